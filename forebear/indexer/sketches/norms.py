"""Norms of the rows' gradients from products of their factors, and of rows of which no sketch is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from typing_extensions import override

from forebear.indexer.gradients.factors import LayerFactors, wide
from forebear.indexer.gradients.gradient_pass import ArrayCollector
from forebear.indexer.gradients.whole import gather
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import picks
from forebear.indexer.model.encoding import Texts
from forebear.indexer.model.scopes import Scope

LEAST = float(np.finfo(np.float32).tiny)  # what can be divided by
SMALL = 1e-28  # squared norms below which squares of a confident row's gradient underflow: it is scaled up


def squared_norms(factors: LayerFactors) -> torch.Tensor:
    """||G||^2 of each row, ``(b,)`` float64: sum over t, s of (d_t . d_s)(a_t . a_s), or from G if cheaper."""
    if not picks(factors.inputs):
        scaled, scale = scaled_up(factors)
        return squares_of(scaled, Grams.of(scaled)).mul_(scale.double().square_())
    return rescued(squares_of(factors, Grams.of(factors)), factors)


def rescued(squares: torch.Tensor, factors: LayerFactors) -> torch.Tensor:
    """Squared norms where those that underflow are made again of scaled gradients."""
    small = squares < SMALL
    if bool(small.any()):
        scaled, scale = scaled_up(LayerFactors(factors.inputs[small], factors.deltas[small]))
        squares[small] = squares_of(scaled, Grams.of(scaled)).mul_(scale.double().square_())
    return squares


def scaled_up(factors: LayerFactors) -> tuple[LayerFactors, torch.Tensor]:
    """Factors whose output gradients have largest numbers of 1, and what they were divided by, ``(b,)``."""
    scale = factors.deltas.abs().amax(dim=(1, 2), keepdim=True).clamp_min_(LEAST)
    return LayerFactors(factors.inputs, factors.deltas / scale), scale[:, 0, 0]


def squares_of(factors: LayerFactors, grams: Grams) -> torch.Tensor:
    """||G||^2 of each row, ``(b,)`` float64, where no square underflows."""
    if grams.products is None:
        parts = [part.gradients().square_().sum(dim=(1, 2), dtype=torch.float64) for part in factors.chunks()]
        return torch.cat(parts)
    return grams.products.sum(dim=(1, 2), dtype=torch.float64).clamp_min_(0)


@dataclass(frozen=True)
class Grams:
    """Products of the factors of each row's positions; None where whole gradients are cheaper.

    Attributes:
        inputs: a_t . a_s, ``(b, t, t)``.
        outputs: d_t . d_s, ``(b, t, t)``.
    """

    inputs: torch.Tensor | None
    outputs: torch.Tensor | None

    @cached_property
    def products(self) -> torch.Tensor | None:
        """Both multiplied, ``(b, t, t)``, whose sum is ||G||^2."""
        return None if self.inputs is None or self.outputs is None else self.inputs * self.outputs

    @classmethod
    def of(cls, factors: LayerFactors) -> Grams:
        """The products of a batch."""
        a, d = factors.inputs, factors.deltas
        tokens, n_in, n_out = a.shape[1], a.shape[2], d.shape[2]
        if tokens * (n_in + n_out) > n_in * n_out:
            return cls(None, None)
        return cls(*(wide(torch.bmm(x, x.transpose(1, 2))) for x in (a, d)))


class _Squares(ArrayCollector):
    """Gathers squared norms."""

    def __init__(self, scope: Scope, n_rows: int, device: torch.device) -> None:
        self.scope, self.out, self._device = scope, np.zeros(n_rows), device

    @override
    def begin(self, positions: list[int]) -> None:
        self._total = torch.zeros(len(positions), dtype=torch.float64, device=self._device)

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self._total += squared_norms(factors)

    @override
    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return (self._total,)


def exact_squares(classifier: Classifier, scope: Scope, texts: Texts, labels: np.ndarray) -> np.ndarray:
    """||G_n||^2 of rows, ``(n,)`` float64.

    Args:
        classifier: Whose loss gradients.
        scope: Over which.
        texts: Rows, ``n`` of them, one list a text column; or encoded.
        labels: Their classes, ``(n,)``.
    """
    collector = _Squares(scope, len(labels), classifier.device)
    gather(classifier, texts, labels, collector)
    return collector.out
