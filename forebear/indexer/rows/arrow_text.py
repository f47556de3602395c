"""Texts in Arrow columns: which types hold them, how many bytes rows take spelled out, and their strings held once.

A dictionary holds a text once, however often rows repeat it. A file of a few hundred bytes can so stand for gigabytes:
what is long is measured by the dictionary, and only then spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_HOLDS_BYTES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_IS_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_map)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def chunks_of(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Array]]:
    """The chunks of a column, each with the position of its first row."""
    start = 0
    for chunk in column.chunks:
        yield start, chunk
        start += len(chunk)


def column_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """How many bytes of text each row of a column takes, spelled out: ``(n,)``, 0 for null."""
    sizes = np.zeros(len(column), np.int64)
    for start, chunk in chunks_of(column):
        sizes[start : start + len(chunk)] = row_bytes(chunk)
    return sizes


def row_bytes(array: pa.Array) -> Any:
    """Bytes of text of each entry of one array; lists, maps and structs count the texts in them, numbers count 0."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        sizes = np.append(row_bytes(array.dictionary), 0)  # the last is for null
        return sizes[array.indices.cast(pa.int64()).fill_null(len(sizes) - 1).to_numpy(zero_copy_only=False)]
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary())
        kind = array.type
    if any(holds(kind) for holds in _HOLDS_BYTES):
        return pc.binary_length(array).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    if any(is_list(kind) for is_list in _IS_LIST):
        ends = np.append(0, np.cumsum(row_bytes(array.values)))
        return np.diff(ends[array.offsets.to_numpy(zero_copy_only=False)])
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        return row_bytes(values).reshape(len(array), size).sum(axis=1)
    if pa.types.is_struct(kind):
        return np.sum([row_bytes(part) for part in array.flatten()] or [np.zeros(len(array), np.int64)], axis=0)
    return np.zeros(len(array), np.int64)


def strings_of(column: pa.ChunkedArray) -> list[Any]:
    """The strings of a column, of a dictionary each held once; None for a null."""
    strings: list[Any] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            texts = chunk.dictionary.to_pylist()
            strings += [None if code is None else texts[code] for code in chunk.indices.to_pylist()]
        else:
            strings += chunk.to_pylist()
    return strings


def rechunked(tables: Iterable[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    """The rows of some tables as tables of exactly ``n_rows``, but for the last."""
    pieces: list[pa.Table] = []
    missing = n_rows
    for table in tables:
        while table.num_rows:
            pieces.append(table.slice(0, missing))
            table = table.slice(pieces[-1].num_rows)
            missing -= pieces[-1].num_rows
            if missing == 0:
                yield pa.concat_tables(pieces)
                pieces, missing = [], n_rows
    if pieces:
        yield pa.concat_tables(pieces)


def are_blank(column: pa.ChunkedArray) -> np.ndarray:
    """Whether each text is null, empty or white space alone, ``(n,)`` bool."""
    is_blank = np.ones(len(column), bool)
    for start, chunk in chunks_of(column):
        texts = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        trimmed = pc.utf8_trim_whitespace(texts.cast(pa.large_string()))
        blank = pc.equal(pc.binary_length(trimmed), 0)
        if texts is not chunk:
            blank = blank.take(chunk.indices)
        is_blank[start : start + len(chunk)] = blank.fill_null(True).to_numpy(zero_copy_only=False)
    return is_blank
