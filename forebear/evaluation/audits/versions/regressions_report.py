"""The page, the numbers and the work list of ``audit regressions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from forebear.evaluation.audits.versions.regressions import (
    IMPROVED,
    KEPT,
    REGRESSED,
    Cause,
    Predicted,
    Regressions,
    WordCounts,
    supporting,
    words_apart,
)
from forebear.evaluation.audits.versions.row_changes import KINDS, NO_ROW, RELABELLED
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_columns, row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import mean_of, paired_difference
from forebear.evaluation.reports.report import Cell, Group, Passage, Report, Table
from forebear.evaluation.worklists.items import WorkList
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.index import Index

SHOWN_CAUSES = 6
SHOWN_ROWS = 3  # test rows and training rows of each cause
_SAID = {
    REGRESSED: "right before, wrong now",
    IMPROVED: "wrong before, right now",
    KEPT: "right before and now (sample)",
}


def mcnemar(predicted: Predicted) -> float:
    """Two-sided exact p of McNemar's test that as many rows regress as improve."""
    from scipy.stats import binomtest

    n = len(predicted.regressed) + len(predicted.improved)
    return float(binomtest(len(predicted.regressed), n).pvalue) if n else 1.0


def regressions_report(
    found: Regressions, asked: Inputs, before: Index, n_listed: int
) -> tuple[tuple[Report, dict[str, Any]], WorkList]:
    """The report and the numbers for ``result.json``; and the changed rows behind the regressions, to be decided on.

    Args:
        found: What changed.
        asked: The later version's index, the question and the test rows.
        before: The index of the version before.
        n_listed: Rows on each list.
    """
    index, predicted, changes = asked.retriever.index, found.predicted, found.changes
    difference = paired_difference(
        (predicted.after == predicted.gold).astype(float),
        (predicted.before == predicted.gold).astype(float),
        asked.seed,
    )
    ranked, words = found.ranked(REGRESSED)[:n_listed], _words(found, asked.queries)
    tables = [
        _rows_table(found, index, ranked, REGRESSED, asked),
        _causes_table(found, words, asked),
        _test_rows_table(found, asked),
        _kinds_table(found),
        _shares_table(found, asked.seed),
        _rows_table(found, index, found.ranked(IMPROVED)[:n_listed], IMPROVED, asked),
    ]
    n, p = len(predicted.gold), mcnemar(predicted)
    interval = "" if difference.low is None else f", 95% interval {difference.low:+.4f} to {difference.high:+.4f}"
    rows = changes.of_changed.rows
    first = "No changed row drives them" if not len(ranked) else f"Row {rows[ranked[0]]} is first among them"
    report = Report(
        "Regressions between two versions",
        f"{len(predicted.regressed):,} of {n:,} test rows were right and are wrong, {len(predicted.improved):,} were "
        f"wrong and are right: accuracy changed by {difference.mean:+.4f}{interval}, McNemar's p {p:.2g}. "
        f"{int(changes.changed.sum()):,} of {len(changes.rows):,} training rows are new, copied or labelled otherwise. "
        f"{first}.",
        tables,
        (),
        tuple(
            _cause_group(found, cause, frozenset(words[REGRESSED][i]), asked, i)
            for i, cause in enumerate(found.causes[REGRESSED][:SHOWN_CAUSES])
        ),
        asked.provenance(before=str(before.folder), before_digest=before.manifest.digest()),
    )
    result = {
        **asked.record(),
        "before": before.manifest.digest(),
        "n_rows": n,
        "accuracy": {"difference": difference.mean, "low": difference.low, "high": difference.high, "p": p},
        "training_rows": {kind: int(changes.of_kind(kind).sum()) for kind in KINDS},
        "dropped": changes.dropped,
        "found": {
            kind: {
                "test_rows": asked.queries.rows[getattr(predicted, kind)],
                "rows": rows[found.ranked(kind)],
                "scores": found.scores[kind][found.ranked(kind)],
                "causes": [
                    {**_labels(cause, asked), "test_rows": asked.queries.rows[cause.members]}
                    for cause in found.causes[kind]
                ],
                "changed_share": found.shares[kind],
            }
            for kind in (REGRESSED, IMPROVED)
        },
        "changed_share_kept": found.shares[KEPT],
    }
    return (report, result), _work_list(found, index, before, ranked, asked)


def _labels(cause: Cause, asked: Inputs) -> dict[str, str]:
    names = asked.retriever.label_names
    return {"gold": names[cause.gold], "before": names[cause.before], "now": names[cause.after]}


def _first_cause(found: Regressions, kind: str, position: int) -> tuple[int, Cause]:
    """The cause that a row adds most to, with its number from 1."""
    causes = found.causes[kind]
    number = int(np.argmax([cause.scores[position] for cause in causes]))
    return number + 1, causes[number]


def _rows_table(found: Regressions, index: Index, ranked: np.ndarray, kind: str, asked: Inputs) -> Table:
    changes = found.changes.of_changed
    rows = changes.rows[ranked]
    texts = {f"text: {name}": column.to_pylist() for name, column in index.texts(rows).items()}
    columns = row_columns(index, rows)
    labels, total = index.label_texts(rows), float(np.abs(found.scores[kind]).sum())
    lines: list[list[Cell]] = []
    for i, position in enumerate(ranked.tolist()):
        number, _ = _first_cause(found, kind, position)
        score, matched = float(found.scores[kind][position]), int(changes.before[position])
        cells: list[Cell] = [
            i + 1,
            int(rows[i]),
            KINDS[changes.kinds[position]],
            labels[i],
            score,
            score / total,
            number,
        ]
        lines.append([*cells, None if matched == NO_ROW else matched, *(c[i] for c in (texts | columns).values())])
    method, label_names = asked.question.methods[0].name, asked.retriever.label_names
    alone = sorted({cause.after for cause in found.causes[kind]} - found.compared)
    nothing = f" No row of {', '.join(label_names[k] for k in alone)} stayed right: nothing is taken off there."
    return Table(
        f"Changed training rows behind the rows that {kind}",
        ["rank", "row", "change", "label", "score", "share", "cause", "row before", *texts, *columns],
        lines,
        f"New, copied or relabelled rows by {method}, summed over the {len(getattr(found.predicted, kind)):,} test "
        f"rows ({_SAID[kind]}), less what is expected by rows of the same prediction that stayed right."
        f"{nothing if alone else ''} Share: of the changed rows' absolute scores. Cause: the group of test rows that "
        "the row adds most to.",
    )


def _causes_table(found: Regressions, words: Mapping[str, list[list[str]]], asked: Inputs) -> Table:
    changed = found.changes.of_changed.rows
    lines: list[list[Cell]] = []
    for kind in (REGRESSED, IMPROVED):
        for number, cause in enumerate(found.causes[kind], 1):
            names = _labels(cause, asked)
            top = changed[supporting(cause.scores)[:SHOWN_ROWS]]
            lines.append([
                kind, number, names["gold"], names["before"], names["now"], len(cause.members),
                ", ".join(words[kind][number - 1]) or None, ", ".join(map(str, top)) or None,
            ])  # fmt: skip
    return Table(
        "Causes",
        ["kind", "cause", "gold", "before", "now", "test rows", "words", "changed rows behind"],
        lines,
        "Test rows of one kind of change whose scores of the changed rows have a mean cosine of .5 or more. Words: "
        "more frequent in them than in the other test rows, z above 3.",
    )


def _words(found: Regressions, queries: QueryRows) -> dict[str, list[list[str]]]:
    """Words of each cause that the other test rows lack, by kind of change, in the order of the causes."""
    every = WordCounts.of(queries.texts)
    own = {k: [WordCounts.of(queries.take(cause.members).texts) for cause in of] for k, of in found.causes.items()}
    return {kind: [words_apart(one, every.without(one)) for one in counts] for kind, counts in own.items()}


def _test_rows_table(found: Regressions, asked: Inputs) -> Table:
    queries = asked.queries
    lines: list[list[Cell]] = []
    for number, cause in enumerate(found.causes[REGRESSED], 1):
        names = _labels(cause, asked)
        for position in cause.members.tolist():
            texts = [column[position] for column in queries.texts]
            lines.append([number, int(queries.rows[position]), names["gold"], names["now"], *texts])
    columns = [f"text: {name}" for name in asked.retriever.index.manifest.spec.text_columns]
    return Table("Test rows that regressed", ["cause", "test row", "gold", "now", *columns], lines)


def _kinds_table(found: Regressions) -> Table:
    changes = found.changes
    lines: list[list[Cell]] = []
    for kind in KINDS:
        of_kind = changes.of_kind(kind)
        lines.append([kind, int(of_kind.sum()), float(of_kind.mean())])
    lines.append(["dropped", len(changes.dropped), None])
    return Table(
        "Training rows beside those of the version before",
        ["change", "rows", "share of rows"],
        lines,
        "Matched by texts and label. Copy: the texts were there, but fewer times. Dropped: rows of the version before "
        "that are gone.",
    )


def _shares_table(found: Regressions, seed: int) -> Table:
    lines: list[list[Cell]] = []
    for kind, said in _SAID.items():
        if len(values := found.shares[kind]):
            mean = mean_of(values, seed)
            lines.append([said, mean.n, mean.mean, mean.low, mean.high])
    rows = float(found.changes.changed.mean())
    return Table(
        "Share of the changed rows in the scores of all training rows",
        ["test rows", "n", "mean share", "95% low", "95% high"],
        lines,
        f"Of the absolute scores of each test row's prediction. The changed rows are {rows:.1%} of all. Where the "
        "share is no larger for rows that regressed than for those that stayed right, retraining itself may be the "
        "cause.",
    )


def _cause_group(found: Regressions, cause: Cause, words: frozenset[str], asked: Inputs, number: int) -> Group:
    """Some test rows of a cause, and the changed rows behind it."""
    names, queries = _labels(cause, asked), asked.queries
    columns = asked.retriever.index.manifest.spec.text_columns
    passages = [
        Passage(
            f"test row {queries.rows[p]}",
            {c: t[p] for c, t in zip(columns, queries.texts, strict=True)},
            words,
            {"gold": names["gold"], "before": names["before"], "now": names["now"]},
        )
        for p in cause.members[:SHOWN_ROWS]
    ]
    behind, changes = supporting(cause.scores)[:SHOWN_ROWS], found.changes.of_changed
    rows = changes.rows[behind]
    passages += row_passages(
        asked.retriever, rows, [f"training row {row}" for row in rows],
        highlighted=[words] * len(rows),
        notes=[f"{KINDS[changes.kinds[p]]}, score {cause.scores[p]:.4g}" for p in behind],
    )  # fmt: skip
    title = f"{number + 1}. {names['gold']}, now {names['now']}: {len(cause.members):,} test rows"
    return Group(title, passages, f"Words: {', '.join(sorted(words))}." if words else "")


def _work_list(found: Regressions, index: Index, before: Index, ranked: np.ndarray, asked: Inputs) -> WorkList:
    """The ranked rows; of those that were relabelled the label before is suggested."""
    changes, reasons, suggested = found.changes.of_changed, [], []
    old = changes.before[ranked]
    old_labels = dict(zip(old[old != NO_ROW].tolist(), before.label_texts(old[old != NO_ROW]), strict=True))
    for position in ranked.tolist():
        number, cause = _first_cause(found, REGRESSED, position)
        names, kind = _labels(cause, asked), KINDS[changes.kinds[position]]
        reasons.append(
            f"This row ({kind} since the version before) supports {names['now']} where {names['gold']} was right: "
            f"cause {number}, {len(cause.members):,} test rows."
        )
        suggested.append(old_labels[int(changes.before[position])] if kind == RELABELLED else None)
    evidence = {"score": found.scores[REGRESSED][ranked]}
    return list_rows(index, changes.rows[ranked], reasons, suggested=suggested, evidence=evidence)
