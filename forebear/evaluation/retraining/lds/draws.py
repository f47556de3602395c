"""Random draws of the rows that a model is retrained on, and how many rows of each class a draw keeps.

In a *stratified* draw every class keeps the same share of its rows. In a *plain* draw any rows are kept, so that the
numbers of rows of each class differ from draw to draw; of a small set this class balance decides most of what the
retrained models say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.amounts import rows_of_share
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.row_choice import random_rows, stratified_rows

Draw = Literal["stratified", "plain"]
DRAWS: tuple[str, ...] = get_args(Draw)
STREAM = 17  # of the random numbers of draws, apart from other uses of the same seed


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the kept rows are drawn.

    Attributes:
        how: ``stratified`` or ``plain``.
        share: Share of the live rows that a draw keeps, in (0, 1).
        paired: Whether the other rows keep their place in the batches of a retraining and weigh nothing. Without it the
            model is trained on the kept rows alone, which makes fewer steps.
    """

    how: str = "stratified"
    share: float = 0.5
    paired: bool = False

    def check(self) -> None:
        """Refuse values that mean nothing for any index.

        Raises:
            InputError: No such draw, or a share out of range.
        """
        if self.how not in DRAWS:
            raise InputError(f"--draw {self.how!r}: expected {' or '.join(DRAWS)}.")
        if not 0 < self.share < 1:
            raise InputError(f"--rows-share {self.share:g}: expected a share between 0 and 1, such as 0.5.")

    def rows(self, live: np.ndarray, labels: np.ndarray, n_draws: int, seed: int) -> list[np.ndarray]:
        """Row numbers that each draw keeps, ascending; all draws keep equally many.

        Args:
            live: Row numbers to draw from, ``(n,)``.
            labels: Their class ids, ``(n,)``.
            n_draws: Number of draws.
            seed: Seed of the draws.

        Raises:
            InputError: By this share a draw keeps all rows, or fewer than two.
        """
        self.check()
        draws = []
        for i in range(n_draws):
            if self.how == "stratified":
                draws.append(stratified_rows(live, labels, self.share, seed, STREAM, i))
            else:
                draws.append(random_rows(live, rows_of_share(str(self.share), len(live)), seed, STREAM, i))
        if not 2 <= len(draws[0]) < len(live):
            raise InputError(
                f"--rows-share {self.share:g} keeps {len(draws[0])} of {len(live)} rows; expected a share by which "
                "two rows or more are kept and some are not."
            )
        return draws

    def job(self, live: np.ndarray, kept: np.ndarray, seed: int) -> Job:
        """The retraining on the rows that a draw keeps."""
        if self.paired:
            return Job(live, seed, without=np.setdiff1d(live, kept, assume_unique=True))
        return Job(kept, seed)

    def __str__(self) -> str:
        """The draws in words, as reports have them."""
        rows = "of each class' rows" if self.how == "stratified" else "of all rows"
        place = "; the others keep their place in the batches and weigh nothing" if self.paired else ""
        return f"{self.how}: {self.share:g} {rows} are kept{place}"


HALVES = Draws()


def class_counts(draws: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Numbers of rows of each class that each draw keeps, ``(draws, c)``, without classes that have no rows.

    Args:
        draws: Row numbers that each draw keeps.
        labels: Class ids of all rows of the index.
    """
    classes = np.unique(labels)
    return np.array([[(labels[kept] == label).sum() for label in classes] for kept in draws])
