"""The forward pass: the feature f of each row, and what the classifier's loss makes of its logits.

Numbers that later meet a cosine or a logarithm are computed in float64 from the logits and stored in float32; see
:mod:`forebear.indexer.losses` (docs/methods.md, "Conventions").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from forebear.errors import NonFiniteError
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import Fetched, fetch, one_late, send
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.encoding import Texts, as_encoded, distinct, plan_batches
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.head import watched_head


@dataclass(frozen=True)
class Forward:
    """Results of one forward pass over ``n`` rows, in the order they were given.

    Attributes:
        features: f, input of the head, ``(n, h)`` float32.
        logits: ``(n, c)`` float64.
        loss: The loss of the classifier.
    """

    features: np.ndarray
    logits: np.ndarray
    loss: Loss

    @cached_property
    def probabilities(self) -> np.ndarray:
        """What is shown of the outputs, ``(n, c)`` float64: of a classifier the probabilities."""
        return self.loss.probabilities(self.logits)

    @cached_property
    def predictions(self) -> np.ndarray:
        """What the model says of each row, as targets: of a classifier the most probable class."""
        return self.loss.predictions(self.logits)

    def take(self, positions: np.ndarray) -> Forward:
        """The results of the rows at some positions."""
        return Forward(self.features[positions], self.logits[positions], self.loss)

    def residuals_and_losses(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals ``(n, c)`` and losses ``(n,)`` of some targets, float64."""
        return self.loss.residual_and_loss(self.logits, targets)


def joined(parts: Sequence[Forward]) -> Forward:
    """The results of one block of rows after another."""
    features, logits = (np.concatenate(values) for values in zip(*((p.features, p.logits) for p in parts), strict=True))
    return Forward(features, logits, parts[0].loss)


def run_forward(
    classifier: Classifier,
    texts: Texts,
    *,
    batch_tokens: int | None = None,
    first_row: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> Forward:
    """Run the classifier over rows of text; rows of the same word pieces are run once and get equal numbers.

    Args:
        classifier: The model, in ``eval()`` mode.
        texts: One list a text column, ``(columns, n)``; or encoded rows.
        batch_tokens: Largest number of padded tokens in a batch; None: as many as suit the device. Scores do not
            depend on it (to 1e-5).
        first_row: Row number of the first text, for messages.
        on_rows: Called with the number of rows after each batch (progress).

    Raises:
        NonFiniteError: A feature or logit is NaN or infinite; the message names the row.
        NotEnoughMemoryError: Not even one row fits in memory.
    """
    encoded = as_encoded(classifier, texts)
    rows = encoded.rows
    features = np.empty((len(rows), classifier.feature_dim), np.float32)
    logits = np.empty((len(rows), classifier.n_classes), np.float64)
    first, kinds = distinct(encoded.digests)
    lengths = [len(rows[i]["input_ids"]) for i in first]

    def run(batch: list[int]) -> Fetched:
        return forward_batch(
            classifier, pad_batch(classifier.tokenizer, [rows[i] for i in first[batch]], classifier.device)
        )

    plan = plan_batches(lengths, batch_tokens or classifier.batch_tokens(), equal_lengths=classifier.equal_lengths)
    batches = run_batches(
        plan, run, lengths=lengths, device=classifier.device, name=lambda i: f"row {first_row + first[i]}"
    )
    for batch, (f, z) in one_late(batches):
        features[first[batch]], logits[first[batch]] = f, z
        if on_rows is not None:
            on_rows(len(batch))
    features, logits = features[first[kinds]], logits[first[kinds]]
    if on_rows is not None and len(first) < len(rows):
        on_rows(len(rows) - len(first))
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(features).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise NonFiniteError(f"{classifier.name}: feature or logits of row {row} are NaN or infinite. Check the model.")
    return Forward(features, logits, classifier.loss)


def forward_batch(classifier: Classifier, batch: dict[str, torch.Tensor]) -> Fetched:
    """Features ``(b, h)`` float32 and float64 logits of one batch; the head itself always runs in fp64."""
    with torch.no_grad(), watched_head(classifier.head) as use:
        with classifier.arithmetic():
            output = classifier.model(**batch)
        features = use.feature(output.logits).detach().float()
    return Fetched(features, _logits(classifier, features))


def _logits(classifier: Classifier, features: torch.Tensor) -> torch.Tensor:
    """Float64 logits of features, ``(n, c)``."""
    with torch.no_grad():
        head = classifier.head
        bias = None if head.bias is None else head.bias.double()
        return nn.functional.linear(features.double(), head.weight.double(), bias)


def forward_of_features(classifier: Classifier, features: np.ndarray) -> Forward:
    """What the head makes of features ``(n, h)`` float32; equal features get equal numbers."""
    first, kinds = distinct(features)
    (logits,) = fetch(_logits(classifier, send(features[first], classifier.device)))
    return Forward(features, logits[kinds], classifier.loss)
