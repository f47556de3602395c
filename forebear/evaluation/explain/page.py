"""An explanation as one HTML file, which stands alone: no script, no network, no other file."""

from __future__ import annotations

from pathlib import Path

from forebear.errors import InputError, OutputExistsError
from forebear.evaluation.explain.explanation import Explanation
from forebear.evaluation.explain.rendering import render_page
from forebear.indexer.storage.atomic import write_bytes


def check_page(path: Path, *, force: bool) -> None:
    """Refuse a path that no page can be written to; called before any work is done.

    Raises:
        InputError: The name does not end in .html, or names a folder.
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
