"""``forebear demo``."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import grouped
from forebear.cli.options.model import Device, Seed
from forebear.cli.options.report import OutputOptions
from forebear.cli.screen.console import OUT, Command, progress_bar, say
from forebear.cli.screen.tables import show_table

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Group, Passage

HELP = """See the whole of it, offline: train, index, retrieve, audit, report, on a small corpus with planted faults.

The corpus is generated here: sentence pairs with a lexical-overlap artifact and a family of wrong labels planted in
the training rows. The demo ends by saying whether attribution found them; exit code 1 if it did not.

Example: forebear demo --out runs/demo
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help=HELP, cls=Command)(demo)


@grouped()
def demo(
    output: OutputOptions,
    out: Annotated[
        str, typer.Option("--out", help="Folder for data, run, index and report.", rich_help_panel="Output")
    ] = "runs/demo",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Run the demo; exit code 1 if attribution did not find the planted faults."""
    from forebear.evaluation.demo.run import run_demo

    with progress_bar() as progress:
        outcome = run_demo(
            out,
            seed=seed,
            device=device,
            force=output.force,
            progress=progress,
            say=say,
        )
    report = outcome.report
    for group in report.groups[:1]:
        show_group(group)
    OUT.print(report.summary, markup=False)
    show_table(report.tables[0])
    say(f"every method, every table and the rows themselves: {outcome.page}")
    program = _program()
    say(f"ask more: {program} retrieve --index {out}/index --test {out}/data/probe.parquet --method gc,if")
    say(f"open it in a browser: {program} serve {out}/index")
    if not outcome.found:
        raise typer.Exit(1)


def _program() -> str:
    """How this program can be started from here, in a shell that may not have the environment's folder in its path."""
    return "forebear" if shutil.which("forebear") else os.path.relpath(sys.argv[0])


def show_group(group: Group) -> None:
    """Print a query and the first rows behind its answer."""
    OUT.print(group.title, style="bold", markup=False)
    if group.query is not None:
        _show_passage(group.query)
    for passage in group.passages[:3]:
        _show_passage(passage)
    OUT.print()


def _show_passage(passage: Passage) -> None:
    from forebear.evaluation.reports.report import format_cell

    facts = ", ".join(f"{name} {format_cell(value)}" for name, value in passage.facts.items())
    note = f"  [{passage.note}]" if passage.note else ""
    OUT.print(f"  {passage.heading}: {facts}{note}", markup=False)
    for text in passage.texts.values():
        OUT.print(f"    {text}", markup=False)
