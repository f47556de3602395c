"""Retraining: jobs, cache, recipes against scikit-learn, the training run itself and a live loop."""

from __future__ import annotations

import copy
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import labels, make_tiny_model, sentences
from torch import nn
from warm import run_program

from forebear.errors import InputError, MismatchError, NonFiniteError
from forebear.evaluation.retraining.changes import within_budget
from forebear.evaluation.retraining.jobs import Job, Outcome, Retrainer, TrainingRows
from forebear.evaluation.retraining.recipe_top import epoch_batches
from forebear.evaluation.retraining.recipes import find_run, open_retrainer
from forebear.indexer.building.build import BuildOptions, build_index, retire_rows
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.recorded_start import Start
from forebear.retriever.retriever import Retriever

N = 48
TEXTS, LABELS = sentences(N, seed=4), labels(N, 2)
QUERIES = [sentences(9, seed=77)]
OPTIONS = TrainOptions(epochs=2, batch_size=8, learning_rate=2e-2, seed=3, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("retraining") / "run"
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, tiny_model("bert", 2, 5, 2.0), folder, OPTIONS)
    chosen = choose_model(str(folder)).checkpoints
    build_index(source, folder / "index", chosen, BuildOptions(dampings=("0.1x",)))
    return folder


@pytest.fixture(scope="module")
def retriever(run_folder):
    return Retriever(run_folder / "index")


def all_rows(retriever) -> np.ndarray:
    return retriever.index.live


@pytest.mark.slow
def test_full_retraining_on_all_rows_with_the_seed_of_the_run_gives_the_model_of_the_run(retriever, tmp_path):
    retrainer = open_retrainer(retriever, "full", QUERIES, tmp_path)
    same, other = retrainer.run([Job(all_rows(retriever), 3), Job(all_rows(retriever), 4)])
    truth = run_forward(retriever.classifier(), QUERIES).logits
    np.testing.assert_allclose(same.logits, truth, atol=1e-6)
    assert np.abs(other.logits - truth).max() > 1e-3


@pytest.mark.slow
def test_full_retraining_trains_on_edited_and_added_rows(retriever, tiny_model, tmp_path):
    rows = np.setdiff1d(all_rows(retriever), [5, 11])
    edited = " ".join(reversed(TEXTS[7].split()))  # as long, so in the batch that a new training puts it into
    assert edited != TEXTS[7]
    added = " ".join(reversed(TEXTS[np.random.default_rng(0).integers(N, size=1)[0]].split()))  # likewise
    job = Job(rows, 1, edits={7: (edited,)}, extra=[((added,), 0)])
    (found,) = open_retrainer(retriever, "full", QUERIES, tmp_path / "cache").run([job])
    texts = [(edited if i == 7 else TEXTS[i]) for i in rows] + [added]
    gold = [LABELS[i] for i in rows] + [0]
    source = rows_from_texts(texts, gold, label_names=("down", "up"))
    train(source, tiny_model("bert", 2, 5, 2.0), tmp_path / "run", replace(OPTIONS, seed=1))
    truth = run_forward(load_classifier(tmp_path / "run" / "checkpoints" / "epoch-2"), QUERIES).logits
    np.testing.assert_allclose(found.logits, truth, atol=1e-6)


@pytest.mark.parametrize(("n_classes", "l2"), [(2, 0.01), (3, 0.05)])
def test_head_retraining_is_the_optimum_of_scikit_learn(make_world, n_classes, l2, tmp_path):
    from sklearn.linear_model import LogisticRegression

    world = make_world("bert", n_classes, False, 2)
    rows = world.index.live[::2]
    retrainer = open_retrainer(world.retriever, "head", [world.queries], tmp_path, l2=l2)
    (found,) = retrainer.run([Job(rows, 0, edits={int(rows[1]): ("good film",)}, extra=[(("dull",), 1)])])
    texts = [world.texts[i] for i in rows] + ["dull"]
    texts[1] = "good film"
    gold = [world.labels[i] for i in rows] + [1]
    classifier = world.retriever.classifier()

    def features(some):
        f = run_forward(classifier, [some]).features.astype(np.float64)
        return np.hstack([f, np.ones((len(f), 1))])

    # one logit instead of two halves the penalty: w0 = -w1 = w / 2
    strength = (2 if n_classes == 2 else 1) / (l2 * len(rows) + l2)
    oracle = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
    oracle.fit(features(texts), gold)
    np.testing.assert_allclose(found.probabilities, oracle.predict_proba(features(world.queries)), atol=1e-5)


def test_head_retraining_without_a_class_keeps_its_probability_small(make_world, tmp_path):
    world = make_world("bert", 3, False, 2)
    rows = np.flatnonzero(np.array(world.labels) != 2)
    (found, whole) = open_retrainer(world.retriever, "head", [world.queries], tmp_path).run(
        [Job(rows, 0), Job(world.index.live, 0)]
    )
    assert found.probabilities.shape == (7, 3)
    assert (found.probabilities[:, 2] > 0).all()
    assert (found.probabilities[:, 2] < whole.probabilities[:, 2]).all()


def test_head_outcomes_do_not_depend_on_the_seed_and_are_trained_once(retriever, tmp_path):
    retrainer = open_retrainer(retriever, "head", QUERIES, tmp_path)
    first, second = retrainer.run([Job(all_rows(retriever)[1:], seed) for seed in (0, 1)])
    assert retrainer.n_trained == 1
    np.testing.assert_array_equal(first.logits, second.logits)


def live_top(start, k, texts, gold, options, lengths, weights=None):
    """Train the last k layers inside the whole model, the layers below computed anew at every step without dropout.

    Rows of label None take part in the forward pass, for the batch's shape, and not in the loss. With ``weights`` the
    mean loss of a batch is the weighted one.
    """
    model = copy.deepcopy(start.model)
    base = model.base_model
    fixed = [base.embeddings, *base.encoder.layer[: len(base.encoder.layer) - k]]
    for module in fixed:
        module.requires_grad_(False)
    free = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in free if "LayerNorm" in name or name.endswith("bias")]
    heavy = [p for name, p in free if not ("LayerNorm" in name or name.endswith("bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": heavy, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    )
    tokenizer = start.tokenizer
    n_steps = options.epochs * math.ceil(len(texts) / options.batch_size)
    warmup, step = int(n_steps * options.warmup_ratio), 0
    model.train()
    for module in fixed:
        module.eval()
    for epoch in range(options.epochs):
        for batch in epoch_batches(lengths, options.batch_size, options.seed, epoch):
            share = step / warmup if step < warmup else (n_steps - step) / (n_steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * share
            inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
            torch.manual_seed(int(np.random.SeedSequence([options.seed, step]).generate_state(1, np.uint64)[0]))
            own = [at for at, i in enumerate(batch) if gold[i] is not None]
            losses = nn.functional.cross_entropy(
                model(**inputs).logits[own], torch.tensor([gold[batch[at]] for at in own]), reduction="none"
            )
            factors = torch.tensor([1.0 if weights is None else weights[batch[at]] for at in own])
            loss = (factors * losses).sum() / factors.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in free], 1.0)
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        return model(**tokenizer(QUERIES[0], padding=True, return_tensors="pt")).logits.numpy()


@pytest.mark.parametrize(("k", "weights"), [(1, {}), (2, {}), (1, {4: 0.25, 9: 3.0, 44: 0.0})])
def test_top_layers_from_stored_states_train_as_in_the_whole_model(retriever, k, weights, tmp_path):
    rows = all_rows(retriever)[3:]
    retrainer = open_retrainer(retriever, f"top-{k}", QUERIES, tmp_path)
    out = np.array([3, 8, 20, 21, 40])
    job = Job(rows, 1, edits={5: ("good film",)}, extra=[(("dull plot near",), 1)], without=out, weights=weights)
    (found,) = retrainer.run([job])
    tokenizer = retriever.index.manifest.spec.tokenizer_sha256
    start = Start(find_run(retriever.index, None), retrainer.rows.label_names, tokenizer, "cpu").at(1)
    texts = ["good film" if i == 5 else TEXTS[i] for i in rows] + ["dull plot near"]
    gold = [None if i in out else LABELS[i] for i in rows] + [1]
    drawn = np.random.default_rng(0).integers(N, size=1)[0]
    grouped_by = [len(start.tokenizer(TEXTS[i])["input_ids"]) for i in [*rows, drawn]]
    factors = [weights.get(int(i), 1.0) for i in rows] + [1.0]
    truth = live_top(start, k, texts, gold, replace(OPTIONS, seed=1), grouped_by, factors)
    untrained = run_forward(start, QUERIES).logits
    assert np.abs(truth - untrained).max() > 0.01
    np.testing.assert_allclose(found.logits, truth, atol=2e-3 * np.abs(truth - untrained).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra"])
def test_top_layers_of_other_encoders_start_from_the_logits_of_the_whole_model(kind, tiny_model, tmp_path):
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, tiny_model(kind, 2, 5, 2.0), tmp_path / "run", replace(OPTIONS, epochs=1))
    build_index(source, tmp_path / "index", choose_model(str(tmp_path / "run")).checkpoints, BuildOptions())
    retriever = Retriever(tmp_path / "index")
    retrainer = open_retrainer(retriever, "top-1", QUERIES, tmp_path / "cache")  # compares the logits itself
    outcomes = retrainer.run([Job(all_rows(retriever)[i:], 0) for i in (0, 20)])
    assert np.abs(outcomes[0].logits - outcomes[1].logits).max() > 1e-4


def test_top_layers_are_deterministic_and_depend_on_the_seed(retriever, tmp_path):
    rows = all_rows(retriever)
    jobs = [Job(rows, 0), Job(rows, 1)]
    first = open_retrainer(retriever, "top-1", QUERIES, tmp_path / "a").run(jobs)
    second = open_retrainer(retriever, "top-1", QUERIES, tmp_path / "b").run(jobs[::-1])[::-1]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
    assert np.abs(first[0].logits - first[1].logits).max() > 1e-3


def test_batches_hold_every_row_once_and_rows_of_like_length_together():
    lengths = np.random.default_rng(0).integers(3, 60, 1000).tolist()
    batches = epoch_batches(lengths, 16, 0, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    spread = np.mean([np.ptp([lengths[i] for i in batch]) for batch in batches])
    assert spread < 8  # 53 or so by chance
    assert batches != epoch_batches(lengths, 16, 0, 1)
    assert batches != epoch_batches(lengths, 16, 1, 0)


class Counting:
    """A recipe that any test can follow: logits from sums over the rows trained on."""

    name, seeded, note, facts = "counting", True, "", {}

    def __init__(self, fail_at=None):
        self.trained, self.fail_at = [], fail_at

    def train(self, job):
        if self.fail_at is not None and len(self.trained) == self.fail_at:
            raise KeyboardInterrupt
        self.trained.append(job)
        total = float(job.rows.sum() + job.seed)
        return np.array([[total, -total], [1.0, len(job)]])


def counting(retriever, cache, **kwargs) -> Retrainer:
    return Retrainer(Counting(**kwargs), TrainingRows(retriever.index), [["a", "b"]], cache)


def some_jobs(retriever, n=6):
    return [Job(np.delete(all_rows(retriever), i), seed) for seed in (0, 1) for i in range(n // 2)]


def test_an_interrupted_queue_goes_on_where_it_was(retriever, tmp_path):
    jobs = some_jobs(retriever)
    truth = counting(retriever, tmp_path / "other").run(jobs)
    with pytest.raises(KeyboardInterrupt):
        counting(retriever, tmp_path / "cache", fail_at=4).run(jobs)
    again = counting(retriever, tmp_path / "cache")
    told = []
    found = again.run(jobs, lambda *values: told.append(values))
    assert again.n_trained == len(again.recipe.trained) == 2
    assert told == [("retraining", 4, 6), ("retraining", 5, 6), ("retraining", 6, 6)]
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_a_killed_process_repeats_no_finished_job(retriever, tmp_path):
    cache = tmp_path / "cache"
    code = f"""
import numpy as np, os, signal, sys
from forebear.evaluation.retraining.jobs import Job, Retrainer, TrainingRows
from forebear.indexer.index import Index
class Recipe:
    name, seeded, note, facts, n = "counting", True, "", {{}}, 0
    def train(self, job):
        self.n += 1
        if self.n == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        total = float(job.rows.sum() + job.seed)
        return np.array([[total, -total], [1.0, len(job)]])
index = Index.open({str(retriever.index.folder)!r})
jobs = [Job(np.delete(index.live, i), seed) for seed in (0, 1) for i in range(3)]
Retrainer(Recipe(), TrainingRows(index), [["a", "b"]], {str(cache)!r}).run(jobs)
"""
    done = run_program(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = counting(retriever, cache)
    found = again.run(some_jobs(retriever))
    assert len(again.recipe.trained) == 3
    truth = counting(retriever, tmp_path / "other").run(some_jobs(retriever))
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_processes_that_share_a_cache_share_the_jobs(retriever, tmp_path):
    """Two of them: every job is trained by one, and both get all outcomes; a job of one that dies goes to the other."""
    import threading

    jobs = some_jobs(retriever, 8)
    truth = counting(retriever, tmp_path / "other").run(jobs)
    both = [counting(retriever, tmp_path / "cache") for _ in range(2)]
    first, dies = threading.Event(), threading.Event()

    def slowly(job, recipe=both[0].recipe, train=both[0].recipe.train):
        if len(recipe.trained) == 1:
            first.set()  # has claimed its second job, and trains it until the other has no more to do
            assert dies.wait(30)
            raise KeyboardInterrupt
        return train(job)

    both[0].recipe.train = slowly
    ended = []

    def run_first():
        with pytest.raises(KeyboardInterrupt):
            both[0].run(jobs)
        ended.append(True)

    thread = threading.Thread(target=run_first)
    thread.start()
    assert first.wait(30)
    found = both[1].run(jobs, lambda _stage, done, total: dies.set() if done == total - 1 else None)
    thread.join(30)
    assert ended == [True]
    assert sum(r.n_trained for r in both) == len(jobs)
    assert not list(tmp_path.rglob("*.lock"))
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_the_lock_of_a_process_that_was_killed_after_its_outcome_is_removed(retriever, tmp_path):
    jobs = some_jobs(retriever, 2)
    counting(retriever, tmp_path).run(jobs)
    outcome = next(tmp_path.rglob("*.arrow"))
    outcome.with_suffix(".lock").write_text("process 1 on a machine\n", encoding="utf-8")
    again = counting(retriever, tmp_path)
    again.run(jobs)
    assert again.n_trained == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_a_lock_that_cannot_be_removed_keeps_nobody_from_outcomes(retriever, tmp_path):
    jobs = some_jobs(retriever, 2)
    counting(retriever, tmp_path).run(jobs)
    next(tmp_path.rglob("*.arrow")).with_suffix(".lock").mkdir()  # cannot be opened, as in a cache that is only read
    again = counting(retriever, tmp_path)
    assert len(again.run(jobs)) == len(jobs)
    assert again.n_trained == 0


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "another job's"])
def test_a_damaged_outcome_is_trained_again_with_a_warning(retriever, damage, tmp_path):
    jobs = some_jobs(retriever, 2)
    first = counting(retriever, tmp_path).run(jobs)
    path, other = sorted(tmp_path.rglob("*.arrow"))
    content = path.read_bytes()
    at = content.index(first[0].logits.tobytes()) if first[0].logits.tobytes() in content else None
    if at is None:
        at = content.index(first[1].logits.tobytes())
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "altered": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "empty": b"",
            "another job's": other.read_bytes(),
        }[damage]
    )
    again = counting(retriever, tmp_path)
    found = again.run(jobs)
    assert again.n_trained == 1
    assert [str(path) in line for line in again.warnings] == [True]
    for one, two in zip(found, first, strict=True):
        np.testing.assert_array_equal(one.logits, two.logits)
    assert counting(retriever, tmp_path)._read(again.digest(jobs[0])) is not None


def test_fewer_evaluation_rows_take_no_retraining(retriever, tmp_path):
    rows = all_rows(retriever)
    jobs = [Job(rows[1:], 0), Job(rows[2:], 0)]
    some = [QUERIES[0][i] for i in (3, 1, 2, 1)]
    more = open_retrainer(retriever, "head", QUERIES, tmp_path)
    wanted = [outcome.logits[[3, 1, 2, 1]] for outcome in more.run(jobs)]
    fewer = open_retrainer(retriever, "head", [some], tmp_path)
    for outcome, logits in zip(fewer.run(jobs), wanted, strict=True):
        np.testing.assert_array_equal(outcome.logits, logits)
    assert (fewer.n_trained, fewer.warnings) == (0, [])
    for other in (["another text", *some], QUERIES[0] + ["another text"]):
        unknown = open_retrainer(retriever, "head", [other], tmp_path)
        unknown.run(jobs[:1])
        assert unknown.n_trained == 1
    other_recipe = open_retrainer(retriever, "head", [some], tmp_path, l2=0.02)
    other_recipe.run(jobs[:1])
    assert other_recipe.n_trained == 1

    for listed in (tmp_path / "evaluations").glob("*/*.json"):
        listed.write_text("[")
    again = open_retrainer(retriever, "head", [some], tmp_path)
    again.run(jobs)
    assert again.n_trained == len(jobs)


def test_all_that_decides_an_outcome_changes_its_digest(retriever, run_folder, tmp_path):
    rows = all_rows(retriever)
    jobs = [
        Job(rows, 0),
        Job(rows[1:], 0),
        Job(rows, 1),
        Job(rows, 0, edits={1: ("a",)}),
        Job(rows, 0, edits={1: ("b",)}),
        Job(rows, 0, edits={2: ("a",)}),
        Job(rows, 0, extra=[(("a",), 0)]),
        Job(rows, 0, extra=[(("a",), 1)]),
        Job(rows, 0, extra=[(("a",), 1), (("a",), 1)]),
    ]
    retrainers = [
        open_retrainer(retriever, "head", QUERIES, tmp_path),
        open_retrainer(retriever, "head", QUERIES, tmp_path, l2=0.02),
        open_retrainer(retriever, "head", [QUERIES[0][1:]], tmp_path),
        open_retrainer(retriever, "full", QUERIES, tmp_path),
        open_retrainer(retriever, "top-1", QUERIES, tmp_path),
        open_retrainer(retriever, "top-2", QUERIES, tmp_path),
    ]
    digests = {r.digest(job) for r in retrainers for job in jobs}
    assert len(digests) == 6 * 9 - 3  # of the head, seeds 0 and 1 are one
    assert retrainers[3].digest(Job(rows.copy(), 0)) == retrainers[3].digest(jobs[0])
    left_out = Job(rows, 0, without=rows[:1])  # in place: another order than without its place
    assert retrainers[0].digest(left_out) == retrainers[0].digest(jobs[1])
    assert all(r.digest(left_out) not in digests for r in retrainers[3:])
    assert retrainers[3].digest(left_out) != retrainers[3].digest(Job(rows, 0, without=rows[1:2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "top-1", "head"])
def test_rows_left_out_weigh_nothing(retriever, name, tmp_path):
    rows, out = all_rows(retriever), np.array([0, 7, 30])
    job = Job(rows, 0, edits={9: ("good film",)}, extra=[(("dull",), 1)], without=out)
    retrainer = open_retrainer(retriever, name, QUERIES, tmp_path / "a")
    found, whole = retrainer.run([job, replace(job, without=None)])
    assert np.abs(found.logits - whole.logits).max() > 1e-5
    flipped = open_retrainer(retriever, name, QUERIES, tmp_path / "b")
    assert flipped.rows.labels is flipped.recipe._labels
    flipped.rows.labels[out] = 1 - flipped.rows.labels[out]
    again, other = flipped.run([job, replace(job, without=None)])
    np.testing.assert_array_equal(again.logits, found.logits)
    assert np.abs(other.logits - whole.logits).max() > 1e-5
    if name == "head":
        (fresh,) = retrainer.run([replace(job, rows=np.delete(rows, out), without=None)])
        np.testing.assert_allclose(found.logits, fresh.logits, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "top-1"])
def test_steps_without_a_row_are_taken(run_folder, name, tmp_path):
    start = json.loads((run_folder / "run.json").read_text())["base_model"]
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, start, tmp_path / "run", replace(OPTIONS, batch_size=1, epochs=1))
    build_index(source, tmp_path / "index", choose_model(str(tmp_path / "run")).checkpoints, BuildOptions())
    retriever = Retriever(tmp_path / "index")
    (found,) = open_retrainer(retriever, name, QUERIES, tmp_path / "cache").run(
        [Job(all_rows(retriever), 0, without=np.arange(5, N))]
    )
    assert np.isfinite(found.logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "top-1"])
def test_paired_retrainings_differ_less_by_chance_than_fresh_ones(tmp_path, name):
    """One of 48 rows hardly matters at a gentle rate: what remains is the noise of order and dropout."""
    start = make_tiny_model(tmp_path / "start", n_classes=2, seed=5)
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, start, tmp_path / "run", replace(OPTIONS, learning_rate=1e-3))
    build_index(source, tmp_path / "index", choose_model(str(tmp_path / "run")).checkpoints, BuildOptions())
    retriever = Retriever(tmp_path / "index")
    rows = all_rows(retriever)
    retrainer = open_retrainer(retriever, name, QUERIES, tmp_path / "cache")
    whole, *found = retrainer.run(
        [Job(rows, 0)]
        + [Job(rows, 0, without=rows[i : i + 1]) for i in range(4)]
        + [Job(np.delete(rows, i), 0) for i in range(4)]
        + [Job(rows, 0, edits={i: (TEXTS[i] + " near",)}) for i in range(4)]
        + [Job(rows, 0, extra=[((" ".join(["near"] * i),), 0)]) for i in range(1, 5)]
    )
    changes = np.array([outcome.logits - whole.logits for outcome in found]).reshape(4, 4, -1)
    paired, fresh, edited, added = np.sqrt((changes**2).mean(axis=(1, 2)))
    between = np.sqrt(((changes[3] - changes[3].mean(axis=0)) ** 2).mean())
    assert 0 < paired < fresh / 3
    assert 0 < edited < fresh / 50
    assert 0 < between < min(added, fresh) / 30


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(np.empty(0, np.int64), 7), r"retraining 1 of 1 \(seed 7\) would train on no rows"),
        (Job(np.array([3, 2]), 0), "ascending"),
        (Job(np.arange(9), 0, without=np.array([9])), "rows to leave out that are among the others"),
        (Job(np.arange(9), 0, without=np.array([3, 3])), "rows to leave out that are among the others"),
        (Job(np.arange(9), 0, edits={3: ("a",)}, without=np.array([3])), "row 3 is edited but not trained on"),
        (Job(np.array([2, 2]), 0), "each once"),
        (Job(np.array([0, N]), 0), f"from 0 to {N - 1}"),
        (Job(np.arange(9), 0, edits={9: ("a",)}), "row 9 is edited but not trained on"),
        (Job(np.arange(9), 0, edits={1: ("a", "b")}), r"has not 1 text\(s\)"),
        (Job(np.arange(9), 0, extra=[(("a",), 2)]), "class id outside of 0 to 1"),
    ],
)
def test_a_job_that_no_model_can_be_trained_on_is_refused_by_name(retriever, job, message, tmp_path):
    with pytest.raises(InputError, match=message):
        counting(retriever, tmp_path).run([job])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head", "top-1", "full"])
def test_rows_of_one_class_are_trained_on_and_said(retriever, name, tmp_path):
    retrainer = open_retrainer(retriever, name, QUERIES, tmp_path)
    up = np.flatnonzero(np.array(LABELS) == 1)
    found, whole = retrainer.run([Job(up, 0), Job(all_rows(retriever), 0)])
    assert (found.probabilities[:, 0] < 0.5).all()
    assert found.probabilities[:, 0].mean() < whole.probabilities[:, 0].mean()
    assert "1 of 2 retrainings had no row left of some class" in retrainer.warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "top-1"])
def test_another_dropout_or_tokenizer_is_another_retraining(tmp_path, name):
    """The start model's configuration changes, its weights do not; the run is made again at the same place."""
    start, run = make_tiny_model(tmp_path / "start", n_classes=2, seed=5), tmp_path / "run"
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    config = json.loads((start / "config.json").read_text())

    def retrained(again: bool):
        if again:
            train(source, start, run, OPTIONS, force=True)
            build_index(source, run / "index", choose_model(str(run)).checkpoints, BuildOptions(), force=True)
        retrainer = open_retrainer(Retriever(run / "index"), name, QUERIES, tmp_path / "cache")
        retrainer.run([Job(np.arange(N), 1)])
        return retrainer.n_trained

    assert retrained(True) == 1
    assert retrained(False) == 0
    (start / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5}))
    with pytest.raises(MismatchError, match="has other dropout than when the run started from it"):
        retrained(False)
    assert retrained(True) == 1
    rules = json.loads((start / "tokenizer.json").read_text())
    (start / "tokenizer.json").write_text(json.dumps(rules | {"normalizer": {"type": "Lowercase"}}))
    assert retrained(True) == 1


def test_top_layers_that_the_run_kept_frozen_stay_frozen(tmp_path):
    start, run = make_tiny_model(tmp_path / "start", n_classes=2, seed=5), tmp_path / "run"
    source = rows_from_texts(TEXTS, LABELS, label_names=("down", "up"))
    train(source, start, run, replace(OPTIONS, freeze_below=1))
    build_index(source, run / "index", choose_model(str(run)).checkpoints, BuildOptions())
    retriever = Retriever(run / "index")
    one, two = (open_retrainer(retriever, name, QUERIES, tmp_path / name) for name in ("top-1", "top-2"))
    assert "its last 1 of 2 layers" in two.recipe.note
    before = {name: p.clone() for name, p in two.recipe._start.at(0).model.named_parameters()}
    two.run([Job(np.arange(N), 0)])
    moved = {name for name, p in two.recipe._start._loaded[1].model.named_parameters() if not p.equal(before[name])}
    assert moved
    assert not [name for name in moved if ".layer.0." in name]
    assert one.recipe.facts["layers"] == 1


def test_nan_of_a_retrained_model_is_refused(retriever, tmp_path):
    retrainer = counting(retriever, tmp_path)
    retrainer.recipe.train = lambda _job: np.array([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(NonFiniteError, match="evaluation row 1"):
        retrainer.run(some_jobs(retriever))
    assert not list(tmp_path.rglob("*.arrow"))


def test_log_odds_stay_finite_where_the_probability_rounds_to_one():
    outcome = Outcome(np.array([[60.0, -60.0, -60.0], [0.5, 1.0, -2.0]], np.float32))
    classes = np.array([0, 1])
    p = outcome.probability(classes)
    assert p[0] == 1.0
    found = outcome.log_odds(classes)
    assert found[0] == pytest.approx(120 - math.log(2))
    assert found[1] == pytest.approx(math.log(p[1] / (1 - p[1])))


def test_a_budget_keeps_whole_units_and_counts_shared_jobs_once(retriever, tmp_path):
    retrainer = counting(retriever, tmp_path)
    rows = all_rows(retriever)
    base = Job(rows, 0)
    units = [[base, Job(rows[i:], 0), Job(rows[:-i], 0)] for i in range(1, 6)]
    kept, line = within_budget(retrainer, units, None, 0)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert line == "all 11 retrainings"
    kept, line = within_budget(retrainer, units, 8, 0)
    assert len(kept) == 3
    assert line.startswith("7 of 11 retrainings (budget=8): 3 of 5 comparisons")
    assert within_budget(retrainer, units, 8, 0)[0].tolist() == kept.tolist()
    assert len({tuple(within_budget(retrainer, units, 8, seed)[0]) for seed in range(8)}) > 1
    with pytest.raises(InputError, match="one comparison takes 3 or more"):
        within_budget(retrainer, units, 2, 0)


def test_recipes_refuse_what_is_not_there(retriever, bert_world, run_folder, tiny_model, tmp_path):
    with pytest.raises(InputError, match="expected full, top-K"):
        open_retrainer(retriever, "top-0", QUERIES, tmp_path)
    with pytest.raises(InputError, match="has 2 encoder layers"):
        open_retrainer(retriever, "top-3", QUERIES, tmp_path)
    with pytest.raises(InputError, match="is no training run"):
        open_retrainer(bert_world.retriever, "full", QUERIES, tmp_path)
    with pytest.raises(InputError, match="l2=0"):
        open_retrainer(retriever, "head", QUERIES, tmp_path, l2=0.0)
    with pytest.raises(MismatchError, match="trained on the labels"):
        open_retrainer(bert_world.retriever, "full", QUERIES, tmp_path, run=run_folder)


def test_retired_rows_take_no_part(run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder, tmp_path / "run")
    retire_rows(tmp_path / "run" / "index", [1, 4])
    retriever = Retriever(tmp_path / "run" / "index")
    rows = TrainingRows(retriever.index)
    assert rows.live.tolist() == [i for i in range(N) if i not in (1, 4)]
    retrainer = open_retrainer(retriever, "head", QUERIES, tmp_path / "cache")
    assert np.isfinite(retrainer.run([Job(rows.live, 0)])[0].logits).all()
