"""All pairs of rows whose word sets are similar, found without comparing every pair.

Two sets with a Jaccard similarity of at least t share one of the first |x| - ceil(t |x|) + 1 words of both, all sets
being sorted by one order of the words, here from rare to frequent (prefix filtering: Chaudhuri, Ganti and Kaushik
2006; Bayardo, Ma and Srikant 2007). So rows are compared that share a rare word; no pair is missed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from forebear.indexer.storage.ragged import offsets
from forebear.ratio import ratio

_WORD = re.compile(r"\w+")
_BLOCK_ROWS = 256  # rows that are joined with all others at once
_PAIRS = 1 << 16  # pairs whose words are compared at once
_ROUNDING = 1e-9


def words_of(text: str) -> list[str]:
    """Words in order: runs of letters, digits and underscores, case folded, compatibility forms made one (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class WordSets:
    """Word sets of rows, by text column; the same word in two columns counts as two words.

    Attributes:
        columns: One indicator matrix a text column, ``(n, v)``.
    """

    columns: tuple[sparse.csr_array, ...]

    @property
    def whole(self) -> sparse.csr_array:
        """The union over the columns, ``(n, v)``."""
        return sparse.csr_array(sum(self.columns[1:], self.columns[0]))

    def jaccard(self, rows: np.ndarray, other: WordSets, other_rows: np.ndarray) -> np.ndarray:
        """Jaccard similarity of rows ``rows`` with rows ``other_rows`` of another, pair by pair, ``(m,)``.

        With several columns it is the least of their similarities; for two sets without words it is 1.
        """
        out = np.ones(len(rows))
        for start in range(0, len(rows), _PAIRS):
            part = slice(start, start + _PAIRS)
            for a, b in zip(self.columns, other.columns, strict=True):
                width = max(a.shape[1], b.shape[1])
                left, right = _widened(a, width)[rows[part]], _widened(b, width)[other_rows[part]]
                common = np.asarray(left.multiply(right).sum(axis=1)).reshape(-1)
                union = np.diff(left.indptr) + np.diff(right.indptr) - common
                similarity = ratio(common, union, 1.0)
                out[part] = np.minimum(out[part], similarity)
        return out


def word_sets(texts: Sequence[Sequence[str]], vocabulary: dict[tuple[int, str], int] | None = None) -> WordSets:
    """Word sets of rows, one list a text column; words are numbered in ``vocabulary``, which grows."""
    vocabulary = {} if vocabulary is None else vocabulary
    matrices = []
    for number, column in enumerate(texts):
        ids = [sorted({vocabulary.setdefault((number, w), len(vocabulary)) for w in words_of(t)}) for t in column]
        starts = offsets(np.array([len(row) for row in ids], np.int64))
        flat = np.array([i for row in ids for i in row], np.int64)
        matrices.append((np.ones(len(flat), np.int32), flat, starts))
    shape = (len(texts[0]), len(vocabulary))
    return WordSets(tuple(sparse.csr_array(arrays, shape=shape) for arrays in matrices))


def stacked(parts: Sequence[WordSets]) -> WordSets:
    """Word sets of one block of rows after another, numbered in one vocabulary."""
    width = parts[-1].columns[0].shape[1]
    columns = zip(*(part.columns for part in parts), strict=True)
    return WordSets(tuple(sparse.csr_array(sparse.vstack([_widened(m, width) for m in blocks])) for blocks in columns))


def near_pairs(
    first: WordSets, threshold: float, second: WordSets | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of a Jaccard similarity of at least ``threshold``: positions and similarity, ``(m,)`` each.

    Within ``first`` (i < j), or of ``first`` with ``second``. Rows without words are in no pair.
    """
    other = first if second is None else second
    a, b = first.whole, other.whole
    width = max(a.shape[1], b.shape[1])
    a, b = _widened(a, width), _widened(b, width)
    frequency = np.bincount(a.indices, minlength=width) + np.bincount(b.indices, minlength=width)
    rank = np.empty(width, np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(width)
    left, right = _prefixes(a, rank, threshold), _prefixes(b, rank, threshold).T.tocsr()
    sizes_a, sizes_b = np.diff(a.indptr), np.diff(b.indptr)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, a.shape[0], _BLOCK_ROWS):
        shared = (left[start : start + _BLOCK_ROWS] @ right).tocoo()
        i, j = shared.coords[0].astype(np.int64) + start, shared.coords[1].astype(np.int64)
        low, high = np.minimum(sizes_a[i], sizes_b[j]), np.maximum(sizes_a[i], sizes_b[j])
        kept = low >= threshold * high - _ROUNDING
        if second is None:
            kept &= i < j
        i, j = i[kept], j[kept]
        jaccard = first.jaccard(i, other, j)
        near = jaccard >= threshold - _ROUNDING
        parts.append((i[near], j[near], jaccard[near]))
    i, j, jaccard = (np.concatenate(values) for values in zip(*parts, strict=True))
    return i, j, jaccard


def _prefixes(sets: sparse.csr_array, rank: np.ndarray, threshold: float) -> sparse.csr_array:
    """The prefix of each row, ``(n, v)``: words of which a row of at least ``threshold`` similarity shares one."""
    sizes = np.diff(sets.indptr)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((rank[sets.indices], rows))
    place = np.arange(len(rows)) - np.repeat(sets.indptr[:-1], sizes)
    lengths = sizes - np.ceil(threshold * sizes - _ROUNDING).astype(np.int64) + 1
    kept = place < lengths[rows]
    tokens = sets.indices[order][kept]
    return sparse.csr_array((np.ones(len(tokens), np.int32), (rows[kept], tokens)), shape=sets.shape)


def _widened(matrix: sparse.csr_array, width: int) -> sparse.csr_array:
    """The matrix with empty columns added up to a width."""
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], width))
