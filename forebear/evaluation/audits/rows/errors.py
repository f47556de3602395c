"""``audit errors``: the training rows behind whole groups of mistakes.

Mispredicted test rows are grouped by gold and predicted label, and within those, if asked for, by k-means over their
features. The query vectors of a group are summed and searched once: <sum over q of v_q, r_n>, the rows that support, or
speak against, the wrong prediction of the group as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import DataError, InputError
from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.passages import row_cells, row_passages
from forebear.evaluation.reports.report import Cell, Group, Passage, Report, Table
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage.ann import unit_rows
from forebear.retriever.answers.results import SIDES, Answers
from forebear.retriever.answers.signs import SignCounts, note_of
from forebear.retriever.effects.kinds import effect_meanings
from forebear.retriever.effects.refits import UNSTATED
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.ranking import Ranking
from forebear.retriever.retriever import Retriever
from forebear.retriever.searchers import QUERY_BLOCK_ROWS

SHOWN_GROUPS = 6
HEADS = ("group", "method", "side", "rank", "row", "score", "score a mistake", "effect", "label", "prediction")
SHOWN_ROWS = 3  # mistakes, proponents and opponents of each group


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """Mispredicted test rows.

    Attributes:
        source: Name of the test file.
        rows: Row numbers in that file, ``(q,)``.
        texts: One list a text column.
        labels: Gold class ids, ``(q,)``.
        predictions: Predicted class ids, ``(q,)``.
        features: Features f of the rows, ``(q, h)`` float32.
        n_rows: Number of test rows, right and wrong.
    """

    source: str
    rows: np.ndarray
    texts: list[list[str]]
    labels: np.ndarray
    predictions: np.ndarray
    features: np.ndarray
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class ErrorGroup:
    """Mistakes of one kind.

    Attributes:
        name: Name of the group, such as ``negative -> positive`` or ``negative -> positive, 2``.
        members: Positions among the mistakes, ascending.
    """

    name: str
    members: np.ndarray


def mistakes_of(
    retriever: Retriever,
    source: RowSource,
    *,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Mistakes:
    """Run the model over test rows and keep those that it gets wrong.

    Raises:
        DataError: No prediction is wrong, or the labels are not the model's.
        MismatchError: The rows do not have the index's number of texts.
    """
    retriever.check_texts(source)
    label_ids = retriever.query_labels(source, required=True)
    assert label_ids is not None
    texts: list[list[str]] = [[] for _ in source.text_columns]
    parts: list[tuple[np.ndarray, ...]] = []
    for block in source.blocks(QUERY_BLOCK_ROWS):
        assert block.labels is not None
        gold = label_ids(block.labels, block.start)
        forward = run_forward(retriever.classifier(), block.texts, first_row=block.start)
        wrong = np.flatnonzero(forward.predictions != gold)
        parts.append((block.start + wrong, gold[wrong], forward.predictions[wrong], forward.features[wrong]))
        for column, block_texts in zip(texts, block.texts, strict=True):
            column += [block_texts[i] for i in wrong]
        progress("rows", block.start + len(block), source.n_rows)
    rows, labels, predictions, features = (np.concatenate(values) for values in zip(*parts, strict=True))
    if not len(rows):
        raise DataError(f"{source.name}: all {source.n_rows} rows are predicted right. There is no mistake to explain.")
    return Mistakes(
        source=source.name, rows=rows, texts=texts, labels=labels, predictions=predictions, features=features,
        n_rows=source.n_rows,
    )  # fmt: skip


def check_clusters(n_clusters: int) -> None:
    """Refuse a number of clusters below 1."""
    if n_clusters < 1:
        raise InputError(f"--clusters {n_clusters}: expected at least 1.")


def group_mistakes(mistakes: Mistakes, label_names: tuple[str, ...], n_clusters: int, seed: int) -> list[ErrorGroup]:
    """Mistakes by (gold, predicted) label, and by clusters of unit features within; the largest groups first.

    Args:
        mistakes: The mistakes.
        label_names: Names of the classes, by class id.
        n_clusters: Clusters of each pair of labels, at most as many as different features; 1: no clusters.
        seed: Random seed of k-means.

    Raises:
        InputError: ``n_clusters`` is less than 1.
    """
    check_clusters(n_clusters)
    groups = []
    for gold, predicted in sorted(set(zip(mistakes.labels.tolist(), mistakes.predictions.tolist(), strict=True))):
        members = np.flatnonzero((mistakes.labels == gold) & (mistakes.predictions == predicted))
        name = f"{label_names[gold]} → {label_names[predicted]}"
        clusters = _clusters(unit_rows(mistakes.features[members]), n_clusters, seed)
        for c in range(clusters.max() + 1):
            part = f"{name}, {c + 1}" if clusters.max() else name
            groups.append(ErrorGroup(name=part, members=members[clusters == c]))
    return sorted(groups, key=lambda group: -len(group.members))


def _clusters(features: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Number of each row's cluster, ``(q,)``, clusters being numbered by falling size."""
    n_clusters = min(n_clusters, len(np.unique(features, axis=0)))
    if n_clusters == 1:
        return np.zeros(len(features), np.int64)
    from sklearn.cluster import KMeans

    numbers = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features)
    by_size = np.argsort(-np.bincount(numbers, minlength=n_clusters), kind="stable")
    return np.asarray(np.argsort(by_size)[numbers])


def explain_groups(
    retriever: Retriever, mistakes: Mistakes, groups: list[ErrorGroup], spec: QuerySpec | Question
) -> Answers:
    """The rows at both ends of each group's ranking; the groups are the queries, in their order.

    Raises:
        InputError: A method is not linear in the query.
    """
    numbers = np.empty(len(mistakes.rows), np.int64)
    for i, group in enumerate(groups):
        numbers[group.members] = i
    return retriever.aggregate(mistakes.texts, mistakes.labels, numbers, spec)


def errors_report(
    mistakes: Mistakes,
    groups: list[ErrorGroup],
    answers: Answers,
    retriever: Retriever,
    spec: QuerySpec | Question,
    seed: int,
    command: str,
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    names, index = retriever.label_names, retriever.index
    n_wrong = len(mistakes.rows)
    sizes: list[list[Cell]] = [
        [group.name, len(group.members), len(group.members) / n_wrong, len(group.members) / mistakes.n_rows]
        for group in groups
    ]
    lines: list[list[Cell]] = []
    for i, group in enumerate(groups):
        for method, ends in answers.rankings.items():
            for side, ranking in zip(SIDES, ends, strict=True):
                columns = row_cells(index, ranking.rows[i])
                for j, (row, score) in enumerate(zip(ranking.rows[i], ranking.scores[i], strict=True)):
                    score_a_mistake = float(score) / len(group.members)
                    cells: list[Cell] = [group.name, method, side, j + 1, int(row), float(score), score_a_mistake]
                    cells += [None if ranking.effects is None else float(ranking.effects[i, j])]
                    cells += [names[index.labels[row]], names[index.predictions[row]]]
                    lines.append([*cells, *(column[j] for column in columns.values())])
    question = retriever.resolve(spec)
    signs = SignCounts(question.methods)
    signs.add(answers)
    target = "predicted, wrong" if question.spec.target == "predicted" else question.spec.target
    meanings = effect_meanings(question, of_loss_alone=True)
    ranked = Table(
        "Training rows behind the mistakes",
        [*HEADS, *row_cells(index, np.empty(0, np.int64))],
        lines,
        f"Score: the sum over the group's mistakes; proponents support the {target} label. One search a group."
        + "".join(f" {note}" for note in signs.notes())
        + "".join(f" By {name}, {note}" for name, note in meanings.items() if note),
    )
    largest = groups[0]
    report = Report(
        "Mistakes by group",
        f"{n_wrong:,} of {mistakes.n_rows:,} rows are mispredicted. The largest group, {largest.name}, has "
        f"{len(largest.members):,} of them.",
        (Table("Groups", ["group", "mistakes", "share of mistakes", "share of rows"], sizes), ranked),
        (),
        tuple(_group(mistakes, g, answers, i, retriever) for i, g in enumerate(groups[:SHOWN_GROUPS])),
        provenance(retriever, spec, command, test_rows=mistakes.source, mistakes=n_wrong, seed=seed),
    )
    result = {
        "question": question_record(retriever, spec),
        "n_rows": mistakes.n_rows,
        "n_mistakes": n_wrong,
        "groups": [
            {
                "name": group.name,
                "test_rows": mistakes.rows[group.members],
                "found": {
                    method: {side: _found(ranking, i) for side, ranking in zip(SIDES, ends, strict=True)}
                    for method, ends in answers.rankings.items()
                },
            }
            for i, group in enumerate(groups)
        ],
        "seed": seed,
    }
    return report, result


def _found(ranking: Ranking, number: int) -> dict[str, Any]:
    """One end of a group's ranking, for ``result.json``; effects where the method estimates them."""
    found = {"rows": ranking.rows[number], "scores": ranking.scores[number]}
    if ranking.effects is not None:
        found["effects"] = ranking.effects[number]
    if ranking.effects_together is not None:
        together = ranking.effects_together[number, 0]
        found["effect_together"] = None if np.isnan(together) else together
    return found


def _group(mistakes: Mistakes, group: ErrorGroup, answers: Answers, number: int, retriever: Retriever) -> Group:
    """The first mistakes of a group, and the rows at both ends by the first method."""
    columns = retriever.index.manifest.spec.text_columns
    passages = [
        Passage(
            f"mistake · test row {mistakes.rows[p]}", {c: t[p] for c, t in zip(columns, mistakes.texts, strict=True)}
        )
        for p in group.members[:SHOWN_ROWS]
    ]
    method, ends = next(iter(answers.rankings.items()))
    notes = []
    for side, ranking in zip(SIDES, ends, strict=True):
        rows, scores = ranking.rows[number][:SHOWN_ROWS], ranking.scores[number][:SHOWN_ROWS]
        notes.append(note_of(method, side, scores))
        if ranking.effects_together is not None and ranking.rows.shape[1] > 1:
            together = ranking.effects_together[number, 0]
            stated = UNSTATED if np.isnan(together) else f"effect {together:+.3g}, summed"
            notes.append(f"Without all {ranking.rows.shape[1]} {side}s together: {stated}.")
        headings = [f"{side} · row {row}" for row in rows]
        passages += row_passages(retriever, rows, headings, notes=[f"score {score:.4g}" for score in scores])
    intro = " ".join(note for note in notes if note)
    return Group(f"{group.name}: {len(group.members):,} mistakes, by {method}", passages, intro)
