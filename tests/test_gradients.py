"""Gradients of deeper scopes against plain autograd, jvp and captum; sketches; retrieval over them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import KINDS, labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, MissingStoreError, ModelError, Retriever, append_rows, build_index
from forebear.indexer.data import rows_from_texts
from forebear.indexer.model import Classifier, load_classifier, make_classifier
from forebear.indexer.runs import choose_model
from forebear.indexer.scopes import scope_blocks
from forebear.indexer.sketch import Sketcher, fit_reduction
from forebear.retriever.gradients import exact_dots, query_gradients

TEXTS = sentences(13, seed=11)
LABELS = np.array(labels(13, 3))
ETAS = [0.1, 0.3]


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


@pytest.fixture(scope="module", params=[*KINDS, "albert"])
def classifier(request, folder) -> Classifier:
    path = folder / request.param
    path = albert(path) if request.param == "albert" else make_tiny_model(path, request.param, n_classes=3)
    return load_classifier(path)


def names_of(blocks) -> tuple[str, ...]:
    return tuple(block.name for block in blocks)


def autograd(classifier: Classifier, names, texts, wanted) -> list[list[torch.Tensor]]:
    """Weight gradients one row at a time, no padding, no hooks."""
    weights = [classifier.model.get_submodule(name).weight for name in names]
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


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_sketches_and_norms_equal_those_of_autograd_gradients(classifier, batch_tokens):
    for scope in scopes_of(classifier):
        sketcher = Sketcher(classifier, scope, seed=3)
        found = sketcher.sketch([TEXTS], LABELS, batch_tokens=batch_tokens)
        for i, gradients in enumerate(autograd(classifier, names_of(sketcher.blocks), TEXTS, LABELS)):
            norm = np.sqrt(dot(gradients, gradients))
            parts = [
                (basis.left.double() @ g.double() @ basis.right.double().T).flatten()
                for basis, g in zip(sketcher.bases.values(), gradients, strict=True)
            ]
            assert found.norms[i] == pytest.approx(norm, rel=1e-5)
            sketch = torch.cat(parts).numpy()
            assert np.abs(found.sketches[i] - sketch).max() <= 1e-5 * norm
            assert np.linalg.norm(found.sketches[i]) <= norm * (1 + 1e-6)


@pytest.mark.parametrize("n_queries", [1, 4])
def test_exact_dots_equal_those_of_autograd_gradients(classifier, n_queries):
    for scope in scopes_of(classifier):
        sketcher = Sketcher(classifier, scope, seed=0)
        asked, targets = sentences(n_queries, seed=5), np.array(labels(n_queries, 3, seed=2))
        vectors = query_gradients(sketcher, [asked], targets)
        found = exact_dots(sketcher, vectors, [TEXTS], LABELS)
        queries = autograd(classifier, names_of(sketcher.blocks), asked, targets)
        rows = autograd(classifier, names_of(sketcher.blocks), TEXTS, LABELS)
        wanted = np.array([[dot(q, r) for r in rows] for q in queries])
        assert (np.abs(found - wanted).max(axis=1) <= 1e-5 * np.abs(wanted).max(axis=1)).all()


def test_in_float64_they_agree_to_ten_digits(folder):
    path = make_tiny_model(folder / "double", n_classes=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    classifier = make_classifier(model, tokenizer, name="double", device=torch.device("cpu"))
    sketcher = Sketcher(classifier, "all", seed=0)
    vectors = query_gradients(sketcher, [TEXTS[:2]], LABELS[:2])
    found = exact_dots(sketcher, vectors, [TEXTS], LABELS)
    rows = autograd(classifier, names_of(sketcher.blocks), TEXTS, LABELS)
    wanted = np.array([[dot(q, r) for r in rows] for q in rows[:2]])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_exact_dots_equal_a_jvp_of_the_loss(folder):
    """Forward-mode differentiation of the row loss along V shares no step with the hooks."""
    path = make_tiny_model(folder / "jvp", n_classes=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    classifier = load_classifier(path)
    sketcher = Sketcher(classifier, "all", seed=0)
    vectors = query_gradients(sketcher, [TEXTS[:1]], LABELS[:1])
    found = exact_dots(sketcher, vectors, [TEXTS], LABELS)[0]
    parameters = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names_of(sketcher.blocks)}
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
    Sketcher(classifier, "all", seed=0).sketch([TEXTS], LABELS, batch_tokens=500)
    for name, p in classifier.model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in classifier.model.modules())


def test_bases_and_reduction_have_orthonormal_rows(classifier):
    sketcher = Sketcher(classifier, "all", seed=0)
    for basis in sketcher.bases.values():
        for rows in (basis.left, basis.right):
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
    raw = sketcher.sketch([TEXTS], LABELS, batch_tokens=500).sketches
    reduction = fit_reduction(raw, 6, seed=0)
    assert reduction.shape == (6, sketcher.raw_width)
    np.testing.assert_allclose(reduction @ reduction.T, np.eye(6), atol=1e-5)
    reduced = Sketcher(classifier, "all", 0, reduction).sketch([TEXTS], LABELS, batch_tokens=500).sketches
    np.testing.assert_allclose(reduced, raw @ reduction.T, atol=1e-4 * np.abs(raw).max())


def test_scopes_name_their_layers(folder):
    classifier = load_classifier(make_tiny_model(folder / "named", n_classes=3))
    everything = names_of(scope_blocks(classifier.model, "classifier", "all"))
    assert everything == tuple(k for k, m in classifier.model.named_modules() if isinstance(m, torch.nn.Linear))
    top = names_of(scope_blocks(classifier.model, "classifier", "top-1"))
    assert set(top) == {k for k in everything if ".layer.1." in k} | {"bert.pooler.dense", "classifier"}
    for wrong, message in (("top-0", "top-1 to top-2"), ("top-3", "top-1 to top-2"), ("most", "top-K")):
        with pytest.raises(InputError, match=message):
            scope_blocks(classifier.model, "classifier", wrong)


def test_a_layer_that_is_not_supported_is_named_before_the_pass(folder, tmp_path):
    classifier = load_classifier(make_tiny_model(folder / "odd", n_classes=3))
    classifier.model.bert.encoder.layer[1].mixer = torch.nn.Conv1d(16, 16, 3)
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer\.1\.mixer \(Conv1d\)"):
        scope_blocks(classifier.model, "classifier", "all")
    with pytest.raises(ModelError, match="mixer"):
        scope_blocks(classifier.model, "classifier", "top-1")


@pytest.fixture(scope="module")
def world(folder):
    """An index of two checkpoints with sketched scopes, and its retriever."""
    models = [str(make_tiny_model(folder / f"m{i}", n_classes=3, seed=i)) for i in range(2)]
    source = rows_from_texts(sentences(90), labels(90, 3))
    chosen = choose_model(None, models, ETAS).checkpoints
    options = BuildOptions(scopes=("head", "all", "top-1"), sketch_dim=48, shard_rows=32)
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
    names = names_of(scope_blocks(classifier.model, classifier.head_name, scope))
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
    names = names_of(scope_blocks(classifier.model, classifier.head_name, scope))
    rows = autograd(classifier, names, sentences(90), labels(90, 3))
    asked = autograd(classifier, names, queries, [1] * len(queries))
    dots = np.array([[dot(q, r) for r in rows] for q in asked])
    lengths = [np.sqrt([dot(g, g) for g in some]) for some in (asked, rows)]
    return dots, dots / np.outer(*lengths)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())


@pytest.mark.parametrize("scope", ["all", "top-1"])
def test_gd_gc_and_tracin_equal_autograd_and_captum(world, scope):
    _, retriever, models, _, _ = world
    queries = sentences(4, seed=8)
    dots, cosines = autograd_scores(models[-1], scope, queries)
    first, _ = autograd_scores(models[0], scope, queries)
    wanted = {"gd": dots, "gc": cosines, "tracin": ETAS[0] * first + ETAS[1] * dots}
    for name, truth in wanted.items():
        assert error(retriever.scores(queries, name, scope=scope, target="LABEL_1"), truth) <= 1e-5, name
    assert error(captum_scores(models[-1], scope, queries), dots) <= 1e-5


@pytest.mark.parametrize("scope", ["all", "top-1"])
def test_candidates_are_scored_exactly_and_enough_of_them_give_the_full_answer(world, scope):
    index, retriever, _, _, _ = world
    queries = sentences(5, seed=9)
    ask = {"methods": ["gd", "gc", "tracin"], "top": 6, "scope": scope}
    full = retriever.retrieve(queries, exact="full", **ask)
    every = retriever.retrieve(queries, candidates=index.manifest.n_live, **ask)
    assert every["row"].to_pylist() == full["row"].to_pylist()
    np.testing.assert_allclose(every["score"].to_numpy(), full["score"].to_numpy(), rtol=1e-4, atol=1e-6)
    some = retriever.retrieve(queries, candidates=30, **ask).to_pylist()
    scores = {m: retriever.scores(queries, m, scope=scope) for m in ask["methods"]}
    for row in some:
        assert row["score"] == pytest.approx(scores[row["method"]][row["query"], row["row"]], rel=1e-4, abs=1e-6)
    hits = np.mean([a["row"] in {b["row"] for b in full.to_pylist() if b["query"] == a["query"]} for a in some])
    assert hits > 0.7
    rough = retriever.retrieve(queries, exact="none", **ask)
    assert not any(rough["exact"].to_pylist())


def test_methods_that_compare_no_gradients_are_the_same_at_every_scope(world):
    _, retriever, _, _, _ = world
    ask = {"methods": ["nn-cos"], "top": 3}
    assert retriever.retrieve(["a film"], scope="all", **ask).equals(retriever.retrieve(["a film"], **ask))
    for name in ("if", "rif", "rep", "tracin-last"):
        with pytest.raises(InputError, match=f"method {name} is not available at scope all"):
            retriever.retrieve(["a film"], methods=[name], scope="all")
    with pytest.raises(MissingStoreError, match="--scope head,top-2"):
        retriever.retrieve(["a film"], methods=["gd"], scope="top-2")


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


def test_stored_sketches_are_unit_vectors_with_their_lengths(world):
    index, _, _, _, _ = world
    store = index.gradients("all")
    sketches = store.sketches.take(np.arange(90)).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), 1.0, atol=2e-3)
    assert (store.lengths <= store.norms * (1 + 1e-5)).all()
    np.testing.assert_allclose(
        store.residual_lengths**2 + store.lengths**2,
        store.norms**2,
        rtol=1e-4,
        atol=1e-6 * float(store.norms.max()) ** 2,
    )


def test_info_and_verify_tell_of_sketched_scopes(world, capsys):
    from forebear.cli.main import run

    index, _, _, _, _ = world
    assert run(["info", str(index.folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("representations") == 1
    assert "all: sketch of 48" in out
    assert "head: exact, 3 x 16" in out
    assert run(["verify", str(index.folder)]) == 0
    args = ["retrieve", "--index", str(index.folder), "--text", "a film", "--method", "gd,gc", "--scope", "top-1"]
    assert run([*args, "--top", "3", "--candidates", "10"]) == 0
    assert "gc: opponents of" in capsys.readouterr().out


def test_rounding_to_fp16_does_not_reorder_nearly_parallel_sketches(world, monkeypatch):
    """Sketches with one dominant component: fp16 changes their length by more than their cosines differ."""
    from dataclasses import replace

    from forebear.indexer.store import RowMatrix
    from forebear.retriever.gradients import GradientSearch
    from forebear.retriever.methods import METHODS

    index, retriever, _, _, _ = world
    search = GradientSearch(index, retriever._models, "all", [["a film"]], np.array([1]), all_checkpoints=False)
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.ones((90, 1)), 0.003 * rng.normal(size=(90, 47))], axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    part = search.parts[0]
    store = replace(part.store, sketches=RowMatrix([vectors.astype(np.float16)]))
    asked = replace(part.asked, sketches=vectors[:1].astype(np.float32))
    search.parts = [replace(part, store=store, asked=asked)]
    found = search._approximate(METHODS["gc"])[0]
    truth = vectors @ vectors[0]
    assert len(set(np.argsort(-found)[:10]) & set(np.argsort(-truth)[:10])) >= 8
