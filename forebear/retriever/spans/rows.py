"""Spans of training rows and of test rows, as what gradients are compared of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts
from forebear.indexer.model.forward import residual_and_loss, run_forward
from forebear.indexer.spans.finders import find_spans
from forebear.indexer.spans.masking import mask_found, mask_spans
from forebear.indexer.spans.text import Finder, Span
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.spec import Question


@dataclass(frozen=True)
class SpanRows:
    """Spans of training rows, as what :class:`GradientSearch` scores: g - g' each.

    Attributes:
        rows: Training row of each, ``(m,)``.
        spans: The spans, by row and then by place.
        encoded: Rows and their masked versions.
        gold: Labels of the rows, ``(m,)`` int64.
        cut: Training row of each span that the model does not read, which is left out, ``(n,)``.
    """

    rows: np.ndarray
    spans: list[Span]
    encoded: Encoded
    gold: np.ndarray
    cut: np.ndarray

    def texts(self, at: np.ndarray) -> Texts:
        """See :class:`~forebear.retriever.deep.search.Rows`."""
        return self.encoded.take(at)

    def labels(self, at: np.ndarray) -> np.ndarray:
        """See :class:`~forebear.retriever.deep.search.Rows`."""
        return np.asarray(self.gold[at])


def span_rows(
    index: Index, classifier: Classifier, rows: np.ndarray, find: Finder, *, unknown: bool = False
) -> SpanRows:
    """All spans of some training rows (ascending); ``unknown``: masked by [UNK]."""
    texts = index.text_lists(rows)
    table = pa.table(dict(zip(index.manifest.spec.text_columns, texts, strict=True)))
    found = mask_found(
        classifier, texts, find_spans(find, texts, table, rows.tolist(), "training row"), unknown=unknown
    )
    of = rows[found.owners]
    return SpanRows(of, found.spans, found.encoded, index.labels[of].astype(np.int64), rows[found.cut])


def stored_span_rows(index: Index, classifier: Classifier, entries: np.ndarray) -> SpanRows:
    """Some entries of the index's span store."""
    store = index.spans()
    rows, spans = store.rows[entries], store.spans(entries)
    encoded, read = mask_spans(classifier, index.text_lists(rows), spans)
    assert read.all()
    labels = index.labels[rows].astype(np.int64)
    return SpanRows(rows, spans, replace(encoded, owners=rows), labels, np.empty(0, np.int64))


def query_spans(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    table: pa.Table | None,
    targets: np.ndarray,
    logits: np.ndarray,
    find: Finder,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Span], Encoded]:
    """The span of each test row that matters most: whose masking raises the target's loss most.

    Args:
        classifier: The model.
        texts: Test rows, one list a text column.
        table: The same rows with all their columns.
        targets: Class whose loss is explained, ``(q,)``.
        logits: Of the rows as they are, ``(q, c)``.
        find: Finds the spans of a row.
        numbers: Of the rows, for messages; None: from 0.

    Returns:
        One span a row; the rows and their masked versions.

    Raises:
        InputError: A row has no span, or none that the model reads.
    """
    numbers = range(len(texts[0])) if numbers is None else numbers
    found = find_spans(find, texts, table, numbers, "test row")
    read = mask_found(classifier, texts, found)
    owners, spans, encoded = read.owners, read.spans, read.encoded
    missing = np.setdiff1d(np.arange(len(found)), owners)
    if len(missing):
        raise InputError(
            f"test row {numbers[missing[0]]} has no span that the model reads. Find spans otherwise (--spans), or "
            "leave the row out."
        )
    assert encoded.minus is not None
    _, whole = residual_and_loss(logits, targets)
    _, masked = residual_and_loss(run_forward(classifier, Encoded(encoded.minus)).logits, targets[owners])
    importance = masked - whole[owners]
    best = np.lexsort((np.arange(len(owners)), -importance, owners))
    first = best[np.unique(owners[best], return_index=True)[1]]
    return [spans[i] for i in first], encoded.take(first)


def gradient_queries(
    question: Question, classifier: Classifier, batch: Batch
) -> tuple[Queries, Queries, list[Span] | None]:
    """Test rows as what gradients are compared of.

    Returns:
        The rows; the rows less themselves with their most important span masked; and these spans. The last two only
        where a method compares spans of both rows; else the rows again, and None.
    """
    by_row = Queries(batch.columns, batch.targets)
    if not any(method.spans == "both" for method in question.methods):
        return by_row, by_row, None
    spans, encoded = query_spans(
        classifier, batch.columns, batch.table, batch.targets, batch.forward.logits, question.query_finder,
        batch.numbers,
    )  # fmt: skip
    return by_row, Queries(encoded, batch.targets), spans
