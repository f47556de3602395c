"""The candidates that sketches propose, estimated on a GPU: of all rows at once, in blocks of queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.device.kept_arrays import DeviceMemory
from forebear.indexer.sketches.estimates import RAW_ERROR, Part, Proposal, code_products, keep_best, residuals

CODE_ROWS = 8192  # rows whose codes are unpacked at once
MOST_SCORES = 1 << 27  # entries of a (queries, rows) block held at once


def propose_on_device(
    parts: Sequence[Part], live: np.ndarray, n_candidates: int, proposal: Proposal, memory: DeviceMemory
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """:func:`~forebear.indexer.sketches.candidates.propose` from the estimates of all rows, in blocks of queries."""
    n_rows, q = len(parts[0].store.sketches), len(parts[0].queries.lengths)
    size = max(1, MOST_SCORES // n_rows)
    numbers = memory.send(live)
    memory.begin()
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for start in range(0, q, size):
        queries = np.arange(start, min(start + size, q))
        with repeatable(memory.device):
            scores = _estimates_of_all(parts, queries, memory, cosine=proposal.cosine, code_weight=proposal.code_weight)
        margins: torch.Tensor | None = None
        if proposal.margin:
            units = [_units_of(part, queries, memory, cosine=proposal.cosine) for part in parts]
            margins = proposal.margin * sum(units[1:], units[0])
        if len(live) < n_rows:
            scores, margins = scores[:, numbers], None if margins is None else margins[:, numbers]
        for end, sign in zip(found, (1, -1), strict=True):
            columns = torch.arange(len(live), device=memory.device).expand(len(queries), -1)
            shifted = scores if margins is None else scores + sign * margins
            best, at = keep_best(None, shifted, columns, n_candidates, largest=sign > 0)
            ranked, rows, values = fetch(best, numbers[at], scores.gather(1, at))
            order = np.lexsort((rows, -sign * ranked), axis=-1)
            end.append((np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1)))
    high, low = ((np.concatenate([rows for rows, _ in end]), np.concatenate([v for _, v in end])) for end in found)
    return high, low


def _estimates_of_all(
    parts: Sequence[Part], queries: np.ndarray, memory: DeviceMemory, *, cosine: bool, code_weight: float
) -> torch.Tensor:
    """Estimated scores of every row for some queries, ``(q, n)`` float32 on the device, by coordinates and code.

    Args:
        parts: One part for each checkpoint.
        queries: Positions of the queries.
        memory: What is kept on the device.
        cosine: Whether scores are cosines; otherwise dot products.
        code_weight: Share of the code's estimate that is counted.
    """
    total: torch.Tensor | None = None
    for part in parts:
        store = part.store
        scores = torch.empty((len(queries), len(store.sketches)), device=memory.device)
        coordinates = memory.send(part.queries.coordinates[queries])
        codes = memory.send(part.queries.codes[queries]) if code_weight and store.codes is not None else None
        shares, code_factors = memory.tensor(store.shares), memory.tensor(store.code_factors)
        for number, (start, shard) in enumerate(store.sketches.blocks()):
            rows = slice(start, start + len(shard))
            units = memory.tensor(shard).float()
            lengths = torch.linalg.vector_norm(units, dim=1)
            block = coordinates @ units.T * (shares[rows] / torch.where(lengths > 0, lengths, 1.0))
            if codes is not None and store.codes is not None:
                packed = memory.tensor(store.codes.shards[number])
                products = [code_products(codes, some, store.reduction.bits) for some in torch.split(packed, CODE_ROWS)]
                block += code_weight * torch.cat(products, dim=1) * code_factors[rows]
            scores[:, rows] = block
        if not cosine:
            scores *= _lengths_of(part, queries, memory)
        total = scores if total is None else total.add_(scores)
    assert total is not None
    return total


def _lengths_of(part: Part, queries: np.ndarray, memory: DeviceMemory) -> torch.Tensor:
    """Weight times the lengths of both raw sketches, ``(q, n)``: from estimated cosines to a part of dot products."""
    of_queries = memory.send(part.queries.lengths[queries].astype(np.float32))
    return of_queries[:, None] * (part.weight * memory.tensor(part.store.lengths))


def _units_of(part: Part, queries: np.ndarray, memory: DeviceMemory, *, cosine: bool) -> torch.Tensor:
    """A part of :meth:`~forebear.indexer.sketches.estimates.Proposal.units` of all rows, ``(q, n)``."""
    of_queries = residuals(np.linalg.norm(part.queries.coordinates[queries], axis=1)).astype(np.float32)
    of_rows = (1.0 - memory.tensor(part.store.shares).double() ** 2).clamp_min(0).sqrt().float()
    units = memory.send(of_queries)[:, None] * of_rows + RAW_ERROR
    return units if cosine else units * _lengths_of(part, queries, memory)
