"""The metasmoothness of a run: do its weights move along straight lines when the weights of rows change?

With theta(z) the trained weights, v a direction of the rows' weights z, and h a step, the empirical metasmoothness of
Engstrom et al. (2025), "Optimizing ML Training with Metagradient Descent", definition 2, is

    d = theta(z + h v) - theta(z)          d' = theta(z + 2 h v) - theta(z + h v)
    metasmoothness = sum over weights of |d + d'| sign(d) sign(d') / sum of |d + d'|

Each weight counts by how far it moves in all. It is 1 where every weight goes on as it began, 0 where the second half
of the way has nothing to do with the first, and -1 where every weight that moved in all went the other way first. The
paper leaves v and h open. Here z is 1 for all rows, v is -1 for some and 0 for the others, and h is 1/2: on half of the
way the rows count half, at its end they are left out, which is what ``magic`` foretells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forebear.indexer.model.device.arithmetic import own_random_numbers
from forebear.indexer.training.fine_tuning import fine_tune
from forebear.indexer.training.replay.opening import RecordedRun, check_repeatable, start_of, threads_of
from forebear.indexer.training.replay.states import Tensors, copied
from forebear.progress import Progress, no_progress

HALVES = (1.0, 0.5, 0.0)  # weight of the rows in the three trainings


def straightness(begin: Tensors, middle: Tensors, end: Tensors) -> float:
    """The formula above, for theta at three points of the way; 1 where no weight ends elsewhere than it began."""
    agreeing = moved = 0.0
    for first, second, third in zip(begin, middle, end, strict=True):
        whole = (third - first).double().abs()
        agreeing += float((whole * (second - first).sign() * (third - second).sign()).sum())
        moved += float(whole.sum())
    return agreeing / moved if moved else 1.0


def metasmoothness(
    recorded: RecordedRun, row_sets: Sequence[np.ndarray], progress: Progress = no_progress
) -> np.ndarray:
    """Metasmoothness of a run along the way to a training without each set of rows, ``(d,)``.

    Trains once as the run did, and twice for each set.

    Args:
        recorded: The run; all of its epochs are trained.
        row_sets: Numbers of training rows, d sets.
        progress: Called with the stage, and the trainings done and in all.

    Raises:
        InputError: The run cannot be repeated.
        MismatchError: The start model changed, or the machine is another.
    """
    check_repeatable(recorded.folder, recorded.run)
    n_trainings = 1 + 2 * len(row_sets)
    with threads_of(recorded.run):
        begin = _trained(recorded, np.empty(0, np.int64), 1.0)
        progress("training", 1, n_trainings)
        found: list[float] = []
        for rows in row_sets:
            states = [begin]
            for weight in HALVES[1:]:
                states.append(_trained(recorded, rows, weight))
                progress("training", 2 * len(found) + len(states), n_trainings)
            found.append(straightness(*states))
    return np.array(found)


def _trained(recorded: RecordedRun, rows: np.ndarray, weight: float) -> Tensors:
    """Trained parameters of the run with another weight of some rows."""
    classifier, options, all_rows = start_of(recorded)
    weights = np.ones(len(all_rows))
    weights[rows] = weight
    weighted = [{**row, "weight": float(w)} for row, w in zip(all_rows, weights, strict=True)]
    with own_random_numbers(classifier.device):
        fine_tune(classifier, weighted, options)
    return copied([parameter.data for parameter in classifier.model.parameters() if parameter.requires_grad])
