"""Locks: who may change a folder, or write a file, at this moment.

A lock is the operating system's (flock) on a small file that names its owner, so it ends with the process that holds
it, however that ends; the file of a process that was killed stays, and stands in nobody's way. Reading takes no lock.

The ``filelock`` package does not name the owner of such a lock, cannot ask for it without taking it, and leaves its
file and the folder made for it behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from forebear.errors import InUseError, StorageError

_TRIES = 4  # whoever asks whether a lock is held holds it for a moment
_PAUSE_SECONDS = 0.05
_RACES = 1000  # lost to other owners one after the other
_SOMEBODY = "another process"


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock, or say who holds it.

    Args:
        path: The lock file; it and its folder are made, and what was made goes again if it is empty.
        what: What is locked, for the message.

    Raises:
        InUseError: Another process holds it; its id and host are named.
        StorageError: The lock file cannot be made.
    """
    for left in reversed(range(_TRIES)):
        with claimed(path, what) as owner:
            if owner is None:
                yield
                return
        if left:
            time.sleep(_PAUSE_SECONDS)
    raise _in_use(what, owner)


def check_free(path: Path, what: str) -> None:
    """Refuse what another process is writing, before anything else is said of it; takes no lock.

    Raises:
        InUseError: Another process holds the lock.
    """
    if (owner := owner_of(path)) is not None:
        raise _in_use(what, owner)


def _in_use(what: str, owner: str | None) -> InUseError:
    return InUseError(f"{what} is being written by {owner}. Wait until it has ended, then run this command again.")


@contextmanager
def claimed(path: Path, what: str | None = None) -> Iterator[str | None]:
    """Hold a lock if it is free: None then, else its owner in words.

    Args:
        path: The lock file.
        what: What is locked, for messages; None: the file.

    Raises:
        StorageError: The lock file cannot be made.
    """
    new = [folder for folder in path.parents if not os.path.lexists(folder)]  # the innermost first
    try:
        file, owner = _open(path, what or str(path))
        try:
            if owner is not None:
                yield owner
                return
            with suppress(OSError):  # a full disk: the lock holds without its owner's name
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            try:
                yield None
            finally:
                path.unlink(missing_ok=True)
        finally:
            with suppress(OSError):
                file.close()
    finally:
        with suppress(OSError):  # not empty: that was the purpose
            for folder in new:
                folder.rmdir()


def owner_of(path: Path) -> str | None:
    """Who holds a lock, in words; None: nobody."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return _try(file, fcntl.LOCK_SH)  # others may look at the same time
    except OSError:
        return None


def _open(path: Path, what: str) -> tuple[IO[str], str | None]:
    """Open the file under ``path`` and try its lock, once; with the owner in words if another process has it.

    Its last owner may have removed the file between the two: a lock on it holds nothing off, and the file that is under
    ``path`` by then is opened.
    """
    reason: str | None = "other processes lock and release it all the time"
    for _ in range(_RACES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError as error:  # the folder went with its last owner
            reason = error.strerror
            continue
        except OSError as error:
            if error.errno != errno.EROFS and os.path.lexists(path):
                raise StorageError(
                    f"cannot write {what}: its lock file {path} cannot be opened ({error.strerror}). Remove that file, "
                    "if no other forebear is at work there."
                ) from error
            reason = error.strerror
            break
        if (owner := _try(file)) is not None:
            return file, owner
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, None
        file.close()
    raise StorageError(f"cannot write {what}: {reason}. Nothing has changed. Choose a place that you may write to.")


def _try(file: IO[str], kind: int = fcntl.LOCK_EX) -> str | None:
    """Lock an open file; the owner in words if another process has."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.readline().strip() or _SOMEBODY
    except OSError:  # a file system without locks: no protection, no obstacle
        return None
    return None
