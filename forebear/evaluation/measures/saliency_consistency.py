"""``saliency-consistency``: do influence and saliency tell one story? (Han20, Figures 2 and 3, Tables 3 and 4)

For each test row, its most negative, median and most positive salient word piece (gradient x input, for the predicted
label). The median is the piece number len // 2 by ascending saliency; equal values stand in reading order. Start and
end tokens and pieces that continue a word are never chosen.

*Influence.* The rows at the top of the signed ranking whose gold label is the predicted label and that hold the
exact word piece: the mean of their z-normalised influence (over all training rows: mean 0, population std 1), pooled
over queries.

*Removal.* The piece's attention mask is set to 0, its position kept; the model predicts again, H^-1 is solved again,
and the tops before and after are compared: share of common rows among floor(p N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.evaluation.common.amounts import common_share, rows_of_share
from forebear.evaluation.common.comparisons import (
    defined_mean,
    interval_cells,
    listed_values,
)
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.queries import QueryRows, refuse_methods
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, encode, encode_with_places
from forebear.indexer.model.forward import run_forward
from forebear.progress import Progress, no_progress
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.ranking import rank
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.maps import saliency
from forebear.retriever.scores import Scores

ROLES = ("most negative", "median", "most positive")
INFLUENCE_SHARES = ("0.1", "0.2", "0.5", "1")
OVERLAP_SHARES = ("0.001", "0.002", "0.005", "0.01")
_TOGETHER = 64  # test rows whose scores of all training rows are held at once
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class SaliencyConsistency:
    """Influence by salient word piece, and the overlap of tops before and after its removal.

    Attributes:
        methods: Names of the methods, ``m``.
        pieces: The chosen word pieces of each query, ``(q, 3)``, in the order of ``ROLES``.
        sums: Sum of the z-normalised influence of the rows that count, ``(m, 3, s, q)``, ``s`` shares of the ranking.
        counts: Number of those rows, ``(m, 3, s, q)``.
        overlaps: Share of common rows before and after removal, ``(m, 3, d, q)``; NaN where floor(p N) is 0 or a
            ranking has no order.
        n_rows: Live training rows.
        n_constant: Queries by method that give all rows one score and are left out, ``(m,)``.
        query_rows: Numbers of the test rows, ``(q,)``.
        n_skipped: Test rows without a word piece that could be chosen.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    pieces: list[tuple[str, ...]]
    sums: np.ndarray
    counts: np.ndarray
    overlaps: np.ndarray
    n_rows: int
    n_constant: np.ndarray
    query_rows: np.ndarray
    n_skipped: int
    residuals: dict[str, float]


def salient_positions(values: np.ndarray, eligible: np.ndarray) -> tuple[int, int, int] | None:
    """Positions of the most negative, median and most positive eligible value ``(t,)``; None if none is eligible."""
    candidates = np.flatnonzero(eligible)
    if not len(candidates):
        return None
    ordered = candidates[np.argsort(values[candidates], kind="stable")]
    return int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1])


def word_starts(encoded: Any, row: int) -> np.ndarray:
    """Which word pieces of a row begin a word of its texts, ``(t,)`` bool; start and end tokens do not."""
    places = list(zip(encoded.sequence_ids(row), encoded.word_ids(row), strict=True))
    return np.array(
        [column is not None and (t == 0 or places[t - 1] != (column, word)) for t, (column, word) in enumerate(places)]
    )


def without_piece(row: dict[str, list[int]], position: int) -> dict[str, list[int]]:
    """An encoded row with the attention mask of one position set to 0."""
    mask = list(row.get("attention_mask", [1] * len(row["input_ids"])))
    mask[position] = 0
    return row | {"attention_mask": mask}


def rows_with_pieces(index: Index, classifier: Classifier, ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Which live training rows hold a word piece, ``(n_live,)`` bool by its id."""
    held = {piece: np.zeros(len(index.live), bool) for piece in set(ids)}
    for start in range(0, len(index.live), 4096):
        for n, row in enumerate(encode(classifier, index.text_lists(index.live[start : start + 4096])), start):
            for piece in held.keys() & set(row["input_ids"]):
                held[piece][n] = True
    return held


def saliency_consistency(
    retriever: Retriever, queries: QueryRows, spec: QuerySpec | Question, *, progress: Progress = no_progress
) -> SaliencyConsistency:
    """Measure influence by salient word pieces, and how far removing one changes the tops.

    Args:
        retriever: Over the index.
        queries: Test rows; their predicted labels are explained.
        spec: Methods that read word pieces alone, scope, curvature. All rows are scored exactly.
        progress: Called with the queries done.

    Raises:
        InputError: A method compares texts or spans.
        DataError: No test row has a word piece that could be chosen.
    """
    question = retriever.resolve(spec, target="predicted")
    names = question.spec.methods
    refuse_methods(
        question,
        lambda method: method.reads_texts or not method.scores_rows,
        "cannot be asked of rows with a word piece masked.",
    )
    index, classifier = retriever.index, retriever.classifier()
    rows, places = encode_with_places(classifier, queries.texts)
    predicted = run_forward(classifier, Encoded(rows)).predictions
    maps = saliency(classifier, queries.texts, predicted)
    salient = [salient_positions(saliency_map.values, word_starts(places, i)) for i, saliency_map in enumerate(maps)]
    kept = [(i, positions) for i, positions in enumerate(salient) if positions is not None]
    if not kept:
        raise DataError(f"{queries.source}: none of the {len(queries)} test rows has a word piece to choose.")
    chosen = [[rows[i]["input_ids"][t] for t in positions] for i, positions in kept]
    held = rows_with_pieces(index, classifier, [piece for row in chosen for piece in row])
    m, q = len(names), len(kept)
    sums, counts = (np.zeros((m, len(ROLES), len(INFLUENCE_SHARES), q)) for _ in range(2))
    overlaps = np.full((m, len(ROLES), len(OVERLAP_SHARES), q), np.nan)
    n_constant = np.zeros(m, np.int64)
    scored = Scores()
    progress("queries", 0, q)
    for start in range(0, q, _TOGETHER):
        block = range(start, min(start + _TOGETHER, q))
        before = retriever.score_block(Encoded([rows[kept[i][0]] for i in block]), None, question)
        after = [
            retriever.score_block(
                Encoded([without_piece(rows[kept[i][0]], kept[i][1][role]) for i in block]), None, question
            )
            for role in range(len(ROLES))
        ]
        scored.note_residuals([before, *after])
        for j, name in enumerate(names):
            for number, i in enumerate(block):
                scores = before[name][number]
                if np.ptp(scores) == 0:
                    n_constant[j] += 1
                    continue
                with_label = index.labels[index.live] == predicted[kept[i][0]]
                rows_counted = [with_label & held[piece] for piece in chosen[i]]
                sums[j, :, :, i], counts[j, :, :, i] = influence_of(scores, rows_counted)
                for role in range(len(ROLES)):
                    overlaps[j, role, :, i] = overlap_of(scores, after[role][name][number])
        progress("queries", block.stop, q)
    return SaliencyConsistency(
        methods=names,
        pieces=[tuple(classifier.tokenizer.convert_ids_to_tokens(row)) for row in chosen],
        sums=sums,
        counts=counts.astype(np.int64),
        overlaps=overlaps,
        n_rows=len(index.live),
        n_constant=n_constant,
        query_rows=queries.rows[[i for i, _ in kept]],
        residuals=scored.residuals,
        n_skipped=len(queries) - q,
    )


def influence_of(scores: np.ndarray, counted_rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the z-normalised scores of the counted rows, in the top shares of the ranking.

    Args:
        scores: Scores of all rows for one query, ``(n,)``, not all equal.
        counted_rows: For each role, whether a row counts, ``(n,)`` bool: it has the predicted label and holds the word
            piece.

    Returns:
        ``(roles, shares)`` each.
    """
    n = len(scores)
    z = (scores - scores.mean()) / scores.std()
    order = np.lexsort((np.arange(n), -scores))
    depths = [rows_of_share(share, n) for share in INFLUENCE_SHARES]
    counts = np.array([[is_counted[order[:k]].sum() for k in depths] for is_counted in counted_rows])
    sums = np.array([[z[order[:k]][is_counted[order[:k]]].sum() for k in depths] for is_counted in counted_rows])
    return sums, counts


def overlap_of(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Share of common rows in the tops of two rankings ``(n,)`` at ``OVERLAP_SHARES``; NaN where it is undefined."""
    depths = [rows_of_share(share, len(before)) for share in OVERLAP_SHARES]
    if np.ptp(after) == 0 or not max(depths):
        return [np.nan] * len(depths)
    numbers = np.arange(len(before))
    tops = [rank(scores[None], numbers, max(depths), largest=True)[0][0] for scores in (before, after)]
    return [common_share(tops[0][:k], tops[1][:k]) if k else np.nan for k in depths]


def pooled_mean(sums: np.ndarray, counts: np.ndarray, seed: int) -> list[Cell]:
    """Mean of values pooled over queries, from each query's sum and number ``(q,)``, and its 95% bootstrap interval.

    Whole queries are resampled, because values of one query depend on each other. None where there are no values; no
    interval where one query has them all.
    """
    if not counts.any():
        return [None, None, None]
    mean = float(sums.sum() / counts.sum())
    if (counts > 0).sum() == 1:
        return [mean, None, None]
    drawn = np.random.default_rng(seed).integers(0, len(counts), size=(_RESAMPLES, len(counts)))
    n = counts[drawn].sum(axis=1)
    low, high = np.quantile(sums[drawn].sum(axis=1)[n > 0] / n[n > 0], [0.025, 0.975])
    return [mean, float(low), float(high)]


def saliency_consistency_report(consistency: SaliencyConsistency, inputs: Inputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    seed = inputs.seed
    inputs = replace(inputs, question=inputs.retriever.resolve(inputs.question, target="predicted"))
    influence: list[list[Cell]] = []
    removal: list[list[Cell]] = []
    figures = []
    for m, name in enumerate(consistency.methods):
        means: dict[str, list[float]] = {role: [] for role in ROLES}
        for s, share in enumerate(INFLUENCE_SHARES):
            for r, role in enumerate(ROLES):
                cells = pooled_mean(consistency.sums[m, r, s], consistency.counts[m, r, s], seed)
                influence.append([name, role, f"{float(share):.0%}", *cells, int(consistency.counts[m, r, s].sum())])
                means[role].append(cells[0] if isinstance(cells[0], float) else 0.0)
        for r, role in enumerate(ROLES):
            for d, share in enumerate(OVERLAP_SHARES):
                k = rows_of_share(share, consistency.n_rows)
                undefined = int(np.isnan(consistency.overlaps[m, r, d]).sum())
                cells = interval_cells(consistency.overlaps[m, r, d], seed)
                removal.append([name, role, f"{float(share):.1%}", k, *cells, undefined])
        labels = [f"top {float(share):.0%}" for share in INFLUENCE_SHARES]
        drawing = bar_chart(labels, means, xlabel="mean z-normalised influence")
        figures.append(
            Figure(f"Influence of rows with a salient word piece, {name}", drawing, "0 where no row counts.")
        )
    tables = (
        Table(
            "Influence of rows that hold a salient word piece",
            ["method", "word piece", "top", "mean", "95% low", "95% high", "values"],
            influence,
            f"Z-normalised influence, pooled over {len(consistency.query_rows):,} queries, of the rows at the top "
            "whose label is the predicted one and that hold the query's word piece. Queries are resampled for the "
            "interval.",
        ),
        Table(
            "Overlap of the tops before and after removing a word piece",
            ["method", "word piece", "top", "k", "mean", "±", "95% low", "95% high", "undefined"],
            removal,
            f"Share of common rows among the floor(p N) of {consistency.n_rows:,} rows of largest score. Undefined: "
            "floor(p N) is 0, or a ranking has no order.",
        ),
    )
    findings = []
    for m, name in enumerate(consistency.methods):
        by_role = [defined_mean(consistency.overlaps[m, r, -1]) for r in range(len(ROLES))]
        shown = ", ".join(f"{v:.0%} ({role})" for role, v in zip(ROLES, by_role, strict=True) if v is not None)
        findings.append(f"Removing a word piece leaves {shown or 'an undefined share'} of {name}'s top 1%.")
    report = Report(
        "Saliency consistency", " ".join(findings), tables, figures,
        provenance=inputs.provenance(
            consistency.residuals, queries=len(consistency.query_rows),
            test_rows_without_a_word_piece=consistency.n_skipped,
            queries_without_order=dict(zip(consistency.methods, consistency.n_constant.tolist(), strict=True)),
            seed=seed,
        ),
    )  # fmt: skip
    result = {
        "methods": list(consistency.methods),
        "roles": list(ROLES),
        "influence_shares": list(INFLUENCE_SHARES),
        "influence_sums": consistency.sums,
        "influence_counts": consistency.counts,
        "overlap_shares": list(OVERLAP_SHARES),
        "overlaps": listed_values(consistency.overlaps),
        "word_pieces": consistency.pieces,
        "query_rows": consistency.query_rows,
        "n_skipped": consistency.n_skipped,
        "n_constant": consistency.n_constant,
        "seed": seed,
        "question": inputs.record(consistency.residuals),
    }
    return report, result
