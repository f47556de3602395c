"""``forebear report``: reports side by side on one page.

Tables of the same title are joined by their labels: the first column, those after it that hold only texts, and as many
columns of whole numbers as it takes to tell the rows apart. Each report then has value columns of its own. Figures
follow one another; provenance is kept apart by report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebear.errors import CorruptIndexError, InputError
from forebear.evaluation.reports.report import Cell, Figure, Report, Table, report_from_json

RESULT, REPORT = "result.json", "report.json"


@dataclass(frozen=True)
class Folder:
    """A report folder.

    Attributes:
        name: Name of the folder in column headings and titles; no two folders have the same.
        path: Path of the folder.
        report: The report in it, without data rows.
        result_sha256: sha256 of its ``result.json``.
    """

    name: str
    path: Path
    report: Report
    result_sha256: str


def read_folders(paths: Sequence[str]) -> list[Folder]:
    """Open report folders.

    Raises:
        InputError: Fewer than two, one named twice, or a folder that holds no result or no report.
        CorruptIndexError: A report that cannot be read.
    """
    if len(paths) < 2:
        raise InputError(f"{len(paths)} folder given; expected two or more to put side by side.")
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a folder is named twice; expected different ones.")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Folder:
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no {RESULT}. Give folders that an evaluation or audit wrote by --out.")
    if not (folder / REPORT).is_file():
        raise InputError(
            f"{folder} holds no {REPORT}: an older version wrote it. Write it again: its {RESULT} names the command."
        )
    try:
        report = report_from_json((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptIndexError(f"{folder / REPORT} cannot be read as a report ({error}). Write it again.") from error
    return Folder(name, folder, report, hashlib.sha256((folder / RESULT).read_bytes()).hexdigest())


def side_by_side(folders: Sequence[Folder], command: str) -> tuple[Report, dict[str, Any]]:
    """One report joined from several, and the names, paths and digests of the folders for ``result.json``."""
    titles = list(dict.fromkeys(table.title for folder in folders for table in folder.report.tables))
    tables: list[Table] = []
    for title in titles:
        named_tables = [(f.name, table) for f in folders for table in f.report.tables if table.title == title]
        joined = join_tables(title, named_tables)
        tables += [joined] if joined is not None else [_named(name, table) for name, table in named_tables]
    figures = [
        Figure(f"{folder.name}: {figure.title}", figure.svg, figure.caption)
        for folder in folders
        for figure in folder.report.figures
    ]
    provenance = {
        f"{folder.name}: {key}": value
        for folder in folders
        for key, value in {
            "folder": str(folder.path), "result sha256": folder.result_sha256, **folder.report.provenance
        }.items()
    }  # fmt: skip
    report = Report(
        "Side by side: " + ", ".join(folder.name for folder in folders),
        " ".join(f"{folder.name}: {folder.report.title}. {folder.report.summary}" for folder in folders),
        tables,
        figures,
        (),
        {**provenance, "command": command},
    )
    result = {
        "folders": [
            {"name": f.name, "path": f.path, "title": f.report.title, "result_sha256": f.result_sha256} for f in folders
        ]
    }
    return report, result


def join_tables(title: str, tables: Sequence[tuple[str, Table]]) -> Table | None:
    """Tables of several reports as one, a group of columns each; rows in the order in which they first come.

    Args:
        title: Title of all the tables.
        tables: Pairs of a report's name and its table, at least one.

    Returns:
        The joined table; None where there is only one table, where label columns differ, or where a table has two rows
        of the same labels, so that rows cannot be matched.
    """
    n_labels = min(_n_labels(table) for _, table in tables)
    while any(_repeats(table, n_labels) for _, table in tables) and all(
        n_labels + 1 < len(table.columns) and all(isinstance(row[n_labels], int) for row in table.rows)
        for _, table in tables
    ):
        n_labels += 1  # such as the number of rows removed
    heads = {tuple(table.columns[:n_labels]) for _, table in tables}
    keyed = [{tuple(row[:n_labels]): row[n_labels:] for row in table.rows} for _, table in tables]
    unique = all(len(rows) == len(table.rows) for rows, (_, table) in zip(keyed, tables, strict=True))
    if len(tables) < 2 or len(heads) > 1 or not unique:
        return None
    columns = list(heads.pop()) + [f"{name} · {c}" for name, table in tables for c in table.columns[n_labels:]]
    rows: list[list[Cell]] = []
    for key in dict.fromkeys(key for rows_of_report in keyed for key in rows_of_report):
        cells: list[Cell] = list(key)
        for rows_of_report, (_, table) in zip(keyed, tables, strict=True):
            cells += rows_of_report.get(key, [None] * (len(table.columns) - n_labels))
        rows.append(cells)
    notes = list(dict.fromkeys(table.note for _, table in tables if table.note))
    if len(notes) > 1:
        notes = [f"{name}: {table.note}" for name, table in tables if table.note]
    return Table(title, columns, rows, " ".join(notes))


def _repeats(table: Table, n_labels: int) -> bool:
    return len({tuple(row[:n_labels]) for row in table.rows}) < len(table.rows)


def _n_labels(table: Table) -> int:
    """Number of columns that label the rows: the first, and those after it that hold only texts; at least one column is
    left for values."""
    for i in range(1, len(table.columns)):
        if not table.rows or not all(isinstance(row[i], str) for row in table.rows):
            return i
    return 1


def _named(name: str, table: Table) -> Table:
    return Table(f"{name}: {table.title}", table.columns, table.rows, table.note)
