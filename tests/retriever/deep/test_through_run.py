"""``magic`` on tiny runs: retrainings without a row, both ends of the ranking, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import labels, sentences, write_jsonl

from forebear import evaluations
from forebear.cli.main import run as forebear
from forebear.errors import InputError
from forebear.evaluation.retraining.effects.fit import fit
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.building.build import BuildOptions, build_index, retire_rows
from forebear.indexer.index import Index
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.run_folder import clear_out
from forebear.retriever.effects.measured import KEPT_EFFECTS
from forebear.retriever.effects.smoothness import KEPT_SMOOTHNESS, read_smoothness
from forebear.retriever.retriever import Retriever

N = 48
TEXTS, LABELS = sentences(N, seed=4), labels(N, 2)
NAMES = ("down", "up")
QUERIES = sentences(3, seed=77)
OPTIONS = TrainOptions(epochs=3, batch_size=24, learning_rate=2e-3, seed=3, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model):
    """A run, with the index of its last checkpoint in the folder ``index``."""
    folder = tmp_path_factory.mktemp("magic") / "run"
    source = rows_from_texts(TEXTS, LABELS, label_names=NAMES)
    train(source, tiny_model("bert", 2, 5, 2.0), folder, OPTIONS)
    build_index(source, folder / "index", choose_model(str(folder)).checkpoints, BuildOptions())
    return folder


@pytest.fixture(scope="module")
def retriever(run_folder):
    return Retriever(run_folder / "index")


@pytest.fixture(scope="module")
def scores(retriever):
    return retriever.scores(QUERIES, "magic")


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the run and its index, to be changed."""
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.mark.slow
def test_a_score_is_what_the_loss_rises_by_where_the_run_is_repeated_without_the_row(retriever, scores, tmp_path):
    strongest = np.abs(scores).max(axis=0).argsort()[-4:]
    rows, seed = retriever.index.live, OPTIONS.seed
    jobs = [Job(rows, seed), *(Job(rows, seed, without=np.array([row])) for row in strongest)]
    outcomes = open_retrainer(retriever, "full", [QUERIES], tmp_path).run(jobs)
    losses = np.array([-np.log(outcome.probability(outcomes[0].predictions)) for outcome in outcomes])
    rises = (losses[1:] - losses[0]).T
    found = scores[:, strongest]
    assert np.abs(rises).min() > 1e-3
    assert np.corrcoef(found.ravel(), rises.ravel())[0, 1] > 0.99  # to first order: the size of a step has curvature
    np.testing.assert_allclose(found, rises, rtol=0.3)


@pytest.mark.slow
def test_effects_of_sets_come_true_in_retrainings_of_the_seed_of_the_run(retriever, scores, tmp_path):
    how = evaluations.Retraining(recipe="full", n_seeds=1, cache=tmp_path)
    found = evaluations.effects(
        retriever, QUERIES, methods="magic", remove=(1, 2), n_sets=6, n_queries=0, how=how, seed=OPTIONS.seed
    )
    pairs = found.numbers.pairs["magic"]
    single = (pairs.sizes == 1) & (pairs.kinds == "proponents")
    highest = -np.sort(-scores, axis=1)[:, :3]  # three sets of one row a test row
    np.testing.assert_allclose(pairs.predicted[single, 0].reshape(3, 3), highest)
    fitted = fit(pairs.predicted[:, 0], pairs.retrained[:, 0], pairs.queries, 0)
    assert 0.8 < fitted.slope < 1.2
    assert fitted.correlation > 0.95


def test_an_index_keeps_how_true_its_effects_are_and_answers_say_it(copied, capsys):
    retriever = Retriever(copied / "index")
    evaluations.effects(retriever, QUERIES[:1], methods=["magic", "if"], remove=(1, 2), n_sets=1, keep=True)
    asked = {one.method: (one.scope, one.curvature, one.damping) for one in KEPT_EFFECTS.read(copied / "index")}
    assert asked["magic"] == ("run", "none", None)
    assert asked["if"][:2] == ("head", "exact")
    table = retriever.retrieve(QUERIES[:1], methods=["magic"], top=2)
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]["magic"]
    assert facts["effect_measured"].startswith("Effects of magic through the run: slope ")
    assert facts["effect_measured"].endswith("for proximal-head without 1 to 2 rows.")
    assert forebear(["info", str(copied / "index")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "magic through the run, target predicted: slope " in shown
    assert "if at head (exact, damping " in shown


def test_answers_say_the_metasmoothness_that_is_kept_of_the_run(copied, tmp_path, capsys, monkeypatch):
    source = rows_from_texts(TEXTS, LABELS, label_names=NAMES)
    monkeypatch.chdir(tmp_path)  # the index remembers the run by a path that is relative to itself
    build_index(source, tmp_path / "index", choose_model("run").checkpoints, BuildOptions())
    asked = ["--index", str(tmp_path / "index")]

    def answer(*more: str) -> str:
        ask = ["retrieve", *asked, "--text", QUERIES[0], "--method", "magic", "--out", str(tmp_path / "answer.parquet")]
        assert forebear([*ask, *more, "--force"]) == 0
        return " ".join("".join(capsys.readouterr()).split())

    assert "reaches in this run: forebear evaluate metasmoothness --keep." in answer()
    measure = ["evaluate", "metasmoothness", *asked, "--share", "0.1", "--directions", "2"]
    assert not (copied / "metasmoothness.json").exists()
    assert forebear([*measure, "--json", "--keep"]) == 0
    values = json.loads(capsys.readouterr().out)["metasmoothness"]
    (kept,) = KEPT_SMOOTHNESS.read(copied)
    assert list(kept.values) == values
    draws = f"2 random draws, {min(values):.3f} to {max(values):.3f}"
    said = f"{sum(values) / 2:.3f} on the way to a training without 5 of {N} rows ({draws})"
    capsys.readouterr()
    assert f"reaches in this run: metasmoothness {said}." in answer()
    facts = json.loads(pq.read_schema(tmp_path / "answer.parquet").metadata[b"forebear"])
    assert facts["methods"]["magic"]["metasmoothness"] == said

    copied = copied.rename(tmp_path / "moved")
    (tmp_path / "answer.parquet").unlink()
    assert f"reaches in this run: metasmoothness {said}." in answer("--model", str(copied))
    facts = json.loads(pq.read_schema(tmp_path / "answer.parquet").metadata[b"forebear"])
    assert facts["methods"]["magic"]["metasmoothness"] == said
    assert "magic" in Retriever(tmp_path / "index", model=str(copied)).available_methods()

    (copied / "run.json").write_text((copied / "run.json").read_text() + "\n")  # another record: another run
    assert read_smoothness(copied) is None
    clear_out(copied)
    assert not (copied / "metasmoothness.json").exists()


def probabilities(retriever) -> np.ndarray:
    """Probability of the predicted class of each query."""
    return run_forward(retriever.classifier(), [QUERIES]).probabilities.max(axis=1)


def test_both_ends_of_the_ranking_are_those_of_the_scores_of_all_rows(retriever, scores):
    table = retriever.retrieve(QUERIES, methods="magic", top=4)
    for side, sign in (("proponent", -1), ("opponent", 1)):
        part = table.filter(np.array(table["side"].to_pylist()) == side)
        rows = np.array(part["row"]).reshape(len(QUERIES), 4)
        np.testing.assert_array_equal(rows, np.argsort(sign * scores, axis=1, kind="stable")[:, :4])
        np.testing.assert_array_equal(np.array(part["score"]).reshape(rows.shape), np.take_along_axis(scores, rows, 1))
    assert all(table["exact"].to_pylist())
    np.testing.assert_array_equal(table["effect"], table["score"])  # nats already
    losses = -np.log(probabilities(retriever))
    changes = np.exp(-(losses[np.array(table["query"])] + np.array(table["effect"]))) - np.exp(-losses)[table["query"]]
    np.testing.assert_allclose(table["effect_probability"], changes, rtol=1e-5)
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]["magic"]
    assert facts["recall"] == 1.0
    assert facts["unit"] == "nats, to first order, if the row is left out of the run"


def test_scores_sum_to_0_because_a_batch_is_the_same_where_all_its_rows_weigh_more(scores):
    assert np.abs(scores.sum(axis=1)).max() < 1e-5 * np.abs(scores).max()


def test_questions_do_not_depend_on_those_beside_them(retriever, scores, monkeypatch):
    monkeypatch.setattr("forebear.retriever.deep.through_run.ADJOINT_BYTES", 1)  # one question at a time
    np.testing.assert_array_equal(retriever.scores(QUERIES, "magic"), scores)


def test_an_aggregate_has_the_sums_of_the_scores(retriever, scores):
    table = retriever.retrieve(QUERIES, methods="magic", top=N, aggregate=True)
    proponents = table.filter(np.array(table["side"].to_pylist()) == "proponent")
    sums = scores.sum(axis=0)[np.array(proponents["row"])]
    np.testing.assert_allclose(np.array(proponents["score"]), sums, rtol=1e-3, atol=1e-5 * np.abs(scores).max())


def test_a_run_is_repeated_with_its_own_number_of_threads(run_folder, scores):
    torch.set_num_threads(2)
    try:
        found = Retriever(run_folder / "index").scores(QUERIES[:1], "magic")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(found, scores[:1], rtol=1e-4)


def test_retired_rows_stay_in_the_run_and_are_not_ranked(copied, scores):
    retire_rows(copied / "index", [2, 5])
    found = Retriever(copied / "index").scores(QUERIES, "magic")
    np.testing.assert_array_equal(found, np.delete(scores, [2, 5], axis=1))


def test_a_checkpoint_on_the_way_is_explained_by_the_steps_before_it(run_folder, tiny_model, tmp_path, retriever):
    source = rows_from_texts(TEXTS, LABELS, label_names=NAMES)
    first = choose_model(str(run_folder), ["epoch-1"]).checkpoints
    build_index(source, tmp_path / "index", first, BuildOptions())
    early = Retriever(tmp_path / "index")
    found = early.scores(QUERIES, "magic", target="down")
    later = retriever.scores(QUERIES, "magic", target="down")
    assert np.abs(found - later).max() > 0.1 * np.abs(later).max()
    trajectory = early.models.kept.find("trajectory")
    assert sorted(np.concatenate(trajectory.batches)) == list(range(N))  # the batches of one epoch


def test_layers_that_were_frozen_stay_so(tiny_model, tmp_path):
    source = rows_from_texts(TEXTS, LABELS, label_names=NAMES)
    options = TrainOptions(**{**vars(OPTIONS), "freeze_below": 1, "class_weights": "balanced", "label_smoothing": 0.1})
    train(source, tiny_model("bert", 2, 5, 2.0), tmp_path / "run", options)
    chosen = choose_model(str(tmp_path / "run"))
    build_index(
        source, tmp_path / "index", chosen.checkpoints, BuildOptions(class_weights=(1.0, 1.0), label_smoothing=0.1)
    )
    retriever = Retriever(tmp_path / "index")
    assert np.abs(retriever.scores(QUERIES[:1], "magic")).max() > 0
    names = {name for name, p in retriever.models.kept.find("trajectory").classifier.model.named_parameters()
             if p.requires_grad}  # fmt: skip
    assert not any("embeddings" in name or "layer.0" in name for name in names)


def refusal(folder, capsys, *more) -> str:
    """The one line by which the command refuses ``magic``."""
    arguments = ["retrieve", "--index", str(folder), "--text", "a good film", "--method", "magic", *more, "--quiet"]
    assert forebear(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_model_without_a_run_is_refused(bert_world, capsys):
    assert "lies in no run of forebear train (no run.json)" in refusal(bert_world.index.folder, capsys)
    with pytest.raises(InputError, match="Give the run's folder by model="):
        bert_world.retriever.scores(QUERIES, "magic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": True}, "trained by a script of its own"),
        ({"random_numbers": None}, "trained by an older forebear"),
        ({"precision": "bf16"}, "trained in bf16, whose rounding has no derivative"),
        ({"problem_type": "regression"}, "trained on rows of regression"),
        ({"computed_on": {"device": "NVIDIA H100"}}, "trained on NVIDIA H100; here is cpu"),
        ({"start_sha256": "0" * 64}, "is not the model that the run started from"),
        ({"learning_rate": 1e-3}, "repeated has other weights at epoch-1, after 2 steps"),
    ],
)
def test_a_run_that_cannot_be_repeated_is_refused(copied, settings, message, capsys):
    content = json.loads((copied / "run.json").read_text())
    content["settings"] |= settings
    (copied / "run.json").write_text(json.dumps(content))
    assert message in refusal(copied / "index", capsys, "--model", str(copied))


def test_other_libraries_are_named_where_the_weights_differ(copied, capsys):
    content = json.loads((copied / "run.json").read_text())
    content["settings"]["learning_rate"] = 1e-3
    content["libraries"]["torch"] = "1.0"
    (copied / "run.json").write_text(json.dumps(content))
    assert f"(torch {torch.__version__}, then 1.0)" in refusal(copied / "index", capsys, "--model", str(copied))


def test_rows_that_are_not_those_of_the_run_are_refused(run_folder, copied, tmp_path, capsys):
    changed = rows_from_texts([*TEXTS[:-1], "another text"], LABELS, label_names=NAMES)
    build_index(changed, tmp_path / "other", choose_model(str(run_folder)).checkpoints, BuildOptions())
    assert "holds other rows" in refusal(tmp_path / "other", capsys)
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(2, seed=9), label=["up", "down"])
    assert forebear(["index", "--append", "--train", str(more), "--out", str(copied / "index"), "--quiet"]) == 0
    assert Index.open(copied / "index").manifest.n_rows == N + 2
    capsys.readouterr()  # what is said of the append
    assert "2 rows that were appended after the run" in refusal(copied / "index", capsys)


@pytest.mark.parametrize("more", [("--exact", "none"), ("--certify",)])
def test_scores_that_nothing_stored_gives_are_refused(run_folder, more, capsys):
    assert "its scores come from the model alone" in refusal(run_folder / "index", capsys, *more)
