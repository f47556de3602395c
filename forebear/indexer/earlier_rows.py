"""Equal rows in different shards: what is stored of the first is stored of the others.

A model's last bits depend on the other rows of a batch, so the same row in two shards would get two numbers, and a tie
would be broken by rounding instead of by row number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.indexer.store import column, read_batches


def row_digests(rows: Sequence[dict[str, list[int]]], labels: np.ndarray) -> np.ndarray:
    """128 bits of what the model reads of each row and of its label, ``(n, 2)`` uint64."""
    out = np.empty((len(rows), 2), np.uint64)
    for i, (row, label) in enumerate(zip(rows, labels.tolist(), strict=True)):
        digest = hashlib.blake2b(repr((label, *row.values())).encode(), digest_size=16).digest()
        out[i] = np.frombuffer(digest, np.uint64)
    return out


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
        """Add the next shard's rows, by :func:`row_digests`."""
        places = self._find(digests)
        known = places[:, 0] >= 0
        self._repeats.append((np.flatnonzero(known), places[known]))
        _, first = np.unique(digests, axis=0, return_index=True)
        new = first[~known[first]]
        every = np.concatenate([self._digests, digests[new]])
        order = np.argsort(every[:, 0], kind="stable")
        here = np.stack([np.full(len(new), self.n_shards - 1), new], axis=1)
        self._digests, self._places = every[order], np.concatenate([self._places, here])[order]

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
