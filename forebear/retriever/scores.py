"""Scores of training rows by several methods, with how well H^-1 was solved for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from forebear.indexer.curvature.convergence import Convergence


class Scores(dict[str, np.ndarray]):
    """Scores ``(q, n)`` float64 by method name, larger = proponent.

    Attributes:
        residuals: Largest relative residual of H^-1 over the queries, by name of the methods whose solver iterates.
    """

    def __init__(self, scores: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__(scores or {})
        self.residuals: dict[str, float] = {}

    def note_convergence(self, method: str, convergence: Convergence | None) -> None:
        """Remember how far H^-1 of some queries came; None: no solver iterated."""
        if convergence is not None:
            self.note_residual(method, convergence.worst)

    def note_residual(self, method: str, residual: float | None) -> None:
        """Remember a relative residual; None: no solver iterated."""
        if residual is not None:
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)

    def note_residuals(self, others: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Remember the relative residuals of other scores."""
        for other in others:
            for method, residual in residuals_of(other).items():
                self.note_residual(method, residual)

    def of(self, methods: Iterable[str]) -> Scores:
        """The scores of these methods, in this order, with all residuals."""
        scores = Scores({name: self[name] for name in methods})
        scores.note_residuals([self])
        return scores

    @classmethod
    def join(cls, blocks: list[Scores]) -> Scores:
        """Scores of one block of queries after another."""
        joined = cls({name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})
        joined.note_residuals(blocks)
        return joined


def residuals_of(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative residuals that came with the scores; empty for a plain mapping."""
    return dict(scores.residuals) if isinstance(scores, Scores) else {}
