"""What an index can answer, how many candidates that takes, and what is said of an answer; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.spans.finders import GIVEN, check_same_finder
from forebear.indexer.storage.manifest import FitAge
from forebear.retriever.head.aggregate import check_linear
from forebear.retriever.head.queries import method_facts
from forebear.retriever.question.methods import METHODS, Method
from forebear.retriever.question.recall import (
    NOT_RERANKED,
    PROVEN,
    deep_recall,
    n_candidates,
    settled,
    stored_recall,
    stores_spans,
    with_note,
)
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.words.search import words_top


def is_deep(method: Method, spec: QuerySpec) -> bool:
    """Whether a method compares gradients beyond the head."""
    return method.representation == "head" and spec.scope_of(method) != "head"


def available_methods(index: Index) -> tuple[str, ...]:
    """Names of the methods that an index can answer."""
    manifest = index.manifest
    has_curvature = "exact" in manifest.curvature.get("head", {})
    return tuple(
        method.name
        for method in METHODS.values()
        if method.store in manifest.spec.stores
        and (has_curvature or method.query != "preconditioned")
        and (method.representation != "words" or words_top(index, method) in manifest.spec.words_tops)
    )


def check_stores(index: Index, methods: Sequence[Method], spec: QuerySpec) -> None:
    """Refuse methods whose representation an index does not hold, naming the option that builds it.

    Raises:
        MissingStoreError: It is not in the index.
        InputError: The question means nothing for this index.
    """
    if any(method.store == "sbert" for method in methods):
        index.sentence()
    for method in methods:
        if method.by_words:
            index.check_words(words_top(index, method) if method.representation == "words" else None)
    index.check_scope(spec.scope)
    if spec.aggregate:
        check_linear(index, methods)
    _check_spans(index, methods, settled(index, spec))
    for method in methods:
        scope = spec.scope_of(method)
        if method.representation == "head":
            index.check_scope(scope)
        if method.query == "preconditioned":
            _check_curvature(index, method, scope, spec)


def _check_spans(index: Index, methods: Sequence[Method], spec: QuerySpec) -> None:
    names = index.manifest.spec.text_columns
    if not 0 <= (spec.span_column or 0) < len(names):
        raise InputError(f"span column {spec.span_column}: {index.folder} has text columns {', '.join(names)}.")
    given = (spec.spans or "").split(":")[0] in GIVEN
    if given and not stores_spans(index, spec) and any(m.ranks_spans for m in methods):
        raise InputError(
            f"--spans {spec.spans}: {index.folder} holds the texts of training rows, not their other columns. "
            f"Build it with --store features,spans --spans {spec.spans}, or give it for test rows by --query-spans "
            "and find those of training rows otherwise."
        )
    # Spans of test rows must be found as those of training rows were; a reader takes too long to look at each time.
    finds = any(m.spans == "both" for m in methods) and spec.query_spans in (None, spec.spans)
    if finds and stores_spans(index, spec) and ".py:" in (spec.spans or ""):
        check_same_finder(spec.spans, index.manifest.spec.spans_sha256, index.folder)


def _check_curvature(index: Index, method: Method, scope: str, spec: QuerySpec) -> None:
    solver = spec.solver.at(scope)
    if method.by_model and scope == "head" and solver not in ("exact", "identity"):
        raise InputError(f"{method.name} at the head: --curvature exact or identity, not {solver}.")
    if solver == "exact":
        index.head_damping(spec.damping)
    elif scope != "head" and solver == "ekfac":
        index.ekfac_damping(scope, spec.damping)
    spec.solver.refuse_lost_damping(index, scope)


def question_facts(index: Index, spec: QuerySpec) -> dict[str, Any]:
    """Everything that decides an answer."""
    spec = settled(index, spec)
    age = fit_age(index, spec)
    return {
        **({} if age is None else {"fitted_beyond_the_head": asdict(age)}),
        "index": str(index.folder),
        "index_digest": index.manifest.digest(),
        "spec_digest": index.manifest.spec.digest(),
        "query_digest": spec.digest(index),
        "exact": spec.exact,
        "aggregate": spec.aggregate,
        "target": spec.target,
        "top": spec.top,
        "sign": "larger = proponent: training on the row supports the target label",
        "methods": {
            m.name: method_facts(m, index, spec.solver, spec.scope_of(m)) | _search_facts(index, m, spec)
            for m in spec.check()
        },
    }


def fit_age(index: Index, spec: QuerySpec) -> FitAge | None:
    """Which rows what the index fits beyond the head was fitted to; None if the question asks nothing beyond it."""
    is_asked = any(is_deep(m, spec) for m in spec.check()) and bool(index.manifest.spec.sketched_scopes)
    return index.manifest.fit_age if is_asked else None


def fit_lines(index: Index, spec: QuerySpec) -> dict[str, str]:
    """The same as a line of a report; none where the question needs no fit, or the fit is to the rows of the index."""
    age = fit_age(index, settled(index, spec))
    return {} if age is None or age.is_current else {"fitted beyond the head": f"{age}."}


def _search_facts(index: Index, method: Method, spec: QuerySpec) -> dict[str, Any]:
    """Recall of a method: proven, calibrated, or not measured (None, with a note); and what else decides its answer."""
    if method.by_model:
        return _by_model_facts(index, method, spec)
    if method.by_words:
        exact = method.representation == "tfidf" or spec.exact != "none"
        return with_note(PROVEN if exact else NOT_RERANKED) | {"normalise": spec.normalise}
    if not is_deep(method, spec):
        return with_note(stored_recall(index, method, spec))
    if spec.exact != "rerank":
        return with_note(PROVEN if spec.exact == "full" else NOT_RERANKED) | {"candidates": None}
    scope = spec.scope_of(method)
    n = n_candidates(index, scope, method, spec)
    stated = PROVEN if spec.certify else deep_recall(index, scope, method, n, spec)
    return with_note(stated) | {"candidates": n, "certify": spec.certify}


def _by_model_facts(index: Index, method: Method, spec: QuerySpec) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if method.saliency:  # spans are words then, whatever --spans says
        facts = {"word": spec.word}
    elif method.spans:
        facts = {"spans": spec.spans, "query_spans": spec.query_spans or spec.spans}
        facts |= {"span_column": spec.span_column, "stored_spans": stores_spans(index, spec)}
    scope = spec.scope_of(method)
    all_stored = stores_spans(index, spec) if method.ranks_spans else method.saliency and not method.spans
    if spec.exact == "full" or (all_stored and scope == "head" and not method.variants):
        return facts | {"recall": 1.0, "candidates": None}
    n = n_candidates(index, scope, method, spec)
    return facts | with_note(deep_recall(index, scope, method, n, spec)) | {"candidates": n}
