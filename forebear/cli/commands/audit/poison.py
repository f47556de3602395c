"""``forebear audit poison``: rows that plant a behaviour."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Listed, SampleSeed
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.retraining import RetrainOptions
from forebear.cli.options.rows import MaybeTestOptions
from forebear.cli.screen.console import Command
from forebear.cli.screen.lists import for_screen
from forebear.cli.workers import start_workers

POISON_HELP = """Which training rows plant a behaviour by a word or phrase that they share, and what is the phrase?

Phrases of which nearly all rows have one label, and more of them than what the phrase means explains, as an encoder
that was not fine-tuned tells. Each is put into rows of other labels: does the model follow it? And cut out of its own.
No test rows are needed; with suspicious ones (--test) only phrases that stand in them are looked at. --retrain trains
again without the listed rows. Not found are attacks without a phrase: by style, or by words that do not stand together.

Examples:

    forebear audit poison --index I --out runs/poison

    forebear audit poison --index I --test suspicious.csv --retrain full --seeds 2 --out runs/poison
"""


def register(audits: typer.Typer) -> None:
    """Add the command to the group."""
    audits.command("poison", help=POISON_HELP, cls=Command)(poison)


@grouped(recipe=Shown("nothing is trained"), n_seeds=3, test=Shown("none; all phrases are looked at"))
def poison(
    index: IndexOptions,
    test: MaybeTestOptions,
    retraining: RetrainOptions,
    report: ReportOptions,
    n_measured: Annotated[
        int,
        typer.Option(
            "--measured", help="Phrases that are put into other rows: those of nearly one label first, by association."
        ),
    ] = 40,
    n_listed: Listed = 100,
    sentence_model: Annotated[
        str | None,
        typer.Option(
            "--sentence-model",
            help="An encoder that was not fine-tuned, a folder or hub name: what a phrase means is asked of it.",
            show_default="the index's, or minilm",
        ),
    ] = None,
    seed: SampleSeed = 0,
) -> None:
    """List the training rows that plant a behaviour."""
    from forebear.evaluation.python.planted import poison

    report.check()
    how = retraining.how(index.first_device(), start_workers)
    shown = partial(for_screen, ("row", "phrase", "label", "prediction", "planted", "rows", "unexplained", "turned"))
    own = {"n_measured": n_measured, "n_listed": n_listed, "sentence_model": sentence_model, "seed": seed}
    report.call(poison, index.open(), shown=shown, rows=test.rows, how=how, **own)
