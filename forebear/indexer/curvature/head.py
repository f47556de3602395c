"""Exact curvature of the head, in float64.

H = mean over rows of weight x B kron f f^T is the Hessian (and the Gauss-Newton matrix) of the mean training loss over
the head's weight, B being the curvature of the loss at the logits: diag(p) - p p^T of the cross-entropy. It is computed
in the loss' basis, which holds every gradient (:meth:`~forebear.indexer.losses.loss.Loss.basis`): m = (c - 1) h numbers
instead of c h of the cross-entropy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpocon
from scipy.sparse.linalg import LinearOperator, eigsh
from typing_extensions import override

from forebear.errors import InputError
from forebear.indexer.curvature.damping import round_up
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY, MAX_CLASS_NUMBERS
from forebear.indexer.losses.loss import Loss

MIN_RECIPROCAL_CONDITION = 1e-11  # below, float64 solves lose the fifth digit
MAX_SIZE = 20_000  # m above which the dense factor would not fit an ordinary machine (3.2 GB)
SMALL_MATRIX = 32  # rows up to which all eigenvalues are computed: Lanczos' method takes a larger one
MAX_BLOCK_NUMBERS = 20_000**2  # numbers in the blocks of single classes that take over then: as many


def weighted_features(features: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Features ``(n, h)`` times the square roots of the rows' curvature weights ``(n,)``: H holds them in pairs."""
    return features if weights is None else np.asarray(features.astype(np.float64) * np.sqrt(weights)[:, None])


def head_hessian(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], feature_dim: int, n_classes: int, loss: Loss = CROSS_ENTROPY
) -> np.ndarray:
    """H of the head weight in the loss' basis, undamped.

    Args:
        blocks: (f ``(n, h)``, outputs ``(n, c)``) of the training rows, in any number of blocks; f are weighted, see
            :func:`weighted_features`.
        feature_dim: h.
        n_classes: c.
        loss: Whose curvature.

    Returns:
        ``(m, m)`` float64 with m = (c - 1) h of the cross-entropy; entry (a h + i, b h + j) belongs to directions a, b
        of the basis and features i, j.
    """
    assert fits_dense(n_classes, feature_dim, loss)
    assert not loss.is_separate
    reduced, n_rows = len(loss.basis(n_classes)), 0
    total = np.zeros((reduced, feature_dim, reduced, feature_dim))
    for features, outputs in blocks:
        for at in row_chunks(len(features), n_classes):
            _add_lower(total, features[at], loss.curvature(outputs[at]))
            n_rows += len(features[at])
    return _mirrored(total) / max(n_rows, 1)


def summed_curvature(features: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
    """Sum over rows of A_n kron f_n f_n^T, ``(m, m)`` float64 with m = a h.

    Args:
        features: f, ``(n, h)``.
        curvatures: A, symmetric, ``(n, a, a)``.
    """
    reduced, feature_dim = curvatures.shape[1], features.shape[1]
    total = np.zeros((reduced, feature_dim, reduced, feature_dim))
    _add_lower(total, features, curvatures)
    return _mirrored(total)


def _add_lower(total: np.ndarray, features: np.ndarray, curvatures: np.ndarray) -> None:
    """Add the sum over rows of A_n kron f_n f_n^T to ``(a, h, a, h)``, in the blocks on and below the diagonal."""
    f = features.astype(np.float64)
    for a in range(len(total)):
        for b in range(a + 1):
            total[a, :, b] += f.T @ (curvatures[:, a, b, None] * f)


def _mirrored(total: np.ndarray) -> np.ndarray:
    """A symmetric matrix ``(m, m)`` from its blocks on and below the diagonal, ``(a, h, a, h)``."""
    for a in range(len(total)):
        for b in range(a):
            total[b, :, a] = total[a, :, b].T
    size = total.shape[0] * total.shape[1]
    return total.reshape(size, size)


def row_chunks(n_rows: int, n_classes: int) -> list[slice]:
    """Rows whose class matrices fit in memory together."""
    size = max(1, MAX_CLASS_NUMBERS // n_classes**2)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def fits_dense(n_classes: int, feature_dim: int, loss: Loss = CROSS_ENTROPY) -> bool:
    """Whether the head's exact curvature is factorised: as one matrix, or output by output where they are separate."""
    if loss.is_separate:
        return n_classes * feature_dim**2 <= MAX_BLOCK_NUMBERS
    return len(loss.basis(n_classes)) * feature_dim <= MAX_SIZE


def check_head_size(n_classes: int, feature_dim: int, loss: Loss = CROSS_ENTROPY) -> None:
    """Refuse a head whose curvature is too large, even class by class.

    Raises:
        InputError: With both sizes, and the way out.
    """
    numbers = n_classes * feature_dim**2
    if not fits_dense(n_classes, feature_dim, loss) and numbers > MAX_BLOCK_NUMBERS:
        raise InputError(
            f"the head has {n_classes} classes x {feature_dim} features: its curvature, a matrix of features for each "
            f"class, would take {8e-9 * numbers:.1f} GB (limit {8e-9 * MAX_BLOCK_NUMBERS:.1f}). Give --damping none "
            "(with --resume if this build was begun before). What is lost: curvature for `if` and `rif`, at all "
            "scopes; `if` is then asked with --curvature cg, which solves for each query.",
            of="index",
        )


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a curvature that dampings are relative to.

    Attributes:
        mean_eigenvalue: Mean over all parameters of the scope.
        largest_eigenvalue: The largest one.
    """

    mean_eigenvalue: float
    largest_eigenvalue: float


def largest_eigenvalue(matrix: np.ndarray | LinearOperator) -> float:
    """Largest eigenvalue of a positive semidefinite matrix ``(m, m)``, by Lanczos' method, to a relative 1e-6."""
    size = matrix.shape[0]
    if size <= SMALL_MATRIX:
        dense = matrix if isinstance(matrix, np.ndarray) else matrix @ np.eye(size)
        return max(float(np.linalg.eigvalsh(dense)[-1]), 0.0)
    start = np.random.default_rng(0).standard_normal(size)  # the same at each call; not orthogonal to any eigenvector
    if not (matrix @ start).any():  # which ARPACK refuses: features or curvatures that are all 0
        return 0.0
    return max(float(eigsh(matrix, k=1, which="LA", v0=start, tol=1e-6, return_eigenvectors=False)[0]), 0.0)


def mean_eigenvalue(hessian: np.ndarray, n_classes: int, loss: Loss = CROSS_ENTROPY) -> float:
    """Mean over all c h eigenvalues of H, those of 0 outside the loss' basis included."""
    return float(np.trace(hessian)) * len(loss.basis(n_classes)) / n_classes / len(hessian)


def factorise(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Lower Cholesky factor of H + damping I, ``(m, m)`` float64.

    Raises:
        InputError: The sum is too near to singular to be solved in float64.
    """
    damped = hessian + damping * np.eye(len(hessian))
    try:
        factor = np.asarray(cholesky(damped, lower=True))
        reciprocal_condition = float(dpocon(factor, np.linalg.norm(damped, 1), uplo="L")[0])
    except LinAlgError:
        reciprocal_condition = 0.0
    if not reciprocal_condition >= MIN_RECIPROCAL_CONDITION:
        # The 1-norm of the inverse is at most sqrt(m) / damping.
        enough = 2 * MIN_RECIPROCAL_CONDITION * float(np.linalg.norm(hessian, 1)) * len(hessian) ** 0.5
        raise InputError(
            f"H + {damping:g} I, the curvature of scope head, is singular in float64: the damping is too small. "
            f"Give --damping {round_up(enough) if enough > 0 else '1e-5'} or more, or a relative one such as 1%.",
            of="index",
        )
    return factor


class HeadInverse(ABC):
    """(H + damping I)^-1 over the head weight, in the loss' basis of a directions.

    Attributes:
        n_classes: c.
        damping: What is added to the diagonal.
        loss: The loss whose curvature H is.
    """

    n_classes: int
    damping: float
    loss: Loss

    def gradients(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Head gradients in the basis, ``(n, a, h)`` float64, from residuals ``(n, c)`` and features ``(n, h)``."""
        reduced = residuals.astype(np.float64) @ self.loss.basis(self.n_classes).T
        return np.asarray(reduced[:, :, None] * features.astype(np.float64)[:, None, :])

    def solve(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(H + damping I)^-1 g in the basis.

        Args:
            residuals: Gradients at the logits, ``(q, c)``.
            features: f, ``(q, h)``.

        Returns:
            ``(q, a, h)`` float64; <result, g_n> is its dot with (basis @ residual of n) outer f_n.
        """
        return self.solve_matrix(self.gradients(residuals, features))

    @abstractmethod
    def solve_matrix(self, gradients: np.ndarray) -> np.ndarray:
        """(H + damping I)^-1 g of gradients in the basis, ``(q, a, h)``; same shape."""

    @abstractmethod
    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """<H^-1 g, g> of each row, ``(n,)`` float64, never negative."""

    @abstractmethod
    def without(self, features: np.ndarray, curvatures: np.ndarray) -> HeadInverse:
        """The inverse of H + damping I - sum over n of A_n kron f_n f_n^T, factorised anew.

        Args:
            features: f, ``(n, h)``.
            curvatures: A, ``(n, a, a)``: of rows that are left out, their curvature at the logits over N.
        """


@dataclass(frozen=True)
class HeadCurvature(HeadInverse):
    """H + damping I over the head weight, factorised; see :class:`HeadInverse`.

    Attributes:
        factor: Lower Cholesky factor L, ``(m, m)`` float64.
    """

    factor: np.ndarray
    n_classes: int
    damping: float
    loss: Loss = CROSS_ENTROPY

    @override
    def solve_matrix(self, gradients: np.ndarray) -> np.ndarray:
        solved = cho_solve((self.factor, True), gradients.reshape(len(gradients), -1).T).T
        return np.asarray(solved.reshape(gradients.shape))

    @override
    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        gradients = self.gradients(residuals, features).reshape(len(features), -1)
        white = solve_triangular(self.factor, gradients.T, lower=True)
        return np.asarray((white**2).sum(axis=0))

    @override
    def without(self, features: np.ndarray, curvatures: np.ndarray) -> HeadCurvature:
        matrix = self.factor @ self.factor.T - summed_curvature(features, curvatures)
        return HeadCurvature(factorise(matrix, 0.0), self.n_classes, self.damping, self.loss)


REPRESENTER_LAMBDA = 1.0  # without a refit: rankings do not depend on it
REFIT_L2 = 0.1  # Pez21's released code


def refit_head(
    features: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, l2: float = REFIT_L2
) -> np.ndarray:
    """Refit the head to the model's soft probabilities, as the representer theorem needs (Pez21, Yeh et al. 2018).

    Minimises mean cross-entropy + l2 ||W||^2 over W ``(c, h + 1)``, the last column being the bias, by L-BFGS.

    Args:
        features: f, ``(n, h)``.
        probabilities: Targets, ``(n, c)``, rows summing to 1.
        weights: Factor of each row's loss, ``(n,)``; None: 1.
        l2: lambda.

    Returns:
        W, ``(c, h + 1)`` float64.

    Raises:
        InputError: L-BFGS did not converge; its message says why.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    x = np.hstack([features.astype(np.float64), np.ones((len(features), 1))])
    shape = (probabilities.shape[1], x.shape[1])
    factors = 1.0 if weights is None else weights[:, None]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(shape)
        logits = x @ w.T
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        loss = -(factors * probabilities * log_p).sum() / len(x) + l2 * (w**2).sum()
        gradient = (factors * (np.exp(log_p) - probabilities)).T @ x / len(x) + 2 * l2 * w
        return float(loss), gradient.reshape(-1)

    result = minimize(
        objective,
        np.zeros(shape[0] * shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8, "maxfun": 20000},
    )
    if not result.success:
        raise InputError(
            f"--rep-refit: L-BFGS stopped without converging ({result.message}). Leave the option out; a build that "
            "came this far goes on with --resume."
        )
    return np.asarray(result.x.reshape(shape))
