"""Word gradients: dL/dE_w of a row for each token id w in it, the sum of the gradients at the positions that hold w.

They are caught at the output of the word embeddings in the same pass as everything else. Either all positions count
(Yeh22, eq. 4), or for each row the k whose gradients are longest (eq. 6); kept positions of one token are summed after
that. Token ids, not strings, tell words apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from forebear.indexer.gradients.factors import EmbeddingFactors, LayerFactors
from forebear.indexer.gradients.gradient_pass import RowCollector, labels_seed, refuse_non_finite, run_pass
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import picks
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import Forward
from forebear.indexer.model.scopes import embedding_scope
from forebear.indexer.storage.ragged import offsets, owners, stretches
from forebear.ratio import ratio

PRECISIONS = ("fp16", "int8", "fp32")
_CODES = {"fp16": np.float16, "int8": np.int8, "fp32": np.float32}
_INT8_STEPS = 127


@dataclass(frozen=True)
class Coded:
    """Vectors as they are stored: what is read back is ``codes * scales[:, None]``, whose length is ``norms``.

    Attributes:
        codes: Directions, ``(m, e)``: rounded unit vectors in fp16 or fp32, or int8 steps of their largest entry.
        scales: ``(m,)`` float32.
        norms: Exact lengths, ``(m,)`` float32.
        errors: Length of what rounding changes, as a share of ``norms``, ``(m,)`` float32.
    """

    codes: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
    errors: np.ndarray


def encode_vectors(vectors: np.ndarray, precision: str) -> Coded:
    """Store vectors ``(m, e)`` as directions and lengths; rounding never changes a length."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    unit = ratio(vectors.astype(np.float64), norms[:, None])
    if precision == "int8":
        largest = np.abs(unit).max(axis=1, initial=0.0, keepdims=True)
        steps = ratio(unit * _INT8_STEPS, largest)
        codes = np.rint(steps).astype(np.int8)
    else:
        codes = unit.astype(_CODES[precision])
    lengths = np.linalg.norm(codes.astype(np.float64), axis=1)
    back = ratio(1.0, lengths)
    errors = np.linalg.norm(codes * back[:, None] - unit, axis=1)
    return Coded(codes, *(values.astype(np.float32) for values in (norms * back, norms, errors)))


@dataclass(frozen=True)
class WordRows:
    """Word gradients of ``n`` rows, row by row; tokens ascend within a row.

    Attributes:
        starts: Where each row's words begin, and one past the last, ``(n + 1,)`` int64.
        tokens: Token ids, ``(m,)`` int64.
        vectors: dL/dE_w, ``(m, e)``, or None where they were encoded.
        coded: The vectors as they are stored, or None.
    """

    starts: np.ndarray
    tokens: np.ndarray
    vectors: np.ndarray | None = None
    coded: Coded | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> np.ndarray:
        """Row of each word, ``(m,)`` int64, from 0."""
        return owners(self.starts)

    def only(self, keep: np.ndarray) -> WordRows:
        """All rows with only the words that the mask ``keep`` ``(m,)`` selects; needs ``vectors``."""
        assert self.vectors is not None
        counts = np.bincount(self.rows[keep], minlength=len(self))
        return WordRows(offsets(counts), self.tokens[keep], self.vectors[keep])

    def take(self, positions: np.ndarray) -> WordRows:
        """The rows at some positions, in the order given; needs ``vectors``."""
        assert self.vectors is not None
        starts, words = stretches(self.starts, positions)
        return WordRows(starts, self.tokens[words], self.vectors[words])


class WordGradients(RowCollector):
    """Gathers word gradients: of all positions (``top`` 0), or of each row's ``top`` longest."""

    def __init__(self, classifier: Classifier, top: int, n_rows: int, precision: str | None) -> None:
        """Make an empty collector.

        Args:
            classifier: The model whose gradients are gathered.
            top: Number of positions kept in each row; 0 for all.
            n_rows: Number of rows of the pass.
            precision: How the vectors are encoded for storage; None keeps the vectors themselves.
        """
        self.scope = embedding_scope(classifier)
        self._name, self._top, self._precision = classifier.name, top, precision
        self._n_tokens = self.scope.blocks[0].n_in
        self._counts = np.zeros(n_rows, np.int64)
        self._squares = np.zeros(n_rows)
        self._places: list[tuple[list[int], np.ndarray]] = []  # rows of a batch, and how many words each has
        self._tokens: list[np.ndarray] = []
        self._vectors: list[np.ndarray] = []
        self._coded: list[Coded] = []
        self._copies: list[tuple[int, int]] = []  # (row, equal row that was not run and gets its words)
        self._batch: tuple[torch.Tensor, ...] = ()

    @override
    def begin(self, positions: list[int]) -> None:
        self._batch = ()

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        assert isinstance(factors, EmbeddingFactors)
        sums = _sums_of_kept if picks(factors.deltas) else _sums_of_all
        self._batch = sums(factors, self._top, self._n_tokens)

    @override
    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return self._batch

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        keys, vectors = arrays
        keys = keys[: np.searchsorted(keys, len(positions) * self._n_tokens)]  # without positions that are no words
        keys = keys[np.diff(keys, prepend=-1) > 0]
        rows, tokens = np.divmod(keys, self._n_tokens)
        vectors, n = vectors[: len(keys)], len(positions)
        sizes = np.bincount(rows, minlength=n)
        self._counts[positions] = sizes
        self._squares[positions] = np.bincount(rows, (vectors.astype(np.float64) ** 2).sum(axis=1), minlength=n)
        self._places.append((positions, sizes))
        self._tokens.append(tokens)
        if self._precision is None:
            self._vectors.append(vectors.copy())  # not what the device copied to
        else:
            self._coded.append(encode_vectors(vectors, self._precision))

    @override
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self._counts[copies], self._squares[copies] = self._counts[sources], self._squares[sources]
        self._copies = list(zip(sources.tolist(), copies.tolist(), strict=True))

    def rows(self, first_row: int = 0) -> WordRows:
        """The word gradients of all rows, after the pass.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; the row is named.
        """
        refuse_non_finite(self._name, first_row, self._squares)
        starts = offsets(self._counts)
        order = np.empty(starts[-1], np.int64)  # where each word of the result stands among those gathered
        n_gathered = 0
        for positions, counts in self._places:
            for position, count in zip(positions, counts, strict=True):
                order[starts[position] : starts[position] + count] = np.arange(n_gathered, n_gathered + count)
                n_gathered += count
        for source, copy in self._copies:
            order[starts[copy] : starts[copy + 1]] = order[starts[source] : starts[source + 1]]
        tokens = np.concatenate(self._tokens)[order]
        if self._precision is None:
            return WordRows(starts, tokens, vectors=np.concatenate(self._vectors)[order])
        names = ("codes", "scales", "norms", "errors")
        coded = Coded(*(np.concatenate([getattr(part, name) for part in self._coded])[order] for name in names))
        return WordRows(starts, tokens, coded=coded)


def _sums_of_kept(factors: EmbeddingFactors, top: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the words of a batch, ``(m, e)``, and before them their keys.

    Returns:
        Keys ``(m,)`` int64, row of the batch x ``n_tokens`` + token id, ascending; and the gradients.
    """
    kept = factors.ids >= 0
    if top:
        kept &= longest(factors.deltas, kept, top)
    row, _ = kept.nonzero(as_tuple=True)
    keys, inverse = torch.unique(row * n_tokens + factors.ids[kept], return_inverse=True)
    vectors = factors.deltas.new_zeros((len(keys), factors.deltas.shape[2]))
    return keys, vectors.index_add_(0, inverse, factors.deltas[kept])


def _sums_of_all(factors: EmbeddingFactors, top: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_sums_of_kept` by operations whose results are as large whatever is kept, and in a fixed order of sums.

    Returns:
        A key for each position, ascending, of which equal ones have one gradient; keys from ``b`` x ``n_tokens`` on are
        of positions that are no words. The gradients of the distinct keys, then others.
    """
    ids, deltas = factors.ids, factors.deltas
    kept = ids >= 0
    if top:
        best = _longest_first(deltas, kept, top).sort(dim=1).values
        ids, kept, deltas = ids.gather(1, best), kept.gather(1, best), deltas.take_along_dim(best[..., None], dim=1)
    b, t, e = deltas.shape
    rows, positions = (torch.arange(n, device=ids.device) for n in (b, b * t))
    keys = torch.where(kept, rows[:, None] * n_tokens + ids, b * n_tokens + positions.view(b, t)).flatten()
    keys, order = keys.sort(stable=True)
    group = (keys.diff(prepend=keys.new_full((1,), -1)) > 0).cumsum(0) - 1
    sizes = torch.zeros_like(keys).scatter_add_(0, group, torch.ones_like(keys))
    return keys, torch.segment_reduce(deltas.reshape(-1, e)[order], "sum", lengths=sizes, axis=0, unsafe=True)


def _longest_first(deltas: torch.Tensor, kept: torch.Tensor, top: int) -> torch.Tensor:
    """The ``top`` kept positions of each row with the longest gradients, ``(b, k)``; others, where it has fewer."""
    norms = torch.linalg.vector_norm(deltas, dim=2).masked_fill(~kept, -1.0)
    return torch.sort(norms, dim=1, descending=True, stable=True).indices[:, :top]


def longest(deltas: torch.Tensor, kept: torch.Tensor, top: int) -> torch.Tensor:
    """Mask ``(b, t)`` of the ``top`` kept positions of each row with the longest gradients; ties go to the first."""
    best = _longest_first(deltas, kept, top)
    chosen: torch.Tensor = torch.zeros_like(kept).scatter_(1, best, True) & kept
    return chosen


def word_gradients(
    classifier: Classifier,
    texts: Sequence[Sequence[str]],
    labels: np.ndarray,
    tops: Iterable[int],
    *,
    batch_tokens: int,
    first_row: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[dict[int, WordRows], Forward]:
    """Word gradients of the losses of rows of text, as vectors; one pass for all of ``tops``.

    Args:
        classifier: The model whose gradients are computed.
        texts: One list a text column.
        labels: Class whose loss is differentiated, ``(n,)``.
        tops: Numbers of positions kept in each row; 0 for all.
        batch_tokens: Largest number of padded tokens in a batch.
        first_row: Row number of the first text, for messages.
        on_rows: Called with the number of rows after each batch.

    Returns:
        Word gradients by ``top``; features and logits from the same pass.

    Raises:
        NonFiniteError: A gradient is NaN or infinite; the row is named.
    """
    collectors = {top: WordGradients(classifier, top, len(labels), None) for top in tops}
    forward = run_pass(
        classifier, texts, labels_seed(classifier.loss, labels), list(collectors.values()),
        batch_tokens=batch_tokens, first_row=first_row, on_rows=on_rows,
    )  # fmt: skip
    return {top: collector.rows(first_row) for top, collector in collectors.items()}, forward


def count_tokens(classifier: Classifier, texts: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each token occurs in each row, special tokens left out.

    Args:
        classifier: Whose tokenizer.
        texts: One list a text column.

    Returns:
        ``(starts, tokens, counts)``, row by row: ``(n + 1,)``, ``(m,)`` and ``(m,)``; tokens ascend within a row.
    """
    special = np.array(sorted(classifier.tokenizer.all_special_ids))
    counted = []
    for row in encode(classifier, texts):
        ids = np.array(row["input_ids"], dtype=np.int64)
        counted.append(np.unique(ids[~np.isin(ids, special)], return_counts=True))
    tokens, counts = (np.concatenate([np.empty(0, np.int64), *(pair[i] for pair in counted)]) for i in (0, 1))
    return offsets(np.array([len(pair[0]) for pair in counted], dtype=np.int64)), tokens, counts
