"""Newton steps of the head's weight when training rows are left out or get other targets: formulas on arrays.

Leaving out a set S of the N training rows means to minimise, beside the trained weight W0,

    J_S(W) = 1/N sum over n not in S of l_n(W) + damping/2 ||W - W0||^2 - <mean of all g_n, W>,

whose minimum without a removal is W0, trained to the end or not (the proximal Bregman response of Bae et al., 2022).
One Newton step from W0 takes the curvature of the rows that go out of H:

    dW = (H - 1/N sum over S of A_n kron f_n f_n^T)^-1 (1/N sum over S of r_n outer f_n),

H being damped, and A_n and r_n the curvature and the gradient of the row's loss at its logits. It is found by conjugate
gradients, preconditioned by H^-1: H less what goes out differs from H in as many directions as the rows have, and
little in most of them, so that a few products with H^-1 are enough for single rows and small sets. Where they are not,
as for most of the rows, the matrix without the set is factorised. A row that gets another target goes out with the old
one and comes in with the new one: A and r are then differences.

Everything is in the loss' basis of a directions (:meth:`~forebear.indexer.losses.loss.Loss.basis`), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.indexer.curvature.head import HeadInverse
from forebear.indexer.losses.loss import Loss

TOLERANCE = 1e-12  # what is left of the gradient, beside all of it
BLOCK_NUMBERS = 1 << 20  # of the steps that are looked for at once, about ten times as many being held
MAX_PRODUCTS = 50  # with H^-1 of a set, before the matrix without it is factorised


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
    """Newton step of each row's removal alone, ``(n, a, h)``, a block of rows after another."""
    n, h = rows.features.shape
    steps = np.empty((n, rows.gradients.shape[1], h))
    size = max(1, BLOCK_NUMBERS // max(1, steps[:1].size))
    for start in range(0, n, size):
        block = slice(start, start + size)
        sets = Leaving(rows.features[block, None], rows.gradients[block, None], rows.curvatures[block, None])
        steps[block] = _steps(inverse, sets)
    return steps


def step_of_set(inverse: HeadInverse, rows: Leaving) -> np.ndarray:
    """Newton step of the removal of all rows together, ``(a, h)``."""
    return np.asarray(_steps(inverse, Leaving(rows.features[None], rows.gradients[None], rows.curvatures[None]))[0])


def _steps(inverse: HeadInverse, sets: Leaving) -> np.ndarray:
    """Newton steps of the removal of k sets, each by itself, ``(k, a, h)``.

    Args:
        inverse: H^-1.
        sets: What goes out, with an axis of sets before that of rows.

    Raises:
        InputError: The damping is too small for H without a set to be solved with in float64.
    """
    residual = sets.gradients.swapaxes(1, 2) @ sets.features
    steps, scale = np.zeros_like(residual), np.linalg.norm(residual, axis=(1, 2))
    direction, image, size = np.zeros_like(residual), np.zeros_like(residual), np.ones(len(residual))
    left = np.flatnonzero(scale)
    for _ in range(MAX_PRODUCTS):
        if not len(left):
            break
        solved = inverse.solve_matrix(residual[left])
        new_size = (residual[left] * solved).sum(axis=(1, 2))
        conjugate = (new_size / size[left])[:, None, None]
        direction[left], size[left] = solved + conjugate * direction[left], new_size
        image[left] = residual[left] + conjugate * image[left]  # H times the direction
        change = image[left] - _curvature_product(sets, left, direction[left])
        length = new_size / (direction[left] * change).sum(axis=(1, 2))
        steps[left] += length[:, None, None] * direction[left]
        residual[left] -= length[:, None, None] * change
        left = left[~(np.linalg.norm(residual[left], axis=(1, 2)) <= TOLERANCE * scale[left])]
    for k in left:
        without = inverse.without(sets.features[k], sets.curvatures[k])
        steps[k] = without.solve_matrix(sets.gradients[k].T @ sets.features[k][None])[0]
    return np.asarray(steps)


def _curvature_product(sets: Leaving, numbers: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """What goes out of H with some sets, times a vector each, ``(k, a, h)``."""
    some = slice(None) if len(numbers) == len(sets.features) else numbers  # all of them are not copied
    features = sets.features[some]
    at_logits = sets.curvatures[some] @ (features @ vectors.swapaxes(1, 2))[..., None]
    return np.asarray(at_logits[..., 0].swapaxes(1, 2) @ features)


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
