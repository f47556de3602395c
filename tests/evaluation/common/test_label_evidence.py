"""Evidence about labels, against a direct forward pass, torch's L-BFGS, slow loops and a mixture that is known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from forebear import InputError, QuerySpec
from forebear.cli.main import run
from forebear.evaluation.audits.rows.suspects import opponents_of, suspects, suspects_report
from forebear.evaluation.audits.work_lists import suspects_list
from forebear.evaluation.common import neighbours
from forebear.evaluation.common.label_evidence import estimates
from forebear.evaluation.common.label_evidence.evidence import (
    VOTERS,
    chances_of,
    label_evidence,
    with_mean,
    written_labels,
)
from forebear.evaluation.common.label_evidence.planted import calibrated
from forebear.evaluation.common.neighbours import nearest_rows, nearest_up_to
from forebear.indexer.losses.cross_entropy import CrossEntropy


class Rows:
    """Features in memory that are taken as an index's are."""

    def __init__(self, features):
        self.features = features
        self.width = features.shape[1]

    def take(self, rows):
        return self.features[rows].astype(np.float32)


def stored(features, labels, logits, texts=None, loss=None):
    """What the evidence reads of an index of one checkpoint and two labels."""
    loss = loss or CrossEntropy()
    residuals, _ = loss.residual_and_loss(logits, labels)
    spec = SimpleNamespace(label_names=("no", "yes"))
    return SimpleNamespace(
        labels=labels, loss=loss, residuals=lambda *_: Rows(residuals), features=lambda *_: Rows(features),
        manifest=SimpleNamespace(spec=spec, checkpoints=(None,), without_texts=texts is None),
        text_lists=lambda rows: [[texts[row] for row in rows]],
    )  # fmt: skip


def ring(n, k):
    """The next k rows of each row, and cosines that fall."""
    return (np.arange(n)[:, None] + np.arange(1, k + 1)) % n, np.tile(np.linspace(0.9, 0.5, k), (n, 1))


@pytest.fixture(scope="module")
def blobs():
    """Three overlapping classes of 90 rows with widths of their own, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    features = rng.normal(size=(90, 4)) * [1, 5, 0.2, 1] + np.eye(3)[labels] @ rng.normal(size=(3, 4)) * 1.5
    return features, labels


def test_means_over_checkpoints_are_those_of_a_direct_forward_pass(bert_world):
    index = bert_world.index
    near, cosines = nearest_rows(bert_world.retriever.models, index.live, VOTERS)
    found = label_evidence(index, index.live, near, cosines).measures
    chances, margins = [], []
    for path in bert_world.models:
        network = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            logits = [network(**tokenizer(text, return_tensors="pt")).logits[0].double() for text in bert_world.texts]
        own = [float(row.softmax(0)[label]) for row, label in zip(logits, bert_world.labels, strict=True)]
        chances.append(own)
        margins.append([float(row[1 - k] - row[k]) for row, k in zip(logits, bert_world.labels, strict=True)])
    assert len(chances) > 1
    np.testing.assert_allclose(found["mean probability"], 1 - np.mean(chances, axis=0), atol=1e-5)
    np.testing.assert_allclose(found["margin"], np.mean(margins, axis=0), atol=1e-4)


def test_a_refit_is_the_penalised_minimum_over_the_other_folds(blobs):
    features, labels = blobs
    found = estimates.out_of_fold(Rows(features), np.arange(90), labels, 3, seed=4)
    folds = estimates.folds_of(labels, np.random.default_rng(4))
    kept = features.astype(np.float32).astype(np.float64)
    for fold in (0, 3):
        others = folds != fold
        scaled = torch.from_numpy((kept - kept[others].mean(axis=0)) / kept[others].std(axis=0))
        weights, bias = (torch.zeros(shape, dtype=torch.double, requires_grad=True) for shape in ((3, 4), (3,)))
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def loss(weights=weights, bias=bias, scaled=scaled, others=others, optimizer=optimizer):
            optimizer.zero_grad()
            logits = scaled[others] @ weights.T + bias
            mean = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[others]))
            total = mean + estimates.PENALTY / 2 * (weights**2).sum()
            total.backward()
            return total

        optimizer.step(loss)
        truth = (scaled[~others] @ weights.T + bias).softmax(1).detach().numpy()
        np.testing.assert_allclose(found[~others], truth, atol=1e-3)


def test_a_rows_own_label_does_not_move_its_refit(blobs):
    """The row is moved far away: heads of other folds change, its own does not but for the row itself."""
    features, labels = blobs
    folds = estimates.folds_of(labels, np.random.default_rng(0))
    base = estimates.out_of_fold(Rows(features), np.arange(90), labels, 3)
    moved = features.copy()
    moved[7] += 50
    found = estimates.out_of_fold(Rows(moved), np.arange(90), labels, 3)
    mates = (folds == folds[7]) & (np.arange(90) != 7)
    np.testing.assert_array_equal(found[mates], base[mates])
    assert np.abs(found[folds != folds[7]] - base[folds != folds[7]]).max() > 0.01


def test_folds_share_out_each_label_and_rare_labels_are_no_error():
    labels = np.array([0] * 23 + [1] * 11 + [2])
    folds = estimates.folds_of(labels, np.random.default_rng(1))
    for label in (0, 1):
        counts = np.bincount(folds[labels == label], minlength=estimates.FOLDS)
        assert counts.max() - counts.min() <= 1
    features = np.random.default_rng(2).normal(size=(35, 3))
    found = estimates.out_of_fold(Rows(features), np.arange(35), labels, 4)
    assert found[34, 2] == found[0, 3] == estimates.FLOOR
    assert np.isfinite(np.log(found)).all()
    alone = estimates.out_of_fold(Rows(features[:2]), np.arange(2), np.array([0, 1]), 2)
    np.testing.assert_array_equal(alone, [[estimates.FLOOR, 1], [1, estimates.FLOOR]])


def test_many_rows_are_fitted_to_a_sample_of_them(blobs, monkeypatch):
    features, labels = blobs
    whole = estimates.out_of_fold(Rows(features), np.arange(90), labels, 3)
    monkeypatch.setattr(estimates, "MOST_FITTED", 40)
    sampled = estimates.out_of_fold(Rows(features), np.arange(90), labels, 3)
    assert 0.001 < np.abs(sampled - whole).mean() < 0.2


def test_votes_means_and_margins_are_those_of_slow_loops():
    rng = np.random.default_rng(5)
    labels, trust, cosines = rng.integers(0, 3, (6, 4)), rng.random((6, 4)), rng.uniform(-0.5, 1, (6, 4))
    found = estimates.votes(labels, trust, cosines, 3)
    some = rng.dirichlet([1, 1, 1], 6)
    mean, own = estimates.geometric_mean([found, some]), rng.integers(0, 3, 6)
    margins = estimates.margin(some, own)
    for i in range(6):
        cast = [0.5 / 3] * 3
        for label, weight, cosine in zip(labels[i], trust[i], cosines[i], strict=True):
            cast[label] += weight * max(cosine, 0)
        np.testing.assert_allclose(found[i], [one / sum(cast) for one in cast])
        roots = [math.sqrt(found[i, k] * some[i, k]) for k in range(3)]
        np.testing.assert_allclose(mean[i], [root / sum(roots) for root in roots])
        others = [math.log(some[i, k]) for k in range(3) if k != own[i]]
        assert margins[i] == pytest.approx(max(others) - math.log(some[i, own[i]]))


def test_written_labels_and_chances_are_those_of_slow_loops():
    rng = np.random.default_rng(6)
    labels = np.r_[[0, 1, 2], rng.integers(0, 3, 57)]
    estimate = rng.dirichlet([1, 1, 1], 60) * 0.8 + np.eye(3)[labels] * 0.2
    least = [np.mean([estimate[i, k] for i in range(60) if labels[i] == k]) for k in range(3)]
    counts, n_counted, n_other = np.ones((3, 3)), 0, 0
    for i in range(60):
        sure = [k for k in range(3) if estimate[i, k] >= least[k]]
        if sure:
            best = max(sure, key=lambda k: estimate[i, k])
            counts[best, labels[i]] += 1
            n_counted, n_other = n_counted + 1, n_other + (best != labels[i])
    written, share = written_labels(estimate, labels)
    assert 0 < n_other < n_counted < 60
    np.testing.assert_allclose(written, counts / counts.sum(axis=1, keepdims=True))
    assert share == pytest.approx(n_other / n_counted)
    found = chances_of(estimate, labels, written)
    for i in range(60):
        terms = [estimate[i, k] * written[k, labels[i]] for k in range(3)]
        np.testing.assert_allclose(found[i], [term / sum(terms) for term in terms])


def test_equal_probabilities_reach_their_mean():
    """The mean of three times 0.1 is above 0.1 in floating point."""
    written, share = written_labels(np.full((3, 2), 0.1), np.zeros(3, int))
    np.testing.assert_allclose(written, [[4 / 5, 1 / 5], [1 / 2, 1 / 2]])
    assert share == pytest.approx(0.5 / 3)


def test_shifted_probabilities_have_the_mean_and_the_order():
    chances = np.array([0.9, 0.2, 0.01, 1e-9, 0.5])
    found = with_mean(np.log(chances / (1 - chances)), 0.15)
    assert found.mean() == pytest.approx(0.15)
    assert np.argsort(found).tolist() == np.argsort(chances).tolist()
    odds = found / (1 - found) * (1 - chances) / chances
    np.testing.assert_allclose(odds, odds[0], rtol=1e-6)
    for mean in (1e-9, 1 - 1e-9):
        assert with_mean(np.array([-30.0, 0.0, 30.0]), mean).mean() == pytest.approx(mean, rel=1e-4)


def test_measured_probabilities_are_those_of_a_known_mixture():
    """Logits of right labels around -2, of wrong and of planted ones around 1: both normal with a deviation of 1."""
    rng = np.random.default_rng(7)
    wrong, planted = np.arange(6000) < 900, np.arange(6000) >= 5500
    logits = rng.normal(np.where(wrong | planted, 1.0, -2.0), 1.0)
    estimated = with_mean(logits, 1400 / 6000)
    found = calibrated(estimated, planted)
    assert (found[planted] == 1).all()
    of_wrong, of_right = (stats.norm.pdf(logits, mean) for mean in (1, -2))
    truth = 0.164 * of_wrong / (0.164 * of_wrong + 0.836 * of_right)
    error, before = (np.abs(some - truth)[~planted].mean() for some in (found, estimated))
    assert error < min(0.03, before / 3)
    with pytest.raises(InputError, match="12 of 6000 rows are planted; expected at least 20"):
        calibrated(np.full(6000, 0.5), np.arange(6000) < 12)


def test_planted_rows_are_known_and_not_listed(bert_world, tmp_path, capsys):
    args = ["audit", "mislabelled", "--index", str(bert_world.index.folder), "--method", "gd", "--top", "60", "--quiet"]
    (tmp_path / "planted.txt").write_text("\n".join(map(str, range(24))))
    assert run([*args, "--planted", str(tmp_path / "planted.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["probability"][:24] == [1.0] * 24
    assert sorted(result["listed"]) == list(range(24, 60))
    (tmp_path / "planted.txt").write_text("3\n")
    assert run([*args, "--planted", str(tmp_path / "planted.txt")]) == 2
    assert "1 of 60 rows are planted; expected at least 20" in capsys.readouterr().err


@pytest.mark.parametrize("n_yes", [30, 0])
def test_the_order_stays_where_no_label_seems_wrong(n_yes):
    """Two groups of rows far apart, or rows of one label: the row that the checkpoint believes least stands first."""
    rng = np.random.default_rng(8)
    labels = np.repeat([0, 1], [60 - n_yes, n_yes])
    sure = rng.permutation(np.linspace(0.5, 6, 60))
    logits = np.stack([-sure, sure], axis=1) * np.where(labels, 1, -1)[:, None]
    index = stored(rng.normal(size=(60, 3)) + 9 * labels[:, None], labels, logits)
    found = label_evidence(index, np.arange(60), np.arange(60)[:, None], np.zeros((60, 1)))
    assert found.estimated.mean() == pytest.approx(0.5 / 60)
    assert np.argmax(found.suspicion) == np.argmax(found.estimated) == np.argmin(sure)
    assert stats.spearmanr(found.suspicion, -sure).statistic > 0.9
    if not n_yes:
        assert np.argsort(-found.suspicion).tolist() == np.argsort(sure).tolist()


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_checkpoint_counts_once_its_own_head_is_trained(is_trained):
    """Two checkpoints of equal features: the first one's head knows nothing, or as much as heads refitted on them."""
    rng = np.random.default_rng(12)
    labels = np.arange(80) % 2
    features = rng.normal(size=(80, 3)) + 1.5 * labels[:, None]
    known = 0.5 * rng.normal(size=80) + (2 * labels - 1)
    logits = [
        np.stack([-x, x], axis=1) for x in (known if is_trained else rng.normal(size=80), known + rng.normal(size=80))
    ]
    first, last = (stored(features, labels, one) for one in logits)
    both = stored(features, labels, logits[1])
    both.manifest.checkpoints = (None, None)
    both.residuals = lambda number: (first, last)[number].residuals()
    near, cosines = ring(80, 5)
    refitted = estimates.out_of_fold(Rows(features), np.arange(80), labels, 2)
    voted = estimates.votes(labels[near], refitted[near, labels[near]], cosines, 2)
    written = written_labels(refitted, labels)[0]
    counted = logits if is_trained else logits[1:]
    trained = np.mean([torch.from_numpy(one).log_softmax(1).numpy() for one in counted], axis=0)
    joint = trained / 2 + np.log(refitted) / 4 + np.log(voted) / 4 + np.log(written[:, labels].T)
    expected = joint[np.arange(80), 1 - labels] - joint[np.arange(80), labels]
    found = label_evidence(both, np.arange(80), near, cosines)
    np.testing.assert_allclose(found.suspicion, expected, atol=1e-4)


def test_checkpoint_probabilities_are_the_softmax_whatever_the_loss():
    rng = np.random.default_rng(9)
    logits, labels = rng.normal(size=(8, 2)) * 2, np.arange(8) % 2
    truth = torch.from_numpy(logits).softmax(1).numpy()
    for loss in (CrossEntropy(), CrossEntropy(class_weights=(0.5, 3.0), label_smoothing=0.2)):
        found = estimates.checkpoint_probabilities(stored(logits, labels, logits, loss=loss), np.arange(8), 0)
        np.testing.assert_allclose(found, truth, atol=1e-6)


def test_equal_texts_share_a_fold_and_have_no_vote():
    rng = np.random.default_rng(10)
    labels, features = np.arange(40) % 2, rng.normal(size=(40, 3))
    features[1::4] = features[::4]
    texts = [str(i) for i in range(40)]
    texts[1::4] = texts[::4]
    index, rows = stored(features, labels, rng.normal(size=(40, 2)), texts), np.arange(40)
    equal = estimates.first_equal(index, rows)
    assert equal.tolist() == [texts.index(text) for text in texts]
    index.manifest.without_texts = True
    assert estimates.first_equal(index, rows).tolist() == equal.tolist()
    folds = estimates.folds_of(labels, np.random.default_rng(0), equal)
    assert (folds[1::4] == folds[::4]).all()
    assert len(np.unique(folds)) == estimates.FOLDS
    near, cosines = ring(40, 5)
    found = label_evidence(index, rows, near, cosines).measures["votes"]
    cosines[::4, 0] = 0  # the next row has the same text
    np.testing.assert_allclose(label_evidence(index, rows, near, cosines).measures["votes"], found)


def test_fewer_rows_vote_where_so_many_are_not_found(bert_world, monkeypatch):
    def at_most_twelve(models, rows, k):
        if k > 12:
            raise InputError(f"--neighbours {k}: FAISS visits fewer rows than that for some. Give fewer.")
        return nearest_rows(models, rows, k)

    models, rows = bert_world.retriever.models, bert_world.index.live
    wanted = nearest_rows(models, rows, 10)[0]
    assert nearest_up_to(models, rows, 10, VOTERS)[0].shape == (60, VOTERS)
    monkeypatch.setattr(neighbours, "nearest_rows", at_most_twelve)
    np.testing.assert_array_equal(nearest_up_to(models, rows, 10, VOTERS)[0], wanted)
    with pytest.raises(InputError, match="n_neighbours=13"):
        nearest_up_to(models, rows, 13, VOTERS)


def test_heads_of_too_many_labels_are_not_refitted_and_the_page_says_so(bert_world, monkeypatch):
    retriever, spec = bert_world.retriever, QuerySpec(methods=("gd",))
    width = retriever.index.features().width
    assert estimates.can_refit(60, width, 2)
    assert not estimates.can_refit(60, width, estimates.MOST_WORK)
    monkeypatch.setattr(estimates, "MOST_WORK", 60 * width * 2 - 1)
    monkeypatch.setattr("forebear.evaluation.common.label_evidence.evidence.out_of_fold", None)
    found = suspects(retriever, spec)
    assert "out-of-fold" not in found.names
    assert {"mean probability", "votes"} < set(found.names)
    assert np.isfinite(found.suspicion).all()
    assert "Left out: refitted heads" in suspects_report(found, retriever, spec, 5, "here")[0].tables[0].note


def test_a_work_list_has_the_probabilities_that_were_measured_alone(bert_world):
    retriever, spec = bert_world.retriever, QuerySpec(methods=("gd",))
    for planted in (None, np.arange(60) < 24):
        found = suspects(retriever, spec, planted=planted)
        first = found.order[:5]
        listed = suspects_list(found, retriever.index, opponents_of(retriever, spec, found.rows[first])[0])
        chances = found.probability[first].tolist()
        page, result = suspects_report(found, retriever, spec, 5, "here")
        if planted is None:
            assert [one.probability for one in listed] == [None] * 5
            assert [one.evidence["estimated probability"] for one in listed] == chances
            assert "estimated probability" in page.tables[0].columns
            assert "probability" not in {*page.tables[0].columns, *result}
        else:
            assert [one.probability for one in listed] == chances
            assert "estimated probability" not in {*listed.figures, *page.tables[0].columns}
