"""``forebear flip``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.queries import QueryOptions
from forebear.cli.options.question import HeadDamping, SampleOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.retraining import RetrainOptions
from forebear.cli.screen.console import Command
from forebear.cli.screen.lists import for_screen
from forebear.cli.workers import start_workers

if TYPE_CHECKING:
    from forebear.indexer.rows.row_source import RowSource

HELP = """The fewest training rows whose removal, or relabelling, changes a prediction.

Rows are taken greedily by their predicted effects, which are predicted anew as rows go. Every set is verified: the head
is fitted again without it; with --retrain the model too, in pairs of the same seed, and the set grows or shrinks until
it flips most seeds. --out also writes patch.csv: the rows, their labels, and what becomes of each.

Examples:

    forebear flip --index I --text "a gripping film"

    forebear flip --index I --text "A man sleeps." --pair "A person is awake." --to entailment --relabel

    forebear flip --index I --test dev.csv --queries 100 --out runs/flips

    forebear flip --index I --text "a gripping film" --retrain full --seeds 5 --out runs/flip
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("flip", help=HELP, cls=Command)(flip)


@grouped(recipe=Shown("the head alone"), n_queries=100)
def flip(
    index: IndexOptions,
    queries: QueryOptions,
    sample: SampleOptions,
    retraining: RetrainOptions,
    report: ReportOptions,
    to: Annotated[
        str | None, typer.Option("--to", help="The label to be predicted.", show_default="any other than now")
    ] = None,
    relabel: Annotated[bool, typer.Option("--relabel", help="Give rows another label; do not take them out.")] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Training rows that are changed at most.", show_default="half of them"),
    ] = None,
    damping: HeadDamping = None,
) -> None:
    """Find the fewest training rows that flip predictions."""
    from forebear.evaluation.python.flipping import flip

    queries.check("predicted")
    report.check()
    retriever = index.open()
    how = retraining.how(index.first_device(), start_workers)

    def rows(*, need_labels: bool, **_columns: object) -> RowSource:
        return queries.open_rows(retriever, need_labels=need_labels)

    shown = partial(for_screen, ("test row", "row", "label", "new label", "effect"), notes=True)
    own = {"to": to, "relabel": relabel, "limit": limit, "damping": damping, "how": how}
    report.call(flip, retriever, sample, shown=shown, rows=rows, **own)
