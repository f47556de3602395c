"""Curvature products, solvers and EK-FAC against dense matrices in float64 that share no code with the package.

The dense Gauss-Newton matrix and Hessian come from plain autograd of the logits of one row at a time, with eager
attention, no padding and no hooks; the Kronecker factors from layers that remember what went through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product as all_of
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences

from forebear.errors import CorruptIndexError, InputError, NonFiniteError
from forebear.indexer.curvature.ekfac import Ekfac, fit_ekfac, read_ekfac, write_ekfac
from forebear.indexer.curvature.products import GaussNewton, HessianProduct
from forebear.indexer.curvature.solvers import HAN20, PEZ21, LissaSettings, conjugate_gradients, lissa
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import make_classifier
from forebear.indexer.model.scopes import Block, Scope, scope_of
from forebear.indexer.storage.arrow import write_columns

TEXTS = sentences(9, seed=4, low=2, high=8)
QUERY = "bert.encoder.layer.1.attention.self.query"
SCOPES = [(f"layer:{QUERY}", False), (f"layer:{QUERY}", True), ("top-1", False), ("top-1", True), ("head", True)]


# ---------------------------------------------------------------- a tiny model and its dense curvature


def smaller(folder: Path, n_classes: int) -> Path:
    """A BERT of width 8 in which no bias is 0 and no LayerNorm weight is 1."""
    make_tiny_model(folder, n_classes=n_classes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(n_classes)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=10,
        num_labels=n_classes, max_position_embeddings=48, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@dataclass
class World:
    """A classifier in float64, and the same weights in a model of the oracle's own."""

    classifier: Classifier
    model: torch.nn.Module
    path: Path
    gold: np.ndarray

    def blocks(self, scope: str, with_bias: bool) -> tuple[Block, ...]:
        return scope_of(self.classifier, scope, with_bias=with_bias).blocks

    def parameters(self, blocks) -> dict[str, torch.Tensor]:
        """Copies of the blocks' parameters, weight before bias."""
        found = {}
        for block in blocks:
            for kind in ("weight", "bias") if block.bias or block.kind == "norm" else ("weight",):
                found[f"{block.name}.{kind}"] = self.model.get_parameter(f"{block.name}.{kind}").detach().clone()
        return found

    def logits_of(self, text: str, parameters: dict[str, torch.Tensor]):
        """Logits as a function of all the parameters in one vector."""
        encoded = dict(self.classifier.tokenizer(text, return_tensors="pt"))
        sizes = [p.numel() for p in parameters.values()]

        def logits(flat: torch.Tensor) -> torch.Tensor:
            parts = [v.view_as(p) for v, p in zip(flat.split(sizes), parameters.values(), strict=True)]
            values = dict(zip(parameters, parts, strict=True))
            return torch.func.functional_call(self.model, values, kwargs=encoded).logits[0]

        return logits, torch.cat([p.flatten() for p in parameters.values()])

    def gauss_newton(self, blocks) -> np.ndarray:
        """J^T (diag(p) - p p^T) J of each row, (n, P, P)."""
        out = []
        for text in TEXTS:
            f, flat = self.logits_of(text, self.parameters(blocks))
            jacobian = torch.autograd.functional.jacobian(f, flat)
            p = f(flat).detach().softmax(0)
            out.append((jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian).numpy())
        return np.stack(out)

    def hessian(self, blocks) -> np.ndarray:
        """Second derivatives of the loss of each row, (n, P, P)."""
        out = []
        for text, label in zip(TEXTS, self.gold, strict=True):
            f, flat = self.logits_of(text, self.parameters(blocks))

            def loss(values, f=f, label=int(label)):
                return -torch.log_softmax(f(values), 0)[label]

            out.append(torch.autograd.functional.hessian(loss, flat, vectorize=True).numpy())
        return np.stack(out)


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory) -> World:
    return make_world(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> World:
    return make_world(tmp_path_factory, 3)


def make_world(tmp_path_factory, n_classes: int) -> World:
    path = smaller(tmp_path_factory.mktemp("solvers") / "model", n_classes)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    mine = make_classifier(load(path, dtype=torch.float64), tokenizer, name="tiny", device=torch.device("cpu"))
    oracle = load(path, dtype=torch.float64, attn_implementation="eager").eval()
    return World(mine, oracle, path, np.array(labels(len(TEXTS), n_classes)))


def random_vectors(blocks, n_queries: int, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {block.name: (n_queries, block.n_out, block.n_in) for block in blocks}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def flatten(vectors, blocks) -> np.ndarray:
    """(q, P), in the order of the oracle's parameters."""
    parts = []
    for block in blocks:
        matrix = vectors[block.name].double()
        if block.bias:  # the last column is the bias
            parts += [matrix[:, :, :-1].flatten(1), matrix[:, :, -1]]
        else:  # a LayerNorm's weight stands above its bias
            parts.append(matrix.flatten(1))
    return torch.cat(parts, dim=1).numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def gauss_newton(world: World, scope: str, blocks, batch_tokens: int = 30, texts=TEXTS) -> GaussNewton:
    return GaussNewton(world.classifier, Scope(scope, blocks), [texts], seed=0, batch_tokens=batch_tokens)


def hessian(world: World, scope: str, blocks, batch_tokens: int = 30) -> HessianProduct:
    return HessianProduct(world.classifier, Scope(scope, blocks), [TEXTS], world.gold, batch_tokens=batch_tokens)


# ---------------------------------------------------------------- products


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "with_bias"), [*SCOPES, ("all", True)])
def test_gauss_newton_products_equal_those_of_the_dense_matrix(world, scope, with_bias):
    blocks = world.blocks(scope, with_bias)
    vectors = random_vectors(blocks, 3)
    rows = world.gauss_newton(blocks)
    wanted = flatten(vectors, blocks) @ rows.mean(axis=0)
    for batch_tokens in (1, 10_000):
        found = gauss_newton(world, scope, blocks, batch_tokens)(vectors)
        assert error(flatten(found, blocks), wanted) <= 1e-8
    at = [5, 0, 5, 2]
    found = gauss_newton(world, scope, blocks)(vectors, at)
    assert error(flatten(found, blocks), flatten(vectors, blocks) @ rows[at].mean(axis=0)) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "with_bias"), SCOPES)
def test_hessian_products_equal_those_of_the_dense_matrix(world, scope, with_bias):
    blocks = world.blocks(scope, with_bias)
    vectors = random_vectors(blocks, 2)
    rows = world.hessian(blocks)
    wanted = flatten(vectors, blocks) @ rows.mean(axis=0)
    for batch_tokens in (1, 10_000):
        found = hessian(world, scope, blocks, batch_tokens)(vectors)
        assert error(flatten(found, blocks), wanted) <= 1e-8
    at = [5, 0, 5, 2]
    found = hessian(world, scope, blocks)(vectors, at)
    assert error(flatten(found, blocks), flatten(vectors, blocks) @ rows[at].mean(axis=0)) <= 1e-8


def test_they_are_equal_at_the_head_and_differ_below_it(world):
    for scope, equal in (("head", True), ("top-1", False)):
        blocks = world.blocks(scope, True)
        vectors = random_vectors(blocks, 2)
        a, b = (flatten(make(world, scope, blocks)(vectors), blocks) for make in (gauss_newton, hessian))
        assert (error(a, b) <= 1e-10) is equal


def test_products_in_float32_agree_with_float64(world):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world.path)
    single = World(
        make_classifier(model, world.classifier.tokenizer, name="tiny", device=torch.device("cpu")),
        world.model, world.path, world.gold,
    )  # fmt: skip
    blocks = world.blocks("top-1", True)
    vectors = random_vectors(blocks, 2)
    for make in (gauss_newton, hessian):
        found = make(single, "top-1", blocks)({name: v.float() for name, v in vectors.items()})
        assert all(v.dtype == torch.float32 for v in found.values())
        assert error(flatten(found, blocks), flatten(make(world, "top-1", blocks)(vectors), blocks)) <= 1e-4


def test_with_five_classes_every_row_keeps_its_signs(tmp_path_factory):
    world = make_world(tmp_path_factory, 5)
    blocks = world.blocks("top-1", False)
    vectors = random_vectors(blocks, 2)
    product = gauss_newton(world, "top-1", blocks)
    whole = flatten(product(vectors), blocks)
    parts = [flatten(product(vectors, [i]), blocks) for i in range(len(TEXTS))]
    assert error(np.mean(parts, axis=0), whole) <= 1e-10
    assert (whole * flatten(vectors, blocks)).sum(axis=1).min() > 0
    # Over many seeds the mean is the exact matrix.
    exact = flatten(vectors, blocks) @ world.gauss_newton(blocks).mean(axis=0)
    drawn = []
    for seed in range(60):
        estimate = GaussNewton(world.classifier, Scope("top-1", blocks), [TEXTS], seed=seed, batch_tokens=1000)
        drawn.append(flatten(estimate(vectors), blocks))
    spread = np.std(drawn, axis=0) / np.sqrt(len(drawn))
    assert np.mean(np.abs(np.mean(drawn, axis=0) - exact) <= 3 * spread + 1e-12) > 0.95


def test_products_leave_weights_and_their_requires_grad_as_they_were(three):
    blocks = three.blocks("top-1", True)
    vectors = random_vectors(blocks, 1)
    model = three.classifier.model
    model.get_parameter("bert.pooler.dense.weight").requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    wrong = HessianProduct(three.classifier, Scope("top-1", blocks), [TEXTS], three.gold + 1, batch_tokens=30)
    gauss_newton(three, "top-1", blocks)(vectors)
    hessian(three, "top-1", blocks)(vectors)
    with pytest.raises(IndexError):
        wrong(vectors)
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.get_parameter("bert.pooler.dense.weight").requires_grad_(True)


def test_products_refuse_numbers_that_are_not_finite(three):
    blocks = three.blocks("top-1", False)
    vectors = random_vectors(blocks, 2)
    vectors[QUERY][1, 0, 0] = float("nan")
    for make in (gauss_newton, hessian):
        with pytest.raises(NonFiniteError, match="curvature product"):
            make(three, "top-1", blocks)(vectors)


def test_a_product_that_runs_out_of_memory_begins_the_batch_again(three, monkeypatch):
    """Nothing of the failed batch may be counted twice."""
    from forebear.indexer.curvature import products

    blocks = three.blocks("top-1", True)
    vectors = random_vectors(blocks, 2)
    wanted = flatten(gauss_newton(three, "top-1", blocks, 10_000)(vectors), blocks)
    dots, calls = products._Tokens.dots, []

    def failing(self, v):
        calls.append(len(self._live))
        if len(self._live) > 3:
            raise torch.OutOfMemoryError("no memory")
        return dots(self, v)

    monkeypatch.setattr(products._Tokens, "dots", failing)
    found = flatten(gauss_newton(three, "top-1", blocks, 10_000)(vectors), blocks)
    assert max(calls) > 3
    assert error(found, wanted) <= 1e-10


# ---------------------------------------------------------------- conjugate gradients

SHAPES = {"a": (3, 4), "b": (2, 5)}
SIZE = 22


def as_vectors(flat: np.ndarray, dtype=torch.float64) -> dict[str, torch.Tensor]:
    values = torch.as_tensor(np.atleast_2d(flat), dtype=dtype)
    return {"a": values[:, :12].reshape(-1, 3, 4), "b": values[:, 12:].reshape(-1, 2, 5)}


def as_flat(vectors) -> np.ndarray:
    return np.concatenate([v.double().reshape(len(v), -1).numpy() for v in vectors.values()], axis=1)


class Dense:
    """A product with a matrix, or with the mean of some of many; it counts, and remembers the positions."""

    def __init__(self, matrices: np.ndarray, dtype=torch.float64) -> None:
        self.matrices = matrices if matrices.ndim == 3 else matrices[None]
        self.dtype = dtype
        self.widths: list[int] = []
        self.batches: list[list[int] | None] = []

    def __call__(self, vectors, at=None):
        self.widths.append(len(vectors["a"]))
        self.batches.append(at)
        chosen = self.matrices if at is None else self.matrices[list(at)]
        return as_vectors(as_flat(vectors) @ chosen.mean(axis=0), self.dtype)


def symmetric(eigenvalues, seed: int = 0) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]
    return (basis * np.asarray(eigenvalues)) @ basis.T


def right_sides(n: int, seed: int = 1) -> np.ndarray:
    """Of very different lengths."""
    return np.random.default_rng(seed).normal(size=(n, SIZE)) * np.logspace(-12, 6, n)[:, None]


def test_cg_equals_a_dense_solve():
    h, b = symmetric(np.linspace(0, 5, SIZE)), right_sides(5)
    seen = []
    found = conjugate_gradients(
        Dense(h), as_vectors(b), 0.1, tolerance=1e-10, on_iteration=lambda i, r: seen.append((i, r.shape))
    )
    wanted = np.linalg.solve(h + 0.1 * np.eye(SIZE), b.T).T
    for x, y in zip(as_flat(found.vectors), wanted, strict=True):
        assert np.abs(x - y).max() <= 1e-8 * np.abs(y).max()
    true = np.linalg.norm(b - as_flat(found.vectors) @ (h + 0.1 * np.eye(SIZE)), axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found.residual, true, atol=1e-13)
    assert found.converged.all()
    assert found.damping == 0.1
    assert (found.iterations > 3).all()
    assert seen[-1] == (found.iterations.max(), (5,))
    assert [i for i, _ in seen] == list(range(1, len(seen) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("make", [gauss_newton, hessian])
def test_cg_over_a_scope_equals_a_dense_solve(world, make):
    blocks = world.blocks("top-1", True)
    rows = world.gauss_newton(blocks) if make is gauss_newton else world.hessian(blocks)
    h = rows.mean(axis=0)
    damping = 0.1 * np.linalg.eigvalsh(h)[-1] + max(0.0, -np.linalg.eigvalsh(h)[0])
    vectors = random_vectors(blocks, 3)
    found = conjugate_gradients(make(world, "top-1", blocks), vectors, damping, tolerance=1e-9)
    wanted = np.linalg.solve(h + damping * np.eye(len(h)), flatten(vectors, blocks).T).T
    assert found.converged.all()
    assert error(flatten(found.vectors, blocks), wanted) <= 1e-7


def test_a_zero_right_side_gives_zero_and_queries_that_are_done_take_no_part():
    h = symmetric(np.linspace(0, 5, SIZE))
    b = right_sides(3)
    b[1] = 0.0
    b[2] = np.linalg.eigh(h)[1][:, 4]  # an eigenvector: one step
    product = Dense(h)
    found = conjugate_gradients(product, as_vectors(b), 0.5, tolerance=1e-8)
    assert not as_flat(found.vectors)[1].any()
    assert found.residual[1] == 0
    assert found.converged.all()
    assert found.iterations[1] == 0
    assert found.iterations[2] == 1
    assert product.widths[:3] == [2, 1, 1]
    alone = conjugate_gradients(Dense(h), as_vectors(b[:1]), 0.5, tolerance=1e-8)
    np.testing.assert_allclose(as_flat(alone.vectors)[0], as_flat(found.vectors)[0], rtol=1e-12)
    nothing = conjugate_gradients(Dense(h), as_vectors(np.zeros((2, SIZE))), 0.5)
    assert not as_flat(nothing.vectors).any()
    assert nothing.converged.all()


def test_preconditioned_cg_is_right_and_needs_fewer_iterations():
    scales = np.logspace(-3, 3, SIZE)
    near = symmetric(np.linspace(1, 2, SIZE))
    h, b = scales[:, None] * near * scales, right_sides(3)
    asked = {"tolerance": 1e-8, "max_iterations": 2000}
    plain = conjugate_gradients(Dense(h), as_vectors(b), 1e-6, **asked)
    diagonal = np.diag(h) + 1e-6
    better = conjugate_gradients(
        Dense(h), as_vectors(b), 1e-6, precondition=lambda v: as_vectors(as_flat(v) / diagonal), **asked
    )
    assert better.converged.all()
    assert (better.iterations < plain.iterations).all()
    assert better.iterations.max() < 30
    wanted = np.linalg.solve(h + 1e-6 * np.eye(SIZE), b.T).T
    rest = np.linalg.norm(as_flat(better.vectors) @ (h + 1e-6 * np.eye(SIZE)) - b, axis=1)
    assert (rest <= 1.1e-8 * np.linalg.norm(b, axis=1)).all()
    assert error(as_flat(better.vectors)[2:], wanted[2:]) <= 1e-2  # the condition number is 1e12


@pytest.mark.slow
def test_cg_preconditioned_by_ekfac_gives_the_same_solution(world):
    """Not always in fewer steps: a matrix of nearly low rank is easy for plain cg, and EK-FAC spreads its spectrum."""
    blocks = world.blocks("top-1", True)
    ekfac = fit(world, "top-1", blocks)
    damping = 0.1 * ekfac.mean_eigenvalue
    vectors, product = random_vectors(blocks, 2), gauss_newton(world, "top-1", blocks)
    plain = conjugate_gradients(product, vectors, damping, tolerance=1e-6)
    other = conjugate_gradients(
        product, vectors, damping, tolerance=1e-6, precondition=lambda v: ekfac.solve(v, damping)
    )
    assert plain.converged.all()
    assert other.converged.all()
    assert error(flatten(other.vectors, blocks), flatten(plain.vectors, blocks)) <= 1e-4


def test_what_does_not_converge_says_so():
    h, b = symmetric(np.logspace(-4, 4, SIZE)), right_sides(3)
    found = conjugate_gradients(Dense(h), as_vectors(b), 0.0, max_iterations=4)
    assert not found.converged.any()
    assert found.iterations.tolist() == [4, 4, 4]
    # float32 cannot reach 1e-12; it must neither claim to nor go on for ever.
    product = Dense(symmetric(np.linspace(0, 5, SIZE)), torch.float32)
    found = conjugate_gradients(product, as_vectors(b, torch.float32), 0.1, tolerance=1e-12, max_iterations=10_000)
    assert not found.converged.any()
    assert (found.residual < 1e-5).all()
    assert found.iterations.max() < 1000
    found = conjugate_gradients(product, as_vectors(b, torch.float32), 0.1, tolerance=1e-4)
    assert found.converged.all()


def test_negative_curvature_stops_a_query_and_no_other():
    eigenvalues = np.linspace(1, 5, SIZE)
    eigenvalues[0] = -3.0
    h = symmetric(eigenvalues)
    vectors = np.linalg.eigh(h)[1]
    b = np.stack([vectors[:, 0], vectors[:, 1] + vectors[:, 5], vectors[:, 0] + 9 * vectors[:, 1:].sum(axis=1)])
    found = conjugate_gradients(Dense(h), as_vectors(b), 0.5, tolerance=1e-8)
    assert found.converged.tolist() == [False, True, False]
    assert found.iterations[0] == 0
    assert not as_flat(found.vectors)[0].any()
    assert found.residual[0] == pytest.approx(1.0, abs=1e-15)
    assert found.iterations[2] > 0
    x, damped = as_flat(found.vectors)[2], h + 0.5 * np.eye(SIZE)
    assert x @ damped @ x / 2 - b[2] @ x < 0
    assert found.residual[2] == pytest.approx(np.linalg.norm(b[2] - damped @ x) / np.linalg.norm(b[2]))


@pytest.mark.slow
def test_negative_curvature_of_a_hessian_is_reported(world):
    blocks = world.blocks("top-1", False)
    values, directions = np.linalg.eigh(world.hessian(blocks).mean(axis=0))
    assert values[0] < 0
    parts = torch.from_numpy(directions[:, 0].copy()).split([block.size for block in blocks])
    down = {block.name: v.view(1, block.n_out, block.n_in) for block, v in zip(blocks, parts, strict=True)}
    for damping, converged in ((-0.5 * values[0], False), (-2 * values[0], True)):
        found = conjugate_gradients(hessian(world, "top-1", blocks), down, damping, tolerance=1e-6)
        assert found.converged.tolist() == [converged]


def test_cg_refuses_what_has_no_meaning():
    h, b = symmetric(np.ones(SIZE)), right_sides(2)
    for wrong in ({"damping": -1.0}, {"damping": float("nan")}, {"damping": 0.1, "max_iterations": 0}):
        with pytest.raises(InputError, match="expected a finite damping"):
            conjugate_gradients(Dense(h), as_vectors(b), **wrong)
    with pytest.raises(NonFiniteError):
        conjugate_gradients(Dense(np.full((SIZE, SIZE), np.nan)), as_vectors(b), 0.1)
    b[0, 3] = np.inf
    with pytest.raises(NonFiniteError):
        conjugate_gradients(Dense(h), as_vectors(b), 0.1)


# ---------------------------------------------------------------- LiSSA


@pytest.mark.slow
def test_lissa_over_all_rows_reaches_its_fixed_point(world):
    blocks = world.blocks("top-1", False)
    h = world.gauss_newton(blocks).mean(axis=0)
    scale = float(np.linalg.eigvalsh(h)[-1])
    vectors = random_vectors(blocks, 2)
    found = lissa(
        gauss_newton(world, "top-1", blocks, 1000), vectors, damping=0.1, scale=scale, depth=150, batch_rows=99,
        n_rows=len(TEXTS),
    )  # fmt: skip
    wanted = np.linalg.solve(h + 0.1 * scale * np.eye(len(h)), flatten(vectors, blocks).T).T
    assert error(flatten(found.vectors, blocks), wanted) <= 1e-6  # 0.9 ** 151 = 1e-7
    assert found.damping == pytest.approx(0.1 * scale)
    assert found.converged.all()
    assert (found.residual <= 1e-6).all()
    assert found.iterations.tolist() == [150, 150]


def test_lissa_is_the_recursion_of_the_papers_on_seeded_batches():
    rows = np.stack([symmetric(np.linspace(0, 1 + i, SIZE), seed=i) for i in range(10)])
    b = right_sides(2)
    settings = {"damping": 0.05, "scale": 8.0, "depth": 30, "batch_rows": 3, "n_rows": 10, "repeats": 2}
    product, steps = Dense(rows), []
    found = lissa(product, as_vectors(b), **settings, seed=3, on_step=steps.append)
    assert steps == list(range(1, 61))
    *batches, of_residual = product.batches
    assert of_residual is None
    assert len(batches) == 60
    assert all(len(set(at)) == 3 for at in batches)
    assert batches[:30] != batches[30:]
    total = np.zeros_like(b)
    for run in range(2):
        h = b
        for at in batches[run * 30 : run * 30 + 30]:
            h = b + (1 - 0.05) * h - h @ rows[at].mean(axis=0) / 8.0
        total += h / 8.0 / 2
    for x, y in zip(as_flat(found.vectors), total, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max())
    again, other = Dense(rows), Dense(rows)
    lissa(again, as_vectors(b), **settings, seed=3)
    lissa(other, as_vectors(b), **settings, seed=4)
    assert again.batches[:-1] == batches
    assert other.batches[:-1] != batches


def test_lissa_reports_its_residual_and_solves_zero_by_zero():
    rows = np.stack([symmetric(np.linspace(0, 1, SIZE), seed=i) for i in range(10)])
    b = right_sides(3)
    b[1] = 0.0
    found = lissa(
        Dense(rows), as_vectors(b), damping=0.01, scale=2.0, depth=20, batch_rows=2, n_rows=10, tolerance=1e-3
    )
    x = as_flat(found.vectors)
    assert not x[1].any()
    damped = rows.mean(axis=0) + 0.02 * np.eye(SIZE)
    for i in (0, 2):
        wanted = np.linalg.norm(b[i] - damped @ x[i]) / np.linalg.norm(b[i])
        assert found.residual[i] == pytest.approx(wanted, rel=1e-9)
    assert found.converged.tolist() == [False, True, False]


def test_lissa_that_diverges_says_what_to_do():
    rows = symmetric(np.linspace(0, 100, SIZE))[None]
    settings = {"damping": 0.01, "depth": 500, "batch_rows": 1, "n_rows": 1}
    with pytest.raises(
        InputError, match=r"diverged at step \d+ of 500: scale 25 is too small.* such as 250 "
    ) as caught:
        lissa(Dense(rows), as_vectors(right_sides(2)), scale=25.0, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="diverged"):
        lissa(Dense(rows, torch.float32), as_vectors(right_sides(2), torch.float32), scale=1e-30, **settings)
    assert lissa(Dense(rows), as_vectors(right_sides(2)), scale=250.0, **settings).damping == 2.5


def test_settings_of_the_papers():
    assert (HAN20.effective_damping, HAN20.steps(10_000)) == (30.0, 2500)
    assert (PEZ21.effective_damping, PEZ21.steps(10_000)) == (0.25, 2000)
    assert LissaSettings.parse("han20") is not None
    assert LissaSettings.parse("Han20, depth=5000").depth == 5000
    assert LissaSettings.parse("damping=0.01,scale=25,batch_rows=5") == PEZ21
    for settings in (HAN20, PEZ21):
        assert LissaSettings.parse(str(settings)) == settings
    for wrong, message in (
        ("han21", "'han21' is not understood"),
        ("han20,depth=many", "'depth=many' is not understood"),
        ("damping=0.1,scale=3", "batch_rows is missing"),
        ("han20,damping=1", "0 <= damping < 1"),
        ("han20,scale=nan", "scale > 0"),
        ("han20,repeats=0", ">= 1"),
        ("", "'' is not understood"),
    ):
        with pytest.raises(InputError, match=message):
            LissaSettings.parse(wrong)


# ---------------------------------------------------------------- EK-FAC


class Remembering(torch.nn.Module):
    """A linear layer that remembers what went through it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.detach()
        self.y = self.layer(x)
        return self.y


def dense_ekfac(world: World, blocks) -> dict[str, np.ndarray]:
    """Each block's EK-FAC matrix, (size, size), from its definition: labels y drawn from p, in expectation."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        world.path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    spies = {}
    for block in blocks:
        if block.kind == "linear":
            spies[block.name] = Remembering(model.get_submodule(block.name))
            model.set_submodule(block.name, spies[block.name])
    a = {block.name: np.zeros((block.n_in, block.n_in)) for block in blocks}
    d = {block.name: np.zeros((block.n_out, block.n_out)) for block in blocks}
    gradients = {block.name: [] for block in blocks}  # (weight of the row and label, G)
    for text in TEXTS:
        logits = model(**world.classifier.tokenizer(text, return_tensors="pt")).logits[0]
        p = logits.detach().softmax(0)
        for label in range(len(p)):
            loss = -logits.log_softmax(0)[label]
            share = float(p[label]) / len(TEXTS)
            for block in blocks:
                module = model.get_submodule(block.name)
                if block.kind == "norm":
                    g = torch.cat(torch.autograd.grad(loss, [module.weight, module.bias], retain_graph=True))[:, None]
                    a[block.name] += 1.0
                    d[block.name] += share * (g @ g.T).numpy()
                else:
                    spy = spies[block.name]
                    wanted = [spy.weight, *([spy.bias] if block.bias else []), spy.y]
                    *parts, delta = torch.autograd.grad(loss, wanted, retain_graph=True)
                    g = torch.cat([parts[0], *(x[:, None] for x in parts[1:])], dim=1)
                    x, delta = spy.x.reshape(-1, spy.x.shape[-1]), delta.reshape(-1, block.n_out)
                    x = torch.cat([x, torch.ones(len(x), 1)], dim=1) if block.bias else x
                    live = delta.abs().sum(dim=1) > 0
                    a[block.name] += (x[live].T @ x[live]).numpy()
                    d[block.name] += share * (delta.T @ delta).numpy()
                gradients[block.name].append((share, g.numpy()))
    matrices = {}
    for name, found in gradients.items():
        left, right = np.linalg.eigh(d[name])[1], np.linalg.eigh(a[name])[1]
        eigenvalues = sum(share * (left.T @ g @ right) ** 2 for share, g in found)
        basis = np.kron(left, right)
        matrices[name] = (basis * eigenvalues.reshape(-1)) @ basis.T
    return matrices


def fit(world: World, scope: str, blocks) -> Ekfac:
    return fit_ekfac(world.classifier, Scope(scope, blocks), [TEXTS], seed=0, batch_tokens=30)


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "with_bias"), [("top-1", False), ("top-1", True), ("all", True), ("head", False)])
def test_ekfac_equals_its_definition(world, scope, with_bias):
    blocks = world.blocks(scope, with_bias)
    ekfac = fit(world, scope, blocks)
    vectors = random_vectors(blocks, 2)
    damping = 0.1 * ekfac.mean_eigenvalue
    solved = ekfac.solve(vectors, damping)
    total = 0.0
    for block, (name, wanted) in zip(blocks, dense_ekfac(world, blocks).items(), strict=True):
        part = ekfac.parts[name]
        for basis in (part.left, part.right):
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
        basis = np.kron(part.left.numpy(), part.right.numpy())
        assembled = (basis * part.eigenvalues.numpy().reshape(-1)) @ basis.T
        assert error(assembled, wanted) <= 1e-8, name
        flat = vectors[name].reshape(2, -1).numpy()
        solution = np.linalg.solve(wanted + damping * np.eye(block.size), flat.T).T
        assert error(solved[name].reshape(2, -1).numpy(), solution) <= 1e-8, name
        total += np.trace(wanted)
    assert ekfac.n_rows == len(TEXTS)
    assert ekfac.mean_eigenvalue == pytest.approx(total / sum(block.size for block in blocks), rel=1e-10)


def test_ekfac_keeps_the_trace_of_the_gauss_newton_matrix(world):
    blocks = world.blocks("top-1", True)
    h = world.gauss_newton(blocks).mean(axis=0)
    assert fit(world, "top-1", blocks).mean_eigenvalue == pytest.approx(np.trace(h) / len(h), rel=1e-10)


def test_ekfac_comes_back_from_its_file(three, tmp_path):
    blocks = three.blocks("top-1", True)
    ekfac = fit(three, "top-1", blocks)
    path = tmp_path / "ekfac.arrow"
    write_ekfac(path, ekfac)
    read = read_ekfac(path)
    assert read.n_rows == ekfac.n_rows
    assert list(read.parts) == [block.name for block in blocks]
    for name, part in read.parts.items():
        assert part.block == ekfac.parts[name].block
        for field in ("left", "right", "eigenvalues"):
            assert torch.equal(getattr(part, field), getattr(ekfac.parts[name], field).float())
    vectors, damping = random_vectors(blocks, 2), 0.1 * ekfac.mean_eigenvalue
    a = read.solve({name: v.float() for name, v in vectors.items()}, damping)
    assert error(flatten(a, blocks), flatten(ekfac.solve(vectors, damping), blocks)) <= 1e-5
    write_columns(tmp_path / "other.arrow", {"row": np.arange(3)})
    path.write_bytes(path.read_bytes()[:-100])
    for wrong in (tmp_path / "other.arrow", path):
        with pytest.raises(CorruptIndexError, match=wrong.name):
            read_ekfac(wrong)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_class_directions_make_up_the_class_curvature(n_classes):
    """All of them exactly; one combination with random signs in expectation, here over every pattern of signs."""
    p = np.random.default_rng(0).dirichlet(np.ones(n_classes), size=6)
    p[0] = 1e-13
    p[0, 1] = 1 - 1e-13 * (n_classes - 1)
    roots = CROSS_ENTROPY.square_root(p)
    assert roots.shape == (6, n_classes, n_classes - 1)
    patterns = np.array(list(all_of([-1.0, 1.0], repeat=n_classes - 1)))
    for root, row in zip(roots, p, strict=True):
        wanted = np.diag(row) - np.outer(row, row)
        np.fill_diagonal(wanted, [row[i] * np.delete(row, i).sum() for i in range(n_classes)])
        combined = [np.outer(root @ signs, root @ signs) for signs in patterns]
        for found in (root @ root.T, np.mean(combined, axis=0)):
            assert np.abs(found - wanted).max() <= 1e-12 * wanted.max()
