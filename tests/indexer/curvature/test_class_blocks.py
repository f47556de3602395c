"""A head of too many classes for one matrix: influence by conjugate gradients, self-influence class by class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error
from tiny import labels, sentences

from forebear.evaluation.measures.mislabelled import self_influence
from forebear.indexer.building.change import retire_rows
from forebear.indexer.curvature import head as module
from forebear.indexer.curvature.head_products import HeadProducts
from forebear.indexer.curvature.solvers import conjugate_gradients
from forebear.indexer.index import Index
from forebear.indexer.losses.cross_entropy import CrossEntropy
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

N_CLASSES, N_ROWS = 5, 30
WEIGHTS = (1.0, 0.5, 2.0, 1.5, 0.25)
TEXTS, LABELS, QUERIES = sentences(N_ROWS, 3), labels(N_ROWS, N_CLASSES), sentences(4, 8)
TIGHT = {"tolerance": 1e-10}


@pytest.fixture(scope="module", params=[(), WEIGHTS], ids=["plain", "weighted"])
def indexes(request, tiny_model, tmp_path_factory) -> tuple[Index, Index]:
    """The same rows: with one matrix, and as if that were too large."""
    folder = tmp_path_factory.mktemp("heads")

    def build(name: str) -> Index:
        return Index.build(
            tiny_model("bert", N_CLASSES), TEXTS, folder / name, LABELS, class_weights=request.param,
            dampings=("0.1x", "0.02"), warn=lambda _line: None,
        )  # fmt: skip

    dense = build("dense")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "MAX_SIZE", 3)
        large = build("large")
    return dense, large


@pytest.fixture(autouse=True)
def small_limit(indexes, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_SIZE", 3)


def class_matrices(index: Index, damping: float) -> np.ndarray:
    """H + damping I without the blocks between two classes, by a loop, ``(c h, c h)``."""
    f = index.features().take(index.live).astype(np.float64)
    p = index.loss.outputs_of_residuals(index.residuals().take(index.live), index.targets(index.live))
    weights = np.array(index.manifest.spec.class_weights or (1.0,) * N_CLASSES)[index.labels]
    h = f.shape[1]
    out = damping * np.eye(N_CLASSES * h)
    for k in range(N_CLASSES):
        at = slice(k * h, (k + 1) * h)
        for n, row in enumerate(f):
            out[at, at] += weights[n] * p[n, k] * (1 - p[n, k]) * np.outer(row, row) / len(f)
    return out


def gradients(index: Index) -> np.ndarray:
    rows = np.arange(N_ROWS)
    f, r = index.features().take(rows).astype(np.float64), index.residuals().take(rows).astype(np.float64)
    return np.einsum("nc,nh->nch", r, f).reshape(N_ROWS, -1)


def test_influence_is_that_of_the_matrix(indexes):
    dense, large = (Retriever(index) for index in indexes)
    assert indexes[1].head.solver == "cg"
    assert indexes[1].head.mean_eigenvalue == pytest.approx(indexes[0].head.mean_eigenvalue, rel=1e-6)
    for damping in (None, "0.02", "0.5x"):
        found = large.scores(QUERIES, "if", damping=damping, **TIGHT)
        wanted = dense.scores(QUERIES, "if", damping=damping, curvature="cg", **TIGHT)
        assert error(found, wanted) < 1e-6
    assert error(large.scores(QUERIES, "if", **TIGHT), dense.scores(QUERIES, "if")) < 1e-6
    by_name = large.scores(QUERIES, "rif", curvature="cg", **TIGHT)  # every row solved for
    assert error(by_name, dense.scores(QUERIES, "rif")) < 1e-6


def test_self_influence_is_that_of_single_classes_and_said(indexes):
    large = indexes[1]
    damping = large.manifest.curvature["head"]["cg"]["damping"]
    g = gradients(large)
    inverse = np.linalg.inv(class_matrices(large, damping))
    truth = np.einsum("np,pr,nr->n", g, inverse, g)
    question = QuerySpec(methods=("if",)).resolve(large)
    np.testing.assert_allclose(self_influence(question)["if"], truth, rtol=1e-5)
    retriever = Retriever(large)
    dots, cosines = (retriever.scores(QUERIES, method, **TIGHT) for method in ("if", "rif"))
    ratios = dots / np.sqrt(truth) / cosines  # the length of the query's own, the same for every row
    np.testing.assert_allclose(ratios, ratios[:, :1].repeat(N_ROWS, axis=1), rtol=1e-4)
    facts = retriever.facts(QuerySpec(methods=("if", "rif")))["methods"]
    assert facts["rif"]["self_influence"] == "class blocks"
    assert facts["if"]["curvature"] == facts["rif"]["curvature"] == "cg"
    assert "self_influence" not in facts["if"]


def test_methods_that_take_whole_gradients_are_those_of_the_matrix(indexes):
    dense, large = (Retriever(index) for index in indexes)
    for method in ("saliency-if", "if+"):
        found, wanted = (
            asked.retrieve(QUERIES[:2], methods=(method,), top=3, **TIGHT).to_pydict() for asked in (large, dense)
        )
        assert found["row"] == wanted["row"]
        np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-4)


def test_answers_and_audits_work_by_default(indexes, tmp_path: Path, capsys):
    from forebear.cli.main import run

    folder = str(indexes[1].folder)
    report = tmp_path / "report"
    assert run(["audit", "mislabelled", "--index", folder, "--out", str(report)]) == 0
    said = capsys.readouterr()
    assert "no curvature" not in said.err
    approximate = "Self-influence by if is an approximation, by class blocks"
    assert approximate in " ".join(said.out.split())
    assert approximate in " ".join((report / "report.html").read_text().split())
    assert json.loads((report / "result.json").read_text())["self_influence"] == {"if": "class blocks"}
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("1 2 3")
    assert run(["evaluate", "mislabelled", "--index", folder, "--wrong-rows", str(wrong)]) == 0
    assert approximate in " ".join(capsys.readouterr().out.split())
    assert run(["audit", "mislabelled", "--index", str(indexes[0].folder)]) == 0
    assert "class blocks" not in capsys.readouterr().out
    out = tmp_path / "answers.jsonl"
    assert run(["retrieve", "--index", folder, "--text", "a good film", "--method", "if,rif", "--out", str(out)]) == 0
    assert run(["info", folder]) == 0
    assert "head: cg, damping 0.1x" in " ".join(capsys.readouterr().out.split())
    assert run(["verify", folder]) == 0
    assert run(["retrieve", "--index", folder, "--text", "a", "--method", "if", "--curvature", "exact"]) == 2
    assert "too many classes for one matrix" in capsys.readouterr().err


@pytest.mark.parametrize("by_row", [False, True])
def test_class_blocks_take_fewer_steps_to_the_same_solution(by_row, monkeypatch):
    rng = np.random.default_rng(0)
    n, c, h = 300, 25, 12
    f = rng.normal(size=(n, h)) * np.geomspace(1, 20, h)
    logits = f @ rng.normal(size=(h, c)) / 6
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    products = HeadProducts(f, p, CrossEntropy())
    products._by_row = by_row
    monkeypatch.setattr(module, "MAX_SIZE", 20_000)
    matrix = products._hessian.numpy()
    monkeypatch.setattr(module, "MAX_SIZE", 3)
    damping = 0.01 * float(np.trace(matrix)) / len(matrix)
    v = rng.normal(size=(2, c - 1, h))
    truth = np.linalg.solve(matrix + damping * np.eye(len(matrix)), v.reshape(2, -1).T).T
    blocks = products.class_blocks(damping)
    steps = []
    for precondition in (None, lambda vectors: {"head": blocks.solve(vectors["head"])}):
        found = conjugate_gradients(
            lambda vectors: {"head": products(vectors["head"])}, {"head": torch.from_numpy(v)}, damping,
            precondition=precondition, tolerance=1e-8, max_iterations=5000,
        )  # fmt: skip
        assert error(found.vectors["head"].numpy().reshape(2, -1), truth) < 1e-5
        steps.append(int(found.iterations.max()))
    assert steps[1] < steps[0] / 2


def test_a_relative_damping_follows_the_rows_that_are_live(indexes, tmp_path, monkeypatch):
    """After rows are retired the mean eigenvalue is that of the others, as where H is one matrix."""
    found = []
    for index, limit in zip(indexes, (20_000, 3), strict=True):
        monkeypatch.setattr(module, "MAX_SIZE", limit)
        copy = shutil.copytree(index.folder, tmp_path / index.folder.name)
        found.append(retire_rows(copy, range(N_ROWS // 2)).head.mean_eigenvalue)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[1] != pytest.approx(indexes[1].head.mean_eigenvalue, rel=1e-3)
