"""Inputs and output gradients of layers, caught by hooks in one forward and one backward of activations.

For a linear layer with inputs a_t and output gradients d_t the row's weight gradient is G = sum_t d_t a_t^T. No
parameter gradient is formed: the weights ask for none, the backward starts at the head's input with
(p - y) W, exact also for confident rows, and ends at the first layer of the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import ModelError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.forward import residual_and_loss
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.scopes import Block, Scope, root_modules


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one block's gradients over a batch of ``b`` rows; several uses of a layer follow one another.

    Attributes:
        inputs: a, ``(b, t, n_in)``.
        deltas: d, the gradients at the output, ``(b, t, n_out)``; zero at padding.
    """

    inputs: torch.Tensor
    deltas: torch.Tensor

    def gradients(self) -> torch.Tensor:
        """G of every row, ``(b, n_out, n_in)``."""
        return torch.bmm(self.deltas.transpose(1, 2), self.inputs)

    def differences(self, owners: torch.Tensor) -> LayerFactors:
        """Factors of G - G' for rows followed by ``n`` other versions of them, tokens side by side.

        As the sum over t of (d_t - d'_t) a_t^T + d'_t (a_t - a'_t)^T, both small where G - G' is: were the factors of
        G and of -G' put side by side, the square of a small difference would be lost in float32.

        Args:
            owners: Position of the row that each version belongs to, ``(n,)``.
        """
        n = len(owners)
        (a, others_a), (d, others_d) = ((x[:-n][owners], x[-n:]) for x in (self.inputs, self.deltas))
        return LayerFactors(torch.cat([a, a - others_a], dim=1), torch.cat([d - others_d, others_d], dim=1))

    def cache_sized(self) -> Iterator[LayerFactors]:
        """The rows a few at a time: on a CPU one by one, so that a whole gradient stays in the cache (2x, measured)."""
        step = 1 if self.inputs.device.type == "cpu" else len(self.inputs)
        for start in range(0, len(self.inputs), step):
            yield LayerFactors(self.inputs[start : start + step], self.deltas[start : start + step])


@dataclass(frozen=True)
class EmbeddingFactors(LayerFactors):
    """Factors of the word embeddings (or of the encoder's input): ``inputs`` are outputs e_t, ``deltas`` gradients.

    Both are ``(b, t, e)``.

    Attributes:
        ids: Token ids ``(b, t)`` int64, -1 where there is padding or a [PAD] in the text.
    """

    ids: torch.Tensor

    def differences(self, owners: torch.Tensor) -> EmbeddingFactors:
        """Both versions side by side, d' negated: a position may hold another word in each."""
        n = len(owners)
        d = torch.cat([self.deltas[:-n][owners], -self.deltas[-n:]], dim=1)
        return EmbeddingFactors(_side_by_side(self.inputs, owners), d, _side_by_side(self.ids, owners))


def _side_by_side(values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """``(rows and n versions, t, ...)`` as ``(n, 2 t, ...)``."""
    n = len(owners)
    return torch.cat([values[:-n][owners], values[-n:]], dim=1)


OnLayer = Callable[[str, LayerFactors], None]
# From logits (b, c) float64 to what is differentiated: the gradient at the logits, (b, c) float64.
Seed = Callable[[np.ndarray], np.ndarray]


def loss_of(labels: np.ndarray | None) -> Seed:
    """The seed p - y of the cross-entropy with ``labels`` ``(b,)``; None takes the predicted classes."""

    def seed(logits: np.ndarray) -> np.ndarray:
        return residual_and_loss(logits, logits.argmax(axis=1) if labels is None else labels)[0]

    return seed


class Tape:
    """Records the factors of a classifier's blocks of some scopes, batch by batch."""

    def __init__(self, classifier: Classifier, scopes: Sequence[Scope]) -> None:
        """Find the blocks and where the backward starts.

        Args:
            classifier: The model, in ``eval()`` mode; its weights' ``requires_grad`` is off while the tape runs.
            scopes: One or several scopes; the backward stops below the deepest.
        """
        self.classifier = classifier
        self.blocks = tuple({block.name: block for scope in scopes for block in scope.blocks}.values())
        self._embedding = next((block for block in self.blocks if block.kind == "embedding"), None)
        self._root = root_modules(classifier, max(scopes, key=lambda scope: scope.depth))

    def record(
        self, rows: Sequence[dict[str, list[int]]], seed: Seed, on_layer: OnLayer
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run one batch; ``on_layer`` gets each block's factors as soon as they are complete, head first.

        Args:
            rows: Encoded rows, ``b`` of them.
            seed: What is differentiated.
            on_layer: Called once a block that the logits depend on.

        Returns:
            f ``(b, h)`` float32 and logits ``(b, c)`` float64.

        Raises:
            ModelError: A layer's gradient is not to be had, and the layer is named: its input has not one entry a row,
                so that rows cannot be told apart, or does not come from where differentiation starts.
        """
        classifier = self.classifier
        batch = pad_batch(classifier.tokenizer, rows, classifier.device)
        arrivals = _Arrivals(classifier.name, len(rows), on_layer)
        caught: list[torch.Tensor] = []
        head = classifier.head
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(only_asking(classifier.model))
            hooks.enter_context(self._grown_from_root(self._ids(rows, batch), on_layer))
            for block in self.blocks:
                if block.name != classifier.head_name and block is not self._embedding:
                    handle = classifier.model.get_submodule(block.name).register_forward_hook(arrivals.watch(block))
                    hooks.callback(handle.remove)
            hooks.callback(head.register_forward_pre_hook(lambda _m, args: caught.append(args[0])).remove)
            with classifier.autocast():
                classifier.model(**batch)
            feature = caught[0]
            f = _wide(feature.detach())
            bias = None if head.bias is None else head.bias.double()
            logits = nn.functional.linear(f.double(), head.weight.double(), bias).cpu().numpy()
            delta = torch.from_numpy(seed(logits)).to(f.device)
            for block in self.blocks:
                if block.name == classifier.head_name:
                    factors = LayerFactors(_with_one(f[:, None, :], block.bias), delta.to(f.dtype)[:, None, :])
                    on_layer(block.name, factors)
            if feature.requires_grad and any(block.name != classifier.head_name for block in self.blocks):
                torch.autograd.backward(feature, (delta @ head.weight.double()).to(feature.dtype))
                arrivals.finish()
        return f.float().cpu().numpy(), logits

    def _ids(self, rows: Sequence[dict[str, list[int]]], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token ids of a batch, -1 at padding."""
        ids = batch["input_ids"]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=ids.device)
        dropped = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        if self.classifier.tokenizer.pad_token_id is not None:
            dropped |= ids == self.classifier.tokenizer.pad_token_id
        return ids.masked_fill(dropped, -1)

    @contextmanager
    def _grown_from_root(self, ids: torch.Tensor, on_layer: OnLayer) -> Iterator[None]:
        """Let gradients flow from the scope's first layer on: nothing below it is differentiated."""
        if self._root is None:
            yield
            return
        modules, is_embedding = self._root
        n_uses = 0

        def grown(values: torch.Tensor) -> torch.Tensor:
            nonlocal n_uses
            n_uses += 1
            values = values.detach().requires_grad_(True)
            block = self._embedding
            if block is not None:
                if n_uses > 1:
                    raise ModelError(
                        f"{self.classifier.name}: {block.name} is used more than once in a pass (by an encoder and a "
                        "decoder?), so words cannot be told apart. Leave the words store out."
                    )
                if values.shape[:-1] != ids.shape:
                    raise ModelError(
                        f"{self.classifier.name}: {block.name} has {tuple(values.shape)} for {tuple(ids.shape)} word "
                        "pieces, so words cannot be told apart. Leave the words store out."
                    )

                def arrived(delta: torch.Tensor) -> None:
                    on_layer(block.name, EmbeddingFactors(_wide(values.detach()), _wide(delta.detach()), ids))

                values.register_hook(arrived)  # type: ignore[no-untyped-call]
            return values

        def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return grown(output)

        def before(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (grown(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": grown(kwargs["hidden_states"])}

        with ExitStack() as hooks:
            for module in modules:
                if is_embedding:
                    handle = module.register_forward_hook(after)
                else:
                    handle = module.register_forward_pre_hook(before, with_kwargs=True)
                hooks.callback(handle.remove)
            yield
        if self._embedding is not None and not n_uses:
            raise ModelError(
                f"{self.classifier.name}: {self._embedding.name} is not used in a pass, so there are no word "
                "gradients. Leave the words store out."
            )


class _Arrivals:
    """Matches each layer's inputs with the gradients at its outputs, over all of its uses in a forward pass."""

    def __init__(self, model_name: str, n_rows: int, on_layer: OnLayer) -> None:
        self._model_name, self._n_rows, self._on_layer = model_name, n_rows, on_layer
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._deltas: dict[Block, dict[int, torch.Tensor]] = {}

    def watch(self, block: Block) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """A forward hook for the block's module."""
        name = block.name

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not output.requires_grad:
                raise ModelError(
                    f"{self._model_name}: layer {name} is also used on something that does not come from the words of "
                    "the row (such as relative positions, or a decoder's start), and that part of its gradient is not "
                    "supported yet. Use --scope head for this model.",
                    of="index",
                )
            a = args[0].detach()
            if a.shape[0] != self._n_rows or a.dim() not in (2, 3):
                raise ModelError(
                    f"{self._model_name}: layer {name} gets inputs of shape {tuple(a.shape)} for {self._n_rows} rows; "
                    "its gradient cannot be told apart by row. Use --scope head for this model.",
                    of="index",
                )
            uses = self._inputs.setdefault(name, [])
            number = len(uses)
            uses.append(_PREPARED[block.kind](module, a) if block.kind in _PREPARED else a)
            output.register_hook(lambda delta: self._arrive(block, number, delta))  # type: ignore[no-untyped-call]

        return hook

    def _arrive(self, block: Block, number: int, delta: torch.Tensor) -> None:
        deltas = self._deltas.setdefault(block, {})
        deltas[number] = delta.detach().transpose(1, 2) if block.kind == "conv" else delta.detach()
        if len(deltas) == len(self._inputs[block.name]):
            self._deliver(block)

    def finish(self) -> None:
        """After the backward, show the layers whose uses have not all had an output gradient.

        These uses are such that the logits do not depend on them: their gradient is zero, so they add nothing, and the
        layer's gradient is whole without them. A layer of which no use matters is not shown, its gradient being zero.
        A use whose gradient would be incomplete never comes this far: where its output does not depend on the root
        (``watch``), or its rows cannot be told apart, the forward pass ends in an error.
        """
        for block, deltas in self._deltas.items():
            if deltas:
                self._deliver(block)

    def _deliver(self, block: Block) -> None:
        """Show a layer's factors, over the uses whose output gradients have arrived."""
        name, deltas = block.name, self._deltas[block]
        numbers = sorted(deltas)
        a = _join([_rows_tokens(self._inputs[name][i]) for i in numbers])
        d = _join([_rows_tokens(deltas[i]) for i in numbers])
        self._inputs[name] = []
        self._deltas[block] = {}
        a, d = _wide(a), _wide(d)
        if block.kind == "norm":  # G = [sum_t d_t * x_t; sum_t d_t], one column
            d = torch.cat([(d * a).sum(dim=1), d.sum(dim=1)], dim=1)[:, None, :]
            a = d.new_ones((len(d), 1, 1))
        self._on_layer(name, LayerFactors(_with_one(a, block.bias), d))


def _with_one(inputs: torch.Tensor, bias: bool) -> torch.Tensor:
    """Inputs that end in 1, so that the last column of G is the bias' gradient."""
    return torch.cat([inputs, inputs.new_ones((*inputs.shape[:-1], 1))], dim=-1) if bias else inputs


def _normalised(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The normalised input of a LayerNorm, which its weight multiplies."""
    assert isinstance(module, nn.LayerNorm)
    return nn.functional.layer_norm(
        inputs.float() if inputs.dtype == torch.bfloat16 else inputs, module.normalized_shape, eps=module.eps
    )


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


_PREPARED: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {"norm": _normalised, "conv": _windows}


def _wide(values: torch.Tensor) -> torch.Tensor:
    """bf16 (autocast) to fp32; fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _join(uses: list[torch.Tensor]) -> torch.Tensor:
    return uses[0] if len(uses) == 1 else torch.cat(uses, dim=1)


def _rows_tokens(values: torch.Tensor) -> torch.Tensor:
    """``(b, t, x)``, with t = 1 for one vector a row."""
    return values[:, None, :] if values.dim() == 2 else values


@contextmanager
def only_asking(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Set ``requires_grad`` for these parameters alone, and restore all flags at the end."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
