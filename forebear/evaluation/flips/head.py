"""The head of an index as a problem in which training rows can be taken out or relabelled, for flip sets.

All of it is at the head, in float64, on the stored features: J_S of :mod:`~forebear.retriever.effects.steps`, whose
minimum with all rows is the trained head. A *state* is that minimum for a set S of changed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError, MissingStoreError
from forebear.indexer.index import Index
from forebear.retriever.effects.refits import HeadRefits


@dataclass(frozen=True, eq=False)
class State:
    """The head, refitted after some rows were changed.

    Attributes:
        changed: Positions among the live rows, in the order in which they were changed.
        new_labels: Class ids that they got; their own, where rows are taken out.
        weight: V, change of the head's weight in the loss' basis, ``(a, h)``.
    """

    changed: np.ndarray
    new_labels: np.ndarray
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
        self.relabels, self.rows, self.labels = relabels, index.live, refits.trained.targets
        self._refits, self._loss = refits, index.loss
        n_classes, width = refits.trained.logits.shape[1], refits.trained.features.shape[1]
        self._basis, none = self._loss.basis(n_classes), np.empty(0, np.int64)
        self.begin = State(none, none, np.zeros((len(self._basis), width)))

    def logits(self, state: State, feature: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Logits ``(c,)`` of a test row in a state, of its feature ``(h,)`` and its logits by the trained head."""
        return np.asarray(logits + self._basis.T @ (state.weight @ feature.astype(np.float64)))

    def refitted(self, changed: np.ndarray, new_labels: np.ndarray, start: State) -> State:
        """The state after rows are changed, at the minimum of J_S.

        Args:
            changed: Positions among the live rows.
            new_labels: The class ids that they get; of no account where rows are taken out.
            start: A state near it.
        """
        targets = new_labels if self.relabels else None
        return State(changed, new_labels, self._refits.minimum(self.rows[changed], targets, start.weight))

    def gains(self, state: State, feature: np.ndarray, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Predicted change of the margin, logit ``first`` - logit ``second``, of a test row by changing each row more.

        To first order in the row, at the state's own head and curvature.

        Args:
            state: A state.
            feature: f of the test row, ``(h,)``.
            first: The class that is predicted.
            second: The class that is to be.

        Returns:
            Changes of the margin ``(n,)``, of a row that is changed already by changing it back; and the label that
            each row would get ``(n,)`` (its own, where rows are taken out).
        """
        trained = self._refits.trained
        kept = self._refits.after(self.rows[state.changed], state.new_labels if self.relabels else None)
        direction = self._basis[:, first] - self._basis[:, second]
        asked = direction[:, None] * feature.astype(np.float64)[None]
        solved = self._refits.refit.solve(state.weight, asked, kept)
        n, n_classes = trained.logits.shape
        back = np.zeros(n, bool)
        back[state.changed] = True
        gains, labels, start = np.empty(n), self.labels.copy(), 0
        for rows in (kept if self.relabels else trained).blocks():
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
