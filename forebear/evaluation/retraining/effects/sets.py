"""Which rows are left out: random ones, shared by all test rows, and those that a method names for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forebear.evaluation.retraining.row_choice import random_rows, rows_at

RANDOM, PROPONENTS, OPPONENTS = "random", "proponents", "opponents"
SINGLE_ROWS = 3  # of each end of a ranking that are left out one by one


@dataclass(frozen=True, eq=False)
class RemovedSet:
    """Rows that are left out together.

    Attributes:
        rows: Their numbers, ascending.
        kind: ``random``, ``proponents`` or ``opponents``.
        setting: Number of the setting (a method at a scope) that names them; None of random rows.
        query: Position of the test row for which they are named; None: all test rows are looked at.
    """

    rows: np.ndarray
    kind: str
    setting: int | None = None
    query: int | None = None


def random_sets(live: np.ndarray, sizes: Sequence[int], n_sets: int, seed: int) -> list[RemovedSet]:
    """``n_sets`` sets of each size."""
    return [RemovedSet(random_rows(live, k, seed, k, i), RANDOM) for k in sizes for i in range(n_sets)]


def named_sets(
    scores: Mapping[int, np.ndarray], live: np.ndarray, sizes: Sequence[int], query: int
) -> list[RemovedSet]:
    """Both ends of each setting's ranking for one test row: of size 1 the first three rows, each alone.

    Args:
        scores: Of the live rows by number of the setting, ``(n,)`` each.
        live: Their numbers.
        sizes: Sizes of the sets.
        query: Position of the test row.
    """
    sets = []
    for setting, values in scores.items():
        for kind, side in ((PROPONENTS, "top"), (OPPONENTS, "bottom")):
            for k in sizes:
                if k > 1:
                    sets.append(RemovedSet(rows_at(values, live, k, side), kind, setting, query))  # type: ignore[arg-type]
                    continue
                order = np.lexsort((live, -values if side == "top" else values))[:SINGLE_ROWS]
                sets += [RemovedSet(live[[place]], kind, setting, query) for place in order]
    return sets
