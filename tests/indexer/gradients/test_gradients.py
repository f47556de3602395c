"""Gradients of deeper scopes against plain autograd, jvp and captum; retrieval over them by every solver."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cnn import make_tiny_cnn
from tiny import KINDS, labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, MissingStoreError, ModelError, Retriever, append_rows, build_index
from forebear.errors import MismatchError
from forebear.indexer.gradients.layer_uses import _windows
from forebear.indexer.gradients.vectors import joined
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_classifier, make_classifier
from forebear.indexer.model.scopes import Scope, embedding_block, scope_blocks, scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.spec import QuerySpec

TEXTS = sentences(13, seed=11)
LABELS = np.array(labels(13, 3))
ETAS = [0.1, 0.3]
LAYER = "bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradients")


def albert(folder: Path) -> Path:
    """Layers that are used twice: their gradients are sums over the uses."""
    make_tiny_model(folder, n_classes=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, num_labels=3, max_position_embeddings=48, classifier_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*KINDS, "albert", "cnn"])
def classifier(request, folder) -> Classifier:
    path = folder / request.param
    if request.param == "albert":
        albert(path)
    elif request.param == "cnn":
        make_tiny_cnn(path, make_tiny_model(folder / "words", n_classes=3))
    else:
        make_tiny_model(path, request.param, n_classes=3)
    return load_classifier(path)


def names_of(blocks) -> tuple[str, ...]:
    return tuple(block.name for block in blocks)


def blocks_of(classifier: Classifier, scope: str, *, with_bias: bool = False):
    return scope_of(classifier, scope, with_bias=with_bias).blocks


def parameters_of(blocks) -> tuple[str, ...]:
    """Names of the parameters that blocks hold, worked out from what a block says of itself."""
    return tuple(
        f"{b.name}.{p}" for b in blocks for p in (("weight", "bias") if b.bias or b.kind == "norm" else ("weight",))
    )


def autograd(classifier: Classifier, blocks, texts, wanted) -> list[list[torch.Tensor]]:
    """Parameter gradients one row at a time, no padding, no hooks."""
    weights = [classifier.model.get_parameter(name) for name in parameters_of(blocks)]
    out = []
    for text, label in zip(texts, wanted, strict=True):
        encoded = classifier.tokenizer(text, return_tensors="pt", truncation=True, max_length=classifier.max_length)
        loss = torch.nn.functional.cross_entropy(classifier.model(**encoded).logits, torch.tensor([int(label)]))
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        out.append([torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)])
    return out


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def scopes_of(classifier: Classifier) -> list[str]:
    return ["all"] if classifier.model.config.model_type == "albert" else ["all", "top-1"]


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_queries", [1, 8])
def test_exact_dots_equal_those_of_autograd_gradients(classifier, n_queries, with_bias):
    """Few queries a row and many take different ways; both are right, with biases and LayerNorm or without."""
    for scope in scopes_of(classifier):
        blocks = blocks_of(classifier, scope, with_bias=with_bias)
        asked, targets = sentences(n_queries, seed=5), np.array(labels(n_queries, 3, seed=2))
        vectors = whole_gradients(classifier, Scope(scope, blocks), [asked], targets)
        found = exact_dots(classifier, Scope(scope, blocks), vectors, [TEXTS], LABELS)
        queries = autograd(classifier, blocks, asked, targets)
        rows = autograd(classifier, blocks, TEXTS, LABELS)
        wanted = np.array([[dot(q, r) for r in rows] for q in queries])
        assert (np.abs(found - wanted).max(axis=1) <= 1e-5 * np.abs(wanted).max(axis=1)).all()
        some = np.random.default_rng(0).random(wanted.shape) < 0.3
        chosen = exact_dots(classifier, Scope(scope, blocks), vectors, [TEXTS], LABELS, wanted=some)
        np.testing.assert_allclose(chosen[some], found[some], rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [False, True])
def test_whole_gradients_are_those_of_autograd(classifier, with_bias):
    for scope in scopes_of(classifier):
        blocks = blocks_of(classifier, scope, with_bias=with_bias)
        found = whole_gradients(classifier, Scope(scope, blocks), [TEXTS], LABELS)
        truth = autograd(classifier, blocks, TEXTS, LABELS)
        for i, row in enumerate(truth):
            mine: dict[str, torch.Tensor] = {}
            for block in blocks:
                mine |= block.split(found[block.name][i])
            size = max(float(g.abs().max()) for g in row)
            for name, g in zip(parameters_of(blocks), row, strict=True):
                assert float((mine[name] - g).abs().max()) <= 1e-5 * size, name


def test_in_float64_they_agree_to_ten_digits(folder):
    path = make_tiny_model(folder / "double", n_classes=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    classifier = make_classifier(model, tokenizer, name="double", device=torch.device("cpu"))
    for with_bias in (False, True):
        blocks = blocks_of(classifier, "all", with_bias=with_bias)
        vectors = whole_gradients(classifier, Scope("all", blocks), [TEXTS[:2]], LABELS[:2])
        found = exact_dots(classifier, Scope("all", blocks), vectors, [TEXTS], LABELS)
        rows = autograd(classifier, blocks, TEXTS, LABELS)
        wanted = np.array([[dot(q, r) for r in rows] for q in rows[:2]])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_exact_dots_equal_a_jvp_of_the_loss(folder):
    """Forward-mode differentiation of the row loss along V shares no step with the hooks."""
    path = make_tiny_model(folder / "jvp", n_classes=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    classifier = load_classifier(path)
    blocks = blocks_of(classifier, "all")
    vectors = whole_gradients(classifier, Scope("all", blocks), [TEXTS[:1]], LABELS[:1])
    found = exact_dots(classifier, Scope("all", blocks), vectors, [TEXTS], LABELS)[0]
    parameters = {name: model.get_parameter(name).detach() for name in parameters_of(blocks)}
    tangents = {f"{name}.weight": v[0] for name, v in vectors.items()}
    for i, text in enumerate(TEXTS):
        encoded = classifier.tokenizer(text, return_tensors="pt")

        def loss(values, encoded=encoded, i=i):
            logits = torch.func.functional_call(model, values, kwargs=dict(encoded)).logits
            return torch.nn.functional.cross_entropy(logits, torch.tensor([int(LABELS[i])]))

        _, slope = torch.func.jvp(loss, (parameters,), (tangents,))
        assert float(slope.detach()) == pytest.approx(found[i], rel=1e-4, abs=1e-5 * np.abs(found).max())


def test_weights_and_their_requires_grad_are_left_as_they_were(classifier):
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in classifier.model.named_parameters()}
    whole_gradients(classifier, scope_of(classifier, "all", with_bias=True), [TEXTS], LABELS)
    for name, p in classifier.model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in classifier.model.modules())


def test_scopes_name_their_layers(folder):
    classifier = load_classifier(make_tiny_model(folder / "named", n_classes=3))
    everything = names_of(blocks_of(classifier, "all"))
    assert everything == tuple(k for k, m in classifier.model.named_modules() if isinstance(m, torch.nn.Linear))
    top = names_of(blocks_of(classifier, "top-1"))
    assert set(top) == {k for k in everything if ".layer.1." in k} | {"bert.pooler.dense", "classifier"}
    one = "bert.encoder.layer.0.output.dense"
    assert names_of(blocks_of(classifier, f"layer:{one}")) == (one,)
    with_bias = blocks_of(classifier, "all", with_bias=True)
    assert {b.name for b in with_bias if b.kind == "norm"} == {
        k for k, m in classifier.model.named_modules() if isinstance(m, torch.nn.LayerNorm)
    }
    wrong_ones = (
        ("top-0", "top-1 to top-2"),
        ("top-3", "top-1 to top-2"),
        ("most", "top-K"),
        ("layer:no", "It has bert"),
    )
    for wrong, message in wrong_ones:
        with pytest.raises(InputError, match=message):
            scope_blocks(classifier.model, "classifier", wrong)


def test_a_layer_that_is_not_supported_is_named_before_the_pass(folder, tmp_path):
    classifier = load_classifier(make_tiny_model(folder / "odd", n_classes=3))
    classifier.model.bert.encoder.layer[1].mixer = torch.nn.Conv1d(16, 16, 3, groups=2)
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer\.1\.mixer \(Conv1d\)"):
        scope_blocks(classifier.model, "classifier", "all")
    with pytest.raises(ModelError, match="mixer"):
        scope_blocks(classifier.model, "classifier", "top-1")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_convolution_is_a_linear_layer_of_windows():
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 11)
    choices = itertools.product(
        (1, 4), (1, 2), (1, 3), (0, 2, "same", "valid"), ("zeros", "reflect", "replicate", "circular")
    )
    for window, stride, dilation, padding, mode in choices:
        if padding == "same" and stride > 1:
            continue  # torch has none
        layer = torch.nn.Conv1d(3, 5, window, stride, padding, dilation, padding_mode=mode)
        found = _windows(layer, inputs) @ layer.weight.flatten(1).T + layer.bias
        torch.testing.assert_close(found.transpose(1, 2), layer(inputs), msg=lambda m, at=layer: f"{at}: {m}")


def test_weights_that_two_layers_share_are_refused(folder):
    classifier = load_classifier(make_tiny_model(folder / "tied", n_classes=3))
    layer = classifier.model.bert.encoder.layer[0].attention.self
    layer.key.weight = layer.query.weight
    with pytest.raises(ModelError, match=r"query and .*key share one weight"):
        blocks_of(classifier, "all")


@pytest.fixture(scope="module")
def world(folder):
    """An index of two checkpoints with sketched scopes, and its retriever."""
    models = [str(make_tiny_model(folder / f"m{i}", n_classes=3, seed=i)) for i in range(2)]
    source = rows_from_texts(sentences(90), labels(90, 3))
    chosen = choose_model(None, models, ETAS).checkpoints
    options = BuildOptions(
        scopes=("head", "all", "top-1", f"layer:{LAYER}"), shard_rows=32,
        sketch_dim=48, sketch_bits=256, white_bits=512, dampings=("0.1x", "0.02"), calibration_queries=8,
    )  # fmt: skip
    index = build_index(source, folder / "index", chosen, options)
    return index, Retriever(index), models, chosen, options


class Logits(torch.nn.Module):
    """captum calls models as model(*batch[:-1])."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits


def captum_scores(path: str, scope: str, queries: list[str]) -> np.ndarray:
    """TracInCP at one checkpoint with weight 1 over the weights of the scope's layers; queries have label 1."""
    from captum.influence import TracInCP

    classifier = load_classifier(path)
    names = names_of(blocks_of(classifier, scope))
    for name in names:
        linear = classifier.model.get_submodule(name)
        bias = linear._parameters.pop("bias").detach()
        linear.register_buffer("bias", bias)  # captum takes every parameter of a layer

    def tensors(texts, wanted):
        encoded = classifier.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=40)
        return encoded["input_ids"], encoded["attention_mask"], torch.tensor(np.asarray(wanted))

    rows = torch.utils.data.TensorDataset(*tensors(sentences(90), labels(90, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracin = TracInCP(
            Logits(classifier.model).eval(), rows, [path], lambda _model, _path: 1.0,
            layers=[f"model.{name}" for name in names], batch_size=9,
            loss_fn=torch.nn.CrossEntropyLoss(reduction="none"),
        )  # fmt: skip
        return tracin.influence(tensors(queries, [1] * len(queries))).numpy()


def autograd_scores(path: str, scope: str, queries: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Dots and cosines of full gradients, row by row."""
    classifier = load_classifier(path)
    blocks = blocks_of(classifier, scope)
    rows = autograd(classifier, blocks, sentences(90), labels(90, 3))
    asked = autograd(classifier, blocks, queries, [1] * len(queries))
    dots = np.array([[dot(q, r) for r in rows] for q in asked])
    lengths = [np.sqrt([dot(g, g) for g in some]) for some in (asked, rows)]
    return dots, dots / np.outer(*lengths)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", "top-1", f"layer:{LAYER}"])
def test_gd_gc_and_tracin_equal_autograd_and_captum(world, scope):
    _, retriever, models, _, _ = world
    queries = sentences(4, seed=8)
    dots, cosines = autograd_scores(models[-1], scope, queries)
    first, _ = autograd_scores(models[0], scope, queries)
    wanted = {"gd": dots, "gc": cosines, "tracin": ETAS[0] * first + ETAS[1] * dots}
    for name, truth in wanted.items():
        assert error(retriever.scores(queries, name, scope=scope, target="LABEL_1"), truth) <= 1e-5, name
    layer = retriever.scores(queries, f"tracin-layer:{scope.removeprefix('layer:')}", target="LABEL_1")
    assert error(layer, wanted["tracin"]) <= 1e-5
    assert error(captum_scores(models[-1], scope, queries), dots) <= 1e-5


DEEP = ["gd", "gc", "tracin", "if", "rif"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", "top-1"])
def test_candidates_are_scored_exactly_and_enough_of_them_give_the_full_answer(world, scope):
    index, retriever, _, _, _ = world
    queries = sentences(5, seed=9)
    ask = {"methods": DEEP, "top": 6, "scope": scope}
    full = retriever.retrieve(queries, exact="full", **ask)
    every = retriever.retrieve(queries, candidates=index.manifest.n_live, **ask)
    assert every["row"].to_pylist() == full["row"].to_pylist()
    np.testing.assert_allclose(every["score"].to_numpy(), full["score"].to_numpy(), rtol=1e-4, atol=1e-6)
    some = retriever.retrieve(queries, candidates=30, **ask).to_pylist()
    scores = {m: retriever.scores(queries, m, scope=scope) for m in ask["methods"]}
    for row in some:
        size = np.abs(scores[row["method"]][row["query"]]).max()
        assert row["score"] == pytest.approx(scores[row["method"]][row["query"], row["row"]], rel=1e-4, abs=1e-6 * size)
    hits = np.mean(
        [
            a["row"] in {b["row"] for b in full.to_pylist() if (b["query"], b["method"]) == (a["query"], a["method"])}
            for a in some
        ]
    )
    assert hits > 0.9
    rough = retriever.retrieve(queries, exact="none", **ask)
    assert not any(rough["exact"].to_pylist())


def dense(classifier: Classifier, scope: str, texts) -> np.ndarray:
    """Gauss-Newton matrix in float64: E over y ~ p of the outer products of the row gradients, mean over rows."""
    blocks = blocks_of(classifier, scope)
    total = 0.0
    for text in texts:
        encoded = classifier.tokenizer(text, return_tensors="pt", truncation=True, max_length=classifier.max_length)
        p = classifier.model(**encoded).logits.detach().softmax(dim=1)[0]
        for c in range(len(p)):
            g = flat(autograd(classifier, blocks, [text], [c])[0])
            total = total + float(p[c]) * np.outer(g, g)
    return total / len(texts)


def flat(gradients: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([g.flatten() for g in gradients]).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["head", f"layer:{LAYER}"])
def test_if_and_rif_by_cg_equal_a_dense_solve(world, scope):
    """<H^-1 g_q, g_n> and its cosine, H the dense Gauss-Newton matrix of all rows plus damping."""
    _, retriever, models, _, _ = world
    classifier = load_classifier(models[-1])
    queries, damping = sentences(3, seed=8), 0.02
    blocks = blocks_of(classifier, scope)
    h = dense(classifier, scope, sentences(90))
    rows = np.stack([flat(g) for g in autograd(classifier, blocks, sentences(90), labels(90, 3))])
    asked = np.stack([flat(g) for g in autograd(classifier, blocks, queries, [1] * 3)])
    solved = np.linalg.solve(h + damping * np.eye(len(h)), np.vstack([asked, rows]).T).T
    truth = {"if": solved[:3] @ rows.T}
    own = [np.sqrt((s * g).sum(axis=1)) for s, g in ((solved[:3], asked), (solved[3:], rows))]
    truth["rif"] = truth["if"] / np.outer(*own)
    choices = {"curvature": "cg", "damping": str(damping), "curvature_rows": 0, "tolerance": 1e-6}
    for name, wanted in truth.items():
        found = retriever.scores(queries, name, scope=scope, target="LABEL_1", **choices)
        assert error(found, wanted) <= 2e-4, name


def test_if_and_rif_by_ekfac_use_the_stored_curvature(world):
    """From the stored bases and eigenvalues, in numpy, over one scope and both stored dampings."""
    index, retriever, models, _, _ = world
    classifier = load_classifier(models[-1])
    queries = sentences(3, seed=8)
    blocks = blocks_of(classifier, "top-1")
    ekfac = index.ekfac("top-1")

    def coordinates(texts, wanted) -> np.ndarray:
        found = []
        for gradients in autograd(classifier, blocks, texts, wanted):
            parts = [
                (ekfac.parts[b.name].left.double().T @ g.double() @ ekfac.parts[b.name].right.double()).flatten()
                for b, g in zip(blocks, gradients, strict=True)
            ]
            found.append(torch.cat(parts).numpy())
        return np.stack(found)

    eigenvalues = np.concatenate([ekfac.parts[b.name].eigenvalues.double().numpy().ravel() for b in blocks])
    q, n = coordinates(queries, [1] * 3), coordinates(sentences(90), labels(90, 3))
    for given, size in (("0.1x", 0.1 * eigenvalues.mean()), ("0.02", 0.02)):
        inverse = 1 / (eigenvalues + size)
        scores = (q * inverse) @ n.T
        own = [np.sqrt((x * x * inverse).sum(axis=1)) for x in (q, n)]
        for name, wanted in (("if", scores), ("rif", scores / np.outer(*own))):
            found = retriever.scores(queries, name, scope="top-1", target="LABEL_1", damping=given)
            assert error(found, wanted) <= 1e-4, (name, given)
        np.testing.assert_allclose(
            index.gradients("top-1", damping=0 if given == "0.1x" else 1).norms, own[1], rtol=1e-4
        )


@pytest.mark.slow
def test_an_index_of_a_convolutional_network(folder):
    """Its stored curvature is read back with the windows' shapes; words, dots and a dense solve by cg are right."""
    path = str(make_tiny_cnn(folder / "cnn0", make_tiny_model(folder / "words0", n_classes=3)))
    layer = "layer:cnn.layers.1"
    options = BuildOptions(
        scopes=("head", "all", layer), stores=("features", "words"), words_tops=(0,), sketch_dim=48, sketch_bits=256,
        white_bits=512, dampings=("0.02",), calibration_queries=0,
    )  # fmt: skip
    source = rows_from_texts(sentences(90), labels(90, 3))
    index = build_index(source, folder / "cnn_index", choose_model(None, [path], [1.0]).checkpoints, options)
    retriever = Retriever(folder / "cnn_index")
    queries, classifier = sentences(4, seed=8), load_classifier(path)
    both = (queries, [1] * 4), (sentences(90), labels(90, 3))
    for scope in ("all", layer):
        blocks = blocks_of(classifier, scope)
        dots, cosines = autograd_scores(path, scope, queries)
        for name, truth in (("gd", dots), ("gc", cosines)):
            assert error(retriever.scores(queries, name, scope=scope, target="LABEL_1"), truth) <= 1e-5, name
        parts = index.ekfac(scope).parts
        scores = 0
        asked, rows = (autograd(classifier, blocks, *of) for of in both)
        for i, block in enumerate(blocks):
            part = parts[block.name]
            q, n = (torch.stack([g[i].flatten(1) for g in some]) for some in (asked, rows))
            q, n = (part.left.T @ g @ part.right for g in (q, n))
            scores = scores + ((q / (part.eigenvalues + 0.02)).flatten(1) @ n.flatten(1).T).double().numpy()
        assert error(retriever.scores(queries, "if", scope=scope, target="LABEL_1"), scores) <= 1e-4
    words = [embedding_block(classifier.model, path)]
    mine, theirs = (autograd(classifier, words, *of) for of in both)
    truth = np.array([[dot(q, r) for r in theirs] for q in mine])
    assert error(retriever.scores(queries, "tracin-we", target="LABEL_1"), truth) <= 1e-3
    h = dense(classifier, layer, sentences(90))
    solved = np.linalg.solve(h + 0.02 * np.eye(len(h)), np.stack([flat(g) for g in asked]).T).T
    choices = {"curvature": "cg", "damping": "0.02", "curvature_rows": 0, "tolerance": 1e-6}
    found = retriever.scores(queries, "if", scope=layer, target="LABEL_1", **choices)
    assert error(found, solved @ np.stack([flat(g) for g in rows]).T) <= 2e-4


@pytest.mark.parametrize("scope", ["head", "top-1"])
def test_identity_curvature_makes_if_gd_and_rif_gc(world, scope):
    _, retriever, _, _, _ = world
    queries = sentences(3, seed=4)
    for name, same in (("if", "gd"), ("rif", "gc")):
        found = retriever.scores(queries, name, scope=scope, curvature="identity")
        assert error(found, retriever.scores(queries, same, scope=scope)) <= 1e-6
        rows = retriever.retrieve(queries, methods=[name], scope=scope, curvature="identity", candidates=40)["row"]
        assert (
            rows.to_pylist()
            == retriever.retrieve(queries, methods=[same], scope=scope, candidates=40)["row"].to_pylist()
        )


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ekfac", "cg", "lissa"])
def test_every_solver_answers_at_the_head_as_the_exact_one_does_at_its_damping(world, solver):
    """At the head Gauss-Newton is the Hessian; EK-FAC is another matrix, only correlated."""
    _, retriever, _, _, _ = world
    queries = sentences(3, seed=4)
    lissa = "damping=0.002,scale=10,batch_rows=90,depth=4000"
    choices = {"curvature": solver, "damping": "0.02", "lissa": lissa, "tolerance": 1e-8}
    for name in ("if", "rif"):
        found = retriever.scores(queries, name, **choices)
        exact = retriever.scores(queries, name, damping="0.02", curvature="exact")
        if solver == "ekfac":
            assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
        else:
            assert error(found, exact) <= (1e-6 if solver == "cg" else 0.05), name
    table = retriever.retrieve(queries, methods=["if"], **choices)
    assert ("residual" in table.column_names) == (solver != "ekfac")
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]["if"]
    assert facts["curvature"] == solver
    assert facts["damping"] == pytest.approx(0.02)


def test_if_by_astra_goes_from_ekfac_to_the_dense_solve(world):
    _, retriever, models, _, _ = world
    classifier = load_classifier(models[-1])
    queries, blocks, damping = sentences(3, seed=8), blocks_of(classifier, "top-1"), 0.05
    rows = np.stack([flat(g) for g in autograd(classifier, blocks, sentences(90), labels(90, 3))])
    asked = np.stack([flat(g) for g in autograd(classifier, blocks, queries, [1] * 3)])
    h = dense(classifier, "top-1", sentences(90))
    wanted = np.linalg.solve(h + damping * np.eye(len(h)), asked.T).T @ rows.T

    def by(solver: str, **given):
        choices = {"scope": "top-1", "target": "LABEL_1", "damping": str(damping), "curvature": solver, **given}
        return error(retriever.scores(queries, "if", **choices), wanted)

    assert by("astra", astra="steps=300,batch_rows=1000") <= 1e-3
    assert by("cg-ekfac", curvature_rows=0, tolerance=1e-6) <= 1e-3
    few, many = (by("astra", astra=f"steps={n},batch_rows=30") for n in (3, 200))
    assert many <= 0.2 * few


def test_rif_by_astra_divides_by_the_lengths_of_rows_under_ekfac(world):
    _, retriever, _, _, _ = world
    asked = {"scope": "top-1", "target": "LABEL_1", "damping": "0.05"}  # a damping that the index does not store
    found = {
        (name, solver): retriever.scores(sentences(3, seed=8), name, curvature=solver, **asked)
        for name in ("if", "rif")
        for solver in ("ekfac", "astra")
    }
    # if / rif of a row is its length under H^-1 times that of the test row.
    lengths = {solver: found["if", solver] / found["rif", solver] for solver in ("ekfac", "astra")}
    shares = {solver: of / of.mean(axis=1, keepdims=True) for solver, of in lengths.items()}
    np.testing.assert_allclose(shares["astra"], shares["ekfac"], rtol=1e-4)
    table = retriever.retrieve(["a film"], methods=["rif"], exact="full", curvature="astra", **asked)
    assert json.loads(table.schema.metadata[b"forebear"])["methods"]["rif"]["self_influence"] == "ekfac"


@pytest.mark.slow
def test_solvers_that_iterate_report_their_residual_beyond_the_head(world):
    _, retriever, _, _, _ = world
    ask = {"methods": ["if", "rif", "gd"], "scope": "top-1", "top": 3, "candidates": 5, "curvature_rows": 20}
    for solver in ("cg", "cg-hessian"):
        table = retriever.retrieve(["a film"], curvature=solver, damping="5.0", **ask)
        residual = {r["method"]: r["residual"] for r in table.to_pylist()}
        assert residual["gd"] is None
        assert residual["if"] <= 1e-3
    table = retriever.retrieve(
        ["a film"], curvature="lissa", lissa="damping=0.01,scale=500,batch_rows=5,depth=50", **ask
    )
    assert 0 < table["residual"].to_pylist()[0] < 2
    assert table["iterations"].to_pylist() == [None if m == "gd" else 50 for m in table["method"].to_pylist()]
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]["if"]
    assert (facts["damping"], facts["curvature_rows"], facts["matrix"]) == (5.0, 20, "Hessian")


def test_methods_that_fix_their_scope_are_the_same_at_every_scope(world):
    _, retriever, _, _, _ = world
    for name in ("nn-cos", "rep", "tracin-last"):
        ask = {"methods": [name], "top": 3}
        assert retriever.retrieve(["a film"], scope="all", **ask).equals(retriever.retrieve(["a film"], **ask))


def test_what_the_index_does_not_hold_is_refused_with_the_option_that_builds_it(world, folder):
    _, retriever, models, _, _ = world
    with pytest.raises(MissingStoreError, match=r'scopes=\("head", "top-2"\)'):
        retriever.retrieve(["a film"], methods=["gd"], scope="top-2")
    with pytest.raises(MissingStoreError, match=r'scopes=\("head", "layer:bert'):
        retriever.retrieve(["a film"], methods=["tracin-layer:bert.pooler.dense"])
    with pytest.raises(MissingStoreError, match=r"damping 0\.1x .*, not 7"):
        retriever.retrieve(["a film"], methods=["if"], scope="all", damping="7")
    with pytest.raises(InputError, match='curvature="exact" is for scope head'):
        retriever.retrieve(["a film"], methods=["if"], scope="all", curvature="exact")
    with pytest.raises(InputError, match="curvature='kfac'"):
        retriever.retrieve(["a film"], methods=["if"], curvature="kfac")
    with pytest.raises(InputError, match="names no layer"):
        retriever.retrieve(["a film"], methods=["tracin-layer:"])
    chosen = choose_model(None, models[-1:], [1.0]).checkpoints
    source = rows_from_texts(sentences(20), labels(20, 3))
    options = BuildOptions(scopes=("head", "all"), sketch_dim=8, curvature="none", calibration_queries=0)
    plain = Retriever(build_index(source, folder / "plain", chosen, options))
    with pytest.raises(MissingStoreError, match='curvature="none"'):
        plain.retrieve(["a film"], methods=["if"], scope="all")
    with pytest.raises(InputError, match="absolute damping="):
        plain.retrieve(["a film"], methods=["if"], scope="all", curvature="cg")
    found = plain.retrieve(["a film"], methods=["if"], scope="all", curvature="cg", damping="0.5", top=3)
    assert found.num_rows == 6


def test_biases_and_layer_norm_change_the_scores_and_are_recorded(world, folder):
    _, retriever, models, _, _ = world
    chosen = choose_model(None, models[-1:], [1.0]).checkpoints
    source = rows_from_texts(sentences(90), labels(90, 3))
    options = BuildOptions(scopes=("head", "top-1"), sketch_dim=16, with_bias=True, calibration_queries=0)
    whole = Retriever(build_index(source, folder / "bias", chosen, options))
    queries = sentences(3, seed=8)
    classifier = load_classifier(models[-1])
    blocks = blocks_of(classifier, "top-1", with_bias=True)
    rows = autograd(classifier, blocks, sentences(90), labels(90, 3))
    asked = autograd(classifier, blocks, queries, [1] * 3)
    wanted = np.array([[dot(q, r) for r in rows] for q in asked])
    assert error(whole.scores(queries, "gd", scope="top-1", target="LABEL_1"), wanted) <= 1e-5
    assert error(retriever.scores(queries, "gd", scope="top-1", target="LABEL_1"), wanted) > 1e-3
    metadata = whole.metadata(QuerySpec(methods=("gd",), scope="top-1"))
    assert json.loads(metadata["forebear"])["methods"]["gd"]["with_bias"]


def test_checkpoints_of_different_shapes_are_refused(world, folder, tmp_path):
    _, _, models, _, _ = world
    small = make_tiny_model(folder / "small", n_classes=3)
    config = transformers.AutoConfig.from_pretrained(small)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 8, 2, 12
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(small)
    chosen = choose_model(None, [str(small), models[-1]], [1.0, 1.0]).checkpoints
    with pytest.raises(MismatchError, match="has 8 features"):
        build_index(rows_from_texts(sentences(9), labels(9, 3)), tmp_path / "x", chosen, BuildOptions())


@pytest.mark.slow
def test_appended_rows_are_sketched_as_the_first_ones_were(world, tmp_path):
    _, _, _, chosen, options = world
    source = rows_from_texts(sentences(90), labels(90, 3))
    first = rows_from_texts(sentences(90)[:60], labels(90, 3)[:60])
    rest = rows_from_texts(sentences(90)[60:], labels(90, 3)[60:])
    whole = build_index(source, tmp_path / "whole", chosen, options)
    build_index(first, tmp_path / "grown", chosen, options)
    grown = append_rows(tmp_path / "grown", rest)
    queries = sentences(4, seed=2)
    for name in ("gd", "gc", "tracin"):
        a, b = (Retriever(i).scores(queries, name, scope="all") for i in (whole, grown))
        assert error(a, b) <= 1e-5
    np.testing.assert_allclose(grown.gradients("all").norms, whole.gradients("all").norms, rtol=1e-5)


@pytest.mark.slow
def test_an_interrupted_build_resumes_to_the_same_bytes_but_not_with_another_damping(world, tmp_path, monkeypatch):
    """The dampings decide the whitened sketches of the pass: with curvature they are no later choice."""
    index, _, _, chosen, options = world
    source = rows_from_texts(sentences(90), labels(90, 3))
    from forebear.indexer.building import shards

    real, calls = shards.write_columns, []

    def dies(path, *columns):
        calls.append(path)
        if "whitened-0" in str(path):
            raise KeyboardInterrupt
        real(path, *columns)

    monkeypatch.setattr(shards, "write_columns", dies)
    with pytest.raises(KeyboardInterrupt):
        build_index(source, tmp_path / "i", chosen, options)
    assert len(calls) > 6
    monkeypatch.undo()
    from dataclasses import replace

    with pytest.raises(MismatchError, match="dampings"):
        build_index(source, tmp_path / "i", chosen, replace(options, dampings=("0.5x",)), resume=True)
    again = build_index(source, tmp_path / "i", chosen, options, resume=True)
    assert again.manifest.files == index.manifest.files
    assert again.manifest.calibration == index.manifest.calibration


def test_info_and_verify_tell_of_sketched_scopes(world, capsys):
    from forebear.cli.main import run

    index, _, _, _, _ = world
    assert run(["info", str(index.folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("representations") == 1
    assert "all: sketch of 48 coordinates and 256 bits" in out
    assert "head: exact, 3 x 16" in out
    assert run(["verify", str(index.folder)]) == 0
    args = ["retrieve", "--index", str(index.folder), "--text", "a film", "--method", "gd,gc", "--scope", "top-1"]
    assert run([*args, "--top", "3", "--candidates", "10"]) == 0
    assert "gc: opponents of" in capsys.readouterr().out


def test_rounding_to_fp16_does_not_reorder_nearly_parallel_sketches(world, monkeypatch):
    """Sketches with one dominant component: fp16 changes their length by more than their cosines differ."""
    from dataclasses import replace

    from forebear.indexer.sketches.candidates import estimate
    from forebear.indexer.sketches.estimates import Part
    from forebear.indexer.sketches.sketch import SketchRows
    from forebear.indexer.storage.arrow import RowMatrix

    index, _, _, _, _ = world
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.ones((90, 1)), 0.003 * rng.normal(size=(90, 47))], axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = replace(
        index.gradients("all"), sketches=RowMatrix([vectors.astype(np.float16)]), shares=np.ones(90, np.float32)
    )
    one = np.ones(1)
    asked = SketchRows(vectors[:1].astype(np.float32), np.zeros((1, 256), np.float32), one, one)
    found = estimate([Part(1.0, asked, store)], np.arange(90), cosine=True)[0]
    truth = vectors @ vectors[0]
    assert len(set(np.argsort(-found)[:10]) & set(np.argsort(-truth)[:10])) >= 8


def test_without_stored_curvature_candidates_for_cg_come_from_sketches_of_the_solution(world, folder):
    """H^-1 g is sketched itself: with all of the sketch kept, the first candidates are the best rows."""
    _, _, models, _, _ = world
    chosen = choose_model(None, models[-1:], [1.0]).checkpoints
    source = rows_from_texts(sentences(90), labels(90, 3))
    options = BuildOptions(scopes=("head", "top-1"), sketch_dim=90, curvature="none", calibration_queries=0)
    retriever = Retriever(build_index(source, folder / "no-curvature", chosen, options))
    ask = {"methods": ["if"], "scope": "top-1", "curvature": "cg", "damping": "0.05", "top": 5}
    full = retriever.retrieve(sentences(3, seed=4), exact="full", **ask)
    some = retriever.retrieve(sentences(3, seed=4), candidates=20, **ask)
    hits = np.mean([a == b for a, b in zip(full["row"].to_pylist(), some["row"].to_pylist(), strict=True)])
    assert hits > 0.9


def test_joined_vectors_are_held_once():
    parts = [{"a": torch.rand(q, 2, 3), "b": torch.rand(q, 1, 4)} for q in (2, 3)]
    wanted = {name: np.concatenate([part[name].numpy() for part in parts]) for name in "ab"}
    whole = joined(parts)
    for name in "ab":
        assert (whole[name].numpy() == wanted[name]).all()
        memory = whole[name].untyped_storage().data_ptr()
        for part, own in zip(parts, (wanted[name][:2], wanted[name][2:]), strict=True):
            assert (part[name].numpy() == own).all()
            assert part[name].untyped_storage().data_ptr() == memory
    assert joined(parts[:1]) is parts[0]
