"""The head of an index without some of its training rows, or with other targets for them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from forebear.indexer.curvature.head import HeadInverse
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.forward import forward_of_features
from forebear.retriever.effects.minimum import HeadRows, Refit
from forebear.retriever.effects.steps import Leaving, leaving, logit_changes, step_of_set, steps_of_rows
from forebear.retriever.question.models import Models

MAX_ROW_NUMBERS = 1 << 26  # multiplications of a product with H^-1, above which rows' effects are of first order

MAX_GROUP_NUMBERS = 1 << 35  # multiplications of a Newton step over all rows, above which a group gets a single step

MIN_CURVATURE = 0.1  # share of the curvature along a group's change that must be left after it
TOO_LITTLE = "the rows that stay say too little of the head"
UNSTATED = f"no effect: {TOO_LITTLE}"


def has_newton_steps(index: Index) -> bool:
    """Whether a row's removal at the head gets a Newton step of its own: of many classes it costs too much."""
    if index.head.solver != "exact":
        return False
    directions, width = len(index.loss.basis(len(index.manifest.spec.label_names))), index.manifest.feature_dim
    blocks = directions if index.loss.is_separate else 1
    return (directions * width) ** 2 // blocks <= MAX_ROW_NUMBERS


class HeadRefits:
    """Changes of the head's weight at the last checkpoint when training rows are left out or relabelled.

    The head is what J_S (:mod:`~forebear.retriever.effects.steps`) makes of it, with the damping of the question. N is
    the number of live rows throughout. Changes are V, ``(a, h)`` in the loss' basis B: the weight becomes W0 + B^T V.
    """

    def __init__(self, models: Models, damping: str | None = None) -> None:
        """Set up without loading a model: only :meth:`minimum` and other targets need one.

        Args:
            models: Models of an index with the exact curvature of its head, or of many classes with :meth:`minimum`
                alone.
            damping: As the question names it; None: the index's first.
        """
        self.models, self.index, self._damping = models, models.index, damping

    @cached_property
    def inverse(self) -> HeadInverse:
        """H^-1 over all live rows.

        Raises:
            InputError: The damping means nothing, or is too small to be solved with in float64.
            MissingStoreError: The index has no exact curvature of the head.
        """
        return self.index.head.inverse(self._damping)

    def each(self, rows: np.ndarray) -> np.ndarray:
        """Newton step of each row's removal alone, ``(n, a, h)`` float64.

        Args:
            rows: Numbers of live rows, ``(n,)``.
        """
        return steps_of_rows(self.inverse, self._leaving(rows))

    def together(self, rows: np.ndarray, targets: np.ndarray | None = None, *, exact: bool = False) -> np.ndarray:
        """Change of the weight when all rows are left out together, or get other targets, ``(a, h)`` float64.

        Args:
            rows: Numbers of different live rows, ``(n,)``.
            targets: Their new targets; None: they are left out.
            exact: Whether further Newton steps lead to the minimum of J_S.

        Raises:
            NotConvergedError: The minimum was not reached.
        """
        parts = self._leaving(rows)
        if targets is not None:
            parts = self._replaced(parts, rows, targets)
        step = step_of_set(self.inverse, parts)
        return self.minimum(rows, targets, step) if exact else step

    def first_order(self, rows: np.ndarray) -> np.ndarray:
        """Change of the weight without some rows to first order, H^-1 (1/N sum over them of g_n), ``(a, h)``.

        A test row's loss changes by it, to first order, by the rows' `if` scores, summed, over N.
        """
        parts = self._leaving(rows)
        return np.asarray(self.inverse.solve_matrix((parts.gradients.T @ parts.features)[None])[0])

    @property
    def reaches_minimum(self) -> bool:
        """Whether a group's change is the minimum, not one Newton step, which costs less."""
        directions, width = len(self.index.loss.basis(self.index.residuals().width)), self.index.features().width
        return len(self.index.live) * (directions * width) ** 2 <= MAX_GROUP_NUMBERS

    def of_group(self, rows: np.ndarray) -> np.ndarray | None:
        """Change of the head's weight when a group of rows is left out, ``(a, h)``: the minimum, if it is reached.

        None where it means nothing; see :meth:`says_enough`.
        """
        change = self.together(rows, exact=self.reaches_minimum)
        return change if self.says_enough(change, rows) else None

    def says_enough(self, change: np.ndarray, rows: np.ndarray) -> bool:
        """Whether J_S along a change has a tenth or more of the curvature that J had before it.

        It has less where a group holds nearly all rows, or all of a class: the size of the change is then that of
        1 / damping, and says nothing.
        """
        before = self.refit.curvature_along(change, np.zeros_like(change), self.trained)
        return self.refit.curvature_along(change, change, self.after(rows, None)) >= MIN_CURVATURE * before

    def minimum(self, rows: np.ndarray, targets: np.ndarray | None, start: np.ndarray) -> np.ndarray:
        """The minimum of J_S, ``(a, h)`` float64, by steps from ``start``; see :meth:`together`."""
        return self.refit.minimum(self.after(rows, targets), start)

    def after(self, rows: np.ndarray, targets: np.ndarray | None) -> HeadRows:
        """The live rows without those of some numbers, or with other targets for these; see :meth:`together`."""
        positions, trained = np.searchsorted(self.index.live, rows), self.trained
        if targets is None:
            return trained.take(np.delete(np.arange(len(trained)), positions))
        changed = trained.targets.copy()
        changed[positions] = targets
        return replace(trained, targets=changed)

    def logit_changes(self, changes: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Changes of the logits of test rows, ``(q, k, c)``.

        Args:
            changes: Of the weight, ``(k, a, h)``.
            features: f of the test rows, ``(q, h)``.
        """
        return logit_changes(self.index.loss, changes, features, self.index.residuals().width)

    def _leaving(self, rows: np.ndarray) -> Leaving:
        index = self.index
        targets, residuals = index.targets(rows), index.residuals().take(rows)
        outputs = index.loss.outputs_of_residuals(residuals, targets)
        return leaving(index.loss, index.features().take(rows), residuals, outputs, targets, len(index.live))

    def _replaced(self, parts: Leaving, rows: np.ndarray, targets: np.ndarray) -> Leaving:
        """What goes out less what comes in with other targets."""
        forward = forward_of_features(self.models.classifier(), self.index.features().take(rows))
        residuals, _ = forward.residuals_and_losses(targets)
        outputs = self.index.loss.outputs(forward.logits)
        new = leaving(self.index.loss, forward.features, residuals, outputs, targets, len(self.index.live))
        return Leaving(parts.features, parts.gradients - new.gradients, parts.curvatures - new.curvatures)

    @cached_property
    def trained(self) -> HeadRows:
        """The live rows, as the head was trained on them."""
        return trained_rows(self.index, self.models.classifier())

    @cached_property
    def refit(self) -> Refit:
        """J_S with the damping of the question."""
        return Refit(self.trained, self.index.loss, self.inverse.damping)


def trained_rows(index: Index, classifier: Classifier) -> HeadRows:
    """The live rows of an index, as the head of its last checkpoint was trained on them."""
    forward = forward_of_features(classifier, index.features().take(index.live))
    return HeadRows(forward.features, forward.logits, index.targets(index.live))
