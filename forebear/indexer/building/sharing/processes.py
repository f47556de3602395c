"""One process a device: they write the shards of an index, and this one reads rows for them and hears of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, Any

from forebear.errors import ForebearError
from forebear.indexer.building.options import Work
from forebear.indexer.building.sharing.claims import Claims, claims_folder
from forebear.indexer.building.sharing.device_process import Task
from forebear.indexer.building.sharing.shard_rows import ShardRows
from forebear.progress import tell_note
from forebear.wording import is_at_command_line

_CODE = "import sys; sys.path[:] = {path!r}; from forebear.indexer.building.sharing.device_process import main; main()"
_SECONDS_TO_END = 10


def write_on_devices(
    write: Callable[[Work, Claims, ShardRows], None],
    folder: Path,
    work: Work,
    *,
    rows: ShardRows | None = None,
    written: Mapping[str, int] | None = None,
) -> None:
    """Let one process a device write shards that no other has claimed, until all have ended.

    Args:
        write: Writes shards, in another process: a function of a module, or a ``partial`` of one with arguments that
            can be pickled. It is called with the work, the claims and the rows there.
        folder: The index.
        work: Its devices, and receiver of warnings and progress, which is summed over the processes.
        rows: The rows that processes ask for; None if they ask for none.
        written: Rows that were written before, by stage.

    Raises:
        ForebearError: A process has ended before its work was done. Errors within a process are raised here as they
            were there. The other processes are ended, and what is written stays.
    """
    with claims_folder(folder), ExitStack() as ending:
        processes = []
        for device in work.devices:
            task = Task(write=write, folder=folder, device=device, at_command_line=is_at_command_line())
            processes.append(ending.enter_context(_process(task)))
        _Hearing(work, rows, written or {}).hear(processes)


@dataclass(frozen=True)
class _Process:
    """A process at work on a device."""

    device: str
    process: subprocess.Popen[bytes]
    connection: Connection
    messages: IO[bytes]  # what it and its libraries print on stderr

    def end_of_connection(self) -> ForebearError:
        """The error for a process that has ended without a word."""
        try:
            code = self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = 0
        if code < 0:
            how = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            how += ", as a system ends it that lacks memory" if code == -signal.SIGKILL else ""
        else:
            self.messages.seek(0)
            lines = self.messages.read().decode(errors="replace").strip().splitlines()
            how = f"exit code {code}" + (f": {lines[-1]}" if lines else "")
        return ForebearError(
            f"the process at work on {self.device} ended before its work was done ({how}). What was finished stays: "
            "give --resume to go on."
        )


@contextmanager
def _process(task: Task) -> Iterator[_Process]:
    """A process that does a task; it is ended with the context, if it has not ended by itself."""
    ours, theirs = Pipe()
    with tempfile.TemporaryFile() as messages, ours:
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable, *(f"-W{option}" for option in sys.warnoptions),
                    "-c", _CODE.format(path=sys.path), str(theirs.fileno()), str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL, stderr=messages, pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which ends the others
            )  # fmt: skip
        try:
            running = _Process(task.device, process, ours, messages)
            try:
                ours.send(task)
            except OSError:  # it has ended
                raise running.end_of_connection() from None
            yield running
        finally:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class _Hearing:
    """Answers processes, and says to the user what they say."""

    work: Work
    rows: ShardRows | None
    written: Mapping[str, int]
    _said: set[Any] = field(default_factory=set)  # what several processes warn of is said once
    _done: dict[str, dict[Connection, int]] = field(default_factory=dict)

    def hear(self, processes: list[_Process]) -> None:
        """Answer until all have done their work."""
        running = {process.connection: process for process in processes}
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    if self._answer(connection, connection.recv()):
                        del running[connection]
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    raise running[connection].end_of_connection() from None

    def _answer(self, connection: Connection, message: tuple[Any, ...]) -> bool:
        """Answer one message; returns whether it was the last one of its process."""
        kind, *content = message
        if kind == "block":
            assert self.rows is not None
            connection.send(self.rows.block(*content))
        elif kind == "progress":
            stage, done, total = content
            of_stage = self._done.setdefault(stage, {})
            of_stage[connection] = done
            self.work.progress(stage, min(total, self.written.get(stage, 0) + sum(of_stage.values())), total)
        elif kind == "error":
            error, traceback = content
            raise error from RuntimeError(f"in another process:\n{traceback}")
        elif kind != "done" and message not in self._said:
            self._said.add(message)
            says: dict[str, Callable[..., None]] = {
                "warning": self.work.warn,
                "python warning": warnings.warn,
                "note": tell_note,
            }
            says[kind](*content)
        return bool(kind == "done")
