"""How many candidates a question takes, and what may be said of the recall that they buy.

A recall is stated only where it was measured for just that case. Calibration
(:mod:`forebear.indexer.building.calibration.calibrate`) measures it for a method at a scope, under EK-FAC at the
index's first damping, for single rows and the class that the model predicts for them, among the rows that the index
had, for the top k that its sample stands for. The recall is 1 where all rows are scored or the search proves its
answer. Everywhere else it is None, and a note says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from forebear.indexer.index import Index
from forebear.indexer.storage.ann import CALIBRATION_TOP, expected_recall
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import Method, ann_name
from forebear.retriever.question.spec import Question
from forebear.wording import worded

DEFAULT_CANDIDATES = 100  # where no calibration says how many a recall takes
# For each method that compares whitened sketches, the method that compares the plain sketches in the same way.
UNWHITENED = {"if": "gd", "rif": "gc", "if+": "tracin+", "if++": "tracin++"}
_ROUNDING = 1e-9
Stated = tuple[float | None, str | None]  # a recall (None: not measured), and the note that stands beside it
PROVEN: Stated = (1.0, None)
NOT_RERANKED: Stated = (None, "recall not measured for --exact none")


def candidates_for(shares: dict[str, float], recall: float, n_live: int) -> int:
    """Candidates at each end that a recall takes, from the shares of all rows that calibration found for some recalls.

    A recall between two of those takes the candidates of the larger. One beyond the largest, which is what the sample
    supports, takes the candidates of the largest: more would cost time and promise nothing. A recall of 1 takes all.
    """
    if recall >= 1 or not shares:
        return n_live
    by_recall = {float(calibrated): share for calibrated, share in shares.items()}
    # The order of the manifest's keys says nothing; a larger recall never takes fewer candidates.
    enough = [share for calibrated, share in by_recall.items() if calibrated >= recall - _ROUNDING]
    return min(n_live, math.ceil(min(enough or [max(by_recall.values())]) * n_live - _ROUNDING))


def recall_of(shares: dict[str, float], n_candidates: int, n_live: int, *, at_most: float = 1.0) -> float | None:
    """The largest calibrated recall that a number of candidates suffices for; None if for none.

    Args:
        shares: As :func:`candidates_for` takes them.
        n_candidates: Number of candidates at each end.
        n_live: Number of all rows; so many candidates leave none out.
        at_most: The recall that the candidates were chosen for. By chance they may suffice for a larger one, which
            must not be stated.
    """
    if n_candidates >= n_live:
        return 1.0
    reached = [float(n) for n, share in shares.items() if math.ceil(share * n_live - _ROUNDING) <= n_candidates]
    return min(at_most, max(reached)) if reached else None


def same_as(index: Index, scope: str, method: Method, curvature: CurvatureSpec) -> str:
    """The method by whose calibration candidates are proposed, where two methods are the same but for a factor.

    With H = I, ``if`` is ``gd`` and ``rif`` is ``gc``; with one checkpoint ``tracin`` is ``gd`` times eta.
    """
    if method.query == "preconditioned" and curvature.at(scope) == "identity":
        return UNWHITENED.get(method.name, method.name)
    checkpoints = index.manifest.checkpoints
    if method.all_checkpoints and len(checkpoints) == 1 and checkpoints[0].eta > 0:
        return "gd"
    return method.name


def _searched(question: Question, method: Method) -> tuple[str, int]:
    """Name of the method whose calibration gives the candidates, and the number of rows or spans that are searched."""
    index = question.index
    if method.ranks_spans and question.spans_are_stored:
        return method.name, len(index.live_spans)
    if method.by_model:
        return method.calibrated_as, index.manifest.n_live
    return same_as(index, question.scope_of(method), method, question.curvature), index.manifest.n_live


def n_candidates(question: Question, method: Method) -> int:
    """Rows, or stored spans, at each end that are scored exactly for a method at a scope beyond the head, at most.

    Where candidates come from two sketches, this is the number from each. Where those of both ends are as many as there
    are rows, all rows are scored: that costs no more, and the answer is proven.
    """
    if question.spec.candidates is not None:
        return question.spec.candidates
    n, total = _listed(question, method)
    return total if 2 * n >= total and stop_of(question, method) is None else n


def _listed(question: Question, method: Method) -> tuple[int, int]:
    """How many candidates an end has that a recall takes, of how many rows or spans.

    Where the calibration's sample does not support the recall of the question, it is the number for the largest recall
    that the sample supports, and at least the number taken without calibration.
    """
    spec = question.spec
    name, total = _searched(question, method)
    calibration = question.index.calibrated(question.scope_of(method), name)
    if calibration is None:
        return max(spec.top, DEFAULT_CANDIDATES), total
    stop = stop_of(question, method)
    shares = calibration["candidates"] if stop is None else {str(stop.recall): stop.list_share}
    n = max(spec.top, candidates_for(shares, spec.recall, total))
    unsupported = spec.recall > calibration.get("supported", 1.0)
    return max(n, min(total, DEFAULT_CANDIDATES)) if unsupported else n, total


@dataclass(frozen=True)
class Stop:
    """When the scoring of candidates stops: no other score can be among the best, if its error is an allowed one.

    Attributes:
        error: How far a score may be beyond its estimate, in units of
            :meth:`~forebear.indexer.sketches.estimates.Proposal.units`.
        list_share: Share of all rows that are listed as candidates at each end, and scored at most.
        recall: What is found of the best rows, in expectation.
    """

    error: float
    list_share: float
    recall: float


def stop_of(question: Question, method: Method) -> Stop | None:
    """When scoring stops at a scope beyond the head; None: when all candidates are scored.

    Calibration measured errors for single rows at one damping, and so on: where a question differs, all are scored.
    """
    spec = question.spec
    if spec.exact != "rerank" or spec.certify or spec.candidates is not None or spec.recall >= 1:
        return None
    if question.searched_by(method) != "gradients":
        return None
    name, _ = _searched(question, method)
    calibration = question.index.calibrated(question.scope_of(method), name)
    if calibration is None or "errors" not in calibration or _not_measured(question, method, name):
        return None
    errors = {float(recall): error for recall, error in calibration["errors"].items()}
    enough = [recall for recall in errors if recall >= min(spec.recall, calibration["supported"]) - _ROUNDING]
    if not enough:  # too many of the best rows were not listed: a number of candidates keeps the recall
        return None
    level = min(enough)
    return Stop(errors[level], calibration["list_share"], min(spec.recall, level))


def deep_recall(question: Question, method: Method, n: int) -> Stated:
    """The recall of ``n`` candidates at each end beyond the head; where it was not measured, None and why."""
    spec = question.spec
    name, total = _searched(question, method)
    words_of_rows = (
        method.saliency and method.spans is not None
    )  # the words of a few rows are scored, never those of all rows
    if n >= total and not words_of_rows:
        return PROVEN
    reasons = _not_measured(question, method, name)
    if reasons:
        return None, f"recall not measured for {'; '.join(reasons)}"
    calibration = question.index.calibrated(question.scope_of(method), name)
    assert calibration is not None
    at_most = spec.recall if spec.candidates is None else 1.0
    stop = stop_of(question, method)
    recall = recall_of(calibration["candidates"], n, total, at_most=at_most) if stop is None else stop.recall
    if recall is None:
        return None, f"recall not measured for so few candidates as {n:,}"
    if spec.candidates is None and recall < spec.recall:
        return recall, (
            f"--recall {spec.recall:g} was asked for; calibration by {calibration['n_stating']} queries supports at "
            f"most {calibration['supported']:.3g}. Build the index with more --calibrate, or ask with --exact full"
        )
    return recall, None


def _not_measured(question: Question, method: Method, name: str) -> list[str]:
    """The respects in which a question differs from the index's calibration, each as a phrase of the note."""
    index, spec, scope = question.index, question.spec, question.scope_of(method)
    manifest = index.manifest
    calibration = index.calibrated(scope, name)
    if method.variants:
        return [f"{method.name}: calibration asks the last checkpoint, not its variants"]
    if method.by_model and name != method.name:
        return [f"{method.name}: rows are proposed as for {name}" + (", not its spans" if method.spans else "")]
    if calibration is None:
        if method.all_checkpoints:
            return [f"{method.name}: sums over checkpoints are not calibrated"]
        return [f"{method.name} at scope {scope}: the index holds no calibration of it (--calibrate)"]
    if "margin_unit" not in calibration:
        return ["an index that an earlier forebear calibrated by other rules: build it again"]
    reasons = []
    if method.query == "preconditioned" and question.curvature.at(scope) != "identity":
        stored = manifest.spec.dampings
        if question.curvature.at(scope) != "ekfac":
            reasons.append(f"--curvature {question.curvature.at(scope)}: calibrated under ekfac")
        elif index.find_ekfac_damping(scope, spec.damping) != 0:
            reasons.append(f"--damping {spec.damping}: calibrated at {stored[0]}")
    if spec.aggregate:
        reasons.append("--aggregate: calibrated for single rows")
    if spec.target != "predicted":
        reasons.append(f"--target {spec.target}: calibrated for the predicted label")
    if method.spans == "both" and question.query_spans != spec.spans:
        reasons.append(f"--query-spans {question.query_spans}: calibrated for {spec.spans}")
    if spec.top > calibration["top"]:
        reasons.append(f"--top {spec.top}: calibrated for the top {calibration['top']}")
    age = manifest.fit_age
    if not age.is_current:
        reasons.append(f"rows that have changed since calibration ({age.appended:,} appended, {age.retired:,} retired)")
    return reasons


def stored_recall(question: Question, method: Method) -> Stated:
    """Recall where every row's vector is stored: 1 where all rows are compared, or what was measured for FAISS."""
    index, spec = question.index, question.spec
    name = ann_name(index, method)
    if spec.exact == "full" or name is None:
        return PROVEN
    if spec.exact == "none":
        return NOT_RERANKED
    facts = index.manifest.derived[name]
    if facts["factory"] == "Flat":
        return PROVEN
    faiss = f"FAISS {facts['factory']}"
    if "n_stating" not in facts:
        return None, (
            f"recall not measured for {faiss} of this index but by the queries that its settings were chosen by (an "
            "earlier forebear): --rebuild-ann measures it"
        )
    if spec.top > CALIBRATION_TOP:
        return None, f"recall not measured for {faiss} at --top {spec.top}, but for the top {CALIBRATION_TOP}"
    expected, n_stating = expected_recall(facts), facts["n_stating"]
    if expected is None:
        return None, f"recall not measured for {faiss} of a single row"
    rows = "row" if n_stating == 1 else "rows"
    return expected, f"measured on {n_stating} {rows} (training rows, {faiss}), not proven"


def with_note(stated: Stated) -> dict[str, Any]:
    """Facts of an answer: ``recall``, and ``recall_note`` where it has one."""
    recall, note = stated
    return {"recall": recall} | ({} if note is None else {"recall_note": worded(note)})
