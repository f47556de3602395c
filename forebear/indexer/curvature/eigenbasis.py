"""Exact scores of all pairs of some queries and rows, by plain gradients and by those whitened with a curvature.

With R = left^T G right, a gradient in the curvature's eigenbasis, <(H + damping I)^-1 G_q, G_n> is the sum of R_q R_n /
(eigenvalue + damping), and <G_q, G_n> that of R_q R_n. A gradient of t positions is turned by its factors, in
t (n_in^2 + n_out^2) multiplications, where H^-1 G takes 2 n_in n_out (n_in + n_out): no solution is formed, and none is
held. Queries are held as factors, too, where these take less than the gradient, and made whole a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from forebear.indexer.curvature.ekfac import Ekfac
from forebear.indexer.gradients.dots import products
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import Collector, RowCollector
from forebear.indexer.gradients.vectors import row_lengths
from forebear.indexer.gradients.whole import gather
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Texts
from forebear.indexer.model.scopes import Block, Scope

_BYTES = 3 << 26  # of whole gradients of rows that are formed at once


@dataclass(frozen=True)
class Whitening:
    """H and what is added to it.

    Attributes:
        ekfac: H, on the classifier's device.
        damping: Added to every eigenvalue.
    """

    ekfac: Ekfac
    damping: float

    def root(self, name: str) -> torch.Tensor:
        """(eigenvalues + damping)^-1/2 of a block, ``(n_out, n_in)``."""
        return (self.ekfac.parts[name].eigenvalues + self.damping).rsqrt()


def _shown(factors: LayerFactors, whitening: Whitening | None, name: str) -> LayerFactors:
    """Factors at live positions, in the eigenbasis if there is one."""
    live = factors.live()
    return live if whitening is None else whitening.ekfac.parts[name].rotate(live)


def _are_fewer(n_pieces: int, n_in: int, n_out: int) -> bool:
    """Whether the factors of so many pieces are fewer numbers than the gradient."""
    return n_pieces * (n_in + n_out) < n_in * n_out


def held_numbers(blocks: Sequence[Block], n_pieces: int) -> int:
    """How many numbers are held of a query of so many word pieces."""
    return sum(n_pieces * (b.n_in + b.n_out) if _are_fewer(n_pieces, b.n_in, b.n_out) else b.size for b in blocks)


class HeldGradients(Collector):
    """Holds the gradients of a few rows, the queries.

    Attributes:
        order: Positions of the queries, in the order in which they are held.
    """

    def __init__(self, scope: Scope, whitening: Whitening | None) -> None:
        """Hold nothing yet; in the eigenbasis of ``whitening``, if there is one."""
        self.scope, self._whitening = scope, whitening
        self.order: list[int] = []
        self._parts: list[tuple[slice, dict[str, LayerFactors | torch.Tensor]]] = []
        self._room = _Room()

    @override
    def begin(self, positions: list[int]) -> None:
        self._batch: dict[str, LayerFactors | torch.Tensor] = {}

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        shown = _shown(factors, self._whitening, name)
        sides = shown.inputs.shape[2], shown.deltas.shape[2]
        self._batch[name] = shown if _are_fewer(shown.inputs.shape[1], *sides) else shown.gradients()

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        self._parts.append((slice(len(self.order), len(self.order) + len(positions)), self._batch))
        self.order += positions

    def whole(self, block: Block, like: torch.Tensor) -> torch.Tensor:
        """The gradients of a block, ``(q, n_out, n_in)``, by :attr:`order`; overwritten by the next call."""
        out = self._room.of((len(self.order), block.n_out, block.n_in), like)
        for queries, found in self._parts:
            held = found.get(block.name)
            if held is None:  # their logits do not depend on it
                out[queries] = 0.0
            elif isinstance(held, LayerFactors):
                torch.bmm(held.deltas.transpose(1, 2), held.inputs, out=out[queries])
            else:
                out[queries] = held
        return out

    def squares(self, like: torch.Tensor) -> torch.Tensor:
        """<G, G> and, with a curvature, <(H + damping I)^-1 G, G>, ``(kinds, q)`` float64, by :attr:`order`."""
        total = torch.zeros((1 if self._whitening is None else 2, len(self.order)), dtype=torch.float64)
        for block in self.scope.blocks:
            v = self.whole(block, like)
            total[0] += row_lengths(v.flatten(1)).square().cpu()
            if self._whitening is not None:
                total[1] += row_lengths(v.mul_(self._whitening.root(block.name)).flatten(1)).square().cpu()
        return total


class _Room:
    """Memory that is used again: in new memory forming gradients takes three times as long on a CPU."""

    def __init__(self) -> None:
        self._numbers: torch.Tensor | None = None

    def of(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """A tensor whose numbers are those of before."""
        n = math.prod(shape)
        if self._numbers is None or len(self._numbers) < n:
            self._numbers = None
            self._numbers = like.new_empty(n)
        return self._numbers[:n].view(shape)


class _Pairs(RowCollector):
    """Gathers dot products with held gradients, and the rows' squared whitened lengths."""

    def __init__(self, held: HeldGradients, whitening: Whitening | None, n_rows: int, like: torch.Tensor) -> None:
        self.scope, self._held, self._whitening, self._like = held.scope, held, whitening, like
        self._blocks = {block.name: block for block in self.scope.blocks}
        n_kinds = 1 if whitening is None else 2
        self.dots, self.squares = np.zeros((n_kinds, len(held.order), n_rows)), np.zeros((n_kinds - 1, n_rows))
        self._room = _Room()

    @override
    def begin(self, positions: list[int]) -> None:
        shapes = (*self.dots.shape[:2], len(positions)), (len(self.squares), len(positions))
        self._dots, self._squares = (
            torch.zeros(shape, dtype=torch.float64, device=self._like.device) for shape in shapes
        )

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        v, start = self._held.whole(self._blocks[name], self._like), 0
        root = None if self._whitening is None else self._whitening.root(name)
        for some in _shown(factors, self._whitening, name).chunks(_BYTES):
            g = self._room.of((len(some.inputs), *v.shape[1:]), self._like)
            torch.bmm(some.deltas.transpose(1, 2), some.inputs, out=g)
            rows = slice(start, start + len(g))
            self._dots[0, :, rows] += products(v, g)
            if root is not None:
                self._squares[0, rows] += row_lengths(g.mul_(root).flatten(1)).square()
                self._dots[1, :, rows] += products(v, g.mul_(root))
            start += len(g)

    @override
    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return self._dots, self._squares

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        self.dots[:, :, positions], self.squares[:, positions] = arrays

    @override
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.dots[:, :, copies], self.squares[:, copies] = self.dots[:, :, sources], self.squares[:, sources]


def hold_gradients(
    classifier: Classifier, scope: Scope, whitening: Whitening | None, texts: Texts, labels: np.ndarray
) -> HeldGradients:
    """Loss gradients of a few rows ``texts`` with classes ``labels``, to score pairs with."""
    held = HeldGradients(scope, whitening)
    gather(classifier, texts, labels, held)
    return held


@dataclass(frozen=True)
class PairScores:
    """Exact scores, float64; of plain gradients, then of whitened ones if there is a curvature.

    Attributes:
        dots: <G_q, G_n> and <(H + damping I)^-1 G_q, G_n>, ``(kinds, q, n)``.
        queries: Squared lengths of the queries' gradients, ``(kinds, q)``.
        rows: Squared lengths of the rows' whitened gradients, ``(kinds - 1, n)``.
    """

    dots: np.ndarray
    queries: np.ndarray
    rows: np.ndarray


def score_pairs(
    classifier: Classifier,
    scope: Scope,
    whitening: Whitening | None,
    queries: tuple[Texts, np.ndarray],
    rows: tuple[Texts, np.ndarray],
    *,
    on_rows: Callable[[int], None] | None = None,
) -> PairScores:
    """Exact scores of every pair; what is held is :func:`held_numbers` of each query, and a block of all whole.

    Args:
        classifier: Whose gradients.
        scope: Over which.
        whitening: The curvature, where scores under it are wanted, too.
        queries: Rows, ``q`` of them, one list a text column or encoded; and their classes, ``(q,)``.
        rows: The same of the ``n`` rows; equal ones are run once.
        on_rows: Called with the number of rows after each batch.
    """
    like = classifier.head.weight
    held = hold_gradients(classifier, scope, whitening, *queries)
    collector = _Pairs(held, whitening, len(rows[1]), like)
    gather(classifier, *rows, collector, on_rows)
    places = np.argsort(held.order)
    return PairScores(collector.dots[:, places], held.squares(like).numpy()[:, places], collector.squares)
