"""Flip sets against refits of the head by scipy, which share no code with the package, and a search of all sets."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from tiny import labels, sentences

import forebear
from forebear.cli.main import run
from forebear.cli.screen.lists import for_screen
from forebear.errors import InputError, MissingStoreError
from forebear.evaluation.flips.head import HeadProblem
from forebear.evaluation.flips.report import flips_report
from forebear.evaluation.flips.retrained import Ranked, Retrained, retrain
from forebear.evaluation.flips.search import FlipSearch
from forebear.evaluation.reports.report import Cell, Table
from forebear.evaluation.retraining.jobs import Job, Outcome
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.effects.refits import HeadRefits


class Oracle:
    """The head refitted by scipy over all of its weights, from features and logits alone."""

    def __init__(self, world) -> None:
        index, classifier = world.index, world.retriever.classifier()
        self.live = index.live
        self.f = index.features().take(index.live).astype(np.float64)
        self.w = classifier.head.weight.detach().double().numpy()
        self.b = classifier.head.bias.detach().double().numpy()
        self.y = np.eye(len(self.w))[index.labels[index.live].astype(int)]
        self.damping = index.head.damping(None)["damping"]
        self.pull = self._gradient(self.w, np.ones(len(self.f)), self.y)

    def _gradient(self, w: np.ndarray, kept: np.ndarray, y: np.ndarray) -> np.ndarray:
        z = self.f @ w.T + self.b
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return ((p - y) * kept[:, None]).T @ self.f / len(self.f)

    def refit(self, without=(), labels=None) -> np.ndarray:
        """Weights ``(c, h)`` after rows at these positions are left out, or get other labels."""
        kept, y = np.ones(len(self.f)), self.y.copy()
        if labels is None:
            kept[list(without)] = 0
        else:
            y[list(without)] = np.eye(len(self.w))[list(labels)]

        def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = flat.reshape(self.w.shape)
            z = self.f @ w.T + self.b
            top = z.max(axis=1)
            log_sum = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
            loss = ((log_sum - (z * y).sum(axis=1)) * kept).sum() / len(self.f)
            gap = w - self.w
            total = loss + self.damping / 2 * (gap**2).sum() - (self.pull * w).sum()
            return total, (self._gradient(w, kept, y) + self.damping * gap - self.pull).reshape(-1)

        found = minimize(value, self.w.reshape(-1), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000})
        assert np.abs(found.jac).max() < 1e-6
        return found.x.reshape(self.w.shape)

    def says(self, feature: np.ndarray, without=(), labels=None) -> int:
        return int((self.refit(without, labels) @ feature.astype(np.float64) + self.b).argmax())


@pytest.fixture(scope="module")
def oracle(bert_world):
    return Oracle(bert_world)


@pytest.fixture(scope="module")
def asked(bert_world):
    return run_forward(bert_world.retriever.classifier(), [bert_world.queries])


def problem_of(world, *, relabels: bool) -> HeadProblem:
    return HeadProblem(HeadRefits(world.retriever.models), relabels=relabels)


@pytest.mark.parametrize("relabels", [False, True])
def test_sets_flip_an_independent_refit_and_no_row_of_them_can_be_put_back(bert_world, oracle, asked, relabels):
    problem = problem_of(bert_world, relabels=relabels)
    search, n_found = FlipSearch(problem, len(oracle.f) // 2), 0
    for feature, logits in zip(asked.features, asked.logits, strict=True):
        found = search.find(feature, logits)
        if not found.flipped:
            continue
        n_found += 1
        positions = np.searchsorted(oracle.live, found.rows).tolist()
        new = None if found.new_labels is None else found.new_labels.tolist()
        assert oracle.says(feature) == found.before
        assert oracle.says(feature, positions, new) == found.after != found.before
        assert len(set(positions)) == len(positions)
        for place in range(len(positions))[-3:]:
            fewer = [p for i, p in enumerate(positions) if i != place]
            others = None if new is None else [p for i, p in enumerate(new) if i != place]
            assert oracle.says(feature, fewer, others) == found.before, "a row too many"
    assert n_found >= 2


def test_no_smaller_set_of_up_to_two_rows_exists_where_one_was_found_of_three_or_fewer(bert_world, oracle, asked):
    search = FlipSearch(problem_of(bert_world, relabels=False), len(oracle.f) // 2)
    sets = [search.find(f, z) for f, z in zip(asked.features, asked.logits, strict=True)]
    smallest = min(range(len(sets)), key=lambda i: len(sets[i]) if sets[i].flipped else 1 << 30)
    n = min(len(sets[smallest]) - 1, 1)
    for some in combinations(range(len(oracle.f)), n):
        assert oracle.says(asked.features[smallest], some) == sets[smallest].before


@pytest.mark.parametrize("relabels", [False, True])
def test_predicted_gains_are_the_first_order_of_refits(bert_world, asked, relabels):
    problem = problem_of(bert_world, relabels=relabels)
    feature, logits = asked.features[0], asked.logits[0]
    first = int(logits.argmax())
    gains, labels = problem.gains(problem.begin, feature, first, 1 - first)
    exact = []
    for position in range(len(problem.rows)):
        state = problem.refitted(np.array([position]), labels[[position]], problem.begin)
        z = problem.logits(state, feature, logits)
        exact.append(z[first] - z[1 - first] - (logits[first] - logits[1 - first]))
    assert np.corrcoef(gains, exact)[0, 1] >= 0.99
    small = np.abs(gains) <= np.quantile(np.abs(gains), 0.3)
    assert np.abs(gains - exact)[small].max() <= 0.1 * np.abs(gains[small]).max()


def test_a_row_changed_back_undoes_its_gain(bert_world, asked):
    problem = problem_of(bert_world, relabels=False)
    feature, logits = asked.features[0], asked.logits[0]
    first = int(logits.argmax())
    before, _ = problem.gains(problem.begin, feature, first, 1 - first)
    row = int(np.argmin(np.abs(before - np.median(before))))
    state = problem.refitted(np.array([row]), problem.labels[[row]], problem.begin)
    after, _ = problem.gains(state, feature, first, 1 - first)
    assert after[row] * before[row] <= 0


def test_the_shortest_beginning_of_an_order_is_the_shortest(bert_world, oracle, asked):
    problem = problem_of(bert_world, relabels=False)
    search = FlipSearch(problem, len(oracle.f) // 2)
    for feature, logits in zip(asked.features, asked.logits, strict=True):
        found = search.find(feature, logits)
        order = np.searchsorted(oracle.live, search.ranking(feature, logits, found).rows)
        short = search.shortest_beginning(feature, logits, order)
        assert short.flipped == found.flipped
        if short.flipped:
            assert len(short) <= len(found)
            assert oracle.says(feature, order[: len(short)].tolist()) != found.before
            assert len(short) == 1 or oracle.says(feature, order[: len(short) - 1].tolist()) == found.before


def test_a_label_that_is_predicted_already_needs_no_row(bert_world, asked):
    search = FlipSearch(problem_of(bert_world, relabels=False), 10)
    found = search.find(asked.features[0], asked.logits[0], int(asked.logits[0].argmax()))
    assert found.flipped
    assert not len(found)


class Made:
    """A retrainer whose models flip from a number of changed rows on, another one for each seed."""

    def __init__(self, needed: dict[int, int]) -> None:
        self.needed, self.rows, self.jobs = needed, self, []
        self.live = np.arange(1000)

    def run(self, jobs, progress=None):
        self.jobs += jobs
        outcomes = []
        for job in jobs:
            n = len(job.relabels) + (0 if job.without is None else len(job.without))
            flips = n >= self.needed[job.seed]
            outcomes.append(Outcome(np.array([[0.0, 1.0 if flips else -1.0]], np.float32)))
        return outcomes


def ranked(size: int, n: int = 400, new_labels=None) -> Ranked:
    rows = np.random.default_rng(0).permutation(1000)[:n]
    return Ranked(0, rows, new_labels, size, 0, None)


def test_a_set_grows_until_most_seeds_flip():
    found = retrain(Made({0: 60, 1: 70, 2: 300}), ranked(20), [0, 1, 2], tries=9)
    assert 70 <= found.size <= 88  # within a quarter of what it takes
    assert found.flipped[found.size] == pytest.approx(2 / 3)
    assert max(found.flipped) <= 160


def test_a_set_shrinks_while_most_seeds_flip():
    found = retrain(Made({0: 5, 1: 5, 2: 5}), ranked(80), [0, 1, 2], tries=9)
    assert 5 <= found.size <= 7


def test_a_set_that_never_flips_says_so_and_seeds_of_another_mind_take_no_part():
    never = retrain(Made({0: 5000, 1: 5000}), ranked(20), [0, 1])
    assert never.size is None
    assert max(never.flipped) == 400
    unclear = retrain(Made({0: 0, 1: 30}), ranked(40), [0, 1])
    assert unclear.unclear == 1
    assert retrain(Made({0: 0}), ranked(40), [0]).size is None


def test_a_label_that_is_predicted_already_is_put_to_the_test_without_a_change():
    rows = np.arange(20)
    needed = {0: 5, 1: 5, 2: 0}
    retrainer = Made(needed)
    found = retrain(retrainer, Ranked(0, rows, None, 0, 0, to=0), [0, 1, 2])
    assert (found.size, found.flipped, found.unclear) == (0, {0: 1.0}, 1)
    assert len(retrainer.jobs) == len(needed)  # on unchanged rows alone
    assert retrain(Made({0: 0}), Ranked(0, rows, None, 0, 0, to=0), [0]).size is None


def test_a_set_that_flips_retrained_models_alone_says_so(bert_world):
    """A retrained model may flip by fewer rows than the refitted head."""
    found = forebear.flip(bert_world.retriever, bert_world.queries[:1], limit=5)
    (held,) = found.numbers.sets
    not_flipped = replace(held, after=held.before, probability_after=0.75)
    flips = replace(found.numbers, sets=[not_flipped], retrained=[Retrained(len(held), {len(held): 1.0})])
    question = bert_world.retriever.resolve(forebear.QuerySpec(methods=("if",)))
    report, _ = flips_report(flips, bert_world.retriever, question, "", "Retrained.")
    name = bert_world.retriever.label_names[held.before]
    assert f"the refitted head still predicts “{name}”" in report.summary
    assert "instead" not in report.summary
    assert "100% of the seeds flip" in report.summary
    assert report.groups[0].title.endswith("as retrained models say")


def test_seeds_that_predict_another_label_without_any_change_are_named_as_the_reason(bert_world):
    found = forebear.flip(bert_world.retriever, bert_world.queries[:1], limit=5)
    flips = replace(found.numbers, retrained=[Retrained(None, {}, 3)])
    question = bert_world.retriever.resolve(forebear.QuerySpec(methods=("if",)))
    report, _ = flips_report(flips, bert_world.retriever, question, "", "Retrained.")
    assert "Trained on unchanged rows, no seed (of 3) predicts" in report.summary
    assert "was found" not in report.summary


def test_shares_are_of_sets_that_the_limit_allows(bert_world):
    found = forebear.flip(bert_world.retriever, bert_world.queries, limit=5)
    assert [row[0] for row in found.report.tables[0].rows] == [1, 5]
    assert "by at most 50" not in found.report.summary


def test_a_list_without_rows_does_not_point_to_more_of_them(bert_world):
    report = forebear.flip(bert_world.retriever, bert_world.queries[:1], limit=5).report

    def note(rows: list[list[Cell]]) -> str:
        table = Table("Rows", ["row", "text: text"], rows, "In order.")
        return for_screen(["row"], replace(report, tables=[table]), notes=True).tables[0].note

    assert note([[3, "a text"]]) == "In order. 1 of 1 rows; --out FOLDER writes all of them, and all columns."
    assert note([]) == "In order."


def test_a_relabelled_row_keeps_its_place_and_has_a_digest_of_its_own():
    rows, new = np.array([7, 3, 5]), np.array([1, 0, 1])
    job = Ranked(0, rows, new, 3, 0, None).job(np.arange(9), 4, 2)
    assert job.relabels == {3: 0, 7: 1}
    assert job.labels(np.zeros(9, np.int64)).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    plain, other = Job(np.arange(9), 4), Job(np.arange(9), 4, relabels={3: 1})
    assert len({j.digest("", seeded=True) for j in (plain, job, other)}) == 3
    assert len({j.digest("", seeded=False) for j in (plain, job, other)}) == 3


# ---------------------------------------------------------------- the command and the function


def test_the_function_says_the_same_as_the_command(bert_world, tmp_path, capsys):
    text = bert_world.queries[0]
    found = forebear.flip(bert_world.index.folder, [text], limit=30)
    assert run(["flip", "--index", str(bert_world.index.folder), "--text", text, "--limit", "30", "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sets"][0]["rows"] == found.result["sets"][0]["rows"].tolist()
    assert said["sizes"] == found.result["sizes"]


def test_a_batch_writes_a_report_and_a_patch_that_names_every_row(bert_world, tmp_path):
    from tiny import write_jsonl

    test = write_jsonl(tmp_path / "test.jsonl", text=bert_world.queries)
    out = tmp_path / "flips"
    command = ["flip", "--index", str(bert_world.index.folder), "--test", str(test), "--relabel"]
    command += ["--out", str(out), "-q"]
    assert run(command) == 0
    result = json.loads((out / "result.json").read_text())
    lines = list(csv.DictReader(io.StringIO((out / "patch.csv").read_text())))
    sizes = [size for size in result["sizes"] if size is not None]
    assert len(lines) == sum(sizes) > 0
    assert {line["action"] for line in lines} == {"relabel"}
    assert all(line["label"] != line["new_label"] for line in lines)
    stored = bert_world.index.text_lists(np.array([int(line["row"]) for line in lines]))[0]
    assert [line["text"] for line in lines] == stored
    assert [result["within"][k] for k in ("1", "5", "10", "50")] == sorted(result["within"].values())
    assert run(command) == 2  # it would overwrite
    assert "Flip sets" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--limit", "0"], "--limit 0: expected 1 to"),
        (["--to", "nothing"], "--to 'nothing': expected one of the model's labels"),
        (["--damping", "much"], "damping 'much': expected a number"),
        (["--pair", "b"], "2 text"),
    ],
)
def test_what_means_nothing_is_refused(bert_world, capsys, given, said):
    import re

    assert run(["flip", "--index", str(bert_world.index.folder), "--text", "a film", *given]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_head_without_curvature_is_refused_before_the_work_with_what_to_do(tmp_path, tiny_model, monkeypatch):
    source = rows_from_texts(sentences(12), labels(12), label_names=("a", "b"))
    build_index(source, tmp_path / "index", choose_model(tiny_model()).checkpoints, BuildOptions(dampings=()))
    expected = "flip sets take .* head's exact curvature.*holds none.*Build it with a dampings="
    with pytest.raises(MissingStoreError, match=expected):
        forebear.flip(tmp_path / "index", ["a film"])
    monkeypatch.setattr("forebear.evaluation.explain.explaining.run_forward", lambda *_a, **_k: pytest.fail("work"))
    with pytest.raises(MissingStoreError, match=expected):
        forebear.explain(tmp_path / "index", "a film", methods=["gc"], flip=True)


def test_retraining_needs_a_run(bert_world):
    how = forebear.evaluations.Retraining(recipe="full")
    with pytest.raises(InputError, match="no training run"):
        forebear.flip(bert_world.index, bert_world.queries[:1], how=how)


def test_an_explanation_says_what_would_flip_the_prediction(bert_world, tmp_path, capsys):
    index, text = str(bert_world.index.folder), bert_world.queries[0]
    found = forebear.flip(index, [text])
    explanation = forebear.explain(index, text, methods=["gc"], flip=True)
    assert explanation.flip.summary == found.report.summary
    shown = [row.row for row in explanation.flip.rows]
    assert shown == found.result["sets"][0]["rows"][: len(shown)].tolist()
    page = explanation._repr_html_()
    assert "What would flip it" in page
    assert run(["explain", "--index", index, "--text", text, "--method", "gc", "--flip"]) == 0
    assert f"row {shown[0]}, " in capsys.readouterr().out
    assert forebear.explain(index, text, methods=["gc"]).flip is None
