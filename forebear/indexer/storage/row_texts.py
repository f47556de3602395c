"""Texts and kept columns of training rows: each text held once, however many rows have it and are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.indexer.rows.arrow_text import row_bytes
from forebear.indexer.storage.arrow import for_each_shard


class RowTexts:
    """The text columns of an index, spread over memory-mapped shards in row order."""

    def __init__(self, shards: Sequence[pa.RecordBatch], starts: np.ndarray, names: Sequence[str]) -> None:
        """Keep the shards; no text is read before it is asked for.

        Args:
            shards: Record batches with the columns ``text_0`` and perhaps ``text_1``.
            starts: First row of each shard, and one past the last, ``(shards + 1,)``.
            names: The columns' names in the training file.
        """
        self._shards, self._starts, self._names = shards, starts, names

    def columns(self, rows: np.ndarray) -> dict[str, pa.DictionaryArray]:
        """Text columns of the given rows: dictionaries whose texts have 64-bit offsets."""
        distinct, places = np.unique(np.asarray(rows, dtype=np.int64).reshape(-1), return_inverse=True)
        return {name: self._column(f"text_{i}", distinct, places) for i, name in enumerate(self._names)}

    def _column(self, name: str, distinct: np.ndarray, places: np.ndarray) -> pa.DictionaryArray:
        """A text column of the rows ``distinct[places]``, taken shard by shard (a take over all would copy them)."""
        parts = [pa.array([], pa.large_string())]

        def visit(shard: int, _positions: np.ndarray, local: np.ndarray) -> None:
            parts.append(self._shards[shard].column(name).take(pa.array(local)).cast(pa.large_string()))

        for_each_shard(self._starts, distinct, visit)
        texts = pa.concat_arrays(parts).dictionary_encode()
        return pa.DictionaryArray.from_arrays(texts.indices.take(pa.array(places)), texts.dictionary)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each row's texts together, ``(n,)`` int64."""
        lengths = [
            np.concatenate([pc.binary_length(shard.column(f"text_{i}")).to_numpy() for shard in self._shards])
            for i in range(len(self._names))
        ]
        return np.asarray(np.sum(lengths, axis=0, dtype=np.int64))


class RowColumns:
    """The columns of an index besides texts and labels, spread over memory-mapped shards in row order."""

    def __init__(self, shards: Sequence[pa.RecordBatch], starts: np.ndarray, names: Sequence[str]) -> None:
        """Keep the shards.

        Args:
            shards: Record batches with a column of each name; strings are dictionaries.
            starts: First row of each shard, and one past the last, ``(shards + 1,)``.
            names: The columns' names in the training file.
        """
        self._shards, self._starts, self._names = shards, starts, names

    def columns(self, rows: np.ndarray) -> dict[str, pa.Array]:
        """The columns of the given rows."""
        distinct, places = np.unique(np.asarray(rows, dtype=np.int64).reshape(-1), return_inverse=True)
        return {name: self._column(name, distinct).take(pa.array(places)) for name in self._names}

    def _column(self, name: str, distinct: np.ndarray) -> pa.Array:
        parts = [self._shards[0].column(name).slice(0, 0)]
        for_each_shard(
            self._starts,
            distinct,
            lambda shard, _positions, local: parts.append(self._shards[shard].column(name).take(pa.array(local))),
        )
        return one_array(parts)

    def whole(self, name: str) -> pa.Array:
        """One column of every row, ``(n,)``."""
        return one_array([shard.column(name) for shard in self._shards])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each row's strings together, ``(n,)`` int64."""
        sizes = np.zeros(int(self._starts[-1]), np.int64)
        for name in self._names:
            for shard, start in zip(self._shards, self._starts, strict=False):
                sizes[start : start + len(shard)] += row_bytes(shard.column(name))
        return sizes


def one_array(parts: Sequence[pa.Array]) -> pa.Array:
    """Arrays of one type as one; of dictionaries, each with values of its own, too."""
    return pa.chunked_array(parts).unify_dictionaries().combine_chunks()


def text_list(column: pa.DictionaryArray) -> list[str]:
    """A column of :class:`RowTexts` as a list; what occurs twice in it is one object."""
    distinct = column.dictionary.to_pylist()
    return [distinct[i] for i in column.indices.to_pylist()]
