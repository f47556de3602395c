"""How many candidates a recall takes: sketches against exact scores, for some training rows as queries.

Exact scores are computed for a sample of the rows only. The sample's best rows stand for the best of all: a top 10 of N
rows is, on average, a top 10 m / N of a sample of m. Where such a row stands among *all* rows by its estimate is
the number of candidates that would have found it. With one row in every sample at least, the answer is on the safe
side for large N.

The same scores say how much of the code's estimate to count: the least-squares coefficient of the exact cosines (for
dots weighted by the rows' lengths) on what coordinates and code say.
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

SAMPLE_ROWS = 1024
QUERIES_AT_ONCE = 12  # whole gradients held at once, and as many solutions
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)
TOP = 10


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
        recalls of the exact top 10, and the weight of the code.
    """
    spec, live = index.manifest.spec, index.live
    queries = live_sample(live, n_queries, spec.seed + 1)
    sample = live_sample(live, SAMPLE_ROWS, spec.seed + 2)
    parts = _parts(index, classifier, scope, queries)
    exact = _exact_scores(index, classifier, scope, queries, sample, white="if" in parts, on_rows=on_rows)
    n_best = max(1, round(TOP * len(sample) / len(live)))
    methods = {}
    for name, scores in exact.items():
        cosine = name in ("gc", "rif")
        part = parts[name]
        others = sample != queries[:, None]
        weight = _code_weight(part, sample, exact["rif" if name in ("if", "rif") else "gc"], others, cosine=cosine)
        estimates = estimate([part], live, cosine=cosine, code_weight=weight)
        scores = np.where(others, scores, np.nan)
        shares = [_shares(s * scores, s * estimates, sample, live, queries, n_best) for s in (1.0, -1.0)]
        methods[name] = {
            "code_weight": weight,
            "candidates": {
                str(recall): max(float(np.quantile(share, recall, method="higher")) for share in shares)
                for recall in RECALLS
            },
        }
    return {"n_queries": len(queries), "n_rows": len(sample), "methods": methods}


def _parts(index: Index, classifier: Classifier, scope: str, queries: np.ndarray) -> dict[str, Part]:
    """Sketches of the queries under the predicted label beside the stored ones, by method."""
    spec, checkpoint = index.manifest.spec, index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.folder, classifier, spec, scope, checkpoint, last=True)
    texts = [column.to_pylist() for column in index.texts(queries).values()]
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
    texts = [column.to_pylist() for column in index.texts(sample).values()]
    labels = index.labels[sample].astype(np.int64)
    lengths = {"gd": index.gradients(scope).norms[sample].astype(np.float64)}
    if white:
        ekfac = index.ekfac(scope).to(classifier.device, classifier.head.weight.dtype)
        damping = index.ekfac_damping(scope)[1]
        lengths["if"] = index.gradients(scope, damping=0).norms[sample].astype(np.float64)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("gd", "gc", *(("if", "rif") if white else ()))}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        chosen = queries[start : start + QUERIES_AT_ONCE]
        asked = [column.to_pylist() for column in index.texts(chosen).values()]
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


def _code_weight(part: Part, sample: np.ndarray, cosines: np.ndarray, others: np.ndarray, *, cosine: bool) -> float:
    """Least-squares share of the code's estimate, 0 to 1, relative to that of the coordinates'.

    ``others`` ``(q, m)`` leaves each query's own row out: its cosine of 1 would outweigh all.
    """
    if part.store.codes is None:
        return 0.0
    x = estimate([part], sample, cosine=True).astype(np.float64)
    everyone = np.arange(len(part.asked.lengths))
    code = part.code_products(everyone, sample).astype(np.float64)
    weights = np.ones(len(sample)) if cosine else part.store.lengths[sample].astype(np.float64)
    weights = np.broadcast_to(weights / max(float(weights.max()), 1e-30), x.shape)[others]
    design = np.stack([x[others], code[others]], axis=1) * weights[:, None]
    of_x, of_code = np.linalg.lstsq(design, cosines[others] * weights, rcond=None)[0]
    return float(np.clip(of_code / of_x, 0.0, 1.0)) if of_x > 0 else 1.0


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
