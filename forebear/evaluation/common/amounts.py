"""Numbers of rows from shares of rows, and the share of rows that two sets have in common."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from forebear.errors import InputError


def rows_of_share(share: str, n_rows: int) -> int:
    """Number of rows, floor(share x n_rows), exact in decimals: "0.29" of 100 rows are 29 rows.

    Raises:
        InputError: ``share`` is no number above 0 and at most 1.
    """
    try:
        value = Fraction(share)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise InputError(f"share {share!r}: expected a number above 0, at most 1, such as 0.1.")
    return int(value * n_rows)


def common_share(first: np.ndarray, second: np.ndarray) -> float:
    """Share of common rows, |A and B| / k, of two lists A and B of ``k`` different rows each."""
    return len(np.intersect1d(first, second)) / len(first)
