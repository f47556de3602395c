"""The label column of a source: integers or names, which rows have no label, and what is refused.

A row has no label where its value is null, NaN or blank; where it is ``-``, which SNLI and MNLI write where the
annotators did not agree; and where it is -1, which ``datasets`` writes for the same, if the integers have names.
Without names -1 counts as "no label" where the other labels are numbered from 0, since -1 is then no class of theirs;
the text "-1" also among labels that are names. A label that the model's classes name is always a class.
Rows without a label are refused where labels are needed, or left out, as ``unlabelled`` says:

- ``refuse``: the error says how many there are, and what can be done;
- ``drop-marked``, of training rows the default: those marked by ``-`` or -1 are left out, null and blank are refused;
- ``drop``: all of them are left out of the source, and row numbers count the rows that are kept;
- ``keep``: ``-`` and -1 (without names) are classes as any other; null and blank are refused still.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import is_text
from forebear.indexer.rows.files.reader import Reader, listed, reading
from forebear.indexer.rows.row_format import SINGLE_LABEL, RowFormat
from forebear.indexer.rows.targets.label_lists import Label
from forebear.indexer.rows.targets.target_columns import TargetColumns

DROP_MARKED = "drop-marked"
UNLABELLED = ("refuse", DROP_MARKED, "drop", "keep")
MAX_CLASSES = 10_000  # with more distinct values than this, a column holds no labels
NO_LABEL_NUMBER = -1
NO_LABEL_NAMES = ("-", str(NO_LABEL_NUMBER))
INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.A)
WHOLE = re.compile(r"\s*[+-]?\d{1,15}\.0*\s*", re.A)  # 1.0: what pandas makes of an integer beside a missing value
NUMBER = re.compile(r"\s*[+-]?(\d+\.\d*|\.\d+)\s*", re.A)


@dataclass
class LabelColumn:
    """What one pass over the label column found; ``column`` is None for an unlabelled source.

    Attributes:
        column: Name of the column.
        n_rows: Number of rows of the file.
        first_rows: Each label that occurs, and the first row with it.
        kinds: First row of each kind of value, "null" included.
        labels: Each value that occurs, as it is stored, and the label that it stands for; None: no label.
        n_rows_with: In how many rows each value occurs.
        first_unlabelled: The first row without a label; None where all have one.
        marks: Labels that were taken out, since they mean "no label", as they are spelled.
        unread: Why the labels of a source, which are not needed, are not read; None where they are, or there are none.
    """

    column: str | None
    n_rows: int
    first_rows: dict[Label, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    labels: dict[Any, Label | None] = field(default_factory=dict)
    n_rows_with: dict[Any, int] = field(default_factory=dict)
    first_unlabelled: int | None = None
    marks: list[Label] = field(default_factory=list)
    unread: str | None = None

    problem_type: ClassVar[str] = SINGLE_LABEL
    form: ClassVar[None] = None  # there are no lists

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold the labels: one, or none."""
        return () if self.column is None else (self.column,)

    @property
    def kind(self) -> str | None:
        """Kind of the labels, such as "a name"; None where there are no labels."""
        return next((kind for kind in self.kinds if kind != "null"), None)

    @property
    def n_unlabelled(self) -> int:
        """Number of rows without a label."""
        return sum(self.n_rows_with[value] for value, label in self.labels.items() if label is None)

    def note_unlabelled(self, row: int) -> None:
        """Note a row without a label."""
        self.first_unlabelled = row if self.first_unlabelled is None else min(row, self.first_unlabelled)

    def take_out(self, marks: Sequence[Label]) -> None:
        """Count the rows with some labels as rows without one."""
        for label in marks:
            self.note_unlabelled(self.first_rows.pop(label))
        self.marks += marks
        self.labels = {value: None if label in marks else label for value, label in self.labels.items()}

    def n_rows_of(self, label: Label) -> int:
        """In how many rows a label occurs."""
        return sum(n for value, n in self.n_rows_with.items() if self.labels[value] == label)

    def of(self, table: pa.Table, start: int = 0) -> list[Any]:
        """The labels of some rows, from a table as the reader gives it; None: no label."""
        return [self.labels[value] for value in plain_values(table.column(self.column)).to_pylist()]


def plain_values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A label column as strings (true and false among them), integers or floats; NaN becomes null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_floating(kind):
        wide = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(wide), None, wide)
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    return column.cast(pa.string())


def scan_labels(reader: Reader, column: str) -> LabelColumn:
    """Pass over the label column once.

    Raises:
        DataError: It cannot be read, or holds more than ``MAX_CLASSES`` different values.
    """
    kind = reader.schema.field(column).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    readable = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not (is_text(kind) or any(is_kind(value_kind) for is_kind in readable)):
        return LabelColumn(column, reader.n_rows or 0, kinds={str(kind): 0})
    scan = LabelColumn(column, 0)
    if pa.types.is_string(kind) and reader.kinds.get(column, {}).keys() - {"null", "a name"}:
        scan.kinds = dict(reader.kinds[column])  # JSON values of unlike kinds are kept as text, which hides their kinds
    is_known = bool(scan.kinds)
    with reading(reader.name, "labelled text"):
        for table in reader.tables(0, [column]):
            values = plain_values(table.column(0))
            for pair in pc.value_counts(values).to_pylist():
                value = pair["values"]
                if value not in scan.labels:
                    position = pc.index(pc.is_null(values), True) if value is None else pc.index(values, value)
                    row = scan.n_rows + position.as_py()
                    label_kind, scan.labels[value] = _label_of(value, reader.typed)
                    if label_kind == "null":
                        scan.note_unlabelled(row)
                    if not is_known or label_kind == "null":
                        scan.kinds.setdefault(label_kind, row)
                    if (label := scan.labels[value]) is not None:
                        scan.first_rows.setdefault(label, row)
                scan.n_rows_with[value] = scan.n_rows_with.get(value, 0) + pair["counts"]
            scan.n_rows += len(table)
            if len(scan.labels) > MAX_CLASSES:
                raise DataError(
                    f"{reader.name}: label column {column!r} holds more than {MAX_CLASSES} different values; "
                    f"expected classes. Name another with --label-column."
                )
    return scan


def _label_of(value: Any, typed: bool) -> tuple[str, Label | None]:
    """The kind of a value, and the label that it stands for; None where it is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "null", None
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 2**53
        return ("an integer", int(value)) if whole else ("a number", str(value))
    if isinstance(value, int):
        return "an integer", value
    if not typed and INTEGER.fullmatch(value):
        return "an integer", int(value)
    if not typed and WHOLE.fullmatch(value):
        return "an integer", int(float(value))
    return ("a number" if not typed and NUMBER.fullmatch(value) else "a name"), value


def check_labels(
    name: str,
    labels: LabelColumn,
    names: Sequence[str] | None,
    need_labels: bool,
    unlabelled: str,
    classes: Sequence[str] = (),
) -> None:
    """Refuse labels that are no classes, find the rows without one; drop the column where no row has one.

    Args:
        name: Name of the source.
        labels: The scanned label column; changed in place.
        names: The names that integer labels index.
        need_labels: Whether rows without a label are refused.
        unlabelled: One of ``UNLABELLED``.
        classes: The model's class names, where it is known.

    Raises:
        DataError: Labels of unlike kinds, labels that the names do not reach, names that repeat; labels are needed and
            some row has none, unless such rows are left out and two different labels stay.
    """
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"{name}: the label names {listed(names)} repeat a name; expected one name a class.")
    if labels.column is None:
        return
    where = f"{name}: label column {labels.column!r}"
    kinds = sorted((row, kind) for kind, row in labels.kinds.items() if kind != "null")
    if len(kinds) > 1 or (kinds and kinds[0][1] not in ("an integer", "a name")):
        held = " and ".join(f"{kind} in row {row}" for row, kind in kinds[:2])
        raise DataError(
            f"{where} holds {held} (from 0); expected integers throughout or names throughout. {_way_out(kinds[0][1])}"
        )
    n_missing, n_labels = labels.n_unlabelled, len(labels.first_rows)
    labels.take_out(_marks(labels, names, unlabelled, classes))
    if labels.n_unlabelled and need_labels:
        is_lost = not labels.first_rows or (unlabelled == DROP_MARKED and len(labels.first_rows) < min(2, n_labels))
        n_refused = {"drop": 0, DROP_MARKED: n_missing}.get(unlabelled, labels.n_unlabelled)
        if n_refused or is_lost:
            raise DataError(_refusal(where, labels, names))
    if not labels.first_rows:
        labels.column = None
    elif names and labels.kind == "an integer":
        for label, row in labels.first_rows.items():
            if isinstance(label, int) and not 0 <= label < len(names):
                raise DataError(
                    f"{where} holds {label} in row {row} (from 0), but there are {len(names)} label names, "
                    f"{listed(names)}; give one a class, in order, with --label-names."
                )


def _way_out(kind: str) -> str:
    """What to do about labels of a kind that are no classes."""
    if "list" in kind:
        return (
            "A row has one label here, not several. Train a model of several labels (--problem-type multi-label), or "
            "make a column for each label, of rows with and without it, and name one of them with --label-column."
        )
    if kind == "a number":
        return (
            "Numbers that are measured are no classes: train a model of numbers (--problem-type regression), or make a "
            "column of ranges, and name it with --label-column."
        )
    return "Mend it, or name another with --label-column."


def _marks(labels: LabelColumn, names: Sequence[str] | None, unlabelled: str, classes: Sequence[str]) -> list[Label]:
    """The labels that mean "no label" in this source, of those that occur: every spelling."""
    rows, known = labels.first_rows, {name.strip() for name in classes}
    if labels.kind == "an integer":
        if NO_LABEL_NUMBER not in rows:
            return []
        is_class = unlabelled == "keep" or str(NO_LABEL_NUMBER) in known or 0 not in rows
        return [] if is_class and not names else [NO_LABEL_NUMBER]
    if unlabelled == "keep":
        return []
    known |= set(names or ())
    spelled = {label: label.strip() for label in rows if isinstance(label, str)}
    others = set(spelled.values()) - {*NO_LABEL_NAMES}
    from_one = "0" not in others and all(INTEGER.fullmatch(label) for label in others)  # as -1 and 1: -1 is a class
    marks = {*(NO_LABEL_NAMES[:1] if from_one else NO_LABEL_NAMES)} - known
    return [label for label, text in spelled.items() if text in marks]


def _refusal(where: str, labels: LabelColumn, names: Sequence[str] | None) -> str:
    """Say which rows have no label, and the ways out."""
    shown = " and ".join(repr(label) for label in labels.marks)
    cause = f"{shown}, which data sets write where there is no gold label" if shown else "null or empty"
    problem = (
        f"{where} gives no label in {labels.n_unlabelled:,} of {labels.n_rows:,} rows, first in row "
        f"{labels.first_unlabelled} (from 0): {cause}."
    )
    if not labels.first_rows:
        return f"{problem} Name another column with --label-column, or label the rows."
    as_class = shown and not (labels.kind == "an integer" and names)
    keep = f", take {shown} as a class by --unlabelled keep" if as_class else ""
    return f"{problem} Leave those rows out by --unlabelled drop{keep}, or label them."


def labelled_rows(reader: Reader, labels: LabelColumn | TargetColumns) -> np.ndarray:
    """Numbers of the rows that have a label, ``(n,)`` int64, in the file's order."""
    kept = []
    start = 0
    for table in reader.tables(0, list(labels.columns)):
        has_label = np.array([label is not None for label in labels.of(table, start)], dtype=bool)
        kept.append(start + np.flatnonzero(has_label))
        start += len(table)
    return np.concatenate(kept)


def names_of_numbers(
    reader: Reader,
    labels: LabelColumn,
    given: Sequence[str] | None,
    recorded: Sequence[str] | None,
    like: RowFormat,
) -> tuple[Sequence[str] | None, bool]:
    """The names that integer labels index, and whether they are remembered rather than the source's own."""
    names = given if given is not None else class_label_names(reader.schema, labels.column)
    if names is not None:
        return names, False
    if recorded and labels.kind == "a name":
        named = {str(label).strip() for label in labels.first_rows}
        return (recorded if named <= {*recorded, *NO_LABEL_NAMES} else None), False
    if recorded or not like.label_names or labels.kind != "an integer":
        return recorded, False
    in_range = all(NO_LABEL_NUMBER <= int(label) < len(like.label_names) for label in labels.first_rows)
    return (like.label_names, True) if in_range else (None, False)


def class_label_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Read the names that ``datasets`` keeps in a schema's metadata, of a column of labels or of lists of them."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        feature = feature if feature["_type"] == "ClassLabel" else feature["feature"]
        return list(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
