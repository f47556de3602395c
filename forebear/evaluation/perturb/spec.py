"""What a perturbation is asked for, and what it changes: aims, strategies, test rows, changes (Joint, 4.2 and 4.3).

A test row's salient word is the one whose saliency s for a label is largest. Training rows that influence s most get
one word replaced, so that s moves the wanted way; the rows then stand in for the old ones (``attack``) or beside them
(``fix``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forebear.errors import InputError
from forebear.indexer.model.forward import run_forward
from forebear.indexer.spans.text import Span
from forebear.retriever.question.spec import RECALL, QuerySpec
from forebear.retriever.retriever import Retriever

What = Literal["attack", "fix"]
RANDOM = "random"
SALIENCY_IF = "saliency-if"


@dataclass(frozen=True)
class Aim:
    """What a substitution is for.

    Attributes:
        name: As given to ``--strategy``.
        of: The label whose salient word is meant: the gold one, or the most probable other one.
        sign: +1 to raise that word's saliency, -1 to lower it.
        proponents: Take the training rows that raise it most, or else those that lower it most.
    """

    name: str
    of: Literal["right", "wrong"]
    sign: int
    proponents: bool = True


LOWER_RIGHT, RAISE_WRONG = Aim("lower-right", "right", -1), Aim("raise-wrong", "wrong", 1)
# A fix adds rows: those that lower a saliency are at the other end.
RAISE_RIGHT, LOWER_WRONG = Aim("raise-right", "right", 1), Aim("lower-wrong", "wrong", -1, proponents=False)
# Several aims take turns, one row after the other.
STRATEGIES: dict[What, dict[str, tuple[Aim, ...]]] = {
    "attack": {
        "lower-right": (LOWER_RIGHT,),
        "raise-wrong": (RAISE_WRONG,),
        "combined": (LOWER_RIGHT, RAISE_WRONG),
    },
    "fix": {"raise-right": (RAISE_RIGHT,), "lower-wrong": (LOWER_WRONG,), "combined": (RAISE_RIGHT, LOWER_WRONG)},
}


@dataclass(frozen=True, kw_only=True)
class PerturbSpec:
    """Every choice that decides which words are replaced.

    Attributes:
        what: ``attack`` replaces rows by changed ones, with synonyms; ``fix`` adds changed rows, antonyms too.
        strategies: Names from :data:`STRATEGIES`.
        rows: Rows changed for each test row, ascending.
        random_words: Words tried in each row beside the one of largest ``saliency-if-token`` (the paper's T).
        seed: Of these.
        scope: Of the gradients, as for ``saliency-if``; so are the next three.
        curvature: See :class:`~forebear.retriever.question.inverse.CurvatureSpec`.
        damping: See there.
        recall: See :class:`~forebear.retriever.question.spec.QuerySpec`.
    """

    what: What
    strategies: tuple[str, ...]
    rows: tuple[int, ...] = (1, 2, 6)
    random_words: int = 5
    seed: int = 0
    scope: str = "head"
    curvature: str | None = None
    damping: str | None = None
    recall: float = RECALL

    @property
    def most(self) -> int:
        """The largest number of rows changed for a test row."""
        return self.rows[-1]

    @property
    def question(self) -> QuerySpec:
        """What the retriever is asked for."""
        return QuerySpec(
            methods=(SALIENCY_IF,), scope=self.scope, curvature=self.curvature, damping=self.damping, recall=self.recall
        )

    def check(self) -> None:
        """Refuse values that mean nothing."""
        known = STRATEGIES[self.what]
        unknown = [name for name in self.strategies if name not in known]
        if unknown or not self.strategies:
            raise InputError(f"--strategy {' '.join(unknown)}: expected one or more of {', '.join(known)}.")
        if not self.rows or self.rows[0] < 1 or list(self.rows) != sorted(set(self.rows)):
            raise InputError(
                f"--rows {','.join(map(str, self.rows))}: expected numbers from 1 up, ascending.", of="perturb attack"
            )
        if self.random_words < 0:
            raise InputError(f"--random-words {self.random_words}: expected 0 or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: expected 0 or more.")
        self.question.check()


@dataclass(frozen=True)
class PerturbationQueries:
    """Test rows whose prediction is to be changed.

    Attributes:
        numbers: Of the rows in their file, ``(q,)``.
        texts: One list a text column.
        right: Gold classes, ``(q,)``.
        wrong: The most probable class that is not the gold one, ``(q,)``.
        predictions: Of the indexed model, ``(q,)``.
    """

    numbers: np.ndarray
    texts: list[list[str]]
    right: np.ndarray
    wrong: np.ndarray
    predictions: np.ndarray

    def targets(self, aim: Aim) -> np.ndarray:
        """The class whose salient word is meant, ``(q,)``."""
        return self.right if aim.of == "right" else self.wrong

    def take(self, at: np.ndarray) -> PerturbationQueries:
        """Some of them."""
        texts = [[column[i] for i in at] for column in self.texts]
        return PerturbationQueries(self.numbers[at], texts, self.right[at], self.wrong[at], self.predictions[at])


def make_queries(retriever: Retriever, texts: Sequence[Sequence[str]], gold: np.ndarray) -> PerturbationQueries:
    """All rows of a test set as queries.

    Args:
        retriever: Whose model says which label is the wrong one.
        texts: One list a text column.
        gold: Class ids, ``(n,)``.
    """
    forward = run_forward(retriever.classifier(), texts)
    others = forward.logits.copy()
    others[np.arange(len(gold)), gold] = -np.inf
    columns = [list(column) for column in texts]
    return PerturbationQueries(np.arange(len(gold)), columns, gold, others.argmax(axis=1), forward.predictions)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One word of one training row replaced.

    Attributes:
        query: Number of the test row it is for; None: a random change.
        aim: Its name, or ``random``.
        salient: The word of the test row whose saliency is to be moved.
        row: Training row number.
        label: Its class.
        span: Where the word stood.
        word: What stood there.
        substitute: What stands there now.
        old: Texts of the row, in order of encoding.
        new: The same after the change.
        score: v . g_old, the row's ``saliency-if``; None for a random change.
        effect: v . (g_new - g_old): positive raises the salient word's saliency; None for a random change.
    """

    query: int | None
    aim: str
    salient: Span | None
    row: int
    label: int
    span: Span
    word: str
    substitute: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    score: float | None
    effect: float | None
