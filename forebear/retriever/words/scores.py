"""Scores by shared words: sum over checkpoints of eta <dL_q/dE_w, dL_n/dE_w>, over the token ids w of both rows.

Arrays in, arrays out (Yeh22, eqs. 4 and 6). A score is the sum of its words' contributions, which the answer holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.storage.ragged import owners, stretches
from forebear.indexer.words.gradients import WordRows

_PRODUCT_BYTES = 1 << 23  # of vectors of shared words that are multiplied at once


@dataclass(frozen=True)
class QueryWords:
    """Words of ``q`` test rows at every checkpoint of the index.

    Attributes:
        words: dL_q/dE_w of their tokens, one entry a checkpoint.
        etas: Weight of each checkpoint.
    """

    words: tuple[WordRows, ...]
    etas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.words[0])

    def take(self, indices: np.ndarray) -> QueryWords:
        """The test rows at some indices."""
        return QueryWords(tuple(words.take(indices) for words in self.words), self.etas)

    def squares(self) -> np.ndarray:
        """Score of each row with itself, ``(q,)`` float64."""
        out = np.empty(len(self))
        for i in range(len(self)):
            vectors = (_vectors(w)[w.starts[i] : w.starts[i + 1]].astype(np.float64) for w in self.words)
            out[i] = np.dot(self.etas, [(v**2).sum() for v in vectors])
        return out


def query_words(words: Sequence[WordRows], etas: Sequence[float], allowed: np.ndarray | None) -> QueryWords:
    """The test rows' words without those that do not take part.

    Args:
        words: Words of all test rows, one entry a checkpoint.
        etas: Weight of each checkpoint.
        allowed: Mask by token id of the words that take part; None: all.
    """
    kept = words if allowed is None else [w.only(allowed[w.tokens]) for w in words]
    return QueryWords(tuple(kept), tuple(etas))


@dataclass(frozen=True)
class Shared:
    """Contributions of the words that both rows of some pairs share.

    Attributes:
        pairs: Number of the pair, ascending, ``(m,)``.
        tokens: The shared token, ascending within a pair, ``(m,)``.
        values: What it contributes to the score, ``(m,)`` float64.
    """

    pairs: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def scores(self, n_pairs: int) -> np.ndarray:
        """Sums over the words of each pair, ``(n_pairs,)`` float64; 0 for a pair that shares none."""
        sums = np.bincount(self.pairs, self.values, minlength=n_pairs)
        return sums.astype(np.float64)  # of nothing they are integers

    def of(self, pairs: np.ndarray) -> Shared:
        """Contributions to some pairs, renumbered from 0, largest in absolute value first; ties by token id."""
        starts = np.searchsorted(self.pairs, np.arange(pairs.max(initial=-1) + 2))
        begins, places = stretches(starts, pairs)
        pair_of_word, tokens, values = owners(begins), self.tokens[places], self.values[places]
        order = np.lexsort((tokens, -np.abs(values), pair_of_word))
        return Shared(pair_of_word, tokens[order], values[order])


def shared_words(queries: QueryWords, rows: Sequence[WordRows], pairs: tuple[np.ndarray, np.ndarray]) -> Shared:
    """Contributions of every shared word, in float64.

    Args:
        queries: Test rows.
        rows: Training rows, one entry a checkpoint.
        pairs: Positions of a test row and of a training row for each pair that is compared, ``(n_pairs,)`` each.
    """
    keys, values = [], []
    width = 1 + max(int(w.tokens.max(initial=0)) for w in (*queries.words, *rows))
    for query_words, eta, row_words in zip(queries.words, queries.etas, rows, strict=True):
        starts, words = stretches(row_words.starts, pairs[1])
        pair_of_word, tokens = owners(starts), row_words.tokens[words]
        known = query_words.rows * width + query_words.tokens  # ascending
        wanted = pairs[0][pair_of_word] * width + tokens
        positions = np.searchsorted(known, wanted)
        positions[positions == len(known)] = 0
        hit = np.flatnonzero(known[positions] == wanted) if len(known) else np.empty(0, np.int64)
        keys.append(pair_of_word[hit] * width + tokens[hit])
        values.append(eta * _dots(query_words, positions[hit], row_words, words[hit]))
    if len(keys) == 1:  # distinct and ascending
        return Shared(keys[0] // width, keys[0] % width, values[0] + 0.0)  # no -0.0, as of a sum
    distinct, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(inverse, np.concatenate(values), minlength=len(distinct)).astype(np.float64)
    return Shared(distinct // width, distinct % width, total)


def _dots(left: WordRows, left_places: np.ndarray, right: WordRows, right_places: np.ndarray) -> np.ndarray:
    """Dots of words of test rows with words of training rows, both at the given places, ``(m,)`` float64."""
    out = np.empty(len(left_places))
    step = max(1, _PRODUCT_BYTES // (16 * _vectors(left).shape[1]))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        vectors = _vectors(left)[left_places[part]].astype(np.float64)
        out[part] = np.einsum("ij,ij->i", vectors, _vectors(right)[right_places[part]].astype(np.float64))
    return out


def _vectors(words: WordRows) -> np.ndarray:
    assert words.vectors is not None
    return words.vectors


def squares(rows: Sequence[WordRows], etas: Sequence[float], allowed: np.ndarray | None) -> np.ndarray:
    """Score of each row with itself over its allowed words, ``(n,)`` float64."""
    total = np.zeros(len(rows[0]))
    for row_words, eta in zip(rows, etas, strict=True):
        lengths = (_vectors(row_words).astype(np.float64) ** 2).sum(axis=1)
        if allowed is not None:
            lengths[~allowed[row_words.tokens]] = 0.0
        total += eta * np.bincount(row_words.rows, lengths, minlength=len(row_words))
    return total
