"""Training files written again with some rows changed or left out; what is not changed keeps its bytes.

Text files (CSV, TSV, JSON Lines) are copied record by record: a row that stays is copied as it stands, with its quotes,
spaces and line end; of a row with another label the cell of the label alone is written anew. Parquet files and JSON
arrays are written anew from the same values, in the same order and the same groups of rows.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from forebear.errors import DataError, InputError
from forebear.indexer.losses.loss import number_text
from forebear.indexer.rows.files.text_file import ENCODINGS, open_text
from forebear.indexer.storage.atomic import atomic_file

PACKERS: Final = {".gz": gzip, ".bz2": bz2}
_CELL = r'"(?:[^"]|"")*"(?!")[^{0}\r\n]*|[^"{0}\r\n][^{0}\r\n]*|'  # quoted; plain; empty
_PLAIN_CELL = r"[^{0}\r\n]*"


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What is written, and where.

    Attributes:
        label_column: The column whose values change.
        labels: New values by row number of the file, from 0.
        left_out: Numbers of the rows that are not written.
        apart: Numbers of those rows that are written to another file, of the same form.
        n_rows: Rows that the file has, as the index reads it: a file that is parted into others is not written.
    """

    label_column: str | None
    labels: Mapping[int, Any]
    left_out: Collection[int]
    apart: Collection[int] = ()
    n_rows: int = 0

    def check(self, n_found: int, train: Path) -> None:
        """Refuse a file whose rows were found otherwise than the index reads them.

        Raises:
            DataError: As said.
        """
        if n_found != self.n_rows:
            raise DataError(
                f"{train}: {n_found:,} rows were found where {self.n_rows:,} were read, so none is changed. Are quotes "
                "or line ends broken? Save the file as JSON Lines or Parquet, and build the index from that."
            )


def ending_of(path: Path) -> str:
    """The ending that says a file's format, with that of its packing: ``.csv``, ``.csv.gz``."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKERS else ""
    return Path(path.name.lower().removesuffix(packing)).suffix + packing


def rewrite(
    train: Path, out: Path, change: Rewriting, *, delimiter: str | None, encoding: str | None,
    apart: Path | None = None, log: Path | None = None,
    logged: Callable[[Mapping[int, int]], bytes] = lambda _lines: b"",
) -> dict[int, int]:  # fmt: skip
    """Write a training file again.

    Args:
        train: The file.
        out: Where it is written; whole, or not at all.
        change: What changes.
        delimiter: Of a CSV or TSV file.
        encoding: Of a text file without a byte order mark; None: UTF-8.
        apart: File of the rows that are written apart, where there are any.
        log: File of what changed: all files are complete before the first appears, and ``out`` appears last.
        logged: What the log holds, of the lines that are returned.

    Returns:
        The line at which each row begins that changes or is left out, from 1, where the file has lines.

    Raises:
        DataError: The file is broken, or has no such column.
        InputError: The file's format cannot be written, or its column does not hold a label.
        StorageError: A file cannot be written.
    """
    with ExitStack() as stack:
        handles = [stack.enter_context(atomic_file(path)) for path in (out, apart) if path is not None]
        log_handle = None if log is None else stack.enter_context(atomic_file(log))
        lines = _rewrite(train, handles, change, delimiter, encoding)
        if log_handle is not None:
            log_handle.write(logged(lines))
    return lines


def _rewrite(
    train: Path, handles: Sequence[IO[bytes]], change: Rewriting, delimiter: str | None, encoding: str | None
) -> dict[int, int]:
    ending = ending_of(train)
    if ending in (".parquet", ".pq"):
        return _rewrite_parquet(train, handles, change)
    with ExitStack() as stack:
        mark = next((m for m in ENCODINGS if _begins_with(train, m)), b"")
        written_in = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(ENCODINGS.get(mark, ""), encoding or "utf-8")
        if mark in ENCODINGS:
            mark = "\ufeff".encode("utf-8" if ENCODINGS[mark] == "utf-8" else written_in)
        outs = [stack.enter_context(_text_out(handle, ending, written_in, mark)) for handle in handles]
        with open_text(str(train), encoding) as file:
            is_array = file.peek(64).lstrip().startswith(b"[") and ".json" in ending
            text = io.TextIOWrapper(file, "utf-8", newline="")
            if is_array:
                return _rewrite_array(text, outs, change, train)
            if ".csv" in ending or ".tsv" in ending or delimiter is not None:
                records = _delimited(text, delimiter or ",", quoted=".tsv" not in ending, change=change)
                return _copy(records, outs, change, train)
            return _copy(_json_lines(text, change), outs, change, train)


def _begins_with(path: Path, mark: bytes) -> bool:
    with pa.input_stream(str(path), compression="detect") as stream:
        return bool(stream.read(4).startswith(mark))


def _text_out(handle: IO[bytes], ending: str, encoding: str, mark: bytes) -> io.TextIOWrapper:
    packing = Path(ending).suffix if Path(ending).suffix in PACKERS else ending
    packed: Any = handle
    if packing == ".gz":
        packed = gzip.GzipFile(fileobj=handle, mode="wb", filename="", mtime=0)
    elif packing == ".bz2":
        packed = bz2.BZ2File(handle, "wb")
    packed.write(mark)
    return _Text(packed, handle, encoding)


class _Text(io.TextIOWrapper):
    """Text that goes to a handle which stays open when this is closed."""

    def __init__(self, packed: Any, handle: IO[bytes], encoding: str) -> None:
        self._packed, self._handle = packed, handle
        super().__init__(packed, encoding, newline="", write_through=False)

    def close(self) -> None:
        if not self.closed:
            self.flush()
            self.detach()
            if self._packed is not self._handle:
                self._packed.close()


@dataclass(frozen=True)
class Record:
    """A row of a text file, its header, or a blank line, as it stands there.

    Attributes:
        text: With its line end.
        line: At which it begins, from 1.
        number: Of the row, from 0; None for a header or a blank line.
        relabelled: Its text with another value of the label column.
    """

    text: str
    line: int
    number: int | None
    relabelled: Callable[[Any], str]


def _copy(records: Iterator[Record], outs: Sequence[IO[str]], change: Rewriting, train: Path) -> dict[int, int]:
    """Copy records, with those of changed rows written anew."""
    lines, n_found = {}, 0
    for record in records:
        number = record.number
        if number is None:
            for out in outs if record.text.strip("\r\n") else outs[:1]:  # each file has the header
                out.write(record.text)
            continue
        n_found += 1
        if number in change.left_out or number in change.labels:
            lines[number] = record.line
        if number in change.apart:
            outs[1].write(record.text)
        elif number not in change.left_out:
            outs[0].write(record.relabelled(change.labels[number]) if number in change.labels else record.text)
    change.check(n_found, train)
    return lines


def raw_records(text: IO[str], sign: str | None, *, quoted: bool) -> Iterator[Record]:
    """Records of a CSV or TSV file, its header first; without a sign that parts values, of JSON Lines."""
    nothing = Rewriting(label_column=None, labels={}, left_out=())
    return _json_lines(text, nothing) if sign is None else _delimited(text, sign, quoted=quoted, change=nothing)


def _delimited(text: IO[str], sign: str, *, quoted: bool, change: Rewriting) -> Iterator[Record]:
    """Records of a CSV or TSV file, its header first."""
    cell = re.compile((_CELL if quoted else _PLAIN_CELL).format(re.escape(sign)))
    whole = re.compile(rf"(?:{cell.pattern})(?:{re.escape(sign)}(?:{cell.pattern}))*(?:\r\n|\n|\r)?")
    place, number, held, start = -1, 0, "", 1
    for line_number, line in enumerate(text, start=1):
        held += line
        if quoted and '"' in held and not whole.fullmatch(held):
            continue  # a line break within quotes
        if not held.strip("\r\n"):
            yield Record(held, start, None, str)
        elif place < 0:
            names = next(csv.reader([held], delimiter=sign, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
            if change.label_column is not None and change.label_column not in names:
                raise DataError(f"the header has no column {change.label_column!r}; it has {', '.join(names)}.")
            place = names.index(change.label_column) if change.label_column is not None else 0
            yield Record(held, start, None, str)
        else:
            yield Record(held, start, number, _cell_writer(held, place, sign, cell, quoted=quoted))
            number += 1
        held, start = "", line_number + 1
    if held:
        raise DataError(f"line {start}: a quote is opened and never closed. Mend it.")


def _cell_writer(record: str, place: int, sign: str, cell: re.Pattern[str], *, quoted: bool) -> Callable[[Any], str]:
    def write(value: Any) -> str:
        at = 0
        for _ in range(place):
            found = cell.match(record, at)
            assert found is not None  # a cell may be empty
            at = found.end() + len(sign)
        old = cell.match(record, at)
        assert old is not None
        new = number_text(value) if isinstance(value, float) else str(value)
        if quoted and (old[0].startswith('"') or any(c in new for c in f'{sign}"\r\n')):
            new = '"' + new.replace('"', '""') + '"'
        return record[: old.start()] + new + record[old.end() :]

    return write


def _json_lines(text: IO[str], change: Rewriting) -> Iterator[Record]:
    number = 0
    for line_number, line in enumerate(_broken_at_newlines(text), start=1):
        if not line.strip():
            yield Record(line, line_number, None, str)
            continue
        yield Record(line, line_number, number, _value_writer(line, change))
        number += 1


def _broken_at_newlines(text: IO[str]) -> Iterator[str]:
    """Lines that end in ``\\n`` alone, as JSON Lines has them."""
    held = ""
    for line in text:
        held += line
        if held.endswith("\n"):
            yield held
            held = ""
    if held:
        yield held


def _value_writer(line: str, change: Rewriting) -> Callable[[Any], str]:
    def write(value: Any) -> str:
        row = json.loads(line)
        body = line.strip()
        style = next((style for style in _STYLES if json.dumps(row, **style) == body), _STYLES[0])
        row[change.label_column] = value
        return line.replace(body, json.dumps(row, **style)) if body else line

    return write


_STYLES: Final[tuple[dict[str, Any], ...]] = tuple(
    {"ensure_ascii": ascii_alone, "separators": separators}
    for ascii_alone in (False, True)
    for separators in ((", ", ": "), (",", ":"))
)


def _rewrite_array(text: IO[str], outs: Sequence[IO[str]], change: Rewriting, train: Path) -> dict[int, int]:
    content = text.read()
    rows = json.loads(content)
    change.check(len(rows), train)
    indents: tuple[int | str | None, ...] = (None, 2, 4, 1, "\t")
    ways = [style | {"indent": i} for i in indents for style in _STYLES]
    ways += [{"ensure_ascii": ascii_alone, "indent": i} for ascii_alone in (False, True) for i in indents]
    style = next(
        (way for way in ways if json.dumps(rows, **way) == content.rstrip()), {"ensure_ascii": False, "indent": 2}
    )
    kept, apart = [], []
    for number, row in enumerate(rows):
        if number in change.labels:
            row[change.label_column] = change.labels[number]
        if number in change.apart:
            apart.append(row)
        elif number not in change.left_out:
            kept.append(row)
    for out, some in zip(outs, (kept, apart), strict=False):
        out.write(json.dumps(some, **style) + content[len(content.rstrip()) :])
    return {}


def _rewrite_parquet(train: Path, handles: Sequence[IO[bytes]], change: Rewriting) -> dict[int, int]:
    with pq.ParquetFile(train) as file, ExitStack() as stack:
        groups = file.metadata.num_row_groups
        packing = file.metadata.row_group(0).column(0).compression.lower() if groups else "snappy"
        compression = packing if packing != "uncompressed" else "none"
        writers = [
            stack.enter_context(pq.ParquetWriter(handle, file.schema_arrow, compression=compression))
            for handle in handles
        ]
        start = 0
        for group in range(groups):
            table = file.read_row_group(group)
            numbers = range(start, start + len(table))
            if change.label_column is not None and not change.labels.keys().isdisjoint(numbers):
                table = _relabelled(table, start, change.label_column, change.labels)
            kept = [n not in change.left_out and n not in change.apart for n in numbers]
            for writer, mask in zip(writers, (kept, [n in change.apart for n in numbers]), strict=False):
                some = table.filter(pa.array(mask, pa.bool_()))
                if len(some):
                    writer.write_table(some, row_group_size=max(1, len(some)))
            start += len(table)
        change.check(start, train)
    return {}


def _relabelled(table: pa.Table, start: int, column: str, labels: Mapping[int, Any]) -> pa.Table:
    place = table.column_names.index(column)
    field = table.schema.field(place)
    values = table.column(place).to_pylist()
    for number, value in labels.items():
        if start <= number < start + len(table):
            values[number - start] = value
    kind = field.type
    own = kind.value_type if pa.types.is_dictionary(kind) else kind
    try:
        made = pa.array(values, own)
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(f"column {column} of the file holds {own}, and not all new labels are: {error}") from error
    for number, value in labels.items():  # Arrow cuts decimals off without a word
        there = made[number - start].as_py() if start <= number < start + len(table) else value
        if there != value and not (pa.types.is_floating(own) and math.isfinite(there)):
            raise InputError(
                f"row {number} (from 0) is to be relabelled {value}, and column {column} of the file holds {own}. "
                "Write such a value, or change the column's type first."
            )
    return table.set_column(place, field, (made.dictionary_encode() if own is not kind else made).cast(kind))


def check_out(train: Path, out: Path, beside: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
    """Refuse a file to write that is not of the training file's form, or is a file that is read.

    Args:
        train: The training file.
        out: The new file.
        beside: Further files to write.
        read: Further files that are read: the work list.

    Raises:
        InputError: As said.
    """
    if ending_of(out) != ending_of(train):
        raise InputError(
            f"--out {out}: expected a name that ends in {ending_of(train)}, as {train.name} does; rows keep their form."
        )
    for path in (out, *beside):
        for name, other in (("training file", train), *(("work list", file) for file in read)):
            if path.exists() and other.exists() and path.samefile(other):
                told = f"--out {out}" if path == out else f"--out {out} writes {path}, which"
                raise InputError(f"{told} is the {name} itself. Name another file; it is not overwritten.")
