"""``forebear demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from forebear.cli.audit import show_report
from forebear.cli.console import progress_bar, say
from forebear.cli.options import Device, Force, Quiet

HELP = """See the whole of it, offline: train, index, retrieve, audit, report, on a small corpus with planted faults.

The corpus is generated here: sentence pairs with a lexical-overlap artifact and a family of wrong labels planted in
the training rows. The demo ends by saying whether attribution found them; exit code 1 if it did not.

Example: forebear demo --out runs/demo
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help=HELP)(demo)


def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for data, run, index and report.")] = "runs/demo",
    seed: Annotated[int, typer.Option("--seed", help="Of the corpus and the training.")] = 0,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See HELP."""
    from forebear.evaluation.demo import run_demo

    with progress_bar(quiet=quiet) as progress:
        outcome = run_demo(
            out, seed=seed, device=device, force=force, progress=progress, say=lambda line: say(line, quiet=quiet)
        )
    show_report(outcome.report)
    say(f"report: {outcome.page}", quiet=quiet)
    say(f"ask more: forebear retrieve --index {out}/index --test {out}/data/probe.parquet --method gc,if", quiet=quiet)
    if not outcome.found:
        raise typer.Exit(1)
