"""Scores summed over groups of training rows: which source, which annotator, which label is behind a prediction.

A sum over dot products (``gd``, ``if``, ``tracin``) is the influence of the group, to first order. A sum over cosines
(``gc``, ``rif``) is none: it says how many rows of the group point the way of the query, and how well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from forebear.errors import InputError, NonFiniteError
from forebear.indexer.index import Index
from forebear.indexer.rows.files.reader import listed
from forebear.indexer.rows.row_format import REGRESSION
from forebear.indexer.rows.user_columns import only_match
from forebear.ratio import ratio
from forebear.retriever.answers.results import target_texts, user_columns
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.listed import GroupEffects
from forebear.retriever.question.spec import Question

LABEL = "label"


@dataclass(frozen=True, eq=False)
class Grouping:
    """The live rows of an index, parted by the values of a column.

    Attributes:
        column: The column.
        numbers: Group of each live row, in the order of ``index.live``, ``(n,)``; every group from 0 to m - 1 has rows.
        values: The value of each group, ``(m,)``; null for the rows without one.
        live: Numbers of the live rows, ``(n,)``.
    """

    column: str
    numbers: np.ndarray
    values: pa.Array
    live: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, number: int) -> np.ndarray:
        """Numbers of the rows of a group, ascending."""
        return np.asarray(self.live[self.numbers == number])

    @property
    def names(self) -> list[str]:
        """The values as text; ``null`` for the rows without one."""
        return ["null" if value is None else str(value) for value in self.values.to_pylist()]


def grouping_of(index: Index, name: str, option: str = "--group-by") -> Grouping:
    """Part the live rows by the values of a kept column, or by their gold labels.

    Args:
        index: The index.
        name: ``label``; or a column, by its name in the training file or in results.
        option: The option that names it.

    Raises:
        InputError: The index keeps no such column.
    """
    if name == LABEL:
        if index.loss.problem_type == REGRESSION:
            raise InputError(f"{option} {LABEL}: the targets of {index.folder} are numbers (regression), no groups.")
        column, labels = LABEL, index.labels[index.live]
        values, numbers = pa.array(index.manifest.spec.label_names), labels.astype(np.int64)
        if labels.ndim > 1:  # a group for each set of labels
            names, numbers = np.unique(index.label_texts(index.live), return_inverse=True)
            values = pa.array(names.tolist())
    else:
        shown = user_columns(index)
        column = only_match(shown, name) or next((own for own, of in shown.items() if of == name), "")
        if not column:
            kept = f"it keeps {listed(shown)}" if shown else "it keeps none besides texts and labels"
            raise InputError(f"{option} {name}: {index.folder} keeps no such column; {kept}. Or group by label.")
        whole = index.row_columns.whole(column)
        encoded = whole if pa.types.is_dictionary(whole.type) else whole.dictionary_encode()
        values = encoded.dictionary
        numbers = encoded.indices.cast(pa.int64()).fill_null(len(values)).to_numpy(zero_copy_only=False)[index.live]
    occurring, numbers = np.unique(numbers, return_inverse=True)
    return Grouping(column, numbers, values.take(pa.array(occurring, mask=occurring == len(values))), index.live)


def check_additive(question: Question) -> None:
    """Refuse methods whose scores mean nothing when they are summed over rows.

    Raises:
        InputError: A method scores spans or a word's saliency, or is a distance.
    """
    for method in question.methods:
        if not method.scores_rows:
            raise InputError(f"--group-by sums a score of every row; {method.name} scores spans, or asks of a word.")
        if method.metric == "euc":
            raise InputError(
                f"--group-by sums scores; {method.name} is minus a distance, and a sum of those counts rows. Give gd, "
                "if or gc."
            )


@dataclass(frozen=True, eq=False)
class GroupScores:
    """One method's scores, by group.

    Attributes:
        sums: Sum of each group's scores, ``(q, m)``.
        shares: Share of the sum of all rows' absolute scores that the group's rows have, ``(q, m)``; 0 where all are 0.
        rows: Rows of each group, ``(m,)``.
        best_rows: The row that adds most to the sum, in the sum's own direction, ``(q, m)``; ties: the lowest number.
        best_scores: Its score, ``(q, m)``.
    """

    sums: np.ndarray
    shares: np.ndarray
    rows: np.ndarray
    best_rows: np.ndarray
    best_scores: np.ndarray


def group_scores(scores: np.ndarray, grouping: Grouping) -> GroupScores:
    """Sum scores over groups.

    Args:
        scores: Of all live rows, ``(q, n)``.
        grouping: Of the same rows.

    Raises:
        NonFiniteError: A score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        query, position = np.argwhere(~np.isfinite(scores))[0]
        raise NonFiniteError(
            f"the score of training row {grouping.live[position]} for query {query} is NaN or infinite."
        )
    numbers, m = grouping.numbers, len(grouping)
    sums, sizes = (np.stack([np.bincount(numbers, one, m) for one in part]) for part in (scores, np.abs(scores)))
    signed = np.where(np.take_along_axis(sums, np.tile(numbers, (len(scores), 1)), 1) >= 0, scores, -scores)
    starts = np.searchsorted(np.sort(numbers), np.arange(m))
    best = np.stack([np.lexsort((-one, numbers))[starts] for one in signed])  # lexsort is stable: the lowest row
    return GroupScores(
        sums=sums,
        shares=ratio(sizes, sizes.sum(axis=1, keepdims=True), 0.0),
        rows=np.bincount(numbers, minlength=m),
        best_rows=grouping.live[best],
        best_scores=np.take_along_axis(scores, best, 1),
    )


def group_table(
    grouping: Grouping,
    scores: Mapping[str, np.ndarray],
    top: int,
    start: int,
    classes: Sequence[np.ndarray],
    index: Index,
    effects: GroupEffects,
    predictions: Sequence[Predictions],
) -> pa.Table:
    """One line a query, method and group, by falling sum: the ``top`` groups of highest sum, and as many of lowest.

    Args:
        grouping: The groups.
        scores: Of all live rows by method, ``(q, n)`` each.
        top: Groups at each end.
        start: Number of the first query.
        classes: Of the queries: gold, predicted, and that whose loss was explained; class ids ``(q,)``, below 0 where
            there is none, or numbers ``(q, c)``.
        index: The index, which has their names.
        effects: Effects of the groups, of the methods that estimate them.
        predictions: The test rows of each query.
    """
    m, n_queries = len(grouping), len(classes[0])
    places = np.arange(m) if m <= 2 * top else np.r_[np.arange(top), np.arange(m - top, m)]
    found = {name: group_scores(values, grouping) for name, values in scores.items()}
    with_effects = any(effects.estimates(name) for name in found)
    lines = [
        _lines(grouping, name, found[name], query, places, (effects, predictions[query]) if with_effects else None)
        for query in range(n_queries)
        for name in found
    ]
    of_groups = pa.concat_tables(lines)
    queries = np.repeat(np.arange(n_queries), len(found) * len(places))
    columns = {"query": pa.array(start + queries)}
    for name, targets in zip(("query_label", "query_prediction", "target"), classes, strict=True):
        columns[name] = target_texts(index, targets, queries)
    return pa.table(columns | dict(zip(of_groups.column_names, of_groups.columns, strict=True)))


def _lines(
    grouping: Grouping,
    method: str,
    found: GroupScores,
    query: int,
    places: np.ndarray,
    estimates: tuple[GroupEffects, Predictions] | None,
) -> pa.Table:
    """The groups at some places of one query's ranking by one method."""
    chosen = np.argsort(-found.sums[query], kind="stable")[places]
    sums, rows = found.sums[query, chosen], found.rows[chosen]
    columns = {
        "method": pa.array([method] * len(chosen)),
        "rank": pa.array((places + 1).astype(np.int32)),
        "group": grouping.values.take(pa.array(chosen)),
        "rows": pa.array(rows),
        "sum": pa.array(sums),
        "mean": pa.array(sums / rows),
        "share": pa.array(found.shares[query, chosen]),
    }
    if estimates is not None:
        effects, predictions = estimates
        values = (np.full(len(chosen), np.nan),) * 2
        if effects.estimates(method):
            values = effects.of(method, predictions, sums, chosen)
        names = ("effect", "effect_probability")
        columns |= {name: pa.array(one, from_pandas=True) for name, one in zip(names, values, strict=True)}
    columns["best_row"] = pa.array(found.best_rows[query, chosen])
    columns["best_score"] = pa.array(found.best_scores[query, chosen])
    return pa.table(columns)
