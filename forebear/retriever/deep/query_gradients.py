"""Gradients of test rows over one scope, and H^-1 of them; those of the latest block of test rows stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.gradients.whole import summed_gradients, whole_gradients
from forebear.indexer.model.encoding import Texts, take_texts
from forebear.indexer.model.scopes import Scope
from forebear.retriever.question.inverse import CurvatureSpec, Solve, deep_solver
from forebear.retriever.question.kept import size_of
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import N_VARIANTS, Models

T = TypeVar("T")


@dataclass(frozen=True)
class Queries:
    """Test rows whose gradients over one scope are compared: a query each, or one for each group of them.

    Attributes:
        texts: One list a text column, or encoded. Where the encoding holds a masked version of each row, a row's
            vector is its gradient minus that of its masked version.
        targets: Class whose loss is explained, one for each row.
        vectors: Vectors at the last checkpoint that take the place of loss gradients, such as those of a saliency;
            None: loss gradients.
        groups: Number of each row's group, from 0: the gradients of a group are summed. None: each row is a query.
    """

    texts: Texts
    targets: np.ndarray
    vectors: Vectors | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets) if self.groups is None else int(self.groups.max()) + 1

    def take(self, indices: np.ndarray) -> Queries:
        """The queries at some indices, which ascend."""
        if self.groups is not None:
            rows = np.flatnonzero(np.isin(self.groups, indices))
            numbers = np.searchsorted(indices, self.groups[rows])
            return Queries(take_texts(self.texts, rows), self.targets[rows], groups=numbers)
        tensor_indices = torch.from_numpy(np.asarray(indices))
        vectors = None if self.vectors is None else {n: v[tensor_indices.to(v.device)] for n, v in self.vectors.items()}
        return Queries(take_texts(self.texts, indices), self.targets[indices], vectors)


class QueryGradients:
    """Query vectors over one scope, at every checkpoint that a method sums over."""

    def __init__(self, models: Models, scope: str, curvature: CurvatureSpec) -> None:
        """Set up without loading a model; each is loaded when its gradients are first needed.

        Args:
            models: Models of the index.
            scope: ``head``, ``top-K``, ``all`` or ``layer:NAME``.
            curvature: The matrix H whose inverse is applied, and how it is solved for.
        """
        self.index, self.models, self.scope, self.curvature = models.index, models, scope, curvature

    @cached_property
    def last(self) -> int:
        """Number of the checkpoint that is explained."""
        return len(self.index.manifest.checkpoints) - 1

    @cached_property
    def parameters(self) -> Scope:
        """The scope's parameters."""
        return self.index.scope(self.models.classifier(), self.scope)

    def checkpoints(self, method: Method) -> list[tuple[int, float]]:
        """Numbers and weights of the checkpoints that a method sums over; numbers past the last are variants of it."""
        if method.variants:
            return [(self.last + 1 + m, 1.0) for m in range(N_VARIANTS)]
        if not method.all_checkpoints:
            return [(self.last, 1.0)]
        return [(i, c.eta) for i, c in enumerate(self.index.manifest.checkpoints)]

    def solve(self, vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        """H^-1 of query gradients at the last checkpoint, and how far it came where a solver iterated."""

        def make() -> Solve:
            return deep_solver(self.curvature, self.index, self.models.exact(), self.parameters)

        return self.models.kept.get(("solver", self.scope, self.curvature), make)(vectors)

    def at_checkpoint(self, number: int, queries: Queries) -> Vectors:
        """Whole gradients of the queries at a checkpoint; the same ``queries`` object asked again costs no pass."""
        if queries.vectors is not None:
            return queries.vectors

        def make() -> Vectors:
            arguments = (self.models.exact(number), self.parameters, queries.texts, queries.targets)
            if queries.groups is None:
                return whole_gradients(*arguments)
            return summed_gradients(*arguments, queries.groups)

        return self._of_latest(("gradients", self.scope, number), queries, make)

    def solutions(self, queries: Queries) -> tuple[Vectors, Convergence | None]:
        """H^-1 of the queries' gradients at the last checkpoint, as :meth:`solve` gives it.

        Like the gradients, the solutions of the latest block stay in memory.
        """
        return self._of_latest(self._solutions_key, queries, lambda: self.solve(self.at_checkpoint(self.last, queries)))

    @property
    def _solutions_key(self) -> Hashable:
        return ("solutions", self.scope, self.curvature)

    def _of_latest(self, key: Hashable, queries: Queries, make: Callable[[], T]) -> T:
        """What is kept of the latest block of test rows, or made of this one."""
        kept = self.models.kept
        found: tuple[Queries, T] | None
        for earlier in (self._solutions_key, key):  # solutions may hold the gradients of their block, too
            found = kept.find(earlier)
            if found is not None and found[0] is not queries:
                kept.drop(earlier)  # before its successor takes memory
                found = None
        if found is None:
            found = kept.put(key, (queries, make()), size=lambda made: size_of(made[1]))
        return found[1]
