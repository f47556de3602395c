"""Text rows from any source, streamed in blocks: Parquet, JSON Lines, CSV, TSV, saved and hub data sets.

A row is named by its number, from 0 in the order of the source; equal rows stay separate. Text is never
interpreted: "NA", "None" and "007" stay as they are, and only a true null is an error. The formats:

- CSV: every column is text; quoted values may hold commas and newlines; blank lines are no rows.
- TSV: as CSV, but a tab always separates and a quote is an ordinary character, as in the GLUE and HANS
  files. Values that hold tabs or newlines need CSV or JSON Lines.
- JSON Lines: one object a line, blank lines are no rows. A column's type is found over the whole file, so
  it is the same in every block; values of unlike types, lists and objects are kept as JSON text.

Labels are integers or names. A label column that is null throughout, or -1 throughout where the integers
have names (the hub's "no label"), counts as absent unless labels are needed. Where only some rows are null,
they are refused; where only some are -1, they are refused if labels are needed, and else stay -1.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from forebear.errors import DataError

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
SINGLES = (("text", "sentence"), ("review", "content", "document", "comment", "tweet"))  # by rank
LABELS = ("label", "labels", "gold_label", "class", "target", "category")  # by rank
MAX_CLASSES = 10_000  # with more distinct values than this, a column holds no labels
CHUNK_ROWS = 4096
CHUNK_BYTES = 16 << 20  # also the longest row that a CSV file may have
TEXT_FORMATS = {"jsonl": "json", "ndjson": "json", "json": "json", "csv": "csv", "tsv": "tsv"}
FORMATS = {".parquet": "parquet", ".pq": "parquet"}
FORMATS |= {f".{end}{packed}": kind for end, kind in TEXT_FORMATS.items() for packed in ("", ".gz", ".bz2")}
FORMATS_TEXT = "a file named .parquet, .jsonl, .json, .csv or .tsv (the last four also .gz or .bz2)"
JSON_KINDS = {type(None): "null", bool: "true/false", float: "a number"}
JSON_KINDS |= {list: "a list", dict: "an object"}
INTEGER, NUMBER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.A), re.compile(r"\s*[+-]?(\d+\.\d*|\.\d+)\s*", re.A)
READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source."""

    start: int  # row number of the first row
    texts: tuple[list[str], ...]  # one list a text column, in order of encoding
    labels: list[int] | list[str] | None  # as the source has them; None without a label column
    table: pa.Table  # the rows with every column of the source

    def __len__(self) -> int:
        return len(self.texts[0])


@contextmanager
def _reading(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the source."""
    try:
        yield
    except READ_ERRORS as error:
        raise DataError(f"{name} cannot be read as {expected}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _skip(tables: Iterable[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    for table in tables:
        if n_rows < table.num_rows:
            yield table.slice(n_rows)
        n_rows = max(0, n_rows - table.num_rows)


def _rechunk(tables: Iterable[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    missing = n_rows
    for table in tables:
        while table.num_rows:
            held.append(table.slice(0, missing))
            table = table.slice(held[-1].num_rows)
            missing -= held[-1].num_rows
            if missing == 0:
                yield pa.concat_tables(held)
                held, missing = [], n_rows
    if held:
        yield pa.concat_tables(held)


@dataclass
class _Reader:
    """Streams a source's rows as tables of any size."""

    name: str
    schema: pa.Schema
    n_rows: int | None  # None where that takes a pass
    tables: Callable[[int, list[str] | None], Iterator[pa.Table]]  # from a row on; some columns or all
    typed: bool = True  # False for CSV, where a label's kind shows in its characters
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)  # JSON: first row of each kind of value


def _table_reader(name: str, table: pa.Table) -> _Reader:
    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        yield (table if columns is None else table.select(columns)).slice(start)

    return _Reader(name, table.schema, table.num_rows, tables)


def _dataset_reader(name: str, dataset: Any) -> _Reader:
    dataset = dataset.with_format("arrow")

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with _reading(name, "a data set"):
            chosen = dataset if columns is None else dataset.select_columns(columns)
            for at in range(start, len(dataset), CHUNK_ROWS):
                yield chosen[at : at + CHUNK_ROWS]

    return _Reader(name, dataset.features.arrow_schema, len(dataset), tables)


def _parquet_reader(name: str) -> _Reader:
    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with _reading(name, "Parquet"), pq.ParquetFile(name, memory_map=True) as file:
            groups = list(range(file.num_row_groups))
            while groups and start >= (size := file.metadata.row_group(groups[0]).num_rows):
                start -= size
                del groups[0]
            batches = file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=columns) if groups else ()
            yield from _skip((pa.Table.from_batches([batch]) for batch in batches), start)

    with _reading(name, "Parquet"), pq.ParquetFile(name) as file:
        return _Reader(name, file.schema_arrow, file.metadata.num_rows, tables)


def _csv_reader(name: str, delimiter: str) -> _Reader:
    quoted = delimiter == ","
    expected = "CSV (UTF-8, a header line, commas)" if quoted else "TSV (UTF-8, a header line, tabs, no quoting)"
    read = pa_csv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES)
    parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)

    def open_stream(names: list[str], columns: list[str] | None) -> Any:
        convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=columns)
        return pa_csv.open_csv(pa.input_stream(name, compression="detect"), read, parse, convert)

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with _reading(name, expected):
            batches = open_stream(names, columns)
            yield from _skip((pa.Table.from_batches([batch]) for batch in batches), start)

    with _reading(name, expected):
        names = open_stream([], None).schema.names
    return _Reader(name, pa.schema([(column, pa.string()) for column in names]), None, tables, typed=False)


def _json_reader(name: str) -> _Reader:
    def lines() -> Iterator[tuple[int, bytes]]:
        with _reading(name, "JSON Lines"), pa.input_stream(name, compression="detect") as stream:
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
            reason = f"cannot be read as JSON ({_one_line(error)})"
        else:
            if isinstance(row, dict):
                return row
            reason = f"holds {_kind_of(row)}"
        raise DataError(f"{name}: line {number} {reason}; expected JSON Lines, one object a line. Mend that line.")

    def tables(start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        with _reading(name, "JSON Lines"):
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

    kinds: dict[str, dict[str, int]] = {}
    n_rows = 0
    for n_rows, (number, line) in enumerate(lines(), 1):
        row = parse(number, line, _unique_pairs)
        with _reading(f"{name}, line {number},", "UTF-8 text"):  # a lone surrogate, \\ud83d say, is no text
            _note_kinds(row, n_rows - 1, kinds)
    schema = pa.schema([(column, _json_type(found)) for column, found in kinds.items()])
    return _Reader(name, schema, n_rows, tables, kinds=kinds)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} comes twice")
    return row


def _note_kinds(row: dict[str, Any], number: int, kinds: dict[str, dict[str, int]]) -> None:
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


def _json_type(kinds: Iterable[str]) -> pa.DataType:
    found = set(kinds) - {"null"}
    if not found:
        return pa.null()
    if found == {"an integer"}:
        return pa.int64()
    if found <= {"an integer", "a number"}:
        return pa.float64()
    return pa.bool_() if found == {"true/false"} else pa.string()


def _json_table(rows: list[dict[str, Any]], fields: list[pa.Field], kinds: dict[str, dict[str, int]]) -> pa.Table:
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


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first_null(column: pa.ChunkedArray) -> int:
    row: int = pc.index(pc.is_null(column), True).as_py()
    return row


class RowSource:
    """Text rows that can be streamed any number of times, in bounded memory.

    Made by ``open_rows`` and ``rows_from_texts``, which have checked the columns and every label.

    Attributes:
        name: What the user gave.
        text_columns: One or two names, in order of encoding.
        label_column: Name of the label column, or None.
        label_names: The names that integer labels index, where known.
        label_values: The distinct labels, sorted, as the source has them; empty without labels.
        n_rows: Number of rows.
    """

    def __init__(
        self,
        reader: _Reader,
        text_columns: tuple[str, ...],
        labels: _Labels,
        label_names: tuple[str, ...] | None,
    ) -> None:
        self._reader = reader
        self.name: str = reader.name
        self.text_columns = text_columns
        self.label_column: str | None = labels.column
        self.label_names = label_names
        self.label_values: tuple[int, ...] | tuple[str, ...] = tuple(sorted(labels.first_rows))
        self.n_rows: int = labels.n_rows

    def blocks(self, block_rows: int = 4096, start: int = 0) -> Iterator[RowBlock]:
        """Stream the rows from number ``start`` on, in blocks of exactly ``block_rows`` but for the last.

        Raises:
            DataError: A text is null, the file is broken further on, or it changed since it was opened.
        """
        if block_rows < 1 or start < 0:
            raise ValueError(f"block_rows={block_rows} and start={start}: expected at least 1 and 0")
        return self._blocks(block_rows, start, None)

    def sha256(self) -> str:
        """Digest of texts and labels in order, whatever the file format and the names of the columns."""
        digest = hashlib.sha256(f"rows of {len(self.text_columns)} texts".encode())
        columns = [*self.text_columns, *([self.label_column] if self.label_column else [])]
        for block in self._blocks(CHUNK_ROWS, 0, columns):
            for row in zip(*block.texts, block.labels or [None] * len(block), strict=True):
                digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def _blocks(self, block_rows: int, start: int, columns: list[str] | None) -> Iterator[RowBlock]:
        for table in _rechunk(self._reader.tables(start, columns), block_rows):
            end = start + len(table)
            if end > self.n_rows:
                raise DataError(f"{self.name} has more than the {self.n_rows} rows it had when opened; open it again.")
            yield RowBlock(start, self._texts(table, start), self._labels(table), table)
            start = end
        if start < self.n_rows:
            raise DataError(f"{self.name} has {start} of the {self.n_rows} rows it had when opened; open it again.")

    def _texts(self, table: pa.Table, start: int) -> tuple[list[str], ...]:
        for name in self.text_columns:
            if table.column(name).null_count:
                raise DataError(
                    f"{self.name}: row {start + _first_null(table.column(name))} (from 0) has no text, its "
                    f"{name!r} is null; expected a string, which may be empty. Drop the row or fill it."
                )
        with _reading(self.name, "text"):
            return tuple(table.column(name).to_pylist() for name in self.text_columns)

    def _labels(self, table: pa.Table) -> list[int] | list[str] | None:
        if self.label_column is None:
            return None
        labels: list[Any] = table.column(self.label_column).to_pylist()
        with _reading(self.name, "labelled text"):
            return [int(label) for label in labels] if isinstance(self.label_values[0], int) else labels


def open_rows(
    source: str | Path,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    need_labels: bool = False,
) -> RowSource:
    """Open a file, a folder of ``datasets.save_to_disk`` or a hub data set, and check its labels.

    Args:
        source: A path, ``FOLDER:SPLIT`` for a saved DatasetDict, or a hub name with its split:
            ``NAME:SPLIT``, ``OWNER/REPO:SPLIT``, ``DATASET/CONFIG:SPLIT`` (tried in this order, as in
            ``glue/sst2:train``) or ``OWNER/REPO/CONFIG:SPLIT``. A path that exists wins over a hub name.
        text_columns: One or two names, in order of encoding. Default: ``text_columns`` of a
            ``dataset.json`` beside the file, else found by name.
        label_column: Default: found by name.
        label_names: The names that integer labels index. Default: those of the ClassLabel feature, else
            ``label_names`` of a ``dataset.json`` beside the file.
        need_labels: Refuse a source in which any row has no label.

    Raises:
        DataError: The source cannot be read as (labelled) text.
    """
    reader, folder = _open_reader(str(source))
    return _make_source(reader, folder, text_columns, label_column, label_names, need_labels)


def rows_from_texts(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[int] | Sequence[str] | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
) -> RowSource:
    """Make a source of rows in memory; columns are ``text`` or ``premise, hypothesis``, and ``label``.

    Raises:
        DataError: Texts are not all strings or all pairs, or labels not all integers or all names.
    """
    name = "the rows given"
    rows = [tuple(text) if isinstance(text, (tuple, list)) else (text,) for text in texts]
    columns = tuple(text_columns or (PAIRS[0] if rows and len(rows[0]) == 2 else ("text",)))
    if labels is not None and len(labels) != len(rows):
        raise DataError(f"{name}: {len(rows)} texts but {len(labels)} labels; give one label a text.")
    data: list[dict[str, Any]] = []
    kinds: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows):
        if len(row) != len(columns) or not all(isinstance(text, str) for text in row):
            raise DataError(f"{name}: row {number} (from 0) is not {len(columns)} strings ({_listed(columns)}).")
        data.append(dict(zip(columns, row, strict=True)))
        if labels is not None:
            label: Any = labels[number]
            data[-1]["label"] = label.item() if isinstance(label, np.generic) else label
        with _reading(name, "text"):
            _note_kinds(data[-1], number, kinds)
    schema = pa.schema([(column, _json_type(found)) for column, found in kinds.items()])
    reader = _table_reader(name, _json_table(data, list(schema), kinds))
    reader.kinds = kinds
    return _make_source(reader, None, columns, None if labels is None else "label", label_names, False)


def _make_source(
    reader: _Reader,
    folder: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    need_labels: bool,
) -> RowSource:
    if reader.n_rows == 0:
        raise DataError(f"{reader.name} has no rows; expected at least one row of text.")
    columns = reader.schema.names
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{reader.name} has more than one column {repeated[0]!r}; rename all but one.")
    beside = _read_beside(folder)
    texts = _find_text_columns(reader, text_columns, beside.get("text_columns"))
    column = _find_label_column(reader, label_column, texts)
    if column is None:
        if need_labels:
            raise DataError(
                f"{reader.name} has no label column among its columns {_listed(columns)}; name it with --label-column."
            )
        labels = _Labels(None, reader.n_rows or sum(len(table) for table in reader.tables(0, [texts[0]])))
    else:
        labels = _scan_labels(reader, column)
    if labels.n_rows == 0:
        raise DataError(f"{reader.name} has no rows below its header; expected at least one row of text.")
    names = label_names if label_names is not None else _class_label_names(reader.schema, column)
    if names is None and (names := beside.get("label_names")) and labels.kind == "a name":
        names = names if labels.first_rows.keys() <= set(names) else None
    _check_labels(reader.name, labels, names, need_labels)
    return RowSource(reader, texts, labels, tuple(names) if names else None)


def _find_text_columns(
    reader: _Reader, wanted: Sequence[str] | None, recorded: Sequence[str] | None
) -> tuple[str, ...]:
    columns = reader.schema.names
    if wanted is not None:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        found = [_named(reader, column, "--text-columns") for column in chosen]
        if len(found) not in (1, 2) or len(set(found)) < len(found):
            raise DataError(f"--text-columns names {_listed(chosen)}; expected one or two different columns.")
    elif recorded and set(recorded) <= set(columns):
        found = list(recorded)
    else:
        ranks = (PAIRS, *(tuple((name,) for name in rank) for rank in SINGLES))
        lower = {column.lower() for column in columns}
        fits = next((f for rank in ranks if (f := [names for names in rank if lower >= set(names)])), [])
        if len(fits) != 1:
            problem = "has no text column known by name" if not fits else "has several columns that may be the text"
            raise DataError(
                f"{reader.name} {problem}; its columns are {_listed(columns)}. Name one, or two for a "
                f"pair, with --text-columns."
            )
        found = [_named(reader, column, "--text-columns") for column in fits[0]]
    for column in found:
        kind = reader.schema.field(column).type
        other = {k: row for k, row in reader.kinds.get(column, {}).items() if k not in ("null", "a name")}
        if other or not (_is_text(kind) or pa.types.is_null(kind)):
            held = f"{next(iter(other))} in row {min(other.values())} (from 0)" if other else str(kind)
            raise DataError(
                f"{reader.name}: text column {column!r} holds {held}; expected strings. "
                f"Mend it, or name another with --text-columns."
            )
    return tuple(found)


def _named(reader: _Reader, wanted: str, option: str) -> str:
    """Find a column by its exact name, else ignoring case."""
    columns = reader.schema.names
    found = [column for column in columns if column == wanted] or [
        column for column in columns if column.lower() == wanted.lower()
    ]
    if len(found) != 1:
        problem = f"more than one column {wanted!r} but for case" if found else f"no column {wanted!r}"
        raise DataError(f"{reader.name} has {problem}; its columns are {_listed(columns)}. Name one with {option}.")
    return str(found[0])


def _find_label_column(reader: _Reader, wanted: str | None, texts: tuple[str, ...]) -> str | None:
    if wanted is None:
        lower = {column.lower() for column in reader.schema.names if column not in texts}
        wanted = next((name for name in LABELS if name in lower), None)
        if wanted is None:
            return None
    found = _named(reader, wanted, "--label-column")
    if found in texts:
        raise DataError(f"{reader.name}: column {found!r} is named both as text and as label; name two columns.")
    return found


@dataclass
class _Labels:
    """What one pass over the label column found; ``column`` is None for an unlabelled source."""

    column: str | None
    n_rows: int
    first_rows: dict[Any, int] = field(default_factory=dict)  # each distinct label, and the first row with it
    kinds: dict[str, int] = field(default_factory=dict)  # first row of each kind, "null" included

    @property
    def kind(self) -> str | None:
        return next((kind for kind in self.kinds if kind != "null"), None)


def _scan_labels(reader: _Reader, column: str) -> _Labels:
    labels = _Labels(column, 0, kinds=dict(reader.kinds.get(column, {})))
    kind = reader.schema.field(column).type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        return _Labels(column, reader.n_rows or 0, kinds=labels.kinds or {str(kind): 0})
    plain = pa.int64() if pa.types.is_integer(kind) else pa.string()
    with _reading(reader.name, "labelled text"):
        for table in reader.tables(0, [column]):
            values = table.column(0).cast(plain)
            for value in values.unique().to_pylist():
                if value not in labels.first_rows:
                    row = _first_null(values) if value is None else pc.index(values, value).as_py()
                    labels.first_rows[value] = labels.n_rows + row
            labels.n_rows += len(table)
            if len(labels.first_rows) > MAX_CLASSES:
                raise DataError(
                    f"{reader.name}: label column {column!r} holds more than {MAX_CLASSES} different values; "
                    f"expected classes. Name another with --label-column."
                )
    found, labels.first_rows = labels.first_rows, {}
    for value, row in found.items():
        value_kind = _kind_of_label(value, reader.typed)
        if column not in reader.kinds:
            labels.kinds.setdefault(value_kind, row)
        if value_kind != "null":
            labels.first_rows.setdefault(int(value) if value_kind == "an integer" else value, row)
    return labels


def _kind_of_label(value: int | str | None, typed: bool) -> str:
    if value is None or (not typed and not str(value).strip()):
        return "null"
    if isinstance(value, int) or (not typed and INTEGER.fullmatch(value)):
        return "an integer"
    return "a number" if not typed and NUMBER.fullmatch(value) else "a name"


def _check_labels(name: str, labels: _Labels, names: Sequence[str] | None, need_labels: bool) -> None:
    """Refuse labels that are no classes; drop the label column of a wholly unlabelled source."""
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"{name}: the label names {_listed(names)} repeat a name; expected one name a class.")
    if labels.column is None:
        return
    where = f"{name}: label column {labels.column!r}"
    kinds = sorted((row, kind) for kind, row in labels.kinds.items() if kind != "null")
    if len(kinds) > 1 or (kinds and kinds[0][1] not in ("an integer", "a name")):
        held = " and ".join(f"{kind} in row {row}" for row, kind in kinds[:2])
        raise DataError(
            f"{where} holds {held} (from 0); expected integers throughout or names throughout. "
            f"Mend it, or name another with --label-column."
        )
    rows = labels.first_rows
    unlabelled = labels.kinds.get("null")
    if names and labels.kind == "an integer" and (minus_one := rows.pop(-1, None)) is not None and need_labels:
        unlabelled = minus_one if unlabelled is None else min(unlabelled, minus_one)
    if unlabelled is not None and (rows or need_labels):
        raise DataError(
            f"{where} gives no label (null, empty or -1) in row {unlabelled} (from 0); label that row or drop it."
        )
    if not rows:
        labels.column = None
    elif names and labels.kind == "an integer":
        for label, row in rows.items():
            if not 0 <= label < len(names):
                raise DataError(
                    f"{where} holds {label} in row {row} (from 0), but there are {len(names)} label names, "
                    f"{_listed(names)}; give one a class, in order, with --label-names."
                )


def _class_label_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Read the names that ``datasets`` keeps in a schema's metadata."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def _read_beside(folder: Path | None) -> dict[str, list[str]]:
    """Read ``label_names`` and ``text_columns`` from a ``dataset.json``, where there is one."""
    path = folder / "dataset.json" if folder else None
    if path is None or not path.is_file():
        return {}
    with _reading(str(path), "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    known = {key: content[key] for key in ("label_names", "text_columns") if key in content}
    for key, names in known.items():
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{path}: {key} is {json.dumps(names)}; expected a list of strings.")
    return known


def _open_reader(source: str) -> tuple[_Reader, Path | None]:
    """Open what ``source`` names, and say where a ``dataset.json`` may lie."""
    named = re.fullmatch(r"(.+?):(\w[\w.-]*(?:\[.*\])?)", source)
    head, split = named.groups() if named else (source, None)
    if source.strip() and _exists(source):
        head, split = source, None
    path = Path(head)
    if not source.strip() or not _exists(head):
        if split is None or path.name.lower().endswith(tuple(FORMATS)) or head.startswith((".", "/", "~")):
            raise DataError(
                f"no such file or folder: {head or 'an empty name'}. Expected {FORMATS_TEXT}, "
                f"a folder of save_to_disk, or a hub name with its split, as in glue/sst2:train."
            )
        return _dataset_reader(source, _load_hub(head, split)), None
    if path.is_dir():
        return _dataset_reader(source, _load_saved(path, split)), path
    if split is not None:
        raise DataError(f"{head} is a file and has no splits; leave out :{split}.")
    kind = next((kind for suffix, kind in FORMATS.items() if head.lower().endswith(suffix)), None)
    if kind is None or not path.is_file():
        raise DataError(f"{head} is no data file that forebear knows; expected {FORMATS_TEXT}.")
    if path.stat().st_size == 0:
        raise DataError(f"{head} is empty (0 bytes); expected at least one row of text.")
    if kind == "parquet":
        return _parquet_reader(head), path.parent
    return (_json_reader(head) if kind == "json" else _csv_reader(head, "," if kind == "csv" else "\t")), path.parent


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name too long, a null character
        return False


def _load_saved(folder: Path, split: str | None) -> Any:
    import datasets

    if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(tuple(FORMATS)))
        raise DataError(
            f"{folder} is no folder of datasets.save_to_disk; expected one, or a file. Data files in it: "
            f"{_listed(files)}."
        )
    with _reading(str(folder), "a saved data set"):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            found = f"no split {split!r}" if split else "several splits"
            raise DataError(
                f"{folder} has {found}; name one of {_listed(loaded)}, as in {folder}:{next(iter(loaded), 'train')}."
            )
        return loaded[split]
    if split is not None:
        raise DataError(f"{folder} is a single data set and has no splits; leave out :{split}.")
    return loaded


def _load_hub(name: str, split: str) -> Any:
    """Load ``NAME``, ``OWNER/REPO`` else ``DATASET/CONFIG``, or ``OWNER/REPO/CONFIG`` from the hub."""
    import datasets

    parts = name.split("/")
    tries: list[tuple[str, str | None]] = [(name, None)]
    if len(parts) == 2:
        tries.append((parts[0], parts[1]))
    elif len(parts) == 3:
        tries = [(f"{parts[0]}/{parts[1]}", parts[2])]
    for repo, config in tries:
        is_last = (repo, config) == tries[-1]
        try:
            return datasets.load_dataset(repo, config, split=split)
        except Exception as error:  # whatever a data set's files or names bring up
            if isinstance(error, datasets.exceptions.DatasetNotFoundError):
                reason = "the hub has no data set of that name; mend the name"
            elif isinstance(error, ConnectionError):
                reason = f"the hub cannot be reached ({_one_line(error)}); HF_HUB_OFFLINE=1 uses cached copies"
                is_last |= not datasets.config.HF_HUB_OFFLINE  # the next try would only wait as long again
            else:
                reason, is_last = f"the hub's cannot be loaded: {_one_line(error)}", True
            if is_last:
                raise DataError(f"there is no file or folder {name}:{split}, and {reason}.") from error
    raise AssertionError("no name was tried")
