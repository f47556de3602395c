"""``forebear evaluate``: the evaluations that ask about test rows, without retraining."""

from __future__ import annotations

from typing import Annotated

import typer

from forebear.cli.options.asking import AskOptions
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import (
    Candidates,
    Depths,
    Methods,
    QuestionOptions,
    Recall,
    SampledRows,
    SampleOptions,
    ScopeOptions,
    SearchOptions,
    Shares,
    Top,
)
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TEST, TestOptions, TextColumns
from forebear.cli.screen.console import Command, integers

CORRELATION_HELP = """Do two methods order the training rows alike? Mean Spearman correlation of every pair.

Over a sample of test rows and of training rows. Constant scores have no order; they are left out and counted.

Example:

    forebear evaluate correlation --index I --test dev.csv --method gd,if,gc,rif,nn-cos --queries 100 --rows 500
"""
OVERLAP_HELP = """Do two methods bring up the same training rows? Share of common rows in the tops of every pair.

The top is that of the signed ranking. A share p of N rows stands for floor(p N) rows.

Examples:

    forebear evaluate overlap --index I --test dev.csv --method gd,if,gc --top 10,50

    forebear evaluate overlap --index I --test dev.csv --method gd,if --share 0.01,0.1 --out R
"""
RANDOMIZED_HELP = """Do scores depend on what the model has learned? Spearman with randomly initialised models.

Near 0 is good. Asked about the trained model's predictions, and about each model's own. The sampled training rows are
indexed under each random model in a temporary folder.

Example:

    forebear evaluate randomized --index I --test dev.csv --method gd,if,gc,rif --random-seeds 0,1,2
"""
SALIENCY_HELP = """Do influence and saliency agree? Influence of rows holding salient word pieces; tops without one.

For each test row's most negative, median and most positive word piece: the mean z-normalised influence of rows at the
top that hold it, and the overlap of the tops before and after it is masked.

Example:

    forebear evaluate saliency-consistency --index I --test dev.csv --method if --queries 50
"""
RECALL_HELP = """How much of the exact top k does retrieval find, and how much faster? By method, at both ends.

Compares --exact rerank at --recall with scoring every row.

Example:

    forebear evaluate recall --index I --test dev.csv --scope all --method gd,gc,if --recall 0.95 --queries 30
"""


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("correlation", CORRELATION_HELP, correlation),
        ("overlap", OVERLAP_HELP, overlap),
        ("randomized", RANDOMIZED_HELP, randomized),
        ("saliency-consistency", SALIENCY_HELP, saliency_consistency),
        ("recall", RECALL_HELP, recall),
    ):
        evaluations.command(name, help=help_text, cls=Command)(command)


@grouped(n_queries=100)
def correlation(question: QuestionOptions, asked: AskOptions, n_rows: SampledRows = 500) -> None:
    """Report the rank correlations of several methods' scores."""
    from forebear.evaluation.python.evaluations import correlation

    asked.call(correlation, question, n_rows=n_rows)


@grouped(n_queries=100, tops=Shown("10,50, unless --share is given"))
def overlap(question: SearchOptions, asked: AskOptions, tops: Depths = None, shares: Shares = None) -> None:
    """Report how many rows the tops of several methods share."""
    from forebear.evaluation.python.evaluations import overlap

    asked.call(overlap, question, tops=integers("--top", tops), shares=shares)


@grouped(n_queries=100)
def randomized(
    question: QuestionOptions,
    asked: AskOptions,
    seeds: Annotated[
        list[str] | None,
        typer.Option("--random-seeds", help="One for each random model, whole numbers.", show_default="0,1,2"),
    ] = None,
    n_rows: SampledRows = 500,
) -> None:
    """Report rank correlations with scores under randomly initialised models."""
    from forebear.evaluation.python.evaluations import randomized

    asked.call(randomized, question, seeds=integers("--random-seeds", seeds), n_rows=n_rows)


@grouped(n_queries=50, methods=Shown("if"))
def saliency_consistency(
    index: IndexOptions,
    test: Annotated[str, TEST],
    question: ScopeOptions,
    sample: SampleOptions,
    report: ReportOptions,
    methods: Methods = None,
    text_columns: TextColumns = None,
) -> None:
    """Report how far influence and saliency of word pieces agree."""
    from forebear.evaluation.python.evaluations import saliency_consistency

    rows = TestOptions(test=test, text_columns=text_columns).rows
    report.call(saliency_consistency, index.open(), question, sample, rows=rows, methods=methods)


@grouped(n_queries=50)
def recall(
    question: QuestionOptions,
    asked: AskOptions,
    top: Top = 10,
    recall: Recall = 0.98,
    candidates: Candidates = None,
) -> None:
    """Report the recall and speed of retrieval against scoring every row."""
    from forebear.evaluation.python import evaluations

    asked.call(evaluations.recall, question, top=top, recall=recall, candidates=candidates)
