"""Where a step of a build works: in the folder that is named, or for a URL in one of this machine."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from forebear.errors import InputError
from forebear.indexer.storage.files import HUB, path_of, url_of


def place_of(
    step: Literal["begin", "write_part", "commit", "records"], out: str | Path, **how: Any
) -> AbstractContextManager[Path]:
    """The folder in which a step of a build works; of a URL one of this machine, which is sent there at the end.

    Args:
        step: The step; ``records`` reads what the others have left, without the rows.
        out: The folder, or a URL of ``fsspec``.
        **how: What the step does otherwise for it, see :mod:`forebear.hub.building`.

    Raises:
        InputError: The URL is one to which nothing can be written so, or cannot be reached.
    """
    if url_of(out) is None:
        return nullcontext(path_of(out))
    # Named, not imported: what sends and fetches is written in terms of this package.
    place: AbstractContextManager[Path] = getattr(_elsewhere(out), step)(str(out), **how)
    return place


def part_folders(folder: str | Path) -> list[Path]:
    """The folders of this machine that hold the parts of a folder: itself; of a URL one for each part."""
    if url_of(folder) is None:
        return [path_of(folder)]
    folders: list[Path] = _elsewhere(folder).part_folders(str(folder))
    return folders


def _elsewhere(out: str | Path) -> Any:
    if str(out).startswith(HUB):
        raise InputError(f"{out}: no index is built on a model hub. Build a folder, and publish it: forebear push.")
    return importlib.import_module("forebear.hub.building")
