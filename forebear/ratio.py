"""Division where the divisor may be zero: lengths, counts and spreads."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def ratio(numerator: ArrayLike, denominator: ArrayLike, otherwise: float = 0.0) -> np.ndarray:
    """``numerator / denominator`` where the denominator is above zero, and ``otherwise`` elsewhere.

    Args:
        numerator: Dividend. The result has its floating type; for whole numbers it is float64.
        denominator: Divisor, broadcast against the numerator.
        otherwise: Result where the denominator is zero, negative or NaN.
    """
    dividend, divisor = np.asarray(numerator), np.asarray(denominator)
    dtype = dividend.dtype if np.issubdtype(dividend.dtype, np.floating) else np.float64
    out = np.full(np.broadcast_shapes(dividend.shape, divisor.shape), otherwise, dtype)
    return np.asarray(np.divide(dividend, divisor, out=out, where=divisor > 0))
