"""Search over exactly stored vectors: features, sentence embeddings and head gradients as their two factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from typing_extensions import override

from forebear.indexer.index import Index
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable, norms_of
from forebear.retriever.head.queries import make_query
from forebear.retriever.head.scoring import Query
from forebear.retriever.head.search import RowFactors, search_ann, search_full, search_scan
from forebear.retriever.head.vectors import VECTORS
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method, ann_name
from forebear.retriever.question.models import Models
from forebear.retriever.question.recall import stored_recall, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends
from forebear.retriever.scores import Scores


class StoredSearcher(Searcher):
    """Features, sentence embeddings and gradients of the head: stored exactly for every row."""

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        ends = {}
        for method in question.methods:
            query = make_query(method, batch, self.index, question.curvature)
            ends[method.name] = search_query(self.models, method, query, question.top, exact=question.spec.exact)
        return ends

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        scores = Scores()
        for method in question.methods:
            query = make_query(method, batch, self.index, question.curvature)
            scores.note_convergence(method.name, query.convergence)
            scores[method.name] = replace(row_factors(self.index, method), live=rows).all_products(query)
        return scores

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        return with_note(stored_recall(question, method))


def search_query(models: Models, method: Method, query: Query, top: int, *, exact: str) -> Ends:
    """Both ends of the ranking of query vectors; see :class:`QuerySpec` for ``exact``."""
    index, memory = models.index, models.memory
    factors = row_factors(index, method)
    table = None if exact == "full" else _scan_table(models, method, query)
    if table is None:
        return search_full(query, factors, top)
    name = ann_name(index, method)
    if name is not None and memory.on_host:
        return search_ann(query, index.ann(name), table, factors, top, rerank=exact == "rerank")
    near, far = search_scan(query, table, factors, top, memory=memory)
    return near, far


def row_factors(index: Index, method: Method) -> RowFactors:
    """The stored factors of every training row that a method compares."""
    if method.representation in VECTORS:
        return RowFactors((VECTORS[method.representation].of_rows(index),), (), index.live)
    if method.all_checkpoints:
        numbers = range(len(index.manifest.checkpoints))
        features = tuple(index.features(c) for c in numbers)
        return RowFactors(features, tuple(index.residuals(c) for c in numbers), index.live)
    residuals = index.residuals()
    if method.query == "representer" and index.manifest.curvature["head"]["representer"]["refit"]:
        residuals = index.head.representer_residuals()
    return RowFactors((index.features(),), (residuals,), index.live)


def _scan_table(models: Models, method: Method, query: Query) -> ScanTable | None:
    """Rows by falling norm of the vectors that a method compares; None where the index has no such table."""
    index = models.index
    if method.representation in VECTORS:
        table_of = VECTORS[method.representation].scan_table
        return None if table_of is None else table_of(index)
    if method.all_checkpoints and len(index.manifest.checkpoints) > 1:
        return index.scan_table("head-tracin")
    if method.query == "representer" and query.terms[0].offset:
        return models.keep("refitted scan table", lambda: _refitted(index))
    return index.scan_table("head")


def _refitted(index: Index) -> ScanTable:
    """The head's scan table with the residuals of the refitted head, which order the rows only nearly."""
    refitted = index.head.representer_residuals()

    def swap(block: ScanBlock) -> ScanBlock:
        r = refitted.take(block.rows).astype("float32")
        return replace(block, residuals=(r,), residual_norms=(norms_of(r).astype("float32"),))

    return ScanTable(tuple(swap(b) for b in index.scan_table("head").blocks))
