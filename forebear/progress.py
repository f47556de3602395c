"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all
Tell = Callable[[str], None]  # a line for the user


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Say nothing."""


def counted(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Announce a stage of ``total`` rows; what is returned is told how many more are done."""
    done = 0

    def on_rows(n: int) -> None:
        nonlocal done
        done = min(total, done + n)
        progress(stage, done, total)

    progress(stage, 0, total)
    return on_rows


def ignore_warning(_message: str | None) -> None:
    """Say nothing."""


def say_nothing(_line: str) -> None:
    """Leave a line out."""
