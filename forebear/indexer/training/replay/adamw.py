"""A step of AdamW and of gradient clipping, differentiated backward; formulas on tensors.

With the clipped gradient h = c g, c = min(1, G / (||g|| + 1e-6)), step t (from 1) is, as torch's fused kernel has it,

    m' = b1 m + (1 - b1) h          v' = b2 v + (1 - b2) h^2
    theta' = (1 - rate decay) theta - s m' / D      s = rate / (1 - b1^t)
    D = sqrt(v') / B + eps                          B = sqrt(1 - b2^t)

An *adjoint* is the derivative of a number that the training leads to, such as the loss of a test row, with respect to
theta, m or v. The functions here take those after a step to those before it. Where v' is 0, the gradient was 0 in all
steps so far, and the root has no derivative: it counts as 0. (Ilyas and Engstrom 2025 add a small number inside the
root; it would be another training than that of the run.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from forebear.indexer.training.replay.states import Tensors

CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class Update:
    """The numbers of one step for a group of parameters: rate, decay, b1, b2, eps and t of the formulas above."""

    rate: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    step: int

    @property
    def size(self) -> float:
        """The s of the formulas above."""
        return self.rate / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        """The B of the formulas above."""
        return math.sqrt(1 - self.beta2**self.step)


def back_through_update(
    adjoint: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    update: Update,
) -> torch.Tensor:
    """Take the adjoint of one parameter back through a step.

    Args:
        adjoint: Of theta', m' and v'; turned, in place, into that of theta, m and v but for what the step's gradient
            adds to theta's.
        gradient: h, the clipped gradient of the step.
        first: m', after the step.
        second: v', after the step.
        update: The numbers of the step.

    Returns:
        The adjoint of h.
    """
    of_weights, of_first, of_second = adjoint
    root = second.sqrt()
    divisor = (root / update.root_correction).add_(update.eps)
    through_first = (of_weights * -update.size).div_(divisor)
    of_first += through_first
    slope = (2 * update.root_correction * root).mul_(divisor)
    of_second -= through_first.mul_(first).div_(slope).masked_fill_(root == 0, 0.0)
    of_gradient = (gradient * (2 * (1 - update.beta2))).mul_(of_second).add_(of_first, alpha=1 - update.beta1)
    of_weights *= 1 - update.rate * update.decay
    of_first *= update.beta1
    of_second *= update.beta2
    return of_gradient


def clip_factor(gradients: Tensors, max_norm: float) -> tuple[float, float]:
    """The factor c of clipping, and the norm ||g|| of all gradients together."""
    norm = math.sqrt(math.fsum(float(torch.linalg.vector_norm(g)) ** 2 for g in gradients))
    return min(1.0, max_norm / (norm + CLIP_EPS)), norm


def back_through_clipping(adjoint: Tensors, gradients: Tensors, factor: float, norm: float) -> Tensors:
    """The adjoint of g from that of h = c g, in place: c a - c <g, a> g / (||g|| (||g|| + 1e-6)) where c < 1.

    Args:
        adjoint: a, of h.
        gradients: g, before clipping.
        factor: c.
        norm: ||g||.
    """
    if factor == 1.0:
        return adjoint
    dot = math.fsum(float((a * g).sum()) for a, g in zip(adjoint, gradients, strict=True))
    share = dot / (norm * (norm + CLIP_EPS))
    return [a.sub_(g, alpha=share).mul_(factor) for a, g in zip(adjoint, gradients, strict=True)]
