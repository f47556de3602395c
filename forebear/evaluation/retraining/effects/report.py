"""The report of predicted and retrained effects, and what of it an index keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import listed_values
from forebear.evaluation.reports.charts import scatter_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import IN_PLACE, RetrainingInputs
from forebear.evaluation.retraining.effects.fit import Fit, fit
from forebear.evaluation.retraining.effects.measure import LOSS, PROBABILITY, EffectPairs, Pairs
from forebear.evaluation.retraining.effects.sets import OPPONENTS, PROPONENTS, RANDOM
from forebear.evaluation.retraining.jobs import Recipe
from forebear.evaluation.retraining.lds.settings import Settings
from forebear.retriever.effects.kinds import effect_kind
from forebear.retriever.effects.measured import Measured, scope_and_curvature, target_of

ALL = "all"
MOST_POINTS = 400  # of a series in a drawing
MOST_FIGURES = 6
COLUMNS = (
    *("method", "rows", "removed", "pairs"),
    *("slope", "slope, 95% low", "slope, 95% high", "r", "r, 95% low", "r, 95% high", "Spearman"),
)
MEANING = (
    "Slope: of retrained on predicted changes, through the origin: 1 where effects come true in size. r: Pearson's "
    "correlation of the pairs. Both with 95% intervals by a bootstrap over test rows. Random sets are shared by all "
    "test rows; proponents and opponents are each test row's own, of single rows its first three, each alone."
)


def fits_of(pairs: Pairs, sizes: tuple[int, ...], column: int, seed: int) -> Iterator[tuple[str, int | None, Fit]]:
    """Fits of all pairs, of each size, and of each kind and size: (kind, size or None for all sizes, fit)."""
    kinds = [kind for kind in (RANDOM, PROPONENTS, OPPONENTS) if (pairs.kinds == kind).any()]
    places = [(ALL, None), *((ALL, k) for k in sizes), *((kind, k) for kind in kinds for k in sizes)]
    defined = ~np.isnan(pairs.predicted[:, column])
    for kind, size in places:
        chosen = defined & ((pairs.kinds == kind) | (kind == ALL)) & ((pairs.sizes == size) | (size is None))
        if chosen.any():
            predicted, retrained = pairs.predicted[chosen, column], pairs.retrained[chosen, column]
            yield kind, size, fit(predicted, retrained, pairs.queries[chosen], seed)


def effects_report(found: EffectPairs, settings: Settings, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    seed, recipe = inputs.seed, inputs.retrainer.recipe
    note = MEANING + (IN_PLACE if recipe.seeded else "")
    tables = [_table("Change of the target's loss, in nats", found, LOSS, seed, note)]
    if any(not np.isnan(pairs.predicted[:, PROBABILITY]).all() for pairs in found.pairs.values()):
        tables.append(_table("Change of the target's probability", found, PROBABILITY, seed, "As above."))
    orders = [
        f"{settings.name(setting)}: {effect_kind(question, question.methods[i]).order}"
        for question, of_question in settings.questions
        for i, setting in enumerate(of_question)
    ]
    provenance = inputs.retraining_provenance({}, found.sampled) | settings.provenance()
    provenance["effects"] = "; ".join(orders)
    report = Report(
        "Effects: predicted and retrained",
        f"{_summary(found, seed)} {recipe.note}",
        tables,
        _figures(found),
        provenance=provenance,
    )
    result = {
        **inputs.retraining_record({}, found.sampled),
        **settings.record(inputs.retriever),
        "sizes": found.sizes,
        "fits": {name: _record(pairs, found.sizes, seed) for name, pairs in found.pairs.items()},
        "pairs": {
            name: {
                "query": inputs.queries.rows[pairs.queries],
                "removed": pairs.sizes,
                "rows": pairs.kinds.tolist(),
                "predicted": listed_values(pairs.predicted),
                "retrained": listed_values(pairs.retrained),
            }
            for name, pairs in found.pairs.items()
        },
    }
    return report, result


def measured(found: EffectPairs, settings: Settings, inputs: RetrainingInputs) -> list[Measured]:
    """What the index keeps: the fit of all pairs of each setting."""
    index = inputs.retriever.index
    results = []
    for question, of_question in settings.questions:
        for method, setting in zip(question.methods, of_question, strict=True):
            pairs = found.pairs[settings.name(setting)]
            _, _, whole = next(fits_of(pairs, found.sizes, LOSS, inputs.seed))
            if whole.slope is None:
                continue
            low, high = whole.slope_interval or (None, None)
            scope, curvature, damping = scope_and_curvature(question, method)
            results.append(
                Measured(
                    index_digest=index.manifest.digest(),
                    method=setting.method,
                    scope=scope,
                    curvature=curvature,
                    damping=damping,
                    target=target_of(question),
                    recipe=_recipe_name(inputs.retrainer.recipe, scope, damping),
                    seeds=found.seeds,
                    test_rows=f"{len(inputs.queries):,} of {inputs.queries.source}",
                    sizes=found.sizes,
                    n_pairs=whole.n_pairs,
                    slope=whole.slope,
                    slope_low=low,
                    slope_high=high,
                    correlation=whole.correlation,
                )
            )
    return results


def _recipe_name(recipe: Recipe, scope: str, damping: float | None) -> str:
    """The recipe; where it holds the head by another damping than the effects at the head have, with this damping."""
    held = recipe.facts.get("damping")
    return recipe.name if scope != "head" or held in (None, damping) else f"{recipe.name} held by {held:.3g}"


def _table(title: str, found: EffectPairs, column: int, seed: int, note: str) -> Table:
    rows: list[list[Cell]] = []
    for name, pairs in found.pairs.items():
        for kind, size, one in fits_of(pairs, found.sizes, column, seed):
            removed: Cell = ALL if size is None else size
            slope, correlation = one.slope_interval or (None, None), one.correlation_interval or (None, None)
            cells = [one.n_pairs, one.slope, *slope, one.correlation, *correlation, one.rank_correlation]
            rows.append([name, kind, removed, *cells])
    return Table(title, COLUMNS, rows, note)


def _record(pairs: Pairs, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Fits for ``result.json``, of the loss and of the probability."""
    return {
        name: [
            {"rows": kind, "removed": size, **asdict(one)} for kind, size, one in fits_of(pairs, sizes, column, seed)
        ]
        for name, column in (("loss", LOSS), ("probability", PROBABILITY))
    }


def _figures(found: EffectPairs) -> list[Figure]:
    figures = []
    for name, pairs in list(found.pairs.items())[:MOST_FIGURES]:
        points = {}
        for k in found.sizes[-6:]:
            places = np.flatnonzero(pairs.sizes == k)
            if len(places) > MOST_POINTS:
                places = np.sort(np.random.default_rng(k).permutation(places)[:MOST_POINTS])
            if len(places):
                label = f"{k:,} row{'s' if k > 1 else ''}"
                points[label] = (pairs.predicted[places, LOSS].tolist(), pairs.retrained[places, LOSS].tolist())
        drawing = scatter_chart(points, xlabel="predicted change of the loss, nats", ylabel="retrained, nats")
        figures.append(Figure(name, drawing, "A point is a set of rows and a test row; on the line both are equal."))
    return figures


def _summary(found: EffectPairs, seed: int) -> str:
    lines = []
    for name, pairs in found.pairs.items():
        _, _, whole = next(fits_of(pairs, found.sizes, LOSS, seed))
        if whole.slope is None:
            lines.append(f"{name} predicts no change at all.")
            continue
        interval = whole.slope_interval
        between = "" if interval is None else f" (95% interval {interval[0]:.3g} to {interval[1]:.3g})"
        r = "" if whole.correlation is None else f", their correlation {whole.correlation:.3f}"
        lines.append(f"{name}: retrained changes are {whole.slope:.3g} times the predicted ones{between}{r}.")
    return " ".join(lines)
