"""Artifacts as numbers: a possible shortcut, such as lexical overlap, measured on the texts of each training row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from forebear.errors import DataError, InputError
from forebear.evaluation.audits.artifacts.lexical_overlap import lexical_overlap, premise_first
from forebear.indexer.index import Index
from forebear.indexer.spans.user_code import load_function

NEGATIONS = (
    "no", "not", "n't", "never", "none", "nobody", "nothing", "neither", "nor", "nowhere", "without", "cannot",
)  # fmt: skip
_WORDS = "|".join(word for word in NEGATIONS if word != "n't")
_NEGATION = re.compile(rf"(?<!\w)(?:{_WORDS})(?!\w)|n['’]t(?!\w)", re.IGNORECASE)
BLOCK_ROWS = 65_536
LARGEST = 1e100  # value of a feature: its square must be a number too


@dataclass(frozen=True)
class Feature:
    """A number for each row.

    Attributes:
        name: Name of the feature, such as "lexical overlap".
        description: How the feature is computed, for the report.
        of_rows: Function from texts (one list a text column) and row numbers to the feature's values ``(n,)``.
        words: Function from a row's texts to the words that show the feature; the report marks them.
    """

    name: str
    description: str
    of_rows: Callable[[Sequence[Sequence[str]], np.ndarray], np.ndarray]
    words: Callable[[Sequence[str]], Set[str]] = lambda _texts: frozenset()


def overlap_feature(text_columns: Sequence[str]) -> Feature:
    """Lexical overlap of pairs, in [0, 1].

    Raises:
        InputError: The rows are single texts.
    """
    if len(text_columns) != 2:
        raise InputError(f"lexical overlap is of pairs of texts; the index was built from {', '.join(text_columns)}.")
    first, second = premise_first(text_columns, text_columns)
    return Feature(
        "lexical overlap",
        f"share of the word types of {second!r} that occur in {first!r}, lower-cased, split at white space",
        lambda texts, _rows: lexical_overlap(*premise_first(texts, text_columns)),
        lambda texts: set(texts[0].lower().split()) & set(texts[1].lower().split()),
    )


def negation_feature(text_columns: Sequence[str], column: str | None = None) -> Feature:
    """1.0 where a text holds a word of ``NEGATIONS``, else 0.0.

    Args:
        text_columns: Text columns of the index.
        column: The column whose text is searched; None: the last column, or of pairs the hypothesis, which is known by
            its name or else is the second column.

    Raises:
        InputError: There is no such column.
    """
    default = premise_first(text_columns, text_columns)[1] if len(text_columns) == 2 else text_columns[-1]
    name = default if column is None else column
    if name not in text_columns:
        raise InputError(f"--column {name!r}: the index was built from {', '.join(text_columns)}. Give one of them.")
    position = text_columns.index(name)
    return Feature(
        "negation",
        f"1 where {name!r} holds one of: {', '.join(NEGATIONS)}; else 0",
        lambda texts, _rows: np.array([float(has_negation(text)) for text in texts[position]]),
        lambda texts: {word for word in texts[position].split() if has_negation(word)},
    )


def has_negation(text: str) -> bool:
    """Whether a text holds a negation as a word of its own, in any case, or a word that ends in n't."""
    return _NEGATION.search(text) is not None


def user_feature(feature: str | Callable[[dict[str, str]], float], text_columns: Sequence[str]) -> Feature:
    """A feature from a user's function, which takes a row (a dictionary of its texts by column) and returns a number.

    Args:
        feature: The function, or ``FILE.py:function``.
        text_columns: Text columns of the index, the dictionary's keys.

    Raises:
        InputError: The function cannot be loaded; or, when the feature is computed, fails on a row or returns no
            finite number.
    """
    function = load_function(feature, "--feature") if isinstance(feature, str) else feature
    place = feature if isinstance(feature, str) else getattr(feature, "__name__", repr(feature))

    def values(texts: Sequence[Sequence[str]], rows: np.ndarray) -> np.ndarray:
        out = np.empty(len(rows))
        for i, row in enumerate(zip(*texts, strict=True)):
            try:
                value = function(dict(zip(text_columns, row, strict=True)))
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                raise InputError(
                    f"--feature {place} failed on training row {rows[i]} ({type(error).__name__}: {error}); it is "
                    f"called with a dictionary of the row's texts ({', '.join(text_columns)}) and must return a number."
                ) from error
            number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
            if not number or not -LARGEST <= value <= LARGEST:  # NaN is in no range
                shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:60]}..."
                raise InputError(
                    f"--feature {place} returned {shown} for training row {rows[i]}; expected a number from "
                    f"-{LARGEST:g} to {LARGEST:g}."
                )
            out[i] = value
        return out

    return Feature(place, f"what the function {place} returns", values)


def measure(index: Index, feature: Feature) -> np.ndarray:
    """The feature of every live training row, ``(n,)`` in the order of ``index.live``.

    Raises:
        DataError: All rows have the same value: nothing can depend on it.
    """
    live = index.live
    values = np.empty(len(live))
    for start in range(0, len(live), BLOCK_ROWS):
        rows = live[start : start + BLOCK_ROWS]
        values[start : start + len(rows)] = feature.of_rows(index.text_lists(rows), rows)
    if np.ptp(values) == 0.0:
        raise DataError(
            f"{feature.name} is {values[0]:g} in all {len(live)} live training rows of {index.folder}; expected a "
            "feature that differs between rows. Influence cannot go with it."
        )
    return values
