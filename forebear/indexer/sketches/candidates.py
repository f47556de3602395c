"""Cosines and dot products of gradients estimated from stored sketches, and the candidates that they propose.

Every row is estimated from its coordinates alone: for dot products by falling length, stopping where Cauchy-Schwarz
shows that no later row's estimate can be among those wanted; for cosines all rows. The best at each end are then
estimated again with the one-bit code of the part of a gradient that the coordinates do not hold.

Dot products are proposed by the estimate *plus a margin*, a share of the usual error of a cosine times both lengths.
The score of a very long row is large even if its cosine is near zero, and no sketch can tell the sign of such a cosine.
Norms are heavy-tailed, so the margin adds few rows: on SST-2 it takes the recall of ``if`` with 400 candidates from
.955 to .997.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from forebear.indexer.model.device.copies import as_tensor
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.sketches.device_scan import propose_on_device
from forebear.indexer.sketches.estimates import Part, Proposal, factors_of, keep_best

BLOCK_ROWS = 16_384
WIDEN = 16  # rows estimated with the code for each one proposed
LEAST_WIDE = 1024


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
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The rows most likely to have the largest and the smallest scores, with their estimates.

    Args:
        parts: One part for each checkpoint.
        live: Numbers of the live rows.
        n_candidates: Number of candidates at each end; at most the number of live rows.
        proposal: Kind of score, weight of the code, and margin.
        memory: Where rows are estimated. A GPU reads the codes of all rows: nothing is cut off before them.

    Returns:
        (rows, estimates) of the proponents' end, best first by estimate and margin, and of the opponents',
        ``(q, n_candidates)`` each.
    """
    if not memory.on_host:
        return memory.run(lambda: propose_on_device(parts, live, n_candidates, proposal, memory))
    # :func:`candidates_needed` relies on these widths.
    width = min(len(live), max(LEAST_WIDE, WIDEN * n_candidates)) if proposal.code_weight else n_candidates
    high, low = _scan(parts, live, width, proposal)
    return _refine(parts, high, n_candidates, proposal, largest=True), _refine(
        parts, low, n_candidates, proposal, largest=False
    )


def candidates_needed(by_coordinates: np.ndarray, by_all: np.ndarray) -> np.ndarray:
    """How many candidates :func:`propose` must be asked for so that a row is among them.

    The row must be among the rows that the scan keeps for the code, and then among the best of these.

    Args:
        by_coordinates: The row's rank among all rows by coordinates and margin, from 1.
        by_all: The row's rank with the code's estimate added, from 1; the same rank where no code is counted.
    """
    to_be_kept = np.where(by_coordinates > LEAST_WIDE, -(-by_coordinates // WIDEN), 1)
    return np.asarray(np.maximum(by_all, to_be_kept))


def _scan(
    parts: Sequence[Part], live: np.ndarray, width: int, proposal: Proposal
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Both ends by coordinates and margin alone, ``(q, width)`` rows and sums each."""
    order = live
    query_reach = None
    if not proposal.cosine:
        # |<x_q, x_n>| <= share_q share_n, and the margin is a multiple of the lengths: both fall with one order.
        shares = [part.store.shares[live].astype(np.float64) for part in parts]
        row_reaches = [
            part.store.lengths[live].astype(np.float64) * np.hypot(share, proposal.margin)
            for part, share in zip(parts, shares, strict=True)
        ]
        squares = sum(part.weight * length**2 for part, length in zip(parts, row_reaches, strict=True))
        assert isinstance(squares, np.ndarray)
        order = live[np.argsort(-squares, kind="stable")]
        lengths = np.sqrt(np.sort(squares)[::-1])
        query_reaches = [
            np.hypot(np.linalg.norm(p.queries.coordinates, axis=1), 1.0 if proposal.margin else 0.0) for p in parts
        ]
        query_reach = np.sqrt(
            sum(p.weight * (x * p.queries.lengths) ** 2 for p, x in zip(parts, query_reaches, strict=True))
        )
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(order), BLOCK_ROWS):
        if ends and query_reach is not None and ends[0][0].shape[1] == width:
            limit = torch.from_numpy(query_reach * lengths[start] * (1 + 1e-5))
            if bool((ends[0][0][:, -1] > limit).all()) and bool((ends[1][0][:, -1] < -limit).all()):
                break
        rows = order[start : start + BLOCK_ROWS]
        scores, margins = estimate(parts, rows, cosine=proposal.cosine), proposal.margins(parts, rows)
        numbers = as_tensor(rows).expand(len(scores), -1)
        ends = [
            keep_best(
                ends[i] if ends else None, torch.from_numpy(scores + sign * margins), numbers, width, largest=sign > 0
            )
            for i, sign in enumerate((1, -1))
        ]
    (high, high_rows), (low, low_rows) = ends
    return (high_rows.numpy(), high.numpy()), (low_rows.numpy(), low.numpy())


def _refine(
    parts: Sequence[Part], end: tuple[np.ndarray, np.ndarray], n_candidates: int, proposal: Proposal, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Add the code to one end and keep the best, in order; ties go to the lower row number."""
    rows, scores = end
    scores = scores.copy()
    margins = np.zeros_like(scores)
    for query, listed in enumerate(rows):
        if proposal.code_weight:
            for part, factor in zip(parts, factors_of(parts, listed, cosine=proposal.cosine), strict=True):
                query_length = 1.0 if proposal.cosine else part.queries.lengths[query]
                scores[query] += (
                    proposal.code_weight * query_length * factor * part.code_products(np.array([query]), listed)[0]
                )
        if proposal.margin:
            margins[query] = proposal.margins(parts, listed)[query]
    order = np.lexsort((rows, -scores if largest else scores), axis=-1)[:, :n_candidates]
    estimates = scores - margins if largest else scores + margins
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(estimates, order, axis=1)
