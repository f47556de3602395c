"""How a job is trained: all of the run again (``full``), its last layers (``top-K``) or its head.

``full`` is the training run once more, by its own loop. The others are stand-ins that cost less: ``head`` fits
a new head, ``proximal-head`` moves the trained one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from forebear.errors import InputError, MismatchError
from forebear.evaluation.retraining.jobs import Recipe, Retrainer, TrainingRows
from forebear.evaluation.retraining.recipe_full import FullRecipe
from forebear.evaluation.retraining.recipe_head import DEFAULT_L2, HeadRecipe, ProximalHeadRecipe
from forebear.evaluation.retraining.recipe_top import TopRecipe
from forebear.indexer.index import Index
from forebear.indexer.training.recorded_start import Start
from forebear.indexer.training.run import RUN_NAME, Run, read_run
from forebear.retriever.retriever import Retriever


def open_retrainer(
    retriever: Retriever,
    name: str,
    evaluation: Sequence[Sequence[str]],
    cache: str | Path,
    *,
    run: str | Path | None = None,
    l2: float = DEFAULT_L2,
    device: str = "auto",
    damping: str | None = None,
) -> Retrainer:
    """A retrainer of the model that an index explains.

    Args:
        retriever: Over the index; jobs choose from its rows.
        name: ``full``, ``top-K``, ``head`` or ``proximal-head``.
        evaluation: Texts of the evaluation rows, one list a text column.
        cache: Folder of outcomes.
        run: Run folder of ``forebear train``; None: the one that the index's last checkpoint lies in.
        l2: For ``head``: weight of half the squared norm of the head beside the mean loss.
        device: As :func:`~forebear.indexer.model.device.picking.pick_device` takes it.
        damping: For ``proximal-head``: as the question names it; None: the index's first.

    Raises:
        InputError: No such recipe, a model without a run folder, or layers that are not there.
        MismatchError: The run's start model changed since the run.
        ModelError: The model's layers cannot be trained alone.
    """
    training_run = check_recipe(retriever.index, name, run)
    rows = TrainingRows(retriever.index)
    recipe: Recipe
    if name == "head":
        recipe = HeadRecipe(retriever, rows, evaluation, l2)
    elif name == ProximalHeadRecipe.name:
        recipe = ProximalHeadRecipe(retriever, rows, evaluation, damping)
    else:
        assert training_run is not None
        start = Start(training_run, rows.label_names, retriever.index.manifest.spec.tokenizer_sha256, device)
        recipe = FullRecipe(start, rows, evaluation) if name == "full" else TopRecipe(start, rows, evaluation, name)
    return Retrainer(recipe, rows, evaluation, cache)


def check_recipe(index: Index, name: str, run: str | Path | None) -> Run | None:
    """The training run that a recipe needs, see :func:`find_run`; None where it needs none.

    Raises:
        InputError: No such recipe, or a model without a run folder.
        MismatchError: The run has other labels.
    """
    if name in (HeadRecipe.name, ProximalHeadRecipe.name):
        return None
    if name != FullRecipe.name and not re.fullmatch(r"top-[1-9]\d*", name):
        raise InputError(f"--retrain {name!r}: expected full, top-K (such as top-2), head or proximal-head.")
    return find_run(index, run)


def find_run(index: Index, run: str | Path | None) -> Run:
    """The training run behind an index."""
    folder = Path(run) if run is not None else None
    if folder is None:
        last = Path(index.checkpoint_paths[-1]).resolve()
        folder = next((parent for parent in last.parents if (parent / RUN_NAME).is_file()), last)
    training_run = read_run(folder)
    if training_run is None:
        raise InputError(
            f"{folder} is no training run (no {RUN_NAME}): how the model was trained is not known. Name the run "
            "folder by --run, or take --retrain head."
        )
    if training_run.settings.get("trainer"):
        raise InputError(
            f"{folder} was trained by a script of its own, with transformers' Trainer, which cannot be repeated here. "
            "Take --retrain head, or train by forebear train."
        )
    if training_run.label_names != index.manifest.spec.label_names:
        raise MismatchError(
            f"{folder} trained on the labels {', '.join(training_run.label_names)}, the index has "
            f"{', '.join(index.manifest.spec.label_names)}. Name the right run by --run."
        )
    return training_run
