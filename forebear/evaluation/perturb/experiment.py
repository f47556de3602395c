"""``perturb attack`` and ``perturb fix``: retrain on changed rows and measure (Joint, sections 4.2 and 4.3).

``attack`` replaces the rows chosen for all attacked test rows at once and retrains; ``fix`` leaves them as they are and
adds the changed ones, with the labels of the old. Beside every strategy stand as many random changes: other rows, other
words, other substitutes. They are drawn anew for each seed of the retraining; the strategies' choice is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from forebear.evaluation.perturb.choice import Chooser
from forebear.evaluation.perturb.spec import RANDOM, Change, PerturbationQueries, PerturbSpec, What
from forebear.evaluation.retraining.jobs import Job, Outcome, Retrainer
from forebear.indexer.model.forward import run_forward
from forebear.retriever.retriever import Retriever

Turns = list[list[Change]]  # one change a query in each


@dataclass(frozen=True)
class Evaluation:
    """Rows on which retrained models are evaluated.

    Attributes:
        texts: One list a text column, as the retrainer has them.
        gold: Class ids, ``(n,)``.
        sets: Positions of the rows of each set that is reported, by its name.
    """

    texts: Sequence[Sequence[str]]
    gold: np.ndarray
    sets: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """Accuracy and confidence of retrained models on a set of rows.

    Attributes:
        accuracy: Share of right answers, ``(amounts, seeds)``.
        probability: Mean probability of the gold class, ``(amounts, seeds)``.
    """

    accuracy: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """The changes of a perturbation, and the measurements of the models retrained with them.

    Attributes:
        spec: The choices.
        seeds: Seeds of the retrainings.
        queries: Test rows that the changes are for.
        changes: Changes by strategy, in turns of one change a query.
        random: Random changes by seed, in the same turns.
        sets: Number of rows of each set, by its name.
        indexed: Accuracy of the indexed model on each set.
        clean: Measurements on each set of models retrained on unchanged rows; they have one amount.
        changed: Measurements by strategy (and ``random``) on each set; the amounts are ``spec.rows``.
        residual: Largest relative residual of H^-1, where the solver iterates; else None.
        seeded: Whether the seed makes a difference to a retraining.
    """

    spec: PerturbSpec
    seeds: tuple[int, ...]
    queries: PerturbationQueries
    changes: dict[str, Turns]
    random: dict[int, Turns]
    sets: dict[str, int]
    indexed: dict[str, float]
    clean: dict[str, Measured]
    changed: dict[str, dict[str, Measured]]
    residual: float | None
    seeded: bool


def perturb(
    retriever: Retriever,
    chooser: Chooser,
    spec: PerturbSpec,
    queries: PerturbationQueries,
    evaluation: Evaluation,
    retrainer: Retrainer,
    seeds: Sequence[int],
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Perturbation:
    """Choose, retrain, measure.

    Args:
        retriever: Over the index.
        chooser: Over the same index, for these choices and test rows.
        spec: The choices.
        queries: The test rows that the changes are for.
        evaluation: Rows on which the retrained models are evaluated.
        retrainer: Over the index's rows and the same evaluation rows.
        seeds: Seeds of the retrainings; every strategy and amount is retrained once with each.
        progress: Called with the stage of the retraining, jobs done and jobs in all.

    Raises:
        InputError: There are too few rows in which a word can be replaced.
    """
    changes = {strategy: chooser.choose(strategy) for strategy in spec.strategies}
    random = {seed: chooser.choose_random(seed) for seed in seeds}
    names = (*spec.strategies, RANDOM)
    live = retriever.index.live
    jobs = []
    for seed in seeds:
        jobs.append(Job(live, seed))
        for turns in (*changes.values(), random[seed]):
            jobs += [make_job(spec.what, live, seed, turns[:n]) for n in spec.rows]
    outcomes = retrainer.run(jobs, progress)
    jobs_per_seed = 1 + len(names) * len(spec.rows)
    by_seed = [outcomes[i : i + jobs_per_seed] for i in range(0, len(outcomes), jobs_per_seed)]

    def measure(amounts: slice) -> dict[str, Measured]:
        return {
            name: _measure([of_seed[amounts] for of_seed in by_seed], evaluation.gold, positions)
            for name, positions in sets.items()
        }

    sets = evaluation.sets
    first = {name: 1 + i * len(spec.rows) for i, name in enumerate(names)}
    right = run_forward(retriever.classifier(), evaluation.texts).predictions == evaluation.gold
    return Perturbation(
        spec=spec, seeds=tuple(seeds), queries=queries, changes=changes, random=random,
        sets={name: len(positions) for name, positions in sets.items()},
        indexed={name: float(right[positions].mean()) for name, positions in sets.items()},
        clean=measure(slice(0, 1)),
        changed={name: measure(slice(i, i + len(spec.rows))) for name, i in first.items()},
        residual=chooser.residual, seeded=retrainer.recipe.seeded,
    )  # fmt: skip


def make_job(what: What, live: np.ndarray, seed: int, turns: Turns) -> Job:
    """A retraining in which rows are replaced (``attack``) or changed ones added (``fix``)."""
    changes = list(chain.from_iterable(turns))
    if what == "attack":
        return Job(live, seed, edits={change.row: change.new for change in changes})
    return Job(live, seed, extra=[(change.new, change.label) for change in changes])


def _measure(outcomes: Sequence[Sequence[Outcome]], gold: np.ndarray, positions: np.ndarray) -> Measured:
    """Measure outcomes, by seed and amount, on the rows at some positions."""
    accuracy = [[float((outcome.predictions == gold)[positions].mean()) for outcome in of_seed] for of_seed in outcomes]
    probability = [[float(outcome.probability(gold)[positions].mean()) for outcome in of_seed] for of_seed in outcomes]
    return Measured(np.array(accuracy).T, np.array(probability).T)
