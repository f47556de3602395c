"""``forebear evaluate``: the evaluations that ask about test rows, without retraining."""

from __future__ import annotations

from typing import Annotated

import typer

from forebear.cli.options.asking import (
    command_line,
    default_methods,
    integers,
    make_question,
    open_queries,
    open_retriever,
)
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
from forebear.cli.screen.console import Command, listed
from forebear.errors import InputError

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


@grouped(queries=100)
def correlation(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    rows: SampledRows = 500,
) -> None:
    """Report the rank correlations of several methods' scores."""
    from forebear.evaluation.measures.correlation import correlation_report, correlations

    retriever = open_retriever(index_options, report)
    question = make_question(retriever, method, question_options, quiet=report.quiet)
    queries = open_queries(retriever, test_options, sample, question)
    found = correlations(retriever, queries, question, n_rows=rows, seed=sample.seed)
    report.finish(*correlation_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped(queries=100, top=Shown("10,50, unless --share is given"))
def overlap(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Depths = None,
    share: Shares = None,
) -> None:
    """Report how many rows the tops of several methods share."""
    from forebear.evaluation.measures.top_overlap import depths_of, top_overlap_report, top_overlaps

    retriever = open_retriever(index_options, report)
    question = make_question(retriever, method, question_options, quiet=report.quiet)
    tops = integers("--top", top) or ([] if share else [10, 50])
    depths = depths_of(tops, listed(share), retriever.index.manifest.n_live)
    queries = open_queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = top_overlaps(retriever, queries, question, depths, progress=progress)
    report.finish(*top_overlap_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped(queries=100)
def randomized(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    random_seeds: Annotated[
        list[str] | None,
        typer.Option("--random-seeds", help="One for each random model, whole numbers.", show_default="0,1,2"),
    ] = None,
    rows: SampledRows = 500,
) -> None:
    """Report rank correlations with scores under randomly initialised models."""
    from forebear.evaluation.measures.randomized import randomized_correlations, randomized_report
    from forebear.retriever.question.methods import METHODS

    retriever = open_retriever(index_options, report)
    question = make_question(retriever, method, question_options, quiet=report.quiet)
    if method is None:  # sentence embeddings do not depend on the model: asked for by name, they are refused
        kept = tuple(name for name in question.spec.methods if METHODS[name].representation != "sentence")
        question = retriever.resolve(question, methods=kept)
    seed, seeds = sample.seed, integers("--random-seeds", random_seeds) or [0, 1, 2]
    queries = open_queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = randomized_correlations(
            retriever, queries, question, n_rows=rows, seed=seed, seeds=seeds, progress=progress
        )  # fmt: skip
    report.finish(*randomized_report(found, retriever, queries, question, seed, command_line()))


@grouped(queries=50, method=Shown("if"))
def saliency_consistency(
    index_options: IndexOptions,
    test: Annotated[str, TEST],
    question_options: ScopeOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    text_columns: TextColumns = None,
) -> None:
    """Report how far influence and saliency of word pieces agree."""
    from forebear.evaluation.measures.saliency_consistency import saliency_consistency as measure
    from forebear.evaluation.measures.saliency_consistency import saliency_consistency_report

    retriever = open_retriever(index_options, report)
    question = make_question(
        retriever, method or default_methods(retriever, ["if"], question_options), question_options, quiet=report.quiet
    )
    queries = open_queries(retriever, TestOptions(test=test, text_columns=text_columns), sample, question)
    with report.progress() as progress:
        found = measure(retriever, queries, question, progress=progress)
    report.finish(*saliency_consistency_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped(queries=50)
def recall(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Top = 10,
    recall: Recall = 0.98,
    candidates: Candidates = None,
) -> None:
    """Report the recall and speed of retrieval against scoring every row."""
    from forebear.evaluation.measures.recall import retrieval_recall, retrieval_recall_report

    retriever = open_retriever(index_options, report)
    n_live = retriever.index.manifest.n_live
    if not 1 <= top <= n_live:
        raise InputError(f"--top {top}: expected 1 to {n_live}, the live rows.")
    question = make_question(
        retriever, method, question_options, recall=recall, top=top, candidates=candidates, quiet=report.quiet
    )
    queries = open_queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = retrieval_recall(retriever, queries, question, progress=progress)
    report.finish(*retrieval_recall_report(found, retriever, queries, question, sample.seed, command_line()))
