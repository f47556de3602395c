"""The word store: for each token id its rows and vectors, contiguous and memory-mapped, and each row's words.

The pass leaves one *run* a shard, sorted by token and row. The runs, and on an append the store that is there, are then
merged: counts first, so that the place of every posting is known, then each run's postings are copied there. Nothing
larger than a run is ever held. A token that every row holds ([CLS], [SEP]) has one posting a row, in row order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import sparse

from forebear.errors import StorageError
from forebear.indexer.storage.arrow import column, read_batches, write_columns
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX
from forebear.indexer.storage.layout import word_files
from forebear.indexer.storage.ragged import offsets, stretches
from forebear.indexer.words.gradients import WordRows

_SLICE = 1 << 16  # postings of an older store that are copied at once


@dataclass(frozen=True)
class Postings:
    """Some postings, by token and row.

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

    def take(self, which: np.ndarray) -> Postings:
        """Some of them, in the order given."""
        return Postings(*(getattr(self, f.name)[which] for f in fields(Postings)))


def write_run(path: Path, words: WordRows, first_row: int, repeated: Postings | None = None) -> None:
    """Write one shard's words, sorted by token and row; ``repeated`` are those that some of its rows have instead."""
    coded = words.coded
    assert coded is not None
    rows = (first_row + words.rows).astype(np.int32)
    found = Postings(rows, words.tokens.astype(np.int32), coded.codes, coded.scales, coded.norms, coded.errors)
    if repeated is not None:
        kept = found.take(~np.isin(rows, repeated.rows))
        pairs = ((getattr(part, f.name) for part in (kept, repeated)) for f in fields(Postings))
        found = Postings(*map(np.concatenate, map(tuple, pairs)))
    found = found.take(np.lexsort((found.rows, found.tokens)))
    names = ("row", "token", "code", "scale", "norm", "error")
    write_columns(path, {name: getattr(found, f.name) for name, f in zip(names, fields(Postings), strict=True)})


def _read_run(path: Path) -> Postings:
    batch = read_batches(path)[0]
    return Postings(*(column(batch, name) for name in ("row", "token", "code", "scale", "norm", "error")))


@dataclass(frozen=True)
class WordStore:
    """Words of every row at one checkpoint.

    Attributes:
        tokens: Token ids that occur, ascending, ``(T,)``.
        errors: Largest share of a vector's length that rounding changed, of each token's postings, ``(T,)`` float32.
        starts: Where the postings of each begin, and one past the last, ``(T + 1,)`` int64.
        rows: Row number of each posting, ascending within a token, ``(P,)`` int32.
        codes: See :class:`~forebear.indexer.words.gradients.Coded`, ``(P, e)``.
        scales: ``(P,)`` float32.
        norms: Length of each vector, ``(P,)`` float32.
        row_starts: Where the words of each row begin among the entries, ``(n + 1,)`` int64.
        entry_tokens: Token ids row by row, ascending within a row, ``(P,)`` int32.
        entry_places: Their postings, ``(P,)`` uint32.
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
        """n, retired rows included."""
        return len(self.row_starts) - 1

    @cached_property
    def _lengths(self) -> sparse.csr_array:
        """Norms by token and row, ``(T, n)``."""
        kind = np.int32 if len(self.rows) < 2**31 else np.int64
        parts = (self.norms.astype(np.float64), self.rows.astype(kind, copy=False), self.starts.astype(kind))
        return sparse.csr_array(parts, shape=(len(self.tokens), self.n_rows))

    def weighted_norms(self, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sum over tokens of weight times the norm of their vector in each row, ``(n,)`` float64."""
        at = np.minimum(np.searchsorted(self.tokens, tokens), len(self.tokens) - 1)
        held = self.tokens[at] == tokens
        return np.asarray(self._lengths[at[held]].T @ weights[held])

    def error(self, tokens: np.ndarray) -> float:
        """Largest share of a vector's length that rounding changed, over the postings of some tokens."""
        at = np.searchsorted(self.tokens, tokens)
        held = at < len(self.tokens)
        at = at[held]
        return float(self.errors[at[self.tokens[at] == tokens[held]]].max(initial=0.0))

    def vectors(self, places: np.ndarray, kind: type = np.float32) -> np.ndarray:
        """dL/dE_w of some postings, ``(m, e)``, their lengths exact to rounding."""
        return np.asarray(self.codes[places].astype(kind) * self.scales[places, None].astype(kind))

    def entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where some rows' words are among the entries: where each row's begin ``(m + 1,)``, and the entries."""
        return stretches(self.row_starts, rows)

    def take(self, rows: np.ndarray) -> WordRows:
        """All words of some rows, in the order given, as vectors."""
        starts, at = self.entries(rows)
        return WordRows(starts, self.entry_tokens[at].astype(np.int64), self.vectors(self.entry_places[at]))

    def squares(self, allowed: np.ndarray) -> np.ndarray:
        """Sum of ||dL/dE_w||^2 over a row's allowed tokens (a mask by token id), ``(n,)`` float64."""
        rows = np.repeat(np.arange(self.n_rows), np.diff(self.row_starts))
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


def repeated_words(rows: np.ndarray, earlier: np.ndarray, runs: Sequence[Path], old: WordStore | None) -> Postings:
    """Words of earlier rows as those of rows that are equal to them, so that both have the same bits.

    Args:
        rows: Numbers of the rows that get them, ``(m,)``.
        earlier: Numbers of the equal rows, ``(m,)``.
        runs: Files of :func:`write_run` that hold some of these.
        old: The store that holds the others, on an append.
    """
    parts = [] if old is None else [_postings_of(old, earlier)]
    for path in runs:
        run = _read_run(path)
        order = np.argsort(run.rows, kind="stable")
        parts.append(run.take(order[np.isin(run.rows[order], earlier)]))
    found = []
    for part in parts:  # sorted by row
        first, last = (np.searchsorted(part.rows, earlier, side=side) for side in ("left", "right"))
        counts = last - first
        at = np.arange(counts.sum()) + np.repeat(first - offsets(counts)[:-1], counts)
        found.append(replace(part.take(at), rows=np.repeat(rows, counts).astype(np.int32)))
    return Postings(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(Postings)))


def _postings_of(store: WordStore, rows: np.ndarray) -> Postings:
    """Postings of those of the rows that a store has, by row; of the errors it keeps the largest of each token."""
    mine = np.unique(rows[rows < store.n_rows])
    starts, at = store.entries(mine)
    tokens, places = store.entry_tokens[at], store.entry_places[at]
    errors = store.errors[np.searchsorted(store.tokens, tokens)]
    owners = np.repeat(mine, np.diff(starts)).astype(np.int32)
    return Postings(owners, tokens, store.codes[places], store.scales[places], store.norms[places], errors)


def merge_runs(
    folder: Path, kind: str, generation: int, runs: Sequence[Path], old: WordStore | None, n_rows: int
) -> tuple[str, ...]:
    """Write a store from the runs of new rows and the store of the rows before them; memory does not grow with rows.

    Args:
        folder: The index.
        kind: Its words folder.
        generation: Goes into the file names.
        runs: Files of :func:`write_run`, in row order.
        old: The store of the earlier rows, on an append.
        n_rows: Rows in all.

    Returns:
        The files written.

    Raises:
        StorageError: The disk is full; nothing that was there has changed.
    """
    found = [] if old is None else [old.tokens]
    n_tokens = 1 + max(int(tokens.max(initial=0)) for tokens in (*found, *(_read_run(path).tokens for path in runs)))
    counts = np.zeros(n_tokens, np.int64)
    errors = np.zeros(n_tokens, np.float32)
    row_counts = np.zeros(n_rows, np.int32)
    before = old.n_rows if old is not None else 0
    if old is not None:
        counts[old.tokens] += np.diff(old.starts)
        errors[old.tokens] = old.errors
        row_counts[:before] = np.diff(old.row_starts)
    for path in runs:
        run = _read_run(path)
        counts += np.bincount(run.tokens, minlength=n_tokens)
        np.maximum.at(errors, run.tokens, run.errors)
        row_counts += np.bincount(run.rows, minlength=n_rows).astype(np.int32)
    total = int(counts.sum())
    starts = offsets(counts)
    like = old if old is not None else _read_run(runs[0])
    with ExitStack() as held:

        def array(name: str, dtype: np.dtype, *width: int) -> np.ndarray:
            path = folder / kind / f"{name}-{generation:04d}{TEMPORARY_SUFFIX}"
            return held.enter_context(_reserved(path, (total, *width), dtype))

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
        for part in map(_read_run, runs):
            places = copy(part)
            order = np.argsort(part.rows, kind="stable")
            at = slice(next_entry, next_entry + len(order))
            entry_tokens[at], entry_places[at] = part.tokens[order], places[order]
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
    """Where postings sorted by token go; ``next_place`` of every token moves on."""
    found, first, counts = np.unique(tokens, return_index=True, return_counts=True)
    places: np.ndarray = np.arange(len(tokens)) + np.repeat(next_place[found] - first, counts)
    next_place[found] += counts
    return places


def _slices(old: WordStore) -> Iterator[Postings]:
    tokens = np.repeat(old.tokens, np.diff(old.starts))
    for start in range(0, len(tokens), _SLICE):
        at = slice(start, start + _SLICE)
        yield Postings(old.rows[at], tokens[at], old.codes[at], old.scales[at], old.norms[at], np.empty(0))


def _move_entries(old: WordStore, starts: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> int:
    """Entries of an older store with their places in the new one; returns how many there are."""
    moved = np.zeros(len(starts) - 1, np.int64)
    moved[old.tokens] = starts[old.tokens] - old.starts[:-1]
    for start in range(0, len(old.entry_tokens), _SLICE):
        at = slice(start, min(start + _SLICE, len(old.entry_tokens)))
        tokens[at] = old.entry_tokens[at]
        places[at] = old.entry_places[at] + moved[old.entry_tokens[at]]
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
        hint = "Free some space and go on with --resume." if error.errno == errno.ENOSPC else "Choose another place."
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing that was there has changed. {hint}"
        ) from error
    finally:
        path.unlink(missing_ok=True)
