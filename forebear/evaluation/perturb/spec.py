"""The choices and the changes of a perturbation: aims, strategies, test rows, changes (Joint, 4.2 and 4.3).

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
    """The aim of a substitution.

    Attributes:
        name: Name of the aim, such as ``lower-right``.
        label: The label whose salient word is meant: the gold label (``right``), or the most probable other label.
        sign: +1 to raise that word's saliency, -1 to lower it.
        proponents: True to take the training rows that raise the saliency most, False for those that lower it most.
    """

    name: str
    label: Literal["right", "wrong"]
    sign: int
    proponents: bool = True


LOWER_RIGHT, RAISE_WRONG = Aim("lower-right", "right", -1), Aim("raise-wrong", "wrong", 1)
# A fix adds rows. Rows that lower a saliency stand at the other end of the ranking: they are opponents.
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
        random_words: Words tried in each row beside the word of largest ``saliency-if-token`` (T in the paper).
        seed: Random seed of these words.
        scope: Scope of the gradients of ``saliency-if``; curvature, damping and recall are of that method too.
        curvature: See :class:`~forebear.retriever.question.inverse.CurvatureSpec`.
        damping: See :class:`~forebear.retriever.question.inverse.CurvatureSpec`.
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
        """The choices of ``saliency-if``, which ranks the training rows."""
        return QuerySpec(
            methods=(SALIENCY_IF,), scope=self.scope, curvature=self.curvature, damping=self.damping, recall=self.recall
        )

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: A strategy is unknown, or a number is out of range.
        """
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
        numbers: Row numbers in their file, ``(q,)``.
        texts: One list a text column.
        right: Gold classes, ``(q,)``.
        wrong: The most probable class that is not the gold one, ``(q,)``.
        predictions: Classes that the indexed model predicts, ``(q,)``.
    """

    numbers: np.ndarray
    texts: list[list[str]]
    right: np.ndarray
    wrong: np.ndarray
    predictions: np.ndarray

    def targets(self, aim: Aim) -> np.ndarray:
        """The class whose salient word an aim is about, ``(q,)``."""
        return self.right if aim.label == "right" else self.wrong

    def take(self, positions: np.ndarray) -> PerturbationQueries:
        """The queries at some positions, ``(m,)``."""
        texts = [[column[i] for i in positions] for column in self.texts]
        return PerturbationQueries(
            self.numbers[positions], texts, self.right[positions], self.wrong[positions], self.predictions[positions]
        )


def make_queries(retriever: Retriever, texts: Sequence[Sequence[str]], gold: np.ndarray) -> PerturbationQueries:
    """All rows of a test set as queries.

    Args:
        retriever: Its model gives the predictions, and the most probable wrong label of each row.
        texts: One list a text column.
        gold: Class ids, ``(n,)``.
    """
    forward = run_forward(retriever.classifier(), texts)
    other_logits = forward.logits.copy()
    other_logits[np.arange(len(gold)), gold] = -np.inf
    columns = [list(column) for column in texts]
    return PerturbationQueries(np.arange(len(gold)), columns, gold, other_logits.argmax(axis=1), forward.predictions)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One word of one training row replaced.

    Attributes:
        query: Number of the test row that the change is for; None: a random change.
        aim: Name of the aim, or ``random``.
        salient: The word of the test row whose saliency is to be moved.
        row: Training row number.
        label: Class id of that row.
        span: Span of the replaced word in the old text.
        word: The replaced word.
        substitute: The word that replaces it.
        old: Texts of the row before the change, in order of encoding.
        new: Texts of the row after the change.
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
