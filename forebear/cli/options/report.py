"""Options for what a command writes and prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import Options, values_of
from forebear.cli.screen.console import be_quiet, listed, progress_bar, say
from forebear.cli.screen.tables import show_report

if TYPE_CHECKING:
    from forebear.evaluation.python.opening import Finding
    from forebear.evaluation.reports.report import Report
    from forebear.retriever.retriever import Retriever

FOLDER = typer.Option(
    "--out",
    help="Folder to write: report.html, tables as CSV, result.json, and report.json, which `forebear report` reads.",
    show_default=False,
)
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results only: no progress, no news.", callback=be_quiet)
]
Keep = Annotated[
    bool, typer.Option("--keep", help="Keep the result where retrieve and explain find it, to say it with answers.")
]
Hubs = Annotated[
    str | None,
    typer.Option(
        "--hubs",
        help="Folder of `forebear audit hubs`: adds each proponent's share of its queries.",
        show_default=False,
    ),
]
JsonOut = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options, panel="Output"):
    """Whether messages are printed, and whether files may be replaced."""

    force: Force = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class FolderOptions(OutputOptions):
    """A folder that a report is written to."""

    out: Annotated[str, FOLDER]

    @property
    def folder(self) -> Path:
        """The folder ``--out`` as a path."""
        return Path(self.out)

    def call(
        self,
        function: Callable[..., Finding[Any]],
        retriever: Retriever | Sequence[Retriever],
        *groups: Options,
        **given: Any,
    ) -> None:
        """See :meth:`ReportOptions.call`."""
        ReportOptions(**values_of(self)).call(function, retriever, *groups, **given)


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

    def call(
        self,
        function: Callable[..., Finding[Any]],
        retriever: Retriever | Sequence[Retriever],
        *groups: Options,
        shown: Callable[[Report], Report] | None = None,
        **given: Any,
    ) -> None:
        """Call a function of ``forebear.audits`` or ``forebear.evaluations``; write and print what it finds.

        See :meth:`check` of what is refused first.

        Args:
            function: The function.
            retriever: Over the index, or over each of several.
            *groups: Groups of options that are keywords of the function by the same names.
            shown: Shortens the report for the screen.
            **given: Further keywords of the function. What is None or empty is left to the function's defaults; lists
                of texts may hold several values in one, separated by commas.
        """
        from forebear.evaluation.reports.report import render_json
        from forebear.evaluation.worklists.files import FILES, file_names

        self.check()
        given = {name: _values(value) for name, value in (values_of(*groups) | given).items()}
        given = {name: value for name, value in given.items() if value is not None}
        with progress_bar() as progress:
            if "progress" in signature(function).parameters:
                given["progress"] = progress
            finding = function(retriever, **given)
        page = None if self.out is None else finding.write(self.out, force=self.force)
        if self.json_out:
            sys.stdout.write(render_json({"provenance": dict(finding.report.provenance), **finding.result}))
        else:
            show_report(finding.report if shown is None else shown(finding.report))
        if page is not None:
            own = [f"{name}.csv" for name in file_names(finding.work_lists)]
            say_written(page, *own, *([] if finding.work_list is None else FILES))


def _values(value: Any) -> Any:
    """An option's value: a list of texts as its values one by one; None for an empty list."""
    if not isinstance(value, list):
        return value
    return (listed(value) if all(isinstance(part, str) for part in value) else value) or None


def say_written(page: Path, *more: str) -> None:
    """Print the names of the files of a report that was written, and of ``more`` files beside it."""
    from forebear.evaluation.reports.report import REPORT_FILES

    *names, last = [str(page), *REPORT_FILES[1:], *more]
    say(f"wrote {', '.join(names)} and {last}")
