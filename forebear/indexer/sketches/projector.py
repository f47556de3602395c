"""Raw sketches: two-sided projections of each block's gradient, S = (A d)^T (B a) summed over tokens.

A ``(k_out x out)`` and B ``(k_in x in)`` have orthogonal rows. Half of them are the leading eigenvectors of the
block's Kronecker factors (they hold most of the energy, exactly), the other half are drawn at random in
what is left and scaled so that a dot of two sketches is an unbiased estimate of the dot of the gradients. Without its
scale a small layer (the head) would count many times over: measured on SST-2 with random directions, recall of the top
10 of ``gd`` falls from .97 to .50.

A whitened sketch is that of H^-1/2 G: the gradient is turned into the curvature's eigenbasis, divided by
sqrt(eigenvalue + damping) entry by entry, and summed over groups of entries with random signs. Where the damping is
above most eigenvalues, :mod:`forebear.indexer.sketches.leading` makes it from the plain sketch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch

from forebear.indexer.curvature.ekfac import Ekfac, KroneckerFactors, eigenvectors, whitened
from forebear.indexer.gradients.block_file import read_blocks, write_blocks
from forebear.indexer.gradients.factors import LayerFactors, OfLastFactors
from forebear.indexer.gradients.vectors import Vectors, dot, row_lengths
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import picks, send
from forebear.indexer.model.device.half import rounded_product
from forebear.indexer.model.scopes import Scope
from forebear.indexer.sketches.norms import Grams, rescued, scaled_up, squares_of

PRINCIPAL = 32  # leading eigenvectors on each side of a block
RANDOM = 32  # random directions on each side, orthogonal to them
POOLED = 64  # groups on each side of a whitened block
BASES = ("mixed", "principal", "random")


class Projector(Protocol):
    """A linear map from the gradients of a scope to D numbers with orthogonal rows.

    Attributes:
        scope: Over which the gradients are.
        width: D.
        squares: Squared length of each row of the map, ``(D,)`` float32.
        bounds_norms: Whether :meth:`project` gives bounds on squared norms beside estimates, or exact ones.
        rounded: Whether factors come from a pass in bf16, and may be multiplied as such numbers.
    """

    scope: Scope
    width: int
    squares: np.ndarray
    bounds_norms: ClassVar[bool]

    @property
    def rounded(self) -> bool:
        """See above."""

    def project(self, name: str, factors: LayerFactors) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """One block's place in the sketch, its numbers ``(b, w)``, and its squared norms float64.

        The squared norms are ``(b,)``, or ``(3, b)`` where they are known within bounds: an estimate, the least and the
        most that they can be.
        """

    def project_matrix(self, vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
        """The sketch of whole gradients, ``(q, D)``, and their squared norms as :meth:`project` has them."""


@dataclass(frozen=True)
class SideBases:
    """Both sides of a block: ``left`` A ``(k_out, n_out)``, ``right`` B ``(k_in, n_in)``; rows orthogonal, scaled."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class SharedProducts:
    """What all sketches of a scope are made from, of one block's gradients; none of it is to be changed.

    Attributes:
        factors: Of which they are the products: those of the batch, on a GPU scaled up, because it would wait for
            the answer whether any row's squares underflow.
        scale: What output gradients were divided by, ``(b,)``; None if they were not.
        outputs: Output gradients along the directions of that side, and along further ones that others have asked for,
            ``(b, t, k_out or more)``.
        inputs: Inputs along those of theirs, ``(b, t, k_in or more)``.
        numbers: The plain sketch, not scaled, ``(b, k_out k_in)``.
        grams: Of the factors.
    """

    factors: LayerFactors
    scale: torch.Tensor | None
    outputs: torch.Tensor
    inputs: torch.Tensor
    numbers: torch.Tensor
    grams: Grams

    @classmethod
    def of(
        cls, factors: LayerFactors, basis: SideBases, sizes: tuple[int, int], *, scaled: bool, rounded: bool
    ) -> SharedProducts:
        """The products of a block's factors with its bases.

        Args:
            factors: Of the rows of a batch.
            basis: All directions, those of the sketch first.
            sizes: How many the sketch has, ``(k_out, k_in)``.
            scaled: Whether output gradients are scaled up.
            rounded: Whether products may be of numbers in bf16.
        """
        scale = None
        if scaled:
            factors, scale = scaled_up(factors)
        product = rounded_product if rounded else torch.matmul
        u, v = product(factors.deltas, basis.left.T), product(factors.inputs, basis.right.T)
        numbers = torch.bmm(u[:, :, : sizes[0]].transpose(1, 2), v[:, :, : sizes[1]]).flatten(1)
        if scale is not None:
            numbers.mul_(scale[:, None])
        return cls(factors, scale, u, v, numbers, Grams.of(factors))


class PlainProjector:
    """The sketch of G itself."""

    bounds_norms: ClassVar[bool] = False

    def __init__(self, scope: Scope, bases: dict[str, SideBases], n_leading: int = 0, *, rounded: bool = False) -> None:
        """Take the bases as they are.

        Args:
            scope: Over which the gradients are.
            bases: By block name.
            n_leading: How many directions of each side are leading eigenvectors, after the random ones. A side that is
                kept whole has all of them, by falling eigenvalue.
            rounded: Whether the factors, which come from a pass in bf16, are multiplied as such numbers.
        """
        self.scope, self.bases, self._n_leading, self.rounded = scope, bases, n_leading, rounded
        self.multiplied = dict(bases)  # and further directions, after those of the sketch
        self._last = OfLastFactors[SharedProducts]()
        self.places, self.width = _places({name: (len(b.left), len(b.right)) for name, b in bases.items()})
        parts = [
            torch.outer(b.left.double().square().sum(dim=1), b.right.double().square().sum(dim=1)).flatten()
            for b in bases.values()
        ]
        self.squares = torch.cat(parts).float().cpu().numpy()

    def project(self, name: str, factors: LayerFactors) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The place in the sketch, numbers and squared norms of one block, as :class:`Projector` says."""
        shared = self.products(name, factors)
        squares = squares_of(shared.factors, shared.grams)
        if shared.scale is not None:
            squares.mul_(shared.scale.double().square_())
        else:
            squares = rescued(squares, factors)
        return self.places[name], shared.numbers, squares

    def products(self, name: str, factors: LayerFactors) -> SharedProducts:
        """What this sketch, and those that are made from it, take of one block's gradients."""
        scaled = not picks(factors.inputs)
        return self._last.get(factors, lambda: self.products_of(name, factors, scaled=scaled))

    def products_of(self, name: str, factors: LayerFactors, *, scaled: bool) -> SharedProducts:
        """:meth:`products` of factors that no other sketch is shown."""
        basis = self.bases[name]
        sizes = len(basis.left), len(basis.right)
        return SharedProducts.of(factors, self.multiplied[name], sizes, scaled=scaled, rounded=self.rounded)

    def multiply_also(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """Make products with further directions, too, given as rows: one product takes less than two."""
        basis = self.bases[name]
        wider = SideBases(torch.cat([basis.left, left]), torch.cat([basis.right, right]))
        self.multiplied[name] = wider
        self.bases[name] = SideBases(wider.left[: len(basis.left)], wider.right[: len(basis.right)])  # the same memory

    def n_leading(self, name: str) -> tuple[int, int]:
        """How many of the last directions of both sides of a block lead: all of a side that is kept whole."""
        sides = (self.bases[name].left, self.bases[name].right)
        n_out, n_in = (min(len(side), self._n_leading) if len(side) < side.shape[1] else len(side) for side in sides)
        return n_out, n_in

    def spread(self, name: str, values: torch.Tensor, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
        """One value for each number of a block's sketch, ``(k_out, k_in)``.

        Args:
            name: The block.
            values: One for each pair of its eigenvectors, ``(n_out, n_in)``.
            pool: What a random direction gets of those of the eigenvectors that do not lead: their mean, for example.
        """
        basis = self.bases[name]
        for dim, n_rows in enumerate((len(basis.left), len(basis.right))):
            if n_rows < values.shape[dim]:
                leading, others = values.tensor_split([self._n_leading], dim=dim)
                pooled = pool(others, dim=dim, keepdim=True)
                values = torch.cat([*[pooled] * (n_rows - self._n_leading), leading], dim=dim)
        return values

    def project_matrix(self, vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches and squared norms of whole gradients, as :class:`Projector` says."""
        parts = [(b.left @ vectors[name] @ b.right.T).flatten(1) for name, b in self.bases.items()]
        return torch.cat(parts, dim=1), dot(vectors, vectors)


class WhiteProjector:
    """The sketch of H^-1/2 G; its squared norms are <(H + damping I)^-1 G, G>, exactly."""

    bounds_norms: ClassVar[bool] = False
    rounded: ClassVar[bool] = False

    def __init__(self, scope: str, ekfac: Ekfac, damping: float, seed: int) -> None:
        """Draw the groups and signs.

        Args:
            scope: Name of the scope.
            ekfac: Curvature of the scope, on the device where the projector will run.
            damping: Added to every eigenvalue.
            seed: Random seed of groups and signs.
        """
        self.scope = Scope(scope, tuple(part.block for part in ekfac.parts.values()))
        self._left, self._right, self._weights = {}, {}, {}
        sizes: dict[str, tuple[int, int]] = {}
        squares = []
        for number, (name, part) in enumerate(ekfac.parts.items()):
            rng = np.random.default_rng([seed, 2, number])
            out, into = (_shuffle(rng, n, part.left) for n in (part.block.n_out, part.block.n_in))
            self._left[name] = part.left[:, out[0]] * out[1]
            self._right[name] = part.right[:, into[0]] * into[1]
            self._weights[name] = (part.eigenvalues[out[0]][:, into[0]] + damping).rsqrt()
            sizes[name] = (min(POOLED, part.block.n_out), min(POOLED, part.block.n_in))
            counts = [_group_sizes(n, k) for n, k in zip((part.block.n_out, part.block.n_in), sizes[name], strict=True)]
            squares.append(np.outer(*counts).reshape(-1))
        self._sizes = sizes
        self._places, self.width = _places(sizes)
        self.squares = np.concatenate(squares).astype(np.float32)

    def project(self, name: str, factors: LayerFactors) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """The place in the sketch, numbers and squared norms of one block, as :class:`Projector` says."""
        turned = LayerFactors(factors.inputs @ self._right[name], factors.deltas @ self._left[name])
        pooled, norms = [], []
        for white, squares in whitened(turned, self._weights[name]):
            norms.append(squares)
            pooled.append(_pool(white, *self._sizes[name]).flatten(1))
        return self._places[name], torch.cat(pooled), torch.cat(norms)

    def project_matrix(self, vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
        """Sketches and squared norms of whole gradients ``vectors``, which are whitened here."""
        parts, squares = [], []
        for name, sizes in self._sizes.items():  # the blocks in the order of the sketch, not of the vectors
            white = (self._left[name].T @ vectors[name] @ self._right[name]) * self._weights[name]
            parts.append(_pool(white, *sizes).flatten(1))
            squares.append(row_lengths(white.flatten(1)).square())
        return torch.cat(parts, dim=1), torch.stack(squares).sum(dim=0)


def _places(sizes: dict[str, tuple[int, int]]) -> tuple[dict[str, slice], int]:
    """The slice of a sketch that each block's numbers take, and the sketch's width."""
    places, start = {}, 0
    for name, (k_out, k_in) in sizes.items():
        places[name] = slice(start, start + k_out * k_in)
        start += k_out * k_in
    return places, start


def _shuffle(rng: np.random.Generator, n: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation and random signs."""
    order = send(rng.permutation(n), like.device)
    signs = send(rng.choice([-1.0, 1.0], size=n), like.device).to(like.dtype)
    return order, signs


def _group_sizes(n: int, k: int) -> np.ndarray:
    """Members of each of ``k`` groups of ``n`` entries as :func:`_pool` forms them (the last ones may be short)."""
    size = -(-n // k)
    return np.clip(n - size * np.arange(k), 0, size).astype(np.float64)


def _pool(matrix: torch.Tensor, k_out: int, k_in: int) -> torch.Tensor:
    """Sums over groups of consecutive rows and columns, ``(b, k_out, k_in)``."""
    b, n_out, n_in = matrix.shape
    rows, columns = -(-n_out // k_out), -(-n_in // k_in)
    if rows * k_out != n_out or columns * k_in != n_in:
        matrix = torch.nn.functional.pad(matrix, (0, columns * k_in - n_in, 0, rows * k_out - n_out))
    narrow = matrix.view(b, k_out * rows, k_in, columns).sum(dim=3)
    return narrow.view(b, k_out, rows, k_in).sum(dim=2)


def draw_bases(
    classifier: Classifier, scope: Scope, factors: KroneckerFactors | Ekfac | None, seed: int, basis: str
) -> dict[str, SideBases]:
    """Bases of every block.

    Args:
        classifier: The model at the checkpoint, on whose device the bases are made.
        scope: The scope, one of whose blocks each basis is for.
        factors: Kronecker factors, or the curvature, whose eigenvectors ``mixed`` and ``principal`` take.
        seed: Random seed of the random directions.
        basis: ``mixed`` (32 leading and 32 random ones), ``principal`` (64 leading ones) or ``random`` (64).

    Returns:
        By block name, random directions before leading ones; a side of at most 64 entries is kept whole, as all its
        eigenvectors if factors are given.
    """
    n_leading = n_principal(basis)
    n_random = PRINCIPAL + RANDOM - n_leading
    dtype, device = classifier.head.weight.dtype, classifier.device
    out = {}
    for number, block in enumerate(scope.blocks):
        rng = np.random.default_rng([seed, number])
        sides = []
        for n, eigenbasis in zip((block.n_out, block.n_in), _eigenbases(factors, block.name), strict=True):
            if n <= n_leading + n_random:
                side = np.eye(n) if eigenbasis is None else eigenbasis()
            else:
                side = np.empty((n, 0)) if eigenbasis is None else eigenbasis()[:, :n_leading]
                if n_random:
                    q, _ = np.linalg.qr(np.hstack([side, rng.normal(size=(n, n_random))]))
                    side = np.hstack([np.sqrt((n - n_leading) / n_random) * q[:, n_leading:], side])
            sides.append(torch.from_numpy(np.ascontiguousarray(side.T)).to(dtype=dtype, device=device))
        out[block.name] = SideBases(*sides)
    return out


def n_principal(basis: str) -> int:
    """How many directions of each side of a basis are leading eigenvectors."""
    return {"mixed": PRINCIPAL, "principal": PRINCIPAL + RANDOM, "random": 0}[basis]


def _eigenbases(
    factors: KroneckerFactors | Ekfac | None, name: str
) -> tuple[Callable[[], np.ndarray] | None, Callable[[], np.ndarray] | None]:
    """Eigenvectors of both sides of a block as columns, by falling eigenvalue, when they are asked for."""
    if factors is None:
        return None, None
    if isinstance(factors, Ekfac):
        part = factors.parts[name]
        return lambda: part.left.double().cpu().numpy(), lambda: part.right.double().cpu().numpy()
    outputs, inputs = factors.outputs[name], factors.inputs[name]
    return lambda: eigenvectors(outputs).cpu().numpy(), lambda: eigenvectors(inputs).cpu().numpy()


def write_bases(path: Path, scope: Scope, bases: dict[str, SideBases], basis: str) -> None:
    """Write the bases of a :class:`PlainProjector`, and how many directions of each lead."""
    parts = {b: {"left": bases[b.name].left, "right": bases[b.name].right} for b in scope.blocks}
    write_blocks(path, parts, {"leading": str(n_principal(basis))})


def read_plain_projector(
    path: Path, scope: str, device: torch.device, dtype: torch.dtype, *, rounded: bool = False
) -> PlainProjector:
    """The projector of the bases that :func:`write_bases` wrote."""
    parts, metadata = read_blocks(path)
    bases = {
        block.name: SideBases(*(send(found[side], device).to(dtype) for side in ("left", "right")))
        for block, found in parts.items()
    }
    return PlainProjector(Scope(scope, tuple(parts)), bases, int(metadata.get("leading", 0)), rounded=rounded)
