"""H^-1 applied to query gradients: which solver, at which scope, with which damping (METHODS.md, section 4).

``exact`` is the head's Cholesky factor, ``ekfac`` the Kronecker-factored eigenbasis stored in the index, ``cg`` and
``lissa`` iterate on products with the curvature of a sample of the training rows, ``identity`` does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.curvature import (
    absolute_damping,
    class_basis,
    class_curvature,
    head_hessian,
    probabilities_from_residuals,
)
from forebear.indexer.ekfac import Vectors
from forebear.indexer.forward import DEFAULT_BATCH_TOKENS
from forebear.indexer.gradients import live_sample
from forebear.indexer.index import Index
from forebear.indexer.model import Classifier
from forebear.indexer.products import GaussNewton, HessianProduct, Product
from forebear.indexer.scopes import Block
from forebear.retriever.solvers import HAN20, LissaSettings, Solved, conjugate_gradients, lissa

SOLVERS = ("exact", "ekfac", "cg", "cg-hessian", "lissa", "identity")


@dataclass(frozen=True, kw_only=True)
class CurvatureSpec:
    """Which H^-1 a question asks for.

    Attributes:
        solver: One of ``exact`` (head only), ``ekfac``, ``cg`` (on the Gauss-Newton matrix), ``cg-hessian``, ``lissa``
            (on the Hessian) and ``identity``; None: ``exact`` at the head, ``ekfac`` at other scopes.
        damping: As given; None: the index's first. ``lissa`` has its own.
        rows: Training rows on which ``cg`` and ``lissa`` compute products; 0: all. The head always takes all.
        lissa: Settings, as :meth:`LissaSettings.parse` reads them.
        tolerance: Of the relative residual of ``cg``.
    """

    solver: str | None = None
    damping: str | None = None
    rows: int = 1024
    lissa: str = str(HAN20)
    tolerance: float = 1e-3

    def check(self) -> None:
        """Refuse values that mean nothing."""
        if self.solver is not None and self.solver not in SOLVERS:
            raise InputError(f"--curvature {self.solver!r}: expected {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}.")
        if self.rows < 0:
            raise InputError(f"--curvature-rows {self.rows}: expected 0 (all) or more.")
        if self.damping is not None:
            absolute_damping(self.damping, 1.0)
        LissaSettings.parse(self.lissa)

    def at(self, scope: str) -> str:
        """The solver at a scope.

        Raises:
            InputError: ``exact`` beyond the head.
        """
        if self.solver == "exact" and scope != "head":
            raise InputError(f"--curvature exact is for scope head. At scope {scope}: ekfac, cg, lissa or identity.")
        return self.solver or ("exact" if scope == "head" else "ekfac")

    def iterates(self, scope: str) -> bool:
        """Whether the solver at a scope leaves a residual."""
        return self.at(scope) in ("cg", "cg-hessian", "lissa")

    def facts(self, index: Index, scope: str) -> dict[str, Any]:
        """What a result must say of the curvature at a scope: solver, matrix, effective damping, rows."""
        solver = self.at(scope)
        found: dict[str, Any] = {"curvature": solver}
        if solver == "identity":
            return found
        if solver == "exact":
            # A Cholesky solve in float64: no iteration, hence no residual to speak of.
            return found | {"damping": index.head_damping(self.damping)["damping"], "residual": 0.0}
        hessian = solver in ("cg-hessian", "lissa")
        found["matrix"] = "Hessian" if hessian and scope != "head" else "Gauss-Newton"
        if solver == "lissa":
            settings = LissaSettings.parse(self.lissa)
            found |= {"damping": settings.effective_damping, "lissa": str(settings)}
        else:
            found["damping"] = self.absolute(index, scope)
        if solver != "ekfac":
            n_live = index.manifest.n_live
            found["curvature_rows"] = n_live if scope == "head" or not self.rows else min(self.rows, n_live)
        return found

    def absolute(self, index: Index, scope: str) -> float:
        """Size of the damping at a scope, for solvers other than ``lissa``."""
        stored = index.manifest.curvature.get(scope, {}).get("exact" if scope == "head" else "ekfac")
        if stored is None:
            given = self.damping
            if given is None or given.endswith("x"):
                raise InputError(
                    f"the damping {given or '(none given)'} is relative to the mean eigenvalue of scope {scope}, which "
                    f"{index.folder} does not hold. Give an absolute --damping, such as 1e-5."
                )
            return absolute_damping(given, 1.0)
        if self.damping is None:
            return float(stored["damping"])
        return absolute_damping(self.damping, stored["mean_eigenvalue"])


class Solve(Protocol):
    """H^-1 applied to whole gradients."""

    def __call__(self, vectors: Vectors) -> tuple[Vectors, np.ndarray | None]:
        """Solutions, and relative residuals ``(q,)`` where the solver iterates."""


def deep_solver(
    spec: CurvatureSpec, index: Index, classifier: Classifier, scope: str, blocks: Sequence[Block]
) -> Solve:
    """H^-1 applied to whole gradients at any scope; at the head by its stored Cholesky factor alone."""
    solver = spec.at(scope)
    if solver == "identity":
        return lambda vectors: (vectors, None)
    device, dtype = classifier.device, classifier.head.weight.dtype
    if scope == "head":
        if solver != "exact":
            raise InputError(f"--curvature {solver} of whole gradients is for scopes beyond the head.")
        return _exact_head(index, classifier, spec.damping)
    if solver == "ekfac":
        _, damping = index.ekfac_damping(scope, spec.damping)
        ekfac = index.ekfac(scope).to(device, dtype)
        return lambda vectors: (ekfac.solve(vectors, damping), None)
    rows = live_sample(index.live, spec.rows, index.manifest.spec.seed)
    texts = index.text_lists(rows)
    product: Product
    if solver == "cg":
        seed = index.manifest.spec.seed
        product = GaussNewton(classifier, scope, blocks, texts, seed=seed, batch_tokens=DEFAULT_BATCH_TOKENS)
    else:
        labels = index.labels[rows].astype(np.int64)
        product = HessianProduct(classifier, scope, blocks, texts, labels, batch_tokens=DEFAULT_BATCH_TOKENS)
    return _iterative(spec, solver, product, len(rows), lambda: spec.absolute(index, scope))


def _exact_head(index: Index, classifier: Classifier, damping: str | None) -> Solve:
    """H^-1 of whole gradients of the head weight, ``(q, c, h)``; their columns sum to 0 over the classes."""
    stored = index.head_curvature(damping)
    basis = class_basis(classifier.n_classes)

    def solve(vectors: Vectors) -> tuple[Vectors, np.ndarray | None]:
        ((name, g),) = vectors.items()
        solved = stored.solve_matrix(np.einsum("ac,qch->qah", basis, g.double().cpu().numpy()))
        return {name: torch.from_numpy(np.einsum("ac,qah->qch", basis, solved)).to(g)}, None

    return solve


def _iterative(spec: CurvatureSpec, solver: str, product: Product, n_rows: int, damping: Any) -> Solve:
    """``cg`` or ``lissa`` on a product."""

    def solve(vectors: Vectors) -> tuple[Vectors, np.ndarray | None]:
        found: Solved
        if solver == "lissa":
            settings = LissaSettings.parse(spec.lissa)
            found = lissa(
                product, vectors, damping=settings.damping, scale=settings.scale, depth=settings.depth,
                batch_rows=settings.batch_rows, repeats=settings.repeats, n_rows=n_rows,
            )  # fmt: skip
        else:
            found = conjugate_gradients(product, vectors, damping(), tolerance=spec.tolerance)
        return found.vectors, found.residual

    return solve


class HeadSolver:
    """``ekfac``, ``cg`` and ``lissa`` at the head, from the stored factors alone, in float64.

    Works in the reduced class basis, like :class:`~forebear.indexer.curvature.HeadCurvature`, whose methods it has.
    """

    def __init__(self, spec: CurvatureSpec, index: Index) -> None:
        """Take the factors of the live rows."""
        self._spec, self._index, self._solver = spec, index, spec.at("head")
        live, labels = index.live, index.labels
        self._features = torch.from_numpy(index.features().take(live).astype(np.float64))
        p = probabilities_from_residuals(index.residuals().take(live), labels[live])
        self._weights = torch.from_numpy(class_curvature(p))
        self.n_classes = p.shape[1]
        self._p = p

    @cached_property
    def damping(self) -> float:
        """What is added to the diagonal."""
        if self._solver == "lissa":
            return LissaSettings.parse(self._spec.lissa).effective_damping
        given = self._spec.damping or (*self._index.manifest.spec.dampings, "0.1x")[0]
        trace = float(torch.einsum("naa,nh->", self._weights, self._features**2)) / len(self._features)
        return absolute_damping(given, trace / (self.n_classes * self._features.shape[1]))

    def solve(self, residuals: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(H + damping I)^-1 g in the reduced class basis, ``(q, c - 1, h)``, and relative residuals."""
        reduced = residuals.astype(np.float64) @ class_basis(self.n_classes).T
        g = torch.from_numpy(reduced[:, :, None] * features.astype(np.float64)[:, None, :])
        if self._solver == "ekfac":
            left, right, eigenvalues = self._ekfac
            return (left @ ((left.T @ g @ right) / (eigenvalues + self.damping)) @ right.T).numpy(), None
        found, residual = _iterative(
            self._spec, self._solver, self._product, len(self._features), lambda: self.damping
        )({"head": g})
        return found["head"].numpy(), residual

    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """<H^-1 g, g> of each row, ``(n,)`` float64."""
        out = []
        for start in range(0, len(residuals), 2048):
            r, f = residuals[start : start + 2048], features[start : start + 2048].astype(np.float64)
            reduced = r.astype(np.float64) @ class_basis(self.n_classes).T
            out.append(np.einsum("nah,na,nh->n", self.solve(r, f)[0], reduced, f, optimize=True))
        return np.asarray(np.maximum(np.concatenate(out), 0.0))

    @cached_property
    def _ekfac(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        right = torch.linalg.eigh(self._features.T @ self._features).eigenvectors
        left = torch.linalg.eigh(self._weights.sum(dim=0)).eigenvectors
        out = torch.einsum("ai,nab,bi->ni", left, self._weights, left)
        return left, right, out.T @ (self._features @ right) ** 2 / len(self._features)

    @cached_property
    def _hessian(self) -> torch.Tensor:
        return torch.from_numpy(
            head_hessian([(self._features.numpy(), self._p)], self._features.shape[1], self.n_classes)
        )

    def _product(self, vectors: Vectors, at: Sequence[int] | None = None) -> Vectors:
        v = vectors["head"]
        if at is None:
            return {"head": (v.flatten(1) @ self._hessian).view_as(v)}
        f, w = self._features[list(at)], self._weights[list(at)]
        weighted = torch.einsum("nab,qbn->qan", w, v @ f.T)
        return {"head": weighted @ f / len(f)}
