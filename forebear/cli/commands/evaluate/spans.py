"""``forebear evaluate``: the evaluations of the methods that compare spans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.asking import command_line, default_methods, integers, open_retriever, say_what_was_fitted
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import (
    Methods,
    QuestionOptions,
    SampledRows,
    SampleOptions,
    SearchOptions,
    SpanOptions,
)
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command, listed

if TYPE_CHECKING:
    from forebear.evaluation.common.queries import QueryRows
    from forebear.evaluation.measures.agreement import Measure
    from forebear.retriever.question.spec import Question
    from forebear.retriever.retriever import Retriever

SEMANTIC_HELP = """Do the rows and spans at the top mean what the query means? Sag@K of several methods.

Mean cosine (times 100) of what the retrieved span adds to its row's embedding with what the query's span adds to its
own; of whole rows for methods that compare rows. The query's span is given, or the one of largest importance, for all
methods that compare spans. Beside them: random rows and random spans.

Examples:

    forebear evaluate semantic-agreement --index I --test test.parquet --spans aspect --queries 200 --at 10,100

    forebear evaluate semantic-agreement --index I --test dev.csv --method if,if++,tracin++ --scope top-2 --out R
"""
LABEL_HELP = """Do the rows at the top bear the query's label? Lag@K of several methods, beside the label's share.

The query's label is its target: the predicted one, unless --target says otherwise.

Examples:

    forebear evaluate label-agreement --index I --test test.parquet --spans aspect --queries 200 --at 10,100

    forebear evaluate label-agreement --index I --test dev.csv --method if,gd,gc,nn-cos --target gold
"""
FAITHFULNESS_HELP = """Do span methods rank spans as the final model itself does? Spearman with its own span scores.

The yardstick is tracin++ at the final checkpoint alone. Compared with it: tracin++ (three variants of the model), if++,
tracin++ summed over the last three checkpoints, and random scores. Each run draws other training rows and variants.

Example:

    forebear evaluate faithfulness --index I --test test.parquet --spans aspect --queries 50 --rows 200 --runs 5
"""


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    evaluations.command("semantic-agreement", help=SEMANTIC_HELP, cls=Command)(_agreement("semantic"))
    evaluations.command("label-agreement", help=LABEL_HELP, cls=Command)(_agreement("label"))
    evaluations.command("faithfulness", help=FAITHFULNESS_HELP, cls=Command)(faithfulness)


def _agreement(measure: Measure) -> Callable[..., None]:
    """The command of one measure; both take the same options."""

    @grouped(queries=200, method=Shown("if, if+, if++, tracin-f, tracin+, tracin++"))
    def agreement(
        index_options: IndexOptions,
        test_options: TestOptions,
        spans: SpanOptions,
        question_options: SearchOptions,
        sample: SampleOptions,
        report: ReportOptions,
        method: Methods = None,
        depth: Annotated[
            list[str] | None, typer.Option("--at", help="K, up to six: the top K are looked at.", show_default="10")
        ] = None,
    ) -> None:
        """Report how far the top rows and spans agree with the query in meaning, or in label."""
        from forebear.evaluation.measures.agreement import PAPER_METHODS, depths, measure_agreement
        from forebear.evaluation.measures.agreement_report import agreement_report

        tops = depths(integers("--at", depth) or [10])
        retriever = open_retriever(index_options, report)
        methods = listed(method) or default_methods(retriever, PAPER_METHODS, question_options)
        question = _question(retriever, tuple(methods), question_options, spans, report.quiet, top=tops[-1])
        queries = _queries(retriever, test_options, sample, question)
        with report.progress() as progress:
            found = measure_agreement(retriever, queries, question, tops, measure, seed=sample.seed, progress=progress)
        report.finish(*agreement_report(found, retriever, queries, question, sample.seed, command_line()))

    return agreement


@grouped(queries=50)
def faithfulness(
    index_options: IndexOptions,
    test_options: TestOptions,
    spans: SpanOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    rows: SampledRows = 200,
    runs: Annotated[int, typer.Option("--runs", help="Each with other training rows and other variants.")] = 5,
) -> None:
    """Report how far span methods rank spans as the final model does."""
    from forebear.evaluation.measures.faithfulness import METHODS, faithfulness_report, measure_faithfulness

    retriever = open_retriever(index_options, report)
    question = _question(retriever, METHODS, question_options, spans, report.quiet)
    queries = _queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = measure_faithfulness(
            retriever, queries, question, n_rows=rows, n_runs=runs, seed=sample.seed, progress=progress
        )
    report.finish(*faithfulness_report(found, retriever, queries, question, sample.seed, command_line()))


def _question(
    retriever: Retriever,
    methods: tuple[str, ...],
    question_options: QuestionOptions,
    spans: SpanOptions,
    quiet: bool,
    **choices: Any,
) -> Question:
    """Resolve the question against the index, and refuse rankings by sketches alone."""
    from forebear.evaluation.common.span_queries import refuse_sketches_alone
    from forebear.retriever.question.spec import QuerySpec

    spec = QuerySpec(methods=methods, **asdict(question_options), **spans.choices(retriever), **choices)
    question = retriever.resolve(spec)
    refuse_sketches_alone(spec)
    say_what_was_fitted(question, quiet=quiet)
    return question


def _queries(retriever: Retriever, test_options: TestOptions, sample: SampleOptions, question: Question) -> QueryRows:
    """Sample the test rows that are the queries."""
    from forebear.evaluation.common.span_queries import sample_span_queries

    source = test_options.open(test_options.test, retriever, need_labels=question.spec.target == "gold")
    return sample_span_queries(retriever, source, question, sample.queries, sample.seed)
