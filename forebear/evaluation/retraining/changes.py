"""Parts that all measures by retraining share: changes of probability, seeds, budgets, lines of their reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import provenance
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.power import compare, no_verdict
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer
from forebear.wording import worded

RANDOM = "(random rows)"
MATCHED_NOTE = (
    " Random rows with the labels of a method: as many random rows of each class as the method removes, which change "
    "the class balance as the method's rows do."
)
IN_PLACE = (
    " Rows removed keep their place in the batches and weigh nothing: order, rates and dropout are those of the same "
    "seed's retraining on all rows."
)
Removals = Callable[[int, int], list[np.ndarray]]  # (query, seed) -> rows to remove, one array a variation


def matched_name(method: str) -> str:
    """What random rows with the labels of a method's rows are called in results."""
    return f"(random rows, labels of {method})"


def verdict_on(changes: np.ndarray, matched: np.ndarray, n_retrainings: int, seed: int) -> str:
    """A sentence where a method differs from random rows of its labels by no more than chance; empty otherwise.

    Args:
        changes: Values without the method's rows, one a query or a seed.
        matched: The same without random rows of their labels.
        n_retrainings: Retrainings that one more value takes.
        seed: Seed of the interval.
    """
    difference, needed = compare(changes, matched, seed)
    if difference.low is None or difference.high is None or not difference.low <= 0 <= difference.high:
        return ""
    said = no_verdict(None if needed is None else n_retrainings * needed, "retrainings")
    return f" Against random rows of the same labels: {said[0].lower()}{said[1:]}"


@dataclass(frozen=True, kw_only=True)
class RetrainingInputs(Inputs):
    """What an evaluation by retraining is given.

    Attributes:
        retrainer: Trains models and evaluates them on ``evaluated``.
        seeds: Seeds of the retrainings.
        evaluated: Test rows on which retrained models are evaluated: the queries, or all test rows.
    """

    retrainer: Retrainer
    seeds: tuple[int, ...]
    evaluated: QueryRows

    def retraining_provenance(self, residuals: Mapping[str, float], sampled: str) -> dict[str, str]:
        """The provenance lines of the report, with how models were retrained."""
        n_left_out = len(self.queries.left_out)
        left_out = f"; {n_left_out:,} sampled rows without a span left out" if n_left_out else ""
        return provenance(
            self.retriever,
            self.question,
            self.command,
            residuals=residuals,
            test_rows=f"{self.queries.source}, {len(self.queries):,} of them{left_out}",
            retraining=f"{self.retrainer.recipe.name}. {self.retrainer.recipe.note}",
            retrained=sampled,
            retraining_digest=self.retrainer.facts()["digest"],
            seeds=", ".join(map(str, self.seeds)),
        )

    def retraining_record(self, residuals: Mapping[str, float], sampled: str) -> dict[str, Any]:
        """The question, the retraining and the test rows as ``result.json`` records them."""
        return {
            **self.record(residuals),
            **self.retrainer.facts(),
            "seeds": self.seeds,
            "sampled": sampled,
            "queries": self.queries.rows,
        }


def seeds_of(retrainer: Retrainer, n_seeds: int, seed: int) -> tuple[int, ...]:
    """Seeds of the retrainings: ``n_seeds`` of them from ``seed`` on; one seed where the recipe has no randomness.

    Raises:
        InputError: ``n_seeds`` is less than 1.
    """
    if n_seeds < 1:
        raise InputError(f"--seeds {n_seeds}: expected at least 1.")
    return tuple(range(seed, seed + (n_seeds if retrainer.recipe.seeded else 1)))


def probability_changes(
    retrainer: Retrainer,
    removals: Removals,
    classes: np.ndarray | None,
    n_queries: int,
    seeds: Sequence[int],
    *,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> tuple[np.ndarray, str]:
    """Retrain without each set of rows, and measure how one class's probability changes for the query of that set.

    Args:
        retrainer: Its evaluation rows are the queries.
        removals: Rows to remove, the same number of variations for every query and seed.
        classes: The class of each query whose probability is measured, ``(q,)``; None: the class that the same seed's
            retraining on all rows predicts.
        n_queries: Number of queries, q.
        seeds: Seeds of the retrainings.
        budget: Models to train at most: pairs of a query and a seed are sampled, with all variations of each.
        seed: Seed of that sample.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Returns:
        Changes ``(variations, seeds, q)``, negative where the class became less probable; NaN where not sampled. And
        one line on the sample.
    """
    live = retrainer.rows.live
    places = [(s, i) for s in range(len(seeds)) for i in range(n_queries)]
    units = []
    for s, i in places:
        without = [Job(live, seeds[s], without=rows) for rows in removals(i, seeds[s])]
        units.append([Job(live, seeds[s]), *without])
    chosen, sampled = within_budget(retrainer, units, budget, seed)
    outcomes = retrainer.run([job for u in chosen for job in units[u]], progress)
    n_variations = len(units[0]) - 1
    changes = np.full((n_variations, len(seeds), n_queries), np.nan)
    for unit, u in enumerate(chosen):
        s, i = places[u]
        unchanged, *reduced = outcomes[unit * (n_variations + 1) : (unit + 1) * (n_variations + 1)]
        target = unchanged.predictions[i] if classes is None else classes[i]
        before = unchanged.probabilities[i, target]
        changes[:, s, i] = [outcome.probabilities[i, target] - before for outcome in reduced]
    return changes, sampled


def within_budget(
    retrainer: Retrainer, units: Sequence[Sequence[Job]], budget: int | None, seed: int
) -> tuple[np.ndarray, str]:
    """Choose the units that are run, so that no more than ``budget`` different models are trained.

    A unit is the jobs that are compared with each other (those of one query and seed, say), so a sample of units
    leaves the comparison fair. Jobs that units share count once; jobs in the cache count like any other, so that the
    sample does not depend on what was run before.

    Args:
        retrainer: Its digests tell which jobs are equal.
        units: Jobs of each unit.
        budget: Models at most; None: no limit.
        seed: Seed of the random order in which units are taken until a unit no longer fits.

    Returns:
        Numbers of the units, ascending, and one line that says what was sampled.

    Raises:
        InputError: Not even one unit fits.
    """
    digests = [{retrainer.digest(job) for job in unit} for unit in units]
    total = len(set().union(*digests))
    if budget is None or total <= budget:
        return np.arange(len(units)), f"all {total:,} retrainings"
    taken: set[str] = set()
    kept: list[int] = []
    for i in np.random.default_rng([seed, 11]).permutation(len(units)).tolist():
        if len(taken | digests[i]) > budget:
            break
        taken |= digests[i]
        kept.append(i)
    if not kept:
        least = min(map(len, digests))
        raise InputError(
            f"--budget {budget}: one comparison takes {least} or more retrainings. Give a larger budget, or fewer "
            "methods or amounts."
        )
    sample = f"{len(taken):,} of {total:,} retrainings (--budget {budget}): {len(kept):,} of {len(units):,} comparisons"
    return np.sort(kept), worded(f"{sample}, sampled with seed {seed}")
