"""The scan: float32 scores of factored rows by falling norm, stopped when no later row can matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from forebear.indexer.storage.scan_table import ScanBlock, ScanTable
from forebear.ratio import ratio
from forebear.retriever.head.scoring import Query, Term, term_scores

# Rounding of a float32 dot product of two unit vectors, with a margin: 4e-6 is over 60 units in the last place.
SCAN_TOLERANCE = 4e-6


class Scan:
    """Float32 scores of factored rows in scan order, for one batch of queries.

    Queries are scaled to length 1 and residuals to unit length with their norm beside them, so that tiny
    gradients keep their precision; scores come back in the units of the exact score divided by ``scale``.
    """

    def __init__(self, query: Query, table: ScanTable) -> None:
        self.query = query
        self.table = table
        self.scale, self.terms = _unit_terms(query)
        self.rounding = SCAN_TOLERANCE * _lengths(self.terms) * max(self._sizes(block).max() for block in table.blocks)

    def run(self, k: int) -> tuple[np.ndarray, float]:
        """Scan until both ends of the top ``k`` are safe.

        Returns:
            Scores of the rows visited ``(q, v)``, each within ``rounding`` of the exact one, and the largest score (in
            absolute value) that a row not visited can have.
        """
        scores = np.empty((len(self.query), len(self.table)), np.float32)
        bounds = self._bounds()
        later = np.append(np.maximum.accumulate(bounds[::-1])[::-1], 0.0)  # largest bound from block i on
        ends = _Ends(k) if self.query.method.metric == "dot" and len(bounds) > 1 else None
        visited = 0
        for i, block in enumerate(self.table.blocks):
            part = scores[:, visited : visited + len(block.rows)]
            part[:] = self._block(block)
            visited += len(block.rows)
            if ends is not None and ends.beyond(part, later[i + 1] + float(self.rounding.max())):
                return scores[:, :visited], float(later[i + 1])
        return scores, 0.0

    def _bounds(self) -> np.ndarray:
        """Largest possible |score| of any row against a unit query, by block."""
        if self.query.method.metric == "cos":
            return np.ones(len(self.table.blocks))
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
        return sizes / self._row_norms(block, 0) if self.query.method.metric == "cos" else sizes

    def _block(self, block: ScanBlock) -> np.ndarray:
        total: np.ndarray | None = None
        for i, term in enumerate(self.terms):
            residuals = None
            factor = np.full(len(block.rows), term.weight)
            if block.residuals:
                norms = block.residual_norms[i].astype(np.float64)
                residuals = ratio(block.residuals[i], norms[:, None])
                factor = factor * norms
            part = term_scores(term, block.features[i], residuals)
            if self.query.method.metric == "cos":
                factor = factor / self._row_norms(block, i)
            part *= factor.astype(np.float32)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _row_norms(self, block: ScanBlock, i: int) -> np.ndarray:
        """Lengths of the rows that a cosine divides by; 1 for zero rows, whose products are 0 anyway."""
        if self.query.self_influence is not None:
            norms = np.sqrt(self.query.self_influence[block.rows])
        else:
            norms = block.feature_norms[i].astype(np.float64)
            if block.residual_norms:
                norms = norms * block.residual_norms[i]
        return np.where(norms > 0, norms, 1.0)


class _Ends:
    """The running k-th best and k-th worst score of each query."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._high: torch.Tensor | None = None
        self._low: torch.Tensor | None = None

    def beyond(self, scores: np.ndarray, limit: float) -> bool:
        """Take in more scores ``(q, m)``; True once every query's k-th score at both ends is beyond ``limit``."""
        part = torch.from_numpy(scores)
        self._high = self._merge(self._high, part, largest=True)
        self._low = self._merge(self._low, part, largest=False)
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


def _unit_terms(query: Query) -> tuple[np.ndarray, list[Term]]:
    """Factors ``(q,)`` that turn scores of unit terms into exact scores, and the query's unit terms in float32."""
    cosine = query.method.metric == "cos"
    scale = query.norms if cosine else _lengths(query.terms)
    scale = np.where(scale > 0, scale, 1.0)

    def small(values: np.ndarray | None, divisor: np.ndarray | None = None) -> np.ndarray | None:
        if values is None or divisor is None:
            return None if values is None else values.astype(np.float32)
        return np.asarray(values / divisor.reshape(-1, *[1] * (values.ndim - 1)), dtype=np.float32)

    # One factor of each term takes the scale: the matrix, else the left one, else the right one.
    terms = [
        replace(
            t,
            matrix=small(t.matrix, scale),
            left=small(t.left, scale),
            right=small(t.right, scale if t.left is None else None),
        )
        for t in query.terms
    ]
    return (np.ones_like(scale) if cosine else scale), terms
