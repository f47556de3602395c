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
from forebear.evaluation.common.power import FOR_A_VERDICT, compared_cells
from forebear.evaluation.reports.charts import MAX_SERIES, bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import (
    MATCHED_NOTE,
    RANDOM,
    RetrainingInputs,
    matched_name,
    verdict_on,
    within_budget,
)
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer
from forebear.evaluation.retraining.row_choice import label_matched_rows, random_rows, rows_at
from forebear.retriever.scores import residuals_of


@dataclass(frozen=True, kw_only=True)
class RetrainingLoss:
    """Accuracies of retrained models.

    Attributes:
        methods: ``m`` names of methods.
        amounts: Rows removed, ``a``.
        seeds: Seeds of the retrainings that were sampled, ``s``.
        whole: Accuracy after retraining on all rows, ``(s,)``.
        accuracy: After removing each method's rows, ``(m, a, s)``.
        matched: After removing as many random rows of each class, ``(m, a, s)``.
        random: After removing as many random rows, ``(a, s)``.
        n_rows: Number of rows that accuracy is measured on.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    amounts: tuple[int, ...]
    seeds: tuple[int, ...]
    whole: np.ndarray
    accuracy: np.ndarray
    matched: np.ndarray
    random: np.ndarray
    n_rows: int
    sampled: str
    residuals: dict[str, float]

    @property
    def loss(self) -> np.ndarray:
        """Retraining loss (Ral) of each method, a difference of accuracies, ``(m, a, s)``."""
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
    live, labels = retrainer.rows.live, retrainer.rows.labels
    summed = [method_scores.sum(axis=0) for method_scores in scores.values()]
    units = []
    for s in seeds:
        removed = [rows_at(values, live, k, "top") for values in summed for k in amounts]
        removed += [label_matched_rows(live, labels, rows, seed, s) for rows in removed]
        removed += [random_rows(live, k, seed, s, k) for k in amounts]
        units.append([Job(live, s), *(Job(np.setdiff1d(live, rows, assume_unique=True), s) for rows in removed)])
    chosen, sampled = within_budget(retrainer, units, budget, seed)
    outcomes = retrainer.run([job for u in chosen for job in units[u]], progress)
    accuracy = np.array([outcome.accuracy(gold) for outcome in outcomes]).reshape(len(chosen), -1)
    n_amounts = len(amounts)
    ranked, matched = accuracy[:, 1:-n_amounts].T.reshape(2, len(scores), n_amounts, len(chosen))
    return RetrainingLoss(
        methods=tuple(scores),
        amounts=tuple(amounts),
        seeds=tuple(seeds[u] for u in chosen),
        whole=accuracy[:, 0],
        accuracy=ranked,
        matched=matched,
        random=accuracy[:, -n_amounts:].T,
        n_rows=len(gold),
        sampled=sampled,
        residuals=residuals_of(scores),
    )


def retraining_loss_report(measured: RetrainingLoss, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; percentage points, as in the paper."""
    retrainer, queries, seed = inputs.retrainer, inputs.queries, inputs.seed
    loss, matched, random = (
        100 * (measured.whole - accuracy) for accuracy in (measured.accuracy, measured.matched, measured.random)
    )
    names = [*(label for name in measured.methods for label in (name, matched_name(name))), RANDOM]
    lost = [*(values for pair in zip(loss, matched, strict=True) for values in pair), random]
    rows: list[list[Cell]] = []
    for name, values in zip(names, lost, strict=True):
        for a, k in enumerate(measured.amounts):
            rows.append([name, k, *interval_cells(values[a], seed), len(measured.seeds)])
    tables = [
        Table(
            "Accuracy lost, in percentage points",
            ["method", "removed", *INTERVAL_COLUMNS, "seeds"],
            rows,
            f"Accuracy of the model retrained on all rows (mean {100 * measured.whole.mean():.2f}%) minus that after "
            f"removing the rows of largest score summed over {len(queries):,} queries, on {measured.n_rows:,} test "
            "rows; mean over seeds, ± its standard error, 95% interval. Of a method by spans a row's score is that of "
            "its best span." + MATCHED_NOTE,
        ),
        _comparison(measured, loss, {"of the same labels": matched, "of any label": random[None]}, seed),
    ]
    drawn = list(enumerate(measured.amounts))[-MAX_SERIES:]
    series = {f"{k:,} rows": [float(values[a].mean()) for values in lost] for a, k in drawn}
    errors = {f"{k:,} rows": [_error(values[a]) for values in lost] for a, k in drawn}
    drawing = bar_chart(names, series, errors=errors, xlabel="accuracy lost, percentage points")
    best = int(loss[:, -1].mean(axis=1).argmax())
    report = Report(
        "Retraining loss",
        f"Without the {measured.amounts[-1]:,} top rows by {measured.methods[best]} accuracy falls by "
        f"{loss[best, -1].mean():.2f} points, without as many random rows of the same labels by "
        f"{matched[best, -1].mean():.2f}, without as many random rows by {random[-1].mean():.2f}."
        f"{verdict_on(loss[best, -1], matched[best, -1], 2, seed)} {retrainer.recipe.note}",
        tables,
        [Figure("Accuracy lost", drawing, f"Mean over seeds, bars: standard error.{_left_undrawn(measured.amounts)}")],
        provenance=inputs.retraining_provenance(measured.residuals, measured.sampled),
    )
    result = {
        **inputs.retraining_record(measured.residuals, measured.sampled),
        "amounts": measured.amounts,
        "n_rows": measured.n_rows,
        "accuracy_whole": measured.whole,
        "accuracy": {
            **{name: listed_values(measured.accuracy[i]) for i, name in enumerate(measured.methods)},
            **{matched_name(name): listed_values(measured.matched[i]) for i, name in enumerate(measured.methods)},
            RANDOM: listed_values(measured.random),
        },
    }
    return report, result


def _comparison(measured: RetrainingLoss, loss: np.ndarray, others: Mapping[str, np.ndarray], seed: int) -> Table:
    """Each method's loss ``(m, a, s)`` against that of random rows, ``(m, a, s)`` or ``(1, a, s)`` by kind."""
    rows: list[list[Cell]] = []
    for kind, values in others.items():
        wide = np.broadcast_to(values, loss.shape)
        for i, name in enumerate(measured.methods):
            for a, k in enumerate(measured.amounts):
                rows.append([name, k, kind, *compared_cells(loss[i, a], wide[i, a], seed)])
    return Table(
        "Compared with random rows",
        ["method", "removed", "random rows", "− random", "95% low", "95% high", "p", "seeds for a verdict"],
        rows,
        "Mean difference over the same seeds, its 95% interval and p of Wilcoxon's signed-rank test. "
        + FOR_A_VERDICT.format(unit="seeds"),
    )


def _left_undrawn(amounts: Sequence[int]) -> str:
    return "" if len(amounts) <= MAX_SERIES else f" The {MAX_SERIES} largest numbers of rows."


def _error(values: np.ndarray) -> float | None:
    error = interval_cells(defined(values), 0)[1]
    return None if error is None else float(error)
