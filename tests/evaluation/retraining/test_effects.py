"""Predicted effects beside retrained ones: the refit of the trained head, fits and their intervals, what is kept."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from inputs import Additive
from scipy import stats

import forebear
from forebear import evaluations
from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.python.evaluations import Retraining
from forebear.evaluation.retraining.effects.fit import fit
from forebear.evaluation.retraining.effects.measure import LOSS, PROBABILITY, Predictor, measure_effects
from forebear.evaluation.retraining.effects.sets import OPPONENTS, PROPONENTS, RANDOM
from forebear.evaluation.retraining.jobs import Job, Retrainer, TrainingRows
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.building.build import retire_rows
from forebear.indexer.model.forward import run_forward
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.measured import KEPT_EFFECTS
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_proximal_head_is_the_minimum_that_torch_finds(make_world, n_classes, tmp_path):
    """With rows left out, an edited and an added row; N stays the number of live rows."""
    world = make_world("bert", n_classes, False, 2)
    retriever, rows, out = world.retriever, world.index.live, np.array([3, 40])
    retrainer = open_retrainer(retriever, "proximal-head", [world.queries], tmp_path, damping="2x")
    job = Job(rows, 0, edits={7: ("good film",)}, extra=[(("dull",), 1)], without=out)
    same, found = retrainer.run([Job(rows, 0), job])
    np.testing.assert_allclose(same.logits, run_forward(retriever.classifier(), [world.queries]).logits, atol=1e-9)

    classifier = retriever.classifier()
    w0, bias = (p.detach().double() for p in (classifier.head.weight, classifier.head.bias))
    damping = retrainer.recipe.facts["damping"]

    def features(texts):
        return torch.from_numpy(run_forward(classifier, [texts]).features.astype(np.float64))

    texts = ["good film" if i == 7 else text for i, text in enumerate(world.texts) if i not in out]
    gold = torch.tensor([label for i, label in enumerate(world.labels) if i not in out] + [1])
    f, whole = features([*texts, "dull"]), features(world.texts)
    w = w0.clone().requires_grad_()

    def mean_loss(f, labels):
        return torch.nn.functional.cross_entropy(f @ w.T + bias, labels, reduction="sum") / len(rows)

    (linear,) = torch.autograd.grad(mean_loss(whole, torch.tensor(world.labels)), w)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=2000, max_eval=4000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = mean_loss(f, gold) + damping / 2 * (w - w0).square().sum() - (linear * w).sum()
        value.backward()
        return value

    optimizer.step(closure)
    truth = (features(world.queries) @ w.T + bias).detach().numpy()
    truth_p, found_p = (np.exp(z - z.max(axis=1, keepdims=True)) for z in (truth, found.logits))
    np.testing.assert_allclose(
        found_p / found_p.sum(axis=1, keepdims=True), truth_p / truth_p.sum(axis=1, keepdims=True), atol=1e-6
    )
    assert np.abs(found.logits - same.logits).max() > 1e-3


def test_outcomes_of_the_proximal_head_are_kept_in_float64(bert_world, tmp_path):
    jobs = [Job(bert_world.index.live, 0, without=np.array([row])) for row in (1, 2)]
    first = open_retrainer(bert_world.retriever, "proximal-head", [bert_world.queries], tmp_path)
    found = first.run(jobs)
    assert found[0].logits.dtype == np.float64
    again = open_retrainer(bert_world.retriever, "proximal-head", [bert_world.queries], tmp_path)
    np.testing.assert_array_equal(again.run(jobs)[1].logits, found[1].logits)
    assert (first.n_trained, again.n_trained) == (2, 0)
    other = open_retrainer(bert_world.retriever, "proximal-head", [bert_world.queries], tmp_path, damping="2x")
    other.run(jobs)
    assert other.n_trained == 2


def test_slopes_and_correlations_are_those_of_numpy_and_scipy():
    rng = np.random.default_rng(1)
    queries = np.repeat(np.arange(30), 8)
    predicted = rng.normal(size=240) * (1 + queries % 3)
    retrained = 0.7 * predicted + 0.2 * rng.normal(size=240)
    found = fit(predicted, retrained, queries, 0)
    (slope,), *_ = np.linalg.lstsq(predicted[:, None], retrained, rcond=None)
    assert found.slope == pytest.approx(slope, rel=1e-12)
    assert found.correlation == pytest.approx(stats.pearsonr(predicted, retrained).statistic, rel=1e-9)
    assert found.rank_correlation == pytest.approx(stats.spearmanr(predicted, retrained).statistic, rel=1e-9)
    draws = np.random.default_rng(5)
    slopes = []
    for _ in range(1000):
        places = np.concatenate([np.flatnonzero(queries == q) for q in draws.integers(30, size=30)])
        slopes.append((predicted[places] @ retrained[places]) / (predicted[places] @ predicted[places]))
    low, high = np.quantile(slopes, [0.025, 0.975])
    assert found.slope_interval == pytest.approx((low, high), abs=0.2 * (high - low))


def test_fits_that_are_undefined_say_so():
    nothing = fit(np.zeros(4), np.ones(4), np.arange(4), 0)
    assert (nothing.slope, nothing.slope_interval, nothing.correlation, nothing.rank_correlation) == (None,) * 4
    one = fit(np.array([1.0, 2.0]), np.array([2.0, 4.0]), np.zeros(2), 0)
    assert (one.slope, one.slope_interval) == (2.0, None)
    two = fit(np.array([1.0, 2.0]), np.array([2.0, 5.0]), np.arange(2), 0)
    assert (two.correlation, two.correlation_interval, two.rank_correlation) == (None,) * 3


def measured_pairs(world, retrainer, seeds=(0,), **choices):
    question = world.retriever.resolve(QuerySpec(methods=("if",), damping="2x"))
    scores = world.retriever.scores(world.queries, "if", damping="2x")
    predictor = Predictor("if", question, scores, world.retriever.models)
    forward = run_forward(world.retriever.classifier(), [world.queries])
    asked = Predictions.of(forward, forward.predictions)
    return asked, measure_effects(retrainer, [predictor], asked, (1, 4), seeds, **choices)


def test_effects_at_the_head_come_true_in_the_refit_that_they_linearise(bert_world, tmp_path):
    retrainer = open_retrainer(bert_world.retriever, "proximal-head", [bert_world.queries], tmp_path, damping="2x")
    asked, found = measured_pairs(bert_world, retrainer, n_sets=5)
    pairs = found.pairs["if"]
    n_queries = len(asked.targets)
    places = [(kind, k) for kind in sorted(set(pairs.kinds)) for k in (1, 4)]
    assert {place: int(((pairs.kinds == place[0]) & (pairs.sizes == place[1])).sum()) for place in places} == {
        (RANDOM, 1): 5 * n_queries, (RANDOM, 4): 5 * n_queries, (PROPONENTS, 1): 3 * n_queries,
        (PROPONENTS, 4): n_queries, (OPPONENTS, 1): 3 * n_queries, (OPPONENTS, 4): n_queries,
    }  # fmt: skip
    for k, tolerance in ((1, 0.02), (4, 0.1)):
        own = pairs.sizes == k
        for column in (LOSS, PROBABILITY):
            one = fit(pairs.predicted[own, column], pairs.retrained[own, column], pairs.queries[own], 0)
            assert one.slope == pytest.approx(1, abs=tolerance)
            assert one.correlation > 0.995
    top = pairs.kinds == PROPONENTS
    assert (pairs.predicted[top, LOSS] > 0).mean() > 0.9
    assert (pairs.predicted[top, PROBABILITY] < 0).mean() > 0.9


def test_changes_are_taken_within_a_seed_and_averaged(bert_world, tmp_path):
    """Of a model whose log odds are a sum over rows: changes by hand, and the noise of a seed goes out."""
    n, q = len(bert_world.labels), len(bert_world.queries)
    weights = np.random.default_rng(3).normal(size=(q, n)) / 4
    retrainer = Retrainer(Additive(weights), TrainingRows(bert_world.index), [bert_world.queries], tmp_path)
    asked, found = measured_pairs(bert_world, retrainer, (0, 1), n_sets=2)
    pairs = found.pairs["if"]
    scores = bert_world.retriever.scores(bert_world.queries, "if", damping="2x")
    query = 3
    own = (pairs.queries == query) & (pairs.kinds == PROPONENTS) & (pairs.sizes == 4)
    rows = np.argsort(-scores[query], kind="stable")[:4]
    changes = []
    for seed in (0, 1):
        odds = np.array([weights[query].sum(), np.delete(weights[query], rows).sum()]) + 0.1 * seed
        logs = np.stack([np.log1p(np.exp(odds)), np.log1p(np.exp(-odds))])[asked.targets[query]]
        changes.append(logs[1] - logs[0])
    assert pairs.retrained[own, LOSS] == pytest.approx([np.mean(changes)], abs=1e-5)


def test_a_budget_samples_sets_and_test_rows(bert_world, tmp_path):
    retrainer = open_retrainer(bert_world.retriever, "proximal-head", [bert_world.queries], tmp_path, damping="2x")
    _, found = measured_pairs(bert_world, retrainer, n_sets=4, budget=20)
    assert retrainer.n_trained <= 20
    assert "of" in found.sampled
    assert len(found.pairs["if"].queries) > 0


@pytest.fixture
def copied(bert_world, tmp_path):
    return shutil.copytree(bert_world.index.folder, tmp_path / "index")


def test_an_index_keeps_what_was_measured_and_answers_say_it(copied, bert_world, tmp_path, capsys):
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": text}) + "\n" for text in bert_world.queries))
    asked = ["--index", str(copied), "--method", "if"]
    measure = ["evaluate", "effects", *asked, "--test", str(test), "--remove", "1,3", "--sets", "2", "--keep"]
    digest = forebear.Index.open(copied).manifest.digest()
    assert run([*measure, "--out", str(tmp_path / "a")]) == 0
    assert run([*measure, "--retrain", "head", "--out", str(tmp_path / "b"), "--force"]) == 0
    assert run([*measure, "--damping", "2x", "--out", str(tmp_path / "c")]) == 0
    assert run([*measure, "--out", str(tmp_path / "a"), "--force"]) == 0  # in place of the first
    assert [one.recipe for one in KEPT_EFFECTS.read(copied)] == ["head", "proximal-head", "proximal-head"]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["fits"]["if"]["loss"][0]["slope"] == pytest.approx(1, abs=0.3)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "retrained changes are" in page
    assert "<svg" in page
    capsys.readouterr()

    assert forebear.Index.open(copied).manifest.digest() == digest
    assert run(["verify", str(copied)]) == 0
    assert run(["info", str(copied)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "proximal-head without 1 to 3 rows" in shown
    assert "target predicted: slope " in shown
    text = ["--text", bert_world.queries[0], "--top", "2"]
    for command in (["retrieve", *asked, *text], ["explain", *asked, *text]):
        assert run(command) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("Effects of if at head: slope ") == 2
        assert "for head without 1 to 3 rows; slope " in shown
        assert "target's probability. Effects of" in shown
    assert run(["retrieve", *asked, *text, "--damping", "0.003"]) == 0
    assert "Effects of if at head" not in " ".join(capsys.readouterr().out.split())  # nobody measured that one
    table = Retriever(copied).retrieve(bert_world.queries[:1], methods=["if"], top=2)
    assert "Effects of if at head: slope " in repr(forebear.show(table))

    retire_rows(copied, [5])
    table = Retriever(copied).retrieve(bert_world.queries[:1], methods=["if"], top=2)
    assert "Effects of if at head" not in repr(forebear.show(table))  # its relative damping is another number now
    assert run(["info", str(copied)]) == 0
    assert "measured before the index changed" in " ".join(capsys.readouterr().out.split())


def test_a_kept_line_is_that_of_the_questions_target_or_names_its_own(copied, bert_world):
    name = bert_world.retriever.label_names[1]
    how = Retraining(recipe="head")
    asked = {"methods": ["if"], "remove": (1,), "n_sets": 1, "how": how, "keep": True}

    def line(target: str) -> str:
        table = Retriever(copied).retrieve(bert_world.queries[:1], methods=["if"], top=2, target=target)
        return json.loads(table.schema.metadata[b"forebear"])["methods"]["if"]["effect_measured"]

    evaluations.effects(copied, bert_world.queries[:2], target=name.lower(), **asked)
    of_label = line(name)
    assert "of the target" not in of_label
    assert line(f"label:{name}") == of_label
    assert line("predicted") == f"{of_label[:-1]}, of the target label:{name} (here predicted)."
    evaluations.effects(copied, bert_world.queries[:2], **asked)
    assert [one.target for one in KEPT_EFFECTS.read(copied)] == [f"label:{name}", "predicted"]
    assert line(name) == of_label
    assert "of the target" not in line("predicted")


def test_a_refit_that_is_held_by_another_damping_than_the_question_is_kept_as_such(copied, bert_world):
    """Both dampings are compared with the same refits, which are those that one of them alone linearises."""
    how = Retraining(recipe="proximal-head")
    evaluations.effects(
        copied, bert_world.queries[:2], dampings=("0.1x", "2x"), remove=(1,), n_sets=1, how=how, keep=True
    )
    first, second = KEPT_EFFECTS.read(copied)
    assert first.recipe == "proximal-head"
    assert second.recipe == f"proximal-head held by {first.damping:.3g}"


def test_a_damaged_record_is_said_and_not_shown(copied, bert_world):
    (copied / "effects.json").write_text('{"version": 1, "results": [')
    with pytest.warns(UserWarning, match="is damaged"):
        table = Retriever(copied).retrieve(bert_world.queries[:1], methods=["if"], top=2)
    assert "Effects of if" not in repr(forebear.show(table))


def test_methods_without_effects_are_refused_before_the_work(bert_world):
    begun = []
    how = Retraining(recipe="proximal-head", begin=begun.append)
    for method, reason in (("gc", "no effect"), ("rif", "no effect"), ("if+", "masking a span")):
        with pytest.raises(InputError, match=reason):
            evaluations.effects(bert_world.retriever, bert_world.queries, methods=[method], how=how)
    assert not begun
