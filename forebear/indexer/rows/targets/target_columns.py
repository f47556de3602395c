"""Targets that are no one class: any number of labels a row, or numbers, and how a file holds them.

**Several labels a row.** What a row has is a dictionary from label to value: 1, or a share between 0 and 1; labels that
it does not have are left out. It is read from

- columns, one a label, of 0 and 1 (also true and false, or shares), which ``--label-column`` names; a -1 in one, which
  data sets write where a row was not judged, is no value;
- a column of lists: of names or of numbers of labels; or of vectors, one 0 or 1 (or share) a label; which of them is
  decided in :mod:`~.label_lists`, and remembered;
- a column of text, each cell a list as JSON or Python writes one; or labels parted by the one of ``;``, ``|`` and ``,``
  that occurs in the column.

An empty list says that a row has none of the labels. An empty cell of text says nothing: it is a missing target.

**Numbers.** One column is one number a row; several columns are as many, and so are lists of numbers in one column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from forebear.errors import DataError
from forebear.indexer.rows.files.reader import Reader, listed
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION, RowFormat
from forebear.indexer.rows.targets.label_lists import (
    Found,
    Label,
    Read,
    Unfit,
    holds_lists,
    in_order,
    labels_in_lists,
    members_of,
    number_in,
    share_in,
    shown,
    tables_of,
)

Target = dict[Label, float] | list[float]  # labels and their values, or numbers
NO_VALUE = -1  # of one label, in several columns
MOST_LABELS = 10_000


@dataclass
class TargetColumns:
    """What one pass over the label columns found; the counterpart of ``LabelColumn``.

    Attributes:
        problem_type: ``MULTI_LABEL`` or ``REGRESSION``.
        columns: Names of the columns.
        n_rows: Number of rows of the file.
        decode: Targets of a table's rows; None: no target; ``NO_VALUE``: marked as such.
        width: Number of labels, where the file says it: by its columns or the length of its vectors; else 0.
        form: Of lists of labels, whether they are ``vectors`` or ``numbers`` (or names); else None.
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
    form: str | None = None
    first_rows: dict[Label, int] = field(default_factory=dict)
    n_rows_with: dict[Label, int] = field(default_factory=dict)
    n_unlabelled: int = 0
    n_marked: int = 0
    first_unlabelled: int | None = None
    marks: tuple[Label, ...] = ()

    unread: ClassVar[None] = None

    @property
    def are_labels(self) -> bool:
        """Whether each column holds 0 and 1 of the label of its name."""
        return self.problem_type == MULTI_LABEL and self.form is None

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


def scan_targets(
    reader: Reader,
    columns: Sequence[str],
    problem_type: str,
    *,
    form: str | None = None,
    n_labels: int | None = None,
    is_one_label: bool = False,
) -> TargetColumns:
    """Pass over the label columns: how they hold targets, which labels occur, and where targets are missing.

    Args:
        reader: The source.
        columns: The label columns.
        problem_type: ``MULTI_LABEL`` or ``REGRESSION``.
        form: Of lists of labels, ``vectors`` or ``numbers`` where it is remembered.
        n_labels: How many labels there are, where it is known.
        is_one_label: The one column holds 0 and 1 of the label of its name.

    Raises:
        DataError: A value is no target of this kind; the row is named.
    """
    found = None
    if problem_type == REGRESSION:
        read, width = _numbers_of(reader, columns)
    elif len(columns) > 1 or is_one_label:
        read, width = _labels_in_columns(columns), len(columns)
    else:
        read, width, found = labels_in_lists(reader, columns[0], form, n_labels)

    def decode(table: pa.Table, start: int) -> list[Found]:
        values = [table.column(column).to_pylist() for column in columns]
        out: list[Found] = []
        try:
            for row in zip(*values, strict=True):
                out.append(read(row))  # noqa: PERF401  # its length says which row an error is of
        except Unfit as error:
            where = f"{reader.name}: label column {listed(columns)}"
            raise DataError(f"{where} holds, in row {start + len(out)} (from 0), {error}") from error
        return out

    scan = TargetColumns(problem_type, tuple(columns), 0, decode, width, found)
    if scan.are_labels:
        scan.n_rows_with = dict.fromkeys(columns, 0)
    for start, table in tables_of(reader, columns):
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
        of_numbers = scan.problem_type == REGRESSION
        what, mark = ("number", "null, NaN or empty") if of_numbers else ("labels", "null, NaN, empty or -1")
        raise DataError(
            f"{name}: label column {listed(scan.columns)} gives no {what} in {scan.n_unlabelled:,} of {scan.n_rows:,} "
            f"rows, first in row {scan.first_unlabelled} (from 0): {mark}. Leave those rows out by "
            "--unlabelled drop, or fill them in" + ("." if of_numbers else " (an empty list says: none of the labels).")
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
    names = scan.columns if len(scan.columns) > 1 or (scan.columns and scan.are_labels) else given
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


def _numbers_of(reader: Reader, columns: Sequence[str]) -> tuple[Read, int]:
    """How a row's numbers are read, one a column or a list of them in one column; and how many a row has.

    Raises:
        DataError: Several columns, and lists in one of them.
    """
    lists = [column for column in columns if holds_lists(reader, column)]
    if lists and len(columns) > 1:
        raise DataError(
            f"{reader.name}: label column {lists[0]!r} holds lists; a regression takes several columns of numbers, or "
            "one column of lists. Name them with --label-column."
        )
    width = _first_length(reader, columns[0]) if lists else len(columns)

    def read(row: tuple[Any, ...]) -> Found:
        members = members_of(row[0]) if lists else list(row)
        if members is None:
            return None
        if len(members) != width:
            raise Unfit(f"{shown(members)}; expected a list of {width} numbers, as in the first row.")
        numbers = [number_in(value) for value in members]
        return None if None in numbers else [number for number in numbers if number is not None]

    return read, width


def _first_length(reader: Reader, column: str) -> int:
    """The length of the first list of a column; 1 where there is none."""
    for _, table in tables_of(reader, [column]):
        for value in table.column(0).to_pylist():
            if value is not None:
                return len(members_of(value) or [None])
    return 1


def _word(value: Any) -> Any:
    """``true`` and ``false`` as files of text spell them."""
    return {"true": 1, "false": 0}.get(value.strip().lower(), value) if isinstance(value, str) else value


def holds_shares(reader: Reader, column: str) -> bool:
    """Whether a column holds 0, 1 (true, false), shares between them and -1 alone, so that it may be of one label."""
    found = False
    if holds_lists(reader, column):
        return False
    for _, table in tables_of(reader, [column]):
        for value in table.column(0).unique().to_pylist():
            try:
                number = number_in(_word(value))
            except Unfit:
                return False
            found |= number is not None
            if number is not None and number != NO_VALUE and not 0 <= number <= 1:
                return False
    return found


def _labels_in_columns(columns: Sequence[str]) -> Read:
    def read(row: tuple[Any, ...]) -> Found:
        values = [number_in(_word(value)) for value in row]
        if NO_VALUE in values:
            return NO_VALUE
        if None in values:
            return None
        return in_order({c: share_in(v) for c, v in zip(columns, values, strict=True) if v is not None})

    return read
