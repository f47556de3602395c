"""Layers of a transformers network, found by structure: linear ones, word embeddings, the encoder's list."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from forebear.errors import ModelError

LinearKind = Literal["linear", "transposed", "conv"]
NormKind = Literal["norm", "scale"]


class Scale(nn.Module):
    """Multiplication by one number a dimension."""

    def __init__(self, weight: nn.Parameter) -> None:
        """The numbers, ``(h,)``."""
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., h)`` times the numbers."""
        return x * self.weight


def linear_kind(module: nn.Module) -> LinearKind | None:
    """How a layer's weight is laid out whose gradient at a row is a sum of outer products; None of any other module."""
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', of GPT-2: the weight turned round
        return "transposed"
    return "conv" if isinstance(module, nn.Conv1d) and module.groups == 1 else None


def norm_kind(module: nn.Module) -> NormKind | None:
    """Whether a module scales each dimension and adds a bias (``norm``), or only scales (``scale``, RMSNorm).

    Told by its own parameters, one number a dimension, and by its name: transformers has an RMSNorm in each family.
    """
    own = dict(module.named_parameters(recurse=False))
    is_named = isinstance(module, Scale) or "norm" in type(module).__name__.lower()
    if not is_named or any(p.dim() != 1 for p in own.values()):
        return None
    return {("bias", "weight"): "norm", ("weight",): "scale"}.get(tuple(sorted(own)))  # type: ignore[return-value]


def is_layer(module: nn.Module) -> bool:
    """Whether a module's gradient at a row can be taken from its inputs and output gradients."""
    return linear_kind(module) is not None or norm_kind(module) is not None


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
    if getattr(model.config, "is_encoder_decoder", False):  # the layers next to the head are the decoder's
        outer = {key: layers for key, layers in outer.items() if "decoder" in key.split(".")} or outer
    longest = max(outer, key=lambda key: len(outer[key]))
    return prefix + longest, len(outer[longest])
