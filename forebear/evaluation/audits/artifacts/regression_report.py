"""The report of an artifact regression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from forebear.evaluation.audits.artifacts.features import Feature
from forebear.evaluation.audits.artifacts.regression import EVERY_QUERY, ArtifactRegression
from forebear.evaluation.common.comparisons import listed_values, provenance
from forebear.evaluation.common.inputs import Inputs
from forebear.evaluation.common.passages import row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import mean_of
from forebear.evaluation.reports.charts import line_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table
from forebear.ratio import ratio
from forebear.retriever.retriever import Retriever

N_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class MeanCoefficient:
    """The mean of a over a group's queries.

    Attributes:
        n: Queries whose a is determined.
        undefined: The group's other queries.
        mean: Mean of a; None without queries.
        error: Standard error of the mean over queries; None for less than two queries.
        low: Lower end of the 95% bootstrap interval over queries; None for less than two queries.
        high: Upper end of that interval.
        rows_low: Lower end of the 95% interval for the choice of training rows; None without queries.
        rows_high: Upper end of that interval.
        above: Share of queries whose own 95% interval lies above 0.
        below: Share of queries whose own 95% interval lies below 0.
    """

    n: int
    undefined: int
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    rows_low: float | None = None
    rows_high: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 if both intervals exclude 0 on that side (of a single query, that over rows alone), else 0."""
        lows = [low for low in (self.low, self.rows_low) if low is not None]
        highs = [high for high in (self.high, self.rows_high) if high is not None]
        return int(bool(lows) and min(lows) > 0) - int(bool(highs) and max(highs) < 0)


def mean_coefficient(regression: ArtifactRegression, method: int, group: int, seed: int = 0) -> MeanCoefficient:
    """The mean of a over a group's queries, with both intervals; ``seed`` is the bootstrap's."""
    determined = regression.defined(method, group)
    n, undefined = int(determined.sum()), int((regression.members[group] & ~determined).sum())
    if not n:
        return MeanCoefficient(n=0, undefined=undefined)
    a = regression.coefficients[method, determined, 0]
    half = regression.quantile * regression.errors[method, determined]
    over_queries = mean_of(a, seed)
    rows_half = regression.quantile * float(regression.row_errors[method, group])
    return MeanCoefficient(
        n=n, undefined=undefined,
        mean=over_queries.mean, error=over_queries.error, low=over_queries.low, high=over_queries.high,
        rows_low=over_queries.mean - rows_half, rows_high=over_queries.mean + rows_half,
        above=float((a - half > 0).mean()), below=float((a + half < 0).mean()),
    )  # fmt: skip


def artifact_report(
    regression: ArtifactRegression, feature: Feature, artifact: np.ndarray, inputs: Inputs
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    retriever, queries, seed = inputs.retriever, inputs.queries, inputs.seed
    means = [
        [mean_coefficient(regression, m, g, seed) for g in range(len(regression.groups))]
        for m in range(len(regression.methods))
    ]
    facts = {"artifact": feature.description, "test_rows": queries.source, "queries": len(queries), "seed": seed}
    report = Report(
        f"Artifact regression: {feature.name}",
        " ".join(_finding(name, feature, row[0]) for name, row in zip(regression.methods, means, strict=True)),
        _tables(regression, feature, artifact, means),
        [_figure(regression, m, feature) for m in range(len(regression.methods)) if means[m][0].n],
        _groups(regression, feature, retriever, queries),
        provenance(retriever, inputs.question, inputs.command, residuals=regression.residuals, **facts),
    )
    result = {
        "feature": {"name": feature.name, "description": feature.description, "mean": float(artifact.mean())},
        "n_rows": regression.n_rows,
        "methods": {
            name: {
                "groups": {
                    group: asdict(means[m][g]) | {"bins": _bins(regression.bins[m, g])}
                    for g, group in enumerate(regression.groups)
                },
                "per_query": {
                    **{x: listed_values(regression.coefficients[m, :, i]) for i, x in enumerate("abc")},
                    "error": listed_values(regression.errors[m]),
                    "low": listed_values(regression.coefficients[m, :, 0] - regression.quantile * regression.errors[m]),
                    "high": listed_values(
                        regression.coefficients[m, :, 0] + regression.quantile * regression.errors[m]
                    ),
                },
            }
            for m, name in enumerate(regression.methods)
        },
        "query_rows": queries.rows,
        "predictions": [retriever.label_names[i] for i in regression.predictions],
        "seed": seed,
        "question": inputs.record(regression.residuals),
    }
    return report, result


def _finding(method: str, feature: Feature, mean: MeanCoefficient) -> str:
    if mean.mean is None:
        return f"By {method}, no test row gives the training rows scores that a parabola could be fitted to."
    value = f"mean quadratic coefficient {mean.mean:.2g}, 95% interval over training rows {mean.rows_low:.2g} to "
    value += f"{mean.rows_high:.2g}"
    if mean.low is not None:
        value += f", over test rows {mean.low:.2g} to {mean.high:.2g}"
    if mean.sign > 0:
        return f"By {method}, training rows of large influence hold more {feature.name} than the others ({value})."
    if mean.sign < 0:
        return f"By {method}, training rows of large influence hold less {feature.name} than the others ({value})."
    return f"By {method}, influence does not tell training rows with {feature.name} from others ({value})."


def _tables(
    regression: ArtifactRegression, feature: Feature, artifact: np.ndarray, means: list[list[MeanCoefficient]]
) -> list[Table]:
    """Two tables: the mean of a with its interval over training rows, and with its interval over queries."""
    rows: list[list[Cell]] = []
    queries: list[list[Cell]] = []
    for name, row in zip(regression.methods, means, strict=True):
        for group, mean in zip(regression.groups, row, strict=True):
            rows.append([name, group, mean.n, *map(_thousandths, (mean.mean, mean.rows_low, mean.rows_high))])
            interval = map(_thousandths, (mean.error, mean.low, mean.high))
            queries.append([name, group, *interval, mean.above, mean.below])
    title = f"Quadratic coefficient of {feature.name} on influence, x 1000"
    undefined = {
        name: row[0].undefined for name, row in zip(regression.methods, means, strict=True) if row[0].undefined
    }
    left_out = ", ".join(f"{n} by {name}" for name, n in undefined.items()) or "none"
    return [
        Table(
            title,
            ["method", "test rows", "number", "a", "95% low", "95% high"],
            rows,
            f"Of artifact = a z² + b z + c over {regression.n_rows:,} training rows, z their z-normalised influence "
            f"on a test row; mean over test rows. Artifact: {feature.description}; mean {artifact.mean():.3f}. The "
            "interval is for the choice of training rows, which all test rows share.",
        ),
        Table(
            f"{title}: between test rows",
            ["method", "test rows", "±", "95% low", "95% high", "above 0", "below 0"],
            queries,
            "Standard error and bootstrap interval of the mean for the choice of test rows. Above and below 0: share "
            "of test rows whose own interval, over training rows, lies there. Left out, because their scores determine "
            f"no parabola: {left_out}.",
        ),
    ]


def _thousandths(value: float | None) -> float | None:
    return None if value is None else 1000.0 * value


def _bins(means: np.ndarray) -> dict[str, Any]:
    return dict(zip(("z", "artifact", "parabola"), listed_values(means), strict=True))


def _figure(regression: ArtifactRegression, method: int, feature: Feature) -> Figure:
    z, artifact, parabola = regression.bins[method, regression.groups.index(EVERY_QUERY)]
    drawing = line_chart(
        z.tolist(),
        {"rows": artifact.tolist(), "parabola": parabola.tolist()},
        xlabel=f"z-normalised influence by {regression.methods[method]}",
        ylabel=f"mean {feature.name}",
    )
    return Figure(
        f"{feature.name} by influence: {regression.methods[method]}",
        drawing,
        f"Means over the queries of {len(z)} equal parts of the training rows, ordered by influence, and of the fitted "
        "parabola over the same rows.",
    )


def _groups(regression: ArtifactRegression, feature: Feature, retriever: Retriever, queries: QueryRows) -> list[Group]:
    """The rows at both ends for the queries whose a is surest to differ from 0, by the first method."""
    a, errors = regression.coefficients[0, :, 0], regression.errors[0]
    defined = np.flatnonzero(regression.defined(0, 0))
    sure = ratio(np.abs(a[defined]), errors[defined])
    names = retriever.index.manifest.spec.text_columns
    groups = []
    for q in defined[np.argsort(-sure, kind="stable")][:N_SHOWN]:
        texts = [column[q] for column in queries.texts]
        query = Passage(
            f"test row {queries.rows[q]}",
            dict(zip(names, texts, strict=True)),
            feature.words(texts),
            {"predicted": retriever.label_names[regression.predictions[q]]},
        )
        passages = [
            passage
            for side, rows in zip(("top", "bottom"), regression.ends[q], strict=True)
            for passage in _passages(retriever, feature, rows, side)
        ]
        intro = f"a = {a[q]:.3g} ± {errors[q]:.2g} (standard error)."
        groups.append(
            Group(
                f"Most influential for test row {queries.rows[q]}, by {regression.methods[0]}", passages, intro, query
            )
        )
    return groups


def _passages(retriever: Retriever, feature: Feature, rows: np.ndarray, side: str) -> list[Passage]:
    """The rows at one end of a ranking, with their values of the feature and its words."""
    columns = retriever.index.text_lists(rows)
    return row_passages(
        retriever,
        rows,
        [f"{side} {place} · row {row}" for place, row in enumerate(rows, start=1)],
        facts=[{feature.name: float(value)} for value in feature.of_rows(columns, rows)],
        highlighted=[feature.words(texts) for texts in zip(*columns, strict=True)],
    )
