"""``forebear evaluate``: the evaluations of the methods that compare spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from forebear.cli.options.asking import AskOptions
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import (
    QuestionOptions,
    SampledRows,
    SampleOptions,
    SearchOptions,
    SpanOptions,
)
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command, integers

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

    forebear evaluate faithfulness --index I --test test.parquet --spans aspect --queries 50 --rows 200 --repeats 5
"""


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    evaluations.command("semantic-agreement", help=SEMANTIC_HELP, cls=Command)(_agreement("semantic"))
    evaluations.command("label-agreement", help=LABEL_HELP, cls=Command)(_agreement("label"))
    evaluations.command("faithfulness", help=FAITHFULNESS_HELP, cls=Command)(faithfulness)


def _agreement(measure: Literal["semantic", "label"]) -> Callable[..., None]:
    """The command of one measure; both take the same options."""

    @grouped(n_queries=200, methods=Shown("if, if+, if++, tracin-f, tracin+, tracin++"))
    def agreement(
        spans: SpanOptions,
        question: SearchOptions,
        asked: AskOptions,
        at: Annotated[
            list[str] | None, typer.Option("--at", help="K, up to six: the top K are looked at.", show_default="10")
        ] = None,
    ) -> None:
        """Report how far the top rows and spans agree with the query in meaning, or in label."""
        from forebear.evaluation.python.evaluations import agreement

        asked.call(agreement, question, spans=spans, measure=measure, at=integers("--at", at))

    return agreement


@grouped(n_queries=50)
def faithfulness(
    index: IndexOptions,
    test: TestOptions,
    spans: SpanOptions,
    question: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    n_rows: SampledRows = 200,
    n_repeats: Annotated[int, typer.Option("--repeats", help="Each with other training rows and other variants.")] = 5,
) -> None:
    """Report how far span methods rank spans as the final model does."""
    from forebear.evaluation.python.evaluations import faithfulness

    asked = AskOptions(index=index, test=test, sample=sample, report=report)  # the methods are fixed
    asked.call(faithfulness, question, spans=spans, n_rows=n_rows, n_repeats=n_repeats)
