"""How many candidates a recall takes: sketches against exact scores, for some training rows as queries.

The queries are split in two. The first part chooses how much of the code's estimate to count, and the margin of dots:
what puts its best rows highest among all. The second part, which chose nothing, says how many candidates find its best
rows; from that :mod:`forebear.conformal` states a recall, at most the largest that so many queries support.

Exact scores are computed for a sample of the rows only. Its best rows stand for the best of all: of m rows sampled from
N, the best j stand no higher among all rows than the best floor(j N / m) of all do (the chance that one of those is
among the first r is at most r m / (j N)). So a recall of the former holds for the top k of all, k up to that number,
unless rows further down the exact ranking are easier to find than those above them. j is the least for which k is 10.
Where a row of the sample stands among *all* rows by its estimate says how many candidates find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forebear.indexer.building.needed_candidates import RankCalibration, Ranking
from forebear.indexer.gradients.vectors import dot
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts, take_texts
from forebear.indexer.model.forward import residual_and_loss
from forebear.indexer.model.scopes import Scope
from forebear.indexer.sketches.candidates import Part
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import sketch_rows
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.storage.layout import gradient_folder
from forebear.indexer.storage.manifest import IndexSpec
from forebear.ratio import ratio
from forebear.sampling import live_sample

SAMPLE_ROWS = 768
# Gradients of queries and as many solutions, held at once; each sampled row's gradient is formed once for them. The
# peak is higher by some copies of the largest layer's gradients, while that layer is solved or its lengths are summed.
VECTOR_BYTES = 2 << 30
LEAST_QUERIES = 12  # held at once, however large they are


def queries_at_once(spec: IndexSpec, scope: Scope) -> int:
    """Queries whose whole vectors are held together."""
    kinds = 2 if spec.whitened else 1
    return max(LEAST_QUERIES, VECTOR_BYTES // (4 * kinds * scope.size))


def calibrate_scope(
    index: Index,
    classifier: Classifier,
    scope: Scope,
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
    methods: dict[str, Any] = {}
    if len(live) > 1:  # a single row leaves none to rank
        asked = _Asked(index.text_lists(queries), index.predictions[queries].astype(np.int64), live == queries[:, None])
        scored = _Scored(index.text_lists(sample), index.labels[sample].astype(np.int64), sample)
        parts = _parts(index, classifier, scope, asked, spans=False)
        exact = _exact_scores(index, classifier, scope, asked, scored, spans=False, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            of_dots, of_cosines = ("gd", "gc") if kind == "plain" else ("if", "rif")
            rankings = {of_dots: Ranking(dots, False), of_cosines: Ranking(cosines, True)}
            calibration = RankCalibration(parts[kind], live, sample, asked.excluded, spec.seed + 3)
            methods |= calibration.calibrate(rankings, cosines)
    return {"n_queries": len(queries), "n_rows": len(sample), "methods": methods}


def calibrate_spans(
    index: Index,
    classifier: Classifier,
    scope: Scope,
    *,
    n_queries: int,
    on_rows: Callable[[int], None],
) -> dict[str, Any]:
    """Calibrate what ranks spans, at the last checkpoint: ``tracin+``, ``tracin++``, ``if+`` and ``if++``.

    Queries are training rows with stored spans, each row's own spans excluded: the whole row for the methods with one
    plus, what its most important span adds for those with two.

    Returns:
        By method; shares are of all live spans. None of them where fewer than two rows have spans.
    """
    spec, live, store = index.manifest.spec, index.live_spans, index.spans()
    if len(np.unique(store.rows[live])) < 2:
        return {}
    queries = live_sample(_most_important(index, classifier), n_queries, spec.seed + 1)
    sample = live_sample(live, SAMPLE_ROWS, spec.seed + 2)
    differences, spans_of_sample = (
        mask_spans(classifier, index.text_lists(store.rows[entries]), store.spans(entries))[0]
        for entries in (queries, sample)
    )
    targets = index.predictions[store.rows[queries]].astype(np.int64)
    excluded = store.rows[live] == store.rows[queries][:, None]
    scored = _Scored(spans_of_sample, index.labels[store.rows[sample]].astype(np.int64), sample)
    methods: dict[str, Any] = {}
    for plus, texts in (("+", Encoded(differences.rows)), ("++", differences)):
        asked = _Asked(texts, targets, excluded)
        parts = _parts(index, classifier, scope, asked, spans=True)
        exact = _exact_scores(index, classifier, scope, asked, scored, spans=True, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            name = ("tracin" if kind == "plain" else "if") + plus
            calibration = RankCalibration(parts[kind], live, sample, excluded, spec.seed + 3)
            methods |= calibration.calibrate({name: Ranking(dots, False)}, cosines)
    return methods


def _most_important(index: Index, classifier: Classifier) -> np.ndarray:
    """The live span of each row whose masking raises the loss of the row's predicted class most; ascending entries."""
    live, store = index.live_spans, index.spans()
    rows = store.rows[live]
    targets = index.predictions[rows].astype(np.int64)
    head = classifier.head
    losses = []
    for features in (store.features.take(live), index.features().take(rows)):
        with torch.no_grad():
            logits = head(torch.from_numpy(features).to(head.weight.device, head.weight.dtype))
        losses.append(residual_and_loss(logits.double().cpu().numpy(), targets)[1])
    order = np.lexsort((live, losses[1] - losses[0], rows))  # by row, the largest rise of the loss first
    return np.sort(live[order[np.unique(rows[order], return_index=True)[1]]])


@dataclass(frozen=True)
class _Asked:
    """Queries: texts, the class whose loss is explained ``(q,)``, and which live rows are their own ``(q, n)``."""

    texts: Texts
    targets: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True)
class _Scored:
    """The sample that is scored exactly: texts, gold classes ``(m,)``, and its numbers ``(m,)``, ascending."""

    texts: Texts
    labels: np.ndarray
    numbers: np.ndarray


def _parts(index: Index, classifier: Classifier, scope: Scope, asked: _Asked, *, spans: bool) -> dict[str, Part]:
    """Sketches of the queries beside the stored ones: ``plain``, and ``white`` where there is curvature."""
    spec, checkpoint = index.manifest.spec, index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.fit_folder, classifier, spec, scope.name, checkpoint, last=True)
    sketches, _ = sketch_rows(
        classifier, list(sketchers.values()), asked.texts, asked.targets, batch_tokens=spec.batch_tokens
    )
    rows = dict(zip(sketchers, sketches, strict=True))
    parts = {
        "plain": Part(1.0, rows[gradient_folder(scope.name, checkpoint)], index.gradients(scope.name, spans=spans))
    }
    if spec.whitened:
        white = index.gradients(scope.name, damping=0, spans=spans)
        parts["white"] = Part(1.0, rows[gradient_folder(scope.name, checkpoint, 0)], white)
    return parts


def _exact_scores(
    index: Index,
    classifier: Classifier,
    scope: Scope,
    asked: _Asked,
    scored: _Scored,
    *,
    spans: bool,
    on_rows: Callable[[int], None],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Exact dots and cosines of the sample with each query, ``(q, m)``, by kind as :func:`_parts` has them."""
    spec = index.manifest.spec
    lengths = {"plain": index.gradients(scope.name, spans=spans).norms[scored.numbers].astype(np.float64)}
    if spec.whitened:
        ekfac = index.ekfac(scope.name).to(classifier.device, classifier.head.weight.dtype)
        damping = index.ekfac_damping(scope.name)[1]
        lengths["white"] = index.gradients(scope.name, damping=0, spans=spans).norms[scored.numbers].astype(np.float64)
    n_queries, n_sampled = len(asked.targets), len(scored.numbers)
    exact = {kind: (np.empty((n_queries, n_sampled)), np.empty((n_queries, n_sampled))) for kind in lengths}
    size = queries_at_once(spec, scope)
    for start in range(0, n_queries, size):
        group = np.arange(start, min(start + size, n_queries))
        vectors = whole_gradients(classifier, scope, take_texts(asked.texts, group), asked.targets[group])
        if spec.whitened:
            for name, g in vectors.items():  # layer by layer, so that only one layer's gradients are held twice
                vectors[name] = torch.cat([g, ekfac.solve({name: g}, damping)[name]])
        dots = exact_dots(classifier, scope, vectors, scored.texts, scored.labels, on_rows=on_rows)
        plain = {name: v[: len(group)] for name, v in vectors.items()}
        for number, kind in enumerate(exact):
            of_kind = slice(number * len(group), (number + 1) * len(group))
            dots_of_kind = dots[of_kind]
            squares = dot({name: v[of_kind] for name, v in vectors.items()}, plain)
            products = squares.clamp_min(0).sqrt().cpu().numpy()[:, None] * lengths[kind]
            exact[kind][0][group] = dots_of_kind
            exact[kind][1][group] = ratio(dots_of_kind, products)
    return exact
