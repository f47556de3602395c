"""Gradients of scopes beyond the head: candidates from the stored sketches, exact scores from the model.

<V, G_n> over all layers of the scope is computed from the factors of the candidates' gradients, in one forward and one
backward of activations for each candidate and checkpoint, for all methods together; no gradient is stored. Which rows
become candidates is decided by the sketches: of the gradients themselves for ``gd``, ``gc`` and ``tracin``, of the
gradients whitened by the index's curvature for ``if`` and ``rif``. Under another H^-1 than the whitened sketches' own,
candidates for ``if`` come from a sketch of the solution H^-1 g beside the rows' plain sketches, and for ``rif``, which
also divides by the rows' lengths under H^-1, from both kinds of sketch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from forebear.indexer.ekfac import Vectors, dot
from forebear.indexer.encoding import Texts, as_encoded, distinct_rows, take_texts
from forebear.indexer.estimate import Part, Proposal, propose
from forebear.indexer.forward import DEFAULT_BATCH_TOKENS
from forebear.indexer.gradient_stage import gradient_files, open_sketcher
from forebear.indexer.gradients import exact_dots, summed_gradients, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model import Classifier
from forebear.indexer.scopes import Block, scope_blocks
from forebear.indexer.sketch import Sketcher, SketchRows, sketch_rows
from forebear.retriever.curvature import CurvatureSpec, Solve, deep_solver
from forebear.retriever.methods import Method
from forebear.retriever.queries import N_VARIANTS, Models
from forebear.retriever.recall import UNWHITENED, same_as
from forebear.retriever.scoring import rank
from forebear.retriever.search import Ranking, join

VECTOR_BYTES = 1 << 30  # whole query vectors held at once
SELF_ROWS = 8  # candidates whose self-influence is solved for at once


@dataclass(frozen=True)
class Asked:
    """Test rows of a block, at one scope: a query each, or one for each group of them.

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

    def take(self, which: np.ndarray) -> Asked:
        """Some of the queries, by ascending number."""
        if self.groups is not None:
            rows = np.flatnonzero(np.isin(self.groups, which))
            numbers = np.searchsorted(which, self.groups[rows])
            return Asked(take_texts(self.texts, rows), self.targets[rows], groups=numbers)
        at = torch.from_numpy(np.asarray(which))
        vectors = None if self.vectors is None else {n: v[at.to(v.device)] for n, v in self.vectors.items()}
        return Asked(take_texts(self.texts, which), self.targets[which], vectors)


class Rows(Protocol):
    """What is scored, by number."""

    def texts(self, at: np.ndarray) -> Texts:
        """Texts of some of them."""

    def labels(self, at: np.ndarray) -> np.ndarray:
        """Gold classes, ``(n,)`` int64."""


class IndexRows:
    """The training rows of an index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def texts(self, at: np.ndarray) -> Texts:
        """See :class:`Rows`."""
        return self._index.text_lists(at)

    def labels(self, at: np.ndarray) -> np.ndarray:
        """See :class:`Rows`."""
        return np.asarray(self._index.labels[at].astype(np.int64))


class GradientSearch:
    """Scores training rows by gradients over one scope beyond the head, for blocks of test rows."""

    def __init__(self, index: Index, models: Models, scope: str, curvature: CurvatureSpec) -> None:
        """Nothing is loaded yet.

        Args:
            index: With the scope's sketches.
            models: Its models.
            scope: ``top-K``, ``all`` or ``layer:NAME``; at ``head`` rows can be scored, but nothing proposes any.
            curvature: For ``if`` and ``rif``.
        """
        if scope != "head":
            index.check_scope(scope)
        self.index, self.models, self.scope, self.curvature = index, models, scope, curvature
        self.rows: Rows = IndexRows(index)
        self._solve: Solve | None = None
        self._sketchers: dict[tuple[int, int | None], Sketcher] = {}
        self._held: dict[int, tuple[Asked, Vectors]] = {}  # of the last block asked, by checkpoint
        self._held_solution: tuple[Asked, Vectors, np.ndarray | None] | None = None

    @cached_property
    def last(self) -> int:
        """Number of the checkpoint that is explained."""
        return len(self.index.manifest.checkpoints) - 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The scope's parameters."""
        classifier = self.models.classifier()
        with_bias = self.index.manifest.spec.with_bias and self.scope != "head"
        return scope_blocks(classifier.model, classifier.head_name, self.scope, classifier.name, with_bias=with_bias)

    def over(self, rows: Rows) -> GradientSearch:
        """The same question's search, which scores other rows; what is held of the test rows is shared."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def checkpoints(self, method: Method) -> list[tuple[int, float]]:
        """Numbers and weights of the checkpoints that a method sums over; numbers past the last are variants of it."""
        if method.variants:
            return [(self.last + 1 + m, 1.0) for m in range(N_VARIANTS)]
        if not method.all_checkpoints:
            return [(self.last, 1.0)]
        return [(i, c.eta) for i, c in enumerate(self.index.manifest.checkpoints)]

    def sketched(self, method: Method) -> list[tuple[int, float]]:
        """The same of the checkpoints whose sketches propose candidates: variants are too near to have their own."""
        return [(self.last, float(N_VARIANTS))] if method.variants else self.checkpoints(method)

    def solve(self, vectors: Vectors) -> tuple[Vectors, np.ndarray | None]:
        """H^-1 of query gradients at the last checkpoint."""
        if self._solve is None:
            classifier = self.models.classifier()
            self._solve = deep_solver(self.curvature, self.index, classifier, self.scope, self.blocks)
        return self._solve(vectors)

    def gradients_of(self, number: int, asked: Asked) -> Vectors:
        """Whole gradients of the queries at a checkpoint; those of the last block asked are held."""
        if asked.vectors is not None:
            return asked.vectors
        held = self._held.get(number)
        if held is None or held[0] is not asked:
            classifier = self.models.classifier(number)
            where = (classifier, self.scope, self.blocks, asked.texts, asked.targets)
            found = whole_gradients(*where) if asked.groups is None else summed_gradients(*where, asked.groups)
            self._held[number] = held = (asked, found)
        return held[1]

    def solutions_of(self, asked: Asked) -> tuple[Vectors, np.ndarray | None]:
        """H^-1 of them at the last checkpoint, and relative residuals where a solver iterated; held likewise."""
        if self._held_solution is None or self._held_solution[0] is not asked:
            self._held_solution = (asked, *self.solve(self.gradients_of(self.last, asked)))
        return self._held_solution[1:]

    def white_number(self) -> int | None:
        """Number of the damping whose whitened sketches propose candidates for ``if`` and ``rif``; None: none do."""
        if not self.index.manifest.spec.whitened or self.curvature.at(self.scope) == "identity":
            return None
        return self.index.ekfac_damping(self.scope, self.curvature.damping)[0] if self._whitened_alike else 0

    @property
    def _whitened_alike(self) -> bool:
        """Whether the whitened sketches are of the H^-1 that is asked for; refused if at a damping that has none."""
        return self.curvature.at(self.scope) == "ekfac"

    def parts(self, methods: Sequence[Method], asked: Asked, *, spans: bool = False) -> dict[str, list[Part]]:
        """Sketches of the test rows beside those of the training rows, for each method; one pass a checkpoint.

        ``spans``: beside those of all stored spans instead, at the last checkpoint.
        """
        found: dict[tuple[int, int | None], SketchRows] = {}
        for number in sorted({number for method in methods for number, _ in self.sketched(method)}):
            wanted = sorted({kind for m in methods for kind in self._kinds(m) if kind[0] == number}, key=str)
            sketchers = [self.sketcher(*kind) for kind in wanted]
            if sketchers and (asked.vectors is not None or asked.groups is not None):
                vectors, device = self.gradients_of(number, asked), self.models.classifier(number).device
                found |= {k: s.of_matrix(vectors, device) for k, s in zip(wanted, sketchers, strict=True)}
            elif sketchers:
                classifier = self.models.classifier(number)
                rows, _ = sketch_rows(
                    classifier, sketchers, asked.texts, asked.targets, batch_tokens=DEFAULT_BATCH_TOKENS
                )
                found |= dict(zip(wanted, rows, strict=True))
        out = {}
        for method in methods:
            kinds = self._kinds(method)
            if not kinds:
                out[method.name] = [self._solution_part(asked, spans=spans)]
                continue
            weights = dict(self.sketched(method))
            out[method.name] = [
                Part(
                    weights[number], found[number, white], self.index.gradients(self.scope, number, white, spans=spans)
                )
                for number, white in kinds
            ]
        return out

    def _solution_part(self, asked: Asked, *, spans: bool) -> Part:
        """A sketch of H^-1 g of each test row beside the plain sketches of the training rows."""
        solved = {name: v.float() for name, v in self.solutions_of(asked)[0].items()}
        sketched = self.sketcher(self.last, None).of_matrix(solved, self.models.classifier().device)
        return Part(1.0, sketched, self.index.gradients(self.scope, spans=spans))

    def propose(
        self, methods: Sequence[Method], asked: Asked, widths: dict[str, int], *, spans: bool = False
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Candidates at the proponents' end and at the opponents', ``(q, m)`` row numbers each, by method name.

        Args:
            methods: That compare gradients.
            asked: Test rows.
            widths: Candidates at each end from each sketch, by method name; at most the number of what is searched.
            spans: Entries of the index's store of spans, instead of rows.
        """
        live = self.index.live_spans if spans else self.index.live
        out = {}
        for name, parts in self.parts(methods, asked, spans=spans).items():
            method, width = _method(methods, name), min(len(live), widths[name])
            ends = [propose(parts, live, width, self.proposal(method))]
            if self._from_solutions(method) and self._kinds(method):
                how = self.index.proposal(self.scope, UNWHITENED[name], cosine=method.metric == "cos")
                ends.append(propose([self._solution_part(asked, spans=spans)], live, width, how))
            high, low = (np.concatenate([found[end][0] for found in ends], axis=1) for end in (0, 1))
            out[name] = high, low
        return out

    def proposal(self, method: Method) -> Proposal:
        """How a method's candidates are chosen from its :meth:`parts`: as calibrated for those sketches."""
        name = same_as(self.index, self.scope, method, self.curvature)
        if method.query == "preconditioned" and not self._kinds(method):
            name = UNWHITENED[method.name]
        return self.index.proposal(self.scope, name, cosine=method.metric == "cos")

    def sketcher(self, number: int, white: int | None) -> Sketcher:
        """Of a checkpoint's gradients, or of those whitened with a damping; opened once."""
        key = (number, white)
        if key not in self._sketchers:
            name, spec = self.index.manifest.checkpoints[number].name, self.index.manifest.spec
            files = gradient_files(spec, self.scope, name, last=number == self.last)
            self.index.checked(*map(self.index.manifest.fitted_name, files))
            classifier = self.models.classifier(number)
            self._sketchers[key] = open_sketcher(self.index.fit_folder, classifier, spec, self.scope, name, white)
        return self._sketchers[key]

    def _from_solutions(self, method: Method) -> bool:
        """Whether a sketch of H^-1 g proposes candidates: no whitened sketches are of the H^-1 that is asked for."""
        if method.query != "preconditioned" or self.curvature.at(self.scope) == "identity":
            return False
        return self.white_number() is None or not self._whitened_alike

    def _kinds(self, method: Method) -> list[tuple[int, int | None]]:
        """Checkpoint and damping of the sketches that a method compares; none where that of H^-1 g stands alone."""
        white = self.white_number() if method.query == "preconditioned" else None
        if self._from_solutions(method) and (method.metric == "dot" or white is None):
            return []
        return [(number, white) for number, _ in self.sketched(method)]

    def search(
        self, methods: Sequence[Method], asked: Asked, k: int, *, exact: str, n_candidates: dict[str, int]
    ) -> dict[str, tuple[Ranking, Ranking]]:
        """Both ends of each method's ranking, (proponents, opponents).

        Args:
            methods: That compare gradients.
            asked: Test rows.
            k: Results at each end.
            exact: ``none``, ``rerank`` or ``full``.
            n_candidates: Rows at each end that the sketches propose, by method name.
        """
        chunks = self._chunks(methods, len(asked))
        if len(chunks) > 1:
            found = [
                self.search(methods, asked.take(which), k, exact=exact, n_candidates=n_candidates) for which in chunks
            ]
            return {m.name: (join([f[m.name][0] for f in found]), join([f[m.name][1] for f in found])) for m in methods}
        if exact == "full":
            return self._full(methods, asked, k)
        live = self.index.live
        if exact == "none":
            nothing = np.zeros(len(asked), np.int64)
            estimated = {
                name: propose(
                    parts, live, min(len(live), k), replace(self.proposal(_method(methods, name)), margin=0.0)
                )
                for name, parts in self.parts(methods, asked).items()
            }
            return {
                name: tuple(Ranking(rows, scores.astype(np.float64), False, nothing) for rows, scores in ends)  # type: ignore[misc]
                for name, ends in estimated.items()
            }
        widths = {method.name: max(k, n_candidates[method.name]) for method in methods}
        rows = {name: np.concatenate(ends, axis=1) for name, ends in self.propose(methods, asked, widths).items()}
        scores, residuals = self.score(methods, asked, rows)
        return {name: _both_ends(rows[name], scores[name], k, residuals.get(name)) for name in rows}

    def _full(self, methods: Sequence[Method], asked: Asked, k: int) -> dict[str, tuple[Ranking, Ranking]]:
        live = self.index.live
        scores, residuals = self.score(methods, asked, {method.name: live for method in methods})
        n_scored = np.full(len(asked), len(live))
        return {
            name: tuple(  # type: ignore[misc]
                Ranking(*rank(found, live, k, largest=largest), True, n_scored, residual=residuals.get(name))
                for largest in (True, False)
            )
            for name, found in scores.items()
        }

    def score(
        self, methods: Sequence[Method], asked: Asked, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Exact scores of rows, and relative residuals of H^-1 where it was iterated.

        Args:
            methods: That compare gradients.
            asked: Test rows.
            rows: Row numbers by method name: ``(q, m)``, or ``(n,)`` for all queries.

        Returns:
            By method name: scores ``(q, m)`` or ``(q, n)`` float64, and residuals ``(q,)``.
        """
        q = len(asked)
        scores = {name: np.empty((q, at.shape[-1])) for name, at in rows.items()}
        residuals: dict[str, np.ndarray] = {}
        chunks = self._chunks(methods, q)
        for which in chunks:
            mine = {name: at if at.ndim == 1 else at[which] for name, at in rows.items()}
            found, left = self._score_chunk(methods, asked if len(chunks) == 1 else asked.take(which), mine)
            for name in scores:
                scores[name][which] = found[name]
                if left is not None and _method(methods, name).query == "preconditioned":
                    residuals.setdefault(name, np.zeros(q))[which] = left
        return scores, residuals

    def _chunks(self, methods: Sequence[Method], n_queries: int) -> list[np.ndarray]:
        """Queries whose whole vectors fit in memory together."""
        kinds = 2 if any(m.query == "preconditioned" for m in methods) else 1
        size = max(1, VECTOR_BYTES // (4 * kinds * sum(block.size for block in self.blocks)))
        return [np.arange(i, min(i + size, n_queries)) for i in range(0, n_queries, size)]

    def _score_chunk(
        self, methods: Sequence[Method], asked: Asked, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        distinct = np.unique(np.concatenate([at.reshape(-1) for at in rows.values()]))
        texts, labels = self.rows.texts(distinct), self.rows.labels(distinct)
        where = {name: np.searchsorted(distinct, at) for name, at in rows.items()}
        scores = {name: np.zeros((len(asked), at.shape[-1])) for name, at in rows.items()}
        residual: np.ndarray | None = None
        for number in sorted({n for method in methods for n, _ in self.checkpoints(method)}):
            classifier = self.models.classifier(number)
            mine = [m for m in methods if number in dict(self.checkpoints(m))]
            g = self.gradients_of(number, asked)
            vectors: list[Vectors] = [g]
            if any(m.query == "preconditioned" for m in mine):
                solved, residual = self.solutions_of(asked)
                vectors.append(solved)
            stacked = vectors[0] if len(vectors) == 1 else {n: torch.cat([v[n] for v in vectors]) for n in g}
            q = len(asked)
            wanted = np.zeros((len(vectors) * q, len(distinct)), bool)
            for method in mine:
                half = wanted[q:] if method.query == "preconditioned" else wanted[:q]
                if where[method.name].ndim == 1:
                    half[:, where[method.name]] = True
                else:
                    np.put_along_axis(half, where[method.name], True, axis=1)
            dots = exact_dots(classifier, self.scope, stacked, self.blocks, texts, labels, wanted=wanted)
            for method in mine:
                preconditioned = method.query == "preconditioned"
                found = _pick(dots[q:] if preconditioned else dots[:q], where[method.name])
                if method.metric == "cos":
                    own = _own_lengths(vectors[-1] if preconditioned else g, g)
                    lengths = self._row_lengths(method, classifier, distinct)
                    below = own[:, None] * _pick(np.broadcast_to(lengths, (q, len(distinct))), where[method.name])
                    found = np.divide(found, below, out=np.zeros_like(found), where=below > 0)
                scores[method.name] += dict(self.checkpoints(method))[number] * found
        return scores, residual

    def _row_lengths(self, method: Method, classifier: Classifier, rows: np.ndarray) -> np.ndarray:
        """What cosines of rows are divided by: ||G_n||, or sqrt(<H^-1 G_n, G_n>), ``(n,)`` float64."""
        if method.query != "preconditioned" or self.curvature.at(self.scope) == "identity":
            return np.asarray(self.index.gradients(self.scope).norms[rows].astype(np.float64))
        if self.curvature.at(self.scope) == "ekfac":
            white = self.white_number()
            return np.asarray(self.index.gradients(self.scope, damping=white).norms[rows].astype(np.float64))
        # Not stored for solvers that iterate: one right-hand side for each candidate of its kind.
        encoded, labels = as_encoded(classifier, self.rows.texts(rows)), self.rows.labels(rows)
        first, kinds = distinct_rows(encoded, labels)
        found = np.empty(len(first))
        for start in range(0, len(first), SELF_ROWS):
            some = first[start : start + SELF_ROWS]
            g = whole_gradients(classifier, self.scope, self.blocks, encoded.take(some), labels[some])
            found[start : start + SELF_ROWS] = dot(self.solve(g)[0], g).cpu().numpy()
        return np.asarray(np.sqrt(np.maximum(found, 0.0))[kinds])


def _own_lengths(solved: Vectors, g: Vectors) -> np.ndarray:
    """sqrt(<H^-1 g, g>) of the queries, ``(q,)`` float64."""
    return np.asarray(dot(solved, g).clamp_min(0).sqrt().cpu().numpy())


def _method(methods: Sequence[Method], name: str) -> Method:
    return next(m for m in methods if m.name == name)


def _pick(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Columns of ``values`` ``(q, distinct)``: the same for all queries ``(n,)``, or each query's own ``(q, m)``."""
    return np.asarray(values[:, where] if where.ndim == 1 else np.take_along_axis(values, where, axis=1))


def _both_ends(rows: np.ndarray, scores: np.ndarray, k: int, residual: np.ndarray | None) -> tuple[Ranking, Ranking]:
    """Rank the candidates of both ends together; a row that was proposed at both counts once."""
    order = np.argsort(rows, axis=1, kind="stable")
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    again = np.zeros(rows.shape, bool)
    again[:, 1:] = rows[:, 1:] == rows[:, :-1]
    n_scored = (~again).sum(axis=1)
    ends = []
    for largest in (True, False):
        once = np.where(again, -np.inf if largest else np.inf, scores)
        ends.append(Ranking(*rank(once, rows, k, largest=largest), True, n_scored, residual=residual))
    return ends[0], ends[1]
