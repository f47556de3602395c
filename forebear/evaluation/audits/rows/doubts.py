"""What speaks against the labels of training rows: the model's prediction, the neighbours' labels, and which label.

Of several labels a row, one is doubted: the one whose probability is farthest from its target, which with targets of 0
and 1 is the one of largest loss. Labels and predictions of the others play no part in what is suggested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forebear.evaluation.common.passages import NO_LABEL
from forebear.indexer.index import Index
from forebear.indexer.losses.sigmoid import HALF
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL


@dataclass(frozen=True)
class Doubts:
    """Doubts about ``n`` rows; targets are as the index has them, ``(n,)`` or ``(n, c)``.

    Attributes:
        majority: Of one label a row the most frequent label of the neighbours; the row's own wins a tie, then the lower
            id. Of several labels the same for each of them; of numbers the neighbours' median.
        suggested: Another target: what the model predicts where that is not the row's label, else what most neighbours
            have where that is not; -1 or NaN where there is none. The audit puts the likeliest other label by all
            evidence in its place, also where the evidence alone is for another. Of several labels the row's own
            with the doubted one changed; of numbers the prediction.
        is_suggested: Whether another target is suggested, ``(n,)`` bool.
        doubted: Number of the doubted label, ``(n,)``; None where rows have not several labels.
        contradicting: Whether each neighbour contradicts the row, ``(n, k)`` bool: it has another label (the doubted
            one), or its number is nearer to the prediction than to the row's.
    """

    majority: np.ndarray
    suggested: np.ndarray
    is_suggested: np.ndarray
    doubted: np.ndarray | None
    contradicting: np.ndarray


def doubts(index: Index, rows: np.ndarray, neighbours: np.ndarray) -> Doubts:
    """The doubts about some rows.

    Args:
        index: The index; no model is run.
        rows: Row numbers, ``(n,)``.
        neighbours: Their nearest other rows, nearest first, ``(n, k)``.
    """
    own, predictions, near = index.labels[rows], index.predictions[rows], index.labels[neighbours]
    if index.loss.problem_type == SINGLE_LABEL:
        majority = majority_label(near, own, len(index.manifest.spec.label_names))
        suggested = np.where(predictions != own, predictions, np.where(majority != own, majority, NO_LABEL))
        return Doubts(majority, suggested, suggested != NO_LABEL, None, near != own[:, None])
    if index.loss.problem_type == REGRESSION:
        numbers, wide = np.median(near, axis=1), predictions.astype(np.float64)
        farther = np.abs(near - wide[:, None]) < np.abs(near - own[:, None])
        return Doubts(numbers, wide, np.ones(len(rows), bool), None, farther.all(axis=2))
    residuals = index.residuals().take(rows)
    doubted = np.abs(residuals).argmax(axis=1)
    at = (np.arange(len(rows)), doubted)
    votes = (near > HALF).sum(axis=1)  # of k neighbours for each label
    majority = np.where(2 * votes == near.shape[1], own, (2 * votes > near.shape[1]).astype(float))
    has, other = own > HALF, ~(own > HALF)[at]
    is_suggested = ((predictions > HALF) != has)[at] | ((majority > HALF) != has)[at]
    suggested = own.copy()
    suggested[at] = other.astype(float)
    suggested[~is_suggested] = np.nan
    of_neighbours = np.take_along_axis(near > HALF, doubted[:, None, None], axis=2)[:, :, 0]
    return Doubts(majority, suggested, is_suggested, doubted, of_neighbours == other[:, None])


def majority_label(neighbours: np.ndarray, row_labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Most frequent class among ``(n, k)`` labels; a row's own ``(n,)`` wins a tie, then the lower id."""
    counts = np.stack([(neighbours == c).sum(axis=1) for c in range(n_classes)], axis=1)
    return np.asarray((2 * counts + (np.arange(n_classes) == row_labels[:, None])).argmax(axis=1))
