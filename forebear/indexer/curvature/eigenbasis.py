"""Exact scores in the curvature's eigenbasis, where H^-1 is a division: for many pairs of a few rows and queries.

With R = left^T G right, <(H + damping I)^-1 G_q, G_n> is the sum of R_q R_n / (eigenvalue + damping), and <G_q, G_n>
that of R_q R_n. A gradient of t positions is turned by its factors, in t (n_in^2 + n_out^2) multiplications, where
H^-1 G takes 2 n_in n_out (n_in + n_out): no solution is formed, and none is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from forebear.indexer.curvature.ekfac import Ekfac
from forebear.indexer.gradients.dots import products
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import RowCollector
from forebear.indexer.gradients.vectors import Vectors, row_lengths
from forebear.indexer.gradients.whole import gather, whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Texts
from forebear.indexer.model.scopes import Scope

_BYTES = 1 << 28  # of whole gradients that are formed at once


def turned_gradients(classifier: Classifier, scope: Scope, ekfac: Ekfac, texts: Texts, labels: np.ndarray) -> Vectors:
    """Coordinates R of a few rows' loss gradients in the eigenbasis, ``(q, n_out, n_in)`` for each block."""
    return whole_gradients(classifier, scope, texts, labels, lambda name, f: ekfac.parts[name].rotate(f.live()))


def turned_squares(ekfac: Ekfac, damping: float, turned: Vectors) -> torch.Tensor:
    """<G, G> and <(H + damping I)^-1 G, G> of whole gradients in the eigenbasis, ``(2, q)`` float64."""
    squares = []
    for name, r in turned.items():
        white = r * (ekfac.parts[name].eigenvalues + damping).rsqrt()
        squares.append(torch.stack([row_lengths(values.flatten(1)) for values in (r, white)]).square())
    return torch.stack(squares).sum(dim=0)


class _TurnedScores(RowCollector):
    """Gathers both dot products with vectors in the eigenbasis, and each row's squared whitened length."""

    def __init__(self, scope: Scope, ekfac: Ekfac, damping: float, turned: Vectors, n_rows: int) -> None:
        self.scope, self._parts, self._turned = scope, ekfac.parts, turned
        self._roots = {name: (part.eigenvalues + damping).rsqrt() for name, part in ekfac.parts.items()}
        self.dots = np.zeros((2, len(next(iter(turned.values()))), n_rows))
        self.squares = np.zeros(n_rows)
        self._room = torch.empty(0)  # of the gradients: in new memory forming them takes three times as long on a CPU

    def begin(self, positions: list[int]) -> None:
        device = next(iter(self._roots.values())).device
        n_queries = self.dots.shape[1]
        self._total = torch.zeros((2, n_queries, len(positions)), dtype=torch.float64, device=device)
        self._squares = torch.zeros(len(positions), dtype=torch.float64, device=device)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        root, v, start = self._roots[name], self._turned[name], 0
        for some in self._parts[name].rotate(factors.live()).chunks(_BYTES):
            n = len(some.inputs) * root.numel()
            if len(self._room) < n:
                self._room = root.new_empty(n)
            r = self._room[:n].view(-1, *root.shape)
            torch.bmm(some.deltas.transpose(1, 2), some.inputs, out=r)
            rows = slice(start, start + len(r))
            self._total[0, :, rows] += products(v, r)
            self._squares[rows] += row_lengths(r.mul_(root).flatten(1)).square()
            self._total[1, :, rows] += products(v, r.mul_(root))
            start += len(r)

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return self._total, self._squares

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        self.dots[:, :, positions], self.squares[positions] = arrays

    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.dots[:, :, copies], self.squares[copies] = self.dots[:, :, sources], self.squares[sources]


def turned_scores(
    classifier: Classifier,
    scope: Scope,
    ekfac: Ekfac,
    damping: float,
    turned: Vectors,
    texts: Texts,
    labels: np.ndarray,
    *,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """<G_q, G_n> and <(H + damping I)^-1 G_q, G_n> of every pair, and <(H + damping I)^-1 G_n, G_n>.

    Args:
        classifier: Whose gradients.
        scope: Over which.
        ekfac: H, on the classifier's device.
        damping: Added to every eigenvalue.
        turned: Of the queries, as :func:`turned_gradients` gives them.
        texts: Rows, ``n`` of them, one list a text column; or encoded.
        labels: Their classes, ``(n,)``.
        on_rows: Called with the number of rows after each batch.

    Returns:
        ``(2, q, n)`` and ``(n,)``, float64.
    """
    collector = _TurnedScores(scope, ekfac, damping, turned, len(labels))
    gather(classifier, texts, labels, collector, on_rows)
    return collector.dots, collector.squares
