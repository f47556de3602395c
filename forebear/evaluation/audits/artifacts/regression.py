"""``artifact-regression``: do the most influential training rows hold an artifact? (Han20, section 5.1, Table 6)

For each test row, over all live training rows: artifact = a z^2 + b z + c, where z is the row's z-normalised influence
(mean 0, population std 1) and the artifact a number of the row, such as its lexical overlap. a > 0: the rows of large
influence, helpful or harmful, hold more of it than the rest.

*How sure.* z is heavy-tailed: a few rows carry much of z^2. There the usual robust error (HC1) is too small (its 95%
interval held a = 0 in 72-88% of simulated artifacts that were pure chance); HC3, which divides each residual by
1 - leverage, is not far off (90-94%), nor is the OLS error as long as chance is all there is (94-97%). Of HC3 and OLS
the larger one counts (Angrist and Pischke, 2009, section 8.1).

*Averaged over queries* there are two sources of error. Other queries: a bootstrap over them. Other training rows: all
queries are regressed on the same rows, whose chance does not average out over queries; the mean of a is a weighted sum
over rows, sum_n v_n artifact_n with v_n the mean of the queries' weights, and its error follows from the rows'
contributions v_n e_n / (1 - h_n), averaged over queries before they are squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forebear.errors import DataError, NonFiniteError
from forebear.evaluation.common.queries import QueryRows
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.labels import UNKNOWN
from forebear.progress import Progress, no_progress
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever
from forebear.retriever.scores import Scores
from forebear.retriever.searchers import QUERY_BLOCK_ROWS

N_BINS = 20
N_ENDS = 5  # rows shown at each end
MIN_ROWS = 4  # three coefficients and a residual
EVERY_QUERY = "all"
_MAX_SCORES = 1 << 24  # entries of a (queries, rows) block held at once
_FLAT = 1e-20  # mean square of z^2 off its line, over the mean of z^4: nothing but rounding


class Parabola(NamedTuple):
    """artifact = a z^2 + b z + c over ``n`` rows, and the parts of the fit that the mean over queries needs.

    Attributes:
        a: Quadratic coefficient.
        b: Linear coefficient.
        c: Constant.
        error: Standard error of a, the larger one of HC3 and OLS.
        variance: Sum of squared residuals over n - 3.
        weights: Weights of the rows, ``(n,)``: a is their dot product with the artifact.
        contributions: Each row's weight times its residual over 1 - leverage, ``(n,)``; their length is the HC3 error.
    """

    a: float
    b: float
    c: float
    error: float
    variance: float
    weights: np.ndarray
    contributions: np.ndarray


def z_normalised(scores: np.ndarray) -> np.ndarray | None:
    """Scores of one query ``(n,)`` with mean 0 and population std 1; None where they are all equal."""
    centred = scores - scores.mean()
    spread = np.sqrt((centred**2).mean())
    if spread <= 1e-12 * np.abs(scores).max():
        return None
    return np.asarray(centred / spread)


def fit_parabola(z: np.ndarray, artifact: np.ndarray) -> Parabola | None:
    """Least squares, in closed form: 1, z and w = z^2 - mean(z^3) z - 1 are orthogonal.

    Args:
        z: Influence from `z_normalised`, ``(n,)``.
        artifact: The artifact of each row, ``(n,)``.

    Returns:
        None where a is not determined: z has two values, or three of which one is of a single row, so that the fit
        passes through that row whatever its artifact is.

    Raises:
        DataError: Fewer than four rows.
    """
    n = len(z)
    if n < MIN_ROWS:
        raise DataError(f"{n} training rows; a parabola and its error take {MIN_ROWS} or more.")
    squares = z * z
    skew = float((squares * z).mean())
    w = squares - skew * z - 1.0
    length = float(w @ w)
    if length <= _FLAT * n * float((squares * squares).mean()):
        return None
    leverage = 1.0 / n + squares / n + w * w / length
    if leverage.max() > 1.0 - 1e-9:
        return None
    a = float(w @ artifact) / length
    b = float((z * artifact).mean()) - a * skew
    c = float(artifact.mean()) - a
    residual = artifact - a * squares - b * z - c
    variance = float(residual @ residual) / (n - 3)
    weights = w / length
    contributions = weights * residual / (1.0 - leverage)
    error = max(float(np.linalg.norm(contributions)), float(np.sqrt(variance / length)))
    return Parabola(a, b, c, error, variance, weights, contributions)


class _Group:
    """Sums over the queries of one group."""

    def __init__(self, n_rows: int, n_bins: int) -> None:
        self.n, self.variance = 0, 0.0
        self.weights, self.contributions = np.zeros(n_rows), np.zeros(n_rows)
        self.bins = np.zeros((3, n_bins))

    def add(self, fit: Parabola, bins: np.ndarray) -> None:
        self.n += 1
        self.variance += fit.variance
        self.weights += fit.weights
        self.contributions += fit.contributions
        self.bins += bins

    def row_error(self) -> float:
        """Standard error of the mean of a by the choice of training rows; NaN without queries."""
        if not self.n:
            return float("nan")
        robust = np.linalg.norm(self.contributions)
        plain = np.sqrt(self.variance / self.n) * np.linalg.norm(self.weights)
        return float(max(robust, plain)) / self.n


@dataclass(frozen=True, kw_only=True)
class ArtifactRegression:
    """Fits of every query.

    Attributes:
        methods: Names of the methods, ``m``.
        n_rows: Number of live training rows.
        groups: Names of the groups of queries, ``g``; see `groups_of`.
        members: Whether a query is in a group, ``(g, q)`` bool.
        coefficients: a, b, c of each query, ``(m, q, 3)``; NaN where a is not determined.
        errors: Standard errors of a, ``(m, q)``; NaN where a is not determined.
        row_errors: Standard error of a group's mean of a by the choice of training rows, ``(m, g)``; NaN without
            queries.
        bins: Means of z, artifact and fitted parabola in ``N_BINS`` equal parts of the ranking by influence, from
            the lowest up, over the queries of a group, ``(m, g, 3, bins)``; NaN without queries.
        ends: The rows at the top and at the bottom by the first method, ``(q, 2, k)``, outermost first.
        predictions: Predicted class, ``(q,)``.
        residuals: Relative residuals of H^-1 by method; see :class:`~forebear.retriever.scores.Scores`.
    """

    methods: tuple[str, ...]
    n_rows: int
    groups: tuple[str, ...]
    members: np.ndarray
    coefficients: np.ndarray
    errors: np.ndarray
    row_errors: np.ndarray
    bins: np.ndarray
    ends: np.ndarray
    predictions: np.ndarray
    residuals: dict[str, float]

    @property
    def quantile(self) -> float:
        """Half of a 95% interval in standard errors of a: Student's t of n - 3 degrees."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.n_rows - 3))

    def defined(self, method: int, group: int) -> np.ndarray:
        """Whether a query is in the group and its a is determined, ``(q,)`` bool."""
        return np.asarray(self.members[group] & ~np.isnan(self.errors[method]))


def regress_artifact(
    retriever: Retriever,
    queries: QueryRows,
    spec: QuerySpec | Question,
    artifact: np.ndarray,
    *,
    progress: Progress = no_progress,
) -> ArtifactRegression:
    """Fit the parabola of every query and method, a block of queries at a time.

    Args:
        retriever: Over the index.
        queries: Test rows.
        spec: Methods that score rows, scope, target, curvature. All rows are scored exactly.
        artifact: A number for each live training row, ``(n,)``.
        progress: Called with the queries done.

    Raises:
        DataError: Fewer than four live training rows.
        InputError: A method that scores no rows.
        NonFiniteError: A score is NaN or infinite.
    """
    question = retriever.resolve(spec)
    methods = question.spec.methods
    n, n_queries = len(retriever.index.live), len(queries)
    if n < MIN_ROWS:
        raise DataError(f"{retriever.index.folder} has {n} live training rows; a regression takes {MIN_ROWS} or more.")
    predictions = run_forward(retriever.classifier(), queries.texts).predictions
    groups, members = groups_of(predictions, queries.labels, retriever.label_names)
    n_bins, k = min(N_BINS, n), min(N_ENDS, n // 2)
    sums = [[_Group(n, n_bins) for _ in groups] for _ in methods]
    coefficients = np.full((len(methods), n_queries, 3), np.nan)
    errors = np.full((len(methods), n_queries), np.nan)
    ends = np.empty((n_queries, 2, k), np.int64)
    size = max(1, min(QUERY_BLOCK_ROWS, _MAX_SCORES // (n * len(methods))))
    scored = Scores()
    progress("queries", 0, n_queries)
    for start in range(0, n_queries, size):
        block = slice(start, start + size)
        labels = None if queries.labels is None else queries.labels[block]
        block_scores = retriever.score_block(
            [column[block] for column in queries.texts], labels, question, first_row=start
        )
        scored.note_residuals([block_scores])
        for m, name in enumerate(methods):
            for q, scores in enumerate(block_scores[name], start):
                if not np.isfinite(scores).all():
                    raise NonFiniteError(f"{name} gives test row {queries.rows[q]} a score that is NaN or infinite.")
                order = np.argsort(scores, kind="stable")
                if m == 0:
                    ends[q] = retriever.index.live[[np.argsort(-scores, kind="stable")[:k], order[:k]]]
                z = z_normalised(scores)
                fit = None if z is None else fit_parabola(z, artifact)
                if z is None or fit is None:
                    continue
                coefficients[m, q], errors[m, q] = fit[:3], fit.error
                means = bin_means(z, artifact, fit, order, n_bins)
                for g in np.flatnonzero(members[:, q]):
                    sums[m][g].add(fit, means)
        progress("queries", min(start + size, n_queries), n_queries)
    return ArtifactRegression(
        methods=methods,
        n_rows=n,
        groups=groups,
        members=members,
        coefficients=coefficients,
        errors=errors,
        row_errors=np.array([[group.row_error() for group in row] for row in sums]),
        bins=np.array(
            [[g.bins / g.n if g.n else np.full_like(g.bins, np.nan) for g in row] for row in sums],
        ),
        ends=ends,
        predictions=predictions,
        residuals=scored.residuals,
    )


def groups_of(
    predictions: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Groups of queries: all; by predicted label; and by predicted label where the gold label is another.

    A group that is empty, or equal to a group before it, is left out.

    Returns:
        Names of the groups, and whether a query is in a group, ``(g, q)`` bool.
    """
    groups = {EVERY_QUERY: np.ones(len(predictions), bool)}
    for label, name in enumerate(names):
        predicted = predictions == label
        wrong = np.zeros_like(predicted) if labels is None else predicted & (labels != label) & (labels != UNKNOWN)
        if predicted.any() and not predicted.all():
            groups[f"predicted {name}"] = predicted
        if wrong.any() and (wrong != predicted).any():
            groups[f"predicted {name}, wrongly"] = wrong
    return tuple(groups), np.stack(list(groups.values()))


def bin_means(z: np.ndarray, artifact: np.ndarray, fit: Parabola, order: np.ndarray, n_bins: int) -> np.ndarray:
    """Means of z, artifact and parabola ``(3, bins)`` in equal parts of the rows ``order``, lowest influence first."""
    edges = np.linspace(0, len(z), n_bins, endpoint=False).astype(np.int64)
    counts = np.diff(edges, append=len(z))
    columns = np.stack([z, artifact, fit.a * z * z + fit.b * z + fit.c])
    return np.asarray(np.add.reduceat(columns[:, order], edges, axis=1) / counts)
