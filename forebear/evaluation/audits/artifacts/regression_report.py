"""The report of an artifact regression."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from forebear.evaluation.audits.artifacts.features import Feature
from forebear.evaluation.audits.artifacts.regression import EVERY_QUERY, ArtifactRegression
from forebear.evaluation.common.comparisons import listed_values, provenance, question_record
from forebear.evaluation.common.passages import row_passages
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.common.statistics import mean_of
from forebear.evaluation.reports.charts import line_chart
from forebear.evaluation.reports.report import Cell, Figure, Group, Passage, Report, Table
from forebear.ratio import ratio
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

N_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class MeanCoefficient:
    """The mean of a over a group's queries.

    Attributes:
        n: Queries whose a is determined.
        undefined: The group's other queries.
        mean: None without queries.
        error: Its standard error over queries; None for less than two.
        low: Lower end of its 95% bootstrap interval over queries, likewise.
        high: Upper end.
        rows_low: Lower end of its 95% interval by the choice of training rows; None without queries.
        rows_high: Upper end.
        above: Share of queries whose own 95% interval lies above 0.
        below: Share of those whose lies below.
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


def mean_coefficient(found: ArtifactRegression, method: int, group: int, seed: int = 0) -> MeanCoefficient:
    """The mean of a over a group's queries, with both intervals; ``seed`` is the bootstrap's."""
    at = found.defined(method, group)
    n, undefined = int(at.sum()), int((found.members[group] & ~at).sum())
    if not n:
        return MeanCoefficient(n=0, undefined=undefined)
    a = found.coefficients[method, at, 0]
    half = found.quantile * found.errors[method, at]
    over_queries = mean_of(a, seed)
    rows_half = found.quantile * float(found.row_errors[method, group])
    return MeanCoefficient(
        n=n, undefined=undefined,
        mean=over_queries.mean, error=over_queries.error, low=over_queries.low, high=over_queries.high,
        rows_low=over_queries.mean - rows_half, rows_high=over_queries.mean + rows_half,
        above=float((a - half > 0).mean()), below=float((a + half < 0).mean()),
    )  # fmt: skip


def artifact_report(
    found: ArtifactRegression,
    feature: Feature,
    artifact: np.ndarray,
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    seed: int,
    command: str,
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    means = [[mean_coefficient(found, m, g, seed) for g in range(len(found.groups))] for m in range(len(found.methods))]
    facts = {"artifact": feature.description, "test_rows": queries.source, "queries": len(queries), "seed": seed}
    report = Report(
        f"Artifact regression: {feature.name}",
        " ".join(_finding(name, feature, row[0]) for name, row in zip(found.methods, means, strict=True)),
        _tables(found, feature, artifact, means),
        [_figure(found, m, feature) for m in range(len(found.methods)) if means[m][0].n],
        _groups(found, feature, retriever, queries),
        provenance(retriever, spec, command, residuals=found.residuals, **facts),
    )
    result = {
        "feature": {"name": feature.name, "description": feature.description, "mean": float(artifact.mean())},
        "n_rows": found.n_rows,
        "methods": {
            name: {
                "groups": {
                    group: asdict(means[m][g]) | {"bins": _bins(found.bins[m, g])}
                    for g, group in enumerate(found.groups)
                },
                "per_query": {
                    **{x: listed_values(found.coefficients[m, :, i]) for i, x in enumerate("abc")},
                    "error": listed_values(found.errors[m]),
                    "low": listed_values(found.coefficients[m, :, 0] - found.quantile * found.errors[m]),
                    "high": listed_values(found.coefficients[m, :, 0] + found.quantile * found.errors[m]),
                },
            }
            for m, name in enumerate(found.methods)
        },
        "query_rows": queries.rows,
        "predictions": [retriever.label_names[i] for i in found.predictions],
        "seed": seed,
        "question": question_record(retriever, spec, found.residuals),
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
    found: ArtifactRegression, feature: Feature, artifact: np.ndarray, means: list[list[MeanCoefficient]]
) -> list[Table]:
    """One with each interval of the mean."""
    rows: list[list[Cell]] = []
    queries: list[list[Cell]] = []
    for name, row in zip(found.methods, means, strict=True):
        for group, mean in zip(found.groups, row, strict=True):
            rows.append([name, group, mean.n, *map(_thousandths, (mean.mean, mean.rows_low, mean.rows_high))])
            interval = map(_thousandths, (mean.error, mean.low, mean.high))
            queries.append([name, group, *interval, mean.above, mean.below])
    title = f"Quadratic coefficient of {feature.name} on influence, x 1000"
    undefined = {name: row[0].undefined for name, row in zip(found.methods, means, strict=True) if row[0].undefined}
    left_out = ", ".join(f"{n} by {name}" for name, n in undefined.items()) or "none"
    return [
        Table(
            title,
            ["method", "test rows", "number", "a", "95% low", "95% high"],
            rows,
            f"Of artifact = a z² + b z + c over {found.n_rows:,} training rows, z their z-normalised influence on a "
            f"test row; mean over test rows. Artifact: {feature.description}; mean {artifact.mean():.3f}. The interval "
            "is for the choice of training rows, which all test rows share.",
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


def _figure(found: ArtifactRegression, method: int, feature: Feature) -> Figure:
    z, artifact, parabola = found.bins[method, found.groups.index(EVERY_QUERY)]
    drawing = line_chart(
        z.tolist(),
        {"rows": artifact.tolist(), "parabola": parabola.tolist()},
        xlabel=f"z-normalised influence by {found.methods[method]}",
        ylabel=f"mean {feature.name}",
    )
    return Figure(
        f"{feature.name} by influence: {found.methods[method]}",
        drawing,
        f"Means over the queries of {len(z)} equal parts of the training rows, ordered by influence, and of the fitted "
        "parabola over the same rows.",
    )


def _groups(found: ArtifactRegression, feature: Feature, retriever: Retriever, queries: QueryRows) -> list[Group]:
    """The rows at both ends for the queries whose a is surest to differ from 0, by the first method."""
    a, errors = found.coefficients[0, :, 0], found.errors[0]
    defined = np.flatnonzero(found.defined(0, 0))
    sure = ratio(np.abs(a[defined]), errors[defined])
    names = retriever.index.manifest.spec.text_columns
    groups = []
    for q in defined[np.argsort(-sure, kind="stable")][:N_SHOWN]:
        texts = [column[q] for column in queries.texts]
        query = Passage(
            f"test row {queries.rows[q]}",
            dict(zip(names, texts, strict=True)),
            feature.words(texts),
            {"predicted": retriever.label_names[found.predictions[q]]},
        )
        passages = [
            passage
            for side, rows in zip(("top", "bottom"), found.ends[q], strict=True)
            for passage in _passages(retriever, feature, rows, side)
        ]
        intro = f"a = {a[q]:.3g} ± {errors[q]:.2g} (standard error)."
        groups.append(
            Group(f"Most influential for test row {queries.rows[q]}, by {found.methods[0]}", passages, intro, query)
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
