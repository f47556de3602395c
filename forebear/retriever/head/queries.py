"""From test rows to query vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.model.forward import Forward, residual_and_loss
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.question.asked import Asked
from forebear.retriever.question.inverse import CurvatureSpec, HeadSolver
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import N_VARIANTS, VARIANT_LEARNING_RATE, VARIANT_ROWS


def make_query(method: Method, asked: Asked, index: Index, curvature: CurvatureSpec) -> Query:
    """Query vectors of one method at the head for a block of test rows, in float64.

    Args:
        method: Which.
        asked: The test rows.
        index: Whose curvature, eta and N are used.
        curvature: For ``if`` and ``rif``.
    """
    if method.representation == "sentence":
        assert asked.sentence is not None
        return _plain(method, asked.sentence)
    if method.representation == "feature":
        return _plain(method, asked.forward.features)
    if method.all_checkpoints:
        parts = [
            _gradient_term(asked.forwards[c], asked.targets, index.manifest.checkpoints[c].eta)
            for c in sorted(asked.forwards)
        ]
        return Query(method, tuple(parts), np.ones(len(asked.targets)))
    if method.query == "representer":
        return _representer(method, asked, index)
    term = _gradient_term(asked.forward, asked.targets)
    assert term.left is not None and term.right is not None
    norms = np.linalg.norm(term.left, axis=1) * np.linalg.norm(term.right, axis=1)
    solver = curvature.at("head")
    if method.query == "same" or solver == "identity":
        return Query(method, (term,), norms)
    if solver == "exact":
        stored = index.head_curvature(curvature.damping)
        norms = np.sqrt(stored.self_influence(term.left, term.right))
        solved = Term(1.0, None, matrix=stored.solve(term.left, term.right))
        return Query(method, (solved,), norms, index.head_self_influence(curvature.damping))
    iterated = HeadSolver(curvature, index)
    matrix, residual = iterated.solve(term.left, term.right)
    self_influence = None
    if method.metric == "cos":
        norms = np.sqrt(iterated.self_influence(term.left, term.right))
        self_influence = iterated.self_influence(
            index.residuals().take(_every(index)), index.features().take(_every(index))
        )
    return Query(method, (Term(1.0, None, matrix=matrix),), norms, self_influence, residual)


def _every(index: Index) -> np.ndarray:
    return np.arange(index.manifest.n_rows)


def _plain(method: Method, vectors: np.ndarray) -> Query:
    wide = vectors.astype(np.float64)
    return Query(method, (Term(1.0, wide),), np.linalg.norm(wide, axis=1))


def _gradient_term(forward: Forward, targets: np.ndarray, eta: float = 1.0) -> Term:
    """The query's head gradient as factors (p - y, f), y being the target."""
    residuals, _ = residual_and_loss(forward.logits, targets)
    return Term(eta, forward.features.astype(np.float64), residuals)


def _representer(method: Method, asked: Asked, index: Index) -> Query:
    """alpha_nc <f_n, f_q> as a dot with (p_n - y_n) outer f_n: the left factor is -e_target / (2 lambda N)."""
    facts = index.manifest.curvature["head"]["representer"]
    left = np.zeros((len(asked.targets), len(index.manifest.spec.label_names)))
    left[np.arange(len(left)), asked.targets] = -1.0 / (2 * facts["lambda"] * index.manifest.n_live)
    features = asked.forward.features.astype(np.float64)
    return Query(method, (Term(1.0, features, left, offset=1.0 if facts["refit"] else 0.0),), np.ones(len(left)))


def method_facts(method: Method, index: Index, curvature: CurvatureSpec, scope: str) -> dict[str, Any]:
    """What a result must say of a method's number: scope, metric, curvature, effective damping."""
    facts: dict[str, Any] = {
        "scope": scope if method.representation == "head" else None,
        "representation": method.representation,
        "metric": method.metric,
        "formula": method.formula,
        "sign": "larger = proponent; " + method.sign,
    }
    if method.representation == "head" and scope != "head":
        facts["with_bias"] = index.manifest.spec.with_bias
    if method.all_checkpoints:
        facts["eta"] = [c.eta for c in index.manifest.checkpoints]
    if method.variants:
        facts |= {"variants": N_VARIANTS, "variant_learning_rate": VARIANT_LEARNING_RATE, "variant_rows": VARIANT_ROWS}
    if method.words is not None:
        facts |= {"words": method.words, "tops": list(index.manifest.spec.words_tops)}
        facts["precision"] = index.manifest.spec.words_precision
    if method.query == "preconditioned":
        facts |= curvature.facts(index, scope)
    if method.query == "representer":
        head = index.manifest.curvature["head"]["representer"]
        facts |= {"lambda": head["lambda"], "refit": head["refit"]}
    return facts
