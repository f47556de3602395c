"""Loading what transformers saved: by folder or hub name, quietly, its errors in one line that says what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from forebear.errors import ModelError, first_line, is_out_of_memory
from forebear.indexer.rows.source_names import similar_names

TRAINER_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WEIGHTS = ("model", "pytorch_model")  # beginnings of the names of files of weights
ADAPTER_CONFIG = "adapter_config.json"
SHOWN_NAMES = 5


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn transformers' log lines and progress bars off for a while."""
    from transformers import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained`` with transformers' chatter off and its errors in one line.

    Args:
        auto_class: For example ``AutoTokenizer``.
        name: A folder, or a name on the hub.
        **kwargs: For ``from_pretrained``.

    Raises:
        ModelError: There is no such folder or name, or what is there cannot be loaded.
    """
    from transformers import AutoConfig

    is_there = Path(name).exists()
    if is_there:
        _check_folder(Path(name), auto_class.__name__)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{name}: no such model folder.{similar_names(name)} If it has moved, say where it is by --model."
        )
    try:
        with quiet_transformers():
            if hasattr(auto_class, "_model_mapping"):
                check_full_precision(AutoConfig.from_pretrained(name), name)
            return auto_class.from_pretrained(name, **kwargs)
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # transformers raises a dozen types here, all of which mean that the model cannot be loaded
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        if is_there or not isinstance(error, OSError):
            raise ModelError(f"cannot load {name} with {auto_class.__name__}: {reason}") from error
        where = "in the hub's cache (HF_HUB_OFFLINE is set)" if _is_offline() else f"on the hub ({_answer(reason)})"
        raise ModelError(
            f"{name}: no such model folder, and no model of that name is found {where}.{similar_names(name)} Give a "
            "folder that save_pretrained wrote, or a hub name such as distilbert-base-uncased."
        ) from error


def check_full_precision(config: Any, name: str) -> None:
    """Refuse a model whose weights are stored in few bits.

    Raises:
        ModelError: Its configuration says so: a gradient of such weights, which no training step changes, is not
            defined, and their layers do not keep them as matrices.
    """
    if (settings := getattr(config, "quantization_config", None)) is None:
        return
    of_kind = settings if isinstance(settings, dict) else settings.to_dict()
    raise ModelError(
        f"{name} has quantised weights (quantization_config: {of_kind.get('quant_method', 'unknown')}), which are not "
        "supported: a gradient needs weights in full precision. Give the model that it was made from; or dequantise it "
        "(model.dequantize().save_pretrained(FOLDER)) and give FOLDER.",
        of="index",
    )


def stored_config(name: str) -> Any:
    """A model's configuration; None where it has none, or it cannot be read: loading the model says what is wrong."""
    from transformers import AutoConfig

    try:
        return load_pretrained(AutoConfig, name)
    except ModelError:
        return None


def trainer_checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders that transformers' Trainer left in a folder, by N."""
    if not folder.is_dir():
        return []
    matches = [(TRAINER_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _step, path in sorted((int(match[1]), path) for match, path in matches if match)]


def trainer_rates(checkpoints: list[Path]) -> list[float] | None:
    """The mean learning rate that Trainer logged between each checkpoint and the one before.

    Returns:
        One a checkpoint, from the last one's ``trainer_state.json``; None where that lacks the rates of any of them, or
        where the folders are not in the order of their steps.
    """
    steps = []
    history: Any = []
    try:
        for folder in checkpoints:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            steps.append(int(state["global_step"]))
            history = state["log_history"]
        logged = [(int(e["step"]), float(e["learning_rate"])) for e in history if "learning_rate" in e and "step" in e]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(later <= step for step, later in pairwise(steps)):
        return None
    rates = []
    for before, step in zip([0, *steps[:-1]], steps, strict=True):
        between = [rate for at, rate in logged if before < at <= step]
        mean = sum(between) / len(between) if between else 0.0
        if not 0 < mean < float("inf"):
            return None
        rates.append(mean)
    return rates


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and no weights of a whole model."""
    is_named = (folder / ADAPTER_CONFIG).is_file()
    return is_named and not any(path.name.startswith(WEIGHTS) for path in folder.iterdir())


def _check_folder(folder: Path, wanted: str) -> None:
    """Refuse a folder that holds no whole model, and say what it holds instead."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is a file and no transformers model folder. Give a folder that save_pretrained wrote."
        )
    if wanted == "AutoTokenizer" and (folder / "tokenizer_config.json").is_file():
        return
    if holds_adapter(folder):
        raise ModelError(
            f"{folder} is a PEFT adapter (adapter_config.json), where a whole model is needed. Merge it first: "
            "model.merge_and_unload().save_pretrained(FOLDER), tokenizer.save_pretrained(FOLDER), and give that folder."
        )
    if (folder / "config.json").is_file():
        return
    if found := trainer_checkpoints(folder):
        names = ", ".join(path.name for path in found[-SHOWN_NAMES:])
        raise ModelError(
            f"{folder} holds no model itself (no config.json) but the Trainer checkpoints {names}. Give one by --model "
            f"{found[-1]}, or all of them to forebear index by --model {folder} --checkpoints all."
        )
    models = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
    inside = f" Model folders in it: {', '.join(models[:SHOWN_NAMES])}." if models else ""
    raise ModelError(
        f"{folder} is no transformers model folder (no config.json in it).{inside} Give one that save_pretrained wrote."
    )


def _answer(reason: str) -> str:
    """The hub's answer in short, because transformers' own line on a lack of network is long and names hosts."""
    return "it cannot be reached" if "connect" in reason else reason[:200]


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
