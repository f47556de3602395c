"""``forebear evaluate``: a group of commands, one an evaluation."""

from __future__ import annotations

import typer

from forebear.cli.commands.evaluate import comparisons as evaluate_comparisons
from forebear.cli.commands.evaluate import retraining as evaluate_retraining
from forebear.cli.commands.evaluate import spans as evaluate_spans
from forebear.cli.commands.evaluate import training_rows as evaluate_training_rows


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    evaluations = typer.Typer(
        help="Measure methods: agreement, faithfulness, retraining and more.", no_args_is_help=True
    )
    for module in (evaluate_comparisons, evaluate_training_rows, evaluate_spans, evaluate_retraining):
        module.register(evaluations)
    app.add_typer(evaluations, name="evaluate")
