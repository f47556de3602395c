"""How many candidates a recall takes: sketches against exact scores, for some training rows as queries.

Exact scores are computed for a sample of the rows only. The sample's best rows stand for the best of all: a top 10 of N
rows is, on average, a top 10 m / N of a sample of m. Where such a row stands among *all* rows by its estimate is
the number of candidates that would have found it. With one row in every sample at least, the answer is on the safe
side for large N.

The same scores choose how much of the code's estimate to count, and the margin of dots: what puts the sample's best
rows highest among all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forebear.indexer.ekfac import Vectors, dot
from forebear.indexer.encoding import Encoded, Texts, take_texts
from forebear.indexer.estimate import Part, estimate
from forebear.indexer.gradient_stage import open_sketchers
from forebear.indexer.gradients import exact_dots, live_sample, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model import Classifier
from forebear.indexer.scopes import scope_blocks
from forebear.indexer.sketch import gradient_folder, sketch_rows
from forebear.indexer.spans import mask_spans

SAMPLE_ROWS = 768
QUERIES_AT_ONCE = 12  # whole gradients held at once, and as many solutions
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)
TOP = 10
AIM = 0.95  # recall whose candidates the choice of weight and margin keeps few
CODE_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
MARGINS = (0.0, 0.5, 1.0)  # in units of the usual error of a cosine


def calibrate_scope(
    index: Index,
    classifier: Classifier,
    scope: str,
    *,
    n_queries: int,
    on_rows: Callable[[int], None],
) -> dict[str, Any]:
    """Calibrate ``gd`` and ``gc``, and ``if`` and ``rif`` at the first damping where there is curvature.

    Args:
        index: Complete but for its manifest.
        classifier: Its last checkpoint.
        scope: Beyond the head.
        n_queries: Live training rows that are asked about, each itself excluded.
        on_rows: Told the number of sampled rows after each batch, over all groups of queries.

    Returns:
        Facts for the manifest: for each method the share of all live rows that must be candidates at each end for some
        recalls of the exact top 10, the weight of the code and the margin.
    """
    spec, live = index.manifest.spec, index.live
    queries = live_sample(live, n_queries, spec.seed + 1)
    sample = live_sample(live, SAMPLE_ROWS, spec.seed + 2)
    asked = _Asked(index.text_lists(queries), index.predictions[queries].astype(np.int64), live == queries[:, None])
    scored = _Scored(index.text_lists(sample), index.labels[sample].astype(np.int64), sample)
    parts = _parts(index, classifier, scope, asked, spans=False)
    exact = _exact_scores(index, classifier, scope, asked, scored, spans=False, on_rows=on_rows)
    methods = {}
    for kind, (dots, cosines) in exact.items():
        of_dots, of_cosines = ("gd", "gc") if kind == "plain" else ("if", "rif")
        for name, scores in ((of_dots, dots), (of_cosines, cosines)):
            methods[name] = _calibrate_method(
                parts[kind], live, scored.numbers, asked.own, scores, cosines, cosine=name == of_cosines
            )
    return {"n_queries": len(queries), "n_rows": len(sample), "methods": methods}


def calibrate_spans(
    index: Index,
    classifier: Classifier,
    scope: str,
    *,
    n_queries: int,
    on_rows: Callable[[int], None],
) -> dict[str, Any]:
    """The same for spans: ``tracin+`` and ``tracin++`` at the last checkpoint, ``if+`` and ``if++`` likewise.

    Some stored spans are asked about, each row's own excluded: the whole row for the methods with one plus, what the
    span adds for those with two.

    Returns:
        By method; shares are of all live spans. None of them without spans.
    """
    spec, live, store = index.manifest.spec, index.live_spans, index.spans()
    if not len(live):
        return {}
    queries = live_sample(live, n_queries, spec.seed + 1)
    sample = live_sample(live, SAMPLE_ROWS, spec.seed + 2)
    differences, spans_of_sample = (
        mask_spans(classifier, index.text_lists(store.rows[entries]), store.spans(entries))[0]
        for entries in (queries, sample)
    )
    targets = index.predictions[store.rows[queries]].astype(np.int64)
    own = store.rows[live] == store.rows[queries][:, None]
    scored = _Scored(spans_of_sample, index.labels[store.rows[sample]].astype(np.int64), sample)
    methods = {}
    for plus, texts in (("+", Encoded(differences.rows)), ("++", differences)):
        asked = _Asked(texts, targets, own)
        parts = _parts(index, classifier, scope, asked, spans=True)
        exact = _exact_scores(index, classifier, scope, asked, scored, spans=True, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            methods[("tracin" if kind == "plain" else "if") + plus] = _calibrate_method(
                parts[kind], live, sample, own, dots, cosines, cosine=False
            )
    return methods


@dataclass(frozen=True)
class _Asked:
    """Queries: texts, the class whose loss is explained ``(q,)``, and which live numbers are their own ``(q, n)``."""

    texts: Texts
    targets: np.ndarray
    own: np.ndarray


@dataclass(frozen=True)
class _Scored:
    """The sample that is scored exactly: texts, gold classes ``(m,)``, and its numbers ``(m,)``, ascending."""

    texts: Texts
    labels: np.ndarray
    numbers: np.ndarray


def _calibrate_method(
    part: Part,
    live: np.ndarray,
    sample: np.ndarray,
    own: np.ndarray,
    scores: np.ndarray,
    cosines: np.ndarray,
    *,
    cosine: bool,
) -> dict[str, Any]:
    """The code's weight and the margin under which the sample's best rows stand highest, and where they then stand."""
    n_best = max(1, round(TOP * len(sample) / len(live)))
    at = np.searchsorted(live, sample)
    scores = np.where(own[:, at], np.nan, scores)
    x, code = estimate([part], live, cosine=True), part.code_products(np.arange(len(own)), live)
    best: tuple[float, dict[str, Any]] | None = None
    for weight in CODE_WEIGHTS if part.store.codes is not None else (0.0,):
        estimates = x + np.float32(weight) * code
        error = float(np.sqrt(np.mean((estimates[:, at] - cosines)[~np.isnan(scores)] ** 2)))
        for share in (0.0,) if cosine else MARGINS:
            shares = []
            for sign in (1.0, -1.0):
                ranked = sign * estimates + np.float32(share * error)
                if not cosine:
                    ranked *= part.store.lengths[live]
                shares.append(_shares(sign * scores, ranked, at, own, n_best))
            cost = float(np.mean(np.log(np.concatenate(shares)))) + max(
                float(np.log(np.quantile(some, AIM, method="higher"))) for some in shares
            )
            if best is None or cost < best[0]:
                candidates = {
                    str(recall): max(float(np.quantile(some, recall, method="higher")) for some in shares)
                    for recall in RECALLS
                }
                best = (cost, {"code_weight": weight, "margin": share * error, "candidates": candidates})
    assert best is not None
    return best[1]


def _parts(index: Index, classifier: Classifier, scope: str, asked: _Asked, *, spans: bool) -> dict[str, Part]:
    """Sketches of the queries beside the stored ones: ``plain``, and ``white`` where there is curvature."""
    spec, checkpoint = index.manifest.spec, index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.fit_folder, classifier, spec, scope, checkpoint, last=True)
    found, _ = sketch_rows(
        classifier, list(sketchers.values()), asked.texts, asked.targets, batch_tokens=spec.batch_tokens
    )
    rows = dict(zip(sketchers, found, strict=True))
    parts = {"plain": Part(1.0, rows[gradient_folder(scope, checkpoint)], index.gradients(scope, spans=spans))}
    if spec.whitened:
        white = index.gradients(scope, damping=0, spans=spans)
        parts["white"] = Part(1.0, rows[gradient_folder(scope, checkpoint, 0)], white)
    return parts


def _exact_scores(
    index: Index,
    classifier: Classifier,
    scope: str,
    asked: _Asked,
    scored: _Scored,
    *,
    spans: bool,
    on_rows: Callable[[int], None],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Exact dots and cosines of the sample with each query, ``(q, m)``, by kind as :func:`_parts` has them."""
    spec = index.manifest.spec
    blocks = scope_blocks(classifier.model, classifier.head_name, scope, classifier.name, with_bias=spec.with_bias)
    lengths = {"plain": index.gradients(scope, spans=spans).norms[scored.numbers].astype(np.float64)}
    if spec.whitened:
        ekfac = index.ekfac(scope).to(classifier.device, classifier.head.weight.dtype)
        damping = index.ekfac_damping(scope)[1]
        lengths["white"] = index.gradients(scope, damping=0, spans=spans).norms[scored.numbers].astype(np.float64)
    shape = len(asked.targets), len(scored.numbers)
    found = {kind: (np.empty(shape), np.empty(shape)) for kind in lengths}
    for start in range(0, len(asked.targets), QUERIES_AT_ONCE):
        at = np.arange(start, min(start + QUERIES_AT_ONCE, len(asked.targets)))
        g = whole_gradients(classifier, scope, blocks, take_texts(asked.texts, at), asked.targets[at])
        kinds: dict[str, Vectors] = {"plain": g}
        if spec.whitened:
            kinds["white"] = ekfac.solve(g, damping)
        stacked = {name: torch.cat([v[name] for v in kinds.values()]) for name in g}
        dots = exact_dots(classifier, scope, stacked, blocks, scored.texts, scored.labels, on_rows=on_rows)
        for some, (kind, vectors) in zip(np.split(dots, len(kinds)), kinds.items(), strict=True):
            below = dot(vectors, g).clamp_min(0).sqrt().cpu().numpy()[:, None] * lengths[kind]
            found[kind][0][at] = some
            found[kind][1][at] = np.divide(some, below, out=np.zeros_like(some), where=below > 0)
    return found


def _shares(scores: np.ndarray, estimates: np.ndarray, sample: np.ndarray, own: np.ndarray, n_best: int) -> np.ndarray:
    """For each of the sample's best rows, the share of all live rows whose estimate is at least its own.

    Args:
        scores: Exact ones of the sample, NaN where excluded, ``(q, m)``.
        estimates: Of all live rows, ``(q, n)``.
        sample: Its positions among them.
        own: Rows that take no part, ``(q, n)``.
        n_best: Of the sample.
    """
    estimates = np.where(own, -np.inf, estimates)
    shares = []
    for q in range(len(scores)):
        ranked = np.argsort(np.where(np.isnan(scores[q]), np.inf, -scores[q]), kind="stable")
        best = estimates[q, sample[ranked[:n_best]]]
        shares.append((estimates[q] >= best[:, None]).sum(axis=1) / estimates.shape[1])
    return np.concatenate(shares)
