"""Every method against oracles that share no code with the package: autograd, captum, dense Hessians, loops.

An oracle may load the index and the model, nothing else. The error of scores is max|difference| / max|score|
of each query.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import DAMPINGS, World, error
from torch import nn

from forebear.errors import InputError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.curvature.damping import absolute_damping
from forebear.indexer.curvature.head import (
    HeadCurvature,
    Spectrum,
    factorise,
    head_hessian,
    largest_eigenvalue,
    mean_eigenvalue,
    refit_head,
)
from forebear.indexer.curvature.head_products import HeadProducts
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.head.scoring import Query, Term, exact_scores, term_scores
from forebear.retriever.question.methods import METHODS
from forebear.retriever.retriever import Retriever

WORLDS = [("bert", 2, False, 2), ("roberta", 3, True, 3), ("distilbert", 3, False, 2), ("electra", 2, True, 2)]
NAMES = [f"{kind}-{c}-{'pairs' if pairs else 'single'}" for kind, c, pairs, _ in WORLDS]
TOLERANCE = 1e-5
KERNEL_TOLERANCE = 1e-9
CAPTUM_ROWS, CAPTUM_QUERIES = 20, 3  # captum takes the gradients of every row again for every query


@pytest.fixture(params=WORLDS, ids=NAMES)
def world(request: pytest.FixtureRequest, make_world: Callable[..., World]) -> World:
    return make_world(*request.param)


# --- the oracles: plain transformers, one row at a time, no padding ---


@cache
def load(path: str, auto: str = "AutoModelForSequenceClassification") -> Any:
    """Model in float64, and tokenizer."""
    model = getattr(transformers, auto).from_pretrained(path).eval().double()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def inputs_of(tokenizer: Any, text: Any) -> dict[str, torch.Tensor]:
    """One row, as the tokenizer itself gives it."""
    return dict(tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt"))


@cache
def features_and_logits(world: World, side: str, checkpoint: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """f and logits of the world's ``texts`` or ``queries`` from a plain forward pass in float64."""
    model, tokenizer = load(world.models[checkpoint])
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(world.head).register_forward_hook(lambda _m, args, _out: caught.append(args[0][0]))
    with torch.no_grad():
        logits = [model(**inputs_of(tokenizer, text)).logits[0] for text in getattr(world, side)]
    hook.remove()
    return torch.stack(caught).numpy(), torch.stack(logits).numpy()


@cache
def row_gradients(world: World, checkpoint: int = -1) -> np.ndarray:
    """d loss / d head weight of every training row, ``(n, c h)`` float64."""
    return head_gradients(world, world.texts, world.labels, checkpoint)


@cache
def query_gradients(world: World, checkpoint: int = -1) -> np.ndarray:
    """The same of the queries, for the class that the last checkpoint predicts, ``(q, c h)``."""
    return head_gradients(world, world.queries, predictions(world), checkpoint)


def head_gradients(world: World, texts: list[Any], labels: Any, checkpoint: int = -1) -> np.ndarray:
    """By autograd through the whole model, row by row."""
    model, tokenizer = load(world.models[checkpoint])
    weight = model.get_submodule(world.head).weight
    out = []
    for text, label in zip(texts, labels, strict=True):
        loss = nn.functional.cross_entropy(model(**inputs_of(tokenizer, text)).logits, torch.tensor([int(label)]))
        out.append(torch.autograd.grad(loss, weight)[0].reshape(-1))
    return torch.stack(out).numpy()


def predictions(world: World) -> np.ndarray:
    """Of the queries, by the last checkpoint."""
    return features_and_logits(world, "queries")[1].argmax(axis=1)


def dense_hessian(features: np.ndarray, weight: np.ndarray, bias: np.ndarray, labels: Any) -> np.ndarray:
    """Hessian of the mean loss over the full head weight, ``(c h, c h)``, by double backward in float64."""
    f, b, y = torch.tensor(features).double(), torch.tensor(bias).double(), torch.tensor(labels)
    shape = weight.shape

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(f @ flat.reshape(shape).T + b, y)

    return torch.autograd.functional.hessian(mean_loss, torch.tensor(weight).double().reshape(-1)).numpy()


def head_of(world: World, checkpoint: int = -1) -> tuple[np.ndarray, np.ndarray]:
    head = load(world.models[checkpoint])[0].get_submodule(world.head)
    return head.weight.detach().numpy(), head.bias.detach().numpy()


def damped_hessian(world: World, damping: str) -> np.ndarray:
    """H + damping I from the stored features."""
    stored = np.asarray(world.index.features().take(np.arange(len(world.texts))), np.float64)
    hessian = dense_hessian(stored, *head_of(world), world.labels)
    size = float(damping.rstrip("x"))
    if damping.endswith("x"):
        size *= np.linalg.eigvalsh(hessian).mean()
    return hessian + size * np.eye(len(hessian))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


# --- whole methods ---


@pytest.mark.slow
def test_gd_and_gc_equal_a_per_row_autograd_loop_for_every_target(world: World) -> None:
    rows, predicted = row_gradients(world), predictions(world)
    asked = rows_from_texts(world.queries, world.query_labels)
    rare = int(np.bincount(predicted, minlength=world.n_classes).argmin())
    targets = {
        "predicted": predicted,
        "gold": world.query_labels,
        f"label_{rare}": [rare] * len(world.queries),  # by name, whatever its case
    }
    assert len({tuple(map(int, labels)) for labels in targets.values()}) == 3
    for target, classes in targets.items():
        g = head_gradients(world, world.queries, classes)
        assert error(world.retriever.scores(asked, "gd", target=target), g @ rows.T) <= TOLERANCE
        assert error(world.retriever.scores(asked, "gc", target=target), cosines(g, rows)) <= TOLERANCE


@pytest.mark.slow
def test_tracin_sums_the_checkpoints_by_eta(world: World) -> None:
    truth = sum(eta * query_gradients(world, c) @ row_gradients(world, c).T for c, eta in enumerate(world.etas))
    for method in ("tracin", "tracin-last"):
        assert error(world.retriever.scores(world.queries, method), truth) <= TOLERANCE


@pytest.mark.parametrize("damping", DAMPINGS)
def test_if_and_rif_equal_a_dense_hessian_in_float64(world: World, damping: str) -> None:
    rows, queries = row_gradients(world), query_gradients(world)
    inverse = np.linalg.inv(damped_hessian(world, damping))
    dots = queries @ inverse @ rows.T
    own = [np.einsum("np,pr,nr->n", g, inverse, g) for g in (queries, rows)]
    assert error(world.retriever.scores(world.queries, "if", damping=damping), dots) <= TOLERANCE
    cos = dots / np.sqrt(own[0])[:, None] / np.sqrt(own[1])
    assert error(world.retriever.scores(world.queries, "rif", damping=damping), cos) <= TOLERANCE


def test_a_damping_may_be_named_by_its_value(bert_world: World) -> None:
    value = bert_world.index.head.damping("2x")["damping"]
    by_name = bert_world.retriever.scores(bert_world.queries, "if", damping="2x")
    by_value = bert_world.retriever.scores(bert_world.queries, "if", damping=str(value))
    np.testing.assert_array_equal(by_value, by_name)


def test_identity_curvature_turns_if_into_gd_and_rif_into_gc(world: World) -> None:
    for preconditioned, plain in (("if", "gd"), ("rif", "gc")):
        found = world.retriever.scores(world.queries, preconditioned, curvature="identity")
        assert error(found, world.retriever.scores(world.queries, plain)) <= TOLERANCE


def test_nearest_neighbour_scores_equal_scikit_learn_on_a_plain_forward_pass(world: World) -> None:
    from sklearn.metrics.pairwise import cosine_similarity, linear_kernel
    from sklearn.neighbors import NearestNeighbors

    rows, queries = features_and_logits(world, "texts")[0], features_and_logits(world, "queries")[0]
    check_neighbours(world, "nn", queries, rows, cosine_similarity, linear_kernel, NearestNeighbors)


def test_sbert_scores_equal_scikit_learn_on_plain_mean_pooling(world: World) -> None:
    from sklearn.metrics.pairwise import cosine_similarity, linear_kernel
    from sklearn.neighbors import NearestNeighbors

    model, tokenizer = load(world.sentence_model, "AutoModel")

    def embed(texts: list[Any]) -> np.ndarray:
        with torch.no_grad():
            states = [model(**inputs_of(tokenizer, text)).last_hidden_state[0] for text in texts]
        return np.stack([s.double().numpy().mean(axis=0) for s in states])

    rows, queries = embed(world.texts), embed(world.queries)
    check_neighbours(world, "sbert", queries, rows, cosine_similarity, linear_kernel, NearestNeighbors)


def check_neighbours(
    world: World, family: str, queries: np.ndarray, rows: np.ndarray, cosine: Any, dot: Any, neighbours: Any
) -> None:
    brute = neighbours(n_neighbors=len(rows), algorithm="brute").fit(rows)
    distances, order = brute.kneighbors(queries)
    euclidean = np.empty_like(distances)
    np.put_along_axis(euclidean, order, distances, axis=1)
    for metric, truth in (("cos", cosine(queries, rows)), ("dot", dot(queries, rows)), ("euc", -euclidean)):
        assert error(world.retriever.scores(world.queries, f"{family}-{metric}"), truth) <= TOLERANCE


def test_rep_equals_the_representer_formula_in_a_slow_loop(world: World) -> None:
    features, logits = features_and_logits(world, "texts")
    queries, query_logits = features_and_logits(world, "queries")
    truth = np.empty((len(queries), len(features)))
    for q in range(len(queries)):
        target = int(query_logits[q].argmax())
        for n in range(len(features)):
            p = torch.softmax(torch.tensor(logits[n]), dim=0).numpy()
            y = 1.0 if world.labels[n] == target else 0.0
            alpha = -(p[target] - y) / (2 * 1.0 * len(features))
            truth[q, n] = alpha * sum(features[n, i] * queries[q, i] for i in range(features.shape[1]))
    assert error(world.retriever.scores(world.queries, "rep"), truth) <= TOLERANCE


@pytest.fixture(scope="module")
def refitted(make_world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Retriever]:
    world = make_world("roberta", 3, True, 3)
    folder = tmp_path_factory.mktemp("refit") / "index"
    options = BuildOptions(rep_refit=True, shard_rows=25)
    source = rows_from_texts(world.texts, world.labels)
    return world, Retriever(build_index(source, folder, choose_model(world.models[-1]).checkpoints, options))


def newton_refit(features: np.ndarray, soft: np.ndarray, l2: float) -> np.ndarray:
    """argmin of mean cross-entropy + l2 ||W||^2 with a bias column, by Newton's method on autograd's Hessian."""
    x = torch.tensor(np.hstack([features, np.ones((len(features), 1))]))
    p = torch.tensor(soft)

    def objective(flat: torch.Tensor) -> torch.Tensor:
        w = flat.reshape(p.shape[1], x.shape[1])
        return -(p * torch.log_softmax(x @ w.T, dim=1)).sum(dim=1).mean() + l2 * (w**2).sum()

    flat = torch.zeros(p.shape[1] * x.shape[1], dtype=torch.float64)
    for _ in range(50):
        flat.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(flat), flat)
        hessian = torch.autograd.functional.hessian(objective, flat.detach())
        flat = (flat - torch.linalg.solve(hessian, gradient)).detach()
        if gradient.abs().max() < 1e-13:
            break
    assert gradient.abs().max() < 1e-13
    return flat.reshape(p.shape[1], x.shape[1]).numpy()


def test_rep_refit_equals_newtons_method_and_the_kernel_plus_one(refitted: tuple[World, Retriever]) -> None:
    world, retriever = refitted
    features, logits = features_and_logits(world, "texts")
    queries, query_logits = features_and_logits(world, "queries")
    soft = torch.softmax(torch.tensor(logits), dim=1).numpy()
    weight = newton_refit(features, soft, 0.1)
    refitted_p = torch.softmax(torch.tensor(features @ weight[:, :-1].T + weight[:, -1]), dim=1).numpy()
    alpha = -(refitted_p - np.eye(world.n_classes)[world.labels]) / (2 * 0.1 * len(features))
    targets = query_logits.argmax(axis=1)
    truth = np.stack(
        [alpha[:, t] * (features @ x + 1.0) for t, x in zip(targets, queries, strict=True)],
    )
    assert error(retriever.scores(world.queries, "rep"), truth) <= TOLERANCE


def test_rep_refit_solves_the_representer_theorem(refitted: tuple[World, Retriever]) -> None:
    """With the soft targets in place of the gold ones, the sum over training rows gives the refitted logit back."""
    world, _ = refitted
    features, logits = features_and_logits(world, "texts")
    soft = torch.softmax(torch.tensor(logits), dim=1).numpy()
    weight = refit_head(features, soft)
    x = np.hstack([features, np.ones((len(features), 1))])
    p = torch.softmax(torch.tensor(x @ weight.T), dim=1).numpy()
    alpha = -(p - soft) / (2 * 0.1 * len(x))
    np.testing.assert_allclose((alpha.T @ x) @ x.T, weight @ x.T, atol=1e-6)


# --- captum ---


class WithoutHeadBias(nn.Module):
    """A classifier called with positional tensors; the head's bias is a buffer, as the package leaves it out."""

    def __init__(self, model: nn.Module, head: str, keys: list[str]) -> None:
        super().__init__()
        self.model, self.keys = copy.deepcopy(model), keys
        linear = self.model.get_submodule(head)
        self.register_buffer("bias", linear.bias.detach().clone())
        linear.bias = None

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.keys, args, strict=True))).logits + self.bias


def captum_tracin(world: World, checkpoints: list[int], etas: list[float]) -> Any:
    """captum's TracInCP over the head for the first rows, and the first queries; all unpadded, one at a time."""
    from captum.influence import TracInCP
    from torch.utils.data import DataLoader

    tokenizer = load(world.models[-1])[1]
    keys = list(inputs_of(tokenizer, world.texts[0]))

    def batch(text: Any, label: int) -> tuple[torch.Tensor, ...]:
        return (*(inputs_of(tokenizer, text)[key] for key in keys), torch.tensor([label]))

    rows = [batch(t, y) for t, y in zip(world.texts[:CAPTUM_ROWS], world.labels, strict=False)]
    wrapped = [WithoutHeadBias(load(world.models[c])[0], world.head, keys) for c in checkpoints]

    def restore(model: nn.Module, path: str) -> float:
        model.load_state_dict(wrapped[int(path)].state_dict())
        return etas[int(path)]

    tracin = TracInCP(
        copy.deepcopy(wrapped[0]),
        DataLoader(rows, batch_size=None, shuffle=False),
        [str(i) for i in range(len(checkpoints))],
        checkpoints_load_func=restore,
        layers=[f"model.{world.head}"],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
    )
    queries = [batch(t, int(y)) for t, y in zip(world.queries[:CAPTUM_QUERIES], predictions(world), strict=False)]
    return tracin, DataLoader(queries, batch_size=None, shuffle=False)


@pytest.mark.parametrize("which", [WORLDS[0], WORLDS[1]], ids=NAMES[:2])
def test_gd_gc_and_tracin_equal_captum(which: tuple[Any, ...], make_world: Callable[..., World]) -> None:
    world = make_world(*which)
    asked, last = world.queries[:CAPTUM_QUERIES], len(world.models) - 1
    found = {m: world.retriever.scores(asked, m)[:, :CAPTUM_ROWS] for m in ("gd", "gc", "tracin")}
    tracin, queries = captum_tracin(world, [last], [1.0])
    dots = tracin.influence(queries).numpy()
    assert error(found["gd"], dots) <= TOLERANCE
    own_rows, own_queries = tracin.self_influence().numpy(), tracin.self_influence(queries).numpy()
    cos = dots / np.sqrt(own_queries)[:, None] / np.sqrt(own_rows)
    assert error(found["gc"], cos) <= TOLERANCE
    tracin, queries = captum_tracin(world, list(range(last + 1)), list(world.etas))
    assert error(found["tracin"], tracin.influence(queries).numpy()) <= TOLERANCE


class Head(nn.Module):
    """The head alone, on stored features, its bias a buffer."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        self.head.weight.data = torch.tensor(weight).double()
        self.register_buffer("bias", torch.tensor(bias).double())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features) + self.bias


@pytest.mark.parametrize("damping", ["0.003", "2x"])
def test_if_and_rif_equal_captums_naive_influence_function(world: World, damping: str) -> None:
    from captum.influence import NaiveInfluenceFunction
    from torch.utils.data import DataLoader, TensorDataset

    n = len(world.texts)
    stored = torch.tensor(np.asarray(world.index.features().take(np.arange(n)), np.float64))
    size = world.index.head.damping(damping)["damping"]
    oracle = NaiveInfluenceFunction(
        Head(*head_of(world)),
        DataLoader(TensorDataset(stored, torch.tensor(world.labels)), batch_size=n),
        checkpoint="",
        checkpoints_load_func=lambda _model, _path: 1.0,
        layers=["head"],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        projection_dim=None,
        hessian_reg=n * size,
        hessian_inverse_tol=0.0,
    )
    features, logits = features_and_logits(world, "queries")
    asked = (torch.tensor(features), torch.tensor(logits.argmax(axis=1)))
    truth = n * oracle.influence(asked).numpy()
    assert error(world.retriever.scores(world.queries, "if", damping=damping), truth) <= TOLERANCE
    rows = oracle.compute_intermediate_quantities(oracle.train_dataloader).numpy()
    queries = oracle.compute_intermediate_quantities(asked).numpy()
    cos = cosines(queries, rows)
    assert error(world.retriever.scores(world.queries, "rif", damping=damping), cos) <= TOLERANCE


# --- kernels on float64 arrays ---


@pytest.fixture(params=[2, 3, 5])
def arrays(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """Random rows and queries of a random head: f, p, y, and gradients written out in full."""
    c, h, n, q = request.param, 7, 80, 6
    rng = np.random.default_rng(c)
    out: dict[str, np.ndarray] = {"weight": rng.normal(size=(c, h)), "bias": rng.normal(size=c)}
    for kind, size in (("row", n), ("query", q)):
        f, y = rng.normal(size=(size, h)), rng.integers(0, c, size)
        p = torch.softmax(torch.tensor(f @ out["weight"].T + out["bias"]), dim=1).numpy()
        r = p - np.eye(c)[y]
        g = np.stack([np.outer(a, b).reshape(-1) for a, b in zip(r, f, strict=True)])
        out |= {f"{kind}_f": f, f"{kind}_p": p, f"{kind}_y": y, f"{kind}_r": r, f"{kind}_g": g}
    return out


def gradient_query(name: str, a: dict[str, np.ndarray]) -> Query:
    norms = np.linalg.norm(a["query_g"], axis=1)
    return Query(METHODS[name], (Term(1.0, a["query_f"], a["query_r"]),), norms)


def test_gradient_kernels_equal_written_out_gradients(arrays: dict[str, np.ndarray]) -> None:
    a, rows = arrays, np.arange(len(arrays["row_f"]))
    for name, truth in (("gd", a["query_g"] @ a["row_g"].T), ("gc", cosines(a["query_g"], a["row_g"]))):
        query = gradient_query(name, a)
        assert error(exact_scores(query, (a["row_f"],), (a["row_r"],), rows), truth) <= KERNEL_TOLERANCE
        picked = np.stack([np.random.default_rng(i).permutation(rows)[:9] for i in range(len(query))])
        found = exact_scores(query, (a["row_f"][picked],), (a["row_r"][picked],), picked)
        assert error(found, np.take_along_axis(truth, picked, axis=1)) <= KERNEL_TOLERANCE


def test_feature_kernels_equal_plain_formulas(arrays: dict[str, np.ndarray]) -> None:
    f, x = arrays["row_f"], arrays["query_f"]
    truths = {"nn-dot": x @ f.T, "nn-cos": cosines(x, f), "nn-euc": -np.sqrt(((x[:, None] - f[None]) ** 2).sum(axis=2))}
    for name, truth in truths.items():
        query = Query(METHODS[name], (Term(1.0, x),), np.linalg.norm(x, axis=1))
        assert error(exact_scores(query, (f,), (), np.arange(len(f))), truth) <= KERNEL_TOLERANCE
        picked = np.tile(np.arange(len(f))[::-3], (len(x), 1))
        found = exact_scores(query, (f[picked],), (), picked)
        assert error(found, np.take_along_axis(truth, picked, axis=1)) <= KERNEL_TOLERANCE


def test_euclidean_kernel_keeps_near_duplicates_apart() -> None:
    x = np.full((1, 4), 1e3)
    rows = x + np.array([[0.0], [1e-9], [3e-9]]) * [1, 0, 0, 0]
    query = Query(METHODS["nn-euc"], (Term(1.0, x),), np.linalg.norm(x, axis=1))
    found = exact_scores(query, (rows,), (), np.arange(3))
    np.testing.assert_allclose(found[0], [0, *(-(rows[1:, 0] - 1e3))], rtol=1e-12)


def test_tracin_and_representer_kernels_equal_written_out_sums(arrays: dict[str, np.ndarray]) -> None:
    a, rows = arrays, np.arange(len(arrays["row_f"]))
    terms = (Term(0.3, a["query_f"], a["query_r"]), Term(0.7, -2 * a["query_f"], a["query_r"]))
    query = Query(METHODS["tracin"], terms, np.ones(len(a["query_f"])))
    found = exact_scores(query, (a["row_f"], 5 * a["row_f"]), (a["row_r"], a["row_r"]), rows)
    assert error(found, (0.3 - 0.7 * 2 * 5) * (a["query_g"] @ a["row_g"].T)) <= KERNEL_TOLERANCE
    left = np.zeros_like(a["query_r"])
    left[:, 1] = -0.25
    query = Query(METHODS["rep"], (Term(1.0, a["query_f"], left, offset=1.0),), np.ones(len(left)))
    truth = -0.25 * a["row_r"][:, 1] * (a["query_f"] @ a["row_f"].T + 1.0)
    assert error(exact_scores(query, (a["row_f"],), (a["row_r"],), rows), truth) <= KERNEL_TOLERANCE


def curvature_of(a: dict[str, np.ndarray], damping: float) -> HeadCurvature:
    c, h = a["weight"].shape
    cut = len(a["row_f"]) // 3  # in blocks of unequal size
    blocks = [(a["row_f"][:cut], a["row_p"][:cut]), (a["row_f"][cut:], a["row_p"][cut:])]
    return HeadCurvature(factorise(head_hessian(blocks, h, c), damping), c, damping)


def lift(matrix: np.ndarray, c: int, h: int) -> np.ndarray:
    """From the basis of class contrasts back to the full head weight."""
    basis = np.kron(CROSS_ENTROPY.basis(c), np.eye(h))
    return basis.T @ matrix @ basis


def test_head_hessian_equals_double_backward_and_its_mean_eigenvalue(arrays: dict[str, np.ndarray]) -> None:
    a = arrays
    c, h = a["weight"].shape
    truth = dense_hessian(a["row_f"], a["weight"], a["bias"], a["row_y"])
    reduced = head_hessian([(a["row_f"], a["row_p"])], h, c)
    assert np.abs(lift(reduced, c, h) - truth).max() <= KERNEL_TOLERANCE * np.abs(truth).max()
    assert mean_eigenvalue(reduced, c) == pytest.approx(np.linalg.eigvalsh(truth).mean(), rel=1e-12)


def test_class_basis_is_orthonormal_and_sums_to_zero() -> None:
    for c in (2, 3, 4, 9):
        basis = CROSS_ENTROPY.basis(c)
        np.testing.assert_allclose(basis @ basis.T, np.eye(c - 1), atol=1e-14)
        np.testing.assert_allclose(basis.sum(axis=1), 0, atol=1e-14)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 30.0])
def test_solves_and_self_influence_equal_a_dense_inverse(arrays: dict[str, np.ndarray], damping: float) -> None:
    a = arrays
    c, h = a["weight"].shape
    dense = dense_hessian(a["row_f"], a["weight"], a["bias"], a["row_y"]) + damping * np.eye(c * h)
    curvature = curvature_of(a, damping)
    own = curvature.self_influence(a["row_r"], a["row_f"])
    solved = np.linalg.solve(dense, a["query_g"].T).T
    true_own = np.array([g @ np.linalg.solve(dense, g) for g in a["row_g"]])
    np.testing.assert_allclose(own, true_own, rtol=KERNEL_TOLERANCE)
    matrix = curvature.solve(a["query_r"], a["query_f"])
    term = Term(1.0, None, matrix=matrix, basis=CROSS_ENTROPY.basis(c))
    truth = solved @ a["row_g"].T
    assert error(term_scores(term, a["row_f"], a["row_r"]), truth) <= KERNEL_TOLERANCE
    norms = np.sqrt(curvature.self_influence(a["query_r"], a["query_f"]))
    query = Query(METHODS["rif"], (term,), norms, own)
    found = exact_scores(query, (a["row_f"],), (a["row_r"],), np.arange(len(own)))
    true_norms = np.sqrt([g @ s for g, s in zip(a["query_g"], solved, strict=True)])
    assert error(found, truth / true_norms[:, None] / np.sqrt(true_own)) <= KERNEL_TOLERANCE


def test_damping_is_absolute_or_relative_to_the_mean_or_the_largest_eigenvalue() -> None:
    spectrum = Spectrum(mean_eigenvalue=7.0, largest_eigenvalue=300.0)
    assert absolute_damping("0.003", spectrum) == 0.003
    assert absolute_damping("0.5x", spectrum) == 3.5
    assert absolute_damping("0.5%", spectrum) == 1.5
    for bad in ("", "x", "%", "-1", "nan", "inf", "1 x y", "-0.1x", "nan%", "1%x"):
        with pytest.raises(InputError, match="damping"):
            absolute_damping(bad, spectrum)


@pytest.mark.parametrize(("c", "h"), [(2, 5), (2, 60), (4, 30)])
def test_the_largest_eigenvalue_of_the_head_is_that_of_its_matrix(c: int, h: int) -> None:
    rng = np.random.default_rng(c * h)
    features, logits = rng.normal(size=(90, h)) * rng.lognormal(size=h), rng.normal(size=(90, c))
    outputs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    curvatures = [np.diag(p) - np.outer(p, p) for p in outputs]
    truth = sum(np.kron(b, np.outer(f, f)) for b, f in zip(curvatures, features, strict=True)) / len(features)
    expected = np.linalg.eigvalsh(truth)[-1]
    assert largest_eigenvalue(head_hessian([(features, outputs)], h, c)) == pytest.approx(expected, rel=1e-6)
    assert HeadProducts(features, outputs, CROSS_ENTROPY).largest_eigenvalue() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("h", [5, 60])
def test_the_largest_eigenvalue_of_a_head_without_curvature_is_0(h: int) -> None:
    features, outputs = np.zeros((90, h)), np.full((90, 2), 0.5)
    assert largest_eigenvalue(head_hessian([(features, outputs)], h, 2)) == 0.0
    assert HeadProducts(features, outputs, CROSS_ENTROPY).largest_eigenvalue() == 0.0


@pytest.mark.parametrize("margin", [0.0, 1.0, 40.0, 80.0, 500.0])
def test_residual_and_loss_keep_their_precision_on_extreme_logits(margin: float) -> None:
    """Two classes have closed forms: 1 - p_y = e^-m / (1 + e^-m), loss = log(1 + e^-m)."""
    small = np.exp(np.longdouble(-margin))
    logits = np.array([[margin, 0.0], [0.0, -margin], [-margin, 0.0], [0.0, margin]]) + 3.0
    residual, loss = CROSS_ENTROPY.residual_and_loss(logits, np.array([0, 0, 0, 0]))
    wrong = small / (1 + small)  # probability of the other class, at the first two rows
    right = 1 / (1 + small)
    truth = np.array([[-wrong, wrong], [-wrong, wrong], [-right, right], [-right, right]])
    np.testing.assert_allclose(residual, truth.astype(np.float64), rtol=1e-14)
    np.testing.assert_allclose(
        loss, np.array([np.log1p(small)] * 2 + [margin + np.log1p(small)] * 2, float), rtol=1e-14
    )


def test_residual_and_loss_of_several_classes_equal_long_doubles() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 4)) * np.logspace(-2, 2.3, 200)[:, None]
    labels = rng.integers(0, 4, 200)
    wide = logits.astype(np.longdouble)
    e = np.exp(wide - wide.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    at = (np.arange(200), labels)
    truth = p.copy()
    truth[at] = 0
    truth[at] = -truth.sum(axis=1)  # exact where 1 - p_y would cancel
    others = wide.copy()
    others[at] = -np.inf
    margin = np.log(np.exp(others - others.max(axis=1, keepdims=True)).sum(axis=1)) + others.max(axis=1) - wide[at]
    loss = np.where(margin > 0, margin + np.log1p(np.exp(-np.abs(margin))), np.log1p(np.exp(-np.abs(margin))))
    residual, found = CROSS_ENTROPY.residual_and_loss(logits, labels)
    np.testing.assert_allclose(residual, truth.astype(float), rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(found, loss.astype(float), rtol=1e-13, atol=1e-300)
    assert (residual.sum(axis=1) <= 1e-15).all()


def test_curvature_of_confident_rows_keeps_its_precision() -> None:
    """Rows with 1 - p_y down to 1e-20 have curvature p_y (1 - p_y), also where p_y rounds to 1."""
    for tail in (1e-3, 1e-9, 1e-14, 1e-17, 1e-20):
        f = np.random.default_rng(0).normal(size=(30, 4))
        residual = np.tile([[-tail, tail]], (30, 1))
        p = CROSS_ENTROPY.outputs_of_residuals(residual, np.zeros(30, int))
        found = head_hessian([(f, p)], 4, 2)
        truth = 2 * tail * (1 - tail) * f.T @ f / 30
        assert np.abs(found - truth).max() <= 1e-6 * np.abs(truth).max(), f"1 - p_y = {tail}"


def wide_solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Gaussian elimination in long doubles (18 digits), ``matrix`` positive definite."""
    a, b = matrix.copy(), right.copy()
    for i in range(len(a)):
        for j in range(i + 1, len(a)):
            factor = a[j, i] / a[i, i]
            a[j] -= factor * a[i]
            b[j] -= factor * b[i]
    for i in reversed(range(len(a))):
        b[i] = (b[i] - a[i, i + 1 :] @ b[i + 1 :]) / a[i, i]
    return b


def test_a_damping_too_small_for_float64_is_refused_not_answered_wrongly() -> None:
    rng = np.random.default_rng(0)
    n, h = 12, 20  # fewer rows than features: H alone is singular
    f, x, p = rng.normal(size=(n, h)), rng.normal(size=(3, h)), rng.uniform(0.1, 0.9, n)
    residual, query_residual = np.stack([p - 1, 1 - p], axis=1), np.tile([[0.3, -0.3]], (3, 1))
    wide = f.astype(np.longdouble)
    hessian = (2 * (p * (1 - p.astype(np.longdouble)))[:, None] * wide).T @ wide / n
    largest = np.linalg.eigvalsh(hessian.astype(float)).max()
    reduced = head_hessian([(f, np.stack([p, 1 - p], axis=1))], h, 2)
    refused = []
    for ratio in 10.0 ** -np.arange(4, 19):
        try:
            curvature = HeadCurvature(factorise(reduced, ratio * largest), 2, ratio * largest)
        except InputError:
            refused.append(ratio)
            continue
        found = term_scores(
            Term(1.0, None, matrix=curvature.solve(query_residual, x), basis=CROSS_ENTROPY.basis(2)), f, residual
        )
        solved = wide_solve(hessian + ratio * largest * np.eye(h, dtype=np.longdouble), x.T.astype(np.longdouble)).T
        truth = 2 * 0.3 * (solved @ wide.T) * (p - 1)
        assert error(found, truth.astype(float)) <= TOLERANCE, f"damping = {ratio:g} x the largest eigenvalue"
    assert refused
    assert max(refused) < 1e-9


# --- what influence means ---


@pytest.mark.slow
@pytest.mark.parametrize("c", [2, 3])
def test_if_predicts_the_change_of_loss_when_a_row_is_left_out(c: int) -> None:
    """Regression with (l2 / 2) ||W||^2, retrained to convergence without each row; damping = that term's Hessian."""
    rng = np.random.default_rng(c)
    n, h, l2 = 60, 5, 0.05
    f = rng.normal(size=(n, h))
    y = (f @ rng.normal(size=(h, c)) + 0.8 * rng.normal(size=(n, c))).argmax(axis=1)
    queries, query_y = rng.normal(size=(10, h)), rng.integers(0, c, 10)

    def train(kept: np.ndarray) -> np.ndarray:
        """Newton's method on the full (c h) weight, to a gradient of 1e-12."""
        w, x = np.zeros((c, h)), f[kept]
        for _ in range(50):
            p = probabilities(x, w)
            gradient = (p - np.eye(c)[y[kept]]).T @ x / n + l2 * w
            if np.abs(gradient).max() < 1e-12:
                return w
            hessian = l2 * np.eye(c * h)
            for pn, xn in zip(p, x, strict=True):
                hessian += np.kron(np.diag(pn) - np.outer(pn, pn), np.outer(xn, xn)) / n
            w = w - np.linalg.solve(hessian, gradient.reshape(-1)).reshape(c, h)
        raise AssertionError("not converged")

    def probabilities(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return torch.softmax(torch.tensor(x @ w.T), dim=1).numpy()

    def losses(w: np.ndarray) -> np.ndarray:
        return -np.log(probabilities(queries, w)[np.arange(10), query_y])

    weight = train(np.arange(n))
    before = losses(weight)
    change = np.stack([losses(train(np.delete(np.arange(n), i))) - before for i in range(n)], axis=1)
    p, query_p = probabilities(f, weight), probabilities(queries, weight)
    curvature = HeadCurvature(factorise(head_hessian([(f, p)], h, c), l2), c, l2)
    residual, query_residual = p - np.eye(c)[y], query_p - np.eye(c)[query_y]
    matrix = curvature.solve(query_residual, queries)
    query = Query(METHODS["if"], (Term(1.0, None, matrix=matrix, basis=CROSS_ENTROPY.basis(c)),), np.ones(len(queries)))
    predicted = exact_scores(query, (f,), (residual,), np.arange(n)) / n
    for q in range(len(queries)):
        assert np.corrcoef(predicted[q], change[q])[0, 1] >= 0.99
    slope = (predicted * change).sum() / (predicted**2).sum()
    assert 0.9 < slope < 1.2  # the sign and the size, not only the order
