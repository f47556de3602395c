"""``overlap``: do two methods bring up the same training rows? (Pez21, Figures 4 to 6; Han20)

The share of common rows in the top k of the signed ranking, so proponents alone. A percentage p of N live rows stands
for k = floor(p N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.amounts import common_share, rows_of_share
from forebear.evaluation.common.comparisons import (
    listed_values,
    matrix_figure,
    matrix_of,
    matrix_table,
    pair_table,
    question_record,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, refuse_spans
from forebear.evaluation.reports.report import Report
from forebear.progress import Progress, no_progress
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class TopOverlap:
    """Share of common rows in the tops of two methods.

    Attributes:
        methods: Names of the methods, ``m``.
        depths: Rows in each top, ascending, ``d`` numbers.
        values: Share of common rows for each depth, query and pair of methods, ``(d, q, m, m)``.
    """

    methods: tuple[str, ...]
    depths: tuple[int, ...]
    values: np.ndarray


def depths_of(tops: Sequence[int], shares: Sequence[str], n_rows: int) -> tuple[int, ...]:
    """Depths of the tops in rows, from numbers and shares of rows; ascending, each once.

    Raises:
        InputError: A depth is less than 1 or more than all rows.
    """
    depths = {*tops, *(rows_of_share(share, n_rows) for share in shares)}
    bad = sorted(depth for depth in depths if not 1 <= depth <= n_rows)
    if bad or not depths:
        given = ", ".join(map(str, [*tops, *shares])) or "none"
        raise InputError(
            f"tops of {given} (--top, --share): expected 1 to {n_rows} of the {n_rows} live rows.",
            of="evaluate overlap",
        )
    return tuple(sorted(depths))


def top_overlaps(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    depths: Sequence[int],
    *,
    progress: Progress = no_progress,
) -> TopOverlap:
    """The share of common rows in the tops of every pair of methods, for each query.

    Args:
        retriever: Over the index.
        queries: Test rows.
        spec: Methods, scope, target, exactness; its ``top`` is not used.
        depths: Rows in each top, ascending.
        progress: Called with the queries done.

    Raises:
        InputError: Fewer than two methods, or one that ranks spans.
    """
    question = retriever.resolve(spec, top=max(depths))
    names = question.spec.methods
    if len(names) < 2:
        raise InputError(f"overlap compares methods; found {', '.join(names)}. Give two or more (--method).")
    refuse_spans(question)
    m = len(names)
    values = np.ones((len(depths), len(queries), m, m))
    done = 0
    progress("queries", 0, len(queries))
    for part in queries.blocks():
        results = retriever.answer_block(0, part.texts, part.labels, question).rankings
        for q in range(len(part)):
            tops = [results[name][0].rows[q] for name in names]
            for d, depth in enumerate(depths):
                for i in range(m):
                    for j in range(i + 1, m):
                        share = common_share(tops[i][:depth], tops[j][:depth])
                        values[d, done + q, i, j] = values[d, done + q, j, i] = share
        done += len(part)
        progress("queries", done, len(queries))
    return TopOverlap(methods=names, depths=tuple(depths), values=values)


def top_overlap_report(overlap: TopOverlap, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    retriever, question, queries, seed = inputs.retriever, inputs.question, inputs.queries, inputs.seed
    n_live = retriever.index.manifest.n_live
    tables, figures, by_depth = [], [], {}
    for depth, values in zip(overlap.depths, overlap.values, strict=True):
        matrix = matrix_of(values)
        name = f"Top {depth:,}"
        note = (
            f"Mean over {len(queries):,} queries of the share of common rows among the {depth:,} of {n_live:,} rows of "
            f"largest score; two random tops share {depth / n_live:.3f}."
        )
        tables += [
            matrix_table(name, overlap.methods, matrix, note),
            pair_table(
                f"{name}: pairs",
                overlap.methods,
                values,
                seed,
                "95% interval over the queries.",
            ),
        ]
        figures.append(matrix_figure(name, overlap.methods, matrix, low=0.0, caption=note))
        by_depth[str(depth)] = {"mean": matrix, "per_query": listed_values(values)}
    pairs = overlap.values[0].mean(axis=0)[np.triu_indices(len(overlap.methods), k=1)]
    report = Report(
        "Overlap of the tops",
        f"Of the {overlap.depths[0]:,} training rows at the top, two methods share {pairs.mean():.0%} on average, "
        f"{pairs.min():.0%} to {pairs.max():.0%} by pair.",
        tables,
        figures,
        provenance=inputs.provenance(exact=question.spec.exact, seed=seed),
    )
    result = {
        "methods": list(overlap.methods),
        "n_rows": n_live,
        "tops": by_depth,
        "query_rows": queries.rows,
        "seed": seed,
        "question": question_record(retriever, retriever.resolve(question, top=max(overlap.depths))),
    }
    return report, result
