"""HANS by kind of row: its heuristic, subcase and template, where the rows name them."""

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
        column: Its name.
        values: Those that occur, numbered by first occurrence.
        n_rows: Rows of each.
        n_right: Rows of each that are answered rightly.
        queries: Number of the value of each row that was asked about.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.values: dict[str, int] = {}
        self.n_rows: list[int] = []
        self.n_right: list[int] = []
        self.queries: list[int] = []

    def add(self, rows: pa.Table, right: np.ndarray, asked: np.ndarray) -> None:
        """Count a block of rows: whether each is answered rightly, and whether it is asked about, ``(n,)`` bool."""
        for value, is_right, is_asked in zip(rows.column(self.column).to_pylist(), right, asked, strict=True):
            at = self.values.setdefault(NAMELESS if value is None else str(value), len(self.values))
            if at == len(self.n_rows):
                self.n_rows.append(0)
                self.n_right.append(0)
            self.n_rows[at] += 1
            self.n_right[at] += int(is_right)
            if is_asked:
                self.queries.append(at)


@dataclass(frozen=True)
class Kind:
    """What is found for the rows of one value.

    Attributes:
        n_rows: Rows.
        accuracy: Share of them that is answered rightly.
        n_queries: Rows asked about.
        top_k: Mean overlap of the training rows at their top by method; None without queries.
    """

    n_rows: int
    accuracy: float
    n_queries: int
    top_k: dict[str, float | None]


def kinds(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray) -> dict[str, Kind]:
    """The numbers of each value.

    Args:
        breakdown: The counts.
        methods: Names, ``m``.
        overlap: Mean overlap of the rows at the top for each query, ``(queries, m)``.
    """
    of_query = np.array(breakdown.queries)
    found = {}
    for value, v in breakdown.values.items():
        mine = overlap[of_query == v]
        top = [float(mean) for mean in mine.mean(axis=0)] if len(mine) else [None] * len(methods)
        n_rows = breakdown.n_rows[v]
        found[value] = Kind(n_rows, breakdown.n_right[v] / n_rows, len(mine), dict(zip(methods, top, strict=True)))
    return found


def kind_table(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray, top: int) -> Table:
    """A value a line; arguments are those of `kinds`, and how many rows the top has."""
    found = kinds(breakdown, methods, overlap)
    return Table(
        f"By {breakdown.column}",
        [breakdown.column, "rows", "right", "queries", *methods],
        [[value, kind.n_rows, kind.accuracy, kind.n_queries, *kind.top_k.values()] for value, kind in found.items()],
        "Right: share of the rows answered rightly. Queries: non-entailment rows taken for entailment; by method, the "
        f"mean overlap of their top {top} training rows.",
    )


def kind_numbers(breakdown: Breakdown, methods: Sequence[str], overlap: np.ndarray) -> dict[str, dict[str, object]]:
    """The same for ``result.json``."""
    return {value: asdict(kind) for value, kind in kinds(breakdown, methods, overlap).items()}
