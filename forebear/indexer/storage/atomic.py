"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from forebear.errors import StorageError, is_out_of_memory

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under ``path`` complete and synced, or not at all.

    Raises:
        StorageError: The disk is full or the path cannot be written; nothing is left behind.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # its parent may be a file, not a folder
            temporary.unlink(missing_ok=True)
        if is_out_of_memory(error):
            raise
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Nothing that was there has changed. "
            + (
                "Free some space and run this again (forebear index and retrieve go on by --resume), or choose another "
                "place."
                if error.errno == errno.ENOSPC
                else "Choose a place that you may write to."
            )
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    with atomic_file(path) as handle:
        handle.write(content)


def write_together(folder: Path, contents: Mapping[str, bytes], instead_of: Iterable[str] = ()) -> None:
    """Write files that belong together, such as a page and its numbers: old ones never lie beside new ones.

    All are complete and synced under temporary names before the first takes its place. Then the old files go, and the
    new ones get their names: a process that is killed in between leaves fewer files than belong together, never a
    mixture of two sets.

    Args:
        folder: Made if missing; other files in it are left alone.
        contents: What each file holds, by its name.
        instead_of: Names of further old files, which go.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    temporaries = {name: folder / (name + TEMPORARY_SUFFIX) for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with temporaries[name].open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        for name in (*contents, *instead_of):
            (folder / name).unlink(missing_ok=True)
        for name, temporary in temporaries.items():
            temporary.replace(folder / name)
        sync(folder)
    except OSError as error:
        if is_out_of_memory(error):
            raise
        reason = error.strerror or error
        raise StorageError(
            f"cannot write {', '.join(contents)} to {folder}: {reason}. Name a folder that you may write to, on a disk "
            "that has space."
        ) from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # its parent may be a file, not a folder
                temporary.unlink(missing_ok=True)
