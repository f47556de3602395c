"""Whole gradients of a few rows, and exact dot products of many rows' gradients with them; no gradient is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from forebear.indexer.gradients.dots import by_gradients, dots_of_gradients, row_dots
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import Collector, RowCollector, labels_seed, plan, run_pass
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import picks, send
from forebear.indexer.model.encoding import Encoded, Texts, as_encoded, distinct_rows
from forebear.indexer.model.scopes import Scope

CPU_TOKENS = 2048  # of a batch on a CPU


class _Gradients(RowCollector):
    """Gathers whole gradients; a batch that is begun again writes its rows again, so that none are held twice."""

    def __init__(self, scope: Scope, n_rows: int, weight: torch.Tensor) -> None:
        self.scope, self.out, self._device = scope, scope.zeros(n_rows, weight), weight.device

    def begin(self, positions: list[int]) -> None:
        self._positions = send(np.array(positions), self._device)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self.out[name][self._positions] = factors.gradients()

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        pass

    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        there, here = send(sources, self._device), send(copies, self._device)
        for gradients in self.out.values():
            gradients[here] = gradients[there]


def gather(
    classifier: Classifier,
    texts: Texts,
    labels: np.ndarray,
    collector: Collector,
    on_rows: Callable[[int], None] | None = None,
) -> None:
    """Run the rows' loss gradients past a collector."""
    seeds, batch_tokens = labels_seed(classifier.loss, labels), classifier.batch_tokens(CPU_TOKENS)
    run_pass(classifier, texts, seeds, [collector], batch_tokens=batch_tokens, on_rows=on_rows)


def whole_gradients(
    classifier: Classifier,
    scope: Scope,
    texts: Texts,
    labels: np.ndarray,
) -> Vectors:
    """Loss gradients of a few rows, ``(q, n_out, n_in)`` for each block of the scope."""
    collector = _Gradients(scope, len(labels), classifier.head.weight)
    gather(classifier, texts, labels, collector)
    return collector.out


class _Sums(Collector):
    """Gathers sums of gradients by group; no row's gradient is formed."""

    def __init__(self, scope: Scope, groups: np.ndarray, weight: torch.Tensor) -> None:
        self.scope, self.out = scope, scope.zeros(int(groups.max()) + 1, weight)
        self._groups, self._device = groups, weight.device
        self._batch: dict[str, list[torch.Tensor]] = {}

    def begin(self, positions: list[int]) -> None:
        self._batch = {}
        mine = self._groups[positions]
        self._members = [(int(g), send(np.flatnonzero(mine == g), self._device)) for g in np.unique(mine)]

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self._batch[name] = []
        for _, members in self._members:
            d, a = factors.deltas[members].flatten(0, 1), factors.inputs[members].flatten(0, 1)
            self._batch[name].append(d.T @ a)

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        for name, sums in self._batch.items():
            for (group, _), total in zip(self._members, sums, strict=True):
                self.out[name][group] += total
        self._batch = {}


def summed_gradients(
    classifier: Classifier,
    scope: Scope,
    texts: Texts,
    labels: np.ndarray,
    groups: np.ndarray,
) -> Vectors:
    """Sums of the loss gradients of the rows of each group, ``(g, n_out, n_in)`` for each block of the scope.

    Args:
        classifier: Whose gradients.
        scope: Over which.
        texts: Rows, ``q`` of them, one list a text column; or encoded.
        labels: Their classes, ``(q,)``.
        groups: Number of each row's group, from 0, ``(q,)``.
    """
    collector = _Sums(scope, groups, classifier.head.weight)
    gather(classifier, texts, labels, collector)
    return collector.out


class _Dots(RowCollector):
    """Gathers dots with query vectors."""

    def __init__(self, scope: Scope, vectors: Vectors, n_rows: int, wanted: np.ndarray | None) -> None:
        self.scope = scope
        self._vectors, self._wanted = vectors, wanted
        first = next(iter(vectors.values()))
        self._device = first.device
        self.out = np.zeros((len(first), n_rows))

    def begin(self, positions: list[int]) -> None:
        self._total = torch.zeros((len(self.out), len(positions)), dtype=torch.float64, device=self._device)
        self._rows_of = None
        if self._wanted is not None and picks(self._total):
            wanted = self._wanted[:, positions]
            self._rows_of = [torch.from_numpy(np.flatnonzero(row_mask)) for row_mask in wanted]
            self._share = float(wanted.sum()) / len(positions)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        v, a, d = self._vectors[name], factors.inputs, factors.deltas
        if not picks(a):
            self._total += row_dots(v, factors)
            return
        share = len(v) if self._rows_of is None else self._share
        if by_gradients(share, len(v), a.shape[1]):
            self._total += dots_of_gradients(v, factors)
            return
        for q in range(len(v)):
            rows = slice(None) if self._rows_of is None else self._rows_of[q]
            self._total[q, rows] += ((a[rows] @ v[q].T) * d[rows]).sum(dim=(1, 2))

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return (self._total,)

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        (self.out[:, positions],) = arrays

    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.out[:, copies] = self.out[:, sources]


def exact_dots(
    classifier: Classifier,
    scope: Scope,
    vectors: Vectors,
    texts: Texts,
    labels: np.ndarray,
    *,
    wanted: np.ndarray | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
    """<V_q, G_n> over a scope, from the factors of the rows' gradients.

    For few queries a row, sum over t of d_t . (V a_t), no gradient being formed; for many, a batch's gradients are
    formed block by block and multiplied.

    Rows of the same word pieces and label are run once: they get the same number, to the last bit.

    Args:
        classifier: Whose gradients.
        scope: Over which.
        vectors: V, ``(q, n_out, n_in)`` for each block.
        texts: Training rows, ``n`` of them, one list a text column; or encoded.
        labels: Their classes, ``(n,)``.
        wanted: Which pairs are asked for, ``(q, n)`` bool; others may come out as 0. None: all.
        on_rows: Called with the number of rows after each batch.

    Returns:
        ``(q, n)`` float64.
    """
    encoded = as_encoded(classifier, texts)
    if wanted is not None:  # of the rows that are run: by any of their kind
        first, kinds = distinct_rows(encoded, labels)
        wanted = wanted_of_kinds(wanted, kinds, len(first))[:, kinds]
    collector = _Dots(scope, vectors, len(labels), wanted)
    gather(classifier, encoded, labels, collector, on_rows)
    return collector.out


def wanted_of_kinds(wanted: np.ndarray, kinds: np.ndarray, n_kinds: int) -> np.ndarray:
    """Which pairs are asked for, ``(q, kinds)``, of any of the equal rows of a kind; of ``wanted`` ``(q, n)``."""
    some = np.zeros((n_kinds, len(wanted)), bool)
    np.logical_or.at(some, kinds, wanted.T)
    return some.T


def batches_of(classifier: Classifier, scope: Scope, rows: Encoded) -> list[list[int]]:
    """Positions of the rows of each batch that :func:`exact_dots` runs, where all rows differ and fit in memory."""
    versions = 1 if rows.minus is None else 2
    return plan(
        classifier,
        [scope],
        [versions * len(row["input_ids"]) for row in rows.rows],
        classifier.batch_tokens(CPU_TOKENS),
    )
