"""Texts as word pieces: encoding rows, planning batches of them, padding one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, overload

import numpy as np
import torch

from forebear.errors import ModelError
from forebear.indexer.model.classifier import Classifier


class MaskedRows(Sequence[dict[str, list[int]]]):
    """Rows with some word pieces replaced, each made when it is read: only the places of the pieces are held."""

    def __init__(self, rows: Sequence[dict[str, list[int]]], pieces: Sequence[np.ndarray], mask: int) -> None:
        """Nothing is copied.

        Args:
            rows: As they are, ``n`` of them.
            pieces: Which word pieces of each are replaced, positions.
            mask: The token that takes their place.
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

    def take(self, at: Sequence[int]) -> MaskedRows:
        """Some of the rows, in the order given."""
        return MaskedRows([self._rows[i] for i in at], [self._pieces[i] for i in at], self._mask)


@dataclass(frozen=True)
class Encoded:
    """Rows of text after the tokenizer, or with some word pieces replaced.

    Attributes:
        rows: As :func:`encode` makes them, ``n`` of them.
        minus: Other versions of the same rows, whose gradients are subtracted: collectors then see g - g'.
        owners: Where several entries are versions of one row: a number for each, ``(n,)``, the same for those whose
            row and label are the same, which is then run once in a batch. None: nothing is known of that.
    """

    rows: Sequence[dict[str, list[int]]]
    minus: Sequence[dict[str, list[int]]] | None = None
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digests(self) -> np.ndarray:
        """128 bits of what the model reads of each row, ``(n, 2)`` uint64."""
        return read_digests(self.rows)

    @cached_property
    def others(self) -> Encoded:
        """The other versions alone."""
        return Encoded(self.minus or [])

    def take(self, which: Iterable[int]) -> Encoded:
        """Some of the rows, in the order given."""
        at = list(which)
        return Encoded(
            _take_rows(self.rows, at),
            None if self.minus is None else _take_rows(self.minus, at),
            None if self.owners is None else self.owners[at],
        )


def _take_rows(rows: Sequence[dict[str, list[int]]], at: Sequence[int]) -> Sequence[dict[str, list[int]]]:
    return rows.take(at) if isinstance(rows, MaskedRows) else [rows[i] for i in at]


Texts = Sequence[Sequence[str]] | Encoded  # one list a text column, or encoded rows


def n_rows_of(texts: Texts) -> int:
    """n."""
    return len(texts) if isinstance(texts, Encoded) else len(texts[0])


def take_texts(texts: Texts, which: Iterable[int]) -> Texts:
    """Some of the rows, in the order given."""
    if isinstance(texts, Encoded):
        return texts.take(which)
    at = list(which)
    return [[column[i] for i in at] for column in texts]


def encode(classifier: Classifier, texts: Sequence[Sequence[str]]) -> list[dict[str, list[int]]]:
    """Word pieces of each row, truncated (longest text first) and not padded.

    Args:
        classifier: Whose tokenizer and limit are used.
        texts: One list a text column, ``(columns, n)``; pairs are encoded in that order.
    """
    return tokenize(classifier.tokenizer, texts, classifier.max_length)


def as_encoded(classifier: Classifier, texts: Texts) -> Encoded:
    """Rows of text, encoded now or already."""
    return texts if isinstance(texts, Encoded) else Encoded(encode(classifier, texts))


def encoded_rows(classifier: Classifier, texts: Texts) -> Sequence[dict[str, list[int]]]:
    """The same, without other versions."""
    return as_encoded(classifier, texts).rows


def tokenize(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int) -> list[dict[str, list[int]]]:
    """Encode rows of one or two texts without padding; see :func:`encode`."""
    columns = [list(column) for column in texts]
    if not columns[0]:
        return []
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
    keys = [key for key in encoded if key in tokenizer.model_input_names]
    return [{key: encoded[key][i] for key in keys} for i in range(len(columns[0]))]


def read_digests(rows: Sequence[dict[str, list[int]]]) -> np.ndarray:
    """128 bits of what a model reads of each row, ``(n, 2)`` uint64: compared instead of the word pieces."""
    out = np.empty((len(rows), 2), np.uint64)
    for i, row in enumerate(rows):
        read = np.array(list(row.values()), np.int32)
        out[i] = np.frombuffer(
            blake2b(read.tobytes(), digest_size=16, salt=str(len(read)).encode()).digest(), np.uint64
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
        ModelError: The tokenizer knows no places, or does not encode twice alike.
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
    """Rows that differ in what the model reads, in what it reads of their other version, or in ``keys``.

    A model's last bits depend on the other rows of a batch: rows that must get equal numbers are run once.

    Args:
        encoded: ``n`` rows.
        keys: What else tells rows apart, such as their labels, whole numbers ``(n,)``.

    Returns:
        The first row of each kind, ``(kinds,)``, ascending; the kind of every row, ``(n,)``.
    """
    parts = [encoded.digests] if encoded.minus is None else [encoded.digests, encoded.others.digests]
    if keys is not None:
        parts.append(np.asarray(keys, np.int64).astype(np.uint64)[:, None])
    return distinct(np.concatenate(parts, axis=1))


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each kind of rows of the same bits of a matrix ``(n, k)``, ascending, and every row's kind."""
    flat = np.ascontiguousarray(values).view(np.dtype((np.void, values.shape[1] * values.itemsize))).reshape(-1)
    _, first, kinds = np.unique(flat, return_index=True, return_inverse=True)
    order = np.argsort(first)
    places = np.empty(len(first), np.int64)
    places[order] = np.arange(len(first))
    return first[order].astype(np.int64), places[kinds.reshape(-1)]


def plan_batches(lengths: Sequence[int], batch_tokens: int, *, equal_lengths: bool) -> Iterator[list[int]]:
    """Positions grouped into batches of similar length, at most ``batch_tokens`` padded tokens each.

    Longest rows come first, so that a batch that does not fit in memory shows at once. The plan depends
    on nothing but what is given; ties keep their order.

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


def pad_batch(tokenizer: Any, rows: Sequence[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """One padded batch of tensors on ``device``.

    Padding goes to the right whatever the tokenizer's setting says: encoders with absolute positions give other
    numbers for rows that are shifted.
    """
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    batch = {}
    for key in rows[0]:
        padded = torch.full((len(rows), width), fill.get(key, 0), dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : len(row[key])] = torch.tensor(row[key], dtype=torch.long)
        batch[key] = padded.to(device)
    return batch
