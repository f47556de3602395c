"""Parts shared by evaluations: rank correlations, means of defined values, tables of method pairs, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from forebear.evaluation.common.statistics import INTERVALS, mean_of
from forebear.evaluation.reports.charts import heat_map
from forebear.evaluation.reports.report import Cell, Figure, Table
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.ratio import ratio
from forebear.retriever.answers.coverage import fit_lines
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

_LEFT_OVER = 1e-7  # below this share of its spread, what a regression leaves of ranks is rounding


def standardised_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks of each query's scores, ties sharing their mean rank, with mean 0 and population std 1.

    Args:
        scores: ``(q, n)``.

    Returns:
        ``(q, n)``; a query whose scores are all equal has no order, and gets NaN.
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).mean(axis=1, keepdims=True))
    return ratio(ranks, spread, np.nan)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation of two methods' scores ``(q, n)``, for each query ``(q,)``; NaN where it is undefined."""
    products = (standardised_ranks(first) * standardised_ranks(second)).mean(axis=1)
    return np.asarray(np.clip(products, -1.0, 1.0))


def partial_spearman(first: np.ndarray, second: np.ndarray, covariates: np.ndarray) -> np.ndarray:
    """Spearman's correlation with the influence of covariates taken out of both sides (partial rank correlation).

    The ranks of both sides are regressed on the ranks of the covariates, with a constant; what is left is correlated.
    Covariates that are constant take nothing out.

    Args:
        first: ``(q, n)``.
        second: ``(q, n)``.
        covariates: ``(n, k)``, the same for all queries.

    Returns:
        For each query ``(q,)``; NaN where the covariates explain all ranks of a side, or where fewer than three degrees
        of freedom are left.
    """
    ranks = standardised_ranks(covariates.T)
    ranks = ranks[~np.isnan(ranks).any(axis=1)]
    if not len(ranks):
        return spearman(first, second)
    left, sizes, _ = np.linalg.svd(ranks.T, full_matrices=False)
    basis = left[:, sizes > _LEFT_OVER * sizes[0]]
    if first.shape[1] < 3 + basis.shape[1]:
        return np.full(len(first), np.nan)

    def left_over(scores: np.ndarray) -> np.ndarray:
        rest = standardised_ranks(scores)
        rest = rest - (rest @ basis) @ basis.T
        spread = np.sqrt((rest**2).mean(axis=1, keepdims=True))  # of the ranks themselves it was 1
        return ratio(rest, np.where(spread > _LEFT_OVER, spread, 0.0), np.nan)

    products = (left_over(first) * left_over(second)).mean(axis=1)
    return np.asarray(np.clip(products, -1.0, 1.0))


def defined(values: np.ndarray) -> np.ndarray:
    """The values that are not NaN, in one axis."""
    return np.asarray(values[~np.isnan(values)])


def defined_mean(values: np.ndarray) -> float | None:
    """Mean of the values that are defined (not NaN); None if no value is."""
    kept = defined(values)
    return float(kept.mean()) if len(kept) else None


def defined_means(values: np.ndarray, axis: int) -> np.ndarray:
    """Means over one axis (of seeds, runs or random models), each of the values that are not NaN.

    Args:
        values: Such as ``(seeds, q)``; NaN where a value is undefined or was not sampled.
        axis: The axis that is averaged away.

    Returns:
        Such as ``(q,)``; NaN where all values along the axis are.
    """
    is_defined = ~np.isnan(values)
    total = np.where(is_defined, values, 0.0).sum(axis=axis)
    return ratio(total, is_defined.sum(axis=axis), np.nan)


def interval_cells(values: np.ndarray, seed: int) -> list[Cell]:
    """Cells for :data:`INTERVAL_COLUMNS`: mean, standard error and 95% interval of the values that are not NaN.

    All four are None where no value is defined; see :func:`~forebear.evaluation.common.statistics.mean_of`.
    """
    kept = defined(values)
    if not len(kept):
        return [None, None, None, None]
    mean = mean_of(kept, seed)
    return [mean.mean, mean.error, mean.low, mean.high]


INTERVAL_COLUMNS = ("mean", "±", "95% low", "95% high")


def listed_values(values: np.ndarray) -> Any:
    """An array as nested lists for ``result.json``, with None for NaN."""
    if values.ndim == 0:
        return None if np.isnan(values) else values.item()
    return [listed_values(part) for part in values]


def matrix_of(values: np.ndarray) -> list[list[float | None]]:
    """Mean over the queries of each entry of ``(q, m, m)``; None where no query defines it."""
    m = values.shape[1]
    return [[defined_mean(values[:, i, j]) for j in range(m)] for i in range(m)]


def matrix_table(title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], note: str) -> Table:
    """A table of ``(m, m)`` values, with a line and a column for each method."""
    return Table(title, ["method", *names], [[name, *row] for name, row in zip(names, matrix, strict=True)], note)


def pair_table(title: str, names: Sequence[str], values: np.ndarray, seed: int, note: str) -> Table:
    """Every pair of methods with the interval of its mean over the queries, from ``(q, m, m)``."""
    rows: list[list[Cell]] = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            pair_values = values[:, i, j]
            rows.append([first, names[j], *interval_cells(pair_values, seed), int(np.isnan(pair_values).sum())])
    return Table(title, ["first", "second", *INTERVAL_COLUMNS, "undefined"], rows, note)


def matrix_figure(
    title: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]], *, low: float, caption: str
) -> Figure:
    """A heat map of values from ``low`` to 1."""
    return Figure(title, heat_map(names, names, matrix, low=low, high=1.0), caption)


def provenance(
    retriever: Retriever,
    spec: QuerySpec | Question,
    command: str,
    *,
    residuals: Mapping[str, float] | None = None,
    **facts: object,
) -> dict[str, str]:
    """The provenance lines of a report: index, question, test rows and the command to repeat it.

    Args:
        retriever: Over the index.
        spec: The question.
        command: The command line.
        residuals: Largest relative residual of H^-1 by method, where a solver iterated.
        **facts: Further lines; underscores of a name become spaces.
    """
    question = retriever.resolve(spec)
    return {
        "index": str(retriever.index.folder),
        "index digest": retriever.index.manifest.digest(),
        "computed on": computed_line(retriever.models.computed_on()),
        **fit_lines(question),
        "question digest": question.digest,
        "scope": question.spec.scope,
        "target": question.spec.target,
        **{name.replace("_", " "): str(value) for name, value in facts.items()},
        **{f"H^-1 of {name}": f"relative residual {r:.1e}" for name, r in (residuals or {}).items()},
        "95% intervals": INTERVALS,
        "command": command,
    }


def question_record(
    retriever: Retriever, spec: QuerySpec | Question, residuals: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The question as ``result.json`` records it: every choice, and what it means for each method."""
    question = retriever.resolve(spec)
    return {
        "spec": asdict(question.spec),
        **retriever.facts(question),
        **({"residuals": dict(residuals)} if residuals else {}),
    }
