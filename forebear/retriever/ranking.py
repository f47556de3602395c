"""Rankings: the best rows of each query, and how the rankings of blocks of queries are joined."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.spans.text import Span

# Shared words of each result of a test row: token ids and what each contributes to the score, (m,) each.
Words = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Ranking:
    """The ends of the ranking for ``q`` test rows.

    Attributes:
        rows: Row numbers, best first, ``(q, k)``.
        scores: Their scores, ``(q, k)`` float64.
        exact: Whether the scores are exact rather than those of sketches, stored vectors or a quantised index.
        n_scored: Rows scored exactly for each query, ``(q,)``.
        convergence: How far H^-1 came for the ``q`` queries, where a solver iterated; else None.
        proven: Whether no row left out can be among ``rows``, ``(q,)``, where a proof was asked for; else None.
        spans: The span of each row that is ranked, ``q`` lists of ``k``; None where rows are ranked.
        query_spans: The span of each test row, where the method compares one; else None.
        n_cut: Number of spans that were left out of the search because the model does not read them, ``(q,)``; None
            where rows are ranked.
        effects: Predicted change of the query's loss without each row, ``(q, k)``, where they were asked for and the
            method estimates them; see :mod:`forebear.retriever.effects`.
        effect_probabilities: The same of the target's probability, ``(q, k)``; NaN where none follows.
        effects_together: Both without all rows of the ranking together, ``(q, 2)``, in answers to groups of test rows
            at the head, NaN where they mean nothing; else None.
        words: Contributions of shared words, ``q`` lists of ``k``, where scores are sums over words; else None.
    """

    rows: np.ndarray
    scores: np.ndarray
    exact: bool
    n_scored: np.ndarray
    convergence: Convergence | None = None
    proven: np.ndarray | None = None
    words: list[Words] | None = None
    spans: list[list[Span]] | None = None
    query_spans: list[Span] | None = None
    n_cut: np.ndarray | None = None
    effects: np.ndarray | None = None
    effect_probabilities: np.ndarray | None = None
    effects_together: np.ndarray | None = None


Ends = tuple[Ranking, Ranking]  # proponents, best first; opponents, lowest score first


def join(parts: list[Ranking]) -> Ranking:
    """Rankings of one block of test rows after another; every field that holds something for each query is joined."""

    def together(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], np.ndarray):
            return np.concatenate(values)
        if isinstance(values[0], Convergence):
            return Convergence.join(values)
        return [value for block in values for value in block] if isinstance(values[0], list) else values[0]

    joined = {field.name: together(field.name) for field in fields(Ranking) if field.name != "exact"}
    return Ranking(**joined, exact=all(part.exact for part in parts))


def join_ends(parts: list[dict[str, Ends]]) -> dict[str, Ends]:
    """Both ends, by method name, of one block of test rows after another."""
    if len(parts) == 1:
        return parts[0]
    return {name: (join([p[name][0] for p in parts]), join([p[name][1] for p in parts])) for name in parts[0]}


def rank(scores: np.ndarray, rows: np.ndarray, k: int, *, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` best of each query in order; ties go to the lower row number.

    Args:
        scores: Scores, ``(q, m)``.
        rows: Row numbers, ``(q, m)`` or ``(m,)``.
        k: Number of results, at most m.
        largest: Whether to rank proponents, largest first; else opponents, smallest first.

    Returns:
        Row numbers and scores, ``(q, k)`` each.
    """
    rows = np.broadcast_to(rows, scores.shape)
    order = np.lexsort((rows, -scores if largest else scores), axis=-1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
