"""``forebear train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.rows import open_rows_aloud
from forebear.cli.options.shared import Device, Force, LabelColumn, LabelNames, Quiet, TextColumns, Unlabelled
from forebear.cli.screen.console import Variadic, progress_bar, say, warn

if TYPE_CHECKING:
    from forebear.indexer.rows.row_source import RowSource

HELP = """Fine-tune a text classifier and keep every epoch's checkpoint with its learning rate.

Examples:

    forebear train --data train.csv --model minilm --out runs/mine

    forebear train --data mnli.parquet --model roberta-base --labels binary-nli --dev dev.parquet --out runs/nli
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train", help=HELP, cls=Variadic)(train)


def train(
    data: Annotated[str, typer.Option("--data", help="Labelled rows: a file, a save_to_disk folder or a hub name.")],
    model: Annotated[str, typer.Option("--model", help="Folder or hub name to start from; minilm: all-MiniLM-L6-v2.")],
    out: Annotated[str, typer.Option("--out", help="Run folder to write.")],
    dev: Annotated[str | None, typer.Option("--dev", help="Rows to measure accuracy on after each epoch.")] = None,
    epochs: Annotated[int, typer.Option("--epochs")] = 3,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 5e-5,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 32,
    freeze_below: Annotated[
        int | None,
        typer.Option("--freeze-below", help="Freeze the embeddings and the encoder layers below this one."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="binary-nli: neutral and contradiction become non-entailment, here and later."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Longest row in word pieces; the rest is cut. Default: 128, or the model's limit if that is shorter.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    unlabelled: Unlabelled = "refuse",
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See HELP."""
    from forebear.indexer.training.fine_tuning import TrainOptions
    from forebear.indexer.training.fine_tuning import train as run_training

    options = TrainOptions(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        freeze_below=freeze_below,
        label_mode=labels,
        max_length=max_length,
        precision=precision,
        seed=seed,
        device=device,
    )

    def rows(path: str) -> RowSource:
        return open_rows_aloud(
            path,
            text_columns=text_columns,
            label_column=label_column,
            label_names=label_names,
            unlabelled=unlabelled,
            need_labels=True,
        )

    with progress_bar(quiet=quiet) as progress:
        run = run_training(
            rows(data), model, out, options, dev=rows(dev) if dev else None, force=force, progress=progress, warn=warn
        )
    for checkpoint in run.checkpoints:
        accuracy = "" if checkpoint.accuracy is None else f", dev accuracy {checkpoint.accuracy:.1%}"
        say(f"{checkpoint.name}: loss {checkpoint.train_loss:.3f}, eta {checkpoint.eta:.2e}{accuracy}", quiet=quiet)
    say(f"wrote {out}. Next: forebear index --model {out} --train {data} --out {out}-index", quiet=quiet)
