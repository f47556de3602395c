"""``metasmoothness``: do a run's weights move along straight lines when the weights of training rows change?

It says how far a first-order answer through the run (``magic``) can reach: see
:mod:`forebear.indexer.training.replay.smoothness` for the formula, of Engstrom et al. (2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import INTERVAL_COLUMNS, interval_cells, listed_values
from forebear.evaluation.reports.report import Report, Table
from forebear.indexer.training.replay.smoothness import metasmoothness as smoothness_of_run
from forebear.progress import Progress, no_progress
from forebear.retriever.deep.through_run import recorded_run
from forebear.retriever.effects.smoothness import KEPT_SMOOTHNESS, keep_smoothness
from forebear.retriever.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class Metasmoothness:
    """The metasmoothness of a run.

    Attributes:
        values: One a set of rows, from -1 to 1, ``(d,)``.
        rows: Numbers of the rows of each set, ``(d, n)``.
        n_rows: Rows of the run.
    """

    values: np.ndarray
    rows: np.ndarray
    n_rows: int


def metasmoothness(
    retriever: Retriever,
    *,
    share: float,
    n_directions: int,
    seed: int,
    keep: bool = False,
    progress: Progress = no_progress,
) -> Metasmoothness:
    """Train the run again with some rows at half weight, and without them.

    Args:
        retriever: Over an index of the run.
        share: Share of the rows that are left out, drawn at random.
        n_directions: Number of such draws, of two trainings each.
        seed: Seed of the draws.
        keep: Whether the run's folder keeps the result, so that answers by ``magic`` say it.
        progress: Called with the stage, and the trainings done and in all.

    Raises:
        InputError: The share or the number mean nothing, or the run cannot be repeated.
        StorageError: The run's folder is to keep the result and cannot be written.
    """
    command = "evaluate metasmoothness"
    if not 0 < share < 1:
        raise InputError(f"--share {share:g}: expected a share above 0, below 1.", of=command)
    if n_directions < 1:
        raise InputError(f"--directions {n_directions}: expected at least 1.", of=command)
    recorded = recorded_run(retriever.models)
    if keep:
        KEPT_SMOOTHNESS.check(recorded.folder)
    n = len(recorded.labels)
    size = max(1, round(share * n))
    draws = [np.random.default_rng([seed, 23, i]).permutation(n)[:size] for i in range(n_directions)]
    rows = np.sort(np.stack(draws), axis=1)
    values = smoothness_of_run(recorded, list(rows), progress)
    if keep:
        keep_smoothness(recorded.folder, values, size, n, seed)
    return Metasmoothness(values=values, rows=rows, n_rows=n)


def metasmoothness_report(
    measured: Metasmoothness, retriever: Retriever, seed: int, command: str
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    d, size = measured.rows.shape
    table = Table(
        "Metasmoothness",
        ["rows left out", *INTERVAL_COLUMNS, "draws"],
        [[f"{size:,} of {measured.n_rows:,}", *interval_cells(measured.values, seed), d]],
        "Sum of |d + d'| sign(d) sign(d') over the sum of |d + d'|: d is how far each weight of the model moves where "
        "some rows, drawn at random, have half their weight in training, d' how far it moves on where they are left "
        "out. 1: on as it began; 0: unrelated; -1: the other way.",
    )
    mean = float(measured.values.mean())
    summary = (
        f"Metasmoothness {mean:.3f} on the way to a training without {size:,} of {measured.n_rows:,} rows: the nearer "
        "to 1, the further a first-order answer through the run (magic) can reach."
    )
    provenance = {
        "index": str(retriever.index.folder),
        "index digest": retriever.index.manifest.digest(),
        "seed": str(seed),
        "command": command,
    }
    result = {
        "metasmoothness": listed_values(measured.values),
        "training_rows": listed_values(measured.rows),
        "n_rows": measured.n_rows,
        "seed": seed,
    }
    return Report("Metasmoothness of the run", summary, [table], provenance=provenance), result
