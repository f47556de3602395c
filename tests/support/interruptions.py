"""A build broken off where a test wants it, and what it left on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Interrupted(BaseException):
    """As if the process had died: nothing in the package catches it."""


def interrupt_at(number: int) -> Callable[[str, int, int], None]:
    """A progress callback that dies at its n-th call."""
    calls = 0

    def progress(_stage: str, _done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Interrupted

    return progress
