"""A text classifier as the rest of the package uses it: network, tokenizer, head, labels, device and precision.

The head is the linear layer whose output *is* the logits; the feature is that layer's input.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.device.arithmetic import forward_arithmetic
from forebear.indexer.model.device.batch_size import BATCH_TOKENS, batch_tokens_on
from forebear.indexer.model.network.adapters import Adapter


@dataclass(frozen=True)
class Classifier:
    """A transformers sequence classifier in ``eval()`` mode, with all that is needed to run it.

    Attributes:
        name: The folder or hub name it was loaded from.
        model: The network, on ``device``.
        tokenizer: The network's tokenizer.
        head_name: Dotted name of the head, a linear layer ``(c, h)``.
        label_names: Names of the ``c`` classes, by id.
        max_length: Longest input in word pieces; longer rows are truncated.
        precision: ``fp32`` or ``bf16`` (autocast; features and residuals are fp32 either way).
        sha256: Digest of weights and of what the configuration changes.
        tokenizer_sha256: Digest of the tokenizer's rules and vocabulary.
        equal_lengths: Whether predictions depend on padding, so that only rows of one length share a batch.
        shared_layers: Layers with a use that all rows of a batch share, such as projections of relative positions.
        alone_layers: Of these, the layers whose gradient needs a row to be alone in its batch.
        padding_remark: A line on a padding token that stands in; None where none does.
        adapter: What LoRA or DoRA put into the network; None of other networks.
        loss: What it was trained to minimise.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    head_name: str
    label_names: tuple[str, ...]
    max_length: int
    precision: str
    sha256: str
    tokenizer_sha256: str
    equal_lengths: bool
    shared_layers: frozenset[str] = frozenset()
    alone_layers: frozenset[str] = frozenset()
    padding_remark: str | None = None
    adapter: Adapter | None = None
    loss: Loss = CROSS_ENTROPY

    @property
    def head(self) -> nn.Linear:
        """The head, a linear layer."""
        module = self.model.get_submodule(self.head_name)
        assert isinstance(module, nn.Linear)
        return module

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    @property
    def feature_dim(self) -> int:
        """Width h of the feature."""
        return self.head.in_features

    @property
    def n_classes(self) -> int:
        """Number of classes c."""
        return self.head.out_features

    def batch_tokens(self, on_cpu: int = BATCH_TOKENS) -> int:
        """Most word pieces of a batch where the user does not say: ``on_cpu``, and on a GPU what its memory holds."""
        return batch_tokens_on(self.device, self.model, self.feature_dim, on_cpu)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines on the model that users should read before its numbers."""
        lines = [] if self.padding_remark is None else [self.padding_remark]
        if self.equal_lengths:
            lines.append(
                f"{self.name}: predictions of {type(self.model).__name__} depend on padding, so only rows of one "
                "length share a batch. Scores then do not depend on the batch; the passes take longer."
            )
        return tuple(lines)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """The arithmetic of a forward pass, as a context: precision, and on a GPU what makes its numbers repeat."""
        return forward_arithmetic(self.device, self.precision)
