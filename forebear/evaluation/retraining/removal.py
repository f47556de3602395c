"""``removal``: retrain without the rows that a method names; how does the confidence change? (Han20 T1-2, Pez21 T1)

Confidence is the probability of the class that the same seed's retraining on all rows predicts. Removed are each
query's most positive, most negative, least influential or random rows; and, beside each of these, as many random rows
of each class as the method removes: the change of the class balance is part of what a removal does.
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
from forebear.evaluation.common.power import FOR_A_VERDICT, compared_cells
from forebear.evaluation.common.statistics import difference_table
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import (
    IN_PLACE,
    MATCHED_NOTE,
    RANDOM,
    RetrainingInputs,
    matched_name,
    probability_changes,
    verdict_on,
)
from forebear.evaluation.retraining.jobs import Progress, Retrainer
from forebear.evaluation.retraining.row_choice import SIDES, Side, label_matched_rows, random_rows, rows_at
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
        matched: The same changes without random rows of the same labels as each method's, ``(m, s, a, seeds, q)``.
        random: The same change without random rows, drawn for each query, seed and amount, ``(a, seeds, q)``.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    sides: tuple[Side, ...]
    amounts: tuple[int, ...]
    seeds: tuple[int, ...]
    changes: np.ndarray
    matched: np.ndarray
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
    """Retrain without the rows at each side of every ranking, without random rows of their labels, and of any.

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
    live, labels = retrainer.rows.live, retrainer.rows.labels
    n_queries = len(next(iter(scores.values())))

    def removals(query: int, job_seed: int) -> list[np.ndarray]:
        ranked = [
            rows_at(method_scores[query], live, k, side)
            for method_scores in scores.values()
            for side in sides
            for k in amounts
        ]
        matched = [label_matched_rows(live, labels, rows, seed, job_seed, query) for rows in ranked]
        return ranked + matched + [random_rows(live, k, seed, job_seed, query, k) for k in amounts]

    changes, sampled = probability_changes(
        retrainer, removals, None, n_queries, seeds, budget=budget, seed=seed, progress=progress
    )
    shape = (2, len(scores), len(sides), len(amounts), len(seeds), n_queries)
    ranked, matched = changes[: -len(amounts)].reshape(shape)
    return Removal(
        methods=tuple(scores),
        sides=tuple(sides),
        amounts=tuple(amounts),
        seeds=tuple(seeds),
        changes=ranked,
        matched=matched,
        random=changes[-len(amounts) :],
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
        _removal_summary(removal, retrainer, seed),
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
        "matched": {
            name: {side: listed_values(removal.matched[i, j]) for j, side in enumerate(removal.sides)}
            for i, name in enumerate(removal.methods)
        },
        "random": listed_values(removal.random),
    }
    return report, result


def _removal_tables(removal: Removal, seed: int, *, paired: bool) -> list[Table]:
    rows: list[list[Cell]] = []
    to_matched: list[list[Cell]] = []
    to_random: list[list[Cell]] = []
    for a, k in enumerate(removal.amounts):
        random = 100 * removal.random[a]
        rows.append([RANDOM, "", k, *_change_cells(random, seed)])
        for i, name in enumerate(removal.methods):
            for j, side in enumerate(removal.sides):
                values, matched = 100 * removal.changes[i, j, a], 100 * removal.matched[i, j, a]
                rows.append([name, SIDES[side], k, *_change_cells(values, seed)])
                rows.append([matched_name(name), SIDES[side], k, *_change_cells(matched, seed)])
                place: list[Cell] = [name, SIDES[side], k]
                to_matched.append([*place, *compared_cells(_of_queries(values), _of_queries(matched), seed)])
                to_random.append([*place, *compared_cells(_of_queries(values), _of_queries(random), seed)])
    note = (
        ", for the same queries and seeds, in percentage points; its 95% interval and p of Wilcoxon's signed-rank test "
        f"over queries, whose seeds are averaged first. {FOR_A_VERDICT.format(unit='queries')}"
    )
    columns = ["method", "rows", "removed", "− random", "95% low", "95% high", "p", "queries for a verdict"]
    return [
        Table(
            "Change of the probability of the original prediction, in percentage points",
            ["method", "rows", "removed", *INTERVAL_COLUMNS, "values"],
            rows,
            "Mean over queries and seeds; ± its standard error over the values of all queries and seeds; 95% interval "
            "over queries, whose seeds are averaged first. The original prediction is that of the same seed's "
            "retraining on all rows. Rows are taken from the signed, raw scores; least influential: smallest |score|."
            + MATCHED_NOTE + (IN_PLACE if paired else ""),
        ),
        Table(
            "Compared with random rows of the same labels", columns, to_matched,
            f"Mean difference to the change without random rows of the same labels{note}",
        ),
        Table(
            "Compared with random rows", columns, to_random,
            f"Mean difference to the change without as many random rows{note}",
        ),
    ]  # fmt: skip


def _of_queries(values: np.ndarray) -> np.ndarray:
    """Means over the seeds of the queries that were sampled, from ``(seeds, q)``."""
    return defined(defined_means(values, axis=0))


def _change_cells(values: np.ndarray, seed: int) -> list[Cell]:
    """Mean, standard error over all of ``(seeds, q)``, interval over queries, and the number of values."""
    mean, _, low, high = interval_cells(defined_means(values, axis=0), seed)
    every = defined(values)
    return [mean, interval_cells(every, seed)[1], low, high, len(every)]


def _removal_figures(removal: Removal) -> list[Figure]:
    figures = []
    for a, k in enumerate(removal.amounts):
        labels = [*(label for name in removal.methods for label in (name, matched_name(name))), RANDOM]
        series: dict[str, list[float]] = {}
        errors: dict[str, list[float | None]] = {}
        for j, side in enumerate(removal.sides):
            pairs = zip(removal.changes[:, j, a], removal.matched[:, j, a], strict=True)
            drawn = [*(values for pair in pairs for values in pair), removal.random[a]]
            cells = [interval_cells(100 * values.reshape(-1), 0) for values in drawn]
            series[SIDES[side]] = [float(cell[0] or 0.0) for cell in cells]
            errors[SIDES[side]] = [None if cell[1] is None else float(cell[1]) for cell in cells]
        drawing = bar_chart(labels, series, errors=errors, xlabel="change of the probability, percentage points")
        figures.append(Figure(f"{k:,} rows removed", drawing, "Mean over queries and seeds, bars: standard error."))
    return figures


def _removal_summary(removal: Removal, retrainer: Retrainer, seed: int) -> str:
    a = len(removal.amounts) - 1
    j = removal.sides.index("top") if "top" in removal.sides else 0
    means = [float(np.nanmean(method_changes[j, a])) for method_changes in removal.changes]
    best = int(np.argmin(means) if removal.sides[j] != "bottom" else np.argmax(means))
    changes, matched = removal.changes[best, j, a], removal.matched[best, j, a]
    verdict = verdict_on(_of_queries(changes), _of_queries(matched), 2 * len(removal.seeds), seed)
    return (
        f"Without the {removal.amounts[a]:,} {SIDES[removal.sides[j]]} rows by {removal.methods[best]} the probability "
        f"of the original prediction changes by {100 * means[best]:+.2f} points, without as many random rows of the "
        f"same labels by {100 * float(np.nanmean(matched)):+.2f}, without as many random rows by "
        f"{100 * float(np.nanmean(removal.random[a])):+.2f}.{verdict} {retrainer.recipe.note}"
    )
