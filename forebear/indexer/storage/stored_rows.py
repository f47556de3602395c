"""The training rows that an index holds: texts and kept columns, each text held once; targets, predictions, losses."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import InputError, MissingStoreError
from forebear.indexer.losses.loss import Loss
from forebear.indexer.rows.arrow_text import row_bytes
from forebear.indexer.storage.arrow import column, for_each_shard, read_batches
from forebear.indexer.storage.files import IndexFiles
from forebear.indexer.storage.layout import COLUMNS

if TYPE_CHECKING:
    from typing_extensions import Self


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


class StoredRows(IndexFiles):
    """The rows of an index folder: what they are, and what the last checkpoint says of them."""

    def text_column(self, name: str) -> int:
        """Number of a text column.

        Raises:
            InputError: There is none of that name.
        """
        names = self.manifest.spec.text_columns
        if name not in names:
            raise InputError(f"{self.folder} has no text column {name!r}; it has {', '.join(names)}.")
        return names.index(name)

    def row_metadata(self) -> list[dict[bytes, bytes]]:
        """Schema metadata of each shard of ``rows/``."""
        return [batch.schema.metadata or {} for batch in self._shards("rows")]

    def _row_column(self, name: str) -> np.ndarray:
        key = ("column", name)
        if key not in self._cache:
            self._cache[key] = np.concatenate([column(batch, name) for batch in self._shards("rows")])
        return np.asarray(self._cache[key])

    @property
    def loss(self) -> Loss:
        """What the model was trained to minimise."""
        return self.manifest.spec.loss

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """What the loss compares the logits of some rows with.

        Of one label a row the gold classes, ``(n,)`` int64; else numbers, one an output, ``(n, c)`` float64.
        """
        return _wide(self.labels[rows])

    def predicted(self, rows: np.ndarray) -> np.ndarray:
        """The targets by which the last checkpoint's predictions of some rows are explained."""
        return self.loss.targets_of(_wide(self.predictions[rows]))

    @property
    def labels(self) -> np.ndarray:
        """Gold class of every row, ``(n,)`` int32; of several labels or numbers a row ``(n, c)`` float64."""
        return self._row_column("label")

    @property
    def predictions(self) -> np.ndarray:
        """Class predicted by the last checkpoint, ``(n,)`` int32; else labels or numbers, ``(n, c)`` float32."""
        return self._row_column("prediction")

    def label_texts(self, rows: np.ndarray) -> list[str]:
        """Gold targets of some rows as people read them: of one label a row its name."""
        return self._target_texts(self.labels[rows])

    def prediction_texts(self, rows: np.ndarray) -> list[str]:
        """The last checkpoint's predictions of some rows as people read them."""
        return self._target_texts(self.predictions[rows])

    def _target_texts(self, targets: np.ndarray) -> list[str]:
        return [str(text) for text in self.loss.texts(targets, self.manifest.spec.label_names)]

    @property
    def losses(self) -> np.ndarray:
        """Loss of the gold label at the last checkpoint, ``(n,)`` float32; of a classifier in nats."""
        return self._row_column("loss")

    @cached_property
    def row_texts(self) -> RowTexts:
        """The texts of all rows."""
        starts = np.array([0, *(stop for _, stop in self.manifest.shards)])
        return RowTexts(self._shards("rows"), starts, self.manifest.spec.text_columns)

    def texts(self, rows: np.ndarray) -> dict[str, pa.DictionaryArray]:
        """Text columns of the given rows, under the names they had in the training file, each text held once.

        An index that was published without texts says which row of which file each is.
        """
        return self.row_texts.columns(rows) if not self.manifest.without_texts else self._names_of(rows)

    def _names_of(self, rows: np.ndarray) -> dict[str, pa.DictionaryArray]:
        """In place of texts: ``(row 17 of train.csv)``."""
        segments = self.manifest.segments
        numbers = np.asarray(rows, dtype=np.int64).reshape(-1)
        owners = np.searchsorted([s.start for s in segments], numbers, side="right") - 1
        names = [f"(row {n - segments[o].start} of {segments[o].source})" for n, o in zip(numbers, owners, strict=True)]
        column = pa.array(names, pa.large_string()).dictionary_encode()
        return dict.fromkeys(self.manifest.spec.text_columns, column)

    def check_texts_held(self, purpose: str) -> None:
        """Refuse what needs the texts of training rows where the index was published without them.

        Args:
            purpose: What needs them, as the subject of a sentence.

        Raises:
            MissingStoreError: There are none.
        """
        if self.manifest.without_texts:
            raise MissingStoreError(
                f"{purpose} needs the texts of the training rows, and {self.folder} was published without them. Ask "
                "for methods of the head or of stored vectors, or for an index that was pushed by --with-texts; or, "
                "if you have the rows, attach their texts by --attach."
            )

    def with_texts(self, rows: Any, out: str | Path, **choices: Any) -> Self:
        """Write this index, which was published without texts, with the texts of its training rows, and open it.

        Args:
            rows: The training rows: a path, hub name or table, as ``open_rows`` takes, or a RowSource.
            out: Folder to write; must not exist.
            **choices: ``keep_columns``, ``model`` and ``device``; and those of ``open_rows``.

        Raises:
            InputError: This index has its texts.
            MismatchError: The rows are others than those that the index was built of, to the last byte of texts and
                labels; the first that differs is named.
        """
        # Named, not imported: what copies whole indexes is written in terms of this package.
        attached: Self = importlib.import_module("forebear.hub.attached").attach_texts(self, rows, out, **choices)
        return attached

    @cached_property
    def row_columns(self) -> RowColumns:
        """The columns of all rows that are kept besides texts and labels."""
        starts = np.array([0, *(stop for _, stop in self.manifest.shards)])
        names = tuple(self.manifest.columns)
        return RowColumns(self._shards(COLUMNS) if names else [], starts, names)

    def columns(self, rows: Any) -> pa.Table:
        """Columns of the given rows besides texts and labels, under their names in the training file.

        Args:
            rows: Row numbers.

        Returns:
            One line a row, in the order given: strings as dictionaries, numbers of 64 bits, true and false, dates,
            times and timestamps; no columns where the index keeps none (``manifest.columns``).
        """
        return pa.table(self.row_columns.columns(np.asarray(rows, dtype=np.int64)))

    def text_lists(self, rows: np.ndarray) -> list[list[str]]:
        """Texts of the given rows: one list a text column, in the order of encoding, as the pass takes them.

        Raises:
            MissingStoreError: The index was published without texts.
        """
        self.check_texts_held("what was asked")
        return [text_list(column) for column in self.texts(rows).values()]

    @cached_property
    def retired(self) -> np.ndarray:
        """Row numbers that were retired, ascending."""
        if not self.manifest.n_retired:
            return np.empty(0, np.int64)
        name = next(name for name in self.manifest.files if name.startswith("retired/"))
        return column(read_batches(self.checked(name)[0])[0], "row")

    @cached_property
    def live(self) -> np.ndarray:
        """Row numbers that take part in answers, ascending."""
        return np.setdiff1d(np.arange(self.manifest.n_rows), self.retired, assume_unique=True)


def _wide(stored: np.ndarray) -> np.ndarray:
    """Stored targets as the loss takes them."""
    return np.asarray(stored.astype(np.int64 if stored.dtype.kind in "iu" else np.float64))
