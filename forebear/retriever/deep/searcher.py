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
from forebear.retriever.question.recall import NOT_RERANKED, PROVEN, deep_recall, n_candidates, stop_of, with_note
from forebear.retriever.question.searcher import Searcher
from forebear.retriever.question.spec import Question
from forebear.retriever.ranking import Ends
from forebear.retriever.scores import Scores


class GradientSearcher(Searcher):
    """Gradients of scopes beyond the head: sketches propose rows, and the model scores them exactly."""

    @override
    def search(self, question: Question, batch: Batch | Queries) -> dict[str, Ends]:
        """Both ends of each method's ranking; given as :class:`Queries`, a query may stand for a group of test rows."""
        queries = batch if isinstance(batch, Queries) else Queries(batch.texts, batch.targets)
        joined: dict[str, Ends] = {}
        n_live = self.index.manifest.n_live
        for scope, methods in question.by_scope().items():
            search = GradientSearch.kept(self.models, scope, question.curvature)
            candidates = {m.name: n_candidates(question, m) for m in methods}
            stops = {m.name: stop for m in methods if (stop := stop_of(question, m)) is not None}

            def prove(
                chunk: Queries, ends: dict[str, Ends], search: GradientSearch = search, methods: list[Method] = methods
            ) -> dict[str, Ends]:
                return {m.name: certify(search, m, chunk, ends[m.name], max_rows=n_live) for m in methods}

            joined |= search.search(
                methods,
                queries,
                question.top,
                exact=question.spec.exact,
                n_candidates=candidates,
                errors={name: stop.error for name, stop in stops.items()},
                prove=prove if question.spec.certify else None,
            )
        return joined

    @override
    def score(self, question: Question, batch: Batch, rows: np.ndarray) -> Scores:
        scores = Scores()
        for scope, methods in question.by_scope().items():
            search = GradientSearch.kept(self.models, scope, question.curvature)
            queries = Queries(batch.texts, batch.targets)
            values, convergences = search.score(methods, queries, {m.name: rows for m in methods})
            scores.update(values)
            for name, convergence in convergences.items():
                scores.note_convergence(name, convergence)
        return scores

    @override
    @staticmethod
    def facts(question: Question, method: Method) -> dict[str, Any]:
        spec = question.spec
        if spec.exact != "rerank":
            return with_note(PROVEN if spec.exact == "full" else NOT_RERANKED) | {"candidates": None}
        n_rows = n_candidates(question, method)
        recall = PROVEN if spec.certify else deep_recall(question, method, n_rows)
        stops = stop_of(question, method) is not None
        return with_note(recall) | {"candidates": n_rows, "stops_early": stops, "certify": spec.certify}
