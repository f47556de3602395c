"""Gradients of scopes beyond the head: candidates from the stored sketches, exact scores from the model.

<V, G_n> over all layers of the scope is computed from the factors of the candidates' gradients, in one forward and one
backward of activations for each candidate and checkpoint, for all methods together; no gradient is stored. Which rows
become candidates is decided by the sketches (:mod:`forebear.retriever.deep.candidates`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from typing_extensions import override

from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.gradients.replicas import dots_on_devices
from forebear.indexer.gradients.vectors import Vectors, dot, joined
from forebear.indexer.model.device.batch_size import vector_bytes_on
from forebear.indexer.model.encoding import Encoded, Texts, encode
from forebear.indexer.sketches.candidates import propose
from forebear.ratio import ratio
from forebear.retriever.deep.candidates import Candidates, Listed
from forebear.retriever.deep.query_gradients import Queries, QueryGradients
from forebear.retriever.deep.rounds import rank_candidates
from forebear.retriever.deep.row_lengths import RowLengths, Rows
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.kept import Kept
from forebear.retriever.question.methods import Method
from forebear.retriever.question.models import Models
from forebear.retriever.ranking import Ends, Ranking, join_ends, rank

VECTOR_BYTES = 2 << 30  # of whole query vectors held at once on a CPU
QUERIES_OF_A_SCAN = 128  # test rows for which stored sketches are read together
ENCODED_BYTES = 256 << 20  # of the word pieces of training rows that stay in memory


class IndexRows(Rows):
    """The training rows of an index; word pieces of rows that were asked for stay in memory for a while.

    All checkpoints, and all blocks of test rows, read a row as the same word pieces.
    """

    def __init__(self, models: Models) -> None:
        self._models, self._index = models, models.index

    @override
    def texts(self, numbers: np.ndarray) -> Texts:
        kept = self._models.kept.get("word pieces", lambda: Kept(ENCODED_BYTES), size=lambda _kept: ENCODED_BYTES)
        found = {number: kept.find(number) for number in numbers.tolist()}
        missing = [number for number, row in found.items() if row is None]
        if missing:
            encoded = encode(self._models.classifier(), self._index.text_lists(np.array(missing)))
            for number, row in zip(missing, encoded, strict=True):
                found[number] = kept.put(number, row, size=_bytes_of_row)
        return Encoded([found[number] for number in numbers.tolist()])

    @override
    def labels(self, numbers: np.ndarray) -> np.ndarray:
        return self._index.targets(numbers)


class GradientSearch:
    """Scores training rows by gradients over one scope beyond the head, for blocks of test rows."""

    def __init__(self, models: Models, scope: str, curvature: CurvatureSpec) -> None:
        """Set up without loading a model.

        Args:
            models: Models of an index with the scope's sketches.
            scope: ``top-K``, ``all`` or ``layer:NAME``. At ``head`` rows can be scored, but not searched: the index
                has no sketches there.
            curvature: The H^-1 of ``if`` and ``rif``.
        """
        index = models.index
        if scope != "head":
            index.check_scope(scope)
        self.index, self.models, self.scope, self.curvature = index, models, scope, curvature
        self.gradients = QueryGradients(models, scope, curvature)
        self.candidates = Candidates(self.gradients)
        self.rows: Rows = IndexRows(models)
        self.lengths = RowLengths(self.gradients, self.rows)

    @classmethod
    def kept(cls, models: Models, scope: str, curvature: CurvatureSpec) -> GradientSearch:
        """The search over a scope under a curvature, kept with the models: what it loads serves all questions."""
        return models.keep((cls, scope, curvature), lambda: cls(models, scope, curvature))

    def over(self, rows: Rows) -> GradientSearch:
        """A search that scores other entries; it shares the gradients of the test rows with this one."""
        other = copy.copy(self)
        other.rows = rows
        other.lengths = RowLengths(self.gradients, rows)
        return other

    def search(
        self,
        methods: Sequence[Method],
        queries: Queries,
        k: int,
        *,
        exact: str,
        n_candidates: dict[str, int],
        errors: Mapping[str, float] | None = None,
        prove: Callable[[Queries, dict[str, Ends]], dict[str, Ends]] | None = None,
    ) -> dict[str, Ends]:
        """Both ends of each method's ranking.

        All stored sketches are read once for many test rows; the whole gradients that exact scores need are then made
        for as many test rows at a time as fit in memory.

        Args:
            methods: Methods that compare gradients.
            queries: Test rows.
            k: Results at each end.
            exact: ``none``, ``rerank`` or ``full``.
            n_candidates: Rows at each end that the sketches propose, by method name.
            errors: By method name, how far a score may be beyond its estimate (in units of :meth:`Proposal.units`),
                where scoring stops when no other candidate can be among the best.
            prove: Proves both ends of some of the test rows, which it is given while their gradients are held.
        """
        chunks = self.chunks(methods, len(queries))
        by_pass = len(chunks) > 1 and exact != "full" and self.candidates.by_pass(methods, queries)
        if by_pass:
            blocks = np.array_split(np.arange(len(queries)), -(-len(queries) // QUERIES_OF_A_SCAN))
            if exact == "none":
                return join_ends([self._estimated(methods, queries.take(b), k, by_pass=True) for b in blocks])
        widths = {name: min(len(self.index.live), max(k, n)) for name, n in n_candidates.items()}
        listed: dict[str, tuple[Listed, Listed]] = {}
        if by_pass:
            of_blocks = [
                self.candidates.propose(methods, queries.take(block), widths, by_pass=True, errors=errors)
                for block in blocks
            ]
            for name in widths:
                first, last = (
                    Listed.join(parts) for parts in zip(*(of_block[name] for of_block in of_blocks), strict=True)
                )
                listed[name] = first, last
        found = []
        for indices in chunks:
            chunk = queries if len(chunks) == 1 else queries.take(indices)
            if exact == "none":
                found.append(self._estimated(methods, chunk, k))
                continue
            if exact == "full":
                ends = self._from_all(methods, chunk, k)
            else:
                of_chunk = {name: (first.take(indices), last.take(indices)) for name, (first, last) in listed.items()}
                if not by_pass:
                    of_chunk = self.candidates.propose(methods, chunk, widths, errors=errors)
                ends = self._from_candidates(methods, chunk, k, of_chunk)
            found.append(ends if prove is None else prove(chunk, ends))
        return join_ends(found)

    def _from_candidates(
        self, methods: Sequence[Method], queries: Queries, k: int, listed: dict[str, tuple[Listed, Listed]]
    ) -> dict[str, Ends]:
        """Both ends by the exact scores of candidates."""

        def score(
            some: Sequence[Method], rows: dict[str, np.ndarray]
        ) -> tuple[dict[str, np.ndarray], Convergence | None]:
            return self.score_together(some, queries, rows, best=k)

        return rank_candidates(score, methods, listed, k)

    def _from_all(self, methods: Sequence[Method], queries: Queries, k: int) -> dict[str, Ends]:
        """Both ends by the exact scores of every live row."""
        live = self.index.live
        everywhere = {method.name: live for method in methods}
        scores, convergence = self.score_together(methods, queries, everywhere, best=k)
        n_scored = np.full(len(queries), len(live))
        return {m.name: _ends(scores[m.name], live, k, n_scored, _of_method(convergence, m)) for m in methods}

    def _estimated(
        self, methods: Sequence[Method], queries: Queries, k: int, *, by_pass: bool = False
    ) -> dict[str, Ends]:
        """Both ends by the sketches' estimates alone."""
        parts = self.candidates.parts(methods, queries, by_pass=by_pass)
        live, n_scored = self.index.live, np.zeros(len(queries), np.int64)
        k = min(len(live), k)
        ends: dict[str, Ends] = {}
        for method in methods:
            proposal = replace(self.candidates.proposal(method), margin=0.0)
            first, last = (
                Ranking(rows, scores.astype(np.float64), False, n_scored)
                for rows, scores in propose(parts[method.name], live, k, proposal, self.models.memory)
            )
            ends[method.name] = (first, last)
        return ends

    def score(
        self, methods: Sequence[Method], queries: Queries, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, Convergence | None]]:
        """Exact scores of rows, and how far H^-1 came where it was iterated.

        Args:
            methods: Methods that compare gradients.
            queries: Test rows.
            rows: Row numbers by method name: ``(q, m)``, or ``(n,)`` for all queries.

        Returns:
            By method name: scores ``(q, m)`` or ``(q, n)`` float64, and the convergence.
        """
        q = len(queries)
        scores = {name: np.empty((q, numbers.shape[-1])) for name, numbers in rows.items()}
        convergences: list[Convergence | None] = []
        chunks = self.chunks(methods, q)
        for indices in chunks:
            chunk_rows = {name: numbers if numbers.ndim == 1 else numbers[indices] for name, numbers in rows.items()}
            chunk_scores, convergence = self.score_together(
                methods, queries if len(chunks) == 1 else queries.take(indices), chunk_rows
            )
            for method in methods:
                scores[method.name][indices] = chunk_scores[method.name]
            convergences.append(convergence)
        joined = Convergence.join(convergences)
        return scores, {method.name: _of_method(joined, method) for method in methods}

    def chunks(self, methods: Sequence[Method], n_queries: int) -> list[np.ndarray]:
        """Indices of the queries, divided so that the whole vectors of each chunk fit in memory together."""
        preconditioned = any(m.query == "preconditioned" for m in methods)
        kinds = self.curvature.n_vectors(self.scope) if preconditioned else 1
        n_bytes = vector_bytes_on(self.models.memory.device, VECTOR_BYTES)
        size = max(1, n_bytes // (4 * kinds * self.gradients.parameters.size))
        return [np.arange(i, min(i + size, n_queries)) for i in range(0, n_queries, size)]

    def score_together(
        self, methods: Sequence[Method], queries: Queries, rows: dict[str, np.ndarray], *, best: int | None = None
    ) -> tuple[dict[str, np.ndarray], Convergence | None]:
        """:meth:`score` for test rows whose whole gradients fit in memory together: one pass over the rows.

        Args:
            methods: Methods that compare gradients.
            queries: Test rows.
            rows: As of :meth:`score`.
            best: How many scores at each end must be exact, whichever rows they are of; None: all. Others may be
                estimates, where lengths are stored within bounds, but only those that are surely not among the best.

        Returns:
            Scores by method name, and how far H^-1 came where it was iterated.
        """
        distinct = np.unique(np.concatenate([numbers.reshape(-1) for numbers in rows.values()]))
        texts, labels = self.rows.texts(distinct), self.rows.labels(distinct)
        columns = {name: np.searchsorted(distinct, numbers) for name, numbers in rows.items()}
        scores = {name: np.zeros((len(queries), numbers.shape[-1])) for name, numbers in rows.items()}
        convergence: Convergence | None = None
        for number in sorted({n for method in methods for n, _ in self.gradients.checkpoints(method)}):
            at_checkpoint = [m for m in methods if number in dict(self.gradients.checkpoints(m))]
            gradients = self.gradients.at_checkpoint(number, queries)
            vectors: dict[str, Vectors] = {}  # of the kinds that some method multiplies with
            if any(m.query != "preconditioned" for m in at_checkpoint):
                vectors["gradient"] = gradients
            if any(m.query == "preconditioned" for m in at_checkpoint):
                vectors["preconditioned"], convergence = self.gradients.solutions(queries)
            q, kinds = len(queries), list(vectors)
            places = {m.name: q * kinds.index(_kind(m)) for m in at_checkpoint}
            wanted = np.zeros((len(kinds) * q, len(distinct)), bool)
            for name, place in places.items():
                half = wanted[place : place + q]
                if columns[name].ndim == 1:
                    half[:, columns[name]] = True
                else:
                    np.put_along_axis(half, columns[name], True, axis=1)
            replicas = self.models.replicas(number)
            stacked = joined(list(vectors.values()))
            dots = dots_on_devices(replicas, self.gradients.parameters, stacked, texts, labels, wanted=wanted)
            for method in at_checkpoint:
                products = dots[places[method.name] :][:q]
                if method.metric == "cos":
                    query_lengths = _query_lengths(vectors[_kind(method)], gradients)
                    asked = wanted[places[method.name] :][:q]
                    lengths = self.lengths.of_rows(method, distinct, products, asked, best)
                    products = ratio(products, query_lengths[:, None] * lengths)
                picked = _pick(products, columns[method.name])
                scores[method.name] += dict(self.gradients.checkpoints(method))[number] * picked
        return scores, convergence


def _kind(method: Method) -> str:
    """Which vector of a test row a method multiplies with the rows' gradients."""
    return "preconditioned" if method.query == "preconditioned" else "gradient"


def _bytes_of_row(row: dict[str, list[int]]) -> int:
    """Bytes of a row's word pieces: of its lists, and of the ids in the first, which are objects of their own."""
    return sum(map(sys.getsizeof, row.values())) + sys.getsizeof(1 << 10) * len(row["input_ids"])


def _query_lengths(solved: Vectors, gradients: Vectors) -> np.ndarray:
    """sqrt(<H^-1 g, g>) of each query's gradient g, ``(q,)`` float64."""
    return np.asarray(dot(solved, gradients).clamp_min(0).sqrt().cpu().numpy())


def _of_method(convergence: Convergence | None, method: Method) -> Convergence | None:
    """How far H^-1 came, for a method that applies it."""
    return convergence if method.query == "preconditioned" else None


def _pick(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Columns of ``values`` ``(q, distinct)``: the same for all queries ``(n,)``, or each query's own ``(q, m)``."""
    return np.asarray(values[:, columns] if columns.ndim == 1 else np.take_along_axis(values, columns, axis=1))


def _ends(scores: np.ndarray, rows: np.ndarray, k: int, n_scored: np.ndarray, convergence: Convergence | None) -> Ends:
    """Both ends of scores ``(q, n)`` of rows ``(n,)``."""
    first, last = (
        Ranking(*rank(scores, rows, k, largest=largest), True, n_scored, convergence=convergence)
        for largest in (True, False)
    )
    return first, last
