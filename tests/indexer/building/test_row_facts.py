"""What is told of an index's rows: accuracy beside the run's, unknown word pieces, rows that are cut."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from places import GOLDEN
from tiny import WORDS, labels, make_tiny_model, sentences, without_tokenizer, write_jsonl
from transformers import AutoTokenizer
from warm import run_command

from forebear.errors import ModelError
from forebear.indexer.building.build import BuildOptions, append_rows, build_index, retire_rows
from forebear.indexer.building.row_facts import RowFacts, row_facts
from forebear.indexer.index import Index
from forebear.indexer.model.network.batches import tokenize
from forebear.indexer.model.reading import Reading, count_reading
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model


def forebear(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command(arguments)


def learnable(n: int) -> tuple[list[str], list[str]]:
    """Texts whose first word gives their label away."""
    gold = ["no" if label else "yes" for label in labels(n)]
    return [f"{'bad' if g == 'no' else 'good'} {t}" for g, t in zip(gold, sentences(n), strict=True)], gold


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt its rows, on rows.jsonl and dev.jsonl beside it."""
    folder = tmp_path_factory.mktemp("run")
    for name, n in (("rows", 120), ("dev", 40)):
        texts, gold = learnable(n)
        write_jsonl(folder / f"{name}.jsonl", text=texts, label=gold)
    start = make_tiny_model(folder / "start", scale=2.0)
    options = TrainOptions(epochs=5, learning_rate=5e-3, batch_size=8, precision="fp32", device="cpu")
    rows, dev = (open_rows(folder / f"{name}.jsonl") for name in ("rows", "dev"))
    train(rows, start, folder / "run", options, dev=dev)
    return folder


@pytest.mark.slow
def test_a_build_and_info_tell_accuracy_beside_the_run_s_and_what_is_read(run, tmp_path):
    done = forebear("index", "--model", run / "run", "--train", run / "rows.jsonl", "--out", tmp_path / "i")
    assert done.returncode == 0, done.stderr
    facts = row_facts(Index.open(tmp_path / "i"))
    recorded = json.loads((run / "run" / "run.json").read_text())["checkpoints"][-1]
    assert (facts.dev_accuracy, facts.train_loss) == (recorded["accuracy"], recorded["train_loss"])
    assert facts.accuracy == 1.0
    line = f"accuracy on the indexed rows 100.0% ({recorded['accuracy']:.1%} on the run's development rows; "
    read = "0.0% of word pieces unknown to the tokenizer, 0.0% of rows cut at 40 word pieces"
    for told in (done.stderr, " ".join(forebear("info", tmp_path / "i").stdout.split())):
        assert line in told
        assert read in told
        assert "warning" not in told
    stated = json.loads(forebear("info", "--json", tmp_path / "i").stdout)["row_facts"]
    assert (stated["accuracy"], stated["reading"]["n_rows"], stated["warnings"]) == (1.0, 120, [])


@pytest.mark.slow
def test_labels_in_another_order_are_remarked_on(run, tmp_path):
    texts, gold = learnable(60)
    turned = [{"yes": "no", "no": "yes"}[g] for g in gold]
    path = write_jsonl(tmp_path / "turned.jsonl", text=texts, label=turned)
    done = forebear("index", "--quiet", "--model", run / "run", "--train", path, "--out", tmp_path / "i")
    assert done.returncode == 0
    assert "warning: the model predicts the label of 0.0% of the indexed rows" in done.stderr
    assert "--label-names" in done.stderr


def test_a_model_far_below_its_run_is_remarked_on():
    known = {"mean_loss": 1.0, "most_frequent": 0.25, "train_loss": 0.3, "max_length": 128, "reading": Reading(1, 1)}
    assert not RowFacts(accuracy=0.8, dev_accuracy=0.9, **known).warnings()
    (found,) = RowFacts(accuracy=0.7, dev_accuracy=0.9, **known).warnings()
    assert "70.0% of the indexed rows (it had 90.0% on its run's development rows)" in found
    assert not RowFacts(accuracy=0.7, dev_accuracy=None, **known).warnings()


@pytest.mark.parametrize(
    ("accuracy", "most_frequent", "dev", "warned"),
    [
        (0.97, 0.97, 0.97, False),  # one rare label: as good as on its development rows
        (0.97, 0.97, None, True),  # of no run: no better than naming one label
        (0.5, 0.5, 0.55, False),
        (0.3, 0.5, 0.9, True),
        (0.95, 1.0, None, False),  # rows of one label say nothing of chance
        (0.95, 1.0, 0.96, False),
        (0.2, 1.0, 0.96, True),
    ],
)
def test_what_the_most_frequent_label_says_is_heeded_where_nothing_better_is_known(
    accuracy, most_frequent, dev, warned
):
    facts = RowFacts(
        accuracy=accuracy, mean_loss=1.0, most_frequent=most_frequent, dev_accuracy=dev, train_loss=None,
        max_length=128, reading=None,
    )  # fmt: skip
    assert bool(facts.warnings()) == warned


@pytest.mark.slow
def test_unknown_words_and_cut_rows_are_counted_and_remarked_on(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    texts = ["good film unheard", "good " * 50, "actor", "unseen unheard of"]
    path = write_jsonl(tmp_path / "rows.jsonl", text=texts, label=["LABEL_0", "LABEL_1", "LABEL_0", "LABEL_1"])
    done = forebear("index", "--quiet", "--model", folder, "--train", path, "--out", tmp_path / "i", "--max-length", 9)
    assert done.returncode == 0, done.stderr
    # 3 + 7 + 1 + 3 word pieces without start and end tokens; "unheard", "unseen", "unheard", "of" are unknown.
    assert row_facts(Index.open(tmp_path / "i")).reading == Reading(n_rows=4, n_pieces=14, n_unknown=4, n_cut=1)
    assert "warning: 28.6% of the word pieces of the indexed rows are unknown to the tokenizer" in done.stderr
    assert "warning: 25.0% of the indexed rows (1 of 4) are longer than 9 word pieces" in done.stderr
    asked = forebear("retrieve", "--index", tmp_path / "i", "--test", path, "--out", tmp_path / "o.jsonl", "--quiet")
    assert asked.returncode == 0, asked.stderr
    assert "warning: 28.6% of the word pieces of the test rows are unknown" in asked.stderr
    assert "warning: 25.0% of the test rows (1 of 4) are longer than 9 word pieces" in asked.stderr


def test_a_few_cut_rows_are_counted_and_many_are_given_advice():
    few = Reading(n_rows=2000, n_pieces=9000, n_cut=3)
    assert few.warnings(128, "the rows") == [
        "0.1% of the rows (3 of 2,000) are longer than 128 word pieces, and the model does not see the rest."
    ]
    (many,) = Reading(n_rows=10, n_pieces=900, n_cut=2).warnings(128, "the rows")
    assert "(2 of 10)" in many
    assert "larger max_length=" in many
    assert Reading(n_rows=10, n_pieces=900).warnings(128, "the rows") == []


def test_of_many_test_rows_the_first_are_looked_at_once_before_the_work(tmp_path, monkeypatch, capsys):
    from forebear.cli import main as command
    from forebear.indexer.building import row_facts as module
    from forebear.retriever.retriever import Retriever

    index = tmp_path / "i"
    texts, gold = sentences(20), labels(20)
    chosen = choose_model(str(make_tiny_model(tmp_path / "m"))).checkpoints
    build_index(rows_from_texts(texts, gold), index, chosen, BuildOptions(dampings=()))
    path = write_jsonl(tmp_path / "rows.jsonl", text=["good " * 60] * 1500)
    events: list[object] = []
    whole, answers = module.encode, Retriever.answers
    monkeypatch.setattr(module, "encode", lambda c, texts: events.append(len(texts[0])) or whole(c, texts))
    monkeypatch.setattr(Retriever, "answers", lambda *a, **k: events.append("asked") or answers(*a, **k))
    arguments = ["retrieve", "--index", index, "--test", path, "--out", tmp_path / "o.jsonl", "--quiet", "--top", 1]
    assert command.run([str(argument) for argument in arguments]) == 0
    assert events == [1024, "asked"]
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: 100.0% of the first 1,024 test rows (1,024 of 1,024) are longer than 40 word pieces" in told


@pytest.mark.slow
def test_training_tells_of_cut_rows_before_its_first_step(tmp_path):
    texts, gold = learnable(40)
    path = write_jsonl(tmp_path / "rows.jsonl", text=[f"{t} {'film ' * 30}" for t in texts], label=gold)
    start = make_tiny_model(tmp_path / "start")
    done = forebear(
        "train",
        "--quiet",
        "--data",
        path,
        "--model",
        start,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--max-length",
        20,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: 100.0% of the rows of" in done.stderr
    assert "longer than 20 word pieces" in done.stderr


def test_counts_add_up_over_shards_appends_and_pairs(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    texts = [*sentences(30), "good " * 60, "odd words here"]
    chosen = choose_model(str(folder)).checkpoints
    found = []
    for shard_rows in (7, 4096):
        out = tmp_path / f"i-{shard_rows}"
        rows = rows_from_texts(texts[:20], labels(20))
        index = build_index(rows, out, chosen, BuildOptions(shard_rows=shard_rows))
        index = append_rows(out, rows_from_texts(texts[20:], labels(12)))
        found.append(row_facts(index).reading)
        assert row_facts(retire_rows(out, [1, 31])).reading == found[-1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found[0] == found[1] == count_reading(tokenizer, [texts], tokenize(tokenizer, [texts], 40), 40)
    pairs = [["good", "unheard"], ["film " * 60, "bad"]]
    assert count_reading(tokenizer, pairs, tokenize(tokenizer, pairs, 40), 40) == Reading(2, 39, 1, 1)


def test_an_index_of_an_older_version_tells_what_is_known():
    golden = GOLDEN / "index"
    facts = row_facts(Index.open(golden))
    assert facts.reading is None
    index = Index.open(golden)
    assert facts.accuracy == np.mean(index.predictions[index.live] == index.labels[index.live])
    assert len(facts.describe()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["index", "train"])
def test_a_model_without_its_tokenizer_files_is_refused_by_the_command(command, tmp_path):
    """It used to be indexed with a tokenizer of five special tokens, under which every word is unknown."""
    folder = without_tokenizer(make_tiny_model(tmp_path / "m"))
    rows = write_jsonl(tmp_path / "rows.jsonl", text=WORDS[:4], label=["LABEL_0", "LABEL_1"] * 2)
    given = "--train" if command == "index" else "--data"
    done = forebear(command, "--model", folder, given, rows, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "holds no vocabulary" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    shutil.copy(make_tiny_model(tmp_path / "whole") / "tokenizer.json", folder)
    assert (
        "holds no vocabulary" not in forebear(command, "--model", folder, given, rows, "--out", tmp_path / "o").stderr
    )


def test_the_sentence_model_needs_its_tokenizer_too(tmp_path):
    from forebear.indexer.model.sentence_encoder import load_sentence_encoder

    with pytest.raises(ModelError, match="holds no vocabulary"):
        load_sentence_encoder(str(without_tokenizer(make_tiny_model(tmp_path / "m"))))


@pytest.mark.parametrize(
    ("command", "told"),
    [("index", "the model's limit, or 512 if it has none"), ("train", "128"), ("retrieve", "max-length")],
)
def test_help_names_the_default_length(command, told):
    assert told in " ".join(forebear(command, "--help").stdout.replace("│", " ").split())
