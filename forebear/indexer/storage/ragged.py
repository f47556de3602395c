"""Lists of different lengths laid end to end."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where each list begins when lists of these lengths are laid end to end, and the total, ``(n + 1,)`` int64.

    ``offsets([2, 3])`` is ``[0, 2, 5]``.
    """
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


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


def owners(starts: np.ndarray) -> np.ndarray:
    """Number of the list that each member belongs to, ``(m,)``, of lists that begin at ``starts``."""
    return np.repeat(np.arange(len(starts) - 1), starts[1:] - starts[:-1])


def is_first(ascending: np.ndarray) -> np.ndarray:
    """Mask ``(m,)`` of the numbers that differ from the one before them."""
    mask = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=mask[1:])
    return mask


def distinct_of(numbers: np.ndarray) -> np.ndarray:
    """The distinct numbers, ascending; for few of them numpy's hash table takes longer."""
    ascending = np.sort(numbers)
    return np.asarray(ascending[is_first(ascending)])


def weighted_sums(lists: np.ndarray, weights: np.ndarray, places: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sums over the members of each list: weight times value, for ``q`` values a member by a sparse-dense product.

    Args:
        lists: Number of each member's list, ``(m,)``.
        weights: Weight of each member, ``(m,)`` float64.
        places: Row of ``values`` that each member stands for, ``(m,)``.
        values: ``(rows, q)`` float64.
        n: Number of lists.

    Returns:
        ``(n, q)`` float64.
    """
    if values.shape[1] == 1:  # what scipy checks takes longer than one sum a list
        return np.bincount(lists, weights * values[places, 0], minlength=n).astype(np.float64)[:, None]
    return np.asarray(sparse.coo_array((weights, (lists, places)), shape=(n, len(values))) @ values)
