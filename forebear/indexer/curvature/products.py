"""Products of a scope's curvature with vectors, one pass over the rows for q of them; no matrix is formed.

The curvature is that of the mean training loss, in nats, undamped. Two kinds:

- :class:`GaussNewton`: mean over rows n of J_n^T B J_n, J_n being the derivative of the logits and B the curvature of
  the loss at the logits: diag(p) - p p^T of the cross-entropy. Never negative. It needs the factors of the rows'
  gradients alone: with directions u as in :mod:`ekfac`,
  it is the mean over n of the sum over u of <G_n(u), V> G_n(u), and G_n(u) = sum_t d_t a_t^T.
- :class:`HessianProduct`: the Hessian of the loss with the gold labels, by double backward. It can have
  negative eigenvalues. At scope ``head`` the two are equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.errors import NonFiniteError
from forebear.indexer.curvature.ekfac import curvature_seeds
from forebear.indexer.gradients.dots import add_weighted, room_for_sums, row_dots
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import Collector, SeedOf, run_pass
from forebear.indexer.gradients.tape import only_asking
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch, picks, send
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.encoding import Encoded, encode, plan_batches
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.scopes import Scope


class Product(Protocol):
    """The product with the curvature of the mean loss over all rows, or over those at some positions."""

    def __call__(self, vectors: Vectors, positions: Sequence[int] | None = None, /) -> Vectors:
        """H V for each of q vectors V."""


class GaussNewton:
    """The Gauss-Newton matrix of the mean training loss over a scope, as a product."""

    def __init__(
        self,
        classifier: Classifier,
        scope: Scope,
        texts: Sequence[Sequence[str]],
        *,
        seed: int,
        batch_tokens: int,
        targets: np.ndarray | None = None,
    ) -> None:
        """Encode the rows.

        Args:
            classifier: The model at the checkpoint.
            scope: The parameters that the curvature is over.
            texts: Training rows, one list a text column, ``(columns, n)``.
            seed: Random seed of the signs that more than 4 classes take: the matrix is then an unbiased estimate, the
                same in each product.
            batch_tokens: Largest number of padded tokens in a batch.
            targets: Targets of the rows, which play a part only where the loss weighs rows by them.
        """
        self._classifier, self._scope = classifier, scope
        self._rows, self._batch_tokens = Encoded(encode(classifier, texts)), batch_tokens
        self._seeds = curvature_seeds(classifier.loss, classifier.n_classes, len(self._rows), seed, targets)

    def __call__(self, vectors: Vectors, positions: Sequence[int] | None = None) -> Vectors:
        """H V; a batch's factors are all that is held beside V and H V.

        Args:
            vectors: V, ``(q, n_out, n_in)`` for each block, of the weights' type and on their device.
            positions: Positions of the rows that the mean is over, repeated ones counting again; default all.

        Returns:
            ``(q, n_out, n_in)`` for each block.

        Raises:
            NonFiniteError: A number is NaN or infinite.
            NotEnoughMemoryError: Not even one row fits in memory.
        """
        rows, seeds = self._rows, self._seeds
        if positions is not None:
            chosen = list(positions)
            rows = rows.take(chosen)
            seeds = tuple(_seed_at(seed_of, chosen) for seed_of in seeds)
        collector = _Outer(self._scope, vectors)
        for seed_of in seeds:
            run_pass(self._classifier, rows, seed_of, [collector], batch_tokens=self._batch_tokens)
        for total in collector.sums.values():
            total /= len(rows)
        _refuse_non_finite(self._classifier.name, collector.sums)
        return collector.sums


def _seed_at(seed_of: SeedOf, chosen: list[int]) -> SeedOf:
    """The seeds of a pass over chosen rows: each row keeps its own signs."""
    return lambda positions: seed_of([chosen[i] for i in positions])


class _BatchFactors(Protocol):
    """A block's factors at a batch of ``b`` rows."""

    def dots(self, vectors: torch.Tensor) -> torch.Tensor:
        """<G_n, V> of each row and vector, ``(q, b)`` float64."""

    def room(self, vectors: torch.Tensor) -> int:
        """How many numbers :meth:`add_to` needs room for."""

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, room: torch.Tensor) -> None:
        """Add the sum over rows of w_qn G_n, weights ``(q, b)``; takes no more memory than the room it overwrites."""


class _Tokens:
    """Factors at the ``m`` positions with an output gradient alone: no padding, often only [CLS]."""

    def __init__(self, factors: LayerFactors) -> None:
        self._live = (factors.deltas != 0).any(dim=-1)  # (b, t)
        self._rows = self._live.nonzero()[:, 0]  # (m,)
        self._inputs, self._deltas = factors.inputs[self._live], factors.deltas[self._live]  # a, d: (m, n)

    def dots(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._dots_with(v) for v in vectors])

    def _dots_with(self, v: torch.Tensor) -> torch.Tensor:
        """Sum over t of d_t . (V a_t) of each row."""
        spread = self._deltas.new_zeros(self._live.shape, dtype=torch.float64)
        spread[self._live] = ((self._inputs @ v.T) * self._deltas).sum(dim=1, dtype=torch.float64)
        return spread.sum(dim=1)

    def room(self, vectors: torch.Tensor) -> int:
        return self._deltas.numel()

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, room: torch.Tensor) -> None:
        weighted = room[: self._deltas.numel()].view_as(self._deltas)
        for sum_of_query, weight in zip(total, weights[:, self._rows, None], strict=True):
            torch.mul(self._deltas, weight, out=weighted)
            sum_of_query.addmm_(weighted.T, self._inputs)


class _Positions:
    """Factors at all positions; what has no output gradient adds zero."""

    def __init__(self, factors: LayerFactors) -> None:
        self._factors = factors

    def dots(self, vectors: torch.Tensor) -> torch.Tensor:
        return row_dots(vectors, self._factors)

    def room(self, vectors: torch.Tensor) -> int:
        return room_for_sums(vectors, self._factors)

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, room: torch.Tensor) -> None:
        add_weighted(total, weights, self._factors, room)


class _Outer(Collector):
    """Sums over rows of <G_n, V> G_n."""

    def __init__(self, scope: Scope, vectors: Vectors) -> None:
        self.scope, self._vectors = scope, vectors
        self.sums = {block.name: torch.zeros_like(vectors[block.name]) for block in scope.blocks}
        self._batch: dict[str, _BatchFactors] = {}

    def begin(self, positions: list[int]) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self._batch[name] = _Tokens(factors) if picks(factors.deltas) else _Positions(factors)

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        batch, vectors = self._batch, self._vectors
        if batch:
            dots = torch.stack([factors.dots(vectors[name]) for name, factors in batch.items()]).sum(dim=0)  # (q, b)
            first = next(iter(vectors.values()))
            self._weights = dots.to(first.dtype)
            self._room = first.new_empty(max(factors.room(vectors[name]) for name, factors in batch.items()))
        return ()

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        batch, self._batch = self._batch, {}
        for name, factors in batch.items():
            factors.add_to(self.sums[name], self._weights, self._room)


class HessianProduct:
    """The Hessian of the mean loss with gold labels over a scope, as a product; always in full precision."""

    def __init__(
        self,
        classifier: Classifier,
        scope: Scope,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray,
        *,
        batch_tokens: int,
    ) -> None:
        """Encode the rows.

        Args:
            classifier: The model at the checkpoint.
            scope: The parameters that the curvature is over.
            texts: Training rows, one list a text column, ``(columns, n)``.
            labels: Gold targets of the ``n`` rows.
            batch_tokens: Largest number of padded tokens in a batch.
        """
        self._classifier, self._scope = classifier, scope
        self._rows, self._batch_tokens = encode(classifier, texts), batch_tokens
        self._labels = torch.as_tensor(np.asarray(labels))

    def __call__(self, vectors: Vectors, positions: Sequence[int] | None = None) -> Vectors:
        """H V, with arguments and result as of :meth:`GaussNewton.__call__`.

        Raises:
            NonFiniteError: A number is NaN or infinite.
            NotEnoughMemoryError: Not even one row fits in memory.
        """
        parts: Vectors = {}
        for block in self._scope.blocks:
            parts |= block.split(vectors[block.name])
        model = self._classifier.model
        parameters = {name: model.get_parameter(name) for name in parts}
        sums = {name: torch.zeros_like(v) for name, v in parts.items()}
        chosen = range(len(self._rows)) if positions is None else list(positions)
        lengths = [len(self._rows[i]["input_ids"]) for i in chosen]
        with (
            repeatable(self._classifier.device), sdpa_kernel(SDPBackend.MATH),
            only_asking(model, parameters.values()), torch.enable_grad(),
        ):  # fmt: skip
            n_added = np.zeros(len(chosen), np.int64)  # vectors whose products with a row's Hessian are in the sums

            def run(batch: list[int]) -> None:
                rows = [chosen[i] for i in batch]
                for q in self._add(rows, parameters, parts, sums, int(n_added[batch[0]])):
                    n_added[batch] = q + 1

            plan = plan_batches(lengths, self._batch_tokens, equal_lengths=self._classifier.equal_lengths)
            batches = run_batches(
                plan, run, device=self._classifier.device, lengths=lengths,
                name=lambda i: f"the Hessian product over scope {self._scope.name} of sampled row {chosen[i]}",
            )  # fmt: skip
            deque(batches, maxlen=0)
        for total in sums.values():
            total /= len(chosen)
        _refuse_non_finite(self._classifier.name, sums)
        return {block.name: block.join(sums) for block in self._scope.blocks}

    def _add(
        self, positions: list[int], parameters: dict[str, nn.Parameter], parts: Vectors, sums: Vectors, first: int
    ) -> Iterator[int]:
        """Add the products with the Hessian of the summed loss of one batch; one backward a vector.

        Yields:
            The number of each vector, from ``first`` on, once its product is added: if memory does not suffice for the
            next, halves of the batch go on from there.
        """
        classifier = self._classifier
        weights = list(parameters.values())
        batch = pad_batch(classifier.tokenizer, [self._rows[i] for i in positions], classifier.device)
        labels = send(self._labels[positions], classifier.device)
        # In float64 p - y and its derivative stay exact for confident rows too.
        loss = classifier.loss.summed(classifier.model(**batch).logits.double(), labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        n_queries = len(next(iter(parts.values())))
        for q in range(first, n_queries):
            vector = [v[q] for v in parts.values()]
            products = torch.autograd.grad(
                gradients, weights, vector, retain_graph=q + 1 < n_queries, materialize_grads=True
            )
            for total, h in zip(sums.values(), products, strict=True):
                total[q] += h
            yield q


def _refuse_non_finite(name: str, products: Vectors) -> None:
    """Stop at the first layer with a NaN or infinity.

    Raises:
        NonFiniteError: The layer is named.
    """
    (finite,) = fetch(torch.stack([torch.isfinite(values).all() for values in products.values()]))
    if not finite.all():
        key = list(products)[int(finite.argmin())]
        raise NonFiniteError(f"{name}: the curvature product of {key} is NaN or infinite. Check model and vectors.")
