"""``forebear audit``: the audits of training rows: wrong labels, duplicates, mistakes and hubs."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import (
    Listed,
    Methods,
    Neighbours,
    SampleOptions,
    SampleSeed,
    ScopeOptions,
    SearchOptions,
    Top,
)
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import MaybeTestOptions, TestOptions
from forebear.cli.screen.console import Command
from forebear.cli.screen.lists import for_screen

MISLABELLED_HELP = """Which training rows may be labelled wrongly? A ranked list, with the rows that contradict each.

Ordered by an estimate of how probably the label is wrong: by the model's checkpoints, by heads refitted without the
row, by the nearest rows, and by how often each label is written for each other. (Several labels or numbers a row: by
the mean of their ranks by influence on itself, loss and neighbours.) No true label is needed. Where you made some
labels wrong before the training (--planted), probabilities are measured on them; the order stays that of the estimate.
Where true labels are known, `forebear evaluate mislabelled` says how well this works.

Examples:

    forebear audit mislabelled --index I --top 200 --out runs/suspects

    forebear audit mislabelled --index I --group-by annotator

    forebear audit mislabelled --index I --planted flipped.txt
"""
DUPLICATES_HELP = """Which training rows say the same, and with different labels? Which test rows are among them?

Equal texts, equal words, similar word sets, and near neighbours whose words overlap; in groups, those of different
labels first.

Examples:

    forebear audit duplicates --index I --out runs/duplicates

    forebear audit duplicates --index I --test dev.csv --jaccard 0.7
"""
ERRORS_HELP = """Which training rows are behind a group of mistakes? One search for each kind of mistake.

Mispredicted test rows are grouped by gold and predicted label (and by --clusters of their features); the query vectors
of a group are summed. For methods that are linear in the query: gd, if, tracin, rep, nn-dot.

Example:

    forebear audit errors --index I --test dev.csv --method if --clusters 3 --out runs/mistakes
"""
HUBS_HELP = """Which training rows come up whatever is asked? Share of reference queries by row, and hubness.

Asked about a sample of the test rows, or else of the training rows themselves, each without its own place.

Examples:

    forebear audit hubs --index I --test dev.csv --method gd,gc,if,nn-cos --top 10 --out runs/hubs

    forebear retrieve --index I --text "a gripping film" --method gd --hubs runs/hubs
"""


def register(audits: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("mislabelled", MISLABELLED_HELP, mislabelled),
        ("duplicates", DUPLICATES_HELP, duplicates),
        ("errors", ERRORS_HELP, errors),
        ("hubs", HUBS_HELP, hubs),
    ):
        audits.command(name, help=help_text, cls=Command)(command)


@grouped(methods=Shown("gd,if"))
def mislabelled(
    index: IndexOptions,
    question: ScopeOptions,
    report: ReportOptions,
    methods: Methods = None,
    n_listed: Listed = 100,
    n_neighbours: Neighbours = 10,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            help="A column that the index keeps, or label: how many of the listed rows each of its values has.",
            show_default=False,
        ),
    ] = None,
    planted: Annotated[
        str | None,
        typer.Option(
            "--planted",
            help="A text file of numbers of rows whose labels you made wrong before the training, one a line: "
            "probabilities are measured on them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the training rows that may be labelled wrongly."""
    from forebear.evaluation.python.audits import suspects

    shown = partial(for_screen, ("row", "estimated probability", "probability", "mean rank", "label", "suggested"))
    own = {"n_listed": n_listed, "n_neighbours": n_neighbours, "group_by": group_by, "planted": planted}
    report.call(suspects, index.open(), question, shown=shown, methods=methods, **own)


@grouped(test=Shown("only training rows are looked at"))
def duplicates(
    index: IndexOptions,
    test: MaybeTestOptions,
    report: ReportOptions,
    n_listed: Listed = 100,
    jaccard: Annotated[float, typer.Option("--jaccard", help="Least similarity of word sets, 0 to 1.")] = 0.8,
    cosine: Annotated[
        float, typer.Option("--cosine", help="Least cosine of the features of neighbours, -1 to 1.")
    ] = 0.95,
    cosine_jaccard: Annotated[
        float, typer.Option("--cosine-jaccard", help="Least similarity of the word sets of such neighbours, 0 to 1.")
    ] = 0.5,
    neighbours: Neighbours = 10,
) -> None:
    """List training rows that say the same, and test rows among them."""
    from forebear.evaluation.python.audits import duplicates

    shown = partial(for_screen, ("group", "test row", "row", "label", "test label", "kind"))
    thresholds = {"jaccard": jaccard, "cosine": cosine, "cosine_jaccard": cosine_jaccard, "neighbours": neighbours}
    report.call(duplicates, index.open(), shown=shown, rows=test.rows, n_listed=n_listed, **thresholds)


@grouped(methods=Shown("if"))
def errors(
    index: IndexOptions,
    test: TestOptions,
    question: SearchOptions,
    report: ReportOptions,
    methods: Methods = None,
    top: Top = 10,
    n_clusters: Annotated[
        int, typer.Option("--clusters", help="Groups that each kind of mistake is parted into, by features; 1: none.")
    ] = 1,
    seed: SampleSeed = 0,
) -> None:
    """List the training rows behind each kind of mistake."""
    from forebear.evaluation.python.audits import errors

    shown = partial(for_screen, ("group", "method", "side", "row", "score", "effect", "label"), notes=True)
    own = {"top": top, "n_clusters": n_clusters, "seed": seed}
    report.call(errors, index.open(), question, shown=shown, rows=test.rows, methods=methods, **own)


@grouped(n_queries=500, test=Shown("the training rows"))
def hubs(
    index: IndexOptions,
    test: MaybeTestOptions,
    question: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    methods: Methods = None,
    top: Top = 10,
    n_listed: Annotated[int, typer.Option("--listed", help="Rows listed for each method.")] = 20,
) -> None:
    """List the training rows that come up for many queries."""
    from forebear.evaluation.python.audits import hubs

    shown = partial(for_screen, ("method", "row", "share", "label"))
    own = {"top": top, "n_listed": n_listed}
    report.call(hubs, index.open(), question, sample, shown=shown, rows=test.rows, methods=methods, **own)
