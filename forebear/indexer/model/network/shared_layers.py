"""Layers whose gradients do not simply arrive by row at their outputs.

Some layers are used on something that all rows share, such as embeddings of relative positions: the input has one entry
for the whole batch, and the gradient at the output is a sum over rows. Where the model takes it, such an output is
expanded to an equal entry for each row, and the gradient arrives by row (:class:`SharedUses`). Where it does not, a row
must be alone in its batch. And some models change a layer's output in place, so that what arrives there is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from forebear.errors import is_out_of_memory

Shape = tuple[int, ...]
RunRows = Callable[[int], torch.Tensor]  # runs the model on a batch of so many equal rows; gives their features


def find_shared_layers(
    model: nn.Module, is_layer: Callable[[nn.Module], bool], run: RunRows, tolerance: float
) -> tuple[frozenset[str], frozenset[str]]:
    """Layers whose outputs must be copied, and of these the layers that need a row to be alone in its batch.

    Copied are outputs that rows share, and outputs that the model changes in place.

    Args:
        model: A transformers model in ``eval()`` mode.
        is_layer: Which modules are layers.
        run: Runs the model.
        tolerance: Largest difference of features, by the largest feature, that is rounding.
    """
    layers = {key: module for key, module in model.named_modules() if is_layer(module)}
    (one, _), (two, features) = (_uses(layers, run, n_rows) for n_rows in (1, 2))
    shared: set[str] = set()
    alone: set[str] = set()
    for key, uses in two.items():
        for use, of_one in zip_longest(uses, one.get(key, [])):
            by_row = use is not None and of_one is not None and _is_by_row(of_one.shape, use.shape)
            if not by_row or use.is_changed:
                shared.add(key)
            if not (by_row or (use is not None and of_one is not None and _has_one_entry(of_one.shape, use.shape))):
                alone.add(key)
    expandable = shared - alone
    if expandable:
        expanding, zero = SharedUses(2), torch.zeros((), device=features.device)
        hooks = [layers[key].register_forward_hook(expanding.expand_after(zero)) for key in expandable]
        try:
            with expanding:
                found = run(2)
            if not (found - features).abs().max() <= tolerance * features.abs().max():
                alone = set(shared)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            alone = set(shared)  # a model may raise anything where a shape is not what it expects
        finally:
            for hook in hooks:
                hook.remove()
    return frozenset(shared), frozenset(alone)


@dataclass
class _Use:
    shape: Shape  # of the input
    output: torch.Tensor
    version: int  # of the output when it was made

    @property
    def is_changed(self) -> bool:
        """Whether the model changed the output in place."""
        return self.output._version != self.version


def _uses(layers: dict[str, nn.Module], run: RunRows, n_rows: int) -> tuple[dict[str, list[_Use]], torch.Tensor]:
    """Uses of layers in a batch of equal rows, and the features."""
    found: dict[str, list[_Use]] = {}

    def note(key: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):  # others, of quantised layers, are refused by the scopes
                found.setdefault(key, []).append(_Use(tuple(args[0].shape), output, output._version))

        return hook

    hooks = [module.register_forward_hook(note(key)) for key, module in layers.items()]
    try:
        return found, run(n_rows)
    finally:
        for hook in hooks:
            hook.remove()


def _is_by_row(one: Shape, two: Shape) -> bool:
    """Whether an input's first dimension goes through the rows: row by row, or position by position of each."""
    return two == (2 * one[0], *one[1:])


def _has_one_entry(one: Shape, two: Shape) -> bool:
    """Whether an input has one entry for all rows, behind a dimension that can be expanded."""
    return one == two and len(one) >= 3 and one[0] == 1


def is_shared(inputs: torch.Tensor, n_rows: int) -> bool:
    """Whether a use of a layer has one entry for all of two or more rows."""
    return n_rows > 1 and inputs.dim() >= 3 and inputs.shape[0] == 1


class SharedUses(TorchFunctionMode):
    """While it is entered, outputs that were expanded to all rows are not repeated for the rows by the model, too.

    DeBERTa-v2 repeats what rows share by ``Tensor.repeat``; DeBERTa lets a product broadcast it, as most models would.
    """

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self._n_rows = n_rows
        self._expanded: list[torch.Tensor] = []

    def expand(self, output: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """An output ``(1, ...)`` with an equal entry for each row, in memory of its own.

        Args:
            output: Output of a shared use.
            zero: The number 0; where it tracks gradients, so does the result.
        """
        out = output.expand(self._n_rows, *output.shape[1:]) + zero
        self._expanded.append(out)
        return out

    def follow(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Count the output of a layer as expanded where its inputs are, as of the two layers of an adapter."""
        if self._is_expanded(inputs):
            self._expanded.append(output)

    def expand_after(self, zero: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        """A forward hook that expands the outputs of shared uses."""
        return lambda _module, args, output: self.expand(output, zero) if is_shared(args[0], self._n_rows) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of torch passes here; only a repetition of an expanded output for the rows is left out."""
        if func is torch.Tensor.repeat and args[1] == self._n_rows and self._is_expanded(args[0]):
            return args[0].repeat(1, *args[2:])
        return func(*args, **(kwargs or {}))

    def _is_expanded(self, values: torch.Tensor) -> bool:
        """Whether values can only be an expanded output in another shape: by their number.

        Were it another tensor of that size, the shapes or the gradients of the check before a build would not agree.
        """
        return any(values.numel() == out.numel() for out in self._expanded)
