"""HANS by kind of row: by its heuristic, subcase and template, where the rows have columns of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from forebear.evaluation.reports.report import Table

KINDS = ("heuristic", "subcase", "template")  # columns of HANS
NAMELESS = "(none)"  # the kind of a row whose column is null


class Breakdown:
    """Rows counted by the values of one column.

    Attributes:
        column: Name of the column.
        values: The values that occur, numbered by first occurrence.
        n_rows: Number of rows of each value.
        n_right: Number of rows of each value that are answered rightly.
        queries: For each row that is asked about, the number of its value.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.values: dict[str, int] = {}
        self.n_rows: list[int] = []
        self.n_right: list[int] = []
        self.queries: list[int] = []

    def add(self, rows: pa.Table, right: np.ndarray, is_query: np.ndarray) -> None:
        """Count a block of rows: whether each is answered rightly, and whether it is asked about, ``(n,)`` bool."""
        for value, is_right, asked_about in zip(rows.column(self.column).to_pylist(), right, is_query, strict=True):
            number = self.values.setdefault(NAMELESS if value is None else str(value), len(self.values))
            if number == len(self.n_rows):
                self.n_rows.append(0)
                self.n_right.append(0)
            self.n_rows[number] += 1
            self.n_right[number] += int(is_right)
            if asked_about:
                self.queries.append(number)


@dataclass(frozen=True)
class Kind:
    """Numbers of the rows with one value of a column.

    Attributes:
        n_rows: Number of rows.
        accuracy: Share of the rows that are answered rightly.
        n_queries: Number of rows that are asked about.
        top_k: Mean overlap of the training rows at the top of their rankings, by method; None without queries.
    """

    n_rows: int
    accuracy: float
    n_queries: int
    top_k: dict[str, float | None]


def kinds(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray) -> dict[str, Kind]:
    """The numbers of each value of a column, by value.

    Args:
        breakdown: Counts of the column.
        methods: Names of the methods, ``m``.
        overlap: Mean overlap of the rows at the top for each query, ``(queries, m)``.
    """
    of_query = np.array(breakdown.queries)
    kinds_by_value = {}
    for value, number in breakdown.values.items():
        query_overlaps = overlap[of_query == number]
        top = [float(mean) for mean in query_overlaps.mean(axis=0)] if len(query_overlaps) else [None] * len(methods)
        n_rows = breakdown.n_rows[number]
        kinds_by_value[value] = Kind(
            n_rows, breakdown.n_right[number] / n_rows, len(query_overlaps), dict(zip(methods, top, strict=True))
        )
    return kinds_by_value


def kind_table(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray, top: int) -> Table:
    """A table with a line for each value; arguments as for `kinds`, and ``top``, the number of rows in a top."""
    kinds_by_value = kinds(breakdown, methods, overlap)
    return Table(
        f"By {breakdown.column}",
        [breakdown.column, "rows", "right", "queries", *methods],
        [
            [value, kind.n_rows, kind.accuracy, kind.n_queries, *kind.top_k.values()]
            for value, kind in kinds_by_value.items()
        ],
        "Right: share of the rows answered rightly. Queries: non-entailment rows taken for entailment; by method, the "
        f"mean overlap of their top {top} training rows.",
    )


def kind_numbers(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray) -> dict[str, dict[str, object]]:
    """The numbers of `kinds` for ``result.json``."""
    return {value: asdict(kind) for value, kind in kinds(breakdown, methods, overlap).items()}
