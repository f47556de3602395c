"""What an index can answer, how many candidates that takes, and what is said of an answer; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from forebear.errors import InputError
from forebear.indexer.index import Index
from forebear.indexer.manifest import FitAge
from forebear.indexer.spans import GIVEN, check_same_finder
from forebear.retriever.aggregate import check_linear
from forebear.retriever.methods import METHODS, Method
from forebear.retriever.queries import method_facts
from forebear.retriever.query_spec import DEFAULT_CANDIDATES, QuerySpec, candidates_for, recall_of
from forebear.retriever.stored import stored_recall
from forebear.retriever.words import words_top


def settled(index: Index, spec: QuerySpec) -> QuerySpec:
    """The question with what it leaves to the index: which spans, and in which text column."""
    stored = index.manifest.spec
    how = spec.spans or stored.spans or "clauses"
    column = stored.span_column if how == stored.spans else 0
    return replace(spec, spans=how, span_column=column if spec.span_column is None else spec.span_column)


def stores_spans(index: Index, spec: QuerySpec) -> bool:
    """Whether an index holds the spans that a settled question is about."""
    stored = index.manifest.spec
    return stored.spans is not None and (spec.spans, spec.span_column) == (stored.spans, stored.span_column)


def is_deep(method: Method, spec: QuerySpec) -> bool:
    """Whether a method compares gradients beyond the head."""
    return method.representation == "head" and spec.scope_of(method) != "head"


def n_candidates(index: Index, scope: str, method: Method, spec: QuerySpec) -> int:
    """Rows, or stored spans, at each end that are scored exactly for a method at a scope beyond the head."""
    if spec.candidates is not None:
        return spec.candidates
    name, total = _searched(index, method, settled(index, spec))
    found = index.calibrated(scope, name)
    if found is None:
        return max(spec.top, DEFAULT_CANDIDATES)
    return max(spec.top, candidates_for(found["candidates"], spec.recall, total))


def _searched(index: Index, method: Method, spec: QuerySpec) -> tuple[str, int]:
    """The method whose calibration says how many candidates it takes, and the number of what is searched."""
    if method.ranks_spans and stores_spans(index, spec):
        return method.name, len(index.live_spans)
    return method.calibrated_as, index.manifest.n_live


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


def _search_facts(index: Index, method: Method, spec: QuerySpec) -> dict[str, Any]:
    """Recall of a method: proven, calibrated, or not known (None); and what else decides its answer."""
    if method.by_model:
        return _by_model_facts(index, method, spec)
    if method.by_words:
        exact = method.representation == "tfidf" or spec.exact != "none"
        return {"recall": 1.0 if exact else None, "normalise": spec.normalise}
    if not is_deep(method, spec):
        return {"recall": stored_recall(index, method, spec.exact)}
    if spec.exact != "rerank":
        return {"recall": 1.0 if spec.exact == "full" else None, "candidates": None}
    scope = spec.scope_of(method)
    n = n_candidates(index, scope, method, spec)
    return {"recall": _calibrated_recall(index, scope, method, n, spec), "candidates": n, "certify": spec.certify}


def _by_model_facts(index: Index, method: Method, spec: QuerySpec) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if method.saliency:  # spans are words then, whatever --spans says
        facts = {"word": spec.word}
    elif method.spans:
        facts = {"spans": spec.spans, "query_spans": spec.query_spans or spec.spans}
        facts |= {"span_column": spec.span_column, "stored_spans": stores_spans(index, spec)}
    scope = spec.scope_of(method)
    name, _ = _searched(index, method, spec)
    of_rows = method.saliency and not method.spans
    all_stored = (name == method.name or of_rows) and scope == "head" and not method.variants
    if spec.exact == "full" or all_stored:
        return facts | {"recall": 1.0, "candidates": None}
    n = n_candidates(index, scope, method, spec)
    recall = _calibrated_recall(index, scope, method, n, spec) if name == method.name else None
    return facts | {"recall": recall, "candidates": n}


def _calibrated_recall(index: Index, scope: str, method: Method, n: int, spec: QuerySpec) -> float | None:
    """What ``n`` candidates bought when the index was built; None where nothing was measured."""
    found = index.calibrated(scope, method.name)
    return None if found is None else recall_of(found["candidates"], n, _searched(index, method, spec)[1])
