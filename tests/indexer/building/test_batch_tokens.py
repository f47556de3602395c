"""``--batch-tokens auto``: a number by the time it is stored, which a resumed build keeps."""

from __future__ import annotations

import pytest
from tiny import labels, sentences

from forebear import BuildOptions, Index, append_rows, build_index, choose_model, rows_from_texts, verify_index
from forebear.errors import InputError
from forebear.indexer.building import build
from forebear.indexer.model.classifier import Classifier

SOURCE = rows_from_texts(sentences(20), labels(20))


def make(folder, tiny_model, *, resume: bool = False, **choices) -> Index:
    checkpoints = choose_model(tiny_model()).checkpoints
    return build_index(SOURCE, folder, checkpoints, BuildOptions(device="cpu", **choices), resume=resume)


def test_the_number_of_a_cpu_is_stored(tmp_path, tiny_model):
    assert make(tmp_path / "i", tiny_model).manifest.spec.batch_tokens == 4096
    assert make(tmp_path / "j", tiny_model, batch_tokens=64).manifest.spec.batch_tokens == 64


def test_a_resumed_build_takes_the_number_that_it_was_begun_with(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(Classifier, "batch_tokens", lambda _self, on_cpu=4096: 8192)

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "finish_build", interrupted)
        make(tmp_path / "i", tiny_model)
    monkeypatch.setattr(Classifier, "batch_tokens", lambda _self, on_cpu=4096: 4096)
    assert make(tmp_path / "i", tiny_model, resume=True).manifest.spec.batch_tokens == 8192
    assert make(tmp_path / "i", tiny_model, resume=True).manifest.spec.batch_tokens == 8192  # nothing was left to do


def test_another_kind_of_device_takes_no_larger_batches_than_any(tmp_path, tiny_model):
    built = make(tmp_path / "i", tiny_model, batch_tokens=65_536).manifest
    assert built.spec_on("cpu").batch_tokens == 65_536
    assert built.spec_on("NVIDIA H200").batch_tokens == 4096
    assert make(tmp_path / "j", tiny_model, batch_tokens=32).manifest.spec_on("NVIDIA H200").batch_tokens == 32


def test_rows_are_appended_and_verified_with_the_stored_number(tmp_path, tiny_model):
    make(tmp_path / "i", tiny_model, batch_tokens=64)
    appended = append_rows(tmp_path / "i", rows_from_texts(sentences(6, seed=9), labels(6)), device="cpu")
    assert appended.manifest.spec.batch_tokens == 64
    assert verify_index(tmp_path / "i", n_rows=5, device="cpu").problems == ()


@pytest.mark.parametrize("given", [0, -3, "many"])
def test_what_is_no_number_of_word_pieces_is_refused(given):
    with pytest.raises(InputError, match=f"batch_tokens.*{given}"):
        BuildOptions(batch_tokens=given).check()
