"""Flip sets put to the test: the model is trained again without the rows, or with their new labels, seed by seed.

Each retraining is paired with the same seed's retraining on unchanged rows. A set that does not flip most seeds is
grown along a longer ranking of rows; one that does is shrunk. Sizes are doubled or halved, then bisected, a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer

MOST = 0.5  # a set holds where more than this share of the seeds flips
TRIES = 6  # sizes of a set that are tried
NEAR_ENOUGH = 1.25  # sizes between which no other is tried


@dataclass(frozen=True, eq=False)
class Ranked:
    """Rows in the order in which they would be changed for a test row.

    Attributes:
        query: Position of the test row among the retrainer's evaluation rows.
        rows: Row numbers, ``(n,)``, the first ``size`` of which flip the head's prediction.
        new_labels: Their new class ids; None: they are taken out.
        size: Rows of the flip set at the head; 0 where the label that is asked for is predicted already.
        before: Class that the model predicts.
        to: Class that is asked for; None: any other.
    """

    query: int
    rows: np.ndarray
    new_labels: np.ndarray | None
    size: int
    before: int
    to: int | None

    def job(self, live: np.ndarray, seed: int, size: int) -> Job:
        """The training with the first ``size`` rows changed."""
        order = np.argsort(self.rows[:size])
        rows = self.rows[:size][order]
        if self.new_labels is None:
            return Job(live, seed, without=rows)
        labels = self.new_labels[:size][order]
        return Job(live, seed, relabels=dict(zip(rows.tolist(), labels.tolist(), strict=True)))


@dataclass(frozen=True)
class Retrained:
    """What retraining says of a flip set.

    Attributes:
        size: First rows of the ranking that flip most seeds, the fewest that were found; None: none did.
        flipped: Share of the seeds that flip, by size that was tried.
        unclear: Seeds whose training on unchanged rows does not predict what the model does; they take no part.
    """

    size: int | None
    flipped: dict[int, float] = field(default_factory=dict)
    unclear: int = 0


def retrain(
    retrainer: Retrainer,
    ranked: Ranked,
    seeds: Sequence[int],
    *,
    tries: int = TRIES,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Retrained:
    """Find the size at which most retrained seeds flip; 0 where the label that is asked for is predicted already."""
    live = retrainer.rows.live
    unchanged = retrainer.run([Job(live, seed) for seed in seeds], progress)
    clear = [s for s, o in zip(seeds, unchanged, strict=True) if o.predictions[ranked.query] == ranked.before]
    flipped: dict[int, float] = {}
    if not clear:
        return Retrained(None, flipped, len(seeds))
    if not ranked.size:
        return Retrained(0, {0: 1.0}, len(seeds) - len(clear))

    def holds(size: int) -> bool:
        outcomes = retrainer.run([ranked.job(live, seed, size) for seed in clear], progress)
        says = [int(outcome.predictions[ranked.query]) for outcome in outcomes]
        flips = [label != ranked.before if ranked.to is None else label == ranked.to for label in says]
        flipped[size] = sum(flips) / len(flips)
        return flipped[size] > MOST

    low, high, size = 0, None, ranked.size
    while len(flipped) < tries and size not in flipped:
        if holds(size):
            high = size
        else:
            low = size
        if high is None:
            size = min(2 * low, len(ranked.rows))
        elif high <= max(low + 1, NEAR_ENOUGH * low):
            break
        else:
            size = max(1, (low + high) // 2)
    return Retrained(high, flipped, len(seeds) - len(clear))
