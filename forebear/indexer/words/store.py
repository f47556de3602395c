"""The word store: for each token id its rows and vectors, contiguous and memory-mapped, and each row's words.

The pass leaves the words of each shard, sorted by token and row. These, and on an append the existing store, are then
merged: postings are counted first, so that the place of each one is known, and then copied there shard by shard. No
more than one shard is in memory at a time. A token that every row holds ([CLS], [SEP]) has one posting a row, in row
order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from forebear.errors import StorageError, is_out_of_memory
from forebear.indexer.storage.arrow import column, read_batches, write_columns
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX
from forebear.indexer.storage.layout import word_files
from forebear.indexer.storage.ragged import offsets, owners, stretches, weighted_sums
from forebear.indexer.words.gradients import WordRows

_SLICE = 1 << 16  # postings of an older store that are copied at once


@dataclass(frozen=True)
class Postings:
    """Postings, each the vector of one token in one row; sorted by token and row, or as said.

    Attributes:
        rows: Row numbers, ``(m,)`` int32.
        tokens: Token ids, ``(m,)``.
        codes: See :class:`~forebear.indexer.words.gradients.Coded`, ``(m, e)``.
        scales: ``(m,)`` float32.
        norms: ``(m,)`` float32.
        errors: ``(m,)`` float32.
    """

    rows: np.ndarray
    tokens: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
    errors: np.ndarray

    def take(self, positions: np.ndarray) -> Postings:
        """The postings at some positions, in the order given."""
        return Postings(*(getattr(self, f.name)[positions] for f in fields(Postings)))


def write_shard(path: Path, words: WordRows, first_row: int) -> None:
    """Write one shard's words, sorted by token and row."""
    coded = words.coded
    assert coded is not None
    rows = (first_row + words.rows).astype(np.int32)
    _write_postings(
        path, Postings(rows, words.tokens.astype(np.int32), coded.codes, coded.scales, coded.norms, coded.errors)
    )


def overwrite_words(path: Path, repeated: Postings) -> None:
    """Write a shard again: rows that occur in ``repeated`` get those words."""
    postings = _read_shard(path)
    kept = postings.take(~np.isin(postings.rows, repeated.rows))
    pairs = ((getattr(part, f.name) for part in (kept, repeated)) for f in fields(Postings))
    _write_postings(path, Postings(*map(np.concatenate, map(tuple, pairs))))


def _write_postings(path: Path, postings: Postings) -> None:
    postings = postings.take(np.lexsort((postings.rows, postings.tokens)))
    names = ("row", "token", "code", "scale", "norm", "error")
    write_columns(path, {name: getattr(postings, f.name) for name, f in zip(names, fields(Postings), strict=True)})


def _read_shard(path: Path) -> Postings:
    batch = read_batches(path)[0]
    return Postings(*(column(batch, name) for name in ("row", "token", "code", "scale", "norm", "error")))


@dataclass(frozen=True)
class WordStore:
    """Words of every row at one checkpoint.

    Attributes:
        tokens: Token ids that occur, ascending, ``(T,)``.
        errors: Largest share of a vector's length that rounding changed, over each token's postings, ``(T,)`` float32.
        starts: Where the postings of each token begin, and one past the last, ``(T + 1,)`` int64.
        rows: Row number of each posting, ascending within a token, ``(P,)`` int32.
        codes: See :class:`~forebear.indexer.words.gradients.Coded`, ``(P, e)``.
        scales: ``(P,)`` float32.
        norms: Length of each vector, ``(P,)`` float32.
        row_starts: Where the words of each row begin among the entries, ``(n + 1,)`` int64.
        entry_tokens: Token ids row by row, ascending within a row, ``(P,)`` int32.
        entry_places: Position of each entry's posting, ``(P,)`` uint32.
    """

    tokens: np.ndarray
    errors: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
    row_starts: np.ndarray
    entry_tokens: np.ndarray
    entry_places: np.ndarray

    @property
    def n_rows(self) -> int:
        """Number of rows n, retired rows included."""
        return len(self.row_starts) - 1

    def find(self, tokens: np.ndarray) -> np.ndarray:
        """Positions of token ids among :attr:`tokens`, ``(m,)``; -1 of those that no row holds."""
        positions = np.minimum(np.searchsorted(self.tokens, tokens), len(self.tokens) - 1)
        return np.where(self.tokens[positions] == tokens, positions, -1)

    def weighted_norms(self, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sums over tokens of weight times the norm of their vector in each row, each token's postings read once.

        Args:
            positions: Positions of ``m`` tokens, from :meth:`find`.
            weights: Weight of each token in each of ``q`` sums, ``(m, q)``.

        Returns:
            ``(q, n)`` float64.
        """
        starts, places = stretches(self.starts, positions)
        numbers = owners(starts)
        norms = self.norms[places].astype(np.float64)
        sums = weighted_sums(self.rows[places], norms, numbers, weights, self.n_rows)
        return np.asarray(torch.from_numpy(sums).T.contiguous().numpy())  # numpy transposes several times as slowly

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """dL/dE_w of some postings, ``(m, e)`` float32, their lengths exact to rounding."""
        vectors = self.directions(places)
        vectors *= self.scales[places, None]
        return vectors

    def directions(self, places: np.ndarray) -> np.ndarray:
        """The same without :attr:`scales`."""
        codes = torch.from_numpy(self.codes.take(places, axis=0))  # numpy widens float16 several times as slowly
        return np.asarray(codes.float().numpy())

    def entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries of some rows' words, row by row: where each row's begin ``(m + 1,)``, and the entries' numbers."""
        return stretches(self.row_starts, rows)

    def take(self, rows: np.ndarray, among: np.ndarray | None = None) -> WordRows:
        """Words of the given rows, in the order given, as vectors: all, or those that a mask by token id selects."""
        starts, entries = self.entries(rows)
        tokens, places = self.entry_tokens[entries], self.entry_places[entries]
        if among is not None:
            chosen = np.flatnonzero(among[tokens])
            starts, tokens, places = np.searchsorted(chosen, starts), tokens[chosen], places[chosen]
        return WordRows(starts, tokens.astype(np.int64), self.vectors(places))

    def squares(self, allowed: np.ndarray) -> np.ndarray:
        """Sum of ||dL/dE_w||^2 over a row's allowed tokens (a mask by token id), ``(n,)`` float64."""
        rows = owners(self.row_starts)
        squares = self.norms[self.entry_places].astype(np.float64) ** 2
        return np.bincount(rows, np.where(allowed[self.entry_tokens], squares, 0.0), minlength=self.n_rows)


def read_word_store(paths: Sequence[Path]) -> WordStore:
    """Memory-map a store; ``paths`` in the order of :data:`PARTS`."""
    tokens, postings, rows, entries = (read_batches(path)[0] for path in paths)
    return WordStore(
        tokens=column(tokens, "token"),
        errors=column(tokens, "error"),
        starts=offsets(column(tokens, "count")),
        rows=column(postings, "row"),
        codes=column(postings, "code"),
        scales=column(postings, "scale"),
        norms=column(postings, "norm"),
        row_starts=offsets(column(rows, "count")),
        entry_tokens=column(entries, "token"),
        entry_places=column(entries, "place"),
    )


def repeated_words(rows: np.ndarray, earlier: np.ndarray, shards: Sequence[Path], old: WordStore | None) -> Postings:
    """The stored words of earlier rows, renumbered as those of later, equal rows, so that both have the same bits.

    Args:
        rows: Numbers of the later rows, ``(m,)``.
        earlier: Number of the earlier row that each of them is equal to, ``(m,)``.
        shards: Files of :func:`write_shard` that may hold words of the earlier rows.
        old: On an append, the store that holds words of rows before it.
    """
    parts = [] if old is None else [_postings_of(old, earlier)]
    for path in shards:
        shard = _read_shard(path)
        order = np.argsort(shard.rows, kind="stable")
        parts.append(shard.take(order[np.isin(shard.rows[order], earlier)]))
    repeated = []
    for part in parts:  # sorted by row
        first, last = (np.searchsorted(part.rows, earlier, side=side) for side in ("left", "right"))
        counts = last - first
        positions = np.arange(counts.sum()) + np.repeat(first - offsets(counts)[:-1], counts)
        repeated.append(replace(part.take(positions), rows=np.repeat(rows, counts).astype(np.int32)))
    return Postings(*(np.concatenate([getattr(part, f.name) for part in repeated]) for f in fields(Postings)))


def _postings_of(store: WordStore, rows: np.ndarray) -> Postings:
    """Postings of the given rows, as far as a store has them, sorted by row; each error is the largest of its token."""
    stored_rows = np.unique(rows[rows < store.n_rows])
    starts, entries = store.entries(stored_rows)
    tokens, places = store.entry_tokens[entries], store.entry_places[entries]
    errors = store.errors[np.searchsorted(store.tokens, tokens)]
    row_of_word = np.repeat(stored_rows, np.diff(starts)).astype(np.int32)
    return Postings(row_of_word, tokens, store.codes[places], store.scales[places], store.norms[places], errors)


def merge_shards(
    folder: Path, kind: str, generation: int, shards: Sequence[Path], old: WordStore | None, n_rows: int
) -> tuple[str, ...]:
    """Write a store from the shards of new rows and the store of the rows before them; memory does not grow with rows.

    Args:
        folder: The index.
        kind: The folder of the word store, relative to the index.
        generation: Generation of the index, a part of the file names.
        shards: Files of :func:`write_shard`, in row order.
        old: The store of the earlier rows, on an append.
        n_rows: Number of rows in all.

    Returns:
        The files written.

    Raises:
        StorageError: The disk is full; nothing that was there has changed.
    """
    old_tokens = [] if old is None else [old.tokens]
    n_tokens = 1 + max(
        int(tokens.max(initial=0)) for tokens in (*old_tokens, *(_read_shard(path).tokens for path in shards))
    )
    counts = np.zeros(n_tokens, np.int64)
    errors = np.zeros(n_tokens, np.float32)
    row_counts = np.zeros(n_rows, np.int32)
    before = old.n_rows if old is not None else 0
    if old is not None:
        counts[old.tokens] += np.diff(old.starts)
        errors[old.tokens] = old.errors
        row_counts[:before] = np.diff(old.row_starts)
    for path in shards:
        shard = _read_shard(path)
        counts += np.bincount(shard.tokens, minlength=n_tokens)
        np.maximum.at(errors, shard.tokens, shard.errors)
        row_counts += np.bincount(shard.rows, minlength=n_rows).astype(np.int32)
    total = int(counts.sum())
    starts = offsets(counts)
    like = old if old is not None else _read_shard(shards[0])
    with ExitStack() as arrays:

        def array(name: str, dtype: np.dtype, *width: int) -> np.ndarray:
            path = folder / kind / f"{name}-{generation:04d}{TEMPORARY_SUFFIX}"
            return arrays.enter_context(_reserved(path, (total, *width), dtype))

        rows, codes = array("row", np.dtype(np.int32)), array("code", like.codes.dtype, like.codes.shape[1])
        scales, norms = array("scale", np.dtype(np.float32)), array("norm", np.dtype(np.float32))
        entry_tokens, entry_places = array("token", np.dtype(np.int32)), array("place", np.dtype(np.uint32))
        next_place = starts[:-1].copy()

        def copy(part: Postings) -> np.ndarray:
            places = _places(part.tokens, next_place)
            rows[places], codes[places] = part.rows, part.codes
            scales[places], norms[places] = part.scales, part.norms
            return places

        next_entry = 0
        if old is not None:
            for part in _slices(old):
                copy(part)
            next_entry = _move_entries(old, starts, entry_tokens, entry_places)
        for part in map(_read_shard, shards):
            places = copy(part)
            order = np.argsort(part.rows, kind="stable")
            new_entries = slice(next_entry, next_entry + len(order))
            entry_tokens[new_entries], entry_places[new_entries] = part.tokens[order], places[order]
            next_entry += len(order)
        present = np.flatnonzero(counts)
        files = word_files(kind, generation)
        of_tokens = {"token": present.astype(np.int32), "count": counts[present], "error": errors[present]}
        write_columns(folder / files[0], of_tokens)
        write_columns(folder / files[1], {"row": rows, "code": codes, "scale": scales, "norm": norms})
        write_columns(folder / files[2], {"count": row_counts})
        write_columns(folder / files[3], {"token": entry_tokens, "place": entry_places})
    return files


def _places(tokens: np.ndarray, next_place: np.ndarray) -> np.ndarray:
    """Places of postings sorted by token in the new store; ``next_place`` of their tokens is moved on."""
    distinct, first, counts = np.unique(tokens, return_index=True, return_counts=True)
    places: np.ndarray = np.arange(len(tokens)) + np.repeat(next_place[distinct] - first, counts)
    next_place[distinct] += counts
    return places


def _slices(old: WordStore) -> Iterator[Postings]:
    tokens = np.repeat(old.tokens, np.diff(old.starts))
    for start in range(0, len(tokens), _SLICE):
        part = slice(start, start + _SLICE)
        yield Postings(old.rows[part], tokens[part], old.codes[part], old.scales[part], old.norms[part], np.empty(0))


def _move_entries(old: WordStore, starts: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> int:
    """Write the entries of an older store with their places in the new one; returns how many there are."""
    moved = np.zeros(len(starts) - 1, np.int64)
    moved[old.tokens] = starts[old.tokens] - old.starts[:-1]
    for start in range(0, len(old.entry_tokens), _SLICE):
        part = slice(start, min(start + _SLICE, len(old.entry_tokens)))
        tokens[part] = old.entry_tokens[part]
        places[part] = old.entry_places[part] + moved[old.entry_tokens[part]]
    return len(old.entry_tokens)


@contextmanager
def _reserved(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array on disk, its space reserved (a full disk is an error here, not a crash later); removed at the end."""
    size_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb+") as handle:
            os.posix_fallocate(handle.fileno(), 0, size_bytes)
            mapped = np.memmap(handle, dtype, "r+", shape=(size_bytes // dtype.itemsize,))
            yield np.asarray(mapped)[: int(np.prod(shape))].reshape(shape)
    except OSError as error:
        if is_out_of_memory(error):
            raise
        hint = "Free some space and go on with --resume." if error.errno == errno.ENOSPC else "Choose another place."
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing that was there has changed. {hint}"
        ) from error
    finally:
        path.unlink(missing_ok=True)
