"""Arrow files of an index: written whole, memory-mapped back, hashed by their raw bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import CorruptIndexError, first_line, is_out_of_memory
from forebear.indexer.storage.atomic import atomic_file

_HASH_CHUNK_BYTES = 1 << 22


def write_table(path: Path, batches: Sequence[pa.RecordBatch] | Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write record batches of one schema as an Arrow IPC file, atomically. Same data, same bytes."""
    with atomic_file(path) as handle, pa.ipc.new_file(handle, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_columns(
    path: Path, columns: Mapping[str, pa.Array | np.ndarray], metadata: dict[bytes, bytes] | None = None
) -> None:
    """Write one record batch, with ``metadata`` in its schema; 2-D arrays become fixed-size lists."""
    batch = record_batch(columns).replace_schema_metadata(metadata)
    write_table(path, [batch], batch.schema)


def record_batch(columns: Mapping[str, pa.Array | np.ndarray]) -> pa.RecordBatch:
    """One record batch of the given columns; a 2-D array ``(n, d)`` becomes ``fixed_size_list[d]``."""
    arrays = [_to_arrow(values) if isinstance(values, np.ndarray) else values for values in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """Memory-map an Arrow IPC file.

    Raises:
        CorruptIndexError: The file is missing, truncated or no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptIndexError(f"{path} cannot be read as Arrow ({first_line(error)}). {MEND}") from error


MEND = "Restore it from a copy, or build the index again with --force."


def column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Zero-copy view of a numeric column: ``(n,)``, or ``(n, d)`` for a fixed-size list."""
    values = batch.column(name)
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        return np.asarray(values.flatten().to_numpy(zero_copy_only=True).reshape(-1, width))
    return np.asarray(values.to_numpy(zero_copy_only=True))


def file_sha256(path: Path) -> str:
    """Digest of a file's raw bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class RowMatrix:
    """Rows of one numeric column, spread over memory-mapped shards in row order, ``(n, d)``."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in self.shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        """Width d of the rows."""
        return int(self.shards[0].shape[1])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row number, rows) of each shard."""
        for start, shard in zip(self.starts, self.shards, strict=False):
            yield int(start), shard

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copy of the given rows, ``(..., d)``, in the order given."""
        flat = np.asarray(rows, dtype=np.int64).reshape(-1)
        out = np.empty((len(flat), *self.shards[0].shape[1:]), self.shards[0].dtype)
        for_each_shard(self.starts, flat, lambda i, positions, local: out.__setitem__(positions, self.shards[i][local]))
        return out.reshape(*np.shape(rows), *out.shape[1:])


def for_each_shard(starts: np.ndarray, rows: np.ndarray, visit: Callable[[int, np.ndarray, np.ndarray], Any]) -> None:
    """Call ``visit(shard, positions in rows, positions in shard)`` for every shard that ``rows`` touches."""
    order = np.argsort(rows, kind="stable")
    cuts = np.searchsorted(rows[order], starts)
    for i in range(len(starts) - 1):
        positions = order[cuts[i] : cuts[i + 1]]
        if len(positions):
            visit(i, positions, rows[positions] - starts[i])
