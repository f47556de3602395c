"""The rows of each shard with their targets: from a source, for this process and for others that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from forebear.errors import InputError
from forebear.indexer.rows.labels import LabelMap
from forebear.indexer.rows.row_source import RowBlock, RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.indexer.sketches.fitting import Sample, sample_rows


class ShardRows(Protocol):
    """Rows by shard."""

    def block(self, number: int) -> tuple[RowBlock, np.ndarray]:
        """Rows of the segment's shard of this number, from 0, and their targets ``(n,)`` or ``(n, c)``."""


class SourceRows:
    """The rows of a source.

    Shards are best asked for in ascending order: going back means reading the source again from its beginning, where
    its format has no place to begin at.
    """

    def __init__(self, source: RowSource, labels: LabelMap | TargetMap, shard_rows: int, n_kept: int = 0) -> None:
        """Open nothing yet.

        Args:
            source: The rows.
            labels: Maps the source's labels to the model's targets.
            shard_rows: Rows of a shard.
            n_kept: How many shards that were read last are kept, for processes that ask in almost ascending order.
        """
        self.source = source
        self._labels, self._shard_rows, self._n_kept = labels, shard_rows, n_kept
        self._blocks: Iterator[RowBlock] = iter(())
        self._next: int | None = None  # number of the shard that comes next
        self._kept: dict[int, tuple[RowBlock, np.ndarray]] = {}

    def block(self, number: int) -> tuple[RowBlock, np.ndarray]:
        """Rows of a shard and their targets, see :class:`ShardRows`.

        Raises:
            InputError: The rows have no labels.
            DataError: The source cannot be read any more, or has changed.
        """
        if number in self._kept:
            return self._kept[number]
        if self._next is None or not self._next <= number <= self._next + self._n_kept:
            self._blocks, self._next = self.source.blocks(self._shard_rows, start=number * self._shard_rows), number
        for passed in range(self._next, number + 1):
            block = next(self._blocks)
            found = block, targets_of(block, self._labels)
            self._kept[passed] = found
            while len(self._kept) > self._n_kept:
                del self._kept[min(self._kept)]
        self._next = number + 1
        if block.start + len(block) == self.source.n_rows:
            next(self._blocks, None)  # refuses a source that has more rows than when it was opened
        return found

    def sample(self, seed: int) -> Sample:
        """A seeded sample of the rows."""
        chosen = sample_rows(self.source.n_rows, seed)
        texts: list[list[str]] = [[] for _ in self.source.text_columns]
        gold = []
        for block in self.source.blocks(self._shard_rows):
            local = chosen[(chosen >= block.start) & (chosen < block.start + len(block))] - block.start
            if len(local):
                gold.append(targets_of(block, self._labels)[local])
                for column, values in zip(texts, block.texts, strict=True):
                    column += [values[i] for i in local]
        return Sample(texts=texts, labels=np.concatenate(gold))


def targets_of(block: RowBlock, labels: LabelMap | TargetMap) -> np.ndarray:
    """Targets of a block of rows.

    Raises:
        InputError: The rows have no labels.
    """
    if block.labels is None:
        raise InputError("the training rows have no labels. Name their column by --label-column.")
    return labels(block.labels, block.start)
