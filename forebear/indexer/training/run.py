"""Training runs on disk: the record in ``run.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forebear.errors import DataError
from forebear.indexer.storage.atomic import write_bytes

RUN_NAME = "run.json"
SMOOTHNESS_NAME = "metasmoothness.json"  # what evaluate metasmoothness keeps beside it


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """One saved checkpoint.

    Attributes:
        name: For example ``epoch-1``.
        path: Folder, relative to the run's.
        step: Optimiser steps taken.
        eta: Mean learning rate over the steps since the previous checkpoint (docs/methods.md, "Conventions").
        train_loss: Mean training loss since the previous checkpoint; None where a Trainer logged none.
        accuracy: Accuracy on the development rows, if any were given and rows have one label.
        measures: What is measured on them otherwise, by name: micro-F1 and subset accuracy, or RMSE and correlation.
    """

    name: str
    path: str
    step: int
    eta: float
    train_loss: float | None
    accuracy: float | None = None
    measures: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record of one ``forebear train``: enough to index the run, and to repeat it.

    Or of one course of transformers' Trainer with a ``ForebearCallback``, which can be indexed, but not repeated:
    ``settings["trainer"]`` then says so.

    Attributes:
        row_format: How the training rows were read, as :meth:`RowFormat.stated` says it; empty in runs of older
            versions, which know ``text_columns`` alone.
    """

    base_model: str
    data: str
    data_sha256: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    label_mode: str | None
    max_length: int
    settings: dict[str, Any]
    checkpoints: tuple[RunCheckpoint, ...]
    libraries: dict[str, str] = field(default_factory=dict)
    row_format: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``run.json`` atomically."""
        content = asdict(self)
        for checkpoint in content["checkpoints"]:
            if checkpoint["measures"] is None:  # which older versions do not know
                del checkpoint["measures"]
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / RUN_NAME, text.encode() + b"\n")


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None when there is none.

    Raises:
        DataError: ``run.json`` is damaged.
    """
    path = folder / RUN_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["checkpoints"] = tuple(RunCheckpoint(**c) for c in content["checkpoints"])
        for name in ("text_columns", "label_names"):
            content[name] = tuple(content[name])
        return Run(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}). Train again, or give the checkpoints by --checkpoints."
        ) from error


def run_of_checkpoint(path: str | Path) -> tuple[Path, Run, RunCheckpoint] | None:
    """The run in whose folder a checkpoint lies: the run's folder, its record, and the checkpoint's entry in it.

    None for a folder of no run, and where ``run.json`` cannot be read: the model can be indexed all the same.
    """
    checkpoint_folder = Path(path).resolve()
    for folder in (checkpoint_folder.parent, checkpoint_folder.parent.parent):  # of a Trainer's run, of forebear train
        try:
            run = read_run(folder)
        except DataError:
            continue
        for checkpoint in () if run is None else run.checkpoints:
            if (folder / checkpoint.path).resolve() == checkpoint_folder:
                assert run is not None
                return folder, run, checkpoint
    return None
