"""``forebear report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.options.groups import grouped
from forebear.cli.options.report import FolderOptions, say_written
from forebear.cli.screen.console import OUT, Command
from forebear.cli.screen.tables import show_table
from forebear.errors import InputError
from forebear.wording import caller

HELP = """Put the reports of several evaluations or audits side by side, on one page.

Tables of the same title are joined by their labels, each report with columns of its own.

Example:

    forebear report runs/hans-head runs/hans-all --out runs/hans-compared
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report", help=HELP, cls=Command)(report)


@grouped()
def report(
    folders: Annotated[list[str], typer.Argument(help="Folders written by --out.", show_default=False)],
    output: FolderOptions,
) -> None:
    """Join several reports on one page."""
    from forebear.evaluation.reports.report import check_folder, write_report
    from forebear.evaluation.reports.side_by_side import read_folders, side_by_side

    if output.folder.resolve() in [Path(folder).resolve() for folder in folders]:
        raise InputError(f"--out {output.out} is one of the reports that are read. Name another folder.")
    check_folder(output.folder, force=output.force)
    page, result = side_by_side(read_folders(folders), caller("forebear report"))
    written = write_report(page, output.folder, result=result, force=output.force)
    OUT.print(page.title, style="bold", markup=False)
    for table in page.tables:
        if not any(
            column.startswith("text: ") for column in table.columns
        ):  # lists of rows are shown on the page alone
            show_table(table)
    say_written(written)
