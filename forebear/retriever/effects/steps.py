"""Newton steps of the head's weight when training rows are left out or get other targets: formulas on arrays.

Leaving out a set S of the N training rows means to minimise, beside the trained weight W0,

    J_S(W) = 1/N sum over n not in S of l_n(W) + damping/2 ||W - W0||^2 - <mean of all g_n, W>,

whose minimum without a removal is W0, trained to the end or not (the proximal Bregman response of Bae et al., 2022).
One Newton step from W0 takes the curvature of the rows that go out of H:

    dW = (H - 1/N sum over S of A_n kron f_n f_n^T)^-1 (1/N sum over S of r_n outer f_n),

H being damped, and A_n and r_n the curvature and the gradient of the row's loss at its logits. With U the columns
I kron f_n of all rows of S, C = diag(A_n) / N and G = U^T H^-1 U it is H^-1 U (I - C G)^-1 r / N (Woodbury), so that
nothing larger than the set is factorised. A row that gets another target goes out with the old one and comes in with
the new one: A and r are then differences.

Everything is in the loss' basis of a directions (:meth:`~forebear.indexer.losses.loss.Loss.basis`), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.indexer.curvature.head import HeadInverse
from forebear.indexer.losses.loss import Loss


@dataclass(frozen=True, eq=False)
class Leaving:
    """What goes out of the mean loss of N rows when ``n`` of them are left out or get other targets.

    Attributes:
        features: f, ``(n, h)``.
        gradients: r / N in the basis, ``(n, a)``: what goes out of the gradient at the logits.
        curvatures: A / N in the basis, ``(n, a, a)``: what goes out of the curvature at the logits.
    """

    features: np.ndarray
    gradients: np.ndarray
    curvatures: np.ndarray


def leaving(
    loss: Loss, features: np.ndarray, residuals: np.ndarray, outputs: np.ndarray, targets: np.ndarray, n_rows: int
) -> Leaving:
    """What goes out with rows that are left out.

    Args:
        loss: The loss.
        features: f, ``(n, h)``.
        residuals: r, ``(n, c)``.
        outputs: The loss' outputs, ``(n, c)``.
        targets: ``n`` targets.
        n_rows: N.
    """
    basis = loss.basis(residuals.shape[1])
    curvatures = loss.curvature(outputs)
    if (weights := loss.row_weights(targets)) is not None:
        curvatures = weights[:, None, None] * curvatures
    wide = features.astype(np.float64)
    return Leaving(wide, residuals.astype(np.float64) @ basis.T / n_rows, curvatures / n_rows)


def steps_of_rows(inverse: HeadInverse, rows: Leaving) -> np.ndarray:
    """Newton step of each row's removal alone, ``(n, a, h)``."""
    products = inverse.feature_products(rows.features)
    system = np.eye(products.shape[1]) - rows.curvatures @ products
    at_logits = np.linalg.solve(system, rows.gradients[:, :, None])[:, :, 0]
    return inverse.solve_matrix(at_logits[:, :, None] * rows.features[:, None, :])


def step_of_set(inverse: HeadInverse, rows: Leaving) -> np.ndarray:
    """Newton step of the removal of all rows together, ``(a, h)``."""
    n, a = rows.gradients.shape
    if n > rows.features.shape[1]:  # the matrix of the rows that stay is the smaller one
        gradient = np.einsum("na,nh->ah", rows.gradients, rows.features)
        return np.asarray(inverse.without(rows.features, rows.curvatures).solve_matrix(gradient[None])[0])
    system = np.eye(n * a).reshape(n, a, n, a)
    system -= np.einsum("nab,nbmd->namd", rows.curvatures, inverse.pair_products(rows.features), optimize=True)
    at_logits = np.linalg.solve(system.reshape(n * a, n * a), rows.gradients.reshape(-1)).reshape(n, a)
    return np.asarray(inverse.solve_matrix((at_logits.T @ rows.features)[None])[0])


def logit_changes(loss: Loss, steps: np.ndarray, features: np.ndarray, n_outputs: int) -> np.ndarray:
    """Changes of the logits of test rows by each of some changes of the weight.

    Args:
        loss: The loss.
        steps: Changes of the weight in the basis, ``(k, a, h)``.
        features: f of the test rows, ``(q, h)``.
        n_outputs: c.

    Returns:
        ``(q, k, c)`` float64.
    """
    k, a, h = steps.shape
    in_basis = features.astype(np.float64) @ steps.reshape(k * a, h).T
    return np.asarray(in_basis.reshape(len(features), k, a) @ loss.basis(n_outputs))
