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
        state = self._grow(asked)
        return asked.found(self._shrink(asked, state) if asked.flips(state) else state)

    def ranking(self, feature: np.ndarray, logits: np.ndarray, flip_set: FlipSet) -> FlipSet:
        """A flip set and further rows, up to the limit, in the order of their predicted effects after it."""
        asked = _Asked(self._problem, feature, logits, flip_set.to)
        state = self._state_of(flip_set, len(flip_set))
        while len(state.changed) < self._limit:
            _, rows, _, labels = self._helping(asked, state)
            n_more = min(max(1, len(state.changed)), len(rows), self._limit - len(state.changed))
            if not n_more:
                break
            state = self._changed_more(state, rows[:n_more], labels[:n_more])
        return asked.found(state)

    def first(self, ranking: FlipSet, size: int, feature: np.ndarray, logits: np.ndarray) -> FlipSet:
        """The first rows of a ranking as a set of their own."""
        return _Asked(self._problem, feature, logits, ranking.to).found(self._state_of(ranking, size))

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
        labels = self._problem.labels[order]  # of no account: rows are taken out
        tried, size, state = 0, min(1, len(order)), self._problem.begin
        while tried < len(order):
            state = self._problem.refitted(order[:size], labels[:size], state)
            if asked.flips(state):
                return asked.found(self._fewest(asked, order, labels, tried, state))
            tried, size = size, min(2 * size, len(order))
        return asked.found(state)

    def _grow(self, asked: _Asked) -> State:
        """Change rows until the refitted head says something else, or no row helps any more."""
        state = self._problem.begin
        while not asked.flips(state) and len(state.changed) < self._limit:
            margin, rows, gains, labels = self._helping(asked, state)
            if not len(rows):
                break
            reached = np.flatnonzero(margin + np.cumsum(gains) <= 0)
            needed = int(reached[0]) + 1 if len(reached) else len(rows)
            n_more = min(int(np.ceil(ROUND_SHARE * needed)), self._limit - len(state.changed))
            state = self._changed_more(state, rows[:n_more], labels[:n_more])
        return state

    def _shrink(self, asked: _Asked, state: State) -> State:
        """Change back as many rows as the flip stands, those of the least effect first."""
        _, gains, _ = asked.gains(state)
        order = np.argsort(-gains[state.changed], kind="stable")  # the largest effect first
        changed, new_labels = state.changed[order], state.new_labels[order]
        best = self._fewest(asked, changed, new_labels, 0, State(changed, new_labels, state.weight))
        for place in range(len(best.changed) - 1, max(-1, len(best.changed) - 1 - SINGLE_TRIES), -1):
            if len(best.changed) == 1:
                break
            fewer = np.delete(best.changed, place), np.delete(best.new_labels, place)
            tried = self._problem.refitted(*fewer, best)
            if asked.flips(tried):
                best = tried
        return best

    def _fewest(
        self, asked: _Asked, changed: np.ndarray, new_labels: np.ndarray, too_few: int, flipped: State
    ) -> State:
        """The fewest first rows that flip, by bisection.

        Args:
            asked: The test row.
            changed: Positions of rows, those to be changed first.
            new_labels: Their new class ids.
            too_few: So many first rows do not flip it.
            flipped: The state of the fewest first rows that are known to.
        """
        while len(flipped.changed) - too_few > 1:
            middle = (too_few + len(flipped.changed)) // 2
            tried = self._problem.refitted(changed[:middle], new_labels[:middle], flipped)
            if asked.flips(tried):
                flipped = tried
            else:
                too_few = middle
        return flipped

    def _helping(self, asked: _Asked, state: State) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Margin; and the rows whose change lowers it, by falling effect: positions, gains and new labels."""
        margin, gains, labels = asked.gains(state)
        gains[state.changed] = np.inf
        rows = np.argsort(gains, kind="stable")[: int((gains < 0).sum())]
        return margin, rows, gains[rows], labels[rows]

    def _changed_more(self, state: State, rows: np.ndarray, labels: np.ndarray) -> State:
        changed, new_labels = np.concatenate([state.changed, rows]), np.concatenate([state.new_labels, labels])
        return self._problem.refitted(changed, new_labels, state)

    def _state_of(self, flip_set: FlipSet, size: int) -> State:
        """The state after the first rows of a set are changed."""
        changed = np.searchsorted(self._problem.rows, flip_set.rows[:size])
        labels = flip_set.labels if flip_set.new_labels is None else flip_set.new_labels
        return self._problem.refitted(changed, labels[:size], self._problem.begin)


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

    def gains(self, state: State) -> tuple[float, np.ndarray, np.ndarray]:
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
        gains, labels = self._problem.gains(state, self._feature, first, second)
        return float(logits[first] - logits[second]), gains, labels

    def found(self, state: State) -> FlipSet:
        problem = self._problem
        logits = np.stack([self._logits, self.logits(state)])
        probabilities = softmax(logits)[:, self._before]
        return FlipSet(
            rows=problem.rows[state.changed],
            labels=problem.labels[state.changed],
            new_labels=state.new_labels if problem.relabels else None,
            before=self._before,
            after=int(logits[1].argmax()),
            probability_before=float(probabilities[0]),
            probability_after=float(probabilities[1]),
            to=self._to,
        )
