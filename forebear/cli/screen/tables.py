"""Reports on the screen: summaries, and tables that show every number whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebear.cli.screen.console import OUT, shortened

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Report
    from forebear.evaluation.reports.report import Table as ReportTable

_GAP = 3  # between two columns of a table on the screen
_TEXT_WIDTH = 24  # least width of a column of texts


def show_report(report: Report) -> None:
    """Print a report's summary and tables."""
    OUT.print(report.title, style="bold", markup=False)
    OUT.print(report.summary, markup=False)
    for table in report.tables:
        show_table(table)


def show_table(table: ReportTable) -> None:
    """Print one table of a report; texts wrap, numbers and names are never cut short, however narrow the screen."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.table import Table

    from forebear.evaluation.reports.report import format_cell

    rows = [
        [shortened(format_cell(cell, 3 if isinstance(cell, float) else None)) for cell in row] for row in table.rows
    ]
    numbers = [any(isinstance(row[i], float | int) for row in table.rows) for i in range(len(table.columns))]
    longest = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(table.columns))]
    heads = list(table.columns)
    if sum(_GAP + max(n, cell_len(head)) for n, head in zip(longest, heads, strict=True)) > OUT.width:
        heads = [head.replace(" ", "\n") if numbers[i] else head for i, head in enumerate(heads)]
    least = sum(
        _GAP + (max(n, *map(cell_len, heads[i].split("\n"))) if numbers[i] or i == 0 else min(n, _TEXT_WIDTH))
        for i, n in enumerate(longest)
    )
    grid = Table(
        title=escape(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False,
        width=least if least > OUT.width else None,
    )  # fmt: skip
    for i, head in enumerate(heads):
        grid.add_column(escape(head), justify="right" if numbers[i] else "left", no_wrap=numbers[i] or i == 0)
    for row in rows:
        grid.add_row(*map(escape, row))
    OUT.print(grid, crop=False)
    if table.note:
        OUT.print(table.note, style="dim", markup=False)
