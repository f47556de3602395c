"""Class weights and label smoothing, from training to answers: every number against torch's own loss and autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import error
from tiny import labels, make_tiny_model, sentences, write_jsonl
from torch import nn

from forebear.cli.main import run
from forebear.evaluation.python.explaining import saliency
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.curvature.products import HessianProduct
from forebear.indexer.index import Index
from forebear.indexer.training.run import read_run
from forebear.retriever.retriever import Retriever

N_CLASSES, N_ROWS, N_QUERIES = 3, 24, 4
WEIGHTS, SMOOTHING, DAMPING = (0.5, 2.0, 1.25), 0.15, 0.03
LOSS = nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double(), reduction="sum", label_smoothing=SMOOTHING)
TEXTS, LABELS, QUERIES = sentences(N_ROWS, 3), labels(N_ROWS, N_CLASSES), sentences(N_QUERIES, 8)
LAYERS = ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("losses") / "model", n_classes=N_CLASSES)


@pytest.fixture(scope="module")
def retriever(model: Path) -> Retriever:
    index = Index.build(
        model, TEXTS, model.parent / "index", LABELS, class_weights=WEIGHTS, label_smoothing=SMOOTHING,
        scopes=("head", "top-1"), stores=("features", "words"), words_tops=(0,), dampings=(str(DAMPING),),
        calibration_queries=0, rep_refit=True, warn=lambda _line: None,
    )  # fmt: skip
    return Retriever(index)


class Oracle:
    """The model in float64, one row at a time; nothing of the package."""

    def __init__(self, folder: Path) -> None:
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = load(folder, attn_implementation="eager").eval().double()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        names = [name for name, p in self.model.named_parameters() if name.startswith(LAYERS) and p.dim() == 2]
        self.scopes = {"head": ["classifier.weight"], "top-1": names, "words": [WORDS]}
        self.predicted = [int(self.logits(text).argmax()) for text in QUERIES]

    def logits(self, text: str) -> torch.Tensor:
        return self.model(**self.tokenizer(text, return_tensors="pt")).logits[0]

    def gradient(self, text: str, label: int, scope: str) -> torch.Tensor:
        weights = [self.model.get_parameter(name) for name in self.scopes[scope]]
        return flat(torch.autograd.grad(LOSS(self.logits(text), torch.tensor(label)), weights))

    def gradients(self, scope: str) -> tuple[np.ndarray, np.ndarray]:
        """Of the queries and of the rows."""
        sides = ((QUERIES, self.predicted), (TEXTS, LABELS))
        queries, rows = (
            torch.stack([self.gradient(text, label, scope) for text, label in zip(*side, strict=True)]).numpy()
            for side in sides
        )
        return queries, rows

    def gauss_newton(self, scope: str) -> np.ndarray:
        """Mean over rows of J^T (d^2 loss / d logits^2) J, the latter by autograd too."""
        weights = [self.model.get_parameter(name) for name in self.scopes[scope]]
        total: Any = 0
        for text, label in zip(TEXTS, LABELS, strict=True):
            logits = self.logits(text)
            target = torch.tensor(label)
            b = torch.autograd.functional.hessian(lambda z, y=target: LOSS(z, y), logits.detach())
            jacobian = torch.stack([flat(torch.autograd.grad(z, weights, retain_graph=True)) for z in logits])
            total = total + jacobian.T @ b @ jacobian
        return total.numpy() / N_ROWS

    def hessian_times(self, vectors: np.ndarray, scope: str) -> np.ndarray:
        """H v of each vector, H being the Hessian of the mean loss."""
        weights = [self.model.get_parameter(name) for name in self.scopes[scope]]
        losses = [LOSS(self.logits(text), torch.tensor(label)) for text, label in zip(TEXTS, LABELS, strict=True)]
        gradient = flat(torch.autograd.grad(sum(losses) / N_ROWS, weights, create_graph=True))
        products = [torch.autograd.grad(gradient @ torch.tensor(v), weights, retain_graph=True) for v in vectors]
        return torch.stack([flat(product) for product in products]).numpy()


def flat(parts: Any) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.mark.parametrize("scope", ["head", "top-1"])
def test_gradients_are_those_of_the_loss(scope, retriever, oracle):
    queries, rows = oracle.gradients(scope)
    assert error(retriever.scores(QUERIES, "gd", scope=scope), queries @ rows.T) < 1e-5
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    assert error(retriever.scores(QUERIES, "gc", scope=scope), queries @ rows.T / lengths) < 1e-5


@pytest.mark.parametrize("curvature", ["exact", "cg"])
def test_influence_at_the_head_is_that_of_the_dense_hessian(curvature, retriever, oracle):
    queries, rows = oracle.gradients("head")
    inverse = np.linalg.inv(oracle.gauss_newton("head") + DAMPING * np.eye(rows.shape[1]))
    asked: dict[str, Any] = {"curvature": curvature, "damping": str(DAMPING), "tolerance": 1e-9}
    assert error(retriever.scores(QUERIES, "if", **asked), queries @ inverse @ rows.T) < 1e-5
    own = [np.einsum("np,pr,nr->n", g, inverse, g) for g in (queries, rows)]
    truth = queries @ inverse @ rows.T / np.sqrt(own[0])[:, None] / np.sqrt(own[1])
    assert error(retriever.scores(QUERIES, "rif", **asked), truth) < 1e-5


def test_influence_beyond_the_head_is_that_of_the_dense_gauss_newton_matrix(retriever, oracle):
    queries, rows = oracle.gradients("top-1")
    matrix = oracle.gauss_newton("top-1")
    truth = queries @ np.linalg.solve(matrix + DAMPING * np.eye(len(matrix)), rows.T)
    asked: dict[str, Any] = {"scope": "top-1", "curvature_rows": 0, "damping": str(DAMPING)}
    assert error(retriever.scores(QUERIES, "if", curvature="cg", tolerance=1e-6, **asked), truth) < 1e-4
    ekfac = retriever.index.ekfac("top-1")
    assert ekfac.mean_eigenvalue == pytest.approx(np.trace(matrix) / len(matrix), rel=1e-4)
    found = retriever.scores(QUERIES, "if", **asked)
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(found, truth, strict=True)) > 0.9


def test_products_with_the_hessian_are_those_of_the_loss(retriever, oracle):
    classifier = retriever.classifier()
    scope = retriever.index.scope(classifier, "top-1")
    product = HessianProduct(classifier, scope, [TEXTS], np.array(LABELS), batch_tokens=64)
    generator = torch.Generator().manual_seed(0)
    shapes = {block.name: (2, block.n_out, block.n_in) for block in scope.blocks}
    vectors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    order = [name.removesuffix(".weight") for name in oracle.scopes["top-1"]]
    assert sorted(order) == sorted(vectors)
    columns = np.concatenate([vectors[name].flatten(1).double().numpy() for name in order], axis=1)
    found = product(vectors)
    products = np.concatenate([found[name].flatten(1).numpy() for name in order], axis=1)
    assert error(products, oracle.hessian_times(columns, "top-1")) < 1e-4


def test_words_and_representer_values_are_those_of_the_loss(retriever, oracle):
    queries, rows = oracle.gradients("words")
    assert error(retriever.scores(QUERIES, "tracin-we"), queries @ rows.T) < 2e-3  # word vectors of 16 bits
    head = oracle.gradients("head")[1].reshape(N_ROWS, N_CLASSES, -1)
    stored = retriever.index.residuals().take(np.arange(N_ROWS))
    features = retriever.index.features().take(np.arange(N_ROWS))
    assert error(np.einsum("nc,nh->nch", stored, features).reshape(N_ROWS, -1), head.reshape(N_ROWS, -1)) < 1e-5


def test_the_refitted_head_is_stationary_for_the_weighted_loss(retriever):
    """At the optimum of mean w_n CE(p_n, softmax(W f)) + lambda |W|^2, 2 lambda W is minus the mean gradient."""
    index = retriever.index
    rows = np.arange(N_ROWS)
    f = np.hstack([index.features().take(rows).astype(np.float64), np.ones((N_ROWS, 1))])
    weights = (1 - SMOOTHING) * np.array(WEIGHTS)[LABELS] + SMOOTHING * np.mean(WEIGHTS)
    targets = (1 - SMOOTHING) * np.eye(N_CLASSES)[LABELS] * np.array(WEIGHTS) + SMOOTHING / N_CLASSES * np.array(
        WEIGHTS
    )
    refitted = (index.head.representer_residuals().take(rows) + targets) / weights[
        :, None
    ]  # softmax of the refitted head
    p = index.loss.outputs_of_residuals(index.residuals().take(rows), np.array(LABELS))
    logits = np.log(refitted) - np.log(refitted).mean(axis=1, keepdims=True)
    w = -((weights[:, None] * (refitted - p)).T @ f) / N_ROWS / (2 * 0.1)
    fitted = f @ w.T
    np.testing.assert_allclose(fitted - fitted.mean(axis=1, keepdims=True), logits, atol=1e-4)


def test_saliency_is_that_of_the_loss(retriever, oracle):
    found = saliency(retriever, QUERIES[:2])
    for map_found, text, label in zip(found, QUERIES, oracle.predicted, strict=False):
        inputs = oracle.tokenizer(text, return_tensors="pt")
        words = oracle.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        kept = {name: inputs[name] for name in ("attention_mask", "token_type_ids")}
        logits = oracle.model(inputs_embeds=words, **kept).logits[0]
        (gradient,) = torch.autograd.grad(LOSS(logits, torch.tensor(label)), words)
        value = -(gradient * words).sum(dim=-1)[0].detach().numpy()
        np.testing.assert_allclose(map_found.values, value / np.abs(value).sum(), atol=1e-5)


# --- the command ---


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    gold = ["bad"] * 20 + ["good"] * 10
    return write_jsonl(tmp_path / "rows.jsonl", text=sentences(30, 1), label=gold)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model without dropout, so that the loss of a step can be computed again."""
    folder = make_tiny_model(tmp_path / "start")
    config = json.loads((folder / "config.json").read_text())
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "id2label": {0: "bad", 1: "good"}}
    (folder / "config.json").write_text(json.dumps(config | changes | {"label2id": {"bad": 0, "good": 1}}))
    return folder


def forebear(*arguments: Any) -> int:
    return run(list(map(str, arguments)))


def test_a_run_is_trained_by_its_loss_and_its_index_has_it(rows, start, tmp_path, capsys):
    out, index = tmp_path / "run", tmp_path / "index"
    train = ("train", "--data", rows, "--model", start, "--out", out, "--epochs", 1, "--batch-size", 30, "--quiet")
    chosen = ("--class-weights", "balanced", "--label-smoothing", 0.1)
    assert forebear(*train, "--precision", "fp32", *chosen) == 0
    weights = (30 / 40, 30 / 20)
    trained = read_run(out)
    assert trained is not None
    assert trained.settings["class_weights"] == pytest.approx(weights)
    assert trained.settings["label_smoothing"] == 0.1
    oracle = Oracle(start)
    texts = [json.loads(line) for line in rows.read_text().splitlines()]
    logits = torch.stack([oracle.logits(row["text"]) for row in texts])
    gold = torch.tensor([row["label"] == "good" for row in texts]).long()
    loss = nn.functional.cross_entropy(logits, gold, torch.tensor(weights).double(), label_smoothing=0.1)
    assert trained.checkpoints[0].train_loss == pytest.approx(loss.item(), rel=1e-5)

    build = ("index", "--model", out, "--train", rows, "--quiet")
    assert forebear(*build, "--out", index) == 0
    spec = Index.open(index).manifest.spec
    assert spec.class_weights == pytest.approx(weights)
    assert spec.label_smoothing == 0.1
    capsys.readouterr()
    assert forebear("info", index) == 0
    shown = capsys.readouterr().out
    assert "class weights bad 0.75, good 1.5" in shown
    assert "label smoothing 0.1" in shown
    assert forebear("verify", index) == 0

    assert forebear(*build, "--out", tmp_path / "plain", "--class-weights", "none", "--label-smoothing", 0) == 0
    plain = Index.open(tmp_path / "plain").manifest.spec
    assert plain.loss.is_plain
    assert plain.digest() != spec.digest()
    assert forebear(*build, "--out", tmp_path / "given", "--class-weights", "1,3") == 0
    assert Index.open(tmp_path / "given").manifest.spec.class_weights == (1.0, 3.0)


def test_append_and_retrain_keep_the_loss(rows, start, tmp_path):
    out, index = tmp_path / "run", tmp_path / "index"
    train = ("train", "--data", rows, "--model", start, "--out", out, "--epochs", 1, "--batch-size", 30, "--quiet")
    assert forebear(*train, "--precision", "fp32", "--class-weights", "1,4") == 0
    assert forebear("index", "--model", out, "--train", rows, "--out", index, "--quiet") == 0
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(6, 7), label=["bad", "good"] * 3)
    assert forebear("index", "--out", index, "--append", "--train", more, "--quiet") == 0
    opened = Index.open(index)
    assert opened.manifest.spec.class_weights == (1.0, 4.0)
    assert forebear("verify", index, "--rows", 36) == 0
    sums = np.abs(opened.residuals().take(np.arange(36))).max(axis=1)
    assert sums[opened.labels == 1].max() > 1  # p - y alone is never beyond 1

    full = open_retrainer(Retriever(opened), "full", [QUERIES], tmp_path / "cache", run=out)
    assert full.recipe.facts["options"]["class_weights"] == [1.0, 4.0]
    assert full.recipe._start.at(0).loss == opened.loss


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--class-weights", "1,2,3"), "3 number(s); the model has 2 classes, bad, good"),
        (("--class-weights", "even"), "expected balanced, none, or a positive number"),
        (("--label-smoothing", "1"), "--label-smoothing 1.0: expected a number from 0"),
    ],
)
def test_what_means_nothing_is_refused_before_the_work(given, said, rows, start, tmp_path, capsys):
    for command in (("train", "--data", rows), ("index", "--train", rows)):
        assert forebear(*command, "--model", start, "--out", tmp_path / "out", *given) == 2
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if not line.startswith("warning:")]
        assert said in line
        assert not list((tmp_path / "out").glob("*"))
