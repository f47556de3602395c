"""Inverse curvature products (H + damping I)^-1 v from products H v alone (docs/methods.md, "Curvature").

``conjugate_gradients`` solves to a tolerance and is the reference for scopes larger than ``head``; ``lissa`` is the
recursion of the papers. Both take q right-hand sides at once, scale each to unit length first (so that tiny
gradients keep their precision), and state the residual of each solution, so that a failed one can be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from forebear.errors import InputError, NonFiniteError
from forebear.indexer.curvature.damping import round_up
from forebear.indexer.curvature.products import Product
from forebear.indexer.gradients.vectors import Vectors, dot
from forebear.indexer.model.device.copies import fetch, send

Multiply = Callable[[Vectors], Vectors]


@dataclass(frozen=True, eq=False)
class Solved:
    """Solutions x of (H + damping I) x = v for ``q`` right-hand sides.

    Attributes:
        vectors: x, ``(q, n_out, n_in)`` for each block.
        damping: The multiple of I that was added to H in effect.
        residual: ||v - (H + damping I) x|| / ||v||, ``(q,)`` float64, from a product with x itself; 0 where v = 0.
        iterations: Number of steps for each right-hand side, ``(q,)`` int64.
        converged: Whether the residual is within the tolerance, ``(q,)``.
    """

    vectors: Vectors
    damping: float
    residual: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray


def norm(a: Vectors) -> torch.Tensor:
    """||a|| of each query, ``(q,)`` float64."""
    return dot(a, a).sqrt()


def axpy(alpha: torch.Tensor | float, x: Vectors, y: Vectors) -> Vectors:
    """alpha x + y, alpha one number or one a query, ``(q,)``."""
    return {name: torch.addcmul(y[name], _factor(alpha, x[name]), x[name]) for name in x}


def scale_by(alpha: torch.Tensor | float, x: Vectors) -> Vectors:
    """Alpha x, alpha as in :func:`axpy`."""
    return {name: _factor(alpha, v) * v for name, v in x.items()}


def take(x: Vectors, positions: np.ndarray) -> Vectors:
    """The vectors of the queries at some positions."""
    there = send(positions, _device(x))
    return {name: v[there] for name, v in x.items()}


def put(x: Vectors, positions: np.ndarray, values: Vectors) -> None:
    """Overwrite the vectors of ``x`` at some positions by ``values``."""
    there = send(positions, _device(x))
    for name, v in x.items():
        v[there] = values[name]


def _device(x: Vectors) -> torch.device:
    return next(iter(x.values())).device


def _factor(alpha: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(alpha, torch.Tensor):
        return alpha.to(like).reshape(-1, 1, 1)
    return like.new_full((1, 1, 1), alpha)  # made on the device


def _zeros(like: Vectors) -> Vectors:
    return {name: torch.zeros_like(v) for name, v in like.items()}


def unit(vectors: Vectors) -> tuple[torch.Tensor, np.ndarray, Vectors]:
    """Lengths ``(q,)``, there and on the host, and directions; a zero vector stays zero."""
    lengths = norm(vectors)
    (on_host,) = fetch(lengths)
    finite(on_host, "a vector to be solved for")
    return lengths, on_host, scale_by(torch.where(lengths > 0, 1.0 / lengths, 0.0), vectors)


def finite(numbers: np.ndarray, quantity: str) -> np.ndarray:
    """The numbers, after refusing NaN and infinity."""
    if not np.isfinite(numbers).all():
        raise NonFiniteError(f"{quantity} is NaN or infinite: no solution would mean anything. Check the model.")
    return numbers


def conjugate_gradients(
    product: Multiply,
    vectors: Vectors,
    damping: float,
    *,
    precondition: Multiply | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    on_iteration: Callable[[int, np.ndarray], None] | None = None,
) -> Solved:
    """Solve (H + damping I) x = v by preconditioned conjugate gradients (Hestenes & Stiefel 1952), q at once.

    A query is done, and left out of further products, when the residual that the recursion carries is within the
    tolerance. The residual is then computed afresh; if rounding had hidden that it is too large, the rest is solved for
    again. A query stops without convergence after ``max_iterations``, when rounding stops its progress, and at a
    direction p with p^T (H + damping I) p <= 0 (an indefinite Hessian): it then keeps the x before that step, which
    minimises x^T (H + damping I) x / 2 - v^T x over the directions so far.

    Args:
        product: V to H V, symmetric.
        vectors: v, ``(q, n_out, n_in)`` for each block.
        damping: Absolute, >= 0.
        precondition: V to M^-1 V, M positive definite and near to H + damping I.
        tolerance: Largest relative residual of a converged query.
        max_iterations: Most iterations of each query.
        on_iteration: Called with the number of iterations and the relative residuals ``(q,)`` after each.

    Raises:
        InputError: The damping, tolerance or number of iterations is out of range.
        NonFiniteError: A vector or a product is NaN or infinite.
    """
    if not (np.isfinite(damping) and damping >= 0 and tolerance > 0 and max_iterations >= 1):
        raise InputError(
            f"cg with damping {damping:g}, tolerance {tolerance:g} and {max_iterations} iterations: expected a finite "
            "damping >= 0, a tolerance > 0 and at least 1 iteration."
        )

    def multiply(v: Vectors) -> Vectors:
        return axpy(damping, v, product(v))

    lengths, lengths_on_host, b = unit(vectors)
    x = _zeros(b)
    residual = (lengths_on_host > 0).astype(np.float64)
    progress = _Progress(residual.copy(), np.zeros(len(residual), np.int64), tolerance, max_iterations, on_iteration)
    positions = np.flatnonzero(residual > tolerance)
    remaining = take(b, positions)
    while len(positions):
        step, failed = _descend(multiply, remaining, precondition or _same, progress, positions)
        better = axpy(1.0, step, take(x, positions))
        put(x, positions, better)
        remaining = axpy(-1.0, multiply(better), take(b, positions))
        new_residual = finite(fetch(norm(remaining))[0], "a residual")
        stuck = failed | (new_residual > residual[positions] / 2)  # little progress in a whole run: rounding dominates
        residual[positions] = new_residual
        goes_on = (new_residual > tolerance) & ~stuck & (progress.iterations[positions] < max_iterations)
        positions, remaining = positions[goes_on], take(remaining, np.flatnonzero(goes_on))
    return Solved(scale_by(lengths, x), damping, residual, progress.iterations, residual <= tolerance)


def _same(v: Vectors) -> Vectors:
    return v


@dataclass
class _Progress:
    """Residuals and numbers of steps of the q queries, over all descents."""

    residual: np.ndarray  # relative, carried by the recursion
    iterations: np.ndarray
    tolerance: float
    max_iterations: int
    on_iteration: Callable[[int, np.ndarray], None] | None

    def advance(self, positions: np.ndarray, taken: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """Count a step of the queries at ``positions``; returns whether each goes on, ``(m,)`` bool."""
        self.iterations[positions] += taken
        self.residual[positions] = residual
        if self.on_iteration is not None:
            self.on_iteration(int(self.iterations.max()), self.residual.copy())
        goes_on = taken & (residual > self.tolerance) & (self.iterations[positions] < self.max_iterations)
        return np.asarray(goes_on)


def _descend(
    multiply: Multiply, b: Vectors, precondition: Multiply, progress: _Progress, queries: np.ndarray
) -> tuple[Vectors, np.ndarray]:
    """One descent of conjugate gradients from zero towards A x = b, for the queries at positions ``queries`` ``(m,)``.

    Returns:
        x of each, and whether it stopped at a direction without positive curvature, ``(m,)``.
    """
    out, failed = _zeros(b), np.zeros(len(queries), bool)
    active = np.arange(len(queries))  # positions in b of the queries that still run
    x, r = _zeros(b), b
    p = z = precondition(r)
    rz = dot(r, z)
    finite(fetch(rz)[0], "a preconditioned vector")
    while len(active):
        ap = multiply(p)
        curvature = dot(p, ap)
        is_positive = (curvature > 0) & (rz > 0)
        alpha = torch.where(is_positive, rz / curvature, 0.0)
        x, r = axpy(alpha, p, x), axpy(-alpha, ap, r)
        z = precondition(r)
        new_rz = dot(r, z)
        p = axpy(torch.where(is_positive, new_rz / rz, 0.0), p, z)
        rz = new_rz
        taken, curvatures, products, residuals = fetch(is_positive, curvature, rz, norm(r))
        finite(curvatures, "a curvature product")
        finite(products, "a preconditioned vector")
        goes_on = progress.advance(queries[active], taken, residuals)
        failed[active] = ~taken
        if not goes_on.all():
            put(out, active[~goes_on], take(x, np.flatnonzero(~goes_on)))
            kept = np.flatnonzero(goes_on)
            active, rz = active[kept], rz[send(kept, rz.device)]
            x, r, p = take(x, kept), take(r, kept), take(p, kept)
    return out, failed


@dataclass(frozen=True, kw_only=True)
class LissaSettings:
    """Choices of :func:`lissa`.

    Attributes:
        damping: Damping of the recursion, 0 <= damping < 1; ``effective_damping`` is added to H.
        scale: Divides H; more than half the largest eigenvalue of any batch's H, or the recursion diverges.
        batch_rows: Training rows a step.
        depth: Steps a run; None: one epoch, rows / batch_rows.
        repeats: r, runs that are averaged.
    """

    damping: float
    scale: float
    batch_rows: int
    depth: int | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        whole = min(self.batch_rows, self.repeats, 1 if self.depth is None else self.depth)
        if not (0 <= self.damping < 1 and np.isfinite(self.scale) and self.scale > 0 and whole >= 1):
            raise InputError(
                f"lissa with {self}: expected 0 <= damping < 1, scale > 0, and depth, batch_rows and repeats >= 1."
            )

    @property
    def effective_damping(self) -> float:
        """Damping x scale."""
        return self.damping * self.scale

    def refuse_lost_damping(self, dtype: torch.dtype) -> None:
        """Refuse a damping d for which 1 - d is 1 in the numbers that the recursion runs in.

        Raises:
            InputError: The damping is lost; the smallest that is not is named.
        """
        smallest = torch.finfo(dtype).eps
        if self.damping < smallest:
            raise InputError(
                f"lissa with damping {self.damping:g}: nothing would be left of it beside 1 in "
                f"{str(dtype).removeprefix('torch.')}. Give --lissa damping={round_up(smallest)} or more "
                f"(effective damping: {round_up(smallest * self.scale)})."
            )

    def steps(self, n_rows: int) -> int:
        """Steps a run over ``n_rows`` training rows."""
        return max(1, n_rows // self.batch_rows) if self.depth is None else self.depth

    @classmethod
    def parse(cls, given: str) -> LissaSettings:
        """``han20``, ``pez21``, ``han20,depth=5000``, or ``damping=0.01,scale=25,batch_rows=5``.

        Raises:
            InputError: A name is not known, a number cannot be read or is out of range, or one is missing.
        """
        first, *rest = [part.strip() for part in given.split(",")]
        preset = PRESETS.get(first.lower())
        values: dict[str, float | int] = {}
        for part in rest if preset else [first, *rest]:
            key, _, number = part.partition("=")
            try:
                if key not in _READERS:
                    raise ValueError
                values[key] = _READERS[key](number)
            except ValueError as error:
                raise InputError(
                    f"lissa settings {given!r}: {part!r} is not understood. Give {' or '.join(PRESETS)}, numbers for "
                    f"{', '.join(_READERS)}, or both, as in han20,depth=5000."
                ) from error
        if preset:
            return replace(preset, **values)  # type: ignore[arg-type]  # each read by its field's type
        missing = [key for key in ("damping", "scale", "batch_rows") if key not in values]
        if missing:
            raise InputError(f"lissa settings {given!r}: {', '.join(missing)} is missing.")
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The settings in the form that :meth:`parse` reads."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ",".join(f"{name}={value}" for name, value in pairs if value is not None)


_READERS: dict[str, Callable[[str], float | int]] = {
    "damping": float, "scale": float, "batch_rows": int, "depth": int, "repeats": int,
}  # fmt: skip
HAN20 = LissaSettings(damping=3e-3, scale=1e4, depth=2500, batch_rows=8)
PEZ21 = LissaSettings(damping=0.01, scale=25.0, batch_rows=5)  # depth: rows / 5
PRESETS = {"han20": HAN20, "pez21": PEZ21}
_BLOW_UP = 10.0


def lissa(
    product: Product,
    vectors: Vectors,
    *,
    damping: float,
    scale: float,
    depth: int | None,
    batch_rows: int,
    n_rows: int,
    repeats: int = 1,
    seed: int = 0,
    tolerance: float = 0.1,
    on_step: Callable[[int], None] | None = None,
) -> Solved:
    """Estimate (H + damping x scale I)^-1 v by the recursion of Agarwal et al. (2017), as Han20 and Pez21 run it.

    From h = v: h <- v + (1 - damping) h - (H_batch h) / scale, ``depth`` times. The result is h / scale, averaged over
    ``repeats`` runs. Where H is never negative, the distance to the solution shrinks by 1 - damping or better a step,
    but for the noise of small batches, which stays: the residual seldom gets small.

    Args:
        product: V and positions of rows to H_batch V.
        vectors: v, ``(q, n_out, n_in)`` for each block; the queries share the batches.
        damping: Damping of the recursion; :class:`LissaSettings` has this and the next settings.
        scale: Divides H.
        depth: Steps a run.
        batch_rows: Distinct rows a step; all rows, where there are not more.
        n_rows: Number of training rows of the product.
        repeats: Number of runs that are averaged.
        seed: Random seed of the batches.
        tolerance: Largest residual of a converged query.
        on_step: Called with the number of steps after each, over all runs.

    Raises:
        InputError: A setting is out of range, or the recursion diverges.
        NonFiniteError: A vector or a product is NaN or infinite.
    """
    settings = LissaSettings(damping=damping, scale=scale, depth=depth, batch_rows=batch_rows, repeats=repeats)
    settings.refuse_lost_damping(next(iter(vectors.values())).dtype)
    lengths, _, v = unit(vectors)
    steps = settings.steps(n_rows)
    total = _zeros(v)
    for run in range(repeats):
        rng = np.random.default_rng([seed, run])
        h = v
        for step in range(1, steps + 1):
            positions = None if batch_rows >= n_rows else rng.choice(n_rows, batch_rows, replace=False).tolist()
            h = axpy(1.0 - damping, h, axpy(-1.0 / scale, product(h, positions), v))
            _refuse_divergence(h, step, steps, settings)
            if on_step is not None:
                on_step(run * steps + step)
        total = axpy(1.0 / (repeats * scale), h, total)
    applied = axpy(settings.effective_damping, total, product(total))
    residual = finite(fetch(norm(axpy(-1.0, applied, v)))[0], "a residual")
    taken = np.full(len(lengths), repeats * steps)
    return Solved(scale_by(lengths, total), settings.effective_damping, residual, taken, residual <= tolerance)


def _refuse_divergence(h: Vectors, step: int, steps: int, settings: LissaSettings) -> None:
    """Refuse a length far above step + 1.

    If no step lengthens a vector, h is a sum of step + 1 vectors of at most unit length.
    """
    longest = float(norm(h).max())
    if not longest <= _BLOW_UP * (step + 1):
        raise InputError(
            f"lissa diverged at step {step} of {steps}: scale {settings.scale:g} is too small for this curvature. Give "
            f"a larger one, such as {10 * settings.scale:g} (the effective damping is damping x scale)."
        )
