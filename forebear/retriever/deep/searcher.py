"""The searcher of gradients beyond the head."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from forebear.retriever.deep.certify import certify
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.batch import Batch
from forebear.retriever.question.methods import Method
from forebear.retriever.question.recall import NOT_RERANKED, PROVEN, deep_recall, n_candidates, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends, join_ends
from forebear.retriever.scores import Scores


class GradientSearcher(Searcher):
    """Gradients of scopes beyond the head: sketches propose rows, and the model scores them exactly."""

    @override
    def search(self, question: Question, batch: Batch) -> dict[str, Ends]:
        return self.search_queries(question, Queries(batch.texts, batch.targets))

    def search_queries(self, question: Question, queries: Queries) -> dict[str, Ends]:
        """The same for queries, each of one test row or of a group of them."""
        found: dict[str, Ends] = {}
        for scope, methods in question.by_scope().items():
            search = GradientSearch.kept(self.models, scope, question.curvature)
            candidates = {m.name: n_candidates(question, m) for m in methods}
            chunks, parts = search.chunks(methods, len(queries)), []
            for which in chunks:
                some = queries if len(chunks) == 1 else queries.take(which)
                ends = search.search(methods, some, question.top, exact=question.spec.exact, n_candidates=candidates)
                if question.spec.certify:
                    n_live = question.index.manifest.n_live
                    ends = {m.name: certify(search, m, some, ends[m.name], max_rows=n_live) for m in methods}
                parts.append(ends)
            found |= join_ends(parts)
        return found

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        found = Scores()
        for scope, methods in question.by_scope().items():
            search = GradientSearch.kept(self.models, scope, question.curvature)
            queries = Queries(batch.texts, batch.targets)
            values, residuals = search.score(methods, queries, {m.name: rows for m in methods})
            found.update(values)
            for name, residual in residuals.items():
                found.note_residual(name, residual)
        return found

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        spec = question.spec
        if spec.exact != "rerank":
            return with_note(PROVEN if spec.exact == "full" else NOT_RERANKED) | {"candidates": None}
        n = n_candidates(question, method)
        stated = PROVEN if spec.certify else deep_recall(question, method, n)
        return with_note(stated) | {"candidates": n, "certify": spec.certify}
