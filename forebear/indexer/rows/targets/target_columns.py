"""Targets that are no one class: any number of labels a row, or numbers, and how a file holds them.

**Several labels a row.** What a row has is a dictionary from label to value: 1, or a share between 0 and 1; labels that
it does not have are left out. It is read from

- several columns, one a label, of 0 and 1 (also true and false, or shares), which ``--label-column`` names; a -1 in
  one, which data sets write where a row was not judged, is no value;
- a column of lists: of names or of numbers of labels; or of vectors, one 0 or 1 (or share) a label, which it is where
  all lists are as long and hold nothing but numbers from 0 to 1;
- a column of text, each cell a list as JSON or Python writes one; or labels parted by the one of ``;``, ``|`` and ``,``
  that occurs in the column.

An empty list says that a row has none of the labels. An empty cell of text says nothing: it is a missing target.

**Numbers.** One column is one number a row; several columns are as many.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.files.file_formats import Reader, listed, reading
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION, RowFormat

Label = int | str
Target = dict[Label, float] | list[float]  # labels and their values, or numbers
NO_VALUE = -1  # of one label, in several columns
Found = dict[Label, float] | list[float] | int | None  # a row's target; or what it has instead of one
Read = Callable[[tuple[Any, ...]], Found]  # from a row's values
SIGNS = (";", "|", ",")  # what may part the labels in a cell of text
MOST_LABELS = 10_000
LARGEST_NUMBER = 1e18  # whose square float32 holds


class _Unfit(Exception):
    """A value that is no target; the message says what it is, and what is expected."""


@dataclass
class TargetColumns:
    """What one pass over the label columns found; the counterpart of ``LabelColumn``.

    Attributes:
        problem_type: ``MULTI_LABEL`` or ``REGRESSION``.
        columns: Names of the columns.
        n_rows: Number of rows of the file.
        decode: Targets of a table's rows; None: no target; ``NO_VALUE``: marked as such.
        width: Number of labels, where the file says it: by its columns or the length of its vectors; else 0.
        first_rows: Each label that occurs, and the first row with it.
        n_rows_with: In how many rows each label occurs.
        n_unlabelled: Number of rows without a target.
        n_marked: Of these, rows that are marked by -1.
        first_unlabelled: The first row without a target; None where all have one.
        marks: What marks rows, where there are such.
    """

    problem_type: str
    columns: tuple[str, ...]
    n_rows: int
    decode: Callable[[pa.Table, int], list[Found]]
    width: int = 0
    first_rows: dict[Label, int] = field(default_factory=dict)
    n_rows_with: dict[Label, int] = field(default_factory=dict)
    n_unlabelled: int = 0
    n_marked: int = 0
    first_unlabelled: int | None = None
    marks: tuple[Label, ...] = ()

    @property
    def column(self) -> str | None:
        """The columns, as ``--label-column`` takes them."""
        return ",".join(self.columns) or None

    def n_rows_of(self, label: Label) -> int:
        """In how many rows a label occurs."""
        return self.n_rows_with.get(label, 0)

    def of(self, table: pa.Table, start: int = 0) -> list[Target | None]:
        """The targets of some rows, from a table as the reader gives it; ``start`` is its first row, for messages."""
        return [target if isinstance(target, (dict, list)) else None for target in self.decode(table, start)]


def scan_targets(reader: Reader, columns: Sequence[str], problem_type: str) -> TargetColumns:
    """Pass over the label columns: how they hold targets, which labels occur, and where targets are missing.

    Raises:
        DataError: A value is no target of this kind; the row is named.
    """
    read, width = (_numbers_of(reader, columns), len(columns)) if problem_type == REGRESSION else (None, 0)
    if read is None:
        read, width = _labels_in_columns(columns) if len(columns) > 1 else _labels_in_one(reader, columns[0])

    def decode(table: pa.Table, start: int) -> list[Found]:
        values = [table.column(column).to_pylist() for column in columns]
        out: list[Found] = []
        try:
            for row in zip(*values, strict=True):
                out.append(read(row))  # noqa: PERF401  # its length says which row an error is of
        except _Unfit as error:
            where = f"{reader.name}: label column {listed(columns)}"
            raise DataError(f"{where} holds, in row {start + len(out)} (from 0), {error}") from error
        return out

    scan = TargetColumns(problem_type, tuple(columns), 0, decode, width)
    if len(columns) > 1 and problem_type == MULTI_LABEL:
        scan.n_rows_with = dict.fromkeys(columns, 0)
    for start, table in _tables(reader, columns):
        for row, target in enumerate(decode(table, start), start):
            if not isinstance(target, (dict, list)):
                scan.n_unlabelled += 1
                scan.n_marked += target == NO_VALUE
                scan.first_unlabelled = row if scan.first_unlabelled is None else scan.first_unlabelled
            if isinstance(target, dict):
                for label in target:
                    scan.first_rows.setdefault(label, row)
                    scan.n_rows_with[label] = scan.n_rows_with.get(label, 0) + 1
        scan.n_rows += len(table)
        if len(scan.first_rows) > MOST_LABELS:
            raise DataError(
                f"{reader.name}: label column {listed(columns)} holds more than {MOST_LABELS:,} different labels. Name "
                "another with --label-column."
            )
    scan.marks = (NO_VALUE,) if scan.n_marked else ()
    return scan


def check_targets(name: str, scan: TargetColumns, unlabelled: str, *, need_labels: bool) -> None:
    """Refuse missing targets where all are needed; drop the columns where no row has a target.

    Args:
        name: Name of the source.
        scan: The scanned columns; changed in place.
        unlabelled: What becomes of rows without a target; see :mod:`~.label_column`. ``keep`` means nothing here.
        need_labels: Whether rows without a target are refused, unless they are left out.

    Raises:
        DataError: As said; the first such row is named.
    """
    n_refused = {"drop": 0, "drop-marked": scan.n_unlabelled - scan.n_marked}.get(unlabelled, scan.n_unlabelled)
    if scan.n_unlabelled and need_labels and (n_refused or scan.n_unlabelled == scan.n_rows):
        what = "number" if scan.problem_type == REGRESSION else "labels"
        raise DataError(
            f"{name}: label column {listed(scan.columns)} gives no {what} in {scan.n_unlabelled:,} of {scan.n_rows:,} "
            f"rows, first in row {scan.first_unlabelled} (from 0): null, NaN, empty or -1. Leave those rows out by "
            "--unlabelled drop, or fill them in"
            + ("." if what == "number" else " (an empty list says: none of the labels).")
        )
    if scan.n_unlabelled == scan.n_rows:
        scan.columns = ()


def names_of_targets(
    name: str, scan: TargetColumns, given: Sequence[str] | None, like: RowFormat
) -> Sequence[str] | None:
    """The names that numbers of labels index: as given, those of the columns, or as remembered; None: there are none.

    Raises:
        DataError: There are not as many names as labels.
    """
    names = given or (scan.columns if len(scan.columns) > 1 else None)
    if names is None and like.label_names and any(isinstance(label, int) for label in scan.first_rows):
        names = like.label_names
    highest = max((label for label in scan.first_rows if isinstance(label, int)), default=-1)
    n_labels = max(scan.width, highest + 1)
    if names is not None and (highest >= len(names) or (scan.width and scan.width != len(names))):
        raise DataError(
            f"{name}: label column {listed(scan.columns)} holds {n_labels} labels, but there are {len(names)} label "
            f"names, {listed(names)}; give one a label, in order, with --label-names."
        )
    return names


def holds_lists(reader: Reader, column: str) -> bool:
    """Whether a column holds lists, by its type or, of JSON, by its values."""
    kind = reader.schema.field(column).type
    return _is_list(kind) or reader.kinds.get(column, {}).keys() - {"null"} == {"a list"}


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _tables(reader: Reader, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    with reading(reader.name, "labelled text"):
        for table in reader.tables(0, list(columns)):
            yield start, table
            start += len(table)


def number_in(value: Any) -> float | None:
    """A cell as a number; None where it is null, blank or NaN.

    Raises:
        _Unfit: It is no finite number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _Unfit(f"{_shown(value)}; expected a number.") from None
    if math.isnan(number):
        return None
    if not abs(number) <= LARGEST_NUMBER:
        raise _Unfit(f"{_shown(value)}; expected a number up to {LARGEST_NUMBER:g}, since losses are its squares.")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def _numbers_of(reader: Reader, columns: Sequence[str]) -> Read:
    for column in columns:
        if holds_lists(reader, column):
            raise DataError(
                f"{reader.name}: label column {column!r} holds lists; a regression takes a number a row, or several "
                "columns of numbers. Name them with --label-column."
            )

    def read(row: tuple[Any, ...]) -> Found:
        numbers = [number_in(value) for value in row]
        return None if None in numbers else [number for number in numbers if number is not None]

    return read


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise _Unfit(f"{value:g}; expected 0, 1, or a share between them, for each label.")
    return int(value) if value in (0, 1) else value


def _ordered(target: dict[Any, float]) -> Target:
    """A row's labels without those that it has not, in one order, so that the same labels have the same digest."""
    return {label: target[label] for label in sorted(target, key=str) if target[label]}


def _word(value: Any) -> Any:
    """``true`` and ``false`` as files of text spell them."""
    return {"true": 1, "false": 0}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _labels_in_columns(columns: Sequence[str]) -> tuple[Read, int]:
    def read(row: tuple[Any, ...]) -> Found:
        values = [number_in(_word(value)) for value in row]
        if NO_VALUE in values:
            return NO_VALUE
        if None in values:
            return None
        return _ordered({c: _share(v) for c, v in zip(columns, values, strict=True) if v is not None})

    return read, len(columns)


def _labels_in_one(reader: Reader, column: str) -> tuple[Read, int]:
    """How the lists of a column are read, and the length of its vectors; 0 where they are lists of labels."""
    as_text = is_text(reader.schema.field(column).type) or pa.types.is_null(reader.schema.field(column).type)
    if not as_text and not holds_lists(reader, column):
        raise DataError(
            f"{reader.name}: label column {column!r} holds one value a row; expected lists of labels, or several "
            "columns of 0 and 1 by --label-column a,b,c. For one label a row leave --problem-type out."
        )
    sign, lengths, are_shares = _sign_of_text(reader, column) if as_text else None, set(), True
    for _, table in _tables(reader, [column]):
        for value in table.column(0).to_pylist():
            try:
                members = _members(value, sign)
            except _Unfit:  # refused with its row when it is decoded
                continue
            if members is not None:
                lengths.add(len(members))
                are_shares &= all(isinstance(v, (bool, int, float)) and 0 <= v <= 1 for v in members)
    width = lengths.pop() if are_shares and len(lengths) == 1 and min(lengths) > 1 else 0

    def read(row: tuple[Any, ...]) -> Found:
        members = _members(row[0], sign)
        if members is None:
            return None
        if width:
            return _ordered({label: _share(value) for label, value in enumerate(members)})
        return _ordered(dict.fromkeys(map(_label, members), 1))

    return read, width


def _members(value: Any, sign: str | None) -> list[Any] | None:
    """The members of a row's list; None where there is no list.

    Raises:
        _Unfit: It cannot be read as a list.
    """
    if not isinstance(value, str):
        return None if value is None else list(value)
    text = value.strip()
    if not text:
        return None
    if text[0] != "[":
        return [part.strip() for part in (text.split(sign) if sign else [text]) if part.strip()]
    for parse in (json.loads, ast.literal_eval):
        try:
            members = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(members, list):
            return members
    raise _Unfit(f'{_shown(value)}; expected a list of labels, such as ["a", "b"].')


def _label(member: Any) -> Label:
    if isinstance(member, str) and member.strip():
        return member.strip()
    if isinstance(member, float) and member.is_integer():
        return int(member)
    if isinstance(member, int) and not isinstance(member, bool) and member >= 0:
        return member
    raise _Unfit(f"{_shown(member)} in a list of labels; expected names, or numbers from 0.")


def _sign_of_text(reader: Reader, column: str) -> str | None:
    """What parts the labels in the cells of a text column; None where each cell is a list, or one label.

    Raises:
        DataError: More than one sign may be it.
    """
    found: set[str] = set()
    for _, table in _tables(reader, [column]):
        for value in table.column(0).to_pylist():
            if isinstance(value, str) and not value.strip().startswith("["):
                found.update(sign for sign in SIGNS if sign in value)
    if len(found) > 1:
        raise DataError(
            f"{reader.name}: label column {column!r} holds {' and '.join(sorted(found))}, of which either may part the "
            'labels of a row. Write lists (["a", "b"]), or a column of 0 and 1 for each label (--label-column a,b).'
        )
    return found.pop() if found else None
