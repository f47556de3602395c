"""Text rows from any source, streamed in blocks: Parquet, JSON Lines, CSV, TSV, saved and hub data sets.

A row is named by its number, from 0 in the order of the source; equal rows stay separate. Text is never
interpreted: "NA", "None" and "007" stay as they are, and only a true null is an error.

Labels are integers or names; what counts as a row without a label, and what becomes of such a row, is said in
``label_column``. A label column in which no row has a label counts as absent unless labels are needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import are_blank, column_bytes, rechunked, strings_of
from forebear.indexer.rows.files.json_rows import LONGEST_ROW, SCALAR_KINDS
from forebear.indexer.rows.files.reader import CHUNK_ROWS, Reader, reading
from forebear.indexer.rows.row_format import RowFormat
from forebear.indexer.rows.targets.label_column import LabelColumn
from forebear.indexer.rows.targets.label_lists import Label
from forebear.indexer.rows.targets.target_columns import TargetColumns

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

    Made by ``open_rows`` and ``rows_from_texts`` of ``opening``, which have checked the columns and every label.

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
            label_lists=self._label_scan.form if self.n_labels or self._has_numbers else None,
            delimiter=self._reader.delimiter,
            encoding=self._reader.encoding,
            problem_type=self.problem_type if self.label_columns else None,
        )

    @property
    def _has_numbers(self) -> bool:
        return any(isinstance(label, int) for label in self.label_values)

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

    def sha256(self, start: int = 0, stop: int | None = None) -> str:
        """Digest of texts and labels in order, whatever the file format and the names of the columns.

        Args:
            start: Number of the first row.
            stop: One past the last; None: all that follow.
        """
        digest = hashlib.sha256(f"rows of {len(self.text_columns)} texts".encode())
        for block in self._blocks(CHUNK_ROWS, start, self._columns()):
            rows = zip(*block.texts, block.labels or [None] * len(block), strict=True)
            for row in rows if stop is None else itertools.islice(rows, max(0, stop - block.start)):
                digest.update(json.dumps(row).encode() + b"\n")
            if stop is not None and stop < block.start + len(block):
                break
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
        scan, lines = self._label_scan, list[str]()
        if scan.unread is not None:
            lines.append(f"{self.name}: {scan.unread}")
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


def texts_sha256(texts: Iterable[str]) -> bytes:
    """The sha256 of the texts of a row, in the order of encoding: rows with equal texts have equal ones."""
    content = json.dumps(list(texts), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()
