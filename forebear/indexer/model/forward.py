"""The forward pass: feature f, residual p - y, probabilities and loss of each row.

Numbers that later meet a cosine or a logarithm are computed in float64 from the logits and stored in
float32; the residual's entry at the label is minus the sum of the other probabilities, never a
difference of numbers near 1 (docs/methods.md, "Conventions").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from forebear.errors import NonFiniteError
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Texts, as_encoded, distinct, plan_batches
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.head import watched_head

DEFAULT_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Forward:
    """Results of one forward pass over ``n`` rows, in the order they were given.

    Attributes:
        features: f, input of the head, ``(n, h)`` float32.
        probabilities: softmax of the logits, ``(n, c)`` float64.
        logits: ``(n, c)`` float64.
    """

    features: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class of each row, ``(n,)`` int64; ties go to the lower id."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    def take(self, positions: np.ndarray) -> Forward:
        """The results of the rows at some positions."""
        return Forward(self.features[positions], self.probabilities[positions], self.logits[positions])


def run_forward(
    classifier: Classifier,
    texts: Texts,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    first_row: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> Forward:
    """Run the classifier over rows of text; rows of the same word pieces are run once and get equal numbers.

    Args:
        classifier: The model, in ``eval()`` mode.
        texts: One list a text column, ``(columns, n)``; or encoded rows.
        batch_tokens: Largest number of padded tokens in a batch. Scores do not depend on it (to 1e-5).
        first_row: Row number of the first text, for messages.
        on_rows: Called with the number of rows after each batch (progress).

    Raises:
        NonFiniteError: A feature or logit is NaN or infinite; the message names the row.
    """
    encoded = as_encoded(classifier, texts)
    rows = encoded.rows
    features = np.empty((len(rows), classifier.feature_dim), np.float32)
    logits = np.empty((len(rows), classifier.n_classes), np.float64)
    first, kinds = distinct(encoded.digests)
    lengths = [len(rows[i]["input_ids"]) for i in first]
    for batch in plan_batches(lengths, batch_tokens, equal_lengths=classifier.equal_lengths):
        at = first[batch]
        f, z = forward_batch(classifier, pad_batch(classifier.tokenizer, [rows[i] for i in at], classifier.device))
        features[at], logits[at] = f, z
        if on_rows is not None:
            on_rows(len(batch))
    features, logits = features[first[kinds]], logits[first[kinds]]
    if on_rows is not None and len(first) < len(rows):
        on_rows(len(rows) - len(first))
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(features).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise NonFiniteError(f"{classifier.name}: feature or logits of row {row} are NaN or infinite. Check the model.")
    return Forward(features, softmax(logits), logits)


def forward_batch(classifier: Classifier, batch: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(b, h)`` float32 and float64 logits of one batch; the head itself always runs in fp64."""
    with torch.no_grad(), watched_head(classifier.head) as use:
        with classifier.autocast():
            output = classifier.model(**batch)
        features = use.feature(output.logits).detach().float()
    return features.cpu().numpy(), _logits(classifier, features)


def _logits(classifier: Classifier, features: torch.Tensor) -> np.ndarray:
    """Float64 logits of features, ``(n, c)``."""
    with torch.no_grad():
        head = classifier.head
        bias = None if head.bias is None else head.bias.double()
        return np.asarray(nn.functional.linear(features.double(), head.weight.double(), bias).cpu().numpy())


def forward_of_features(classifier: Classifier, features: np.ndarray) -> Forward:
    """What the head makes of features ``(n, h)`` float32; equal features get equal numbers."""
    first, kinds = distinct(features)
    logits = _logits(classifier, torch.from_numpy(features[first]).to(classifier.device))[kinds]
    return Forward(features, softmax(logits), logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities ``(n, c)`` of float64 logits ``(n, c)``."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def residual_and_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logit gradient p - y and cross-entropy of each row, accurate also where p_y is nearly 1.

    With m = logsumexp of the other logits minus the label's, the loss is softplus(m) and the residual at
    the label is -sigmoid(m) = -(1 - p_y).

    Args:
        logits: ``(n, c)`` float64.
        labels: Class ids, ``(n,)``.

    Returns:
        ``(p - y, loss)``: ``(n, c)`` and ``(n,)`` float64; each residual sums to 0; loss in nats.
    """
    at = (np.arange(len(labels)), labels)
    residual = softmax(logits)
    others = logits.copy()
    others[at] = -np.inf
    top = others.max(axis=1)
    margin = top + np.log(np.exp(others - top[:, None]).sum(axis=1)) - logits[at]
    residual[at] = 0.0
    residual[at] = -residual.sum(axis=1)
    return residual, np.logaddexp(0.0, margin)
