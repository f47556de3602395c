"""Which shards a process writes: those that no other process has claimed.

A claim is a lock of the operating system on a small file, one for each shard and stage, so it ends with its process.
No process waits for another: a shard depends on what was fitted and on its own rows alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from forebear.errors import InputError
from forebear.indexer.storage.layout import CLAIMS
from forebear.indexer.storage.locks import check_free, claimed, owner_of


@dataclass(frozen=True)
class Claims:
    """The claims of one process on the shards of an index.

    Attributes:
        folder: The index, where several processes write it; None where this process writes alone and claims nothing.
    """

    folder: Path | None = None

    @property
    def shared(self) -> bool:
        """Whether other processes write shards, too."""
        return self.folder is not None

    @contextmanager
    def take(self, stage: str, shard: int, is_written: Callable[[], bool]) -> Iterator[bool]:
        """Claim a shard while the context lasts; yields whether this process is to write it.

        Args:
            stage: Name of the stage, which may be that of a folder.
            shard: Number of the shard.
            is_written: Says whether the shard is written already.
        """
        if self.folder is None or is_written():
            yield not is_written()
            return
        with claimed(_lock(self.folder, stage, shard)) as owner:
            yield owner is None and not is_written()  # another process may have written it before this claim


@contextmanager
def claims_folder(folder: Path) -> Iterator[None]:
    """The folder of all claims on the shards of an index; it goes with the last claim.

    Raises:
        InputError: The file system has no locks, without which two processes would write the same shard.
    """
    place = folder / CLAIMS
    place.mkdir(parents=True, exist_ok=True)
    try:
        probe = place / f"probe-{socket.gethostname()}-{os.getpid()}.lock"
        with claimed(probe), claimed(probe) as owner:
            if owner is None:
                raise InputError(
                    f"the file system of {folder} has no locks (flock), by which several processes divide the rows. "
                    "Name one device by --device, or write the index to another disk."
                )
        yield
    finally:
        for left in place.glob("*.lock"):  # by killed processes
            if owner_of(left) is None:
                left.unlink(missing_ok=True)
        with suppress(OSError):  # others have claims
            place.rmdir()


def part_lock(folder: Path, part: str) -> Path:
    """The lock file that a process holds while it writes a part of an index, such as ``3/8``."""
    return folder / CLAIMS / f"part-{part.replace('/', '-of-')}.lock"


def refuse_parts_under_way(folder: Path) -> None:
    """Refuse to go on while a process writes a part of an index in this folder.

    Raises:
        InUseError: One does.
    """
    for lock in sorted((folder / CLAIMS).glob("part-*.lock")):
        check_free(lock, f"{lock.stem.replace('-of-', '/').replace('-', ' ')} of {folder}")


def _lock(folder: Path, stage: str, shard: int) -> Path:
    return folder / CLAIMS / f"{stage.replace('/', '.')}-{shard:05d}.lock"
