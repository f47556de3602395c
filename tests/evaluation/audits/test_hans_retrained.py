"""The HANS audit of several indexes, and retraining without the shortcut's rows, against scikit-learn and loops."""

from __future__ import annotations

import json
import math
import shutil

import datasets
import numpy as np
import pytest
from scipy.stats import t as student
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import BuildOptions, InputError, Retriever, audits, build_index, choose_model, open_rows, train
from forebear.cli.main import run
from forebear.evaluation.audits.artifacts.hans import audit_hans, shortcut_rows, telling_method
from forebear.evaluation.audits.artifacts.hans_indexes import names_of
from forebear.evaluation.audits.artifacts.hans_retrained_report import noise_of
from forebear.evaluation.common.statistics import Mean
from forebear.evaluation.python.retrainings import Retraining
from forebear.evaluation.worklists.files import file_names, read_work_list
from forebear.indexer.model.forward import run_forward
from forebear.indexer.training.fine_tuning import TrainOptions

N, N_HANS, N_DEV = 60, 48, 30
NAMES = ["contradiction", "entailment", "neutral"]
BINARY = ["entailment", "non-entailment"]
MAIN = ("entailment", "non-entailment", "in-domain")


def pairs(n, seed, names, **columns):
    return {
        "premise": sentences(n, seed=seed),
        "hypothesis": sentences(n, seed=seed + 1, low=1, high=5),
        "label": [names[i] for i in labels(n, len(names), seed=seed)],
        **columns,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Indexes ``one`` and ``two`` of two runs of different seeds, HANS-like rows and in-domain rows."""
    folder = tmp_path_factory.mktemp("hans-several")
    make_tiny_model(folder / "model", n_classes=3, seed=5)
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    rows = open_rows(write_jsonl(folder / "train.jsonl", **pairs(N, 1, NAMES)), need_labels=True)
    heuristics = [["lexical_overlap", "subsequence", None][i % 3] for i in range(N_HANS)]
    write_jsonl(folder / "hans.jsonl", **pairs(N_HANS, 11, BINARY, heuristic=heuristics))
    write_jsonl(folder / "dev.jsonl", **pairs(N_DEV, 21, NAMES))
    for seed, name in enumerate(("one", "two")):
        options = TrainOptions(epochs=1, batch_size=8, learning_rate=1e-4, seed=seed, precision="fp32", device="cpu")
        train(rows, folder / "model", folder / f"run-{name}", options)
        model = choose_model(str(folder / f"run-{name}")).checkpoints
        build_index(rows, folder / name, model, BuildOptions(dampings=("0.1x",)))
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def head(**choices):
    return Retraining(recipe="head", **choices)


def test_several_indexes_are_audited_as_each_by_itself(place):
    both = audits.hans([place / "one", Retriever(place / "two")], place / "hans.jsonl", ["gc", "nn-cos"], top=4)
    alone = {name: audits.hans(place / name, place / "hans.jsonl", ["gc", "nn-cos"], top=4) for name in ("one", "two")}
    assert json.loads(json.dumps(both.result["indexes"])) == {
        n: json.loads(json.dumps(f.result)) for n, f in alone.items()
    }
    assert {name: w.records() for name, w in both.work_lists.items()} == {
        n: f.work_list.records() for n, f in alone.items()
    }
    assert both.work_list is None
    assert alone["one"].work_list is not None
    assert not alone["one"].work_lists
    tops = [alone[name].result["methods"]["gc"]["top_k"] for name in ("one", "two")]
    overlap = next(table for table in both.report.tables if table.title == "Overlap of the top 4 by index")
    line = next(row for row in overlap.rows if row[0] == "gc")
    assert line[1:3] == pytest.approx(tops)
    assert line[3] == pytest.approx(np.mean(tops))
    assert line[4] == pytest.approx(np.std(tops, ddof=1) / math.sqrt(2))
    right = [alone[name].result["by"]["heuristic"]["subsequence"]["accuracy"] for name in ("one", "two")]
    by_kind = next(t for t in both.report.tables if t.title == "Right answers by heuristic and index")
    assert [row[1:4] for row in by_kind.rows if row[0] == "subsequence"] == [[*right, pytest.approx(np.mean(right))]]


def test_the_shortcuts_rows_are_entailed_overlap_and_are_behind_wrong_answers(place):
    retriever = Retriever(place / "one")
    audit = audit_hans(retriever, open_rows(place / "hans.jsonl", need_labels=True), ["gc", "nn-cos"], top=4)
    train_rows = read(place / "train.jsonl")
    share = []
    for row in train_rows:
        words = set(row["hypothesis"].lower().split())
        share.append(sum(w in row["premise"].lower().split() for w in words) / len(words))
    counts = audit.counts[telling_method(audit)]
    wanted = [n for n in range(N) if counts[n] and share[n] > np.mean(share) and train_rows[n]["label"] == "entailment"]
    assert wanted
    assert shortcut_rows(audit, retriever.index).tolist() == sorted(wanted, key=lambda n: (-counts[n], n))


@pytest.fixture(scope="module")
def retrained(place, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return audits.hans(
        place / "one", place / "hans.jsonl", ["gc"], top=10, how=head(n_seeds=3, cache=cache, l2=0.001),
        dev=place / "dev.jsonl", shortcut="3", weight=0.25, seed=7,
    )  # fmt: skip


def test_retrained_answers_are_those_of_scikit_learn(place, retrained):
    """Heads fitted by another library, on rows found here, and answers counted by a loop."""
    from sklearn.linear_model import LogisticRegression

    found, classifier = retrained.numbers.retrained["one"], Retriever(place / "one").classifier()
    train_rows, hans, dev = (read(place / f"{name}.jsonl") for name in ("train", "hans", "dev"))

    def features(rows):
        f = run_forward(classifier, [[r[c] for r in rows] for c in ("premise", "hypothesis")]).features
        return np.hstack([f.astype(np.float64), np.ones((len(f), 1))])

    gold = np.array([r["label"] for r in train_rows])
    f_train, f_hans, f_dev = features(train_rows), features(hans), features(dev)
    assert found.seeds == (7, 8, 9)
    for s in range(3):
        weighted = {"all rows": ([], 1.0)}
        for kind, rows in (("the shortcut's rows", found.rows), ("random rows", found.drawn[s])):
            weighted |= {f"without {kind}": (rows, 0.0), f"{kind} at weight 0.25": (rows, 0.25)}
        assert set(found.right) == set(weighted)
        for name, (rows, weight) in weighted.items():
            factors = np.ones(N)
            factors[np.array(rows, int)] = weight
            oracle = LogisticRegression(C=1 / (0.001 * factors.sum()), fit_intercept=False, tol=1e-12, max_iter=50_000)
            oracle.fit(f_train[factors > 0], gold[factors > 0], sample_weight=factors[factors > 0])
            said = oracle.predict(f_hans)
            right = [(p == "entailment") == (r["label"] == "entailment") for p, r in zip(said, hans, strict=True)]
            right += [p == r["label"] for p, r in zip(oracle.predict(f_dev), dev, strict=True)]
            np.testing.assert_array_equal(found.right[name][s], right)
    changed = found.right["without the shortcut's rows"] != found.right["all rows"]
    assert changed.any()


def test_groups_hold_the_rows_that_their_names_say(place, retrained):
    found, hans = retrained.numbers.retrained["one"], read(place / "hans.jsonl")
    kinds = {(r["label"], r["heuristic"] or "(none)") for r in hans}
    assert set(found.groups) == {*MAIN, *(f"{label}, {heuristic}" for label, heuristic in kinds)}
    for name, mask in found.groups.items():
        label, _, heuristic = name.partition(", ")
        wanted = [r["label"] == label and heuristic in ("", r["heuristic"] or "(none)") for r in hans]
        wanted += [label == "in-domain"] * N_DEV
        np.testing.assert_array_equal(mask, wanted)


def test_the_control_is_as_many_random_other_rows_of_the_same_labels(place, retrained):
    found, gold = retrained.numbers.retrained["one"], [r["label"] for r in read(place / "train.jsonl")]
    listed = [item.row for item in retrained.work_list]
    assert found.rows.tolist() == listed[:3]
    for drawn in found.drawn:
        assert not set(drawn) & set(found.rows)
        assert sorted(gold[n] for n in drawn) == sorted(gold[n] for n in found.rows)
    assert len({tuple(drawn) for drawn in found.drawn}) > 1


def test_intervals_are_student_s_t_over_seeds_and_differences_are_paired(retrained):
    found = retrained.numbers.retrained["one"]
    record = retrained.result["retrained"]["changes"][0]["beyond_control"]["non-entailment"]
    mask = found.groups["non-entailment"]
    by_hand = [
        found.right["without the shortcut's rows"][s, mask].mean() - found.right["without random rows"][s, mask].mean()
        for s in range(3)
    ]
    np.testing.assert_allclose(record["by_seed"], by_hand)
    assert record["over_seeds"]["mean"] == pytest.approx(np.mean(by_hand))
    error = np.std(by_hand, ddof=1) / math.sqrt(3)
    half = student.ppf(0.975, 2) * error
    assert record["over_seeds"]["high"] == pytest.approx(np.mean(by_hand) + half)
    # the recipe has no seed: against all rows nothing varies, and no interval is made up
    assert retrained.result["retrained"]["changes"][0]["over_all_rows"]["non-entailment"]["over_seeds"] is None
    gains = next(table for table in retrained.report.tables if table.title == "Gains over all rows")
    assert {row[-1] for row in gains.rows if row[1] == "without the shortcut's rows"} == {"no seeds in it"}


def test_the_finding_says_what_the_audited_model_answers_too(retrained):
    """Where retraining on all rows gives another model than the audited one, a reader must see it."""
    audit = retrained.numbers.audits["one"]
    assert retrained.report.summary.endswith(f"right answers on non-entailment rows are {audit.accuracy[1]:.1%}.")


def test_a_difference_within_the_seeds_noise_is_said_to_be():
    assert noise_of(Mean(0.1, 0.1, -0.1, 0.3, 3)) == "within the seeds' noise"
    assert noise_of(Mean(0.1, 0.01, 0.05, 0.15, 3)) == "rises"
    assert noise_of(Mean(-0.1, 0.01, -0.15, -0.05, 3)) == "falls"
    assert noise_of(None) == noise_of(Mean(0.1, None, None, None, 1)) == "not known (one seed)"


@pytest.mark.slow
def test_the_command_puts_indexes_side_by_side_and_retrains_each(place, tmp_path, capsys):
    both = ["--index", place / "one", "--index", place / "two"]
    call = ["audit", "hans", *both, "--test", place / "hans.jsonl", "--method", "gc", "--dev", place / "dev.jsonl"]
    call += ["--retrain", "top-1", "--seeds", "2", "--shortcut", "2", "--cache", tmp_path / "cache", "-q"]
    assert run([str(word) for word in [*call, "--out", tmp_path / "out"]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Retrained (top-1, 2 seeds) without the shortcut's 2 rows" in shown
    assert "Against its control non-entailment changes by" in shown
    result = json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    assert set(result["retrained"]) == {"one", "two"}
    for name in ("one", "two"):
        record = result["retrained"][name]
        assert record["retrain"] == "top-1"
        assert record["seeds"] == ([0, 1] if name == "one" else [2, 3])
        items = read_work_list(tmp_path / "out" / f"worklist-{name}.csv")
        assert [item.row for item in items][:2] == record["rows"]
        for change in record["changes"]:
            gained = record["accuracy"][change["name"]]["in-domain"] - record["accuracy"]["all rows"]["in-domain"]
            assert np.mean(change["over_all_rows"]["in-domain"]["by_seed"]) == pytest.approx(gained)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "one: rows to decide on" in page
    assert "worklist-two.csv" in page
    trained = len(list((tmp_path / "cache").rglob("*.arrow")))
    assert run([str(word) for word in [*call, "--out", tmp_path / "again"]]) == 0
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == trained >= 2 * 2 * 5
    assert json.loads((tmp_path / "again" / "result.json").read_text())["retrained"] == result["retrained"]


def test_hans_comes_from_a_hub_name_as_from_a_file(place, tmp_path, monkeypatch, capsys):
    rows = read(place / "hans.jsonl")
    features = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"), label=datasets.ClassLabel(names=BINARY),
        parse_premise=datasets.Value("string"), heuristic=datasets.Value("string"),
    )  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in ("premise", "hypothesis", "label", "heuristic")}
    hub = datasets.Dataset.from_dict({**columns, "parse_premise": ["(ROOT)"] * len(rows)}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((words, more)) or hub)
    results = []
    for number, test in enumerate(("jhu-cogsci/hans:validation", str(place / "hans.jsonl"))):
        call = ["audit", "hans", "--index", str(place / "one"), "--test", test, "--method", "gc", "-q"]
        assert run([*call, "--out", str(tmp_path / str(number))]) == 0
        result = json.loads((tmp_path / str(number) / "result.json").read_text())
        assert result.pop("provenance")["test rows"]
        results.append(result)
    assert asked[0] == (("jhu-cogsci/hans", None), {"split": "validation"})
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"weight": 1.0}, r"weight=1: expected 0 or more, and not 1"),
        ({"weight": -0.5}, r"weight=-0\.5: expected 0 or more"),
        ({"weight": float("nan")}, r"weight=nan: expected 0 or more"),
        ({"shortcut": 0}, r"takes 0 rows; expected 1 to \d+, half of the rows labelled entailment"),
        ({"shortcut": "0.9"}, r"takes 54 rows; expected 1 to"),
        ({"shortcut": "many"}, r"share 'many': expected a number above 0"),
        ({"how": head(n_seeds=0)}, r"n_seeds=0: expected at least 1"),
        ({"how": Retraining(recipe="most")}, r"'most': expected full, top-K"),
        ({"how": head(run="somewhere"), "retriever": ["one", "two"]}, "run= names one training, and 2 indexes"),
        ({"retriever": ["one", "one"]}, r"is named twice; expected different ones"),
        ({"retriever": []}, r"no index is given"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_the_work(place, monkeypatch, choices, message):
    monkeypatch.setattr("forebear.evaluation.python.hans.audit_hans", lambda *_, **__: pytest.fail("work was begun"))
    given = {"how": head()} | choices
    names = given.pop("retriever", "one")
    folders = place / names if isinstance(names, str) else [place / name for name in names]
    with pytest.raises(InputError, match=message):
        audits.hans(folders, place / "hans.jsonl", ["gc"], **given)


def test_an_index_without_nli_labels_is_named_before_the_work(place, tmp_path, monkeypatch, capsys):
    model = make_tiny_model(tmp_path / "model")
    rows = write_jsonl(
        tmp_path / "t.jsonl", premise=["a film", "a plot"], hypothesis=["a plot", "a film"], label=[0, 1]
    )
    build_index(open_rows(rows), tmp_path / "other", choose_model(str(model)).checkpoints)
    monkeypatch.setattr("forebear.evaluation.python.hans.audit_hans", lambda *_, **__: pytest.fail("work was begun"))
    call = ["audit", "hans", "--index", place / "one", "--index", tmp_path / "other", "--test", place / "hans.jsonl"]
    assert run([str(word) for word in [*call, "--out", tmp_path / "out"]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"needs a model with NLI labels; that of {tmp_path / 'other'} has" in line
    call = [*call[:4], "--index", place / "two", "--test", place / "hans.jsonl", "--model", tmp_path / "model"]
    assert run([str(word) for word in [*call, "--out", tmp_path / "out"]]) == 2
    assert "--model is one model, --index 2 indexes" in capsys.readouterr().err


def test_indexes_of_one_folder_name_have_names_and_lists_of_their_own(place, tmp_path):
    (tmp_path / "one").symlink_to(place / "two")
    (tmp_path / "a").mkdir()
    copied = tmp_path / "a" / "one"
    shutil.copytree(place / "two", copied)
    names = names_of([Retriever(place / "one"), Retriever(copied)])
    assert names == [str(place / "one"), str(copied)]
    assert file_names(["a b", "a/b", "../x", "é"]) == ["worklist-a-b", "worklist-a-b-2", "worklist-x", "worklist-index"]
    with pytest.raises(InputError, match="is named twice"):
        names_of([Retriever(place / "two"), Retriever(tmp_path / "one")])
