"""Refinement of EK-FAC's H^-1 v by products with the curvature of batches of training rows (ASTRA, Wang et al. 2025).

EK-FAC sees each layer alone, as a Kronecker product; products H v see the whole matrix. From EK-FAC's own solution,
preconditioned steps against the gradient of x^T (H + damping I) x / 2 - v^T x lead to the solution for H itself:

    x <- x - rate P^-1 ((H_batch + damping I) x - v),    P: EK-FAC's matrix plus the damping

Every step takes other rows, so that all training rows play their part at the cost of a batch a step. The rate is found
on the way, and falls to zero, so that the noise of the batches averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.curvature.products import Product
from forebear.indexer.curvature.solvers import Multiply, Solved, axpy, finite, norm, scale_by, take, unit
from forebear.indexer.gradients.vectors import Vectors, dot
from forebear.indexer.model.device.copies import fetch

PROBED_BATCHES = 4  # on which the rate is found
POWER_STEPS = 4  # of the power method on each


@dataclass(frozen=True, kw_only=True)
class DescentSettings:
    """Choices of :func:`descend`.

    Attributes:
        batch_rows: Training rows a step.
        steps: Steps of each query.
    """

    batch_rows: int = 64
    steps: int = 100

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if min(self.batch_rows, self.steps) < 1:
            raise InputError(f"astra with {self}: expected batch_rows and steps of 1 or more.")

    @classmethod
    def parse(cls, given: str) -> DescentSettings:
        """``steps=200,batch_rows=128``; what is not given is the default.

        Raises:
            InputError: A name is not known, or a number cannot be read or is out of range.
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in given.split(","))):
            key, _, number = part.partition("=")
            if key not in names or not number.isdigit():
                raise InputError(
                    f"astra settings {given!r}: {part!r} is not understood. Give whole numbers for "
                    f"{' and '.join(names)}, as in steps=200,batch_rows=128."
                )
            values[key] = int(number)
        return cls(**values)

    def __str__(self) -> str:
        """The settings in the form that :meth:`parse` reads."""
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def descend(
    product: Product,
    vectors: Vectors,
    damping: float,
    *,
    precondition: Multiply,
    settings: DescentSettings,
    n_rows: int,
    seed: int = 0,
    tolerance: float = 0.1,
) -> Solved:
    """Solve (H + damping I) x = v approximately, from x = P^-1 v on, q right-hand sides at once.

    Args:
        product: V and positions of rows to H_batch V.
        vectors: v, ``(q, n_out, n_in)`` for each block; the queries share the batches.
        damping: Absolute, > 0.
        precondition: V to P^-1 V, P positive definite.
        settings: Steps, and rows a step; all rows, where there are not more.
        n_rows: Number of training rows of the product.
        seed: Random seed of the batches.
        tolerance: Largest residual of a converged query.

    Returns:
        The solutions, with the residual of a product over all rows. Where that is larger than the one of x = P^-1 v,
        the query's solution is P^-1 v itself, and its number of iterations 0.

    Raises:
        NonFiniteError: A vector or a product is NaN or infinite.
    """
    lengths, lengths_on_host, v = unit(vectors)
    is_whole = settings.batch_rows >= n_rows

    def shifted(x: Vectors, positions: list[int] | None) -> Vectors:
        return axpy(damping, x, product(x, positions))

    def residual_of(x: Vectors) -> np.ndarray:
        return fetch(norm(axpy(-1.0, shifted(x, None), v)))[0]

    start = precondition(v)
    batches = _batches(n_rows, settings.batch_rows, seed)
    if not lengths_on_host.any():
        nothing = np.zeros(len(lengths_on_host))
        return Solved(start, damping, nothing, nothing.astype(np.int64), nothing == 0)
    probe = take(start, np.flatnonzero(lengths_on_host)[:1])
    rate = 1.0 / _largest(shifted, precondition, probe, list(islice(batches, 1 if is_whole else PROBED_BATCHES)))
    x = start
    for step in range(settings.steps):
        share = 1.0 if is_whole else 1.0 - step / settings.steps
        gradient = axpy(-1.0, v, shifted(x, next(batches)))
        x = axpy(-rate * share, precondition(gradient), x)
    before, residual = finite(residual_of(start), "a residual"), residual_of(x)
    worse = ~(residual <= before)  # also where steps too long for a batch led beyond all numbers
    if worse.any():
        kept = torch.from_numpy(worse).to(next(iter(x.values())).device).reshape(-1, 1, 1)
        x = {name: torch.where(kept, start[name], found) for name, found in x.items()}
        residual = np.where(worse, before, residual)
    residual = np.where(lengths_on_host > 0, residual, 0.0)
    taken = np.where(worse, 0, settings.steps)
    return Solved(scale_by(lengths, x), damping, residual, taken, residual <= tolerance)


def _batches(n_rows: int, size: int, seed: int) -> Iterator[list[int] | None]:
    """Positions of the rows of each step, in passes without what is left below ``size``; None: all rows."""
    rng = np.random.default_rng([seed, 13])
    while True:
        if size >= n_rows:
            yield None
            continue
        order = rng.permutation(n_rows)
        for start in range(0, n_rows - size + 1, size):
            yield order[start : start + size].tolist()


def _largest(
    shifted: Callable[[Vectors, list[int] | None], Vectors],
    precondition: Multiply,
    probe: Vectors,
    batches: list[list[int] | None],
) -> float:
    """Largest eigenvalue of P^-1 (H_batch + damping I) over some batches, by the power method from one vector."""
    largest = 0.0
    for batch in batches:
        x = probe
        for _ in range(POWER_STEPS):
            applied = shifted(x, batch)
            turned = precondition(applied)
            # Rayleigh's quotient in the inner product of H + damping I, in which P^-1 (H + damping I) is symmetric.
            squares = finite(np.concatenate(fetch(dot(applied, turned), dot(x, applied))), "a curvature product")
            largest = max(largest, float(squares[0] / squares[1]))
            x = scale_by(1.0 / norm(turned).clamp_min(1e-30), turned)
    return largest
