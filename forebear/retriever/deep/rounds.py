"""Exact scores of candidates by falling reach, in rounds, until no other candidate can be among the best.

A candidate's reach is its estimate plus the error that calibration allows. Scoring stops at an end when the k-th best
score is above the reach of every candidate left. Candidates without a reach are scored all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.curvature.convergence import Convergence
from forebear.retriever.deep.candidates import Listed
from forebear.retriever.question.methods import Method
from forebear.retriever.ranking import Ends, Ranking, rank

FIRST_ROUND = 32  # candidates of each end, or twice as many as are asked for
GROWTH = 4  # of the number that is scored after each further round, at most
# Exact scores of rows ``(q, m)`` by method name, of these methods, and how far H^-1 came where it was iterated.
Score = Callable[[Sequence[Method], dict[str, np.ndarray]], tuple[dict[str, np.ndarray], Convergence | None]]


@dataclass
class _Scored:
    """One end's candidates of each test row, of which the first ``n`` ``(q,)`` have scores ``(q, m)``."""

    listed: Listed
    sign: float
    scores: np.ndarray
    n: np.ndarray

    @classmethod
    def of(cls, listed: Listed, sign: float) -> _Scored:
        shape = listed.rows.shape
        return cls(listed, sign, np.full(shape, np.nan), np.zeros(shape[0], np.int64))

    def until(self, k: int) -> np.ndarray:
        """How many of each test row's candidates are to be scored after the next round, ``(q,)``."""
        m = self.scores.shape[1]
        if self.listed.reach is None:
            return np.full(len(self.n), m)
        if not self.n.any():
            return np.full(len(self.n), min(m, max(FIRST_ROUND, 2 * k)))
        known = np.sort(np.where(np.isnan(self.scores), -np.inf, self.sign * self.scores), axis=1)
        edges = known[:, -k] if k <= m else np.full(len(known), -np.inf)
        n_open = (self.listed.reach >= edges[:, None]).sum(axis=1)
        return np.asarray(np.maximum(self.n, np.minimum(n_open, GROWTH * self.n)))


def rank_candidates(
    score: Score, methods: Sequence[Method], listed: dict[str, tuple[Listed, Listed]], k: int
) -> dict[str, Ends]:
    """Both ends by the exact scores of as many candidates as it takes.

    Args:
        score: Scores rows of the test rows at hand.
        methods: Methods.
        listed: Candidates of both ends, by method name.
        k: Results at each end.
    """
    ends = {
        name: tuple(_Scored.of(of_end, sign) for of_end, sign in zip(both, (1.0, -1.0), strict=True))
        for name, both in listed.items()
    }
    convergences: dict[str, Convergence | None] = {}
    while True:
        rounds = {name: [(end, end.n, end.until(k)) for end in both] for name, both in ends.items()}
        left = [m for m in methods if any((until > n).any() for _, n, until in rounds[m.name])]
        if not left:
            break
        asked = {method.name: _of_round(rounds[method.name]) for method in left}
        scores, convergence = score(left, {name: rows for name, (rows, _) in asked.items()})
        for method in left:
            convergences.setdefault(method.name, convergence if method.query == "preconditioned" else None)
            _put(rounds[method.name], scores[method.name], asked[method.name][1])
    return {m.name: _both_ends(ends[m.name], k, convergences[m.name]) for m in methods}


_Round = list[tuple[_Scored, np.ndarray, np.ndarray]]  # of both ends: from which candidate, and up to which


def _of_round(of_round: _Round) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows that a round scores, ``(q, m)``, and their places in the lists of each end, ``(q, m)`` bool of each list.

    A test row with fewer than others has one of its own rows again, or else one of the others'.
    """
    masks, parts = [], []
    for end, start, stop in of_round:
        places = np.arange(end.scores.shape[1])
        masks.append((places >= start[:, None]) & (places < stop[:, None]))
        parts.append([rows[mask] for rows, mask in zip(end.listed.rows, masks[-1], strict=True)])
    rows_of_queries = [np.concatenate(of_both) for of_both in zip(*parts, strict=True)]
    some = next(rows[0] for rows in rows_of_queries if len(rows))
    out = np.empty((len(rows_of_queries), max(map(len, rows_of_queries))), np.int64)
    for filled, rows in zip(out, rows_of_queries, strict=True):
        filled[: len(rows)] = rows
        filled[len(rows) :] = rows[0] if len(rows) else some
    return out, masks


def _put(of_round: _Round, scores: np.ndarray, masks: list[np.ndarray]) -> None:
    """Take in the scores of a round, ``(q, m)``."""
    (high, _, _), (low, _, _) = of_round
    for q, of_query in enumerate(scores):
        n_high, n_low = int(masks[0][q].sum()), int(masks[1][q].sum())
        high.scores[q, masks[0][q]] = of_query[:n_high]
        low.scores[q, masks[1][q]] = of_query[n_high : n_high + n_low]
    for end, _, stop in of_round:
        end.n = stop


def _both_ends(both: tuple[_Scored, ...], k: int, convergence: Convergence | None) -> Ends:
    """Rank the candidates of both ends together; one that was listed at both counts once, one without a score never."""
    rows = np.concatenate([end.listed.rows for end in both], axis=1)
    scores = np.concatenate([end.scores for end in both], axis=1)
    order = np.lexsort((np.isnan(scores), rows), axis=1)
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    dropped = np.isnan(scores)
    dropped[:, 1:] |= rows[:, 1:] == rows[:, :-1]
    n_scored = (~dropped).sum(axis=1)
    ends = []
    for largest in (True, False):
        kept = np.where(dropped, -np.inf if largest else np.inf, scores)
        ends.append(Ranking(*rank(kept, rows, k, largest=largest), True, n_scored, convergence=convergence))
    return ends[0], ends[1]
