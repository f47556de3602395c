"""Uses of layers in one pass: each layer's inputs are matched with the gradients at its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from forebear.errors import ModelError
from forebear.indexer.gradients.factors import LayerFactors, OnLayer, wide
from forebear.indexer.model.device.copies import picks
from forebear.indexer.model.network.shared_layers import SharedUses, is_shared
from forebear.indexer.model.scopes import Block


class LayerUses:
    """Matches each layer's inputs with the gradients at its outputs, over all of its uses in a forward pass."""

    def __init__(
        self,
        model_name: str,
        n_rows: int,
        shared_layers: frozenset[str],
        shared: SharedUses,
        on_layer: OnLayer,
        *,
        narrow: bool = False,
    ) -> None:
        """Nothing is watched yet.

        Args:
            model_name: Name of the model, for messages.
            n_rows: Rows of the batch.
            shared_layers: Layers of which some use has another first dimension than the rows.
            shared: Expands outputs that all rows share.
            on_layer: Gets each layer's factors once the gradients of all of its uses have arrived.
            narrow: Whether factors keep the types of the pass, where nothing is made of them here.
        """
        self._narrow = narrow
        self._model_name, self._n_rows, self._on_layer = model_name, n_rows, on_layer
        self._shared_layers, self._shared = shared_layers, shared
        self._zero: torch.Tensor | None = None
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._deltas: dict[Block, dict[int, torch.Tensor]] = {}

    def watch(self, block: Block) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        """A forward hook for the block's module."""
        name = block.name

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            a = args[0].detach()
            uses = self._inputs.setdefault(name, [])
            number = len(uses)
            is_for_all = is_shared(a, self._n_rows)
            uses.append(self._by_row(_prepared(block, module, a), block))
            # What does not come from the root, such as relative positions, begins to track gradients here; and a use
            # that the rows share is told apart by row.
            if is_for_all:
                watched = self._shared.expand(output, self._tracking(output))
            elif not output.requires_grad or name in self._shared_layers:  # changed in place, perhaps: watch a copy
                watched = output + self._tracking(output)
                self._shared.follow(a, watched)
            else:
                watched = output
            watched.register_hook(lambda delta: self._arrive(block, number, delta))  # type: ignore[no-untyped-call]
            return None if watched is output else watched

        return hook

    def _tracking(self, like: torch.Tensor) -> torch.Tensor:
        """The number 0, tracking gradients."""
        if self._zero is None:
            self._zero = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        return self._zero

    def _by_row(self, values: torch.Tensor, block: Block) -> torch.Tensor:
        """Inputs or output gradients as ``(b, t, x)``; a use that rows share has one entry, ``(1, t, x)``.

        Raises:
            ModelError: The rows cannot be told apart; the layer is named.
        """
        n, width = self._n_rows, values.shape[-1]
        if n == 1 or is_shared(values, n):
            return values.reshape(1, -1, width)
        one_after_another = values.dim() == 2 and len(values) % n == 0 and block.name not in self._shared_layers
        if values.dim() >= 2 and (len(values) == n or one_after_another):
            return values.reshape(n, -1, width)
        raise ModelError(
            f"{self._model_name}: layer {block.name} gets inputs of shape {tuple(values.shape)} for {n} rows; its "
            "gradient cannot be told apart by row. Use --scope head for this model.",
            of="index",
        )

    def _arrive(self, block: Block, number: int, delta: torch.Tensor) -> None:
        d = delta.detach().transpose(1, 2) if block.kind == "conv" else delta.detach()
        deltas = self._deltas.setdefault(block, {})
        deltas[number] = self._by_row(d, block)
        if len(deltas) == len(self._inputs[block.name]):
            self._deliver(block)

    def finish(self) -> None:
        """After the backward, show the layers whose uses have not all had an output gradient.

        These uses are such that the logits do not depend on them: their gradient is zero, so they add nothing, and the
        layer's gradient is whole without them. A layer of which no use matters is not shown, its gradient being zero.
        """
        for block, deltas in self._deltas.items():
            if deltas:
                self._deliver(block)

    def _deliver(self, block: Block) -> None:
        """Show a layer's factors, over the uses whose output gradients have arrived."""
        inputs, deltas = self._inputs[block.name], self._deltas[block]
        plain = block.kind in ("linear", "transposed") and not block.bias
        keeps = self._narrow and plain and len(deltas) == 1
        uses = [_factors(inputs[number], deltas[number], keeps) for number in sorted(deltas)]
        self._inputs[block.name] = []
        self._deltas[block] = {}
        factors = LayerFactors.of_uses(uses)
        a, d = factors.inputs, factors.deltas
        if block.kind in ("norm", "scale"):  # G = [sum_t d_t * x_t; sum_t d_t], one column
            parts = [(d * a).sum(dim=1), d.sum(dim=1)] if block.kind == "norm" else [(d * a).sum(dim=1)]
            d = torch.cat(parts, dim=1)[:, None, :]
            a = d.new_ones((len(d), 1, 1))
        self._on_layer(block.name, LayerFactors(with_one(a, block.bias), d))


def _factors(inputs: torch.Tensor, deltas: torch.Tensor, keeps: bool) -> LayerFactors:
    """Factors of one use; of one that the rows share, only the positions that any of them depends on, on the CPU."""
    a, d = (inputs, deltas) if keeps else (wide(inputs), wide(deltas))
    if len(a) != len(d):  # a few of the positions that a model knows: a text is short
        if picks(d):
            used = (d != 0).any(dim=2).any(dim=0)
            a, d = a[:, used], d[:, used]
        a = a.expand(len(d), -1, -1)
    return LayerFactors(a, d)


def with_one(inputs: torch.Tensor, bias: bool) -> torch.Tensor:
    """Inputs that end in 1, so that the last column of G is the bias' gradient."""
    return torch.cat([inputs, inputs.new_ones((*inputs.shape[:-1], 1))], dim=-1) if bias else inputs


def _prepared(block: Block, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the weight multiplies: the input itself, its windows, or the normalised input."""
    if block.kind == "conv":
        return _windows(module, inputs)
    return _normalised(module, inputs) if block.kind in ("norm", "scale") else inputs


def _normalised(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The normalised input, which the weight multiplies: the output's slope in the weight.

    Norms are linear in their parameters, also where the factor is 1 + weight (Gemma).
    """
    twin = copy.copy(module)  # a call of the module itself would call its hooks

    def output(scale: float) -> torch.Tensor:
        twin._parameters = {
            key: p if p is None else nn.Parameter(torch.full_like(p, 0.0 if key == "bias" else scale), False)
            for key, p in module._parameters.items()
        }
        return torch.as_tensor(twin.forward(wide(inputs)))

    with torch.no_grad():
        return output(1.0) - output(0.0)


def _windows(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Windows of the input that a convolution multiplies with its weight: ``(b, c, t)`` to ``(b, t', c * window)``."""
    assert isinstance(module, nn.Conv1d)
    (window,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
    if isinstance(module.padding, str):
        around = dilation * (window - 1) if module.padding == "same" else 0
        before, after = around // 2, around - around // 2
    else:
        before = after = module.padding[0]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(inputs, (before, after), mode=mode)
    found = nn.functional.unfold(padded[:, :, None, :], (1, window), dilation=(1, dilation), stride=(1, stride))
    return found.transpose(1, 2)
