"""Options of commands that retrain the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.cli.options.groups import Options, values_of
from forebear.cli.options.question import Shares
from forebear.cli.screen.console import integers

if TYPE_CHECKING:
    from forebear.evaluation.python.retrainings import Retraining

Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        help="Processes that retrain at a time; they share the cores. To go on after a kill, give the same number: "
        "threads decide last bits.",
    ),
]

RECIPE = typer.Option(
    "--retrain",
    help="What is trained again: full, top-K (the last K layers, as top-2), head, or proximal-head (the head from its "
    "trained weight, held by the damping).",
)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options, panel="Retraining"):
    """How the model is retrained, how often, and where the outcomes are kept."""

    recipe: Annotated[str | None, RECIPE] = None
    n_seeds: Annotated[
        int,
        typer.Option("--seeds", help="Retrainings of each kind, with seeds from --seed up; for head one is enough."),
    ] = 5
    run: Annotated[
        str | None,
        typer.Option(
            "--run", help="Run folder of the training.", show_default="the one that the index's model lies in"
        ),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Folder of finished retrainings.", show_default="INDEX-retraining"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RetrainOptions(RecipeOptions):
    """The same, of commands that always retrain, by several processes."""

    recipe: Annotated[str | None, RECIPE] = "head"
    workers: Workers = 1

    def how(self, device: str, start: Callable[[int, Path], None]) -> Retraining | None:
        """The retraining on a device, as the functions of the package take it; None where no recipe is given.

        ``start`` begins so many processes over a folder of outcomes.
        """
        from forebear.evaluation.python.retrainings import Retraining

        if self.recipe is None:  # of commands whose default is that nothing is trained
            return None
        choices = values_of(self)
        return Retraining(device=device, begin=partial(start, choices.pop("workers")), **choices)


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(RetrainOptions):
    """Options of evaluations that train many models, besides those of retraining."""

    l2: Annotated[float, typer.Option("--l2", help="Of --retrain head: weight of half the squared norm, above 0.")] = (
        0.01
    )
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            help="Models to train at most; what is compared is then sampled.",
            show_default="as many as it takes",
            min=1,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class AmountOptions(Options, panel="Retraining"):
    """How many rows are removed."""

    remove: Annotated[
        list[str] | None, typer.Option("--remove", help="Numbers of rows to remove.", show_default=False)
    ] = None
    shares: Shares = None

    def given(self) -> dict[str, Any]:
        """The options as the functions that retrain take them."""
        return {"remove": integers("--remove", self.remove), "shares": self.shares}
