"""Conformal risk control: the share of rows whose candidates keep a recall, in expectation, for the next query.

Angelopoulos, Bates, Fisch, Lei and Schuster, *Conformal Risk Control* (ICLR 2024, arXiv 2208.02814). With the loss
1 - recall, which is at most 1 and falls as the share s grows, their theorem 1 reads: of G queries that are exchangeable
with the next one, take the smallest s for which

    (1 / (G + 1)) * sum over the queries g of recall_g(s)  >=  r.

Then the next query's recall is at least r in expectation, over the G queries and the next one. The "+ 1" stands for
the next query, whose recall may be 0: so G queries support a recall of at most G / (G + 1).

A query's best rows tend to be found or missed together, so a query counts once, however many of its rows are looked at.
"""

from __future__ import annotations

import numpy as np

_ROUNDING = 1e-9  # rounding error of a sum of shares


def supported_recall(n_queries: int) -> float:
    """The largest recall that so many queries support: G / (G + 1)."""
    return n_queries / (n_queries + 1)


def least_share(needed: np.ndarray, recall: float) -> float | None:
    """The smallest share of all rows that keeps a recall for the next query.

    Args:
        needed: For each query and each of its best rows, the share of all rows that must be candidates for that row to
            be among them, ``(g, k)``.
        recall: Recall that the next query should have in expectation, in (0, 1].

    Returns:
        The share; None where the queries do not support the recall, whatever the share.
    """
    n_queries, n_best = needed.shape
    if recall > supported_recall(n_queries) + _ROUNDING:
        return None
    n_found = int(np.ceil((recall * (n_queries + 1) - _ROUNDING) * n_best))
    return float(np.sort(needed, axis=None)[min(max(n_found, 1), needed.size) - 1])
