"""Whose loss is explained: what the model predicts, the gold target, or one label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forebear.errors import InputError
from forebear.indexer.losses.loss import Loss
from forebear.indexer.rows.files.reader import listed

LABEL = "label:"  # before a label's name in --target


def choose_targets(
    target: str, predictions: np.ndarray, labels: np.ndarray | None, names: Sequence[str], loss: Loss
) -> np.ndarray:
    """Whose loss is explained, for each test row.

    Args:
        target: ``predicted``; ``gold``; or a label, as ``label:NAME`` or, of one label a row, ``NAME``. Of several
            labels or numbers ``label:NAME`` is the loss of this one output alone, at what the model predicts for it.
        predictions: What the model says, as targets.
        labels: Gold targets, or None.
        names: Names of the outputs.
        loss: The loss of the model.

    Returns:
        Targets; of a single output NaN for the others.

    Raises:
        InputError: The target is not known, or there are no gold labels.
    """
    if target == "predicted":
        return loss.targets_of(predictions)
    if target == "gold":
        if labels is None:
            raise InputError("--target gold needs labels in the test file. Name their column by --label-column.")
        return labels
    if predictions.ndim == 1:
        return np.full(len(predictions), _label(target, names))
    single = _without_prefix(target)
    if single is None:
        raise InputError(f"--target {target!r}: expected predicted, gold, or {LABEL}NAME of {listed(names)}.")
    output, targets = _output(single, names, f"{LABEL}NAME", target), loss.targets_of(predictions)
    return np.where(np.arange(len(names)) == output, targets, np.nan)


def settled_target(target: str, names: Sequence[str]) -> str:
    """``predicted``, ``gold``, or ``label:NAME`` with the name as the model has it: one spelling of each target."""
    return target if target in ("predicted", "gold") else LABEL + names[_label(target, names)]


def _label(target: str, names: Sequence[str]) -> int:
    """Position of the label that is named, with or without the prefix."""
    name = target if target in names else _without_prefix(target) or target
    return _output(name, names, "NAME", target)


def _without_prefix(target: str) -> str | None:
    """The name after ``label:``, whatever its case; None without it."""
    return target[len(LABEL) :] if target.lower().startswith(LABEL) else None


def _output(name: str, names: Sequence[str], form: str, target: str) -> int:
    matches = [i for i, known in enumerate(names) if known == name]
    matches = matches or [i for i, known in enumerate(names) if known.casefold() == name.casefold()]
    if len(matches) != 1:
        known = f"one of {', '.join(names)}" if form == "NAME" else f"{form} of {', '.join(names)}"
        raise InputError(f"--target {target!r}: expected predicted, gold, or {known}.")
    return matches[0]
