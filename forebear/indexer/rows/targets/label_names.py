"""When two names of labels are the same, and which names say nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?[0-9]+")  # as a class name: its sign is no separator


def key_of(name: str) -> str:
    """What two spellings of a name have in common: case, "-", "_" and white space do not matter."""
    if re.fullmatch(NUMBER, name):
        return name
    key = re.sub(r"[-_\s]+", " ", name).strip().casefold()
    return "non entailment" if key in ("not entailment", "nonentailment") else key


def are_unnamed(model_names: Sequence[str]) -> bool:
    """Whether a model's class names are those that transformers makes up: LABEL_0, LABEL_1 and so on."""
    return all(re.fullmatch(r"label ?\d+", key_of(name)) for name in model_names)


def are_same(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists hold the same names, in any order."""
    return sorted(map(key_of, names)) == sorted(map(key_of, others))
