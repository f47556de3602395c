"""The metasmoothness of a run, kept in its folder: what ``forebear evaluate metasmoothness --keep`` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forebear.indexer.storage.arrow import file_sha256
from forebear.indexer.training.run import RUN_NAME, SMOOTHNESS_NAME
from forebear.retriever.effects.kept_results import KeptResults


@dataclass(frozen=True, kw_only=True)
class KeptSmoothness:
    """The metasmoothness of a run; see :mod:`forebear.indexer.training.replay.smoothness` for the formula.

    Attributes:
        run_sha256: Digest of the record of the run.
        values: One a set of rows, drawn at random, on the way to a training without it.
        n_out: Rows of a set.
        n_rows: Rows of the run.
        seed: Seed of the draws.
    """

    run_sha256: str
    values: tuple[float, ...]
    n_out: int
    n_rows: int
    seed: int

    def __str__(self) -> str:
        n = len(self.values)
        draws = "1 random draw" if n == 1 else f"{n} random draws, {min(self.values):.3f} to {max(self.values):.3f}"
        mean = float(np.mean(self.values))
        return f"{mean:.3f} on the way to a training without {self.n_out:,} of {self.n_rows:,} rows ({draws})"


KEPT_SMOOTHNESS = KeptResults(
    SMOOTHNESS_NAME,
    version=1,
    command="evaluate metasmoothness",
    make=lambda one: KeptSmoothness(**one | {"values": tuple(one["values"])}),
    gives_way=lambda _earlier, _newer: True,
)


def keep_smoothness(folder: Path, values: np.ndarray, n_out: int, n_rows: int, seed: int) -> None:
    """Keep the metasmoothness of the run in a folder, in place of an earlier one.

    Args:
        folder: Of the run.
        values: One a set of rows, ``(d,)``.
        n_out: Rows of a set.
        n_rows: Rows of the run.
        seed: Seed of the draws.

    Raises:
        InUseError: Another process changes the folder.
        StorageError: The file cannot be written.
    """
    digest, listed = file_sha256(folder / RUN_NAME), tuple(values.tolist())
    result = KeptSmoothness(run_sha256=digest, values=listed, n_out=n_out, n_rows=n_rows, seed=seed)
    KEPT_SMOOTHNESS.keep(folder, [result])


def read_smoothness(folder: Path) -> KeptSmoothness | None:
    """The kept metasmoothness of the run in a folder; None where there is none, or of an earlier run there."""
    kept = KEPT_SMOOTHNESS.read(folder)
    return next((one for one in kept if one.run_sha256 == file_sha256(folder / RUN_NAME)), None)
