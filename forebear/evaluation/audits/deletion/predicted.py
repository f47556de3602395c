"""What the head would say without a set of training rows; and how strongly it depends on each of them.

Three predictions, each nearer to the head without the rows than the one before (see
:mod:`~forebear.retriever.effects.steps`): the rows' influence, summed, which takes the curvature of all rows; one
Newton step, which takes that of the set out; and the refit to the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.retraining.jobs import Outcome
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.refits import TOO_LITTLE, HeadRefits, has_newton_steps

SUMMED, NEWTON, REFIT = "summed influence", "Newton step", "refit of the head"
BLOCK_ROWS = 2048  # whose steps are held at once


@dataclass(frozen=True, eq=False)
class Change:
    """Predictions of test rows by a changed head.

    Attributes:
        name: How it was predicted.
        logits: After the change, ``(q, c)``.
        losses: Changes of the gold label's loss, in nats, above 0 where it rises, ``(q,)``.
        margins: Changes of log p / (1 - p) of the gold label, ``(q,)``.
        probabilities: Changes of its probability, ``(q,)``.
    """

    name: str
    logits: np.ndarray
    losses: np.ndarray
    margins: np.ndarray
    probabilities: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Predicted class ids after the change, ``(q,)``."""
        return np.asarray(self.logits.argmax(axis=1))


@dataclass(frozen=True, eq=False)
class Dependence:
    """How much of what a model says of a training row it says because of the row.

    Attributes:
        rows: Row numbers, ``(n,)``.
        losses: Own losses now, in nats, ``(n,)``.
        alone: Rises of the own loss when each row is left out by itself, ``(n,)``: what the head learnt of a row that
            no other row says. To first order where a Newton step costs too much.
        together: Rises when all of the set are left out, ``(n,)``.
        flips: Whether the row's prediction is another one without the set, ``(n,)``.
    """

    rows: np.ndarray
    losses: np.ndarray
    alone: np.ndarray
    together: np.ndarray
    flips: np.ndarray


def changes_without(refits: HeadRefits, predictions: Predictions, rows: np.ndarray) -> tuple[list[Change], np.ndarray]:
    """The predictions of test rows without some training rows, the best last; and the change of the weight of that.

    Args:
        refits: Of the index.
        predictions: The test rows; their targets are the gold labels.
        rows: Numbers of different live rows, ``(n,)``.

    Returns:
        Changes by summed influence, by a Newton step and, unless that costs too much, by a refit; and ``(a, h)``.

    Raises:
        InputError: The rows that stay say too little of the head.
    """
    step = refits.together(rows)
    weights = {SUMMED: refits.first_order(rows), NEWTON: step}
    if refits.reaches_minimum:
        weights[REFIT] = refits.minimum(rows, None, step)
    last = list(weights.values())[-1]
    if not refits.says_enough(last, rows):
        raise InputError(
            f"without {len(rows):,} of {len(refits.index.live):,} rows {TOO_LITTLE}. Name fewer rows, or not all of a "
            "class."
        )
    return [_change(refits, predictions, name, weight) for name, weight in weights.items()], last


def _change(refits: HeadRefits, predictions: Predictions, name: str, weight: np.ndarray) -> Change:
    moved = refits.logit_changes(weight[None], predictions.features)
    losses, probabilities = (values[:, 0] for values in predictions.changes(moved))
    after, targets = predictions.logits + moved[:, 0], predictions.targets
    if name == SUMMED:  # to first order, as scores are
        residuals, _ = predictions.loss.residual_and_loss(predictions.logits, targets)
        losses = (residuals * moved[:, 0]).sum(axis=1)
    margins = Outcome(after).log_odds(targets) - Outcome(predictions.logits).log_odds(targets)
    return Change(name, after, losses, margins, probabilities)


def dependence(refits: HeadRefits, rows: np.ndarray, change: np.ndarray | None = None) -> Dependence:
    """How strongly the model depends on each of some live rows.

    Args:
        refits: Of the index.
        rows: Row numbers, ``(n,)``.
        change: Of the weight without all of them, ``(a, h)``; None: they are left out one by one alone.
    """
    index = refits.index
    own = refits.trained.take(np.searchsorted(index.live, rows))
    said = Predictions(own.features, own.logits, own.targets, index.loss)
    moved = np.zeros((len(rows), own.logits.shape[1])) if change is None else _own(refits, own.features, change[None])
    alone = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        if has_newton_steps(index):
            steps = _own(refits, own.features[block], refits.each(rows[block]))
            alone[block] = said.take(np.arange(len(rows))[block]).changes(steps[:, None])[0][:, 0]
        else:
            residuals = index.residuals().take(rows[block])
            alone[block] = refits.inverse.self_influence(residuals, own.features[block]) / len(index.live)
    return Dependence(
        rows=rows,
        losses=said.losses(),
        alone=alone,
        together=said.changes(moved[:, None])[0][:, 0],
        flips=(own.logits + moved).argmax(axis=1) != own.logits.argmax(axis=1),
    )


def _own(refits: HeadRefits, features: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Changes of the logits of rows, each by its own change of the weight or all by one, ``(n, c)``."""
    basis = refits.index.loss.basis(refits.index.residuals().width)
    return np.asarray((changes @ features.astype(np.float64)[:, :, None])[..., 0] @ basis)
