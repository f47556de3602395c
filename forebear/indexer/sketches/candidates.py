"""Cosines and dot products of gradients estimated from stored sketches, and the candidates that they propose.

Every row is estimated from its coordinates and the one-bit code of the part of its gradient that these do not hold: for
dot products by falling length, stopping where Cauchy-Schwarz shows that no later row's estimate can be among those
wanted; for cosines all rows.

Rows are proposed by the estimate *plus a margin*, a number of the usual errors of their scores. The dot product of a
very long row is large even if its cosine is near zero, and no sketch can tell the sign of such a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from forebear.indexer.model.device.copies import as_tensor
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.sketches.device_scan import propose_on_device
from forebear.indexer.sketches.estimates import RAW_ERROR, Part, Proposal, factors_of, keep_best, residuals

BLOCK_ROWS = 16_384
End = tuple[np.ndarray, np.ndarray]  # rows and their estimates, the best first by estimate and margin, (q, m) each


def estimate(parts: Sequence[Part], rows: np.ndarray, *, cosine: bool, code_weight: float = 0.0) -> np.ndarray:
    """Estimated scores of some rows for every query, ``(q, n)`` float32: cosines, or dot products."""
    out: np.ndarray | None = None
    positions = np.arange(len(parts[0].queries.lengths))
    for part, factor in zip(parts, factors_of(parts, rows, cosine=cosine), strict=True):
        scores = (as_tensor(part.query_coordinates(positions)) @ as_tensor(part.store.coordinates(rows)).T).numpy()
        if code_weight:
            scores += np.float32(code_weight) * part.code_products(positions, rows)
        scores *= factor
        if not cosine:
            scores *= part.queries.lengths[:, None].astype(np.float32)
        out = scores if out is None else out + scores
    assert out is not None
    return out


def propose(
    parts: Sequence[Part], live: np.ndarray, n_candidates: int, proposal: Proposal, memory: DeviceMemory = HOST
) -> tuple[End, End]:
    """The rows most likely to have the largest and the smallest scores, with their estimates.

    Args:
        parts: One part for each checkpoint.
        live: Numbers of the live rows.
        n_candidates: Number of candidates at each end; at most the number of live rows.
        proposal: Kind of score, weight of the code, and margin.
        memory: Where rows are estimated.

    Returns:
        (rows, estimates) of the proponents' end and of the opponents', ``(q, n_candidates)`` each; ties go to the lower
        row number.
    """
    if not memory.on_host:
        return memory.run(lambda: propose_on_device(parts, live, n_candidates, proposal, memory))
    order, reaches = (live, None) if proposal.cosine else _by_falling_reach(parts, live, proposal)
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(order), BLOCK_ROWS):
        if ends and reaches is not None and ends[0][0].shape[1] == n_candidates:
            of_rows, of_queries = reaches
            limit = torch.from_numpy(of_queries * of_rows[start] * (1 + 1e-5))
            if bool((ends[0][0][:, -1] > limit).all()) and bool((ends[1][0][:, -1] < -limit).all()):
                break
        rows = order[start : start + BLOCK_ROWS]
        scores = estimate(parts, rows, cosine=proposal.cosine, code_weight=proposal.code_weight)
        margins = proposal.margin * proposal.units(parts, rows) if proposal.margin else 0.0
        numbers = as_tensor(rows).expand(len(scores), -1)
        ends = [
            keep_best(
                ends[i] if ends else None, as_tensor(scores + sign * margins), numbers, n_candidates, largest=sign > 0
            )
            for i, sign in enumerate((1, -1))
        ]
    high, low = (_in_order(parts, proposal, end, sign) for end, sign in zip(ends, (1, -1), strict=True))
    return high, low


def _by_falling_reach(
    parts: Sequence[Part], live: np.ndarray, proposal: Proposal
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Rows, and numbers of theirs ``(n,)`` and of the queries ``(q,)``: no estimate and margin is above their product.

    Each is the length of a vector (Cauchy-Schwarz) of: what a row has along the coordinates; what the code makes of
    the rest; the margin's two terms. The rows' numbers fall.
    """
    row_squares, query_squares = np.zeros(len(live)), np.zeros(len(parts[0].queries.lengths))
    for part in parts:
        store, queries = part.store, part.queries
        shares = store.shares[live].astype(np.float64)
        of_rows, of_queries = shares**2, (queries.coordinates.astype(np.float64) ** 2).sum(axis=1)
        if proposal.margin:
            of_rows += proposal.margin**2 * (residuals(shares) ** 2 + RAW_ERROR)
            of_queries += (1 - of_queries).clip(0) + RAW_ERROR
        if proposal.code_weight and store.codes is not None:
            code_lengths = store.code_factors[live].astype(np.float64) * np.sqrt(store.reduction.bits)
            of_rows += (proposal.code_weight * code_lengths) ** 2
            of_queries += (queries.codes.astype(np.float64) ** 2).sum(axis=1)
        row_squares += part.weight * of_rows * store.lengths[live].astype(np.float64) ** 2
        query_squares += part.weight * of_queries * queries.lengths**2
    order = np.argsort(-row_squares, kind="stable")
    return live[order], (np.sqrt(row_squares[order]), np.sqrt(query_squares))


def _in_order(parts: Sequence[Part], proposal: Proposal, end: tuple[torch.Tensor, torch.Tensor], sign: int) -> End:
    """One end by falling estimate and margin, and the estimates without the margin."""
    ranked, rows = (values.numpy() for values in end)
    order = np.lexsort((rows, -sign * ranked), axis=-1)
    ranked, rows = np.take_along_axis(ranked, order, axis=1), np.take_along_axis(rows, order, axis=1)
    if not proposal.margin:
        return rows, ranked
    return rows, ranked - np.float32(sign * proposal.margin) * proposal.units(parts, rows)
