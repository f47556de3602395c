"""Weights of rows in retraining, against rows that stand twice, rows left out, scikit-learn and weights of classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import labels, sentences

from forebear.errors import InputError
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.retriever import Retriever

N = 40
TEXTS, LABELS = sentences(N, seed=4), labels(N, 2)
QUERIES = [sentences(9, seed=77)]
OPTIONS = TrainOptions(epochs=2, batch_size=8, learning_rate=2e-2, seed=3, precision="fp32", device="cpu")
HEADS = ("head", "proximal-head")
ALL = np.arange(N)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("weights") / "run"
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, tiny_model("bert", 2, 5, 2.0), folder, OPTIONS)
    build_index(source, folder / "index", choose_model(str(folder)).checkpoints, BuildOptions(dampings=("0.1x",)))
    return Retriever(folder / "index")


def logits_of(retriever, recipe, cache, *jobs):
    return [outcome.logits for outcome in open_retrainer(retriever, recipe, QUERIES, cache).run(jobs)]


@pytest.mark.parametrize("recipe", HEADS)
def test_a_row_of_weight_2_counts_like_the_row_twice(retriever, recipe, tmp_path):
    twice = [((TEXTS[row],), LABELS[row]) for row in (3, 8)]
    weighted, repeated, plain = logits_of(
        retriever, recipe, tmp_path, Job(ALL, 0, weights={3: 2.0, 8: 2.0}), Job(ALL, 0, extra=twice), Job(ALL, 0)
    )
    moved = np.abs(weighted - plain).max()
    assert moved > 1e-4
    np.testing.assert_allclose(weighted, repeated, atol=2e-3 * moved)


@pytest.mark.parametrize("recipe", [*HEADS, "top-1", "full"])
def test_a_row_of_weight_0_is_left_out_and_weights_of_1_change_nothing(retriever, recipe, tmp_path):
    out = [1, 5, 6, 30]
    nothing, without, mixed, ones, plain = logits_of(
        retriever,
        recipe,
        tmp_path,
        Job(ALL, 1, weights=dict.fromkeys(out, 0.0)),
        Job(ALL, 1, without=np.array(out)),
        Job(ALL, 1, without=np.array(out[:2]), weights=dict.fromkeys(out[2:], 0.0)),
        Job(ALL, 1, weights=dict.fromkeys(out, 1.0)),
        Job(ALL, 1),
    )
    moved = np.abs(without - plain).max()
    assert moved > 1e-4
    for found, wanted in ((nothing, without), (mixed, without), (ones, plain)):
        np.testing.assert_allclose(found, wanted, atol=2e-3 * moved)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_weighted_head_is_the_optimum_of_scikit_learn_with_sample_weights(make_world, n_classes, tmp_path):
    from sklearn.linear_model import LogisticRegression

    world, l2 = make_world("bert", n_classes, False, 2), 0.02
    rows = world.index.live
    weights = {int(row): float(w) for row, w in zip(rows[:6], (0.2, 0.0, 3.0, 0.2, 1.5, 0.7), strict=True)}
    retrainer = open_retrainer(world.retriever, "head", [world.queries], tmp_path, l2=l2)
    (found,) = retrainer.run([Job(rows, 0, weights=weights)])
    factors = np.array([weights.get(int(row), 1.0) for row in rows])

    def features(some):
        f = run_forward(world.retriever.classifier(), [some]).features.astype(np.float64)
        return np.hstack([f, np.ones((len(f), 1))])

    # one logit instead of two halves the penalty: w0 = -w1 = w / 2
    strength = (2 if n_classes == 2 else 1) / (l2 * factors.sum())
    oracle = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
    oracle.fit(features([world.texts[i] for i in rows]), [world.labels[i] for i in rows], sample_weight=factors)
    np.testing.assert_allclose(found.probabilities, oracle.predict_proba(features(world.queries)), atol=1e-5)


@pytest.mark.slow
def test_weights_by_class_train_as_the_weights_of_classes_do(retriever, tiny_model, tmp_path):
    """Torch's own weighted mean of a batch, in a run that knows nothing of rows' weights."""
    by_class = (1.0, 3.0)
    weights = {row: by_class[label] for row, label in enumerate(LABELS)}
    (found,) = logits_of(retriever, "full", tmp_path / "cache", Job(ALL, 1, weights=weights))
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, tiny_model("bert", 2, 5, 2.0), tmp_path / "run", replace(OPTIONS, seed=1, class_weights=by_class))
    truth = run_forward(load_classifier(tmp_path / "run" / "checkpoints" / "epoch-2"), QUERIES).logits
    np.testing.assert_allclose(found, truth, atol=1e-4)


def test_jobs_without_weights_keep_the_digests_that_they_had():
    """Outcomes of earlier versions are still found."""
    rows = np.arange(9)
    job = Job(rows, 4, edits={2: ("a",)}, extra=[(("b",), 1)], without=np.array([3]), relabels={5: 0})
    assert job.digest("d", seeded=True) == "db88e75f078d451c915c7c6cfccdfe61b7b9a8633ee4111182aacb26a50d52a1"
    assert job.digest("d", seeded=False) == "a81ff50ed2b2e118b58681f26ee8d2608b92990e2b85373ca704701c5c457173"
    assert Job(rows, 4).digest("d", seeded=True) == "51ddfbccaa2e8c6f55125d654285bbfb32a37d7dd98d46ecabee660d4c02d175"
    digests = {replace(job, weights=w).digest("d", seeded=True) for w in ({}, {5: 0.2}, {5: 0.3}, {6: 0.2})}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(ALL, 0, weights={N: 0.5}), rf"row {N} is weighted but not trained on\. Leave its weight out"),
        (Job(ALL, 0, without=np.array([2]), weights={2: 0.5}), "row 2 is weighted but not trained on"),
        (Job(ALL, 0, weights={2: -1.0}), r"row 2 has the weight -1\.0; expected 0 or more"),
        (Job(ALL, 0, weights={2: float("nan")}), "row 2 has the weight nan; expected 0 or more"),
        (Job(ALL, 0, weights=dict.fromkeys(range(N), 0.0)), "would train on no rows"),
    ],
)
def test_weights_that_no_model_can_be_trained_with_are_refused(retriever, tmp_path, job, message):
    with pytest.raises(InputError, match=message):
        open_retrainer(retriever, "head", QUERIES, tmp_path).run([job])
