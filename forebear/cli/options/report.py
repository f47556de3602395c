"""Options for what a command writes and prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import Options
from forebear.cli.screen.console import progress_bar, say
from forebear.cli.screen.tables import show_report

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Report

FOLDER = typer.Option(
    "--out",
    help="Folder to write: report.html, table.csv, result.json, and report.json, which `forebear report` reads.",
    show_default=False,
)
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only: no progress, no news.")]
JsonOut = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options, panel="Output"):
    """Whether messages are printed, and whether files may be replaced."""

    force: Force = False
    quiet: Quiet = False

    def progress(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """A progress bar on the screen, unless ``--quiet`` is given."""
        return progress_bar(quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class FolderOptions(OutputOptions):
    """A folder that a report is written to."""

    out: Annotated[str, FOLDER]

    @property
    def folder(self) -> Path:
        """The folder ``--out`` as a path."""
        return Path(self.out)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(OutputOptions):
    """Where the report is written, and how it is printed."""

    out: Annotated[str | None, FOLDER] = None
    json_out: JsonOut = False

    def check(self) -> None:
        """Refuse a folder that the report cannot be written to, before any work."""
        from forebear.evaluation.reports.report import check_folder

        if self.out is not None:
            check_folder(Path(self.out), force=self.force)

    def finish(self, report: Report, result: dict[str, Any], shown: Report | None = None) -> None:
        """Write the report to ``--out``, if given, and print it; ``shown`` is a shorter version for the screen."""
        from forebear.evaluation.reports.report import render_json, write_report

        if self.out is not None:
            page = write_report(report, Path(self.out), result=result, force=self.force)
        if self.json_out:
            sys.stdout.write(render_json({"provenance": dict(report.provenance), **result}))
        else:
            show_report(shown or report)
        if self.out is not None:
            say_written(page, quiet=self.quiet)


def say_written(page: Path, *more: str, quiet: bool) -> None:
    """Print the names of the files of a report that was written, and of ``more`` files beside it."""
    from forebear.evaluation.reports.report import REPORT_FILES

    *names, last = [str(page), *REPORT_FILES[1:], *more]
    say(f"wrote {', '.join(names)} and {last}", quiet=quiet)
