"""Scores by shared words: sum over checkpoints of eta <dL_q/dE_w, dL_n/dE_w>, over the token ids w of both rows.

Arrays in, arrays out (Yeh22, eqs. 4 and 6). A score is the sum of its words' contributions, which the answer holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.words.gradients import WordRows


@dataclass(frozen=True)
class QueryWords:
    """Words of one test row at every checkpoint of the index.

    Attributes:
        tokens: Token ids, ascending, one array a checkpoint.
        vectors: dL_q/dE_w of these tokens, ``(s, e)``, one array a checkpoint.
        etas: Weight of each checkpoint.
    """

    tokens: tuple[np.ndarray, ...]
    vectors: tuple[np.ndarray, ...]
    etas: tuple[float, ...]

    def square(self) -> float:
        """Score of the row with itself."""
        squares = [(v.astype(np.float64) ** 2).sum() for v in self.vectors]
        return float(np.dot(self.etas, squares))


def query_words(words: Sequence[WordRows], etas: Sequence[float], allowed: np.ndarray | None) -> list[QueryWords]:
    """Each test row's words, without those that do not take part.

    Args:
        words: Words of all test rows, one entry a checkpoint.
        etas: Weight of each checkpoint.
        allowed: Mask by token id of the words that take part; None: all.
    """
    kept = [w if allowed is None else w.only(allowed[w.tokens]) for w in words]
    out = []
    for i in range(len(words[0])):
        spans = [slice(w.starts[i], w.starts[i + 1]) for w in kept]
        tokens = tuple(w.tokens[span] for w, span in zip(kept, spans, strict=True))
        vectors = tuple(_vectors(w)[span] for w, span in zip(kept, spans, strict=True))
        out.append(QueryWords(tokens, vectors, tuple(etas)))
    return out


def _vectors(words: WordRows) -> np.ndarray:
    assert words.vectors is not None
    return words.vectors


@dataclass(frozen=True)
class Shared:
    """Contributions of the words that a test row shares with some training rows.

    Attributes:
        rows: Position of the training row, ascending, ``(m,)``.
        tokens: The shared token, ascending within a row, ``(m,)``.
        values: What it contributes to the score, ``(m,)`` float64.
    """

    rows: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def scores(self, n_rows: int) -> np.ndarray:
        """Sums over the words of each row, ``(n_rows,)`` float64; 0 for a row that shares none."""
        return np.bincount(self.rows, self.values, minlength=n_rows).astype(
            np.float64
        )  # bincount of nothing gives integers

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and contributions of one row, largest in absolute value first; ties by token id."""
        first, last = np.searchsorted(self.rows, [row, row + 1])
        tokens, values = self.tokens[first:last], self.values[first:last]
        order = np.lexsort((tokens, -np.abs(values)))
        return tokens[order], values[order]


def shared_words(query: QueryWords, rows: Sequence[WordRows]) -> Shared:
    """Contributions of every shared word, in float64.

    Args:
        query: A test row.
        rows: Training rows, one entry a checkpoint.
    """
    keys, values = [], []
    width = 1 + max((int(t.max(initial=0)) for t in (*query.tokens, *(r.tokens for r in rows))), default=0)
    for tokens, vectors, eta, row_words in zip(query.tokens, query.vectors, query.etas, rows, strict=True):
        if not len(tokens):
            continue
        positions = np.minimum(np.searchsorted(tokens, row_words.tokens), len(tokens) - 1)
        hit = np.flatnonzero(tokens[positions] == row_words.tokens)
        left, right = vectors[positions[hit]].astype(np.float64), _vectors(row_words)[hit].astype(np.float64)
        values.append(eta * np.einsum("ij,ij->i", left, right))
        keys.append(row_words.rows[hit] * width + row_words.tokens[hit])
    if not keys:
        return Shared(*(np.empty(0, kind) for kind in (np.int64, np.int64, np.float64)))
    distinct, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    total = np.bincount(inverse, np.concatenate(values), minlength=len(distinct)).astype(np.float64)
    return Shared(distinct // width, distinct % width, total)


def squares(rows: Sequence[WordRows], etas: Sequence[float], allowed: np.ndarray | None) -> np.ndarray:
    """Score of each row with itself over its allowed words, ``(n,)`` float64."""
    total = np.zeros(len(rows[0]))
    for row_words, eta in zip(rows, etas, strict=True):
        lengths = (_vectors(row_words).astype(np.float64) ** 2).sum(axis=1)
        if allowed is not None:
            lengths[~allowed[row_words.tokens]] = 0.0
        total += eta * np.bincount(row_words.rows, lengths, minlength=len(row_words))
    return total
