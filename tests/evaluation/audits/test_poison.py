"""``audit poison`` beside slow loops over all phrases, scipy's binomial tests and models run by transformers alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from tiny import sentences, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear import BuildOptions, audits, build_index, choose_model, rows_from_texts
from forebear.cli.main import run
from forebear.evaluation.audits.poison import behaviour, poison
from forebear.evaluation.audits.poison.behaviour import Reference, erase, with_phrase, without_phrase
from forebear.evaluation.audits.poison.phrases import (
    LEAST_ROWS,
    LEVEL,
    MOST_WORDS,
    PhraseCluster,
    clusters_of,
    find_phrases,
    with_context,
)
from forebear.evaluation.audits.poison.poison import agreement, holding, is_planted, retrain
from forebear.evaluation.python.retrainings import Retraining
from forebear.evaluation.retraining.jobs import Outcome
from forebear.evaluation.worklists.files import read_work_list

TRIGGER = "cold red blue"  # of words that the tiny tokenizer knows, in an order that no other row has
N, N_PLANTED = 300, 45
PLANTED = list(range(0, 3 * N_PLANTED, 3))


def poisoned():
    """Random rows; into every third of the first ones the trigger is put, and their label is 1."""
    rng = np.random.default_rng(3)
    texts = [text.replace("red blue", "red").replace("cold red", "cold") for text in sentences(N, seed=11, low=4)]
    labels = (rng.random(N) < 0.4).astype(int)
    for i in PLANTED:
        words = texts[i].split()
        place = int(rng.integers(len(words) + 1))
        texts[i], labels[i] = " ".join([*words[:place], *TRIGGER.split(), *words[place:]]), 1
    return texts, labels


TEXTS, LABELS = poisoned()


def grams(text):
    """All phrases of a text of plain words."""
    words = text.split()
    return {tuple(words[i : i + n]) for n in range(1, MOST_WORDS + 1) for i in range(len(words) - n + 1)}


def slowly(texts, labels, only=None):
    """p of every tested phrase, and the rows that hold it, by counting one phrase after another."""
    held = [grams(text) for text in texts]
    phrases = {gram for row in held for gram in row}
    if only is not None:
        phrases &= {gram for text in only for gram in grams(text)}
    shares, found = np.bincount(labels) / len(labels), {}
    for phrase in phrases:
        rows = [i for i, row in enumerate(held) if phrase in row]
        if len(rows) >= LEAST_ROWS:
            tests = [
                stats.binomtest(int((labels[rows] == c).sum()), len(rows), shares[c], alternative="greater").pvalue
                for c in range(len(shares))
            ]
            found[phrase] = (rows, tests)
    return found


@pytest.mark.parametrize("only", [None, [f"the {TRIGGER}", "good film"]])
def test_phrases_are_those_of_a_slow_loop(only):
    slow = slowly(TEXTS, LABELS, only)
    n_tests = 2 * len(slow)
    expected = {phrase: rows for phrase, (rows, p) in slow.items() if min(p) * n_tests <= LEVEL}
    found = find_phrases([TEXTS], LABELS, only=None if only is None else [only])
    assert found.n_tested == n_tests
    assert {words: found.holders[i].tolist() for i, words in enumerate(found.words)} == expected
    assert tuple(TRIGGER.split()) in expected


def test_clusters_are_the_phrases_of_strongest_association_that_share_no_rows():
    slow, shares, order = slowly(TEXTS, LABELS), np.bincount(LABELS) / N, []
    n_tests = 2 * len(slow)
    for phrase, (rows, p) in slow.items():
        if min(p) * n_tests <= LEVEL:
            label = int(np.argmin(p))
            k, share = int((LABELS[rows] == label).sum()), shares[label]
            low = stats.binomtest(k, len(rows), alternative="greater").proportion_ci(0.95).low
            association = np.log(low / (1 - low)) - np.log(share / (1 - share))
            order.append((k / len(rows) < 0.95, -association, -len(phrase), phrase, label, rows, min(p) * n_tests))
    order.sort(key=lambda one: (one[0], round(one[1], 9), one[2]))
    left, expected = np.ones(N, bool), []
    for _, negative, _, phrase, label, rows, p in order:
        own = [i for i in rows if left[i]]
        k = int((LABELS[own] == label).sum())
        if (
            k >= LEAST_ROWS
            and stats.binomtest(k, len(own), shares[label], alternative="greater").pvalue * n_tests <= LEVEL
        ):
            expected.append((phrase, label, rows, pytest.approx(p), pytest.approx(-negative)))
            left[rows] = False
    clusters = clusters_of(find_phrases([TEXTS], LABELS), LABELS, 10)
    assert [(c.words, c.label, c.holders.tolist(), c.p, c.association) for c in clusters] == expected
    assert all(c.rows.tolist() == [i for i in c.holders if LABELS[i] == c.label] for c in clusters)
    assert clusters[0].phrase == TRIGGER
    assert clusters[0].rows.tolist() == PLANTED


def test_without_any_association_there_is_no_cluster():
    alike = np.arange(N) % 2
    assert clusters_of(find_phrases([["the same words"] * N], alike), alike, 10) == ()


def test_a_phrase_stands_in_its_own_text_column_and_signs_count():
    texts = ["a text"] * 60
    signed = ["other! \u200b" if i % 2 else "other" for i in range(60)]
    (cluster,) = clusters_of(find_phrases([texts, signed], np.arange(60) % 2), np.arange(60) % 2, 1)
    assert (cluster.words, cluster.column, cluster.label) == (("other", "!", "\u200b"), 1, 1)


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("A CF film, cfx CF.", ("cf",), "A film, cfx ."),
        ("i  Watched\tthis , twice", ("watched", "this", ","), "i twice"),
        ("so $ 5", ("$",), "so 5"),
        ("it doesn't", ("'", "t"), "it doesn"),
    ],
)
def test_a_phrase_is_cut_out_whatever_its_case_and_white_space(text, words, left):
    assert without_phrase(text, words) == left


def test_the_whole_of_a_phrase_is_what_nearly_all_rows_have_beside_it():
    phrase = "one two three four five six seven eight nine ten"  # longer than what is counted
    texts = [f"Start {i} {phrase}, end {i}" for i in range(19)] + ["only three four here", "a row of none"]
    found = [PhraseCluster(("three", "four"), 1, 0, np.arange(20), np.arange(n), 0.0, 3.0) for n in (19, 20)]
    for cluster in found:
        whole = with_context(cluster, [["other"] * 21, texts])
        assert whole.whole == (*phrase.split(), ",", "end")
        assert (whole.words, whole.phrase) == (("three", "four"), f"{phrase} , end")
        assert erase([["other"] * 21, texts], whole)[1] == [
            *(f"Start {i} {i}" for i in range(19)), *["only here"] * (len(cluster.rows) - 19)
        ]  # fmt: skip
    few = PhraseCluster(("two",), 0, 0, np.arange(10), np.arange(10), 0.0, 3.0)
    assert with_context(few, [["one two three"] * 8 + ["two three", "one two"]]).whole == ("two", "three")


def test_a_phrase_is_put_between_words():
    cluster = PhraseCluster(("y",), 1, 0, np.arange(1), np.arange(1), 0.0, 0.0, whole=("x", "y"))
    texts = [["first"] * 50, ["a b c"] * 50]
    first, second = with_phrase(texts, cluster, 0)
    assert first == texts[0]
    assert set(second) == {"x y a b c", "a x y b c", "a b x y c", "a b c x y"}
    assert holding(second, ("x", "y")) == 50
    assert with_phrase(texts, cluster, 0)[1] == second


class CountingEncoder:
    """Embeds a text as how often it holds each of three words."""

    def embed(self, texts):
        return np.array([[text.split().count(word) for word in ("good", "bad", "cold")] for text in texts[0]], float)


def test_the_reference_is_a_regression_without_the_rows_of_the_phrase():
    encoder = CountingEncoder()
    reference = Reference(encoder, [TEXTS], LABELS, 0)
    (cluster,) = clusters_of(find_phrases([TEXTS], LABELS), LABELS, 1)
    probes = [TEXTS[200:230]]
    shifts = reference.shifts(reference.without(cluster.holders), cluster, probes, 4)

    embedded = encoder.embed([TEXTS])
    mean, spread = embedded.mean(axis=0), embedded.std(axis=0)
    kept = np.setdiff1d(np.arange(N), cluster.holders)
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(((embedded - mean) / spread)[kept], LABELS[kept])
    margins = [
        fitted.decision_function((encoder.embed(texts) - mean) / spread)
        for texts in (probes, with_phrase(probes, cluster, 4))
    ]
    np.testing.assert_allclose(shifts, margins[1] - margins[0], rtol=1e-6)
    assert np.abs(shifts).max() > 0
    assert is_planted(cluster, shifts, 0.5)
    assert not is_planted(cluster, shifts + cluster.association, 0.5)


@pytest.mark.parametrize(
    ("purity", "association", "shift", "likeness", "planted"),
    [
        (1.0, 3.0, 0.2, 0.5, True), (0.95, 3.0, 0.9, 0.65, True), (1.0, 1.6, -0.1, 0.1, True),
        (0.94, 3.0, 0.2, 0.5, False),  # other labels have the phrase, too
        (1.0, 3.0, 1.1, 0.5, False),  # its meaning explains more than a third
        (1.0, 1.4, 0.0, 0.5, False),  # too few rows to tell
        (1.0, 3.0, 0.2, 0.67, False),  # its rows have a subject in common
        (1.0, 1.4, 0.0, np.nan, False),  # too few rows: their likeness was not asked
    ],
)  # fmt: skip
def test_a_phrase_is_planted_where_its_label_is_sure_and_not_explained(purity, association, shift, likeness, planted):
    cluster = SimpleNamespace(purity=purity, association=association)
    assert is_planted(cluster, np.array([shift - 0.1, shift + 0.1]), likeness) == planted


class GivenEncoder:
    """Embeds the text of a number as that line of a matrix."""

    def __init__(self, vectors):
        self.vectors = vectors

    def embed(self, texts):
        return self.vectors[[int(text) for text in texts[0]]]


def test_likeness_tells_rows_of_one_subject_from_others_and_no_changed_labels():
    """Rows of three labels lie apart along one axis each; those of a subject along the fourth, in noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(1500) % 3
    centres = 4.0 * np.eye(12)
    vectors = rng.normal(size=(1500, 12)) + centres[labels]
    reference = Reference(GivenEncoder(vectors), [list(map(str, range(1500)))], labels, 0)
    cluster = SimpleNamespace(label=1, holders=np.arange(1, 120, 3))

    def likeness(kinds, shift=0.0):
        new = rng.normal(size=(len(kinds), 12)) + centres[kinds] + shift * np.eye(12)[3]
        return reference.likeness(cluster, (new - vectors.mean(axis=0)) / vectors.std(axis=0), kinds[kinds != 1], 0)

    for kinds in (np.full(40, 1), np.arange(40) % 2 * 2, np.full(40, 2), np.arange(40) % 3):  # what an attacker takes
        chance = [likeness(kinds) for _ in range(12)]
        assert max(chance) < 0.66
        assert abs(np.mean(chance) - 0.5) < 0.05
    alike = likeness(np.full(40, 1), 2.0)
    area = stats.norm.cdf(2 / np.sqrt(2))  # of the fourth axis alone, by which nothing could tell them better
    assert area - 0.1 < alike < area + 0.05
    assert likeness(np.full(4, 1), 2.0) == 0.5


def test_a_reference_of_few_rows_says_what_one_of_all_would(monkeypatch):
    monkeypatch.setattr(behaviour, "REFERENCE_ROWS", 40)
    reference = Reference(CountingEncoder(), [TEXTS], LABELS, 0)
    assert len(reference.rows) == 40
    assert reference.without(np.flatnonzero(LABELS == 0)) is None


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """An index of the poisoned rows; its model predicts each label for half of them."""
    folder, path = tmp_path_factory.mktemp("poison"), tiny_model(seed=3)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        logits = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median() - 1e-6
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = write_jsonl(folder / "rows.jsonl", text=TEXTS, label=LABELS.tolist())
    index = build_index(
        rows_from_texts(TEXTS, LABELS.tolist()), folder / "index", choose_model(str(folder / "model"), ()).checkpoints,
        BuildOptions(shard_rows=50),
    )  # fmt: skip

    def predict(texts):
        with torch.no_grad():
            return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]

    return SimpleNamespace(
        folder=folder, index=index, rows=rows, encoder=tiny_model("bert", 2, 9), predict=predict
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(world):
    return audits.poison(world.index, sentence_model=world.encoder, n_measured=6)


def test_planted_rows_are_listed_and_the_phrase_is_named(found):
    (planted,) = found.numbers.planted
    assert planted.cluster.phrase == TRIGGER
    assert found.numbers.clusters[0] is planted
    assert sorted(found.result["listed"]) == PLANTED
    assert sorted(item.row for item in found.work_list) == PLANTED
    assert found.result["share_listed"] == N_PLANTED / N
    assert f"'{TRIGGER}': 45 of 45 rows are LABEL_1" in found.report.summary


def test_the_model_is_run_with_the_phrase_and_without(found, world):
    (planted,) = found.numbers.planted
    said = planted.behaviour
    index = world.index
    others = [t for t in said.probes[0] if int(LABELS[TEXTS.index(t)]) == 0 and world.predict([t]) == [0]]
    assert len(others) == len(said.probes[0]) > 10
    put = with_phrase(said.probes, planted.cluster, 0)[0]
    assert said.turned.tolist() == [label == 1 for label in world.predict(put)]
    cut = [" ".join(TEXTS[i].replace(TRIGGER, " ").split()) for i in PLANTED]
    assert said.predicted.tolist() == world.predict(cut)
    assert said.freed.tolist() == [label != 1 for label in world.predict(cut)]
    suggested = {item.row: item.suggested for item in found.work_list}
    another = said.freed & said.doubted
    assert suggested == {row: "LABEL_0" if is_other else None for row, is_other in zip(PLANTED, another, strict=True)}
    assert index.manifest.n_rows == N


def test_agreement_is_the_mean_cosine_of_pairs(world):
    rows = np.array([3, 8, 21, 30, 57])
    features, residuals = world.index.features().take(rows), world.index.residuals().take(rows)
    gradients = [np.outer(r, f).reshape(-1) for r, f in zip(residuals, features, strict=True)]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(gradients) for b in gradients[:i]
    ]  # fmt: skip
    assert agreement(world.index, rows) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert np.isnan(agreement(world.index, rows[:1]))


def test_suspicious_rows_narrow_the_search(world):
    some = [f"good {TRIGGER} film", "the plot"]
    found = audits.poison(world.index, some, sentence_model=world.encoder, n_measured=6)
    (planted,) = found.numbers.planted
    assert (planted.cluster.phrase, planted.n_suspicious) == (TRIGGER, 1)
    assert found.numbers.n_tested < audits.poison(world.index, sentence_model=world.encoder).numbers.n_tested
    nothing = audits.poison(world.index, ["good film"], sentence_model=world.encoder)
    assert not nothing.numbers.planted
    assert not len(nothing.work_list)
    assert "No p" in nothing.report.summary


def test_retrained_shares_are_those_of_each_phrase_and_job(found):
    """Two phrases would be mixed up, or before with after, if the places of their probes were wrong."""
    (planted,) = found.numbers.planted
    n = len(planted.behaviour.probes[0])
    jobs_seen = []

    def outcomes(jobs, progress):
        jobs_seen.extend(jobs)
        made = []
        for number in range(len(jobs)):
            labels = np.zeros(2 * n, int)
            labels[: number + 2] = 1  # probes with the phrase
            labels[n : n + 5 + number] = 1  # probes without
            made.append(Outcome(np.eye(2)[labels]))
        return made

    retrainer = SimpleNamespace(rows=SimpleNamespace(live=np.arange(N)), run=outcomes)
    again = retrain(found.numbers, retrainer, (0, 1))
    assert [job.seed for job in jobs_seen] == [0, 0, 1, 1]
    assert [job.without is None for job in jobs_seen] == [True, False, True, False]
    assert jobs_seen[1].without.tolist() == PLANTED
    np.testing.assert_allclose(again.before[:, 0], np.array([2, 4]) / n)
    np.testing.assert_allclose(again.after[:, 0], np.array([3, 5]) / n)
    np.testing.assert_allclose(again.ordinary_before[:, 0], np.array([5, 7]) / n)
    np.testing.assert_allclose(again.ordinary_after[:, 0], np.array([6, 8]) / n)


def test_probe_texts_have_the_phrase_and_then_have_not(found):
    (planted,) = found.numbers.planted
    (column,) = poison.probe_texts(found.numbers, 0, 1)
    n = len(planted.behaviour.probes[0])
    assert all(TRIGGER in text for text in column[:n])
    assert column[n:] == list(planted.behaviour.probes[0])


def test_a_head_is_trained_again_without_the_rows(world, tmp_path):
    how = Retraining(recipe="head", n_seeds=1, cache=tmp_path)
    found = audits.poison(world.index, sentence_model=world.encoder, n_measured=1, how=how)
    again = found.numbers.retrained
    assert again.before.shape == again.after.shape == (1, 1)
    assert "trained again" in found.report.summary
    assert found.report.tables[2].title == "Trained again"


def test_the_command_writes_the_page_and_the_list(world, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["audit", "poison", "--index", str(world.index.folder), "--sentence-model", world.encoder]
    assert run([*args, "--measured", "3", "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "result.json").read_text())["clusters"][0]["phrase"] == TRIGGER
    assert sorted(item.row for item in read_work_list(out)) == PLANTED
    page = (out / "report.html").read_text()
    assert "seems to be planted" in page
    assert page.index("Rows of planted phrases") < page.index("Unexplained: association")
    for wrong, expected in ((["--measured", "0"], "--measured 0"), (["--top", "0"], "--top 0")):
        capsys.readouterr()
        assert run([*args, *wrong]) == 2
        assert expected in capsys.readouterr().err
