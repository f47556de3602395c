"""Lists of training rows in reports, cut to what a screen holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Cell, Report, Table

SCREEN_ROWS, SCREEN_TEXT = 20, 120  # rows of a list on the screen, and characters of each text


def for_screen(columns: Sequence[str], report: Report, *, notes: bool = False) -> Report:
    """The report, its lists of rows cut to these columns, the texts, and ``SCREEN_ROWS`` rows.

    Args:
        columns: Names of columns besides texts; one without a value in these rows is left out.
        report: The report.
        notes: Whether the lists' notes are shown: they speak of none but these columns.
    """
    return replace(report, tables=[_cut(table, columns, notes=notes) for table in report.tables])


def _cut(table: Table, columns: Sequence[str], *, notes: bool) -> Table:
    if not any(name.startswith("text: ") for name in table.columns):
        return table
    shown = table.rows[:SCREEN_ROWS]
    has_value = [not shown or any(row[i] is not None for row in shown) for i in range(len(table.columns))]
    kept = [
        i for i, name in enumerate(table.columns) if name.startswith("text: ") or (name in columns and has_value[i])
    ]

    def short(cell: Cell) -> Cell:
        return f"{cell[:SCREEN_TEXT]}…" if isinstance(cell, str) and len(cell) > SCREEN_TEXT else cell

    rows = [[short(row[i]) for i in kept] for row in shown]
    more = f"{len(rows)} of {len(table.rows)} rows; --out FOLDER writes all of them, and all columns." if rows else ""
    note = " ".join(filter(None, [table.note if notes else "", more]))
    return replace(table, columns=[table.columns[i] for i in kept], rows=rows, note=note)
