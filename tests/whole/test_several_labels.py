"""Several labels a row, and numbers, from index to answers: every number against torch's own loss and autograd."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import error
from tiny import make_tiny_model, sentences, write_jsonl
from torch import nn

from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.python.explaining import saliency
from forebear.indexer.building.build import append_rows, retire_rows
from forebear.indexer.building.verify import verify_index
from forebear.indexer.curvature.products import HessianProduct
from forebear.indexer.index import Index
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.question.targets import choose_targets
from forebear.retriever.retriever import Retriever

N_ROWS, N_QUERIES, DAMPING = 24, 4, 0.03
TEXTS, QUERIES = sentences(N_ROWS, 3), sentences(N_QUERIES, 8)
NAMES = ("bad", "film", "good")
LAYERS = ("bert.encoder.layer.", "bert.pooler.", "classifier.")
WORDS = "bert.embeddings.word_embeddings.weight"
KINDS = ("multi_label_classification", "regression")


def targets_of(texts: list[str], kind: str) -> np.ndarray:
    if kind == "regression":
        return np.array([[len(text.split()) / 4.0] for text in texts])
    return np.array(
        [[float(name in text.split() or len(text) % 7 == k) for k, name in enumerate(NAMES)] for text in texts]
    )


class Case:
    """A model of one kind, its index, and the model in float64 for oracles, which share no code with the package."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, names = kind, NAMES if kind == KINDS[0] else ("length",)
        self.folder = make_tiny_model(folder / "model", n_classes=len(names))
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) | {"problem_type": kind, "id2label": dict(enumerate(names))}
        path.write_text(json.dumps(config))
        self.names, self.targets = names, targets_of(TEXTS, kind)
        listed = self.targets if kind == KINDS[0] else self.targets[:, 0]
        self.index = Index.build(
            self.folder, TEXTS, folder / "index", listed.tolist(), label_names=NAMES if kind == KINDS[0] else None,
            scopes=("head", "top-1", "all"), stores=("features", "words", "spans"), words_tops=(0,), spans="words",
            dampings=(str(DAMPING),), calibration_queries=8, warn=lambda _line: None,
        )  # fmt: skip
        self.retriever = Retriever(self.index)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = load(self.folder, attn_implementation="eager").eval().double()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        linear = [n for n, p in self.model.named_parameters() if n.startswith(LAYERS) and p.dim() == 2]
        self.scopes = {"head": ["classifier.weight"], "all": linear, "words": [WORDS]}
        self.scopes["top-1"] = [name for name in linear if not name.startswith("bert.encoder.layer.0.")]
        with torch.no_grad():
            self.predicted = torch.stack([self.logits(text) for text in QUERIES]).numpy()

    def logits(self, text: str) -> torch.Tensor:
        return self.model(**self.tokenizer(text, return_tensors="pt")).logits[0]

    def loss(self, logits: torch.Tensor, target: np.ndarray) -> torch.Tensor:
        of_torch = nn.BCEWithLogitsLoss() if self.kind == KINDS[0] else nn.MSELoss()
        return of_torch(logits, torch.from_numpy(target))

    def query_loss(self, text: str, query: int) -> torch.Tensor:
        """Of the predicted labels; of a number minus the output, so that what raises it is a proponent."""
        if self.kind == "regression":
            return -self.logits(text).mean()
        return self.loss(self.logits(text), (self.predicted[query] > 0).astype(float))

    def gradient(self, loss: torch.Tensor, scope: str) -> np.ndarray:
        weights = [self.model.get_parameter(name) for name in self.scopes[scope]]
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)]).numpy()

    def row_gradients(self, scope: str) -> np.ndarray:
        losses = (self.loss(self.logits(text), target) for text, target in zip(TEXTS, self.targets, strict=True))
        return np.stack([self.gradient(loss, scope) for loss in losses])

    def query_gradients(self, scope: str) -> np.ndarray:
        return np.stack([self.gradient(self.query_loss(text, q), scope) for q, text in enumerate(QUERIES)])

    def features(self, texts: list[str]) -> np.ndarray:
        found: list[torch.Tensor] = []
        hook = self.model.classifier.register_forward_pre_hook(lambda _m, args: found.append(args[0][0]))
        with torch.no_grad():
            for text in texts:
                self.logits(text)
        hook.remove()
        return torch.stack(found).numpy()

    def head_hessian(self) -> np.ndarray:
        """Of the mean loss, over the head's weight, by torch."""
        f, t = torch.from_numpy(self.features(TEXTS)), torch.from_numpy(self.targets)
        of_torch = nn.BCEWithLogitsLoss() if self.kind == KINDS[0] else nn.MSELoss()
        weight, bias = self.model.classifier.weight.detach(), self.model.classifier.bias.detach()

        def mean(flat: torch.Tensor) -> torch.Tensor:
            return of_torch(f @ flat.view_as(weight).T + bias, t)

        return torch.autograd.functional.hessian(mean, weight.reshape(-1)).numpy()


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def labels_case(tmp_path_factory) -> Case:
    return Case(KINDS[0], tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def numbers_case(tmp_path_factory) -> Case:
    return Case(KINDS[1], tmp_path_factory.mktemp("numbers"))


@pytest.mark.parametrize("scope", ["head", "top-1", "all"])
def test_gradients_are_those_of_the_loss(scope, case):
    queries, rows = case.query_gradients(scope), case.row_gradients(scope)
    assert error(case.retriever.scores(QUERIES, "gd", scope=scope), queries @ rows.T) < 1e-5
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    assert error(case.retriever.scores(QUERIES, "gc", scope=scope), queries @ rows.T / lengths) < 1e-5
    method = "tracin" if scope != "head" else "tracin-last"
    assert error(case.retriever.scores(QUERIES, method, scope=scope), queries @ rows.T) < 1e-5


def test_stored_losses_targets_and_predictions_are_those_of_the_model(case):
    with torch.no_grad():
        logits = torch.stack([case.logits(text) for text in TEXTS])
        losses = [case.loss(z, target).item() for z, target in zip(logits, case.targets, strict=True)]
    np.testing.assert_allclose(case.index.losses, losses, rtol=1e-4)
    everywhere = np.arange(N_ROWS)
    np.testing.assert_array_equal(case.index.targets(everywhere), case.targets)
    said = (logits > 0).double() if case.kind == KINDS[0] else logits
    np.testing.assert_allclose(case.index.predictions, said.numpy(), rtol=1e-4, atol=1e-5)
    assert case.index.manifest.spec.problem_type == case.kind


@pytest.mark.parametrize("curvature", ["exact", "cg"])
def test_influence_at_the_head_is_that_of_the_dense_hessian(curvature, case):
    queries, rows = case.query_gradients("head"), case.row_gradients("head")
    inverse = np.linalg.inv(case.head_hessian() + DAMPING * np.eye(rows.shape[1]))
    asked: dict[str, Any] = {"curvature": curvature, "damping": str(DAMPING), "tolerance": 1e-9}
    assert error(case.retriever.scores(QUERIES, "if", **asked), queries @ inverse @ rows.T) < 1e-5
    own = [np.einsum("np,pr,nr->n", g, inverse, g) for g in (queries, rows)]
    truth = queries @ inverse @ rows.T / np.sqrt(own[0])[:, None] / np.sqrt(own[1])
    assert error(case.retriever.scores(QUERIES, "rif", **asked), truth) < 1e-5
    if curvature == "exact":
        np.testing.assert_allclose(case.index.head.self_influence(), own[1], rtol=1e-5)
        mean = np.trace(case.head_hessian()) / rows.shape[1]
        assert case.index.head.mean_eigenvalue == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("scope", ["top-1"])
def test_influence_beyond_the_head_is_that_of_the_gauss_newton_matrix(scope, case):
    queries, rows = case.query_gradients(scope), case.row_gradients(scope)
    weights = [case.model.get_parameter(name) for name in case.scopes[scope]]
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for text, target in zip(TEXTS, case.targets, strict=True):
        logits = case.logits(text)
        b = torch.autograd.functional.hessian(lambda z, t=target: case.loss(z, t), logits.detach()).numpy()
        jacobian = np.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(z, weights, retain_graph=True)]).numpy()
            for z in logits
        ])  # fmt: skip
        total += jacobian.T @ b @ jacobian / N_ROWS
    inverse = np.linalg.inv(total + DAMPING * np.eye(len(total)))
    found = case.retriever.scores(
        QUERIES, "if", scope=scope, curvature="cg", damping=str(DAMPING), tolerance=1e-7, curvature_rows=0
    )
    assert error(found, queries @ inverse @ rows.T) < 1e-4


def test_hessian_products_are_those_of_double_backward(case):
    classifier, scope = case.retriever.classifier(), case.index.scope(case.retriever.classifier(), "top-1")
    product = HessianProduct(classifier, scope, [TEXTS], case.index.targets(np.arange(N_ROWS)), batch_tokens=256)
    generator = torch.Generator().manual_seed(0)
    vectors = {block.name: torch.randn(1, block.n_out, block.n_in, generator=generator) for block in scope.blocks}
    found = product(vectors)
    weights = [case.model.get_parameter(name) for name in case.scopes["top-1"]]
    losses = [case.loss(case.logits(text), target) for text, target in zip(TEXTS, case.targets, strict=True)]
    gradients = torch.autograd.grad(sum(losses) / N_ROWS, weights, create_graph=True)
    parts: dict[str, torch.Tensor] = {}
    for block in scope.blocks:
        parts |= {name: v[0].double() for name, v in block.split(vectors[block.name]).items()}
    products = torch.autograd.grad(gradients, weights, [parts[name] for name in case.scopes["top-1"]])
    for name, truth in zip(case.scopes["top-1"], products, strict=True):
        block = next(b for b in scope.blocks if name in b.parameter_names)
        torch.testing.assert_close(block.split(found[block.name])[name][0].double(), truth, rtol=1e-3, atol=1e-5)


def test_words_and_tfidf_are_of_the_loss(case):
    rows, queries = case.row_gradients("words"), case.query_gradients("words")
    assert error(case.retriever.scores(QUERIES, "tracin-we"), queries @ rows.T) < 2e-3  # word vectors of 16 bits
    found = case.retriever.retrieve(QUERIES, methods=("tracin-we", "tracin-tfidf"), top=3)
    assert found.num_rows == N_QUERIES * 2 * 2 * 3


def test_representer_points_add_up_the_output(case):
    """rep is alpha_n <f_n, f_q> with alpha_n = -(dL/dz) / (2 N), summed with the sign of each target."""
    rows, queries = case.features(TEXTS), case.features(QUERIES)
    residuals = np.stack([
        torch.autograd.functional.jacobian(lambda z, t=t: case.loss(z, t), case.logits(x).detach()).numpy()
        for x, t in zip(TEXTS, case.targets, strict=True)
    ])  # fmt: skip
    signs = np.sign(case.predicted) if case.kind == KINDS[0] else np.ones((N_QUERIES, 1))
    truth = -(signs @ residuals.T) * (queries @ rows.T) / (2 * N_ROWS)
    assert error(case.retriever.scores(QUERIES, "rep"), truth) < 1e-5


def test_one_label_is_the_model_of_that_label_alone(labels_case):
    """``label:NAME`` is influence in a logistic model of this label alone, assembled here, of c times the damping."""
    case, c = labels_case, len(NAMES)
    rows, queries = case.features(TEXTS), case.features(QUERIES)
    for k, name in enumerate(NAMES):
        with torch.no_grad():
            z = np.array([case.logits(text)[k].item() for text in TEXTS])
        p, t = 1 / (1 + np.exp(-z)), case.targets[:, k]
        hessian = rows.T @ ((p * (1 - p))[:, None] * rows) / N_ROWS
        zq = case.predicted[:, k]
        left = ((1 / (1 + np.exp(-zq))) - (zq > 0))[:, None] * queries
        right = (p - t)[:, None] * rows
        inverse = np.linalg.inv(hessian + c * DAMPING * np.eye(rows.shape[1]))
        asked: dict[str, Any] = {"target": f"label:{name}"}
        assert error(case.retriever.scores(QUERIES, "if", **asked), left @ inverse @ right.T) < 1e-5
        assert error(case.retriever.scores(QUERIES, "gd", **asked), left @ right.T / c) < 1e-5
        deep = np.stack([
            case.gradient(nn.functional.binary_cross_entropy_with_logits(
                case.logits(text)[k], torch.tensor(float(case.predicted[q, k] > 0), dtype=torch.float64)), "top-1")
            for q, text in enumerate(QUERIES)
        ])  # fmt: skip
        truth = deep @ case.row_gradients("top-1").T
        assert error(case.retriever.scores(QUERIES, "gd", scope="top-1", **asked), truth) < 1e-5
    table = case.retriever.retrieve(QUERIES[:1], target="label:good", top=2)
    assert set(table["target"].to_pylist()) == {"good" if case.predicted[0, 2] > 0 else "not good"}
    assert table.equals(case.retriever.retrieve(QUERIES[:1], target="LABEL:GOOD", top=2))


def test_leaving_a_row_out_of_ridge_regression_is_told_by_influence(numbers_case):
    """At the optimum of a squared loss, influence / N over 1 - leverage is exactly the change without the row.

    theta minimises 1/N sum of (f theta - t)^2 + damping / 2 |theta|^2. Without row n it moves by H^-1 g_n / N, divided
    by 1 - 2 f_n H^-1 f_n / N (Sherman and Morrison), H being the damped mean curvature.
    """
    case = numbers_case
    f, q, t = case.features(TEXTS), case.features(QUERIES), case.targets[:, 0]
    hessian = 2 * f.T @ f / N_ROWS + DAMPING * np.eye(f.shape[1])
    theta = np.linalg.solve(hessian, 2 * f.T @ t / N_ROWS)
    residual = 2 * (f @ theta - t)
    influence = (-q @ np.linalg.inv(hessian)) @ (residual[:, None] * f).T  # of an optimal head, on the output
    changes = np.empty((N_QUERIES, N_ROWS))
    for n in range(N_ROWS):
        kept = np.arange(N_ROWS) != n
        without = 2 * f[kept].T @ f[kept] / N_ROWS + DAMPING * np.eye(f.shape[1])
        changes[:, n] = q @ (theta - np.linalg.solve(without, 2 * f[kept].T @ t[kept] / N_ROWS))
    leverage = 2 * np.einsum("nh,hk,nk->n", f, np.linalg.inv(hessian), f) / N_ROWS
    np.testing.assert_allclose(changes, influence / N_ROWS / (1 - leverage), rtol=1e-8)
    # The same from the index: its influence is linear in the residuals, so those of the optimum take their place.
    found = case.retriever.scores(QUERIES, "if")
    own = case.index.residuals().take(np.arange(N_ROWS))[:, 0].astype(float)
    assert error(found / own * residual / N_ROWS / (1 - leverage), changes) < 1e-4


def test_appended_and_retired_rows_give_the_index_of_a_build(case, tmp_path):
    def built(name: str, n: int) -> Index:
        return Index.build(
            case.folder, source(0, n), tmp_path / name, dampings=(str(DAMPING),), warn=lambda _line: None
        )

    def source(start: int, stop: int) -> Any:
        listed = case.targets[start:stop]
        values = (listed if case.kind == KINDS[0] else listed[:, 0]).tolist()
        names = NAMES if case.kind == KINDS[0] else None
        return rows_from_texts(TEXTS[start:stop], values, label_names=names, problem_type=case.kind)

    built("grown", 16)
    append_rows(tmp_path / "grown", source(16, N_ROWS))
    grown = Retriever(retire_rows(tmp_path / "grown", range(16, N_ROWS)))
    truth = Retriever(built("small", 16))
    assert error(grown.scores(QUERIES, "if"), truth.scores(QUERIES, "if")) < 1e-6
    assert not verify_index(tmp_path / "grown", n_rows=6).problems


def test_the_index_is_whole_and_known(case, capsys):
    assert not verify_index(case.index.folder, n_rows=8).problems
    assert run(["info", str(case.index.folder)]) == 0
    shown = capsys.readouterr().out
    assert ("micro-F1" if case.kind == KINDS[0] else "RMSE") in shown
    assert case.kind in shown


def test_every_method_answers_and_says_what_it_answers(case):
    methods = [name for name in case.retriever.available_methods() if not name.startswith("sbert")]
    table = case.retriever.retrieve(QUERIES, methods=methods, top=2)
    rows = table.to_pylist()
    assert {row["method"] for row in rows} == set(methods)
    texts = {row["row"]: row["label"] for row in rows}
    for number, text in texts.items():
        target = case.targets[number]
        if case.kind == KINDS[0]:
            assert text == ("; ".join(n for n, t in zip(NAMES, target, strict=True) if t) or "(none)")
        else:
            assert float(text) == target[0]
    if case.kind == "regression":
        assert {row["target"] for row in rows} == {"higher"}
    certified = case.retriever.retrieve(QUERIES[:1], methods=("gd",), scope="all", top=2, certify=True)
    assert all(certified["proven"].to_pylist())


def test_gold_targets_come_from_the_test_file(case, tmp_path, capsys):
    wanted = targets_of(QUERIES, case.kind)
    labels = [[n for n, t in zip(NAMES, row, strict=True) if t] if case.kind == KINDS[0] else row[0] for row in wanted]
    path = write_jsonl(tmp_path / "test.jsonl", text=QUERIES, label=labels)
    found = case.retriever.scores(str(path), "gd", target="gold")
    gradients = np.stack(
        [case.gradient(case.loss(case.logits(x), t), "head") for x, t in zip(QUERIES, wanted, strict=True)]
    )
    assert error(found, gradients @ case.row_gradients("head").T) < 1e-5
    assert run(["retrieve", "--index", str(case.index.folder), "--test", str(path), "--target", "gold"]) == 0
    assert "labelled" in capsys.readouterr().out


def test_an_aggregate_sums_the_scores_of_its_test_rows(case):
    asked: dict[str, Any] = {"methods": ("if", "gd"), "aggregate": True, "top": N_ROWS}
    table = case.retriever.retrieve(QUERIES, **asked).to_pylist()
    for method in asked["methods"]:
        summed = case.retriever.scores(QUERIES, method).sum(axis=0)
        found = {row["row"]: row["score"] for row in table if row["method"] == method}
        np.testing.assert_allclose([found[n] for n in range(N_ROWS)], summed, atol=1e-6 * np.abs(summed).max())


def test_scores_are_summed_by_sets_of_labels_and_not_by_numbers(case, tmp_path, capsys):
    call = ["retrieve", "--index", str(case.index.folder), "--text", QUERIES[0], "--method", "gd"]
    call += ["--group-by", "label", "--out", str(tmp_path / "groups.csv")]
    if case.kind == "regression":
        assert run(call) == 2
        assert "are numbers (regression), no groups" in capsys.readouterr().err
        return
    assert run([*call, "--top", "50"]) == 0
    lines = list(csv.DictReader((tmp_path / "groups.csv").read_text(encoding="utf-8").splitlines()))
    scores, texts = case.retriever.scores(QUERIES[:1], "gd")[0], np.array(case.index.label_texts(np.arange(N_ROWS)))
    assert {line["group"] for line in lines} == {*texts.tolist()}
    for line in lines:
        assert float(line["sum"]) == pytest.approx(scores[texts == line["group"]].sum(), rel=1e-6, abs=1e-9)
    assert lines[0]["query_prediction"] == case.index.loss.texts((case.predicted[:1] > 0).astype(float), NAMES)[0]


def test_unknown_targets_are_refused_before_any_work(case, capsys):
    call = ["retrieve", "--index", str(case.index.folder), "--text", "a film", "--target"]
    assert run([*call, "label:dull"]) == 2
    assert f"label:NAME of {', '.join(case.names)}" in capsys.readouterr().err
    assert run([*call, case.names[0]]) == 2
    assert f"expected predicted, gold, or label:NAME of {', '.join(case.names)}" in capsys.readouterr().err


def test_saliency_is_of_the_loss_of_the_target(case):
    (found,) = saliency(case.retriever, QUERIES[:1])
    classifier = case.model
    encoded = case.tokenizer(QUERIES[0], return_tensors="pt")
    embeddings = classifier.bert.embeddings.word_embeddings(encoded["input_ids"]).detach().requires_grad_(True)
    logits = classifier(inputs_embeds=embeddings, attention_mask=encoded["attention_mask"],
                        token_type_ids=encoded["token_type_ids"]).logits[0]  # fmt: skip
    loss = -logits.mean() if case.kind == "regression" else case.loss(logits, (case.predicted[0] > 0).astype(float))
    (gradient,) = torch.autograd.grad(loss, embeddings)
    values = -(gradient[0] * embeddings[0]).sum(dim=1).detach().numpy()
    np.testing.assert_allclose(found.values, values / np.abs(values).sum(), atol=1e-5)


def test_of_one_label_a_row_label_name_is_the_name():
    """A class may be called predicted, gold, or even label:x: each can be asked for."""
    names, predictions = ("predicted", "gold", "label:x", "x", "y"), np.array([4, 0])

    def chosen(target: str) -> list[int]:
        return choose_targets(target, predictions, np.array([1, 1]), names, CROSS_ENTROPY).tolist()

    assert chosen("predicted") == [4, 0]
    assert chosen("gold") == [1, 1]
    for target, wanted in (("label:predicted", 0), ("label:gold", 1), ("label:x", 2), ("x", 3), ("LABEL:Y", 4)):
        assert chosen(target) == [wanted, wanted]
    with pytest.raises(InputError, match="expected predicted, gold, or one of predicted, gold, label:x, x, y"):
        chosen("label:z")


def test_effects_are_changes_of_the_loss_that_is_asked_about(case):
    """Beside the head that torch finds without the row; of numbers the fall of the output, exact in one step."""
    table = case.retriever.retrieve(QUERIES, methods=["if"], top=2).to_pylist()
    f, q = (torch.from_numpy(case.features(texts)) for texts in (TEXTS, QUERIES))
    w0, bias = case.model.classifier.weight.detach(), case.model.classifier.bias.detach()
    of_torch = nn.BCEWithLogitsLoss(reduction="none") if case.kind == KINDS[0] else nn.MSELoss(reduction="none")
    t, predicted = torch.from_numpy(case.targets), torch.from_numpy(case.predicted)

    def losses(w: torch.Tensor) -> torch.Tensor:
        return of_torch(f @ w.T + bias, t).mean(dim=1)

    at_w0 = w0.clone().requires_grad_()
    (linear,) = torch.autograd.grad(losses(at_w0).mean(), at_w0)
    for result in table:
        w = w0.clone().requires_grad_()
        kept = torch.arange(N_ROWS) != result["row"]
        solver = torch.optim.LBFGS(
            [w], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(w=w, kept=kept, solver=solver) -> torch.Tensor:
            solver.zero_grad()
            value = losses(w)[kept].sum() / N_ROWS + DAMPING / 2 * (w - w0).square().sum() - (linear * w).sum()
            value.backward()
            return value

        solver.step(closure)
        new = (q @ w.T + bias).detach()[result["query"]]
        old = predicted[result["query"]]
        if case.kind == "regression":
            assert result["effect"] == pytest.approx((old - new).item(), rel=1e-3)
            assert result["effect_probability"] is None
            continue
        asked = (old > 0).double()
        change = (of_torch(new, asked) - of_torch(old, asked)).mean().item()
        assert result["effect"] == pytest.approx(change, rel=0.2)
        right = [(asked * z.sigmoid() + (1 - asked) * (-z).sigmoid()).mean() for z in (old, new)]
        assert result["effect_probability"] == pytest.approx((right[1] - right[0]).item(), rel=0.2)


def test_first_order_effects_of_one_label_have_its_probability(labels_case):
    asked = {"methods": ["if"], "top": 2, "scope": "top-1"}
    table = labels_case.retriever.retrieve(QUERIES, target="label:good", **asked).to_pandas()
    np.testing.assert_allclose(table["effect"], table["score"] / N_ROWS)
    p = 1 / (1 + np.exp(-np.abs(labels_case.predicted[table["query"], NAMES.index("good")])))
    np.testing.assert_allclose(table["effect_probability"], p * np.expm1(-table["effect"]), rtol=1e-4)
    assert labels_case.retriever.retrieve(QUERIES, **asked).column("effect_probability").null_count == table.shape[0]
