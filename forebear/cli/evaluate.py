"""``forebear evaluate``: a group of commands, one an evaluation."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    evaluations = typer.Typer(
        help="Measure methods: agreement, faithfulness, retraining and more.", no_args_is_help=True
    )
    app.add_typer(evaluations, name="evaluate")
