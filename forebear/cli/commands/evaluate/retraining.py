"""``forebear evaluate``: the evaluations that retrain the model without some of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from forebear.cli.options.asking import AskOptions
from forebear.cli.options.groups import Options, Shown, grouped
from forebear.cli.options.question import QuestionOptions, SeveralOptions, SpanOptions
from forebear.cli.options.report import Keep
from forebear.cli.options.retraining import AmountOptions, BudgetOptions
from forebear.cli.screen.console import Command
from forebear.cli.workers import start_workers

_HOW = """--retrain full fine-tunes as the run did. Stand-ins: top-K trains the last K layers from stored states, at K
layers' share of the cost; head fits the last layer to stored features, in about a second. Finished retrainings are
kept (--cache): after a kill the same command goes on, and --workers share them.
"""
REMOVAL_HELP = f"""How does the confidence change without the rows that a method names, after retraining?

For each test row: without the top, bottom, least influential and random rows, and without random rows of the same
labels; the change of the probability of the class that the same seed's retraining on all rows predicts.

{_HOW}
Examples:

    forebear evaluate removal --index I --test dev.csv --method if,gc,nn-cos --share 0.1 --queries 50 --out R

    forebear evaluate removal --index I --test dev.csv --method if --remove 50,500 --retrain top-2 --budget 400
"""
DELETION_HELP = f"""DEL+ and DEL-: the gold class's probability without the top k proponents or opponents, retrained.

Beside each method: random rows of the same labels, and of any.

{_HOW}
Examples:

    forebear evaluate deletion-curve --index I --test dev.csv --method tracin-we,tracin-last --queries 30 --out R

    forebear evaluate deletion-curve --index I --test dev.csv --method tracin-we --no-overlap 2000 --remove 10,50,100
"""
LOSS_HELP = f"""How much accuracy is lost without the rows of largest score summed over the queries, retrained? (Ral)

Accuracy is measured on all test rows; scores are summed over a sample of them. Beside each method: random rows of the
same labels, and of any.

{_HOW}
Example:

    forebear evaluate retraining-loss --index I --test test.csv --method if,if++,tracin++ --share 0.2,0.5 --queries 200
"""
LDS_HELP = f"""Linear datamodeling score: do summed scores foretell what models trained on random draws of the rows say?

Draws keep half of each class' rows. Beside the methods stand baselines: the label, random scores, tf-idf, BM25, a
sentence embedding, nn-cos, a row's own loss. Several scopes and dampings share the retrainings.

{_HOW}
Examples:

    forebear evaluate lds --index I --test dev.csv --method if,gd,tracin --subsets 100 --retrain top-2 --seeds 2

    forebear evaluate lds --index I --test dev.csv --method if,rif --scope head,all --damping 0.1%,1%,10% --out R

    forebear evaluate lds --index I --test dev.csv --retrain full --rows-share 0.95 --paired --seeds 1
"""
EFFECTS_HELP = f"""Do predicted effects, in nats, come true when the model is trained again without the rows?

Removed are random rows and each test row's proponents and opponents, one alone and more together; reported are slope
and correlation of retrained on predicted changes, with intervals. With --keep the index remembers them, and retrieve
and explain say how true their effects are.

--retrain proximal-head moves the trained head to the minimum without the rows, held by half its squared distance times
the damping: the very refit that `if` at the head linearises, in milliseconds.
{_HOW}
Examples:

    forebear evaluate effects --index I --test dev.csv --method if --queries 50 --keep

    forebear evaluate effects --index I --test dev.csv --scope head,top-2 --retrain top-2 --budget 200 --keep
"""


@dataclass(frozen=True, kw_only=True)
class RepeatedTrainingOptions(AskOptions):
    """The options that all of these commands have."""

    spans: SpanOptions
    retraining: BudgetOptions

    def retrain(self, function: Callable[..., Any], question: Options, **given: Any) -> None:
        """Call a function of ``forebear.evaluations`` that retrains; see :meth:`AskOptions.call`."""
        how = self.retraining.how(self.index.first_device(), start_workers)
        self.call(function, question, spans=self.spans, how=how, **given)


@dataclass(frozen=True, kw_only=True)
class RetrainingAskOptions(RepeatedTrainingOptions):
    """With one scope and one damping."""

    question: QuestionOptions


@dataclass(frozen=True, kw_only=True)
class LdsAskOptions(RepeatedTrainingOptions):
    """With several."""

    question: SeveralOptions


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("removal", REMOVAL_HELP, removal),
        ("deletion-curve", DELETION_HELP, deletion_curve),
        ("retraining-loss", LOSS_HELP, retraining_loss),
        ("lds", LDS_HELP, lds),
        ("effects", EFFECTS_HELP, effects),
    ):
        evaluations.command(name, help=help_text, cls=Command)(command)


@grouped(n_queries=50)
def removal(
    asked: RetrainingAskOptions,
    amounts: AmountOptions,
    sides: Annotated[
        list[str] | None,
        typer.Option("--sides", help="Which rows are removed: top, bottom, least.", show_default="all three"),
    ] = None,
) -> None:
    """Report how predictions change when the rows of a ranking are removed."""
    from forebear.evaluation.python.evaluations import removal

    asked.retrain(removal, asked.question, **amounts.given(), sides=sides)


@grouped(n_queries=30, target="gold")
def deletion_curve(
    asked: RetrainingAskOptions,
    amounts: AmountOptions,
    no_overlap: Annotated[
        int | None,
        typer.Option(
            "--no-overlap",
            help="Only so many rows of least tf-idf overlap with the test row may be removed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Report the gold class's probability as more of the top rows are removed."""
    from forebear.evaluation.python.evaluations import deletion_curve

    asked.retrain(deletion_curve, asked.question, **amounts.given(), no_overlap=no_overlap)


@grouped(n_queries=200)
def retraining_loss(asked: RetrainingAskOptions, amounts: AmountOptions) -> None:
    """Report the accuracy that is lost without the rows of largest summed score."""
    from forebear.evaluation.python.evaluations import retraining_loss

    asked.retrain(retraining_loss, asked.question, **amounts.given())


@grouped(n_queries=100)
def lds(
    asked: LdsAskOptions,
    n_subsets: Annotated[
        int, typer.Option("--subsets", help="Random draws of the training rows; a model is trained on each.")
    ] = 100,
    draw: Annotated[
        str,
        typer.Option(
            "--draw",
            help="Which rows a draw keeps: stratified, the same share of each class; or plain, of all rows, so that "
            "the class balance differs from draw to draw.",
        ),
    ] = "stratified",
    rows_share: Annotated[
        float, typer.Option("--rows-share", help="Share of the rows that a draw keeps, between 0 and 1.")
    ] = 0.5,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired",
            help="Rows that are not kept keep their place in the batches and weigh nothing, and the seed is the run's "
            "own; with --seeds 1.",
        ),
    ] = False,
) -> None:
    """Report how well summed scores foretell models trained on random draws of the rows."""
    from forebear.evaluation.python.evaluations import lds

    asked.retrain(lds, asked.question, n_subsets=n_subsets, draw=draw, rows_share=rows_share, paired=paired)


@grouped(n_queries=50, recipe="proximal-head", methods=Shown("if"))
def effects(
    asked: LdsAskOptions,
    amounts: AmountOptions,
    n_sets: Annotated[int, typer.Option("--sets", help="Random sets of each size, which all test rows share.")] = 10,
    keep: Keep = False,
) -> None:
    """Report how true predicted effects are."""
    from forebear.evaluation.python.evaluations import effects

    asked.retrain(effects, asked.question, **amounts.given(), n_sets=n_sets, keep=keep)
