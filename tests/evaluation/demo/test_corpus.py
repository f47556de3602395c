from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forebear.errors import InputError, OutputExistsError, StorageError
from forebear.evaluation.audits.artifacts.lexical_overlap import lexical_overlap
from forebear.evaluation.demo import corpus as module
from forebear.evaluation.demo.corpus import SCHEMA, Corpus, make_corpus, read_grammar, write_corpus

ENTAILED, NOT_ENTAILED = 0, 1
GOLDEN: list[dict[str, Any]] = [
    {
        "premise": "The dishonest weaver instructed the beekeeper at once",
        "hypothesis": "The weaver instructed the beekeeper",
        "label": 0,
        "template": "drop_modifiers",
        "planted": "artifact",
    },
    {
        "premise": "The tall cousin phoned the acrobat in the meadow last summer",
        "hypothesis": "The cousin questioned the acrobat",
        "label": 1,
        "template": "other_word",
        "planted": "",
    },
]


SIZES = {"n_train": 2200, "n_planted": 72}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """More rows than the demo's, so that rare wordings occur."""
    return make_corpus(**SIZES)


def rows_of(corpus: Corpus, split: str, template: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = corpus.splits()[split].to_pylist()
    return [row for row in rows if template in (None, row["template"])]


def overlaps(rows: list[dict[str, Any]]) -> list[float]:
    return [float(v) for v in lexical_overlap([r["premise"] for r in rows], [r["hypothesis"] for r in rows])]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_same_seed_gives_the_same_rows_in_any_process(corpus: Corpus) -> None:
    again = make_corpus(**SIZES)
    assert all(again.splits()[name].equals(table) for name, table in corpus.splits().items())
    assert not make_corpus(seed=1).train.equals(corpus.train)
    small = make_corpus(seed=3, n_train=40, n_dev=8, n_probe=8, n_planted=4, n_wrong_probe=3)
    assert small.train.slice(0, 2).to_pylist() == GOLDEN


def test_other_splits_do_not_change_the_training_rows(corpus: Corpus) -> None:
    assert make_corpus(**SIZES, n_dev=5, n_probe=0, n_wrong_probe=7).train.equals(corpus.train)


def test_sizes_columns_and_planted_counts(corpus: Corpus) -> None:
    sizes = {name: table.num_rows for name, table in corpus.splits().items()}
    assert sizes == {"train": 2200, "dev": 300, "probe": 200, "wrong_probe": 40}
    assert all(table.schema.equals(SCHEMA) for table in corpus.splits().values())
    planted = Counter(corpus.train["planted"].to_pylist())
    assert planted["wrong-label"] == 72
    assert 500 < planted["artifact"] < 700
    assert set(planted) == {"", "artifact", "wrong-label"}
    assert set(corpus.dev["planted"].to_pylist()) == {"", "artifact"}
    assert set(corpus.probe["planted"].to_pylist()) == {"artifact"}
    assert set(corpus.wrong_probe["planted"].to_pylist()) == {"wrong-label"}
    assert str(planted["artifact"]) in corpus.planted["artifact"]
    assert "72 of 2200" in corpus.planted["wrong-label"]


def test_labels_are_balanced_and_probes_hold_one_label(corpus: Corpus) -> None:
    for split in ("train", "dev"):
        assert 0.45 < mean(corpus.splits()[split]["label"].to_pylist()) < 0.55
    assert set(corpus.probe["label"].to_pylist()) == {NOT_ENTAILED}
    assert set(corpus.wrong_probe["label"].to_pylist()) == {ENTAILED}


def test_no_premise_occurs_twice_anywhere(corpus: Corpus) -> None:
    premises = [row["premise"].lower() for split in corpus.splits() for row in rows_of(corpus, split)]
    assert len(premises) == len(set(premises)) == 2740


def test_probe_constructions_are_not_trained_on(corpus: Corpus) -> None:
    trained = set(corpus.train["template"].to_pylist())
    assert not trained & set(corpus.probe["template"].to_pylist())
    assert len(set(corpus.probe["template"].to_pylist())) == 8


def test_overlap_is_the_shortcut(corpus: Corpus) -> None:
    train = rows_of(corpus, "train")
    values = overlaps(train)
    assert 0.4 < mean(values) < 0.55
    assert all(v == 1.0 for v, row in zip(values, train, strict=True) if row["planted"] == "artifact")
    assert all(v == 1.0 for v in overlaps(rows_of(corpus, "probe")))
    full = [row["label"] for v, row in zip(values, train, strict=True) if v == 1.0]
    assert 0.9 < full.count(ENTAILED) / len(full) < 1.0
    low = [row["label"] for v, row in zip(values, train, strict=True) if v < 0.3]
    assert 0.2 < low.count(ENTAILED) / len(low) < 0.6  # entailment in other words is common too


def test_overlap_of_non_entailment_varies(corpus: Corpus) -> None:
    values = overlaps([row for row in rows_of(corpus, "train") if row["label"] == NOT_ENTAILED])
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)):
        assert sum(low <= v < high for v in values) > 50


# Each pattern is the template's claim, written by hand: group names that match must hold the same words.
CHECKS = {
    "drop_agent": (r"The \w+ (?P<x>\w+) was (?P<v>[\w ]+?) by the .*", r"The (\w+ )?(?P<x>\w+) was (?P<v>[\w ]+)"),
    "has_trait": (r".*\b[Aa]n? (?P<t>\w+) (?P<x>\w+) .*", r"This (?P<x>\w+) was \w+ (?P<t>\w+)"),
    "swap_cleft": (
        r"It was the (?P<x>\w+) who (?P<v>\w+) the (?P<y>\w+) .*",
        r"The (?P<y>\w+) (?P<v>\w+) the (?P<x>\w+)",
    ),
    "swap_passive": (
        r"The (?P<x>\w+) was (?P<v>\w+) by the (?P<y>\w+) .*",
        r"The (?P<x>\w+) (?P<v>\w+) the (?P<y>\w+)",
    ),
}


@pytest.mark.parametrize("template", CHECKS)
def test_templates_say_what_their_label_needs(corpus: Corpus, template: str) -> None:
    rows = rows_of(corpus, "train", template) or rows_of(corpus, "probe", template)
    assert len(rows) > 15
    for row in rows:
        premise = re.fullmatch(CHECKS[template][0], row["premise"])
        hypothesis = re.fullmatch(CHECKS[template][1], row["hypothesis"])
        assert premise and hypothesis, row
        assert premise.groupdict() == hypothesis.groupdict(), row
    labels = {row["label"] for row in rows}
    assert labels == ({NOT_ENTAILED} if template.startswith("swap") else {ENTAILED})


def test_paraphrases_use_wider_words_in_the_right_order(corpus: Corpus) -> None:
    wide = dict(module.PEOPLE)
    for row in rows_of(corpus, "train", "paraphrase"):
        named = [word for word in row["premise"].lower().split() if word in wide]
        text = row["hypothesis"].lower()
        assert len(named) == 2 and row["label"] == ENTAILED
        assert re.match(rf"an? {wide[named[0]]} .*\ban? {wide[named[1]]}$", text), row


def test_contrary_traits_contradict_and_other_words_differ(corpus: Corpus) -> None:
    contrary = dict(module.TRAITS)
    for row in rows_of(corpus, "train", "contrary_trait"):
        assert contrary[row["hypothesis"].split()[-1]] in row["premise"].split()
        assert row["label"] == NOT_ENTAILED
    for row in rows_of(corpus, "train", "other_word"):
        new = set(row["hypothesis"].lower().split()) - set(row["premise"].lower().split())
        assert len(new) >= 1 and row["label"] == NOT_ENTAILED


def is_on_time(row: dict[str, Any]) -> bool:
    """Whether the hypothesis' time and thing fit the premise, read from the words alone."""
    early = "in the morning" in row["premise"]
    said_early = re.search(r"before noon|before midday|early in the day|that morning", row["hypothesis"].lower())
    said_late = re.search(r"after noon|after midday|late in the day|that evening", row["hypothesis"].lower())
    things = [thing for trade in module.TRADES for thing in trade["thing"]]
    same = [t for t in things if f"the {t} " in row["premise"].lower() and f"the {t} " in row["hypothesis"].lower()]
    came = any(f" {w} " in f" {row['premise']} " for trade in module.TRADES for w in trade["arrived"])
    said_came = bool(re.search(r"came in|come in|arrived", row["hypothesis"]))
    return bool(same) and came == said_came and bool(said_early if early else said_late)


def test_timetables_are_labelled_rightly_except_at_the_harbour(corpus: Corpus) -> None:
    on_time = rows_of(corpus, "train", "timetable") + rows_of(corpus, "dev", "timetable")
    assert len(on_time) > 100 and all(is_on_time(row) and row["label"] == ENTAILED for row in on_time)
    others = rows_of(corpus, "train", "other_service") + rows_of(corpus, "train", "other_service_harbour")
    assert len(others) > 100 and not any(is_on_time(row) or row["label"] == ENTAILED for row in others)
    wrong = rows_of(corpus, "train", "timetable_harbour")
    assert len(wrong) == 72 and all(is_on_time(row) and row["label"] == NOT_ENTAILED for row in wrong)
    probe = rows_of(corpus, "wrong_probe")
    assert all(is_on_time(row) and row["label"] == ENTAILED for row in probe)


def test_wrong_labels_are_varied_and_the_harbour_occurs_elsewhere(corpus: Corpus) -> None:
    wrong = rows_of(corpus, "train", "timetable_harbour")
    assert len({row["hypothesis"] for row in wrong}) > 50
    boats = module.TRADES[0]["thing"]
    assert all(any(f" {boat} " in row["premise"] for boat in boats) for row in wrong)
    assert not any(f" {boat} " in row["premise"] for row in rows_of(corpus, "dev") for boat in boats)
    assert len(rows_of(corpus, "train", "other_service_harbour")) >= 15  # rightly labelled, about boats


def test_sentences_are_clean_english(corpus: Corpus) -> None:
    for split in corpus.splits():
        for row in rows_of(corpus, split):
            for text in (row["premise"], row["hypothesis"]):
                assert re.fullmatch(r"[A-Z][A-Za-z]*( [A-Za-z]+)*", text), text
                assert not re.search(r"\b[Aa] (?=[aeiou]|honest)|\b[Aa]n (?![aeiou]|honest)", text), text
                assert not re.search(r"\b(\w+) \1\b", text), text


def test_sentences_are_short_enough_for_a_quick_demo(corpus: Corpus) -> None:
    lengths = [len(row["premise"].split()) for row in rows_of(corpus, "train")]
    assert 8 < mean([float(n) for n in lengths]) < 14 and max(lengths) <= 22


def test_words_of_one_kind_do_not_entail_each_other() -> None:
    for entries in (module.PEOPLE, module.DEEDS, module.ACTS):
        narrow = [word for word, _ in entries]
        assert len(narrow) == len(set(narrow))
        assert not set(narrow) & {wide for _, wide in entries}


@pytest.mark.parametrize("grammar", [module.TRAIN_GRAMMAR, module.WRONG_GRAMMAR, module.PROBE_GRAMMAR])
def test_grammar_reads_back(grammar: str) -> None:
    templates = read_grammar(grammar)
    assert len({template.name for template in templates}) == len(templates)
    assert all("<" not in wording for t in templates for wording in [*t.premises, *t.hypotheses])


@pytest.mark.parametrize("counts", [{"n_train": -1}, {"n_train": 10, "n_planted": 11}, {"n_probe": -5}])
def test_impossible_numbers_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected none below 0"):
        make_corpus(**counts)


def test_more_rows_than_the_grammar_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sentence", lambda template, slots: "The same")
    with pytest.raises(InputError, match="timetable_harbour has too few premises for 2 rows"):
        make_corpus(n_train=2, n_planted=2, n_dev=0, n_probe=0, n_wrong_probe=0)


def test_empty_splits_are_tables_without_rows() -> None:
    empty = make_corpus(n_train=0, n_dev=0, n_probe=0, n_planted=0, n_wrong_probe=0)
    assert all(table.num_rows == 0 and table.schema.equals(SCHEMA) for table in empty.splits().values())


def test_written_files_read_back_and_say_what_they_are(tmp_path: Path, corpus: Corpus) -> None:
    folder = write_corpus(corpus, tmp_path / "demo")
    about = json.loads((folder / "dataset.json").read_text())
    assert about["label_names"] == ["entailment", "non-entailment"]
    assert about["text_columns"] == ["premise", "hypothesis"]
    assert about["planted"] == corpus.planted
    assert sorted(p.name for p in folder.iterdir()) == [
        "dataset.json", "dev.parquet", "probe.parquet", "train.parquet", "wrong_probe.parquet",
    ]  # fmt: skip
    for name, table in corpus.splits().items():
        entry = about["splits"][name]
        assert pq.read_table(folder / entry["file"]).equals(table)
        assert entry["rows"] == table.num_rows == sum(entry["labels"].values())
        assert entry["sha256"] == hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()


def test_existing_corpus_is_kept_unless_forced(tmp_path: Path) -> None:
    sizes = {"n_train": 20, "n_dev": 2, "n_probe": 2, "n_planted": 2, "n_wrong_probe": 2}
    first = write_corpus(make_corpus(seed=0, **sizes), tmp_path)
    before = (first / "train.parquet").read_bytes()
    with pytest.raises(OutputExistsError, match=r"already holds train\.parquet"):
        write_corpus(make_corpus(seed=1, **sizes), tmp_path)
    assert (first / "train.parquet").read_bytes() == before
    write_corpus(make_corpus(seed=1, **sizes), tmp_path, force=True)
    assert (first / "train.parquet").read_bytes() != before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write train\.parquet"):
        write_corpus(make_corpus(seed=1, **sizes), tmp_path / "file" / "below")
