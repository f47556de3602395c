"""The minimum of J_S (see :mod:`~forebear.retriever.effects.steps`): the head refitted without rows, to convergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky
from scipy.optimize import minimize

from forebear.errors import ForebearError
from forebear.indexer.curvature.head import fits_dense, summed_curvature
from forebear.indexer.losses.loss import Loss

TOLERANCE = 1e-10  # gradient at the minimum, beside the longest part of it
MAX_STEPS = 100
SHORTEST_STEP = 2.0**-30
SUFFICIENT_DECREASE = 1e-4  # of Armijo's rule
ROUNDING = 1e-14  # of J, by which a step may raise it
BLOCK_ROWS = 8192
LBFGS_MEMORY = 30


class NotConvergedError(ForebearError):
    """A refit of the head did not reach its minimum."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Rows as the head is trained on them.

    Attributes:
        features: f, ``(n, h)``.
        logits: Logits of the trained head, ``(n, c)`` float64.
        targets: n targets.
        weights: Factors of the rows' losses, ``(n,)`` float64; None: all are 1.
    """

    features: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, positions: np.ndarray | slice) -> HeadRows:
        """The rows at some positions."""
        weights = None if self.weights is None else self.weights[positions]
        return HeadRows(self.features[positions], self.logits[positions], self.targets[positions], weights)

    def blocks(self) -> Iterator[HeadRows]:
        """The rows, a bounded number at a time."""
        for start in range(0, len(self), BLOCK_ROWS):
            part = self.take(np.s_[start : start + BLOCK_ROWS])
            yield replace(part, features=part.features.astype(np.float64))

    def curvature_weights(self, loss: Loss) -> np.ndarray | None:
        """Factor of each row's curvature, ``(n,)``: its own times the loss'; None: all are 1."""
        of_loss = loss.row_weights(self.targets)
        if self.weights is None or of_loss is None:
            return of_loss if self.weights is None else self.weights
        return np.asarray(self.weights * of_loss)


class Refit:
    """J_S over the head's weight, as a function of V: the weight is W0 + B^T V, B being the loss' basis.

    Attributes:
        loss: The loss.
        damping: Weight of half the squared distance from W0.
        n_rows: N.
    """

    def __init__(self, trained: HeadRows, loss: Loss, damping: float) -> None:
        """Take the mean gradient of the rows that the head was trained on."""
        self.loss, self.damping, self.n_rows = loss, damping, len(trained)
        self._basis = loss.basis(trained.logits.shape[1])
        self._mean_gradient = np.zeros((len(self._basis), trained.features.shape[1]))
        for rows in trained.blocks():
            residuals, _ = loss.residual_and_loss(rows.logits, rows.targets)
            self._mean_gradient += (residuals @ self._basis.T).T @ rows.features / self.n_rows

    def minimum(self, rows: HeadRows, start: np.ndarray | None = None) -> np.ndarray:
        """V at the minimum for some of the rows, or for others in their place, ``(a, h)`` float64.

        Args:
            rows: The rows that take part; N stays the divisor.
            start: V to begin with, ``(a, h)``; near the minimum fewer steps are taken. None: 0.

        Raises:
            NotConvergedError: The minimum was not reached.
        """
        begin = np.zeros_like(self._mean_gradient) if start is None else start
        dense = fits_dense(self._basis.shape[1], begin.shape[1], self.loss)
        return (self._by_newton if dense else self._by_lbfgs)(begin, rows)

    def weight_change(self, v: np.ndarray) -> np.ndarray:
        """W - W0 of a V, ``(c, h)``."""
        return np.asarray(self._basis.T @ v)

    def value_and_gradient(self, v: np.ndarray, rows: HeadRows) -> tuple[float, np.ndarray]:
        """J at V up to a constant, and its gradient ``(a, h)``."""
        total, gradient = 0.0, np.zeros_like(v)
        for block in rows.blocks():
            logits = block.logits + block.features @ v.T @ self._basis
            residuals, losses = self.loss.residual_and_loss(logits, block.targets)
            if block.weights is not None:
                residuals, losses = block.weights[:, None] * residuals, block.weights * losses
            total += float(losses.sum())
            gradient += (residuals @ self._basis.T).T @ block.features
        value = total / self.n_rows + self.damping / 2 * float((v**2).sum()) - float((self._mean_gradient * v).sum())
        return value, gradient / self.n_rows + self.damping * v - self._mean_gradient

    def curvature_along(self, v: np.ndarray, weight: np.ndarray, rows: HeadRows) -> float:
        """The second derivative of J along V at a weight ``(a, h)``, over some rows: v^T (H + damping I) v."""
        total = 0.0
        for block in rows.blocks():
            outputs = self.loss.outputs(block.logits + block.features @ weight.T @ self._basis)
            along = block.features @ v.T
            of_rows = np.einsum("na,nab,nb->n", along, self.loss.curvature(outputs), along)
            weights = block.curvature_weights(self.loss)
            total += float((of_rows if weights is None else weights * of_rows).sum())
        return total / self.n_rows + self.damping * float((v**2).sum())

    def _by_newton(self, start: np.ndarray, rows: HeadRows) -> np.ndarray:
        v = start
        value, gradient = self.value_and_gradient(v, rows)
        scale = max(float(np.abs(self._mean_gradient).max()), float(np.abs(gradient).max()), np.finfo(float).tiny)
        for _ in range(MAX_STEPS):
            if np.abs(gradient).max() <= TOLERANCE * scale:
                return v
            step = -self.solve(v, gradient, rows)
            slope, size = float((gradient * step).sum()), 1.0
            while True:
                there = v + size * step
                value_there, gradient_there = self.value_and_gradient(there, rows)
                allowed = SUFFICIENT_DECREASE * size * slope + ROUNDING * abs(value)
                if value_there <= value + allowed:
                    break
                size /= 2
                if size < SHORTEST_STEP:
                    return self._checked(v, gradient, scale)
            v, value, gradient = there, value_there, gradient_there
        return self._checked(v, gradient, scale)

    def _checked(self, v: np.ndarray, gradient: np.ndarray, scale: float) -> np.ndarray:
        """V, if the last bits of J alone kept it from the minimum."""
        if np.abs(gradient).max() > 1e3 * TOLERANCE * scale:
            raise NotConvergedError(
                f"the head's refit did not converge: largest gradient {np.abs(gradient).max():.1e}, expected "
                f"{TOLERANCE * scale:.1e}. Give a larger --damping."
            )
        return v

    def solve(self, v: np.ndarray, gradient: np.ndarray, rows: HeadRows) -> np.ndarray:
        """The inverse Hessian of J at V, over some rows, times a gradient ``(a, h)``.

        Raises:
            NotConvergedError: The Hessian is singular in float64.
        """
        a, h = v.shape
        separate = self.loss.is_separate
        hessian = np.zeros((a, h, h)) if separate else np.zeros((a * h, a * h))
        for block in rows.blocks():
            f = block.features
            curvatures = self.loss.curvature(self.loss.outputs(block.logits + f @ v.T @ self._basis))
            if (weights := block.curvature_weights(self.loss)) is not None:
                curvatures = weights[:, None, None] * curvatures
            if separate:
                for k in range(a):
                    hessian[k] += f.T @ (curvatures[:, k, k, None] * f)
            else:
                hessian += summed_curvature(f, curvatures)
        parts = hessian if separate else hessian[None]
        solved = []
        for part, g in zip(parts, gradient if separate else gradient.reshape(1, -1), strict=True):
            damped = part / self.n_rows + self.damping * np.eye(len(part))
            try:
                solved.append(cho_solve((cholesky(damped, lower=True), True), g))
            except LinAlgError as error:
                raise NotConvergedError(
                    f"the head's curvature with damping {self.damping:g} is singular in float64. Give a larger "
                    "--damping."
                ) from error
        return np.asarray(solved).reshape(a, h)

    def _by_lbfgs(self, start: np.ndarray, rows: HeadRows) -> np.ndarray:
        def function(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self.value_and_gradient(flat.reshape(start.shape), rows)
            return value, gradient.reshape(-1)

        scale = max(float(np.abs(self._mean_gradient).max()), float(np.abs(function(start.reshape(-1))[1]).max()))
        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": TOLERANCE * scale, "ftol": 0.0, "maxcor": LBFGS_MEMORY}
        fit = minimize(function, start.reshape(-1), jac=True, method="L-BFGS-B", options=options)
        return self._checked(fit.x.reshape(start.shape), fit.jac, scale)
