"""Texts as cells of CSV files that people open in a spreadsheet."""

from __future__ import annotations

import re
from typing import Any

# What a spreadsheet takes for a formula, or does not show, at the beginning of a cell.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def guarded(text: str) -> str:
    """A text as a cell of a CSV file: an apostrophe goes before what a spreadsheet would take for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(cell: str) -> str:
    """The text of a cell that :func:`guarded` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def as_cell(value: Any) -> Any:
    """A value of a table as a cell: texts are guarded, numbers stay numbers, also those written as text."""
    if not isinstance(value, str):
        return "" if value is None else value
    try:
        float(value)
    except ValueError:
        return guarded(value)
    return value
