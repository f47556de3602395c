"""``forebear evaluate``: the evaluations that ask about the training rows themselves, without retraining."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from forebear.cli.options.report import Keep, ReportOptions
from forebear.cli.options.rows import ColumnOptions, LabelNames, TextColumns, Train, Unlabelled
from forebear.cli.screen.console import Command, integers
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
METASMOOTHNESS_HELP = """Do the run's weights move along straight lines when rows' weights change?

Trains the run again, with a random share of the rows at half their weight, and without them; 1 is as smooth as can be.
The nearer to 1, the further a first-order answer through the run (--method magic) can reach. With --keep the run's
folder remembers it, and answers by magic say it.

Example:

    forebear evaluate metasmoothness --index I --share 0.05 --directions 3 --keep
"""
MISLABELLED_HELP = """Does a row's influence on itself tell wrong labels? AUC and precision, beside two baselines.

Wrong are the rows whose label in the index differs from the one in another column of the training file, or those
whose numbers are given.

Examples:

    forebear evaluate mislabelled --index I --true-label clean_label --method gd,if

    forebear evaluate mislabelled --index I --wrong-rows flipped.txt --method if --damping 1%
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
    unlabelled: Unlabelled = None

    def check(self) -> None:
        """Refuse both or neither, before anything is opened."""
        if (self.true_label is None) == (self.wrong_rows is None):
            raise InputError("give either --true-label COLUMN or --wrong-rows FILE.")

    def read(self, retriever: Retriever) -> tuple[np.ndarray, np.ndarray | None]:
        """The wrong rows, and the true class ids of all rows where they are known."""
        from forebear.evaluation.measures.mislabelled import true_labels_of, wrong_rows_of
        from forebear.indexer.rows.targets.label_column import DROP_MARKED

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
        source = columns.open(
            self.train or segments[0].source,
            classes=retriever.label_names,
            like=index.manifest.row_format,
            unlabelled=DROP_MARKED,
        )
        truth = true_labels_of(index, source)
        differs = truth != index.labels
        return differs if differs.ndim == 1 else differs.any(axis=1), truth


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("near-duplicates", NEAR_DUPLICATES_HELP, near_duplicates),
        ("cancellation", CANCELLATION_HELP, cancellation),
        ("metasmoothness", METASMOOTHNESS_HELP, metasmoothness),
        ("mislabelled", MISLABELLED_HELP, mislabelled),
    ):
        evaluations.command(name, help=help_text, cls=Command)(command)


@grouped(n_queries=200, tops=Shown("1,10"))
def near_duplicates(
    index: IndexOptions,
    question: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    methods: Methods = None,
    edits: Annotated[
        list[str] | None,
        typer.Option("--edits", help="What is done to a row: same, add, remove, replace.", show_default="all four"),
    ] = None,
    tops: Depths = None,
) -> None:
    """Report how often a training row is found by its own text, as it is or edited."""
    from forebear.evaluation.python.evaluations import near_duplicates

    depths = integers("--top", tops)
    report.call(near_duplicates, index.open(), question, sample, methods=methods, edits=edits, tops=depths)


@grouped()
def cancellation(index: IndexOptions, report: ReportOptions, n_rows: SampledRows = 100, seed: SampleSeed = 0) -> None:
    """Report how far the gradients of training rows cancel out, by layer."""
    from forebear.evaluation.python.evaluations import cancellation

    report.call(cancellation, index.open(), n_rows=n_rows, seed=seed)


@grouped()
def metasmoothness(
    index: IndexOptions,
    report: ReportOptions,
    share: Annotated[float, typer.Option("--share", help="Share of the rows whose weight is lowered to 0.")] = 0.05,
    n_directions: Annotated[int, typer.Option("--directions", help="Draws of rows, two trainings each.")] = 1,
    seed: SampleSeed = 0,
    keep: Keep = False,
) -> None:
    """Report the metasmoothness of the run."""
    from forebear.evaluation.python.evaluations import metasmoothness

    report.call(metasmoothness, index.open(), share=share, n_directions=n_directions, seed=seed, keep=keep)


@grouped(methods=Shown("gd,if"), tops=Shown("the number of wrong rows"), train=Shown("the file that the index names"))
def mislabelled(
    index: IndexOptions,
    question: ScopeOptions,
    report: ReportOptions,
    truth: TruthOptions,
    methods: Methods = None,
    tops: Depths = None,
    n_neighbours: Neighbours = 10,
    seed: SampleSeed = 0,
) -> None:
    """Report how well self-influence finds wrong labels."""
    from forebear.evaluation.python.evaluations import mislabelled

    truth.check()
    report.check()
    retriever = index.open()
    wrong, true_labels = truth.read(retriever)
    report.call(
        mislabelled, retriever, question, methods=methods, wrong=wrong, true_labels=true_labels,
        tops=integers("--top", tops), n_neighbours=n_neighbours, seed=seed,
    )  # fmt: skip
