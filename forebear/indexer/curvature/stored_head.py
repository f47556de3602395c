"""The head's curvature as an index stores it, or as its stored features and residuals give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from forebear.errors import MissingStoreError
from forebear.indexer.curvature.damping import stored_damping
from forebear.indexer.curvature.head import HeadCurvature, HeadInverse, weighted_features
from forebear.indexer.curvature.head_products import HeadProducts
from forebear.indexer.curvature.separate import SeparateHead
from forebear.indexer.losses.loss import Loss
from forebear.indexer.storage.arrow import RowMatrix, column, read_batches
from forebear.indexer.storage.files import IndexFiles


@dataclass(frozen=True, eq=False)
class StoredHead:
    """The head of an index at its last checkpoint: what its curvature is made of, and what was made of it.

    Attributes:
        files: The index' files.
        features: f of every row, ``(n, h)`` float32.
        residuals: Residual of every row, ``(n, c)`` float32.
        targets: Gives the targets of rows by their numbers.
        live: Numbers of the rows that take part, ascending: H is the mean over them.
        loss: What the model was trained to minimise.
    """

    files: IndexFiles
    features: RowMatrix
    residuals: RowMatrix
    targets: Callable[[np.ndarray], np.ndarray]
    live: np.ndarray
    loss: Loss
    _kept: dict[Any, Any] = field(default_factory=dict, init=False)  # what was read or computed, by its key

    @property
    def _facts(self) -> dict[str, Any]:
        return dict(self.files.manifest.curvature.get("head", {}))

    @property
    def solver(self) -> str | None:
        """How H^-1 is had unless another way is asked for.

        ``exact`` by its stored factor; ``cg`` where the head has too many classes for one; None without a damping.
        """
        return next((solver for solver in ("exact", "cg") if solver in self._facts), None)

    def damping(self, given: str | None = None) -> dict[str, Any]:
        """Facts of one stored damping of the exact curvature; the first one by default.

        Raises:
            MissingStoreError: The index has no curvature, or not at this damping.
        """
        folder = self.files.folder
        if self.solver == "cg":
            raise MissingStoreError(
                f"{folder}: the head has too many classes for one matrix of its curvature, so that there is no "
                "exact factor of it. Leave --curvature exact out, or ask with cg.",
                of="index",
            )
        if self.solver is None:
            raise MissingStoreError(
                f"{folder} was built with --damping none: it holds no curvature of the head. Ask with --curvature "
                "cg, or build it with a --damping.",
                of="index",
            )
        stored: list[dict[str, Any]] = self._facts["exact"]["dampings"]
        return dict(stored[stored_damping(stored, given, f"{folder} holds the head's curvature")])

    def inverse(self, given: str | None = None) -> HeadInverse:
        """(H + damping I)^-1 over the head weight."""
        facts = self.damping(given)
        name = facts["cholesky"]
        if name not in self._kept:
            factor = column(read_batches(self.files.checked(name)[0])[0], "factor")
            c, h, damping = self.residuals.width, self.features.width, facts["damping"]
            if self.loss.is_separate:
                self._kept[name] = SeparateHead(factor.reshape(c, h, h), c, damping, self.loss)
            else:
                self._kept[name] = HeadCurvature(factor, c, damping, self.loss)
        inverse: HeadInverse = self._kept[name]
        return inverse

    def self_influence(self, given: str | None = None) -> np.ndarray:
        """<H^-1 g_n, g_n> of every row, ``(n,)`` float64."""
        path = self.files.checked(self.damping(given)["self_influence"])[0]
        return column(read_batches(path)[0], "self_influence")

    def blockwise_self_influence(self, damping: float) -> np.ndarray:
        """<M^-1 g_n, g_n> of every row, ``(n,)`` float64, M being H + damping I without blocks between two classes."""
        if damping not in self._kept:
            blocks, out = self.products().class_blocks(damping), np.empty(self.files.manifest.n_rows)
            for (start, f), (_, r) in zip(self.features.blocks(), self.residuals.blocks(), strict=True):
                out[start : start + len(f)] = blocks.self_influence(r, f)
            self._kept[damping] = out
        return np.asarray(self._kept[damping])

    def factors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted features and outputs of some rows: what the curvature is made of."""
        targets = self.targets(rows)
        features = weighted_features(self.features.take(rows), self.loss.row_weights(targets))
        return features, self.loss.outputs_of_residuals(self.residuals.take(rows), targets)

    def products(self) -> HeadProducts:
        """H over the live rows as a product with vectors; kept where there is no other form."""
        return HeadProducts(*self.factors(self.live), self.loss) if self.solver == "exact" else self._products

    @cached_property
    def _products(self) -> HeadProducts:
        return HeadProducts(*self.factors(self.live), self.loss)

    @cached_property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of H; where it is not stored, from its trace."""
        if stored := self._facts.get("exact") or self._facts.get("cg"):
            return float(stored["mean_eigenvalue"])
        trace = 0.0
        for rows in np.array_split(self.live, -(-len(self.live) // 4096)):
            traces = self.loss.curvature_trace(self.residuals.take(rows), self.targets(rows))
            trace += float(traces @ (self.features.take(rows).astype(np.float64) ** 2).sum(axis=1))
        return trace / len(self.live) / (self.features.width * self.residuals.width)

    def representer_residuals(self) -> RowMatrix:
        """Residuals p' - y of the refitted head (``--rep-refit``), ``(n, c)`` float64."""
        name = self._facts["representer"].get("file")
        if name is None:
            raise MissingStoreError(f"{self.files.folder} has no refitted head. Build it with --rep-refit.")
        return RowMatrix([column(read_batches(self.files.checked(name)[0])[0], "residual")])
