"""Division where there may be nothing to divide by."""

from __future__ import annotations

import numpy as np
import pytest

from forebear.numbers import divide


def test_quotients_are_numpys_where_the_denominator_is_above_0() -> None:
    above, below = np.array([[1.0, -2.0, 3.0]]), np.array([[4.0], [0.5]])
    np.testing.assert_array_equal(divide(above, below), above / below)


@pytest.mark.parametrize("otherwise", [0.0, 1.0, np.nan])
def test_nothing_to_divide_by_gives_the_value_asked_for(otherwise: float) -> None:
    found = divide([3, 5, 0, 7], [2, 0, 0, np.nan], otherwise)
    np.testing.assert_array_equal(found, [1.5, otherwise, otherwise, otherwise])


def test_the_precision_is_that_of_the_numerators() -> None:
    third = divide(np.array([1.0], np.float32), np.array([3.0]))
    assert third.dtype == np.float32
    assert third[0] == np.float32(1.0 / 3.0)
    assert divide(1.0, np.array([3.0], np.float32)).dtype == np.float64
    assert divide(np.array([1]), np.array([3])).dtype == np.float64
