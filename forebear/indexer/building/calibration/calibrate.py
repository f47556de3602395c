"""How many candidates a recall takes: sketches are compared with exact scores, with training rows as queries.

The queries are split in two. The first part chooses two settings, the weight of the code's estimate and the margin of
dot products, so that the estimates of its best rows stand highest among all rows. The second part measures how many
candidates are needed to find its best rows; from that :mod:`forebear.conformal` states a recall, at most the largest
that so many queries support.

Exact scores are computed for a sample of the rows only, whose best rows stand for the best of all. Of m rows sampled
from N, the best j rank no higher among all rows than the best floor(j N / m) of all do (the chance that one of them is
among the first r is at most r m / (j N)). So a recall of the sample's best j holds for the top k of all rows, for k up
to floor(j N / m), unless rows lower in the exact ranking are easier to find than rows above them. j is the least number
for which k is 10. A sampled row is found by r candidates if its estimate ranks at most r-th among *all* rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forebear.indexer.building.calibration.needed_candidates import TOP, RankCalibration, Ranking
from forebear.indexer.curvature.eigenbasis import Whitening, held_numbers, score_pairs
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import device_kind
from forebear.indexer.model.device.copies import send
from forebear.indexer.model.encoding import Encoded, Texts, as_encoded
from forebear.indexer.model.scopes import Scope
from forebear.indexer.rows.sampling import live_sample
from forebear.indexer.sketches.estimates import Part
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import sketch_rows
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.storage.layout import gradient_folder
from forebear.ratio import ratio

SAMPLE_ROWS = 768  # at most
LEAST_SAMPLE_ROWS = 128  # or all rows, if there are fewer
# Of the queries' gradients that are held at once, as factors where the texts are short; beside them stand the gradients
# of one layer of all these queries, and of some rows.
VECTOR_BYTES = 1 << 30
LEAST_QUERIES = 12  # held at once, also where they take more than VECTOR_BYTES


def n_sampled(n_live: int) -> int:
    """How many of the live rows (or spans) are scored exactly: as many as have one of the best 10 of all on average."""
    return min(n_live, SAMPLE_ROWS, max(LEAST_SAMPLE_ROWS, (n_live - 1) // TOP))


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
        index: The index, all of whose files are written except for the manifest.
        classifier: The last checkpoint of the index.
        scope: A scope beyond the head.
        n_queries: Number of live training rows to take as queries; each is excluded from its own ranking.
        on_rows: Called with the number of sampled rows after each batch, those of the last group of queries.

    Returns:
        Facts for the manifest: for each method the share of all live rows that must be candidates at each end for some
        recalls of the exact top 10, the weight of the code, and the margin.
    """
    spec, live = index.manifest.spec, index.live
    queries = live_sample(live, n_queries, spec.seed + 1)
    sample = live_sample(live, n_sampled(len(live)), spec.seed + 2)
    methods: dict[str, Any] = {}
    if len(live) > 1:  # a single row leaves none to rank
        calibration_queries = _CalibrationQueries(
            index.text_lists(queries), index.predicted(queries), live == queries[:, None]
        )
        exact_sample = _ExactSample(index.text_lists(sample), index.targets(sample), sample)
        parts = _parts(index, classifier, scope, calibration_queries, spans=False)
        exact = _exact_scores(index, classifier, scope, calibration_queries, exact_sample, spans=False, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            of_dots, of_cosines = ("gd", "gc") if kind == "plain" else ("if", "rif")
            rankings = {of_dots: Ranking(dots, False), of_cosines: Ranking(cosines, True)}
            calibration = RankCalibration(parts[kind], live, sample, calibration_queries.excluded, spec.seed + 3)
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
    """Calibrate the methods that rank spans, at the last checkpoint: ``tracin+``, ``tracin++``, ``if+`` and ``if++``.

    Queries are training rows with stored spans, each row's own spans excluded: the whole row for the methods with one
    plus, what its most important span adds for those with two.

    Returns:
        Facts by method, whose shares are of all live spans; empty where fewer than two rows have spans.
    """
    spec, live, store = index.manifest.spec, index.live_spans, index.spans()
    if len(np.unique(store.rows[live])) < 2:
        return {}
    queries = live_sample(_most_important(index, classifier), n_queries, spec.seed + 1)
    sample = live_sample(live, n_sampled(len(live)), spec.seed + 2)
    differences, spans_of_sample = (
        mask_spans(classifier, index.text_lists(store.rows[entries]), store.spans(entries))[0]
        for entries in (queries, sample)
    )
    targets = index.predicted(store.rows[queries])
    excluded = store.rows[live] == store.rows[queries][:, None]
    exact_sample = _ExactSample(spans_of_sample, index.targets(store.rows[sample]), sample)
    methods: dict[str, Any] = {}
    for plus, texts in (("+", Encoded(differences.rows)), ("++", differences)):
        calibration_queries = _CalibrationQueries(texts, targets, excluded)
        parts = _parts(index, classifier, scope, calibration_queries, spans=True)
        exact = _exact_scores(index, classifier, scope, calibration_queries, exact_sample, spans=True, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            name = ("tracin" if kind == "plain" else "if") + plus
            calibration = RankCalibration(parts[kind], live, sample, excluded, spec.seed + 3)
            methods |= calibration.calibrate({name: Ranking(dots, False)}, cosines, stops=False)
    return methods


def _most_important(index: Index, classifier: Classifier) -> np.ndarray:
    """The live span of each row whose masking raises the loss of the row's predicted class most; ascending entries."""
    live, store = index.live_spans, index.spans()
    rows = store.rows[live]
    targets = index.predicted(rows)
    head = classifier.head
    losses = []
    for features in (store.features.take(live), index.features().take(rows)):
        with torch.no_grad():
            logits = head(send(features, head.weight.device).to(head.weight.dtype))
        losses.append(index.loss.residual_and_loss(logits.double().cpu().numpy(), targets)[1])
    order = np.lexsort((live, losses[1] - losses[0], rows))  # by row, the largest rise of the loss first
    return np.sort(live[order[np.unique(rows[order], return_index=True)[1]]])


@dataclass(frozen=True)
class _CalibrationQueries:
    """Queries: texts, classes whose losses are explained ``(q,)``, and the live rows each one excludes ``(q, n)``."""

    texts: Texts
    targets: np.ndarray
    excluded: np.ndarray


@dataclass(frozen=True)
class _ExactSample:
    """The rows or spans that are scored exactly: texts, gold classes ``(m,)``, and numbers ``(m,)``, ascending."""

    texts: Texts
    labels: np.ndarray
    numbers: np.ndarray


def _parts(
    index: Index, classifier: Classifier, scope: Scope, queries: _CalibrationQueries, *, spans: bool
) -> dict[str, Part]:
    """Sketches of the queries beside the stored ones: ``plain``, and ``white`` where there is curvature."""
    spec = index.manifest.spec_on(device_kind(classifier.device))
    checkpoint = index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.fit_folder, classifier, spec, scope.name, checkpoint, last=True)
    sketches, _ = sketch_rows(
        classifier, list(sketchers.values()), queries.texts, queries.targets, batch_tokens=spec.batch_tokens
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
    queries: _CalibrationQueries,
    sample: _ExactSample,
    *,
    spans: bool,
    on_rows: Callable[[int], None],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Exact dot products and cosines of the sample with each query, ``(q, m)``, by the kinds of :func:`_parts`."""
    store, whitening = index.gradients(scope.name, spans=spans), None
    if index.manifest.spec.whitened:
        ekfac = index.ekfac(scope.name).to(classifier.device, classifier.head.weight.dtype)
        whitening = Whitening(ekfac, index.ekfac_damping(scope.name)[1])
    encoded = as_encoded(classifier, queries.texts)
    n_groups = -(-len(encoded) // _queries_at_once(scope, encoded))
    dots, squares = [], []
    for number, group in enumerate(np.array_split(np.arange(len(encoded)), n_groups), 1):
        found = score_pairs(
            classifier, scope, whitening, (encoded.take(group), queries.targets[group]), (sample.texts, sample.labels),
            on_rows=on_rows if number == n_groups else None,
        )  # fmt: skip
        dots.append(found.dots)
        squares.append(found.queries)
    lengths = np.concatenate([store.norms_within(sample.numbers)[0][None], np.sqrt(found.rows)])
    scores = np.concatenate(dots, axis=1)
    cosines = ratio(scores, np.sqrt(np.concatenate(squares, axis=1))[:, :, None] * lengths[:, None])
    return {kind: (scores[i], cosines[i]) for i, kind in enumerate(("plain", "white")[: len(scores)])}


def _queries_at_once(scope: Scope, queries: Encoded) -> int:
    """How many queries' gradients are held at once."""
    versions = [queries.rows] if queries.minus is None else [queries.rows, queries.minus]
    n_pieces = sum(max(len(row["input_ids"]) for row in rows) for rows in versions)
    return max(LEAST_QUERIES, VECTOR_BYTES // (4 * held_numbers(scope.blocks, n_pieces)))
