"""Training on several labels a row and on numbers: what is minimised is transformers' own loss; the run records it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tiny import sentences, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear.cli.main import run
from forebear.indexer.rows.row_format import MULTI_LABEL, REGRESSION
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.run import read_run

TEXTS = sentences(48)
LABELS = [[name for name in ("good", "bad", "film") if name in text.split()] for text in TEXTS]
NUMBERS = [float(len(text.split())) for text in TEXTS]
FAST = ("--lr", "3e-3", "--epochs", "6", "--batch-size", "8", "--precision", "fp32", "--device", "cpu")


def trained(folder: Path, model: str, targets: list[Any], *options: str, first: int = 0) -> Path:
    train = write_jsonl(folder / f"train-{first}.jsonl", text=TEXTS[first:], label=targets[first:])
    dev = write_jsonl(folder / "dev.jsonl", text=TEXTS[:16], label=targets[:16])
    out = folder / f"run-{first}"
    call = ["train", "--data", str(train), "--dev", str(dev), "--model", model, "--out", str(out), *FAST, *options]
    assert run(call) == 0
    return out


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(TEXTS[:16], padding=True, return_tensors="pt")).logits.double()


def test_several_labels_are_learnt_and_measured(tmp_path: Path, tiny_model: Callable[..., str], capsys) -> None:
    folder = trained(tmp_path, tiny_model(), LABELS)
    found = read_run(folder)
    assert found is not None
    config = json.loads((folder / found.checkpoints[-1].path / "config.json").read_text())
    assert config["problem_type"] == found.settings["problem_type"] == MULTI_LABEL
    assert found.label_names == ("bad", "film", "good")
    losses = [checkpoint.train_loss for checkpoint in found.checkpoints]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.8 * losses[0]
    predicted = (logits_of(folder / found.checkpoints[-1].path) > 0).numpy()
    there = np.array([[name in names for name in found.label_names] for names in LABELS[:16]])
    measures = found.checkpoints[-1].measures
    assert measures is not None
    assert measures["micro-F1"] == pytest.approx(f1_score(there, predicted, average="micro", zero_division=1.0))
    assert measures["subset accuracy"] == pytest.approx((there == predicted).all(axis=1).mean())
    assert "dev micro-F1" in capsys.readouterr().err
    assert choose_model(str(folder)).problem_type == MULTI_LABEL
    assert choose_model(str(folder / found.checkpoints[-1].path)).problem_type == MULTI_LABEL


def test_numbers_are_learnt_and_measured(tmp_path: Path, tiny_model: Callable[..., str]) -> None:
    folder = trained(tmp_path, tiny_model(), NUMBERS, "--problem-type", "regression")
    found = read_run(folder)
    assert found is not None
    assert (found.settings["problem_type"], found.label_names) == (REGRESSION, ("label",))
    predicted = logits_of(folder / found.checkpoints[-1].path).numpy()[:, 0]
    measures = found.checkpoints[-1].measures
    assert measures is not None
    assert measures["RMSE"] == pytest.approx(np.sqrt(np.mean((predicted - NUMBERS[:16]) ** 2)), rel=1e-5)
    assert measures["correlation"] == pytest.approx(np.corrcoef(predicted, NUMBERS[:16])[0, 1], rel=1e-3)


@pytest.mark.parametrize(("targets", "options"), [(LABELS, ()), (NUMBERS, ("--problem-type", "regression"))])
def test_the_first_loss_is_that_of_transformers(targets, options, tmp_path: Path, tiny_model) -> None:
    """With one batch and no dropout, the mean loss of the first epoch is what transformers computes from labels."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=3 if targets is LABELS else 1,
                                                               ignore_mismatched_sizes=True)  # fmt: skip
    model.config.problem_type = MULTI_LABEL if targets is LABELS else REGRESSION
    names = ("bad", "film", "good") if targets is LABELS else ("label",)
    model.config.id2label = dict(enumerate(names))
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    start, tokenizer = tmp_path / "start", AutoTokenizer.from_pretrained(tiny_model())
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    wanted = [[float(name in row) for name in names] if isinstance(row, list) else row for row in targets]
    loss = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=torch.tensor(wanted)).loss
    folder = trained(tmp_path, str(start), targets, "--epochs", "1", "--batch-size", "48", *options)
    found = read_run(folder)
    assert found is not None
    assert found.settings["head"] == "kept"
    assert found.checkpoints[0].train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_what_is_of_one_label_is_refused_by_name(tmp_path: Path, tiny_model, capsys) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", text=TEXTS, label=LABELS)
    for option in (["--class-weights", "balanced"], ["--label-smoothing", "0.1"], ["--labels", "binary-nli"]):
        out = tmp_path / "out"
        assert run(["train", "--data", str(data), "--model", tiny_model(), "--out", str(out), *option]) == 2
        assert f"{option[0]}" in capsys.readouterr().err
        assert not list(out.glob("*"))
