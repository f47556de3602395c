"""Searches against brute force: the same rows in the same order, ties to the lower row number, both ends.

Truth is computed from written-out gradients in float64, once for each distinct row, so that exact duplicates tie
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from forebear.indexer.curvature.head import HeadCurvature
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.storage import ann as ann_module
from forebear.indexer.storage import scan_table as derived
from forebear.indexer.storage.ann import Vectors, build_ann, read_ann, write_ann
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import ScanTable, by_falling, read_scan_table, row_norms, write_scan_table
from forebear.retriever.head import rounded, search
from forebear.retriever.head.scan import Scan, group_rows
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_ann, search_full, search_scan
from forebear.retriever.question.methods import METHODS
from forebear.retriever.ranking import Ranking

N, H, C, Q, K = 1500, 12, 3, 24, 7
BLOCK_ROWS = 128
SCANNED = ("nn-dot", "gd", "gc", "if", "rif", "tracin", "rep")
NEIGHBOURS = ("nn-cos", "nn-euc")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks small enough for a scan of a few hundred rows to stop early."""
    monkeypatch.setattr(derived, "SCAN_BLOCK_ROWS", BLOCK_ROWS)


@dataclass
class Rows:
    """Rows and queries of one scenario, at two checkpoints, in the float32 of the store."""

    features: list[np.ndarray]
    residuals: list[np.ndarray]
    query_features: np.ndarray
    query_residuals: np.ndarray
    damping: float = 0.1
    live: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.features = [f.astype(np.float32) for f in self.features]
        self.residuals = [r.astype(np.float32) for r in self.residuals]
        self.live = np.arange(len(self.features[0]))


def random_residuals(rng: np.random.Generator, n: int) -> np.ndarray:
    """p - y of random softmaxes: each sums to 0."""
    p = np.exp(2 * rng.normal(size=(n, C)))
    p /= p.sum(axis=1, keepdims=True)
    return p - np.eye(C)[rng.integers(0, C, n)]


def scenario(name: str) -> Rows:
    rng = np.random.default_rng(7)
    n = 5 if name == "fewer rows than results" else N
    f = [rng.normal(size=(n, H)) for _ in range(2)]
    r = [random_residuals(rng, n) for _ in range(2)]
    x, a = rng.normal(size=(Q, H)), random_residuals(rng, Q)
    if name == "heavy-tailed norms":
        f = [v * rng.lognormal(sigma=2, size=(n, 1)) for v in f]
    elif name == "exact duplicates":
        kinds = rng.integers(0, 12, n)
        f, r = [v[kinds] for v in f], [v[kinds] for v in r]
        x[:6], a[:6] = f[-1][:6], r[-1][:6]
    elif name == "saturated features":
        f = [np.tile(v[:1], (n, 1)) + 1e-3 * v for v in f]
        x = f[-1][:Q] + 1e-4 * x
        a *= 1e-3  # confident queries, short gradients
    elif name == "one direction, to 1e-5":
        f = [np.tile(v[:1], (n, 1)) + 1e-5 * v for v in f]
        r = [np.tile(v[:1], (n, 1)) for v in r]
        x, a = np.tile(f[-1][:1], (Q, 1)) + 1e-5 * x, 1e-3 * np.tile(a[:1], (Q, 1))
    elif name == "zero residuals":
        r = [np.where(rng.random((n, 1)) < 0.5, 0, v) for v in r]
    elif name == "all gradients zero":
        r = [np.zeros_like(v) for v in r]
    elif name == "tiny residuals":
        r = [v * 10.0 ** rng.uniform(-20, 0, (n, 1)) for v in r]
        a = a * 10.0 ** -np.linspace(0, 20, Q)[:, None]
    return Rows(f, r, x, a)


SCENARIOS = (
    "random", "heavy-tailed norms", "exact duplicates", "saturated features", "one direction, to 1e-5",
    "zero residuals", "all gradients zero", "tiny residuals", "fewer rows than results",
)  # fmt: skip


def flat_gradients(residuals: np.ndarray, features: np.ndarray) -> np.ndarray:
    r, f = residuals.astype(np.float64), features.astype(np.float64)
    return (r[:, :, None] * f[:, None, :]).reshape(len(f), -1)


def helmert_basis() -> np.ndarray:
    """The contrasts in which the package keeps preconditioned gradients, by hand for three classes."""
    return np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])


def preconditioner(rows: Rows) -> np.ndarray:
    """A dense (c h, c h) curvature with a wide spectrum, zero where class directions are constant."""
    spread = np.diag(10.0 ** -np.linspace(0, 3, H))
    basis = helmert_basis()
    return np.kron(basis.T @ basis, spread) + rows.damping * np.eye(C * H)


def query_and_truth(rows: Rows, name: str) -> tuple[Query, np.ndarray]:
    """The package's query, and scores (q, n) from written-out vectors, one for each distinct row."""
    method = METHODS[name]
    x, a = rows.query_features, rows.query_residuals
    stacked = np.hstack([*rows.features, *rows.residuals])
    _, first, back = np.unique(stacked, axis=0, return_index=True, return_inverse=True)
    back = back.reshape(-1)
    f = [v[first].astype(np.float64) for v in rows.features]
    g = [flat_gradients(r[first], v[first]) for r, v in zip(rows.residuals, rows.features, strict=True)]
    gq = flat_gradients(a, x)

    def spread(scores: np.ndarray) -> np.ndarray:
        return np.stack([s[back] for s in scores])

    def products(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """One by one, so that nothing depends on a block's shape."""
        return np.stack([(v * one).sum(axis=1) for one in u])

    def cosine(dots: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        below = left[:, None] * right
        return np.divide(dots, below, out=np.zeros_like(dots), where=below > 0)

    norm = np.linalg.norm
    if name.startswith("nn-"):
        query = Query(method, (Term(1.0, x),), norm(x, axis=1))
        if method.metric == "euc":
            return query, spread(-np.stack([norm(f[-1] - one, axis=1) for one in x]))
        dots = products(x, f[-1])
        return query, spread(dots if method.metric == "dot" else cosine(dots, norm(x, axis=1), norm(f[-1], axis=1)))
    if name == "tracin":
        query = Query(method, (Term(0.3, x, a), Term(0.7, x, a)), np.ones(Q))
        return query, spread(0.3 * products(gq, g[0]) + 0.7 * products(gq, g[1]))
    if name == "rep":
        left = np.zeros((Q, C))
        left[:, 1] = -0.02
        query = Query(method, (Term(1.0, x, left, offset=1.0),), np.ones(Q))
        return query, spread(-0.02 * rows.residuals[-1][first][:, 1].astype(np.float64) * (products(x, f[-1]) + 1.0))
    if name in ("gd", "gc"):
        query = Query(method, (Term(1.0, x, a),), norm(gq, axis=1))
        dots = products(gq, g[-1])
        return query, spread(dots if name == "gd" else cosine(dots, norm(gq, axis=1), norm(g[-1], axis=1)))
    dense = preconditioner(rows)
    basis = np.kron(helmert_basis(), np.eye(H))
    curvature = HeadCurvature(np.linalg.cholesky(basis @ dense @ basis.T), C, rows.damping)
    own = curvature.self_influence(rows.residuals[-1], rows.features[-1])
    query = Query(
        method,
        (Term(1.0, None, matrix=curvature.solve(a, x), basis=helmert_basis()),),
        np.sqrt(curvature.self_influence(a, x)),
        own,
    )
    solved = np.linalg.solve(dense, gq.T).T
    dots = products(solved, g[-1])
    if name == "if":
        return query, spread(dots)
    own_query = np.sqrt((solved * gq).sum(axis=1))
    own_rows = np.sqrt((np.linalg.solve(dense, g[-1].T).T * g[-1]).sum(axis=1))
    return query, spread(cosine(dots, own_query, own_rows))


def factors_of(rows: Rows, name: str) -> RowFactors:
    matrices = [RowMatrix([m[: len(m) // 2], m[len(m) // 2 :]]) for m in (*rows.features, *rows.residuals)]
    f, r = matrices[:2], matrices[2:]
    if name == "tracin":
        return RowFactors(tuple(f), tuple(r), rows.live)
    return RowFactors((f[-1],), () if name.startswith("nn-") else (r[-1],), rows.live)


def table_of(factors: RowFactors, folder: Path) -> ScanTable:
    """A scan table as the index writes them: by the norm of eta-weighted concatenated gradients."""
    squares = np.zeros(len(factors.live))
    weights = (1.0,) if len(factors.features) == 1 else (0.3, 0.7)
    for i, weight in enumerate(weights):
        norms = row_norms(factors.features[i])
        if factors.residuals:
            norms = norms * row_norms(factors.residuals[i])
        squares += weight * norms**2
    path = folder / "table.arrow"
    write_scan_table(path, by_falling(np.sqrt(squares), factors.live), list(factors.features), list(factors.residuals))
    return read_scan_table(path)


def brute_force(truth: np.ndarray, live: np.ndarray, k: int, sign: int) -> np.ndarray:
    """Rows by falling sign x score, then by row number: a plain sort."""
    return np.array([sorted(live, key=lambda n: (-sign * scores[n], n))[:k] for scores in truth])


def check(found: Sequence[Ranking], truth: np.ndarray, live: np.ndarray, k: int) -> None:
    for ranking, sign in zip(found, (1, -1), strict=True):
        np.testing.assert_array_equal(ranking.rows, brute_force(truth, live, k, sign))
        assert ranking.exact
        scale = np.abs(truth).max(axis=1, keepdims=True)
        wanted = np.take_along_axis(truth, ranking.rows, axis=1)
        assert (np.abs(ranking.scores - wanted) <= 1e-9 * scale).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SCANNED, *NEIGHBOURS))
@pytest.mark.parametrize("kind", SCENARIOS)
def test_rerank_equals_full_equals_a_sort(kind: str, name: str, tmp_path: Path) -> None:
    rows = scenario(kind)
    query, truth = query_and_truth(rows, name)
    factors = factors_of(rows, name)
    k = min(K, len(rows.live))
    check(search_full(query, factors, k), truth, rows.live, k)
    check(search_scan(query, table_of(factors, tmp_path), factors, k), truth, rows.live, k)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("kind", SCENARIOS)
def test_neighbours_by_flat_faiss_equal_full_equal_a_sort(kind: str, name: str, tmp_path: Path) -> None:
    rows = scenario(kind)
    query, truth = query_and_truth(rows, name)
    factors = factors_of(rows, name)
    k = min(K, len(rows.live))
    metric = METHODS[name].metric
    ann, facts = build_ann(Vectors(factors.features[0], rows.live, metric), metric, "Flat", 0)
    assert facts["factory"] == "Flat"
    check(search_full(query, factors, k), truth, rows.live, k)
    check(search_ann(query, ann, table_of(factors, tmp_path), factors, k, rerank=True), truth, rows.live, k)


@pytest.mark.parametrize("name", SCANNED)
def test_opponents_are_exactly_the_smallest_scores(name: str, tmp_path: Path) -> None:
    rows = scenario("random")
    query, _ = query_and_truth(rows, name)
    factors = factors_of(rows, name)
    everything = factors.all_products(query)
    _, opponents = search_scan(query, table_of(factors, tmp_path), factors, K)
    np.testing.assert_allclose(opponents.scores, np.sort(everything, axis=1)[:, :K], rtol=1e-12)
    assert (np.diff(opponents.scores, axis=1) >= 0).all()


def test_a_table_that_was_asked_before_answers_the_same(tmp_path: Path) -> None:
    """What a table keeps from one question, of other size, shape or kind, must not show in the next."""
    rows = scenario("random")
    for order in ((300, Q), (K, 1), (1, Q), (K, 5)), ((K, 1), (300, 3), (K, Q)):
        tables: dict[str, ScanTable] = {}
        for k, n_queries in order:
            for name in ("gc", "gd", "rif", "gc"):
                query, truth = query_and_truth(rows, name)
                factors = factors_of(rows, name)
                table = tables.setdefault("head", table_of(factors, tmp_path))
                found = search_scan(query.take(np.arange(n_queries)), table, factors, k)
                check(found, truth[:n_queries], rows.live, k)


def visited(scan: Scan, k: int) -> int:
    """Rows whose scores a scan computes."""
    group = group_rows(scan.table, k)
    return min(len(scan._visited(k, group)[0]), len(scan.table))


@pytest.mark.parametrize("name", ["gd", "tracin", "nn-dot", "rep"])
def test_a_scan_over_heavy_tailed_norms_stops_early_and_misses_nothing(name: str, tmp_path: Path) -> None:
    rows = scenario("heavy-tailed norms")
    query, truth = query_and_truth(rows, name)
    factors = factors_of(rows, name)
    table = table_of(factors, tmp_path)
    assert visited(Scan(query, table), K) <= N // 2
    check(search_scan(query, table, factors, K), truth, rows.live, K)


def test_a_scan_over_equal_norms_visits_every_row(tmp_path: Path) -> None:
    rows = scenario("random")
    rows.features = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in rows.features]
    query, _ = query_and_truth(rows, "nn-dot")
    factors = factors_of(rows, "nn-dot")
    assert visited(Scan(query, table_of(factors, tmp_path)), K) == N


def all_products(query: Query, factors: RowFactors) -> np.ndarray:
    """Scores of all rows in the units in which a scan ranks: of distances 2 <q, f> - ||f||^2."""
    scores = factors.all_products(query)
    if query.method.metric != "euc":
        return scores
    assert query.terms[0].right is not None
    return (query.terms[0].right ** 2).sum(axis=1)[:, None] - scores**2


@pytest.mark.parametrize("name", (*SCANNED, *NEIGHBOURS))
def test_every_score_of_a_scan_is_within_its_reach_and_lists_are_short(name: str, tmp_path: Path) -> None:
    """Products in float64 of all rows; a reach that is too small by half is seen, lists would be long if too large."""
    rng = np.random.default_rng(2)
    n, h = 5003, 64
    spread = 0.7 ** np.arange(h)  # a few directions hold nearly all of the length
    rotation = np.linalg.qr(rng.normal(size=(h, h)))[0]
    f = [(rng.normal(size=(n, h)) * spread + 2 * (np.arange(h) == 0)) @ rotation for _ in range(2)]
    rows = Rows(f, [random_residuals(rng, n) for _ in range(2)], np.zeros((1, 1)), np.zeros((1, 1)))
    x, a = f[-1][:Q] + 0.01 * rng.normal(size=(Q, h)), random_residuals(rng, Q)
    rows.query_features, rows.query_residuals = x, a
    rows.features = rows.features[-1:] * 2
    query = plain_query(rows, name)
    factors = factors_of(rows, name)
    table = table_of(factors, tmp_path)
    scan = Scan(query, table)
    values, reach, *_ = scan._visited(K, group_rows(scan.table, K))
    reaches = (reach @ scan._reach).numpy()
    found, order = values.numpy(), table.rows[: len(values)]
    wanted = all_products(query, factors)[:, order].T / scan.scale
    assert (np.abs(found[: len(order)] - wanted) <= reaches[: len(order)]).all()
    for positions in scan.contenders(K, n):
        assert np.median([len(p) for p in positions if p is not None]) <= 4 * K


def plain_query(rows: Rows, name: str) -> Query:
    """Queries of a width that the truth above is not written out for."""
    x, a, method = rows.query_features, rows.query_residuals, METHODS[name]
    norms = np.linalg.norm(x, axis=1) * (1 if name.startswith("nn-") else np.linalg.norm(a, axis=1))
    if name.startswith("nn-"):
        return Query(method, (Term(1.0, x),), norms)
    if name == "tracin":
        return Query(method, (Term(0.3, x, a), Term(0.7, x, a)), norms)
    if name == "rep":
        return Query(method, (Term(1.0, x, a, offset=1.0),), norms)
    if name in ("gd", "gc"):
        return Query(method, (Term(1.0, x, a),), norms)
    basis = helmert_basis()
    reduced = np.einsum("mc,qc->qm", basis, a)
    own = 0.5 + np.random.default_rng(0).random(len(rows.live))
    return Query(method, (Term(1.0, None, matrix=reduced[:, :, None] * x[:, None], basis=basis),), norms, own)


@pytest.mark.parametrize("k", [1, 2])
def test_the_best_of_many_groups_of_rows_are_found(k: int, tmp_path: Path) -> None:
    """So many groups that the k-th best of them is looked for among the best of neighbours."""
    rng = np.random.default_rng(k)
    f, x = rng.normal(size=(5003, H)).astype(np.float32), rng.normal(size=(Q, H))
    query = Query(METHODS["nn-cos"], (Term(1.0, x),), np.linalg.norm(x, axis=1))
    factors = RowFactors((RowMatrix([f]),), (), np.arange(len(f)))
    wide = f.astype(np.float64)
    truth = x @ wide.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(wide, axis=1))
    check(search_scan(query, table_of(factors, tmp_path), factors, k), truth, factors.live, k)


def test_integers_and_floats_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever a CPU is quicker at: sums of products of codes are exact in both."""
    rng = np.random.default_rng(0)
    codes, queries = (torch.from_numpy(rng.integers(-127, 128, shape, np.int8)) for shape in ((300, 96), (96, 10)))
    wanted = codes.numpy().astype(np.int64) @ queries.numpy().astype(np.int64)
    for integers in (True, False):
        monkeypatch.setattr(rounded, "_multiplies_integers", lambda _width, integers=integers: integers)
        found = torch.empty(wanted.shape)
        rounded._multiply(codes, queries, found)
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("n_copies", [5, 41, 200])
def test_exact_duplicates_tie_at_full_width(n_copies: int, tmp_path: Path) -> None:
    """768 products in another order differ in the last bits: equal rows must have equal scores all the same."""
    rng = np.random.default_rng(n_copies)
    n, h = 1003, 768
    kinds = rng.permutation(np.arange(n) // n_copies)
    f = rng.normal(size=(n, h)).astype(np.float32)[kinds]
    r = np.tile(np.float32([[0.25, -0.25]]), (n, 1))
    x = rng.normal(size=(40, h))
    query = Query(METHODS["gd"], (Term(1.0, x, np.tile([[0.5, -0.5]], (40, 1))),), np.ones(40))
    factors = RowFactors((RowMatrix([f]),), (RowMatrix([r]),), np.arange(n))
    first = np.unique(kinds, return_index=True)[1]
    by_kind = np.array([[0.25 * np.dot(one, f[i].astype(np.float64)) for i in first] for one in x])
    table = table_of(factors, tmp_path)
    for k in (7, 10):
        check(search_full(query, factors, k), by_kind[:, kinds], factors.live, k)
        check(search_scan(query, table, factors, k), by_kind[:, kinds], factors.live, k)


def test_identical_rows_rank_by_number_wherever_a_matrix_product_puts_them(tmp_path: Path) -> None:
    """A product's last bits depend on the block's shape and the row's place in it; the ranking must not."""
    rng = np.random.default_rng(0)
    wrong = []
    for n in [*range(2, 40), 501, 1500]:
        for h in (12, 33, 384):
            f = np.tile(rng.normal(size=(1, h)).astype(np.float32), (n, 1))
            r = np.tile(np.float32([[0.3, -0.3]]), (n, 1))
            factors = RowFactors((RowMatrix([f]),), (RowMatrix([r]),), np.arange(n))
            x, a = rng.normal(size=(3, h)), np.tile([[0.7, -0.7]], (3, 1))
            query = Query(METHODS["gd"], (Term(1.0, x, a),), np.ones(3))
            k = min(n, 40)
            found = [search_full(query, factors, k)]
            found.append(search_scan(query, table_of(factors, tmp_path), factors, k))
            if any((ranking.rows != np.arange(k)).any() for pair in found for ranking in pair):
                wrong.append((n, h))
    assert not wrong, f"ties in the wrong order at (rows, width) {wrong}"


def test_the_small_end_of_a_ranking_is_ordered_too(tmp_path: Path) -> None:
    """All scores positive, over 18 orders of magnitude: the opponents are the smallest of them, in order."""
    rng = np.random.default_rng(0)
    n = 600
    f = (np.ones((n, H)) * 10.0 ** rng.uniform(-18, 0, (n, 1))).astype(np.float32)
    r = np.tile(np.float32([[0.5, -0.5]]), (n, 1))
    factors = RowFactors((RowMatrix([f]),), (RowMatrix([r]),), np.arange(n))
    query = Query(METHODS["gd"], (Term(1.0, np.ones((3, H)), np.tile([[0.5, -0.5]], (3, 1))),), np.ones(3))
    truth = np.tile(0.5 * f.astype(np.float64).sum(axis=1), (3, 1))
    check(search_full(query, factors, K), truth, factors.live, K)
    check(search_scan(query, table_of(factors, tmp_path), factors, K), truth, factors.live, K)


@pytest.mark.parametrize("name", ["if", "rif"])
@pytest.mark.parametrize("damping", [1e-3, 1e-8])
def test_ill_conditioned_curvature_misses_nothing(name: str, damping: float, tmp_path: Path) -> None:
    """H^-1 stretches some directions by 1e8: float32 rounding of a product is then large beside the result."""
    rng = np.random.default_rng(3)
    n, h = 4000, 16
    scales = np.array([1.0, *[1e-4] * (h - 1)])
    rotation = np.linalg.qr(rng.normal(size=(h, h)))[0]  # else float32 would round each direction by itself
    f = (rng.normal(size=(n, h)) * scales @ rotation).astype(np.float32)
    sign = np.where(rng.random(n) < 0.5, 1, -1)[:, None]
    r = (sign * np.array([[0.3, -0.3]])).astype(np.float32)
    hessian = f.astype(np.float64).T @ f.astype(np.float64) / n + damping * np.eye(h)
    curvature = HeadCurvature(np.linalg.cholesky(hessian), 2, damping)
    x, a = f[:Q] * 1.5, r[:Q].astype(np.float64)
    own = curvature.self_influence(r, f)
    matrix = curvature.solve(a, x)
    query = Query(
        METHODS[name],
        (Term(1.0, None, matrix=matrix, basis=CROSS_ENTROPY.basis(2)),),
        np.sqrt(curvature.self_influence(a, x)),
        own,
    )
    factors = RowFactors((RowMatrix([f]),), (RowMatrix([r]),), np.arange(n))
    table = table_of(factors, tmp_path)
    scan = Scan(query, table)
    values, reach, *_ = scan._visited(K, group_rows(scan.table, K))
    n_visited = min(len(values), len(table))
    exact = factors.scores(query, np.tile(table.rows[:n_visited], (Q, 1)))
    exact = exact / scan.scale[:, None]
    reaches = (reach @ scan._reach).numpy()[:n_visited]
    assert (np.abs(values.numpy()[:n_visited] - exact.T) <= reaches).all(), "the bound on rounding does not hold"
    for end, sure in zip(search_scan(query, table, factors, K), search_full(query, factors, K), strict=True):
        np.testing.assert_array_equal(end.rows, sure.rows)


def test_a_short_list_is_made_where_its_groups_have_more_rows_than_a_list(tmp_path: Path) -> None:
    """The rows of the groups that are looked at are no list yet: no row may be scored because of them."""
    rng = np.random.default_rng(5)
    f, right = rng.normal(size=(N, H)).astype(np.float32), rng.normal(size=(Q, H))
    query = Query(METHODS["nn-cos"], (Term(1.0, right),), np.linalg.norm(right, axis=1))
    factors = RowFactors((RowMatrix([f]),), (), np.arange(N))
    scan = Scan(query, table_of(factors, tmp_path))
    for end, free in zip(scan.contenders(K, longest := 2 * K), scan.contenders(K, N), strict=True):
        lengths = [len(rows) for rows in free if rows is not None]
        assert max(lengths) <= longest < K * group_rows(scan.table, K), "the case does not crowd its groups"
        for some, every in zip(end, free, strict=True):
            np.testing.assert_array_equal(np.sort(some), np.sort(every))


def test_lists_of_a_block_of_queries_hold_no_more_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that rounding cannot tell apart all would be listed, for every query: these are scored in full."""
    rng = np.random.default_rng(3)
    centre, held = rng.normal(size=H), 64 * K
    f = (centre + 1e-7 * rng.normal(size=(N, H))).astype(np.float32)
    right = centre + 1e-7 * rng.normal(size=(Q, H))
    query = Query(METHODS["nn-cos"], (Term(1.0, right),), np.linalg.norm(right, axis=1))
    factors = RowFactors((RowMatrix([f]),), (), np.arange(N))
    table = table_of(factors, tmp_path)
    assert min(len(one) for one in Scan(query, table).contenders(K, N, (True,))[0] if one is not None) > N / 2
    monkeypatch.setattr(search, "_LISTED", held)
    listed: list[int] = []

    class Counted(Scan):
        def contenders(self, k: int, most: int, ends: Sequence[bool] = (True, False)) -> list[list[np.ndarray | None]]:
            found = super().contenders(k, most, ends)
            listed.extend(sum(len(one) for one in end if one is not None) for end in found)
            return found

    monkeypatch.setattr(search, "Scan", Counted)
    for end, sure in zip(search_scan(query, table, factors, K), search_full(query, factors, K), strict=True):
        np.testing.assert_array_equal(end.rows, sure.rows)
    assert listed and max(listed) <= max(held, 4 * K * Q)


def test_short_queries_far_from_long_rows_find_their_nearest(tmp_path: Path) -> None:
    """||q|| << ||f||: the float32 error of FAISS' distances grows with ||f||^2, not with ||q||^2."""
    rng = np.random.default_rng(0)
    f = rng.normal(size=(20_000, 8))
    f *= 1000 / np.linalg.norm(f, axis=1, keepdims=True)
    f = (f * (1 + 1e-7 * rng.normal(size=(len(f), 1)))).astype(np.float32)
    x = (1e-4 * rng.normal(size=(40, 8))).astype(np.float32).astype(np.float64)
    factors = RowFactors((RowMatrix([f]),), (), np.arange(len(f)))
    query = Query(METHODS["nn-euc"], (Term(1.0, x),), np.linalg.norm(x, axis=1))
    ann, _ = build_ann(Vectors(factors.features[0], factors.live, "euc"), "euc", "Flat", 0)
    found = search_ann(query, ann, table_of(factors, tmp_path), factors, 5, rerank=True)
    for end, sure in zip(found, search_full(query, factors, 5), strict=True):
        np.testing.assert_array_equal(end.rows, sure.rows)


def test_retired_rows_never_appear(tmp_path: Path) -> None:
    rows = scenario("exact duplicates")
    rows.live = np.flatnonzero(np.random.default_rng(0).random(N) < 0.6)
    for name in (*SCANNED, *NEIGHBOURS):
        query, truth = query_and_truth(rows, name)
        factors = factors_of(rows, name)
        table = table_of_live(factors, tmp_path)
        check(search_full(query, factors, K), truth, rows.live, K)
        if name in NEIGHBOURS:
            metric = METHODS[name].metric
            ann, _ = build_ann(Vectors(factors.features[0], rows.live, metric), metric, "Flat", 0)
            check(search_ann(query, ann, table, factors, K, rerank=True), truth, rows.live, K)
        else:
            check(search_scan(query, table, factors, K), truth, rows.live, K)


def table_of_live(factors: RowFactors, folder: Path) -> ScanTable:
    norms = row_norms(factors.features[-1])
    write_scan_table(
        folder / "live.arrow", by_falling(norms, factors.live), list(factors.features), list(factors.residuals)
    )
    return read_scan_table(folder / "live.arrow")


# --- FAISS, exact and quantised ---

N_VECTORS = 1200
FACTORIES = ("Flat", "SQ8", "SQfp16", "PQ8x4fs", "IVF16,Flat", "IVF16,SQ8", "HNSW16")


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    """Vectors around 30 centres, ``(n, 16)`` float32, one of them zero."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(30, 16))[rng.integers(0, 30, N_VECTORS)] + 0.3 * rng.normal(size=(N_VECTORS, 16))
    vectors[17] = 0
    return vectors.astype(np.float32)


def neighbours(vectors: np.ndarray, metric: str, n_queries: int = 30) -> tuple[Query, RowFactors]:
    rng = np.random.default_rng(11)
    x = vectors[rng.integers(0, len(vectors), n_queries)].astype(np.float64) + 0.1 * rng.normal(size=(n_queries, 16))
    factors = RowFactors((RowMatrix([vectors]),), (), np.arange(len(vectors)))
    return Query(METHODS[f"nn-{metric}"], (Term(1.0, x),), np.linalg.norm(x, axis=1)), factors


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cos", "euc"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_faiss_gives_real_rows_exact_scores_and_its_measured_recall(
    factory: str, metric: str, clustered: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann_module, "_CALIBRATION_QUERIES", len(clustered))  # every row chooses settings or states
    asked: list[np.ndarray] = []
    nearest = ann_module._nearest
    monkeypatch.setattr(
        ann_module, "_nearest", lambda v, q, own, *rest: (asked.append(own), nearest(v, q, own, *rest))[1]
    )
    query, factors = neighbours(clustered, metric)
    vectors = Vectors(factors.features[0], factors.live, metric)
    ann, facts = build_ann(vectors, metric, factory, 0)
    write_ann(ann, tmp_path / "x.faiss")
    ann = read_ann(tmp_path / "x.faiss", facts)
    table = table_of(factors, tmp_path)
    everything = factors.all_products(query)
    for k in (1, 10, 333):
        found = search_ann(query, ann, table, factors, k, rerank=True)
        for ranking, sign in zip(found, (1, -1), strict=True):
            assert ((ranking.rows >= 0) & (ranking.rows < len(clustered))).all()
            assert all(len(set(rows)) == k for rows in ranking.rows.tolist())
            exact = np.take_along_axis(everything, ranking.rows, axis=1)
            np.testing.assert_allclose(ranking.scores, exact, rtol=1e-9, atol=1e-12)
            assert (np.diff(sign * ranking.scores, axis=1) <= 0).all()
            if factory == "Flat":
                best = np.sort(sign * everything, axis=1)[:, ::-1][:, :k]
                np.testing.assert_allclose(sign * ranking.scores, best, rtol=1e-9, atol=1e-12)
    values = clustered.astype(np.float64)
    if metric == "cos":
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)
    products = values @ values.T
    scores = products if metric == "cos" else 2 * products - (values**2).sum(axis=1)
    if factory == "Flat":
        assert facts["recall"] == 1.0
        assert "n_stating" not in facts
        return
    choosing, *stating = asked
    assert not set(choosing.tolist()) & set(stating[0].tolist())  # settings are not judged by what chose them
    assert facts["n_stating"] == len(stating[0]) == len(clustered) // 2
    recalls = []
    for sign in (1, -1) if metric == "cos" else (1,):
        signed = sign * scores
        np.fill_diagonal(signed, -np.inf)
        truth = np.argsort(-signed, axis=1)[:, :10]
        _, listed = ann.search(sign * values.astype(np.float32), 10 * ann.widen + 1)
        both = zip(truth[stating[0]].tolist(), listed[stating[0]].tolist(), strict=True)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in both]))
    zero_row = 1 / len(stating[0])  # all of its cosines tie
    assert facts["recall"] == pytest.approx(min(recalls), abs=zero_row + 1e-3)
    assert recalls[0] >= 0.98


@pytest.mark.parametrize("metric", ["cos", "euc"])
def test_faiss_alone_gives_its_own_scores_or_refuses(metric: str, clustered: np.ndarray, tmp_path: Path) -> None:
    query, factors = neighbours(clustered, metric)
    everything = factors.all_products(query)
    vectors = Vectors(factors.features[0], factors.live, metric)
    table = table_of(factors, tmp_path)
    for factory in ("Flat", "SQ8"):
        ann, _ = build_ann(vectors, metric, factory, 0)
        near, far = search_ann(query, ann, table, factors, 10, rerank=False)
        assert not near.exact
        for ranking in (near, far):
            wanted = np.take_along_axis(everything, ranking.rows, axis=1)
            assert np.abs(ranking.scores - wanted).max() <= (1e-5 if factory == "Flat" else 0.2)
    ann, _ = build_ann(vectors, metric, "IVF16,Flat", 0)
    with pytest.raises(Exception, match=f"found fewer than {N_VECTORS - 1} rows"):
        search_ann(query, type(ann)(ann.faiss_index, metric, False, 1, 4), table, factors, N_VECTORS - 1, rerank=False)


def test_an_unknown_factory_is_refused_by_name(clustered: np.ndarray) -> None:
    vectors = Vectors(RowMatrix([clustered]), np.arange(len(clustered)), "cos")
    with pytest.raises(Exception, match=f"ann='Nonsense7' does not work for {N_VECTORS} vectors of width 16"):
        build_ann(vectors, "cos", "Nonsense7", 0)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("factory", ["Flat", "SQ8"])
def test_one_or_two_rows_are_enough(n: int, factory: str, tmp_path: Path) -> None:
    vectors = np.eye(16, dtype=np.float32)[:n]
    query, factors = neighbours(vectors, "cos", 3)
    ann, facts = build_ann(Vectors(factors.features[0], factors.live, "cos"), "cos", factory, 0)
    assert 0 <= facts["recall"] <= 1
    near, _ = search_ann(query, ann, table_of(factors, tmp_path), factors, n, rerank=True)
    assert sorted(near.rows[0]) == list(range(n))


def test_faiss_files_on_a_full_disk_are_refused_not_truncated(
    small_disk: Callable[[int], Path], clustered: np.ndarray
) -> None:
    """FAISS buffers what it writes: an error on closing the file must not pass for success."""
    disk = small_disk(100)
    vectors = Vectors(RowMatrix([clustered[:30]]), np.arange(30), "cos")
    ann, _ = build_ann(vectors, "cos", "Flat", 0)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as handle, pytest.raises(OSError, match="No space"):
        while True:
            handle.write(b"0" * 4096)
    with pytest.raises(Exception, match=r"cannot write .*x\.faiss"):
        write_ann(ann, disk / "x.faiss")
    assert not (disk / "x.faiss").exists()
