"""Columns of training rows besides texts and labels (id, source, annotator, date): which are kept, and as what type.

A few types hold all of them, so that equal values give equal bytes wherever they come from: strings (dictionaries),
64-bit integers and floats, true and false, dates, times and timestamps in microseconds. A NaN is a null. Lists, objects
and all other types are not kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import InputError, MismatchError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.files.reader import listed, reading
from forebear.indexer.rows.row_source import RowSource
from forebear.wording import worded

ALL, NONE = "all", "none"
STRING = pa.dictionary(pa.int32(), pa.large_string())
KINDS = {  # by name, as the manifest of an index has them
    "string": STRING,
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "timestamp UTC": pa.timestamp("us", "UTC"),
}
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def kind_of(kind: pa.DataType | str) -> str | None:
    """The name in :data:`KINDS` under which a column of an Arrow type is kept; None where it cannot be."""
    if isinstance(kind, str):  # JSON values that are no scalars
        return None
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "uint64" if kind == pa.uint64() else "int64"
    if pa.types.is_timestamp(kind):
        return "timestamp" if kind.tz is None else "timestamp UTC"
    tests = {
        "string": is_text, "float64": pa.types.is_floating, "bool": pa.types.is_boolean, "date": pa.types.is_date,
        "time": pa.types.is_time,
    }  # fmt: skip
    return next((name for name, is_kind in tests.items() if is_kind(kind)), None)


def choose_columns(source: RowSource, wanted: Sequence[str]) -> dict[str, str]:
    """The columns of a source that are kept, and their kinds, in the order of the source.

    Args:
        source: Training rows.
        wanted: Names; or ``all``: every column of scalar values but texts and labels; or ``none``, or empty.

    Raises:
        InputError: A column that is named is missing, is a text or the label, or cannot be kept.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    others = source.other_columns()
    kinds = {name: kind for name, given in others.items() if (kind := kind_of(given)) is not None}
    if names == [ALL]:
        return {name: kind for name, kind in kinds.items() if not _PANDAS_INDEX.fullmatch(name)}
    if names == [NONE]:
        return {}
    names = [only_match([*others, *source.text_columns], name) or name for name in names]
    for name in names:
        if name in (*source.text_columns, *source.label_columns):
            raise InputError(
                f"--keep-columns {name}: it holds the texts or labels, which are kept anyway. Leave it out."
            )
        if name not in others:
            has = f"its other columns are {listed(others)}" if others else "it has none besides texts and labels"
            raise InputError(f"--keep-columns {name}: {source.name} has no such column; {has}.")
        if name not in kinds:
            raise InputError(
                f"--keep-columns {name}: it holds {others[name]}, which is not kept; expected strings, numbers, true "
                "and false, dates or times."
            )
    return {name: kind for name, kind in kinds.items() if name in names}


def only_match(names: Iterable[str], wanted: str) -> str | None:
    """The name that is wanted, else the only one that is it but for case and white space around it; None without."""
    names = list(names)
    if wanted in names:
        return wanted
    alike = [name for name in names if name.strip().lower() == wanted.strip().lower()]
    return alike[0] if len(alike) == 1 else None


def check_columns(source: RowSource, kept: Mapping[str, str], where: str) -> str | None:
    """Refuse rows whose values do not fit the columns that an index keeps.

    Args:
        source: Rows that are appended.
        kept: Columns of the index, by name, and their kinds.
        where: The index.

    Returns:
        A line on columns that the rows lack, whose values are null; None where they have all.

    Raises:
        MismatchError: A column has another kind.
    """
    others = source.other_columns()
    for name, kind in kept.items():
        given = others.get(name, pa.null())
        if given != pa.null() and kind_of(given) != kind:
            raise MismatchError(
                f"{source.name}: column {name!r} holds {kind_of(given) or given}, {where} keeps it as {kind}. Give the "
                "rows with the same type (in CSV and TSV every value is a string), or without the column."
            )
    missing = [name for name in kept if name not in others]
    if not missing:
        return None
    return f"{source.name} has no column {listed(missing)}, which {where} keeps: null for these rows"


def stored_columns(table: pa.Table, kept: Mapping[str, str]) -> dict[str, pa.Array]:
    """The kept columns of some rows as an index stores them; null where the rows have no such column."""
    return {
        name: _stored(table.column(name) if name in table.column_names else None, KINDS[kind], len(table))
        for name, kind in kept.items()
    }


def _stored(column: pa.ChunkedArray | None, kind: pa.DataType, n_rows: int) -> pa.Array:
    plain = pa.large_string() if kind == STRING else kind
    if column is None or pa.types.is_null(column.type):
        values = pa.nulls(n_rows, plain)
    else:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_timestamp(column.type) or pa.types.is_time(column.type):
            column = pc.cast(column, kind, safe=False)  # nanoseconds are cut
        values = column.cast(plain).combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.nulls(0, plain)
        if pa.types.is_floating(plain):
            values = pc.if_else(pc.is_nan(values), None, values)
    if kind != STRING:
        return _with_plain_nulls(values)
    encoded = values.dictionary_encode()
    return pa.DictionaryArray.from_arrays(_with_plain_nulls(encoded.indices), encoded.dictionary)


def _with_plain_nulls(values: pa.Array) -> pa.Array:
    """Equal values with equal bytes: a null may lie over any number, such as NaN of a DataFrame."""
    is_there = values.is_valid().to_numpy(zero_copy_only=False)
    return values.drop_null().take(pa.array(np.cumsum(is_there) - 1, mask=~is_there))


def columns_sha256(source: RowSource, kept: Mapping[str, str]) -> str | None:
    """Digest of the kept columns' kinds and values, in row order, whatever the file format; None without any.

    Passes over the rows once.

    Raises:
        DataError: A value cannot be read, such as a string that is no UTF-8.
    """
    if not kept:
        return None
    digest = hashlib.sha256(json.dumps(dict(kept)).encode())
    for table in source.tables([name for name in kept if name in source.other_columns()]):
        columns = []
        for name, column in stored_columns(table, kept).items():
            with reading(f"{source.name}: column {name!r}", worded(f"{kept[name]} (leave it out by --keep-columns)")):
                columns.append(column.to_pylist())
        for row in zip(*columns, strict=True):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()
