"""Cross-entropy of several labels a row, each with a sigmoid of its own, as ``torch.nn.BCEWithLogitsLoss`` has it.

The loss of a row is the mean over its labels of -t log p - (1 - t) log(1 - p), p being the sigmoid of the label's logit
and t, its target, 0, 1 or a share between: what training minimises is the mean over rows and labels. The gradient at
the logits is (p - t) / c. Labels do not meet in the curvature: it is diagonal, p (1 - p) / c.

A target may leave labels out, as NaN: the mean is then over the others, so that a target with one number is the loss of
this one label, -t log p - (1 - t) log(1 - p). Queries are asked so; training rows have all targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from forebear.indexer.losses.loss import Loss, number_text
from forebear.indexer.rows.row_format import MULTI_LABEL
from forebear.ratio import ratio

NO_LABELS = "(none)"
HALF = 0.5  # a label is predicted where its probability is above


@dataclass(frozen=True)
class SigmoidLoss(Loss):
    """The loss of a classifier whose rows have any number of labels; targets are ``(n, c)`` float64.

    Its *outputs* are p where p is at most 1/2, else p - 1: the probability of a label or, below 0, of its absence. So
    both keep their precision, and p (1 - p) takes no difference of numbers near 1.
    """

    problem_type: ClassVar[str] = MULTI_LABEL
    is_separate: ClassVar[bool] = True

    def describe(self) -> str:
        """The loss in a few words."""
        return "binary cross-entropy, mean over the labels"

    def outputs(self, logits: np.ndarray) -> np.ndarray:
        """P where it is at most 1/2, else p - 1, ``(n, c)``."""
        small = _sigmoid(-np.abs(logits))
        return np.where(logits > 0, -small, small)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probability of each label, ``(n, c)``."""
        return _sigmoid(logits)

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Which labels have a probability above 1/2: 0 and 1, ``(n, c)`` float64."""
        return (logits > 0).astype(np.float64)

    def unlikely(self, logits: np.ndarray) -> np.ndarray:
        """The labels that are not predicted, and no others."""
        return 1.0 - self.predictions(logits)

    def residual_and_loss(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(p - t) / c and the mean cross-entropy in nats; accurate also where p is nearly t."""
        share, t = _shares(targets)
        p, absent = _sigmoid(logits), _sigmoid(-logits)
        loss = t * np.logaddexp(0.0, -logits) + (1 - t) * np.logaddexp(0.0, logits)
        return share * ((1 - t) * p - t * absent), (share * loss).sum(axis=1)

    def outputs_of_residuals(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The outputs from (p - t) / c and t, ``(n, c)`` float64."""
        difference = residuals.astype(np.float64) * residuals.shape[1]
        p, minus_absent = difference + targets, difference + (targets - 1.0)
        return np.asarray(np.where(p <= HALF, p, minus_absent))

    def row_weights(self, targets: np.ndarray) -> np.ndarray | None:
        """None: no row weighs more than another."""
        return None

    def basis(self, n_outputs: int) -> np.ndarray:
        """The labels themselves."""
        return np.eye(n_outputs)

    def curvature(self, outputs: np.ndarray) -> np.ndarray:
        """p (1 - p) / c on the diagonal, ``(n, c, c)``."""
        return np.asarray(self.curvature_diagonal(outputs)[:, :, None] * np.eye(outputs.shape[1]))

    def curvature_diagonal(self, outputs: np.ndarray) -> np.ndarray:
        """p (1 - p) / c, ``(n, c)``."""
        small = np.abs(outputs)
        return np.asarray(small * (1.0 - small) / outputs.shape[1])

    def curvature_trace(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Sum over labels of p (1 - p) / c."""
        return np.asarray(self.curvature_diagonal(self.outputs_of_residuals(residuals, targets)).sum(axis=1))

    def curvature_products(self, outputs: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """p (1 - p) u / c."""
        return vectors * torch.from_numpy(self.curvature_diagonal(outputs.numpy())).T

    def square_root(self, outputs: np.ndarray) -> np.ndarray:
        """sqrt(p (1 - p) / c) on the diagonal, ``(n, c, c)``."""
        return np.asarray(np.sqrt(self.curvature(outputs)))

    def support_slope(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """(2 t - 1) p (1 - p) / c, ``(n, c)``."""
        share, t = _shares(targets)
        return np.asarray(share * (2 * t - 1) * _sigmoid(logits) * _sigmoid(-logits))

    def support(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the labels of the probability that the label is as the target says."""
        kept = ~targets.isnan()
        t = targets.nan_to_num().to(logits.dtype)
        right = t * logits.sigmoid() + (1 - t) * (-logits).sigmoid()
        return (right * kept).sum(dim=1) / kept.sum(dim=1)

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over labels, summed over rows."""
        kept = ~targets.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, targets.nan_to_num().to(logits.dtype), reduction="none"
        )
        return ((losses * kept).sum(dim=1) / kept.sum(dim=1)).sum()

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """The number of rows."""
        return torch.tensor(float(len(targets)))

    def representer(self, targets: np.ndarray, n_outputs: int) -> np.ndarray:
        """1 for a label that the target has, -1 for one that it has not, 0 for one left out, ``(n, c)``."""
        return np.asarray(np.sign(2 * np.where(np.isnan(targets), HALF, targets) - 1))

    def measures(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Micro-F1 over all labels of all rows, and the share of rows with exactly the right labels."""
        found, there = predictions > HALF, targets > HALF
        f1 = ratio(2.0 * (found & there).sum(), float(found.sum() + there.sum()), otherwise=1.0)
        return {"micro-F1": float(f1), "subset accuracy": float((found == there).all(axis=1).mean())}

    def better_than_guessing(self, predictions: np.ndarray, targets: np.ndarray) -> bool:
        """Whether more single labels are right than by each label's more frequent value."""
        found, there = predictions > HALF, targets > HALF
        rate = there.mean(axis=0)
        return bool((found == there).mean() > np.maximum(rate, 1 - rate).mean())

    def texts(self, targets: np.ndarray, names: Sequence[str]) -> list[str | None]:
        """Names of the labels; of a target that leaves labels out, ``not NAME`` too; None where all are left out."""
        return [_text(target, names) for target in targets]


SIGMOID = SigmoidLoss()


def _text(target: np.ndarray, names: Sequence[str]) -> str | None:
    kept = ~np.isnan(target)
    if not kept.any():
        return None
    if not kept.all():
        return "; ".join(names[k] if target[k] > HALF else f"not {names[k]}" for k in np.flatnonzero(kept).tolist())
    shown = [
        names[k] + ("" if target[k] == 1 else f" {number_text(target[k])}") for k in np.flatnonzero(target > 0).tolist()
    ]
    return "; ".join(shown) or NO_LABELS


def _shares(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / (number of labels with a target) where a label has one, else 0; and targets with 0 for those without."""
    kept = ~np.isnan(targets)
    return kept / kept.sum(axis=1, keepdims=True), np.where(kept, targets, 0.0)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow, accurate for z far below 0."""
    e = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, e) / (1.0 + e))
