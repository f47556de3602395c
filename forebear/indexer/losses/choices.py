"""Class weights and label smoothing as users give them: checked, and turned into numbers once the classes are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from forebear.errors import InputError

BALANCED = "balanced"
NONE = "none"
# One number a class, in the order of the model's class ids, or "balanced", or "none"; empty as "none".
GivenWeights = str | Sequence[float | str]


def check_loss_choices(class_weights: GivenWeights, label_smoothing: float) -> None:
    """Refuse values that mean nothing, as far as that takes no classes.

    Raises:
        InputError: What was found, and what is expected.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"--label-smoothing {label_smoothing}: expected a number from 0 up to, but below, 1.")
    numbers_of(class_weights)


def weights_of_classes(
    given: GivenWeights, class_names: Sequence[str], n_rows: np.ndarray, rows_name: str
) -> tuple[float, ...]:
    """The weight of each class.

    Args:
        given: As users give them.
        class_names: Names of the c classes, by id.
        n_rows: Training rows of each class, ``(c,)``.
        rows_name: Name of the training rows, for messages.

    Returns:
        c positive numbers, ``balanced`` being rows / (c x rows of the class), so that they are 1 in the mean over the
        rows; empty where all are 1.

    Raises:
        InputError: There are not c of them, or ``balanced`` is asked for and a class has no rows.
    """
    numbers = numbers_of(given)
    if numbers is None:
        if not n_rows.all():
            missing = ", ".join(class_names[i] for i in np.flatnonzero(n_rows == 0)[:3])
            raise InputError(
                f"--class-weights {BALANCED}: no row of {rows_name} is of class {missing}, so its weight would be "
                "infinite. Give the weights as numbers."
            )
        numbers = tuple((n_rows.sum() / (len(n_rows) * n_rows)).tolist())
    if numbers and len(numbers) != len(class_names):
        raise InputError(
            f"--class-weights has {len(numbers)} number(s); the model has {len(class_names)} classes, "
            f"{_listed(class_names)}. Give one number for each, in this order."
        )
    return () if all(number == 1 for number in numbers) else numbers


def numbers_of(given: GivenWeights) -> tuple[float, ...] | None:
    """The numbers given; None for ``balanced``.

    Raises:
        InputError: They are no positive numbers.
    """
    parts = [given] if isinstance(given, str) else list(given)
    if parts in ([], [NONE]):
        return ()
    if parts == [BALANCED]:
        return None
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(0 < number < math.inf for number in numbers):
        raise InputError(
            f"--class-weights {','.join(map(str, parts))}: expected {BALANCED}, {NONE}, or a positive number for each "
            "class, such as 1,2.5."
        )
    return numbers


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
