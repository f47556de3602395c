"""Work lists as files: Parquet, CSV and JSON Lines of the same columns; what was written is read without loss.

A CSV file is read as a spreadsheet leaves it: with a byte order mark, with semicolons or tabs between the values and
commas in the numbers, with the columns in another order and others beside them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from forebear.errors import DataError, InputError
from forebear.evaluation.reports.csv_cells import guarded, unguarded
from forebear.evaluation.worklists.items import EVIDENCE, TEXT, Item, WorkList, is_column, item_of
from forebear.indexer.rows.files.file_formats import SIGNS, csv_reader, json_reader, parquet_reader
from forebear.indexer.rows.files.reader import Reader, reading
from forebear.indexer.rows.files.text_file import is_utf8, open_text
from forebear.indexer.storage.atomic import write_bytes

NAME: Final = "worklist"
ENDINGS: Final = (".parquet", ".csv", ".jsonl")
FILES: Final = tuple(NAME + ending for ending in ENDINGS)
READ: Final = (*ENDINGS, ".tsv", ".json", ".ndjson", ".pq")
_WHOLE = ("row", "source_row", "line")


def rendered(work_list: WorkList, name: str = NAME) -> dict[str, bytes]:
    """The three files of a work list by name, ``worklist.parquet``, ``.csv`` and ``.jsonl``."""
    return {name + ending: as_bytes(work_list, ending) for ending in ENDINGS}


def file_names(indexes: Iterable[str]) -> list[str]:
    """Names of the files of one work list for each of several indexes, without endings; no two are the same."""
    names: list[str] = []
    for index in indexes:
        name = f"{NAME}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', index).strip('-.') or 'index'}"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def as_bytes(work_list: WorkList, ending: str) -> bytes:
    """A work list as the content of a file.

    Args:
        work_list: The list.
        ending: Of the file's name: ``.parquet``, ``.csv`` or ``.jsonl``.

    Raises:
        InputError: It is another one.
    """
    if ending == ".parquet":
        return _as_parquet(work_list)
    if ending == ".csv":
        return _as_csv(work_list)
    if ending == ".jsonl":
        return "".join(json_line(record) for record in work_list.records()).encode("utf-8", "replace")
    raise InputError(f"a work list is written as {', '.join(ENDINGS)}, not as {ending or 'a file without an ending'}.")


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON Lines."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_work_list(work_list: WorkList, path: Path) -> None:
    """Write a work list as its name ends.

    Raises:
        InputError: The name ends in none of ``ENDINGS``.
        StorageError: It cannot be written.
    """
    write_bytes(path, as_bytes(work_list, path.suffix.lower()))


def read_work_list(path: Path) -> WorkList:
    """Read a work list.

    Args:
        path: A file named as one of ``READ``; or a folder, such as a report's, with a file ``worklist.csv``,
            ``worklist.jsonl`` or ``worklist.parquet``: the one with decisions, else the one that was changed last.

    Raises:
        DataError: There is no such file, or it cannot be read as a table.
        InputError: A value is not of its column's kind; the line names the file and the row. Or two files of a folder
            hold different decisions.
    """
    files = _files_of(path)
    lists = {file: _read(file) for file in files}
    decided = [file for file in files if any(item.decision for item in lists[file])]
    for other in decided[1:]:
        if _decisions(lists[other]) != _decisions(lists[decided[0]]):
            raise InputError(f"{decided[0]} and {other} hold different decisions. Name the file that counts.")
    newest = max(files, key=lambda file: (file.stat().st_mtime_ns, -files.index(file)))
    return replace(lists[decided[0] if decided else newest], files=tuple(files))


def _decisions(work_list: WorkList) -> list[tuple[int, str, str]]:
    return sorted((item.row, item.decision, item.suggested or "") for item in work_list if item.decision)


def _read(file: Path) -> WorkList:
    reader, commas = _reader(file)
    if "row" not in reader.schema.names and (reader.schema.names or reader.n_rows):
        raise InputError(
            f"{file} has the columns {', '.join(reader.schema.names[:12])}; a work list has a column row, the number "
            "of a training row."
        )
    return WorkList(tuple(_item(file, number, record) for number, record in enumerate(_records(reader, commas), 1)))


def _item(file: Path, number: int, record: Mapping[str, Any]) -> Item:
    try:
        return item_of(record)
    except InputError as error:
        raise InputError(f"{file}, item {number}: {error}") from error


def _files_of(path: Path) -> list[Path]:
    """The files of which :func:`read_work_list` takes one.

    Raises:
        DataError: There is none.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path} holds no {', '.join(FILES)}; expected a work list, or a folder with one.")
        return found
    if not path.is_file():
        raise DataError(f"no such file: {path}. Expected a work list, as audits write it beside their pages.")
    return [path]


def _reader(file: Path) -> tuple[Reader, bool]:
    """A reader of the file; and whether commas part whole numbers from decimals in it."""
    name, ending = str(file), file.suffix.lower()
    if ending in (".parquet", ".pq"):
        return parquet_reader(name), False
    if ending in (".jsonl", ".ndjson", ".json"):
        return json_reader(name), False
    if ending not in (".csv", ".tsv"):
        raise DataError(f"{file} is no work list by its name; expected one that ends in {', '.join(READ)}.")
    if not is_utf8(name):
        raise DataError(f"{file} is not UTF-8. Save it from the spreadsheet as CSV UTF-8.")
    with reading(name, "CSV"), open_text(name) as text:
        header = text.readline(1 << 20).decode()
    signs = [sign for sign in SIGNS if "row" in next(csv.reader([header], delimiter=sign), [])]
    sign = signs[0] if signs else ","
    return csv_reader(name, sign), sign != ","


def _records(reader: Reader, commas: bool) -> Iterator[dict[str, Any]]:
    known = [name for name in reader.schema.names if is_column(name)]
    if repeated := [name for name in known if known.count(name) > 1]:
        raise InputError(f"{reader.name} has more than one column {repeated[0]!r}; take all but one out.")
    for table in reader.tables(0, known):
        for record in table.to_pylist():
            yield record if reader.typed else {name: _uncelled(name, cell, commas) for name, cell in record.items()}


def _uncelled(name: str, cell: str, commas: bool) -> str | None:
    """What a cell of a CSV file stands for."""
    if name.startswith(TEXT) or name == "text":
        return unguarded(cell)  # a text may be empty
    if commas and (name.startswith(EVIDENCE) or name == "probability"):
        cell = cell.replace(",", ".")
    return unguarded(cell) or None


def _as_csv(work_list: WorkList) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)  # its lines end in CRLF, so that a lone CR within a cell is quoted, too
    writer.writerow(work_list.columns)
    for record in work_list.records():
        writer.writerow([_cell(value) for value in record.values()])
    return out.getvalue().encode("utf-8", "replace")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return guarded(value) if isinstance(value, str) else value


def _as_parquet(work_list: WorkList) -> bytes:
    schema = pa.schema([(column, _type(column)) for column in work_list.columns])
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(work_list.records(), schema), out)
    return out.getvalue()


def _type(column: str) -> pa.DataType:
    if column in _WHOLE:
        return pa.int64()
    if column == "contradicting":
        return pa.list_(pa.int64())
    return pa.float64() if column == "probability" or column.startswith(EVIDENCE) else pa.large_string()
