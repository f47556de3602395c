"""Which dampings floating-point numbers can represent beside the eigenvalues.

A damping counts where it is not smaller than what rounding makes of an eigenvalue that is 0. At the head, whose matrix
is formed in float64, that is 2.2e-16 of the largest. Beyond it EK-FAC's eigenvalues are means of squared coordinates of
gradients: a coordinate in float32 carries 1.2e-7 of the gradient's length, its square 1.4e-14 of the largest
eigenvalue. With a smaller damping the solution is noise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError, MissingStoreError


def refuse_nil_damping(given: str, dtype: torch.dtype, scope: str) -> None:
    """Refuse a damping that cannot count whatever the eigenvalues are, before any of them is known.

    Args:
        given: Absolute, or relative to the mean eigenvalue, as ``0.1x``.
        dtype: Number type that the curvature of the scope is computed in.
        scope: Name of the scope, for the message.

    Raises:
        InputError: The damping is 0, or relative and below the rounding of the largest eigenvalue.
    """
    relative = given.endswith("x")
    value = float(given.removesuffix("x"))
    smallest = carried(dtype)
    if value == 0 or (relative and value < smallest):
        raise InputError(
            f"--damping {given}: nothing would be left of it in {_name(dtype)}, which scope {scope} is computed in. "
            f"Give {round_up(smallest)}x or more, such as 0.1x."
        )


def refuse_lost_damping(damping: float, largest: float, dtype: torch.dtype, scope: str) -> None:
    """Refuse a damping that is lost in rounding beside an eigenvalue.

    Args:
        damping: An absolute damping.
        largest: The largest eigenvalue of the scope's curvature, or a number that is not larger.
        dtype: Number type that the curvature is computed in.
        scope: Name of the scope, for the message.

    Raises:
        InputError: The damping is lost; the smallest that is not is named.
    """
    smallest = carried(dtype) * largest
    if damping < smallest:
        raise InputError(
            f"a damping of {damping:.3g} is lost in {_name(dtype)} beside the eigenvalues of scope {scope}, up to "
            f"{largest:.3g}. Give --damping {round_up(smallest)} or more."
        )


def carried(dtype: torch.dtype) -> float:
    """The smallest damping that counts, as a share of the largest eigenvalue; float32 holds squares, see the module."""
    eps = float(torch.finfo(dtype).eps)
    return eps if dtype == torch.float64 else eps**2


def round_up(number: float) -> str:
    """A positive number with two digits, not smaller than it is."""
    step = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{(math.floor(number / step) + 1) * step:.1e}"


def find_damping(stored: list[dict[str, Any]], given: str | None) -> int | None:
    """Position of the stored damping that ``given`` names, such as ``0.1x``; 0 by default, None if none is."""
    for i, facts in enumerate(stored):
        if given is None or given == facts["given"] or _same_number(given, facts["damping"]):
            return i
    return None


def stored_damping(stored: list[dict[str, Any]], given: str | None, holder: str) -> int:
    """Position of the stored damping that ``given`` names, such as ``0.1x``; 0 by default.

    Raises:
        MissingStoreError: None is; ``holder`` begins the message.
    """
    number = find_damping(stored, given)
    if number is not None:
        return number
    names = ", ".join(f"{facts['given']} (= {facts['damping']:.6g})" for facts in stored)
    raise MissingStoreError(
        f"{holder} at damping {names}, not {given}. "
        "Query with a stored one, or build the index with --damping naming both.",
        of="index",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_number(given: str, stored: float) -> bool:
    try:
        return bool(np.isclose(float(given), stored, rtol=1e-6, atol=0))
    except ValueError:
        return False
