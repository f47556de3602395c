"""Seeded samples of rows."""

from __future__ import annotations

import numpy as np


def live_sample(live: np.ndarray, n_rows: int, seed: int) -> np.ndarray:
    """A seeded sample of row numbers, ascending; ``n_rows`` of 0, or above the number of live rows, gives all."""
    if not n_rows or n_rows >= len(live):
        return live
    return np.asarray(np.sort(np.random.default_rng([seed, 5]).permutation(live)[:n_rows]))
