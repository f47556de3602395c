"""Effects of the rows that an answer lists, beside the head as it comes out of a refit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebear
from forebear.cli.main import run
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.effects import kinds
from forebear.retriever.effects import refits as refits_module
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.listed import effects_of_rows, effects_of_set
from forebear.retriever.effects.refits import HeadRefits
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever


@pytest.fixture(params=[2, 3])
def world(request, make_world):
    return make_world("bert", request.param, False, 1)


def head_without(world, row, damping):
    """Weight of the head at the minimum of J without a row, ``(c, h)``, by gradient descent of torch from scratch."""
    index, classifier = world.index, world.retriever.classifier()
    features = torch.from_numpy(index.features().take(index.live).astype(np.float64))
    labels = torch.tensor(world.labels)
    w0, bias = classifier.head.weight.detach().double(), classifier.head.bias.detach().double()
    n = len(labels)

    def losses(w, rows):
        return torch.nn.functional.cross_entropy(features[rows] @ w.T + bias, labels[rows], reduction="sum") / n

    w = w0.clone().requires_grad_()
    (linear,) = torch.autograd.grad(losses(w, torch.arange(n)), w)
    kept = torch.tensor([i for i in range(n) if i != row])
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = losses(w, kept) + damping / 2 * (w - w0).square().sum() - (linear * w).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach(), bias


def test_effects_foretell_the_head_fitted_without_the_row(world):
    """With damping 2x the step is short, so that what is predicted comes true to a percent."""
    table = world.retriever.retrieve(world.queries, methods=["if"], top=3, damping="2x")
    damping = json.loads(table.schema.metadata[b"forebear"])["methods"]["if"]["damping"]
    forward = run_forward(world.retriever.classifier(), [world.queries])
    q = torch.from_numpy(forward.features.astype(np.float64))
    old = torch.from_numpy(forward.logits).log_softmax(dim=1)
    for result in table.slice(0, 12).to_pylist():
        weight, bias = head_without(world, result["row"], damping)
        new = (q @ weight.T + bias).log_softmax(dim=1)
        query, target = result["query"], world.index.manifest.spec.label_names.index(result["target"])
        change = (old - new)[query, target].item()
        assert result["effect"] == pytest.approx(change, rel=0.02, abs=1e-7)
        probability = (new.exp() - old.exp())[query, target].item()
        assert result["effect_probability"] == pytest.approx(probability, rel=0.02, abs=1e-7)


def test_an_effect_has_the_scores_sign_and_nearly_its_size(world):
    table = world.retriever.retrieve(world.queries, methods=["if"], top=10, damping="2x").to_pandas()
    first_order = table["score"] / len(world.labels)
    assert np.corrcoef(table["effect"], first_order)[0, 1] > 0.99
    assert (np.sign(table["effect"]) == np.sign(table["score"])).mean() > 0.9
    assert (table["effect"] * table["effect_probability"] <= 0).all()  # the loss rises where the probability falls


def test_methods_without_effects_have_none(bert_world):
    plain = bert_world.retriever.retrieve(bert_world.queries, methods=["gc", "rif"], top=2)
    assert "effect" not in plain.column_names
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["gc", "if"], top=2)
    values = table.column("effect").to_pylist()
    assert [value is None for value in values] == [name == "gc" for name in table.column("method").to_pylist()]
    methods = json.loads(table.schema.metadata[b"forebear"])["methods"]
    assert methods["gc"]["effect"] is None
    assert methods["gc"]["effect_note"].startswith("no effect: ")
    assert methods["if"]["effect"] == "Newton step"
    identity = bert_world.retriever.retrieve(bert_world.queries, methods=["if"], curvature="identity", top=2)
    assert "effect" not in identity.column_names


def test_sizes_beyond_the_head_that_nobody_measured_are_doubted(bert_world, tmp_path, monkeypatch):
    options = BuildOptions(scopes=("head", "all"), sketch_dim=16, sketch_bits=64, white_bits=64, calibration_queries=2)
    chosen = choose_model(None, bert_world.models[:1]).checkpoints
    build_index(rows_from_texts(bert_world.texts, bert_world.labels), tmp_path / "index", chosen, options)
    retriever = Retriever(tmp_path / "index")

    def said(scope: str) -> dict[str, str | None]:
        asked = {"methods": ["if", "rif", "gd"], "top": 2, "scope": scope, "exact": "full"}
        table = retriever.retrieve(bert_world.queries[:1], **asked)
        shown = repr(forebear.show(table))
        facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
        assert ("not measured" in shown) == ("not measured" in facts["if"].get("effect_measured", ""))
        return {name: of.get("effect_measured") for name, of in facts.items()}

    assert said("all") == {"if": kinds.UNMEASURED, "rif": None, "gd": None}
    assert said("head") == {"if": None, "rif": None, "gd": None}
    monkeypatch.setattr(kinds, "measured_line", lambda *_of: "slope 1")
    assert said("all") == {"if": "slope 1", "rif": None, "gd": None}


@pytest.mark.parametrize("choices", [{"curvature": "cg"}, {"curvature": "ekfac"}, {}])
def test_effects_of_first_order_are_scores_over_n(bert_world, choices, monkeypatch):
    """Of other solvers, and where a row's own Newton step would cost too much."""
    if not choices:
        monkeypatch.setattr(refits_module, "MAX_ROW_NUMBERS", 1)
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["if"], top=3, **choices)
    assert json.loads(table.schema.metadata[b"forebear"])["methods"]["if"]["effect"] == "first order"
    found = table.to_pandas()
    np.testing.assert_allclose(found["effect"], found["score"] / len(bert_world.labels), rtol=1e-12)
    p = run_forward(bert_world.retriever.classifier(), [bert_world.queries]).probabilities.max(axis=1)[found["query"]]
    np.testing.assert_allclose(found["effect_probability"], p * np.expm1(-found["effect"]), rtol=1e-9)


def test_first_order_probabilities_never_leave_0_to_1(bert_world):
    forward = run_forward(bert_world.retriever.classifier(), [bert_world.queries])
    asked = Predictions.of(forward, forward.predictions)
    p = forward.probabilities.max(axis=1)
    np.testing.assert_allclose(asked.probability_changes(np.full((len(p), 1), -1e3))[:, 0], 1 - p)
    np.testing.assert_allclose(asked.probability_changes(np.full((len(p), 1), 1e3))[:, 0], -p)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_first_order_probabilities_know_class_weights_and_not_smoothing(smoothing, world, tmp_path, tiny_model):
    c = world.n_classes
    weights = (0.5, 2.0, 1.5)[:c]
    model = choose_model(None, (tiny_model("bert", c),), (1.0,)).checkpoints
    options = BuildOptions(class_weights=weights, label_smoothing=smoothing)
    index = build_index(rows_from_texts(world.texts, world.labels), tmp_path / "index", model, options)
    retriever = Retriever(index)
    table = retriever.retrieve(world.queries, methods=["if"], top=2, curvature="cg").to_pandas()
    if smoothing:
        assert table["effect_probability"].isna().all()
        return
    forward = run_forward(retriever.classifier(), [world.queries])
    target = forward.predictions[table["query"]]
    p = forward.probabilities[table["query"], target]
    new = np.exp(-(-np.log(p) * np.array(weights)[target] + table["effect"]) / np.array(weights)[target])
    np.testing.assert_allclose(table["effect_probability"], new - p, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("n_classes", "width", "few"),
    [(22, 384, True), (23, 384, False), (11, 768, True), (12, 768, False), (9, 1024, True), (10, 1024, False)],
)
def test_newton_steps_end_where_the_page_on_methods_says(n_classes, width, few):
    spec = SimpleNamespace(label_names=["a"] * n_classes)
    manifest = SimpleNamespace(spec=spec, feature_dim=width)
    head = SimpleNamespace(solver="exact")
    index = SimpleNamespace(head=head, loss=CROSS_ENTROPY, manifest=manifest)
    assert refits_module.has_newton_steps(index) is few
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    assert "from 23 classes of 384 features on, 12 of 768 or 10 of 1,024" in page


def test_effects_on_a_group_are_sums_and_sets_are_solved_together(world):
    retriever, spec = world.retriever, QuerySpec(methods=("if",), top=4, damping="0.003", target="gold")
    groups = np.array([0, 0, 1, 1, 1, 2, 2])
    gold = np.array(world.query_labels)
    ends = retriever.aggregate([world.queries], gold, groups, spec).rankings["if"]
    forward = run_forward(retriever.classifier(), [world.queries])
    asked, refits = Predictions.of(forward, gold), HeadRefits(retriever.models, "0.003")
    for ranking in ends:
        for g in range(3):
            members = asked.take(np.flatnonzero(groups == g))
            rows = np.tile(ranking.rows[g], (len(members.targets), 1))
            effects, probabilities = effects_of_rows(refits, members, rows)
            np.testing.assert_allclose(ranking.effects[g], effects.sum(axis=0), rtol=1e-9)
            np.testing.assert_allclose(ranking.effect_probabilities[g], probabilities.sum(axis=0), rtol=1e-9)
            together = effects_of_set(refits, members, ranking.rows[g], exact=True)
            np.testing.assert_allclose(ranking.effects_together[g], [one.sum() for one in together], rtol=1e-9)
    table = pa.concat_tables(retriever.tables(retriever.aggregate([world.queries], gold, groups, spec)))
    assert {"effect_together", "effect_probability_together"} <= set(table.column_names)


def test_no_effect_is_stated_of_nearly_all_rows_together(bert_world, capsys, tmp_path):
    spec = {"methods": ["if"], "top": len(bert_world.labels) - 1, "target": "gold", "aggregate": True}
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    table = bert_world.retriever.retrieve(source, **spec)
    assert table["effect_together"].null_count == table["effect_probability_together"].null_count == len(table)
    assert table["effect"].null_count == 0
    test = tmp_path / "test.jsonl"
    pairs = zip(bert_world.queries, bert_world.query_labels, strict=True)
    test.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    asked = ["--index", str(bert_world.index.folder), "--test", str(test), "--method", "if", "--top", str(spec["top"])]
    assert run(["retrieve", *asked, "--aggregate"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "together: no effect: the rows that stay say too little of the head" in shown
    assert run(["audit", "errors", *asked, "--out", str(tmp_path / "errors")]) == 0
    (group, *_) = json.loads((tmp_path / "errors" / "result.json").read_text())["groups"]
    assert group["found"]["if"]["proponent"]["effect_together"] is None
    assert "together: no effect" in (tmp_path / "errors" / "report.html").read_text()


def test_effects_do_not_depend_on_the_blocks_of_rows_and_queries(bert_world, monkeypatch):
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["if"], top=5)
    monkeypatch.setattr("forebear.retriever.effects.listed.CHANGE_NUMBERS", 200)
    again = bert_world.retriever.retrieve(bert_world.queries, methods=["if"], top=5)
    np.testing.assert_allclose(again.column("effect").to_numpy(), table.column("effect").to_numpy(), rtol=1e-9)


def test_other_targets_for_rows_are_a_removal_and_an_addition(world):
    """A set relabelled and refitted to the minimum; a row that keeps its label changes nothing."""
    refits = HeadRefits(world.retriever.models, "2x")
    rows, n_classes = np.array([3, 8, 21]), world.n_classes
    labels = world.index.targets(rows)
    assert np.abs(refits.together(rows, labels)).max() < 1e-9
    new = (labels + 1) % n_classes
    step, best = refits.together(rows, new), refits.together(rows, new, exact=True)
    assert np.linalg.norm(step - best) < 0.1 * np.linalg.norm(best)
    assert np.linalg.norm(best - refits.together(rows, exact=True)) > 0.1 * np.linalg.norm(best)


def test_retired_rows_take_no_part(world, tmp_path, tiny_model):
    model = choose_model(None, (tiny_model("bert", world.n_classes),), (1.0,)).checkpoints
    index = build_index(rows_from_texts(world.texts, world.labels), tmp_path / "index", model, BuildOptions())
    index = forebear.retire_rows(index.folder, [0, 5, 7])
    kept = [i for i in range(len(world.texts)) if i not in (0, 5, 7)]
    fresh = build_index(
        rows_from_texts([world.texts[i] for i in kept], [world.labels[i] for i in kept]), tmp_path / "fresh", model,
        BuildOptions(),
    )  # fmt: skip
    for exact in (False, True):
        changes = [
            HeadRefits(Retriever(one).models).together(rows, exact=exact)
            for one, rows in ((index, np.array([8, 10])), (fresh, np.array([5, 7])))
        ]
        np.testing.assert_allclose(changes[0], changes[1], rtol=1e-6, atol=1e-12)


def test_what_is_shown_says_what_effects_mean_and_which_rows_oppose(bert_world):
    table = bert_world.retriever.retrieve(bert_world.queries[:1], methods=["if"], top=len(bert_world.labels))
    for text in (repr(forebear.show(table)), forebear.show(table)._repr_html_()):
        assert "effect: predicted rise of the target" in text
        assert "proponents of if have scores below 0" in text
        assert "opponents of if have scores above 0" in text
    older = table.drop_columns(["effect", "effect_probability"]).replace_schema_metadata(None)
    assert "effect" not in repr(forebear.show(older))


def test_commands_show_effects_and_what_they_mean(bert_world, capsys, tmp_path):
    index, text = str(bert_world.index.folder), bert_world.queries[0]
    asked = ["--index", index, "--text", text, "--method", "if,gc", "--top", "3"]
    assert run(["retrieve", *asked]) == 0
    shown = capsys.readouterr().out
    assert "change" in shown
    assert shown.count("effect: predicted rise") == 2  # under both ends of `if`, and not of `gc`
    page = tmp_path / "page.html"
    assert run(["explain", *asked]) == 0
    assert capsys.readouterr().out.count("effect: predicted rise") == 2
    assert run(["explain", *asked, "--html", str(page)]) == 0
    assert page.read_text().count(" · effect ") == page.read_text().count(" · probability ") == 6
    assert run(["retrieve", *asked, "--group-by", "label"]) == 0
    shown = capsys.readouterr().out
    assert "change" in shown
    assert shown.count("effect: predicted rise") == 1
    test = tmp_path / "test.jsonl"
    pairs = zip(bert_world.queries, bert_world.query_labels, strict=True)
    test.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    together = ["--index", index, "--test", str(test), "--method", "if", "--top", "3"]
    assert run(["retrieve", *together, "--aggregate"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("Without all 3 together: effect ") == 2
    assert run(["audit", "errors", *together, "--out", str(tmp_path / "errors")]) == 0
    (group, *_) = json.loads((tmp_path / "errors" / "result.json").read_text())["groups"]
    proponents = group["found"]["if"]["proponent"]
    assert len(proponents["effects"]) == 3
    assert proponents["effect_together"] > max(proponents["effects"])
