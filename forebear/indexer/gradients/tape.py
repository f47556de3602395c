"""Inputs and output gradients of layers, caught by hooks in one forward and one backward of activations.

For a linear layer with inputs a_t and output gradients d_t the row's weight gradient is G = sum_t d_t a_t^T. No
parameter gradient is formed: the weights ask for none, the backward starts at the head's input with
(p - y) W, exact also for confident rows, and ends at the first layer of the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from forebear.indexer.gradients.embedding_uses import EmbeddingUses, Root
from forebear.indexer.gradients.factors import LayerFactors, OnLayer, wide
from forebear.indexer.gradients.layer_uses import LayerUses, with_one
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import fetch, send
from forebear.indexer.model.forward import forward_batch
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.head import watched_head
from forebear.indexer.model.network.shared_layers import SharedUses
from forebear.indexer.model.scopes import Scope, root_modules

# From logits (b, c) float64 to what is differentiated: the gradient at the logits, (b, c) float64.
Seed = Callable[[np.ndarray], np.ndarray]


def loss_of(loss: Loss, labels: np.ndarray | None) -> Seed:
    """The seed of a loss, its residual, with ``b`` targets ``labels``; None takes what the model says."""

    def seed(logits: np.ndarray) -> np.ndarray:
        targets = loss.targets_of(loss.predictions(logits)) if labels is None else labels
        return loss.residual_and_loss(logits, targets)[0]

    return seed


class Tape:
    """Records the factors of a classifier's blocks of some scopes, batch by batch."""

    def __init__(self, classifier: Classifier, scopes: Sequence[Scope], *, narrow: bool = False) -> None:
        """Find the blocks and where the backward starts.

        Args:
            classifier: The model, in ``eval()`` mode; its weights' ``requires_grad`` is off while the tape runs.
            scopes: One or several scopes; the backward stops below the deepest.
            narrow: Whether factors may keep the types of a pass in bf16; they are in fp32 or fp64 otherwise.
        """
        self.classifier, self._narrow = classifier, narrow
        self.blocks = tuple({block.name: block for scope in scopes for block in scope.blocks}.values())
        self._embedding = next((block for block in self.blocks if block.kind == "embedding"), None)
        self._layers = [b for b in self.blocks if b.name != classifier.head_name and b is not self._embedding]
        root = root_modules(classifier, max(scopes, key=lambda scope: scope.depth))
        self._root = None if root is None else Root(root[0], is_embedding=root[1])
        self._shared_layers = classifier.shared_layers & {block.name for block in self._layers}
        self._alone = alone(classifier, scopes)

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
            ModelError: A layer's gradient is not to be had, and the layer is named: its rows cannot be told apart.
        """
        if self._alone and len(rows) > 1:
            return self._record_one_by_one(rows, seed, on_layer)
        classifier, head = self.classifier, self.classifier.head
        batch = pad_batch(classifier.tokenizer, rows, classifier.device)
        shared = SharedUses(len(rows))
        uses = LayerUses(classifier.name, len(rows), classifier.shared_layers, shared, on_layer, narrow=self._narrow)
        embedding = None
        if self._embedding is not None:
            embedding = EmbeddingUses(self._embedding, classifier.name, classifier.tokenizer, rows, batch)
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(only_asking(classifier.model))
            if self._root is not None:
                hooks.enter_context(self._root.grown(embedding))
            for block in self._layers:
                handle = classifier.model.get_submodule(block.name).register_forward_hook(uses.watch(block))
                hooks.callback(handle.remove)
            head_use = hooks.enter_context(watched_head(head))
            if self._shared_layers:
                hooks.enter_context(shared)
            with classifier.arithmetic():
                output = classifier.model(**batch)
            feature = head_use.feature(output.logits)
            f = wide(feature.detach())
            bias = None if head.bias is None else head.bias.double()
            features, logits = fetch(f.float(), nn.functional.linear(f.double(), head.weight.double(), bias).detach())
            delta = send(seed(logits), f.device)
            for block in self.blocks:
                if block.name == classifier.head_name:
                    factors = LayerFactors(with_one(f[:, None, :], block.bias), delta.to(f.dtype)[:, None, :])
                    on_layer(block.name, factors)
            if feature.requires_grad and len(self._layers) + (embedding is not None):
                torch.autograd.backward(feature, (delta @ head.weight.double()).to(feature.dtype))
                uses.finish()
                if embedding is not None:
                    on_layer(embedding.name, embedding.factors())
        return features, logits

    def _record_one_by_one(
        self, rows: Sequence[dict[str, list[int]]], seed: Seed, on_layer: OnLayer
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`record`, every row alone in its batch; the factors of all rows come at the end."""
        classifier = self.classifier
        batches = (pad_batch(classifier.tokenizer, [row], classifier.device) for row in rows)
        found = [forward_batch(classifier, batch) for batch in batches]
        delta = seed(np.concatenate([forward.arrays()[1] for forward in found]))
        by_row: list[dict[str, LayerFactors]] = []
        features, logits = [], []
        for n, row in enumerate(rows):
            by_row.append({})
            f, z = self.record([row], lambda _logits, n=n: delta[n : n + 1], by_row[n].__setitem__)  # type: ignore[misc]
            features.append(f)
            logits.append(z)
        for name, some in {name: factors for mine in by_row for name, factors in mine.items()}.items():
            nothing = some.nothing()  # of a row whose logits do not depend on the layer
            on_layer(name, type(some).of_rows([mine.get(name, nothing) for mine in by_row]))
        return np.concatenate(features), np.concatenate(logits)


def alone(classifier: Classifier, scopes: Iterable[Scope]) -> bool:
    """Whether each row is alone in its batch: some layer of the scopes cannot tell the rows of a batch apart."""
    return any(block.name in classifier.alone_layers for scope in scopes for block in scope.blocks)


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
