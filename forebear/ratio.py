"""Division where the divisor may be zero: lengths, counts and spreads."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def ratio(numerator: ArrayLike, denominator: ArrayLike, otherwise: float = 0.0) -> np.ndarray:
    """``numerator / denominator`` where the denominator is above zero, and ``otherwise`` elsewhere.

    Args:
        numerator: Its type is that of the result; of whole numbers the result is float64.
        denominator: Broadcast against it.
        otherwise: Where the denominator is zero, negative or NaN.
    """
    above, below = np.asarray(numerator), np.asarray(denominator)
    dtype = above.dtype if np.issubdtype(above.dtype, np.floating) else np.float64
    out = np.full(np.broadcast_shapes(above.shape, below.shape), otherwise, dtype)
    return np.asarray(np.divide(above, below, out=out, where=below > 0))
