"""``removal``: retrain without the rows that a method names; how does the confidence change? (Han20 T1-2, Pez21 T1)

Confidence is the probability of the class that the same seed's retraining on all rows predicts. Removed are each
query's most positive, most negative, least influential or random rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    defined,
    defined_means,
    interval_cells,
    listed_values,
)
from forebear.evaluation.common.statistics import difference_table, paired_difference
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import (
    IN_PLACE,
    RANDOM,
    RetrainingInputs,
    probability_changes,
)
from forebear.evaluation.retraining.jobs import Progress, Retrainer
from forebear.evaluation.retraining.row_choice import SIDES, Side, random_rows, rows_at
from forebear.retriever.scores import residuals_of


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Changes of the confidence in the original prediction.

    Attributes:
        methods: ``m`` names.
        sides: ``s`` sides of the ranking.
        amounts: Rows removed, ``a``.
        seeds: Seeds of the retrainings.
        changes: Change of the probability, ``(m, s, a, seeds, q)``; NaN where not sampled.
        random: The same change without random rows, drawn for each query, seed and amount, ``(a, seeds, q)``.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    sides: tuple[Side, ...]
    amounts: tuple[int, ...]
    seeds: tuple[int, ...]
    changes: np.ndarray
    random: np.ndarray
    sampled: str
    residuals: dict[str, float]


def measure_removal(
    retrainer: Retrainer,
    scores: Mapping[str, np.ndarray],
    amounts: Sequence[int],
    seeds: Sequence[int],
    *,
    sides: Sequence[Side] = ("top", "bottom", "least"),
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Removal:
    """Retrain without the rows at each side of every ranking, and without random rows.

    Args:
        retrainer: Its evaluation rows are the queries.
        scores: Scores of all live rows, ``(q, n)`` by method; larger = proponent.
        amounts: Rows to remove.
        seeds: Seeds of the retrainings.
        sides: Sides of the ranking.
        budget: See :func:`probability_changes`.
        seed: Seed of the random rows and of the sample of retrainings.
        progress: See :func:`probability_changes`.
    """
    live = retrainer.rows.live
    n_queries = len(next(iter(scores.values())))

    def removals(query: int, job_seed: int) -> list[np.ndarray]:
        ranked = [
            rows_at(method_scores[query], live, k, side)
            for method_scores in scores.values()
            for side in sides
            for k in amounts
        ]
        return ranked + [random_rows(live, k, seed, job_seed, query, k) for k in amounts]

    changes, sampled = probability_changes(
        retrainer, removals, None, n_queries, seeds, budget=budget, seed=seed, progress=progress
    )
    n_ranked = len(scores) * len(sides) * len(amounts)
    return Removal(
        methods=tuple(scores),
        sides=tuple(sides),
        amounts=tuple(amounts),
        seeds=tuple(seeds),
        changes=changes[:n_ranked].reshape(len(scores), len(sides), len(amounts), len(seeds), n_queries),
        random=changes[n_ranked:],
        sampled=sampled,
        residuals=residuals_of(scores),
    )


def removal_report(removal: Removal, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; changes in percentage points, as in the papers."""
    retrainer, seed = inputs.retrainer, inputs.seed
    tables = _removal_tables(removal, seed, paired=retrainer.recipe.seeded)
    if len(removal.methods) > 1:
        tables += [
            difference_table(
                f"Methods compared, {SIDES[side]}, {k:,} rows removed",
                {
                    name: defined(defined_means(100 * removal.changes[i, j, a], axis=0))
                    for i, name in enumerate(removal.methods)
                },
                seed,
            )
            for j, side in enumerate(removal.sides)
            for a, k in enumerate(removal.amounts)
            if side == "top"
        ]
    report = Report(
        "Removal: confidence after retraining without some rows",
        _removal_summary(removal, retrainer),
        tables,
        _removal_figures(removal),
        provenance=inputs.retraining_provenance(removal.residuals, removal.sampled),
    )
    result = {
        **inputs.retraining_record(removal.residuals, removal.sampled),
        "amounts": removal.amounts,
        "changes": {
            name: {side: listed_values(removal.changes[i, j]) for j, side in enumerate(removal.sides)}
            for i, name in enumerate(removal.methods)
        },
        "random": listed_values(removal.random),
    }
    return report, result


def _removal_tables(removal: Removal, seed: int, *, paired: bool) -> list[Table]:
    rows: list[list[Cell]] = []
    compared: list[list[Cell]] = []
    for a, k in enumerate(removal.amounts):
        random = 100 * removal.random[a]
        rows.append([RANDOM, "", k, *_change_cells(random, seed)])
        for i, name in enumerate(removal.methods):
            for j, side in enumerate(removal.sides):
                values = 100 * removal.changes[i, j, a]
                rows.append([name, SIDES[side], k, *_change_cells(values, seed)])
                d = paired_difference(
                    defined(defined_means(values, axis=0)), defined(defined_means(random, axis=0)), seed
                )
                compared.append([name, SIDES[side], k, d.mean, d.low, d.high, d.p])
    return [
        Table(
            "Change of the probability of the original prediction, in percentage points",
            ["method", "rows", "removed", *INTERVAL_COLUMNS, "values"],
            rows,
            "Mean over queries and seeds; ± its standard error over the values of all queries and seeds; 95% interval "
            "over queries, whose seeds are averaged first. The original prediction is that of the same seed's "
            "retraining on all rows. Rows are taken from the signed, raw scores; least influential: smallest |score|."
            + (IN_PLACE if paired else ""),
        ),
        Table(
            "Compared with random rows",
            ["method", "rows", "removed", "− random", "95% low", "95% high", "p"],
            compared,
            "Mean difference to the change without as many random rows, for the same queries and seeds, in percentage "
            "points; its 95% interval and p of Wilcoxon's signed-rank test over queries, whose seeds are "
            "averaged first.",
        ),
    ]


def _change_cells(values: np.ndarray, seed: int) -> list[Cell]:
    """Mean, standard error over all of ``(seeds, q)``, interval over queries, and the number of values."""
    mean, _, low, high = interval_cells(defined_means(values, axis=0), seed)
    every = defined(values)
    return [mean, interval_cells(every, seed)[1], low, high, len(every)]


def _removal_figures(removal: Removal) -> list[Figure]:
    figures = []
    for a, k in enumerate(removal.amounts):
        labels = [*removal.methods, RANDOM]
        series: dict[str, list[float]] = {}
        errors: dict[str, list[float | None]] = {}
        random = interval_cells(100 * removal.random[a].reshape(-1), 0)
        for j, side in enumerate(removal.sides):
            cells = [interval_cells(100 * values.reshape(-1), 0) for values in removal.changes[:, j, a]] + [random]
            series[SIDES[side]] = [float(cell[0] or 0.0) for cell in cells]
            errors[SIDES[side]] = [None if cell[1] is None else float(cell[1]) for cell in cells]
        drawing = bar_chart(labels, series, errors=errors, xlabel="change of the probability, percentage points")
        figures.append(Figure(f"{k:,} rows removed", drawing, "Mean over queries and seeds, bars: standard error."))
    return figures


def _removal_summary(removal: Removal, retrainer: Retrainer) -> str:
    a = len(removal.amounts) - 1
    j = removal.sides.index("top") if "top" in removal.sides else 0
    means = [float(np.nanmean(method_changes[j, a])) for method_changes in removal.changes]
    best = int(np.argmin(means) if removal.sides[j] != "bottom" else np.argmax(means))
    return (
        f"Without the {removal.amounts[a]:,} {SIDES[removal.sides[j]]} rows by {removal.methods[best]} the probability "
        f"of the original prediction changes by {100 * means[best]:+.2f} points, without as many random rows by "
        f"{100 * float(np.nanmean(removal.random[a])):+.2f}. {retrainer.recipe.note}"
    )
