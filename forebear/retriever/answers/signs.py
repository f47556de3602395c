"""Notes on scores whose sign is not that of their side: proponents below 0, opponents above 0.

Both sides are ends of one ranking: where few rows support a prediction, its proponents include rows that oppose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebear.retriever.answers.results import SIDES, Answers
from forebear.retriever.question.methods import Method, pick_methods


def is_crossed(method: Method, side: str, scores: np.ndarray | Sequence[float]) -> np.ndarray:
    """Mask of one side's scores that have the sign of the other; all False where the method's sign means nothing."""
    crossed = np.asarray(scores) < 0 if side == SIDES[0] else np.asarray(scores) > 0
    return crossed & method.signed


def sign_note(method: Method, side: str, n_crossed: int, n: int, *, named: bool = True) -> str:
    """A sentence on the scores of one side that have the other side's sign; empty where there are none.

    Args:
        method: Method of the scores.
        side: ``proponent`` or ``opponent``.
        n_crossed: Number of scores that :func:`is_crossed` marks.
        n: Number of scores, of one test row or of many.
        named: Whether the sentence names the method.
    """
    if not n_crossed:
        return ""
    verbs = ("raises", "lowers") if method.saliency else ("supports", "opposes")
    what = "the word's saliency" if method.saliency else "the target"
    where = "below 0" if side == SIDES[0] else "above 0"
    does, instead = verbs if side == SIDES[0] else verbs[::-1]
    of_method = f" of {method.name}" if named else ""
    said = f"{n_crossed:,} of {n:,} {side}s{of_method} have scores {where}"
    if n_crossed == n:
        return f"{said}: none {does} {what}, they {instead.removesuffix('s')} it least."
    return f"{said}: these {instead.removesuffix('s')} {what}, less than other rows do."


def note_of(name: str, side: str, scores: np.ndarray | Sequence[float]) -> str:
    """:func:`sign_note` of the scores of one side, by a method's name."""
    (method,) = pick_methods([name])
    crossed = is_crossed(method, side, scores)
    return sign_note(method, side, int(crossed.sum()), crossed.size)


class SignCounts:
    """Counts the results of many answers whose score has the sign of the other side."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods = {method.name: method for method in methods}
        self._crossed = {(name, side): [0, 0] for name in self._methods for side in SIDES}

    def add(self, answers: Answers) -> None:
        """Count the results of one block of test rows."""
        for name, ends in answers.rankings.items():
            for side, ranking in zip(SIDES, ends, strict=True):
                self.count(name, side, ranking.scores)

    def add_table(self, table: pa.Table) -> None:
        """Count the results of a table."""
        for name in self._methods:
            for side in SIDES:
                chosen = pc.and_(pc.equal(table["method"], name), pc.equal(table["side"], side))
                self.count(name, side, table["score"].filter(chosen).to_numpy())

    def count(self, name: str, side: str, scores: np.ndarray) -> None:
        """Count scores of one method and side."""
        count = self._crossed[name, side]
        count[0] += int(is_crossed(self._methods[name], side, scores).sum())
        count[1] += scores.size

    def notes(self) -> list[str]:
        """A sentence for each side of a method that has such scores; it names the method."""
        return [sentence for _, sentence in self._sentences(named=True)]

    def by_method(self) -> list[tuple[str, str]]:
        """The sentences of :meth:`notes` without the method's name, as pairs of name and sentence."""
        return self._sentences(named=False)

    def _sentences(self, *, named: bool) -> list[tuple[str, str]]:
        sentences = [
            (name, sign_note(self._methods[name], side, *count, named=named))
            for (name, side), count in self._crossed.items()
        ]
        return [(name, sentence) for name, sentence in sentences if sentence]
