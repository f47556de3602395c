"""Flip sets of test rows: searched at the head, put to the test by retraining where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.flips.head import HeadProblem
from forebear.evaluation.flips.retrained import Ranked, Retrained, retrain
from forebear.evaluation.flips.search import FlipSearch, FlipSet
from forebear.evaluation.retraining.jobs import Progress, Retrainer
from forebear.indexer.model.forward import Forward, run_forward
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.listed import effects_of_rows
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.retriever import Retriever

WITHIN = (1, 5, 10, 50)  # rows of a set, for the shares of test rows that so many flip


@dataclass(frozen=True, eq=False)
class Flips:
    """Flip sets of ``q`` test rows.

    Attributes:
        queries: The test rows.
        sets: Their sets, of the rows that are changed in the end.
        effects: Predicted rise of the loss of the predicted class without each row of a set alone, in nats; empty
            where rows are relabelled.
        retrained: What retraining says of each; empty where none was asked for.
        relabels: Whether rows are relabelled; else they are taken out.
        limit: Rows that were changed at most.
        n_rows: Live training rows.
    """

    queries: QueryRows
    sets: list[FlipSet]
    effects: list[np.ndarray]
    retrained: list[Retrained]
    relabels: bool
    limit: int
    n_rows: int

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each set that holds, ``(q,)`` float64; infinity where none was found.

        A set holds where retraining flips most seeds, or, without retraining, where the refitted head flips.
        """
        if self.retrained:
            return np.array([np.inf if r.size is None else r.size for r in self.retrained], np.float64)
        return np.array([len(s) if s.flipped else np.inf for s in self.sets], np.float64)

    def within(self, n_rows: int) -> int:
        """Number of test rows that at most so many rows flip."""
        return int((self.sizes <= n_rows).sum())


def limit_of(given: int | None, n_rows: int) -> int:
    """Rows that are changed at most: half of the live ones where nothing is given.

    Raises:
        InputError: The number is below 1, or leaves fewer than two rows.
    """
    limit = n_rows // 2 if given is None else given
    if not 1 <= limit <= n_rows - 2:
        raise InputError(f"--limit {limit}: expected 1 to {n_rows - 2}, of {n_rows} live rows.")
    return limit


def flip_sets(
    retriever: Retriever,
    queries: QueryRows,
    *,
    to: int | None,
    relabels: bool,
    limit: int,
    damping: str | None,
    retrainer: Retrainer | None = None,
    seeds: Sequence[int] = (),
    progress: Progress = lambda _stage, _done, _total: None,
) -> Flips:
    """Find the flip set of every test row.

    Args:
        retriever: Over an index with the exact curvature of its head.
        queries: Test rows.
        to: The class that the model shall predict; None: any other than it does. Rows that it predicts already have an
            empty set.
        relabels: Whether rows get another label; else they are taken out.
        limit: Rows that are changed at most.
        damping: Of the head, as a question names it; None: the index's first.
        retrainer: Its evaluation rows are the test rows; None: sets are verified at the head alone.
        seeds: Seeds of the retrainings.
        progress: Called with the stage, the test rows done and in all.
    """
    refits = HeadRefits(retriever.models, damping)
    problem = HeadProblem(refits, relabels=relabels)
    search = FlipSearch(problem, limit)
    forward = run_forward(retriever.classifier(), queries.texts)
    sets, effects, found = [], [], []
    for i in range(len(queries)):
        feature, logits = forward.features[i], forward.logits[i]
        flip_set = search.find(feature, logits, to)
        if retrainer is not None:
            is_predicted = flip_set.before == to
            more = flip_set if is_predicted else search.ranking(feature, logits, flip_set)
            size = 0 if is_predicted else max(1, len(flip_set))
            ranked = Ranked(i, more.rows, more.new_labels, size, flip_set.before, to)
            outcome = retrain(retrainer, ranked, seeds)
            found.append(outcome)
            if outcome.size is not None:
                flip_set = search.first(more, outcome.size, feature, logits)
        sets.append(flip_set)
        effects.append(np.empty(0) if relabels else _effects(refits, forward, flip_set, i))
        progress("test rows", i + 1, len(queries))
    return Flips(queries, sets, effects, found, relabels, limit, len(problem.rows))


def _effects(refits: HeadRefits, forward: Forward, flip_set: FlipSet, query: int) -> np.ndarray:
    """Effect of the removal of each row of a set alone on the loss of the predicted class, ``(n,)``."""
    if not len(flip_set):
        return np.empty(0)
    predictions = Predictions.of(forward.take(np.array([query])), np.array([flip_set.before]))
    return np.asarray(effects_of_rows(refits, predictions, flip_set.rows[None])[0][0])
