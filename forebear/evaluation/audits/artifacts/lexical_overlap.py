"""Lexical overlap of sentence pairs, and how sure a mean of such numbers is.

The overlap is that of Pezeshkpour et al. (2021): the share of the hypothesis' words that the premise
holds too. A model that answers "entailment" because of it follows a shortcut (McCoy et al., 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from forebear.errors import DataError
from forebear.evaluation.common.statistics import FloatArray

T = TypeVar("T")


def premise_first(texts: Sequence[T], columns: Sequence[str]) -> tuple[T, T]:
    """Two columns of texts as (premises, hypotheses): by their names where these say so, else in their order."""
    first, second = texts
    names = [name.casefold() for name in columns]
    return (second, first) if "hypothesis" in names[0] or "premise" in names[1] else (first, second)


def lexical_overlap(premises: Sequence[str], hypotheses: Sequence[str]) -> FloatArray:
    """Share of each hypothesis' word types that occur in its premise.

    Words are lower-cased and split at white space; punctuation stays attached, as in the released code
    of Pezeshkpour et al. Each word counts once, however often it occurs. A hypothesis without words has
    overlap 0.0: nothing of it was found in the premise.

    Args:
        premises: The first texts, ``n`` of them.
        hypotheses: The second texts, ``n`` of them.

    Returns:
        Values in [0, 1], ``(n,)``; never NaN.

    Raises:
        DataError: The two sequences differ in length, or a text is no string.
    """
    if len(premises) != len(hypotheses):
        raise DataError(
            f"{len(premises)} premises but {len(hypotheses)} hypotheses; expected one of each per row. "
            "Give both columns of the same rows."
        )
    values = np.zeros(len(premises), dtype=np.float64)
    for row, (premise, hypothesis) in enumerate(zip(premises, hypotheses, strict=True)):
        if not isinstance(premise, str) or not isinstance(hypothesis, str):
            raise DataError(
                f"row {row} has a premise of type {type(premise).__name__} and a hypothesis of type "
                f"{type(hypothesis).__name__}; expected two strings. Drop the row or fill in the text."
            )
        words = set(hypothesis.lower().split())
        if words:
            values[row] = len(words & set(premise.lower().split())) / len(words)
    return values
