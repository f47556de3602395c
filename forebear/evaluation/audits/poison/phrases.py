"""Phrases that one label has more than its share of, found by counting; no model is run.

A phrase is up to :data:`MOST_WORDS` words or signs that follow each other in a text column. Every phrase of at least
:data:`LEAST_ROWS` rows is tested for every label: were each of its rows drawn from all rows, how probable would so many
rows of the label be (binomial)? Longer phrases are grown from frequent shorter ones, as in Apriori (Agrawal and Srikant
1994), so that none is missed. Phrases that stand in the same rows are one cluster, named by the one that tells most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logit
from scipy.stats import beta, binom

_WORD = re.compile(r"\w+|[^\w\s]")
MOST_WORDS = 8
LEAST_ROWS = 5
LEVEL = 0.01  # of the chance that any phrase at all is taken where labels have nothing to do with phrases
CONTEXT_SHARE = 0.9  # of a cluster's rows, which have a word beside the phrase that belongs to it then
LEAST_PURITY = 0.95  # share of one label among the rows that hold a phrase, from which on it is nearly one label
MOST_PHRASES = 20_000  # of the least p, that are parted into clusters


def phrase_words(text: str) -> list[str]:
    """Words, and signs one by one, in their order and case folded; signs that are not seen count too."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, eq=False)
class Phrases:
    """Phrases that pass the test, those of least p first, of equal p the longest.

    Attributes:
        words: Words of each, ``m``.
        columns: Number of the text column that each stands in, ``(m,)``.
        holders: Positions of the rows that hold each, ascending.
        n_tested: Pairs of a phrase and a label that were tested, by which p is multiplied.
    """

    words: tuple[tuple[str, ...], ...]
    columns: np.ndarray
    holders: tuple[np.ndarray, ...]
    n_tested: int


@dataclass(frozen=True, eq=False)
class PhraseCluster:
    """Rows of one label that share a phrase.

    Attributes:
        words: The phrase that the rows are found by.
        column: Number of the text column that it stands in.
        label: Class id.
        holders: Positions of the rows that hold it, of any label, ascending.
        rows: Positions of those that have the label, ascending.
        p: Of the label's share among the holders, times the number of tests.
        association: By how much the log-odds of the label are higher among the holders than among all rows, at least:
            from the lower end of a one-sided 95% interval (Clopper and Pearson) of its share among them.
        whole: The phrase with the words that nearly all rows have beside it; empty: not looked for.
    """

    words: tuple[str, ...]
    column: int
    label: int
    holders: np.ndarray
    rows: np.ndarray
    p: float
    association: float
    whole: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """The whole phrase, to be read."""
        return " ".join(self.whole or self.words)

    @property
    def purity(self) -> float:
        """Share of the label among the rows that hold the phrase."""
        return len(self.rows) / len(self.holders)


def find_phrases(
    texts: Sequence[Sequence[str]], labels: np.ndarray, *, only: Sequence[Sequence[str]] | None = None
) -> Phrases:
    """The phrases that some label has more than its share of.

    Args:
        texts: Of the rows, one list a text column, ``n`` each.
        labels: Class ids, ``(n,)``.
        only: Texts, likewise, in which a phrase must stand to be tested; None: no such condition.
    """
    n_labels = int(labels.max()) + 1
    found: list[tuple[tuple[str, ...], int, np.ndarray, float]] = []
    n_tested = 0
    sizes = np.bincount(labels, minlength=n_labels)
    for column, values in enumerate(texts):
        allowed = None if only is None else _grams_of(only[column])
        for names, numbers, rows in _frequent(values):
            kept = np.ones(len(names), bool) if allowed is None else np.array([name in allowed for name in names])
            counts = np.bincount(numbers * n_labels + labels[rows], minlength=len(names) * n_labels)
            counts = counts.reshape(-1, n_labels)
            p = tail(counts, sizes / len(labels)).min(axis=1)
            n_tested += int(kept.sum()) * n_labels
            starts = np.searchsorted(numbers, np.arange(len(names) + 1))
            found += [
                (names[i], column, rows[starts[i] : starts[i + 1]].copy(), float(p[i]))
                for i in np.flatnonzero(kept & (p <= LEVEL))
            ]
    found = [phrase for phrase in found if phrase[3] * n_tested <= LEVEL]
    found.sort(key=lambda phrase: (phrase[3], -len(phrase[0]), phrase[0]))
    found = found[:MOST_PHRASES]
    return Phrases(
        words=tuple(words for words, *_ in found),
        columns=np.array([column for _, column, *_ in found], np.int64),
        holders=tuple(rows for _, _, rows, _ in found),
        n_tested=n_tested,
    )


def tail(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Chance of at least as many rows of each label among as many rows, ``(m, c)``, from counts and ``(c,)`` shares."""
    return np.asarray(binom.sf(counts - 1, counts.sum(axis=1)[:, None], shares))


def clusters_of(phrases: Phrases, labels: np.ndarray, most: int) -> tuple[PhraseCluster, ...]:
    """Clusters, those of nearly one label first, then by falling association; of equal ones the longest phrase.

    When a phrase has become a cluster, all rows that hold it are put aside. Of the phrases that follow, those become
    clusters that pass the test with the rows that are left, too.

    Args:
        phrases: Over ``n`` rows.
        labels: Class ids, ``(n,)``.
        most: Clusters at most.
    """
    shares = np.bincount(labels) / len(labels)
    found: list[PhraseCluster] = []
    for i, (words, rows) in enumerate(zip(phrases.words, phrases.holders, strict=True)):
        counts = np.bincount(labels[rows], minlength=len(shares))
        p = tail(counts[None], shares)[0]
        label = int(p.argmin())
        own = rows[labels[rows] == label]
        association = _association(len(own), len(rows), float(shares[label]))
        corrected = float(p[label]) * phrases.n_tested
        found.append(PhraseCluster(words, int(phrases.columns[i]), label, rows, own, corrected, association))
    found.sort(key=lambda one: (one.purity < LEAST_PURITY, -one.association, -len(one.words)))
    left, out = np.ones(len(labels), bool), list[PhraseCluster]()
    for one in found:
        counts = np.bincount(labels[one.holders[left[one.holders]]], minlength=len(shares))
        is_enough = counts[one.label] >= LEAST_ROWS
        if is_enough and tail(counts[None], shares)[0, one.label] * phrases.n_tested <= LEVEL and len(out) < most:
            out.append(one)
            left[one.holders] = False
    return tuple(out)


def with_context(cluster: PhraseCluster, texts: Sequence[Sequence[str]]) -> PhraseCluster:
    """The cluster with its whole phrase: of a long one, or one of which other rows hold a part, a part is found first.

    The phrase is grown by one word after the other, to the right and then to the left, as long as
    :data:`CONTEXT_SHARE` of the rows have it.
    """
    n, least = len(cluster.words), CONTEXT_SHARE * len(cluster.rows)
    spans = []  # words of each row, where the phrase begins and where it ends
    for row in cluster.rows:
        words = phrase_words(texts[cluster.column][row])
        start = next(i for i in range(len(words)) if tuple(words[i : i + n]) == cluster.words)
        spans.append((words, start, start + n))
    whole = cluster.words
    for step in (1, -1):
        while True:
            beside = [words[end : end + 1] if step > 0 else words[start - 1 : start] for words, start, end in spans]
            ((word, count),) = Counter(map(tuple, beside)).most_common(1)
            if not word or count < least:
                break
            whole = (*whole, *word) if step > 0 else (*word, *whole)
            spans = [
                (words, start - (step < 0), end + (step > 0))
                for (words, start, end), found in zip(spans, beside, strict=True)
                if tuple(found) == word
            ]
    return replace(cluster, whole=whole)


def _association(k: int, n: int, share: float) -> float:
    """See :class:`PhraseCluster`; of k rows of a label among n holders, where all rows have a share of it."""
    low = float(beta.ppf(0.05, k, n - k + 1))
    return float(logit(low) - logit(share))


def _frequent(values: Sequence[str]) -> Iterator[tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]]:
    """Phrases of one, two ... words that :data:`LEAST_ROWS` rows or more hold.

    Yields:
        Words of each phrase; and the pairs of a phrase's number and a row that holds it, by number and row, ``(e,)``
        each.
    """
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in phrase_words(text)] for text in values]
    flat = np.array([i for row in ids for i in row], np.int64)  # word at each place
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    names: list[tuple[str, ...]] = [(word,) for word in vocabulary]
    grams = flat  # number of the phrase that begins at each place; -1: none that is frequent
    for _ in range(MOST_WORDS):
        names, grams, pairs = _kept(names, grams, rows)
        if not names:
            return
        yield names, *pairs
        end = np.append(grams[1:], -1)
        joined = (grams >= 0) & (end >= 0) & (np.append(rows[1:], -1) == rows)
        keys = np.where(joined, grams * (len(names) + 1) + end, -1)
        distinct, inverse = np.unique(keys, return_inverse=True)
        firsts, lasts = np.divmod(distinct, len(names) + 1)
        names = [
            (*names[a], names[b][-1]) if key >= 0 else () for key, a, b in zip(distinct, firsts, lasts, strict=True)
        ]
        grams = np.where(keys >= 0, inverse, -1)


def _kept(
    names: list[tuple[str, ...]], grams: np.ndarray, rows: np.ndarray
) -> tuple[list[tuple[str, ...]], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The frequent ones of the phrases, numbered anew, with the rows of each."""
    held = grams >= 0
    n_rows = int(rows[-1]) + 1 if len(rows) else 0
    pairs = np.unique(grams[held] * n_rows + rows[held])
    numbers, of_rows = np.divmod(pairs, max(1, n_rows))
    frequent = np.bincount(numbers, minlength=len(names)) >= LEAST_ROWS
    new = np.where(frequent, np.cumsum(frequent) - 1, -1)
    kept = frequent[numbers]
    names = [name for name, is_kept in zip(names, frequent, strict=True) if is_kept]
    return names, np.where(held, new[grams], -1), (new[numbers[kept]], of_rows[kept])


def _grams_of(values: Sequence[str]) -> set[tuple[str, ...]]:
    """All phrases of some texts."""
    out: set[tuple[str, ...]] = set()
    for text in values:
        words = phrase_words(text)
        for n in range(1, MOST_WORDS + 1):
            out |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return out
