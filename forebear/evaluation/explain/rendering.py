"""The HTML of an explanation, as one document.

Sign and strength of every mark are in its underline, its weight and the sign beside it, so that the page reads in black
and white; colour repeats them.
"""

from __future__ import annotations

from typing import Any

from forebear.evaluation.explain.marks import Piece
from forebear.evaluation.reports.report import page_template

_LONGEST_UNBROKEN = 30  # characters of a word that is kept on one line with the number beside it


def render_page(explanation: Any) -> str:
    """The whole page, as one self-contained HTML document."""
    page: str = page_template("explain.html.j2", number=_minus, hover=_hover).render(explanation=explanation)
    return page


def _minus(number: str) -> str:
    """A number with a true minus sign."""
    return number.replace("-", "\u2212")


def _hover(piece: Piece) -> dict[str, Any]:
    """HTML attributes of a marked piece: its class, and its value as the title shown under the pointer."""
    assert piece.value is not None
    side = "supports" if piece.value > 0 else "opposes" if piece.value < 0 else "zero"
    short = " short" if len(piece.text) <= _LONGEST_UNBROKEN else ""
    return {"class": f"{side} s{piece.level}{short}", "title": f"{_minus(f'{piece.value:+.4g}')}, {side}"}
