"""The derivative through a run: finite differences of real trainings, and a training that autograd keeps whole."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import labels, sentences
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.errors import ModelError, NonFiniteError
from forebear.indexer.losses.cross_entropy import IGNORED, CrossEntropy
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.training.fine_tuning import fine_tune
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.recorded_start import arrays
from forebear.indexer.training.replay import derivative
from forebear.indexer.training.replay.derivative import loss_slopes, row_derivatives
from forebear.indexer.training.replay.trajectory import Trajectory

N = 14
TEXTS, LABELS = sentences(N, seed=4), np.array(labels(N, 2))
QUERIES, TARGETS = sentences(2, seed=77), np.array([0, 1])
OPTIONS = TrainOptions(
    epochs=2, batch_size=4, learning_rate=2e-2, weight_decay=0.1, warmup_ratio=0.3, seed=3, precision="fp32",
    device="cpu",
)  # fmt: skip
STEP = 1e-5  # of finite differences
LARGE, SMALL = 1 << 30, 300_000  # bytes: all states in memory; every third state, most of them in files


class WeightedRows(CrossEntropy):
    """The loss of a retraining in which rows have weights; a row's label is its number."""

    weights = torch.ones(N, dtype=torch.float64)

    def mean(self, logits, targets):
        weights = self.weights[targets]
        losses = nn.functional.cross_entropy(logits, torch.from_numpy(LABELS)[targets], reduction="none")
        return (weights * losses).sum() / weights.sum()

    def total_weight(self, targets):
        return torch.tensor(float(len(targets)))


@pytest.fixture
def start(tiny_model):
    """A tiny model in float64, all of whose parameters are trained."""

    def load():
        classifier = load_classifier(tiny_model("bert", 2, 5, 2.0), device="cpu")
        classifier.model.double().requires_grad_(True)
        return classifier

    return load


def labelled(classifier, targets=LABELS):
    return [
        {**row, "labels": int(label)} for row, label in zip(arrays(encode(classifier, [TEXTS])), targets, strict=True)
    ]


def derivatives(trajectory: Trajectory) -> np.ndarray:
    slopes = loss_slopes(trajectory, encode(trajectory.classifier, [QUERIES]), TARGETS, np.arange(2))
    return row_derivatives(trajectory, slopes)


def query_losses(model, tokenizer) -> torch.Tensor:
    logits = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in QUERIES])
    return nn.functional.cross_entropy(logits, torch.from_numpy(TARGETS), reduction="none")


def retrained_losses(start, weights: np.ndarray) -> np.ndarray:
    """Losses of the queries after the loop of ``forebear train`` with weighted rows."""
    loss = WeightedRows()
    object.__setattr__(loss, "weights", torch.from_numpy(weights))
    classifier = replace(start(), loss=loss)
    fine_tune(classifier, labelled(classifier, np.arange(N)), OPTIONS)
    with torch.no_grad():
        return query_losses(classifier.model, classifier.tokenizer).numpy()


@pytest.mark.slow
def test_derivatives_are_finite_differences_of_retrainings_with_another_weight_of_a_row(start, monkeypatch):
    factors = []

    def noted(*given):
        factors.append(clip(*given)[0])
        return clip(*given)

    clip = derivative.clip_factor
    monkeypatch.setattr(derivative, "clip_factor", noted)
    found = derivatives(Trajectory(start(), labelled(start()), OPTIONS))
    assert min(factors) < 1 == max(factors)  # clipped in some steps, and not in others
    for row in (0, 6, 13):
        weights = np.ones((2, N))
        weights[:, row] += (STEP, -STEP)
        above, below = (retrained_losses(start, of_rows) for of_rows in weights)
        np.testing.assert_allclose(found[:, row], (above - below) / (2 * STEP), rtol=1e-6)


def unrolled_derivatives(start, batches) -> np.ndarray:
    """All steps of the training as one expression of the rows' weights, which autograd differentiates at once."""
    classifier = start()
    model, tokenizer = classifier.model.train(), classifier.tokenizer
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    theta = dict(model.named_parameters())
    is_plain = {name: "LayerNorm" in name or name.endswith("bias") for name in theta}
    m, v = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    n_steps = len(batches)
    n_warm = int(OPTIONS.warmup_ratio * n_steps)
    for t, rows in enumerate(batches):
        share = t / n_warm if t < n_warm else (n_steps - t) / (n_steps - n_warm)
        rate = OPTIONS.learning_rate * share
        inputs = tokenizer([TEXTS[i] for i in rows], padding=True, return_tensors="pt")
        torch.manual_seed(int(np.random.SeedSequence([OPTIONS.seed, t]).generate_state(1, np.uint64)[0]))
        logits = functional_call(model, theta, args=(), kwargs=dict(inputs)).logits
        losses = nn.functional.cross_entropy(logits, torch.from_numpy(LABELS)[rows], reduction="none")
        loss = (weights[rows] * losses).sum() / weights[rows].sum()
        g = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))
        norm = torch.sqrt(sum((x**2).sum() for x in g.values()))
        clip = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        for name in theta:
            h = g[name] * clip
            m[name] = 0.9 * m[name] + 0.1 * h
            v[name] = 0.999 * v[name] + 0.001 * h**2
            # Where nothing has reached a parameter yet, the root has no derivative: it stands still.
            root = torch.where(v[name] > 0, torch.where(v[name] > 0, v[name], 1.0).sqrt(), 0.0)
            divisor = root / math.sqrt(1 - 0.999 ** (t + 1)) + 1e-8
            decayed = theta[name] * (1 - rate * (0.0 if is_plain[name] else OPTIONS.weight_decay))
            theta[name] = decayed - rate / (1 - 0.9 ** (t + 1)) * m[name] / divisor
    model.eval()
    losses = query_losses(lambda **inputs: functional_call(model, theta, args=(), kwargs=inputs), tokenizer)
    return np.stack([torch.autograd.grad(loss, weights, retain_graph=True)[0].numpy() for loss in losses])


@pytest.mark.parametrize("memory_bytes", [LARGE, SMALL])
def test_derivatives_are_those_of_a_training_that_autograd_keeps_whole(start, memory_bytes):
    trajectory = Trajectory(start(), labelled(start()), OPTIONS, memory_bytes=memory_bytes)
    assert len(trajectory.stretches) == (8 if memory_bytes == LARGE else 3)
    assert trajectory.n_bytes <= memory_bytes
    found = derivatives(trajectory)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = unrolled_derivatives(start, trajectory.batches)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_sum_of_losses_has_the_sum_of_the_derivatives(start):
    trajectory = Trajectory(start(), labelled(start()), OPTIONS)
    one_by_one = derivatives(trajectory)
    slopes = loss_slopes(trajectory, encode(trajectory.classifier, [QUERIES]), TARGETS, np.zeros(2, np.int64))
    np.testing.assert_allclose(row_derivatives(trajectory, slopes), one_by_one.sum(axis=0, keepdims=True), rtol=1e-10)


def test_a_weight_of_0_is_a_training_without_the_row():
    """The mean is that of the other rows, class weights in its divisor, as where the row is ``IGNORED``."""
    loss = CrossEntropy((1.0, 3.0), 0.1)
    logits = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(loss.weighted_mean(logits, targets, torch.ones(5)), loss.mean(logits, targets))
    without = torch.tensor([0, 1, IGNORED, 0, 1])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(loss.weighted_mean(logits, targets, weights), loss.mean(logits, without))
    assert loss.weighted_mean(logits, targets, torch.zeros(5)) == 0  # as where all rows are left out


def test_dropout_that_differs_where_a_gradient_is_differentiated_is_refused(start):
    trajectory = Trajectory(start(), labelled(start()), OPTIONS)
    trajectory.losses[5] += 0.01
    with pytest.raises(ModelError, match="step 6 of the run"):
        derivatives(trajectory)


def test_a_layer_without_second_derivative_is_refused(start):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(_ctx, slope):
            return 2 * slope

    classifier = start()
    classifier.head.register_forward_pre_hook(lambda _module, given: (Once.apply(given[0]),))
    with pytest.raises(ModelError, match="cannot differentiate twice"):
        derivatives(Trajectory(classifier, labelled(classifier), OPTIONS))


def test_a_derivative_without_bound_is_refused_by_the_row(start):
    trajectory = Trajectory(start(), labelled(start()), OPTIONS)
    slopes = loss_slopes(trajectory, encode(trajectory.classifier, [QUERIES]), TARGETS, np.arange(2))
    slopes[0][0][:] = np.inf
    with pytest.raises(NonFiniteError, match="training row 0 is NaN or infinite"):
        row_derivatives(trajectory, slopes)
