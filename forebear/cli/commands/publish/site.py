"""``forebear export-site``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped, values_of
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, QuestionOptions, Recall, Top
from forebear.cli.options.report import Hubs, OutputOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command, listed, progress_bar, say
from forebear.wording import caller

HELP = """Explain all test rows of a file, and write the explorer: a folder of pages that opens without a server.

Open index.html in a browser: a list of test rows (wrong ones, confident and wrong ones, by label, by text), for each
the rows for and against its prediction by every method side by side, for each of these rows the predictions that it
drives, and a work list of rows that you mark.

Examples:

    forebear export-site --index my-index --test dev.csv --out site

    forebear export-site --index my-index --test dev.csv --method gc,if --hubs runs/hubs --out site
"""


@dataclass(frozen=True, kw_only=True)
class SiteOptions(OutputOptions):
    """Where the site goes."""

    out: Annotated[
        str, typer.Option("--out", help="Folder to write: index.html, and beside it what it loads.", show_default=False)
    ]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export-site", help=HELP, cls=Command)(export_site)


@grouped(methods=Shown("tracin-we-topk where the index holds words, and gc"), top=5)
def export_site(
    index: IndexOptions,
    test: TestOptions,
    question: QuestionOptions,
    output: SiteOptions,
    methods: Methods = None,
    top: Top = 5,
    recall: Recall = 0.98,
    hubs: Hubs = None,
) -> None:
    """Write the explorer of the predictions for test rows."""
    from forebear.evaluation.explorer import site
    from forebear.evaluation.explorer.asking import ask

    folder = Path(output.out)
    site.check_site(folder, force=output.force)
    choices = values_of(question) | {"methods": listed(methods), "top": top, "recall": recall}
    asked = ask(index.open(), test.rows, hubs=hubs, **choices)
    with progress_bar() as progress:
        command = caller("forebear export-site")
        n_rows = site.export_site(asked, folder, command, force=output.force, progress=progress)
    say(f"wrote {folder / site.PAGE}: {len(asked.test):,} test rows, {n_rows:,} training rows behind them")
