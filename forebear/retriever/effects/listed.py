"""Effects of the training rows that an answer lists: of each row, and in the answer to a group of all of them together.

Only listed rows are looked at, and a row that several test rows list is solved for once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.kinds import NEWTON, EffectKind, effect_kind
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.question.models import Models
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends

CHANGE_NUMBERS = 1 << 22  # of rows' changes of the weight, or of pairs' logits, that are held at once


def with_effects(
    question: Question, models: Models, predictions: Predictions, found: Mapping[str, Ends]
) -> dict[str, Ends]:
    """Rankings with the effects of their rows, of the methods that estimate one.

    Args:
        question: The question.
        models: Models of the index.
        predictions: The test rows: one a ranking, or with groups one group a ranking.
        found: Both ends by method name.
    """
    out = dict(found)
    for method in question.methods:
        kind = effect_kind(question, method)
        if kind.order is None:
            continue
        ends = found[method.name]
        if kind.order == NEWTON:
            refits = HeadRefits(models, question.curvature.damping)
            rows = np.concatenate([ranking.rows for ranking in ends], axis=1)
            parts = [np.split(values, 2, axis=1) for values in effects_of_rows(refits, predictions, rows)]
            together = [None if predictions.groups is None else _together(refits, predictions, r.rows) for r in ends]
        else:
            parts, together = _first_order(predictions, ends, kind), [None, None]
        first, last = (
            replace(ranking, effects=effects, effect_probabilities=probabilities, effects_together=both)
            for ranking, effects, probabilities, both in zip(ends, *parts, together, strict=True)
        )
        out[method.name] = (first, last)
    return out


class GroupEffects:
    """Effects of whole groups of training rows, each group being left out together; a group is solved for once."""

    def __init__(self, question: Question, models: Models, groups: Callable[[int], np.ndarray]) -> None:
        """Set up.

        Args:
            question: The question; of an aggregate, effects are summed over the test rows.
            models: Models of the index.
            groups: Gives the training rows of a group by its number.
        """
        self._groups = groups
        self._kinds = {method.name: effect_kind(question, method) for method in question.methods}
        self._refits = HeadRefits(models, question.curvature.damping)
        self._changes: dict[int, np.ndarray | None] = {}

    def estimates(self, method: str) -> bool:
        """Whether a method estimates effects."""
        return self._kinds[method].order is not None

    def of(
        self, method: str, predictions: Predictions, sums: np.ndarray, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Effects of some groups on one answer, ``(m,)`` each: of the loss and of the target's probability.

        NaN of a group without which they mean nothing; see :meth:`HeadRefits.of_group`.

        Args:
            method: One that estimates effects.
            predictions: The test rows of the answer: one, or all of an aggregate.
            sums: Sums of the groups' scores, ``(m,)``.
            groups: Numbers of the groups, ``(m,)``.
        """
        kind = self._kinds[method]
        if kind.order == NEWTON:
            changes = {i: change for i, number in enumerate(groups) if (change := self._of_group(number)) is not None}
            summed = np.full((2, len(groups)), np.nan)
            if changes:
                logit_changes = self._refits.logit_changes(np.stack(list(changes.values())), predictions.features)
                summed[:, list(changes)] = [one.sum(axis=0) for one in predictions.changes(logit_changes)]
            return summed[0], summed[1]
        effects = sums / kind.divisor
        if not kind.has_probability:
            return effects, np.full(len(groups), np.nan)
        return effects, predictions.probability_changes(effects[None])[0]

    def _of_group(self, number: int) -> np.ndarray | None:
        """Change of the head's weight without a group, ``(a, h)``."""
        if number not in self._changes:
            self._changes[number] = self._refits.of_group(self._groups(number))
        return self._changes[number]


def _first_order(predictions: Predictions, ends: Ends, kind: EffectKind) -> list[list[np.ndarray]]:
    """Effects of both ends by their scores alone, and changes of the probability, NaN where none follows."""
    effects = [ranking.scores / kind.divisor for ranking in ends]
    if not kind.has_probability:
        return [effects, [np.full(one.shape, np.nan) for one in effects]]
    return [effects, [predictions.probability_changes(one) for one in effects]]


def effects_of_rows(refits: HeadRefits, predictions: Predictions, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effects of training rows by a Newton step of the head each.

    Args:
        refits: Of the index.
        predictions: Test rows, or groups of them.
        rows: Numbers of live training rows, for each test row or group its own, ``(q, k)``.

    Returns:
        Changes of the loss and of the target's probability, ``(q, k)`` each, summed over a group's test rows; see
        :meth:`Predictions.changes`.
    """
    distinct, places = np.unique(rows, return_inverse=True)
    places = places.reshape(rows.shape)
    effects, probabilities = np.zeros(rows.shape), np.zeros(rows.shape)
    step = max(1, CHANGE_NUMBERS // (predictions.logits.shape[1] * predictions.features.shape[1]))
    members = [predictions.members(i) for i in range(len(rows))]
    for start in range(0, len(distinct), step):
        changes = refits.each(distinct[start : start + step])
        for i, positions in enumerate(members):
            columns = np.flatnonzero((places[i] >= start) & (places[i] < start + step))
            size = max(1, CHANGE_NUMBERS // max(1, len(columns) * predictions.logits.shape[1]))
            for block in range(0, len(positions) if len(columns) else 0, size):
                some = predictions.take(positions[block : block + size])
                found = some.changes(refits.logit_changes(changes[places[i, columns] - start], some.features))
                effects[i, columns] += found[0].sum(axis=0)
                probabilities[i, columns] += found[1].sum(axis=0)
    return effects, probabilities


def effects_of_set(
    refits: HeadRefits,
    predictions: Predictions,
    rows: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of the removal of training rows together, or of other targets for them.

    Args:
        refits: Of the index.
        predictions: Test rows.
        rows: Numbers of different live training rows, ``(n,)``.
        targets: Their new targets; None: they are left out.
        exact: Whether the head is refitted to the minimum, not by one Newton step.

    Returns:
        Changes of the loss and of the target's probability of each test row, ``(q,)`` each; see
        :meth:`Predictions.changes`.
    """
    change = refits.together(rows, targets, exact=exact)
    effects, probabilities = predictions.changes(refits.logit_changes(change[None], predictions.features))
    return effects[:, 0], probabilities[:, 0]


def _together(refits: HeadRefits, predictions: Predictions, rows: np.ndarray) -> np.ndarray:
    """Effects of the removal of all rows of each ranking together, summed over its test rows: ``(g, 2)``, or NaN."""
    members = [predictions.take(predictions.members(i)) for i in range(len(rows))]
    sums = np.full((len(rows), 2), np.nan)
    for i, (some, row_numbers) in enumerate(zip(members, rows, strict=True)):
        if (change := refits.of_group(row_numbers)) is not None:
            sums[i] = [one.sum() for one in some.changes(refits.logit_changes(change[None], some.features))]
    return sums
