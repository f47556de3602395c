"""Rows that evaluations of span methods use: a sample of test rows that hold a span; spans of training rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from forebear.errors import DataError
from forebear.evaluation.common.queries import QueryRows, sample_queries
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
) -> QueryRows:
    """A seeded sample of test rows, in the order of their file; all rows if ``n_queries`` is 0 or exceeds them.

    If a method of the question compares spans, sampled rows without a span that the model reads are left out.

    Args:
        retriever: Over the index.
        source: Source of the test rows.
        spec: The question: methods, target, how spans of test rows are found.
        n_queries: Size of the sample.
        seed: Random seed of the sample.
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
    classifier = retriever.classifier()
    find = question.query_finder(classifier.device)
    spans = find_spans(find, queries.texts, queries.table, queries.rows.tolist(), "test row")
    kept = np.unique(mask_found(classifier, queries.texts, spans).owners)
    if not len(kept):
        raise DataError(
            f"{source.name}: none of the {len(queries):,} test rows has a span that the model reads. Find spans "
            "otherwise (--query-spans)."
        )
    return replace(queries.take(kept), left_out=np.delete(queries.rows, kept))


def gradients_compared(
    retriever: Retriever, queries: QueryRows, question: Question
) -> tuple[GradientQueries, GradientQueries]:
    """Test rows as span methods compare their gradients: g(x), and the difference g(x) - g(x without its span).

    The span of a test row is the one that is given, or else the one of largest importance.

    Returns:
        The queries by whole row, and the queries by span difference.
    """
    numbers = queries.rows.tolist()
    batch = make_batch(question, retriever.models, queries.texts, queries.labels, numbers=numbers, table=queries.table)
    by_row, by_span, _ = gradient_queries(question, retriever.classifier(), batch)
    return by_row, by_span


def training_spans(retriever: Retriever, question: Question, rows: np.ndarray) -> SpanRows:
    """All spans of the given live training rows (ascending numbers), stored or found as the question says."""
    index = retriever.index
    if question.spans_are_stored:
        entries = index.live_spans
        return stored_span_rows(index, retriever.classifier(), entries[np.isin(index.spans().rows[entries], rows)])
    classifier = retriever.classifier()
    return span_rows(index, classifier, rows, question.row_finder(classifier.device))
