"""Exact curvature of a head whose outputs do not meet: one matrix over the features for each output, in float64.

Where the loss' curvature at the logits is diagonal (several labels, numbers), H has no blocks between two outputs, and
each block, mean over rows of B_kk f f^T, is factorised alone: c factors of h x h numbers instead of one of (c h)^2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from typing_extensions import override

from forebear.indexer.curvature.head import HeadInverse, factorise
from forebear.indexer.losses.loss import Loss


def separate_hessian(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], feature_dim: int, n_outputs: int, loss: Loss
) -> np.ndarray:
    """The diagonal blocks of H, undamped, ``(c, h, h)`` float64.

    Args:
        blocks: (f ``(n, h)``, outputs ``(n, c)``) of the training rows, in any number of blocks.
        feature_dim: h.
        n_outputs: c.
        loss: Whose curvature, which is separate.
    """
    assert loss.is_separate
    total, n_rows = np.zeros((n_outputs, feature_dim, feature_dim)), 0
    for features, outputs in blocks:
        f, weights = features.astype(np.float64), loss.curvature_diagonal(outputs)
        for k in range(n_outputs):
            total[k] += f.T @ (weights[:, k, None] * f)
        n_rows += len(f)
    return total / max(n_rows, 1)


def mean_eigenvalue_of_blocks(hessian: np.ndarray) -> float:
    """Mean over all c h eigenvalues of H, from its diagonal blocks ``(c, h, h)``."""
    return float(np.einsum("khh->", hessian) / hessian[..., 0].size)


@dataclass(frozen=True)
class SeparateHead(HeadInverse):
    """H + damping I over the head weight, factorised output by output; see :class:`HeadInverse`.

    Attributes:
        factors: Lower Cholesky factors, ``(c, h, h)`` float64.
    """

    factors: np.ndarray
    n_classes: int
    damping: float
    loss: Loss

    @classmethod
    def of(cls, hessian: np.ndarray, damping: float, loss: Loss) -> SeparateHead:
        """From the blocks of H, ``(c, h, h)``.

        Raises:
            InputError: A damped block is too near to singular to be solved in float64.
        """
        factors = np.stack([factorise(block, damping) for block in hessian])
        return cls(factors, len(hessian), damping, loss)

    @override
    def solve_matrix(self, gradients: np.ndarray) -> np.ndarray:
        solved = [cho_solve((factor, True), gradients[:, k].T).T for k, factor in enumerate(self.factors)]
        return np.stack(solved, axis=1)

    @override
    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        f, r = features.astype(np.float64).T, residuals.astype(np.float64)
        out = np.zeros(len(r))
        for k, factor in enumerate(self.factors):
            out += r[:, k] ** 2 * (solve_triangular(factor, f, lower=True) ** 2).sum(axis=0)
        return out

    @override
    def without(self, features: np.ndarray, curvatures: np.ndarray) -> SeparateHead:
        f = features.astype(np.float64)
        blocks = [factor @ factor.T - f.T @ (curvatures[:, k, k, None] * f) for k, factor in enumerate(self.factors)]
        factors = np.stack([factorise(block, 0.0) for block in blocks])
        return SeparateHead(factors, self.n_classes, self.damping, self.loss)
