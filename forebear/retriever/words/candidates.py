"""Candidates by shared words: upper bounds first, so that most postings are never read; test rows go together.

A row's score is at most U = sum over shared words of |dL_q/dE_w| |dL_n/dE_w|, which needs the stored lengths alone: for
a block of test rows one sparse-dense product. Rows are then scored from the store by falling U until no later row can
enter either end of a ranking. Each round reads the rows that any test row still needs, once: the stored vectors of a
word are multiplied with those of all test rows that hold it, and another sparse-dense product sums these by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from forebear.indexer.storage.ragged import is_first, offsets, owners, weighted_sums
from forebear.indexer.words.gradients import WordRows
from forebear.indexer.words.store import WordStore
from forebear.retriever.words.scores import QueryWords

FIRST_ROWS = 128  # rows scored in the first round, which gives a first k-th best score
_ENTRIES = 1 << 17  # words of rows that are scored at once
_VECTOR_BYTES = 1 << 22  # of stored vectors that are widened at once: few enough to stay in the cache
_FLOAT32 = 1e-5  # rounding of the scores from the store, as a share of U


class CandidateSearch:
    """Finds the rows that hold both ends of the rankings of some test rows."""

    def __init__(
        self, queries: QueryWords, stores: Sequence[WordStore], factors: np.ndarray | None, retired: np.ndarray
    ) -> None:
        """Bound the scores of all rows.

        Args:
            queries: The test rows, ``q`` of them.
            stores: The words of the ``n`` training rows, one entry a checkpoint.
            factors: What each score is multiplied by, ``(q, n)``; None: nothing.
            retired: Numbers of rows that are no candidates.
        """
        parts = zip(queries.words, stores, queries.etas, strict=True)
        self._words = [_BlockWords.of(words, store, eta) for words, store, eta in parts]
        self._factors = factors
        # U, (q, n) float64: where the model is sure of a row, it may be below float32's range. -1 for retired rows.
        self._upper = np.zeros((len(queries), stores[0].n_rows))
        self._errors = np.zeros(len(queries))  # largest rounding error of a score from the store, as a share of U
        for words in self._words:
            self._upper += words.bounds(len(queries))
            np.maximum.at(self._errors, words.queries, words.store.errors[words.positions[words.numbers]])
        if factors is not None:
            self._upper *= factors
        self._upper[:, retired] = -1.0

    def find(self, k: int, *, stored: bool, prune: bool) -> list[np.ndarray]:
        """Rows, ascending, that hold both ends of each test row's ranking.

        Args:
            k: Results at each end.
            stored: Whether that is the ranking by the stored vectors; else it is the one by the models' vectors, from
                which the stored ones differ by rounding, so that more rows are kept.
            prune: Whether rows whose upper bound is too low are skipped. The result is the same.
        """
        q, n_rows = self._upper.shape
        share = np.full(q, _FLOAT32) if stored else _FLOAT32 + self._errors
        n_next = FIRST_ROWS + 4 * k if prune else n_rows
        least = np.full(q, np.nextafter(0.0, 1.0))  # smallest U of a row that can still enter either end
        left, active = self._upper.copy(), np.arange(q)  # U of the rows that are not scored yet, of the test rows left
        rows, most, reached = np.empty(0, np.int64), np.empty((2, q, 0)), np.zeros((2, q))
        while True:
            next_rows, is_left = _of_largest(left, least[active], n_next)
            if not len(next_rows):
                break
            if not is_left.all():
                left, active = left[is_left], active[is_left]
            left[:, next_rows] = 0.0
            block = np.full((2, q, len(next_rows)), np.inf)
            block[:, active] = self._most(active, next_rows, share[active])
            rows, most = np.concatenate([rows, next_rows]), np.concatenate([most, block], axis=2)
            reached[:, active] = _reached(most[:, active], k)
            needed = reached[:, active].min(axis=0) / (1 + share[active])
            least[active] = np.maximum(least[active], needed * (1 - 1e-12))
            n_next *= 4
        near = (most >= reached[:, :, None]).any(axis=0) & (most[0] < np.inf)
        order = np.argsort(rows)
        candidates = [rows[order[is_near]] for is_near in near[:, order]]
        for i in np.flatnonzero(reached.min(axis=0) <= 0.0):  # rows that share no word, at 0, may be among the best
            candidates[i] = np.union1d(candidates[i], np.flatnonzero(self._upper[i] == 0)[:k])
        return candidates

    def _most(self, active: np.ndarray, rows: np.ndarray, share: np.ndarray) -> np.ndarray:
        """The most that scores and minus scores may be, by the stored vectors and ``share``, their rounding.

        Returns:
            ``(2, len(active), len(rows))``; infinite where no word is shared.
        """
        words = self._words if len(active) == len(self._upper) else [w.of_queries(active) for w in self._words]
        scores = sum(of_checkpoint.scores(len(active), rows) for of_checkpoint in words)
        pairs = np.ix_(active, rows)
        if self._factors is not None:
            scores *= self._factors[pairs]
        upper = self._upper[pairs]
        slack = share[:, None] * upper
        slack[upper <= 0] = np.inf
        return np.stack([slack + scores, slack - scores])


@dataclass(frozen=True)
class _BlockWords:
    """Words of test rows at one checkpoint, token by token; without those that no training row holds.

    Attributes:
        store: The training rows' words.
        eta: Weight of the checkpoint.
        positions: Positions of the distinct tokens in the store, ascending, ``(s,)``.
        numbers: Number of each word's token among these, ascending, ``(m,)``.
        queries: Test row of each word, ``(m,)``.
        lengths: eta |dL_q/dE_w|, ``(m,)`` float64.
        vectors: dL_q/dE_w, ``(m, e)`` float32.
    """

    store: WordStore
    eta: float
    positions: np.ndarray
    numbers: np.ndarray
    queries: np.ndarray
    lengths: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, words: WordRows, store: WordStore, eta: float) -> _BlockWords:
        assert words.vectors is not None
        positions = store.find(words.tokens)
        order = np.argsort(positions, kind="stable")
        order = order[positions[order] >= 0]
        positions, vectors = positions[order], words.vectors[order]
        firsts = is_first(positions)
        lengths = eta * np.linalg.norm(vectors.astype(np.float64), axis=1)
        of_words = (words.rows[order], lengths, vectors.astype(np.float32, copy=False))
        return cls(store, eta, positions[firsts], np.cumsum(firsts) - 1, *of_words)

    def of_queries(self, active: np.ndarray) -> _BlockWords:
        """The words of some test rows, ascending, which are renumbered from 0."""
        places = np.minimum(np.searchsorted(active, self.queries), len(active) - 1)
        kept = active[places] == self.queries
        distinct, numbers = np.unique(self.numbers[kept], return_inverse=True)
        of_words = (places[kept], self.lengths[kept], self.vectors[kept])
        return _BlockWords(self.store, self.eta, self.positions[distinct], numbers, *of_words)

    def bounds(self, n_queries: int) -> np.ndarray:
        """Upper bounds of the scores of all rows, ``(n_queries, n)`` float64, from lengths alone."""
        weights = np.zeros((len(self.positions), n_queries))
        weights[self.numbers, self.queries] = self.lengths
        return self.store.weighted_norms(self.positions, weights)

    @cached_property
    def _starts(self) -> list[int]:
        """Where the words of each token begin, and one past the last."""
        starts: list[int] = offsets(np.bincount(self.numbers, minlength=len(self.positions))).tolist()
        return starts

    @cached_property
    def _number_of_token(self) -> np.ndarray:
        """By token id; -1 of other tokens."""
        numbers = np.full(1 + self.store.tokens[-1], -1, np.int32)
        numbers[self.store.tokens[self.positions]] = np.arange(len(self.positions))
        return numbers

    def scores(self, n_queries: int, rows: np.ndarray) -> np.ndarray:
        """Scores from the stored vectors, ``(n_queries, len(rows))`` float64; float32 products."""
        out = np.empty((n_queries, len(rows)))
        counts = self.store.row_starts[rows + 1] - self.store.row_starts[rows]
        step = max(1, _ENTRIES // max(1, int(counts.max(initial=0))))
        for start in range(0, len(rows), step):
            out[:, start : start + step] = self._of_some(n_queries, rows[start : start + step]).T
        return out

    def _of_some(self, n_queries: int, rows: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`scores`: a sum over the words of each row."""
        store = self.store
        starts, entries = store.entries(rows)
        numbers = self._number_of_token[store.entry_tokens[entries]]
        hit = np.flatnonzero(numbers >= 0)
        places = store.entry_places[entries[hit]]
        order = np.argsort(places)  # postings of a token lie together
        dots = self._dots(n_queries, numbers[hit[order]], places[order])
        places_of_dots = np.empty_like(order)
        places_of_dots[order] = np.arange(len(order))
        weights = self.eta * store.scales[places].astype(np.float64)
        row_of_hit = owners(starts)[hit]
        return weighted_sums(row_of_hit, weights, places_of_dots, dots, len(rows))

    def _dots(self, n_queries: int, numbers: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Dots of postings' directions with each test row's vector of the token, 0 where it has none, ``(m, q)``."""
        out = np.zeros((len(places), n_queries))
        step = max(1, _VECTOR_BYTES // (4 * self.vectors.shape[1]))
        for start in range(0, len(places), step):
            directions = self.store.directions(places[start : start + step])
            some = numbers[start : start + step]
            first = np.flatnonzero(is_first(some))
            ends = [*first[1:].tolist(), len(directions)]
            for token, a, b in zip(some[first].tolist(), first.tolist(), ends, strict=True):
                first_word, last_word = self._starts[token], self._starts[token + 1]
                if last_word == first_word + 1:  # most tokens are of one test row, and one column is written faster
                    out[start + a : start + b, self.queries[first_word]] = directions[a:b] @ self.vectors[first_word]
                else:
                    words = slice(first_word, last_word)
                    out[start + a : start + b, self.queries[words]] = directions[a:b] @ self.vectors[words].T
        return out


def _of_largest(left: np.ndarray, least: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose U is no less than ``least`` ``(q,)``, and among the ``n`` largest of a test row.

    Args:
        left: U, ``(q, rows)``.
        least: Smallest U that counts, ``(q,)``.
        n: Number of rows of each test row.

    Returns:
        Rows of any test row, ascending; and which test rows have some, ``(q,)``.
    """
    is_left = left >= least[:, None]
    n_left = np.count_nonzero(is_left, axis=1)
    if n_left.max() > n:
        nth = -np.partition(-left[n_left > n], n - 1, axis=1)[:, n - 1]
        is_left[n_left > n] = left[n_left > n] >= nth[:, None]
    return np.flatnonzero(is_left.any(axis=0)), n_left > 0


def _reached(most: np.ndarray, k: int) -> np.ndarray:
    """A score that at least k rows reach, and one that they do at the other end with minus scores, despite rounding.

    With fewer than k scores both are 0, the score of the rows that share no word.

    Args:
        most: The most that scores and minus scores may be, ``(2, q, m)``; infinite where there is none.
        k: Number of rows.

    Returns:
        ``(2, q)``.
    """
    if most.shape[2] < k:
        return np.zeros(most.shape[:2])
    kth = np.partition(most[::-1], k - 1, axis=2)[:, :, k - 1]  # a score is at least minus the most of minus the score
    return np.where(kth < np.inf, -kth, 0.0)
