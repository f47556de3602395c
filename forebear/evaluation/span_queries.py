"""What evaluations of span methods ask about: a sample of test rows that hold a span; spans of training rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from forebear.errors import DataError
from forebear.evaluation.comparisons import sample_queries
from forebear.indexer.data import RowSource
from forebear.indexer.spans import find_spans, mask_found, span_finder
from forebear.retriever.coverage import stores_spans
from forebear.retriever.query_spec import QuerySpec
from forebear.retriever.retriever import Retriever
from forebear.retriever.spans import SpanRows, span_rows, stored_span_rows

BLOCK_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class SpanQueries:
    """Test rows that are asked about.

    Attributes:
        source: Where they come from.
        rows: Their numbers there, ascending, ``(q,)``.
        texts: One list a text column, ``q`` texts each.
        table: The same rows with all their columns.
        labels: Class ids of the model, ``(q,)``; None where the source has none.
        left_out: Numbers of the sampled rows that hold no span that the model reads.
    """

    source: str
    rows: np.ndarray
    texts: tuple[list[str], ...]
    table: pa.Table
    labels: np.ndarray | None
    left_out: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: np.ndarray) -> SpanQueries:
        """Some of them, by position."""
        return SpanQueries(
            source=self.source,
            rows=self.rows[at],
            texts=tuple([column[i] for i in at] for column in self.texts),
            table=self.table.take(pa.array(at)),
            labels=None if self.labels is None else self.labels[at],
            left_out=self.left_out,
        )

    def blocks(self) -> Iterator[SpanQueries]:
        """Some of them at a time."""
        for start in range(0, len(self), BLOCK_ROWS):
            yield self.take(np.arange(start, min(start + BLOCK_ROWS, len(self))))


def sample_span_queries(
    retriever: Retriever, source: RowSource, spec: QuerySpec, n_queries: int, seed: int
) -> SpanQueries:
    """A seeded sample of test rows, in their order; all of them for 0 or more than there are.

    Rows without a span that the model reads are left out of it, if a method of the question compares spans.

    Args:
        retriever: Over the index.
        source: The test rows.
        spec: The question, settled: methods, target, how spans of test rows are found.
        n_queries: Size of the sample.
        seed: Of the sample.

    Raises:
        MismatchError: The source does not have the index's number of texts.
        DataError: Labels are needed and missing, or are not the model's; or no row has a span.
        InputError: The number is negative.
    """
    methods = spec.check()
    retriever.check_stores(methods, spec)
    found = sample_queries(retriever, source, n_queries, seed, need_labels=spec.target == "gold")
    assert found.table is not None
    queries = SpanQueries(
        source=found.source, rows=found.rows, texts=found.texts, table=found.table, labels=found.labels,
        left_out=np.empty(0, np.int64),
    )  # fmt: skip
    if not any(method.spans and not method.saliency for method in methods):
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
