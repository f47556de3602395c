"""Newton steps and minima of the head without rows, beside refits by scipy that share no code with them."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, root
from torch import nn

from forebear.indexer.curvature.head import HeadCurvature, factorise, head_hessian, weighted_features
from forebear.indexer.curvature.separate import SeparateHead, separate_hessian
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.losses.sigmoid import SigmoidLoss
from forebear.indexer.losses.squared import SquaredLoss
from forebear.retriever.effects import steps as steps_module
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.minimum import HeadRows, Refit
from forebear.retriever.effects.steps import Leaving, leaving, logit_changes, step_of_set, steps_of_rows

N, H, Q, DAMPING = 160, 5, 4, 0.1


@dataclass(frozen=True, eq=False)
class Head:
    """A trained head over random features: what the package is given, and what the oracle knows."""

    loss: object
    features: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    targets: np.ndarray
    queries: np.ndarray
    query_targets: np.ndarray

    @property
    def logits(self):
        return self.features @ self.weight.T + self.bias

    @property
    def inverse(self):
        outputs = self.loss.outputs(self.logits)
        c = len(self.bias)
        f = weighted_features(self.features, self.loss.row_weights(self.targets))
        if self.loss.is_separate:
            return SeparateHead.of(separate_hessian([(f, outputs)], H, c, self.loss), DAMPING, self.loss)
        return HeadCurvature(factorise(head_hessian([(f, outputs)], H, c, self.loss), DAMPING), c, DAMPING, self.loss)

    def leaving(self, rows) -> Leaving:
        residuals, _ = self.loss.residual_and_loss(self.logits, self.targets)
        outputs = self.loss.outputs(self.logits)
        return leaving(self.loss, self.features[rows], residuals[rows], outputs[rows], self.targets[rows], N)

    def effects(self, changes):
        """Changes of the queries' losses and probabilities, ``(q, k)``, by changes of the weight ``(k, a, h)``."""
        logits = self.queries @ self.weight.T + self.bias
        asked = Predictions(self.queries, logits, self.query_targets, self.loss)
        return asked.changes(logit_changes(self.loss, changes, self.queries, len(self.bias)))


def torch_loss(loss, logits, targets):
    """Losses of rows by torch, ``(n,)``."""
    if isinstance(loss, CrossEntropy):
        weight = torch.tensor(loss.class_weights, dtype=torch.float64) if loss.class_weights else None
        smoothing = loss.label_smoothing
        return nn.functional.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing, reduction="none")
    function = (
        nn.functional.mse_loss if isinstance(loss, SquaredLoss) else nn.functional.binary_cross_entropy_with_logits
    )
    return function(logits, targets, reduction="none").mean(dim=1)


def refitted(head, left_out, targets=None):
    """The weight that minimises J_S over all (c, h) numbers: autograd and scipy, begun at 0."""
    f, w0, b = (torch.from_numpy(a) for a in (head.features, head.weight, head.bias))
    y = torch.from_numpy(head.targets)
    new = y if targets is None else torch.from_numpy(targets)
    at_w0 = w0.clone().requires_grad_()
    (linear,) = torch.autograd.grad(torch_loss(head.loss, f @ at_w0.T + b, y).sum() / N, at_w0)
    kept = torch.ones(N, dtype=torch.bool)
    kept[list(left_out)] = False

    def objective(w):
        losses = torch_loss(head.loss, f[kept] @ w.T + b, new[kept])
        return losses.sum() / N + DAMPING / 2 * (w - w0).square().sum() - (linear * w).sum()

    def numbers(flat):
        w = torch.from_numpy(flat).view(w0.shape).requires_grad_()
        value = objective(w)
        (gradient,) = torch.autograd.grad(value, w)
        return value.item(), gradient.reshape(-1).numpy()

    def hessian(flat):
        return torch.autograd.functional.hessian(lambda v: objective(v.view(w0.shape)), torch.from_numpy(flat)).numpy()

    near = minimize(numbers, np.zeros(w0.numel()), jac=True, hess=hessian, method="trust-exact").x
    fit = root(lambda flat: numbers(flat)[1], near, jac=hessian, tol=1e-15)
    assert np.abs(fit.fun).max() < 1e-14
    return fit.x.reshape(w0.shape)


def true_effects(head, weight):
    """Changes of the queries' losses, ``(q,)``, by torch."""
    q, b, y = (torch.from_numpy(a) for a in (head.queries, head.bias, head.query_targets))
    old, new = (torch_loss(head.loss, q @ torch.from_numpy(w).T + b, y) for w in (head.weight, weight))
    return (new - old).numpy()


LOSSES = {
    "two classes": (CrossEntropy(), 2),
    "four classes": (CrossEntropy(), 4),
    "class weights": (CrossEntropy((0.5, 2.0, 1.0)), 3),
    "label smoothing": (CrossEntropy((), 0.2), 3),
    "weights and smoothing": (CrossEntropy((0.5, 3.0), 0.1), 2),
    "several labels": (SigmoidLoss(), 3),
    "numbers": (SquaredLoss(), 2),
}


@pytest.fixture(params=LOSSES)
def head(request):
    loss, c = LOSSES[request.param]
    rng = np.random.default_rng(5)
    features, queries = rng.normal(size=(N, H)), rng.normal(size=(Q, H))
    weight, bias = rng.normal(size=(c, H)), rng.normal(size=c)
    if isinstance(loss, CrossEntropy):
        noisy = features @ weight.T + bias + rng.gumbel(size=(N, c))  # labels as probable as the head says
        targets, query_targets = noisy.argmax(axis=1), rng.integers(c, size=Q)
    elif isinstance(loss, SigmoidLoss):
        targets, query_targets = (rng.integers(2, size=(n, c)).astype(float) for n in (N, Q))
    else:
        targets, query_targets = rng.normal(size=(N, c)), rng.normal(size=(Q, c))
    return Head(loss, features, weight, bias, targets, queries, query_targets)


def relative(found, truth):
    return np.abs(found - truth).max() / np.abs(truth).max()


def test_a_rows_newton_step_is_nearer_to_a_refit_than_first_order(head):
    rows = np.arange(12)
    steps = steps_of_rows(head.inverse, head.leaving(rows))
    truth = np.stack([true_effects(head, refitted(head, [n])) for n in rows], axis=1)
    found, _ = head.effects(steps)
    gone = head.leaving(rows)
    first = head.inverse.solve_matrix(gone.gradients[:, :, None] * gone.features[:, None, :])
    assert relative(found, truth) < 0.05
    assert relative(found, truth) < 0.75 * relative(head.effects(first)[0], truth)
    if isinstance(head.loss, SquaredLoss):
        assert relative(found, truth) < 1e-9


def test_steps_of_rows_do_not_depend_on_their_blocks(head, monkeypatch):
    rows = np.arange(12)
    steps = steps_of_rows(head.inverse, head.leaving(rows))
    monkeypatch.setattr(steps_module, "BLOCK_NUMBERS", 5 * steps[0].size)  # the last block is shorter
    np.testing.assert_allclose(steps_of_rows(head.inverse, head.leaving(rows)), steps, rtol=1e-9, atol=1e-15)


def test_steps_of_many_rows_take_no_memory_beside_themselves(monkeypatch):
    n, h = 4000, 16
    features, curvatures = np.random.default_rng(0).normal(size=(n, h)), np.full((n, 1, 1), 0.5 / n)
    hessian = (features * curvatures[:, 0]).T @ features
    inverse = HeadCurvature(factorise(hessian, DAMPING), 2, DAMPING, CrossEntropy())
    monkeypatch.setattr(steps_module, "BLOCK_NUMBERS", 1000)
    rows, out = Leaving(features, np.full((n, 1), 0.5 / n), curvatures), []
    tracemalloc.start()
    try:
        out.append(steps_of_rows(inverse, rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * out[0].nbytes


def test_the_step_of_a_set_solves_for_all_rows_together(head):
    for n in (1, 3, H, H + 1, N // 2):
        rows = np.arange(n)
        gone = head.leaving(rows)
        step = step_of_set(head.inverse, gone)
        outputs = head.loss.outputs(head.logits)
        basis, weights = head.loss.basis(len(head.bias)), head.loss.row_weights(head.targets)
        hessian = DAMPING * np.eye(len(basis) * H)
        for i in range(n, N):
            at_logits = head.loss.curvature(outputs[i : i + 1])[0] * (1 if weights is None else weights[i])
            hessian += np.kron(at_logits, np.outer(head.features[i], head.features[i])) / N
        gradient = sum(np.outer(r, f) for r, f in zip(gone.gradients, gone.features, strict=True))
        np.testing.assert_allclose(step.reshape(-1), np.linalg.solve(hessian, gradient.reshape(-1)), rtol=1e-9)
        if n == 1:
            np.testing.assert_allclose(step, steps_of_rows(head.inverse, gone)[0], rtol=1e-9)


def test_the_step_of_most_rows_is_solved_without_products_where_these_are_not_enough(head, monkeypatch):
    gone = head.leaving(np.arange(N - 4))
    by_products = step_of_set(head.inverse, gone)
    monkeypatch.setattr("forebear.retriever.effects.steps.MAX_PRODUCTS", 2)
    np.testing.assert_allclose(step_of_set(head.inverse, gone), by_products, rtol=1e-8, atol=1e-10)
    steps = steps_of_rows(head.inverse, head.leaving(np.arange(8)))
    monkeypatch.undo()
    np.testing.assert_allclose(steps, steps_of_rows(head.inverse, head.leaving(np.arange(8))), rtol=1e-9)


def test_a_row_without_a_gradient_changes_nothing(head):
    gone = head.leaving(np.arange(3))
    gone.gradients[1] = 0
    steps = steps_of_rows(head.inverse, gone)
    assert not steps[1].any()
    assert np.abs(steps[[0, 2]]).min() > 0


@pytest.mark.parametrize("n", [1, 6, 80])
def test_the_minimum_is_that_of_a_refit(head, n):
    rows = np.arange(n)
    kept = np.arange(N) >= n
    found = _minimum(head, kept, head.targets, step_of_set(head.inverse, head.leaving(rows)))
    weight = refitted(head, rows)
    np.testing.assert_allclose(head.weight + head.loss.basis(len(head.bias)).T @ found, weight, atol=1e-8)
    assert relative(head.effects(found[None])[0][:, 0], true_effects(head, weight)) < 1e-7


def _minimum(head, kept, targets, start):
    trained = HeadRows(head.features, head.logits, head.targets)
    rows = HeadRows(head.features, head.logits, targets).take(kept)
    return Refit(trained, head.loss, DAMPING).minimum(rows, start)


def test_curvature_along_a_change_is_the_second_derivative_of_the_objective(head):
    basis, kept = head.loss.basis(len(head.bias)), np.arange(N) >= 20
    v, at = np.random.default_rng(2).normal(size=(2, len(basis), H))
    f, w0, b, y = (torch.from_numpy(a) for a in (head.features, head.weight, head.bias, head.targets))

    def objective(t):
        change = torch.from_numpy(basis.T) @ (torch.from_numpy(at) + t * torch.from_numpy(v))
        losses = torch_loss(head.loss, f[kept] @ (w0 + change).T + b, y[kept])
        return losses.sum() / N + DAMPING / 2 * change.square().sum()

    truth = torch.autograd.functional.hessian(objective, torch.zeros((), dtype=torch.float64)).item()
    trained = HeadRows(head.features, head.logits, head.targets)
    found = Refit(trained, head.loss, DAMPING).curvature_along(v, at, trained.take(kept))
    assert found == pytest.approx(truth, rel=1e-9)


def test_without_a_removal_the_minimum_is_the_trained_weight(head):
    kept = np.ones(N, bool)
    start = np.zeros((len(head.loss.basis(len(head.bias))), H))
    assert np.abs(_minimum(head, kept, head.targets, start)).max() < 1e-12
    np.testing.assert_allclose(refitted(head, []), head.weight, atol=1e-9)


def test_the_minimum_is_reached_from_afar_and_with_other_targets(head):
    targets = np.roll(head.targets, 1, axis=0)
    start = 3 * np.ones((len(head.loss.basis(len(head.bias))), H))
    found = _minimum(head, np.ones(N, bool), targets, start)
    weight = refitted(head, [], targets)
    np.testing.assert_allclose(head.weight + head.loss.basis(len(head.bias)).T @ found, weight, atol=1e-8)


def test_minima_of_large_heads_come_by_lbfgs(head, monkeypatch):
    kept = np.arange(N) >= 6
    start = np.zeros((len(head.loss.basis(len(head.bias))), H))
    newton = _minimum(head, kept, head.targets, start)
    monkeypatch.setattr("forebear.retriever.effects.minimum.fits_dense", lambda *_: False)
    np.testing.assert_allclose(_minimum(head, kept, head.targets, start), newton, atol=1e-7)


def test_the_step_of_a_smaller_set_errs_less(head):
    """Against the minimum, relative to the change itself; of numbers one step is exact."""

    def error(rows):
        step = step_of_set(head.inverse, head.leaving(rows))
        best = _minimum(head, ~np.isin(np.arange(N), rows), head.targets, step)
        return np.linalg.norm(step - best) / np.linalg.norm(best)

    large, small = error(np.arange(48)), np.mean([error(np.array([n])) for n in range(24)])
    assert large < 1e-9 if isinstance(head.loss, SquaredLoss) else small < large / 2


def test_probabilities_change_as_the_logits_say(head):
    steps = steps_of_rows(head.inverse, head.leaving(np.arange(5)))
    _, probabilities = head.effects(steps)
    if isinstance(head.loss, SquaredLoss):
        assert np.isnan(probabilities).all()
        return
    basis, q = head.loss.basis(len(head.bias)), torch.from_numpy(head.queries)
    for k, step in enumerate(steps):
        old, new = (
            q @ torch.from_numpy(w).T + torch.from_numpy(head.bias) for w in (head.weight, head.weight + basis.T @ step)
        )
        if isinstance(head.loss, SigmoidLoss):
            t = torch.from_numpy(head.query_targets)
            expected = [(t * z.sigmoid() + (1 - t) * (1 - z.sigmoid())).mean(dim=1) for z in (old, new)]
        else:
            expected = [z.softmax(dim=1)[torch.arange(Q), torch.from_numpy(head.query_targets)] for z in (old, new)]
        np.testing.assert_allclose(probabilities[:, k], (expected[1] - expected[0]).numpy(), atol=1e-12)
