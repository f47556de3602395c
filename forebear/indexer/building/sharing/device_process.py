"""A process that writes shards on one device, started by :mod:`~forebear.indexer.building.sharing.processes`.

It is a new interpreter, because a fork is not safe once torch has run. It is not one of ``multiprocessing``, which
would run the caller's script once more in each process.
"""

from __future__ import annotations

import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebear.indexer.building.sharing.claims import Claims
from forebear.indexer.building.sharing.ending import end_with
from forebear.progress import Listener, heard_by
from forebear.wording import at_command_line

if TYPE_CHECKING:
    import numpy as np

    from forebear.indexer.building.options import Work
    from forebear.indexer.building.sharing.shard_rows import ShardRows
    from forebear.indexer.rows.row_source import RowBlock


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to do.

    Attributes:
        write: Writes the shards that nobody has claimed; called with the work, the claims and the rows.
        folder: The index.
        device: Device of this process.
        at_command_line: Whether messages name options as the command line does.
    """

    write: Callable[[Work, Claims, ShardRows], None]
    folder: Path
    device: str
    at_command_line: bool


@dataclass(frozen=True)
class _AskedRows:
    """Rows that the first process reads and sends, so that a source is read once, whatever it is."""

    connection: Connection

    def block(self, number: int) -> tuple[RowBlock, np.ndarray]:
        """Rows of a shard and their targets, see :class:`~forebear.indexer.building.sharing.shard_rows.ShardRows`."""
        self.connection.send(("block", number))
        block: tuple[RowBlock, np.ndarray] = self.connection.recv()
        return block


def main() -> None:
    """Do the task that comes through a connection; arguments: its file descriptor, the id of the first process."""
    end_with(int(sys.argv[2]))
    connection = Connection(int(sys.argv[1]))
    try:
        _do(connection.recv(), connection)
    except Exception as error:
        connection.send(("error", _sendable(error), traceback.format_exc()))
        return
    connection.send(("done",))


def _do(task: Task, connection: Connection) -> None:
    """Write shards; progress and warnings go to the first process."""
    from forebear.indexer.building.options import Work

    def warn(message: str | None) -> None:
        if message is not None:
            connection.send(("warning", message))

    def warn_as_python(message: Warning | str, category: type[Warning], *_place: Any, **_places: Any) -> None:
        connection.send(("python warning", str(message), category))

    def note(subject: str, message: str) -> None:
        connection.send(("note", subject, message))

    def progress(stage: str, done: int, total: int) -> None:
        connection.send(("progress", stage, done, total))

    warnings.showwarning = warn_as_python
    work = Work(warn=warn, progress=progress, device=task.device)
    with at_command_line() if task.at_command_line else nullcontext(), heard_by(Listener(warn, note)):
        task.write(work, Claims(task.folder), _AskedRows(connection))


def _sendable(error: Exception) -> Exception:
    """An error as it can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))  # what this process has just written
    except Exception:  # whatever a library's own kind of error brings up
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
