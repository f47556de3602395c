"""The head of an index as a problem in which training rows can be taken out or relabelled, for flip sets.

All of it is at the head, in float64, on the stored features: J_S of :mod:`~forebear.retriever.effects.steps`, whose
minimum with all rows is the trained head. A *state* is that minimum for a set S of changed rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from forebear.errors import InputError, MissingStoreError
from forebear.indexer.index import Index
from forebear.retriever.effects.minimum import HeadRows, Refit
from forebear.retriever.effects.refits import HeadRefits, trained_rows


@dataclass(frozen=True, eq=False)
class State:
    """The head, refitted after some rows were changed.

    Attributes:
        changed: Positions among the live rows, in the order in which they were changed.
        weight: V, change of the head's weight in the loss' basis, ``(a, h)``.
    """

    changed: np.ndarray
    weight: np.ndarray


def check_head(index: Index) -> None:
    """Refuse an index whose head cannot be refitted row by row.

    Raises:
        InputError: The head has too many classes for one matrix.
        MissingStoreError: The index holds no curvature of its head.
    """
    needs = "flip sets take the head's exact curvature"
    if index.head.solver is None:
        raise MissingStoreError(
            f"{needs}, and {index.folder} holds none (--damping none). Build it with a --damping.", of="index"
        )
    if index.head.solver != "exact":
        raise InputError(
            f"{needs}, and the head of {index.folder} has too many classes for one matrix of it. The method `if` ranks "
            "the rows behind a prediction there, too."
        )


class HeadProblem:
    """Changes of the training rows of an index, and what the head then says of a test row.

    Attributes:
        relabels: Whether rows get another label; else they are taken out.
        rows: Numbers of the live rows, ``(n,)``.
        labels: Their class ids, ``(n,)``.
    """

    def __init__(self, refits: HeadRefits, *, relabels: bool) -> None:
        """Read the stored features of the live rows.

        Raises:
            InputError: See :func:`check_head`.
        """
        index = refits.index
        check_head(index)
        self.relabels, self.rows, self._loss = relabels, index.live, index.loss
        self._trained = trained_rows(index, refits.models.classifier())
        self.labels = self._trained.targets
        self._basis = self._loss.basis(self._trained.logits.shape[1])
        width = self._trained.features.shape[1]
        self._refit = Refit(self._trained, self._loss, refits.inverse.damping)
        self.begin = State(np.empty(0, np.int64), np.zeros((len(self._basis), width)))

    def logits(self, state: State, feature: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Logits ``(c,)`` of a test row in a state, of its feature ``(h,)`` and its logits by the trained head."""
        return np.asarray(logits + self._basis.T @ (state.weight @ feature.astype(np.float64)))

    def refitted(self, changed: np.ndarray, new_labels: np.ndarray | None, start: State) -> State:
        """The state after rows are changed, at the minimum of J_S.

        Args:
            changed: Positions among the live rows.
            new_labels: Their new class ids, where rows are relabelled.
            start: A state near it.
        """
        rows = self._after(changed, new_labels)
        if not self.relabels:
            rows = rows.take(np.delete(np.arange(len(rows)), changed))
        return State(changed, self._refit.minimum(rows, start.weight))

    def gains(
        self, state: State, new_labels: np.ndarray | None, feature: np.ndarray, first: int, second: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted change of the margin, logit ``first`` - logit ``second``, of a test row by changing each row more.

        To first order in the row, at the state's own head and curvature.

        Args:
            state: A state.
            new_labels: Class ids of the state's changed rows, where rows are relabelled.
            feature: f of the test row, ``(h,)``.
            first: The class that is predicted.
            second: The class that is to be.

        Returns:
            Changes of the margin ``(n,)``, of a row that is changed already by changing it back; and the label that
            each row would get ``(n,)`` (its own, where rows are taken out).
        """
        now = self._after(state.changed, new_labels)
        kept = now if self.relabels else now.take(np.delete(np.arange(len(now)), state.changed))
        direction = self._basis[:, first] - self._basis[:, second]
        asked = direction[:, None] * feature.astype(np.float64)[None]
        solved = self._refit.solve(state.weight, asked, kept)
        n, n_classes = self._trained.logits.shape
        back = np.zeros(n, bool)
        back[state.changed] = True
        gains, labels, start = np.empty(n), self.labels.copy(), 0
        for rows in now.blocks():
            block = slice(start, start := start + len(rows))
            logits = rows.logits + rows.features @ state.weight.T @ self._basis
            along = rows.features @ solved.T  # <x_a, f_n>, (b, a)

            def pull(of: np.ndarray, logits: np.ndarray = logits, along: np.ndarray = along) -> np.ndarray:
                """What the row's loss with these labels takes from the margin, times N."""
                residuals, _ = self._loss.residual_and_loss(logits, of)
                return np.asarray(((residuals @ self._basis.T) * along).sum(axis=1))

            own = pull(self.labels[block])
            if not self.relabels:
                gains[block] = np.where(back[block], -own, own)
                continue
            by_label = np.stack([pull(np.full(len(rows), label)) for label in range(n_classes)])
            by_label[self.labels[block], np.arange(len(rows))] = -np.inf  # its own label is no new one
            gains[block] = np.where(back[block], pull(rows.targets) - own, own - by_label.max(axis=0))
            labels[block] = np.where(back[block], self.labels[block], by_label.argmax(axis=0))
        return gains / n, labels

    def _after(self, changed: np.ndarray, new_labels: np.ndarray | None) -> HeadRows:
        """All rows, with the new labels of those that are relabelled."""
        if not self.relabels or new_labels is None or not len(changed):
            return self._trained
        targets = self.labels.copy()
        targets[changed] = new_labels
        return replace(self._trained, targets=targets)
