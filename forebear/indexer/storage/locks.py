"""Locks: who may change a folder, or write a file, at this moment.

A lock is the operating system's (flock) on a small file that names its owner, so it ends with the process that holds
it, however that process ends. The lock file of a killed process stays, but blocks nobody. Reading takes no lock.

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

_TRIES = 4  # asking who owns a lock takes it for a moment, so the first try may fail
_PAUSE_SECONDS = 0.05
_RACES = 1000  # lost to other owners in a row before this process gives up
_SOMEBODY = "another process"


@contextmanager
def exclusive(path: Path, target: str) -> Iterator[None]:
    """Hold a lock, or say who holds it.

    Args:
        path: The lock file. It and missing folders above it are made, and removed at the end if they are empty.
        target: Name of what is locked, for the message.

    Raises:
        InUseError: Another process holds it; its id and host are named.
        StorageError: The lock file cannot be made.
    """
    for tries_left in reversed(range(_TRIES)):
        with claimed(path, target) as owner:
            if owner is None:
                yield
                return
        if tries_left:
            time.sleep(_PAUSE_SECONDS)
    raise _in_use(target, owner)


def check_free(path: Path, target: str) -> None:
    """Refuse a target that another process is writing, before any other error about it; takes no lock.

    Raises:
        InUseError: Another process holds the lock.
    """
    if (owner := owner_of(path)) is not None:
        raise _in_use(target, owner)


def _in_use(target: str, owner: str | None) -> InUseError:
    return InUseError(f"{target} is being written by {owner}. Wait until it has ended, then run this command again.")


@contextmanager
def claimed(path: Path, target: str | None = None) -> Iterator[str | None]:
    """Hold a lock if it is free; yields None then, and otherwise the name of its owner.

    Args:
        path: The lock file.
        target: Name of what is locked, for messages; None: the lock file's path.

    Raises:
        StorageError: The lock file cannot be made.
    """
    new = [folder for folder in path.parents if not os.path.lexists(folder)]  # the innermost first
    try:
        file, owner = _open(path, target or str(path))
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
        with suppress(OSError):  # a folder that is not empty stays
            for folder in new:
                folder.rmdir()


def owner_of(path: Path) -> str | None:
    """The name of the process that holds a lock, for messages; None if nobody does."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return _try(file, fcntl.LOCK_SH)  # shared, so that several processes may ask at the same time
    except OSError:
        return None


def _open(path: Path, target: str) -> tuple[IO[str], str | None]:
    """Open the lock file and try to lock it; returns the file, and the owner's name if another process has the lock.

    The last owner may remove the file after it was opened and before it is locked. A lock on a removed file excludes
    nobody, so the new file under ``path`` is opened then.
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
                    f"cannot write {target}: its lock file {path} cannot be opened ({error.strerror}). Remove that "
                    "file, if no other forebear is at work there."
                ) from error
            reason = error.strerror
            break
        if (owner := _try(file)) is not None:
            return file, owner
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, None
        file.close()
    raise StorageError(f"cannot write {target}: {reason}. Nothing has changed. Choose a place that you may write to.")


def _try(file: IO[str], kind: int = fcntl.LOCK_EX) -> str | None:
    """Try to lock an open file; returns the owner's name if another process has locked it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.readline().strip() or _SOMEBODY
    except OSError:  # a file system without locks: go on unprotected
        return None
    return None
