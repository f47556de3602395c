"""``forebear audit overlap``, ``negation`` and ``artifact``: does an artifact go with influence?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import (
    command_line,
    default_methods,
    make_question,
    open_queries,
    open_retriever,
)
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import Methods, QuestionOptions, SampleOptions
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command

if TYPE_CHECKING:
    from forebear.evaluation.audits.artifacts.features import Feature
    from forebear.retriever.retriever import Retriever

_HOW = """For each test row, over all training rows: artifact = a z^2 + b z + c, z the z-normalised influence. a above
0: rows of large influence hold more of it than the rest. By predicted label, with 95% intervals."""
OVERLAP_HELP = f"""Are the most influential training rows those of high lexical overlap?

{_HOW}

Examples:

    forebear audit overlap --index runs/nli-index --test hans_small.parquet --out runs/overlap-audit

    forebear audit overlap --index I --test hans.parquet --method if,gd --damping 0.1x --queries 300 --out A
"""
NEGATION_HELP = f"""Are the most influential training rows those with a negation?

{_HOW} Artifact: 1 where a text holds no, not, n't, never, none, nobody, nothing, neither, nor, nowhere, without or
cannot, else 0.

Example:

    forebear audit negation --index I --test hans_negated.parquet --out A
"""
ARTIFACT_HELP = f"""Are the most influential training rows those on which a function of yours is high?

{_HOW} The function is called with a dictionary of a row's texts by column, and returns a number.

Example:

    forebear audit artifact --feature length.py:n_words --index I --test dev.csv --out A
"""
NegationColumn = Annotated[
    str | None, typer.Option("--column", help="The text column that is looked at.", show_default="the last")
]
FeatureOption = Annotated[
    str, typer.Option("--feature", help="FILE.py:function, from a row's texts to a number.", show_default=False)
]
BY_INFLUENCE = Shown("if")


def register(audits: typer.Typer) -> None:
    """Add the commands to the group."""
    audits.command("overlap", help=OVERLAP_HELP, cls=Command)(overlap)
    audits.command("negation", help=NEGATION_HELP, cls=Command)(negation)
    audits.command("artifact", help=ARTIFACT_HELP, cls=Command)(artifact)


@grouped(queries=100, method=BY_INFLUENCE)
def overlap(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
) -> None:
    """Regress lexical overlap on the influence of training rows."""
    from forebear.evaluation.audits.artifacts.features import overlap_feature

    retriever = open_retriever(index_options, report)
    feature = overlap_feature(retriever.index.manifest.spec.text_columns)
    _audit(retriever, feature, method, question_options, test_options, sample, report)


@grouped(queries=100, method=BY_INFLUENCE)
def negation(
    index_options: IndexOptions,
    test_options: TestOptions,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    column: NegationColumn = None,
    method: Methods = None,
) -> None:
    """Regress the presence of a negation on the influence of training rows."""
    from forebear.evaluation.audits.artifacts.features import negation_feature

    retriever = open_retriever(index_options, report)
    feature = negation_feature(retriever.index.manifest.spec.text_columns, column)
    _audit(retriever, feature, method, question_options, test_options, sample, report)


@grouped(queries=100, method=BY_INFLUENCE)
def artifact(
    index_options: IndexOptions,
    test_options: TestOptions,
    feature: FeatureOption,
    question_options: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
) -> None:
    """Regress a feature of the user's on the influence of training rows."""
    from forebear.evaluation.audits.artifacts.features import user_feature

    retriever = open_retriever(index_options, report)
    measured = user_feature(feature, retriever.index.manifest.spec.text_columns)
    _audit(retriever, measured, method, question_options, test_options, sample, report)


def _audit(
    retriever: Retriever,
    feature: Feature,
    method: Sequence[str] | None,
    question_options: QuestionOptions,
    test_options: TestOptions,
    sample: SampleOptions,
    report: ReportOptions,
) -> None:
    """Regress a feature on the influence of all training rows; show and write the report."""
    from forebear.evaluation.audits.artifacts.features import measure
    from forebear.evaluation.audits.artifacts.regression import regress_artifact
    from forebear.evaluation.audits.artifacts.regression_report import artifact_report

    question = make_question(
        retriever, method or default_methods(retriever, ["if"], question_options), question_options, quiet=report.quiet
    )
    values = measure(retriever.index, feature)
    queries = open_queries(retriever, test_options, sample, question)
    with report.progress() as progress:
        found = regress_artifact(retriever, queries, question, values, progress=progress)
    report.finish(*artifact_report(found, feature, values, retriever, queries, question, sample.seed, command_line()))
