"""Products of the head's curvature with vectors, from the features and outputs of the rows; no matrix need be formed.

All in float64 and in the loss' basis of m directions: vectors are ``(q, m, h)``. Where the whole matrix is small it is
formed once; where the matrices of all rows at their logits are, those are kept; else both are left out, and products
are taken row by row from the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from forebear.indexer.curvature.class_blocks import ClassBlocks
from forebear.indexer.curvature.head import fits_dense, head_hessian, largest_eigenvalue
from forebear.indexer.losses.loss import Loss

MAX_WEIGHTS = 1 << 25  # numbers in the matrices at the logits, or in the gradients, of the rows that are held at once
EIGEN_ROWS = 256  # rows whose matrices at the logits, or products with all directions, are held at once
PRODUCT_ROWS = 2048  # rows whose products with the head's curvature are computed at once


class HeadProducts:
    """The curvature of the mean loss of some rows over the head weight, as a product.

    Attributes:
        features: Weighted features, ``(n, h)`` float64; see :func:`~.head.weighted_features`.
        outputs: The loss' outputs, ``(n, c)`` float64.
        loss: Whose curvature.
    """

    def __init__(self, features: np.ndarray, outputs: np.ndarray, loss: Loss) -> None:
        self.features = torch.from_numpy(features.astype(np.float64))
        self.outputs, self.loss = outputs, loss
        self._class_blocks: tuple[float, ClassBlocks] | None = None
        self._by_row = outputs.size * outputs.shape[1] > MAX_WEIGHTS

    @property
    def is_dense(self) -> bool:
        """Whether H is held as one matrix: it is small enough, and not separate by output."""
        return not self.loss.is_separate and fits_dense(self.outputs.shape[1], self.features.shape[1], self.loss)

    def class_blocks(self, damping: float) -> ClassBlocks:
        """The diagonal blocks of H + damping I, one a class, factorised; kept for the last damping."""
        if self._class_blocks is None or self._class_blocks[0] != damping:
            self._class_blocks = damping, ClassBlocks(self.features.numpy(), self.outputs, self.loss, damping)
        return self._class_blocks[1]

    def __len__(self) -> int:
        return len(self.outputs)

    @cached_property
    def _weights(self) -> torch.Tensor:
        """B of all rows, ``(n, m, m)``."""
        return torch.from_numpy(self.loss.curvature(self.outputs))

    @cached_property
    def _hessian(self) -> torch.Tensor:
        h, c = self.features.shape[1], self.outputs.shape[1]
        return torch.from_numpy(head_hessian([(self.features.numpy(), self.outputs)], h, c, self.loss))

    def __call__(self, vectors: torch.Tensor, at: Sequence[int] | None = None) -> torch.Tensor:
        """H V, the mean over all rows, or over those at some positions, repeated ones counting again."""
        v = vectors
        if at is None and self.is_dense:
            return (v.flatten(1) @ self._hessian).view_as(v)
        rows = np.arange(len(self)) if at is None else np.asarray(at)
        total = torch.zeros_like(v)
        for start in range(0, len(rows), PRODUCT_ROWS):
            block = rows[start : start + PRODUCT_ROWS]
            f = self.features[block]
            if self._by_row:
                weighted = self.loss.curvature_products(torch.from_numpy(self.outputs[block]), v @ f.T)
            else:
                weighted = torch.einsum("nab,qbn->qan", self._weights[block], v @ f.T)
            total += weighted @ f
        return total / len(rows)

    def largest_eigenvalue(self) -> float:
        """Largest eigenvalue of H, by products."""
        shape = (1, len(self.loss.basis(self.outputs.shape[1])), self.features.shape[1])
        size = shape[1] * shape[2]

        def multiply(vector: np.ndarray) -> np.ndarray:
            return np.asarray(self(torch.from_numpy(np.asarray(vector)).reshape(shape)).flatten())

        return largest_eigenvalue(LinearOperator((size, size), matvec=multiply, dtype=np.float64))

    @cached_property
    def eigenbasis(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """EK-FAC of the head: eigenvectors at the logits ``(m, m)`` and of the features ``(h, h)``, as columns.

        Third, the mean square of each coordinate of the rows' gradients in that basis, ``(m, h)``.
        """
        right = torch.linalg.eigh(self.features.T @ self.features).eigenvectors
        if self._by_row:
            blocks = torch.split(torch.from_numpy(self.outputs), EIGEN_ROWS)
            total = np.sum([self.loss.curvature(p.numpy()).sum(axis=0) for p in blocks], axis=0)
            left = torch.linalg.eigh(torch.from_numpy(total)).eigenvectors
            u = left.T  # eigenvectors as rows; every row of the index gets all of them
            parts = [
                torch.einsum("ia,ian->ni", u, self.loss.curvature_products(p, u[:, :, None].expand(-1, -1, len(p))))
                for p in blocks
            ]
            out = torch.cat(parts)
        else:
            left = torch.linalg.eigh(self._weights.sum(dim=0)).eigenvectors
            out = torch.einsum("ai,nab,bi->ni", left, self._weights, left)
        return left, right, out.T @ (self.features @ right) ** 2 / len(self)
