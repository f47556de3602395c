"""Rows with a span masked: every word piece that the span touches becomes the mask token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.errors import ModelError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, MaskedRows, encode_with_places
from forebear.indexer.spans.text import Span

_ENCODED_ROWS = 512  # rows whose word pieces are held together with their places in the text


def pieces_of(places: Any, row: int, span: Span) -> list[bool]:
    """Whether each word piece of a row is in a span: those from the first to the last that share a character with it.

    Args:
        places: From :func:`~forebear.indexer.model.encoding.encode_with_places`.
        row: Position of the row in ``places``.
        span: A span of that row.
    """
    columns = places.sequence_ids(row)
    inside = [
        column == span.column and a < span.end and span.start < b and a < b
        for column, (a, b) in zip(columns, places["offset_mapping"][row], strict=True)
    ]
    if any(inside):  # pieces for white space share no character with it, so those in between are added
        first, last = inside.index(True), len(inside) - inside[::-1].index(True)
        inside[first:last] = [column == span.column for column in columns[first:last]]
    return inside


def mask_spans(
    classifier: Classifier, texts: Sequence[Sequence[str]], spans: Sequence[Span], *, unknown: bool = False
) -> tuple[Encoded, np.ndarray]:
    """Rows beside the same rows with a span masked.

    Args:
        classifier: Whose tokenizer and limit are used.
        texts: One list a text column, with the row's text for each span. Equal rows are encoded once.
        spans: The span that is masked in each row.
        unknown: Use the unknown token ([UNK]) instead of the mask token.

    Returns:
        The rows and, as ``minus``, their masked versions, for the spans that the model reads; and whether it reads each
        span, ``(m,)`` bool. A span that truncation cuts away altogether, or of white space alone, is not read.

    Raises:
        ModelError: The tokenizer has no such token, or does not say where word pieces stand.
    """
    kind = "unknown" if unknown else "mask"
    mask = classifier.tokenizer.unk_token_id if unknown else classifier.tokenizer.mask_token_id
    if mask is None:
        raise ModelError(f"{classifier.name}: its tokenizer has no {kind} token, so no span can be masked.")
    if not spans:
        return Encoded([], []), np.zeros(0, bool)
    entries: dict[tuple[str, ...], list[int]] = {}
    for i, entry in enumerate(zip(*texts, strict=True)):
        entries.setdefault(entry, []).append(i)
    rows: list[dict[str, list[int]]] = [{}] * len(spans)
    pieces = [np.empty(0, np.int32)] * len(spans)
    distinct = list(entries)
    for start in range(0, len(distinct), _ENCODED_ROWS):
        group = distinct[start : start + _ENCODED_ROWS]
        encoded, places = encode_with_places(classifier, list(zip(*group, strict=True)))
        for n, entry in enumerate(group):
            for i in entries[entry]:
                rows[i] = encoded[n]
                pieces[i] = np.flatnonzero(pieces_of(places, n, spans[i])).astype(np.int32)
    kept = np.array([len(masked) > 0 for masked in pieces])
    positions = np.flatnonzero(kept).tolist()
    whole = [rows[i] for i in positions]
    return Encoded(whole, MaskedRows(whole, [pieces[i] for i in positions], mask)), kept


@dataclass(frozen=True)
class MaskedSpans:
    """Spans of rows, by row and then by place, ready for the model.

    Attributes:
        owners: Position of each span's row, ``(m,)``.
        spans: The ``m`` spans that the model reads.
        encoded: Their rows and, as ``minus``, the rows with the span masked.
        cut: Positions of the rows of spans that the model does not read (cut away altogether by truncation, or white
            space alone); such spans are in none of the other attributes.
    """

    owners: np.ndarray
    spans: list[Span]
    encoded: Encoded
    cut: np.ndarray


def mask_found(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    spans_of_rows: Sequence[list[Span]],
    *,
    unknown: bool = False,
) -> MaskedSpans:
    """Every span of every row masked.

    Args:
        classifier: Whose tokenizer and limit are used.
        texts: One list a text column, an entry a row.
        spans_of_rows: The spans of each row.
        unknown: Use the unknown token ([UNK]) instead of the mask token.
    """
    owners = np.repeat(np.arange(len(spans_of_rows)), [len(flat_spans) for flat_spans in spans_of_rows])
    flat_spans = [span for row_spans in spans_of_rows for span in sorted(row_spans)]
    entries = [[column[i] for i in owners.tolist()] for column in texts]
    encoded, read = mask_spans(classifier, entries, flat_spans, unknown=unknown)
    kept = [span for span, is_read in zip(flat_spans, read, strict=True) if is_read]
    return MaskedSpans(owners[read], kept, replace(encoded, owners=owners[read]), owners[~read])
