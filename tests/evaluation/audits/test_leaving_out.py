"""``audit deletion`` and ``sources`` beside refits by scikit-learn, scipy's permutation test and slow loops."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from tiny import sentences, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear import BuildOptions, InputError, Retriever, audits, build_index, choose_model, open_rows
from forebear.cli.main import run
from forebear.evaluation.audits.deletion.given import named_rows
from forebear.evaluation.audits.sources import worth as of_worth
from forebear.evaluation.audits.sources.worth import chance, less_the_rest, worth
from forebear.evaluation.python.retrainings import Retraining
from forebear.evaluation.worklists.items import Item, WorkList

N, Q, DAMPING = 150, 60, 0.02
BAD = "kim"  # who turns most labels over


def logistic(features, labels):
    """Weights ``(c, h)`` of the ridge regression whose objective is mean loss + DAMPING / 2 ||W||^2, N its divisor."""
    model = LogisticRegression(C=1 / (N * DAMPING), fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(features, labels).coef_


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """A model whose head is at its minimum, on labels that one of five annotators often turns over; and its index."""
    folder = tmp_path_factory.mktemp("leaving-out")
    source = tiny_model("bert", 3)
    tokenizer, model = (kind.from_pretrained(source) for kind in (AutoTokenizer, AutoModelForSequenceClassification))

    def features(texts):
        with torch.no_grad():
            return model.bert(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output.double().numpy()

    rng = np.random.default_rng(4)
    texts = sentences(N + Q, seed=7, low=4)
    f = features(texts)
    labels = (stats.zscore(f) @ rng.normal(size=(3, f.shape[1])).T).argmax(axis=1)
    annotators = rng.choice(["ann", "bo", BAD, "li", "mo"], N, p=[0.4, 0.2, 0.15, 0.15, 0.1])
    turned = (annotators == BAD) & (rng.random(N) < 0.7)
    given = np.where(turned, (labels[:N] + 1) % 3, labels[:N])
    weight = logistic(f[:N], given)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.zero_()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    columns = {"annotator": annotators.tolist(), "id": [f"r{i}" for i in range(N)]}
    train = write_jsonl(folder / "train.jsonl", text=texts[:N], label=given.tolist(), **columns)
    kinds = (np.arange(Q) % 3).tolist()
    test = write_jsonl(folder / "test.jsonl", text=texts[N:], label=labels[N:].tolist(), kind=kinds)
    options = BuildOptions(dampings=(str(DAMPING),), shard_rows=40)
    chosen = choose_model(str(folder / "model"), ()).checkpoints
    index = build_index(open_rows(str(train)), folder / "index", chosen, options)
    return SimpleNamespace(
        index=index, retriever=Retriever(index), texts=texts[:N], labels=given, annotators=annotators, f=f[:N],
        test=str(test), test_f=f[N:], gold=labels[N:], weight=weight, turned=turned, kinds=np.array(kinds),
    )  # fmt: skip


def log_loss(logits, labels):
    return -np.log(np.exp(logits)[np.arange(len(labels)), labels] / np.exp(logits).sum(axis=1))


# Deletion


@pytest.fixture(scope="module")
def left_out(world):
    """A set of rows, and what the audit says of it."""
    rows = np.array([3, 17, 29, 41, 60, 77, 103])
    return rows, audits.deletion(world.retriever, world.test, rows, group_by="kind", n_listed=5)


def test_a_deletion_is_predicted_as_scikit_learn_refits_the_head_without_the_rows(world, left_out):
    rows, finding = left_out
    found, kept = finding.numbers, np.delete(np.arange(N), rows)
    summed, step, refit = found.changes
    after = world.test_f @ logistic(world.f[kept], world.labels[kept]).T
    before = world.test_f @ world.weight.T
    moved = np.abs(after - before).max()
    assert np.abs(refit.logits - after).max() < 1e-3 * moved  # the model holds its weights in float32
    losses = log_loss(after, world.gold) - log_loss(before, world.gold)
    np.testing.assert_allclose(refit.losses, losses, atol=1e-3 * np.abs(losses).max())
    odds = [stats.logistic.ppf(np.exp(-log_loss(logits, world.gold))) for logits in (before, after)]
    np.testing.assert_allclose(refit.margins, odds[1] - odds[0], atol=1e-2 * np.abs(odds[1] - odds[0]).max())
    assert refit.labels.tolist() == after.argmax(axis=1).tolist()
    errors = [np.abs(change.logits - after).max() for change in (summed, step)]
    assert errors[1] < errors[0] < 0.5 * moved


def test_summed_influence_is_the_sum_of_the_scores_over_n(world, left_out):
    rows, finding = left_out
    scores = world.retriever.scores(open_rows(world.test), "if", target="gold")
    np.testing.assert_allclose(finding.numbers.changes[0].losses, scores[:, rows].sum(axis=1) / N, rtol=1e-6, atol=1e-9)


def test_dependence_is_the_rise_of_a_rows_own_loss_when_scikit_learn_refits_without_it(world, left_out):
    rows, finding = left_out
    depends = finding.numbers.depends
    own = log_loss(world.f @ world.weight.T, world.labels)[rows]
    alone = []
    for row, loss in zip(rows, own, strict=True):
        weight = logistic(np.delete(world.f, row, 0), np.delete(world.labels, row))
        alone.append(log_loss(world.f[[row]] @ weight.T, world.labels[[row]])[0] - loss)
    np.testing.assert_allclose(depends.losses, own, rtol=1e-4)
    np.testing.assert_allclose(depends.alone, alone, rtol=0.1, atol=1e-4)  # one Newton step each
    kept = np.delete(np.arange(N), rows)
    without = world.f[rows] @ logistic(world.f[kept], world.labels[kept]).T
    np.testing.assert_allclose(depends.together, log_loss(without, world.labels[rows]) - own, rtol=1e-2, atol=1e-5)
    flips = without.argmax(axis=1) != (world.f[rows] @ world.weight.T).argmax(axis=1)
    assert depends.flips.tolist() == flips.tolist()


def test_accuracy_is_reported_by_label_and_by_a_column_of_the_test_rows(world, left_out):
    rows, finding = left_out
    table = next(table for table in finding.report.tables if table.title.startswith("Accuracy"))
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert set(lines) == {"all", *(f"{of}{i}" for of in ("label: LABEL_", "kind: ") for i in range(3))}
    right = (world.test_f @ world.weight.T).argmax(axis=1) == world.gold
    for name, mask in (("all", np.ones(Q, bool)), ("label: LABEL_1", world.gold == 1), ("kind: 2", world.kinds == 2)):
        assert lines[name]["accuracy with"] == pytest.approx(right[mask].mean())
        after = (finding.numbers.best.labels == world.gold)[mask].mean()
        assert lines[name]["accuracy without"] == pytest.approx(after)
    listed = finding.work_list
    assert sorted(item.row for item in listed) == rows.tolist()
    rises = [item.evidence["rise alone"] for item in listed]
    assert rises == sorted(rises, reverse=True)


def test_retrained_changes_stand_beside_what_was_predicted(world, left_out, tmp_path):
    rows, _ = left_out
    how = Retraining(recipe="proximal-head", cache=tmp_path)
    found = audits.deletion(world.retriever, world.test, rows, how=how).numbers
    truth = found.retrained.changes("loss", found.predictions.targets, found.predictions.loss)
    np.testing.assert_allclose(truth[0], found.best.losses, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.retrained.own, found.depends.together, rtol=1e-5, atol=1e-9)
    r = [found.fit(change, "margin", 0).correlation for change in found.changes]
    assert r[2] == pytest.approx(1)
    assert r[0] == pytest.approx(stats.pearsonr(found.changes[0].margins, found.changes[2].margins)[0], abs=1e-6)


def test_rows_are_found_by_number_by_text_by_id_and_by_work_list(world, tmp_path):
    index = world.index
    (tmp_path / "numbers.txt").write_text("3 7-9,\n12")
    assert named_rows(index, tmp_path / "numbers.txt").rows.tolist() == [3, 7, 8, 9, 12]
    table = write_jsonl(tmp_path / "rows.jsonl", row=[5, 2])
    assert named_rows(index, str(table)).rows.tolist() == [2, 5]
    alike = [i for i, text in enumerate(world.texts) if text == world.texts[4]]
    by_text = named_rows(index, write_jsonl(tmp_path / "texts.jsonl", text=[world.texts[4], "a lost text"]))
    assert (by_text.rows.tolist(), by_text.missing) == (alike, ("a lost text",))
    (tmp_path / "ids.csv").write_text("id\nr8\nr11\nx1\n")
    by_id = named_rows(index, tmp_path / "ids.csv")
    assert (by_id.rows.tolist(), by_id.missing) == ([8, 11], ("x1",))
    items = tuple(Item(row=i, decision=said) for i, said in ((1, "remove"), (2, "keep"), (6, "quarantine"), (9, "")))
    assert named_rows(index, WorkList(items)).rows.tolist() == [1, 6]
    older = WorkList((Item(row=0, texts={"text": world.texts[20]}), Item(row=3, texts={"text": world.texts[3]})))
    assert 20 in named_rows(index, older).rows
    assert 0 not in named_rows(index, older).rows


# Sources


def test_a_sources_worth_is_the_mean_of_its_scores_and_its_loss_that_of_its_deletion(world):
    found = audits.sources(world.retriever, world.test, "annotator").numbers
    scores = world.retriever.scores(open_rows(world.test), "if", target="gold")
    wrong = (world.test_f @ world.weight.T).argmax(axis=1) != world.gold
    own = {name: world.annotators == name for name in found.grouping.names}
    for part, mask in (("all", np.ones(Q, bool)), ("wrong", wrong), ("label: LABEL_2", world.gold == 2)):
        means = [scores[np.ix_(mask, rows)].mean() for rows in own.values()]
        rest = [scores[np.ix_(mask, ~rows)].mean() for rows in own.values()]
        scale = np.abs(means).max()
        np.testing.assert_allclose(found.worths[part].means, means, atol=1e-6 * scale)
        np.testing.assert_allclose(found.worths[part].differences, np.subtract(means, rest), atol=1e-6 * scale)
        assert (found.worths[part].intervals[0] <= found.worths[part].differences).all()
        assert (found.worths[part].intervals[1] >= found.worths[part].differences).all()
    supported = world.retriever.scores(open_rows(world.test), "if", target="predicted")[wrong]
    top = np.argsort(-supported, axis=1, kind="stable")[:, :10]
    for mean, rows in zip(found.errors.shares, own.values(), strict=True):
        assert mean.mean == pytest.approx(rows[top].mean())
    for number, rows in enumerate(own.values()):
        weight = logistic(world.f[~rows], world.labels[~rows])
        logits = [world.test_f @ w.T for w in (world.weight, weight)]
        rise = np.mean(log_loss(logits[1], world.gold) - log_loss(logits[0], world.gold))
        assert found.left_out[number].rise.mean == pytest.approx(rise, rel=5e-3, abs=1e-5)
        gain = np.subtract(*((one.argmax(axis=1) == world.gold).mean() for one in logits[::-1]))
        assert found.left_out[number].gain.mean == pytest.approx(gain)


def test_a_source_of_turned_labels_is_the_worst_and_its_turned_rows_are_listed(world):
    finding = audits.sources(world.retriever, world.test, "annotator", n_left_out=1, n_listed=10)
    found = finding.numbers
    assert found.grouping.names[found.order[0]] == BAD
    assert found.grouping.names[found.worst[0]] == BAD
    assert found.worst[1] < 0.05
    assert BAD in finding.report.summary
    assert len(finding.work_list) == 10
    assert np.mean([world.turned[item.row] for item in finding.work_list]) > 0.7
    assert list(found.left_out) == [int(found.order[0])]


def test_p_is_that_of_scipys_permutation_test():
    rng = np.random.default_rng(0)
    scores, numbers = rng.normal(size=24), rng.permutation(np.repeat([0, 1, 2], [12, 8, 4]))
    scores[numbers == 2] += 0.9
    found = chance(scores, numbers, None, 0)
    assert found.n_shuffles == of_worth.MOST_SHUFFLES
    for m in range(3):
        parts = scores[numbers == m], scores[numbers != m]
        exact = stats.permutation_test(
            parts, lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=20_000, vectorized=True, rng=1
        ).pvalue
        assert found.p[m] == pytest.approx(exact, abs=4 * np.sqrt(exact / found.n_shuffles) + 0.005)
    assert (found.p_of_all >= found.p).all()


def test_shuffled_columns_have_uniform_p_and_labels_alone_are_no_fault(monkeypatch):
    monkeypatch.setattr(of_worth, "MOST_SHUFFLES", 200)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 90)
    scores = rng.standard_t(3, size=90) + 4 * labels  # heavy tails, and one label that is worth more
    sizes = np.repeat([0, 1, 2], [60, 20, 10])
    plain, of_all, of_labels, within = [], [], [], []
    for i in range(100):
        shuffled = chance(scores, rng.permutation(sizes), None, i)
        plain.append(shuffled.p[2])
        of_all.append(shuffled.p_of_all.min())
        mixed = np.where(rng.random(90) < np.where(labels == 1, 0.6, 0.2), 1, 0)  # a source of one label, mostly
        of_labels.append(chance(scores, mixed, None, i).p[1])
        within.append(chance(scores, mixed, labels, i).p[1])
    for values in (plain, of_all, within):
        assert stats.kstest(values, "uniform").pvalue > 0.01
    assert np.mean(np.array(of_labels) < 0.01) > 0.5


def test_intervals_are_those_of_a_bootstrap_over_test_rows_and_rows():
    rng = np.random.default_rng(2)
    numbers = rng.permutation(np.repeat([0, 1], [70, 30]))
    matrix = rng.normal(size=(40, 1)) * (1 + numbers) + 3 * rng.normal(size=100) + rng.normal(size=(40, 100))
    by_test_row = np.stack([matrix[:, numbers == m].mean(axis=1) for m in (0, 1)], axis=1)
    found = worth(by_test_row, matrix.mean(axis=0), numbers, 0)
    draws = []
    for _ in range(2000):
        rows = [rng.choice(np.flatnonzero(numbers == m), (numbers == m).sum()) for m in (0, 1)]
        some = matrix[rng.integers(0, 40, 40)]
        draws.append(some[:, rows[1]].mean() - some[:, rows[0]].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.intervals[1, 1] - found.intervals[0, 1] == pytest.approx(high - low, rel=0.2)
    assert less_the_rest(found.means, np.array([70, 30]))[1] == pytest.approx(found.means[1] - found.means[0])


# Commands


@pytest.mark.slow
def test_the_commands_write_their_folders(world, tmp_path, capsys):
    index, test = str(world.index.folder), world.test
    args = ["audit", "sources", "--index", index, "--test", test, "--column", "annotator", "--quiet"]
    assert run([*args, "--out", str(tmp_path / "sources"), "--left-out", "2"]) == 0
    result = json.loads((tmp_path / "sources" / "result.json").read_text())
    assert result["sources"][result["order"][0]] == BAD
    listed = list(csv.DictReader((tmp_path / "sources" / "worklist.csv").read_text().splitlines()))
    args = ["audit", "deletion", "--index", index, "--test", test, "--rows", str(tmp_path / "sources"), "--quiet"]
    cache = str(tmp_path / "cache")
    assert run([*args, "--retrain", "head", "--cache", cache, "--out", str(tmp_path / "deletion")]) == 0
    result = json.loads((tmp_path / "deletion" / "result.json").read_text())
    assert result["rows"] == sorted(int(line["row"]) for line in listed)
    assert len(result["retrained"]["loss"][0]) == Q
    assert "Trained again (head)" in (tmp_path / "deletion" / "report.html").read_text()
    capsys.readouterr()


def test_mistakes_are_one_line(world, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("3 five")
    (tmp_path / "none.txt").write_text("900")
    (tmp_path / "one.txt").write_text("9")
    (tmp_path / "other.csv").write_text("name\nx\n")
    (tmp_path / "all.txt").write_text(f"0-{N - 2}")
    index, test = str(world.index.folder), world.test
    for args, said in (
        (["deletion", "--rows", str(tmp_path / "bad.txt")], "'five' is no row number"),
        (["deletion", "--rows", str(tmp_path / "none.txt")], "none of the 1 that are named"),
        (["deletion", "--rows", str(tmp_path / "other.csv")], "it has the columns name"),
        (["deletion", "--rows", str(tmp_path / "all.txt"), "--damping", "1e-4"], "the rows that stay say too little"),
        (["deletion", "--rows", str(tmp_path / "one.txt"), "--top", "0"], "--top 0"),
        (["sources", "--column", "id"], "Expected a column whose values are shared"),
        (["sources", "--column", "nothing"], "--column nothing"),
        (["sources", "--column", "annotator", "--top", "0"], "--top 0"),
    ):
        assert run(["audit", args[0], "--index", index, "--test", test, *args[1:], "--quiet"]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1
    with pytest.raises(InputError, match="group_by"):
        audits.deletion(world.retriever, world.test, [1], group_by="nothing")
