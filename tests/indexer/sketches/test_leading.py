"""Whitened sketches from leading directions, against dense numpy in float64: numbers, bounds, and what they are for.

Few directions lead here, so that every part of a gradient is outside of them somewhere.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import labels, make_tiny_model, sentences

from forebear import Retriever
from forebear.indexer.building.build import build_index
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.curvature.ekfac import Ekfac, EkfacBlock
from forebear.indexer.gradients.factors import LayerFactors, OfLastFactors
from forebear.indexer.model.scopes import Block, Scope
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches import leading as leads
from forebear.indexer.sketches import projector as projecting
from forebear.indexer.sketches.estimates import may_be_best
from forebear.indexer.sketches.leading import LeadingEnergies, LeadingProjector, bounds_width
from forebear.indexer.sketches.projector import PlainProjector, SharedProducts, draw_bases, n_principal
from forebear.indexer.sketches.reduction import fit_reduction, scaled
from forebear.indexer.sketches.sketch import Sketches
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.spec import QuerySpec

CPU = torch.device("cpu")
SHAPES = (
    Block("a", "linear", 18, 13),
    Block("b", "linear", 5, 15),
    Block("c", "norm", 16, 1),
    Block("d", "linear", 3, 4),
)
SCOPE = Scope("x", SHAPES)
DAMPING = 0.4
WHOLE = {"scopes": ("head", "top-1"), "sketch_dim": 16, "sketch_bits": 64, "white_bits": 128, "device": "cpu"}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """3 leading and 4 random directions a side in a sketch, 6 whose energies are known."""
    monkeypatch.setattr(projecting, "PRINCIPAL", 3)
    monkeypatch.setattr(projecting, "RANDOM", 4)
    monkeypatch.setattr(leads, "LEADING", 6)


def curvature(seed: int = 0, spread: float = 2.0) -> Ekfac:
    """Random eigenvectors; eigenvalues that fall along both sides, times log-normal numbers."""
    rng, parts = np.random.default_rng(seed), {}
    for b in SHAPES:
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (b.n_out, b.n_in))
        falls = np.outer(np.exp(-np.arange(b.n_out) / 3), np.exp(-np.arange(b.n_in) / 3))
        values = 3 * falls * np.exp(spread * rng.normal(size=falls.shape))
        parts[b.name] = EkfacBlock(b, *(torch.from_numpy(x).float() for x in (left, right, values)))
    return Ekfac(parts, 1)


def projectors(ekfac: Ekfac, damping: float = DAMPING, seed: int = 1) -> tuple[PlainProjector, LeadingProjector]:
    stand_in = torch.nn.Module()
    stand_in.head, stand_in.device = torch.nn.Linear(1, 1), CPU
    plain = PlainProjector(SCOPE, draw_bases(stand_in, SCOPE, ekfac, seed, "mixed"), n_principal("mixed"))
    return plain, LeadingProjector(LeadingEnergies(plain, ekfac), damping)


def random_factors(seed: int, n_rows: int = 7, tokens: int = 3, scale: float = 1.0) -> dict[str, LayerFactors]:
    rng = np.random.default_rng(seed)

    def draw(width: int, size: float) -> torch.Tensor:
        return torch.from_numpy(size * rng.normal(size=(n_rows, tokens, width))).float()

    return {b.name: LayerFactors(draw(b.n_in, 1.0), draw(b.n_out, scale)) for b in SHAPES}


def dense(factors: dict[str, LayerFactors]) -> dict[str, np.ndarray]:
    return {
        name: np.einsum("bto,bti->boi", f.deltas.double().numpy(), f.inputs.double().numpy())
        for name, f in factors.items()
    }


def exact_squares(gradients: dict[str, np.ndarray], ekfac: Ekfac, damping: float) -> np.ndarray:
    """<(H + damping I)^-1 G, G> by one dense matrix a block."""
    out = 0.0
    for name, g in gradients.items():
        part, flat = ekfac.parts[name], g.reshape(len(g), -1)
        basis = np.kron(part.left.double().numpy(), part.right.double().numpy())
        h = (basis * part.eigenvalues.double().numpy().reshape(-1)) @ basis.T
        out = out + (np.linalg.solve(h + damping * np.eye(len(h)), flat.T).T * flat).sum(axis=1)
    return out


def shown(projector, factors: dict[str, LayerFactors]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers ``(b, D)`` and squared norms ``(3, b)`` or ``(b,)`` of a pass over all blocks."""
    n_rows = len(next(iter(factors.values())).inputs)
    numbers, squares = np.full((n_rows, projector.width), np.nan), 0.0
    for name, some in factors.items():
        place, of_block, squares_of_block = projector.project(name, some)
        numbers[:, place] = of_block.numpy()
        squares = squares + squares_of_block.numpy()
    return numbers, squares


def weights_by_loops(plain: PlainProjector, ekfac: Ekfac, pool) -> np.ndarray:
    """(pooled eigenvalue + damping) of every number: random directions stand for all that do not lead."""
    out = []
    for b in SHAPES:
        values = ekfac.parts[b.name].eigenvalues.double().numpy()
        whole = [n <= 7 for n in values.shape]
        members = [
            [[i] for i in range(n)] if is_whole else [*[list(range(3, n))] * 4, [0], [1], [2]]
            for n, is_whole in zip(values.shape, whole, strict=True)
        ]
        out += [pool(values[np.ix_(rows, columns)]) + DAMPING for rows in members[0] for columns in members[1]]
    return np.array(out)


@pytest.mark.parametrize("tokens", [3, 40])  # by products of positions, and by whole gradients
@pytest.mark.parametrize("damping", [1e-3, 0.4, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_squared_lengths_are_within_their_bounds(seed, damping, tokens):
    """Gradients are drawn without regard for the curvature, so the estimates are poor: the bounds must hold."""
    ekfac, factors = curvature(seed), random_factors(seed + 10, tokens=tokens)
    _, projector = projectors(ekfac, damping)
    estimate, least, most = shown(projector, factors)[1]
    exact = exact_squares(dense(factors), ekfac, damping)
    assert (least <= exact * (1 + 1e-6)).all()
    assert (exact <= most * (1 + 1e-6)).all()
    assert ((least <= estimate) & (estimate <= most)).all()
    assert ((most - least) / exact > 1e-3).any() or damping == 30.0


def test_estimates_are_right_where_gradients_are_those_of_the_curvature():
    """Coordinates whose mean squares are the eigenvalues: the estimate has no bias, whatever the bounds are."""
    ekfac, rng = curvature(3), np.random.default_rng(0)
    _, projector = projectors(ekfac)
    factors = {}
    for name, part in ekfac.parts.items():
        n_out, n_in = part.eigenvalues.shape
        rotated = rng.normal(size=(400, n_out, n_in)) * part.eigenvalues.double().sqrt().numpy()
        g = torch.from_numpy(part.left.double().numpy() @ rotated @ part.right.double().numpy().T).float()
        factors[name] = LayerFactors(g, torch.eye(n_out).expand(400, n_out, n_out))  # sum_t e_t g_t^T
    estimate = shown(projector, factors)[1][0]
    exact = exact_squares(dense(factors), ekfac, DAMPING)
    np.testing.assert_allclose(estimate.mean(), exact.mean(), rtol=0.02)
    assert np.corrcoef(estimate, exact)[0, 1] > 0.9


def test_lengths_are_exact_where_all_directions_lead(monkeypatch):
    monkeypatch.setattr(projecting, "PRINCIPAL", 20)
    monkeypatch.setattr(leads, "LEADING", 40)
    ekfac, factors = curvature(), random_factors(1)
    _, projector = projectors(ekfac)
    squares = shown(projector, factors)[1]
    exact = exact_squares(dense(factors), ekfac, DAMPING)
    for values in squares:
        np.testing.assert_allclose(values, exact, rtol=2e-5)
    assert bounds_width(ekfac, DAMPING) < 1e-12


@pytest.mark.parametrize("scale", [1e-24, 1e-18])
def test_confident_rows_keep_their_lengths(scale):
    """Squares of such gradients are no float32."""
    ekfac = curvature()
    _, projector = projectors(ekfac)
    of_size_1, small = (shown(projector, random_factors(2, scale=s))[1] for s in (1.0, scale))
    np.testing.assert_allclose(small / of_size_1, scale**2, rtol=1e-4)


def test_numbers_are_those_of_the_plain_sketch_over_roots_of_eigenvalues():
    ekfac, factors = curvature(), random_factors(4)
    plain, projector = projectors(ekfac)
    weights = weights_by_loops(plain, ekfac, np.mean) ** -0.5
    wanted = shown(plain, factors)[0] * weights
    np.testing.assert_allclose(shown(projector, factors)[0], wanted, rtol=2e-5)
    whole = {name: torch.from_numpy(g).float() for name, g in dense(factors).items()}
    numbers, squares = projector.project_matrix(whole)
    np.testing.assert_allclose(numbers, wanted, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(squares, shown(projector, factors)[1], rtol=2e-5)
    tiny = projector.project_matrix({name: 1e-24 * g for name, g in whole.items()})[1]  # squares are no float32
    np.testing.assert_allclose(tiny, 1e-48 * squares, rtol=1e-4)


def test_squares_bound_the_map_from_whitened_gradients():
    """M M^T is at most diag(squares), seen from H^-1/2 G: else what is made orthonormal by them could be too long."""
    ekfac = curvature()
    plain, projector = projectors(ekfac)
    columns = []
    for b in SHAPES:
        part = ekfac.parts[b.name]
        units = torch.eye(b.size).reshape(b.size, b.n_out, b.n_in) * (part.eigenvalues + DAMPING).sqrt()
        zeros = {o.name: torch.zeros(b.size, o.n_out, o.n_in) for o in SHAPES}
        columns.append(projector.project_matrix(zeros | {b.name: part.left @ units @ part.right.T})[0].double().numpy())
    gram = (matrix := np.concatenate(columns).T) @ matrix.T
    assert np.linalg.eigvalsh(gram / np.sqrt(np.outer(projector.squares, projector.squares))).max() <= 1 + 1e-5
    most = weights_by_loops(plain, ekfac, np.max) / weights_by_loops(plain, ekfac, np.mean)
    np.testing.assert_allclose(projector.squares, most * plain.squares, rtol=1e-5)


def test_dots_of_sketches_estimate_inverse_curvature_products():
    """Over seeds of the random directions; eigenvalues outside of the leading ones are equal, or means would not do."""
    ekfac = curvature()
    for part in ekfac.parts.values():
        part.eigenvalues[3:] = 0.01
        part.eigenvalues[:, 3:] = 0.01
    factors = random_factors(5, n_rows=4)
    g, exact = dense(factors), 0.0
    for name, part in ekfac.parts.items():
        rotated = part.left.double().numpy().T @ g[name] @ part.right.double().numpy()
        white = (rotated / np.sqrt(part.eigenvalues.double().numpy() + DAMPING)).reshape(4, -1)
        exact = exact + white @ white.T
    dots = np.array([(x := shown(projectors(ekfac, seed=seed)[1], factors)[0]) @ x.T for seed in range(400)])
    error = dots.std(axis=0) / 20
    assert (np.abs(dots.mean(axis=0) - exact) <= 5 * error + 1e-4 * exact.max()).all()


def test_dampings_share_what_they_are_made_from(monkeypatch):
    calls = []
    monkeypatch.setattr(SharedProducts, "of", counted(SharedProducts.of, calls))
    ekfac, factors = curvature(), random_factors(6)
    plain, first = projectors(ekfac)
    second = LeadingProjector(first.energies, 2 * DAMPING)
    for name, some in factors.items():
        for projector in (plain, first, second):
            projector.project(name, some)
    assert len(calls) == len(SHAPES)
    alone = projectors(ekfac, 2 * DAMPING)[1]
    for mine, others in zip(shown(second, factors), shown(alone, factors), strict=True):
        np.testing.assert_array_equal(mine, others)


def counted(function, calls: list):
    def wrapped(*args, **how):
        calls.append(args)
        return function(*args, **how)

    return wrapped


def test_what_was_made_of_other_factors_is_not_taken():
    last = OfLastFactors[int]()
    one, other = (LayerFactors(torch.ones(1), torch.ones(1)) for _ in range(2))
    assert [last.get(one, lambda: 1), last.get(one, lambda: 2), last.get(other, lambda: 3)] == [1, 1, 3]
    del other
    assert last._made is None  # nothing is kept of factors that are gone
    assert last.get(LayerFactors(torch.ones(1), torch.ones(1)), lambda: 4) == 4


def test_stored_residuals_take_the_longest_that_a_row_can_be():
    ekfac, factors = curvature(), random_factors(7, n_rows=30)
    plain, projector = projectors(ekfac)
    unit = shown(plain, factors)[0]
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16)
    reduction = fit_reduction(scaled(unit, projector.weights), projector, width=8, bits=24, seed=0)
    collector = Sketches(projector, reduction, 30, CPU)
    collector.begin(list(range(30)))
    for name, some in factors.items():
        collector.on_layer(name, some)
    collector.keep(list(range(30)), *(tensor.numpy() for tensor in collector.end(list(range(30)))))
    rows = collector.rows()
    white = []
    for name, g in dense(factors).items():
        part = ekfac.parts[name]
        rotated = part.left.double().numpy().T @ g @ part.right.double().numpy()
        white.append((rotated / np.sqrt(part.eigenvalues.double().numpy() + DAMPING)).reshape(30, -1))
    white = np.concatenate(white, axis=1)
    held = (rows.coordinates * rows.lengths[:, None]) @ reduction.orthonormaliser.T
    errors = np.abs(white @ white.T - held @ held.T)
    residuals = rows.residual_lengths(reduction)
    assert (errors <= np.outer(residuals, residuals) * (1 + 1e-4)).all()
    stored = rows.columns(reduction)["norm_bounds"]
    lengths = np.linalg.norm(white, axis=1)
    assert stored.dtype == np.float32
    assert ((stored[:, 0] <= lengths) & (lengths <= stored[:, 1])).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_best_are_among_the_rows_that_may_be_best(seed):
    rng = np.random.default_rng(seed)
    products, asked = rng.normal(size=(3, 40)).round(1), rng.random((3, 40)) < 0.8
    least = rng.uniform(0.0, 1.0, size=40)
    most = least + rng.choice([0.0, 0.1, 1.0], size=40)
    lengths = rng.uniform(least, most)
    found = may_be_best(products, asked, least, most, 4)
    cosines = products / lengths
    for scores, mine in zip(cosines, asked, strict=True):
        numbers = np.flatnonzero(mine)
        for end in (scores[numbers], -scores[numbers]):
            assert found[numbers[np.argsort(-end)[:4]]].all()
    exact = may_be_best(products, asked, lengths, lengths, 4)
    assert exact.sum() <= found.sum()
    assert exact.sum() < 35


# ---------------------------------------------------------------- an index


@pytest.fixture(scope="module")
def indexes(tmp_path_factory) -> dict[str, Retriever]:
    """The same rows and model, whitened by leading directions and whole, at a damping that allows both."""
    folder, out = tmp_path_factory.mktemp("leading"), {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((projecting, "PRINCIPAL", 4), (projecting, "RANDOM", 5), (leads, "LEADING", 4)):
            patch.setattr(module, name, value)
        model = choose_model(None, [str(make_tiny_model(folder / "model", n_classes=3))], [1.0]).checkpoints
        for whitening in ("leading", "whole"):
            options = BuildOptions(**WHOLE, whitening=whitening, dampings=("3%", "0.01%"), calibration_queries=9)
            rows = rows_from_texts(sentences(90, seed=5), labels(90, 3))
            out[whitening] = Retriever(build_index(rows, folder / whitening, model, options), device="cpu")
    return out


def test_how_gradients_were_whitened_is_read_not_decided_again(indexes, monkeypatch):
    """A later forebear may decide otherwise."""
    from forebear.indexer.sketches import fitting

    monkeypatch.setattr(fitting, "WIDEST", -1.0)
    monkeypatch.setattr(leads, "LEADING", 4)
    for whitening, retriever in indexes.items():
        index, classifier = retriever.index, retriever.models.classifier()
        name = index.manifest.checkpoints[-1].name
        opened = fitting.open_sketcher(index.fit_folder, classifier, index.manifest.spec, "top-1", name, 0)
        assert isinstance(opened.projector, LeadingProjector) == (whitening == "leading")


def test_an_index_has_bounds_where_its_damping_is_above_most_eigenvalues(indexes):
    index, whole = indexes["leading"].index, indexes["whole"].index
    exact = whole.gradients("top-1", damping=0).norms
    norms, least, most = index.gradients("top-1", damping=0).norms_within(index.live)
    assert ((least <= exact) & (exact <= most)).all()
    assert (least < most).all()
    np.testing.assert_allclose(norms, exact, rtol=0.1)
    assert not np.allclose(norms, exact, rtol=3e-6)
    assert whole.gradients("top-1", damping=0).norm_bounds is None
    assert index.gradients("top-1").norm_bounds is None
    np.testing.assert_allclose(index.gradients("top-1").norms, whole.gradients("top-1").norms, rtol=1e-5)


@pytest.mark.parametrize("choices", [{"exact": "rerank"}, {"exact": "full"}, {"certify": True}])
@pytest.mark.parametrize("damping", ["3%", "0.01%"])
def test_scores_are_exact_whatever_lengths_are_stored(indexes, damping, choices, monkeypatch):
    monkeypatch.setattr(projecting, "PRINCIPAL", 4)
    monkeypatch.setattr(projecting, "RANDOM", 5)
    monkeypatch.setattr(leads, "LEADING", 4)
    queries = sentences(6, seed=77)
    for method in ("if", "rif"):
        how = {"methods": [method], "scope": "top-1", "damping": damping, "top": 5, "candidates": 60} | choices
        tables = {name: retriever.retrieve(queries, **how) for name, retriever in indexes.items()}
        for column in ("row", "score"):
            mine, others = (tables[name][column].to_numpy() for name in ("leading", "whole"))
            if column == "row":
                assert (mine == others).mean() > 0.95  # but for scores that are equal but for rounding
            else:
                np.testing.assert_allclose(mine, others, rtol=2e-4, atol=1e-6)


def test_few_rows_have_their_lengths_solved_for(indexes):
    """Those that may be among the best, not all that are scored."""
    retriever, spec = indexes["leading"], QuerySpec(methods=("rif",), scope="top-1", damping="3%", exact="full", top=1)
    solved = []
    with pytest.MonkeyPatch.context() as patch:
        from forebear.retriever.deep import row_lengths

        original = row_lengths.ekfac_self_influence

        def counting(classifier, scope, ekfac, damping, texts, targets):
            solved.append(len(targets))
            return original(classifier, scope, ekfac, damping, texts, targets)

        patch.setattr(row_lengths, "ekfac_self_influence", counting)
        Retriever(retriever.index, device="cpu").retrieve(sentences(1, seed=78), spec=replace(spec))
    assert sum(solved) < 45
