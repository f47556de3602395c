"""Texts as word pieces: encoding rows, planning batches of them, padding one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, overload

import numpy as np

from forebear.errors import ModelError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.network.batches import tokenize


class MaskedRows(Sequence[dict[str, list[int]]]):
    """Rows with some word pieces replaced, each made when it is accessed; only places of pieces are in memory."""

    def __init__(self, rows: Sequence[dict[str, list[int]]], pieces: Sequence[np.ndarray], mask: int) -> None:
        """Keep references to the rows; nothing is copied.

        Args:
            rows: The ``n`` unmasked rows.
            pieces: Positions of the word pieces to replace in each row.
            mask: Id of the token that replaces them.
        """
        self._rows, self._pieces, self._mask = rows, pieces, mask

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> dict[str, list[int]]: ...

    @overload
    def __getitem__(self, i: slice) -> MaskedRows: ...

    def __getitem__(self, i: int | slice) -> dict[str, list[int]] | MaskedRows:
        if isinstance(i, slice):
            return MaskedRows(self._rows[i], self._pieces[i], self._mask)
        ids = list(self._rows[i]["input_ids"])
        for place in self._pieces[i].tolist():
            ids[place] = self._mask
        return self._rows[i] | {"input_ids": ids}

    def take(self, positions: Sequence[int]) -> MaskedRows:
        """The rows at some positions, in the order given."""
        return MaskedRows([self._rows[i] for i in positions], [self._pieces[i] for i in positions], self._mask)


@dataclass(frozen=True)
class Encoded:
    """Rows of text after the tokenizer, or with some word pieces replaced.

    Attributes:
        rows: The ``n`` rows, as :func:`encode` makes them.
        minus: Another version of each row, such as one with a span masked, whose gradient g' is subtracted:
            collectors then see g - g'.
        owners: A number for each entry, ``(n,)``, equal for entries with the same row and label (a row occurs once for
            each of its spans, for example): such a row is run once in a batch. None: every entry is run.
    """

    rows: Sequence[dict[str, list[int]]]
    minus: Sequence[dict[str, list[int]]] | None = None
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digests(self) -> np.ndarray:
        """128-bit digest of each row's word pieces, ``(n, 2)`` uint64."""
        return read_digests(self.rows)

    @cached_property
    def others(self) -> Encoded:
        """The versions ``minus`` as rows of their own."""
        return Encoded(self.minus or [])

    def take(self, positions: Iterable[int]) -> Encoded:
        """The rows at some positions, in the order given."""
        indices = list(positions)
        return Encoded(
            _take_rows(self.rows, indices),
            None if self.minus is None else _take_rows(self.minus, indices),
            None if self.owners is None else self.owners[indices],
        )


def _take_rows(rows: Sequence[dict[str, list[int]]], positions: Sequence[int]) -> Sequence[dict[str, list[int]]]:
    return rows.take(positions) if isinstance(rows, MaskedRows) else [rows[i] for i in positions]


Texts = Sequence[Sequence[str]] | Encoded  # one list a text column, or encoded rows


def n_rows_of(texts: Texts) -> int:
    """Number of rows n."""
    return len(texts) if isinstance(texts, Encoded) else len(texts[0])


def take_texts(texts: Texts, positions: Iterable[int]) -> Texts:
    """The rows at some positions, in the order given."""
    if isinstance(texts, Encoded):
        return texts.take(positions)
    indices = list(positions)
    return [[column[i] for i in indices] for column in texts]


def encode(classifier: Classifier, texts: Sequence[Sequence[str]]) -> list[dict[str, list[int]]]:
    """Word pieces of each row, truncated (longest text first) and not padded.

    Args:
        classifier: Whose tokenizer and limit are used.
        texts: One list a text column, ``(columns, n)``; pairs are encoded in that order.
    """
    return tokenize(classifier.tokenizer, texts, classifier.max_length)


def as_encoded(classifier: Classifier, texts: Texts) -> Encoded:
    """Rows of text as :class:`Encoded`; rows that are encoded already are returned as they are."""
    return texts if isinstance(texts, Encoded) else Encoded(encode(classifier, texts))


def encoded_rows(classifier: Classifier, texts: Texts) -> Sequence[dict[str, list[int]]]:
    """Word pieces of rows of text, encoded if they are not yet, without the versions ``minus``."""
    return as_encoded(classifier, texts).rows


def read_digests(rows: Sequence[dict[str, list[int]]]) -> np.ndarray:
    """128-bit digest of each row's word pieces, ``(n, 2)`` uint64, to compare rows by."""
    out = np.empty((len(rows), 2), np.uint64)
    for i, row in enumerate(rows):
        pieces = np.array(list(row.values()), np.int32)
        out[i] = np.frombuffer(
            blake2b(pieces.tobytes(), digest_size=16, salt=str(len(pieces)).encode()).digest(), np.uint64
        )
    return out


def encode_with_places(
    classifier: Classifier, texts: Sequence[Sequence[str]]
) -> tuple[list[dict[str, list[int]]], Any]:
    """The rows as :func:`encode` has them, and where each word piece stands in its text.

    Returns:
        The rows, and a ``BatchEncoding`` with ``input_ids``, ``offset_mapping``, and by row ``sequence_ids`` and
        ``word_ids``.

    Raises:
        ModelError: The tokenizer does not give places, or gives other word pieces when asked for places.
    """
    tokenizer = classifier.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{classifier.name}: {type(tokenizer).__name__} does not say where in the text a word piece stands, so "
            "words cannot be shown. Give a model with a fast tokenizer (tokenizer.json)."
        )
    columns = [list(column) for column in texts]
    encoded = tokenizer(
        *columns, truncation=True, max_length=classifier.max_length, padding=False, return_offsets_mapping=True
    )
    rows = encode(classifier, texts)
    if encoded["input_ids"] != [row["input_ids"] for row in rows]:
        raise ModelError(
            f"{classifier.name}: {type(tokenizer).__name__} gives other word pieces when asked for their places in the "
            "text, so words cannot be told apart. Give a model with another tokenizer."
        )
    return rows, encoded


def distinct_rows(encoded: Encoded, keys: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ in their word pieces, in those of their version ``minus``, or in ``keys``.

    A model's last bits depend on the other rows of a batch: rows that must get equal numbers are run once.

    Args:
        encoded: ``n`` rows.
        keys: Numbers that tell rows apart too, such as labels, ``(n,)`` or ``(n, k)``.

    Returns:
        The first row of each kind, ``(kinds,)``, ascending; the kind of every row, ``(n,)``.
    """
    parts = [encoded.digests] if encoded.minus is None else [encoded.digests, encoded.others.digests]
    if keys is not None:
        parts.append(bits_of(keys))
    return distinct(np.concatenate(parts, axis=1))


def bits_of(numbers: np.ndarray) -> np.ndarray:
    """Numbers ``(n,)`` or ``(n, k)`` as ``(n, k)`` uint64, equal where they are: whole ones, or the bits of others."""
    numbers = np.asarray(numbers)
    whole = numbers.dtype.kind in "iu"
    bits = numbers.astype(np.int64).astype(np.uint64) if whole else (numbers.astype(np.float64) + 0.0).view(np.uint64)
    return np.asarray(bits[:, None] if bits.ndim == 1 else bits)


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group rows of a matrix ``(n, k)`` by their bits: the first row of each kind, ascending, and every row's kind."""
    flat = np.ascontiguousarray(values).view(np.dtype((np.void, values.shape[1] * values.itemsize))).reshape(-1)
    _, first, kinds = np.unique(flat, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int64)
    places[order] = np.arange(len(first))
    return first[order].astype(np.int64), places[kinds.reshape(-1)]


def plan_batches(lengths: Sequence[int], batch_tokens: int, *, equal_lengths: bool) -> Iterator[list[int]]:
    """Positions grouped into batches of similar length, at most ``batch_tokens`` padded tokens each.

    Longest rows come first, so that a batch that does not fit in memory shows at once. The plan depends
    on the arguments alone; ties keep their order.

    Args:
        lengths: Word pieces of each row, ``(n,)``.
        batch_tokens: Largest number of padded tokens in a batch.
        equal_lengths: Only rows of one length share a batch, so that none is padded: for models whose predictions
            depend on padding (:attr:`~forebear.indexer.model.classifier.Classifier.equal_lengths`).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        stop = start + max(1, batch_tokens // longest)
        batch = order[start:stop]
        if equal_lengths:
            batch = [i for i in batch if lengths[i] == lengths[batch[0]]]
        yield batch
        start += len(batch)
