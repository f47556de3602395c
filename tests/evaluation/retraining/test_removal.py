"""Evaluations that retrain, on models whose retrained outputs are known: slow loops, scipy, sums by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import texts_of
from inputs import Additive
from scipy import stats
from tiny import labels, sentences, write_jsonl
from warm import run_command, start_command

from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.common.power import values_for_verdict
from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.retraining.changes import seeds_of, verdict_on
from forebear.evaluation.retraining.deletion_curve import measure_deletion
from forebear.evaluation.retraining.jobs import Job, Retrainer, TrainingRows
from forebear.evaluation.retraining.lds.measure import measure_lds
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.evaluation.retraining.removal import Removal, _removal_tables, measure_removal
from forebear.evaluation.retraining.retraining_loss import measure_retraining_loss
from forebear.evaluation.retraining.row_choice import (
    amounts_of,
    label_matched_rows,
    least_overlap,
    row_scores,
    rows_at,
    sides_of,
)
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.opening import open_rows
from forebear.retriever.question.spec import QuerySpec

N, Q = 60, 5


@pytest.fixture
def weights():
    return np.random.default_rng(3).normal(size=(Q, N)) / 4


@pytest.fixture
def make(bert_world, weights, tmp_path):
    def retrainer(noise=0.0, of=weights, **facts):
        recipe = Additive(of, noise)
        recipe.facts = {"noise": noise, "sum": float(of.sum()), **facts}
        return Retrainer(recipe, TrainingRows(bert_world.index), [[f"query {i}" for i in range(len(of))]], tmp_path)

    return retrainer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_rows_are_chosen_by_signed_score_and_ties_go_to_the_lower_row():
    rows = np.array([2, 3, 5, 7, 11])
    scores = np.array([1.0, -3.0, 1.0, 0.5, -0.5])
    assert rows_at(scores, rows, 1, "top").tolist() == [2]
    assert rows_at(scores, rows, 2, "top").tolist() == [2, 5]
    assert rows_at(scores, rows, 2, "bottom").tolist() == [3, 11]
    assert rows_at(scores, rows, 1, "least").tolist() == [7]
    assert rows_at(np.zeros(5), rows, 3, "bottom").tolist() == [2, 3, 5]
    without_span = np.array([1.0, -np.inf, 2.0, -1.0, -np.inf])
    assert rows_at(without_span, rows, 1, "bottom").tolist() == [7]
    assert rows_at(without_span, rows, 1, "least").tolist() == [2]


def test_removal_equals_a_slow_loop(make, weights):
    # a perfect method: what raises class 1 supports a query that is predicted as 1, and opposes one predicted as 0
    seeds, amounts = (0, 1), (3, 10)
    signs = np.where(weights.sum(axis=1) > 0, 1.0, -1.0)
    found = measure_removal(make(), {"perfect": weights * signs[:, None]}, amounts, seeds)
    assert found.changes.shape == (1, 3, 2, 2, Q)
    for i in range(Q):
        for s in seeds:
            total = weights[i].sum() + 0.1 * s
            sign = 1.0 if total > 0 else -1.0
            mine = sorted(range(N), key=lambda n: -weights[i, n] * signs[i])
            least = sorted(range(N), key=lambda n: abs(weights[i, n]))
            for j, order in enumerate((mine, mine[::-1], least)):
                for a, k in enumerate(amounts):
                    less = total - sum(weights[i, n] for n in order[:k])
                    truth = sigmoid(sign * less) - sigmoid(sign * total)
                    assert found.changes[0, j, a, s, i] == pytest.approx(truth, abs=1e-6)
    assert (found.changes[0, 0, 1] < found.changes[0, 0, 0]).all()
    assert (found.changes[0, 0] < found.random).all()
    assert (found.changes[0, 1] > found.random).all()


def test_random_rows_are_drawn_for_each_query_seed_and_amount(make, weights):
    same = np.tile(weights[:1], (Q, 1))
    found = measure_removal(make(of=same), {"a": same}, (5, 6), (0, 1, 2))
    assert len(np.unique(found.random)) == found.random.size
    again = measure_removal(make(of=same), {"a": same}, (5, 6), (0, 1, 2))
    np.testing.assert_array_equal(found.random, again.random)
    other = measure_removal(make(of=same), {"a": same}, (5, 6), (0, 1, 2), seed=1)
    assert (found.random != other.random).all()


def test_matched_rows_have_the_labels_of_those_removed():
    gold = np.array([0, 1, 1, 0, 1, 2, 1, 0, 2, 1, 1, 0])
    rows = np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 11])
    removed = np.array([1, 5, 7, 9])  # labels 1, 2, 0, 1
    seen = set()
    for seed in range(200):
        found = label_matched_rows(rows, gold, removed, seed)
        assert len(set(found.tolist())) == 4
        assert set(found.tolist()) <= set(rows.tolist())
        assert sorted(gold[found]) == [0, 1, 1, 2]
        seen |= set(found.tolist())
    assert seen == set(rows.tolist())
    other = np.array([2, 4, 8, 11])  # other rows of the same labels
    assert label_matched_rows(rows, gold, other, 3).tolist() == label_matched_rows(rows, gold, removed, 3).tolist()


def test_what_is_removed_beside_a_method_has_the_labels_of_its_rows(bert_world, make, weights):
    """Where the label is all that counts, a method does no more than random rows of the same labels."""
    of_label = np.tile(np.where(np.array(bert_world.labels) == 1, 0.05, -0.05), (Q, 1))
    noise = weights / 1000
    found = measure_removal(make(of=of_label), {"label": of_label + noise}, (4, 9), (0, 1), sides=("top", "bottom"))
    np.testing.assert_allclose(found.matched, found.changes, atol=1e-12)
    assert (np.abs(found.changes).mean() - np.abs(found.random).mean()) > 0.02
    gold = np.ones(Q, np.int64)
    curve = measure_deletion(make(of=of_label), {"label": of_label + noise}, gold, (4, 9), (0, 1))
    np.testing.assert_allclose(curve.matched, curve.changes, atol=1e-12)
    np.testing.assert_allclose(curve.matched_auc, curve.auc, atol=1e-12)
    assert curve.random_auc.shape == (Q,)
    assert (curve.auc[0, 0] < curve.random_auc).all()
    lost = measure_retraining_loss(make(of=of_label), {"label": of_label + noise}, gold, (4, 20), (0, 1))
    np.testing.assert_array_equal(lost.matched, lost.accuracy)
    candidates = np.tile(np.arange(20, 40), (Q, 1))
    curve = measure_deletion(make(of=of_label), {"label": of_label}, gold, (4,), (0,), candidates=candidates)
    np.testing.assert_allclose(curve.matched, curve.changes, atol=1e-12)


def test_a_difference_within_chance_says_how_many_retrainings_would_tell_it():
    values = np.random.default_rng(0).normal(size=20)
    n = values_for_verdict(values)
    said = verdict_on(values, values * 0, 6, 0)
    assert said.startswith(" Against random rows of the same labels: no verdict: about ")
    assert f"about {round(6 * n, 2 - len(str(6 * n))):,} retrainings" in said
    assert verdict_on(values + 9, values * 0, 6, 0) == ""


def test_a_budget_leaves_whole_comparisons_out(make, weights):
    scores = {"a": weights, "b": -weights}
    retrainer = make()
    found = measure_removal(retrainer, scores, (4,), (0, 1), sides=("top",), budget=24)
    whole = measure_removal(make(), scores, (4,), (0, 1), sides=("top",))
    assert retrainer.n_trained <= 24
    known = ~np.isnan(found.random[0])
    assert 3 <= known.sum() < 2 * Q
    np.testing.assert_array_equal(np.isnan(found.changes[:, 0, 0]), np.broadcast_to(~known, (2, 2, Q)))
    np.testing.assert_array_equal(found.changes[:, 0, 0, known], whole.changes[:, 0, 0, known])
    np.testing.assert_array_equal(found.matched[:, 0, 0, known], whole.matched[:, 0, 0, known])
    assert "budget=24" in found.sampled


def test_one_query_and_constant_scores_are_defined(make, weights):
    found = measure_removal(make(of=weights[:1]), {"flat": np.zeros((1, N))}, (7,), (0,))
    assert np.isfinite(found.changes).all()
    assert (found.changes == found.changes[0, 0]).all()  # the first rows, on every side


def test_deletion_curves_and_their_area_by_hand(make, weights):
    gold = np.array([1, 0, 1, 0, 1])
    signs = np.where(gold == 1, 1.0, -1.0)
    seeds, amounts = (0, 4), (2, 5, 9)
    found = measure_deletion(make(), {"perfect": weights * signs[:, None]}, gold, amounts, seeds)
    truth = np.zeros((2, len(amounts), Q))
    for i in range(Q):
        order = sorted(range(N), key=lambda n: -weights[i, n] * signs[i])
        for j, mine in enumerate((order, order[::-1])):
            for a, k in enumerate(amounts):
                before = [sigmoid(signs[i] * (weights[i].sum() + 0.1 * s)) for s in seeds]
                after = [
                    sigmoid(signs[i] * (sum(weights[i, n] for n in range(N) if n not in mine[:k]) + 0.1 * s))
                    for s in seeds
                ]
                truth[j, a, i] = sum(after) / 2 - sum(before) / 2
    np.testing.assert_allclose(found.curves[0], truth, atol=1e-6)
    by_hand = (truth[:, 0] + truth[:, 1] + truth[:, 2]) / 3
    np.testing.assert_allclose(found.auc[0], by_hand, atol=1e-6)
    assert (found.auc[0, 0] < 0).all()
    assert (found.auc[0, 1] > 0).all()


def test_only_candidates_are_removed(make, weights):
    gold = np.ones(Q, np.int64)
    candidates = np.tile(np.arange(20, 30), (Q, 1))
    found = measure_deletion(make(), {"perfect": weights}, gold, (4,), (0,), candidates=candidates)
    for i in range(Q):
        best = np.sort(weights[i, 20:30])[::-1][:4].sum()
        truth = sigmoid(weights[i].sum() - best) - sigmoid(weights[i].sum())
        assert found.changes[0, 0, 0, 0, i] == pytest.approx(truth, abs=1e-6)


def test_candidates_of_the_no_overlap_test_are_those_of_scikit_learns_least_tf_idf_cosine(bert_world):
    from sklearn.feature_extraction.text import TfidfVectorizer

    queries = QueryRows(source="q", rows=np.arange(7), texts=(bert_world.queries,), labels=None)
    found = least_overlap(bert_world.retriever, queries, 12)
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", lowercase=False)
    rows = vectorizer.fit_transform(bert_world.texts)
    cosines = (vectorizer.transform(bert_world.queries) @ rows.T).toarray()
    for mine, truth in zip(found, cosines, strict=True):
        assert len(set(mine.tolist())) == 12
        np.testing.assert_allclose(np.sort(truth[mine]), np.sort(truth)[:12], atol=1e-9)
    with pytest.raises(InputError, match="n_candidates=61: expected 3 to 60"):
        least_overlap(bert_world.retriever, queries, 61)


def test_retraining_loss_equals_a_slow_loop(make, weights):
    gold = np.array([1, 0, 1, 0, 1])
    scores = weights[:3] * 2  # queries and rows that accuracy is measured on may differ
    found = measure_retraining_loss(make(), {"a": scores, "b": -scores}, gold, (6, 20), (0, 5))
    for s, seed in enumerate((0, 5)):

        def accuracy(removed, seed=seed):
            odds = [sum(weights[i, n] for n in range(N) if n not in removed) + 0.1 * seed for i in range(Q)]
            return np.mean([(o > 0) == (y == 1) for o, y in zip(odds, gold, strict=True)])

        assert found.whole[s] == accuracy([])
        for m, sign in enumerate((1, -1)):
            order = sorted(range(N), key=lambda n: -sign * sum(scores[i][n] for i in range(3)))
            for a, k in enumerate((6, 20)):
                assert found.accuracy[m, a, s] == accuracy(order[:k])
                assert found.loss[m, a, s] == accuracy([]) - accuracy(order[:k])
    assert found.methods == ("a", "b")


def test_bad_amounts_sides_and_seeds_are_refused(make):
    assert amounts_of([5], ["0.1", "0.5"], 60, ["0.2"]) == (5, 6, 30)
    assert amounts_of([], [], 60, ["0.2", "7"]) == (7, 12)
    for remove, shares in (([0], []), ([59], []), ([], ["0.99"])):
        with pytest.raises(InputError, match="expected 1 to 58"):
            amounts_of(remove, shares, 60, [])
    assert sides_of([]) == ("top", "bottom", "least")
    with pytest.raises(InputError, match=r'names=\("middle",\): expected top, bottom, least'):
        sides_of(["top", "middle"])
    with pytest.raises(InputError, match="n_seeds=0"):
        seeds_of(make(), 0, 0)
    assert seeds_of(make(), 3, 7) == (7, 8, 9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["if+", "if++", "tracin+", "tracin++"])
def test_a_rows_score_by_spans_is_that_of_its_best_span_among_all(bert_world, method):
    retriever = bert_world.retriever
    texts = texts_of(3, 50, False)
    spec = retriever.resolve(QuerySpec(methods=(method, "gd"), spans="words", damping="0.1x"))
    queries = QueryRows(source="q", rows=np.arange(3), texts=(texts,), labels=None)
    found = row_scores(retriever, queries, spec)
    np.testing.assert_allclose(found["gd"], retriever.scores(texts, "gd"))
    table = retriever.retrieve(texts, methods=[method], spans="words", damping="0.1x", exact="full", top=200)
    best = np.full((3, N), -np.inf)
    for row in table.to_pylist():
        if row["side"] == "proponent":
            best[row["query"], row["row"]] = max(best[row["query"], row["row"]], row["score"])
    seen = np.isfinite(best)
    assert seen.sum() > 50
    scale = np.abs(best[seen]).max()
    np.testing.assert_allclose(found[method][seen], best[seen], atol=1e-5 * scale)
    assert (found[method][~seen] <= best[seen].max()).all()


def test_spans_of_test_rows_may_be_given_by_columns(bert_world, tmp_path):
    retriever, texts = bert_world.retriever, texts_of(5, 50, False)
    ends = [text.index(" ") for text in texts]
    path = write_jsonl(tmp_path / "test.jsonl", text=texts, **{"from": [0] * 5, "to": ends})
    choices = {"spans": "words", "query_spans": "columns:from,to", "damping": "0.1x"}
    queries = sample_queries(retriever, open_rows(path), 3, 0)
    found = row_scores(retriever, queries, retriever.resolve(QuerySpec(methods=("if++",), **choices)))["if++"]
    top = retriever.retrieve(open_rows(path), methods=["if++"], top=1, exact="full", **choices).to_pylist()
    best = {row["query"]: row for row in top if row["side"] == "proponent"}
    for i, number in enumerate(queries.rows):
        assert best[number]["query_span_end"] == ends[number]
        assert retriever.index.live[found[i].argmax()] == best[number]["row"]
        assert found[i].max() == pytest.approx(best[number]["score"], rel=1e-4)


def test_influence_at_the_refitted_head_foretells_refits_on_halves(bert_world, tmp_path):
    # influence functions by numpy alone, at the optimum of scikit-learn, against the heads refitted by the engine
    from sklearn.linear_model import LogisticRegression

    l2, classifier = 0.2, bert_world.retriever.classifier()

    def features(texts):
        f = run_forward(classifier, [texts]).features.astype(np.float64)
        return np.hstack([f, np.ones((len(f), 1))])

    x, y = features(bert_world.texts), np.array(bert_world.labels)
    texts = sentences(6, seed=8)
    xq, targets = features(texts), np.array([0, 1, 0, 1, 1, 0])
    fitted = LogisticRegression(C=2 / (l2 * N), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y)
    p, pq = fitted.predict_proba(x)[:, 1], fitted.predict_proba(xq)[:, 1]
    g, gq = (p - y)[:, None] * x, (pq - targets)[:, None] * xq  # of one logit w: its penalty is l2 / 2
    hessian = (x * (p * (1 - p))[:, None]).T @ x / N + l2 / 2 * np.eye(x.shape[1])
    scores = np.linalg.solve(hessian, gq.T).T @ g.T
    retrainer = open_retrainer(bert_world.retriever, "head", [texts], tmp_path, l2=l2)
    shuffled = np.random.default_rng(0).permuted(scores, axis=1)
    found = measure_lds(retrainer, [{"influence": scores, "shuffled": shuffled}], targets, (0,), n_subsets=60)
    assert found.values[0].min() > 0.9
    assert abs(found.values[1].mean()) < 0.3
    removed = measure_removal(retrainer, {"influence": scores}, (3,), (0,), sides=("top", "bottom"))
    whole = retrainer.run([Job(np.arange(N), 0)])[0].predictions
    at = whole == targets  # what removal looks at is then what the scores explain
    assert at.any()
    assert (removed.changes[0, 0, 0, 0, at] < removed.random[0, 0, at]).all()
    assert (removed.changes[0, 1, 0, 0, at] > removed.random[0, 0, at]).all()


@pytest.fixture(scope="module")
def test_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("test-rows")
    return write_jsonl(folder / "test.jsonl", text=sentences(12, seed=31), label=labels(12, 2, seed=8))


COMMANDS = {
    "removal": ["--remove", "3,6", "--sides", "top", "bottom"],
    "deletion-curve": ["--remove", "2,8", "--no-overlap", "30"],
    "retraining-loss": ["--share", "0.2"],
    "lds": ["--subsets", "6"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_writes_a_report_and_repeats_it_from_its_cache(
    bert_world, test_rows, command, tmp_path, capsys, monkeypatch
):
    index = str(bert_world.index.folder)
    args = ["evaluate", command, "--index", index, "--test", str(test_rows), "--method", "gd", "nn-cos", "-q"]
    args += ["--queries", "4", "--cache", str(tmp_path / "cache"), *COMMANDS[command]]
    assert run([*args, "--out", str(tmp_path / "a")]) == 0
    first = json.loads((tmp_path / "a" / "result.json").read_text())
    assert first["retrain"] == "head"
    assert "stand-in" in first["note"]
    assert len(first["queries"]) == 4
    assert "stand-in" in (tmp_path / "a" / "report.html").read_text()
    assert (tmp_path / "a" / "table.csv").read_text().count("nn-cos") >= 1
    if command != "lds":
        assert "(random rows, labels of gd)" in (tmp_path / "a" / "table.csv").read_text()
    cached = sorted(tmp_path.glob("cache/*/*.arrow"))
    assert cached

    def refuse(*_args):
        raise AssertionError("a finished job was trained again")

    monkeypatch.setattr("forebear.evaluation.retraining.recipes.HeadRecipe.train", refuse)
    assert run([*args, "--out", str(tmp_path / "b")]) == 0
    second = json.loads((tmp_path / "b" / "result.json").read_text())
    del first["provenance"]["command"], second["provenance"]["command"]
    assert first == second
    assert (tmp_path / "a" / "table.csv").read_bytes() == (tmp_path / "b" / "table.csv").read_bytes()
    capsys.readouterr()
    assert run([*args, "--out", str(tmp_path / "b")]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_give_the_report_of_one_process(bert_world, test_rows, tmp_path):
    args = ["evaluate", "removal", "--index", str(bert_world.index.folder), "--test", str(test_rows), "--method", "gd"]
    args += ["--queries", "4", "--remove", "5", "-q"]
    results = []
    for workers in ("1", "3"):
        out = tmp_path / workers
        how = [*args, "--cache", str(tmp_path / f"cache-{workers}"), "--workers", workers, "--out", str(out)]
        if workers == "1":
            assert run(how) == 0
        else:
            environment = os.environ | {"TMPDIR": str(tmp_path)}
            done = run_command([*how, "--devices", "cpu,cpu"], environment=environment)
            assert done.returncode == 0, done.stderr
            assert "worker ended" not in done.stderr
        result = json.loads((out / "result.json").read_text())
        del result["provenance"]["command"]
        results.append(result)
    assert results[0] == results[1]
    assert not list(tmp_path.glob("forebear-workers-*"))


def test_test_rows_without_a_span_are_left_out_and_counted(bert_world, tmp_path, capsys):
    texts = sentences(12, seed=31)
    texts[5] = "?!"
    path = write_jsonl(tmp_path / "test.jsonl", text=texts, label=labels(12, 2, seed=8))
    args = ["evaluate", "removal", "--index", str(bert_world.index.folder), "--test", str(path), "-q", "--queries", "0"]
    args += ["--method", "if++", "--spans", "words", "--cache", str(tmp_path / "c"), "--scope", "head"]
    assert run([*args, "--remove", "3", "--sides", "top", "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["queries"] == [n for n in range(12) if n != 5]
    assert "1 sampled rows without a span left out" in result["provenance"]["test rows"]


def test_rows_without_a_span_are_not_removed_as_if_they_were_ranked():
    scores = np.array([-np.inf, 2.0, -1.0, -np.inf, 0.5])
    assert rows_at(scores, np.arange(5), 3, "bottom").tolist() == [1, 2, 4]
    with pytest.raises(InputError, match="4 rows are to be removed, but only 3 hold a span"):
        rows_at(scores, np.arange(5), 4, "top")


def test_an_unsolved_system_is_said(bert_world, test_rows, tmp_path):
    args = ["evaluate", "retraining-loss", "--index", str(bert_world.index.folder), "--test", str(test_rows), "-q"]
    args += ["--queries", "3", "--cache", str(tmp_path / "c"), "--remove", "5", "--method", "if", "--curvature", "cg"]
    assert run([*args, "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert 0 < result["residuals"]["if"] < 1
    assert f"relative residual {result['residuals']['if']:.1e}" in (tmp_path / "a" / "report.html").read_text()


def test_intervals_and_p_are_over_queries_not_over_their_seeds():
    """Four queries of seven nearly equal seeds say no more than four values."""
    rng = np.random.default_rng(0)
    of_query = np.array([-0.3, -0.1, 0.05, 0.2])
    changes = of_query + 1e-6 * rng.normal(size=(1, 1, 1, 7, 4))
    found = Removal(
        methods=("a",), sides=("top",), amounts=(5,), seeds=tuple(range(7)), changes=changes, matched=changes + 0.1,
        random=np.zeros((1, 7, 4)), sampled="all", residuals={},
    )  # fmt: skip
    table, to_matched, compared = _removal_tables(found, 0, paired=True)
    mean, error, low, high, n = table.rows[1][3:]
    half = stats.t.ppf(0.975, 3) * stats.sem(100 * of_query)
    assert (mean, low, high) == pytest.approx((-3.75, -3.75 - half, -3.75 + half), abs=1e-3)
    assert n == 28
    assert error == pytest.approx(stats.sem(100 * changes.reshape(-1)))
    assert compared.rows[0][-2] == pytest.approx(stats.wilcoxon(of_query).pvalue)
    assert to_matched.rows[0][3:6] == pytest.approx([-10.0] * 3)
    assert (compared.rows[0][-1], to_matched.rows[0][-1]) == (values_for_verdict(of_query), None)


def test_a_share_of_one_is_all_rows_not_one():
    for share in ("1", "1.0"):
        with pytest.raises(InputError, match="takes 60 of 60 rows away"):
            amounts_of([], [share], 60, ["0.2"])


def test_more_amounts_than_a_chart_shows(bert_world, test_rows, tmp_path):
    args = ["evaluate", "retraining-loss", "--index", str(bert_world.index.folder), "--test", str(test_rows), "-q"]
    args += ["--queries", "3", "--cache", str(tmp_path / "c"), "--method", "gd", "--remove", "1,2,3,4,5,6,7,8"]
    assert run([*args, "--out", str(tmp_path / "a")]) == 0
    assert "The 6 largest numbers of rows." in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.slow
def test_workers_end_with_a_command_that_is_terminated(bert_world, test_rows, tmp_path):
    command = ["evaluate", "lds", "--index", bert_world.index.folder, "--test", test_rows, "--method", "gd,if,gc"]
    command += ["--seeds", "1", "--subsets", "20000", "--cache", tmp_path / "cache", "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    running = start_command([*command, "--out", tmp_path / "out"], environment=environment)
    try:
        wait_for(lambda: len(list(tmp_path.glob("cache/*/*.arrow"))) > 3)
        (worker,) = children_of(running.pid)
        os.kill(running.pid, signal.SIGTERM)
        running.wait(60)
        wait_for(lambda: not alive(worker), 60)  # all its work would take longer
        assert not list(tmp_path.glob("forebear-workers-*"))
    finally:
        running.kill()


def wait_for(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def children_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def alive(number: int) -> bool:
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_mistakes_exit_with_one_line(bert_world, test_rows, tmp_path, capsys):
    index = str(bert_world.index.folder)
    args = ["evaluate", "removal", "--index", index, "--test", str(test_rows), "-q", "--cache", str(tmp_path)]
    for extra, message in (
        (["--method", "saliency-if"], "saliency"),
        (["--retrain", "top-9x"], "expected full, top-K"),
        (["--retrain", "full"], "is no training run"),
        (["--remove", "60"], "expected 1 to 58"),
        (["--workers", "0"], "expected 1 or more"),
        (["--method", "gd", "--budget", "2"], "one comparison takes"),
    ):
        assert run([*args, *extra]) == 2
        err = capsys.readouterr().err
        assert message in " ".join(err.split()), err
    shutil.rmtree(tmp_path)
