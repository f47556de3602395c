"""Losses of training steps, which a GPU's host reads many at a time: it waits for each that it reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from forebear.errors import NonFiniteError
from forebear.indexer.model.device.copies import fetch

READ_STEPS = 32  # steps whose losses stay on a GPU; a loss that is NaN is refused that late


class StepLosses:
    """The losses of steps one after another.

    Attributes:
        read: Mean loss of the batch and its weight, of each step that was read.
    """

    def __init__(self, refusal: Callable[[int, float], str]) -> None:
        """No step yet.

        Args:
            refusal: The message of the error where the loss of a step, counted from 0, is NaN or infinite.
        """
        self.read: list[tuple[float, float]] = []
        self._refusal = refusal
        self._unread: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._n_read = 0  # steps, also those forgotten since

    def add(self, loss: torch.Tensor, weight: torch.Tensor) -> None:
        """Take the mean loss of the next step's batch, and its weight; both have no dimensions.

        Raises:
            NonFiniteError: The loss of this step, or of one before it, is NaN or infinite.
        """
        self._unread.append((loss.detach(), weight))
        if loss.device.type == "cpu" or len(self._unread) == READ_STEPS:
            self.settle()

    def settle(self) -> None:
        """Read what is left.

        Raises:
            NonFiniteError: The loss of a step is NaN or infinite.
        """
        if not self._unread:
            return
        losses, weights = zip(*self._unread, strict=True)
        self._unread = []
        found = zip(*(values.tolist() for values in fetch(torch.stack(losses), torch.stack(weights))), strict=True)
        for loss, weight in found:
            if not math.isfinite(loss):
                raise NonFiniteError(self._refusal(self._n_read, loss))
            self.read.append((loss, float(weight)))
            self._n_read += 1
