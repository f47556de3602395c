"""Cross-entropy with class weights and label smoothing equals torch's own, and its derivatives torch's autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from forebear.indexer.losses.cross_entropy import IGNORED, CrossEntropy

N_CLASSES = 4
WEIGHTS = (0.5, 2.0, 1.25, 0.1)
LOSSES = [
    CrossEntropy(),
    CrossEntropy(class_weights=WEIGHTS),
    CrossEntropy(label_smoothing=0.2),
    CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.2),
]
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(9, N_CLASSES)) * 3
TARGETS = RNG.integers(N_CLASSES, size=9)


def torch_loss(loss: CrossEntropy, reduction: str) -> nn.CrossEntropyLoss:
    weight = torch.tensor(loss.class_weights, dtype=torch.float64) if loss.class_weights else None
    return nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=loss.label_smoothing)


@pytest.mark.parametrize("loss", LOSSES, ids=CrossEntropy.describe)
def test_values_and_derivatives_are_those_of_torch(loss: CrossEntropy) -> None:
    of_row = torch_loss(loss, "sum")
    residuals, losses = loss.residual_and_loss(LOGITS, TARGETS)
    outputs, basis, weights = loss.outputs(LOGITS), loss.basis(N_CLASSES), loss.row_weights(TARGETS)
    np.testing.assert_allclose(loss.outputs_of_residuals(residuals, TARGETS), outputs, atol=1e-14)
    curvatures = loss.curvature(outputs) * (np.ones(9) if weights is None else weights)[:, None, None]
    traces = loss.curvature_trace(residuals, TARGETS)
    roots = loss.square_root(outputs)
    directions = RNG.normal(size=(2, len(basis), 9))
    products = loss.curvature_products(torch.from_numpy(outputs), torch.from_numpy(directions)).numpy()
    for n, (row, target) in enumerate(zip(LOGITS, TARGETS, strict=True)):
        logits, y = torch.tensor(row, requires_grad=True), torch.tensor(target)
        value = of_row(logits, y)
        (gradient,) = torch.autograd.grad(value, logits)
        hessian = torch.autograd.functional.hessian(lambda z, y=y: of_row(z, y), logits.detach()).numpy()
        weight = 1.0 if weights is None else weights[n]
        assert losses[n] == pytest.approx(value.item(), rel=1e-12)
        np.testing.assert_allclose(residuals[n], gradient.numpy(), atol=1e-13)
        np.testing.assert_allclose(basis.T @ curvatures[n] @ basis, hessian, atol=1e-13)
        np.testing.assert_allclose(weight * roots[n] @ roots[n].T, hessian, atol=1e-13)
        np.testing.assert_allclose(
            weight * products[:, :, n], directions[:, :, n] @ (basis @ hessian @ basis.T), atol=1e-13
        )
        assert traces[n] == pytest.approx(np.trace(hessian), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=CrossEntropy.describe)
def test_the_mean_of_a_batch_is_that_of_torch_and_ignored_rows_take_no_part(loss: CrossEntropy) -> None:
    logits, targets = torch.from_numpy(LOGITS), torch.from_numpy(TARGETS.copy())
    targets[[1, 4]] = IGNORED
    torch.testing.assert_close(loss.mean(logits, targets), torch_loss(loss, "mean")(logits, targets), rtol=1e-6, atol=0)
    assert loss.mean(logits, torch.full((9,), IGNORED)).item() == 0


def test_the_slope_of_the_support_is_that_of_the_probability() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    support = CrossEntropy().support(logits, torch.from_numpy(TARGETS))
    np.testing.assert_allclose(support.detach(), logits.softmax(1)[range(9), TARGETS].detach())
    (slope,) = torch.autograd.grad(logits.softmax(1)[range(9), TARGETS].sum(), logits)
    np.testing.assert_allclose(CrossEntropy().support_slope(LOGITS, TARGETS), slope.numpy(), atol=1e-14)
