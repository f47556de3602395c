"""Whitened sketches of which no whitened gradient is formed: from plain sketches and a few leading directions.

In the curvature's eigenbasis H^-1/2 G is G_ij / sqrt(L_ij + damping). Where few eigenvalues L are above the damping,
that is G / sqrt(damping) but for the leading directions. So the plain sketch, each of whose numbers stands for one pair
of leading directions or for a mean of all others, is divided by the roots of (mean) eigenvalues plus damping. Measured
on SST-2 (benchmarks/RESULTS.md), its candidates are as good as those of :class:`WhiteProjector`.

The squared length <(H + damping I)^-1 G, G> is the sum of G_ij^2 / (L_ij + damping). The squares are known one by one
for the 64 x 64 pairs of leading directions, in sums for each of these directions beside all others, and in one sum for
the rest. Each sum is divided by its mean eigenvalue for an estimate, and by its least and its largest for bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import ClassVar

import torch

from forebear.indexer.curvature.ekfac import Ekfac, EkfacBlock
from forebear.indexer.gradients.factors import LayerFactors, OfLastFactors
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.sketches.norms import LEAST, SMALL
from forebear.indexer.sketches.projector import PlainProjector, SharedProducts

LEADING = 64  # directions on each side of a block, whose energies are known one by one
WIDEST = 1 / 3  # of the bounds on a squared length, as a share of it; beyond, gradients are whitened whole
_ROUNDING = 1e-6  # of float32 in a squared length, as a share of the squares that were added and subtracted


@dataclass(frozen=True)
class Energies:
    """Squared lengths of a block's gradients of ``b`` rows, and of parts of them in the curvature's eigenbasis.

    All float64; k is :data:`LEADING` or the whole side, if that is shorter.

    Attributes:
        whole: ||G||^2, ``(b,)``.
        outputs: Of each leading direction of the outputs, over all inputs, ``(b, k_out)``.
        inputs: Of each leading direction of the inputs, over all outputs, ``(b, k_in)``.
        pairs: Of each pair of leading directions, ``(b, k_out, k_in)``.
        gross: Sum of the absolute values of which ``whole`` is the sum, ``(b,)``: what its rounding is a share of.
    """

    whole: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor
    pairs: torch.Tensor
    gross: torch.Tensor

    @classmethod
    def expected(cls, part: EkfacBlock) -> Energies:
        """The eigenvalues, which are the mean energies of the rows that they were fitted on, as those of one row."""
        values = part.eigenvalues.double()[None]
        whole = values.sum(dim=(1, 2))
        k_out, k_in = _n_known(part)
        return cls(
            whole, values[:, :k_out].sum(dim=2), values[:, :, :k_in].sum(dim=1), values[:, :k_out, :k_in],
            torch.zeros_like(whole),
        )  # fmt: skip

    @classmethod
    def of_rows(cls, parts: Sequence[Energies]) -> Energies:
        """Those of some rows after those of others."""
        return cls(*(torch.cat([getattr(part, own.name) for part in parts]) for own in fields(cls)))

    def times(self, factors: torch.Tensor) -> Energies:
        """The energies of each row times a factor, ``(b,)``."""
        rows = factors[:, None]
        return Energies(
            self.whole * factors, self.outputs * rows, self.inputs * rows, self.pairs * rows[:, None],
            self.gross * factors,
        )  # fmt: skip

    def put(self, rows: torch.Tensor, others: Energies) -> None:
        """Replace the energies of some rows, ``(b,)`` bool."""
        for own in fields(self):
            getattr(self, own.name)[rows] = getattr(others, own.name)

    def outside(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is left of ``outputs`` and of ``inputs`` without the pairs, and of the whole without all of these."""
        of_outputs, of_inputs = self.pairs.sum(dim=2), self.pairs.sum(dim=1)
        rest = self.whole - self.outputs.sum(dim=1) - self.inputs.sum(dim=1) + of_outputs.sum(dim=1)
        left = (self.outputs - of_outputs, self.inputs - of_inputs, rest)
        outputs, inputs, rest = (values.clamp_min(0) for values in left)
        return outputs, inputs, rest


def _n_known(part: EkfacBlock) -> tuple[int, int]:
    return min(LEADING, part.block.n_out), min(LEADING, part.block.n_in)


class LeadingEnergies:
    """Energies of the leading directions in the gradients of a pass, made once for the dampings of a scope."""

    def __init__(self, plain: PlainProjector, ekfac: Ekfac) -> None:
        """Take the directions that ``plain`` has not.

        Args:
            plain: The plain sketch of the same scope, whose last directions on each side lead.
            ekfac: The curvature whose eigenvectors these are, on the device where the pass will run.
        """
        self.plain, self.parts = plain, ekfac.parts
        self._last = OfLastFactors[Energies]()
        for name, part in ekfac.parts.items():
            (k_out, k_in), (n_out, n_in) = _n_known(part), plain.n_leading(name)
            assert n_out <= k_out
            assert n_in <= k_in
            plain.multiply_also(name, part.left[:, n_out:k_out].T, part.right[:, n_in:k_in].T)

    @property
    def n_bytes(self) -> int:
        """Bytes of what the energies are made with, the plain sketch's bases among it."""
        of_parts = ((part.left, part.right, part.eigenvalues) for part in self.parts.values())
        of_bases = ((basis.left, basis.right) for basis in self.plain.multiplied.values())
        tensors = chain.from_iterable(chain(of_parts, of_bases))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def of(self, name: str, factors: LayerFactors) -> Energies:
        """Energies of block ``name`` at the rows of a batch."""
        return self._last.get(factors, lambda: self._energies(name, factors))

    def of_matrix(self, name: str, gradients: torch.Tensor) -> Energies:
        """Energies of whole gradients ``(q, n_out, n_in)``, scaled up lest squares underflow."""
        scale = gradients.abs().amax(dim=(1, 2), keepdim=True).clamp_min_(LEAST)
        return _from_gradients(gradients / scale, *self._directions(name)).times(scale[:, 0, 0].double().square_())

    def _directions(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The leading directions of both sides of a block, as columns."""
        (k_out, k_in), basis = _n_known(self.parts[name]), self.plain.multiplied[name]
        return basis.left[-k_out:].T, basis.right[-k_in:].T

    def _energies(self, name: str, factors: LayerFactors) -> Energies:
        """Those of rows so confident that squares underflow are made again of scaled gradients."""
        shared = self.plain.products(name, factors)
        energies = self._made(name, shared)
        if shared.scale is not None:
            return energies.times(shared.scale.double().square_())
        small = energies.whole < SMALL
        if bool(small.any()):
            some = LayerFactors(factors.inputs[small], factors.deltas[small])
            scaled = self.plain.products_of(name, some, scaled=True)
            assert scaled.scale is not None
            energies.put(small, self._made(name, scaled).times(scaled.scale.double().square_()))
        return energies

    def _made(self, name: str, shared: SharedProducts) -> Energies:
        factors, grams = shared.factors, shared.grams
        if grams.inputs is None or grams.outputs is None:
            directions = self._directions(name)
            return Energies.of_rows([_from_gradients(part.gradients(), *directions) for part in factors.chunks()])
        k_out, k_in = _n_known(self.parts[name])
        u, v = shared.outputs[:, :, -k_out:], shared.inputs[:, :, -k_in:]
        assert grams.products is not None
        return Energies(
            whole=grams.products.sum(dim=(1, 2), dtype=torch.float64).clamp_min_(0),
            outputs=torch.bmm(grams.inputs, u).mul_(u).sum(dim=1).double(),
            inputs=torch.bmm(grams.outputs, v).mul_(v).sum(dim=1).double(),
            pairs=torch.bmm(u.transpose(1, 2), v).double().square_(),
            gross=grams.products.abs().sum(dim=(1, 2), dtype=torch.float64),
        )


def _from_gradients(gradients: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Energies:
    """Energies of whole gradients ``(m, n_out, n_in)``, along leading directions as columns."""
    along = left.T @ gradients
    whole = gradients.square().sum(dim=(1, 2), dtype=torch.float64)
    return Energies(
        whole=whole,
        outputs=along.square().sum(dim=2, dtype=torch.float64),
        inputs=(gradients @ right).square_().sum(dim=1, dtype=torch.float64),
        pairs=(along @ right).double().square_(),
        gross=whole,
    )


@dataclass(frozen=True)
class _Inverse:
    """1 / (eigenvalue + damping) of a block: of each pair of leading directions, and of what is outside of them.

    Attributes:
        pairs: ``(k_out, k_in)``.
        outputs: Of each leading direction of the outputs beside the other inputs: the mean, weighted by the
            eigenvalues, the least and the most, ``(3, k_out)``; 0 where there are no others.
        inputs: The same of the inputs, ``(3, k_in)``.
        rest: The same of the pairs of directions neither of which leads, ``(3,)``.
        rounding: Of a squared length, as a share of :attr:`Energies.gross`.
    """

    pairs: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor
    rest: torch.Tensor
    rounding: float

    @classmethod
    def of(cls, part: EkfacBlock, damping: float) -> _Inverse:
        values = part.eigenvalues.double()
        k_out, k_in = _n_known(part)
        outside = (values[:k_out, k_in:], values[k_out:, :k_in].T, values[k_out:, k_in:].reshape(1, -1))
        outputs, inputs, rest = (_mean_and_bounds(of_outside, damping) for of_outside in outside)
        pairs = (values[:k_out, :k_in] + damping).reciprocal()
        return cls(pairs, outputs, inputs, rest[:, 0], _ROUNDING / damping)

    def squared_lengths(self, energies: Energies) -> torch.Tensor:
        """<(H + damping I)^-1 G, G>: estimate, least and most, ``(3, b)``."""
        outputs, inputs, rest = energies.outside()
        known = (energies.pairs * self.pairs).sum(dim=(1, 2))
        out = known + self.outputs @ outputs.T + self.inputs @ inputs.T + self.rest[:, None] * rest
        rounding = self.rounding * energies.gross
        out[1].sub_(rounding).clamp_min_(0)
        out[2].add_(rounding)
        return out


def _mean_and_bounds(values: torch.Tensor, damping: float) -> torch.Tensor:
    """1 / (eigenvalue + damping) over each row of eigenvalues ``(n, m)``: weighted mean, least, most, ``(3, n)``."""
    if not values.shape[1]:
        return values.new_zeros((3, len(values)))
    inverse = (values + damping).reciprocal()
    sums = values.sum(dim=1)
    most = inverse.amax(dim=1)
    mean = torch.where(sums > 0, (inverse * values).sum(dim=1) / torch.where(sums > 0, sums, 1.0), most)
    return torch.stack([mean, inverse.amin(dim=1), most])


def bounds_width(ekfac: Ekfac, damping: float) -> float:
    """How far apart the bounds on a squared length of an average row are, as a share of its estimate."""
    total = torch.zeros(3, dtype=torch.float64)
    for part in ekfac.parts.values():
        total += _Inverse.of(part, damping).squared_lengths(Energies.expected(part))[:, 0].cpu()
    estimate, least, most = total.tolist()
    return (most - least) / estimate if estimate else 0.0


@dataclass
class LeadingProjector:
    """The sketch of H^-1/2 G from the plain one; squared norms are estimates between bounds.

    Its rows are not orthogonal: ``squares`` bound what their squared lengths are from above, so that coordinates that
    were made orthonormal by them are no longer than the whitened gradient.

    Attributes:
        energies: Of the scope, shared by the projectors of all its dampings.
        damping: Added to every eigenvalue.
    """

    bounds_norms: ClassVar[bool] = True

    energies: LeadingEnergies
    damping: float
    _inverses: dict[str, _Inverse] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Scale every number of the plain sketch."""
        plain, parts = self.energies.plain, self.energies.parts
        self.scope, self.width = plain.scope, plain.width
        self._inverses = {name: _Inverse.of(part, self.damping) for name, part in parts.items()}
        means, most = (
            torch.cat([
                plain.spread(name, parts[name].eigenvalues.double(), pool).flatten() for name in plain.bases
            ]) + self.damping
            for pool in (torch.mean, torch.amax)
        )  # fmt: skip
        self.weights = means.rsqrt().float()
        self.squares = (most / means).float().cpu().numpy() * plain.squares

    @property
    def rounded(self) -> bool:
        """As of the plain sketch."""
        return self.energies.plain.rounded

    def project(self, name: str, factors: LayerFactors) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The place in the sketch, numbers, and squared norms ``(3, b)`` of one block, as :class:`Projector` says."""
        plain = self.energies.plain
        place, numbers = plain.places[name], plain.products(name, factors).numbers
        squares = self._inverses[name].squared_lengths(self.energies.of(name, factors))
        return place, numbers * self.weights[place], squares

    def project_matrix(self, vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches and squared norms ``(3, q)`` of whole gradients, as :class:`Projector` says."""
        numbers = self.energies.plain.project_matrix(vectors)[0] * self.weights
        squares = [
            self._inverses[name].squared_lengths(self.energies.of_matrix(name, vectors[name]))
            for name in self._inverses
        ]
        return numbers, torch.stack(squares).sum(dim=0)
