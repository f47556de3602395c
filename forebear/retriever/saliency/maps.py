"""Saliency maps: how much each word piece of a row, and each word, speaks for a label.

For ``gradient-x-input`` e_t is the output of the word embeddings at position t, before positions, types and LayerNorm.
For ``summed-gradient`` it is what enters the first encoder layer: the LayerNorm between the two does not see a constant
added to all dimensions, so at the word embeddings the sum over dimensions of any gradient is exactly 0.

The gradients come from the pass that everything else uses; where a word stands in its text is what the tokenizer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.gradients.factors import EmbeddingFactors, LayerFactors
from forebear.indexer.gradients.gradient_pass import RowCollector, SeedByKey, refuse_non_finite, run_pass
from forebear.indexer.gradients.tape import Seed
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, encode_with_places
from forebear.indexer.model.scopes import (
    embedding_scope,
    encoder_input_scope,
)
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.ratio import ratio

GRADIENT_X_INPUT = "gradient-x-input"
SUMMED_GRADIENT = "summed-gradient"
FORMS = (GRADIENT_X_INPUT, SUMMED_GRADIENT)


@dataclass(frozen=True)
class SalientWord:
    """One word of a row, as the tokenizer divides words: "don't" may be three.

    Attributes:
        text: ``texts[column][row][start:end]``, never empty; of a word that truncation cuts, what is left.
        column: Text column, from 0.
        start: First character in that text.
        end: One past the last.
        value: Sum of the values of its pieces; positive supports the target.
    """

    text: str
    column: int
    start: int
    end: int
    value: float


@dataclass(frozen=True)
class Saliency:
    """Saliency of one row, for one label.

    Attributes:
        pieces: Vocabulary strings of its ``t`` word pieces, start and end tokens included.
        values: Value of each piece, ``(t,)`` float64.
        special: Whether the tokenizer added the piece ([CLS], [SEP]; <s>, </s>), ``(t,)`` bool.
        words: In reading order. Added pieces and bare white space are no words; a "[MASK]" in the text is one.
    """

    pieces: tuple[str, ...]
    values: np.ndarray
    special: np.ndarray
    words: tuple[SalientWord, ...]


def saliency(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    targets: np.ndarray,
    *,
    form: str = GRADIENT_X_INPUT,
    batch_tokens: int | None = None,
) -> list[Saliency]:
    """Saliency maps of rows of text.

    ``gradient-x-input`` (Han et al. 2020): -<dL/de_t, e_t> over its L1 norm in the row, start and end tokens included;
    L is the loss of the target. The sign is kept; 0 where the norm is 0. ``summed-gradient`` (the Joint paper's s_t):
    the sum over dimensions of dS_y/de_t, S_y the target's probability; not normalised. Positive supports the target.

    Args:
        classifier: The model; its tokenizer must be a fast one.
        texts: One list a text column, ``(columns, n)``.
        targets: Class ids, ``(n,)``; of several labels and of numbers ``(n, c)``.
        form: ``gradient-x-input`` or ``summed-gradient``.
        batch_tokens: Largest number of padded tokens in a batch; None: as many as suit the device.

    Returns:
        One a row, in the order given.

    Raises:
        InputError: The form is not known, or the targets do not belong to the rows or the classes.
        ModelError: The tokenizer does not say where word pieces stand.
        NonFiniteError: A feature, logit or gradient is NaN or infinite; the row is named.
    """
    if form not in FORMS:
        raise InputError(f"saliency form {form!r} is not known. Give {' or '.join(FORMS)}.")
    targets = np.asarray(targets)
    _check_targets(classifier, texts, targets)
    if not len(targets):
        return []
    rows, encoded = encode_with_places(classifier, texts)
    gathered = _Saliencies(classifier, form, [len(ids) for ids in encoded["input_ids"]])
    tokens = batch_tokens or classifier.batch_tokens()
    run_pass(classifier, Encoded(rows), _seeds(classifier.loss, form, targets), [gathered], batch_tokens=tokens)
    refuse_non_finite(classifier.name, 0, gathered.sizes)
    maps = []
    for row, values in enumerate(gathered.values):
        if form == GRADIENT_X_INPUT:
            values = _normalised(values)
        pieces = tuple(classifier.tokenizer.convert_ids_to_tokens(encoded["input_ids"][row]))
        special = np.array([column is None for column in encoded.sequence_ids(row)])
        maps.append(Saliency(pieces, values, special, words_of(encoded, row, [c[row] for c in texts], values)))
    return maps


class _Saliencies(RowCollector):
    """Gathers values before normalisation; see :class:`~forebear.indexer.gradients.gradient_pass.Collector`.

    Attributes:
        values: Values of the pieces of each row, ``(t,)`` float64.
        sizes: Sum of the absolute terms of a row's values, over pieces and dimensions, ``(n,)``.
    """

    def __init__(self, classifier: Classifier, form: str, lengths: Sequence[int]) -> None:
        self.scope = embedding_scope(classifier) if form == GRADIENT_X_INPUT else encoder_input_scope(classifier)
        self.values = [np.empty(0)] * len(lengths)
        self.sizes = np.zeros(len(lengths))
        self._form, self._lengths = form, lengths
        self._batch: tuple[torch.Tensor, ...] = ()

    def begin(self, positions: list[int]) -> None:
        self._batch = ()
        self._width = max(self._lengths[position] for position in positions) + 1  # what is no piece comes last

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        assert isinstance(factors, EmbeddingFactors)
        terms = factors.deltas.double()
        if self._form == GRADIENT_X_INPUT:
            terms = terms * -factors.inputs.double()
        by_piece = terms.new_zeros((len(terms), self._width))
        by_piece.scatter_add_(1, factors.pieces % self._width, terms.sum(dim=2))
        self._batch = by_piece, terms.abs().sum(dim=(1, 2))

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return self._batch

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        values, self.sizes[positions] = arrays
        for position, row in zip(positions, values, strict=True):
            self.values[position] = row[: self._lengths[position]].copy()  # a view would hold the batch

    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.sizes[copies] = self.sizes[sources]
        for source, copy in zip(sources, copies, strict=True):
            self.values[copy] = self.values[source].copy()


def _seeds(loss: Loss, form: str, targets: np.ndarray) -> SeedByKey:
    """The scalar that is differentiated for a row: S_y, or a multiple of the loss, whose factor the norm cancels."""

    def seed_of(positions: list[int]) -> Seed:
        wanted = targets[positions]

        def seed(logits: np.ndarray) -> np.ndarray:
            if form == SUMMED_GRADIENT:
                return loss.support_slope(logits, wanted)
            residual, _ = loss.residual_and_loss(logits, wanted)
            # Largest entry 1: in fp32 the gradient of a very confident row would underflow.
            largest = np.abs(residual).max(axis=1, keepdims=True)
            return ratio(residual, largest)

        return seed

    return SeedByKey(targets, seed_of)


def _normalised(values: np.ndarray) -> np.ndarray:
    """Values ``(t,)`` divided by their L1 norm; 0 where the norm is 0."""
    norm = np.abs(values).sum()
    return ratio(values, norm)


def _check_targets(classifier: Classifier, texts: Sequence[Sequence[str]], targets: np.ndarray) -> None:
    """Refuse targets that are not one class id a row, or of several labels and of numbers one number an output."""
    lengths = [len(column) for column in texts]
    outputs = () if classifier.loss.problem_type == SINGLE_LABEL else (classifier.n_classes,)
    if any(targets.shape != (n, *outputs) for n in lengths):
        raise InputError(
            f"saliency: targets of shape {targets.shape} for text columns of {lengths} rows. Give one each."
        )
    if outputs:
        return
    if len(targets) and not (targets.dtype.kind in "iu" and 0 <= targets.min() <= targets.max() < classifier.n_classes):
        raise InputError(
            f"saliency: the targets of {classifier.name} must be class ids, 0 to {classifier.n_classes - 1}."
        )


def words_of(encoded: Any, row: int, texts: Sequence[str], values: np.ndarray) -> tuple[SalientWord, ...]:
    """Words of one row, whose texts are ``texts``, from the values ``(t,)`` of its pieces."""
    places: dict[tuple[int, int], list[int]] = {}
    for t, (column, word) in enumerate(zip(encoded.sequence_ids(row), encoded.word_ids(row), strict=True)):
        if column is not None:
            places.setdefault((column, word), []).append(t)
    offsets = encoded["offset_mapping"][row]
    words = []
    for (column, _), pieces in places.items():
        spans = [offsets[t] for t in pieces if offsets[t][0] < offsets[t][1]]
        if not spans:
            continue
        start, end = min(s for s, _ in spans), max(e for _, e in spans)
        text = texts[column][start:end]
        start += len(text) - len(text.lstrip())  # byte-level pieces may begin with the space before them
        text = text.strip()
        if text:
            words.append(SalientWord(text, column, start, start + len(text), float(values[pieces].sum())))
    return tuple(words)
