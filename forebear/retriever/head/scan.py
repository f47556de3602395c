"""The scan: float32 scores of factored rows, on the device that holds them.

On a CPU rows are visited by falling norm, until no later row can matter. A GPU reads all of them, so that the host need
not wait after each block for the answer whether it must go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable
from forebear.retriever.head.scoring import Query, Term

# Rounding of a float32 dot product of two unit vectors, with a margin: 4e-6 is over 60 units in the last place.
SCAN_TOLERANCE = 4e-6


@dataclass(frozen=True)
class _UnitTerm:
    """A :class:`Term` scaled to length 1, as float32 tensors on the device of a scan."""

    weight: float
    right: torch.Tensor | None
    left: torch.Tensor | None
    matrix: torch.Tensor | None
    basis: torch.Tensor | None
    offset: float

    def products(self, features: torch.Tensor, residuals: torch.Tensor | None) -> torch.Tensor:
        """Scores ``(q, n)`` before the weight, of features ``(n, h)`` and residuals ``(n, c)``."""
        if self.matrix is not None:
            assert residuals is not None
            assert self.basis is not None
            reduced = residuals @ self.basis.T
            parts = [(self.matrix[:, a] @ features.T) * reduced[:, a] for a in range(reduced.shape[1])]
            return sum(parts[1:], parts[0])
        assert self.right is not None
        scores = self.right @ features.T
        if self.offset:
            scores += self.offset
        if self.left is not None:
            assert residuals is not None
            scores *= self.left @ residuals.T
        return scores


class Scan:
    """Float32 scores of factored rows in scan order, for one batch of queries.

    Queries are scaled to length 1 and residuals to unit length with their norm beside them, so that tiny
    gradients keep their precision; scores come back in the units of the exact score divided by ``scale``.
    """

    def __init__(self, query: Query, table: ScanTable, memory: DeviceMemory = HOST) -> None:
        self.query, self.table, self.memory = query, table, memory
        self._sent: torch.Tensor | None = None
        cosine = query.method.metric == "cos"
        lengths = _lengths(query.terms)
        divisor = query.norms if cosine else lengths
        divisor = np.where(divisor > 0, divisor, 1.0)
        self.scale = np.ones_like(divisor) if cosine else divisor
        self.terms = [_unit_term(term, divisor, memory) for term in query.terms]
        self.rounding = SCAN_TOLERANCE * lengths / divisor * max(self._sizes(block).max() for block in table.blocks)

    def run(self, k: int) -> tuple[torch.Tensor, float]:
        """Scan until both ends of the top ``k`` are safe.

        Returns:
            Scores of the rows visited ``(q, v)`` on the device, each within ``rounding`` of the exact one, and the
            largest score (in absolute value) that a row not visited can have.
        """
        self.memory.begin()
        with repeatable(self.memory.device):
            return self._run(k)

    def _run(self, k: int) -> tuple[torch.Tensor, float]:
        scores = torch.empty((len(self.query), len(self.table)), device=self.memory.device)
        stops = self.memory.on_host and self.query.method.metric == "dot" and len(self.table.blocks) > 1
        bounds = self._bounds() if stops else np.zeros(len(self.table.blocks))
        later = np.append(np.maximum.accumulate(bounds[::-1])[::-1], 0.0)  # largest bound from block i on
        ends = _Ends(k) if stops else None
        visited = 0
        for i, block in enumerate(self.table.blocks):
            part = scores[:, visited : visited + len(block.rows)]
            part.copy_(self._block(block))
            visited += len(block.rows)
            if ends is not None and ends.beyond(part, later[i + 1] + float(self.rounding.max())):
                return scores[:, :visited], float(later[i + 1])
        return scores, 0.0

    def _bounds(self) -> np.ndarray:
        """Largest possible |score| of any row against a unit query, by block."""
        return np.array([self._bound(block).max() for block in self.table.blocks])

    def _bound(self, block: ScanBlock) -> np.ndarray:
        bound = self._sizes(block)
        if self.query.self_influence is not None:  # Cauchy-Schwarz in H^-1's inner product, often tighter
            reach = (self.query.norms / self.scale).max()
            bound = np.minimum(bound, reach * np.sqrt(self.query.self_influence[block.rows]))
        return bound

    def _sizes(self, block: ScanBlock) -> np.ndarray:
        """Euclidean length of each row as it is scored: that of its gradient, over the row's norm for cosines."""
        squares = np.zeros(len(block.rows))
        for i, term in enumerate(self.terms):
            norm = block.feature_norms[i].astype(np.float64) + abs(term.offset)
            if block.residual_norms:
                norm = norm * block.residual_norms[i]
            squares += abs(term.weight) * norm**2
        sizes = np.sqrt(squares)
        return sizes / self._row_norms(block, 0).numpy() if self.query.method.metric == "cos" else sizes

    def _block(self, block: ScanBlock) -> torch.Tensor:
        memory = self.memory
        total: torch.Tensor | None = None
        for i, term in enumerate(self.terms):
            residuals, factor = None, None
            if block.residuals:
                factor = memory.tensor(block.residual_norms[i]).double()
                divisor = torch.where(factor > 0, factor, 1.0)  # a residual of length 0 is 0
                residuals = (memory.tensor(block.residuals[i]).double() / divisor[:, None]).float()
                factor = term.weight * factor
            part = term.products(memory.tensor(block.features[i]), residuals)
            if self.query.method.metric == "cos":
                factor = (term.weight if factor is None else factor) / self._row_norms(block, i, memory)
            part *= term.weight if factor is None else factor.float()
            total = part if total is None else total + part
        assert total is not None
        return total

    def _own(self, memory: DeviceMemory) -> torch.Tensor:
        """<H^-1 g_n, g_n> of every training row; sent once, for it may have been made for this question alone."""
        assert self.query.self_influence is not None
        if memory.on_host:
            return memory.send(self.query.self_influence)
        if self._sent is None:
            self._sent = memory.send(self.query.self_influence)
        return self._sent

    def _row_norms(self, block: ScanBlock, i: int, memory: DeviceMemory = HOST) -> torch.Tensor:
        """Lengths ``(n,)`` of the rows that a cosine divides by; 1 for zero rows, whose products are 0 anyway."""
        if self.query.self_influence is not None:
            norms = self._own(memory)[memory.tensor(block.rows)].sqrt()
        else:
            norms = memory.tensor(block.feature_norms[i]).double()
            if block.residual_norms:
                norms = norms * memory.tensor(block.residual_norms[i]).double()
        return torch.where(norms > 0, norms, 1.0)


class _Ends:
    """The running k-th best and k-th worst score of each query."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._high: torch.Tensor | None = None
        self._low: torch.Tensor | None = None

    def beyond(self, scores: torch.Tensor, limit: float) -> bool:
        """Take in more scores ``(q, m)``; True once every query's k-th score at both ends is beyond ``limit``."""
        self._high = self._merge(self._high, scores, largest=True)
        self._low = self._merge(self._low, scores, largest=False)
        if self._high.shape[1] < self.k:
            return False
        return bool((self._high[:, -1] > limit).all()) and bool((self._low[:, -1] < -limit).all())

    def _merge(self, kept: torch.Tensor | None, part: torch.Tensor, *, largest: bool) -> torch.Tensor:
        best = part.topk(min(self.k, part.shape[1]), dim=1, largest=largest).values
        if kept is not None:
            best = torch.cat([kept, best], dim=1)
            best = best.topk(min(self.k, best.shape[1]), dim=1, largest=largest).values
        return best


def _lengths(terms: Sequence[Term]) -> np.ndarray:
    """Euclidean length of each query vector over all its terms, ``(q,)``."""
    squares = np.zeros(1)
    for t in terms:
        if t.matrix is not None:
            part = (t.matrix.astype(np.float64) ** 2).sum(axis=(1, 2))
        else:
            assert t.right is not None
            part = (t.right.astype(np.float64) ** 2).sum(axis=1) + t.offset**2
            if t.left is not None:
                part = part * (t.left.astype(np.float64) ** 2).sum(axis=1)
        squares = squares + abs(t.weight) * part
    return np.sqrt(squares)


def _unit_term(term: Term, divisor: np.ndarray, memory: DeviceMemory) -> _UnitTerm:
    """A term divided by a number for each query ``(q,)``: by its matrix, else its left factor, else its right one."""

    def unit(values: np.ndarray | None, *, divided: bool) -> torch.Tensor | None:
        if values is None:
            return None
        scaled = values / divisor.reshape(-1, *[1] * (values.ndim - 1)) if divided else values
        return memory.send(scaled.astype(np.float32))

    return _UnitTerm(
        weight=term.weight,
        right=unit(term.right, divided=term.left is None),
        left=unit(term.left, divided=True),
        matrix=unit(term.matrix, divided=True),
        basis=unit(term.basis, divided=False),
        offset=term.offset,
    )
