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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from forebear.conformal import least_share, supported_recall
from forebear.indexer.gradients.vectors import dot
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts, take_texts
from forebear.indexer.model.forward import residual_and_loss
from forebear.indexer.model.scopes import scope_blocks
from forebear.indexer.sketches.candidates import BLOCK_ROWS, Part, Proposal, candidates_needed, estimate
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
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99)  # what the manifest says the candidates of; and the largest that is supported
TOP = 10
AIM = 0.95  # recall whose candidates the choice of weight and margin keeps few
CODE_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
MARGINS = (0.0, 0.5, 1.0)  # in units of the usual error of a cosine
ESTIMATED_QUERIES = 64  # whose estimates of all rows are held at once: 8 bytes a query and row
CHOOSING_SHARE = 1 / 3  # of the queries, which choose weight and margin; the others state the recall


def queries_at_once(classifier: Classifier, spec: IndexSpec, scope: str) -> int:
    """Queries whose whole vectors are held together."""
    blocks = scope_blocks(classifier.model, classifier.head_name, scope, classifier.name, with_bias=spec.with_bias)
    kinds = 2 if spec.whitened else 1
    return max(LEAST_QUERIES, VECTOR_BYTES // (4 * kinds * sum(block.size for block in blocks)))


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
    methods: dict[str, Any] = {}
    if len(live) > 1:  # a single row leaves none to rank
        asked = _Asked(index.text_lists(queries), index.predictions[queries].astype(np.int64), live == queries[:, None])
        scored = _Scored(index.text_lists(sample), index.labels[sample].astype(np.int64), sample)
        parts = _parts(index, classifier, scope, asked, spans=False)
        exact = _exact_scores(index, classifier, scope, asked, scored, spans=False, on_rows=on_rows)
        for kind, (dots, cosines) in exact.items():
            of_dots, of_cosines = ("gd", "gc") if kind == "plain" else ("if", "rif")
            rankings = {of_dots: _Ranking(dots, False), of_cosines: _Ranking(cosines, True)}
            calibration = _Calibration(parts[kind], live, sample, asked.excluded, spec.seed + 3)
            methods |= calibration.calibrate(rankings, cosines)
    return {"n_queries": len(queries), "n_rows": len(sample), "methods": methods}


def calibrate_spans(
    index: Index,
    classifier: Classifier,
    scope: str,
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
            calibration = _Calibration(parts[kind], live, sample, excluded, spec.seed + 3)
            methods |= calibration.calibrate({name: _Ranking(dots, False)}, cosines)
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


@dataclass(frozen=True)
class _Ranking:
    """How one method ranks: exact scores of the sample, ``(q, m)``, and whether they are cosines; else dots."""

    scores: np.ndarray
    by_cosine: bool


@dataclass(frozen=True)
class _Estimates:
    """Estimated cosines of all rows in two terms, so that each weight of the code takes a sum and no second pass.

    Attributes:
        by_coordinates: From the coordinates alone, ``(q, n)`` float32.
        by_code: What the code adds at weight 1, ``(q, n)`` float32; None without codes.
    """

    by_coordinates: np.ndarray
    by_code: np.ndarray | None

    def weighted(self, code_weight: float) -> np.ndarray:
        """The estimates with the code counted at a weight, ``(q, n)``."""
        if not code_weight or self.by_code is None:
            return self.by_coordinates
        return np.asarray(self.by_coordinates + np.float32(code_weight) * self.by_code)

    def take(self, queries: slice, rows: np.ndarray | slice = slice(None)) -> _Estimates:
        """The estimates of some queries and rows."""
        by_code = None if self.by_code is None else self.by_code[queries, rows]
        return _Estimates(self.by_coordinates[queries, rows], by_code)


@dataclass(frozen=True)
class _Calibration:
    """Where the sample's best rows stand among all rows by their estimates.

    Attributes:
        part: Sketches of the queries beside the stored ones.
        live: Numbers of all rows that take part, ``(n,)``, ascending.
        sample: Those that are scored exactly, ``(m,)``.
        excluded: Which of all rows are a query's own, ``(q, n)``.
        seed: Of the split into queries that choose and queries that state.
    """

    part: Part
    live: np.ndarray
    sample: np.ndarray
    excluded: np.ndarray
    seed: int

    def calibrate(self, rankings: Mapping[str, _Ranking], cosines: np.ndarray) -> dict[str, dict[str, Any]]:
        """Choose the code's weight and the margin by a third of the queries, and state recalls by the others.

        Args:
            rankings: By method name.
            cosines: Exact cosines of the sample, ``(q, m)``.

        Returns:
            What the manifest keeps of each method.
        """
        n_queries, n = self.excluded.shape
        order = np.random.default_rng(self.seed).permutation(n_queries)
        n_choosing = int(n_queries * CHOOSING_SHARE)
        choosing, stating = np.sort(order[:n_choosing]), np.sort(order[n_choosing:])
        n_others = n - int(self.excluded.sum(axis=1).max())
        n_sampled = min(len(self.sample), n_others)
        n_best = min(n_sampled, -(-TOP * n_sampled // n_others))
        settings = self._choose(choosing, rankings, cosines, n_best)
        needed = self._needed_when_stating(stating, rankings, settings, n_best)
        supported = supported_recall(len(stating))
        recalls = sorted({*(recall for recall in RECALLS if recall < supported), supported})
        return {
            name: {
                "code_weight": settings[name].code_weight,
                "margin": settings[name].margin,
                "candidates": {
                    str(recall): max(share for end in ends if (share := least_share(end, recall)) is not None)
                    for recall in recalls
                },
                "supported": supported,
                "top": n_best * n_others // n_sampled,
                "n_choosing": n_choosing,
                "n_stating": len(stating),
            }
            for name, ends in needed.items()
        }

    def _choose(
        self, queries: np.ndarray, rankings: Mapping[str, _Ranking], cosines: np.ndarray, n_best: int
    ) -> dict[str, Proposal]:
        """Weight and margin by which each method's best rows stand highest; as uncalibrated where no query chooses."""
        if not len(queries):
            return {n: Proposal(r.by_cosine, 1.0 if r.by_cosine else 0.0) for n, r in rankings.items()}
        estimates = self._estimates(queries)
        columns = np.searchsorted(self.live, self.sample)
        counted = ~self.excluded[np.ix_(queries, columns)]
        of_sample = estimates.take(slice(None), columns)
        costs: dict[str, list[tuple[float, Proposal]]] = {name: [] for name in rankings}
        for weight in CODE_WEIGHTS if estimates.by_code is not None else (0.0,):
            error = float(np.sqrt(np.mean((of_sample.weighted(weight) - cosines[queries])[counted] ** 2)))
            for name, ranking in rankings.items():
                for share in (0.0,) if ranking.by_cosine else MARGINS:
                    setting = Proposal(ranking.by_cosine, weight, share * error)
                    ends = self._needed(queries, estimates, ranking, setting, n_best)
                    cost = float(np.mean(np.log(np.concatenate(ends)))) + max(
                        float(np.log(np.quantile(end, AIM, method="higher"))) for end in ends
                    )
                    costs[name].append((cost, setting))
        return {name: min(tried, key=lambda cost_and_setting: cost_and_setting[0])[1] for name, tried in costs.items()}

    def _needed_when_stating(
        self, queries: np.ndarray, rankings: Mapping[str, _Ranking], settings: dict[str, Proposal], n_best: int
    ) -> dict[str, list[np.ndarray]]:
        """Shares at both ends by method, ``(q, n_best)`` each; estimates of few queries are held at once."""
        groups = [queries[start : start + ESTIMATED_QUERIES] for start in range(0, len(queries), ESTIMATED_QUERIES)]
        needed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in rankings}
        for group in groups:
            estimates = self._estimates(group)
            for name, ranking in rankings.items():
                needed[name].append(self._needed(group, estimates, ranking, settings[name], n_best))
        return {name: [np.concatenate(end) for end in zip(*ends, strict=True)] for name, ends in needed.items()}

    def _estimates(self, queries: np.ndarray) -> _Estimates:
        """Of all rows for some queries, in one pass over the stored sketches."""
        part = replace(self.part, asked=self.part.asked.take(queries))
        numbers = np.arange(len(queries))
        by_coordinates = np.empty((len(queries), len(self.live)), np.float32)
        by_code = None if part.store.codes is None else np.empty_like(by_coordinates)
        for start in range(0, len(self.live), BLOCK_ROWS):
            columns = slice(start, start + BLOCK_ROWS)
            by_coordinates[:, columns] = estimate([part], self.live[columns], cosine=True)
            if by_code is not None:
                by_code[:, columns] = part.code_products(numbers, self.live[columns])
        return _Estimates(by_coordinates, by_code)

    def _needed(
        self, queries: np.ndarray, estimates: _Estimates, ranking: _Ranking, setting: Proposal, n_best: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Share of all rows that must be candidates for each of the sample's best rows, at both ends ``(q, n_best)``.

        One query at a time: what is made on the way is of one query's rows.
        """
        columns = np.searchsorted(self.live, self.sample)
        lengths = 1.0 if ranking.by_cosine else self.part.store.lengths[self.live]
        ends = np.empty((2, len(queries), n_best))
        for i, query in enumerate(queries):
            excluded = self.excluded[query : query + 1]
            scores = np.where(excluded[:, columns], np.nan, ranking.scores[query])
            of_query = estimates.take(slice(i, i + 1))
            steps = [of_query.weighted(weight) for weight in sorted({0.0, setting.code_weight})]
            for end, sign in zip(ends, (1.0, -1.0), strict=True):
                ranked = [(sign * step + np.float32(setting.margin)) * lengths for step in steps]
                end[i] = _needed_shares(sign * scores, ranked[0], ranked[-1], columns, excluded, n_best)[0]
        return ends[0], ends[1]


def _parts(index: Index, classifier: Classifier, scope: str, asked: _Asked, *, spans: bool) -> dict[str, Part]:
    """Sketches of the queries beside the stored ones: ``plain``, and ``white`` where there is curvature."""
    spec, checkpoint = index.manifest.spec, index.manifest.checkpoints[-1].name
    sketchers = open_sketchers(index.fit_folder, classifier, spec, scope, checkpoint, last=True)
    sketches, _ = sketch_rows(
        classifier, list(sketchers.values()), asked.texts, asked.targets, batch_tokens=spec.batch_tokens
    )
    rows = dict(zip(sketchers, sketches, strict=True))
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
    n_queries, n_sampled = len(asked.targets), len(scored.numbers)
    exact = {kind: (np.empty((n_queries, n_sampled)), np.empty((n_queries, n_sampled))) for kind in lengths}
    size = queries_at_once(classifier, spec, scope)
    for start in range(0, n_queries, size):
        group = np.arange(start, min(start + size, n_queries))
        vectors = whole_gradients(classifier, scope, blocks, take_texts(asked.texts, group), asked.targets[group])
        if spec.whitened:
            for name, g in vectors.items():  # layer by layer, so that only one layer's gradients are held twice
                vectors[name] = torch.cat([g, ekfac.solve({name: g}, damping)[name]])
        dots = exact_dots(classifier, scope, vectors, blocks, scored.texts, scored.labels, on_rows=on_rows)
        plain = {name: v[: len(group)] for name, v in vectors.items()}
        for number, kind in enumerate(exact):
            of_kind = slice(number * len(group), (number + 1) * len(group))
            dots_of_kind = dots[of_kind]
            squares = dot({name: v[of_kind] for name, v in vectors.items()}, plain)
            products = squares.clamp_min(0).sqrt().cpu().numpy()[:, None] * lengths[kind]
            exact[kind][0][group] = dots_of_kind
            exact[kind][1][group] = ratio(dots_of_kind, products)
    return exact


def _needed_shares(
    scores: np.ndarray,
    scanned: np.ndarray,
    estimates: np.ndarray,
    sample: np.ndarray,
    excluded: np.ndarray,
    n_best: int,
) -> np.ndarray:
    """For each of the sample's best rows, the share of all rows that must be candidates for it to be among them.

    Of equal estimates every row counts as standing before it.

    Args:
        scores: Exact ones of the sample, NaN where excluded, ``(q, m)``.
        scanned: Estimates of all live rows by which the scan ranks, ``(q, n)``.
        estimates: Those by which candidates are ranked in the end, ``(q, n)``.
        sample: Its positions among them.
        excluded: Rows that take no part, ``(q, n)``.
        n_best: Of the sample.

    Returns:
        ``(q, n_best)``.
    """
    out = np.empty((len(scores), n_best))
    for q, of_query in enumerate(scores):
        best = sample[np.argsort(np.where(np.isnan(of_query), np.inf, -of_query), kind="stable")[:n_best]]
        ranks = [
            (others >= others[best, None]).sum(axis=1)
            for others in (np.where(excluded[q], -np.inf, ranked[q]) for ranked in (scanned, estimates))
        ]
        out[q] = candidates_needed(*ranks) / len(excluded[q])
    return out
