"""Models in memory, straight into an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import labels, make_tiny_model, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear import Index, InputError, MismatchError, OutputExistsError, Retriever

ROWS = (sentences(20), labels(20))


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder, and the model and tokenizer in it."""
    folder = make_tiny_model(tmp_path / "tiny")
    return folder, AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def build(model: Any, out: Path, tokenizer: Any = None, **choices: Any) -> Index:
    return Index.build(model, ROWS[0], out, ROWS[1], tokenizer=tokenizer, warn=lambda _line: None, **choices)


def test_a_model_in_memory_is_indexed_like_its_folder(given: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, tokenizer = given
    by_folder, by_model = build(folder, tmp_path / "a"), build(model, tmp_path / "b", tokenizer)
    assert by_model.manifest.checkpoints[0].sha256 == by_folder.manifest.checkpoints[0].sha256
    assert by_model.manifest.spec.tokenizer_sha256 == by_folder.manifest.spec.tokenizer_sha256
    assert Path(by_model.manifest.checkpoints[0].path) == tmp_path / "b-model"
    found, truth = (Retriever(i).retrieve(["a good film"]).select(["row", "score"]) for i in (by_model, by_folder))
    assert found.to_pylist() == truth.to_pylist()


def test_a_model_that_is_kept_is_not_lost(given: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, tokenizer = given
    build(model, tmp_path / "index", tokenizer)
    with pytest.raises(OutputExistsError, match="index holds an index"):
        build(model, tmp_path / "index", tokenizer)
    build(model, tmp_path / "index", tokenizer, resume=True)
    stored = (tmp_path / "index-model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    with pytest.raises(MismatchError, match="another model"):
        build(model, tmp_path / "index", tokenizer, resume=True)
    assert (tmp_path / "index-model" / "model.safetensors").read_bytes() == stored
    build(model, tmp_path / "index", tokenizer, force=True)
    assert (tmp_path / "index-model" / "model.safetensors").read_bytes() != stored
    (tmp_path / "other-model").mkdir()
    (tmp_path / "other-model" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputExistsError, match="other-model"):
        build(model, tmp_path / "other", tokenizer, force=True)
    assert (tmp_path / "other-model" / "thesis.txt").read_text() == "all of it"


def test_what_is_no_model_is_refused(given: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, tokenizer = given
    with pytest.raises(InputError, match="expected a folder or hub name"):
        build(torch.nn.Linear(2, 2), tmp_path / "index", tokenizer)
    with pytest.raises(InputError, match="tokenizer of the model is not given"):
        build(model, tmp_path / "index")
    with pytest.raises(InputError, match="a str; expected a folder"):
        build(str(tmp_path / "tiny"), tmp_path / "index", tokenizer)
    assert not (tmp_path / "index").exists() and not (tmp_path / "index-model").exists()
