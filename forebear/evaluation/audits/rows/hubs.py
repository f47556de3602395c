"""``audit hubs``: training rows that come up for an unusual share of reference queries.

N_k of a row counts the queries that have it among their top k. Where no row is preferred, N_k is binomial: each query
picks a row with chance k / n. Hubness is the skewness of N_k over all rows, E[(N_k - mean)^3] / std^3 (Radovanovic,
Nanopoulos and Ivanovic 2010, eq. 1). A hub explains none of the queries that it comes up for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.audits.rows.suspects import own_places
from forebear.evaluation.common.comparisons import provenance
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_cells, row_passages
from forebear.evaluation.common.queries import QueryRows, refuse_saliency, refuse_spans
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Report, Table
from forebear.indexer.rows.sampling import live_sample
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import SignCounts
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

CHANCE = 0.05  # that any row at all comes up as often as a hub, where no row is preferred
SHOWN_HUBS = 3
TRAINING_ROWS = "training rows"


@dataclass(frozen=True, kw_only=True)
class Hubs:
    """How often each row comes up.

    Attributes:
        methods: Names of the methods, ``m``.
        rows: Live row numbers, ``(n,)``.
        counts: N_k, ``(m, n)``.
        top: k.
        n_queries: Number of reference queries.
        signs: Notes on proponents whose score is below 0.
    """

    methods: tuple[str, ...]
    rows: np.ndarray
    counts: np.ndarray
    top: int
    n_queries: int
    signs: tuple[str, ...]

    @property
    def expected(self) -> float:
        """Share of the queries that a row comes up for where no row is preferred, k / n."""
        return self.top / len(self.rows)

    @property
    def shares(self) -> np.ndarray:
        """Share of the queries that each row comes up for, ``(m, n)``."""
        return np.asarray(self.counts / self.n_queries)

    @property
    def hub_count(self) -> int:
        """The least N_k of a hub: the least count with n P(N_k >= count) < 0.05 for a binomial N_k."""
        from scipy.stats import binom

        counts = np.arange(self.n_queries + 2)
        chance = binom.sf(counts - 1, self.n_queries, self.expected)  # P(N_k >= count)
        return int(counts[len(self.rows) * chance < CHANCE][0])


def training_queries(retriever: Retriever, n_queries: int, seed: int) -> QueryRows:
    """A seeded sample of live training rows, with their gold labels; all rows if ``n_queries`` is 0.

    Raises:
        InputError: The number is negative.
    """
    if n_queries < 0:
        raise InputError(f"--queries {n_queries}: expected a number of rows, or 0 for all of them.")
    index = retriever.index
    rows = live_sample(index.live, n_queries, seed)
    labels = index.targets(rows)
    return QueryRows(source=TRAINING_ROWS, rows=rows, texts=tuple(index.text_lists(rows)), labels=labels)


def hubs(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    *,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Hubs:
    """Count how often each live row is among the top k proponents.

    Args:
        retriever: Over the index.
        queries: Reference queries; a training row's own place is left out.
        spec: The question; ``top`` is k.
        progress: Called with the stage, queries done and queries in all.

    Raises:
        InputError: A method ranks spans or words, or k is out of range.
    """
    question = retriever.resolve(spec)
    methods, top = question.methods, question.spec.top
    refuse_spans(question)
    refuse_saliency(question)
    live = retriever.index.live
    leaves_out_own = queries.source == TRAINING_ROWS
    if top > len(live) - leaves_out_own:
        raise InputError(f"--top {top}: expected 1 to {len(live) - leaves_out_own}, the rows that a query can find.")
    deeper = retriever.resolve(question, top=top + leaves_out_own)
    counts = np.zeros((len(methods), len(live)), np.int64)
    signs, done = SignCounts(methods), 0
    for part in queries.blocks():
        results = retriever.answer_block(0, part.texts, part.labels, deeper).rankings
        for i, method in enumerate(methods):
            proponents = results[method.name][0]
            rows, scores = proponents.rows, proponents.scores
            if leaves_out_own:
                is_other = ~own_places(rows, part.rows)
                rows, scores = rows[is_other], scores[is_other]
            signs.count(method.name, SIDES[0], scores)
            counts[i] += np.bincount(np.searchsorted(live, rows.reshape(-1)), minlength=len(live))
        done += len(part)
        progress("queries", done, len(queries))
    return Hubs(
        methods=question.spec.methods,
        rows=live,
        counts=counts,
        top=top,
        n_queries=len(queries),
        signs=tuple(signs.notes()),
    )


def skewness(counts: np.ndarray) -> float | None:
    """E[(N - mean)^3] / std^3, population moments; None where all counts are equal."""
    from scipy.stats import skew

    return float(skew(counts)) if np.ptp(counts) else None


def hubs_report(counted: Hubs, inputs: Inputs, n_listed: int) -> tuple[Report, dict[str, Any]]:
    """The report, with the ``n_listed`` most frequent rows of each method, and the numbers for ``result.json``.

    Raises:
        InputError: ``n_listed`` is less than 1.
    """
    retriever, queries, seed = inputs.retriever, inputs.queries, inputs.seed
    if n_listed < 1:
        raise InputError(f"--listed {n_listed}: expected at least 1.")
    least = counted.hub_count
    summary_rows: list[list[Cell]] = []
    listed_rows: list[list[Cell]] = []
    groups = []
    for name, counts, shares in zip(counted.methods, counted.counts, counted.shares, strict=True):
        order = np.argsort(-counts, kind="stable")[:n_listed]
        order = order[counts[order] > 0]
        n_hubs = int((counts >= least).sum())
        share_of_hubs = float(counts[counts >= least].sum() / counts.sum())
        summary_rows.append(
            [
                name,
                float(shares.max()),
                counted.expected,
                skewness(counts),
                n_hubs,
                share_of_hubs,
                float((counts == 0).mean()),
            ]
        )
        rows = counted.rows[order]
        columns = row_cells(retriever.index, rows)
        labels = retriever.index.label_texts(rows)
        for i, (p, row) in enumerate(zip(order, rows, strict=True)):
            hub = bool(counts[p] >= least)
            cells: list[Cell] = [name, int(row), float(shares[p]), int(counts[p]), hub, labels[i]]
            listed_rows.append([*cells, *(column[i] for column in columns.values())])
        shown = list(zip(order[:SHOWN_HUBS], rows[:SHOWN_HUBS], strict=True))
        passages = row_passages(
            retriever,
            rows[:SHOWN_HUBS],
            [f"{shares[p]:.1%} of the queries · row {row}" for p, row in shown],
            notes=["hub" if counts[p] >= least else "" for p, _ in shown],
        )
        groups.append(Group(f"Most frequent rows by {name}", passages))
    overview = Table(
        "Hubs by method",
        ["method", "largest share", "expected", "skewness", "hubs", "of all places", "never found"],
        summary_rows,
        f"{counted.n_queries:,} queries, top {counted.top}, {len(counted.rows):,} rows. Largest share: of the queries "
        "that have one and the same row in their top. Expected: of each row where none is preferred. Hubs: rows that "
        f"come up for at least {least} queries; by chance, less than one such audit in {1 / CHANCE:.0f} finds any. Of "
        "all places: share of the places in all tops that hubs take. Never found: share of the rows."
        + "".join(f" {note}" for note in counted.signs),
    )
    listing = Table(
        "Most frequent rows",
        ["method", "row", "share", "queries", "hub", "label", *row_cells(retriever.index, counted.rows[:0])],
        listed_rows,
    )
    largest = {str(row[0]): float(row[1] or 0.0) for row in summary_rows}
    worst = max(largest, key=lambda name: largest[name])
    drawing = bar_chart(
        list(largest), {"largest share": list(largest.values())}, xlabel="share of the queries that find the row",
        reference=("expected", counted.expected),
    )  # fmt: skip
    report = Report(
        "Hubs",
        f"By {worst}, one row is in the top {counted.top} of {largest[worst]:.1%} of the queries; where no row is "
        f"preferred, each is in {counted.expected:.2%}. A row that comes up for most queries explains none of them.",
        (overview, listing),
        (Figure("Largest share by method", drawing),),
        tuple(groups),
        provenance(
            retriever,
            inputs.question,
            inputs.command,
            queries=f"{len(queries)} of {queries.source}",
            top=counted.top,
            seed=seed,
        ),
    )
    result = {
        "question": inputs.record(),
        "methods": {
            row[0]: dict(
                zip(("largest_share", "expected", "skewness", "hubs", "of_places", "never"), row[1:], strict=True)
            )
            for row in summary_rows
        },
        "counts": {
            name: {int(counted.rows[p]): int(counts[p]) for p in np.flatnonzero(counts)}
            for name, counts in zip(counted.methods, counted.counts, strict=True)
        },
        "n_queries": counted.n_queries,
        "query_rows": queries.rows,
        "source": queries.source,
        "top": counted.top,
        "hub_count": least,
        "seed": seed,
    }
    return report, result
