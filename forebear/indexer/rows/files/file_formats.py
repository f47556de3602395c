"""Readers of the file formats: each streams the rows of one source as Arrow tables, any number of times.

Values are never interpreted: "NA", "None" and "007" stay as they are. The formats:

- CSV: every column is text; quoted values may hold commas and newlines; blank lines are no rows. Another delimiter
  than the comma may be given.
- TSV: as CSV, but a tab separates and a quote is an ordinary character, as in the GLUE and HANS files. Values that hold
  tabs or newlines need CSV or JSON Lines.
- JSON Lines: one object a line, blank lines are no rows; or one array of objects. A column's type is found over the
  whole file, so it is the same in every block; values of unlike types, lists and objects are kept as JSON text.
- Parquet, and data sets of ``datasets``: as they are typed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import column_bytes
from forebear.indexer.rows.files.json_rows import DATE, TIMESTAMP, UTC_TIMESTAMP, json_kind, json_rows
from forebear.indexer.rows.files.reader import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Kinds,
    Reader,
    check_width,
    from_row,
    listed,
    reading,
)
from forebear.indexer.rows.files.text_file import ExpansionGuard, check_text, open_text

SIGNS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # what parts values, in words


def dataset_reader(name: str, dataset: Any) -> Reader:
    """Read a ``datasets.Dataset``."""
    dataset = dataset.with_format("arrow")

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with reading(name, "a data set"):
            chosen = dataset if columns is None else dataset.select_columns(columns)
            for at in range(start, len(dataset), CHUNK_ROWS):
                yield chosen[at : at + CHUNK_ROWS]

    return Reader(name, dataset.features.arrow_schema, len(dataset), tables)


def parquet_reader(name: str) -> Reader:
    """Read a Parquet file.

    Texts are read as dictionaries, also those within lists, so that one long text which a small file repeats a million
    times is held once; what is no dictionary by the schema is then spelled out a few rows at a time.
    """

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        guard = ExpansionGuard(name)
        with reading(name, "Parquet"), pq.ParquetFile(name, memory_map=True, read_dictionary=texts) as file:
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                if start < facts.num_rows:
                    batches = file.iter_batches(_batch_rows(facts, fixed_bytes), row_groups=[group], columns=columns)
                    for table in from_row(start, batches):
                        yield from _spelled_out(table, schema, guard)
                start = max(0, start - facts.num_rows)

    with reading(name, "Parquet"), pq.ParquetFile(name) as file:
        schema, n_rows = file.schema_arrow, file.metadata.num_rows
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
    check_width(name, max(len(schema), len(leaves)))
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"]
    fixed_bytes = sum(leaf.length for leaf in leaves if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY")
    return Reader(name, schema, n_rows, tables)


def _batch_rows(group: pq.RowGroupMetaData, fixed_bytes: int) -> int:
    """How many rows of a row group are decoded at once: fewer where lists are long or values of fixed length wide."""
    columns = [group.column(number) for number in range(group.num_columns)]
    listed_values = sum(column.num_values for column in columns if "." in column.path_in_schema)
    row_bytes: int = fixed_bytes + 8 * listed_values // max(1, group.num_rows)
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))


def _spelled_out(table: pa.Table, schema: pa.Schema, guard: ExpansionGuard) -> Iterator[pa.Table]:
    """Cut a table where its texts come to ``CHUNK_BYTES``, and give its columns the types of the schema."""
    wanted = [schema.field(column) for column in table.column_names]
    lengths = np.sum([column_bytes(column) for column in table.columns] or [np.zeros(len(table), np.int64)], axis=0)
    start = 0
    while start < len(table):
        stop = start + max(1, int(np.searchsorted(np.cumsum(lengths[start:]), CHUNK_BYTES, "right")))
        guard.add(int(lengths[start:stop].sum()))
        part = table.slice(start, stop - start)
        columns = [_typed(column, field_.type) for column, field_ in zip(part.columns, wanted, strict=True)]
        yield pa.Table.from_arrays(columns, schema=pa.schema(wanted, schema.metadata))
        start = stop


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if pa.types.is_dictionary(column.type) and pa.types.is_string_view(kind):  # Arrow has no cast from one to the other
        column = column.cast(pa.large_string())
    elif pa.types.is_nested(kind):  # a cast of some of the rows spells out the lists of all: copy theirs alone
        column = column.take(pa.array(np.arange(len(column))))
    return column.cast(kind)


def holds_dicts(rows: Any) -> bool:
    """Whether rows are a list of dicts, by the first of them."""
    return isinstance(rows, (list, tuple)) and bool(rows) and isinstance(rows[0], Mapping)


def _with_names(row: Any) -> dict[str, Any]:
    """A row of a list of dicts.

    Raises:
        DataError: It is no dict, or a key is no string.
    """
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise DataError(f"the rows given: {str(row)[:60]} is not a dict of columns, as the first row is.")
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}


def table_reader(table: Any) -> Reader:
    """Read a table in memory: a ``datasets.Dataset``, a pyarrow Table, a DataFrame of pandas or polars, dicts by row.

    Raises:
        DataError: It is none of these, or a column holds values of unlike types.
    """
    kind = type(table).__name__
    name = f"the {kind} given"
    library = type(table).__module__.split(".")[0]
    if holds_dicts(table):
        return memory_reader("the rows given", map(_with_names, table))
    if library == "datasets" and kind == "Dataset":
        return dataset_reader(name, table)
    if library == "datasets" and isinstance(table, dict):
        raise DataError(f"{name} has the splits {listed(map(str, table))}; give one of them, as in data['train'].")
    with reading(name, "a table of text"):
        if library == "pandas" and kind == "DataFrame":
            table = pa.Table.from_pandas(table, preserve_index=False)
        elif hasattr(table, "__arrow_c_stream__"):
            table = pa.table(table)
    if not isinstance(table, pa.Table):
        raise DataError(
            f"rows cannot be read from a {kind}; expected the name of a file, a datasets.Dataset, a pyarrow Table, a "
            "DataFrame of pandas or polars, or a list of dicts. Lists of texts are opened by rows_from_texts."
        )
    check_width(name, table.num_columns)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        chosen = table if columns is None else table.select(columns)
        for row in range(start, len(table), CHUNK_ROWS):
            yield chosen.slice(row, CHUNK_ROWS)

    return Reader(name, table.schema, len(table), tables)


def csv_reader(name: str, delimiter: str, *, quoted: bool = True, encoding: str | None = None) -> Reader:
    """Read a CSV file, or a TSV file where nothing is quoted; packed or not. Its bytes are checked now.

    Args:
        name: The file.
        delimiter: The character that parts values.
        quoted: Whether values in double quotes may hold the delimiter and line breaks.
        encoding: None: UTF-8, or what a byte order mark says.
    """
    signs = SIGNS.get(delimiter, repr(delimiter))
    how = f"{encoding or 'UTF-8'}, a header line, {signs}"
    expected = f"CSV ({how})" if quoted else f"TSV ({how}, no quoting)"
    read = pa_csv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES)
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)

    def batches(file: Any, names: list[str], columns: list[str] | None) -> Any:
        convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns)
        return pa_csv.open_csv(file, read, parse, convert)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with _reading_csv(name, expected, hint), open_text(name, encoding) as file:
            yield from from_row(start, batches(file, names, columns))

    with _reading_csv(name, expected):
        check_text(name, encoding)
        with open_text(name, encoding) as file:
            header = file.readline(CHUNK_BYTES)
            check_width(name, header.count(delimiter.encode()) + 1)
    hint = other_delimiter(header.decode(), delimiter)
    with _reading_csv(name, expected, hint), open_text(name, encoding) as file:
        names = batches(file, [], None).schema.names
    return Reader(
        name, pa.schema([(column, pa.string()) for column in names]), None, tables,
        typed=False, delimiter=delimiter, encoding=encoding, hint=hint,
    )  # fmt: skip


def other_delimiter(header: str, delimiter: str) -> str:
    """A question whether another character parts the values, where the delimiter is not in the header; else empty."""
    found = next((sign for sign in SIGNS if sign in header and sign != delimiter), None)
    if delimiter in header or found is None:
        return ""
    given = "tab" if found == "\t" else f"'{found}'"
    return f" Are its values separated by {SIGNS[found]}? If so, give --delimiter {given}."


@contextmanager
def _reading_csv(name: str, expected: str, hint: str = "") -> Iterator[None]:
    """Like ``reading``, with a clear message for a row longer than ``CHUNK_BYTES``, Arrow's "straddling object"."""
    try:
        with reading(name, expected):
            yield
    except DataError as error:
        if hint and "cannot be read as" in str(error):
            raise DataError(f"{str(error).rstrip('.')}.{hint}") from error
        if "straddling object" not in str(error):
            raise
        raise DataError(
            f"{name} cannot be read as {expected}: a row is longer than {CHUNK_BYTES >> 20} MiB."
            f"{' Is a quote opened and never closed?' if expected.startswith('CSV') else ' Is a line break lost?'} "
            "Else cut its text: a model reads the beginning."
        ) from error


def json_reader(name: str, encoding: str | None = None) -> Reader:
    """Read a file of JSON Lines or of one JSON array, packed or not; every row is checked now."""

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with reading(name, "JSON"):
            fields = list(schema) if columns is None else [schema.field(column) for column in columns]
            rows: list[dict[str, Any]] = []
            held_bytes = 0
            for number, (_where, row, n_bytes) in enumerate(json_rows(name, None, encoding)):
                if number >= start:
                    rows.append(row)
                    held_bytes += n_bytes
                if len(rows) == CHUNK_ROWS or held_bytes >= CHUNK_BYTES:
                    yield _json_table(rows, fields, kinds)
                    rows, held_bytes = [], 0
            if rows:
                yield _json_table(rows, fields, kinds)

    kinds: Kinds = {}
    n_rows = 0
    with reading(name, "JSON"):
        check_text(name, encoding)
        for n_rows, (where, row, _n_bytes) in enumerate(json_rows(name, _unique_pairs, encoding), 1):
            with reading(f"{name}, {where},", "UTF-8 text"):  # a lone surrogate, \\ud83d say, is no text
                _note_kinds(row, n_rows - 1, kinds)
            check_width(name, len(kinds))
    schema = _json_schema(kinds)
    return Reader(name, schema, n_rows, tables, kinds=kinds, encoding=encoding)


def memory_reader(name: str, rows: Iterable[dict[str, Any]]) -> Reader:
    """Read rows held in memory; columns are typed as in JSON Lines."""
    kinds: Kinds = {}
    kept: list[dict[str, Any]] = []
    for row in rows:
        with reading(name, "text"):
            _note_kinds(row, len(kept), kinds)
        kept.append(row)
    table = _json_table(kept, list(_json_schema(kinds)), kinds)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        yield (table if columns is None else table.select(columns)).slice(start)

    return Reader(name, table.schema, len(kept), tables, kinds=kinds)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} comes twice")
    return row


def _note_kinds(row: dict[str, Any], number: int, kinds: Kinds) -> None:
    for column, value in row.items():
        if column not in kinds:
            column.encode()
            kinds[column] = {"null": 0} if number else {}
        if isinstance(value, str):
            value.encode()
        kinds[column].setdefault(json_kind(value), number)
    if len(row) < len(kinds):
        for column in kinds.keys() - row.keys():
            kinds[column].setdefault("null", number)


def _json_schema(kinds: Kinds) -> pa.Schema:
    return pa.schema([(column, json_type(found.keys() - {"null"})) for column, found in kinds.items()])


_TYPES = {
    "true/false": pa.bool_(),
    DATE: pa.date32(),
    TIMESTAMP: pa.timestamp("us"),
    UTC_TIMESTAMP: pa.timestamp("us", "UTC"),
}


def json_type(kinds: set[str]) -> pa.DataType:
    """The Arrow type of a column that holds these kinds of JSON values, nulls left out."""
    if not kinds:
        return pa.null()
    if kinds == {"an integer"}:
        return pa.int64()
    if kinds <= {"an integer", "a number"}:
        return pa.float64()
    return _TYPES.get(next(iter(kinds)), pa.string()) if len(kinds) == 1 else pa.string()


def _json_table(rows: list[dict[str, Any]], fields: list[pa.Field], kinds: Kinds) -> pa.Table:
    arrays = []
    for column in fields:
        values = [row.get(column.name) for row in rows]
        if pa.types.is_floating(column.type):
            values = [None if value is None else float(value) for value in values]
        elif pa.types.is_string(column.type) and kinds[column.name].keys() - {"null", "a name"}:
            values = [
                value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                for value in values
            ]
        arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
