"""Lists of different lengths laid end to end."""

from __future__ import annotations

import numpy as np


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where each list begins when lists of these lengths are laid end to end, and the total, ``(n + 1,)`` int64.

    ``offsets([2, 3])`` is ``[0, 2, 5]``.
    """
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def stretches(starts: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose some of the lists that begin at ``starts``, and lay them end to end.

    Args:
        starts: From :func:`offsets`, ``(n + 1,)``.
        indices: Numbers of the chosen lists, ``(m,)``.

    Returns:
        Where each chosen list begins in the result, ``(m + 1,)``, and the positions of their members in the original.
    """
    counts = starts[indices + 1] - starts[indices]
    starts_taken = offsets(counts)
    return starts_taken, np.arange(starts_taken[-1]) + np.repeat(starts[indices] - starts_taken[:-1], counts)
