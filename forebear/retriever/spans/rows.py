"""Spans of training rows and of test rows, encoded with their masked versions so that gradients can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from typing_extensions import override

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts
from forebear.indexer.model.forward import run_forward
from forebear.indexer.spans.finders import find_spans
from forebear.indexer.spans.masking import mask_found, mask_spans
from forebear.indexer.spans.text import Finder, Span
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.row_lengths import Rows
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.spec import Question


@dataclass(frozen=True)
class SpanRows(Rows):
    """Spans of training rows as entries that :class:`GradientSearch` scores: g - g' each, g' with the span masked.

    Attributes:
        rows: Training row of each span, ``(m,)``.
        spans: The spans, by row and then by place.
        encoded: The rows and their masked versions.
        gold: Labels of the rows, ``(m,)`` int64.
        cut: Training rows of the spans that were left out because truncation hides them from the model, ``(n,)``.
    """

    rows: np.ndarray
    spans: list[Span]
    encoded: Encoded
    gold: np.ndarray
    cut: np.ndarray

    @override
    def texts(self, numbers: np.ndarray) -> Texts:
        return self.encoded.take(numbers)

    @override
    def labels(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray(self.gold[numbers])


def span_rows(
    index: Index, classifier: Classifier, rows: np.ndarray, find: Finder, *, unknown: bool = False
) -> SpanRows:
    """All spans of training rows, which ascend.

    ``find`` finds the spans of a row. With ``unknown`` a span is masked by [UNK] instead of the mask token.
    """
    texts = index.text_lists(rows)
    table = pa.table(dict(zip(index.manifest.spec.text_columns, texts, strict=True)))
    masked = mask_found(
        classifier, texts, find_spans(find, texts, table, rows.tolist(), "training row"), unknown=unknown
    )
    owners = rows[masked.owners]
    return SpanRows(owners, masked.spans, masked.encoded, index.targets(owners), rows[masked.cut])


def stored_span_rows(index: Index, classifier: Classifier, entries: np.ndarray) -> SpanRows:
    """The spans of the index's span store with the numbers ``entries``, ``(m,)``."""
    store = index.spans()
    rows, spans = store.rows[entries], store.spans(entries)
    encoded, read = mask_spans(classifier, index.text_lists(rows), spans)
    assert read.all()
    labels = index.targets(rows)
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
        table: The test rows with all their columns.
        targets: Class whose loss is explained, ``(q,)``.
        logits: Logits of the unmasked rows, ``(q, c)``.
        find: Finds the spans of a row.
        numbers: Numbers of the rows in their source, for messages; None: from 0.

    Returns:
        One span a row; the rows and their masked versions.

    Raises:
        InputError: A row has no span, or truncation hides all its spans from the model.
    """
    numbers = range(len(texts[0])) if numbers is None else numbers
    spans_by_row = find_spans(find, texts, table, numbers, "test row")
    readable = mask_found(classifier, texts, spans_by_row)
    owners, spans, encoded = readable.owners, readable.spans, readable.encoded
    missing = np.setdiff1d(np.arange(len(spans_by_row)), owners)
    if len(missing):
        raise InputError(
            f"test row {numbers[missing[0]]} has no span that the model reads. Find spans otherwise (--spans), or "
            "leave the row out."
        )
    assert encoded.minus is not None
    _, whole_losses = classifier.loss.residual_and_loss(logits, targets)
    _, masked_losses = run_forward(classifier, Encoded(encoded.minus)).residuals_and_losses(targets[owners])
    importance = masked_losses - whole_losses[owners]
    order = np.lexsort((np.arange(len(owners)), -importance, owners))
    first = order[np.unique(owners[order], return_index=True)[1]]
    return [spans[i] for i in first], encoded.take(first)


def gradient_queries(
    question: Question, classifier: Classifier, batch: Batch
) -> tuple[Queries, Queries, list[Span] | None]:
    """Test rows as the queries of methods by whole rows and of methods by spans.

    Returns:
        Queries of the whole rows; queries of each row minus its version with the most important span masked; and
        these spans. Where no method compares spans of both rows, the last two are the first again and None.
    """
    by_row = Queries(batch.columns, batch.targets)
    if not any(method.spans == "both" for method in question.methods):
        return by_row, by_row, None
    spans, encoded = query_spans(
        classifier, batch.columns, batch.table, batch.targets, batch.forward.logits,
        question.query_finder(classifier.device), batch.numbers,
    )  # fmt: skip
    return by_row, Queries(encoded, batch.targets), spans
