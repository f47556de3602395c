"""``correlation``: do two methods order the training rows alike? (Pez21, Figures 2 and 3)"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import (
    listed_values,
    matrix_figure,
    matrix_of,
    matrix_table,
    pair_table,
    standardised_ranks,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, score_queries
from forebear.evaluation.reports.report import Report
from forebear.indexer.rows.sampling import live_sample
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import residuals_of


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's correlations.

    Attributes:
        methods: Names of the methods, ``m``.
        values: For each query and pair of methods, ``(q, m, m)``; NaN where a method gives all rows one score.
        rows: Training rows that were scored, ``(n,)``.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    values: np.ndarray
    rows: np.ndarray
    residuals: dict[str, float]


def correlations(
    retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question, *, n_rows: int = 500, seed: int = 0
) -> Correlation:
    """Spearman's correlation between the scores of every pair of methods, for each query.

    Args:
        retriever: Over the index.
        queries: Test rows.
        spec: Methods, scope, target, curvature.
        n_rows: Training rows, a seeded sample; 0 for all.
        seed: Random seed of the sample.

    Raises:
        InputError: Fewer than two methods or two rows, which have no order to compare.
    """
    question = retriever.resolve(spec)
    names = question.spec.methods
    if len(names) < 2:
        raise InputError(f"correlation compares methods; found {', '.join(names)}. Give two or more (--method).")
    if n_rows < 0 or n_rows == 1:
        raise InputError(f"--rows {n_rows}: expected 2 or more training rows, or 0 for all of them.")
    rows = live_sample(retriever.index.live, n_rows, seed)
    if len(rows) < 2:
        raise InputError(f"{retriever.index.folder} has {len(rows)} live row(s); a rank correlation takes 2 or more.")
    scores = score_queries(retriever, queries, question, rows)
    ranks = np.stack([standardised_ranks(scores[name]) for name in names], axis=1)
    values = np.clip(np.einsum("qin,qjn->qij", ranks, ranks) / len(rows), -1.0, 1.0)
    return Correlation(methods=names, values=values, rows=rows, residuals=residuals_of(scores))


def correlation_report(correlation: Correlation, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    queries, seed = inputs.queries, inputs.seed
    matrix = matrix_of(correlation.values)
    n_undefined = int(np.isnan(correlation.values.diagonal(axis1=1, axis2=2)).sum())
    n_lists = correlation.values.shape[0] * correlation.values.shape[1]
    note = (
        f"Mean over {len(queries):,} queries of Spearman's correlation over {len(correlation.rows):,} training rows. "
        f"{n_undefined} of the {n_lists:,} score lists (query x method) are "
        "constant: they have no order, and their correlations are left out."
    )
    pairs = [(i, j) for i, j in combinations(range(len(correlation.methods)), 2) if matrix[i][j] is not None]
    summary = "No pair of methods has a correlation: each gives all rows one score."
    if pairs:
        low, high = (pick(pairs, key=lambda p: matrix[p[0]][p[1]] or 0.0) for pick in (min, max))
        summary = " ".join(
            f"{correlation.methods[i]} and {correlation.methods[j]} are {how} alike ({matrix[i][j]:.2f})."
            for how, (i, j) in (("most", high), ("least", low))
        )
    report = Report(
        "Correlation of methods",
        summary,
        (
            matrix_table("Mean Spearman correlation", correlation.methods, matrix, note),
            pair_table(
                "Pairs",
                correlation.methods,
                correlation.values,
                seed,
                "95% interval over the queries.",
            ),
        ),
        (
            matrix_figure(
                "Mean Spearman correlation",
                correlation.methods,
                matrix,
                low=-1.0,
                caption="Empty where it is undefined.",
            ),
        ),
        provenance=inputs.provenance(correlation.residuals, rows=len(correlation.rows), seed=seed),
    )
    result = {
        "methods": list(correlation.methods),
        "mean": matrix,
        "n_undefined": n_undefined,
        "per_query": listed_values(correlation.values),
        "query_rows": queries.rows,
        "training_rows": correlation.rows,
        "seed": seed,
        "question": inputs.record(correlation.residuals),
    }
    return report, result
