"""Callbacks by which long work reports its progress, and who hears of what a caller should know."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Listener:
    """Who hears of what is known before the work is done: that a fit is old, that labels are unknown.

    Attributes:
        warn: Called with a warning; None is no warning.
        note: Called with a subject and a note on it, which is less than a warning.
    """

    warn: Callable[[str | None], None]
    note: Callable[[str, str], None]


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within this context, :func:`tell_warning` and :func:`tell_note` go to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_warning(message: str | None) -> None:
    """Warn whoever listens; where nobody does, as Python does. None is no warning."""
    listener = _listener.get()
    (python_warning if listener is None else listener.warn)(message)


def tell_note(subject: str, message: str) -> None:
    """Give a note to whoever listens; where nobody does, notes are not given."""
    listener = _listener.get()
    if listener is not None:
        listener.note(subject, message)


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
