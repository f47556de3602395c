"""Class weights and label smoothing as users give them."""

from __future__ import annotations

import numpy as np
import pytest

from forebear.errors import InputError
from forebear.indexer.losses.choices import check_loss_choices, weights_of_classes

NAMES = ("bad", "fair", "good")
N_ROWS = np.array([60, 30, 10])


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ((), ()),
        ("none", ()),
        (("1", "1", "1"), ()),
        (("0.5", "2", "1e1"), (0.5, 2.0, 10.0)),
        ([0.5, 2, 1], (0.5, 2.0, 1.0)),
        ("balanced", (100 / 180, 100 / 90, 100 / 30)),
        (("balanced",), (100 / 180, 100 / 90, 100 / 30)),
    ],
)
def test_weights_are_numbers_in_the_order_of_the_classes(given, weights):
    assert weights_of_classes(given, NAMES, N_ROWS, "rows.csv") == pytest.approx(weights)


@pytest.mark.parametrize("given", ["even", (1, "x"), (1, 0, 1), (1, -2, 1), (1, float("inf"), 1), ("balanced", 1)])
def test_weights_that_are_no_positive_numbers_are_refused(given):
    with pytest.raises(InputError, match="expected balanced, none, or a positive number for each class"):
        check_loss_choices(given, 0.0)


def test_another_number_of_weights_than_classes_is_refused_with_the_classes():
    with pytest.raises(InputError, match=r"2 number\(s\); the model has 3 classes, bad, fair, good"):
        weights_of_classes((1, 2), NAMES, N_ROWS, "rows.csv")


def test_a_class_without_rows_has_no_balanced_weight():
    with pytest.raises(InputError, match=r"no row of rows\.csv is of class fair"):
        weights_of_classes("balanced", NAMES, np.array([3, 0, 2]), "rows.csv")


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(InputError, match="expected a number from 0 up to, but below, 1"):
        check_loss_choices((), smoothing)
