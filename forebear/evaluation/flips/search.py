"""The search for a flip set at the head: greedy, with effects that are updated, then as small as it can be made.

The margin is the logit of the predicted class minus that of another. Rows are changed whose change is predicted to
lower it most; every few rows the head is refitted (exactly, to the minimum of J_S), and all effects are predicted anew
from there. When the refitted head says something else, rows of the least effect are changed back as long as it does. So
every set that is returned is verified at the head; that it is the smallest of all sets is not proven.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.evaluation.flips.head import HeadProblem, State
from forebear.indexer.losses.cross_entropy import softmax

ROUND_SHARE = 0.5  # of the rows that seem to be needed: what is changed before effects are predicted anew
SINGLE_TRIES = 8  # rows that are changed back one by one, at the end


@dataclass(frozen=True, eq=False)
class FlipSet:
    """Training rows whose change flips a prediction, or what was tried.

    Attributes:
        rows: Numbers of the training rows, those of the largest effect first, ``(n,)``.
        labels: Their class ids, ``(n,)``.
        new_labels: Their new class ids where they are relabelled, ``(n,)``; None where they are taken out.
        before: Class that is predicted.
        after: Class that the head predicts after the change; ``before`` where it did not flip.
        probability_before: Probability of ``before`` by the model as it is.
        probability_after: The same after the change, by the refitted head.
        to: The class that was asked for; None: any other.
    """

    rows: np.ndarray
    labels: np.ndarray
    new_labels: np.ndarray | None
    before: int
    after: int
    probability_before: float
    probability_after: float
    to: int | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def flipped(self) -> bool:
        """Whether the refitted head predicts what was asked for."""
        return self.after != self.before if self.to is None else self.after == self.to


class FlipSearch:
    """Searches for the flip set of one prediction after another."""

    def __init__(self, problem: HeadProblem, limit: int) -> None:
        """Set up.

        Args:
            problem: The head.
            limit: Rows that are changed at most.
        """
        self._problem, self._limit = problem, limit

    def find(self, feature: np.ndarray, logits: np.ndarray, to: int | None = None) -> FlipSet:
        """The flip set of a test row.

        Args:
            feature: f of the test row, ``(h,)``.
            logits: Its logits, ``(c,)`` float64.
            to: The class that the head shall predict; None: any other than it does.
        """
        asked = _Asked(self._problem, feature, logits, to)
        state, new_labels = self._grow(asked)
        if asked.flips(state):
            state, new_labels = self._shrink(asked, state, new_labels)
        return asked.found(state, new_labels)

    def ranking(self, feature: np.ndarray, logits: np.ndarray, flip_set: FlipSet) -> FlipSet:
        """A flip set and further rows, up to the limit, in the order of their predicted effects after it."""
        asked = _Asked(self._problem, feature, logits, flip_set.to)
        changed = np.searchsorted(self._problem.rows, flip_set.rows)
        new_labels = np.empty(0, np.int64) if flip_set.new_labels is None else flip_set.new_labels
        state = self._problem.refitted(changed, new_labels, self._problem.begin)
        while len(state.changed) < self._limit:
            _, gains, labels = asked.gains(state, new_labels)
            gains[state.changed] = np.inf
            order = np.argsort(gains, kind="stable")
            n_more = min(max(1, len(state.changed)), int((gains < 0).sum()), self._limit - len(state.changed))
            if not n_more:
                break
            new_labels = np.concatenate([new_labels, labels[order[:n_more]]])
            state = self._problem.refitted(np.concatenate([state.changed, order[:n_more]]), new_labels, state)
        return asked.found(state, new_labels)

    def first(self, ranking: FlipSet, size: int, feature: np.ndarray, logits: np.ndarray) -> FlipSet:
        """The first rows of a ranking as a set of their own."""
        asked = _Asked(self._problem, feature, logits, ranking.to)
        changed = np.searchsorted(self._problem.rows, ranking.rows[:size])
        new_labels = np.empty(0, np.int64) if ranking.new_labels is None else ranking.new_labels[:size]
        return asked.found(self._problem.refitted(changed, new_labels, self._problem.begin), new_labels)

    def shortest_beginning(
        self, feature: np.ndarray, logits: np.ndarray, order: np.ndarray, to: int | None = None
    ) -> FlipSet:
        """The fewest first rows of a given order whose removal flips the prediction, to compare orders with.

        Args:
            feature: f of the test row, ``(h,)``.
            logits: Its logits, ``(c,)`` float64.
            order: Positions among the live rows, those to be taken out first.
            to: See :meth:`find`.
        """
        asked = _Asked(self._problem, feature, logits, to)
        order = order[: self._limit]
        low, high, size, best = 0, None, 1, self._problem.begin
        while high is None and low < len(order):
            size = min(size, len(order))
            state = self._problem.refitted(order[:size], None, best)
            best = state
            if asked.flips(state):
                high = size
            else:
                low, size = size, 2 * size
        while high is not None and high - low > 1:
            middle = (low + high) // 2
            state = self._problem.refitted(order[:middle], None, best)
            if asked.flips(state):
                best, high = state, middle
            else:
                low = middle
        return asked.found(best, None)

    def _grow(self, asked: _Asked) -> tuple[State, np.ndarray]:
        """Change rows until the refitted head says something else, or no row helps any more."""
        state, new_labels = self._problem.begin, np.empty(0, np.int64)
        while not asked.flips(state) and len(state.changed) < self._limit:
            margin, gains, labels = asked.gains(state, new_labels)
            gains[state.changed] = np.inf
            order = np.argsort(gains, kind="stable")
            helping = int((gains < 0).sum())
            if not helping:
                break
            reached = np.flatnonzero(margin + np.cumsum(gains[order[:helping]]) <= 0)
            needed = int(reached[0]) + 1 if len(reached) else helping
            n_more = min(int(np.ceil(ROUND_SHARE * needed)), self._limit - len(state.changed))
            more = order[:n_more]
            new_labels = np.concatenate([new_labels, labels[more]])
            state = self._problem.refitted(np.concatenate([state.changed, more]), new_labels, state)
        return state, new_labels

    def _shrink(self, asked: _Asked, state: State, new_labels: np.ndarray) -> tuple[State, np.ndarray]:
        """Change back as many rows as the flip stands, those of the least effect first."""
        _, gains, _ = asked.gains(state, new_labels)
        order = np.argsort(-gains[state.changed], kind="stable")  # the largest effect first
        changed, new_labels = state.changed[order], new_labels[order]
        low, high = 0, len(changed)  # so many rows do not suffice; so many do
        best = State(changed, state.weight)
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._problem.refitted(changed[:middle], new_labels[:middle], best)
            if asked.flips(tried):
                best, high = tried, middle
            else:
                low = middle
        new_labels = new_labels[:high]
        for place in range(len(best.changed) - 1, max(-1, len(best.changed) - 1 - SINGLE_TRIES), -1):
            if len(best.changed) == 1:
                break
            kept = np.delete(np.arange(len(best.changed)), place)
            tried = self._problem.refitted(best.changed[kept], new_labels[kept], best)
            if asked.flips(tried):
                best, new_labels = tried, new_labels[kept]
        return best, new_labels


class _Asked:
    """One test row and what is asked of it."""

    def __init__(self, problem: HeadProblem, feature: np.ndarray, logits: np.ndarray, to: int | None) -> None:
        self._problem, self._feature, self._logits, self._to = problem, feature, logits, to
        self._before = int(logits.argmax())

    def logits(self, state: State) -> np.ndarray:
        return self._problem.logits(state, self._feature, self._logits)

    def flips(self, state: State) -> bool:
        after = int(self.logits(state).argmax())
        return after != self._before if self._to is None else after == self._to

    def gains(self, state: State, new_labels: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Margin, and the predicted changes of it with the new labels; see :meth:`HeadProblem.gains`.

        Of a state that flips already the margin is below 0: it is that of the same two classes.
        """
        logits = self.logits(state)
        others = logits.copy()
        if self._to is None:
            others[self._before] = -np.inf
            first, second = self._before, int(others.argmax())
        else:
            others[self._to] = -np.inf
            first, second = int(others.argmax()), self._to
        gains, labels = self._problem.gains(state, new_labels, self._feature, first, second)
        return float(logits[first] - logits[second]), gains, labels

    def found(self, state: State, new_labels: np.ndarray | None) -> FlipSet:
        problem = self._problem
        logits = np.stack([self._logits, self.logits(state)])
        probabilities = softmax(logits)[:, self._before]
        return FlipSet(
            rows=problem.rows[state.changed],
            labels=problem.labels[state.changed],
            new_labels=new_labels if problem.relabels else None,
            before=self._before,
            after=int(logits[1].argmax()),
            probability_before=float(probabilities[0]),
            probability_after=float(probabilities[1]),
            to=self._to,
        )
