"""Exact curvature of the softmax head, in float64.

H = mean over rows of (diag(p) - p p^T) kron f f^T is the Hessian (and the Gauss-Newton matrix) of the mean
training loss over the head's weight. Every head gradient (p - y) outer f sums to zero over the classes, and
so does every row and column of diag(p) - p p^T: along the direction that is constant over classes H is zero and
no gradient has a part in it. So everything is done, without any loss, in an orthonormal basis of the c - 1
remaining class directions (Helmert's contrasts): m = (c - 1) h numbers instead of c h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_solve, cholesky, helmert, solve_triangular
from scipy.linalg.lapack import dpocon

from forebear.errors import InputError
from forebear.indexer.curvature.damping import round_up

MIN_RECIPROCAL_CONDITION = 1e-11  # below, float64 solves lose the fifth digit
MAX_SIZE = 20_000  # m above which the dense factor would not fit an ordinary machine (3.2 GB)
MAX_CLASS_NUMBERS = 1 << 27  # in the class matrices of the rows that are taken at once
MANY_CLASSES = 64  # beyond, a sum over all pairs of classes takes more memory than the matrices it gives


def class_basis(n_classes: int) -> np.ndarray:
    """Orthonormal basis of the class directions that sum to zero, ``(c - 1, c)``."""
    return np.asarray(helmert(n_classes), dtype=np.float64)


def probabilities_from_residuals(residuals: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """p from p - y and y, ``(n, c)`` float64."""
    p = residuals.astype(np.float64)
    p[np.arange(len(labels)), labels] += 1.0
    return p


def head_hessian(blocks: Iterable[tuple[np.ndarray, np.ndarray]], feature_dim: int, n_classes: int) -> np.ndarray:
    """H of the head weight in the reduced class basis, undamped.

    Args:
        blocks: (f ``(n, h)``, p ``(n, c)``) of the training rows, in any number of blocks.
        feature_dim: h.
        n_classes: c.

    Returns:
        ``(m, m)`` float64 with m = (c - 1) h; entry (a h + i, b h + j) belongs to contrasts a, b and features i, j.
    """
    check_head_size(n_classes, feature_dim)
    reduced = n_classes - 1
    size = reduced * feature_dim
    total = np.zeros((reduced, reduced, feature_dim, feature_dim))
    n_rows = 0
    for features, probabilities in blocks:
        for at in row_chunks(len(features), n_classes):
            f = features[at].astype(np.float64)
            weights = class_curvature(probabilities[at])
            for a in range(reduced):
                for b in range(a + 1):
                    total[a, b] += f.T @ (weights[:, a, b, None] * f)
            n_rows += len(f)
    for a in range(reduced):
        for b in range(a):
            total[b, a] = total[a, b].T
    return np.asarray(total.transpose(0, 2, 1, 3).reshape(size, size) / max(n_rows, 1))


def row_chunks(n_rows: int, n_classes: int) -> list[slice]:
    """Rows whose class matrices fit in memory together."""
    size = max(1, MAX_CLASS_NUMBERS // n_classes**2)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def fits_dense(n_classes: int, feature_dim: int) -> bool:
    """Whether the head's exact curvature is computed as one matrix."""
    return (n_classes - 1) * feature_dim <= MAX_SIZE


def check_head_size(n_classes: int, feature_dim: int) -> None:
    """Refuse a head whose exact curvature is too large.

    Raises:
        InputError: With both sizes, and the way out.
    """
    if not fits_dense(n_classes, feature_dim):
        size_gb, limit_gb = (8e-9 * m**2 for m in ((n_classes - 1) * feature_dim, MAX_SIZE))
        raise InputError(
            f"the head has {n_classes} classes x {feature_dim} features: its exact curvature would take "
            f"{size_gb:.1f} GB (limit {limit_gb:.1f}). Give --damping none (with --resume if this build was begun "
            "before). What is lost: curvature stored for `if` and `rif`, at all scopes; `if` is then asked with "
            "--curvature cg, which solves for each query.",
            of="index",
        )


def class_curvature(p: np.ndarray) -> np.ndarray:
    """B (diag(p) - p p^T) B^T of each row, ``(n, c - 1, c - 1)``.

    As the sum over i < j of p_i p_j (b_i - b_j)(b_i - b_j)^T, b_i being columns of B: no difference of numbers near 1,
    so that rows predicted with all but certainty keep their precision. With very many classes the matrix in brackets is
    formed from the same products.
    """
    basis = class_basis(p.shape[1])
    if p.shape[1] > MANY_CLASSES:
        return np.asarray(basis @ _class_covariance(p) @ basis.T)
    i, j = np.triu_indices(p.shape[1], k=1)
    steps = (basis[:, i] - basis[:, j]).T
    squares = (steps[:, :, None] * steps[:, None, :]).reshape(len(i), -1)
    return np.asarray(((p[:, i] * p[:, j]) @ squares).reshape(len(p), len(basis), len(basis)))


def _class_covariance(p: np.ndarray) -> np.ndarray:
    """diag(p) - p p^T of each row, ``(n, c, c)``; diagonal entry i is computed as the sum of p_i p_j over j != i."""
    products = p[:, :, None] * p[:, None, :]
    i = np.arange(p.shape[1])
    products[:, i, i] = 0.0
    out = -products
    out[:, i, i] = products.sum(axis=2)
    return np.asarray(out)


def class_products(p: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """B (diag(p) - p p^T) B^T u, no matrix being formed.

    Args:
        p: Probabilities, ``(n, c)`` float64.
        vectors: u, ``(q, c - 1, n)``.

    Returns:
        ``(q, c - 1, n)``. Numbers are taken relative to that of the most probable class, so that rows predicted with
        all but certainty keep their precision.
    """
    basis = torch.from_numpy(class_basis(p.shape[1]))
    z = vectors.transpose(1, 2) @ basis  # (q, n, c)
    z -= z.gather(2, p.argmax(dim=1)[None, :, None].expand(len(z), -1, 1))
    z -= (p * z).sum(dim=2, keepdim=True)
    return (z.mul_(p) @ basis.T).transpose(1, 2)


def head_trace(features: np.ndarray, residuals: np.ndarray, labels: np.ndarray) -> float:
    """Sum over rows of the trace of (diag(p) - p p^T) kron f f^T; see :func:`head_hessian`.

    Args:
        features: f, ``(n, h)``.
        residuals: p - y, ``(n, c)``.
        labels: y, ``(n,)``.
    """
    at = (np.arange(len(labels)), labels)
    p = probabilities_from_residuals(residuals, labels)
    others = 1.0 - p
    others[at] = -residuals[at].astype(np.float64)  # 1 - p, where it would be a difference of numbers near 1
    return float((p * others).sum(axis=1) @ (features.astype(np.float64) ** 2).sum(axis=1))


def absolute_damping(given: str, mean_eigenvalue: float) -> float:
    """``0.1x`` is 0.1 times the mean eigenvalue of H; a plain number is added to the diagonal as it is.

    Raises:
        InputError: Neither form, negative, or not finite.
    """
    relative = given.endswith("x")
    try:
        value = float(given[:-1] if relative else given)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value >= 0):
        raise InputError(
            f"damping {given!r}: expected a number >= 0 (absolute), such as 0.003, or a relative one, such as 0.1x."
        )
    return value * mean_eigenvalue if relative else value


def mean_eigenvalue(hessian: np.ndarray, n_classes: int) -> float:
    """Mean over all c h eigenvalues of H, the zero ones of the constant class direction included."""
    return float(np.trace(hessian)) * (n_classes - 1) / n_classes / len(hessian)


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
            f"Give --damping {round_up(enough) if enough > 0 else '1e-5'} or more, or a relative one such as 0.1x.",
            of="index",
        )
    return factor


@dataclass(frozen=True)
class HeadCurvature:
    """H + damping I over the head weight, factorised.

    Attributes:
        factor: Lower Cholesky factor L, ``(m, m)`` float64.
        n_classes: c.
        damping: What was added to the diagonal.
    """

    factor: np.ndarray
    n_classes: int
    damping: float

    def _gradients(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Head gradients in the reduced basis, ``(n, m)`` float64."""
        reduced = residuals.astype(np.float64) @ class_basis(self.n_classes).T
        f = features.astype(np.float64)
        return np.asarray((reduced[:, :, None] * f[:, None, :]).reshape(len(f), -1))

    def solve(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(H + damping I)^-1 g in the reduced class basis.

        Args:
            residuals: p - y, ``(q, c)``.
            features: f, ``(q, h)``.

        Returns:
            ``(q, c - 1, h)`` float64; <result, g_n> is its dot with ``class_basis(c) @ (p_n - y_n)`` outer f_n.
        """
        return self.solve_matrix(self._gradients(residuals, features).reshape(len(features), self.n_classes - 1, -1))

    def solve_matrix(self, gradients: np.ndarray) -> np.ndarray:
        """(H + damping I)^-1 g of gradients in the reduced class basis, ``(q, c - 1, h)``; same shape."""
        solved = cho_solve((self.factor, True), gradients.reshape(len(gradients), -1).T).T
        return np.asarray(solved.reshape(gradients.shape))

    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """<H^-1 g, g> of each row, ``(n,)`` float64, never negative."""
        white = solve_triangular(self.factor, self._gradients(residuals, features).T, lower=True)
        return np.asarray((white**2).sum(axis=0))


REPRESENTER_LAMBDA = 1.0  # without a refit: rankings do not depend on it
REFIT_L2 = 0.1  # Pez21's released code


def refit_head(features: np.ndarray, probabilities: np.ndarray, l2: float = REFIT_L2) -> np.ndarray:
    """Refit the head to the model's soft probabilities, as the representer theorem needs (Pez21, Yeh et al. 2018).

    Minimises mean cross-entropy + l2 ||W||^2 over W ``(c, h + 1)``, the last column being the bias, by L-BFGS.

    Args:
        features: f, ``(n, h)``.
        probabilities: Targets, ``(n, c)``, rows summing to 1.
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

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(shape)
        logits = x @ w.T
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        loss = -(probabilities * log_p).sum() / len(x) + l2 * (w**2).sum()
        gradient = (np.exp(log_p) - probabilities).T @ x / len(x) + 2 * l2 * w
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
