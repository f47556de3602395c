"""Dampings that the arithmetic does not carry are refused by name; curvature that is too large before the pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import labels, sentences, write_jsonl

from forebear import Index, InputError, QuerySpec, Retriever
from forebear.cli.main import run
from forebear.indexer.curvature import head as module
from forebear.indexer.curvature import head_products as products
from forebear.indexer.curvature.damping import refuse_lost_damping, round_up
from forebear.indexer.curvature.head import factorise, head_hessian
from forebear.indexer.curvature.solvers import LissaSettings
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.storage.choices import DEFAULT_DAMPING
from forebear.retriever.question.inverse import CurvatureSpec

N_ROWS = 40
TEXTS = sentences(N_ROWS, seed=6)


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", text=TEXTS, label=labels(N_ROWS))


def command(model: str, train: Path, out: Path, *more: str) -> list[str]:
    start = ["index", "--model", model, "--train", str(train), "--out", str(out), "--sketch-dim", "8", "--quiet"]
    return [*start, "--sketch-bits", "64", "--white-bits", "64", "--calibrate", "0", *more]


def refused(capsys, arguments: list[str]) -> str:
    """The one line of a command that is refused."""
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return " ".join(error.split())


def named_damping(message: str) -> str:
    """The damping that a refusal says is enough."""
    return re.search(r'(--damping |dampings=\(")([^"\s]+)', message)[2]


def no_pass(monkeypatch) -> None:
    """Any pass over rows fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("rows were run through the model")

    for name in ("forebear.indexer.building.shards.run_pass", "forebear.indexer.building.shards.run_forward"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("forebear.indexer.curvature.ekfac.run_pass", fail)


# ---------------------------------------------------------------- at the build


@pytest.mark.parametrize("damping", ["0", "0x", "1e-15x", "1e-13%", "0.0", "-1", "nan"])
def test_a_damping_that_can_never_count_is_refused_before_the_pass(
    tiny_model, train, tmp_path, capsys, monkeypatch, damping
):
    no_pass(monkeypatch)
    said = refused(capsys, command(tiny_model(), train, tmp_path / "i", "--scope", "head,all", f"--damping={damping}"))
    assert damping in said
    assert "1%" in said


def test_a_damping_below_the_rounding_of_the_eigenvalues_is_refused_before_the_rows_are_sketched(
    tiny_model, train, tmp_path, capsys
):
    out = tmp_path / "i"
    scopes = ("--scope", "head,all")
    said = refused(capsys, command(tiny_model(), train, out, *scopes, "--damping", "1e-30"))
    assert "damping of 1e-30 is lost in float32" in said
    assert not (out / "rows").exists()
    enough = named_damping(said)
    assert run(command(tiny_model(), train, out, *scopes, "--damping", enough, "--resume")) == 0
    index = Index.open(out)
    largest = index.ekfac("all").largest_eigenvalue
    assert np.finfo(np.float32).eps ** 2 * largest <= float(enough) < 1.5e-14 * 1.2 * largest
    assert run(["verify", str(out)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("damping", ["none", "1%"])
def test_a_resumed_build_with_another_damping_gives_the_bytes_of_a_new_one(
    tiny_model, train, tmp_path, capsys, damping
):
    scopes = ("--scope", "head,all", "--damping")
    refused(capsys, command(tiny_model(), train, tmp_path / "resumed", *scopes, "1e-30"))
    assert run(command(tiny_model(), train, tmp_path / "resumed", *scopes, damping, "--resume")) == 0
    assert run(command(tiny_model(), train, tmp_path / "new", *scopes, damping)) == 0
    resumed, new = (
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "resumed", tmp_path / "new")
    )
    assert resumed == new


def test_a_singular_head_names_the_damping_that_is_enough_and_that_the_pass_is_kept(tiny_model, tmp_path, capsys):
    out = tmp_path / "i"  # of fewer rows than features
    train = write_jsonl(tmp_path / "few.jsonl", text=sentences(8, seed=6), label=labels(8))
    said = refused(capsys, command(tiny_model(), train, out, "--damping", "1e-30"))
    assert "singular in float64" in said
    assert "--resume" in said
    assert "--damping none" in said
    assert run(command(tiny_model(), train, out, "--damping", named_damping(said), "--resume")) == 0


def test_the_damping_that_a_singular_head_names_is_enough_for_any_matrix():
    rng = np.random.default_rng(0)
    for size in (3, 40, 150):
        for scale in (1e-9, 1.0, 1e6):
            rows = scale * rng.normal(size=(max(1, size // 3), size))
            hessian = rows.T @ rows
            with pytest.raises(InputError, match="singular") as caught:
                factorise(hessian, 0.0)
            factorise(hessian, float(named_damping(str(caught.value))))


def test_without_any_curvature_the_named_damping_is_a_number():
    with pytest.raises(InputError, match=r'dampings=\("1e-5",\) or more'):
        factorise(np.zeros((3, 3)), 0.0)


@pytest.mark.parametrize("number", [1.0, 1.19e-7, 9.99e-12, 3.14159e5, 9.99])
def test_a_named_number_is_never_too_small(number):
    assert number < float(round_up(number)) <= 1.12 * number


# ---------------------------------------------------------------- at the query


@pytest.fixture(scope="module")
def indexes(tiny_model, train, tmp_path_factory) -> dict[str, Path]:
    """With and without curvature."""
    root = tmp_path_factory.mktemp("indexes")
    for name, damping in (("default", DEFAULT_DAMPING), ("none", "none")):
        assert run(command(tiny_model(), train, root / name, "--scope", "head,top-1", "--damping", damping)) == 0
    return {name: root / name for name in ("default", "none")}


def ask(index: Path, *more: str) -> list[str]:
    return ["retrieve", "--index", str(index), "--text", "a good film", "--method", "if", "--quiet", *more]


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["default", "none"])
@pytest.mark.parametrize("damping", ["0", "0x", "0%", "1e-30", "1e-20x", "1e-20%"])
@pytest.mark.parametrize(("scope", "solver"), [("head", "cg"), ("head", "ekfac"), ("top-1", "cg")])
def test_a_query_with_a_damping_that_is_lost_is_refused_by_name(indexes, capsys, stored, damping, scope, solver):
    said = refused(
        capsys, ask(indexes[stored], "--scope", scope, "--curvature", solver, f"--damping={damping}", "--exact", "full")
    )
    assert "damping" in said
    if not (scope == "top-1" and stored == "none" and damping.endswith(("x", "%"))):
        assert "lost in" in said or "nothing would be left" in said
        assert re.search(r"Give (--damping )?\d\.\de[+-]\d\d%? or more", said)


@pytest.mark.parametrize(("scope", "smallest"), [("head", "2.3e-16"), ("top-1", "1.2e-07")])
def test_lissa_with_a_damping_that_is_lost_is_refused_by_name(indexes, capsys, scope, smallest):
    settings = "damping=1e-30,scale=10,batch_rows=4,depth=3"
    said = refused(capsys, ask(indexes["default"], "--scope", scope, "--curvature", "lissa", "--lissa", settings))
    assert f"damping={smallest}" in said


def test_what_is_refused_is_what_rounds_away():
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        smallest = {"float32": 1.421e-14, "float64": 2.220e-16}[name] * 5.0
        refuse_lost_damping(1.01 * smallest, 5.0, dtype, "all")
        with pytest.raises(InputError, match=name):
            refuse_lost_damping(0.99 * smallest, 5.0, dtype, "all")
    # MiniLM on SST-2, the top two layers: a tenth of the mean eigenvalue is below a ten-millionth of the largest.
    refuse_lost_damping(2.6e-7, 3.88, torch.float32, "top-2")
    with pytest.raises(InputError, match=r"damping=1\.2e-07"):
        LissaSettings(damping=0.0, scale=1.0, batch_rows=1).refuse_lost_damping(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--damping", "0.1x"), ("--damping", "0.01"), ("--curvature", "ekfac")])
def test_if_by_cg_at_the_head_is_answered_without_stored_curvature(indexes, tmp_path, more):
    solver = () if "--curvature" in more else ("--curvature", "cg")
    answers = []
    for name, index in indexes.items():
        out = tmp_path / f"{name}.jsonl"
        assert run([*ask(index, *solver, *more), "--out", str(out)]) == 0
        answers.append([json.loads(line) for line in out.read_text().splitlines()])
    assert [row["row"] for row in answers[0]] == [row["row"] for row in answers[1]]
    np.testing.assert_allclose(*([row["score"] for row in some] for some in answers), rtol=1e-8)


def test_a_question_that_has_no_damping_is_refused_before_the_model_runs(indexes, capsys, monkeypatch):
    monkeypatch.setattr("forebear.retriever.question.batch.run_forward", lambda *a, **k: pytest.fail("the model ran"))
    said = refused(capsys, ask(indexes["none"], "--scope", "top-1", "--curvature", "cg"))
    assert "absolute --damping" in said


# ---------------------------------------------------------------- sizes


def test_the_mean_eigenvalue_without_a_matrix_is_that_of_the_matrix(bert_world):
    index, live = bert_world.index, bert_world.index.live
    stored = index.manifest.curvature["head"]["exact"]["mean_eigenvalue"]
    features, residuals = index.features(), index.residuals()
    traces = index.loss.curvature_trace(residuals.take(live), index.targets(live))
    trace = traces @ (features.take(live).astype(np.float64) ** 2).sum(axis=1)
    assert trace / len(live) / (features.width * residuals.width) == pytest.approx(stored, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [2, 5, 77])
def test_products_with_class_matrices_are_those_of_the_matrices(n_classes):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, n_classes)) * np.array([0, 1, 3, 10, 30, 60])[:, None]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    u = rng.normal(size=(3, n_classes - 1, 6))
    wide, basis = p.astype(np.longdouble), CROSS_ENTROPY.basis(n_classes).astype(np.longdouble)
    i, j = np.triu_indices(n_classes, k=1)
    steps = (basis[:, i] - basis[:, j]).T
    truth = np.einsum("np,pa,pb,qbn->qan", wide[:, i] * wide[:, j], steps, steps, u.astype(np.longdouble))
    size = np.abs(truth).max(axis=1, keepdims=True)
    found = CROSS_ENTROPY.curvature_products(torch.from_numpy(p), torch.from_numpy(u)).numpy()
    assert (np.abs(found - truth) <= 1e-10 * size).all()
    matrices = np.einsum("nab,qbn->qan", CROSS_ENTROPY.curvature(p), u)
    assert (np.abs(matrices - truth) <= 1e-10 * size).all()


@pytest.mark.slow
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("solver", ["cg", "ekfac", "lissa"])
def test_a_head_too_large_for_one_matrix_is_solved_alike(make_world, monkeypatch, by_row, solver):
    world = make_world("bert", 3, False, 1)
    asked = {"methods": ("if",), "curvature": solver, "tolerance": 1e-10}
    asked |= {"lissa": "damping=0.01,scale=100,batch_rows=60,depth=50"}
    spec = QuerySpec(**asked)
    whole = Retriever(world.index).score_block([world.queries], None, spec)["if"]
    monkeypatch.setattr(module, "MAX_SIZE", 3)
    monkeypatch.setattr(products, "PRODUCT_ROWS", 7)
    monkeypatch.setattr(products, "EIGEN_ROWS", 7)
    if by_row:
        monkeypatch.setattr(products, "MAX_WEIGHTS", 0)
    found = Retriever(world.index).score_block([world.queries], None, spec)["if"]
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-8 * np.abs(whole).max())


def test_a_head_too_large_is_refused_before_the_pass_and_resumed_without_curvature(
    tiny_model, train, tmp_path, capsys, monkeypatch
):
    model, out = tiny_model(), tmp_path / "i"
    with monkeypatch.context() as interrupted:  # begun by a version that found the size after the pass

        def too_large(*_arguments):
            raise InputError("too large")

        interrupted.setattr("forebear.indexer.curvature.stored_head.head_hessian", too_large)
        refused(capsys, command(model, train, out))
    monkeypatch.setattr(module, "MAX_SIZE", 3)
    monkeypatch.setattr(module, "MAX_BLOCK_NUMBERS", 511)
    with monkeypatch.context() as strict:
        no_pass(strict)
        said = refused(capsys, command(model, train, tmp_path / "new"))
    assert "2 classes x 16 features" in said
    assert "--damping none" in said
    assert "--curvature cg" in said
    assert run(command(model, train, out, "--damping", "none", "--resume")) == 0
    assert run(command(model, train, tmp_path / "new", "--damping", "none")) == 0


@pytest.mark.slow
def test_audits_take_gd_where_the_index_holds_no_curvature_and_say_so(indexes, train, tmp_path, capsys):
    test = write_jsonl(tmp_path / "t.jsonl", text=sentences(12, seed=9), label=labels(12, seed=4))
    asked = [["audit", "mislabelled"], ["audit", "errors", "--test", str(test)]]
    for number, arguments in enumerate(asked):
        for scope in ("head", "top-1"):
            out = ["--out", str(tmp_path / f"{number}{scope}"), "--quiet"]
            assert run([*arguments, "--index", str(indexes["none"]), "--scope", scope, *out]) == 0
            said = " ".join(capsys.readouterr().err.split())
            assert f"holds no curvature of scope {scope}: taken by default is gd, without if" in said
    agreement = ["evaluate", "label-agreement", "--test", str(test), "--at", "3", "--spans", "words", "--quiet"]
    assert run([*agreement, "--index", str(indexes["none"])]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "taken by default is tracin-f, tracin+, tracin++, without if, if+, if++" in said
    assert run(["audit", "mislabelled", "--index", str(indexes["default"]), "--quiet"]) == 0
    assert "no curvature" not in capsys.readouterr().err
    said = refused(capsys, ["audit", "mislabelled", "--index", str(indexes["none"]), "--method", "if"])
    assert "--damping none" in said


@pytest.mark.slow
def test_seventy_seven_classes_by_384_features_end_to_end(tmp_path, capsys):
    """As banking77 under MiniLM: 29,184 numbers, whose matrix would take 6.8 GB."""
    model = wide_model(tmp_path / "model", n_classes=77, width=384)
    names = [f"LABEL_{i}" for i in labels(77, 77)[:20]]
    train = write_jsonl(tmp_path / "train.jsonl", text=sentences(20, seed=2), label=names)
    out = tmp_path / "index"
    assert run(["index", "--model", str(model), "--train", str(train), "--out", str(out), "--quiet"]) == 0
    audit = tmp_path / "audit"
    assert run(["audit", "mislabelled", "--index", str(out), "--out", str(audit), "--quiet"]) == 0
    assert "no curvature" not in capsys.readouterr().err
    assert run([*ask(out), "--out", str(tmp_path / "answers.jsonl")]) == 0
    index = Index.open(out)
    assert index.head.solver == "cg"
    found = Retriever(index).score_block([["a good film"]], None, QuerySpec(methods=("if",), tolerance=1e-9))
    assert found.residuals["if"] <= 1e-9
    assert_solved(index, found["if"][0], CurvatureSpec(solver="cg").absolute(index, "head"))


def assert_solved(index: Index, scores: np.ndarray, damping: float) -> None:
    """Scores are <H^-1 g, g_n>, by Woodbury's identity over the rows' own gradients: H is of low rank."""
    f = index.features().take(index.live).astype(np.float64)
    r = index.residuals().take(index.live).astype(np.float64)
    n, c = r.shape
    p = r.copy()
    p[np.arange(n), index.labels[index.live]] += 1
    classifier = load_classifier(index.manifest.checkpoints[0].path, device="cpu")
    asked = run_forward(classifier, [["a good film"]])
    target = int(asked.predictions[0])
    residual = asked.probabilities[0].copy()
    residual[target] = -(residual.sum() - residual[target])
    # Columns sqrt(p_i) (e_i - p) of a root of diag(p) - p p^T, a class and a row each: H = U U^T / n.
    roots = np.sqrt(p)[:, :, None] * (np.eye(c)[None] - p[:, None, :])  # (n, c, c): row, column, class
    kernel = np.einsum("nic,mjc->nimj", roots, roots) * (f @ f.T)[:, None, :, None] / n
    kernel = kernel.reshape(n * c, n * c)
    query = np.einsum("nic,c->ni", roots, residual) * (f @ asked.features[0].astype(np.float64))[:, None] / n**0.5
    weights = np.linalg.solve(kernel + damping * np.eye(n * c), query.reshape(-1)).reshape(n, c)
    plain = (r @ residual) * (f @ asked.features[0].astype(np.float64))
    through = np.einsum("mc,nic,ni,nm->m", r, roots, weights, f @ f.T, optimize=True) / n**0.5
    truth = (plain - through) / damping
    assert np.abs(scores - truth).max() <= 1e-5 * np.abs(truth).max()


def wide_model(folder: Path, n_classes: int, width: int) -> Path:
    """A random classifier of one narrow layer whose features are wide."""
    import transformers
    from tiny import make_tiny_model

    make_tiny_model(folder, "bert", n_classes)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, 1, 2
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "limit", "said"),
    [
        ((), 10, "layer"),
        (("--curvature", "none"), 10, "--sketch-basis random"),
        (("--curvature", "none", "--sketch-basis", "random"), 10, None),
        ((), 24, None),
    ],
)
def test_a_layer_too_wide_for_its_factor_is_refused_before_the_pass(
    tiny_model, train, tmp_path, capsys, monkeypatch, options, limit, said
):
    monkeypatch.setattr("forebear.indexer.building.preflight.MAX_SIDE", limit)
    build = command(tiny_model(), train, tmp_path / "i", "--scope", "head,top-1", *options)
    if said is None:
        assert run(build) == 0
        return
    no_pass(monkeypatch)
    assert said in refused(capsys, build)


def test_spans_that_the_tokenizer_cannot_mask_are_refused_before_the_pass(
    tiny_model, train, tmp_path, capsys, monkeypatch
):
    import shutil

    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            config = json.loads((model / name).read_text())
            config.pop("mask_token", None)
            (model / name).write_text(json.dumps(config))
    no_pass(monkeypatch)
    said = refused(capsys, command(str(model), train, tmp_path / "i", "--store", "features,spans"))
    assert "no mask token" in said


def test_many_classes_in_chunks_give_the_same_matrix(monkeypatch):
    rng = np.random.default_rng(3)
    f, p = rng.normal(size=(20, 3)), rng.dirichlet(np.ones(9), 20)
    whole = head_hessian([(f, p)], 3, 9)
    monkeypatch.setattr(module, "MAX_CLASS_NUMBERS", 3 * 81)
    np.testing.assert_allclose(head_hessian([(f, p)], 3, 9), whole, rtol=0, atol=1e-14)
