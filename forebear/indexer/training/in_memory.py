"""A model in memory: it is saved beside its index, because an index is asked together with its model."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forebear.errors import InputError, MismatchError, OutputExistsError
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.network.pretrained import ADAPTER_CONFIG
from forebear.indexer.training.run_folder import save_model

MODEL_SUFFIX = "-model"


def saved_beside(index: Path, model: Any, tokenizer: Any, *, resume: bool, force: bool) -> str:
    """Save a transformers model, or one with an adapter of PEFT, into the folder ``INDEX-model``.

    Args:
        index: The index folder.
        model: The model.
        tokenizer: Its tokenizer.
        resume: Take the folder as it is, if it holds this model.
        force: Replace the folder.

    Returns:
        The folder.

    Raises:
        InputError: These are no model and tokenizer.
        OutputExistsError: The folder is there, and neither ``resume`` nor ``force`` is set.
        MismatchError: ``resume``, and the folder holds another model.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise InputError(
            f"the model is a {type(model).__name__}; expected a folder or hub name, which brings its tokenizer, or a "
            "transformers model in memory with tokenizer=tokenizer."
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise InputError(
            f"the tokenizer of the model is {'not given' if tokenizer is None else f'a {type(tokenizer).__name__}'}. "
            "Give it: Index.build(model, rows, out, tokenizer=tokenizer)."
        )
    folder = index.with_name(index.name + MODEL_SUFFIX)
    if folder.exists() and resume:
        with TemporaryDirectory() as temporary:
            save_model(model, tokenizer, Path(temporary) / "model")
            given, stored = (load_classifier(path, device="cpu") for path in (Path(temporary) / "model", folder))
        if (given.sha256, given.tokenizer_sha256) == (stored.sha256, stored.tokenizer_sha256):
            return str(folder)
        if not force:
            raise MismatchError(f"{folder} holds another model than the one given. Use --force to replace it.")
    if folder.exists():
        if not force or not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise OutputExistsError(
                f"{folder}, where the model is to be kept, exists. Give another --out; or --force, if it is a model "
                "that an earlier build kept there."
            )
        shutil.rmtree(folder)
    save_model(model, tokenizer, folder)
    return str(folder)
