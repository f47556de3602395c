"""A recorded run opened to be repeated: what cannot be repeated to the last bit is refused, as early as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError, MismatchError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.loading import load_classifier, weights_sha256
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.storage.manifest import library_versions
from forebear.indexer.training.course import RANDOM_NUMBERS
from forebear.indexer.training.options import TrainOptions
from forebear.indexer.training.recorded_start import Start, arrays
from forebear.indexer.training.replay.trajectory import Trajectory
from forebear.indexer.training.run import Run, RunCheckpoint
from forebear.indexer.training.start import freeze_below
from forebear.progress import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run on disk, up to one of its checkpoints, and the rows that it was trained on.

    Attributes:
        folder: The run's folder.
        run: Its record.
        checkpoint: The checkpoint that is differentiated.
        checkpoint_sha256: Digest of its weights.
        tokenizer_sha256: Digest of its tokenizer.
        texts: Texts of the training rows in the run's order, one list a text column.
        labels: Class ids of the training rows, ``(n,)``.
    """

    folder: Path
    run: Run
    checkpoint: RunCheckpoint
    checkpoint_sha256: str
    tokenizer_sha256: str
    texts: Sequence[Sequence[str]]
    labels: np.ndarray


def check_repeatable(folder: Path, run: Run) -> None:
    """Refuse a run whose record says that it cannot be repeated here.

    Raises:
        InputError: A script of its own trained it, an older version, in bf16, or not on rows of one label.
        MismatchError: It was trained on another device than there is.
    """
    settings = run.settings
    if settings.get("trainer"):
        raise InputError(
            f"{folder} was trained by a script of its own, with transformers' Trainer, whose steps are not recorded. "
            "Train by forebear train to ask for the derivative through the run."
        )
    if (problem_type := settings.get("problem_type", SINGLE_LABEL)) != SINGLE_LABEL:
        raise InputError(
            f"{folder} was trained on rows of {problem_type}; the derivative through a run is there for rows of one "
            "label alone. Ask by other methods."
        )
    if settings.get("random_numbers") != RANDOM_NUMBERS:
        raise InputError(
            f"{folder} was trained by an older forebear, whose dropout cannot be repeated. Train and index again."
        )
    if settings["precision"] != "fp32":
        raise InputError(
            f"{folder} was trained in {settings['precision']}, whose rounding has no derivative. Train with "
            "--precision fp32 and index again."
        )
    recorded = settings.get("computed_on", {}).get("device", settings["device"])
    here = device_kind(pick_device(settings["device"]))
    if here != recorded:
        raise MismatchError(
            f"{folder} was trained on {recorded}; here is {here}, which computes other last bits, so that the run "
            f"cannot be repeated. Ask on a machine with {recorded}."
        )


def open_trajectory(recorded: RecordedRun, progress: Progress = no_progress) -> Trajectory:
    """Train the run once more, up to its checkpoint, comparing the weights at the end of every epoch.

    With the number of threads that the run had.

    Args:
        recorded: The run.
        progress: Called with the stage, and the steps done and in all.

    Raises:
        MismatchError: The start model changed, or the weights at the end of an epoch are not those of the run.
        InputError: As :func:`check_repeatable`.
    """
    run = recorded.run
    check_repeatable(recorded.folder, run)
    classifier, options, rows = start_of(recorded)
    n_epochs = 1 + [checkpoint.name for checkpoint in run.checkpoints].index(recorded.checkpoint.name)

    def check(step: int, trained: Classifier) -> None:
        _check_weights(recorded, step, trained)

    return Trajectory(classifier, rows, options, n_epochs=n_epochs, check=check, progress=progress)


def start_of(recorded: RecordedRun) -> tuple[Classifier, TrainOptions, list[dict[str, Any]]]:
    """The model before the first step, what is frozen being so; the run's options; and its rows as training takes them.

    Raises:
        MismatchError: The start model changed.
    """
    run = recorded.run
    start = Start(run, run.label_names, recorded.tokenizer_sha256, run.settings["device"])
    k = start.options.freeze_below
    if k is not None:
        start.prepare(lambda classifier: freeze_below(classifier.model, k, classifier.name))
    classifier = start.at(start.options.seed)
    encoded = arrays(encode(classifier, recorded.texts))
    rows = [{**row, "labels": int(label)} for row, label in zip(encoded, recorded.labels, strict=True)]
    return classifier, start.options, rows


def _check_weights(recorded: RecordedRun, step: int, trained: Classifier) -> None:
    """Refuse weights that are not those of the run's checkpoint after a step; one that was deleted is passed over."""
    checkpoint = next(c for c in recorded.run.checkpoints if c.step == step)
    folder = recorded.folder / checkpoint.path
    if checkpoint.name == recorded.checkpoint.name:
        expected = recorded.checkpoint_sha256
    elif folder.is_dir():
        expected = load_classifier(folder, device="cpu").sha256
    else:
        return
    if weights_sha256(trained.model) != expected:
        raise MismatchError(
            f"{recorded.folder} repeated has other weights at {checkpoint.name}, after {step} steps: this machine "
            f"computes other last bits than that of the run{_other_libraries(recorded.run)}. Ask where it was trained, "
            "or train and index again here."
        )


def _other_libraries(run: Run) -> str:
    """Libraries of the run that have another version here, as a phrase of a message."""
    here = library_versions(tuple(run.libraries))
    others = [
        f"{name} {here.get(name, 'none')}, then {version}"
        for name, version in run.libraries.items()
        if here.get(name) != version
    ]
    return f" ({'; '.join(others)})" if others else ""


@contextmanager
def threads_of(run: Run) -> Iterator[None]:
    """As many threads as the run had, on which last bits depend on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(run.settings.get("threads", before)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
