"""``effects``: do predicted effects come true when the model is trained again without the rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.retraining.changes import within_budget
from forebear.evaluation.retraining.effects.sets import RemovedSet, named_sets, random_sets
from forebear.evaluation.retraining.jobs import Job, Outcome, Progress, Retrainer
from forebear.indexer.losses.loss import Loss
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.kinds import NEWTON, effect_kind
from forebear.retriever.effects.listed import effects_of_set
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.question.models import Models
from forebear.retriever.question.spec import Question

LOSS, PROBABILITY = 0, 1  # columns of changes


@dataclass(frozen=True, eq=False)
class Predictor:
    """The effects that one method at one scope predicts.

    Attributes:
        name: What it is called in results.
        question: A question of this method alone.
        scores: Scores of all live rows, ``(q, n)``.
        models: Models of the index.
    """

    name: str
    question: Question
    scores: np.ndarray
    models: Models

    def changes(self, predictions: Predictions, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Predicted changes without some rows, ``(m, 2)``: of the loss, and of the target's probability or NaN.

        Args:
            predictions: The test rows.
            rows: Numbers of the rows that are left out, ascending.
            positions: Which of the test rows, ``(m,)``.
        """
        kind = effect_kind(self.question, self.question.methods[0])
        some = predictions.take(positions)
        if kind.order == NEWTON:
            refits = HeadRefits(self.models, self.question.curvature.damping)
            return np.stack(effects_of_set(refits, some, rows), axis=1)
        live = self.question.index.live
        effects = self.scores[np.ix_(positions, np.searchsorted(live, rows))].sum(axis=1) / kind.divisor
        changes = np.full((len(positions), 2), np.nan)
        changes[:, LOSS] = effects
        if kind.has_probability:
            changes[:, PROBABILITY] = some.probability_changes(effects[:, None])[:, 0]
        return changes


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Predicted and retrained changes of one setting.

    Attributes:
        queries: Position of each pair's test row, ``(n,)``.
        sizes: Number of rows left out, ``(n,)``.
        kinds: Which rows: ``random``, ``proponents`` or ``opponents``, ``(n,)``.
        predicted: Predicted changes of the target's loss in nats, and of its probability, ``(n, 2)``.
        retrained: The same after retraining, means over seeds, ``(n, 2)``.
    """

    queries: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    predicted: np.ndarray
    retrained: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EffectPairs:
    """Pairs of every setting, by its name.

    Attributes:
        pairs: By name of the setting.
        sizes: Numbers of rows left out.
        seeds: Seeds of the retrainings.
        sampled: One line that says which retrainings were sampled.
    """

    pairs: dict[str, Pairs]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    sampled: str


def check_effects(question: Question) -> None:
    """Refuse methods that estimate no effect, or one of another loss than the target's.

    Raises:
        InputError: With the reason.
    """
    for method in question.methods:
        kind = effect_kind(question, method)
        if kind.order is None:
            raise InputError(f"{method.name} has {kind.note}. Leave it out of --method; `if` has effects.")
        if method.spans:
            raise InputError(f"{method.name} has effects of masking a span, not of removing a row. Give `if`.")


def measure_effects(
    retrainer: Retrainer,
    predictors: Sequence[Predictor],
    predictions: Predictions,
    sizes: Sequence[int],
    seeds: Sequence[int],
    *,
    n_sets: int = 10,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> EffectPairs:
    """Retrain without random rows and without both ends of every ranking; beside each change what was predicted.

    Args:
        retrainer: Its evaluation rows are the test rows.
        predictors: Settings, whose methods estimate effects.
        predictions: What the model says of the test rows.
        sizes: Numbers of rows to leave out.
        seeds: Seeds of the retrainings; changes are taken within a seed, and averaged.
        n_sets: Random sets of each size, which all test rows share.
        budget: Models to train at most; random sets, and test rows with their own sets, are sampled.
        seed: Seed of the random sets and of that sample.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.
    """
    if n_sets < 1:
        raise InputError(f"--sets {n_sets}: expected at least 1.")
    live, n_queries = retrainer.rows.live, len(predictions.targets)
    groups = [[one] for one in random_sets(live, sizes, n_sets, seed)]
    groups += [
        named_sets({i: p.scores[query] for i, p in enumerate(predictors)}, live, sizes, query)
        for query in range(n_queries)
    ]
    units = [[Job(live, s, without=one.rows) for one in sets for s in seeds] for sets in groups]
    units = [[*(Job(live, s) for s in seeds), *unit] for unit in units]
    chosen, sampled = within_budget(retrainer, units, budget, seed)
    sets = [one for i in chosen for one in groups[i]]
    changes = _retrained(retrainer, sets, predictions, seeds, progress)
    pairs = {predictor.name: _pairs(predictor, i, sets, changes, predictions) for i, predictor in enumerate(predictors)}
    return EffectPairs(pairs=pairs, sizes=tuple(sizes), seeds=tuple(seeds), sampled=sampled)


def _retrained(
    retrainer: Retrainer, sets: Sequence[RemovedSet], predictions: Predictions, seeds: Sequence[int], progress: Progress
) -> np.ndarray:
    """Changes without each set, means over the seeds, ``(sets, q, 2)``."""
    live = retrainer.rows.live
    jobs = [job for s in seeds for job in (Job(live, s), *(Job(live, s, without=one.rows) for one in sets))]
    outcomes = retrainer.run(jobs, progress)
    values = np.stack([_values(outcome, predictions.targets, predictions.loss) for outcome in outcomes])
    by_seed = values.reshape(len(seeds), 1 + len(sets), *values.shape[1:])
    return np.asarray((by_seed[:, 1:] - by_seed[:, :1]).mean(axis=0))


def _values(outcome: Outcome, targets: np.ndarray, loss: Loss) -> np.ndarray:
    """Loss of each target in nats and its probability, ``(q, 2)``."""
    _, losses = loss.residual_and_loss(outcome.logits.astype(np.float64), targets)
    return np.stack([losses, outcome.probability(targets)], axis=1)


def _pairs(
    predictor: Predictor, number: int, sets: Sequence[RemovedSet], changes: np.ndarray, predictions: Predictions
) -> Pairs:
    """The pairs of one setting: of random sets with every test row, of its own sets with theirs."""
    every = np.arange(len(predictions.targets))
    own = [(i, one) for i, one in enumerate(sets) if one.setting in (None, number)]
    positions = [every if one.query is None else np.array([one.query]) for _, one in own]
    counts = [len(some) for some in positions]
    predicted = [predictor.changes(predictions, one.rows, some) for (_, one), some in zip(own, positions, strict=True)]
    return Pairs(
        queries=np.concatenate(positions),
        sizes=np.repeat([len(one.rows) for _, one in own], counts),
        kinds=np.repeat([one.kind for _, one in own], counts),
        predicted=np.concatenate(predicted),
        retrained=np.concatenate([changes[i, some] for (i, _), some in zip(own, positions, strict=True)]),
    )
