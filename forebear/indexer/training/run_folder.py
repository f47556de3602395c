"""Writing a run folder: only an earlier run is replaced, and each checkpoint is written whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forebear.errors import DataError, OutputExistsError, StorageError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX, sync
from forebear.indexer.storage.layout import LOCK_NAME
from forebear.indexer.training.run import RUN_NAME, SMOOTHNESS_NAME, read_run

CHECKPOINTS = "checkpoints"
CHECKPOINT_NAME = re.compile(rf"epoch-\d+({re.escape(TEMPORARY_SUFFIX)})?")


def check_out(folder: Path, force: bool) -> None:
    """Refuse a folder that is in use; with ``force``, only one that holds anything else than a forebear run.

    Raises:
        OutputExistsError: The folder is refused, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; --out names a folder to be written. Choose another.")
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK_NAME) if folder.is_dir() else []
    if not names:
        return
    held = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    if not _is_run(folder, names):
        raise OutputExistsError(
            f"{folder} holds {held} and is no training run; nothing of it is ever removed. Choose another --out."
        )
    if not force:
        state = "a training run" if RUN_NAME in names else "an unfinished training run"
        raise OutputExistsError(f"{folder} holds {state}. Choose another --out, or give --force to replace it.")


def _is_run(folder: Path, names: list[str]) -> bool:
    """Whether a folder holds a finished run, or nothing but an unfinished one."""
    if RUN_NAME in names:
        try:
            return read_run(folder) is not None
        except DataError:
            return False
    checkpoints = folder / CHECKPOINTS
    inside = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return set(names) <= {CHECKPOINTS, RUN_NAME + TEMPORARY_SUFFIX} and all(map(CHECKPOINT_NAME.fullmatch, inside))


def clear_out(folder: Path) -> None:
    """Remove an earlier run's files, ``run.json`` first, and make the folder.

    Raises:
        StorageError: The folder cannot be written.
    """
    with _writing(folder):
        for name in (RUN_NAME, RUN_NAME + TEMPORARY_SUFFIX, SMOOTHNESS_NAME):
            (folder / name).unlink(missing_ok=True)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for path in (folder / CHECKPOINTS).iterdir():
            if CHECKPOINT_NAME.fullmatch(path.name):
                shutil.rmtree(path)


def save_checkpoint(classifier: Classifier, folder: Path) -> None:
    """Write model and tokenizer under a temporary name, sync, rename: the folder is complete or absent.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    save_model(classifier.model, classifier.tokenizer, folder)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """:func:`save_checkpoint` of a transformers model and its tokenizer."""
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    try:
        with _writing(folder):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for path in [*partial.iterdir(), partial]:
                sync(path)
            partial.replace(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the errors of a failed write into a StorageError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise StorageError(
            f"cannot write {path}: {reason}. The run is unfinished; free some space or choose another --out, and train "
            "again."
        ) from error
