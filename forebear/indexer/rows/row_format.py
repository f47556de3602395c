"""How the rows of a file are read: its columns, label names, delimiter and encoding; runs and indexes remember it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forebear.errors import InputError

DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|", "pipe": "|", "space": " "}
_REMEMBERED = ("text_columns", "label_column", "label_names", "label_lists", "delimiter", "encoding")
VECTORS, NUMBERS = "vectors", "numbers"  # what lists of numbers are: a 0 or 1 for each label, or numbers of labels
# What a row's target is: one class, any number of labels, or numbers. The names are those of transformers' configs.
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
_SHORT = {"single-label": SINGLE_LABEL, "multi-label": MULTI_LABEL}


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows were read, to read other rows of the same kind likewise.

    A column is taken over where the other file has it, label names where its labels are numbers in their range, the
    delimiter where its header holds it, the encoding where it is no UTF-8.

    Attributes:
        owner: The run or index that remembers this, for messages: ``the run``.
        text_columns: One or two names, in order of encoding; empty: not known.
        label_column: The column of labels; or several, where each holds one label's 0 and 1.
        label_names: The names that integer labels index, where they have any.
        label_lists: What lists of numbers are, ``VECTORS`` or ``NUMBERS``; None where there were none.
        delimiter: What parts the values of a CSV or TSV file, where it was given.
        encoding: Of a text file, where it was given.
        problem_type: What the model takes a row's target for, one of ``PROBLEM_TYPES``; None: not known. It is not
            among what :meth:`stated` gives: the run and the index say it themselves.
    """

    owner: str = "the run"
    text_columns: tuple[str, ...] = ()
    label_column: str | tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    label_lists: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    problem_type: str | None = None

    def stated(self) -> dict[str, Any]:
        """What is known, as it is written to ``run.json`` and to the manifest of an index."""
        values = {name: getattr(self, name) for name in _REMEMBERED}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v not in (None, ())}

    @classmethod
    def of(cls, stated: Mapping[str, Any], owner: str, problem_type: str | None = None) -> RowFormat:
        """The format that :meth:`stated` gave."""
        values: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in stated.items() if n in _REMEMBERED
        }
        return cls(owner=owner, problem_type=problem_type, **values)


def problem_type_of(given: str) -> str:
    """The problem type that ``--problem-type`` names: as transformers has it, or ``multi-label``, ``single-label``.

    Raises:
        InputError: There is none of that name.
    """
    name = _SHORT.get(given, given)
    if name not in PROBLEM_TYPES:
        raise InputError(f"--problem-type {given!r}: expected single-label, multi-label or regression.")
    return name


def delimiter_of(given: str) -> str:
    """The character that ``--delimiter`` names: itself, or a name such as ``tab``.

    Raises:
        InputError: It is no single ASCII character, or one that CSV needs for something else.
    """
    sign = DELIMITERS.get(given.strip().lower() or given, given)
    if len(sign) != 1 or not sign.isascii() or sign in "\"'\r\n\0" or sign.isalnum():
        raise InputError(f"--delimiter {given!r}: expected one character, such as ';', or its name: tab, semicolon.")
    return sign


def encoding_of(given: str) -> str:
    """The name by which Python knows the text encoding that ``--encoding`` names.

    Raises:
        InputError: There is none of that name.
    """
    try:
        "".encode(given)
        b"".decode(given)
    except (LookupError, ValueError) as error:
        raise InputError(f"--encoding {given!r} is not known. Give utf-8, latin-1, cp1252 or utf-16.") from error
    return given.lower()
