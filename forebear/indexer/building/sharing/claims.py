"""Which shards a process writes: those that no other process has claimed.

A claim is a lock of the operating system on a small file, one for each shard and stage, so it ends with its process.
Shards are claimed in ascending order, and stages one after another. A process waits only for shards before the one it
has claimed, so of all processes the one with the earliest claim never waits.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forebear.errors import InputError
from forebear.indexer.storage.layout import CLAIMS
from forebear.indexer.storage.locks import claimed, owner_of

_PAUSE_SECONDS = 0.05  # between two looks for a shard of another process


class AbandonedShardError(Exception):
    """A shard that this process waits for is neither written nor claimed: the process that claimed it has ended."""


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

    def wait(self, stage: str, shards: Iterable[int], is_written: Callable[[int], bool]) -> None:
        """Wait until other processes have written shards; a process that writes alone has written them before.

        Raises:
            AbandonedShardError: One is not written, and nobody is writing it.
        """
        if self.folder is None:
            return
        for shard in shards:
            while not is_written(shard):
                if owner_of(_lock(self.folder, stage, shard)) is None and not is_written(shard):
                    raise AbandonedShardError(f"{stage}, shard {shard}")
                time.sleep(_PAUSE_SECONDS)


@contextmanager
def claims_folder(folder: Path) -> Iterator[None]:
    """The folder of all claims on the shards of an index; it goes at the end.

    Raises:
        InputError: The file system has no locks, without which two processes would write the same shard.
    """
    place = folder / CLAIMS
    place.mkdir(parents=True, exist_ok=True)
    try:
        probe = place / "probe.lock"
        with claimed(probe), claimed(probe) as owner:
            if owner is None:
                raise InputError(
                    f"the file system of {folder} has no locks (flock), by which several processes divide the rows. "
                    "Name one device by --device, or write the index to another disk."
                )
        yield
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _lock(folder: Path, stage: str, shard: int) -> Path:
    return folder / CLAIMS / f"{stage.replace('/', '.')}-{shard:05d}.lock"
