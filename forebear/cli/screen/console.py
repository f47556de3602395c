"""The terminal: progress and messages on stderr, answers on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperCommand

from forebear.errors import InputError


class _Console(Console):
    """A console that leaves it to the command to handle a broken pipe."""

    def on_broken_pipe(self) -> None:
        """Raise the error again; rich would end the process with exit code 1."""
        raise BrokenPipeError


SHOWN_CHARACTERS = 2000  # of a text, at most
OUT = _Console(highlight=False, soft_wrap=False)
ERR = Console(stderr=True, highlight=False)


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def be_quiet(asked: bool) -> bool:
    """Print neither news nor notes nor progress from now on, if that is asked: what ``--quiet`` means."""
    _quiet.set(asked)
    return asked


def say(message: str) -> None:
    """Print one line of news on stderr, unless ``--quiet`` is given."""
    if not _quiet.get():
        ERR.print(message, markup=False, soft_wrap=True)


def note(subject: str, message: str) -> None:
    """Print a note on the results of a method, of several methods or of an index, ``subject``, in one form for all."""
    say(f"note: {subject}: {message}")


def warn(message: str | None) -> None:
    """Print a warning on stderr, also with ``--quiet``; None prints nothing."""
    if message:
        ERR.print(f"warning: {message}", markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callable (stage, done, total) that draws a bar with rate and time left, in a terminal, without ``--quiet``."""
    if _quiet.get() or not ERR.is_terminal:
        yield lambda _stage, _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=ERR) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


ARGUMENTS = "forebear.arguments"  # in a context's ``meta``: what stands behind the command's name


class Command(TyperCommand):
    """A command whose list options take several values after one flag: ``--checkpoints A B C``."""

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, under the heading of the output options."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Output"
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, since the parser takes one value a flag."""
        ctx.meta[ARGUMENTS] = list(args)
        many = {o for p in self.params if getattr(p, "multiple", False) for o in p.opts}
        return super().parse_args(ctx, _repeat_flags(args, many))


def _repeat_flags(args: Sequence[str], many: set[str]) -> list[str]:
    out: list[str] = []
    flag = None
    for i, arg in enumerate(args):
        if arg.startswith("-") and len(arg) > 1:
            flag = arg if arg in many else None
        elif flag is not None and args[i - 1] != flag:
            out.append(flag)
        out.append(arg)
    return out


def listed(values: Sequence[str] | None) -> list[str]:
    """Values of a list option: several, or separated by commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def integers(option: str, values: Sequence[str] | None) -> list[int]:
    """Whole numbers of a list option."""
    given = listed(values)
    if not all(value.isascii() and value.isdigit() for value in given):
        raise InputError(f"{option} {','.join(given)}: expected whole numbers, such as 10,50.")
    return [int(value) for value in given]


def shortened(text: str) -> str:
    """The beginning of a long text, for the screen: laying out one long word takes time that grows with its square."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"


def is_terminal() -> bool:
    """Whether answers are printed to a terminal."""
    return sys.stdout.isatty()


def size(n_bytes: float) -> str:
    """A number of bytes as people read it, such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
