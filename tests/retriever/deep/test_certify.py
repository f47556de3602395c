"""Bounds, proofs and calibration over a tiny index with lossy sketches, against float64 autograd and full scores."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, QuerySpec, Retriever, build_index
from forebear.conformal import supported_recall
from forebear.indexer.building import preflight
from forebear.indexer.building.calibration.needed_candidates import RECALLS, needed_shares
from forebear.indexer.model.scopes import scope_blocks
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches import projector as projecting
from forebear.indexer.sketches.estimates import GradientStore, Part
from forebear.indexer.sketches.reduction import Reduction
from forebear.indexer.sketches.sketch import SketchRows
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.deep import certify as certifying
from forebear.retriever.deep.certify import bounds, certify
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.recall import candidates_for, n_candidates, recall_of

N_ROWS = 90
TEXTS = sentences(N_ROWS, seed=3)
LABELS = labels(N_ROWS, 3)
QUERIES = sentences(5, seed=30)
ETAS = [0.1, 0.3]
DEEP = ("gd", "gc", "tracin", "if", "rif")
SCOPES = ("all", "top-1")


class World:
    """A tiny index of two checkpoints."""

    def __init__(self, folder, precision: str = "fp32", **choices) -> None:
        self.models = [str(make_tiny_model(folder / f"m{i}", n_classes=3, seed=i)) for i in range(2)]
        options = BuildOptions(
            **{"scopes": ("head", *SCOPES), "sketch_dim": 8, "sketch_bits": 64, "white_bits": 64, "shard_rows": 32}
            | {"dampings": ("0.1x", "3x"), "calibration_queries": N_ROWS, "precision": precision, "device": "cpu"}
            | choices
        )
        checkpoints = choose_model(None, self.models, ETAS).checkpoints
        self.index = build_index(rows_from_texts(TEXTS, LABELS), folder / "index", checkpoints, options)
        self.retriever = Retriever(self.index, device="cpu")

    def search(self, scope: str, **choices) -> GradientSearch:
        return GradientSearch(self.retriever.models, scope, QuerySpec(**choices).curvature_spec)

    def asked(self) -> Queries:
        """The queries, label 1."""
        return Queries([QUERIES], np.ones(len(QUERIES), np.int64))


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    """Few directions and groups a side, so that the tiny model's sketches lose much; the same when it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projecting, "PRINCIPAL", 4)
        patch.setattr(projecting, "RANDOM", 3)
        patch.setattr(projecting, "POOLED", 6)
        yield


@pytest.fixture(scope="module")
def world(_narrow, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("certify"))


@pytest.fixture
def _small_rounds(monkeypatch):
    monkeypatch.setattr(certifying, "_ROUND_ROWS", 3)


def autograd_scores(world: World, scope: str, method: str) -> np.ndarray:
    """``gd``, ``gc`` or ``tracin`` of all rows in float64, one row at a time; queries have label 1."""
    total = 0.0
    for path, eta in zip(world.models, ETAS, strict=True):
        if method != "tracin" and path != world.models[-1]:
            continue
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        weights = [model.get_submodule(b.name).weight for b in scope_blocks(model, "classifier", scope)]

        def gradients(texts, wanted, model=model, tokenizer=tokenizer, weights=weights) -> np.ndarray:
            out = []
            for text, label in zip(texts, wanted, strict=True):
                logits = model(**tokenizer(text, return_tensors="pt")).logits
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
                out.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).numpy())
            return np.stack(out)

        q, n = gradients(QUERIES, [1] * len(QUERIES)), gradients(TEXTS, LABELS)
        scores = q @ n.T
        if method == "gc":
            scores /= np.outer(np.linalg.norm(q, axis=1), np.linalg.norm(n, axis=1))
        total = total + (eta if method == "tracin" else 1.0) * scores
    return total


# ---------------------------------------------------------------- bounds


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", DEEP)
def test_bounds_contain_the_exact_score_of_every_pair(world, scope, method):
    cosine = METHODS[method].metric == "cos"
    choices = [{}, {"damping": "3x"}, {"curvature": "identity"}] if method in ("if", "rif") else [{}]
    for some in choices:
        exact = world.retriever.scores(QUERIES, method, scope=scope, target="LABEL_1", **some)
        parts = world.search(scope, **some).candidates.parts([METHODS[method]], world.asked())[method]
        centre, slack = bounds(parts, world.index.live, cosine=cosine)
        assert centre.shape == slack.shape == exact.shape == (len(QUERIES), N_ROWS)
        assert (np.abs(exact - centre) <= slack).all()
        # Lossy, yet they say more than Cauchy and Schwarz do.
        trivial = np.ones_like(slack)
        if not cosine:
            trivial = sum(p.weight * np.outer(p.queries.norms, p.store.norms) for p in parts)
        assert np.median(slack / trivial) < 0.97
        assert np.median(parts[-1].store.residual_lengths / parts[-1].store.norms) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["gd", "gc", "tracin"])
def test_bounds_contain_the_scores_of_float64_autograd(world, scope, method):
    exact = autograd_scores(world, scope, method)
    parts = world.search(scope).candidates.parts([METHODS[method]], world.asked())[method]
    centre, slack = bounds(parts, world.index.live, cosine=METHODS[method].metric == "cos")
    assert (np.abs(exact - centre) <= slack).all()


def synthetic_part(g_queries: np.ndarray, g_rows: np.ndarray, basis: np.ndarray, squares: np.ndarray) -> Part:
    """Sketches of whole gradients whose raw map scales entry i by sqrt(squares_i)."""
    reduction = Reduction(basis.astype(np.float16), squares.astype(np.float32), 0, 0)

    def sketch(g: np.ndarray) -> SketchRows:
        """In float32, as the pass does."""
        g = g.astype(np.float32)
        raw = g * np.sqrt(squares).astype(np.float32)
        lengths, norms = (np.linalg.norm(v.astype(np.float64), axis=1) for v in (raw, g))
        unit = raw / np.where(lengths > 0, lengths, 1).astype(np.float32)[:, None]
        x = unit @ reduction.basis.astype(np.float32).T
        return SketchRows(x, np.zeros((len(g), 0), np.float32), lengths, norms)

    columns = sketch(g_rows).columns(reduction)
    store = GradientStore(
        RowMatrix([columns["sketch"]]), None, np.zeros(len(g_rows), np.float32), columns["share"], columns["length"],
        columns["norm"], columns["residual_length"], reduction,
    )  # fmt: skip
    return Part(1.0, sketch(g_queries), store)


def unfriendly(rng: np.random.Generator, n: int, kind: str, basis: np.ndarray) -> np.ndarray:
    """Gradients whose coordinates fp16 rounds badly, of lengths from 1e-12 to 1e6."""
    width = basis.shape[1]
    if kind == "dominated":  # one direction holds nearly all
        g = basis[0] + 1e-3 * rng.normal(size=(n, width))
    elif kind == "tiny coordinates":  # most coordinates are below fp16's smallest number
        g = np.abs(rng.normal(size=(n, 1))) * basis[0] + (10.0 ** -np.arange(1, len(basis) + 1)) @ basis
        g = g + 1e-9 * rng.normal(size=(n, width))
    elif kind == "nearly held":  # what is outside is about the square root of float32's rounding
        g = rng.normal(size=(n, len(basis))) @ basis
        g = g / np.linalg.norm(g, axis=1, keepdims=True) + 1e-5 * rng.normal(size=(n, width))
    elif kind == "held":  # nothing is outside of the coordinates
        g = rng.normal(size=(n, len(basis))) @ basis
    elif kind == "outside":  # nearly everything is
        g = rng.normal(size=(n, width))
        g = g - (g @ basis.T) @ basis + 1e-6 * (rng.normal(size=(n, len(basis))) @ basis)
    else:
        raise AssertionError(kind)
    return g / np.linalg.norm(g, axis=1, keepdims=True) * 10.0 ** rng.uniform(-12, 6, size=(n, 1))


KINDS = ("dominated", "tiny coordinates", "held", "nearly held", "outside")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("asked", KINDS)
@pytest.mark.parametrize("stored", KINDS)
def test_bounds_contain_the_scores_of_rows_that_fp16_rounds_badly(stored, asked, scaled):
    rng = np.random.default_rng(0)
    width, d = 60, 8
    squares = rng.uniform(1, 40, size=width) if scaled else np.ones(width)
    basis = np.linalg.qr(rng.normal(size=(width, d)))[0].T
    # Directions of the gradient that the coordinates hold.
    held = np.linalg.qr((basis.astype(np.float16).astype(np.float64) * np.sqrt(squares)).T)[0].T
    g_rows, g_queries = unfriendly(rng, 200, stored, held), unfriendly(rng, 6, asked, held)
    part = synthetic_part(g_queries, g_rows, basis, squares)
    dots = g_queries @ g_rows.T
    norms = np.outer(np.linalg.norm(g_queries, axis=1), np.linalg.norm(g_rows, axis=1))
    for exact, cosine in ((dots, False), (dots / norms, True)):
        centre, slack = bounds([part], np.arange(200), cosine=cosine)
        assert np.isfinite(centre).all()
        assert np.isfinite(slack).all()
        rounding = 1e-6 * (1 if cosine else norms)  # of the exact scores, which are float32
        excess = (np.abs(exact - centre) - slack - rounding) / (1 if cosine else norms)
        assert excess.max() <= 0, (
            f"{(excess > 0).mean():.1%} of the pairs are out of bounds, by up to {excess.max():.1e}"
        )


@pytest.mark.parametrize(("estimate", "least", "most"), [(0.8, 0.79, 1.05), (1.25, 0.95, 1.26), (1.0, 0.0, 1.3)])
def test_bounds_contain_cosines_of_lengths_that_are_known_within_bounds(estimate, least, most):
    """Also where a length is far above its estimate, which is near its least, and the other way round."""
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(20, 6)))[0].T
    g_rows, g_queries = rng.normal(size=(300, 20)), rng.normal(size=(5, 20))
    g_rows[:60] = -g_queries[0] + 0.05 * rng.normal(size=(60, 20))  # cosines near -1
    part = synthetic_part(g_queries, g_rows, basis, np.ones(20))
    lengths = np.linalg.norm(g_rows, axis=1)
    held = lengths**2 - part.store.residual_lengths.astype(np.float64) ** 2
    store = replace(
        part.store,
        norms=(estimate * lengths).astype(np.float32),
        norm_bounds=RowMatrix([np.stack([least * lengths, most * lengths], axis=1).astype(np.float32)]),
        residual_lengths=np.sqrt((most * lengths) ** 2 - held).astype(np.float32),
    )
    centre, slack = bounds([replace(part, store=store)], np.arange(300), cosine=True)
    exact = g_queries @ g_rows.T / np.outer(np.linalg.norm(g_queries, axis=1), lengths)
    assert (np.abs(exact - centre) <= slack + 1e-6).all()


def test_bounds_of_rows_without_a_gradient_are_zero():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(20, 4)))[0].T
    g = rng.normal(size=(5, 20))
    g[3] = 0
    part = synthetic_part(g[:2], g, basis, np.ones(20))
    for cosine in (False, True):
        centre, slack = bounds([part], np.array([3]), cosine=cosine)
        assert not centre.any()
        assert not slack.any()


# ---------------------------------------------------------------- proofs


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("candidates", [4, 40])
def test_proven_answers_are_the_full_ones(world, scope, candidates, _small_rounds):
    ask = {"methods": DEEP, "top": 4, "scope": scope}
    full = world.retriever.retrieve(QUERIES, exact="full", **ask)
    found = world.retriever.retrieve(QUERIES, certify=True, candidates=candidates, **ask)
    assert {"proven", "rows_scored"} <= set(found.column_names)
    assert not {"proven", "rows_scored"} & set(full.column_names)
    assert all(found["proven"].to_pylist())  # as many rows are scored as it takes
    assert found["row"].to_pylist() == full["row"].to_pylist()
    np.testing.assert_allclose(found["score"].to_numpy(), full["score"].to_numpy(), rtol=1e-4, atol=1e-6)
    assert all(found["exact"].to_pylist())
    scored = found["rows_scored"].to_numpy()
    assert ((scored >= 4) & (scored <= N_ROWS)).all()
    gd = scored[np.array(found["method"].to_pylist()) == "gd"]
    assert gd.max() < N_ROWS  # not for want of rows


def test_without_a_request_nothing_is_said_of_proofs(world):
    table = world.retriever.retrieve(QUERIES, methods=["gd"], scope="all", top=3)
    assert not {"proven", "rows_scored"} & set(table.column_names)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gd", "gc", "rif"])
def test_where_rows_may_not_be_scored_there_is_no_proof_and_every_proof_is_right(world, method, _small_rounds):
    search, asked, k = world.search("all"), world.asked(), 4
    chosen = METHODS[method]
    (full,) = search.search([chosen], asked, k, exact="full", n_candidates={}).values()
    shares = []
    for max_rows in (1, 20, 40, 60, 80, N_ROWS):
        (found,) = search.search([chosen], asked, k, exact="rerank", n_candidates={method: k}).values()
        listed = len(np.unique(np.concatenate([end.rows for end in found])))
        ends = certify(search, chosen, asked, found, max_rows=max_rows)
        for end, true in zip(ends, full, strict=True):
            assert end.proven.shape == end.n_scored.shape == (len(QUERIES),)
            assert (end.n_scored <= max(max_rows, listed)).all()
            assert (end.n_scored >= listed).all()
            np.testing.assert_array_equal(end.rows[end.proven], true.rows[end.proven])
            np.testing.assert_allclose(end.scores[end.proven], true.scores[end.proven], rtol=1e-4)
        shares.append(np.mean([end.proven for end in ends]))
    assert shares[0] < 1
    assert shares[-1] == 1
    assert all(a <= b for a, b in pairwise(shares))


def test_a_wrong_list_of_candidates_is_put_right(world, _small_rounds):
    """The proof starts from any rows at all, here from the worst."""
    search, asked, k = world.search("all"), world.asked(), 4
    (full,) = search.search([METHODS["gd"]], asked, k, exact="full", n_candidates={}).values()
    ends = certify(search, METHODS["gd"], asked, full[::-1], max_rows=N_ROWS)
    for end, true in zip(ends, full, strict=True):
        assert end.proven.all()
        np.testing.assert_array_equal(end.rows, true.rows)


@pytest.mark.parametrize("solver", ["cg", "cg-hessian", "lissa"])
def test_proofs_are_refused_under_solvers_that_iterate_before_any_work(world, solver, monkeypatch):
    ask = {"scope": "all", "certify": True, "curvature": solver, "top": 2}
    with pytest.raises(
        InputError, match=f'certify=True bounds scores under curvature="ekfac" or identity, not {solver}'
    ):
        # The others need no curvature, and are refused with it.
        world.retriever.retrieve(QUERIES[:1], methods=["gd", "if"], curvature_rows=8, lissa="han20,depth=2", **ask)
    assert all(world.retriever.retrieve(QUERIES[:1], methods=["gd"], **ask)["proven"].to_pylist())

    def no_work(*_args, **_choices):
        raise AssertionError("rows were scored before the refusal")

    monkeypatch.setattr(GradientSearch, "search", no_work)
    with pytest.raises(InputError, match="certify=True"):
        world.retriever.retrieve(QUERIES[:1], methods=["rif"], **ask)


def test_proofs_are_refused_for_an_index_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "has_half_products", lambda _device: True)
    rough = World(tmp_path, precision="bf16", scopes=("head", "top-1"), curvature="none", calibration_queries=0)
    assert rough.index.manifest.spec.precision == "bf16"
    with pytest.raises(InputError, match=r'^certify=True needs an index built with precision="fp32"\.$'):
        rough.retriever.retrieve(QUERIES[:1], methods=["gd"], scope="top-1", certify=True, top=2)


@pytest.mark.parametrize("exact", ["none", "full"])
def test_proofs_are_refused_where_nothing_is_re_ranked(world, exact):
    with pytest.raises(InputError, match=f'certify=True proves what exact="rerank" finds.* {exact}'):
        world.retriever.retrieve(QUERIES[:1], methods=["gd"], scope="all", certify=True, exact=exact)


# ---------------------------------------------------------------- calibration


def test_calibration_says_for_each_method_how_many_candidates_a_recall_takes(world):
    for scope in SCOPES:
        facts = world.index.manifest.calibration[scope]
        assert (facts["n_queries"], facts["n_rows"]) == (N_ROWS, N_ROWS)
        assert set(facts["methods"]) == {"gd", "gc", "if", "rif"}
        for name, found in facts["methods"].items():
            assert 0 <= found["code_weight"] <= 1
            how = world.index.proposal(scope, name, cosine=name in ("gc", "rif"))
            assert (how.code_weight, how.margin) == (found["code_weight"], found["margin"])
            assert how.margin == 0 or name in ("gd", "if") or "errors" in found
            assert (found["n_choosing"], found["n_stating"], found["top"]) == (30, 60, 10)
            assert found["supported"] == supported_recall(60)
            assert list(found["candidates"]) == [*map(str, RECALLS[:-1]), str(60 / 61)]
            shares = list(found["candidates"].values())
            assert all(a <= b for a, b in pairwise(shares))
            assert 0 < shares[0] < shares[-1] <= 1
    assert world.index.calibrated("all", "tracin") is None
    assert "head" not in world.index.manifest.calibration


@pytest.mark.parametrize("method", ["gd", "gc", "if", "rif"])
def test_a_question_takes_as_many_candidates_as_its_recall(world, method):
    calibrated = world.index.calibrated("all", method)
    chosen, found = METHODS[method], calibrated["candidates"]
    if "errors" in calibrated:  # all candidates of a list are scored at most
        found = dict.fromkeys(found, calibrated["list_share"])

    def n(**choices) -> int:
        return n_candidates(world.retriever.resolve(QuerySpec(methods=(method,), scope="all", **choices)), chosen)

    def listed(share: float) -> int:  # where both ends would be as many as all rows, all are scored
        number = round(share * N_ROWS)
        return N_ROWS if 2 * number >= N_ROWS and "errors" not in calibrated else number

    for recall in RECALLS[:-1]:
        assert n(recall=recall, top=1) == listed(found[str(recall)])
    assert n(recall=0.91, top=1) == n(recall=0.95, top=1)
    assert n(recall=1.0, top=1) == N_ROWS
    assert n(recall=0.995, top=1) == N_ROWS  # not supported: at least the default number, here all of them
    assert n(recall=0.8, top=80) == (80 if "errors" in calibrated else N_ROWS)
    assert n(recall=0.8, candidates=33) == 33
    numbers = [n(recall=recall) for recall in (0.5, *RECALLS, 1.0)]
    assert numbers == sorted(numbers)


def test_without_calibration_there_is_a_default(world, monkeypatch):
    question = world.retriever.resolve(QuerySpec(methods=("tracin",), scope="all"))
    assert n_candidates(question, METHODS["tracin"]) == N_ROWS  # no more than twice 100
    monkeypatch.setattr("forebear.retriever.question.recall.DEFAULT_CANDIDATES", 20)
    assert n_candidates(question, METHODS["tracin"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gd", "gc", "if", "rif"])
@pytest.mark.parametrize("recall", [0.8, 0.95])
def test_calibrated_candidates_hold_that_share_of_the_exact_top_ten(world, method, recall):
    """All training rows were the queries and all were sampled: of those that stated the recall it holds, and of nearly
    as many of all. Own rows do not count."""
    spec = QuerySpec(methods=(method,), scope="all", recall=recall, top=1)
    n = n_candidates(world.retriever.resolve(spec), METHODS[method])
    exact = world.retriever.scores(TEXTS, method, scope="all")
    # Every row that is a candidate, with its exact score: as many results as candidates, one more for the own row.
    table = world.retriever.retrieve(TEXTS, methods=[method], scope="all", exact="none", top=n + 1)
    rows = table["row"].to_numpy().reshape(N_ROWS, 2, n + 1)
    for side, sign in enumerate((1, -1)):
        hits = 0
        for q in range(N_ROWS):
            order = np.argsort(-sign * exact[q], kind="stable")
            best = order[order != q][:10]
            hits += len(set(best.tolist()) & set(rows[q, side].tolist()))
        assert hits / (10 * N_ROWS) >= recall - 0.02


def test_results_state_the_calibrated_recall(world):
    import json

    def facts(**choices):
        table = world.retriever.retrieve(QUERIES[:1], methods=["gd"], scope="all", top=1, **choices)
        return json.loads(table.schema.metadata[b"forebear"])["methods"]["gd"]

    found = facts(recall=0.9)
    assert found["recall"] == 0.9
    assert found["candidates"] == n_candidates(
        world.retriever.resolve(QuerySpec(methods=("gd",), scope="all", recall=0.9, top=1)), METHODS["gd"]
    )
    assert facts(recall=1.0)["recall"] == 1.0
    assert facts(candidates=1)["recall"] is None
    assert facts(exact="full")["recall"] == 1.0


def test_shares_are_the_ranks_of_the_sample_best_rows_among_all_live_rows():
    live = np.array([2, 3, 5, 7, 11])
    sample = np.array([3, 5, 11])
    queries = np.array([5, 7])
    scores = np.array([[9.0, np.nan, 1.0], [2.0, 3.0, 8.0]])  # of the sample; its own row does not count
    estimates = np.array(
        [
            [0.9, 0.5, 99.0, 0.1, 0.7],  # row 5 is the query; rows 2 and 11 stand above row 3
            [0.4, 0.3, 0.3, 99.0, 0.2],  # row 7 is the query; row 11 is last but for it
        ]
    )
    at, own = np.searchsorted(live, sample), live == queries[:, None]
    np.testing.assert_allclose(needed_shares(scores, estimates, at, own, 1), [[3 / 5], [4 / 5]])
    # Second best: row 11 (behind row 2), and row 5, which ties with row 3 behind row 2.
    two = needed_shares(scores, estimates, at, own, 2)
    np.testing.assert_allclose(two, [[3 / 5, 2 / 5], [4 / 5, 3 / 5]])


def test_candidates_for_and_recall_of_are_inverse():
    shares = {"0.8": 0.01, "0.9": 0.021, "0.98": 0.3}
    assert candidates_for(shares, 0.5, 1000) == 10
    assert candidates_for(shares, 0.8, 1000) == 10
    assert candidates_for(shares, 0.81, 1000) == 21
    assert candidates_for(shares, 0.98, 1000) == 300
    assert candidates_for(shares, 0.981, 1000) == 300  # the largest that is supported
    assert candidates_for(shares, 1.0, 1000) == 1000
    assert candidates_for(shares, 0.9, 10) == 1
    assert candidates_for({"0.9": 1.0}, 0.9, 7) == 7
    assert recall_of(shares, 9, 1000) is None
    assert recall_of(shares, 10, 1000) == 0.8
    assert recall_of(shares, 20, 1000) == 0.8
    assert recall_of(shares, 21, 1000) == 0.9
    assert recall_of(shares, 999, 1000) == 0.98
    assert recall_of(shares, 999, 1000, at_most=0.95) == 0.95
    assert recall_of(shares, 1000, 1000, at_most=0.95) == 1.0
    for recall in (0.8, 0.9, 0.98):
        assert recall_of(shares, candidates_for(shares, recall, 1000), 1000) == recall


def test_candidates_for_is_not_fooled_by_the_order_of_recalls():
    """Manifests sort their keys as text."""
    assert candidates_for({"0.98": 0.3, "0.8": 0.01, "0.9": 0.021}, 0.85, 100) == 3


# ---------------------------------------------------------------- many test rows


@pytest.mark.parametrize("exact", ["none", "rerank", "full"])
def test_test_rows_whose_gradients_do_not_fit_together_get_the_same_answers(world, exact, monkeypatch):
    """Their sketches come from a pass then, not from whole gradients, which round otherwise."""
    from forebear.retriever.deep import search as searching

    methods = [METHODS[name] for name in ("gd", "gc", "tracin", "if", "rif")]
    choices = {"exact": exact, "n_candidates": {method.name: 12 for method in methods}}
    together = world.search("all").search(methods, world.asked(), 5, **choices)
    monkeypatch.setattr(searching, "VECTOR_BYTES", 1)
    monkeypatch.setattr(searching, "QUERIES_OF_A_SCAN", 4)
    search = world.search("all")
    assert len(search.chunks(methods, len(QUERIES))) == len(QUERIES)
    one_by_one = search.search(methods, world.asked(), 5, **choices)
    for name, ends in together.items():
        for a, b in zip(ends, one_by_one[name], strict=True):
            np.testing.assert_allclose(b.scores, a.scores, rtol=2e-4, atol=1e-5 * np.abs(a.scores).max())
            assert (a.rows == b.rows).mean() >= 0.9  # nearly equal estimates may change places


def test_stored_sketches_are_read_once_for_many_test_rows(world, monkeypatch):
    from forebear.indexer.sketches.estimates import GradientStore
    from forebear.retriever.deep import search as searching

    monkeypatch.setattr(searching, "VECTOR_BYTES", 1)  # a test row at a time
    read, coordinates = [], GradientStore.coordinates
    monkeypatch.setattr(
        GradientStore, "coordinates", lambda store, rows: read.append(len(rows)) or coordinates(store, rows)
    )
    for method in ("gc", "rif"):
        read.clear()
        world.search("all").search([METHODS[method]], world.asked(), 5, exact="rerank", n_candidates={method: 12})
        assert read == [N_ROWS]
