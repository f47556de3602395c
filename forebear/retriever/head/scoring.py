"""The formulas: scores of factored rows against factored queries.

A head gradient is the outer product of p - y and f and is never formed: <a outer x, r outer f> = <a, r> <x, f>.
Rows come either as a block shared by all queries, ``(n, h)``, giving scores ``(q, n)``, or as candidates of
each query, ``(q, k, h)``, giving ``(q, k)``; the formulas are the same. All functions keep the precision of
their inputs: float64 in, float64 out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.model.device.copies import as_tensor
from forebear.ratio import ratio
from forebear.retriever.question.methods import Method


@dataclass(frozen=True)
class Term:
    """A query's part at one checkpoint: ``weight`` times one of three forms.

    Attributes:
        weight: eta of the checkpoint, else 1.
        right: x, ``(q, h)``: <x, f_n>.
        left: a, ``(q, c)``, or None: <a, r_n> <x, f_n> with r = p - y.
        matrix: V, ``(q, m, h)`` in the loss' basis B, in place of ``left`` and ``right``: sum over a of
            (B r_n)_a <V_a, f_n>.
        offset: Added to <x, f_n> (the representer kernel's bias).
        basis: B, ``(m, c)``, of a term that has a matrix, or whose sum over queries has one.
    """

    weight: float
    right: np.ndarray | None
    left: np.ndarray | None = None
    matrix: np.ndarray | None = None
    offset: float = 0.0
    basis: np.ndarray | None = None


@dataclass(frozen=True)
class Query:
    """Query vectors of one method for ``q`` test rows.

    Attributes:
        method: The method.
        terms: One term a checkpoint.
        norms: Length of each query vector in the method's inner product, ``(q,)``; cosines are divided by it.
        self_influence: <H^-1 g_n, g_n> of every training row, ``(N,)``, for preconditioned cosines; else None.
        convergence: How far H^-1 of the ``q`` gradients came, where a solver iterated; else None.
    """

    method: Method
    terms: tuple[Term, ...]
    norms: np.ndarray
    self_influence: np.ndarray | None = None
    convergence: Convergence | None = None

    def __len__(self) -> int:
        return len(self.norms)

    def take(self, indices: np.ndarray) -> Query:
        """The query vectors of the test rows at some indices."""

        def pick(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[indices]

        terms = tuple(replace(t, right=pick(t.right), left=pick(t.left), matrix=pick(t.matrix)) for t in self.terms)
        convergence = None if self.convergence is None else self.convergence.take(indices)
        return replace(self, terms=terms, norms=self.norms[indices], convergence=convergence)


def summed(query: Query, groups: np.ndarray, n_groups: int) -> Query:
    """Query vectors added up by group, in float64; the scores of a sum are the sums of the scores.

    Args:
        query: Query vectors of ``q`` test rows, for a method that is linear in the query, without an offset.
        groups: Number of each test row's group, ``(q,)``.
        n_groups: Number of groups, g; a group without rows gets the zero vector.

    Returns:
        ``g`` queries; their convergence is the worst of the rows', and their norms, which dots do not
        need, are 1.
    """
    membership = (groups == np.arange(n_groups)[:, None]).astype(np.float64)
    terms = []
    for term in query.terms:
        assert term.offset == 0
        if term.matrix is not None:
            matrix: np.ndarray | None = np.einsum("gq,qah->gah", membership, term.matrix)
        elif term.left is not None:
            assert term.right is not None
            assert term.basis is not None
            reduced = term.left @ term.basis.T
            matrix = np.einsum("gq,qa,qh->gah", membership, reduced, term.right, optimize=True)
        else:
            matrix = None
        right = None if matrix is not None or term.right is None else membership @ term.right
        terms.append(Term(term.weight, right, matrix=matrix, basis=term.basis))
    convergence = None if query.convergence is None else query.convergence.of_groups(membership > 0)
    return Query(query.method, tuple(terms), np.ones(n_groups), convergence=convergence)


def added(first: Query, second: Query) -> Query:
    """Sum of the query vectors of one method, query by query; of their convergences the worse."""

    def plus(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return None if a is None or b is None else a + b

    terms = tuple(
        replace(a, right=plus(a.right, b.right), matrix=plus(a.matrix, b.matrix))
        for a, b in zip(first.terms, second.terms, strict=True)
    )
    convergence = None
    if first.convergence is not None and second.convergence is not None:
        convergence = first.convergence.or_worse(second.convergence)
    return replace(first, terms=terms, convergence=convergence)


def dots(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """<x_q, f_n>: rows ``(n, h)`` give ``(q, n)``, candidates ``(q, k, h)`` give ``(q, k)``.

    A block goes through torch, like every other parallel step of a search (two pools of threads would wait for each
    other's cores). Candidates are summed pair by pair, so that equal rows get the same bits wherever they stand.
    """
    if rows.ndim == 3:
        return np.asarray(np.einsum("qh,qkh->qk", queries, rows))
    return np.asarray((as_tensor(queries) @ as_tensor(rows).T).numpy())


def term_scores(term: Term, features: np.ndarray, residuals: np.ndarray | None) -> np.ndarray:
    """One checkpoint's part of the dot product <v_q, r_n>, before its weight.

    Args:
        term: The queries' part, for q test rows.
        features: f, ``(n, h)`` or ``(q, k, h)``.
        residuals: p - y, ``(n, c)`` or ``(q, k, c)``; None for representations without residuals.

    Returns:
        ``(q, n)`` or ``(q, k)``.
    """
    if term.matrix is not None:
        assert residuals is not None
        assert term.basis is not None
        reduced = residuals @ term.basis.T.astype(residuals.dtype)
        parts = (dots(term.matrix[:, a], features) * reduced[..., a] for a in range(reduced.shape[-1]))
        return np.asarray(sum(parts))
    assert term.right is not None
    scores = dots(term.right, features)
    if term.offset:
        scores = scores + term.offset
    if term.left is not None:
        assert residuals is not None
        scores = scores * dots(term.left, residuals)
    return scores


def exact_scores(
    query: Query,
    features: tuple[np.ndarray, ...],
    residuals: tuple[np.ndarray, ...],
    rows: np.ndarray,
) -> np.ndarray:
    """Final scores in float64, larger = proponent (``docs/methods.md``, "Conventions" and "The methods").

    A cosine with a zero vector is 0.

    Args:
        query: Query vectors of one method.
        features: f at each checkpoint of the method, ``(n, h)`` or ``(q, k, h)``.
        residuals: p - y at each checkpoint, ``(n, c)`` or ``(q, k, c)``; empty for representations without residuals.
        rows: Row numbers, ``(n,)`` or ``(q, k)``.

    Returns:
        ``(q, n)`` or ``(q, k)`` float64.
    """
    wide_features = [f.astype(np.float64) for f in features]
    wide_residuals: list[np.ndarray | None] = [r.astype(np.float64) for r in residuals] or [None] * len(wide_features)
    if query.method.metric == "euc":
        x = query.terms[0].right
        assert x is not None
        return -_distances(x.astype(np.float64), wide_features[0])
    parts = (
        t.weight * term_scores(t, f, r) for t, f, r in zip(query.terms, wide_features, wide_residuals, strict=True)
    )
    scores = np.asarray(sum(parts))
    if query.method.metric == "dot":
        return scores
    if query.self_influence is not None:
        norms = np.sqrt(query.self_influence[rows])
    else:
        norms = _lengths(wide_features[0])
        if wide_residuals[0] is not None:
            norms = norms * _lengths(wide_residuals[0])
    divisors = query.norms[:, None] * norms
    return ratio(scores, divisors)


def _lengths(values: np.ndarray) -> np.ndarray:
    """Euclidean norm along the last axis."""
    return np.asarray(np.sqrt(np.einsum("...h,...h->...", values, values)))


def _distances(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Euclidean distances by subtraction, which keeps near-duplicates apart; ``(q, n)`` or ``(q, k)``."""
    if rows.ndim == 3:
        return _lengths(rows - queries[:, None, :])
    return np.stack([_lengths(rows - x) for x in queries])
