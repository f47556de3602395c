"""Lists of different lengths laid end to end."""

from __future__ import annotations

import numpy as np


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where each of some consecutive stretches begins, and one past the last, ``(n + 1,)`` int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def stretches(starts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some of the stretches that begin at ``starts``, side by side: where each begins now, and its members."""
    counts = starts[which + 1] - starts[which]
    now = offsets(counts)
    return now, np.arange(now[-1]) + np.repeat(starts[which] - now[:-1], counts)
