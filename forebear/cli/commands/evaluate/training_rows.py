"""``forebear evaluate``: the evaluations that ask about the training rows themselves, without retraining."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import command_line, default_methods, integers, make_question, open_retriever
from forebear.cli.options.groups import Options, Shown, grouped
from forebear.cli.options.model import IndexOptions
from forebear.cli.options.question import (
    Depths,
    Methods,
    Neighbours,
    SampledRows,
    SampleOptions,
    SampleSeed,
    ScopeOptions,
    SearchOptions,
)
from forebear.cli.options.report import ReportOptions
from forebear.cli.options.rows import ColumnOptions, LabelNames, TextColumns, Train, Unlabelled
from forebear.cli.screen.console import Command, listed
from forebear.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from forebear.retriever.retriever import Retriever

NEAR_DUPLICATES_HELP = """Is a training row found when it is asked about, as it is or with one word changed?

hit@1 and hit@10. One word of each text is added, removed or replaced at a seeded random place; words are parted by
white space. Rows with the same texts as the source count as hits.

Example:

    forebear evaluate near-duplicates --index I --method nn-cos,gc,gd,if --queries 500
"""
CANCELLATION_HELP = """Do the training rows' gradients cancel out? By layer, biases against weights.

The sum of eta ||dL/dW|| over training rows, over how far W moved between the index's checkpoints; and the mean cosine
of two rows' gradients. Needs an index of two or more checkpoints.

Example:

    forebear evaluate cancellation --index I --rows 100
"""
MISLABELLED_HELP = """Does a row's influence on itself tell wrong labels? AUC and precision, beside two baselines.

Wrong are the rows whose label in the index differs from the one in another column of the training file, or those
whose numbers are given.

Examples:

    forebear evaluate mislabelled --index I --true-label clean_label --method gd,if

    forebear evaluate mislabelled --index I --wrong-rows flipped.txt --method if --damping 0.1x
"""


@dataclass(frozen=True, kw_only=True)
class TruthOptions(Options, panel="Rows"):
    """Which training rows are labelled wrongly."""

    true_label: Annotated[
        str | None,
        typer.Option(
            "--true-label", help="Column of the training file that holds the true labels.", show_default=False
        ),
    ] = None
    wrong_rows: Annotated[
        str | None,
        typer.Option(
            "--wrong-rows", help="Instead: a text file of numbers of wrongly labelled rows.", show_default=False
        ),
    ] = None
    train: Train = None
    text_columns: TextColumns = None
    label_names: LabelNames = None
    unlabelled: Unlabelled = "refuse"

    def check(self) -> None:
        """Refuse both or neither, before anything is opened."""
        if (self.true_label is None) == (self.wrong_rows is None):
            raise InputError("give either --true-label COLUMN or --wrong-rows FILE.")

    def read(self, retriever: Retriever) -> tuple[np.ndarray, np.ndarray | None]:
        """The wrong rows, and the true class ids of all rows where they are known."""
        from forebear.evaluation.measures.mislabelled import true_labels_of, wrong_rows_of

        index = retriever.index
        if self.wrong_rows is not None:
            return wrong_rows_of(Path(self.wrong_rows), index.manifest.n_rows), None
        segments = index.manifest.segments
        if self.train is None and len(segments) > 1:
            raise InputError(f"{index.folder} was built from {len(segments)} files. Give them as one by --train.")
        columns = ColumnOptions(
            text_columns=self.text_columns,
            label_column=self.true_label,
            label_names=self.label_names,
            unlabelled=self.unlabelled,
        )
        source = columns.open_for(
            self.train or segments[0].source, retriever.label_names, text_columns=index.manifest.spec.text_columns
        )
        truth = true_labels_of(index, source)
        return truth != index.labels, truth


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("near-duplicates", NEAR_DUPLICATES_HELP, near_duplicates),
        ("cancellation", CANCELLATION_HELP, cancellation),
        ("mislabelled", MISLABELLED_HELP, mislabelled),
    ):
        evaluations.command(name, help=help_text, cls=Command)(command)


@grouped(queries=200, top=Shown("1,10"))
def near_duplicates(
    index_options: IndexOptions,
    question_options: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    edits: Annotated[
        list[str] | None,
        typer.Option("--edits", help="What is done to a row: same, add, remove, replace.", show_default="all four"),
    ] = None,
    top: Depths = None,
) -> None:
    """Report how often a training row is found by its own text, as it is or edited."""
    from forebear.evaluation.measures.near_duplicates import EDITS, TOPS, near_duplicates_report
    from forebear.evaluation.measures.near_duplicates import near_duplicates as ask

    retriever = open_retriever(index_options, report)
    question = make_question(retriever, method, question_options, quiet=report.quiet)
    tops = sorted(set(integers("--top", top))) or TOPS
    with report.progress() as progress:
        found = ask(
            retriever,
            question,
            n_queries=sample.queries,
            edits=tuple(dict.fromkeys(listed(edits))) or EDITS,
            tops=tops,
            seed=sample.seed,
            progress=progress,
        )
    report.finish(*near_duplicates_report(found, retriever, question, sample.seed, command_line()))


@grouped()
def cancellation(
    index_options: IndexOptions, report: ReportOptions, rows: SampledRows = 100, seed: SampleSeed = 0
) -> None:
    """Report how far the gradients of training rows cancel out, by layer."""
    from forebear.evaluation.measures.cancellation import cancellation as measure
    from forebear.evaluation.measures.cancellation import cancellation_report

    retriever = open_retriever(index_options, report)
    with report.progress() as progress:
        found = measure(retriever, n_rows=rows, seed=seed, progress=progress)
    report.finish(*cancellation_report(found, retriever, seed, command_line()))


@grouped(method=Shown("gd,if"), top=Shown("the number of wrong rows"), train=Shown("the file that the index names"))
def mislabelled(
    index_options: IndexOptions,
    question_options: ScopeOptions,
    report: ReportOptions,
    truth: TruthOptions,
    method: Methods = None,
    top: Depths = None,
    neighbours: Neighbours = 10,
    seed: SampleSeed = 0,
) -> None:
    """Report how well self-influence finds wrong labels."""
    from forebear.evaluation.measures.mislabelled import mislabelled as measure
    from forebear.evaluation.measures.mislabelled import mislabelled_report

    truth.check()
    retriever = open_retriever(index_options, report)
    question = make_question(
        retriever,
        method or default_methods(retriever, ["gd", "if"], question_options),
        question_options,
        target="gold",
        quiet=report.quiet,
    )
    wrong, true_labels = truth.read(retriever)
    found = measure(retriever, question, wrong, true_labels=true_labels, n_neighbours=neighbours)
    tops = integers("--top", top)
    report.finish(*mislabelled_report(found, retriever, question, tops, seed, command_line()))
