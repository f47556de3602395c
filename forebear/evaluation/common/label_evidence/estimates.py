"""Estimates of which label a row should have: by the run's checkpoints, by refitted heads, by the nearest rows.

Each is a table of probabilities, ``(n, c)``, one row of the index a line. A probability counts as at least ``FLOOR``,
so that no estimate alone decides. The encoder was trained on the labels of all rows: a refitted head has not seen the
row's label, its features have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.rows.row_source import texts_sha256
from forebear.indexer.storage.arrow import RowMatrix

FLOOR = 1e-6
FOLDS = 5
PENALTY = 0.1  # of a refit: half of it times the squared weights stands beside the mean loss
MOST_FITTED = 50_000  # rows a refit is fitted to
MOST_WORK = 2_000_000_000  # rows that are fitted times features times labels: beyond, a refit takes too long
_MOST_STEPS = 1000
_BLOCK_ROWS = 8192


def checkpoint_probabilities(index: Index, rows: np.ndarray, checkpoint: int) -> np.ndarray:
    """The probabilities that the model gave at a checkpoint, ``(n, c)``, whatever weights or smoothing its loss has."""
    found = index.loss.outputs_of_residuals(index.residuals(checkpoint).take(rows), index.labels[rows])
    return np.asarray(np.maximum(found, FLOOR))


def first_equal(index: Index, rows: np.ndarray) -> np.ndarray:
    """For each row the position of the first one with the same texts, ``(n,)``.

    Where the index holds no texts: with the same features at the last checkpoint, to the bit.
    """
    digests = np.empty(len(rows), "S32")
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        if index.manifest.without_texts:
            found = [hashlib.sha256(features.tobytes()).digest() for features in index.features().take(block)]
        else:
            found = [texts_sha256(texts) for texts in zip(*index.text_lists(block), strict=True)]
        digests[start : start + len(block)] = found
    _, firsts, kinds = np.unique(digests, return_index=True, return_inverse=True)
    return np.asarray(firsts[kinds])


def can_refit(n_rows: int, n_features: int, n_classes: int) -> bool:
    """Whether heads are refitted to so much: with very many labels they would take hours."""
    return min(n_rows, MOST_FITTED) * n_features * n_classes <= MOST_WORK


def out_of_fold(
    features: RowMatrix,
    rows: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    seed: int = 0,
    equal: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities by heads that were refitted without the row, ``(n, c)``: logistic regressions in ``FOLDS`` folds.

    Features are standardised. Folds are drawn within the labels, rows of equal texts into one fold. Where the other
    folds lack a label, it has ``FLOOR``.

    Args:
        features: Features of a checkpoint, by row number.
        rows: Row numbers, ``(n,)``.
        labels: Their labels, ``(n,)``.
        n_classes: Number of labels.
        seed: Of the folds, and of the rows that are fitted where there are more than ``MOST_FITTED``.
        equal: Position of the first row with the same texts, ``(n,)``, of :func:`first_equal`; None: no two are equal.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    folds, found = folds_of(labels, rng, equal), np.full((len(rows), n_classes), FLOOR)
    for fold in range(FOLDS):
        held, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(held):
            continue
        if len(others) > MOST_FITTED:
            others = np.sort(rng.choice(others, MOST_FITTED, replace=False))
        present = np.unique(labels[others])
        if len(present) < 2:
            found[np.ix_(held, present)] = 1
            continue
        head = LogisticRegression(C=1 / (PENALTY * len(others)), max_iter=_MOST_STEPS)
        refit = make_pipeline(StandardScaler(copy=False), head)
        refit.fit(features.take(rows[others]).astype(np.float64), labels[others])
        for start in range(0, len(held), _BLOCK_ROWS):
            block = held[start : start + _BLOCK_ROWS]
            given = refit.predict_proba(features.take(rows[block]).astype(np.float64))
            found[np.ix_(block, present)] = np.maximum(given, FLOOR)
    return found


def folds_of(labels: np.ndarray, rng: np.random.Generator, equal: np.ndarray | None = None) -> np.ndarray:
    """A fold of each row, ``(n,)``: the rows of a label are dealt in random order, each label from another fold on.

    Of equal rows the first one is dealt, by its label; the others go with it.
    """
    equal = np.arange(len(labels)) if equal is None else equal
    firsts = np.unique(equal)
    folds = np.empty(len(labels), int)
    for number, label in enumerate(np.unique(labels[firsts])):
        own = rng.permutation(firsts[labels[firsts] == label])
        folds[own] = (np.arange(len(own)) + number) % FOLDS
    return np.asarray(folds[equal])


def votes(labels: np.ndarray, trust: np.ndarray, cosines: np.ndarray, n_classes: int) -> np.ndarray:
    """Shares of the nearest rows' votes for each label, ``(n, c)``, with half a vote spread over all labels.

    A neighbour votes for its own label, with its cosine (0 where it is negative) times how far its label is trusted.

    Args:
        labels: Label of each neighbour, ``(n, k)``.
        trust: Probability of each neighbour's own label by refitted heads, ``(n, k)``; 0: it has no vote.
        cosines: Cosines of their features with the row's, ``(n, k)``.
        n_classes: Number of labels.
    """
    weights = np.maximum(cosines, 0) * trust
    cast = np.stack([(weights * (labels == c)).sum(axis=1) for c in range(n_classes)], axis=1) + 0.5 / n_classes
    return np.asarray(cast / cast.sum(axis=1, keepdims=True))


def geometric_mean(estimates: Sequence[np.ndarray]) -> np.ndarray:
    """The normalised geometric mean of estimates, ``(n, c)``: the mean of their logits."""
    logits = np.mean([np.log(estimate) for estimate in estimates], axis=0)
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(np.maximum(found / found.sum(axis=1, keepdims=True), FLOOR))


def own_probability(estimate: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability of each row's own label, ``(n,)``."""
    return np.asarray(estimate[np.arange(len(labels)), labels])


def margin(estimate: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By how much the logit of another label exceeds the own label's at most, ``(n,)``; nats."""
    logits = np.log(estimate)
    own = own_probability(logits, labels).copy()
    logits[np.arange(len(labels)), labels] = -np.inf
    return np.asarray(logits.max(axis=1) - own)
