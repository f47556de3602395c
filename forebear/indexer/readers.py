"""Readers of the file formats: each streams the rows of one source as Arrow tables, any number of times.

Values are never interpreted: "NA", "None" and "007" stay as they are. The formats:

- CSV: every column is text; quoted values may hold commas and newlines; blank lines are no rows.
- TSV: as CSV, but a tab always separates and a quote is an ordinary character, as in the GLUE and HANS
  files. Values that hold tabs or newlines need CSV or JSON Lines.
- JSON Lines: one object a line, blank lines are no rows. A column's type is found over the whole file, so
  it is the same in every block; values of unlike types, lists and objects are kept as JSON text.
- Parquet, and data sets of ``datasets``: as they are typed.
"""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from forebear.errors import DataError

CHUNK_ROWS = 4096
CHUNK_BYTES = 16 << 20  # also the longest row that a CSV file may have
JSON_KINDS = {type(None): "null", bool: "true/false", float: "a number", list: "a list", dict: "an object"}
READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, TypeError, OverflowError, RecursionError)

Kinds = dict[str, dict[str, int]]  # by column: each kind of value in it, and the first row of that kind


@contextmanager
def reading(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the source."""
    try:
        yield
    except READ_ERRORS as error:
        raise DataError(f"{name} cannot be read as {expected}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line of some 300 characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def listed(names: Iterable[str]) -> str:
    """Names for a message, ``none`` where there are none."""
    return ", ".join(names) or "none"


@dataclass
class Reader:
    """Streams a source's rows as tables of any size.

    Attributes:
        name: What the user gave.
        schema: Every column.
        n_rows: Number of rows; None where that takes a pass.
        tables: Given a row number and some columns (None: all), the tables from that row on.
        typed: False for CSV, where a label's kind shows in its characters.
        kinds: For JSON values, the first row of each kind in a column; else empty.
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    tables: Callable[[int, list[str] | None], Iterator[pa.Table]]
    typed: bool = True
    kinds: Kinds = field(default_factory=dict)


def _from_row(start: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    for batch in batches:
        if start < batch.num_rows:
            yield pa.Table.from_batches([batch.slice(start)])
        start = max(0, start - batch.num_rows)


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
    """Read a Parquet file."""

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with reading(name, "Parquet"), pq.ParquetFile(name, memory_map=True) as file:
            groups = list(range(file.num_row_groups))
            while groups and start >= (size := file.metadata.row_group(groups[0]).num_rows):
                start -= size
                del groups[0]
            batches = file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=columns) if groups else ()
            yield from _from_row(start, batches)

    with reading(name, "Parquet"), pq.ParquetFile(name) as file:
        return Reader(name, file.schema_arrow, file.metadata.num_rows, tables)


def csv_reader(name: str, delimiter: str) -> Reader:
    """Read a CSV file, or a TSV file where ``delimiter`` is a tab; packed or not."""
    quoted = delimiter == ","
    expected = "CSV (UTF-8, a header line, commas)" if quoted else "TSV (UTF-8, a header line, tabs, no quoting)"
    read = pa_csv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES)
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)

    def open_stream(names: list[str], columns: list[str] | None) -> Any:
        convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns)
        return pa_csv.open_csv(pa.input_stream(name, compression="detect"), read, parse, convert)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with reading(name, expected):
            yield from _from_row(start, open_stream(names, columns))

    with reading(name, expected):
        names = open_stream([], None).schema.names
    return Reader(name, pa.schema([(column, pa.string()) for column in names]), None, tables, typed=False)


def json_reader(name: str) -> Reader:
    """Read a JSON Lines file, packed or not; every line is checked now."""

    def lines() -> Iterator[tuple[int, bytes]]:
        with reading(name, "JSON Lines"), pa.input_stream(name, compression="detect") as stream:
            file = io.BufferedReader(stream)
            if file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise DataError(f"{name} is a JSON array; expected JSON Lines, one object a line. Save it so.")
            if file.peek(3).startswith(codecs.BOM_UTF8):
                file.read(3)
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())

    def parse(number: int, line: bytes, hook: Any = None) -> dict[str, Any]:
        try:
            row = json.loads(line.decode(), object_pairs_hook=hook)
        except (ValueError, RecursionError) as error:
            reason = f"cannot be read as JSON ({one_line(error)})"
        else:
            if isinstance(row, dict):
                return row
            reason = f"holds {_kind_of(row)}"
        raise DataError(f"{name}: line {number} {reason}; expected JSON Lines, one object a line. Mend that line.")

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with reading(name, "JSON Lines"):
            fields = list(schema) if columns is None else [schema.field(column) for column in columns]
            rows: list[dict[str, Any]] = []
            n_bytes = 0
            for row, (number, line) in enumerate(lines()):
                if row >= start:
                    rows.append(parse(number, line))
                    n_bytes += len(line)
                if len(rows) == CHUNK_ROWS or n_bytes >= CHUNK_BYTES:
                    yield _json_table(rows, fields, kinds)
                    rows, n_bytes = [], 0
            if rows:
                yield _json_table(rows, fields, kinds)

    kinds: Kinds = {}
    n_rows = 0
    for n_rows, (number, line) in enumerate(lines(), 1):
        row = parse(number, line, _unique_pairs)
        with reading(f"{name}, line {number},", "UTF-8 text"):  # a lone surrogate, \\ud83d say, is no text
            _note_kinds(row, n_rows - 1, kinds)
    schema = _json_schema(kinds)
    return Reader(name, schema, n_rows, tables, kinds=kinds)


def memory_reader(name: str, rows: Iterable[dict[str, Any]]) -> Reader:
    """Read rows held in memory; columns are typed as in JSON Lines."""
    kinds: Kinds = {}
    held: list[dict[str, Any]] = []
    for row in rows:
        with reading(name, "text"):
            _note_kinds(row, len(held), kinds)
        held.append(row)
    table = _json_table(held, list(_json_schema(kinds)), kinds)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        yield (table if columns is None else table.select(columns)).slice(start)

    return Reader(name, table.schema, len(held), tables, kinds=kinds)


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
        kinds[column].setdefault(_kind_of(value), number)
    if len(row) < len(kinds):
        for column in kinds.keys() - row.keys():
            kinds[column].setdefault("null", number)


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "a name"
    if type(value) is int:
        return "an integer" if -(2**63) <= value < 2**63 else "a long integer"
    return JSON_KINDS.get(type(value), f"a value of type {type(value).__name__}")


def _json_schema(kinds: Kinds) -> pa.Schema:
    return pa.schema([(column, _json_type(found.keys() - {"null"})) for column, found in kinds.items()])


def _json_type(kinds: set[str]) -> pa.DataType:
    if not kinds:
        return pa.null()
    if kinds == {"an integer"}:
        return pa.int64()
    if kinds <= {"an integer", "a number"}:
        return pa.float64()
    return pa.bool_() if kinds == {"true/false"} else pa.string()


def _json_table(rows: list[dict[str, Any]], fields: list[pa.Field], kinds: Kinds) -> pa.Table:
    arrays = []
    for column in fields:
        values = [row.get(column.name) for row in rows]
        if pa.types.is_floating(column.type):
            values = [None if value is None else float(value) for value in values]
        elif pa.types.is_string(column.type) and kinds[column.name].keys() - {"null", "a name"}:
            values = [
                value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for value in values
            ]
        arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
