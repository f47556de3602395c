"""What evaluations of span methods ask about: a sample of test rows that hold a span; spans of training rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from forebear.errors import DataError
from forebear.evaluation.common.queries import Queries, sample_queries
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_found
from forebear.retriever.question.recall import stores_spans
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever
from forebear.retriever.spans.search import SpanRows, span_rows, stored_span_rows


def sample_span_queries(
    retriever: Retriever, source: RowSource, spec: QuerySpec, n_queries: int, seed: int, *, need_labels: bool = False
) -> Queries:
    """A seeded sample of test rows, in their order; all of them for 0 or more than there are.

    Rows without a span that the model reads are left out of it, if a method of the question compares spans.

    Args:
        retriever: Over the index.
        source: The test rows.
        spec: The question, settled: methods, target, how spans of test rows are found.
        n_queries: Size of the sample.
        seed: Of the sample.
        need_labels: Whether labels are needed also where the target is not the gold one.

    Raises:
        MismatchError: The source does not have the index's number of texts.
        DataError: Labels are needed and missing, or are not the model's; or no row has a span.
        InputError: The number is negative.
    """
    methods = spec.check()
    retriever.check_stores(methods, spec)
    queries = sample_queries(retriever, source, n_queries, seed, need_labels=need_labels or spec.target == "gold")
    if not any(method.ranks_spans for method in methods):
        return queries
    assert spec.spans is not None
    find = span_finder(spec.query_spans or spec.spans, spec.span_column or 0)
    spans = find_spans(find, queries.texts, queries.table, queries.rows.tolist(), "test row")
    kept = np.unique(mask_found(retriever.classifier(), queries.texts, spans).owners)
    if not len(kept):
        raise DataError(
            f"{source.name}: none of the {len(queries):,} test rows has a span that the model reads. Find spans "
            "otherwise (--query-spans)."
        )
    return replace(queries.take(kept), left_out=np.delete(queries.rows, kept))


def training_spans(retriever: Retriever, spec: QuerySpec, rows: np.ndarray) -> SpanRows:
    """All spans of some live training rows (ascending), stored or found as a settled question says."""
    index = retriever.index
    if stores_spans(index, spec):
        entries = index.live_spans
        return stored_span_rows(index, retriever.classifier(), entries[np.isin(index.spans().rows[entries], rows)])
    assert spec.spans is not None
    return span_rows(index, retriever.classifier(), rows, span_finder(spec.spans, spec.span_column or 0))
