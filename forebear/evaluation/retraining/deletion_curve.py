"""``deletion-curve``: DEL+ and DEL-, and the area under them (Yeh22, section 5).

DEL+(k) is the mean probability of the gold class after removing a query's top k proponents and retraining, minus that
of the model retrained on all rows; DEL-(k) the same of opponents. AUC is the mean over k. DEL+ should be negative, DEL-
positive. In the no-overlap test only rows that share few words with the query may be removed. Beside each curve stands
that of as many random rows of each class as the method removes, and that of random rows.
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
from forebear.evaluation.reports.charts import line_chart
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
from forebear.evaluation.retraining.row_choice import Side, label_matched_rows, random_rows, rows_at
from forebear.retriever.scores import residuals_of

MAX_LINES = 6  # of one chart
CURVES = ("DEL+", "DEL−")


@dataclass(frozen=True, kw_only=True)
class DeletionCurve:
    """DEL+ and DEL-.

    Attributes:
        methods: ``m`` names.
        amounts: Rows removed, ascending, ``k``.
        seeds: Seeds of the retrainings.
        changes: Change of the gold class's probability without the top proponents, and without the top opponents:
            ``(m, 2, k, seeds, q)``; NaN where not sampled.
        matched: The same changes without random rows of the same labels, ``(m, 2, k, seeds, q)``.
        random: The same change without random rows, ``(k, seeds, q)``.
        n_candidates: Number of rows that may be removed for each query; None: all rows.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    amounts: tuple[int, ...]
    seeds: tuple[int, ...]
    changes: np.ndarray
    matched: np.ndarray
    random: np.ndarray
    n_candidates: int | None
    sampled: str
    residuals: dict[str, float]

    @property
    def curves(self) -> np.ndarray:
        """DEL+(k) and DEL-(k) of each query, ``(m, 2, k, q)``; NaN for queries that were not sampled."""
        return defined_means(self.changes, axis=-2)

    @property
    def auc(self) -> np.ndarray:
        """Mean of the curves over k, ``(m, 2, q)``."""
        return np.asarray(self.curves.mean(axis=2))

    @property
    def matched_auc(self) -> np.ndarray:
        """The same of random rows with the labels of each method's, ``(m, 2, q)``."""
        return np.asarray(defined_means(self.matched, axis=-2).mean(axis=2))

    @property
    def random_auc(self) -> np.ndarray:
        """The same of random rows, ``(q,)``."""
        return np.asarray(defined_means(self.random, axis=-2).mean(axis=0))


def measure_deletion(
    retrainer: Retrainer,
    scores: Mapping[str, np.ndarray],
    gold: np.ndarray,
    amounts: Sequence[int],
    seeds: Sequence[int],
    *,
    candidates: np.ndarray | None = None,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> DeletionCurve:
    """Retrain without the top k proponents, and without the top k opponents, for each k (Yeh22, section 5).

    Args:
        retrainer: Its evaluation rows are the queries.
        scores: Scores of all live rows, ``(q, n)`` by method; larger = proponent.
        gold: Class ids of the queries, ``(q,)``.
        amounts: The numbers k of rows to remove.
        seeds: Seeds of the retrainings; their mean stands for the expectation.
        candidates: Positions among the live rows that may be removed for each query, ``(q, n_candidates)``; None: all.
        budget: See :func:`probability_changes`.
        seed: Seed of the random rows and of the sample of retrainings.
        progress: See :func:`probability_changes`.
    """
    live, labels = retrainer.rows.live, retrainer.rows.labels
    sides: tuple[Side, Side] = ("top", "bottom")

    def removals(query: int, job_seed: int) -> list[np.ndarray]:
        positions = np.arange(len(live)) if candidates is None else candidates[query]
        rows, seeds_of_draw = live[positions], (seed, job_seed, query)
        query_scores = [method_scores[query, positions] for method_scores in scores.values()]
        ranked = [rows_at(values, rows, k, side) for values in query_scores for side in sides for k in amounts]
        matched = [label_matched_rows(rows, labels, removed, *seeds_of_draw) for removed in ranked]
        return ranked + matched + [random_rows(rows, k, *seeds_of_draw, k) for k in amounts]

    changes, sampled = probability_changes(
        retrainer, removals, gold, len(gold), seeds, budget=budget, seed=seed, progress=progress
    )
    shape = (2, len(scores), 2, len(amounts), len(seeds), len(gold))
    ranked, matched = changes[: -len(amounts)].reshape(shape)
    return DeletionCurve(
        methods=tuple(scores),
        amounts=tuple(amounts),
        seeds=tuple(seeds),
        changes=ranked,
        matched=matched,
        random=changes[-len(amounts) :],
        n_candidates=None if candidates is None else candidates.shape[1],
        sampled=sampled,
        residuals=residuals_of(scores),
    )


def deletion_report(curve: DeletionCurve, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; changes as differences of probabilities, as in the paper."""
    retrainer, seed = inputs.retrainer, inputs.seed
    sampled = curve.sampled
    if curve.n_candidates is not None:
        sampled += f"; of each query, only the {curve.n_candidates:,} rows of least tf-idf overlap may be removed"
    best = int(np.nanmean(curve.auc[:, 0], axis=1).argmin())
    plus, minus = (float(np.nanmean(curve.auc[best, j])) for j in (0, 1))
    of_method, of_matched = defined(curve.auc[best, 0]), defined(curve.matched_auc[best, 0])
    n_retrainings = 2 * len(curve.seeds) * len(curve.amounts)
    report = Report(
        "Deletion curves",
        f"AUC-DEL+, the change of the gold class's probability without its proponents, is least by "
        f"{curve.methods[best]}: {plus:+.3f}, without random rows of the same labels {of_matched.mean():+.3f}; without "
        f"its opponents (AUC-DEL−) {minus:+.3f}.{verdict_on(of_method, of_matched, n_retrainings, seed)} "
        f"{retrainer.recipe.note}",
        _deletion_tables(curve, seed, paired=retrainer.recipe.seeded),
        [_curve_figure(curve, j, f"{side}(k)") for j, side in enumerate(CURVES)],
        provenance=inputs.retraining_provenance(curve.residuals, sampled),
    )
    result = {
        **inputs.retraining_record(curve.residuals, sampled),
        "amounts": curve.amounts,
        "changes": {
            name: {"proponents": listed_values(curve.changes[i, 0]), "opponents": listed_values(curve.changes[i, 1])}
            for i, name in enumerate(curve.methods)
        },
        "matched": {
            name: {"proponents": listed_values(curve.matched[i, 0]), "opponents": listed_values(curve.matched[i, 1])}
            for i, name in enumerate(curve.methods)
        },
        "random": listed_values(curve.random),
        "auc": {name: {s: interval_cells(curve.auc[i, j], seed)[0] for j, s in enumerate(("plus", "minus"))}
                for i, name in enumerate(curve.methods)},
    }  # fmt: skip
    return report, result


def _deletion_tables(curve: DeletionCurve, seed: int, *, paired: bool) -> list[Table]:
    rows: list[list[Cell]] = []
    points: list[list[Cell]] = []
    compared: list[list[Cell]] = []
    random = defined(curve.random_auc)
    rows.append([RANDOM, "", *interval_cells(random, seed), len(random)])
    for i, name in enumerate(curve.methods):
        for j, side in enumerate(CURVES):
            auc, matched = defined(curve.auc[i, j]), defined(curve.matched_auc[i, j])
            rows.append([name, side, *interval_cells(auc, seed), len(auc)])
            rows.append([matched_name(name), side, *interval_cells(matched, seed), len(matched)])
            compared.append([name, side, *compared_cells(auc, matched, seed)])
            points += [
                [name, side, k, *interval_cells(curve.curves[i, j, a], seed)] for a, k in enumerate(curve.amounts)
            ]
    tables = [
        Table(
            "AUC-DEL",
            ["method", "curve", *INTERVAL_COLUMNS, "queries"],
            rows,
            "Mean over k of the change of the gold class's probability after removing the top k proponents (DEL+: "
            "should be negative) or opponents (DEL−: should be positive) and retraining; mean over queries, ± its "
            "standard error, 95% interval." + MATCHED_NOTE + (IN_PLACE if paired else ""),
        ),
        Table(
            "Compared with random rows of the same labels",
            ["method", "curve", "− random", "95% low", "95% high", "p", "queries for a verdict"],
            compared,
            "Mean difference of AUC-DEL to that of random rows of the same labels, for the same queries and seeds; its "
            "95% interval and p of Wilcoxon's signed-rank test over queries, whose seeds are averaged first. "
            + FOR_A_VERDICT.format(unit="queries"),
        ),
        Table("Curves", ["method", "curve", "removed", *INTERVAL_COLUMNS], points),
    ]
    if len(curve.methods) > 1:
        for j, side in enumerate(CURVES):
            values = {name: defined(curve.auc[i, j]) for i, name in enumerate(curve.methods)}
            tables.append(difference_table(f"Methods compared, AUC-{side}", values, seed))
    return tables


def _curve_figure(curve: DeletionCurve, side: int, title: str) -> Figure:
    series: dict[str, list[float]] = {}
    errors: dict[str, list[float | None]] = {}
    for i, name in list(enumerate(curve.methods))[:MAX_LINES]:
        cells = [interval_cells(values, 0) for values in curve.curves[i, side]]
        series[name] = [float(cell[0] or 0.0) for cell in cells]
        errors[name] = [None if cell[1] is None else float(cell[1]) for cell in cells]
    drawing = line_chart(
        curve.amounts, series, errors=errors, xlabel="rows removed", ylabel="change of the gold class's probability"
    )
    more = "" if len(curve.methods) <= MAX_LINES else f" The first {MAX_LINES} methods."
    return Figure(title, drawing, f"Mean over queries, bars: standard error.{more}")
