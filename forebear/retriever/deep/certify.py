"""Proving a top k from stored residual lengths: no row that was not scored can be in it.

The stored coordinates are a linear image of the gradient. Along orthonormal directions they are y = T x, and with r the
length of what is outside of those directions,

    |<g_q, g_n> - <y_q, y_n>| <= r_q r_n + (rounding of the stored vector),

for cosines divided by both norms. Rows are scored exactly by falling upper bound until the k-th score clears all
bounds that are left. The proof holds for the scores that the model computes in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forebear.indexer.sketches.candidates import BLOCK_ROWS
from forebear.indexer.sketches.estimates import FLOAT32, Part
from forebear.ratio import ratio
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.methods import Method
from forebear.retriever.ranking import Ends, Ranking, rank

_ROUND_ROWS = 256  # rows scored in a round, at least
_CANCELLED = 1e-3  # as a share of the norm: what float32 leaves of sqrt(norm^2 - held^2) where the result should be 0
_UNBOUNDED = 1e30  # times that a norm is longer than its least, where that is 0
_FLOAT16 = 1e-3  # rounding of a stored unit vector's direction


def certify(search: GradientSearch, method: Method, queries: Queries, candidate_ends: Ends, *, max_rows: int) -> Ends:
    """Prove both ends of a ranking, scoring as many more rows as it takes.

    Args:
        search: Search over the scope.
        method: Method whose ranking is proven.
        queries: Test rows whose whole gradients fit in memory together.
        candidate_ends: Both ends as the candidates give them, ``k`` results each.
        max_rows: Largest number of rows to score exactly for a block of queries. Queries whose proof needs more stay
            unproven.

    Returns:
        Both ends, with ``proven`` and the number of rows scored.
    """
    live = search.index.live
    k = candidate_ends[0].rows.shape[1]
    centre, slack = bounds(search.candidates.parts([method], queries)[method.name], live, cosine=method.metric == "cos")
    scores = np.full(centre.shape, np.nan)
    column = {int(row): i for i, row in enumerate(live)}

    def score(columns: np.ndarray) -> None:
        exact, _ = search.score([method], queries, {method.name: live[columns]})
        scores[:, columns] = exact[method.name]

    score(np.unique([column[int(row)] for end in candidate_ends for row in end.rows.reshape(-1)]))
    while True:
        wanted, open_queries = _to_score(scores, centre, slack, k)
        n_known = int((~np.isnan(scores[0])).sum())
        if not len(wanted) or n_known >= max_rows:
            break
        score(wanted[: max(1, max_rows - n_known)])
    n_scored = np.full(len(scores), n_known)
    ends = []
    for side, largest in enumerate((True, False)):
        filled = np.where(np.isnan(scores), -np.inf if largest else np.inf, scores)
        rows, values = rank(filled, live, k, largest=largest)
        ends.append(Ranking(rows, values, True, n_scored, proven=~open_queries[side]))
    return ends[0], ends[1]


def _to_score(scores: np.ndarray, centre: np.ndarray, slack: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns to score next, largest bounds first, and a mask of the unproven queries at each end, ``(2, q)`` bool."""
    unknown = np.isnan(scores)
    wanted: dict[int, float] = {}
    is_open = np.zeros((2, len(scores)), bool)
    for side, sign in enumerate((1.0, -1.0)):
        for q in range(len(scores)):
            known = np.sort(sign * scores[q, ~unknown[q]])
            edge = known[-k] if len(known) >= k else -np.inf
            upper = sign * centre[q] + slack[q]
            left = np.flatnonzero(
                unknown[q] & (upper >= edge - FLOAT32 * abs(edge) if np.isfinite(edge) else unknown[q])
            )
            is_open[side, q] = len(left) > 0
            best = left[np.argsort(-upper[left], kind="stable")[: max(_ROUND_ROWS, len(left) // 4)]]
            for c in best:
                wanted[int(c)] = max(wanted.get(int(c), -np.inf), float(upper[c] - edge))
    order = sorted(wanted, key=lambda c: -wanted[c])
    return np.array(order, np.int64), is_open


def bounds(parts: Sequence[Part], live: np.ndarray, *, cosine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half-width of the interval that holds each exact score.

    Args:
        parts: Sketches of the queries and of the rows, one part a checkpoint.
        live: Row numbers, ``(n,)``.
        cosine: Whether the scores are cosines rather than dots.

    Returns:
        Centres and half-widths, ``(q, n)`` float64 each.
    """
    q = len(parts[0].queries.lengths)
    centre, slack = np.zeros((q, len(live))), np.zeros((q, len(live)))
    for part in parts:
        store, query_sketches = part.store, part.queries
        t = store.reduction.orthonormaliser
        stretch = float(np.linalg.norm(t, 2))
        query_vectors = (query_sketches.coordinates.astype(np.float64) @ t.T) * query_sketches.lengths[:, None]
        query_residuals = query_sketches.residual_lengths(store.reduction)
        query_lengths = np.linalg.norm(query_vectors, axis=1)
        for start in range(0, len(live), BLOCK_ROWS):
            rows = live[start : start + BLOCK_ROWS]
            lengths = store.lengths[rows].astype(np.float64)
            y = (store.coordinates(rows).astype(np.float64) @ t.T) * lengths[:, None]
            rounding = _FLOAT16 * stretch * store.shares[rows].astype(np.float64) * lengths
            middle = query_vectors @ y.T
            width = np.outer(
                np.hypot(query_residuals, _CANCELLED * query_sketches.norms),
                np.hypot(store.residual_lengths[rows].astype(np.float64), _CANCELLED * store.norms[rows]),
            )
            width += np.outer(query_lengths, rounding)
            if cosine:
                of_both = zip(query_sketches.norms_within(), store.norms_within(rows), strict=True)
                norms, least, most = (np.outer(of_queries, of_rows) for of_queries, of_rows in of_both)
                middle, width = (ratio(x, norms) for x in (middle, width))
                above = np.where(norms > 0, ratio(norms, least, otherwise=_UNBOUNDED), 1.0)
                below = ratio(norms, most, otherwise=1.0)
                width = width * above + np.abs(middle) * np.maximum(above - 1, 1 - below)
            columns = slice(start, start + len(rows))
            centre[:, columns] += part.weight * middle
            slack[:, columns] += part.weight * width
    return centre, slack
