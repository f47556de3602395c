"""Parameter scopes: over which weights a gradient is taken.

``head`` is the final linear layer; ``top-K`` adds the pooler and the linear layers of the last K encoder layers;
``all`` is every linear layer; ``layer:NAME`` is one of them. ``adapter`` is what LoRA or DoRA trained; the other scopes
are those of the model that it was merged into. A one-dimensional convolution counts as a linear layer of
windows. Word embeddings are left out, and so are biases and LayerNorm, unless they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from forebear.errors import InputError, ModelError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.network.adapters import Adapter
from forebear.indexer.model.network.layers import (
    LinearKind,
    NormKind,
    encoder_layers,
    linear_kind,
    norm_kind,
    word_embeddings,
)
from forebear.indexer.model.scope_names import ADAPTER, ALL, EMBEDDING, ENCODER_INPUT, HEAD, LAYER_PREFIX, n_top_layers


@dataclass(frozen=True)
class Block:
    """Parameters whose gradient at a row is one matrix G = sum_t d_t a_t^T, ``(n_out, n_in)``.

    Attributes:
        name: Dotted name of the module.
        kind: ``linear``: its weight, with the bias as a last column (a_t then ends in 1) if ``bias``.
            ``transposed``: the same, where the module keeps its weight as ``(n_in, n_out)`` (GPT-2).
            ``conv``: a Conv1d's weight and bias likewise; a_t is a window of its input, channel by channel.
            ``norm``: a LayerNorm's weight and bias, one above the other, ``(2 h, 1)``.
            ``scale``: the weight of a norm without a bias (RMSNorm), ``(h, 1)``.
            ``embedding``: the word embeddings, transposed; a_t is the one-hot vector of a token id. Or what enters the
            first encoder layer, which has no parameters (``n_in`` 0).
        n_out: Rows of G.
        n_in: Columns of G.
        bias: Whether a layer's bias takes part.
        window: Positions that a convolution sees at a time.
    """

    name: str
    kind: LinearKind | NormKind | Literal["embedding"]
    n_out: int
    n_in: int
    bias: bool = False
    window: int = 1

    @property
    def size(self) -> int:
        """Numbers in G."""
        return self.n_out * self.n_in

    @property
    def parameter_names(self) -> list[str]:
        """Dotted names of the parameters that G splits into."""
        return list(self.split(torch.empty((self.n_out, self.n_in), device="meta")))

    def split(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """``(..., n_out, n_in)`` as tensors of the shapes of the module's own parameters, by dotted name."""
        if self.kind == "norm":
            half = self.n_out // 2
            return {f"{self.name}.weight": matrix[..., :half, 0], f"{self.name}.bias": matrix[..., half:, 0]}
        if self.kind == "scale":
            return {f"{self.name}.weight": matrix[..., 0]}
        weight = matrix[..., :-1] if self.bias else matrix
        if self.kind == "conv":
            weight = weight.reshape(*weight.shape[:-1], -1, self.window)
        if self.kind in ("transposed", "embedding"):
            weight = weight.transpose(-1, -2)
        return {f"{self.name}.weight": weight} | ({f"{self.name}.bias": matrix[..., -1]} if self.bias else {})

    def join(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`split`; parts of other blocks are passed over."""
        weight = parts[f"{self.name}.weight"]
        if self.kind == "norm":
            return torch.cat([weight, parts[f"{self.name}.bias"]], dim=-1)[..., None]
        if self.kind == "scale":
            return weight[..., None]
        if self.kind == "conv":
            weight = weight.flatten(-2)
        if self.kind in ("transposed", "embedding"):
            weight = weight.transpose(-1, -2)
        if self.bias:
            return torch.cat([weight, parts[f"{self.name}.bias"][..., None]], dim=-1)
        return weight


@dataclass(frozen=True)
class Scope:
    """The parameters of one classifier over which gradients are taken; the same at all checkpoints of a run.

    Attributes:
        name: ``head``, ``top-K``, ``all``, ``adapter`` or ``layer:NAME``; or ``embedding``, or ``encoder-input``.
        blocks: The parameters, module by module in the model's order.
    """

    name: str
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Numbers in a gradient."""
        return sum(block.size for block in self.blocks)

    @property
    def depth(self) -> float:
        """Encoder layers that the backward goes through: 0, K of ``top-K``, or infinity, down to the embeddings."""
        return 0 if self.name == HEAD else n_top_layers(self.name) or math.inf

    def zeros(self, n: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """``n`` gradients of zeros, ``(n, n_out, n_in)`` for each block, of the type and on the device of ``like``."""
        return {block.name: like.new_zeros((n, block.n_out, block.n_in)) for block in self.blocks}


def scope_of(classifier: Classifier, name: str, *, with_bias: bool = False) -> Scope:
    """A scope of a classifier; see :func:`scope_blocks` for what is refused."""
    blocks = scope_blocks(
        classifier.model,
        classifier.head_name,
        name,
        classifier.name,
        with_bias=with_bias,
        adapter=classifier.adapter,
    )
    return Scope(name, blocks)


def embedding_scope(classifier: Classifier) -> Scope:
    """The word embeddings.

    Raises:
        ModelError: The model has none.
    """
    return Scope(EMBEDDING, (embedding_block(classifier.model, classifier.name),))


def encoder_input_scope(classifier: Classifier) -> Scope:
    """What enters the first encoder layer: words, positions and types together, after their LayerNorm."""
    model: Any = classifier.model
    prefix, _ = encoder_layers(model, classifier.name)
    return Scope(ENCODER_INPUT, (Block(f"{prefix}.0", "embedding", model.config.hidden_size, 0),))


def root_modules(classifier: Classifier, scope: Scope) -> tuple[list[nn.Module], bool] | None:
    """Where differentiation starts: the embeddings (True: at their output), a layer (False: at its input), nowhere.

    Raises:
        ModelError: The scope starts at the word embeddings, and the model has none.
    """
    model: Any = classifier.model
    if scope.name == HEAD:
        return None
    n_top = n_top_layers(scope.name)
    if n_top is None and scope.name != ENCODER_INPUT:
        words = word_embeddings(model)
        if words is None:
            raise ModelError(
                f"{classifier.name} ({type(model).__name__}) has no word embeddings, where gradients of scope "
                f"{scope.name!r} start. Use --scope head, or top-K.",
                of="index",
            )
        # An encoder and a decoder (BART) have a module each, of one weight.
        return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is words.weight], True
    prefix, n_layers = encoder_layers(model, classifier.name)
    first = 0 if n_top is None else n_layers - n_top
    return [model.get_submodule(f"{prefix}.{first}")], False


def embedding_block(model: Any, name: str) -> Block:
    """The word embeddings of a transformers model.

    Raises:
        ModelError: The model has none.
    """
    module = word_embeddings(model)
    if module is None:
        raise ModelError(f"{name} ({type(model).__name__}) has no word embeddings, so no word gradients.")
    key = next(key for key, candidate in model.named_modules() if candidate is module)
    return Block(key, "embedding", module.embedding_dim, module.num_embeddings)


def scope_blocks(
    model: Any,
    head_name: str,
    scope: str,
    name: str = "the model",
    *,
    with_bias: bool = False,
    adapter: Adapter | None = None,
) -> tuple[Block, ...]:
    """The parameters of a scope, module by module in the model's order.

    Args:
        model: A transformers sequence classifier.
        head_name: Dotted name of its head.
        scope: ``head``, ``top-K``, ``all``, ``adapter`` or ``layer:NAME``.
        name: Name of the model, for messages.
        with_bias: Whether biases and LayerNorm parameters take part.
        adapter: What LoRA or DoRA put into the network.

    Raises:
        InputError: The scope is not known, K is out of range, or there is no such layer or adapter.
        ModelError: The scope holds weights of a layer type that is not supported, or weights that two layers share;
            the layer is named.
    """
    covers = _coverage(model, head_name, scope, name, adapter)
    blocks: list[Block] = []
    owners: dict[int, str] = {}
    for key, module in model.named_modules():
        if not covers(key):
            continue
        if (kind := linear_kind(module)) is not None:
            other = owners.setdefault(id(module.weight), key)
            if other != key:
                raise ModelError(f"{name}: layers {other} and {key} share one weight, which scope {scope!r} covers.")
            blocks.append(_linear_block(key, module, kind, with_bias=with_bias))
        elif (norm := norm_kind(module)) is not None:
            if with_bias or scope == ADAPTER:
                size = sum(p.numel() for p in module.parameters(recurse=False))
                blocks.append(Block(key, norm, size, 1))
        elif not isinstance(module, nn.Embedding) and (own := _own_parameters(module, with_bias)):
            if n_experts := _n_experts(model):
                raise ModelError(
                    f"{name} is a mixture of experts ({n_experts} in a layer), each of which sees some word pieces of "
                    f"a batch, and scope {scope!r} covers them, which is not supported. Use --scope head.",
                    of="index",
                )
            raise ModelError(
                f"{name}: layer {key} ({type(module).__name__}) holds weights that scope {scope!r} covers "
                f"({', '.join(own)}), and only linear layers, convolutions of one dimension and one group, and norms "
                "are supported. Use --scope head.",
                of="index",
            )
    return tuple(blocks)


def _linear_block(key: str, module: Any, kind: LinearKind, *, with_bias: bool) -> Block:
    """The parameters of one linear layer."""
    n_out, *rest = module.weight.shape[::-1] if kind == "transposed" else module.weight.shape
    bias = with_bias and module.bias is not None
    window = rest[1] if kind == "conv" else 1
    return Block(key, kind, n_out, rest[0] * window + bias, bias, window)


def _n_experts(model: Any) -> int:
    """How many experts a layer has, of which a router picks some for each word piece; 0 in ordinary models."""
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(n) for name in names if (n := getattr(config, name, None)) and n > 1), 0)


def _own_parameters(module: nn.Module, with_bias: bool) -> list[str]:
    """Names of parameters that a module holds itself and that a scope covers: weights, and vectors with biases."""
    return [key for key, p in module.named_parameters(recurse=False) if p.dim() >= 2 or (with_bias and p.dim())]


def _coverage(model: Any, head_name: str, scope: str, name: str, adapter: Adapter | None) -> Callable[[str], bool]:
    """Whether a module, by its name, belongs to a scope."""
    if scope == HEAD:
        return lambda key: key == head_name
    if scope == ADAPTER:
        return _trained_by(adapter, name).__contains__
    if adapter is None:
        return _coverage_of_whole(model, scope, name)
    no_layers = adapter.added | adapter.replaced
    in_merged = _coverage_of_whole(model, scope, name)
    return lambda key: key not in no_layers and in_merged(key)


def _trained_by(adapter: Adapter | None, name: str) -> frozenset[str]:
    """Modules of scope ``adapter``.

    Raises:
        InputError: There is no adapter.
        ModelError: It trained something that is no whole layer.
    """
    if adapter is None:
        raise InputError(f"scope {ADAPTER!r}: {name} holds no LoRA or DoRA adapter. Use head, top-K, or all.")
    if adapter.untold is not None:
        raise ModelError(
            f"scope {ADAPTER!r}: {name} trained {adapter.untold}, which is no whole linear layer or norm. Use --scope "
            "head, top-K or all.",
            of="index",
        )
    return adapter.trained


def _coverage_of_whole(model: Any, scope: str, name: str) -> Callable[[str], bool]:
    """Whether a module of a model without an adapter belongs to a scope beyond the head."""
    if scope == ALL:
        return lambda _key: True
    if scope.startswith(LAYER_PREFIX):
        wanted = scope.removeprefix(LAYER_PREFIX)
        known = [key for key, module in model.named_modules() if linear_kind(module) is not None]
        if wanted not in known:
            raise InputError(f"scope {scope!r}: {name} has no linear layer of that name. It has {', '.join(known)}.")
        return lambda key: key == wanted
    k = n_top_layers(scope)
    if k is None:
        raise InputError(f"scope {scope!r}: expected head, top-K (such as top-5), all, adapter, or layer:NAME.")
    prefix, n_layers = encoder_layers(model, name)
    expected = getattr(model.config, "num_hidden_layers", n_layers)
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
