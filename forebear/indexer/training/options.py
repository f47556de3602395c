"""The choices of a training run that change its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forebear.errors import InputError
from forebear.indexer.losses.choices import GivenWeights, check_loss_choices


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Every choice that changes the weights, beside the rows and the model.

    Attributes:
        epochs: Passes over the rows; each ends in a checkpoint.
        learning_rate: The highest rate, reached after the warm-up and falling linearly to 0.
        batch_size: Rows a step.
        weight_decay: AdamW's, on weights but not on biases and LayerNorm.
        warmup_ratio: Share of the steps, rounded down, in which the rate rises from 0.
        class_weights: Factor of each class' loss: one number a class, in the order of the model's class ids, or
            ``balanced``: rows / (classes x rows of the class). Empty: all 1.
        label_smoothing: Share of each label that is spread over all classes, as torch has it.
        freeze_below: Keep everything in the base model fixed but encoder layers >= this and the pooler.
        label_mode: ``binary-nli`` merges neutral and contradiction.
        max_length: Longest input in word pieces; default 128, or the model's limit if that is shorter.
        precision: ``bf16``, ``fp32``, or ``auto``: bf16 where the device computes in it natively.
        seed: Random seed of the new head, the order of the rows and dropout.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    class_weights: GivenWeights = ()
    label_smoothing: float = 0.0
    freeze_below: int | None = None
    label_mode: str | None = None
    max_length: int | None = None
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a positive number"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_ratio": (0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
            "precision": (self.precision in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        }
        for name, (is_right, expected) in checks.items():
            if not is_right:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}.")
        check_loss_choices(self.class_weights, self.label_smoothing)
