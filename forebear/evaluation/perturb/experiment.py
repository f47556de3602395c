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
    """Rows that retrained models are asked of.

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
    """How retrained models do on a set of rows.

    Attributes:
        accuracy: Share of right answers, ``(amounts, seeds)``.
        probability: Mean probability of the gold class, ``(amounts, seeds)``.
    """

    accuracy: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What was changed, and what came of it.

    Attributes:
        spec: The choices.
        seeds: Of the retrainings.
        queries: Test rows that the changes are for.
        changes: By strategy, in turns of one a query.
        random: The same of random changes, by seed.
        sets: Number of rows of each set, by its name.
        indexed: Accuracy of the indexed model on each set.
        clean: On each set, of models retrained on the rows as they are; one amount.
        changed: By strategy (and ``random``), on each set; amounts are ``spec.rows``.
        residual: Largest relative residual of H^-1, where the solver iterates.
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
        queries: The test rows.
        evaluation: Rows that are reported.
        retrainer: Over the index's rows and the same evaluation rows.
        seeds: One retraining for each, for every strategy and amount.
        progress: Told the stage of the retraining, jobs done and jobs in all.

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
    each = 1 + len(names) * len(spec.rows)
    by_seed = [outcomes[i : i + each] for i in range(0, len(outcomes), each)]

    def measure(where: slice) -> dict[str, Measured]:
        return {name: _measure([some[where] for some in by_seed], evaluation.gold, at) for name, at in sets.items()}

    sets = evaluation.sets
    first = {name: 1 + i * len(spec.rows) for i, name in enumerate(names)}
    right = run_forward(retriever.classifier(), evaluation.texts).predictions == evaluation.gold
    return Perturbation(
        spec=spec, seeds=tuple(seeds), queries=queries, changes=changes, random=random,
        sets={name: len(at) for name, at in sets.items()},
        indexed={name: float(right[at].mean()) for name, at in sets.items()},
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


def _measure(outcomes: Sequence[Sequence[Outcome]], gold: np.ndarray, at: np.ndarray) -> Measured:
    """Of outcomes by seed and amount, on some rows."""
    accuracy = [[float((o.predictions == gold)[at].mean()) for o in some] for some in outcomes]
    probability = [[float(o.probability(gold)[at].mean()) for o in some] for some in outcomes]
    return Measured(np.array(accuracy).T, np.array(probability).T)
