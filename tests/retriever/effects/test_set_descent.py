"""Effects of TracIn in a run of plain SGD, beside the same descent by a loop of torch without the row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
from forebear import ForebearCallback
from forebear.errors import MismatchError

N_ROWS, BATCH, EPOCHS, RATE = 24, 4, 3, 2e-3
TEXTS, LABELS, QUERIES = sentences(N_ROWS), labels(N_ROWS), sentences(4, seed=9)


class Course:
    """A course of Trainer in which the head's weight alone learns, and an index of all its checkpoints."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        start = make_tiny_model(folder / "start")
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        self.model = AutoModelForSequenceClassification.from_pretrained(start, **still)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name == "classifier.weight")
        self.words, self.folder = AutoTokenizer.from_pretrained(start), folder / "run"
        self.begin = self.model.classifier.weight.detach().double().clone()
        examples = [
            {**self.words(text, truncation=True, max_length=20), "labels": label}
            for text, label in zip(TEXTS, LABELS, strict=True)
        ]
        chosen = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"} | settings
        arguments = TrainingArguments(
            str(self.folder), per_device_train_batch_size=BATCH, learning_rate=RATE, num_train_epochs=EPOCHS,
            save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True, log_level="error", **chosen,
        )  # fmt: skip
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
        Trainer(
            model=self.model, args=arguments, train_dataset=examples, data_collator=DataCollatorWithPadding(self.words),
            processing_class=self.words, callbacks=[ForebearCallback(rows, max_length=20)],
        ).train()  # fmt: skip
        quiet: Any = {"dampings": (), "warn": lambda _line: None}
        self.index = forebear.Index.build(self.folder, rows, folder / "index", checkpoints=("all",), **quiet)
        self.last = forebear.Index.build(self.folder, rows, folder / "last", **quiet)

    def inputs_of_the_head(self, texts: list[str]) -> torch.Tensor:
        """By transformers alone, ``(n, h)`` float64."""
        encoded = self.words(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
        with torch.no_grad():
            return self.model.eval().bert(**encoded).pooler_output.double()

    def losses_after(self, left_out: int | None, targets: torch.Tensor) -> torch.Tensor:
        """Losses of the queries after plain descent in batches; a row that is left out keeps its place there."""
        features, y, weight = self.inputs_of_the_head(TEXTS), torch.tensor(LABELS), self.begin.clone()
        bias, order = self.model.classifier.bias.detach().double(), torch.Generator().manual_seed(3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(N_ROWS, generator=order).split(BATCH):
                batch = batch[batch != left_out] if left_out is not None else batch
                at = weight.clone().requires_grad_()
                loss = torch.nn.functional.cross_entropy(features[batch] @ at.T + bias, y[batch], reduction="sum")
                weight = weight - RATE * torch.autograd.grad(loss / BATCH, at)[0]
        logits = self.inputs_of_the_head(QUERIES) @ weight.T + bias
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("descent"))


def asked(index: forebear.Index, model: Path | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    retriever = forebear.Retriever(index, model=None if model is None else str(model))
    table = retriever.retrieve(QUERIES, methods=["tracin"], top=N_ROWS)
    return table.to_pylist(), json.loads(table.schema.metadata[b"forebear"])["methods"]["tracin"]


def test_effects_of_tracin_foretell_the_descent_without_the_row(course: Course) -> None:
    results, facts = asked(course.index)
    assert facts["effect"] == "first order"
    assert "its own steps left out, by the weights of scope head alone" in facts["effect_note"]
    with torch.no_grad():
        encoded = course.words(QUERIES, truncation=True, max_length=20, padding=True, return_tensors="pt")
        targets = course.model.eval()(**encoded).logits.argmax(dim=1)
    whole = course.losses_after(None, targets)
    truth = np.stack([(course.losses_after(n, targets) - whole).numpy() for n in range(N_ROWS)], axis=1)
    found = np.zeros_like(truth)
    for result in results:
        found[result["query"], result["row"]] = result["effect"]
    assert np.abs(truth).max() > 1e-5
    assert np.abs(found - truth).max() < 0.03 * np.abs(truth).max()
    p = np.exp(-whole.numpy())
    changes = {(r["query"], r["row"]): r["effect_probability"] for r in results}
    for (query, row), change in changes.items():
        assert change == pytest.approx(p[query] * np.expm1(-truth[query, row]), abs=0.03 * np.abs(truth).max())


def test_a_run_that_has_moved_is_read_where_model_says(course: Course, tmp_path: Path) -> None:
    expected, _ = asked(course.index)
    moved = shutil.copytree(course.folder, tmp_path / "moved")
    away = course.folder.rename(course.folder.with_name("away"))
    try:
        results, facts = asked(course.index, moved)
        assert [r["effect"] for r in results] == [r["effect"] for r in expected]
        assert facts["effect"] == "first order"
        last = Path(json.loads((moved / "run.json").read_text())["checkpoints"][-1]["path"])
        assert course.last.at(str(moved / last)).run[0] == moved.resolve()

        # A run by other steps lies where the run lay: the one that --model names counts.
        shutil.copytree(away, course.folder)
        run = json.loads((course.folder / "run.json").read_text())
        run["settings"]["optimizer"]["name"] = "AdamW"
        (course.folder / "run.json").write_text(json.dumps(run))
        assert asked(course.index, moved)[1]["effect"] == "first order"
        assert "training took others" in asked(course.index)[1]["effect_note"]

        # Another run is not taken for that of the index.
        shutil.copytree(moved / run["checkpoints"][0]["path"], moved / last, dirs_exist_ok=True)
        with pytest.raises(MismatchError, match="is not the one of the index"):
            asked(course.index, moved)
    finally:
        shutil.rmtree(course.folder, ignore_errors=True)
        away.rename(course.folder)


def test_a_trainers_run_records_its_optimizer(course: Course) -> None:
    run = json.loads((course.folder / "run.json").read_text())
    expected = {"name": "SGD", "momentum": 0.0, "weight_decay": 0.0, "several_rates": False}
    assert run["settings"]["optimizer"] == expected


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("optimizer.name", "AdamW", "training took others"),
        ("optimizer.momentum", 0.9, "training had momentum"),
        ("optimizer.weight_decay", 0.01, "training had weight decay"),
        ("optimizer.several_rates", True, "training had several rates"),
        ("optimizer", None, "run.json does not say which training took"),
        ("optimizer", {}, "run.json does not say which training took"),
        ("optimizer", "adamw", "training took others"),
        ("max_grad_norm", 1.0, "may have cut them"),
        ("class_weights", [1.0, 2.0], "class weights"),
    ],
)
def test_other_runs_have_no_effects_of_tracin_and_say_why(course: Course, place: str, value: Any, reason: str) -> None:
    path = course.folder / "run.json"
    before = path.read_text()
    run = json.loads(before)
    *inner, name = place.split(".")
    within = run["settings"][inner[0]] if inner else run["settings"]
    within[name] = value
    try:
        path.write_text(json.dumps(run))
        results, facts = asked(course.index)
    finally:
        path.write_text(before)
    assert "effect" not in results[0]
    assert facts["effect"] is None
    assert facts["effect_note"].startswith("no effect: ")
    assert reason in facts["effect_note"]


def test_the_last_checkpoint_alone_says_nothing_of_the_run(course: Course) -> None:
    results, facts = asked(course.last)
    assert "effect" not in results[0]
    assert "all checkpoints of the run" in facts["effect_note"]
