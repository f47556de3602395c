"""``forebear audit``: the audits of training rows: wrong labels, duplicates, mistakes and hubs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import (
    command_line,
    default_methods,
    make_question,
    open_queries,
    open_retriever,
    warn_of_labels,
)
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
from forebear.errors import InputError

if TYPE_CHECKING:
    from forebear.evaluation.reports.report import Cell, Report, Table

MISLABELLED_HELP = """Which training rows may be labelled wrongly? A ranked list, with the rows that contradict each.

Ordered by the mean of a row's ranks by influence on itself, loss and disagreement of its neighbours. No true label is
needed; where some are known, `forebear evaluate mislabelled` says how well this works.

Example:

    forebear audit mislabelled --index I --top 200 --out runs/suspects
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
SCREEN_ROWS, SCREEN_TEXT = 20, 120  # rows of a list on the screen, and characters of each text


def register(audits: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("mislabelled", MISLABELLED_HELP, mislabelled),
        ("duplicates", DUPLICATES_HELP, duplicates),
        ("errors", ERRORS_HELP, errors),
        ("hubs", HUBS_HELP, hubs),
    ):
        audits.command(name, help=help_text, cls=Command)(command)


@grouped(method=Shown("gd,if"))
def mislabelled(
    index_options: IndexOptions,
    question_options: ScopeOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Listed = 100,
    neighbours: Neighbours = 10,
) -> None:
    """List the training rows that may be labelled wrongly."""
    from forebear.evaluation.audits.rows.suspects import suspects, suspects_report

    retriever = open_retriever(index_options, report)
    question = make_question(
        retriever,
        method or default_methods(retriever, ["gd", "if"], question_options),
        question_options,
        target="gold",
        quiet=report.quiet,
    )
    found = suspects(retriever, question, n_neighbours=neighbours)
    page, result = suspects_report(found, retriever, question, top, command_line())
    report.finish(page, result, _for_screen(page, ("row", "mean rank", "label", "suggested")))


@grouped(test=Shown("only training rows are looked at"))
def duplicates(
    index_options: IndexOptions,
    test_options: MaybeTestOptions,
    report: ReportOptions,
    top: Listed = 100,
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
    from forebear.evaluation.audits.rows.duplicates import Thresholds, duplicates_report, leaks
    from forebear.evaluation.audits.rows.duplicates import duplicates as find
    from forebear.evaluation.common.queries import sample_queries

    thresholds = Thresholds(jaccard=jaccard, cosine=cosine, cosine_jaccard=cosine_jaccard, neighbours=neighbours)
    thresholds.check()
    retriever = open_retriever(index_options, report)
    queries = None
    if test_options.test is not None:
        source = test_options.open(test_options.test, retriever)
        warn_of_labels(retriever, source, required=False)
        queries = sample_queries(retriever, source, 0, 0)
    groups = find(retriever.index, thresholds)
    leaked = [] if queries is None else leaks(retriever.index, queries, thresholds)
    page, result = duplicates_report(groups, retriever, thresholds, top, command_line(), queries, leaked)
    report.finish(page, result, _for_screen(page, ("group", "test row", "row", "label", "test label", "kind")))


@grouped(method=Shown("if"))
def errors(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: SearchOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Top = 10,
    clusters: Annotated[
        int, typer.Option("--clusters", help="Groups that each kind of mistake is parted into, by features; 1: none.")
    ] = 1,
    seed: SampleSeed = 0,
) -> None:
    """List the training rows behind each kind of mistake."""
    from forebear.evaluation.audits.rows.errors import errors_report, explain_groups, group_mistakes, mistakes_of

    retriever = open_retriever(index_options, report)
    question = make_question(
        retriever,
        method or default_methods(retriever, ["if"], question_options),
        question_options,
        top=top,
        aggregate=True,
        quiet=report.quiet,
    )
    source = test_options.open(test_options.test, retriever, need_labels=True)
    if clusters < 1:
        raise InputError(f"--clusters {clusters}: expected at least 1.")
    with report.progress() as progress:
        found = mistakes_of(retriever, source, progress=progress)
    groups = group_mistakes(found, retriever.label_names, clusters, seed)
    answers = explain_groups(retriever, found, groups, question)
    page, result = errors_report(found, groups, answers, retriever, question, seed, command_line())
    report.finish(page, result, _for_screen(page, ("group", "side", "row", "score", "label")))


@grouped(queries=500, test=Shown("the training rows"))
def hubs(
    index_options: IndexOptions,
    test_options: MaybeTestOptions,
    question_options: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Top = 10,
    n_listed: Annotated[int, typer.Option("--listed", help="Rows listed for each method.")] = 20,
) -> None:
    """List the training rows that come up for many queries."""
    from forebear.evaluation.audits.rows.hubs import hubs as count
    from forebear.evaluation.audits.rows.hubs import hubs_report, training_queries

    retriever = open_retriever(index_options, report)
    question = make_question(retriever, method, question_options, top=top, quiet=report.quiet)
    if test_options.test is None:
        queries = training_queries(retriever, sample.queries, sample.seed)
    else:
        queries = open_queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = count(retriever, queries, question, progress=progress)
    page, result = hubs_report(found, retriever, queries, question, sample.seed, n_listed, command_line())
    report.finish(page, result, _for_screen(page, ("method", "row", "share", "label")))


def _for_screen(report: Report, columns: Sequence[str]) -> Report:
    """The report, its lists of rows cut to these columns, the texts, and ``SCREEN_ROWS`` rows."""
    return replace(report, tables=[_cut(table, columns) for table in report.tables])


def _cut(table: Table, columns: Sequence[str]) -> Table:
    if not any(name.startswith("text: ") for name in table.columns):
        return table
    kept = [i for i, name in enumerate(table.columns) if name in columns or name.startswith("text: ")]

    def short(cell: Cell) -> Cell:
        return f"{cell[:SCREEN_TEXT]}…" if isinstance(cell, str) and len(cell) > SCREEN_TEXT else cell

    rows = [[short(row[i]) for i in kept] for row in table.rows[:SCREEN_ROWS]]
    more = f"{len(rows)} of {len(table.rows)} rows; --out FOLDER writes all of them, and all columns."
    return replace(table, columns=[table.columns[i] for i in kept], rows=rows, note=more)
