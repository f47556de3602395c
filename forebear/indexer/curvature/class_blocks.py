"""The head's curvature without its blocks between two outputs: one matrix over the features for each output.

H of many classes has (c - 1) h rows and columns, too many for one matrix. Its c diagonal blocks
mean over rows of B_kk f f^T + damping I, of h rows and columns each, are factorised instead. They precondition
conjugate gradients, and stand in for H where H^-1 of every training row would be needed.
"""

from __future__ import annotations

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.losses.loss import Loss

ROWS_AT_ONCE = 4096


class ClassBlocks:
    """(mean over rows of B_kk f f^T + damping I)^-1 of each output k, factorised; in float64.

    Attributes:
        basis: The loss' basis, ``(m, c)``.
    """

    def __init__(self, features: np.ndarray, outputs: np.ndarray, loss: Loss, damping: float) -> None:
        """Factorise the blocks.

        Args:
            features: Weighted features of the rows, ``(n, h)``; see :func:`~.head.weighted_features`.
            outputs: The loss' outputs, ``(n, c)`` float64.
            loss: Whose curvature.
            damping: What is added to the diagonal, positive.

        Raises:
            InputError: The damping is too small for float64.
        """
        n, h = features.shape
        c = outputs.shape[1]
        f = torch.from_numpy(features.astype(np.float64))
        weights = torch.from_numpy(loss.curvature_diagonal(outputs))
        blocks = torch.empty((c, h, h), dtype=torch.float64)
        for k in range(c):
            blocks[k] = f.T @ (weights[:, k, None] * f) / n
        blocks.diagonal(dim1=1, dim2=2).add_(damping)
        self._factors, failed = torch.linalg.cholesky_ex(blocks)
        if failed.any():
            raise InputError(
                f"the head's curvature with damping {damping:g} is singular in float64: the damping is too small. Give "
                "a larger --damping, or a relative one such as 1%."
            )
        self.basis = torch.from_numpy(loss.basis(c))

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        """The blocks' inverse times vectors in the loss' basis, ``(q, m, h)``; same shape. Positive definite."""
        by_output = torch.einsum("mc,qmh->chq", self.basis, vectors)
        return torch.einsum("mc,chq->qmh", self.basis, torch.cholesky_solve(by_output, self._factors))

    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """g^T blocks^-1 g of each row's head gradient g, ``(n,)`` float64, never negative.

        Args:
            residuals: Gradients at the logits, ``(n, c)``.
            features: f, ``(n, h)``.
        """
        out = np.zeros(len(residuals))
        for start in range(0, len(out), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            f = torch.from_numpy(features[rows].astype(np.float64)).T
            r = residuals[rows].astype(np.float64)
            for k, factor in enumerate(self._factors):
                white = torch.linalg.solve_triangular(factor, f, upper=False)
                out[rows] += r[:, k] ** 2 * white.square().sum(dim=0).numpy()
        return out
