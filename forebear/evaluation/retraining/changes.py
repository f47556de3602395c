"""What every measure by retraining shares: changes of probability, seeds, how a report says what was retrained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import provenance
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer, within_budget
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

RANDOM = "(random rows)"
IN_PLACE = (
    " Rows removed keep their place in the batches and weigh nothing: order, rates and dropout are those of the same "
    "seed's retraining on all rows."
)
Removals = Callable[[int, int], list[np.ndarray]]  # (query, seed) -> rows to remove, one array a variation


def seeds_of(retrainer: Retrainer, n_seeds: int, seed: int) -> tuple[int, ...]:
    """Seeds of the retrainings: ``seed`` and those that follow it; one where seeds make no difference.

    Raises:
        InputError: Fewer than one.
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
    """Retrain without each set of rows; the change of one class's probability for the query they belong to.

    Args:
        retrainer: Its evaluation rows are the queries.
        removals: Rows to remove, the same number of variations for every query and seed.
        classes: Whose probability is looked at, ``(q,)``; None: what the same seed's retraining on all rows predicts.
        n_queries: q.
        seeds: Of the retrainings.
        budget: Models to train at most: queries and seeds are sampled, with all of their variations.
        seed: Of that sample.
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
    for at, u in enumerate(chosen):
        s, i = places[u]
        whole, *reduced = outcomes[at * (n_variations + 1) : (at + 1) * (n_variations + 1)]
        target = whole.predictions[i] if classes is None else classes[i]
        before = whole.probabilities[i, target]
        changes[:, s, i] = [outcome.probabilities[i, target] - before for outcome in reduced]
    return changes, sampled


def retraining_provenance(
    retriever: Retriever,
    spec: QuerySpec | Question,
    residuals: Mapping[str, float],
    retrainer: Retrainer,
    seeds: Sequence[int],
    sampled: str,
    queries: QueryRows,
    command: str,
) -> dict[str, str]:
    """What a report says of where its numbers come from."""
    return provenance(
        retriever,
        spec,
        command,
        residuals=residuals,
        test_rows=f"{queries.source}, {len(queries):,} of them"
        + (f"; {len(queries.left_out):,} sampled rows without a span left out" if len(queries.left_out) else ""),
        retraining=f"{retrainer.recipe.name}. {retrainer.recipe.note}",
        retrained=sampled,
        retraining_digest=retrainer.facts()["digest"],
        seeds=", ".join(map(str, seeds)),
    )
