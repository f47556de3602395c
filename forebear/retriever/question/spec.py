"""What a question asks: methods, scope, exactness, curvature; and how many candidates its recall takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.storage.manifest import canonical_json
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import Method, pick_methods

Exactness = Literal["none", "rerank", "full"]
DEFAULT_METHODS = ("gc",)
RECALL = 0.98


@dataclass(frozen=True, kw_only=True)
class QuerySpec:
    """Every choice of a question that changes its answer.

    Attributes:
        methods: Names from the method table.
        top: Rows at each end of the ranking.
        target: Whose loss is explained: ``predicted``, ``gold``, or a label's name.
        exact: ``none`` (scores of the search itself), ``rerank`` (candidates scored exactly, the default) or
            ``full`` (every row scored exactly).
        scope: Parameters whose gradients are compared: ``head``, or a sketched scope of the index. Methods that do not
            compare gradients are the same at every scope.
        recall: Share of the exact top 10 that the candidates of a deeper scope should hold, in expectation; their
            number follows from the index's calibration, whose sample supports a largest recall.
        candidates: That number itself: rows at each end that the sketches propose and the model scores exactly.
        normalise: Divide the scores of word methods by sqrt(self x self).
        spans: For methods by spans: how they are found in training rows; see
            :func:`~forebear.indexer.spans.finders.span_finder`. None: as the index stores them, else ``clauses``. Spans
            that the index does not store are found in the rows' texts alone.
        query_spans: How they are found in test rows; None: likewise.
        word: For ``saliency-if``: the word of the test rows whose saliency is explained; None: each row's most salient.
        span_column: The text column that they are in, by number; None: that of the stored spans, else the first.
        aggregate: One answer to all test rows together: their query vectors are summed. For methods that are linear in
            the query alone; a cosine is not.
        certify: Prove each top k at a deeper scope, scoring as many rows as it takes.
        curvature: For ``if`` and ``rif``; see :class:`CurvatureSpec` for this and the next four.
        damping: See there.
        curvature_rows: See there.
        lissa: See there.
        tolerance: See there.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    top: int = 10
    target: str = "predicted"
    exact: Exactness = "rerank"
    scope: str = "head"
    recall: float = RECALL
    candidates: int | None = None
    normalise: bool = False
    spans: str | None = None
    query_spans: str | None = None
    word: str | None = None
    span_column: int | None = None
    aggregate: bool = False
    certify: bool = False
    curvature: str | None = None
    damping: str | None = None
    curvature_rows: int = CurvatureSpec.rows
    lissa: str = CurvatureSpec.lissa
    tolerance: float = CurvatureSpec.tolerance

    @property
    def solver(self) -> CurvatureSpec:
        """The curvature that it asks for."""
        return CurvatureSpec(
            solver=self.curvature, damping=self.damping, rows=self.curvature_rows, lissa=self.lissa,
            tolerance=self.tolerance,
        )  # fmt: skip

    def scope_of(self, method: Method) -> str:
        """Where a method's gradients are compared."""
        return method.scope or self.scope

    def digest(self, index: Index) -> str:
        """Name this question in results, once it is settled: two ways to write one question have one name.

        Choices are taken as they come out for the index (``0.1x`` as the damping that it is there, ``han20`` as its
        settings), and those that no method of the question depends on are left out.
        """
        methods = {method.name: self._decisive(method, index) for method in pick_methods(self.methods)}
        resolved = {
            "top": self.top, "target": self.target, "exact": self.exact, "aggregate": self.aggregate,
            "methods": methods,
        }  # fmt: skip
        return hashlib.sha256(canonical_json(resolved)).hexdigest()

    def _decisive(self, method: Method, index: Index) -> dict[str, Any]:
        """What decides a method's answer beside what all methods share."""
        found: dict[str, Any] = {}
        if method.by_words:
            found["normalise"] = self.normalise
        if method.representation == "head":
            scope = found["scope"] = self.scope_of(method)
            if method.query == "preconditioned":
                found |= self.solver.facts(index, scope)
                if self.solver.at(scope).startswith("cg"):
                    found["tolerance"] = self.tolerance
            if self.exact == "rerank" and (scope != "head" or method.by_model):
                found["certify"] = self.certify
                found |= {"recall": self.recall} if self.candidates is None else {"candidates": self.candidates}
        if method.ranks_spans:
            found |= {"spans": self.spans, "span_column": self.span_column}
            if method.spans == "both":
                found["query_spans"] = self.query_spans or self.spans
        if method.saliency:
            found["word"] = self.word
        return found

    def check(self) -> tuple[Method, ...]:
        """The methods, after refusing values that mean nothing."""
        if self.top < 1:
            raise InputError(f"--top {self.top}: expected at least 1.")
        if self.exact not in ("none", "rerank", "full"):
            raise InputError(f"--exact {self.exact!r}: expected none or rerank or full.")
        if self.candidates is not None and self.candidates < self.top:
            raise InputError(f"--candidates {self.candidates}: expected at least --top, {self.top}.")
        if not 0 < self.recall <= 1:
            raise InputError(f"--recall {self.recall}: expected a share above 0, at most 1.")
        if self.certify and self.exact != "rerank":
            raise InputError(f"--certify proves what --exact rerank finds; it has no meaning with {self.exact}.")
        self.solver.check()
        for how in (self.spans, self.query_spans):
            if how is not None:
                span_finder(how, self.span_column or 0)
        methods = pick_methods(self.methods)
        for method in methods:
            if method.by_model and (self.exact == "none" or self.certify):
                asked = "--certify" if self.certify else "--exact none"
                raise InputError(f"{asked} is not of {method.name}: its scores come from the model alone.")
            if self.normalise and not method.by_words:
                raise InputError(f"--normalise is of methods by words, not of {method.name}. Ask for it separately.")
            if self.aggregate and not method.linear:
                raise InputError(
                    f"--aggregate sums query vectors, which says nothing of {method.name}: it is not linear in the "
                    "query, or compares words or spans. Give gd, if, tracin, rep or nn-dot."
                )
            if method.query == "preconditioned":
                self.solver.at(self.scope_of(method))
        return methods
