"""What a solver of H^-1 that iterates says of its solutions, which goes with scores and rankings to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Convergence:
    """How far ``q`` solutions x of (H + damping I) x = v came; None in its place: no solver iterated.

    Attributes:
        residual: ||v - (H + damping I) x|| / ||v||, ``(q,)`` float64; 0 where v = 0.
        iterations: Number of steps, ``(q,)`` int64.
    """

    residual: np.ndarray
    iterations: np.ndarray

    @property
    def worst(self) -> float:
        """The largest residual."""
        return float(self.residual.max())

    def take(self, indices: np.ndarray) -> Convergence:
        """That of the solutions at some indices."""
        return Convergence(self.residual[indices], self.iterations[indices])

    def of_groups(self, membership: np.ndarray) -> Convergence:
        """The largest residual and the largest number of steps in each group, membership ``(g, q)`` bool."""
        residual, iterations = (np.where(membership, a, 0).max(axis=1) for a in (self.residual, self.iterations))
        return Convergence(residual, iterations)

    def or_worse(self, other: Convergence) -> Convergence:
        """The larger residual and the larger number of steps of each two solutions."""
        return Convergence(np.maximum(self.residual, other.residual), np.maximum(self.iterations, other.iterations))

    @staticmethod
    def join(parts: Sequence[Convergence | None]) -> Convergence | None:
        """That of one block of solutions after another; None where no solver iterated."""
        iterated = [part for part in parts if part is not None]
        if not iterated:
            return None
        return Convergence(
            *(np.concatenate([getattr(p, name) for p in iterated]) for name in ("residual", "iterations"))
        )


def convergence_phrase(residual: float, iterations: int) -> str:
    """How far one solution came, in words."""
    return f"a relative residual of {residual:.1e} in {iterations:,} iteration{'s' * (iterations != 1)}"
