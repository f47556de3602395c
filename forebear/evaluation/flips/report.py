"""The report on flip sets, and the patch: which rows are to be taken out, or get which label."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import provenance
from forebear.evaluation.common.passages import row_cells, row_passages
from forebear.evaluation.flips.flipping import WITHIN, Flips
from forebear.evaluation.flips.search import FlipSet
from forebear.evaluation.reports.csv_cells import as_cell
from forebear.evaluation.reports.report import Cell, Group, Passage, Report, Table
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever

PATCH_NAME = "patch.csv"
SHOWN_SETS, SHOWN_ROWS = 6, 10  # in full on the page
HOW = (
    "At the head: its weights are fitted again, to convergence, without the rows (or with their new labels), held near "
    "the trained ones by the damping (the larger it is, the more rows a flip takes); the encoder stays as it is."
)


def flips_report(
    flips: Flips, retriever: Retriever, question: Question, command: str, retrained_by: str
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``.

    Args:
        flips: The sets.
        retriever: Over the index.
        question: What names curvature and damping.
        command: What repeats the report.
        retrained_by: Name and note of the recipe; empty without retraining.
    """
    names = retriever.label_names
    tables = [] if len(flips.sets) == 1 else [_share_table(flips), _test_row_table(flips, names)]
    tables.append(_row_table(flips, retriever))
    report = Report(
        "Flip sets",
        " ".join(filter(None, (_summary(flips, names), HOW, retrained_by))),
        tables,
        groups=[_group(flips, retriever, i) for i in range(min(SHOWN_SETS, len(flips.sets)))],
        provenance=provenance(
            retriever,
            question,
            command,
            test_rows=f"{flips.queries.source}, {len(flips.queries):,} of them",
            change="rows get another label" if flips.relabels else "rows are taken out",
            limit=f"{flips.limit:,} of {flips.n_rows:,} rows",
            retraining=retrained_by or "of the head alone",
        ),
    )
    return report, {
        "relabel": flips.relabels,
        "limit": flips.limit,
        "n_rows": flips.n_rows,
        "queries": flips.queries.rows,
        "sizes": [None if math.isinf(size) else int(size) for size in flips.sizes],
        "within": {str(k): flips.within(k) for k in WITHIN},
        "sets": [_record(s, effects, names) for s, effects in zip(flips.sets, flips.effects, strict=True)],
        "retrained": [
            {"size": r.size, "flipped": {str(k): share for k, share in r.flipped.items()}, "unclear": r.unclear}
            for r in flips.retrained
        ],
    }


def patch_text(flips: Flips, retriever: Retriever) -> str:
    """The changes of all sets that hold, as CSV: a line for each test row and training row."""
    names = retriever.label_names
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    held = [(int(q), s) for q, s, size in _rows_of(flips) if not math.isinf(size)]
    columns = list(row_cells(retriever.index, np.empty(0, np.int64)))
    writer.writerow(["query", "row", "action", "label", "new_label", *(name.split(": ", 1)[1] for name in columns)])
    for query, flip_set in held:
        cells = row_cells(retriever.index, flip_set.rows)
        for i, (row, label) in enumerate(zip(flip_set.rows.tolist(), flip_set.labels.tolist(), strict=True)):
            new = "" if flip_set.new_labels is None else names[flip_set.new_labels[i]]
            action = "remove" if flip_set.new_labels is None else "relabel"
            line = [query, row, action, names[label], new, *(cells[name][i] for name in columns)]
            writer.writerow(map(as_cell, line))
    return out.getvalue()


def _rows_of(flips: Flips) -> list[tuple[int, FlipSet, float]]:
    return list(zip(flips.queries.rows.tolist(), flips.sets, flips.sizes.tolist(), strict=True))


def _verb(flips: Flips, n: int) -> str:
    rows = f"{n:,} training row{'' if n == 1 else 's'}"
    return f"With other labels for {rows}" if flips.relabels else f"Without {rows}"


def _summary(flips: Flips, names: tuple[str, ...]) -> str:
    if len(flips.sets) > 1:
        sizes, n = flips.sizes, len(flips.sets)
        found = sizes[np.isfinite(sizes)]
        middle = f", half of these by {int(np.median(found)):,} or fewer" if len(found) else ""
        how = "as retrained models say" if flips.retrained else "as the refitted head says"
        depths = [k for k in WITHIN if k <= flips.limit]
        return (
            f"{len(found):,} of {n:,} predictions flip by at most {flips.limit:,} training rows, {how}{middle}; "
            + ", ".join(f"{flips.within(k):,} by at most {k}" for k in depths)
            + "."
        )
    (flip_set,) = flips.sets
    before = f"“{names[flip_set.before]}” ({flip_set.probability_before:.3g})"
    if flips.retrained and not flips.retrained[0].flipped:
        return (
            f"Trained on unchanged rows, no seed (of {flips.retrained[0].unclear}) predicts {before} as the model "
            "does, so that there is nothing to flip. Give other seeds, or leave retraining out."
        )
    if math.isinf(flips.sizes[0]):
        return f"No flip of {before} was found by at most {flips.limit:,} of {flips.n_rows:,} training rows."
    if not len(flip_set):
        return f"The model predicts {before} already: no row need be changed."
    share = len(flip_set) / flips.n_rows
    stays = flip_set.after == flip_set.before
    says = f"still predicts {before}" if stays else f"predicts “{names[flip_set.after]}” instead of {before}"
    after = (
        f"{_verb(flips, len(flip_set))} ({share:.1%} of all) the refitted head {says}, to which it then gives "
        f"{flip_set.probability_after:.3g}."
    )
    if not flips.retrained:
        return after
    return f"{after} Retrained, {_seeds(flips, 0)}."


def _seeds(flips: Flips, i: int) -> str:
    retrained = flips.retrained[i]
    if retrained.size is None:
        return "no size that was tried flips most seeds"
    return f"{retrained.flipped[retrained.size]:.0%} of the seeds flip"


def _share_table(flips: Flips) -> Table:
    from scipy.stats import binomtest

    rows: list[list[Cell]] = []
    for k in sorted({*(k for k in WITHIN if k <= flips.limit), flips.limit}):
        n = flips.within(k)
        interval = binomtest(n, len(flips.sets)).proportion_ci(method="wilson")
        rows.append([k, n, n / len(flips.sets), float(interval.low), float(interval.high)])
    return Table(
        "Predictions that few rows flip",
        ["rows at most", "test rows", "share", "95% low", "95% high"],
        rows,
        "Share of the test rows whose prediction flips by so many training rows or fewer; Wilson's interval.",
    )


def _test_row_table(flips: Flips, names: tuple[str, ...]) -> Table:
    heads = ["test row", "prediction", "probability", "rows", "new prediction", "new probability"]
    rows: list[list[Cell]] = []
    for i, (query, s, size) in enumerate(_rows_of(flips)):
        n = None if math.isinf(size) else int(size)
        line: list[Cell] = [query, names[s.before], s.probability_before, n, names[s.after], s.probability_after]
        if flips.retrained:
            line += [None if n is None else flips.retrained[i].flipped[n], flips.retrained[i].unclear]
        rows.append(line)
    if flips.retrained:
        heads += ["seeds that flip", "unclear seeds"]
    return Table(
        "Test rows",
        heads,
        rows,
        "Rows: of the set that holds; none where no set of at most the limit does. New prediction and probability (of "
        "the class predicted before) are the refitted head's, of the last set that was tried where none holds.",
    )


def _row_table(flips: Flips, retriever: Retriever) -> Table:
    names, index = retriever.label_names, retriever.index
    texts = [f"text: {name}" for name in index.manifest.spec.text_columns]
    heads = ["test row", "row", "label", "new label" if flips.relabels else "effect", *texts]
    rows: list[list[Cell]] = []
    for (query, s, size), effects in zip(_rows_of(flips), flips.effects, strict=True):
        if math.isinf(size):
            continue
        cells = row_cells(index, s.rows)
        for j, (row, label) in enumerate(zip(s.rows.tolist(), s.labels.tolist(), strict=True)):
            change: Cell = float(effects[j]) if s.new_labels is None else names[s.new_labels[j]]
            rows.append([query, row, names[label], change, *(cells[name][j] for name in texts)])
    effect = "Effect: predicted rise of the predicted label's loss, in nats, without this row alone. "
    return Table(
        "Training rows of the sets",
        heads,
        rows,
        ("" if flips.relabels else effect)
        + "No set is proven to be the smallest: rows were taken greedily, and put back where the flip stood without.",
    )


def _group(flips: Flips, retriever: Retriever, i: int) -> Group:
    names, flip_set = retriever.label_names, flips.sets[i]
    row = int(flips.queries.rows[i])
    texts = dict(zip(retriever.index.manifest.spec.text_columns, (c[i] for c in flips.queries.texts), strict=True))
    query = Passage(
        f"test row {row}", texts,
        facts={"prediction": names[flip_set.before], "probability": flip_set.probability_before},
    )  # fmt: skip
    if math.isinf(flips.sizes[i]):
        return Group(f"Test row {row}: no flip found", [], query=query)
    shown = slice(0, SHOWN_ROWS)
    heads = [f"{i}. row {number}" for i, number in enumerate(flip_set.rows[shown].tolist(), start=1)]
    new = flip_set.new_labels
    facts = None if new is None else [{"new label": names[label]} for label in new[shown]]
    more = len(flip_set) - SHOWN_ROWS
    n_rows = f"{len(flip_set):,} row{'' if len(flip_set) == 1 else 's'}"
    result = f"flip it to {names[flip_set.after]}" if flip_set.flipped else "flip it, as retrained models say"
    if not len(flip_set):
        n_rows, result = names[flip_set.before], "is predicted already"
    return Group(
        f"Test row {row}: {n_rows} {result}",
        row_passages(retriever, flip_set.rows[shown], heads, facts=facts),
        f"The first {SHOWN_ROWS}; {more:,} more stand in the table." if more > 0 else "",
        query,
    )


def _record(flip_set: FlipSet, effects: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "rows": flip_set.rows,
        "labels": [names[label] for label in flip_set.labels],
        "new_labels": None if flip_set.new_labels is None else [names[label] for label in flip_set.new_labels],
        "effects": effects,
        "before": names[flip_set.before],
        "after": names[flip_set.after],
        "probability_before": flip_set.probability_before,
        "probability_after": flip_set.probability_after,
        "flipped_at_head": flip_set.flipped,
    }
