"""Callbacks by which long work reports its progress."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all
Tell = Callable[[str], None]  # a line for the user


def no_progress(_stage: str, _done: int, _total: int) -> None:
    """Ignore progress: the default of functions that report it."""


def progress_of(progress: Progress | bool) -> Progress:
    """What is told how far work is: True stands for the usual bar, False for nothing."""
    if isinstance(progress, bool):
        return ProgressBar() if progress else no_progress
    return progress


def counted(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Announce a stage of ``total`` rows.

    Returns:
        A function that is called with the number of rows newly done, and reports their sum.
    """
    done = 0

    def on_rows(n: int) -> None:
        nonlocal done
        done = min(total, done + n)
        progress(stage, done, total)

    progress(stage, 0, total)
    return on_rows


def python_warning(message: str | None) -> None:
    """Warn as Python does; None is no warning."""
    if message is not None:
        warnings.warn(message, stacklevel=3)


def ignore_warning(_message: str | None) -> None:
    """Ignore a warning: the default of functions that warn."""


def say_nothing(_line: str) -> None:
    """Ignore a line for the user: the default of functions that print some."""


class ProgressBar:
    """The usual bar (tqdm), one a stage, as ``build_index(..., progress=True)``.

    It is drawn in a terminal and in a notebook; where a program's errors go to a file or a pipe, nothing is.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draw how far a stage is: rows done, and rows in all."""
        if not (sys.stderr.isatty() or _in_notebook()):
            return
        if stage not in self._bars:
            from tqdm.auto import tqdm

            self._bars[stage] = tqdm(desc=stage, total=total, unit=" rows", leave=True)
        bar = self._bars[stage]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            del self._bars[stage]


def _in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and "IPKernelApp" in running.config
