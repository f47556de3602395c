"""Equal rows in different shards: what is stored of the first is stored of the others.

A model's last bits depend on the other rows of a batch, so the same row in two shards would get two numbers, and a tie
would be broken by rounding instead of by row number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.indexer.store import column, read_batches


def _digests(items: Iterable[object], n: int) -> np.ndarray:
    """128 bits of each, ``(n, 2)`` uint64."""
    out = np.empty((n, 2), np.uint64)
    for i, item in enumerate(items):
        out[i] = np.frombuffer(hashlib.blake2b(repr(item).encode(), digest_size=16).digest(), np.uint64)
    return out


def row_digests(rows: Sequence[dict[str, list[int]]], labels: np.ndarray) -> np.ndarray:
    """128 bits of what the model reads of each row and of its label, ``(n, 2)`` uint64."""
    return _digests(((label, *row.values()) for row, label in zip(rows, labels.tolist(), strict=True)), len(rows))


def text_digests(folder: Path, shard: int) -> np.ndarray:
    """128 bits of the texts of each stored row of a shard, ``(n, 2)`` uint64."""
    stored = _stored_rows(folder, shard)
    return _digests(zip(*_texts(stored), strict=True), len(stored))


def span_digests(folder: Path, shard: int, owners: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """128 bits of the texts and label of the row that each span is in, and of its place.

    Args:
        folder: The index.
        shard: Whose rows are stored.
        owners: Position in the shard of each span's row, ``(m,)``.
        ends: Text column, first character and one past the last, ``(m, 3)``.

    Returns:
        ``(m, 2)`` uint64.
    """
    stored = _stored_rows(folder, shard)
    rows = _digests(zip(*_texts(stored), column(stored, "label").tolist(), strict=True), len(stored))
    return _digests(((rows[i].tolist(), *place) for i, place in zip(owners, ends.tolist(), strict=True)), len(owners))


def stored_span_digests(folder: Path, shard: int) -> np.ndarray:
    """The same of the stored spans of a shard."""
    spans = read_batches(folder / "spans" / f"{shard:05d}.arrow")[0]
    first = column(_stored_rows(folder, shard), "row")[0]
    ends = np.stack([column(spans, name) for name in ("column", "start", "end")], axis=1)
    return span_digests(folder, shard, column(spans, "row") - first, ends)


def _stored_rows(folder: Path, shard: int) -> pa.RecordBatch:
    return read_batches(folder / "rows" / f"{shard:05d}.arrow")[0]


def _texts(rows: pa.RecordBatch) -> list[list[str]]:
    """Texts of each text column."""
    return [rows.column(name).to_pylist() for name in rows.schema.names if name.startswith("text_")]


class EarlierRows:
    """The distinct rows of the shards so far, 32 bytes each."""

    def __init__(self) -> None:
        self._digests = np.empty((0, 2), np.uint64)  # ascending by the first half
        self._places = np.empty((0, 2), np.int64)  # shard, and position in it
        self._repeats: list[tuple[np.ndarray, np.ndarray]] = []  # of each shard

    @property
    def n_shards(self) -> int:
        """Shards that have been added."""
        return len(self._repeats)

    def add(self, digests: np.ndarray) -> None:
        """Add the next shard's rows, by their digests."""
        places = self._find(digests)
        known = places[:, 0] >= 0
        self._repeats.append((np.flatnonzero(known), places[known]))
        _, first = np.unique(digests, axis=0, return_index=True)
        new = first[~known[first]]
        every = np.concatenate([self._digests, digests[new]])
        order = np.argsort(every[:, 0], kind="stable")
        here = np.stack([np.full(len(new), self.n_shards - 1), new], axis=1)
        self._digests, self._places = every[order], np.concatenate([self._places, here])[order]

    def fill(self, n_shards: int, read: Callable[[int], np.ndarray]) -> None:
        """Add the shards that are missing, up to so many; ``read`` gives the digests of one by its number."""
        while self.n_shards < n_shards:
            self.add(read(self.n_shards))

    def repeats(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in a shard of rows that an earlier one has, ``(m,)``, and where: shard and position, ``(m, 2)``."""
        return self._repeats[shard]

    def _find(self, digests: np.ndarray) -> np.ndarray:
        """Shard and position of the equal row, ``(n, 2)``; -1 where there is none."""
        out = np.full((len(digests), 2), -1, np.int64)
        if len(self._digests):
            at = np.searchsorted(self._digests[:, 0], digests[:, 0]).clip(max=len(self._digests) - 1)
            same = (self._digests[at] == digests).all(axis=1)
            out[same] = self._places[at[same]]
        return out


def copy_repeats(
    folder: Path, columns: dict[str, pa.Array | np.ndarray], positions: np.ndarray, places: np.ndarray
) -> None:
    """Replace the numbers of rows that an earlier shard has by those stored there.

    Args:
        folder: Of the shards of one kind.
        columns: Of the new shard; changed in place. Texts and the like (Arrow arrays) are left as they are.
        positions: Rows of the new shard, ``(m,)``.
        places: Shard and position of the equal row, ``(m, 2)``.
    """
    for shard in np.unique(places[:, 0]):
        of_shard = places[:, 0] == shard
        stored = read_batches(folder / f"{shard:05d}.arrow")[0]
        for name, values in columns.items():
            if isinstance(values, np.ndarray) and name != "row":
                values[positions[of_shard]] = column(stored, name)[places[of_shard, 1]]
