"""``audit deletion`` and ``sources`` beside refits by scikit-learn, scipy's permutation test and slow loops."""

from __future__ import annotations

import csv
import json
import tracemalloc
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
from forebear.evaluation.audits.deletion.deletion import Retrained
from forebear.evaluation.audits.deletion.given import named_rows
from forebear.evaluation.audits.sources import sources as of_sources
from forebear.evaluation.audits.sources import worth as of_worth
from forebear.evaluation.audits.sources.report import _summary
from forebear.evaluation.audits.sources.sources import BehindErrors, Sources
from forebear.evaluation.audits.sources.worth import chance, less_the_rest, worth
from forebear.evaluation.common.statistics import mean_of
from forebear.evaluation.python.retrainings import Retraining
from forebear.evaluation.worklists.items import Item, WorkList
from forebear.indexer.building.change import retire_rows

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


def test_a_row_that_was_decided_to_stay_is_not_taken_for_an_equal_one_that_went(tiny_model, tmp_path):
    texts, labels = sentences(12, seed=3), [0, 1, 2] * 4
    texts[9], texts[4], texts[11] = texts[2], texts[3], texts[5]  # equal; 11 has the label of 5 too, 9 and 4 another
    train = write_jsonl(tmp_path / "train.jsonl", text=texts, label=labels)
    chosen = choose_model(str(tiny_model("bert", 3)), ()).checkpoints
    build_index(open_rows(str(train)), tmp_path / "index", chosen, BuildOptions(dampings=(str(DAMPING),)))
    index = retire_rows(tmp_path / "index", [5])
    names = index.label_texts(np.arange(12))

    def item(of, decision="", row=None):
        return Item(row=of if row is None else row, texts={"text": texts[of]}, given=names[of], decision=decision)

    def named(*items):
        found = named_rows(index, WorkList(items))
        return found.rows.tolist(), [text.split(":")[0] for text in found.missing]

    first = item(7, "remove")
    assert named(first, item(5, "remove"), item(11, "keep")) == ([7], ["row 5"])  # 5 is retired
    assert named(first, item(5, "remove")) == ([7], ["row 5"])
    assert named(first, item(5, "remove", 1)) == ([7, 11], [])  # of an older index, where it was row 1
    assert named(first, item(5, "remove", 1), item(11, "keep")) == ([7], ["row 1"])
    assert named(first, item(5, "remove", 1), item(5, "relabel", 0)) == ([7], ["row 1"])  # both moved
    assert named(first, item(5, "remove", 1), item(8, "keep", 11)) == ([7], ["row 1"])  # a number that stays
    assert named(first, item(2, "remove", 1)) == ([2, 7], [])  # not row 9, whose label is another
    assert named(item(7), item(3, row=4)) == ([3, 7], [])
    with pytest.raises(InputError, match="row 7 is decided both to go and to stay"):
        named(first, item(7, "keep"))


def test_the_ceiling_of_r_is_the_r_of_the_mean_of_the_seeds_with_the_change_behind_them():
    rng = np.random.default_rng(0)
    behind, targets = rng.normal(size=4000), np.ones(4000, np.int64)
    after = np.zeros((2, 4000, 2))
    after[:, :, 1] = behind + 1.2 * rng.normal(size=(2, 4000))
    again = Retrained((0, 1), np.zeros_like(after), after, np.empty(0))
    r = stats.pearsonr(again.changes("margin", targets, None).mean(axis=0), behind)[0]
    assert again.ceiling("margin", targets, None) == pytest.approx(r, abs=0.02)
    assert Retrained((0,), after[:1], after[1:], np.empty(0)).ceiling("margin", targets, None) is None


# Sources


def sources_by(scores, numbers, labels, behind=None):
    """Sources of made-up scores of rows, and of how often each stands behind an error."""
    sizes, m = np.bincount(numbers), numbers.max() + 1
    by_test_row = np.tile([scores[numbers == one].mean() for one in range(m)], (20, 1))
    errors = None
    if behind is not None:
        shares = [mean_of([behind[numbers == one].sum() / behind.sum()] * 2) for one in range(m)]
        errors = BehindErrors(shares, *(chance(behind, numbers, strata, 0) for strata in (None, labels)))
    return Sources(
        grouping=SimpleNamespace(names=[f"s{one}" for one in range(m)], column="who", numbers=numbers), sizes=sizes,
        n_test={"all": 20}, worths={"all": worth(by_test_row, scores, numbers, 0)},
        chance=chance(scores, numbers, None, 0), chance_in_labels=chance(scores, numbers, labels, 0), scores=scores,
        errors=errors, left_out={},
    )  # fmt: skip


def test_no_source_is_blamed_for_the_labels_that_it_drew(monkeypatch):
    monkeypatch.setattr(of_worth, "MOST_SHUFFLES", 400)
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 400)
    scores, behind = rng.normal(size=400) + 2 * labels, rng.poisson(3 - 2 * labels).astype(float)
    drew = np.where(rng.random(400) < np.where(labels == 0, 0.4, 0.05), 1, 0)  # s1: clean, mostly of label 0
    for numbers in (drew, labels):
        for counts in (None, behind):
            found = sources_by(scores, numbers, labels, counts)
            assert found.chance.p_of_all.max() < 0.01
            assert found.worst.p > 0.05
            assert "No who differs from the others by more than chance and its mix of labels" in _summary(found)
    bad = drew == 1
    assert sources_by(scores - 1.0 * bad, drew, labels).worst.number == 1
    assert sources_by(scores - 1.0 * bad, drew, labels).worst.p < 0.05
    # worth less among all rows for its labels, and more than others of the same labels
    assert sources_by(scores + 0.6 * bad, drew, labels).worst.p > 0.05


def test_the_summary_names_the_question_that_found_the_source_and_the_rows_worth_most(monkeypatch):
    monkeypatch.setattr(of_worth, "MOST_SHUFFLES", 400)
    rng = np.random.default_rng(6)
    numbers, labels = np.repeat([0, 1, 2, 3], [150, 150, 85, 15]), np.tile([0, 1], 200)
    scores = rng.normal(size=400) + np.array([0.5, 0.45, -0.3, 0.0])[numbers]
    scores[numbers == 3] += 0.7 - scores[numbers == 3].mean()
    behind = rng.poisson(np.array([1, 1, 1, 4])[numbers]).astype(float)
    by_worth = sources_by(scores, numbers, labels, np.ones(400))
    assert (by_worth.worst.number, by_worth.worst.by) == (2, "worth")
    assert "of its worth, beside" in _summary(by_worth)
    by_errors = sources_by(rng.normal(size=400), numbers, labels, behind)
    assert (by_errors.worst.number, by_errors.worst.by) == (3, "errors")
    assert "of its share of what is behind errors" in _summary(by_errors)
    assert "Its 15 rows are worth" in _summary(by_errors)
    assert by_worth.order[-1] != 3
    assert "a row is worth most of s3." in _summary(by_worth)


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
    assert found.grouping.names[found.worst.number] == BAD
    assert found.worst.p < 0.05
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


def test_intervals_of_small_sources_are_as_wide_as_their_spread_or_none():
    rng = np.random.default_rng(3)
    numbers = np.r_[np.zeros(60, int), np.ones(10, int), np.full(9, 2), np.arange(3, 33)]
    scores = rng.normal(size=len(numbers))
    equal = np.tile([scores[numbers == one].mean() for one in range(33)], (5, 1))  # test rows that are all alike
    found = [worth(equal, scores, numbers, seed) for seed in range(20)]
    widths = np.mean([one.mean_intervals[1] - one.mean_intervals[0] for one in found], axis=0)
    assert np.isnan(widths).tolist() == [False, False, *[True] * 31]
    normal = 2 * stats.norm.ppf(0.975)
    assert widths[1] == pytest.approx(normal * scores[60:70].std(ddof=1) / np.sqrt(10), rel=0.03)
    width = np.mean([one.intervals[1, 0] - one.intervals[0, 0] for one in found])
    rest = (10 * scores[60:70].var(ddof=1) + 9 * scores[70:79].var(ddof=1) + 30 * scores.var()) / 49**2
    assert width == pytest.approx(normal * np.sqrt(scores[:60].var(ddof=1) / 60 + rest), rel=0.03)
    one_row = worth(equal[:, :2], scores[:61], numbers[:61], 0)
    assert np.isnan(one_row.intervals).all()
    assert np.isnan(one_row.mean_intervals[0]).tolist() == [False, True]


def test_products_hold_no_more_than_a_block_of_test_rows(monkeypatch):
    monkeypatch.setattr(of_sources, "BLOCK_NUMBERS", 1 << 12)
    rng = np.random.default_rng(0)
    residuals, features, matrices = (rng.normal(size=shape) for shape in ((2000, 4), (2000, 3), (50, 4, 3)))
    tracemalloc.start()
    try:
        found = of_sources._products(residuals, features, matrices)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    slow = [[r @ matrix @ f for matrix in matrices] for r, f in zip(residuals[::500], features[::500], strict=True)]
    np.testing.assert_allclose(found[::500], slow)
    assert peak < 1.5 * found.nbytes  # the products by class are four times as many


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
