"""``recall``: how much of the exact top k does retrieval find, and how much faster?

``--exact rerank`` (candidates, then exact scores) against ``--exact full`` (every row scored exactly), at both ends of
the ranking. Rows that are equally good by the exact scores but for rounding count as misses when they change places.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.amounts import common_share
from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    interval_cells,
    listed_values,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, refuse_spans
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.progress import Progress, no_progress
from forebear.retriever.question.spec import Exactness, QuerySpec, Question
from forebear.retriever.retriever import Retriever

ENDS = ("proponents", "opponents")
WAYS: tuple[Exactness, ...] = ("rerank", "full")


@dataclass(frozen=True, kw_only=True)
class RetrievalRecall:
    """Recall and wall time of each method.

    Attributes:
        methods: Names of the methods, ``m``.
        top: k.
        values: recall@k of each end and query, ``(m, 2, q)``.
        seconds: Wall time of all queries by candidates and by scoring every row, ``(m, 2)``.
    """

    methods: tuple[str, ...]
    top: int
    values: np.ndarray
    seconds: np.ndarray


def retrieval_recall(
    retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question, *, progress: Progress = no_progress
) -> RetrievalRecall:
    """Ask every query twice, by candidates and by scoring every row, one method at a time.

    Models and files are loaded before the clock starts: the first query is asked once in advance.

    Args:
        retriever: Over the index.
        queries: Test rows.
        spec: Methods, top, scope, recall or candidates; its ``exact`` is not used.
        progress: Called with the methods done.

    Raises:
        InputError: A method ranks spans, or k is more than the live rows.
    """
    question = retriever.resolve(spec)
    refuse_spans(question)
    if question.spec.top > (n_live := retriever.index.manifest.n_live):
        raise InputError(f"--top {question.spec.top}: expected 1 to {n_live}, the live rows.")
    n_methods = len(question.methods)
    values, seconds = np.zeros((n_methods, 2, len(queries))), np.zeros((n_methods, 2))
    first = replace(
        queries,
        rows=queries.rows[:1],
        texts=tuple(column[:1] for column in queries.texts),
        labels=None if queries.labels is None else queries.labels[:1],
    )
    progress("methods", 0, n_methods)
    for m, name in enumerate(question.spec.methods):
        tops = []
        for way, exact in enumerate(WAYS):
            single = retriever.resolve(question, methods=(name,), exact=exact)
            if exact == "rerank":
                _ends(retriever, first, single)
            start = time.perf_counter()
            tops.append(_ends(retriever, queries, single))
            seconds[m, way] = time.perf_counter() - start
        for end, (candidates, every) in enumerate(zip(*tops, strict=True)):
            values[m, end] = [common_share(every[q], candidates[q]) for q in range(len(queries))]
        progress("methods", m + 1, n_methods)
    return RetrievalRecall(methods=question.spec.methods, top=question.spec.top, values=values, seconds=seconds)


def _ends(retriever: Retriever, queries: QueryRows, question: Question) -> tuple[np.ndarray, np.ndarray]:
    """Rows at both ends of each query's ranking by the question's only method, ``(q, k)`` each."""
    (name,) = question.spec.methods
    answers = [retriever.answer_block(0, part.texts, part.labels, question) for part in queries.blocks()]
    rankings = [part.rankings[name] for part in answers]
    return np.concatenate([ends[0].rows for ends in rankings]), np.concatenate([ends[1].rows for ends in rankings])


def retrieval_recall_report(recall: RetrievalRecall, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    retriever, queries, seed = inputs.retriever, inputs.queries, inputs.seed
    q = len(queries)
    inputs = replace(inputs, question=inputs.retriever.resolve(inputs.question, exact="rerank"))
    facts = inputs.record()["methods"]
    lines: list[list[Cell]] = []
    for m, name in enumerate(recall.methods):
        by_candidates, every = (float(value) for value in recall.seconds[m] / q)
        expected = facts[name].get("recall")
        for end, side in enumerate(ENDS):
            cells = interval_cells(recall.values[m, end], seed)
            lines.append([name, side, *cells, expected, by_candidates, every, every / by_candidates])
    means = {side: recall.values[:, end].mean(axis=1).tolist() for end, side in enumerate(ENDS)}
    table = Table(
        f"Recall of the exact top {recall.top}",
        ["method", "end", *INTERVAL_COLUMNS, "expected", "s/query", "s/query, all rows", "times faster"],
        lines,
        f"Over {q:,} queries, answered together, of {retriever.index.manifest.n_live:,} training rows; 95% bootstrap "
        "interval. Expected: the recall that the index's calibration states for this question, 1 where the search "
        "proves its answer, none where it was not measured. Wall time, models loaded."
        + "".join(f" {name}: {note}." for name in recall.methods if (note := facts[name].get("recall_note"))),
    )
    lowest = recall.values.mean(axis=2)
    m, end = (int(i) for i in np.unravel_index(lowest.argmin(), lowest.shape))
    report = Report(
        "Recall of retrieval",
        f"Retrieval finds {lowest.min():.1%} to {lowest.max():.1%} of the exact top {recall.top}; least for the "
        f"{ENDS[end]} of {recall.methods[m]}.",
        (table,),
        (Figure(f"Recall@{recall.top}", bar_chart(recall.methods, means, xlabel=f"recall@{recall.top}", digits=3)),),
        provenance=inputs.provenance(recall_asked_for=inputs.question.spec.recall, seed=seed),
    )
    result = {
        "methods": list(recall.methods),
        "top": recall.top,
        "ends": list(ENDS),
        "recall": listed_values(recall.values.mean(axis=2)),
        "per_query": listed_values(recall.values),
        "seconds": {"rerank": recall.seconds[:, 0], "full": recall.seconds[:, 1]},
        "query_rows": queries.rows,
        "seed": seed,
        "question": inputs.record(),
    }
    return report, result
