"""``forebear audit deletion`` and ``sources``: the model without some rows, or without a source of rows."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import HeadDamping, Listed, SampleOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.retraining import RetrainOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command
from forebear.cli.screen.lists import for_screen
from forebear.cli.workers import start_workers

DELETION_HELP = """What would leaving rows out change, and how strongly does the model depend on each of them?

Predicted for every test row: the change of its loss, probability and label, by summed influence, a Newton step and a
refit of the head; accuracy by group. --retrain trains again without the rows (full, top-K, head) and puts what comes
true beside it. --rows is a file: a work list (its rows decided to go, if any are), a table with a column row, with the
texts or with an id that the index keeps, or numbers such as 17 and 230-240.

Examples:

    forebear audit deletion --index I --rows runs/suspects/worklist.csv --test dev.csv --out runs/deletion

    forebear audit deletion --index I --rows ids.csv --test dev.csv --group-by genre --retrain full --seeds 3
"""
SOURCES_HELP = """Which annotator, crawl, year or template helps, and which drives the errors?

For each value of a column that the index keeps: what its rows are worth to the test rows' loss, beside as many other
rows, with intervals and p of a permutation test; its share of what is behind the errors; and what leaving all of it out
would change.

Examples:

    forebear audit sources --index I --column annotator --test dev.csv --out runs/annotators

    forebear audit sources --index I --column year --test dev.csv --left-out 0
"""


def register(audits: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (("deletion", DELETION_HELP, deletion), ("sources", SOURCES_HELP, sources)):
        audits.command(name, help=help_text, cls=Command)(command)


@grouped(recipe=Shown("nothing is trained"), n_seeds=3, n_queries=0)
def deletion(
    index: IndexOptions,
    test: TestOptions,
    sample: SampleOptions,
    retraining: RetrainOptions,
    report: ReportOptions,
    rows: Annotated[
        str, typer.Option("--rows", help="File of the training rows that are left out.", show_default=False)
    ],
    group_by: Annotated[
        str | None,
        typer.Option("--group-by", help="A column of the test rows: accuracy by its values.", show_default=False),
    ] = None,
    n_listed: Listed = 100,
    damping: HeadDamping = None,
) -> None:
    """Report what leaving rows out would change."""
    from forebear.evaluation.python.leaving_out import deletion

    report.check()
    how = retraining.how(index.first_device(), start_workers)
    shown = partial(
        for_screen, ("row", "label", "loss", "rise alone", "test row", "predicted now", "predicted without")
    )
    own = {"without": rows, "group_by": group_by, "n_listed": n_listed, "damping": damping}
    report.call(deletion, index.open(), sample, shown=shown, rows=test.rows, how=how, **own)


@grouped(n_queries=0)
def sources(
    index: IndexOptions,
    test: TestOptions,
    sample: SampleOptions,
    report: ReportOptions,
    column: Annotated[
        str,
        typer.Option(
            "--column", help="A column that the index keeps, or label: its values are the sources.", show_default=False
        ),
    ],
    n_left_out: Annotated[
        int,
        typer.Option(
            "--left-out", help="Sources that are left out whole, the worst and the best; a refit of the head each."
        ),
    ] = 20,
    n_listed: Listed = 100,
    damping: HeadDamping = None,
) -> None:
    """Report what each source is worth."""
    from forebear.evaluation.python.leaving_out import sources

    shown = partial(for_screen, ("row", "label", "prediction", "rise"))
    own = {"column": column, "n_left_out": n_left_out, "n_listed": n_listed, "damping": damping}
    report.call(sources, index.open(), sample, shown=shown, rows=test.rows, **own)
