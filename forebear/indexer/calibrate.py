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
from typing import Any

import numpy as np
import torch

from forebear.indexer.ekfac import Vectors, dot
from forebear.indexer.estimate import Part, estimate
from forebear.indexer.gradient_stage import open_sketchers
from forebear.indexer.gradients import exact_dots, live_sample, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model import Classifier
from forebear.indexer.scopes import scope_blocks
from forebear.indexer.sketch import gradient_folder, sketch_rows

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
    parts = _parts(index, classifier, scope, queries)
    exact = _exact_scores(index, classifier, scope, queries, sample, white="if" in parts, on_rows=on_rows)
    n_best = max(1, round(TOP * len(sample) / len(live)))
    others = sample != queries[:, None]
    methods = {}
    for name, scores in exact.items():
        cosine = name in ("gc", "rif")
        measured = exact["rif" if name in ("if", "rif") else "gc"]
        methods[name] = _calibrate_method(
            parts[name], live, sample, queries, np.where(others, scores, np.nan), measured, n_best, cosine=cosine
        )
    return {"n_queries": len(queries), "n_rows": len(sample), "methods": methods}


def _calibrate_method(
    part: Part,
    live: np.ndarray,
    sample: np.ndarray,
    queries: np.ndarray,
    scores: np.ndarray,
    cosines: np.ndarray,
    n_best: int,
    *,
    cosine: bool,
) -> dict[str, Any]:
    """The code's weight and the margin under which the sample's best rows stand highest, and where they then stand."""
    everyone = np.arange(len(queries))
    x, code = estimate([part], live, cosine=True), part.code_products(everyone, live)
    at = np.searchsorted(live, sample)
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
                shares.append(_shares(sign * scores, ranked, sample, live, queries, n_best))
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


def _parts(index: Index, classifier: Classifier, scope: str, queries: np.ndarray) -> dict[str, Part]:
    """Sketches of the queries under the predicted label beside the stored ones, by method."""
    spec, checkpoint = index.manifest.spec, index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.folder, classifier, spec, scope, checkpoint, last=True)
    texts = index.text_lists(queries)
    found, _ = sketch_rows(classifier, list(sketchers.values()), texts, None, batch_tokens=spec.batch_tokens)
    rows = dict(zip(sketchers, found, strict=True))
    plain = Part(1.0, rows[gradient_folder(scope, checkpoint)], index.gradients(scope))
    parts = {"gd": plain, "gc": plain}
    if spec.whitened:
        white = Part(1.0, rows[gradient_folder(scope, checkpoint, 0)], index.gradients(scope, damping=0))
        parts |= {"if": white, "rif": white}
    return parts


def _exact_scores(
    index: Index,
    classifier: Classifier,
    scope: str,
    queries: np.ndarray,
    sample: np.ndarray,
    *,
    white: bool,
    on_rows: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Exact scores of the sample for each query, ``(q, m)`` by method."""
    spec = index.manifest.spec
    blocks = scope_blocks(classifier.model, classifier.head_name, scope, classifier.name, with_bias=spec.with_bias)
    texts = index.text_lists(sample)
    labels = index.labels[sample].astype(np.int64)
    lengths = {"gd": index.gradients(scope).norms[sample].astype(np.float64)}
    if white:
        ekfac = index.ekfac(scope).to(classifier.device, classifier.head.weight.dtype)
        damping = index.ekfac_damping(scope)[1]
        lengths["if"] = index.gradients(scope, damping=0).norms[sample].astype(np.float64)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("gd", "gc", *(("if", "rif") if white else ()))}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        chosen = queries[start : start + QUERIES_AT_ONCE]
        asked = index.text_lists(chosen)
        g = whole_gradients(classifier, scope, blocks, asked, index.predictions[chosen].astype(np.int64))
        kinds: dict[str, Vectors] = {"gd": g}
        if white:
            kinds["if"] = ekfac.solve(g, damping)
        stacked = {name: torch.cat([v[name] for v in kinds.values()]) for name in g}
        dots = exact_dots(classifier, scope, stacked, blocks, texts, labels, on_rows=on_rows)
        for i, (name, vectors) in enumerate(kinds.items()):
            some = dots[i * len(chosen) : (i + 1) * len(chosen)]
            below = dot(vectors, g).clamp_min(0).sqrt().cpu().numpy()[:, None] * lengths[name]
            found[name].append(some)
            cosines = np.divide(some, below, out=np.zeros_like(some), where=below > 0)
            found["gc" if name == "gd" else "rif"].append(cosines)
    return {name: np.concatenate(some) for name, some in found.items()}


def _shares(
    scores: np.ndarray, estimates: np.ndarray, sample: np.ndarray, live: np.ndarray, queries: np.ndarray, n_best: int
) -> np.ndarray:
    """For each of the sample's best rows, the share of all live rows whose estimate is at least its own."""
    estimates = np.where(live == queries[:, None], -np.inf, estimates)
    at = np.searchsorted(live, sample)
    shares = []
    for q in range(len(scores)):
        ranked = np.argsort(np.where(np.isnan(scores[q]), np.inf, -scores[q]), kind="stable")
        own = estimates[q, at[ranked[:n_best]]]
        shares.append((estimates[q] >= own[:, None]).sum(axis=1) / len(live))
    return np.concatenate(shares)
