"""Text rows from any source, streamed in blocks: Parquet, JSON Lines, CSV, TSV, saved and hub data sets.

A row is named by its number, from 0 in the order of the source; equal rows stay separate. Text is never
interpreted: "NA", "None" and "007" stay as they are, and only a true null is an error.

Labels are integers or names; what counts as a row without a label, and what becomes of such a row, is said in
``label_column``. A label column in which no row has a label counts as absent unless labels are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import are_blank, column_bytes, rechunked, strings_of
from forebear.indexer.rows.columns import PAIRS, find_label_columns, find_text_columns, said
from forebear.indexer.rows.files.file_formats import (
    CHUNK_ROWS,
    Reader,
    holds_dicts,
    listed,
    memory_reader,
    reading,
    table_reader,
)
from forebear.indexer.rows.files.json_rows import LONGEST_ROW, SCALAR_KINDS
from forebear.indexer.rows.row_format import RowFormat
from forebear.indexer.rows.source_names import TextChoices, open_reader, read_beside
from forebear.indexer.rows.targets.label_column import DROP_MARKED, MAX_CLASSES, LabelColumn, labelled_rows
from forebear.indexer.rows.targets.reading import read_targets
from forebear.indexer.rows.targets.target_columns import Label, TargetColumns

__all__ = ["MAX_CLASSES", "RowBlock", "RowSource", "open_rows", "rows_from_texts"]
SHOWN_ROWS = 3  # row numbers that a remark gives as examples


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source."""

    start: int  # row number of the first row
    texts: tuple[list[str], ...]  # one list a text column, in order of encoding
    # As the source has them, None for a row without one; None without a column. Of rows with several labels
    # dictionaries from label to value, of rows with numbers lists of these.
    labels: Sequence[Any] | None
    table: pa.Table  # the rows with every column of the source

    def __len__(self) -> int:
        return len(self.texts[0])


class RowSource:
    """Text rows that can be streamed any number of times, in bounded memory.

    Made by ``open_rows`` and ``rows_from_texts``, which have checked the columns and every label.

    Attributes:
        name: The source's name, as the user gave it.
        text_columns: One or two names, in order of encoding.
        problem_type: What the targets of the rows are: one class, any number of labels, or numbers.
        label_column: Name of the label column, or None; of several columns, their names parted by commas.
        label_columns: The label columns.
        label_names: The names that integer labels index, where known.
        label_values: The distinct labels, sorted, as the source has them; empty without labels.
        n_labels: How many labels there are, where several columns or vectors say it; else 0.
        n_rows: Number of rows, without those that were left out.
        n_dropped: Number of rows that were left out since they have no label.
        unlabelled: What became of rows without a label: ``refuse``, ``drop-marked``, ``drop`` or ``keep``.
        taken: One line on the columns and label names that were taken without being named; None where all were named.
        marks: Values of the label column that mean "no label", such as ``-``, as they are spelled there.
    """

    def __init__(
        self,
        reader: Reader,
        text_columns: tuple[str, ...],
        labels: LabelColumn | TargetColumns,
        label_names: tuple[str, ...] | None,
        kept: np.ndarray | None = None,
        *,
        unlabelled: str = "refuse",
        taken: str | None = None,
    ) -> None:
        self._reader = reader
        self._label_scan = labels
        self._kept = kept  # numbers of the rows that are kept, where some are left out
        self.name: str = reader.name
        self.text_columns = text_columns
        self.problem_type = labels.problem_type
        self.label_column: str | None = labels.column
        self.label_columns: tuple[str, ...] = labels.columns
        self.label_names = label_names
        by_kind = sorted(labels.first_rows, key=lambda label: (isinstance(label, str), label))
        self.label_values: tuple[int, ...] | tuple[str, ...] = tuple(by_kind)  # type: ignore[assignment]
        self.n_labels: int = labels.width if isinstance(labels, TargetColumns) else 0
        self.marks: tuple[Label, ...] = tuple(labels.marks)
        self.n_dropped = 0 if kept is None else labels.n_rows - len(kept)
        self.n_rows: int = labels.n_rows - self.n_dropped
        self.unlabelled = unlabelled
        self.taken = taken

    def format(self, owner: str) -> RowFormat:
        """How these rows are read, to be remembered by a run or an index, ``owner``."""
        return RowFormat(
            owner=owner,
            text_columns=self.text_columns,
            label_column=self.label_columns if len(self.label_columns) > 1 else self.label_column,
            label_names=self.label_names,
            delimiter=self._reader.delimiter,
            encoding=self._reader.encoding,
            problem_type=self.problem_type if self.label_columns else None,
        )

    def blocks(self, block_rows: int = 4096, start: int = 0) -> Iterator[RowBlock]:
        """Stream the rows from number ``start`` on, in blocks of exactly ``block_rows`` but for the last.

        Raises:
            DataError: A text is null, the file is broken further on, or it changed since it was opened.
        """
        if block_rows < 1 or start < 0:
            raise ValueError(f"block_rows={block_rows} and start={start}: expected at least 1 and 0")
        return self._blocks(block_rows, start, None)

    def other_columns(self) -> dict[str, pa.DataType | str]:
        """Types of the columns that hold neither texts nor labels; of JSON values that are no scalars what they are."""
        found: dict[str, pa.DataType | str] = {}
        for field in self._reader.schema:
            if field.name not in self._columns():
                nested = sorted(self._reader.kinds.get(field.name, {}).keys() - SCALAR_KINDS)
                found[field.name] = nested[0] if nested else field.type
        return found

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Stream some columns of all rows, a part at a time; with no columns, the parts have their numbers of rows.

        Raises:
            DataError: The file is broken further on.
        """
        for table in self._tables(0, list(columns) or [self.text_columns[0]]):
            yield table if columns else table.select([])

    def sha256(self) -> str:
        """Digest of texts and labels in order, whatever the file format and the names of the columns."""
        digest = hashlib.sha256(f"rows of {len(self.text_columns)} texts".encode())
        for block in self._blocks(CHUNK_ROWS, 0, self._columns()):
            for row in zip(*block.texts, block.labels or [None] * len(block), strict=True):
                digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def file_row(self, row: int) -> int:
        """The number of a row in the file, from 0, of which some rows may have been left out."""
        return row if self._kept is None else int(self._kept[row])

    def first_row_of(self, label: Label) -> int:
        """The number in the file of the first row with a label, from 0."""
        return self._label_scan.first_rows[label]

    def n_rows_with(self, label: Label) -> int:
        """In how many rows a label occurs."""
        return self._label_scan.n_rows_of(label)

    def remarks(self) -> list[str]:
        """What the user should know of rows that were left out, have no label or no words: a line each, with a count.

        Passes over the texts once.
        """
        scan, lines = self._label_scan, []
        if self.n_dropped:
            marks = f" ({' and '.join(map(repr, self.marks))})" if self.marks else ""
            lines.append(
                f"{self.name}: {self.n_dropped:,} of {scan.n_rows:,} rows have no label{marks} and are left out, first "
                f"row {scan.first_unlabelled} (from 0) of the file; row numbers count the {self.n_rows:,} rows kept"
            )
        elif self.label_column is not None and scan.n_unlabelled:
            lines.append(
                f"{self.name}: {scan.n_unlabelled:,} of {scan.n_rows:,} rows have no label, first row "
                f"{scan.first_unlabelled} (from 0); theirs stays empty"
            )
        n_empty, first_rows = self._empty_texts()
        if n_empty:
            shown = ", ".join(map(str, first_rows)) + (" ..." if n_empty > len(first_rows) else "")
            lines.append(
                f"{self.name}: {n_empty:,} of {self.n_rows:,} rows have a text that is empty or white space alone "
                f"(rows {shown}, from 0); they are kept"
            )
        return lines

    def _empty_texts(self) -> tuple[int, list[int]]:
        """How many rows have a text that is empty or white space alone, and the first few of these rows."""
        n_empty, first_rows, start = 0, list[int](), 0
        for table in self._tables(0, list(self.text_columns)):
            empty = np.zeros(len(table), bool)
            with reading(self.name, "text"):
                for column in table.columns:
                    empty |= are_blank(column)
            empty_rows = np.flatnonzero(empty)
            n_empty += len(empty_rows)
            first_rows += (start + empty_rows[: SHOWN_ROWS - len(first_rows)]).tolist()
            start += len(table)
        return n_empty, first_rows

    def _columns(self) -> list[str]:
        return [*self.text_columns, *self.label_columns]

    def _tables(self, start: int, columns: list[str] | None) -> Iterator[pa.Table]:
        """The reader's tables from a row on, without the rows that are left out."""
        if self._kept is None:
            yield from self._reader.tables(start, columns)
            return
        if start >= len(self._kept):
            return
        first = int(self._kept[start])
        for table in self._reader.tables(first, columns):
            inside = self._kept[np.searchsorted(self._kept, first) : np.searchsorted(self._kept, first + len(table))]
            yield table.take(pa.array(inside - first))
            first += len(table)

    def _blocks(self, block_rows: int, start: int, columns: list[str] | None) -> Iterator[RowBlock]:
        for table in rechunked(self._tables(start, columns), block_rows):
            end = start + len(table)
            if end > self.n_rows:
                raise DataError(f"{self.name} has more than the {self.n_rows} rows it had when opened; open it again.")
            yield RowBlock(start, self._texts(table, start), self._labels(table, start), table)
            start = end
        if start < self.n_rows:
            raise DataError(f"{self.name} has {start} of the {self.n_rows} rows it had when opened; open it again.")

    def _texts(self, table: pa.Table, start: int) -> tuple[list[str], ...]:
        for name in self.text_columns:
            if table.column(name).null_count:
                row = self.file_row(start + pc.index(pc.is_null(table.column(name)), True).as_py())
                raise DataError(
                    f"{self.name}: row {row} (from 0) has no text, its {name!r} is null; expected a string, which may "
                    "be empty. Drop the row or fill it."
                )
            longest = int(column_bytes(table.column(name)).max(initial=0))
            if longest > LONGEST_ROW:
                raise DataError(
                    f"{self.name}: of the rows from {self.file_row(start)} (from 0) on, one has a text of {longest:,} "
                    f"bytes in {name!r}; expected at most {LONGEST_ROW:,}. Cut it; a model reads its beginning."
                )
        with reading(self.name, "text"):
            return tuple(strings_of(table.column(name)) for name in self.text_columns)

    def _labels(self, table: pa.Table, start: int) -> list[Any] | None:
        if not self.label_columns:
            return None
        try:
            with reading(self.name, "labelled text"):
                return self._label_scan.of(table, start)
        except KeyError as error:
            raise DataError(f"{self.name} has the label {error} that it had not when opened; open it again.") from error


def open_rows(
    source: Any,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    need_labels: bool = False,
    unlabelled: str | None = None,
    classes: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    like: RowFormat | None = None,
    problem_type: str | None = None,
) -> RowSource:
    """Open files, a folder of ``datasets.save_to_disk``, a hub data set or a table, and check the labels.

    Args:
        source: A path; a folder or a pattern (``data/train-*.parquet``) of files, which are read as one in natural
            order; ``FOLDER:SPLIT`` for a saved DatasetDict, or for the files whose names begin with the split's; or a
            hub name with its split:
            ``NAME:SPLIT``, ``OWNER/REPO:SPLIT``, ``DATASET/CONFIG:SPLIT`` (tried in this order, as in
            ``glue/sst2:train``) or ``OWNER/REPO/CONFIG:SPLIT``. A path that exists wins over a hub name.
            Or a table in memory: a ``datasets.Dataset``, a pyarrow Table, a DataFrame of pandas or polars, a list of
            dicts.
        text_columns: One or two names, in order of encoding. Default: those of ``like``, else ``text_columns`` of a
            ``dataset.json`` beside the file, else found by name.
        label_column: One column; or several, as ``a,b,c`` or a list of names, each of which holds one label's 0 and 1
            (of a regression: one of its numbers). Default: that of ``like``, else found by name.
        label_names: The names that integer labels index. Default: those of the ClassLabel feature, else
            ``label_names`` of a ``dataset.json`` beside the file, else those of ``like``.
        need_labels: Refuse a source in which any row has no label, as ``unlabelled`` says.
        unlabelled: ``refuse`` (the default), ``drop-marked`` (that of training rows), ``drop`` or ``keep``; see
            :mod:`forebear.indexer.rows.targets.label_column`.
        classes: The model's class names, as ``Retriever.label_names``: ``-`` or -1 among them is a class here too.
        delimiter: What parts the values of a CSV or TSV file: a character, or its name, such as ``tab``. Default:
            commas in CSV, tabs in TSV.
        encoding: Of a text file without a byte order mark. Default: UTF-8.
        like: How a run or an index read its rows (``ModelChoice.row_format``, ``Index.row_format``): taken where
            nothing else is given and the source has such columns.
        problem_type: One class a row (``single_label_classification``), any number of labels
            (``multi_label_classification``), or numbers (``regression``); how files hold those is said in
            :mod:`forebear.indexer.rows.targets.target_columns`. Default: as ``like`` says, else several labels where
            the label columns are several or hold lists, else one class.

    Raises:
        DataError: The source cannot be read as (labelled) text.
    """
    choices = TextChoices(delimiter=delimiter, encoding=encoding, like=like or RowFormat())
    if isinstance(source, (str, Path)):
        reader, folder = open_reader(str(source), choices)
    else:
        reader, folder = table_reader(source), None
        choices.refuse(reader.name)
    return _make_source(
        reader,
        folder,
        text_columns,
        label_column,
        label_names,
        need_labels,
        unlabelled or "refuse",
        classes,
        choices.like,
        problem_type,
    )


def rows_given(
    rows: Any, *, need_labels: bool = False, classes: Sequence[str] = (), like: RowFormat | None = None
) -> RowSource:
    """Test rows as callers of Python have them: a list of texts or pairs, what :func:`open_rows` takes, or its result.

    Args:
        rows: The rows.
        need_labels: Whether rows without labels are refused.
        classes: The model's class names.
        like: How the run or the index read its rows.

    Raises:
        DataError: They cannot be read, or have no labels, as :func:`open_rows` says.
    """
    if isinstance(rows, RowSource):
        return rows
    if isinstance(rows, (list, tuple)) and not holds_dicts(rows):
        if need_labels:
            raise DataError("these rows need labels. Give rows_from_texts(texts, labels), or a file that has them.")
        return rows_from_texts(rows)
    return open_rows(rows, need_labels=need_labels, classes=classes, like=like)


def rows_from_texts(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    labels: Sequence[Any] | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    unlabelled: str | None = None,
    problem_type: str | None = None,
) -> RowSource:
    """Make a source of rows in memory; columns are ``text`` or ``premise, hypothesis``, and ``label``.

    ``classes`` and ``problem_type`` as in ``open_rows``; rows of several labels have lists of labels, or vectors. Where
    ``unlabelled`` says what becomes of rows without a label, labels are needed.

    Raises:
        DataError: Texts are not all strings or all pairs, or labels not all integers or all names.
    """
    name = "the rows given"
    if isinstance(texts, (str, bytes)) or hasattr(texts, "columns"):
        raise DataError(
            f"{name} are one {type(texts).__name__}; expected a list of texts or of pairs. open_rows takes tables."
        )
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
                named["label"] = _plain(label)
            yield named

    label_column = None if labels is None else "label"
    return _make_source(
        memory_reader(name, checked()), None, columns, label_column, label_names, unlabelled is not None,
        unlabelled or "refuse", classes, RowFormat(), problem_type,
    )  # fmt: skip


def _plain(label: Any) -> Any:
    """A label in memory as JSON has it."""
    if isinstance(label, (np.generic, np.ndarray)):
        return label.tolist()
    if isinstance(label, (list, tuple, set, frozenset)):
        members = [_plain(member) for member in label]
        return sorted(members, key=str) if isinstance(label, (set, frozenset)) else members
    return label


def _make_source(
    reader: Reader,
    folder: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | Sequence[str] | None,
    label_names: Sequence[str] | None,
    need_labels: bool,
    unlabelled: str,
    classes: Sequence[str],
    like: RowFormat,
    problem_type: str | None,
) -> RowSource:
    if reader.n_rows == 0:
        raise DataError(f"{reader.name} has no rows; expected at least one row of text.")
    columns = reader.schema.names
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{reader.name} has more than one column {repeated[0]!r}; rename all but one.")
    beside = read_beside(folder)
    texts, text_origin = find_text_columns(reader, text_columns, beside.get("text_columns"), like)
    found, label_origin = find_label_columns(reader, label_column, texts, like, need_labels=need_labels)
    if not found and need_labels:
        raise DataError(
            f"{reader.name} has no label column among its columns {listed(columns)}; name it with --label-column."
        )
    labels, names, are_remembered = read_targets(
        reader, texts[0], found, label_names=label_names, recorded=beside.get("label_names"), like=like,
        problem_type=problem_type, need_labels=need_labels, unlabelled=unlabelled, classes=classes,
    )  # fmt: skip
    drops = unlabelled == "drop" or (unlabelled == DROP_MARKED and need_labels)
    drops = drops and bool(labels.columns) and labels.n_unlabelled > 0
    kept = labelled_rows(reader, labels) if drops else None
    taken = [
        (f"text column{'s' * (len(texts) > 1)} {' and '.join(texts)}", text_origin),
        (f"label column{'s' * (len(found) > 1)} {listed(found)}", label_origin),
        (f"label names {listed(names or ())}", f"as in {like.owner}" if are_remembered else None),
    ]
    said_of = said(reader.name, [(what, why) for what, why in taken if why is not None])
    return RowSource(reader, texts, labels, tuple(names) if names else None, kept, unlabelled=unlabelled, taken=said_of)
