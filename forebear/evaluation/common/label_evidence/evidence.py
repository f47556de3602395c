"""What the estimates say together: a chance that each label is wrong, and another label in its place.

The model's estimate (the geometric mean of its checkpoints') and that of its features (of refitted heads and of the
nearest rows) are multiplied (their geometric mean), and by Bayes' rule with how often each label is written for each
other they give the chance that another label is the true one. Checkpoints are left out that are so early that the
model's own head knows less than heads that are refitted on its features.
Its logit orders the rows. How often labels are written for each other is counted where the refitted heads are
confident, as confident learning does (Northcutt et al. 2021). Rows of equal texts neither vote for each other nor fit
the heads that judge them; but the encoder, whose features all of this reads, was trained on every label. Where heads
have too many labels to be refitted, the checkpoints stand in for them, and there is no out-of-fold measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from forebear.evaluation.common.label_evidence.estimates import (
    can_refit,
    checkpoint_probabilities,
    first_equal,
    geometric_mean,
    margin,
    out_of_fold,
    own_probability,
    votes,
)
from forebear.indexer.index import Index

VOTERS = 30  # nearest rows that vote for a label
LEAST_CHANCE = 1e-12
ROUNDING = 1e-12
TRAINED_SHARE = 0.9  # of what refitted heads know, that a model's own head knows once it is trained
MEAN_PROBABILITY, MARGIN, OUT_OF_FOLD, VOTES = "mean probability", "margin", "out-of-fold", "votes"
EVIDENCE = "evidence"


@dataclass(frozen=True, kw_only=True)
class LabelEvidence:
    """What speaks against the labels of ``n`` rows.

    Attributes:
        measures: ``(n,)`` by name, larger: more suspicious. 1 minus the mean probability of the own label over the
            checkpoints; by how much another label's logit exceeds the own one's, in the mean over the checkpoints, and
            out of fold, where heads were refitted; the share of the nearest rows' votes for other labels.
        chances: The chance of each label to be the true one, ``(n, c)``.
        written: How often each true label, a line, is written as each label, ``(c, c)``.
        suggested: The likeliest other label of each row, ``(n,)``.
        suspicion: Logit of the chance that another label than the own one is true, ``(n,)``: what rows are ordered by.
        estimated: Estimated probability that the own label is wrong, ``(n,)``: in the same order, its mean the share of
            rows that confident heads give another label.
    """

    measures: Mapping[str, np.ndarray]
    chances: np.ndarray
    written: np.ndarray
    suggested: np.ndarray
    suspicion: np.ndarray
    estimated: np.ndarray


def label_evidence(index: Index, rows: np.ndarray, neighbours: np.ndarray, cosines: np.ndarray) -> LabelEvidence:
    """The evidence about live rows; no model is run.

    Args:
        index: An index of one label a row.
        rows: All live rows, ``(n,)``.
        neighbours: The nearest other live rows of each, by features of the last checkpoint, ``(n, k)``.
        cosines: Their cosines, ``(n, k)``.
    """
    labels, c = index.labels[rows], len(index.manifest.spec.label_names)
    last = len(index.manifest.checkpoints) - 1
    models = [checkpoint_probabilities(index, rows, number) for number in range(last + 1)]
    equal, first, refits = first_equal(index, rows), 0, list[np.ndarray]()
    if can_refit(len(rows), index.features(last).width, c):
        first, refits = trained_refits(index, rows, models, equal)
    trained = geometric_mean(models[first:])
    refitted = geometric_mean(refits) if refits else trained
    at = np.searchsorted(rows, neighbours)
    trust = np.where(equal[at] == equal[:, None], 0.0, own_probability(refitted, labels)[at])
    voted = votes(labels[at], trust, cosines, c)
    measures = {
        MEAN_PROBABILITY: 1 - np.mean([own_probability(model, labels) for model in models], axis=0),
        MARGIN: np.mean([margin(model, labels) for model in models], axis=0),
        **({OUT_OF_FOLD: margin(refitted, labels)} if refits else {}),
        VOTES: 1 - own_probability(voted, labels),
    }
    written, share = written_labels(refitted, labels)
    by_features = geometric_mean([refitted, voted]) if refits else voted
    chances = chances_of(geometric_mean([trained, by_features]), labels, written)
    others = chances.copy()
    others[np.arange(len(rows)), labels] = 0
    suspicion = np.log(np.maximum(others.sum(axis=1), LEAST_CHANCE)) - np.log(own_probability(chances, labels))
    return LabelEvidence(
        measures=measures,
        chances=chances,
        written=written,
        suggested=others.argmax(axis=1),
        suspicion=suspicion,
        estimated=with_mean(suspicion, share),
    )


def trained_refits(
    index: Index, rows: np.ndarray, models: Sequence[np.ndarray], equal: np.ndarray
) -> tuple[int, list[np.ndarray]]:
    """The first checkpoint at which the model's own head is trained, and what heads refitted to its features say.

    Args:
        index: An index of one label a row.
        rows: Row numbers, ``(n,)``.
        models: Probabilities by its checkpoints, ``(n, c)`` each.
        equal: Of :func:`first_equal`.

    Returns:
        The checkpoint's number; out-of-fold probabilities at it and, where that is another, at the last, ``(n, c)``.
    """
    labels, last = index.labels[rows], len(models) - 1
    refit = partial(out_of_fold, rows=rows, labels=labels, n_classes=models[0].shape[1], equal=equal)
    for first, model in enumerate(models):
        refitted = refit(index.features(first))
        if first == last or knowledge(model, labels) >= TRAINED_SHARE * knowledge(refitted, labels):
            break
    return first, [refitted] if first == last else [refitted, refit(index.features(last))]


def knowledge(estimate: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose likeliest label is their own, above that of the largest label, at least 0."""
    largest = np.bincount(labels).max() / len(labels)
    return max(0.0, float((estimate.argmax(axis=1) == labels).mean() - largest))


def written_labels(estimate: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """How often each true label is written as each label, and the share of rows whose label is another one.

    A row counts for the likeliest of the labels whose probability reaches the mean that this label has where it is
    written; a row with none does not count. Each pair of labels counts once more, so that none is impossible.

    Args:
        estimate: Probabilities by heads that were refitted without the row, ``(n, c)``.
        labels: Labels, ``(n,)``.

    Returns:
        Shares ``(c, c)``, a line for each true label, which sums to 1; and the share of the rows that count, of
        n rows at least .5 / n and at most 1 - .5 / n.
    """
    c = estimate.shape[1]
    least = np.array([estimate[labels == k, k].mean() if (labels == k).any() else np.inf for k in range(c)])
    confident = estimate >= least - ROUNDING  # the mean of equal numbers may be above them
    counts, some = np.zeros((c, c)), confident.any(axis=1)
    np.add.at(counts, (np.where(confident, estimate, 0).argmax(axis=1)[some], labels[some]), 1)
    share = (counts.sum() - np.trace(counts)) / max(counts.sum(), 1)
    half = 0.5 / len(labels)
    counts += 1
    return counts / counts.sum(axis=1, keepdims=True), float(np.clip(share, half, 1 - half))


def chances_of(estimate: np.ndarray, labels: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Bayes' rule, ``(n, c)``: a label's probability times how often it is written as the row's label, normalised."""
    found = estimate * written[:, labels].T
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def with_mean(logits: np.ndarray, mean: float) -> np.ndarray:
    """Probabilities whose mean is given, above 0 and below 1, ``(n,)``: all logits are shifted by one number."""
    from scipy.optimize import brentq
    from scipy.special import expit

    # Each probability is above the mean where all logits are shifted above its logit, and below likewise.
    least, most = np.log(mean / (1 - mean)) - np.array([logits.max(), logits.min()])
    shift = brentq(lambda shift: expit(logits + shift).mean() - mean, least - 1, most + 1)
    return np.asarray(expit(logits + shift))
