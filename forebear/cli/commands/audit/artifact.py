"""``forebear audit overlap``, ``negation`` and ``artifact``: does an artifact go with influence?"""

from __future__ import annotations

from typing import Annotated

import typer

from forebear.cli.options.asking import AskOptions
from forebear.cli.options.groups import Shown, grouped
from forebear.cli.options.question import QuestionOptions
from forebear.cli.screen.console import Command

_HOW = """For each test row, over all training rows: artifact = a z^2 + b z + c, z the z-normalised influence. a above
0: rows of large influence hold more of it than the rest. By predicted label, with 95% intervals."""
OVERLAP_HELP = f"""Are the most influential training rows those of high lexical overlap?

{_HOW}

Examples:

    forebear audit overlap --index runs/nli-index --test hans_small.parquet --out runs/overlap-audit

    forebear audit overlap --index I --test hans.parquet --method if,gd --damping 1% --queries 300 --out A
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


@grouped(n_queries=100, methods=BY_INFLUENCE)
def overlap(question: QuestionOptions, asked: AskOptions) -> None:
    """Regress lexical overlap on the influence of training rows."""
    from forebear.evaluation.python.audits import overlap

    asked.call(overlap, question)


@grouped(n_queries=100, methods=BY_INFLUENCE)
def negation(question: QuestionOptions, asked: AskOptions, column: NegationColumn = None) -> None:
    """Regress the presence of a negation on the influence of training rows."""
    from forebear.evaluation.python.audits import negation

    asked.call(negation, question, column=column)


@grouped(n_queries=100, methods=BY_INFLUENCE)
def artifact(question: QuestionOptions, asked: AskOptions, feature: FeatureOption) -> None:
    """Regress a feature of the user's on the influence of training rows."""
    from forebear.evaluation.python.audits import artifact

    asked.call(artifact, question, feature=feature)
