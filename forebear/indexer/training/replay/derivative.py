"""The derivative of a number that a training leads to with respect to the weight of every training row.

Row n has the weight w_n, 1 in the run, in the loss of each batch that it is in: sum of w_n l_n over sum of w_n (with
class weights c_n: over sum of w_n c_n). With w_n = 0 the batch has the mean of its other rows, which is what a
retraining without the row does. The derivative is taken backward through the steps of the run, from the last to the
first (Ilyas and Engstrom 2025, "MAGIC: Near-Optimal Data Attribution for Deep Learning"; Engstrom et al. 2025,
"Optimizing ML Training with Metagradient Descent"): at each step the adjoints of weights and moments go back through
AdamW and clipping to the batch's gradient, and one backward pass through this gradient gives what they add to the
adjoint of the weights (a product with the Hessian) and the derivatives of the batch's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forebear.errors import ModelError, NonFiniteError
from forebear.indexer.model.device.arithmetic import own_random_numbers, repeatable
from forebear.indexer.model.device.memory import refusing_lack
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.training.course import MAX_GRAD_NORM
from forebear.indexer.training.replay.adamw import back_through_clipping, back_through_update, clip_factor
from forebear.indexer.training.replay.states import State, Tensors
from forebear.indexer.training.replay.trajectory import Trajectory
from forebear.progress import Progress, no_progress

NOT_DIFFERENTIABLE = ("torch::autograd::Error", "torch::autograd::NotImplemented")  # nodes of a graph of torch
LOSS_TOLERANCE = 1e-4  # between the loss of a batch by one kernel and by another, relative to it or to 1


@dataclass(frozen=True, eq=False)
class Adjoint:
    """Derivative of one number with respect to the state before a step: weights, first and second moments."""

    weights: Tensors
    first: Tensors
    second: Tensors

    @classmethod
    def of_end(cls, slope: Tensors) -> Adjoint:
        """After the last step: the number depends on the weights alone, with this slope."""
        return cls(slope, *([torch.zeros_like(tensor) for tensor in slope] for _ in range(2)))


def loss_slopes(
    trajectory: Trajectory, rows: Sequence[dict[str, Any]], targets: np.ndarray, groups: np.ndarray
) -> list[Tensors]:
    """Gradients of the losses of test rows with respect to the trained parameters after the run, summed by group.

    Args:
        trajectory: The run.
        rows: Word pieces of the test rows.
        targets: Whose loss it is, ``(q,)``; the model is in ``eval()`` mode.
        groups: Number of each row's group, from 0, ``(q,)``.

    Returns:
        Of each group one tensor a trained parameter; 0 for parameters on which the losses do not depend.
    """
    trajectory.last_weights()
    classifier = trajectory.classifier
    model = classifier.model.eval()
    slopes = [[torch.zeros_like(p) for p in trajectory.parameters] for _ in range(int(groups.max()) + 1)]
    for row, target, group in zip(rows, targets, groups.tolist(), strict=True):
        with classifier.arithmetic():
            logits = model(**pad_batch(classifier.tokenizer, [row], classifier.device)).logits
        residual, _ = classifier.loss.residual_and_loss(logits.detach().double().cpu().numpy(), target[None])
        seed = torch.from_numpy(residual).to(logits)
        with repeatable(classifier.device):
            found = torch.autograd.grad(logits, trajectory.parameters, seed, allow_unused=True)
        for slope, gradient in zip(slopes[group], found, strict=True):
            if gradient is not None:
                slope += gradient
    return slopes


def row_derivatives(trajectory: Trajectory, slopes: Sequence[Tensors], progress: Progress = no_progress) -> np.ndarray:
    """Derivative of some numbers with respect to the weight of every training row, through the whole run.

    Args:
        trajectory: The run, of T steps.
        slopes: Derivative of each of q numbers with respect to the trained parameters after the run; used up.
        progress: Called with the stage, and the steps done and in all.

    Returns:
        ``(q, n)`` float64. To first order a number changes by minus its derivative if the row is left out.

    Raises:
        ModelError: The model computes something that torch cannot differentiate twice, or draws its random numbers
            otherwise where it does.
        MismatchError: The machine does not repeat the numbers of the run.
        NonFiniteError: A derivative is NaN or infinite.
    """
    adjoints = [Adjoint.of_end(slope) for slope in slopes]
    derivatives = np.zeros((len(adjoints), len(trajectory.course.rows)))
    done = 0
    for first, last in reversed(trajectory.stretches):
        states = trajectory.states(first, last)
        after = states.get(last)
        trajectory.classifier.model.train()
        for step in range(last - 1, first - 1, -1):
            before = states.get(step)
            trajectory.put(before)
            rows = trajectory.batches[step]
            derivatives[:, rows] += _back_through_step(trajectory, step, after, adjoints)
            after = before
            done += 1
            progress("differentiating the run", done, trajectory.n_steps)
    if not np.isfinite(derivatives).all():
        row = int(np.flatnonzero(~np.isfinite(derivatives).all(axis=0))[0])
        raise NonFiniteError(
            f"the derivative of the run with respect to training row {row} is NaN or infinite: small changes of a row "
            "change the run without bound. Train with a lower --learning-rate, and index again."
        )
    return derivatives


def _back_through_step(trajectory: Trajectory, step: int, after: State, adjoints: Sequence[Adjoint]) -> np.ndarray:
    """Take adjoints back through a step, in place; the derivatives of its rows, ``(q, b)`` float64."""
    parameters, device = trajectory.parameters, trajectory.classifier.device
    n_rows = len(trajectory.batches[step])
    subject = f"the second derivative of a training step of {n_rows} rows"
    with refusing_lack(subject, device, "Train with a smaller --batch-size"), repeatable(device):
        weights, gradients = _batch_gradient(trajectory, step)
        plain = [gradient.detach() for gradient in gradients]
        factor, norm = clip_factor(plain, MAX_GRAD_NORM)
        moments = [(m.to(device), v.to(device)) for m, v in zip(after.first, after.second, strict=True)]
        updates = trajectory.updates(step)
        found = np.empty((len(adjoints), n_rows))
        for i, adjoint in enumerate(adjoints):
            of_clipped = [
                back_through_update(of_parameter, g * factor, m, v, update)
                for of_parameter, g, (m, v), update in zip(
                    zip(adjoint.weights, adjoint.first, adjoint.second, strict=True),
                    plain, moments, updates, strict=True,
                )
            ]  # fmt: skip
            of_gradient = back_through_clipping(of_clipped, plain, factor, norm)
            *products, of_rows = torch.autograd.grad(
                gradients, [*parameters, weights], of_gradient, retain_graph=i + 1 < len(adjoints), allow_unused=True
            )
            for of_weights, product in zip(adjoint.weights, products, strict=True):
                if product is not None:
                    of_weights += product
            assert of_rows is not None
            found[i] = of_rows.double().cpu().numpy()
    return found


def _batch_gradient(trajectory: Trajectory, step: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The weights of a batch's rows, all 1, and the gradient of its loss, which can be differentiated once more."""
    course, classifier = trajectory.course, trajectory.classifier
    batch = trajectory.batch(step)
    with own_random_numbers(classifier.device):
        logits = course.logits(classifier.model, batch, step, twice=True)
    weights = torch.ones(len(logits), dtype=logits.dtype, device=logits.device, requires_grad=True)
    loss = classifier.loss.weighted_mean(logits, batch["labels"], weights)
    known = trajectory.losses[step]
    if abs(float(loss.detach()) - known) > LOSS_TOLERANCE * max(1.0, abs(known)):
        raise ModelError(
            f"{classifier.name}: step {step + 1} of the run has the loss {known:.6g}, and {float(loss.detach()):.6g} "
            "where its gradient can be differentiated: its dropout draws other random numbers there. The derivative "
            "through the run cannot be taken on this device."
        )
    gradients = torch.autograd.grad(loss, trajectory.parameters, create_graph=True)
    if step == trajectory.n_steps - 1:
        _check_differentiable(gradients, classifier.name)
    return weights, gradients


def _check_differentiable(gradients: Sequence[torch.Tensor], name: str) -> None:
    """Refuse gradients that torch cannot differentiate.

    Of a function of the model's own that is marked as ``once_differentiable``, torch would leave out the second
    derivative without a word.
    """
    waiting: list[Any] = [gradient.grad_fn for gradient in gradients]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() in NOT_DIFFERENTIABLE:
            raise ModelError(f"{name} computes something that torch cannot differentiate twice. Ask by other methods.")
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
