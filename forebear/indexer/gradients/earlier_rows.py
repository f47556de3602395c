"""Equal rows in different shards: the numbers stored for the first are stored for the others too.

A model's last bits depend on the other rows of a batch, so the same row in two shards would get two numbers, and a tie
would be broken by rounding instead of by row number. Shards are computed each by itself; when all are written, their
repeated rows are overwritten. That may be broken off and done again: no first row is ever overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.indexer.model.encoding import bits_of, read_digests
from forebear.indexer.storage.arrow import column, read_batches, write_columns

Repeats = tuple[np.ndarray, np.ndarray]  # positions of a shard's rows that an earlier shard has, (m,); places, (m, 2)
EncodeTexts = Callable[[list[list[str]]], Sequence[dict[str, list[int]]]]  # texts, one list a column, as word pieces

DIGEST = "digest"  # column of a shard with the digest of each row's word pieces
_MIX = np.uint64(0x9E3779B97F4A7C15)


def combined(digests: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Mix digests ``(n, 2)`` with other digests, or with targets ``(n,)`` or ``(n, c)``; returns ``(n, 2)``."""
    for key in keys:
        if key.dtype == np.uint64 and key.ndim == 2:
            digests = digests * _MIX + key
        else:
            for bits in bits_of(key).T:
                digests = digests * _MIX + bits[:, None]
    return digests


def stored_digests(batch: pa.RecordBatch, encode: EncodeTexts, texts: pa.RecordBatch) -> np.ndarray:
    """Digests of the word pieces of a shard's rows; where an older version kept none, the texts are encoded again.

    Args:
        batch: The shard that may have a column of digests.
        encode: Encodes texts, one list a column, as word pieces.
        texts: The shard of ``rows/`` that holds the texts.
    """
    if DIGEST in batch.schema.names:
        return column(batch, DIGEST)
    names = [name for name in texts.schema.names if name.startswith("text_")]
    return read_digests(encode([texts.column(name).to_pylist() for name in names]))


@dataclass(frozen=True)
class _Run:
    """Distinct rows in ascending order of the first half of their digests.

    Attributes:
        firsts: First halves of the digests, ``(n,)``.
        seconds: Second halves, ``(n,)``.
        places: Shard, and position in it, ``(n, 2)``.
    """

    firsts: np.ndarray
    seconds: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, firsts: np.ndarray, seconds: np.ndarray, places: np.ndarray) -> _Run:
        """Rows in any order."""
        order = np.argsort(firsts, kind="stable")  # two runs one behind the other are merged, not sorted again
        return cls(firsts[order], seconds[order], places[order])

    def joined(self, other: _Run) -> _Run:
        """The rows of both."""
        pairs = ((self.firsts, other.firsts), (self.seconds, other.seconds), (self.places, other.places))
        return _Run.of(*(np.concatenate(pair) for pair in pairs))

    def find(self, digests: np.ndarray, out: np.ndarray) -> None:
        """Write the places of the rows ``(n, 2)`` that are among these."""
        nearest = np.searchsorted(self.firsts, digests[:, 0]).clip(max=len(self.firsts) - 1)
        same = (self.firsts[nearest] == digests[:, 0]) & (self.seconds[nearest] == digests[:, 1])
        out[same] = self.places[nearest[same]]


class EarlierRows:
    """The distinct rows of the shards so far, 32 bytes each.

    They are kept in runs, each at least twice as long as the next, so that a row is moved as often as the number of
    rows has doubled since it came, not once a shard.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._repeats: list[Repeats] = []  # by shard

    @property
    def n_shards(self) -> int:
        """Shards that have been added."""
        return len(self._repeats)

    def add(self, digests: np.ndarray) -> None:
        """Add the next shard's rows, by their digests ``(n, 2)``."""
        places = np.full((len(digests), 2), -1, np.int64)
        for run in self._runs:
            run.find(digests, places)
        known = places[:, 0] >= 0
        self._repeats.append((np.flatnonzero(known), places[known]))
        _, first = np.unique(digests, axis=0, return_index=True)
        new = first[~known[first]]
        if not len(new):
            return
        new_places = np.stack([np.full(len(new), self.n_shards - 1), new], axis=1)
        self._runs.append(_Run.of(digests[new, 0], digests[new, 1], new_places))
        while len(self._runs) > 1 and len(self._runs[-2].firsts) < 2 * len(self._runs[-1].firsts):
            self._runs[-2:] = [self._runs[-2].joined(self._runs[-1])]

    def repeats(self, shard: int) -> Repeats:
        """Positions of a shard's rows that an earlier shard has, ``(m,)``; shard and position of those, ``(m, 2)``."""
        return self._repeats[shard]


class LabelledRows:
    """Rows of the shards so far: with equal word pieces, and with equal word pieces and labels.

    Attributes:
        read: Rows by word pieces. Equal rows share features, predictions and all that does not depend on the label.
        labelled: Rows by word pieces and label. Equal rows share residuals, losses and gradients too.
    """

    def __init__(self) -> None:
        self.read, self.labelled = EarlierRows(), EarlierRows()

    @property
    def n_shards(self) -> int:
        """Shards that have been added."""
        return self.read.n_shards

    def add(self, read: np.ndarray, labels: np.ndarray) -> None:
        """Add the next shard: digests ``(n, 2)`` of word pieces, and targets ``(n,)`` or ``(n, c)``."""
        self.read.add(read)
        self.labelled.add(combined(read, labels))


def note_rows(earlier: LabelledRows, folder: Path, shard: int, encode: EncodeTexts) -> None:
    """Add the stored rows of the next shard to those of the shards before it.

    Args:
        earlier: Rows of the shards before this one.
        folder: The index.
        shard: Number of the shard to add.
        encode: Encodes texts where an older version kept no digests.
    """
    rows = read_batches(folder / "rows" / shard_file(shard))[0]
    earlier.add(stored_digests(rows, encode, rows), column(rows, "label"))


class EarlierSpans:
    """Spans of the shards so far.

    Attributes:
        masked: Spans by the word pieces of the row with the span masked.
        labelled: Spans by these and the label.
        differences: Spans by these and the word pieces of the whole row, which decide the difference of gradients.
    """

    def __init__(self) -> None:
        self.masked, self.labelled, self.differences = EarlierRows(), EarlierRows(), EarlierRows()

    @property
    def n_shards(self) -> int:
        """Shards that have been added."""
        return self.masked.n_shards

    def add(self, read: np.ndarray, masked: np.ndarray, labels: np.ndarray) -> None:
        """Add the next shard: digests ``(e, 2)`` of whole and masked rows, and labels ``(e,)``."""
        self.masked.add(masked)
        self.labelled.add(combined(masked, labels))
        self.differences.add(combined(masked, read, labels))


def shard_file(shard: int) -> str:
    """Name of the files of a shard, one in the folder of each kind."""
    return f"{shard:05d}.arrow"


def copy_repeats(
    folder: Path, columns: Mapping[str, pa.Array | np.ndarray], positions: np.ndarray, places: np.ndarray
) -> None:
    """Replace the numbers of rows that an earlier shard has by those stored there.

    Args:
        folder: Folder of the shards of one kind.
        columns: Columns of the later shard, changed in place. Arrow arrays, such as texts, are left as they are.
        positions: Rows of the later shard, ``(m,)``.
        places: Shard and position of the equal row, ``(m, 2)``.
    """
    for shard in np.unique(places[:, 0]):
        of_shard = places[:, 0] == shard
        stored = read_batches(folder / shard_file(shard))[0]
        for name, values in columns.items():
            if isinstance(values, np.ndarray) and name != "row":
                values[positions[of_shard]] = column(stored, name)[places[of_shard, 1]]


def stored_columns_of(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Copies of columns of a shard, by name; None: of all, which are of numbers."""
    batch = read_batches(path)[0]
    return {name: column(batch, name).copy() for name in names or batch.schema.names}


def overwrite_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write a shard again with other values of some columns; a shard that has these values is left as it is."""
    batch = read_batches(path)[0]
    if all(column(batch, name).tobytes() == values.tobytes() for name, values in columns.items()):
        return
    others = {name: batch.column(name) for name in batch.schema.names}
    write_columns(path, others | dict(columns), batch.schema.metadata)


def overwrite_repeats(folder: Path, shard: int, repeats: Repeats) -> None:
    """Replace all numbers of a written shard's repeated rows by those of the earlier ones.

    Args:
        folder: Folder of the shards of one kind, whose columns are all of numbers.
        shard: Number of the shard; the earlier ones have been through this.
        repeats: Its repeated rows, and their places.
    """
    if len(repeats[0]):
        columns = stored_columns_of(folder / shard_file(shard))
        copy_repeats(folder, columns, *repeats)
        overwrite_columns(folder / shard_file(shard), columns)
