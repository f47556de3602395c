"""Estimates of which label a row should have: by the run's checkpoints, by refitted heads, by the nearest rows.

Each is a table of probabilities, ``(n, c)``, one row of the index a line. A probability counts as at least ``FLOOR``,
so that no estimate alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.storage.arrow import RowMatrix

FLOOR = 1e-6
FOLDS = 5
PENALTY = 0.1  # of a refit: half of it times the squared weights stands beside the mean loss
MOST_FITTED = 50_000  # rows a refit is fitted to
_MOST_STEPS = 1000
_BLOCK_ROWS = 8192


def checkpoint_probabilities(index: Index, rows: np.ndarray, checkpoint: int) -> np.ndarray:
    """The probabilities that the model gave at a checkpoint, ``(n, c)``: p = (p - y) + y."""
    labels = index.labels[rows]
    found = index.residuals(checkpoint).take(rows).astype(np.float64)
    found[np.arange(len(rows)), labels] += 1
    return np.maximum(found, FLOOR)


def out_of_fold(features: RowMatrix, rows: np.ndarray, labels: np.ndarray, n_classes: int, seed: int = 0) -> np.ndarray:
    """Probabilities by heads that were refitted without the row, ``(n, c)``: logistic regressions in ``FOLDS`` folds.

    Features are standardised. Folds are drawn within the labels. Where the other folds lack a label, it has ``FLOOR``.

    Args:
        features: Features of a checkpoint, by row number.
        rows: Row numbers, ``(n,)``.
        labels: Their labels, ``(n,)``.
        n_classes: Number of labels.
        seed: Of the folds, and of the rows that are fitted where there are more than ``MOST_FITTED``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    folds, found = folds_of(labels, rng), np.full((len(rows), n_classes), FLOOR)
    for fold in range(FOLDS):
        held, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
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


def folds_of(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fold of each row, ``(n,)``: the rows of a label are dealt in random order, each label from another fold on."""
    folds = np.empty(len(labels), int)
    for number, label in enumerate(np.unique(labels)):
        own = rng.permutation(np.flatnonzero(labels == label))
        folds[own] = (np.arange(len(own)) + number) % FOLDS
    return folds


def votes(labels: np.ndarray, trust: np.ndarray, cosines: np.ndarray, n_classes: int) -> np.ndarray:
    """Shares of the nearest rows' votes for each label, ``(n, c)``, with half a vote spread over all labels.

    A neighbour votes for its own label, with its cosine (0 where it is negative) times how far its label is trusted.

    Args:
        labels: Label of each neighbour, ``(n, k)``.
        trust: Probability of each neighbour's own label by refitted heads, ``(n, k)``.
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
