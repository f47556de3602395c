"""The losses of several labels and of numbers equal torch's own, and their derivatives torch's autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.losses.loss import Loss
from forebear.indexer.losses.sigmoid import SIGMOID
from forebear.indexer.losses.squared import SQUARED

N, C = 9, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, C)) * 3
LABELS = RNG.integers(2, size=(N, C)).astype(np.float64)
SHARES = RNG.random(size=(N, C))
NUMBERS = RNG.normal(size=(N, C)) * 5
CASES = [
    pytest.param(SIGMOID, nn.BCEWithLogitsLoss, LABELS, id="labels"),
    pytest.param(SIGMOID, nn.BCEWithLogitsLoss, SHARES, id="shares"),
    pytest.param(SQUARED, nn.MSELoss, NUMBERS, id="numbers"),
]


@pytest.mark.parametrize(("loss", "of_torch", "targets"), CASES)
def test_values_and_derivatives_are_those_of_torch(loss: Loss, of_torch: Callable[[], nn.Module], targets) -> None:
    residuals, losses = loss.residual_and_loss(LOGITS, targets)
    outputs, basis, roots = loss.outputs(LOGITS), loss.basis(C), loss.square_root(loss.outputs(LOGITS))
    np.testing.assert_allclose(loss.outputs_of_residuals(residuals, targets), outputs, atol=1e-12)
    curvatures, traces = loss.curvature(outputs), loss.curvature_trace(residuals, targets)
    directions = RNG.normal(size=(2, len(basis), N))
    products = loss.curvature_products(torch.from_numpy(outputs), torch.from_numpy(directions)).numpy()
    for n, (row, target) in enumerate(zip(LOGITS, targets, strict=True)):
        logits, t = torch.tensor(row, requires_grad=True), torch.tensor(target)
        value = of_torch()(logits, t)
        (gradient,) = torch.autograd.grad(value, logits)
        hessian = torch.autograd.functional.hessian(lambda z, t=t: of_torch()(z, t), logits.detach()).numpy()
        assert losses[n] == pytest.approx(value.item(), rel=1e-12)
        np.testing.assert_allclose(residuals[n], gradient.numpy(), atol=1e-13)
        np.testing.assert_allclose(basis.T @ curvatures[n] @ basis, hessian, atol=1e-13)
        np.testing.assert_allclose(np.diag(loss.curvature_diagonal(outputs)[n]), hessian, atol=1e-13)
        np.testing.assert_allclose(roots[n] @ roots[n].T, hessian, atol=1e-13)
        np.testing.assert_allclose(products[:, :, n], directions[:, :, n] @ hessian, atol=1e-13)
        assert traces[n] == pytest.approx(np.trace(hessian), rel=1e-12)


@pytest.mark.parametrize(("loss", "of_torch", "targets"), CASES)
def test_what_training_minimises_is_the_mean_loss_of_torch(loss: Loss, of_torch, targets) -> None:
    logits, t = torch.from_numpy(LOGITS), torch.from_numpy(targets)
    torch.testing.assert_close(loss.mean(logits, t), of_torch()(logits, t))
    assert loss.residual_and_loss(LOGITS, targets)[1].mean() == pytest.approx(loss.mean(logits, t).item(), rel=1e-12)


@pytest.mark.parametrize("loss", [SIGMOID, SQUARED], ids=["labels", "numbers"])
def test_a_target_of_one_output_is_the_loss_of_that_output_alone(loss: Loss) -> None:
    targets, full = np.full((N, C), np.nan), LABELS
    targets[:, 2] = full[:, 2]
    residuals, losses = loss.residual_and_loss(LOGITS, targets)
    alone_residuals, alone = loss.residual_and_loss(LOGITS[:, 2:3], full[:, 2:3])
    np.testing.assert_allclose(losses, alone, rtol=1e-13)
    np.testing.assert_allclose(residuals[:, 2:3], alone_residuals, rtol=1e-13)
    assert not residuals[:, [0, 1, 3]].any()
    summed = loss.summed(torch.from_numpy(LOGITS), torch.from_numpy(targets))
    assert summed.item() == pytest.approx(alone.sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [(SIGMOID, LABELS), (SIGMOID, SHARES), (SQUARED, NUMBERS), (SQUARED, np.full((N, C), np.inf))],
)
def test_residuals_and_slopes_are_the_gradients_of_loss_and_support(loss: Loss, targets) -> None:
    for function, found in (
        (loss.summed, loss.residual_and_loss(LOGITS, targets)[0]),
        (lambda z, t: loss.support(z, t).sum(), loss.support_slope(LOGITS, targets)),
    ):
        logits = torch.tensor(LOGITS, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(logits, torch.from_numpy(targets)), logits)
        np.testing.assert_allclose(found, gradient.numpy(), atol=1e-13)


def test_all_but_certain_labels_keep_their_precision() -> None:
    logits, targets = np.array([[40.0, -40.0]]), np.array([[1.0, 0.0]])
    residual, loss = SIGMOID.residual_and_loss(logits, targets)
    small = np.exp(-40.0) / (1 + np.exp(-40.0))  # 4e-18: 1 - it is 1 in float64
    np.testing.assert_allclose(residual, [[-small / 2, small / 2]], rtol=1e-14)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-40.0))], rtol=1e-14)
    for outputs in (SIGMOID.outputs(logits), SIGMOID.outputs_of_residuals(residual.astype(np.float32), targets)):
        np.testing.assert_allclose(SIGMOID.curvature_diagonal(outputs), [[small / 2, small / 2]], rtol=1e-6)


def test_measures_and_texts_are_what_people_count() -> None:
    there = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], np.float64)
    found = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], np.float64)
    assert SIGMOID.measures(found, there) == {"micro-F1": pytest.approx(2 / 3), "subset accuracy": pytest.approx(1 / 3)}
    names = ["a", "b", "c", "d"]
    assert SIGMOID.texts(there, names) == ["a; c", "(none)", "b"]
    asked = np.array([[np.nan, 0, np.nan, np.nan], [1, np.nan, np.nan, np.nan], [np.nan] * 4])
    assert SIGMOID.texts(asked, names) == ["not b", "a", None]
    assert SQUARED.texts(np.array([[1.5], [np.inf], [np.nan]]), ["score"]) == ["1.5", "higher", None]
    measured = SQUARED.measures(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [2.0], [5.0]]))
    assert measured["RMSE"] == pytest.approx(np.sqrt(4 / 3))
    assert measured["correlation"] == pytest.approx(np.corrcoef([1, 2, 3], [1, 2, 5])[0, 1])
    assert CROSS_ENTROPY.texts(np.array([1, -1]), ["no", "yes"]) == ["yes", None]


@pytest.mark.parametrize("number", [4, 0.3, 123456, 123457.25, float(np.float32(0.1)), 1e-9, 1e18, -2.5])
def test_the_text_of_a_number_is_the_number(number) -> None:
    (text,) = SQUARED.texts(np.array([[number]]), ["score"])
    assert float(text) == number or np.float32(text) == np.float32(number) == number
    assert not text.endswith(".0")
    assert SIGMOID.texts(np.array([[0.3], [0.30001]]), ["a"]) == ["a 0.3", "a 0.30001"]
