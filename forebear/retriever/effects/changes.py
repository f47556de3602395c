"""What changed logits make of predictions: changes of the loss in nats, and of the target's probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.forward import Forward
from forebear.indexer.rows.row_format import REGRESSION


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions that are explained.

    Attributes:
        features: f, ``(q, h)`` float32.
        logits: ``(q, c)`` float64.
        targets: Whose loss is explained; q targets.
        loss: The loss.
        groups: Number of the group of each, from 0, ``(q,)``, where one answer is given to a group; else None.
    """

    features: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    loss: Loss
    groups: np.ndarray | None = None

    @classmethod
    def of(cls, forward: Forward, targets: np.ndarray) -> Predictions:
        """Those of a forward pass."""
        return cls(forward.features, forward.logits, targets, forward.loss)

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of one block of test rows after another."""
        features, logits, targets = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("features", "logits", "targets")
        )
        return cls(features, logits, targets, parts[0].loss)

    def take(self, positions: np.ndarray) -> Predictions:
        """Those at some positions, without their groups."""
        return Predictions(self.features[positions], self.logits[positions], self.targets[positions], self.loss)

    def members(self, number: int) -> np.ndarray:
        """Positions of the test rows of one answer: of a group, or the one of this number."""
        return np.array([number]) if self.groups is None else np.flatnonzero(self.groups == number)

    def losses(self) -> np.ndarray:
        """Losses of the targets, ``(q,)``."""
        return self.loss.residual_and_loss(self.logits, self.targets)[1]

    def changes(self, logit_changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Changes of the loss and of the target's probability by changes of the logits.

        Args:
            logit_changes: ``(q, k, c)``.

        Returns:
            ``(q, k)`` float64 each: in nats, above 0 where the loss rises (of numbers in squared units, of the output
            itself in units); and of the probability, of several labels the mean over those that the target names, NaN
            of numbers.
        """
        shape = logit_changes.shape[:2]
        logits = (self.logits[:, None, :] + logit_changes).reshape(-1, logit_changes.shape[2])
        targets = np.repeat(self.targets, shape[1], axis=0)
        losses = self.loss.residual_and_loss(logits, targets)[1].reshape(shape)
        effects = losses - self.losses()[:, None]
        if self.loss.problem_type == REGRESSION:
            return effects, np.full(shape, np.nan)
        return effects, self._support(logits, targets).reshape(shape) - self._support(self.logits, self.targets)[
            :, None
        ]

    def _support(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The target's probability."""
        return self.loss.support(torch.from_numpy(logits), torch.from_numpy(targets)).numpy()

    def probability_changes(self, effects: np.ndarray) -> np.ndarray:
        """Changes of the target's probability that follow from those of its loss alone, ``(q, k)``, -p to 1 - p.

        Only where the loss is -w log p, w being the weight of the target's class.
        """
        weights = self.loss.row_weights(self.targets) if isinstance(self.loss, CrossEntropy) else None
        weight = 1.0 if weights is None else weights[:, None]
        losses = self.losses()[:, None]
        return np.asarray(np.exp(-losses / weight) * np.expm1(-np.maximum(effects, -losses) / weight))
