"""Parameter scopes: which linear layers' weights a gradient is taken over (METHODS.md, section 2).

``head`` is the final linear layer; ``top-K`` adds the pooler and the linear layers of the last K encoder layers;
``all`` is every linear layer. Word embeddings, biases and LayerNorm are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from forebear.errors import InputError, ModelError

_PASSIVE = (nn.Linear, nn.Embedding, nn.LayerNorm)


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
    outer = {key: found for key, found in lists.items() if not any(key.startswith(f"{o}.") for o in lists)}
    if not outer:
        raise ModelError(f"{name} ({type(model).__name__}) has no list of encoder layers.")
    found = max(outer, key=lambda key: len(outer[key]))
    return prefix + found, len(outer[found])


def scope_layers(model: Any, head_name: str, scope: str, name: str = "the model") -> tuple[str, ...]:
    """Names of the linear layers of a scope, in the model's order.

    Args:
        model: A transformers sequence classifier.
        head_name: Its head.
        scope: ``head``, ``top-K`` or ``all``.
        name: For messages.

    Raises:
        InputError: The scope is not known, or K is out of range.
        ModelError: The scope holds weights of a layer type that is not supported; the layer is named.
    """
    if scope == "head":
        return (head_name,)
    covers = _coverage(model, scope, name)
    linear = []
    for key, module in model.named_modules():
        if not covers(key):
            continue
        if isinstance(module, nn.Linear):
            linear.append(key)
        elif not isinstance(module, _PASSIVE) and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            raise ModelError(
                f"{name}: layer {key} ({type(module).__name__}) holds weights that scope {scope!r} covers, and only "
                "linear layers are supported. Use --scope head."
            )
    return tuple(linear)


def _coverage(model: Any, scope: str, name: str) -> Callable[[str], bool]:
    """Whether a module, by its name, belongs to a scope."""
    if scope == "all":
        return lambda _key: True
    match = re.fullmatch(r"top-(\d+)", scope)
    if match is None:
        raise InputError(f"scope {scope!r}: expected head, top-K (such as top-5) or all.")
    prefix, n_layers = encoder_layers(model, name)
    expected = getattr(model.config, "num_hidden_layers", n_layers)
    k = int(match[1])
    if n_layers != expected:
        raise ModelError(
            f"{name} runs {expected} layers with the weights of {n_layers} (shared): top-K has no meaning. Use all."
        )
    if not 1 <= k <= n_layers:
        raise InputError(f"scope {scope!r}: {name} has {n_layers} encoder layers, so top-1 to top-{n_layers}.")
    base = f"{model.base_model_prefix}."
    kept = tuple(f"{prefix}.{i}." for i in range(n_layers - k, n_layers))

    def covers(key: str) -> bool:
        above = (
            bool(key) and key != base[:-1] and not key.startswith(base)
        )  # pooler and head of RoBERTa, DistilBERT, ...
        return f"{key}.".startswith(kept) or above or "pooler" in key.split(".")

    return covers
