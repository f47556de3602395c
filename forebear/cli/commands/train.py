"""``forebear train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Options, Shown, grouped, values_of
from forebear.cli.options.model import ClassWeights, Device, Labels, LabelSmoothing, MaxLength, Precision, Seed
from forebear.cli.options.report import OutputOptions
from forebear.cli.options.rows import ColumnOptions, ProblemType
from forebear.cli.screen.console import Command, listed, progress_bar, say, warn

if TYPE_CHECKING:
    from forebear.indexer.training.fine_tuning import TrainOptions

HELP = """Fine-tune a text classifier and keep every epoch's checkpoint with its learning rate.

Examples:

    forebear train --data train.csv --model minilm --out runs/mine

    forebear train --data mnli.parquet --model roberta-base --labels binary-nli --dev dev.parquet --out runs/nli

    forebear train --data comments.csv --label-column toxic,obscene,threat --model minilm --out runs/several

    forebear train --data reviews.csv --label-column stars --problem-type regression --model minilm --out runs/stars
"""


@dataclass(frozen=True, kw_only=True)
class TrainingChoices(Options, panel="Training"):
    """How the model is trained: each option is the field of the same name of :class:`TrainOptions`."""

    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the rows.")] = 3
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="The highest rate: it rises over the first tenth of the steps, then falls to 0.",
        ),
    ] = 5e-5
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows in a step.")] = 32
    freeze_below: Annotated[
        int | None,
        typer.Option(
            "--freeze-below",
            help="Freeze the embeddings and the encoder layers below this one, counted from 0.",
            show_default="nothing is frozen",
        ),
    ] = None
    label_mode: Labels = None
    max_length: MaxLength = None
    precision: Precision = "auto"
    class_weights: ClassWeights = None
    label_smoothing: LabelSmoothing = None
    seed: Seed = 0
    device: Device = "auto"

    def train_options(self) -> TrainOptions:
        """The options as the library's :class:`TrainOptions`."""
        from forebear.indexer.training.fine_tuning import TrainOptions

        loss = {"class_weights": tuple(listed(self.class_weights)), "label_smoothing": self.label_smoothing or 0.0}
        return TrainOptions(**values_of(self) | loss)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=HELP, cls=Command)(train)


@grouped(
    max_length=Shown("128, or the model's limit if that is shorter"),
    class_weights=Shown("none"),
    label_smoothing=Shown("0"),
)
def train(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Labelled rows: a file, a save_to_disk folder or a hub name.", rich_help_panel="Rows"
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Folder or hub name to start from; minilm: all-MiniLM-L6-v2.", rich_help_panel="Training"
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Run folder to write.", rich_help_panel="Output")],
    columns: ColumnOptions,
    choices: TrainingChoices,
    output: OutputOptions,
    dev: Annotated[
        str | None,
        typer.Option(
            "--dev",
            help="Rows to measure accuracy on after each epoch: of several labels micro-F1, of numbers RMSE.",
            rich_help_panel="Rows",
            show_default=False,
        ),
    ] = None,
    problem_type: ProblemType = None,
) -> None:
    """Fine-tune a model and keep its checkpoints."""
    from forebear.indexer.rows.targets.label_column import DROP_MARKED
    from forebear.indexer.training.fine_tuning import train as run_training

    source = columns.open(data, unlabelled=DROP_MARKED, problem_type=problem_type)
    dev_source = None
    if dev is not None:
        dev_source = columns.open(dev, like=source.format("the training rows"), unlabelled=DROP_MARKED)
    with progress_bar() as progress:
        run = run_training(
            source,
            model,
            out,
            choices.train_options(),
            dev=dev_source,
            force=output.force,
            progress=progress,
            warn=warn,
        )
    for checkpoint in run.checkpoints:
        accuracy = "" if checkpoint.accuracy is None else f", dev accuracy {checkpoint.accuracy:.1%}"
        accuracy += "".join(f", dev {name} {value:.3f}" for name, value in (checkpoint.measures or {}).items())
        line = f"{checkpoint.name}: loss {checkpoint.train_loss:.3f}, eta {checkpoint.eta:.2e}{accuracy}"
        say(line)
    say(f"wrote {out}. Next: forebear index --model {out} --train {data} --out {out}-index")
