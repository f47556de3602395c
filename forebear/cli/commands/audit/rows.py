"""``forebear audit``: the audits of training rows, which need no question from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import (
    ColumnOptions,
    IndexOptions,
    Methods,
    ReportOptions,
    SampleOptions,
    ScopeOptions,
    SearchOptions,
    Seed,
    TestOptions,
    command_line,
    default_methods,
    make_question,
    open_queries,
    open_retriever,
    warn_of_labels,
)
from forebear.cli.options.groups import grouped
from forebear.cli.screen.console import Variadic
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
SCREEN_ROWS, SCREEN_TEXT = 20, 120  # of a list of rows on a screen: how many, and characters of each text
Neighbours = Annotated[int, typer.Option("--neighbours", help="Nearest rows that are looked at.")]


def register(audits: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("mislabelled", MISLABELLED_HELP, mislabelled),
        ("duplicates", DUPLICATES_HELP, duplicates),
        ("errors", ERRORS_HELP, errors),
        ("hubs", HUBS_HELP, hubs),
    ):
        audits.command(name, help=help_text, cls=Variadic)(command)


@grouped()
def mislabelled(
    at: IndexOptions,
    asked: ScopeOptions,
    report: ReportOptions,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="gd, if, tracin and the like.  [default: gd,if]", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Rows listed.")] = 100,
    neighbours: Neighbours = 10,
) -> None:
    """See MISLABELLED_HELP."""
    from forebear.evaluation.audits.rows.suspects import suspects, suspects_report

    retriever = open_retriever(at, report)
    question = make_question(
        retriever, method or default_methods(retriever, ["gd", "if"], asked), asked, target="gold", quiet=report.quiet
    )
    found = suspects(retriever, question, n_neighbours=neighbours)
    page, result = suspects_report(found, retriever, question, top, command_line())
    report.finish(page, result, _for_screen(page, ("row", "mean rank", "label", "suggested")))


@grouped()
def duplicates(
    at: IndexOptions,
    columns: ColumnOptions,
    report: ReportOptions,
    test: Annotated[
        str | None, typer.Option("--test", help="Test rows that are looked for as well.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Groups listed.")] = 100,
    jaccard: Annotated[float, typer.Option("--jaccard", help="Least similarity of word sets.")] = 0.8,
    cosine: Annotated[float, typer.Option("--cosine", help="Least cosine of neighbours.")] = 0.95,
    cosine_jaccard: Annotated[
        float, typer.Option("--cosine-jaccard", help="Least similarity of the word sets of those.")
    ] = 0.5,
    neighbours: Neighbours = 10,
) -> None:
    """See DUPLICATES_HELP."""
    from forebear.evaluation.audits.rows.duplicates import Thresholds, duplicates_report, leaks
    from forebear.evaluation.audits.rows.duplicates import duplicates as find
    from forebear.evaluation.common.queries import sample_queries

    thresholds = Thresholds(jaccard=jaccard, cosine=cosine, cosine_jaccard=cosine_jaccard, neighbours=neighbours)
    thresholds.check()
    retriever = open_retriever(at, report)
    tested = None
    if test is not None:
        source = columns.open(test, retriever)
        warn_of_labels(retriever, source, required=False)
        tested = sample_queries(retriever, source, 0, 0)
    groups = find(retriever.index, thresholds)
    leaked = [] if tested is None else leaks(retriever.index, tested, thresholds)
    page, result = duplicates_report(groups, retriever, thresholds, top, command_line(), tested, leaked)
    report.finish(page, result, _for_screen(page, ("group", "test row", "row", "label", "test label", "kind")))


@grouped()
def errors(
    at: IndexOptions,
    tested: TestOptions,
    asked: SearchOptions,
    report: ReportOptions,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="gd, if, tracin, rep, nn-dot.  [default: if]", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Rows at each end of a group's ranking.")] = 10,
    clusters: Annotated[int, typer.Option("--clusters", help="Of each kind of mistake, by features; 1: none.")] = 1,
    seed: Seed = 0,
) -> None:
    """See ERRORS_HELP."""
    from forebear.evaluation.audits.rows.errors import errors_report, explain_groups, group_mistakes, mistakes_of

    retriever = open_retriever(at, report)
    question = make_question(
        retriever,
        method or default_methods(retriever, ["if"], asked),
        asked,
        top=top,
        aggregate=True,
        quiet=report.quiet,
    )
    source = tested.open(tested.test, retriever, need_labels=True)
    if clusters < 1:
        raise InputError(f"--clusters {clusters}: expected at least 1.")
    with report.progress() as progress:
        found = mistakes_of(retriever, source, progress=progress)
    groups = group_mistakes(found, retriever.label_names, clusters, seed)
    answers = explain_groups(retriever, found, groups, question)
    page, result = errors_report(found, groups, answers, retriever, question, seed, command_line())
    report.finish(page, result, _for_screen(page, ("group", "side", "row", "score", "label")))


@grouped(queries=500)
def hubs(
    at: IndexOptions,
    columns: ColumnOptions,
    asked: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    test: Annotated[
        str | None, typer.Option("--test", help="Reference rows. Default: the training rows.", show_default=False)
    ] = None,
    method: Methods = None,
    top: Annotated[int, typer.Option("--top", help="k: places looked at in each ranking.")] = 10,
    n_listed: Annotated[int, typer.Option("--listed", help="Rows listed for each method.")] = 20,
) -> None:
    """See HUBS_HELP."""
    from forebear.evaluation.audits.rows.hubs import hubs as count
    from forebear.evaluation.audits.rows.hubs import hubs_report, training_queries

    retriever = open_retriever(at, report)
    question = make_question(retriever, method, asked, top=top, quiet=report.quiet)
    if test is None:
        queries = training_queries(retriever, sample.queries, sample.seed)
    else:
        queries = open_queries(retriever, TestOptions(test=test, **asdict(columns)), sample, question)
    with report.progress() as progress:
        found = count(retriever, queries, question, progress=progress)
    page, result = hubs_report(found, retriever, queries, question, sample.seed, n_listed, command_line())
    report.finish(page, result, _for_screen(page, ("method", "row", "share", "label")))


def _for_screen(report: Report, columns: Sequence[str]) -> Report:
    """The report with its lists of rows cut to the columns named, the texts and as many rows as a screen bears."""
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
