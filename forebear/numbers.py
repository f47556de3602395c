"""Arithmetic that all layers share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def divide(numerators: npt.ArrayLike, denominators: npt.ArrayLike, otherwise: float = 0.0) -> np.ndarray:
    """Quotients, and ``otherwise`` where there is nothing to divide by: where the denominator is not above 0.

    Cosines with a zero vector, means over nothing and shares of nothing are such quotients.

    Args:
        numerators: Of any shape.
        denominators: Of a shape that broadcasts with it; lengths, counts and other numbers that are never below 0.
        otherwise: Value in place of a quotient by 0 (or by NaN), such as NaN for a mean over nothing.

    Returns:
        Of the shape that both broadcast to, in the precision of the numerators: float64 of integers.
    """
    above, below = np.asarray(numerators), np.asarray(denominators)
    precision = above.dtype if np.issubdtype(above.dtype, np.floating) else np.float64
    quotients = np.full(np.broadcast_shapes(above.shape, below.shape), otherwise, precision)
    np.divide(above, below, out=quotients, where=below > 0)
    return quotients
