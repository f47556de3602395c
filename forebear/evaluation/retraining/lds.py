"""``lds``: the linear datamodeling score. Do summed scores foretell the output of a model trained on some of the rows?

Models are retrained on random halves of the rows. For each query: Spearman's correlation, over the halves, between the
sum of the kept rows' scores and the retrained log-odds of the class that the scores explain (Ilyas et al., 2022; Park
et al., 2023). 1 is perfect, 0 is chance; noise of the retraining itself sets a ceiling below 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    defined,
    interval_cells,
    listed_values,
    spearman,
)
from forebear.evaluation.common.statistics import difference_table
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.evaluation.retraining.changes import RetrainingInputs
from forebear.evaluation.retraining.jobs import Job, Progress, Retrainer, within_budget
from forebear.evaluation.retraining.row_choice import stratified_rows
from forebear.retriever.scores import residuals_of

MIN_SUBSETS = 3


@dataclass(frozen=True, kw_only=True)
class Lds:
    """Linear datamodeling scores.

    Attributes:
        methods: ``m`` names.
        values: Spearman's correlation for each query, ``(m, q)``; NaN where sums or outputs are all equal.
        outputs: Log-odds of the target class, ``(subsets, seeds, q)``.
        agreement: Mean correlation of two seeds' outputs for each query, ``(q,)``; None with one seed.
        subsets: Numbers of the random halves that were sampled.
        seeds: Seeds of the retrainings; outputs are averaged over them.
        sampled: One line that says which retrainings were sampled.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    values: np.ndarray
    outputs: np.ndarray
    agreement: np.ndarray | None
    subsets: np.ndarray
    seeds: tuple[int, ...]
    sampled: str
    residuals: dict[str, float]

    @property
    def ceiling(self) -> np.ndarray | None:
        """Value that scores without error would reach, ``(q,)``, by Spearman and Brown's formula; None with one seed.

        sqrt(s r / (1 + (s - 1) r)) for s seeds that agree by r; 0 where r is not positive.
        """
        if self.agreement is None:
            return None
        r, s = np.maximum(self.agreement, 0.0), len(self.seeds)
        return np.asarray(np.sqrt(s * r / (1 + (s - 1) * r)))


def measure_lds(
    retrainer: Retrainer,
    scores: Mapping[str, np.ndarray],
    targets: np.ndarray,
    seeds: Sequence[int],
    *,
    n_subsets: int = 100,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Lds:
    """Retrain on random halves of the live rows.

    Args:
        retrainer: Its evaluation rows are the queries.
        scores: Scores of all live rows, ``(q, n)`` by method; larger = proponent. The score -inf of a row without a
            span adds nothing.
        targets: The class whose loss the scores explain, ``(q,)``.
        seeds: Seeds of the retrainings, the same for each subset.
        n_subsets: Number of random halves.
        budget: Models to train at most; subsets are sampled.
        seed: Seed of the random halves.
        progress: See :meth:`~forebear.evaluation.retraining.jobs.Retrainer.run`.

    Raises:
        InputError: Fewer than three subsets.
    """
    if n_subsets < MIN_SUBSETS:
        raise InputError(f"--subsets {n_subsets}: expected at least {MIN_SUBSETS}, better 100.")
    live = retrainer.rows.live
    labels = retrainer.rows.labels[live]
    halves = [stratified_rows(live, labels, 0.5, seed, 17, i) for i in range(n_subsets)]
    chosen, sampled = within_budget(retrainer, [[Job(half, s) for s in seeds] for half in halves], budget, seed)
    if len(chosen) < MIN_SUBSETS:
        raise InputError(f"--budget {budget}: {len(chosen)} subsets; a correlation takes {MIN_SUBSETS} or more.")
    jobs = [Job(halves[i], s) for s in seeds for i in chosen]  # by seed, so that each start model is loaded once
    odds = np.array([outcome.log_odds(targets) for outcome in retrainer.run(jobs, progress)])
    outputs = odds.reshape(len(seeds), len(chosen), -1).transpose(1, 0, 2)
    kept = np.array([np.isin(live, halves[i]) for i in chosen], dtype=np.float64)
    mean = outputs.mean(axis=1).T
    pairs = [spearman(outputs[:, a].T, outputs[:, b].T) for a, b in combinations(range(len(seeds)), 2)]
    return Lds(
        methods=tuple(scores),
        values=np.array([spearman(_sums(method_scores, kept), mean) for method_scores in scores.values()]),
        outputs=outputs,
        agreement=np.mean(pairs, axis=0) if pairs else None,
        subsets=chosen,
        seeds=tuple(seeds),
        sampled=sampled,
        residuals=residuals_of(scores),
    )


def _sums(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Summed scores of the kept rows ``(q, subsets)``, less the same number for each subset of a query.

    All halves have the same size, so a shift of a query's scores leaves the order of their sums; it makes sums of equal
    scores exactly equal.
    """
    finite = np.where(np.isneginf(scores), 0.0, scores)
    return np.asarray((finite - finite[:, :1]) @ kept.T)


def lds_report(lds: Lds, inputs: RetrainingInputs) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    retrainer, seed = inputs.retrainer, inputs.seed
    rows: list[list[Cell]] = []
    for name, values in zip(lds.methods, lds.values, strict=True):
        rows.append([name, *interval_cells(values, seed), int(np.isnan(values).sum())])
    if lds.agreement is not None and lds.ceiling is not None:
        for name, values in (("(one seed against another)", lds.agreement), ("(noise ceiling)", lds.ceiling)):
            rows.append([name, *interval_cells(values, seed), int(np.isnan(values).sum())])
    n = len(lds.subsets)
    table = Table(
        "Linear datamodeling score",
        ["method", *INTERVAL_COLUMNS, "undefined"],
        rows,
        f"Spearman's correlation over {n:,} random halves between summed scores of the kept rows and the retrained "
        f"log-odds of the target class, averaged over {len(lds.seeds)} seed(s); mean over queries, ± its standard "
        "error, 95% interval over queries. Undefined: queries whose sums or outputs are all equal; left out. "
        "Noise ceiling: what scores without error would reach, from how well two seeds agree (Spearman and Brown).",
    )
    tables = [table]
    whole = ~np.isnan(lds.values).any(axis=0)
    if len(lds.methods) > 1 and whole.any():
        values = {name: method_values[whole] for name, method_values in zip(lds.methods, lds.values, strict=True)}
        tables.append(difference_table("Methods compared", values, seed))
    cells = [interval_cells(values, seed) for values in lds.values]
    means = [float(cell[0] or 0.0) for cell in cells]
    errors = [None if cell[1] is None else float(cell[1]) for cell in cells]
    top = None if lds.ceiling is None else defined(lds.ceiling)
    reference = None if top is None or not len(top) else ("noise ceiling", float(top.mean()))
    drawing = bar_chart(
        lds.methods, {"LDS": means}, errors={"LDS": errors}, reference=reference, xlabel="mean Spearman's correlation"
    )
    best = int(np.argmax([-np.inf if cell[0] is None else float(cell[0]) for cell in cells]))
    report = Report(
        "Linear datamodeling score",
        (
            f"{lds.methods[best]} foretells retrained outputs best: {means[best]:.3f} over {n:,} random halves. "
            if cells[best][0] is not None
            else f"Undefined for every method: scores or outputs are all equal over {n:,} random halves. "
        )
        + retrainer.recipe.note,
        tables,
        [Figure("LDS by method", drawing, "Mean over queries, bars: standard error.")],
        provenance=inputs.retraining_provenance(lds.residuals, lds.sampled),
    )
    result = {
        **inputs.retraining_record(lds.residuals, lds.sampled),
        "subsets": lds.subsets,
        "lds": {name: listed_values(values) for name, values in zip(lds.methods, lds.values, strict=True)},
        "agreement": None if lds.agreement is None else listed_values(lds.agreement),
        "ceiling": None if lds.ceiling is None else listed_values(lds.ceiling),
        "outputs": listed_values(lds.outputs),
    }
    return report, result
