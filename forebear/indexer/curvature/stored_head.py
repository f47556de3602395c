"""The head's curvature as an index stores it, or as its stored features and residuals give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from forebear.errors import MissingStoreError
from forebear.indexer.curvature.damping import absolute_damping, find_damping
from forebear.indexer.curvature.head import (
    HeadCurvature,
    HeadInverse,
    Spectrum,
    factorise,
    fits_dense,
    head_hessian,
    largest_eigenvalue,
    mean_eigenvalue,
    weighted_features,
)
from forebear.indexer.curvature.head_products import HeadProducts
from forebear.indexer.curvature.separate import SeparateHead, mean_eigenvalue_of_blocks, separate_hessian
from forebear.indexer.losses.loss import Loss
from forebear.indexer.storage.arrow import RowMatrix, column, read_batches
from forebear.indexer.storage.files import IndexFiles

_COMPARED_ROWS = 1 << 16


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
        """Facts of one damping of the exact curvature; the first one that the index was built with by default.

        Of another damping only its size, ``damping``: what depends on it is computed where it is asked for.

        Raises:
            InputError: The damping means nothing.
            MissingStoreError: The index has no curvature.
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
        number = find_damping(stored, given)
        if number is not None:
            return dict(stored[number])
        assert given is not None
        return {"given": given, "damping": absolute_damping(given, self)}

    def inverse(self, given: str | None = None) -> HeadInverse:
        """(H + damping I)^-1 over the head weight.

        Raises:
            InputError: The damping is too small to be solved with in float64.
        """
        facts = self.damping(given)
        name = facts.get("cholesky", ("cholesky", facts["damping"]))
        if name not in self._kept and "cholesky" not in facts:
            self._kept[name] = self.factorised(self.hessian(), facts["damping"])
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
        facts = self.damping(given)
        if "self_influence" in facts:
            return self._column(facts["self_influence"], "self_influence")
        key = ("self-influence", facts["damping"])
        if key not in self._kept:
            self._kept[key] = self.self_influence_under(self.inverse(given))
        return np.asarray(self._kept[key])

    def hessian(self) -> np.ndarray:
        """H over the live rows, undamped, ``(m, m)`` float64; of separate outputs its diagonal blocks ``(c, h, h)``."""
        starts = [start for start, _ in self.features.blocks()]
        live = np.split(self.live, np.searchsorted(self.live, starts[1:]))  # of each block of rows
        form = separate_hessian if self.loss.is_separate else head_hessian
        return form(map(self.factors, live), self.features.width, self.residuals.width, self.loss)

    def factorised(self, hessian: np.ndarray, damping: float) -> HeadCurvature | SeparateHead:
        """H + damping I, factorised.

        Raises:
            InputError: The sum is too near to singular to be solved in float64.
        """
        if self.loss.is_separate:
            return SeparateHead.of(hessian, damping, self.loss)
        return HeadCurvature(factorise(hessian, damping), self.residuals.width, damping, self.loss)

    def self_influence_under(self, inverse: HeadInverse) -> np.ndarray:
        """<H^-1 g_n, g_n> of every row, ``(n,)`` float64, the same to the bit for equal rows."""
        blocks = zip(self.features.blocks(), self.residuals.blocks(), strict=True)
        values = np.concatenate([inverse.self_influence(r, f) for (_, f), (_, r) in blocks])
        return np.asarray(values[self.first_equal_rows()])

    def first_equal_rows(self) -> np.ndarray:
        """For each row the number of the first row with the same feature and residual, ``(n,)``.

        A product over a block of rows rounds each row by its place in the block, so equal rows would get different last
        bits; they all take the number of the first instead.
        """
        blocks = zip(self.features.blocks(), self.residuals.blocks(), strict=True)
        hashes = np.concatenate([_hashes(np.concatenate([f, r], axis=1)) for (_, f), (_, r) in blocks])
        _, firsts, kinds = np.unique(hashes, return_index=True, return_inverse=True)
        first = firsts[kinds]
        repeated = np.flatnonzero(first != np.arange(len(first)))
        for start in range(0, len(repeated), _COMPARED_ROWS):
            rows = repeated[start : start + _COMPARED_ROWS]
            if not np.array_equal(self._bits(rows), self._bits(first[rows])):
                return self._first_equal_by_bytes(repeated, first)
        return first

    def _first_equal_by_bytes(self, repeated: np.ndarray, first: np.ndarray) -> np.ndarray:
        """:meth:`first_equal_rows` where different rows have one hash: of the rows that share one, by their bytes."""
        found, numbers = np.arange(len(first)), dict[bytes, int]()
        for row in np.union1d(repeated, first[repeated]):
            found[row] = numbers.setdefault(self._bits(np.array([row])).tobytes(), int(row))
        return found

    def _bits(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([self.features.take(rows), self.residuals.take(rows)], axis=1).view(np.uint32)

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
        if (stored := self._stored_spectrum("mean_eigenvalue")) is not None:
            return stored
        trace = 0.0
        for rows in np.array_split(self.live, -(-len(self.live) // 4096)):
            traces = self.loss.curvature_trace(self.residuals.take(rows), self.targets(rows))
            trace += float(traces @ (self.features.take(rows).astype(np.float64) ** 2).sum(axis=1))
        return trace / len(self.live) / (self.features.width * self.residuals.width)

    @cached_property
    def largest_eigenvalue(self) -> float:
        """Largest eigenvalue of H; where it is not stored, from H or its products."""
        if (stored := self._stored_spectrum("largest_eigenvalue")) is not None:
            return stored
        if fits_dense(self.residuals.width, self.features.width, self.loss):
            return self.spectrum_of(self.hessian()).largest_eigenvalue
        return self._products.largest_eigenvalue()

    def spectrum_of(self, hessian: np.ndarray) -> Spectrum:
        """Mean and largest eigenvalue of H in the form that :meth:`hessian` gives."""
        if self.loss.is_separate:
            return Spectrum(mean_eigenvalue_of_blocks(hessian), max(map(largest_eigenvalue, hessian)))
        return Spectrum(mean_eigenvalue(hessian, self.residuals.width, self.loss), largest_eigenvalue(hessian))

    def _stored_spectrum(self, name: str) -> float | None:
        found = self._facts.get("exact") or self._facts.get("cg") or {}
        return float(found[name]) if name in found else None

    def representer_residuals(self) -> RowMatrix:
        """Residuals p' - y of the refitted head (``--rep-refit``), ``(n, c)`` float64."""
        name = self._facts["representer"].get("file")
        if name is None:
            raise MissingStoreError(f"{self.files.folder} has no refitted head. Build it with --rep-refit.")
        return RowMatrix([self._column(name, "residual")])

    def _column(self, file: str, name: str) -> np.ndarray:
        """A column of a file, mapped once: whoever holds the head can read it when a change has removed the file."""
        if file not in self._kept:
            self._kept[file] = column(read_batches(self.files.checked(file)[0])[0], name)
        return np.asarray(self._kept[file])


def _hashes(values: np.ndarray) -> np.ndarray:
    """A number for each row of float32 values ``(n, k)``, the same for equal bits, ``(n,)`` uint64."""
    factors = np.random.default_rng(0).integers(1 << 63, size=values.shape[1], dtype=np.uint64) * 2 + 1
    return np.asarray(values.view(np.uint32).astype(np.uint64) @ factors)  # modulo 2^64
