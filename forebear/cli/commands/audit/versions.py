"""``forebear audit regressions``: a model beside the version before it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Listed, Methods, SampleSeed, ScopeOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command
from forebear.cli.screen.lists import for_screen

REGRESSIONS_HELP = """Which test rows did the version before have right, and which training rows broke them?

Training rows are matched by content: which are new, copied, labelled otherwise or gone. The new, copied and relabelled
rows are ranked by their scores for the wrong predictions, less what they do to rows that stayed right. Test rows that
the same training rows drive are one cause. Rows that improved are told alike.

Examples:

    forebear audit regressions --index new-index --before old-index --test dev.csv --out runs/regressions

    forebear audit regressions --index new-index --before old-index --test dev.csv --method gc
"""


def register(audits: typer.Typer) -> None:
    """Add the command to the group."""
    audits.command("regressions", help=REGRESSIONS_HELP, cls=Command)(regressions)


@grouped(methods=Shown("if"))
def regressions(
    index: IndexOptions,
    test: TestOptions,
    question: ScopeOptions,
    report: ReportOptions,
    before: Annotated[str, typer.Option("--before", help="The index of the version before.", show_default=False)],
    before_model: Annotated[
        str | None,
        typer.Option(
            "--before-model", help="The model of that index, if it has moved.", show_default="where it lay then"
        ),
    ] = None,
    methods: Methods = None,
    n_listed: Listed = 100,
    seed: SampleSeed = 0,
) -> None:
    """List the training rows behind what a version has wrong and the one before had right."""
    from forebear.evaluation.python.audits import regressions

    shown = partial(for_screen, ("rank", "row", "change", "label", "score", "share", "cause"))
    own = {"before": before, "before_model": before_model, "rows": test.rows, "n_listed": n_listed, "seed": seed}
    report.call(regressions, index.open(), question, shown=shown, methods=methods, **own)
