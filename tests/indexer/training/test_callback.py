"""A course of transformers' Trainer with a ForebearCallback: its folder is a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import labels, make_tiny_model, sentences
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import forebear
from forebear import ForebearCallback, choose_model
from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.retraining.recipes import find_run
from forebear.indexer.training.run import read_run

N_ROWS, BATCH = 24, 4
PEAK = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def training_rows() -> pa.Table:
    return pa.table({"text": sentences(N_ROWS), "label": labels(N_ROWS)})


def trainer(model: Path, out: Path, *callbacks: ForebearCallback, tokenizer: Any = None, **settings: Any) -> Trainer:
    """Of 6 steps an epoch, with a linear decay from PEAK to 0."""
    words = AutoTokenizer.from_pretrained(model)
    examples = [
        {**words(text, truncation=True, max_length=20), "labels": label}
        for text, label in zip(sentences(N_ROWS), labels(N_ROWS), strict=True)
    ]
    torch.manual_seed(0)
    chosen = {"num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 1} | settings
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=BATCH, learning_rate=PEAK, report_to=[], use_cpu=True, disable_tqdm=True,
        log_level="error", **chosen,
    )  # fmt: skip
    return Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(model), args=arguments, train_dataset=examples,
        data_collator=DataCollatorWithPadding(words), processing_class=words if tokenizer is None else None,
        callbacks=list(callbacks),
    )  # fmt: skip


def rates(n_steps: int) -> np.ndarray:
    return PEAK * (1 - np.arange(n_steps) / n_steps)


def test_a_trainers_folder_is_a_run(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "run", ForebearCallback(training_rows(), max_length=20)).train()
    found = read_run(tmp_path / "run")
    assert found is not None
    assert [c.path for c in found.checkpoints] == ["checkpoint-6", "checkpoint-12"]
    expected = [rates(12)[:6].mean(), rates(12)[6:].mean()]
    assert [c.eta for c in found.checkpoints] == pytest.approx(expected, rel=1e-9)
    assert all(0 < (c.train_loss or 0) < 2 for c in found.checkpoints)
    assert (found.max_length, found.text_columns, found.label_names) == (20, ("text",), ("LABEL_0", "LABEL_1"))
    assert found.data_sha256 == forebear.open_rows(training_rows()).sha256()
    assert found.settings["optimizer"]["name"] == "AdamW"
    index = forebear.Index.build(
        tmp_path / "run", training_rows(), tmp_path / "index", checkpoints=("all",), warn=lambda _line: None
    )
    assert [c.eta for c in index.manifest.checkpoints] == pytest.approx(expected, rel=1e-9)
    assert index.manifest.spec.max_length == 20
    with pytest.raises(InputError, match="cannot be repeated"):
        find_run(index, None)


def test_the_loss_of_the_script_is_the_runs(model: Path, tmp_path: Path) -> None:
    callback = ForebearCallback(training_rows(), class_weights=(1, 2.5))
    trainer(model, tmp_path / "run", callback, num_train_epochs=1, label_smoothing_factor=0.1).train()
    chosen = choose_model(str(tmp_path / "run"))
    assert chosen.loss_choices == {"class_weights": (1.0, 2.5), "label_smoothing": 0.1}
    with pytest.raises(InputError, match="class_weights"):
        ForebearCallback(training_rows(), class_weights=(1, -1))


def test_a_trainers_checkpoint_given_alone_has_the_loss_of_its_run(model: Path, tmp_path: Path) -> None:
    callback = ForebearCallback(training_rows(), class_weights=(0.5, 1.5))
    trainer(model, tmp_path / "run", callback, label_smoothing_factor=0.1).train()
    index = forebear.Index.build(
        tmp_path / "run" / "checkpoint-12", training_rows(), tmp_path / "index", dampings=(), warn=lambda _line: None
    )
    spec = index.manifest.spec
    assert (spec.class_weights, spec.label_smoothing, spec.max_length) == ((0.5, 1.5), 0.1, 20)
    assert index.manifest.checkpoints[0].name == "checkpoint-12"


def test_the_length_at_which_the_tokenizer_cut_is_the_runs(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "run", ForebearCallback(training_rows()), num_train_epochs=1).train()
    assert choose_model(str(tmp_path / "run")).max_length == 20


def test_a_model_that_trainer_does_not_save_is_saved_at_the_end(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "run", ForebearCallback(training_rows()), save_strategy="no", num_train_epochs=1).train()
    found = read_run(tmp_path / "run")
    assert found is not None
    assert [c.path for c in found.checkpoints] == ["checkpoint-6"]
    assert found.checkpoints[0].eta == pytest.approx(rates(6).mean())


def test_rates_of_checkpoints_that_trainer_removed_count_for_the_next(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path / "run", ForebearCallback(training_rows()), save_total_limit=1).train()
    found = read_run(tmp_path / "run")
    assert found is not None
    assert [c.path for c in found.checkpoints] == ["checkpoint-12"]
    assert found.checkpoints[0].eta == pytest.approx(rates(12).mean())


def test_a_course_that_is_resumed_has_the_rates_of_its_beginning(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer(model, folder, ForebearCallback(training_rows())).train()
    whole = read_run(folder)
    shutil.rmtree(folder / "checkpoint-12")
    trainer(model, folder, ForebearCallback(training_rows())).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    found = read_run(folder)
    assert whole is not None and found is not None
    assert [c.eta for c in found.checkpoints] == pytest.approx([c.eta for c in whole.checkpoints])
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match="resumed at step 6"):
        trainer(model, folder, ForebearCallback(training_rows())).train(
            resume_from_checkpoint=str(folder / "checkpoint-6")
        )


def test_without_a_tokenizer_nothing_is_trained(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="processing_class"):
        trainer(model, tmp_path / "run", ForebearCallback(training_rows()), tokenizer="none").train()
    words = AutoTokenizer.from_pretrained(model)
    callback = ForebearCallback(training_rows(), tokenizer=words)
    trainer(model, tmp_path / "run", callback, tokenizer="none", num_train_epochs=1).train()
    assert (tmp_path / "run" / "checkpoint-6" / "tokenizer.json").is_file()


def test_trainers_checkpoints_are_indexed_like_those_of_a_run(model: Path, tmp_path: Path) -> None:
    """The same weights and rates, once as forebear train leaves them, once as Trainer does."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in training_rows().to_pylist()))
    options = ["--epochs", "2", "--batch-size", "4", "--max-length", "20", "--quiet"]
    assert run(["train", "--data", str(rows), "--model", str(model), "--out", str(tmp_path / "run"), *options]) == 0
    found = read_run(tmp_path / "run")
    assert found is not None
    history: list[dict[str, float]] = []
    for checkpoint in found.checkpoints:
        folder = tmp_path / "trainer" / f"checkpoint-{checkpoint.step}"
        shutil.copytree(tmp_path / "run" / checkpoint.path, folder)
        history.append({"step": checkpoint.step, "learning_rate": checkpoint.eta})
        state = {"global_step": checkpoint.step, "log_history": history}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    answers = []
    for name in ("run", "trainer"):
        index = forebear.Index.build(
            tmp_path / name, rows, tmp_path / f"index-{name}", checkpoints=("all",), max_length=20, warn=lambda _l: None
        )
        table = forebear.Retriever(index).retrieve(["a good film"], methods=["tracin", "gd"], top=N_ROWS)
        answers.append(table.select(["method", "row", "score"]).to_pylist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_trainer_of_several_labels_or_numbers_leaves_a_run_of_them(kind: str, tmp_path: Path) -> None:
    several = kind == "multi_label_classification"
    model = make_tiny_model(tmp_path / "model", n_classes=3 if several else 1)
    rng = np.random.default_rng(0)
    targets: list[Any] = rng.random(N_ROWS).tolist()
    if several:
        targets = rng.integers(2, size=(N_ROWS, 3)).astype(float).tolist()
    rows = [{"text": text, "label": target} for text, target in zip(sentences(N_ROWS), targets, strict=True)]
    names = {"label_names": ["a", "b", "c"]} if several else {}
    callback = ForebearCallback(rows, max_length=20, problem_type=kind, **names)
    course = trainer(model, tmp_path / "run", callback, num_train_epochs=1)
    course.model.config.problem_type = kind
    course.train_dataset = [
        {**example, "labels": target} for example, target in zip(course.train_dataset, targets, strict=True)
    ]
    course.train()
    chosen = choose_model(str(tmp_path / "run"))
    assert chosen.problem_type == kind
    index = forebear.Index.build(chosen, rows, tmp_path / "index", warn=lambda _line: None, **names)
    assert index.manifest.spec.problem_type == kind
    assert index.manifest.spec.label_names == (("a", "b", "c") if several else ("label",))
    np.testing.assert_allclose(index.targets(np.arange(N_ROWS)), np.reshape(targets, (N_ROWS, -1)))
