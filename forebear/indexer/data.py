"""Text rows from any source, streamed in blocks: Parquet, JSON Lines, CSV, TSV, saved and hub data sets.

A row is named by its number, from 0 in the order of the source; equal rows stay separate. Text is never
interpreted: "NA", "None" and "007" stay as they are, and only a true null is an error.

Labels are integers or names. A label column that is null throughout, or -1 throughout where the integers
have names (the hub's "no label"), counts as absent unless labels are needed. Where only some rows are null,
they are refused; where only some are -1, they are refused if labels are needed, and else stay -1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import DataError
from forebear.indexer.readers import CHUNK_ROWS, Reader, listed, memory_reader, reading
from forebear.indexer.sources import open_reader, read_beside

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
SINGLES = (("text", "sentence"), ("review", "content", "document", "comment", "tweet"))  # by rank
LABELS = ("label", "labels", "gold_label", "class", "target", "category")  # by rank
MAX_CLASSES = 10_000  # with more distinct values than this, a column holds no labels
INTEGER, NUMBER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.A), re.compile(r"\s*[+-]?(\d+\.\d*|\.\d+)\s*", re.A)


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source."""

    start: int  # row number of the first row
    texts: tuple[list[str], ...]  # one list a text column, in order of encoding
    labels: list[int] | list[str] | None  # as the source has them; None without a label column
    table: pa.Table  # the rows with every column of the source

    def __len__(self) -> int:
        return len(self.texts[0])


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
        reader: Reader,
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
        with reading(self.name, "text"):
            return tuple(table.column(name).to_pylist() for name in self.text_columns)

    def _labels(self, table: pa.Table) -> list[int] | list[str] | None:
        if self.label_column is None:
            return None
        labels: list[Any] = table.column(self.label_column).to_pylist()
        with reading(self.name, "labelled text"):
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
    reader, folder = open_reader(str(source))
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

    def checked() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            if len(row) != len(columns) or not all(isinstance(text, str) for text in row):
                raise DataError(f"{name}: row {number} (from 0) is not {len(columns)} strings ({listed(columns)}).")
            named: dict[str, Any] = dict(zip(columns, row, strict=True))
            if labels is not None:
                label: Any = labels[number]
                named["label"] = label.item() if isinstance(label, np.generic) else label
            yield named

    label_column = None if labels is None else "label"
    return _make_source(memory_reader(name, checked()), None, columns, label_column, label_names, False)


def _make_source(
    reader: Reader,
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
    beside = read_beside(folder)
    texts = _find_text_columns(reader, text_columns, beside.get("text_columns"))
    column = _find_label_column(reader, label_column, texts)
    if column is None:
        if need_labels:
            raise DataError(
                f"{reader.name} has no label column among its columns {listed(columns)}; name it with --label-column."
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


def _find_text_columns(reader: Reader, wanted: Sequence[str] | None, recorded: Sequence[str] | None) -> tuple[str, ...]:
    columns = reader.schema.names
    if wanted is not None:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        found = [_named(reader, column, "--text-columns") for column in chosen]
        if len(found) not in (1, 2) or len(set(found)) < len(found):
            raise DataError(f"--text-columns names {listed(chosen)}; expected one or two different columns.")
    elif recorded and set(recorded) <= set(columns):
        found = list(recorded)
    else:
        ranks = (PAIRS, *(tuple((name,) for name in rank) for rank in SINGLES))
        lower = {column.lower() for column in columns}
        fits = next((f for rank in ranks if (f := [names for names in rank if lower >= set(names)])), [])
        if len(fits) != 1:
            problem = "has no text column known by name" if not fits else "has several columns that may be the text"
            raise DataError(
                f"{reader.name} {problem}; its columns are {listed(columns)}. Name one, or two for a "
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


def _named(reader: Reader, wanted: str, option: str) -> str:
    """Find a column by its exact name, else ignoring case."""
    columns = reader.schema.names
    found = [column for column in columns if column == wanted] or [
        column for column in columns if column.lower() == wanted.lower()
    ]
    if len(found) != 1:
        problem = f"more than one column {wanted!r} but for case" if found else f"no column {wanted!r}"
        raise DataError(f"{reader.name} has {problem}; its columns are {listed(columns)}. Name one with {option}.")
    return str(found[0])


def _find_label_column(reader: Reader, wanted: str | None, texts: tuple[str, ...]) -> str | None:
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


def _scan_labels(reader: Reader, column: str) -> _Labels:
    labels = _Labels(column, 0, kinds=dict(reader.kinds.get(column, {})))
    kind = reader.schema.field(column).type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        return _Labels(column, reader.n_rows or 0, kinds=labels.kinds or {str(kind): 0})
    plain = pa.int64() if pa.types.is_integer(kind) else pa.string()
    found: dict[Any, int] = {}  # each distinct value, and the first row with it
    with reading(reader.name, "labelled text"):
        for table in reader.tables(0, [column]):
            values = table.column(0).cast(plain)
            for value in values.unique().to_pylist():
                if value not in found:
                    row = _first_null(values) if value is None else pc.index(values, value).as_py()
                    found[value] = labels.n_rows + row
            labels.n_rows += len(table)
            if len(found) > MAX_CLASSES:
                raise DataError(
                    f"{reader.name}: label column {column!r} holds more than {MAX_CLASSES} different values; "
                    f"expected classes. Name another with --label-column."
                )
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
        raise DataError(f"{name}: the label names {listed(names)} repeat a name; expected one name a class.")
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
                    f"{listed(names)}; give one a class, in order, with --label-names."
                )


def _class_label_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Read the names that ``datasets`` keeps in a schema's metadata."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
