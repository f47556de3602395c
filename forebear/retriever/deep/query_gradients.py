"""Gradients of test rows over one scope, and H^-1 of them; those of the block that was asked last are held."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.gradients.whole import summed_gradients, whole_gradients
from forebear.indexer.model.encoding import Texts, take_texts
from forebear.indexer.model.scopes import Scope
from forebear.retriever.question.inverse import CurvatureSpec, Solve, deep_solver
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import N_VARIANTS, Models


@dataclass(frozen=True)
class Queries:
    """Test rows whose gradients over one scope are compared: a query each, or one for each group of them.

    Attributes:
        texts: One list a text column, or encoded; with another version of each row, its gradient is subtracted.
        targets: Class whose loss is explained, of each row.
        vectors: What is asked instead of loss gradients, at the last checkpoint; None: those.
        groups: Number of each row's group, from 0: the gradients of a group are summed. None: a query a row.
    """

    texts: Texts
    targets: np.ndarray
    vectors: Vectors | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets) if self.groups is None else int(self.groups.max()) + 1

    def take(self, which: np.ndarray) -> Queries:
        """Some of the queries, by ascending number."""
        if self.groups is not None:
            rows = np.flatnonzero(np.isin(self.groups, which))
            numbers = np.searchsorted(which, self.groups[rows])
            return Queries(take_texts(self.texts, rows), self.targets[rows], groups=numbers)
        at = torch.from_numpy(np.asarray(which))
        vectors = None if self.vectors is None else {n: v[at.to(v.device)] for n, v in self.vectors.items()}
        return Queries(take_texts(self.texts, which), self.targets[which], vectors)


class QueryGradients:
    """Query vectors over one scope, at every checkpoint that a method sums over."""

    def __init__(self, models: Models, scope: str, curvature: CurvatureSpec) -> None:
        """Nothing is loaded yet.

        Args:
            models: Of the index whose checkpoints are asked.
            scope: ``head``, ``top-K``, ``all`` or ``layer:NAME``.
            curvature: H, whose inverse is applied.
        """
        self.index, self.models, self.scope, self.curvature = models.index, models, scope, curvature
        self._solve: Solve | None = None
        self._held: dict[int, tuple[Queries, Vectors]] = {}  # of the last block asked, by checkpoint
        self._held_solution: tuple[Queries, Vectors, np.ndarray | None] | None = None

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

    def solve(self, vectors: Vectors) -> tuple[Vectors, np.ndarray | None]:
        """H^-1 of query gradients at the last checkpoint."""
        if self._solve is None:
            classifier = self.models.classifier()
            self._solve = deep_solver(self.curvature, self.index, classifier, self.parameters)
        return self._solve(vectors)

    def at_checkpoint(self, number: int, queries: Queries) -> Vectors:
        """Whole gradients of the queries at a checkpoint; those of the last block asked are held."""
        if queries.vectors is not None:
            return queries.vectors
        held = self._held.get(number)
        if held is None or held[0] is not queries:
            classifier = self.models.classifier(number)
            where = (classifier, self.parameters, queries.texts, queries.targets)
            found = whole_gradients(*where) if queries.groups is None else summed_gradients(*where, queries.groups)
            self._held[number] = held = (queries, found)
        return held[1]

    def solutions(self, queries: Queries) -> tuple[Vectors, np.ndarray | None]:
        """H^-1 of them at the last checkpoint, and relative residuals where a solver iterated; held likewise."""
        if self._held_solution is None or self._held_solution[0] is not queries:
            self._held_solution = (queries, *self.solve(self.at_checkpoint(self.last, queries)))
        return self._held_solution[1:]
