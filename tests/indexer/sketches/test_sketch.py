"""Sketches, reductions, codes, candidates and the gradient pass against autograd one row at a time and dense numpy.

The oracles load the model themselves, in float64 with eager attention, see one row at a time without padding, and form
whole gradients. Widths are made small here, so that both halves of every basis and every group are put to use.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences

from forebear.errors import NonFiniteError, NotEnoughMemoryError
from forebear.indexer.curvature.ekfac import Ekfac, EkfacBlock, KroneckerFactors, fit_factors
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import Collector, labels_seed, run_pass
from forebear.indexer.gradients.tape import Tape
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import Block, Scope, scope_of
from forebear.indexer.sketches import candidates as estimating
from forebear.indexer.sketches import projector as projecting
from forebear.indexer.sketches.candidates import estimate, propose
from forebear.indexer.sketches.estimates import GradientStore, Part, Proposal
from forebear.indexer.sketches.projector import (
    PlainProjector,
    WhiteProjector,
    draw_bases,
    n_principal,
    read_plain_projector,
    write_bases,
)
from forebear.indexer.sketches.reduction import RawSketches, Reduction, fit_reduction, read_reduction, write_reduction
from forebear.indexer.sketches.sketch import Sketcher, Sketches, SketchRows, sketch_rows
from forebear.indexer.storage.arrow import RowMatrix

TEXTS = sentences(11, seed=21)
LABELS = np.array(labels(11, 3))
KINDS = ("bert", "roberta", "distilbert")
CPU = torch.device("cpu")
SHAPES = (Block("a", "linear", 18, 13), Block("b", "linear", 9, 15), Block("c", "linear", 3, 9))
SHAPED = Scope("x", SHAPES)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """3 leading and 4 random directions a side, 5 groups a side: the tiny model's sides of 16 and 24 do not fit."""
    monkeypatch.setattr(projecting, "PRINCIPAL", 3)
    monkeypatch.setattr(projecting, "RANDOM", 4)
    monkeypatch.setattr(projecting, "POOLED", 5)


# ---------------------------------------------------------------- oracles


class Model:
    """A classifier, and an oracle's own copy of its weights in float64."""

    def __init__(self, folder, kind: str, scale: float = 6.0) -> None:
        path = make_tiny_model(folder / f"{kind}-{scale}", kind, n_classes=3, scale=scale)
        self.classifier = load_classifier(path)
        self.oracle = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        ).eval()

    def blocks(self, scope: str, with_bias: bool) -> tuple[Block, ...]:
        return scope_of(self.classifier, scope, with_bias=with_bias).blocks

    def gradients(self, blocks, texts=TEXTS, wanted=LABELS) -> list[dict[str, np.ndarray]]:
        """G of every block, row by row, laid out as Block says."""
        out = []
        for text, label in zip(texts, wanted, strict=True):
            encoded = self.classifier.tokenizer(text, return_tensors="pt")
            logits = self.oracle(**encoded).logits[0]
            others = torch.cat([logits[: int(label)], logits[int(label) + 1 :]]) - logits[int(label)]
            loss = torch.nn.functional.softplus(torch.logsumexp(others, 0))  # cross-entropy, accurate near 0
            names = [f"{b.name}.{p}" for b in blocks for p in ("weight", "bias") if p == "weight" or has_bias(b)]
            found = torch.autograd.grad(loss, [self.oracle.get_parameter(name) for name in names])
            found = {name: g.numpy() for name, g in zip(names, found, strict=True)}
            row = {}
            for b in blocks:
                weight = found[f"{b.name}.weight"]
                if b.kind == "norm":
                    row[b.name] = np.concatenate([weight, found[f"{b.name}.bias"]])[:, None]
                else:
                    row[b.name] = np.hstack([weight, found[f"{b.name}.bias"][:, None]]) if b.bias else weight
            out.append(row)
        return out


def has_bias(block: Block) -> bool:
    return block.bias or block.kind == "norm"


def norm_of(row: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((g**2).sum() for g in row.values())))


class Raw(Collector):
    """Gathers what a projector says."""

    def __init__(self, projector, n_rows: int) -> None:
        self.scope, self.projector = projector.scope, projector
        self.out, self.squares = np.full((n_rows, projector.width), np.nan), np.full(n_rows, np.nan)

    def begin(self, positions):
        self._out, self._squares = np.zeros((len(positions), self.projector.width)), np.zeros(len(positions))

    def on_layer(self, name, factors):
        place, numbers, squares = self.projector.project(name, factors)
        self._out[:, place] = numbers
        self._squares += squares.numpy()

    def keep(self, positions):
        self.out[positions], self.squares[positions] = self._out, self._squares


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sketch")


@pytest.fixture(scope="module", params=KINDS)
def model(request, folder) -> Model:
    return Model(folder, request.param)


@pytest.fixture(scope="module")
def bert(folder) -> Model:
    return Model(folder, "bert")


def plain_projector(model: Model, scope: str, with_bias: bool, basis: str, seed: int = 1) -> PlainProjector:
    parameters = Scope(scope, model.blocks(scope, with_bias))
    factors = None
    if basis != "random":
        factors = fit_factors(model.classifier, parameters, [TEXTS], seed=0, batch_tokens=100)
    return PlainProjector(
        parameters, draw_bases(model.classifier, parameters, factors, seed, basis), n_principal(basis)
    )


def synthetic_factors(seed: int, n_rows: int = 4, blocks=SHAPES, tokens: int = 3) -> dict[str, LayerFactors]:
    """Random factors with a common part, so that no dot of two rows is near 0."""
    rng = np.random.default_rng(seed)

    def draw(width: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(1, tokens, width)) + 0.7 * rng.normal(size=(n_rows, tokens, width)))

    return {b.name: LayerFactors(draw(b.n_in), draw(b.n_out)) for b in blocks}


def dense(factors: dict[str, LayerFactors]) -> dict[str, np.ndarray]:
    """G by einsum, (b, n_out, n_in)."""
    return {
        name: np.einsum("bto,bti->boi", f.deltas.double().numpy(), f.inputs.double().numpy())
        for name, f in factors.items()
    }


def project_all(projector, factors: dict[str, LayerFactors]) -> tuple[np.ndarray, np.ndarray]:
    out, squares = None, 0.0
    for name, some in factors.items():
        place, numbers, norms = projector.project(name, some)
        out = np.zeros((len(numbers), projector.width)) if out is None else out
        out[:, place] = numbers.numpy()
        squares = squares + norms.numpy()
    return out, squares


def unit_gradients(blocks) -> dict[str, torch.Tensor]:
    """Every unit vector of the scope, (P, n_out, n_in) by block."""
    total = sum(b.size for b in blocks)
    eye, out, start = torch.eye(total, dtype=torch.float64), {}, 0
    for b in blocks:
        out[b.name] = eye[:, start : start + b.size].reshape(total, b.n_out, b.n_in)
        start += b.size
    return out


def flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([g.reshape(len(g), -1) for g in gradients.values()], axis=1)


def synthetic_ekfac(blocks, seed: int = 0, dtype=torch.float64) -> Ekfac:
    """Random eigenvectors, log-normal eigenvalues."""
    rng = np.random.default_rng(seed)
    parts = {}
    for b in blocks:
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (b.n_out, b.n_in))
        values = np.exp(2 * rng.normal(size=(b.n_out, b.n_in)))
        parts[b.name] = EkfacBlock(b, *(torch.from_numpy(x).to(dtype) for x in (left, right, values)))
    return Ekfac(parts, 1)


def damped(part: EkfacBlock, damping: float) -> np.ndarray:
    """H + damping I of a block as one matrix over G's entries row by row."""
    basis = np.kron(part.left.double().numpy(), part.right.double().numpy())
    return (basis * part.eigenvalues.double().numpy().reshape(-1)) @ basis.T + damping * np.eye(len(basis))


# ---------------------------------------------------------------- projectors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("basis", "with_bias"), [("mixed", False), ("mixed", True), ("principal", True), ("random", True)]
)
def test_plain_sketches_are_two_sided_projections_of_autograd_gradients(model, basis, with_bias):
    projector = plain_projector(model, "all", with_bias, basis)
    assert {b.kind for b in projector.scope.blocks} == ({"linear", "norm"} if with_bias else {"linear"})
    rows = model.gradients(projector.scope.blocks)
    wanted = np.array(
        [
            np.concatenate(
                [
                    (b.left.double().numpy() @ row[name] @ b.right.double().numpy().T).reshape(-1)
                    for name, b in projector.bases.items()
                ]
            )
            for row in rows
        ]
    )
    norms = np.array([norm_of(row) for row in rows])
    for batch_tokens in (1, 1000):
        found = Raw(projector, len(TEXTS))
        run_pass(model.classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [found], batch_tokens=batch_tokens)
        assert (np.abs(found.out - wanted).max(axis=1) <= 1e-5 * norms).all()
        np.testing.assert_allclose(np.sqrt(found.squares), norms, rtol=1e-5)
    whole = {b.name: torch.from_numpy(np.stack([row[b.name] for row in rows])).float() for b in projector.scope.blocks}
    assert (np.abs(projector.project_matrix(whole)[0].numpy() - wanted).max(axis=1) <= 1e-5 * norms).all()


@pytest.mark.parametrize("basis", ["mixed", "principal", "random"])
def test_rows_of_the_plain_map_are_orthogonal_and_squares_are_their_squared_lengths(bert, basis):
    projector = plain_projector(bert, "top-1", True, basis)
    units = {name: unit.float() for name, unit in unit_gradients(projector.scope.blocks).items()}
    matrix = projector.project_matrix(units)[0].double().numpy().T
    gram = matrix @ matrix.T
    assert projector.squares.dtype == np.float32
    np.testing.assert_allclose(np.diag(gram), projector.squares, rtol=1e-5)
    lengths = np.sqrt(np.diag(gram))
    assert np.abs(gram / np.outer(lengths, lengths) - np.eye(len(gram))).max() <= 1e-5
    assert (projector.squares >= 1 - 1e-5).all()  # so that whatever is orthonormalised is no longer than the gradient
    assert (projector.squares.max() > 1.5) == (basis != "principal")


def test_leading_directions_are_eigenvectors_of_the_kronecker_factors(bert):
    blocks = bert.blocks("top-1", False)
    scope = Scope("top-1", blocks)
    factors = fit_factors(bert.classifier, scope, [TEXTS], seed=0, batch_tokens=100)
    for basis, n_leads in (("mixed", 3), ("principal", 7)):
        bases = draw_bases(bert.classifier, scope, factors, 0, basis)
        for block in blocks:
            for side, factor in (
                (bases[block.name].left, factors.outputs[block.name]),
                (bases[block.name].right, factors.inputs[block.name]),
            ):
                side = side.double().numpy()
                n = len(side) if len(side) == len(factor) else n_leads  # a side that is kept whole has all of them
                leading, values = side[-n:], np.linalg.eigvalsh(factor.numpy())[::-1][:n]
                held = leading @ factor.numpy() @ leading.T
                assert np.abs(held - np.diag(values)).max() <= 1e-5 * values[0]
                np.testing.assert_allclose(leading @ leading.T, np.eye(n), atol=1e-5)


def test_bases_survive_a_file(bert, tmp_path):
    projector = plain_projector(bert, "top-1", True, "mixed")
    write_bases(tmp_path / "bases.arrow", projector.scope, projector.bases, "mixed")
    again = read_plain_projector(tmp_path / "bases.arrow", "top-1", CPU, torch.float32)
    assert again.scope == projector.scope
    assert (again.squares == projector.squares).all()
    assert all(again.n_leading(name) == projector.n_leading(name) for name in projector.bases)
    for name, basis in projector.bases.items():
        assert torch.equal(again.bases[name].left, basis.left)
        assert torch.equal(again.bases[name].right, basis.right)


def dots_over_seeds(make, factors, n_seeds: int) -> np.ndarray:
    """Dots of the sketches of all pairs of rows, (seeds, n, n)."""
    out = []
    for seed in range(n_seeds):
        found, _ = project_all(make(seed), factors)
        out.append(found @ found.T)
    return np.array(out)


def assert_unbiased(drawn: np.ndarray, exact: np.ndarray) -> None:
    """Within 4 standard errors at every pair of rows, the errors being small enough to tell."""
    spread = drawn.std(axis=0, ddof=1) / np.sqrt(len(drawn))
    lengths = np.sqrt(np.diag(exact))
    assert (spread <= 0.05 * np.outer(lengths, lengths)).all()
    assert (spread > 0).all()
    assert (np.abs(drawn.mean(axis=0) - exact) <= 4 * spread).all()


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["random", "mixed"])
def test_dots_of_plain_sketches_are_unbiased_over_seeds(basis):
    factors = synthetic_factors(0)
    g = flat(dense(factors))
    stand_in = SimpleNamespace(head=torch.nn.Linear(1, 1).double(), device=CPU)
    kronecker = KroneckerFactors(
        {name: torch.einsum("bti,btj->ij", f.inputs, f.inputs) for name, f in factors.items()},
        {name: torch.einsum("bti,btj->ij", f.deltas, f.deltas) for name, f in factors.items()},
    )

    def make(seed: int) -> PlainProjector:
        return PlainProjector(SHAPED, draw_bases(stand_in, SHAPED, kronecker, seed, basis))

    assert_unbiased(dots_over_seeds(make, factors, 600), g @ g.T)


def test_blocks_of_one_shape_have_different_random_directions(bert):
    blocks = bert.blocks("all", False)
    bases = draw_bases(bert.classifier, Scope("all", blocks), None, 0, "random")
    square = [bases[b.name].left for b in blocks if (b.n_out, b.n_in) == (16, 16)]
    assert len(square) > 2
    assert all(not torch.allclose(a, b) for a, b in pairwise(square))


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_squared_norms_of_white_sketches_are_inverse_curvature_products(model, damping):
    blocks = model.blocks("top-1", True)
    ekfac = synthetic_ekfac(blocks, dtype=torch.float32)
    projector = WhiteProjector("top-1", ekfac, damping, seed=3)
    assert projector.scope.blocks == blocks
    found = Raw(projector, len(TEXTS))
    run_pass(model.classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [found], batch_tokens=60)
    rows = model.gradients(blocks)
    wanted = np.zeros(len(TEXTS))
    for block in blocks:
        g = np.stack([row[block.name].reshape(-1) for row in rows])
        wanted += (np.linalg.solve(damped(ekfac.parts[block.name], damping), g.T).T * g).sum(axis=1)
    np.testing.assert_allclose(found.squares, wanted, rtol=1e-4)
    whole = {b.name: torch.from_numpy(np.stack([row[b.name] for row in rows])).float() for b in blocks}
    turned = dict(reversed(whole.items()))  # whoever made the vectors may list the blocks otherwise
    for vectors in (whole, turned):
        sketch, squares = projector.project_matrix(vectors)
        difference = np.abs(sketch.numpy() - found.out).max(axis=1)
        assert (difference <= 1e-4 * np.sqrt(wanted)).all()
        np.testing.assert_allclose(squares, wanted, rtol=1e-4)


@pytest.mark.slow
def test_dots_of_white_sketches_are_unbiased_over_seeds():
    factors, ekfac, damping = synthetic_factors(1), synthetic_ekfac(SHAPES, seed=2), 0.3
    exact = 0.0
    for block in SHAPES:
        g = dense(factors)[block.name].reshape(4, -1)
        exact = exact + g @ np.linalg.solve(damped(ekfac.parts[block.name], damping), g.T)
    drawn = dots_over_seeds(lambda seed: WhiteProjector("x", ekfac, damping, seed), factors, 600)
    assert_unbiased(drawn, exact)


def test_rows_of_the_white_map_are_orthogonal_and_squares_are_their_squared_lengths():
    """Seen from the whitened gradient: unit vectors there are H^1/2 times those in the eigenbasis."""
    ekfac, damping = synthetic_ekfac(SHAPES, seed=4), 0.2
    projector = WhiteProjector("x", ekfac, damping, seed=0)
    units = {}
    for name, e in unit_gradients(SHAPES).items():
        part = ekfac.parts[name]
        units[name] = part.left @ (e * (part.eigenvalues + damping).sqrt()) @ part.right.T
    matrix = projector.project_matrix(units)[0].numpy().T
    assert matrix.shape == (projector.width, sum(b.size for b in SHAPES))
    np.testing.assert_allclose(matrix @ matrix.T, np.diag(projector.squares), atol=1e-9)
    assert (np.abs(matrix) > 0.5).sum() == matrix.shape[1]  # every entry is in one group
    assert projector.squares.max() > 4


def test_confident_rows_keep_their_norms(folder):
    """Gradients of 1e-25, whose squares are no float32."""
    confident = Model(folder, "bert", scale=6.0)
    with torch.no_grad():
        for m in (confident.classifier.model, confident.oracle):
            weight = m.get_parameter("classifier.weight")
            weight.mul_(550.0 / weight.abs().sum(dim=1).mean())
    classifier = confident.classifier
    predicted = forward_of(confident).logits.argmax(axis=1)
    blocks = confident.blocks("top-1", False)
    wanted = np.array([norm_of(row) for row in confident.gradients(blocks, wanted=predicted)])
    assert 1e-34 < wanted.min() < 1e-24  # well within float32, its square is not
    projector = plain_projector(confident, "top-1", False, "random")
    found = Raw(projector, len(TEXTS))
    run_pass(classifier, [TEXTS], labels_seed(CROSS_ENTROPY, predicted), [found], batch_tokens=100)
    np.testing.assert_allclose(np.sqrt(found.squares), wanted, rtol=1e-4)


# ---------------------------------------------------------------- reductions


@pytest.fixture
def reduced():
    """A projector, a reduction fitted on 40 of 60 synthetic rows, their whole gradients and their stored form."""
    stand_in = SimpleNamespace(head=torch.nn.Linear(1, 1), device=CPU)
    projector = PlainProjector(SHAPED, draw_bases(stand_in, SHAPED, None, 0, "random"))
    return projector, *reduce_rows(projector, bits=24)


def reduce_rows(projector, bits: int):
    factors = {
        name: LayerFactors(f.inputs.float(), f.deltas.float()) for name, f in synthetic_factors(5, n_rows=60).items()
    }
    g = flat(dense(factors))
    gathered = RawSketches(projector, 60, CPU)
    show(gathered, factors)
    reduction = fit_reduction(gathered.out[:40], projector, width=8, bits=bits, seed=0)
    rows = Sketches(projector, reduction, 60, CPU)
    show(rows, factors)
    return reduction, g, rows.rows()


def show(collector, factors) -> None:
    """One batch of all rows."""
    at = list(range(len(next(iter(factors.values())).inputs)))
    collector.begin(at)
    for name, some in factors.items():
        collector.on_layer(name, some)
    collector.keep(at, *(tensor.numpy() for tensor in collector.end(at)))


def reduce_raw(reduction: Reduction, raw: np.ndarray) -> list[np.ndarray]:
    """Lengths, coordinates and codes of raw sketches ``(b, D)``."""
    reducer = reduction.on(CPU)
    padded = torch.zeros(len(raw), reducer.width)
    padded[:, : raw.shape[1]] = torch.from_numpy(raw)
    return [values.double().numpy() for values in reducer(padded)]


def explicit_map(projector, reduction) -> np.ndarray:
    """M, (d, P): from whole gradients to coordinates times length."""
    units = {name: unit.float() for name, unit in unit_gradients(SHAPES).items()}
    return reduction.basis.astype(np.float64) @ projector.project_matrix(units)[0].double().numpy().T


def test_coordinates_are_the_explicit_map_of_the_gradient(reduced):
    projector, reduction, g, rows = reduced
    assert reduction.basis.shape == (8, projector.width)
    wanted = g @ explicit_map(projector, reduction).T
    found = rows.coordinates * rows.lengths[:, None]
    assert (np.abs(found - wanted).max(axis=1) <= 1e-5 * rows.lengths).all()
    np.testing.assert_allclose(rows.norms, np.linalg.norm(g, axis=1), rtol=1e-5)
    np.testing.assert_allclose(reduction.basis.astype(np.float64) @ reduction.basis.T, np.eye(8), atol=2e-3)


def test_orthonormalised_coordinates_are_no_longer_than_the_gradient(reduced):
    projector, reduction, g, rows = reduced
    orthonormal = reduction.orthonormaliser @ explicit_map(projector, reduction)
    np.testing.assert_allclose(orthonormal @ orthonormal.T, np.eye(8), atol=1e-5)
    held = np.linalg.norm((rows.coordinates * rows.lengths[:, None]) @ reduction.orthonormaliser.T, axis=1)
    assert (held <= rows.norms * (1 + 1e-5)).all()
    assert (held > 0.1 * rows.norms).all()
    outside = g - g @ orthonormal.T @ orthonormal
    np.testing.assert_allclose(rows.residual_lengths(reduction), np.linalg.norm(outside, axis=1), rtol=1e-4)


def test_residual_and_held_lengths_are_pythagorean(reduced):
    _, reduction, _, rows = reduced
    held = (rows.coordinates.astype(np.float64) * rows.lengths[:, None]) @ reduction.orthonormaliser.T
    total = (held**2).sum(axis=1) + rows.residual_lengths(reduction) ** 2
    np.testing.assert_allclose(total, rows.norms**2, rtol=1e-12)
    stored = rows.columns(reduction)["residual_length"]
    np.testing.assert_allclose(stored, rows.residual_lengths(reduction), rtol=1e-6)


def test_the_basis_is_the_principal_one_of_the_unit_sketches(reduced):
    projector, reduction, _, _ = reduced
    gathered = RawSketches(projector, 60, CPU)
    show(gathered, {n: LayerFactors(f.inputs.float(), f.deltas.float()) for n, f in synthetic_factors(5, 60).items()})
    unit = gathered.out[:40].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-3)
    best = (np.linalg.svd(unit, compute_uv=False)[:8] ** 2).sum()
    assert ((unit @ reduction.basis.T.astype(np.float64)) ** 2).sum() == pytest.approx(best, rel=2e-3)


def test_the_code_is_what_the_coordinates_leave_summed_with_signs(reduced):
    """Any query's code product is linear in the left-over part: 24 sums of disjoint groups with signs +-1."""
    projector, reduction, g, rows = reduced
    units = {name: unit.float() for name, unit in unit_gradients(SHAPES).items()}
    raw = g @ projector.project_matrix(units)[0].double().numpy()
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    basis = reduction.basis.astype(np.float64)
    left = unit - (unit @ basis.T) @ basis
    pool, *_ = np.linalg.lstsq(left, rows.codes.astype(np.float64), rcond=None)
    np.testing.assert_allclose(left @ pool, rows.codes, atol=1e-4)
    # Over many seeds dots of codes are those of what is left.
    drawn = []
    for seed in range(400):
        _, _, codes = reduce_raw(replace(reduction, seed=seed), raw[:4])
        drawn.append(codes @ codes.T)
    drawn, exact = np.array(drawn), left[:4] @ left[:4].T
    spread = drawn.std(axis=0, ddof=1) / 20
    assert (spread <= 0.05).all()
    assert (np.abs(drawn.mean(axis=0) - exact) <= 4 * spread + 1e-3).all()


def test_a_reduction_survives_a_file(reduced, tmp_path):
    _, reduction, _, _ = reduced
    write_reduction(tmp_path / "map.arrow", reduction)
    again = read_reduction(tmp_path / "map.arrow")
    assert (again.basis == reduction.basis).all()
    assert again.basis.dtype == np.float16
    assert (again.squares == reduction.squares).all()
    assert (again.bits, again.seed) == (24, 0)
    raw = np.random.default_rng(0).normal(size=(3, len(reduction.squares)))
    for a, b in zip(reduce_raw(again, raw), reduce_raw(reduction, raw), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_without_a_gradient_are_zero_and_not_nan(reduced):
    projector, reduction, _, _ = reduced
    factors = {
        name: LayerFactors(f.inputs.float(), torch.zeros_like(f.deltas).float())
        for name, f in synthetic_factors(5, n_rows=3).items()
    }
    collector = Sketches(projector, reduction, 3, CPU)
    show(collector, factors)
    columns = collector.rows().columns(reduction)
    for name, values in columns.items():
        assert np.isfinite(values).all(), name
        assert not values.any(), name
    gathered = RawSketches(projector, 3, CPU)
    show(gathered, factors)
    assert not gathered.out.any()


def test_a_sample_without_any_gradient_gives_no_nan_directions(reduced):
    projector, _, _, _ = reduced
    found = fit_reduction(np.zeros((6, projector.width), np.float16), projector, width=4, bits=8, seed=0)
    assert np.isfinite(found.basis).all()


def test_fewer_rows_than_coordinates_give_as_many_directions(reduced):
    projector, _, _, _ = reduced
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(5, projector.width))
    unit[4] = unit[0]
    found = fit_reduction(
        (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16), projector, width=8, bits=0, seed=0
    )
    assert len(found.basis) == 4
    np.testing.assert_allclose(found.basis.astype(np.float64) @ found.basis.T, np.eye(4), atol=2e-3)


def test_no_bits_means_no_code(reduced, tmp_path):
    projector, coded, _, rows = reduced
    reduction, _, plain = reduce_rows(projector, bits=0)
    assert plain.codes.shape == (60, 0)
    np.testing.assert_allclose(plain.coordinates, rows.coordinates, atol=1e-5)
    columns = plain.columns(reduction)
    assert set(coded_names := rows.columns(coded)) - set(columns) == {"code", "code_factor"}
    assert "code" in coded_names
    write_reduction(tmp_path / "map.arrow", reduction)
    assert read_reduction(tmp_path / "map.arrow").bits == 0
    part = Part(1.0, plain, store_of(plain, reduction))
    assert not part.code_products(np.arange(60), np.arange(60)).any()
    every = np.arange(60)
    np.testing.assert_array_equal(
        estimate([part], every, cosine=True, code_weight=1.0), estimate([part], every, cosine=True)
    )


# ---------------------------------------------------------------- what is stored


def store_of(rows: SketchRows, reduction: Reduction, shards: int = 1) -> GradientStore:
    """A store in memory, of several shards."""
    columns = rows.columns(reduction)

    def matrix(name: str) -> RowMatrix:
        return RowMatrix(np.array_split(columns[name], shards))

    coded = "code" in columns
    return GradientStore(
        sketches=matrix("sketch"),
        codes=matrix("code") if coded else None,
        code_factors=columns["code_factor"] if coded else np.zeros(len(rows.norms), np.float32),
        shares=columns["share"],
        lengths=columns["length"],
        norms=columns["norm"],
        residual_lengths=columns["residual_length"],
        reduction=reduction,
    )


def synthetic_rows(n: int, seed: int, *, d: int = 10, bits: int = 32, sigma: float = 1.9) -> SketchRows:
    """Unit vectors of d + bits numbers, split; log-normal lengths."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d + bits)) / np.r_[np.arange(1, d + 1), np.full(bits, 8.0)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths = np.exp(sigma * rng.normal(size=n))
    return SketchRows(vectors[:, :d].astype(np.float32), vectors[:, d:].astype(np.float32), lengths, lengths * 1.5)


def plain_reduction(d: int = 10, bits: int = 32) -> Reduction:
    return Reduction(np.eye(d, 4 * d).astype(np.float16), np.ones(4 * d, np.float32), bits, 0)


def test_columns_hold_coordinates_codes_and_factors(reduced):
    _, reduction, _, rows = reduced
    columns = rows.columns(reduction)
    assert {name: v.dtype for name, v in columns.items() if v.ndim == 2} == {
        "sketch": np.dtype(np.float16), "code": np.dtype(np.uint8),
    }  # fmt: skip
    assert all(v.dtype == np.float32 for v in columns.values() if v.ndim == 1)
    store = store_of(rows, reduction, shards=3)
    shuffled = np.random.default_rng(0).permutation(60)
    coordinates = store.coordinates(shuffled)
    share = np.linalg.norm(rows.coordinates[shuffled].astype(np.float64), axis=1)
    np.testing.assert_allclose(np.linalg.norm(coordinates, axis=1), share, rtol=1e-6)
    error = np.linalg.norm(coordinates - rows.coordinates[shuffled], axis=1)
    assert (error <= 5e-4 * share).all()
    assert store.coordinates(shuffled.reshape(4, 15)).shape == (4, 15, 8)
    signs = np.unpackbits(columns["code"], axis=1)[:, :24].astype(bool)
    np.testing.assert_array_equal(signs, rows.codes > 0)
    c = rows.codes.astype(np.float64)
    np.testing.assert_allclose(columns["code_factor"], (c**2).sum(axis=1) / np.abs(c).sum(axis=1), rtol=1e-6)


def test_code_products_are_factor_times_signs(reduced, monkeypatch):
    monkeypatch.setattr("forebear.indexer.sketches.estimates.CODE_ROWS", 7)
    _, reduction, _, rows = reduced
    part = Part(1.0, rows, store_of(rows, reduction, shards=3))
    which, at = np.array([5, 0, 5]), np.random.default_rng(0).permutation(60)[:31]
    c = rows.codes.astype(np.float64)
    factors = (c**2).sum(axis=1) / np.abs(c).sum(axis=1)
    wanted = (c[which] @ np.where(c > 0, 1.0, -1.0)[at].T) * factors[at]
    np.testing.assert_allclose(part.code_products(which, at), wanted, atol=1e-5)
    # Of a row with itself: the squared length of its code, exactly.
    every = np.arange(60)
    np.testing.assert_allclose(np.diag(part.code_products(every, every)), (c**2).sum(axis=1), rtol=1e-4)


def test_code_products_are_unbiased_over_random_directions():
    """A pair at a fixed angle, turned at random: the mean of the products is the dot."""
    rng, bits, n = np.random.default_rng(0), 64, 4000
    reduction = plain_reduction(bits=bits)
    for cosine in (0.9, 0.3, 0.0, -0.6):
        a, b = rng.normal(size=(2, n, bits))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b -= (a * b).sum(axis=1, keepdims=True) * a
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        asked = 0.5 * (cosine * a + np.sqrt(1 - cosine**2) * b)
        nothing = np.zeros((n, 10), np.float32)
        stored, queries = (SketchRows(nothing, c.astype(np.float32), np.ones(n), np.ones(n)) for c in (a, asked))
        store = store_of(stored, reduction)
        found = np.concatenate(
            [
                np.diag(Part(1.0, queries, store).code_products(np.arange(i, i + 200), np.arange(i, i + 200)))
                for i in range(0, n, 200)
            ]
        )
        spread = found.std(ddof=1) / np.sqrt(n)
        assert spread < 0.002
        assert abs(found.mean() - 0.5 * cosine) <= 4 * spread + 1e-5


# ---------------------------------------------------------------- candidates


def oracle_estimates(parts: list[Part], *, cosine: bool, code_weight: float) -> np.ndarray:
    """What the stored numbers say, in float64, for all rows."""
    total = 0.0
    for part in parts:
        sketches = np.concatenate(part.store.sketches.shards).astype(np.float64)
        sketches /= np.linalg.norm(sketches, axis=1, keepdims=True)
        scores = part.queries.coordinates.astype(np.float64) @ (sketches * part.store.shares[:, None]).T
        if code_weight:
            signs = 2.0 * np.unpackbits(np.concatenate(part.store.codes.shards), axis=1) - 1
            scores += code_weight * (part.queries.codes.astype(np.float64) @ signs.T) * part.store.code_factors
        if not cosine:
            scores *= part.weight * np.outer(part.queries.lengths, part.store.lengths)
        total = total + scores
    return total


def oracle_units(parts: list[Part], *, cosine: bool) -> np.ndarray:
    """Usual errors of the estimates up to a factor: of what both sides' coordinates leave, and of the raw sketches."""
    total = 0.0
    for part in parts:
        left_over = [
            np.sqrt(np.maximum(0, 1 - shares.astype(np.float64) ** 2))
            for shares in (np.sqrt((part.queries.coordinates.astype(np.float64) ** 2).sum(axis=1)), part.store.shares)
        ]
        lengths = 1.0 if cosine else part.weight * np.outer(part.queries.lengths, part.store.lengths)
        total = total + (np.outer(*left_over) + 0.03) * lengths
    return total


def parts_of(n: int, n_parts: int, *, sigma: float = 1.9, shards: int = 3) -> list[Part]:
    reduction = plain_reduction()
    return [
        Part(weight, synthetic_rows(5, 100 + i), store_of(synthetic_rows(n, i, sigma=sigma), reduction, shards))
        for i, weight in enumerate((1.0, 0.3)[:n_parts])
    ]


def assert_best(found, values: np.ndarray, live: np.ndarray, k: int) -> None:
    """Each end holds k different live rows, in order, with the best of ``values`` (q, n)."""
    for (rows, scores), sign in zip(found, (1, -1), strict=True):
        assert rows.shape == scores.shape == (len(values), k)
        for q in range(len(values)):
            scale = np.abs(values[q]).max()
            assert len(set(rows[q].tolist())) == k
            assert set(rows[q].tolist()) <= set(live.tolist())
            best = sign * np.sort(-sign * values[q, live])[:k] * -1
            np.testing.assert_allclose(values[q, rows[q]], best, atol=2e-6 * scale)
            np.testing.assert_allclose(scores[q], best, atol=2e-6 * scale)


@pytest.mark.parametrize(("cosine", "n_parts"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("code_weight", [0.0, 0.6, 1.0])
def test_estimates_and_proposals_equal_brute_force(cosine, n_parts, code_weight, monkeypatch):
    monkeypatch.setattr(estimating, "BLOCK_ROWS", 64)
    parts = parts_of(300, n_parts)
    live = np.setdiff1d(np.arange(300), [0, 7, 299])
    values = oracle_estimates(parts, cosine=cosine, code_weight=code_weight)
    found = estimate(parts, live, cosine=cosine, code_weight=code_weight)
    np.testing.assert_allclose(found, values[:, live], atol=2e-6 * np.abs(values).max())
    for k in (len(live), 10, 1):  # 1024 rows are estimated with the code: here all of them
        assert_best(propose(parts, live, k, Proposal(cosine, code_weight)), values, live, k)


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_stopping_early_finds_the_rows_that_a_whole_scan_finds(n_parts, k, monkeypatch):
    parts, live = parts_of(3000, n_parts, sigma=2.5), np.arange(1, 3000)
    whole = propose(parts, live, k, Proposal(False, 0.0))
    monkeypatch.setattr(estimating, "BLOCK_ROWS", 32)
    seen = []
    plain = estimating.estimate
    monkeypatch.setattr(
        estimating, "estimate", lambda some, rows, **choices: seen.append(rows) or plain(some, rows, **choices)
    )
    early = propose(parts, live, k, Proposal(False, 0.0))
    assert sum(map(len, seen)) < len(live) // 2
    for a, b in zip(early, whole, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_allclose(a[1], b[1], rtol=1e-4)
    assert_best(early, oracle_estimates(parts, cosine=False, code_weight=0.0), live, k)


def test_stopping_early_allows_for_coordinates_a_little_longer_than_one(monkeypatch):
    """fp16 directions are not quite orthonormal: a share may be 1.0004, and a shorter row the better one."""
    monkeypatch.setattr(estimating, "BLOCK_ROWS", 2)
    share = np.array([1.0, 1.0, 1.0004, 1.0004])
    lengths = np.array([1.0, 1.0, 0.9999, 0.9999])
    x = np.zeros((4, 10), np.float32)
    x[:, 0] = share * [1, -1, 1, -1]
    rows = SketchRows(x, np.zeros((4, 32), np.float32), lengths, lengths)
    asked = SketchRows(x[:1], np.zeros((1, 32), np.float32), np.ones(1), np.ones(1))
    part = Part(1.0, asked, store_of(rows, plain_reduction()))
    (high, _), (low, _) = propose([part], np.arange(4), 1, Proposal(False, 0.0))
    assert (high[0, 0], low[0, 0]) == (2, 3)


def duplicates(n: int) -> Part:
    one = synthetic_rows(1, 3)
    rows = SketchRows(*(np.repeat(v, n, axis=0) for v in (one.coordinates, one.codes, one.lengths, one.norms)))
    return Part(1.0, synthetic_rows(2, 4), store_of(rows, plain_reduction()))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("code_weight", [0.0, 1.0])
def test_equal_estimates_of_all_rows_are_listed_by_row_number(cosine, code_weight):
    for rows, _ in propose([duplicates(64)], np.arange(64), 64, Proposal(cosine, code_weight)):
        np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(64), (2, 64)))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("code_weight", [0.0, 1.0])
def test_where_equal_estimates_are_cut_off_the_lower_row_numbers_stay(cosine, code_weight, monkeypatch):
    monkeypatch.setattr(estimating, "BLOCK_ROWS", 16)
    for rows, _ in propose([duplicates(64)], np.arange(64), 6, Proposal(cosine, code_weight)):
        np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(6), (2, 6)))


# ---------------------------------------------------------------- the gradient pass


def forward_of(model: Model, texts=TEXTS, **choices):
    """Features and logits of a pass at the head, under the predicted labels."""
    collector = Raw(plain_projector(model, "head", False, "random"), len(texts))
    return run_pass(
        model.classifier, [texts], labels_seed(CROSS_ENTROPY, None), [collector], **({"batch_tokens": 1000} | choices)
    )


def sketcher_of(model: Model) -> Sketcher:
    projector = plain_projector(model, "top-1", False, "random")
    raw = RawSketches(projector, len(TEXTS), CPU)
    run_pass(model.classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [raw], batch_tokens=100)
    return Sketcher(projector, fit_reduction(raw.out, projector, width=8, bits=16, seed=0))


def too_many_rows(limit: int, fail, monkeypatch) -> list[int]:
    """Batches of more rows than ``limit`` fail after all layers have been shown; sizes of those that were tried."""
    tried: list[int] = []
    record = Tape.record

    def failing(self, rows, seed, on_layer):
        tried.append(len(rows))
        found = record(self, rows, seed, on_layer)
        if len(rows) > limit:
            fail()
        return found

    monkeypatch.setattr(Tape, "record", failing)
    return tried


def raise_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def raise_python():
    raise MemoryError


def exhaust_the_allocator():
    torch.empty(1 << 55)


@pytest.mark.parametrize("fail", [raise_cuda, raise_python, exhaust_the_allocator])
def test_a_batch_that_does_not_fit_is_halved_with_a_warning_and_the_same_results(bert, fail, monkeypatch):
    sketcher = sketcher_of(bert)
    (wanted,), forward = sketch_rows(bert.classifier, [sketcher], [TEXTS], LABELS, batch_tokens=1000)
    tried = too_many_rows(3, fail, monkeypatch)
    warnings, done = [], []
    (found,), again = sketch_rows(
        bert.classifier, [sketcher], [TEXTS], LABELS, batch_tokens=1000, on_rows=done.append, warn=warnings.append
    )
    assert tried[0] == len(TEXTS)
    assert max(tried[len(warnings) :]) <= 3
    assert warnings[0].startswith("11 rows of ")
    assert warnings[0].endswith("word pieces do not fit in memory; going on with 5.")
    assert sum(done) == len(TEXTS)
    for name in ("coordinates", "codes", "lengths", "norms"):
        a, b = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.logits, forward.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.features, forward.features, rtol=1e-4, atol=1e-5)


def test_later_batches_as_large_are_halved_without_a_try(bert, monkeypatch):
    texts = [TEXTS[0]] * 24  # one length: three batches of eight
    n_tokens = len(bert.classifier.tokenizer(TEXTS[0])["input_ids"])
    tried = too_many_rows(4, raise_cuda, monkeypatch)
    warnings = []
    forward_of(bert, texts, batch_tokens=8 * n_tokens, warn=warnings.append)
    assert tried == [8, 4, 4, 4, 4, 4, 4]
    assert len(warnings) == 1


def test_a_row_that_does_not_fit_is_named(bert, monkeypatch):
    sketcher = sketcher_of_shape(bert)
    texts = [*TEXTS[:5], " ".join(["film"] * 20), *TEXTS[5:]]
    record = Tape.record

    def failing(self, rows, seed, on_layer):
        if max(len(row["input_ids"]) for row in rows) == 22:
            raise_cuda()
        return record(self, rows, seed, on_layer)

    monkeypatch.setattr(Tape, "record", failing)
    expected = r"row 1005 \(22 word pieces\) does not fit in the memory of cpu\. .*max_length="
    with pytest.raises(NotEnoughMemoryError, match=expected):
        sketch_rows(bert.classifier, [sketcher], [texts], np.zeros(12, np.int64), batch_tokens=1000, first_row=1000)


def sketcher_of_shape(model: Model) -> Sketcher:
    """Any sketcher, without a pass."""
    projector = plain_projector(model, "top-1", False, "random")
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(12, projector.width))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float16)
    return Sketcher(projector, fit_reduction(unit, projector, width=8, bits=16, seed=0))


def test_other_errors_pass_through(bert, monkeypatch):
    def failing(self, rows, seed, on_layer):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Tape, "record", failing)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        forward_of(bert)


def poison(bad: dict[str, float], model: Model, monkeypatch) -> None:
    """The gradients of some texts become NaN or infinite; their logits stay as they are."""
    record = Tape.record
    ids = {tuple(model.classifier.tokenizer(text)["input_ids"]): value for text, value in bad.items()}

    def poisoned(self, rows, seed, on_layer):
        def with_nan(logits):
            out = seed(logits).copy()
            for i, row in enumerate(rows):
                if tuple(row["input_ids"]) in ids:
                    out[i] = ids[tuple(row["input_ids"])]
            return out

        return record(self, rows, with_nan, on_layer)

    monkeypatch.setattr(Tape, "record", poisoned)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_a_gradient_that_is_not_finite_names_its_row(bert, value, batch_tokens, monkeypatch):
    sketcher = sketcher_of_shape(bert)
    poison({TEXTS[4]: value, TEXTS[6]: value}, bert, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"row 504 is NaN or infinite"):
        sketch_rows(bert.classifier, [sketcher], [TEXTS], LABELS, batch_tokens=batch_tokens, first_row=500)


def test_a_gradient_that_is_not_finite_stops_the_fit_of_a_reduction(bert, monkeypatch):
    projector = plain_projector(bert, "top-1", False, "random")
    poison({TEXTS[4]: np.nan}, bert, monkeypatch)
    raw = RawSketches(projector, len(TEXTS), CPU)
    with pytest.raises(NonFiniteError):
        run_pass(bert.classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [raw], batch_tokens=1000)
        fit_reduction(raw.out, projector, width=8, bits=16, seed=0)


@pytest.mark.parametrize("code_weight", [0.0, 1.0])
@pytest.mark.parametrize(("cosine", "n_parts"), [(False, 1), (False, 2), (True, 1)])
def test_a_margin_lets_uncertain_rows_in_at_both_ends_and_leaves_estimates_alone(
    code_weight, cosine, n_parts, monkeypatch
):
    """The rows are those of largest estimate plus margin, by brute force, also with an early stop."""
    monkeypatch.setattr(estimating, "BLOCK_ROWS", 64)
    parts, live = parts_of(900, n_parts, sigma=2.5), np.arange(1, 900)
    values = oracle_estimates(parts, cosine=cosine, code_weight=code_weight)
    units, how = oracle_units(parts, cosine=cosine), Proposal(cosine, code_weight, 0.2)
    np.testing.assert_allclose(how.units(parts, live), units[:, live], rtol=1e-5)
    own = np.stack([live[q : q + 4] for q in range(len(values))])
    np.testing.assert_allclose(how.units(parts, own), np.take_along_axis(units, own, axis=1), rtol=1e-5)
    for sign, (rows, found) in zip((1, -1), propose(parts, live, 7, how), strict=True):
        for q in range(len(values)):
            wanted = live[np.argsort(-(sign * values[q] + 0.2 * units[q])[live], kind="stable")[:7]]
            np.testing.assert_array_equal(rows[q], wanted)
            np.testing.assert_allclose(found[q], values[q, wanted], atol=1e-5 * np.abs(units[q, wanted]).max())
