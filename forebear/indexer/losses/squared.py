"""Squared error of one number a row, or of several, as ``torch.nn.MSELoss`` has it: without the factor 1/2.

The loss of a row is the mean over its c outputs z of (z - t)^2. Its gradient is 2 (z - t) / c, its curvature 2 / c on
the diagonal.

At the model's own prediction the gradient is 0, and says nothing of who made it. So what ``predicted`` asks of is the
output itself, for which the target +inf stands: its loss is -z, its gradient -1 (each over c), so that a row that
raises the output supports it. NaN leaves an output out, and the mean is over the others. Queries are asked so; training
rows have finite targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from forebear.indexer.losses.loss import Loss, number_text
from forebear.indexer.rows.row_format import REGRESSION
from forebear.ratio import ratio


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """The loss of a model of numbers; targets are ``(n, c)`` float64, and outputs the logits themselves."""

    problem_type: ClassVar[str] = REGRESSION
    is_separate: ClassVar[bool] = True

    def describe(self) -> str:
        """The loss in a few words."""
        return "squared error, mean over the outputs"

    def outputs(self, logits: np.ndarray) -> np.ndarray:
        """The logits."""
        return logits

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """The logits, ``(n, c)`` float64."""
        return logits.astype(np.float64)

    def targets_of(self, predictions: np.ndarray) -> np.ndarray:
        """+inf: the output itself."""
        return np.full(predictions.shape, np.inf)

    def unlikely(self, logits: np.ndarray) -> np.ndarray:
        """A number that is 1 too small."""
        return logits - 1.0

    def residual_and_loss(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """2 (z - t) / c, and the mean of (z - t)^2; of the output itself -1 / c and -z / c."""
        kept, itself = ~np.isnan(targets), np.isposinf(targets)
        share = kept / kept.sum(axis=1, keepdims=True)
        difference = np.where(kept & ~itself, logits - np.where(kept & ~itself, targets, 0.0), 0.0)
        residual = share * np.where(itself, -1.0, 2 * difference)
        return np.asarray(residual), (share * np.where(itself, -logits, difference**2)).sum(axis=1)

    def outputs_of_residuals(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """t + c r / 2, ``(n, c)`` float64."""
        return np.asarray(targets + residuals.astype(np.float64) * residuals.shape[1] / 2)

    def row_weights(self, targets: np.ndarray) -> np.ndarray | None:
        """None: no row weighs more than another."""
        return None

    def basis(self, n_outputs: int) -> np.ndarray:
        """The outputs themselves."""
        return np.eye(n_outputs)

    def curvature(self, outputs: np.ndarray) -> np.ndarray:
        """2 / c on the diagonal, ``(n, c, c)``."""
        n, c = outputs.shape
        return np.tile(2.0 / c * np.eye(c), (n, 1, 1))

    def curvature_diagonal(self, outputs: np.ndarray) -> np.ndarray:
        """2 / c, ``(n, c)``."""
        return np.full(outputs.shape, 2.0 / outputs.shape[1])

    def curvature_trace(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """2 for every row."""
        return np.full(len(residuals), 2.0)

    def curvature_products(self, outputs: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """2 u / c."""
        return vectors * (2.0 / outputs.shape[1])

    def square_root(self, outputs: np.ndarray) -> np.ndarray:
        """sqrt(2 / c) on the diagonal, ``(n, c, c)``."""
        return np.asarray(np.sqrt(self.curvature(outputs)))

    def support_slope(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Minus the residual, ``(n, c)``."""
        return np.asarray(-self.residual_and_loss(logits, targets)[0])

    def support(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Minus the loss: of the output itself, the output."""
        return -self._losses(logits, targets)

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over outputs, summed over rows."""
        return self._losses(logits, targets).sum()

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kept, itself = ~targets.isnan(), targets.isposinf()
        t = torch.where(kept & ~itself, targets, 0.0).to(logits.dtype)
        losses: torch.Tensor = torch.where(itself, -logits, (logits - t).square()) * kept
        return losses.sum(dim=1) / kept.sum(dim=1)

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """The number of rows."""
        return torch.tensor(float(len(targets)))

    def representer(self, targets: np.ndarray, n_outputs: int) -> np.ndarray:
        """1 for each output that the target asks about, ``(n, c)``: a row that raises it supports it."""
        return np.broadcast_to(~np.isnan(targets), (len(targets), n_outputs)).astype(np.float64)

    def measures(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Root of the mean squared error, and Pearson's correlation over all outputs; 0 where either is constant."""
        error = float(np.sqrt(np.mean((predictions - targets) ** 2)))
        p, t = (values - values.mean(axis=0) for values in (predictions, targets))
        correlation = ratio((p * t).sum(), np.sqrt((p**2).sum() * (t**2).sum()))
        return {"RMSE": error, "correlation": float(correlation)}

    def better_than_guessing(self, predictions: np.ndarray, targets: np.ndarray) -> bool:
        """Whether the error is smaller than that of the mean of the targets."""
        return bool(np.mean((predictions - targets) ** 2) < np.mean((targets - targets.mean(axis=0)) ** 2))

    def texts(self, targets: np.ndarray, names: Sequence[str]) -> list[str | None]:
        """The numbers, of several outputs with their names; ``higher`` for the output itself; None for no number."""
        return [_text(target, names) for target in targets]


SQUARED = SquaredLoss()


def _text(target: np.ndarray, names: Sequence[str]) -> str | None:
    numbers = [
        ("" if len(names) == 1 else f"{name} ") + ("higher" if np.isposinf(t) else number_text(t))
        for name, t in zip(names, target, strict=True)
        if not np.isnan(t)
    ]
    return "; ".join(numbers) or None
