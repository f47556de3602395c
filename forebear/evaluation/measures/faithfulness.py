"""Do span methods rank spans as the final model itself does? (Span paper, Table 4)

The yardstick is `tracin++` at the one final checkpoint: <g_q - g_q(-kl), g_n - g_n(-ij)>, without variants and without
curvature. Compared with it, by Spearman's correlation over the spans of sampled training rows, for each query:
`tracin++` (summed over three variants, one SGD step away), `if++`, a control (`tracin++` summed, unweighted, over the
last three checkpoints) and random scores. A repeat draws other training rows and other variants; queries stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import (
    defined_means,
    interval_cells,
    listed_values,
    spearman,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.span_queries import gradients_compared, training_spans
from forebear.evaluation.common.statistics import difference_table
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.indexer.rows.sampling import live_sample
from forebear.retriever.question.models import N_VARIANTS, one_step_away
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.spans.scores import SpanScores

METHODS = ("tracin++", "if++")
CONTROL, RANDOM = "(last checkpoints)", "(random)"
CONTROL_CHECKPOINTS = 3
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Spearman's correlations with the yardstick.

    Attributes:
        names: Scores that are compared with the yardstick, ``m``: methods, control, random scores.
        values: For each repeat and query, ``(repeats, q, m)``; NaN where all spans have one score.
        n_spans: Spans that were ranked in each repeat.
        n_control: Checkpoints that the control sums over; with 1 it is the yardstick itself, and left out.
        residual: Largest relative residual of H^-1, where a solver iterated; else None.
    """

    names: tuple[str, ...]
    values: np.ndarray
    n_spans: tuple[int, ...]
    n_control: int
    residual: float | None

    @property
    def by_query(self) -> np.ndarray:
        """Mean of each query's correlation over the repeats, ``(q, m)``; NaN where no repeat defines it."""
        return defined_means(self.values, axis=0)


def measure_faithfulness(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    *,
    n_rows: int = 200,
    n_repeats: int = REPEATS,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Faithfulness:
    """Spearman's correlation of each method's span scores with those at the final checkpoint.

    Args:
        retriever: Over the index.
        queries: Test rows with spans, from :func:`~forebear.evaluation.common.span_queries.sample_span_queries`.
        spec: Scope, target, curvature and spans; its methods are :data:`METHODS`.
        n_rows: Training rows a repeat, a seeded sample; 0 for all.
        n_repeats: Repeats, each with other rows and other variants of the model.
        seed: Random seed of the samples and of the random scores.
        progress: Called with the stage, repeats done and repeats in all.

    Raises:
        InputError: No repeat, or fewer than two spans in one, which have no order to compare.
    """
    if n_repeats < 1:
        raise InputError(f"--repeats {n_repeats}: expected at least 1.")
    if n_rows < 0:
        raise InputError(f"--rows {n_rows}: expected a number of training rows, or 0 for all of them.")
    index, classifier = retriever.index, retriever.classifier()
    question = retriever.resolve(spec)
    _, span_differences = gradients_compared(retriever, queries, question)
    n_checkpoints = len(index.manifest.checkpoints)
    control = range(max(0, n_checkpoints - CONTROL_CHECKPOINTS), n_checkpoints)
    names = (*METHODS, *([CONTROL] if len(control) > 1 else []), RANDOM)
    values, n_spans, residuals = [], [], []
    progress("repeats", 0, n_repeats)
    for repeat in range(n_repeats):
        entries = training_spans(retriever, question, live_sample(index.live, n_rows, seed + repeat))
        if len(entries.rows) < 2:
            raise InputError(
                f"{len(entries.rows)} span(s) in the sampled training rows; a rank correlation takes 2 or more. Give "
                "more --rows, or find spans otherwise (--spans)."
            )
        spans = SpanScores(index, classifier, question.spec.scope, span_differences, entries)
        truth = spans.summed([classifier])
        variants = (one_step_away(classifier, index, (seed + repeat) * N_VARIANTS + m) for m in range(N_VARIANTS))
        solved, convergence = spans.preconditioned(question.curvature)
        scores = {METHODS[0]: spans.summed(variants), METHODS[1]: solved}
        if CONTROL in names:
            scores[CONTROL] = spans.summed(retriever.classifier(number) for number in control)
        scores[RANDOM] = np.random.default_rng([seed, repeat, 8]).normal(size=truth.shape)
        values.append(np.stack([spearman(scores[name], truth) for name in names], axis=1))
        n_spans.append(len(entries.rows))
        residuals += [] if convergence is None else [convergence.worst]
        progress("repeats", repeat + 1, n_repeats)
    return Faithfulness(
        names=names,
        values=np.stack(values),
        n_spans=tuple(n_spans),
        n_control=len(control),
        residual=max(residuals, default=None),
    )


def faithfulness_report(faithfulness: Faithfulness, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``; correlations times 100, as in the paper."""
    queries, seed = inputs.queries, inputs.seed
    scaled = replace(faithfulness, values=100.0 * faithfulness.values)
    rows: list[list[Cell]] = []
    for i, name in enumerate(faithfulness.names):
        rows.append([name, *interval_cells(scaled.by_query[:, i], seed), *variances(scaled.values[:, :, i])])
    undefined = int(np.isnan(faithfulness.values).any(axis=2).sum())
    repeats = len(faithfulness.values)
    note = (
        f"Spearman's correlation x 100 with `tracin++` at the final checkpoint, over {min(faithfulness.n_spans):,} to "
        f"{max(faithfulness.n_spans):,} spans; mean over {len(queries):,} queries, each the mean of {repeats} "
        "repeat(s), ± its standard error; 95% interval. Variances: over queries, averaged over repeats; of the "
        "repeats' means. "
        + (
            f"The control sums the last {faithfulness.n_control} checkpoints, unweighted, the final one among them. "
            if CONTROL in faithfulness.names
            else "The index holds one checkpoint, so there is no control. "
        )
        + f"Left out: {undefined:,} lists (repeat x query) whose scores are all equal; {len(queries.left_out):,} "
        "sampled test rows without a span."
        + (
            ""
            if faithfulness.residual is None
            else f" H^-1 of if++ is solved to a relative residual of {faithfulness.residual:.1e}."
        )
    )
    table = Table(
        "Faithfulness to the final checkpoint",
        ["method", "mean", "±", "95% low", "95% high", "var. queries", "var. repeats"],
        rows,
        note,
    )
    tables = [table]
    defined = ~np.isnan(scaled.by_query).any(axis=1)
    drawn = [(str(name), mean, error) for name, mean, error, *_ in rows if isinstance(mean, float)]
    figures = []
    if drawn:
        axis = "Spearman x 100"
        heights = {axis: [mean for _, mean, _ in drawn]}
        errors = {axis: [error if isinstance(error, float) else None for _, _, error in drawn]}
        drawing = bar_chart([name for name, *_ in drawn], heights, errors=errors, xlabel=axis, digits=1)
        figures.append(Figure("Faithfulness", drawing, "Means of the table, bars: standard error over queries."))
    if defined.any():
        values = {name: scaled.by_query[defined, i] for i, name in enumerate(faithfulness.names)}
        tables.append(difference_table("Paired", values, seed))
    summary = "; ".join(f"{name} {'undefined' if mean is None else f'{mean:.1f}'}" for name, mean, *_ in rows)
    report = Report(
        "Faithfulness of span methods",
        f"Rank correlation with the final checkpoint's own span scores: {summary}.",
        tables,
        figures,
        provenance=inputs.provenance(repeats=repeats, seed=seed),
    )
    result = {
        "names": list(faithfulness.names),
        "mean": {name: row[1] for name, row in zip(faithfulness.names, rows, strict=True)},
        "per_run_and_query": listed_values(scaled.values),
        "n_spans": list(faithfulness.n_spans),
        "control_checkpoints": faithfulness.n_control,
        "largest_residual": faithfulness.residual,
        "query_rows": queries.rows,
        "query_rows_left_out": queries.left_out,
        "seed": seed,
        "question": inputs.record(),
    }
    return report, result


def variances(values: np.ndarray) -> list[Cell]:
    """Sample variance over queries, averaged over repeats, and of the repeats' means; values are ``(repeats, q)``.

    None where fewer than two values are defined.
    """
    defined_runs = [run_values[~np.isnan(run_values)] for run_values in values]
    over_queries = [float(run_values.var(ddof=1)) for run_values in defined_runs if len(run_values) > 1]
    means = [float(run_values.mean()) for run_values in defined_runs if len(run_values)]
    return [
        float(np.mean(over_queries)) if over_queries else None,
        float(np.var(means, ddof=1)) if len(means) > 1 else None,
    ]
