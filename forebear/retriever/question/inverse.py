"""H^-1 applied to query gradients: which solver, at which scope, with which damping (``docs/methods.md``, "Curvature").

``exact`` is the head's Cholesky factor, ``ekfac`` the Kronecker-factored eigenbasis stored in the index, ``cg`` and
``lissa`` iterate on products with the curvature of a sample of the training rows, ``identity`` takes H = I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from forebear.errors import InputError
from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.curvature.damping import (
    absolute_damping,
    damping_number,
    find_damping,
    is_relative,
    refuse_lost_damping,
    refuse_nil_damping,
)
from forebear.indexer.curvature.descent import DescentSettings, descend
from forebear.indexer.curvature.ekfac import Ekfac
from forebear.indexer.curvature.head_products import MAX_WEIGHTS
from forebear.indexer.curvature.products import GaussNewton, HessianProduct, Product
from forebear.indexer.curvature.solvers import HAN20, LissaSettings, Multiply, Solved, conjugate_gradients, lissa
from forebear.indexer.gradients.vectors import Vectors, dot
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.batch_size import BATCH_TOKENS
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.encoding import distinct
from forebear.indexer.model.scopes import Scope
from forebear.indexer.rows.sampling import live_sample
from forebear.indexer.storage.choices import DEFAULT_DAMPING

SELF_ROWS = 2048  # rows whose self-influence is solved for at once, at most
SOLVERS = ("exact", "ekfac", "astra", "cg", "cg-ekfac", "cg-hessian", "lissa", "identity")
BY_EKFAC = ("ekfac", "astra", "cg-ekfac")  # beyond the head: what takes the stored eigenbasis


@dataclass(frozen=True, kw_only=True)
class CurvatureSpec:
    """Which H^-1 a question asks for.

    Attributes:
        solver: One of ``exact`` (head only), ``ekfac``, ``astra`` (which refines it), ``cg`` and ``cg-ekfac`` (on the
            Gauss-Newton matrix; the second preconditioned by EK-FAC), ``cg-hessian``, ``lissa`` (on the Hessian) and
            ``identity``; None: ``of_head`` at the head, ``ekfac`` at other scopes.
        damping: As the user writes it (``1e-5``, ``0.1x``, ``1%``); None: the index's first. ``lissa`` has its own.
        rows: Training rows on which ``cg`` and ``lissa`` compute products; 0: all. The head always takes all, and so
            does ``astra``, some of them a step.
        lissa: Settings, as :meth:`LissaSettings.parse` reads them.
        astra: Settings, as :meth:`DescentSettings.parse` reads them.
        tolerance: Relative residual at which ``cg`` stops.
        of_head: The solver at the head where ``solver`` is None: ``exact``, or ``cg`` for an index whose head has too
            many classes for one matrix.
    """

    solver: str | None = None
    damping: str | None = None
    rows: int = 1024
    lissa: str = str(HAN20)
    astra: str = str(DescentSettings())
    tolerance: float = 1e-3
    of_head: str = "exact"

    @property
    def by_class_blocks(self) -> bool:
        """Whether self-influence at the head is that of single classes: H^-1 of all rows is not asked for by name."""
        return self.solver is None and self.of_head == "cg"

    def check(self) -> None:
        """Refuse values that mean nothing."""
        if self.solver is not None and self.solver not in SOLVERS:
            raise InputError(f"--curvature {self.solver!r}: expected {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}.")
        if self.rows < 0:
            raise InputError(f"--curvature-rows {self.rows}: expected 0 (all) or more.")
        if not 0 < self.tolerance < float("inf"):
            raise InputError(f"--tolerance {self.tolerance}: expected a number above 0.")
        if self.damping is not None:
            damping_number(self.damping)
        LissaSettings.parse(self.lissa)
        DescentSettings.parse(self.astra)

    def at(self, scope: str) -> str:
        """The solver at a scope.

        Raises:
            InputError: ``exact`` beyond the head.
        """
        if self.solver == "exact" and scope != "head":
            raise InputError(
                f"--curvature exact is for scope head. At scope {scope}: ekfac, astra, cg, lissa or identity."
            )
        if self.solver in ("astra", "cg-ekfac") and scope == "head":
            raise InputError(f"--curvature {self.solver} is for scopes beyond the head, where exact takes the whole H.")
        return self.solver or (self.of_head if scope == "head" else "ekfac")

    def n_vectors(self, scope: str) -> int:
        """Vectors of a test row that are held while H^-1 is applied.

        Its gradient and the solution; a solver that iterates also holds a residual and a direction.
        """
        return 2 if self.at(scope) in ("exact", "ekfac", "identity") else 4

    def facts(self, index: Index, scope: str) -> dict[str, Any]:
        """Facts of the curvature at a scope that stand in a result: solver, matrix, effective damping, rows."""
        solver = self.at(scope)
        found: dict[str, Any] = {"curvature": solver}
        if solver == "identity":
            return found
        if solver == "exact":
            # A Cholesky solve in float64: no iteration, hence no residual to speak of.
            return found | {"damping": index.head.damping(self.damping)["damping"], "residual": 0.0}
        hessian = solver in ("cg-hessian", "lissa")
        found["matrix"] = "Hessian" if hessian and scope != "head" else "Gauss-Newton"
        if solver == "lissa":
            settings = LissaSettings.parse(self.lissa)
            found |= {"damping": settings.effective_damping, "lissa": str(settings)}
        else:
            found["damping"] = self.absolute(index, scope)
        if solver == "astra":
            found["astra"] = str(DescentSettings.parse(self.astra))
        if solver not in ("ekfac", "astra"):
            n_live = index.manifest.n_live
            found["curvature_rows"] = n_live if scope == "head" or not self.rows else min(self.rows, n_live)
        return found

    def absolute(self, index: Index, scope: str) -> float:
        """Size of the damping at a scope, for solvers other than ``lissa``."""
        if scope == "head":
            chosen = self.damping or (*index.manifest.spec.dampings, DEFAULT_DAMPING)[0]
            return absolute_damping(chosen, index.head)
        stored = index.manifest.curvature.get(scope, {}).get("ekfac")
        if stored is None:
            given = self.damping
            if given is None or is_relative(given):
                raise InputError(
                    f"the damping {given or '(none given)'} is relative to the eigenvalues of scope {scope}, which "
                    f"{index.folder} does not hold. Give an absolute --damping, such as 1e-5."
                )
            return damping_number(given)
        number = find_damping(stored["dampings"], self.damping)
        if number is not None:
            return float(stored["dampings"][number]["damping"])
        assert self.damping is not None  # None names the first
        return absolute_damping(self.damping, index.ekfac(scope))

    def refuse_lost_damping(self, index: Index, scope: str) -> None:
        """Refuse a damping that rounding would lose beside the eigenvalues of the curvature at a scope.

        Where the index stores no eigenvalues, only a damping that is lost for any of them is refused here; the first
        product with the curvature shows the rest.

        Raises:
            InputError: The damping is lost in rounding.
        """
        solver = self.at(scope)
        if solver in ("exact", "identity"):  # the exact factor was refused at the build, if at all
            return
        dtype = torch.float64 if scope == "head" else torch.float32
        if solver == "lissa":
            LissaSettings.parse(self.lissa).refuse_lost_damping(dtype)
            return
        if self.damping is not None:
            refuse_nil_damping(self.damping, dtype, scope)
        if scope == "head":
            largest = index.head.mean_eigenvalue
        else:
            largest = index.ekfac(scope).largest_eigenvalue if index.manifest.spec.whitened else 0.0
        refuse_lost_damping(self.absolute(index, scope), largest, dtype, scope)


class Solve(Protocol):
    """H^-1 applied to whole gradients."""

    def __call__(self, vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        """Solutions, and how far they came where the solver iterates."""


def deep_solver(spec: CurvatureSpec, index: Index, classifier: Classifier, parameters: Scope) -> Solve:
    """H^-1 applied to whole gradients at any scope; at the head by its stored Cholesky factor alone."""
    scope = parameters.name
    solver = spec.at(scope)
    if solver == "identity":
        return lambda vectors: (vectors, None)
    device, dtype = classifier.device, classifier.head.weight.dtype
    spec.refuse_lost_damping(index, scope)
    if scope == "head":
        if solver == "exact":
            return _exact_head(index, classifier, spec.damping)
        if not spec.by_class_blocks:
            raise InputError(f"--curvature {solver} of whole gradients is for scopes beyond the head.")
        return _large_head(HeadSolver(spec, index))
    if solver == "ekfac":
        ekfac = index.ekfac(scope).to(device, dtype)
        return _ByEkfac(ekfac, spec.absolute(index, scope))
    rows = live_sample(index.live, 0 if solver == "astra" else spec.rows, index.manifest.spec.seed)
    texts = index.text_lists(rows)
    targets = index.targets(rows)
    product: Product
    if solver not in ("cg-hessian", "lissa"):
        product = GaussNewton(
            classifier, parameters, texts, seed=index.manifest.spec.seed, batch_tokens=classifier.batch_tokens(),
            targets=targets,
        )  # fmt: skip
    else:
        product = HessianProduct(classifier, parameters, texts, targets, batch_tokens=BATCH_TOKENS)
    precondition = None
    if solver in BY_EKFAC:
        precondition = _ByEkfac(index.ekfac(scope).to(device, dtype), spec.absolute(index, scope)).multiply
    return _iterative(spec, solver, product, len(rows), lambda: spec.absolute(index, scope), scope, precondition)


@dataclass(frozen=True)
class _ByEkfac:
    """H^-1 in the eigenbasis, which lies on the model's device."""

    ekfac: Ekfac
    damping: float

    def __call__(self, vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        return self.multiply(vectors), None

    def multiply(self, vectors: Vectors) -> Vectors:
        """The solutions alone."""
        return self.ekfac.solve(vectors, self.damping)


def _exact_head(index: Index, classifier: Classifier, damping: str | None) -> Solve:
    """H^-1 of whole gradients of the head weight, ``(q, c, h)``, which lie in the loss' basis."""
    stored = index.head.inverse(damping)
    basis = index.loss.basis(classifier.n_classes)

    def solve(vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        ((name, g),) = vectors.items()
        solved = stored.solve_matrix(np.einsum("ac,qch->qah", basis, g.double().cpu().numpy()))
        return {name: torch.from_numpy(np.einsum("ac,qah->qch", basis, solved)).to(g)}, None

    return solve


def _large_head(solver: HeadSolver) -> Solve:
    """H^-1 of whole gradients of the head weight, ``(q, c, h)``, where it has too many classes for one matrix."""

    def solve(vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        ((name, g),) = vectors.items()
        basis = torch.from_numpy(solver.basis)
        solved, convergence = solver.solve_matrix(torch.einsum("ac,qch->qah", basis, g.double().cpu()))
        return {name: torch.einsum("ac,qah->qch", basis, torch.from_numpy(solved)).to(g)}, convergence

    return solve


def _iterative(
    spec: CurvatureSpec,
    solver: str,
    product: Product,
    n_rows: int,
    damping: Callable[[], float],
    scope: str,
    precondition: Multiply | None = None,
) -> Solve:
    """``cg``, ``astra`` or ``lissa`` on a product."""

    def solve(vectors: Vectors) -> tuple[Vectors, Convergence | None]:
        found: Solved
        if solver == "lissa":
            settings = LissaSettings.parse(spec.lissa)
            found = lissa(
                product, vectors, damping=settings.damping, scale=settings.scale, depth=settings.depth,
                batch_rows=settings.batch_rows, repeats=settings.repeats, n_rows=n_rows,
            )  # fmt: skip
        elif solver == "astra":
            assert precondition is not None
            settings_of_descent = DescentSettings.parse(spec.astra)
            found = descend(
                product, vectors, damping(), precondition=precondition, settings=settings_of_descent, n_rows=n_rows
            )
        else:
            size = damping()
            found = conjugate_gradients(
                _watched(product, size, scope), vectors, size, precondition=precondition, tolerance=spec.tolerance
            )
        return found.vectors, Convergence(found.residual, found.iterations)

    return solve


def _watched(product: Product, damping: float, scope: str) -> Multiply:
    """The product, refusing a damping that is lost beside <v, H v> / <v, v>, which the largest eigenvalue reaches."""

    def multiply(vectors: Vectors) -> Vectors:
        products = product(vectors)
        lengths = dot(vectors, vectors)
        quotients = torch.where(lengths > 0, dot(vectors, products) / lengths, 0.0)
        refuse_lost_damping(damping, float(quotients.max()), next(iter(vectors.values())).dtype, scope)
        return products

    return multiply


class HeadSolver:
    """``ekfac``, ``cg`` and ``lissa`` at the head, from the stored factors alone, in float64.

    Works in the loss' basis, as :class:`~forebear.indexer.curvature.head.HeadInverse` does.
    """

    def __init__(self, spec: CurvatureSpec, index: Index) -> None:
        """Take the factors of the live rows."""
        self._spec, self._index, self._solver = spec, index, spec.at("head")
        self._products = index.head.products()
        self.basis = index.loss.basis(self._products.outputs.shape[1])
        spec.refuse_lost_damping(index, "head")

    @cached_property
    def damping(self) -> float:
        """The number that is added to the diagonal of H."""
        if self._solver == "lissa":
            return LissaSettings.parse(self._spec.lissa).effective_damping
        return self._spec.absolute(self._index, "head")

    def solve(self, residuals: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, Convergence | None]:
        """(H + damping I)^-1 g in the loss' basis, ``(q, a, h)``, and how far it came where it iterates."""
        reduced = residuals.astype(np.float64) @ self.basis.T
        return self.solve_matrix(torch.from_numpy(reduced[:, :, None] * features.astype(np.float64)[:, None, :]))

    def solve_matrix(self, gradients: torch.Tensor) -> tuple[np.ndarray, Convergence | None]:
        """The same of gradients in the basis, ``(q, a, h)`` float64."""
        if self._solver == "ekfac":
            left, right, eigenvalues = self._products.eigenbasis
            refuse_lost_damping(self.damping, float(eigenvalues.max()), eigenvalues.dtype, "head")
            return (left @ ((left.T @ gradients @ right) / (eigenvalues + self.damping)) @ right.T).numpy(), None

        def product(vectors: Vectors, at: Sequence[int] | None = None) -> Vectors:
            return {"head": self._products(vectors["head"], at)}

        solve = _iterative(
            self._spec, self._solver, product, len(self._products), lambda: self.damping, "head", self._precondition
        )
        solved, convergence = solve({"head": gradients})
        return solved["head"].numpy(), convergence

    @property
    def _precondition(self) -> Multiply | None:
        """The class blocks, where H is no one matrix and is damped; else products cost little."""
        if self._products.is_dense or not self._solver.startswith("cg") or self.damping <= 0:
            return None
        blocks = self._products.class_blocks(self.damping)
        return lambda vectors: {"head": blocks.solve(vectors["head"])}

    def self_influence(self, residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
        """<H^-1 g, g> of each row, ``(n,)`` float64; rows of the same factors are solved for once."""
        unique, inverse = distinct(np.concatenate([residuals, features.astype(residuals.dtype)], axis=1))
        residuals, features = residuals[unique], features[unique]
        out = np.empty(len(residuals))
        size = max(1, min(SELF_ROWS, MAX_WEIGHTS // (residuals.shape[1] * features.shape[1])))

        def run(rows: list[int]) -> np.ndarray:
            r, f = residuals[rows], features[rows].astype(np.float64)
            reduced = r.astype(np.float64) @ self.basis.T
            return np.asarray(np.einsum("nah,na,nh->n", self.solve(r, f)[0], reduced, f, optimize=True))

        chunks = (range(start, min(start + size, len(out))) for start in range(0, len(out), size))
        subject, remedy = "H^-1 of the head's gradient of a row".format, "Free some memory"
        for rows, values in run_batches(chunks, run, device=torch.device("cpu"), name=subject, remedy=remedy):
            out[rows] = values
        return np.asarray(np.maximum(out, 0.0)[inverse])
