"""What evaluations of span methods ask about: a sample of test rows that hold a span; spans of training rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from forebear.errors import DataError
from forebear.evaluation.common.queries import Queries, sample_queries
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.finders import find_spans
from forebear.indexer.spans.masking import mask_found
from forebear.retriever.deep.query_gradients import Queries as GradientQueries
from forebear.retriever.question.batch import make_batch
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.spans.rows import SpanRows, gradient_queries, span_rows, stored_span_rows


def sample_span_queries(
    retriever: Retriever,
    source: RowSource,
    spec: QuerySpec | Question,
    n_queries: int,
    seed: int,
    *,
    need_labels: bool = False,
) -> Queries:
    """A seeded sample of test rows, in their order; all of them for 0 or more than there are.

    Rows without a span that the model reads are left out of it, if a method of the question compares spans.

    Args:
        retriever: Over the index.
        source: The test rows.
        spec: The question: methods, target, how spans of test rows are found.
        n_queries: Size of the sample.
        seed: Of the sample.
        need_labels: Whether labels are needed also where the target is not the gold one.

    Raises:
        MismatchError: The source does not have the index's number of texts.
        DataError: Labels are needed and missing, or are not the model's; or no row has a span.
        InputError: The number is negative.
    """
    question = retriever.resolve(spec)
    queries = sample_queries(
        retriever, source, n_queries, seed, need_labels=need_labels or question.spec.target == "gold"
    )
    if not any(method.ranks_spans for method in question.methods):
        return queries
    spans = find_spans(question.query_finder, queries.texts, queries.table, queries.rows.tolist(), "test row")
    kept = np.unique(mask_found(retriever.classifier(), queries.texts, spans).owners)
    if not len(kept):
        raise DataError(
            f"{source.name}: none of the {len(queries):,} test rows has a span that the model reads. Find spans "
            "otherwise (--query-spans)."
        )
    return replace(queries.take(kept), left_out=np.delete(queries.rows, kept))


def gradients_compared(
    retriever: Retriever, queries: Queries, question: Question
) -> tuple[GradientQueries, GradientQueries]:
    """The test rows, and the rows less themselves with their most important span masked, as gradients are compared."""
    numbers = queries.rows.tolist()
    batch = make_batch(question, retriever.models, queries.texts, queries.labels, numbers=numbers, table=queries.table)
    by_row, by_span, _ = gradient_queries(question, retriever.classifier(), batch)
    return by_row, by_span


def training_spans(retriever: Retriever, question: Question, rows: np.ndarray) -> SpanRows:
    """All spans of some live training rows (ascending), stored or found as a question says."""
    index = retriever.index
    if question.spans_are_stored:
        entries = index.live_spans
        return stored_span_rows(index, retriever.classifier(), entries[np.isin(index.spans().rows[entries], rows)])
    return span_rows(index, retriever.classifier(), rows, question.row_finder)
