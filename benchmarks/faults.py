"""Commands run with a fault: killed, held up, or out of disk space at their n-th operation on files below a folder.

Commands run in forked children of a process that has imported everything, so that one takes little more than its work.
An operation is what changes a file system: opening for writing, writing, fsync, reserving space, renaming, removing,
making a folder. A kill comes right before one; before a write half of it is written first.
"""

from __future__ import annotations

import builtins
import errno
import gc
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
TAKES_SPACE = ("open", "write", "fsync", "reserve", "os.mkdir")
MODULES = (
    "forebear.cli.main",
    "forebear.indexer.building.build",
    "forebear.retriever.retriever",
    "forebear.evaluation.retraining.removal",
    "forebear.evaluation.perturb.experiment",
    "forebear.evaluation.reports.report",
    "forebear.indexer.training.fine_tuning",
    "faiss",
    "transformers",
)


@dataclass(frozen=True)
class Fault:
    """What happens at one operation.

    Attributes:
        kind: ``count``: nothing; ``kill``; ``full``: from there on nothing that takes space succeeds; ``hold``: stop
            until continued; ``kill after``: killed after ``at`` seconds, wherever it is; ``clock``: time runs
            backwards, from the start.
        at: Number of the operation, from 1; or seconds.
        root: Operations below this folder count.
    """

    kind: str
    at: float
    root: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; minus the signal where one ended it.
        out: Its standard output.
        err: Its standard error.
        n_operations: On files below the fault's root, where it was not killed.
    """

    code: int
    out: str
    err: str
    n_operations: int


class _Operations:
    """Counts operations below a folder, and lets the fault happen."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.n, self.prefix = fault, 0, str(fault.root)
        self.busy = False

    def step(self, what: str, path: Any, half: Callable[[], None] | None = None) -> None:
        if self.busy or (path is not None and not os.fsdecode(path).startswith(self.prefix)):
            return
        self.n += 1
        if self.fault.kind == "full" and self.n >= self.fault.at and what in TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if path is None else os.fsdecode(path))
        if self.n != self.fault.at:
            return
        if self.fault.kind == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.kind == "hold":
            os.kill(os.getpid(), signal.SIGSTOP)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes, os.PathLike)) and flags & WRITING:
                self.step("open", path)
        elif event in CHANGING and isinstance(args[0], (str, bytes, os.PathLike)):
            self.step(event, args[0])

    def install(self) -> None:
        real_open, real_fsync, real_reserve = io.open, os.fsync, os.posix_fallocate

        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            handle = real_open(file, mode, *args, **options)
            is_ours = isinstance(file, (str, bytes, os.PathLike)) and os.fsdecode(file).startswith(self.prefix)
            return _File(handle, self, file) if is_ours and set(mode) & set("wax+") else handle

        def fsync(descriptor: int) -> None:
            self.step("fsync", None)
            real_fsync(descriptor)

        def reserve(*args: int) -> None:
            self.step("reserve", None)
            real_reserve(*args)

        io.open = builtins.open = opened  # type: ignore[assignment]
        os.fsync, os.posix_fallocate = fsync, reserve  # type: ignore[assignment]
        sys.addaudithook(self.audit)


class _File:
    """An open file whose writes count."""

    def __init__(self, handle: Any, operations: _Operations, path: Any) -> None:
        self._handle, self._operations, self._path = handle, operations, path

    def write(self, data: Any) -> Any:
        def half() -> None:
            flat = data if isinstance(data, str) else memoryview(data).cast("B")
            self._handle.write(flat[: len(flat) // 2])
            self._handle.flush()

        self._operations.step("write", self._path, half)
        return self._handle.write(data)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def warm_up(*commands: Sequence[Any], scratch: Path, modules: Sequence[str] = MODULES) -> None:
    """Import these modules, and what commands import, so that children have it."""
    for name in modules:
        import_module(name)
    listed = scratch / "modules.txt"
    for command in commands:
        run(command, scratch=scratch, after=lambda: listed.write_text("\n".join(sys.modules)))
        for name in listed.read_text().splitlines():
            if name not in sys.modules and not name.startswith("_"):
                with suppress(Exception):
                    import_module(name)
    gc.collect()
    gc.freeze()  # no child looks for garbage among the libraries


def start(
    command: Sequence[Any], *, scratch: Path, fault: Fault | None = None, after: Callable[[], object] | None = None
) -> int:
    """Start a forebear command in a child; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(scratch / f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        from forebear.cli.main import run as run_command

        operations = None
        if fault is not None and fault.kind == "clock":
            _turn_the_clock_back()
        elif fault is not None and fault.kind != "kill after":
            operations = _Operations(fault)
            operations.install()
        code = run_command([str(part) for part in command])
        if operations is not None:
            operations.busy = True
            (scratch / f"{os.getpid()}.n").write_text(str(operations.n))
        if after is not None:
            after()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, scratch: Path) -> Ended:
    """Wait for a command."""
    _, status = os.waitpid(pid, 0)
    texts = {}
    for name in ("out", "err", "n"):
        path = scratch / f"{pid}.{name}"
        texts[name] = path.read_text(errors="replace") if path.exists() else ""
        path.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), texts["out"], texts["err"], int(texts["n"] or 0))


def run(
    command: Sequence[Any], *, scratch: Path, fault: Fault | None = None, after: Callable[[], object] | None = None
) -> Ended:
    """Run a forebear command in a child to its end."""
    pid = start(command, scratch=scratch, fault=fault, after=after)
    if fault is not None and fault.kind == "kill after":
        time.sleep(fault.at)
        os.kill(pid, signal.SIGKILL)
    return ended(pid, scratch)


def _turn_the_clock_back() -> None:
    """Let every look at the clock be an hour earlier than the one before."""
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    time.time = earlier
    time.time_ns = lambda: int(earlier() * 1e9)
