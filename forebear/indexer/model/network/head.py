"""The head of a network in a pass: the feature is what enters it, also where its outputs are pooled over word pieces.

An encoder's head sees one vector a row. A decoder's head is applied at each word piece, and the model picks the logits
at one of them, or averages them. The head is linear and the pooling is a weighted sum whose weights add up to 1, so the
logits are the head's output at the same weighted sum of its inputs: that sum is then the feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class HeadUse:
    """What a head got and gave in one forward pass."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self.turned_on = False  # tracking of gradients, which a pooled head needs

    def note(self, _head: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """A forward hook; outputs at word pieces are replaced by a leaf of the graph that the pooling then grows."""
        self._inputs = args[0]
        if output.dim() < 3:
            return None
        self.turned_on = not torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        self._outputs = output.detach().requires_grad_(True)
        return self._outputs

    def feature(self, logits: torch.Tensor) -> torch.Tensor:
        """The feature of each row, ``(b, h)``, of the head's type and in the graph of its input.

        Args:
            logits: Of the same pass, ``(b, c)``.

        Raises:
            RuntimeError: The logits do not depend on the head's outputs.
        """
        assert self._inputs is not None
        if self._outputs is None:
            return self._inputs
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(logits[:, 0].sum(), self._outputs)
        weights = slopes[..., 0, None].to(self._inputs.dtype)  # (b, t, 1): of each piece in the first class' logit
        return (self._inputs.masked_fill(weights == 0, 0.0) * weights).sum(dim=1)


@contextmanager
def watched_head(head: nn.Module) -> Iterator[HeadUse]:
    """Watch a head during one forward pass; whether gradients are tracked is restored at the end."""
    use = HeadUse()
    hook = head.register_forward_hook(use.note)
    try:
        yield use
    finally:
        hook.remove()
        if use.turned_on:
            torch.set_grad_enabled(False)
