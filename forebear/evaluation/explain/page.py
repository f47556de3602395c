"""An explanation as one HTML file, which stands alone: no script, no network, no other file.

Sign and strength of every mark are in its underline, its weight and the sign beside it, so that the page reads in black
and white; colour repeats them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forebear.errors import InputError, OutputExistsError
from forebear.evaluation.explain.explanation import Explanation
from forebear.evaluation.explain.marks import Piece
from forebear.evaluation.reports.report import page_template
from forebear.indexer.storage.atomic import write_bytes

_LONGEST_UNBROKEN = 30  # characters of a word that is kept on one line with the number beside it


def check_page(path: Path, *, force: bool) -> None:
    """Refuse a page of another kind, or one that exists; for asking before any work.

    Raises:
        InputError: The name does not end in .html, or is that of a folder.
        OutputExistsError: The file is there and ``force`` is not given.
    """
    if path.suffix != ".html":
        raise InputError(f"--html {path}: expected a name ending in .html.")
    if path.is_dir():
        raise InputError(f"--html {path} is a folder. Give a file name.")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists. Give another --html, or --force to replace it.")


def write_page(explanation: Explanation, path: Path, *, force: bool = False) -> None:
    """Write the page; it appears complete, or not at all.

    Raises:
        InputError: See :func:`check_page`.
        OutputExistsError: The file is there and ``force`` is not given.
        StorageError: It cannot be written.
    """
    check_page(path, force=force)
    write_bytes(path, render_page(explanation).encode())


def render_page(explanation: Explanation) -> str:
    """The whole page, as one self-contained HTML document."""
    page: str = page_template("explain.html.j2", number=_minus, hover=_hover).render(explanation=explanation)
    return page


def _minus(number: str) -> str:
    """A number with a true minus sign."""
    return number.replace("-", "\u2212")


def _hover(piece: Piece) -> dict[str, Any]:
    """Attributes of a marked piece: its looks, and its value for whoever points at it."""
    assert piece.value is not None
    side = "supports" if piece.value > 0 else "opposes" if piece.value < 0 else "zero"
    short = " short" if len(piece.text) <= _LONGEST_UNBROKEN else ""
    return {"class": f"{side} s{piece.level}{short}", "title": f"{_minus(f'{piece.value:+.4g}')}, {side}"}
