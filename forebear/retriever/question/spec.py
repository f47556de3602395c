"""What is asked: a :class:`QuerySpec` as the user writes it, and the :class:`Question` that it is for one index.

``QuerySpec.resolve(index)`` fills in what the spec leaves to the index and refuses, once and before any model runs,
what means nothing or what the index cannot answer. All that is below takes the question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from forebear.display import facts_table
from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.spans.finders import GIVEN, check_same_finder, span_finder
from forebear.indexer.spans.text import Finder
from forebear.indexer.storage.manifest import canonical_json
from forebear.retriever.question.inverse import BY_EKFAC, CurvatureSpec
from forebear.retriever.question.methods import Method, Searched, pick_methods
from forebear.retriever.question.targets import choose_targets

if TYPE_CHECKING:
    from typing_extensions import Unpack

Exactness = Literal["none", "rerank", "full"]
DEFAULT_METHODS = ("gc",)
RECALL = 0.98


class QueryChoices(TypedDict, total=False):
    """The fields of :class:`QuerySpec` as keywords: what :meth:`Retriever.retrieve` takes, for type checkers."""

    methods: Sequence[str]
    top: int
    target: str
    exact: Exactness
    scope: str
    recall: float
    candidates: int | None
    normalise: bool
    spans: str | None
    query_spans: str | None
    word: str | None
    span_column: int | None
    aggregate: bool
    certify: bool
    curvature: str | None
    damping: str | None
    curvature_rows: int
    lissa: str
    astra: str
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class QuerySpec:
    """Every choice of a question that changes its answer.

    Attributes:
        methods: Names from the method table.
        top: Rows at each end of the ranking.
        target: Whose loss is explained: ``predicted``, ``gold``, or a label's name (also ``label:NAME``); of several
            labels a row, ``label:NAME`` is the loss of this label alone. See docs/methods.md, "Several labels a row".
        exact: ``none`` (scores of the search itself, which are exact at the head but for FAISS), ``rerank`` (candidates
            scored exactly, the default) or ``full`` (every row scored exactly).
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
        curvature: For ``if`` and ``rif``; see :class:`CurvatureSpec` for this and the next five.
        damping: See there. ``exact`` curvature takes any; ``ekfac`` those that the index was built with, or any where
            every row is scored exactly (``exact="full"``).
        curvature_rows: See there.
        lissa: See there.
        astra: See there.
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
    astra: str = CurvatureSpec.astra
    tolerance: float = CurvatureSpec.tolerance

    @classmethod
    def of(cls, spec: QuerySpec | None = None, **choices: Unpack[QueryChoices]) -> QuerySpec:
        """A spec with some choices made otherwise; None: the default one. One method may be given by its name alone."""
        if "methods" in choices:
            methods = choices["methods"]
            choices["methods"] = (methods,) if isinstance(methods, str) else tuple(methods)
        return replace(spec or cls(), **choices)  # type: ignore[arg-type]  # methods are a tuple by now

    def resolve(self, index: Index) -> Question:
        """This question of an index.

        Raises:
            InputError: A value that means nothing, or that means nothing for this index.
            MissingStoreError: A method compares what the index does not store; the message names the option that
                builds it.
        """
        methods, spec = self.check(), self
        if any(method.spans for method in methods):
            stored = index.manifest.spec
            spans = self.spans or stored.spans or "clauses"
            stored_column = stored.span_column if spans == stored.spans else 0
            spec = replace(
                self, spans=spans, span_column=stored_column if self.span_column is None else self.span_column
            )
        question = Question(index, spec, methods, replace(self.curvature_spec, of_head=index.head.solver or "exact"))
        check_question(question)
        return question

    @property
    def curvature_spec(self) -> CurvatureSpec:
        """The curvature that it asks for."""
        return CurvatureSpec(
            solver=self.curvature, damping=self.damping, rows=self.curvature_rows, lissa=self.lissa, astra=self.astra,
            tolerance=self.tolerance,
        )  # fmt: skip

    def scope_of(self, method: Method) -> str:
        """Where a method's gradients are compared."""
        return method.scope or self.scope

    def check(self) -> tuple[Method, ...]:
        """The methods, after refusing values that mean nothing for any index."""
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
        self.curvature_spec.check()
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
                self.curvature_spec.at(self.scope_of(method))
        return methods


@dataclass(frozen=True, eq=False, repr=False)
class Question:
    """A spec resolved against an index: every choice is made, and the index can answer it.

    Attributes:
        index: The index that is asked.
        spec: The choices; of methods by spans, ``spans`` and ``span_column`` are filled in.
        methods: Rows of the method table, in the order asked.
        curvature: Which H^-1 is meant.
    """

    index: Index
    spec: QuerySpec
    methods: tuple[Method, ...]
    curvature: CurvatureSpec

    def _shown(self) -> dict[str, object]:
        """What is said of the question where it is shown: its choices, but for those that nobody made."""
        default = QuerySpec()
        chosen = {f.name: getattr(self.spec, f.name) for f in fields(QuerySpec)}
        always = ("methods", "top", "target", "scope")
        return {
            name: ", ".join(value) if isinstance(value, tuple) else value
            for name, value in chosen.items()
            if name in always or value != getattr(default, name)
        }

    def __repr__(self) -> str:
        choices = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        return f"<Question of {str(self.index.folder)!r}: {choices}>"

    def _repr_html_(self) -> str:
        return facts_table(f"Question of {self.index.folder}", {**self._shown(), "digest": self.digest})

    def of(self, methods: Iterable[Method]) -> Question:
        """The same question of some of its methods."""
        some = tuple(methods)
        return replace(self, spec=replace(self.spec, methods=tuple(m.name for m in some)), methods=some)

    def scope_of(self, method: Method) -> str:
        """Where a method's gradients are compared."""
        return self.spec.scope_of(method)

    def searched_by(self, method: Method) -> Searched:
        """Name of the searcher that answers for a method."""
        return method.searched_by(self.scope_of(method))

    def by_scope(self) -> dict[str, list[Method]]:
        """The methods by the scope at which they compare gradients."""
        found: dict[str, list[Method]] = {}
        for method in self.methods:
            found.setdefault(self.scope_of(method), []).append(method)
        return found

    @property
    def top(self) -> int:
        """Rows at each end of a ranking of rows: at most as many as are live."""
        return min(self.spec.top, self.index.manifest.n_live)

    @property
    def spans_are_stored(self) -> bool:
        """Whether the index holds the spans of training rows that are meant."""
        stored, spec = self.index.manifest.spec, self.spec
        return stored.spans is not None and (spec.spans, spec.span_column) == (stored.spans, stored.span_column)

    @property
    def query_spans(self) -> str | None:
        """How spans of test rows are found; None if no method compares spans."""
        return self.spec.query_spans or self.spec.spans

    def row_finder(self, device: object) -> Finder:
        """Finds the spans of a training row; a model that does so runs on ``device``."""
        return span_finder(str(self.spec.spans), self.spec.span_column or 0, str(device))

    def query_finder(self, device: object) -> Finder:
        """Finds the spans of a test row; a model that does so runs on ``device``."""
        return span_finder(str(self.query_spans), self.spec.span_column or 0, str(device))

    @cached_property
    def digest(self) -> str:
        """Name of this question in results: two ways to write one question have one name.

        Choices are taken as they come out for the index (``1%`` as the damping that it is there, ``han20`` as its
        settings), and those that no method of the question depends on are left out.
        """
        spec = self.spec
        resolved = {
            "top": spec.top, "target": spec.target, "exact": spec.exact, "aggregate": spec.aggregate,
            "methods": {method.name: self._decisive(method) for method in self.methods},
        }  # fmt: skip
        return hashlib.sha256(canonical_json(resolved)).hexdigest()

    def _decisive(self, method: Method) -> dict[str, Any]:
        """What decides a method's answer beside what all methods share."""
        spec = self.spec
        found: dict[str, Any] = {}
        if method.by_words:
            found["normalise"] = spec.normalise
        if method.representation == "head":
            scope = found["scope"] = self.scope_of(method)
            if method.query == "preconditioned":
                found |= self.curvature.facts(self.index, scope)
                if self.curvature.at(scope).startswith("cg"):
                    found["tolerance"] = spec.tolerance
            if spec.exact == "rerank" and (scope != "head" or method.by_model):
                found["certify"] = spec.certify
                found |= {"recall": spec.recall} if spec.candidates is None else {"candidates": spec.candidates}
        if method.ranks_spans:
            found |= {"spans": spec.spans, "span_column": spec.span_column}
            if method.spans == "both":
                found["query_spans"] = self.query_spans
        if method.saliency:
            found["word"] = spec.word
        return found


def words_top(index: Index, method: Method) -> int:
    """Positions kept a row in the store of words that a method compares; 0: all."""
    tops = index.manifest.spec.words_tops
    return next((top for top in tops if top), 10) if method.words == "topk" else 0


def check_question(question: Question) -> None:
    """Refuse what an index cannot answer, naming the option that builds what is missing.

    Raises:
        MissingStoreError: A representation is not in the index.
        InputError: The question means nothing for this index.
    """
    index, spec = question.index, question.spec
    if any(method.store == "sbert" for method in question.methods):
        index.sentence()
    for method in question.methods:
        if question.searched_by(method) != "stored":
            index.check_texts_held(f"{method.name} at {question.scope_of(method)}")
        if method.by_words:
            index.check_words(words_top(index, method) if method.representation == "words" else None)
    if spec.target not in ("predicted", "gold"):
        choose_targets(spec.target, index.predictions[:1], None, index.manifest.spec.label_names, index.loss)
    index.check_scope(spec.scope)
    refits = index.manifest.curvature.get("head", {}).get("representer", {}).get("refit")
    if spec.aggregate and refits and any(m.query == "representer" for m in question.methods):
        raise InputError(  # its kernel has an offset, so its sum over test rows is no query vector
            "--aggregate: rep of an index built with --rep-refit is not linear in the query. Give gd or if."
        )
    _check_spans(question)
    if spec.certify:
        _check_certifiable(question)
    for method in question.methods:
        if method.representation == "head":
            index.check_scope(question.scope_of(method))
        if method.query == "preconditioned":
            _check_curvature(question, method)


def _check_spans(question: Question) -> None:
    index, spec, methods = question.index, question.spec, question.methods
    names = index.manifest.spec.text_columns
    if not 0 <= (spec.span_column or 0) < len(names):
        raise InputError(f"span column {spec.span_column}: {index.folder} has text columns {', '.join(names)}.")
    given = (spec.spans or "").split(":")[0] in GIVEN
    if given and not question.spans_are_stored and any(m.ranks_spans for m in methods):
        raise InputError(
            f"--spans {spec.spans}: {index.folder} holds the texts of training rows, not their other columns. "
            f"Build it with --store features,spans --spans {spec.spans}, or give it for test rows by --query-spans "
            "and find those of training rows otherwise."
        )
    # Spans of test rows must be found as those of training rows were; a reader takes too long to look at each time.
    finds = any(m.spans == "both" for m in methods) and question.query_spans == spec.spans
    if finds and question.spans_are_stored and ".py:" in (spec.spans or ""):
        check_same_finder(spec.spans, index.manifest.spec.spans_sha256, index.folder)


def _check_certifiable(question: Question) -> None:
    """Refuse to prove what no stored residual bounds: rounding of bf16, and H^-1 that is not the stored one."""
    beyond = [m for m in question.methods if question.searched_by(m) == "gradients"]
    if beyond and question.index.manifest.spec.precision != "fp32":
        raise InputError("--certify needs an index built with --precision fp32.")
    for method in beyond:
        solver = question.curvature.at(question.scope_of(method))
        if method.query == "preconditioned" and solver not in ("ekfac", "identity"):
            raise InputError(f"--certify bounds scores under --curvature ekfac or identity, not {solver}.")


def _check_curvature(question: Question, method: Method) -> None:
    index, scope = question.index, question.scope_of(method)
    solver = question.curvature.at(scope)
    if method.by_model and scope == "head" and solver not in ("exact", "identity") and question.curvature.solver:
        raise InputError(f"{method.name} at the head: --curvature exact or identity, not {solver}.")
    if solver == "exact":
        index.head.damping(question.curvature.damping)
    elif scope != "head" and solver == "ekfac":
        if question.spec.exact == "full":  # H^-1 is known at any damping; only sketches are of those stored
            index.ekfac(scope)
        else:
            index.ekfac_damping(scope, question.curvature.damping)
    elif scope != "head" and solver in BY_EKFAC:
        index.ekfac_damping(scope, None)
    question.curvature.refuse_lost_damping(index, scope)
