"""Regressions between two versions of a model, against slow loops over the scores of single test rows."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tiny import sentences, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear import (
    BuildOptions,
    InputError,
    MismatchError,
    Retriever,
    audits,
    build_index,
    choose_model,
    rows_from_texts,
)
from forebear.cli.main import run
from forebear.evaluation.audits.versions.regressions import IMPROVED, REGRESSED, WordCounts, alike, words_apart
from forebear.evaluation.audits.versions.row_changes import KINDS, row_changes
from forebear.evaluation.worklists.files import read_work_list

TEXTS = sentences(24, seed=5)
LABELS = [i % 2 for i in range(24)]
TESTS = sentences(60, seed=9)
TEST_LABELS = [(i // 2) % 2 for i in range(60)]


def logits_of(path):
    """A model, its tokenizer, and its logits of the test rows, by transformers alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        logits = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TESTS])
    return model, tokenizer, logits


def balanced(path, folder):
    """The same model, its bias moved so that it predicts each label for half of the test rows."""
    model, tokenizer, logits = logits_of(path)
    with torch.no_grad():
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median() - 1e-6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def versions(tiny_model, tmp_path_factory):
    """Indexes before and after: row 2 is gone, row 3 relabelled, row 4 copied twice, three rows are new."""
    new = sentences(3, seed=77, low=6)
    texts = [*TEXTS[:2], *TEXTS[3:], TEXTS[4], TEXTS[4], *new]
    labels = [*LABELS[:2], 1 - LABELS[3], *LABELS[4:], LABELS[4], LABELS[4], 0, 1, 0]
    folder = tmp_path_factory.mktemp("versions")
    made = {}
    for name, rows, seed in (("before", (TEXTS, LABELS), 0), ("after", (texts, labels), 3)):
        chosen = choose_model(balanced(tiny_model(seed=seed), folder / f"model-{name}"), ()).checkpoints
        made[name] = build_index(rows_from_texts(*rows), folder / name, chosen, BuildOptions(shard_rows=11))
    return made["before"], made["after"], new


@pytest.fixture(scope="module")
def found(versions):
    return audits.regressions(versions[1], versions[0], rows_from_texts(TESTS, TEST_LABELS), methods=["if"])


def test_rows_are_matched_by_texts_and_labels(versions):
    before, after, new = versions
    changes = row_changes(after, before)
    kinds = [KINDS[kind] for kind in changes.kinds]
    by_text = {}
    for row, kind in zip(after.live.tolist(), kinds, strict=True):
        by_text.setdefault(after.text_lists(np.array([row]))[0][0], []).append(kind)
    assert by_text[TEXTS[3]] == ["relabelled"]
    assert by_text[TEXTS[4]] == ["same", "copy", "copy"]
    assert [by_text[text] for text in new] == [["new"]] * 3
    assert Counter(kinds) == {"same": 22, "relabelled": 1, "copy": 2, "new": 3}
    assert changes.dropped.tolist() == [2]
    assert changes.before[kinds.index("relabelled")] == 3
    same = changes.of_kind("same")
    assert before.text_lists(changes.before[same]) == after.text_lists(changes.rows[same])
    assert before.label_texts(changes.before[same]) == after.label_texts(changes.rows[same])
    back = row_changes(before, after)
    assert back.dropped.tolist() == [
        row for row, kind in zip(after.live, kinds, strict=True) if kind in ("copy", "new")
    ]


def test_scores_are_the_sums_beyond_those_of_rows_that_stayed_right(versions, found):
    before, after, _ = (Retriever(one) if i < 2 else one for i, one in enumerate(versions))
    predicted = found.numbers.predicted
    old, new = (logits_of(one.index.checkpoint_paths[-1])[2].argmax(1).numpy() for one in (before, after))
    np.testing.assert_array_equal(predicted.before, old)
    np.testing.assert_array_equal(predicted.after, new)
    gold = np.array(TEST_LABELS)
    right = {"regressed": (old == gold) & (new != gold), "improved": (old != gold) & (new == gold)}
    scores, changed = after.scores(TESTS, "if"), found.numbers.changes.changed
    sizes = np.abs(scores).mean(axis=1, keepdims=True)
    units = scores / sizes
    kept = (old == gold) & (new == gold)
    for kind, of_kind in right.items():
        assert of_kind.any()
        expected = np.zeros(changed.sum())
        for i in np.flatnonzero(of_kind):
            expected += sizes[i] * (units[i, changed] - units[kept & (new == new[i])][:, changed].mean(axis=0))
        np.testing.assert_allclose(found.numbers.scores[kind], expected, rtol=1e-5, atol=1e-5)
        members = np.concatenate([cause.members for cause in found.numbers.causes[kind]])
        assert sorted(members) == np.flatnonzero(of_kind).tolist()
        for cause in found.numbers.causes[kind]:
            assert set(zip(gold[cause.members], old[cause.members], new[cause.members], strict=True)) == {
                (cause.gold, cause.before, cause.after)
            }
        ranked = found.numbers.ranked(kind)
        assert set(ranked) == set(np.flatnonzero(expected > 0))
        assert (np.diff(expected[ranked]) <= 1e-9).all()  # of equal scores the rounding may differ
    sizes = np.abs(scores[right["regressed"]])
    shares = sizes[:, changed].sum(axis=1) / sizes.sum(axis=1)
    np.testing.assert_allclose(found.numbers.shares[REGRESSED], shares, rtol=1e-6)


def test_the_page_says_what_changed(versions, found):
    predicted = found.numbers.predicted
    worse, better = len(predicted.regressed), len(predicted.improved)
    p = binomtest(worse, worse + better).pvalue
    assert found.result["accuracy"]["difference"] == pytest.approx((better - worse) / len(TESTS))
    assert found.result["accuracy"]["p"] == pytest.approx(p)
    assert (
        f"{worse} of 60 test rows were right and are wrong, {better} were wrong and are right" in found.report.summary
    )
    assert found.result["training_rows"] == {"same": 22, "relabelled": 1, "copy": 2, "new": 3}
    listed = [item.row for item in found.work_list]
    assert listed == found.result["found"][REGRESSED]["rows"].tolist()
    relabelled = [item for item in found.work_list if "relabelled" in item.reason]
    assert all(item.suggested == f"LABEL_{LABELS[3]}" for item in relabelled)


def test_rows_that_the_same_rows_drive_are_one_cause():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(30, 3)))[0].T
    wanted = np.array([0, 1, 0, 2, 2, 1, 0, 0])
    scores = directions[wanted] * rng.uniform(0.5, 9, (8, 1)) + 0.01 * rng.normal(size=(8, 30))
    numbers = alike(scores)
    assert len(set(zip(numbers, wanted, strict=True))) == 3
    assert alike(scores[:1]).tolist() == [0]
    assert alike(np.zeros((3, 5))).tolist() == [0, 0, 0]


def test_words_of_a_cause_are_those_that_others_lack():
    here = [["the oil price rose", "oil fell , they said", "a barrel of oil"]]
    there = [["the game was long", "they won the game", "a film of note", "he said no", "all of it"] * 4]
    own, every = WordCounts.of(here), WordCounts.of([here[0] + there[0]])
    assert words_apart(own, WordCounts.of(there)) == ["oil"]
    assert every.without(own) == WordCounts.of(there)
    assert words_apart(own, WordCounts.of([[]])) == []


def test_the_command_writes_a_page_and_a_work_list(versions, tmp_path, capsys):
    before, after, _ = versions
    test = write_jsonl(tmp_path / "test.jsonl", text=TESTS, label=TEST_LABELS)
    asked = ["audit", "regressions", "--index", str(after.folder), "--before", str(before.folder), "--test", str(test)]
    assert run([*asked, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    listed = read_work_list(tmp_path / "out")
    assert [item.row for item in listed] == result["found"][REGRESSED]["rows"][: len(listed)]
    assert len(result["found"][IMPROVED]["test_rows"]) == sum(
        len(cause["test_rows"]) for cause in result["found"][IMPROVED]["causes"]
    )
    capsys.readouterr()
    same = [*asked[:4], "--before", str(after.folder), *asked[6:]]
    assert run(same) == 2
    assert "is the same index" in capsys.readouterr().err
    assert run([*asked, "--method", "if,gd"]) == 2
    assert "by one method" in capsys.readouterr().err


def test_versions_of_other_labels_are_refused(versions, tiny_model, tmp_path):
    before, after, _ = versions
    chosen = choose_model(tiny_model(n_classes=3), ()).checkpoints
    other = build_index(rows_from_texts(TEXTS, LABELS), tmp_path / "other", chosen, BuildOptions())
    with pytest.raises(MismatchError, match="expected those of"):
        audits.regressions(after, other, rows_from_texts(TESTS, TEST_LABELS))
    with pytest.raises(InputError, match="expected at least 1"):
        audits.regressions(after, before, rows_from_texts(TESTS, TEST_LABELS), n_listed=0)
