"""Which methods an index can answer, and the facts of an answer; no model is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from forebear.indexer.index import Index
from forebear.indexer.storage.manifest import FitAge
from forebear.progress import tell_note, tell_warning
from forebear.retriever.effects.kinds import effect_kind, effect_size
from forebear.retriever.question.methods import METHODS, Method, ann_name
from forebear.retriever.question.models import N_VARIANTS, VARIANT_LEARNING_RATE, VARIANT_ROWS
from forebear.retriever.question.recall import PROVEN, with_note
from forebear.retriever.question.spec import Question, words_top
from forebear.retriever.searchers import SEARCHERS

CLASS_BLOCKS = "class blocks"  # H without the blocks between two classes, of which self-influence is taken


def available_methods(index: Index) -> tuple[str, ...]:
    """Names of the methods that an index can answer."""
    manifest = index.manifest
    has_curvature = index.head.solver is not None
    return tuple(
        method.name
        for method in METHODS.values()
        if method.store in manifest.spec.stores
        and (has_curvature or method.query != "preconditioned")
        and (method.representation != "words" or words_top(index, method) in manifest.spec.words_tops)
        and (not method.through_run or _comes_from_run(index))
    )


def _comes_from_run(index: Index) -> bool:
    """Whether the last checkpoint lies in a run of ``forebear train``, which can be repeated or not."""
    return (found := index.run) is not None and not found[1].settings.get("trainer")


def question_facts(question: Question, *, by_scan: bool = False) -> dict[str, Any]:
    """Everything that decides an answer, and the recall of each method as far as it was measured.

    Args:
        question: The question.
        by_scan: Whether a device compares all vectors, where the CPU asks FAISS.
    """
    index, spec, age = question.index, question.spec, fit_age(question)
    return {
        **({} if age is None else {"fitted_beyond_the_head": asdict(age)}),
        "index": str(index.folder),
        "index_digest": index.manifest.digest(),
        "spec_digest": index.manifest.spec.digest(),
        "query_digest": question.digest,
        "exact": spec.exact,
        "aggregate": spec.aggregate,
        "target": spec.target,
        "top": spec.top,
        "sign": "larger = proponent: training on the row supports the target label",
        "methods": {
            m.name: method_facts(question, m) | _search_facts(question, m, by_scan=by_scan) for m in question.methods
        },
    }


def _search_facts(question: Question, method: Method, *, by_scan: bool) -> dict[str, Any]:
    if by_scan and ann_name(question.index, method) is not None:
        return with_note(PROVEN)
    return SEARCHERS[question.searched_by(method)].facts(question, method)


def method_facts(question: Question, method: Method) -> dict[str, Any]:
    """Facts of a method that decide its scores: scope, metric, curvature, effective damping."""
    index, scope = question.index, question.scope_of(method)
    facts: dict[str, Any] = {
        "scope": scope if method.representation == "head" else None,
        "representation": method.representation,
        "metric": method.metric,
        "formula": method.formula,
        "sign": "larger = proponent; " + method.sign,
    }
    if method.representation == "head" and scope != "head":
        facts["with_bias"] = index.manifest.spec.with_bias
    if method.all_checkpoints:
        facts["eta"] = [c.eta for c in index.manifest.checkpoints]
    if method.variants:
        facts |= {"variants": N_VARIANTS, "variant_learning_rate": VARIANT_LEARNING_RATE, "variant_rows": VARIANT_ROWS}
    if method.words is not None:
        facts |= {"words": method.words, "tops": list(index.manifest.spec.words_tops)}
        facts["precision"] = index.manifest.spec.words_precision
    if method.query == "preconditioned":
        facts |= question.curvature.facts(index, scope)
        if method.metric == "cos" and scope == "head" and question.curvature.by_class_blocks:
            facts["self_influence"] = CLASS_BLOCKS
        if method.metric == "cos" and facts["curvature"] == "astra":
            facts["self_influence"] = "ekfac"  # of the training rows: astra refines the test rows' side
    if method.query == "representer":
        head = index.manifest.curvature["head"]["representer"]
        facts |= {"lambda": head["lambda"], "refit": head["refit"]}
    kind = effect_kind(question, method)
    size = effect_size(question, method, kind)
    return facts | kind.facts() | ({"effect_measured": size} if size else {})


def fit_age(question: Question) -> FitAge | None:
    """Rows that came or went since the index's fit beyond the head; None if the question needs no such fit."""
    beyond = any(m.representation == "head" and question.scope_of(m) != "head" for m in question.methods)
    manifest = question.index.manifest
    return manifest.fit_age if beyond and manifest.spec.sketched_scopes else None


def tell_fit_age(question: Question) -> None:
    """Tell how many rows came or went since the index was fitted, for a question beyond the head."""
    age = fit_age(question)
    if age is None or age.is_current:
        return
    if age.is_stale:
        tell_warning(f"{question.index.folder}: {age}.")
    else:
        tell_note(str(question.index.folder), f"{age}.")


def fit_lines(question: Question) -> dict[str, str]:
    """The fit's age as a line of a report; empty where the question needs no fit, or the fit is current."""
    age = fit_age(question)
    return {} if age is None or age.is_current else {"fitted beyond the head": f"{age}."}
