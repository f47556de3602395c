"""``retraining-loss``: accuracy lost when the rows that matter most to a set of queries are removed (Span, Ral).

Ral = accuracy of the model retrained on all rows - accuracy after removing the top 20% or 50% of rows by their scores
summed over the queries, and retraining with the same seed. Of a method by spans a row's score for a query is that of
its best span. Larger is better; as many random rows are removed beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    defined,
    interval_cells,
    listed_values,
)
from forebear.evaluation.common.statistics import paired_difference
from forebear.evaluation.reports.charts import MAX_SERIES, bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import RANDOM, RetrainingInputs
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer, within_budget
from forebear.evaluation.retraining.row_choice import random_rows, rows_at
from forebear.retriever.scores import residuals_of


@dataclass(frozen=True, kw_only=True)
class RetrainingLoss:
    """Accuracies of retrained models.

    Attributes:
        methods: ``m`` names of methods, then the name of random rows.
        amounts: Rows removed, ``a``.
        seeds: Seeds of the retrainings that were sampled, ``s``.
        whole: Accuracy after retraining on all rows, ``(s,)``.
        accuracy: After removing rows, ``(m + 1, a, s)``.
        n_rows: Number of rows that accuracy is measured on.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    amounts: tuple[int, ...]
    seeds: tuple[int, ...]
    whole: np.ndarray
    accuracy: np.ndarray
    n_rows: int
    sampled: str
    residuals: dict[str, float]

    @property
    def loss(self) -> np.ndarray:
        """Retraining loss (Ral), a difference of accuracies, ``(m + 1, a, s)``."""
        return np.asarray(self.whole - self.accuracy)


def measure_retraining_loss(
    retrainer: Retrainer,
    scores: Mapping[str, np.ndarray],
    gold: np.ndarray,
    amounts: Sequence[int],
    seeds: Sequence[int],
    *,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> RetrainingLoss:
    """Retrain without the rows of largest summed score.

    Args:
        retrainer: Accuracy is measured on its evaluation rows.
        scores: Scores of all live rows, ``(q, n)`` by method; larger = proponent.
        gold: Class ids of the evaluation rows.
        amounts: Numbers of rows to remove.
        seeds: Seeds of the retrainings.
        budget: Models to train at most; seeds are sampled.
        seed: Seed of the random rows and of the sample of retrainings.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.
    """
    live = retrainer.rows.live
    summed = [method_scores.sum(axis=0) for method_scores in scores.values()]
    units = []
    for s in seeds:
        removed = [rows_at(values, live, k, "top") for values in summed for k in amounts]
        removed += [random_rows(live, k, seed, s, k) for k in amounts]
        units.append([Job(live, s), *(Job(np.setdiff1d(live, rows, assume_unique=True), s) for rows in removed)])
    chosen, sampled = within_budget(retrainer, units, budget, seed)
    outcomes = retrainer.run([job for u in chosen for job in units[u]], progress)
    accuracy = np.array([outcome.accuracy(gold) for outcome in outcomes]).reshape(len(chosen), -1)
    return RetrainingLoss(
        methods=(*scores, RANDOM),
        amounts=tuple(amounts),
        seeds=tuple(seeds[u] for u in chosen),
        whole=accuracy[:, 0],
        accuracy=accuracy[:, 1:].T.reshape(len(scores) + 1, len(amounts), len(chosen)),
        n_rows=len(gold),
        sampled=sampled,
        residuals=residuals_of(scores),
    )


def retraining_loss_report(measured: RetrainingLoss, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; percentage points, as in the paper."""
    retrainer, queries, seed = inputs.retrainer, inputs.queries, inputs.seed
    loss = 100 * measured.loss
    rows: list[list[Cell]] = []
    for i, name in enumerate(measured.methods):
        for a, k in enumerate(measured.amounts):
            d = None if name == RANDOM else paired_difference(loss[i, a], loss[-1, a], seed)
            compared = [None, None, None] if d is None else [d.mean, d.low, d.high]
            rows.append([name, k, *interval_cells(loss[i, a], seed), *compared, len(measured.seeds)])
    table = Table(
        "Accuracy lost, in percentage points",
        ["method", "removed", *INTERVAL_COLUMNS, "− random", "− random low", "− random high", "seeds"],
        rows,
        f"Accuracy of the model retrained on all rows (mean {100 * measured.whole.mean():.2f}%) minus that after "
        f"removing the rows of largest score summed over {len(queries):,} queries, on {measured.n_rows:,} test rows; "
        "mean over seeds, ± its standard error, 95% interval; paired difference to random rows. Of a method by spans a "
        "row's score is that of its best span.",
    )
    drawn = list(enumerate(measured.amounts))[-MAX_SERIES:]
    series = {f"{k:,} rows": [float(v) for v in loss[:, a].mean(axis=1)] for a, k in drawn}
    errors = {f"{k:,} rows": [_error(v) for v in loss[:, a]] for a, k in drawn}
    drawing = bar_chart(measured.methods, series, errors=errors, xlabel="accuracy lost, percentage points")
    best = int(loss[:-1, -1].mean(axis=1).argmax())
    report = Report(
        "Retraining loss",
        f"Without the {measured.amounts[-1]:,} top rows by {measured.methods[best]} accuracy falls by "
        f"{loss[best, -1].mean():.2f} points, without as many random rows by {loss[-1, -1].mean():.2f}. "
        f"{retrainer.recipe.note}",
        [table],
        [Figure("Accuracy lost", drawing, f"Mean over seeds, bars: standard error.{_left_undrawn(measured.amounts)}")],
        provenance=inputs.retraining_provenance(measured.residuals, measured.sampled),
    )
    result = {
        **inputs.retraining_record(measured.residuals, measured.sampled),
        "amounts": measured.amounts,
        "n_rows": measured.n_rows,
        "accuracy_whole": measured.whole,
        "accuracy": {name: listed_values(measured.accuracy[i]) for i, name in enumerate(measured.methods)},
    }
    return report, result


def _left_undrawn(amounts: Sequence[int]) -> str:
    return "" if len(amounts) <= MAX_SERIES else f" The {MAX_SERIES} largest numbers of rows."


def _error(values: np.ndarray) -> float | None:
    error = interval_cells(defined(values), 0)[1]
    return None if error is None else float(error)
