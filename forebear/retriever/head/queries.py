"""From test rows to query vectors."""

from __future__ import annotations

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.model.forward import Forward
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.vectors import VECTORS
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.inverse import CurvatureSpec, HeadSolver
from forebear.retriever.question.methods import Method


def make_query(method: Method, batch: Batch, index: Index, curvature: CurvatureSpec) -> Query:
    """Query vectors of one method at the head for a block of test rows, in float64.

    Args:
        method: Row of the method table.
        batch: The test rows.
        index: The index whose curvature, eta and N are used.
        curvature: The H^-1 of ``if`` and ``rif``.
    """
    if method.representation in VECTORS:
        vectors = VECTORS[method.representation].of_queries(batch).astype(np.float64)
        return Query(method, (Term(1.0, vectors),), np.linalg.norm(vectors, axis=1))
    if method.all_checkpoints:
        parts = [
            _gradient_term(batch.forwards[c], batch.targets, index.manifest.checkpoints[c].eta)
            for c in sorted(batch.forwards)
        ]
        return Query(method, tuple(parts), np.ones(len(batch.targets)))
    if method.query == "representer":
        return _representer(method, batch, index)
    term = _gradient_term(batch.forward, batch.targets)
    assert term.left is not None and term.right is not None
    norms = np.linalg.norm(term.left, axis=1) * np.linalg.norm(term.right, axis=1)
    solver = curvature.at("head")
    if method.query == "same" or solver == "identity":
        return Query(method, (term,), norms)
    if solver == "exact":
        stored = index.head.inverse(curvature.damping)
        norms = np.sqrt(stored.self_influence(term.left, term.right))
        solved = Term(1.0, None, matrix=stored.solve(term.left, term.right), basis=term.basis)
        return Query(method, (solved,), norms, index.head.self_influence(curvature.damping))
    iterated = HeadSolver(curvature, index)
    matrix, convergence = iterated.solve(term.left, term.right)
    self_influence = None
    if method.metric == "cos" and curvature.by_class_blocks:
        blocks = index.head.products().class_blocks(iterated.damping)
        norms = np.sqrt(blocks.self_influence(term.left, term.right))
        self_influence = index.head.blockwise_self_influence(iterated.damping)
    elif method.metric == "cos":
        norms = np.sqrt(iterated.self_influence(term.left, term.right))
        self_influence = iterated.self_influence(
            index.residuals().take(_all_rows(index)), index.features().take(_all_rows(index))
        )
    return Query(method, (Term(1.0, None, matrix=matrix, basis=term.basis),), norms, self_influence, convergence)


def _all_rows(index: Index) -> np.ndarray:
    return np.arange(index.manifest.n_rows)


def _gradient_term(forward: Forward, targets: np.ndarray, eta: float = 1.0) -> Term:
    """The query's head gradient as factors (p - y, f), y being the target."""
    residuals, _ = forward.residuals_and_losses(targets)
    basis = forward.loss.basis(residuals.shape[1])
    return Term(eta, forward.features.astype(np.float64), residuals, basis=basis)


def _representer(method: Method, batch: Batch, index: Index) -> Query:
    """alpha_nc <f_n, f_q> as a dot with (p_n - y_n) outer f_n: the left factor is -e_target / (2 lambda N)."""
    facts = index.manifest.curvature["head"]["representer"]
    directions = index.loss.representer(batch.targets, len(index.manifest.spec.label_names))
    left = directions * (-1.0 / (2 * facts["lambda"] * index.manifest.n_live))
    features, offset = batch.forward.features.astype(np.float64), 1.0 if facts["refit"] else 0.0
    term = Term(1.0, features, left, offset=offset, basis=index.loss.basis(left.shape[1]))
    return Query(method, (term,), np.ones(len(left)))
