"""Layers of a transformers network, found by structure: linear ones, word embeddings, the encoder's list."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from forebear.errors import ModelError


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    """Whether a module's gradient at a row is a sum of outer products, one a position."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.groups == 1)


def word_embeddings(model: Any) -> nn.Embedding | None:
    """The word embeddings of a transformers model; None where it has none, or none of torch's kind."""
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # CANINE hashes characters
        return None
    return module if isinstance(module, nn.Embedding) else None


def encoder_layers(model: Any, name: str) -> tuple[str, int]:
    """Dotted name and length of the encoder's list of layers, found by structure.

    Raises:
        ModelError: There is no such list.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    lists = {
        key: module
        for key, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    }
    outer = {key: layers for key, layers in lists.items() if not any(key.startswith(f"{o}.") for o in lists)}
    if not outer:
        raise ModelError(f"{name} ({type(model).__name__}) has no list of encoder layers.")
    longest = max(outer, key=lambda key: len(outer[key]))
    return prefix + longest, len(outer[longest])
