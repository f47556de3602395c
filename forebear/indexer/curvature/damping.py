"""Dampings: what is added to the eigenvalues of a curvature, and which of them floating-point numbers can represent.

A damping is a number, a multiple of the mean eigenvalue (``0.1x``) or a share of the largest one (``1%``). It counts
where it is not smaller than what rounding makes of an eigenvalue that is 0. At the head, whose matrix is formed in
float64, that is 2.2e-16 of the largest. Beyond it EK-FAC's eigenvalues are means of squared coordinates of gradients: a
coordinate in float32 carries 1.2e-7 of the gradient's length, its square 1.4e-14 of the largest eigenvalue. With a
smaller damping the solution is noise.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch

from forebear.errors import InputError, MissingStoreError


class Eigenvalues(Protocol):
    """What a relative damping is relative to."""

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all parameters of the scope."""

    @property
    def largest_eigenvalue(self) -> float:
        """The largest one."""


def is_relative(given: str) -> bool:
    """Whether a damping is relative to eigenvalues."""
    return given.endswith(("x", "%"))


def damping_number(given: str) -> float:
    """The number of a damping: absolute, times the mean eigenvalue (``0.1x``), or a share, .01 of ``1%``.

    Raises:
        InputError: None of these forms, negative, or not finite.
    """
    try:
        value = float(given[:-1] if is_relative(given) else given)
    except ValueError:
        value = float("nan")
    if not (math.isfinite(value) and value >= 0):
        raise InputError(
            f"damping {given!r}: expected a number >= 0 (absolute), such as 0.003, or a relative one, such as 0.1x (of "
            "the mean eigenvalue) or 1% (of the largest)."
        )
    return value / 100 if given.endswith("%") else value


def absolute_damping(given: str, eigenvalues: Eigenvalues) -> float:
    """What a damping adds to the diagonal.

    Raises:
        InputError: See :func:`damping_number`.
    """
    value = damping_number(given)
    if given.endswith("x"):
        return value * eigenvalues.mean_eigenvalue
    return value * eigenvalues.largest_eigenvalue if given.endswith("%") else value


def refuse_nil_damping(given: str, dtype: torch.dtype, scope: str) -> None:
    """Refuse a damping that cannot count whatever the eigenvalues are, before any of them is known.

    Args:
        given: Absolute or relative.
        dtype: Number type that the curvature of the scope is computed in.
        scope: Name of the scope, for the message.

    Raises:
        InputError: The damping is 0, or relative and below the rounding of the largest eigenvalue.
    """
    value, smallest = damping_number(given), carried(dtype)
    if value == 0 or (is_relative(given) and value < smallest):
        raise InputError(
            f"--damping {given}: nothing would be left of it in {_name(dtype)}, which scope {scope} is computed in. "
            f"Give {round_up(100 * smallest)}% or more, such as 1%."
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
    """Position of the stored damping that ``given`` names, such as ``1%``; 0 by default, None if none is."""
    for i, facts in enumerate(stored):
        if given is None or given == facts["given"] or _same_number(given, facts["damping"]):
            return i
    return None


def stored_damping(stored: list[dict[str, Any]], given: str | None, holder: str) -> int:
    """Position of the stored damping that ``given`` names, such as ``1%``; 0 by default.

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
    return not is_relative(given) and bool(np.isclose(damping_number(given), stored, rtol=1e-6, atol=0))
