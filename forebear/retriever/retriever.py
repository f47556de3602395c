"""The retriever: ask which training rows made the model predict what it predicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts
from forebear.indexer.model.forward import Forward
from forebear.indexer.rows.labels import LabelMap
from forebear.indexer.rows.row_source import RowSource, rows_from_texts
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.spans.text import Span
from forebear.retriever.answers.results import Answers, answer_tables, queries_together
from forebear.retriever.answers.scores import Scores
from forebear.retriever.coverage import (
    available_methods,
    check_stores,
    is_deep,
    question_facts,
)
from forebear.retriever.deep.certify import certify, check_certifiable
from forebear.retriever.deep.query_gradients import Asked as DeepAsked
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.head.aggregate import common_class, read_rows, sum_queries
from forebear.retriever.head.queries import make_query
from forebear.retriever.head.stored import row_factors, search_query, search_stored
from forebear.retriever.question.asked import ask
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import METHODS, Method
from forebear.retriever.question.models import Models
from forebear.retriever.question.query_rows import check_texts, query_labels
from forebear.retriever.question.recall import n_candidates, settled, stores_spans
from forebear.retriever.question.spec import DEFAULT_METHODS, Exactness, QuerySpec
from forebear.retriever.ranking import Ranking
from forebear.retriever.spans.search import SpanSearch, word_influence
from forebear.retriever.words.search import WordSearch
from forebear.retriever.words.tfidf import TfidfSearch

QUERY_BLOCK_ROWS = 512


class Retriever:
    """Answers questions from one index.

    Attributes:
        index: The index.

    Example:
        >>> from forebear import Index, Retriever
        >>> retriever = Retriever(Index.open("runs/demo/index"))
        >>> table = retriever.retrieve([("The cat sat .", "A cat sat .")], methods=["gc", "if"], top=5)
        >>> table.to_pandas()
    """

    def __init__(
        self,
        index: Index | str | Path,
        *,
        model: str | Classifier | None = None,
        device: str = "auto",
    ) -> None:
        """Open a retriever; models are loaded at the first question.

        Args:
            index: An open index, or its folder.
            model: Where the model is now, if it has moved; it must match the index's fingerprint.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        """
        self.index = index if isinstance(index, Index) else Index.open(index)
        self._models = Models(self.index, model=model, device=device)
        self._searches: dict[tuple[str, CurvatureSpec], GradientSearch] = {}
        self._words = WordSearch(self.index, self._models)
        self._tfidf = TfidfSearch(self.index, self._models)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, by id."""
        return self.index.manifest.spec.label_names

    def classifier(self, checkpoint: int = -1) -> Classifier:
        """The model that is explained, or another checkpoint of the index by its number."""
        return self._models.classifier(checkpoint)

    def retrieve(
        self,
        queries: Sequence[str] | Sequence[tuple[str, str]] | RowSource,
        *,
        methods: Sequence[str] = DEFAULT_METHODS,
        top: int = 10,
        target: str = "predicted",
        exact: Exactness = "rerank",
        scope: str = "head",
        **choices: Any,
    ) -> pa.Table:
        """The training rows at both ends of each query's ranking.

        Args:
            queries: Texts, pairs of texts, or rows opened by ``open_rows``.
            methods: Names from the method table.
            top: Rows at each end.
            target: ``predicted``, ``gold`` (queries need labels) or a label's name.
            exact: See :class:`QuerySpec`.
            scope: See :class:`QuerySpec`.
            **choices: ``recall``, ``candidates``, ``aggregate``, ``certify``, ``normalise``, ``spans``,
                ``query_spans``, ``span_column``, ``word``, ``curvature``, ``damping``, ``curvature_rows``, ``lissa``,
                ``tolerance``; see :class:`QuerySpec`.

        Returns:
            One row a result; columns as DESIGN.md's section 5 lists them, provenance in the schema's metadata. Texts
            are dictionaries, which hold each text once: of type ``category`` in pandas.

        Raises:
            InputError: A choice that means nothing, or texts that do not fit the index.
            CorruptIndexError: A stored file was altered.
        """
        spec = QuerySpec(methods=tuple(methods), top=top, target=target, exact=exact, scope=scope, **choices)
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        tables = [table for answers in self.answers(source, spec) for table in self.tables(answers)]
        return pa.concat_tables(tables).replace_schema_metadata(self.metadata(spec))

    def answers(self, source: RowSource, spec: QuerySpec, *, block_rows: int = QUERY_BLOCK_ROWS) -> Iterator[Answers]:
        """Stream answers in bounded memory; of an aggregate, the one answer.

        Args:
            source: Test rows.
            spec: The question.
            block_rows: Queries that are asked together, at most: fewer where their rankings are long.
        """
        spec = self.settled(spec)
        methods = spec.check()
        self.check_stores(methods, spec)
        self.check_texts(source)
        labels = self.query_labels(source, required=spec.target == "gold")
        if spec.aggregate:
            texts, gold = read_rows(source, labels)
            yield self.aggregate(texts, gold, np.zeros(source.n_rows, np.int64), spec)
            return
        top = spec.top if any(m.spans for m in methods) else min(spec.top, self.index.manifest.n_live)
        for block in source.blocks(min(block_rows, queries_together(methods, top))):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            yield self.answer_block(block.start, block.texts, gold, spec, table=block.table)

    def tables(self, answers: Answers) -> Iterator[pa.Table]:
        """Answers as tables, one row a result, a bounded number of results each."""
        return answer_tables(self.index, answers, self.classifier().tokenizer)

    def answer_block(
        self,
        start: int,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray | None,
        spec: QuerySpec,
        *,
        forward: Forward | None = None,
        table: pa.Table | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Answers:
        """Answer one block of test rows.

        Args:
            start: Number of the first of them.
            texts: One list a text column.
            labels: Class ids of the model, or None.
            spec: The question.
            forward: The last checkpoint's pass over them, if already run.
            table: The rows with all their columns, where spans are given by columns.
            numbers: Of the test rows, for messages; None: from ``start`` on.
        """
        spec = self.settled(spec)
        numbers = range(start, start + len(texts[0])) if numbers is None else numbers
        methods = spec.check()
        n_checkpoints = len(self.index.manifest.checkpoints)
        asked = ask(self._models, methods, texts, labels, spec.target, n_checkpoints, first_row=start, forward=forward)
        top = min(spec.top, self.index.manifest.n_live)
        found: dict[str, tuple[Ranking, Ranking]] = {}
        by_words = [m for m in methods if m.representation == "words"]
        if by_words:
            found |= self._words.search(by_words, texts, asked.targets, top, exact=spec.exact, normalise=spec.normalise)
        for method in methods:
            if method.representation == "tfidf":
                found[method.name] = self._tfidf.search(texts, asked, top, normalise=spec.normalise)
        by_spans = [m for m in methods if m.by_model]
        if by_spans:  # none of them fixes its scope
            found |= self._span_search(spec).search(
                by_spans, texts, table, asked, spec.top if all(m.spans for m in methods) else top,
                full=spec.exact == "full",
                n_candidates={m.name: n_candidates(self.index, spec.scope, m, spec) for m in by_spans}, word=spec.word,
                numbers=numbers,
            )  # fmt: skip
        others = [m for m in methods if not (m.by_words or m.by_model)]
        for scope, some in self._by_scope(others, spec).items():
            if scope is None:
                found |= {m.name: search_stored(self.index, m, asked, spec.solver, top, exact=spec.exact) for m in some}
            else:
                found |= self._deep(scope, some, DeepAsked([list(t) for t in texts], asked.targets), spec, top)
        found = {method.name: found[method.name] for method in methods}
        return Answers(start, labels, asked.forward.predictions, asked.targets, found)

    def aggregate(
        self, texts: Sequence[Sequence[str]], labels: np.ndarray | None, groups: np.ndarray, spec: QuerySpec
    ) -> Answers:
        """One answer for each group of test rows: their query vectors are summed, and searched once.

        Scores are the sums of those that the rows would get one by one.

        Args:
            texts: Test rows, one list a text column.
            labels: Class ids of the model, ``(q,)``, or None.
            groups: Number of each row's group, ``(q,)``; every number from 0 on has rows.
            spec: The question, with ``aggregate``.
        """
        spec = self.settled(replace(spec, aggregate=True))
        methods = spec.check()
        self.check_stores(methods, spec)
        top = min(spec.top, self.index.manifest.n_live)
        by_scope = self._by_scope(methods, spec)
        stored = by_scope.pop(None, [])
        seen = sum_queries(self._models, self.index, stored, texts, labels, groups, spec.target, spec.solver)
        found = {m.name: search_query(self.index, m, seen.queries[m.name], top, exact=spec.exact) for m in stored}
        for scope, some in by_scope.items():
            assert scope is not None
            found |= self._deep(
                scope, some, DeepAsked([list(t) for t in texts], seen.targets, groups=groups), spec, top
            )
        found = {method.name: found[method.name] for method in methods}
        gold = None if labels is None else common_class(labels, groups)
        return Answers(0, gold, common_class(seen.predictions, groups), common_class(seen.targets, groups), found)

    def _by_scope(self, methods: Sequence[Method], spec: QuerySpec) -> dict[str | None, list[Method]]:
        """Methods by the scope beyond the head at which they compare gradients; None: the others."""
        out: dict[str | None, list[Method]] = {}
        for method in methods:
            out.setdefault(spec.scope_of(method) if is_deep(method, spec) else None, []).append(method)
        return out

    def _gradient_search(self, scope: str, spec: QuerySpec) -> GradientSearch:
        key = (scope, spec.solver)
        if key not in self._searches:
            self._searches[key] = GradientSearch(self.index, self._models, scope, spec.solver)
        return self._searches[key]

    def _span_search(self, spec: QuerySpec) -> SpanSearch:
        assert spec.spans is not None  # settled
        finders = [span_finder(how, spec.span_column or 0) for how in (spec.spans, spec.query_spans or spec.spans)]
        return SpanSearch(self._gradient_search(spec.scope, spec), *finders, stored=stores_spans(self.index, spec))

    def _deep(
        self, scope: str, methods: Sequence[Method], asked: DeepAsked, spec: QuerySpec, top: int
    ) -> dict[str, tuple[Ranking, Ranking]]:
        search = self._gradient_search(scope, spec)
        if spec.certify:
            check_certifiable(search, methods)
        candidates = {m.name: n_candidates(self.index, scope, m, spec) for m in methods}
        found = search.search(methods, asked, top, exact=spec.exact, n_candidates=candidates)
        if spec.certify:
            n_live = self.index.manifest.n_live
            found = {m.name: certify(search, m, asked, found[m.name], max_rows=n_live) for m in methods}
        return found

    def scores(
        self,
        queries: Sequence[str] | Sequence[tuple[str, str]] | RowSource,
        method: str,
        *,
        target: str = "predicted",
        scope: str = "head",
        **choices: Any,
    ) -> np.ndarray:
        """Exact scores of every live training row, ``(q, n)`` float64, columns in the order of ``index.live``.

        Of an aggregate ``(1, n)``, summed over the test rows.

        For small sets, and as the yardstick: memory is q x n x 8 bytes.
        """
        spec = self.settled(QuerySpec(methods=(method,), target=target, exact="full", scope=scope, **choices))
        (chosen,) = spec.check()
        self.check_stores((chosen,), spec)
        source = queries if isinstance(queries, RowSource) else rows_from_texts(queries)
        self.check_texts(source)
        labels = self.query_labels(source, required=target == "gold")
        parts = []
        for block in source.blocks(QUERY_BLOCK_ROWS):
            gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
            parts.append(self.score_block(block.texts, gold, spec, first_row=block.start)[chosen.name])
        scores = np.concatenate(parts)
        return scores.sum(axis=0, keepdims=True) if spec.aggregate else scores

    def score_block(
        self,
        texts: Texts,
        labels: np.ndarray | None,
        spec: QuerySpec,
        *,
        rows: np.ndarray | None = None,
        first_row: int = 0,
    ) -> Scores:
        """Exact scores of training rows for one block of test rows, by all methods of a question together.

        Args:
            texts: Test rows, one list a text column; or encoded, for methods that read word pieces alone.
            labels: Class ids of the model, ``(q,)``, or None.
            spec: The question; how candidates are found does not matter.
            rows: Live training rows, ascending; None: all of them.
            first_row: Number of the first test row, for messages.

        Returns:
            By method name ``(q, n)`` float64, columns in the order of ``rows``; with the residuals of H^-1.

        Raises:
            InputError: A method scores no rows, or reads the texts of test rows that are encoded.
        """
        methods = spec.check()
        live = self.index.live
        wanted = live if rows is None else rows
        for method in methods:
            if method.spans or method.saliency:
                raise InputError(f"{method.name} scores spans or asks of a word, not a row: ask for it by retrieve.")
            if isinstance(texts, Encoded) and (method.by_words or method.representation == "sentence"):
                raise InputError(f"{method.name} compares texts; it cannot be asked of rows with word pieces masked.")
        asked = ask(
            self._models, methods, texts, labels, spec.target, len(self.index.manifest.checkpoints), first_row=first_row
        )
        deep = [m for m in methods if not m.by_words and (m.variants or is_deep(m, spec))]
        found = Scores()
        for scope in dict.fromkeys(spec.scope_of(m) for m in deep):
            some = [m for m in deep if spec.scope_of(m) == scope]
            at = DeepAsked(texts, asked.targets)
            values, residuals = self._gradient_search(scope, spec).score(some, at, {m.name: wanted for m in some})
            found.update(values)
            for name, residual in residuals.items():
                found.note_residual(name, residual)
        by_words = [m for m in methods if m.representation == "words"]
        if by_words:
            assert not isinstance(texts, Encoded)
            questions = self._words.questions(by_words, texts, asked.targets, normalise=spec.normalise)
            scored = self._words.score(questions, wanted)
            found.update({m.name: scores for m, scores in zip(by_words, scored, strict=True)})
        for method in methods:
            if method.representation == "tfidf":
                assert not isinstance(texts, Encoded)
                whole = self._tfidf.scores(texts, asked, normalise=spec.normalise)
                found[method.name] = whole[:, np.searchsorted(live, wanted)]
            elif method.name not in found:
                query = make_query(method, asked, self.index, spec.solver)
                found.note_residual(method.name, query.residual)
                found[method.name] = replace(row_factors(self.index, method), live=wanted).all_products(query)
        return found.of(method.name for method in methods)

    def word_influence(
        self, query: Sequence[str], target: int, rows: np.ndarray, spec: QuerySpec
    ) -> tuple[Span, list[tuple[int, Span, float]]]:
        """How much each word of some training rows made the model look at a word of a test row (Joint eq. 8).

        Args:
            query: Texts of the test row.
            target: Class whose probability the saliency is of.
            rows: Training rows.
            spec: Scope, curvature and ``word``.

        Returns:
            The test row's word; and (row, word, ``saliency-if-token``) of each word that the model reads.
        """
        search = self._gradient_search(spec.scope, spec)
        columns = [[text] for text in query]
        salient, words, scores = word_influence(search, columns, target, spec.word, np.unique(rows))
        return salient, list(zip(words.rows.tolist(), words.spans, scores.tolist(), strict=True))

    def settled(self, spec: QuerySpec) -> QuerySpec:
        """The question with what it leaves to the index: which spans, and in which text column."""
        return settled(self.index, spec)

    def check_stores(self, methods: Sequence[Method], spec: QuerySpec) -> None:
        """Refuse methods whose representation the index does not hold, naming the option that builds it."""
        check_stores(self.index, methods, spec)

    def available_methods(self) -> tuple[str, ...]:
        """Names of the methods that this index can answer."""
        return available_methods(self.index)

    def row_methods(self) -> tuple[str, ...]:
        """Names of those that score every training row from what is stored, without passes of the model over rows."""
        return tuple(name for name in self.available_methods() if not METHODS[name].by_model)

    def metadata(self, spec: QuerySpec) -> dict[str, str]:
        """Provenance of an answer, for the Parquet schema's metadata, under the key ``forebear``."""
        return {"forebear": json.dumps(question_facts(self.index, spec), sort_keys=True, allow_nan=False)}

    def check_texts(self, source: RowSource) -> None:
        """Refuse single texts for an index of pairs, the other way round, and the same columns in another order."""
        check_texts(self.index, source)

    def query_labels(self, source: RowSource, *, required: bool) -> LabelMap | None:
        """How the test rows' labels map onto the model's; None when there are none or, unless required, none fit.

        Unless required, a row without a label, or with one that the model does not know, gets ``labels.UNKNOWN``.
        """
        return query_labels(self.index, source, required=required)
