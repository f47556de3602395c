"""Which device a name stands for, and that tests run on the CPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.retraining.recipe_full import FullRecipe
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.training import fine_tuning

PICK = "from forebear.indexer.model.device.picking import pick_device; print(pick_device())"


@pytest.fixture
def two_gpus(monkeypatch):
    """A torch that sees two CUDA devices; nothing can be run on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_the_first_gpu_where_there_is_one_and_nothing_else_is_said(two_gpus, monkeypatch):
    monkeypatch.delenv("FOREBEAR_DEVICE")
    assert pick_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")


def test_the_environment_says_what_auto_is_and_a_named_device_stays(two_gpus, monkeypatch):
    for named, picked in (("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        monkeypatch.setenv("FOREBEAR_DEVICE", named)
        assert pick_device() == torch.device(picked)
        assert pick_device("cuda:0") == torch.device("cuda:0")
    for unset in ("", "auto"):
        monkeypatch.setenv("FOREBEAR_DEVICE", unset)
        assert pick_device() == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "device 'gpu' is no device that torch knows. Give auto, cpu, cuda or cuda:N."),
        ("cuda:2", "device 'cuda:2': torch sees cuda:0 to cuda:1 here. Give one of these, or device=\"cpu\"."),
        ("meta", "device 'meta': torch cannot use such a device here. Give auto, cpu, cuda or cuda:N."),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_line(device, said, two_gpus, monkeypatch):
    with pytest.raises(InputError) as refused:
        pick_device(device)
    assert str(refused.value) == said
    monkeypatch.setenv("FOREBEAR_DEVICE", device)
    with pytest.raises(InputError) as refused:
        pick_device("auto")
    assert str(refused.value) == said.replace(
        f"device '{device}'", f"the environment variable FOREBEAR_DEVICE={device}"
    )


def test_a_gpu_is_refused_where_torch_sees_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^device .cuda:0.: torch sees no CUDA device here\. Use device=.cpu.\.$"):
        pick_device("cuda:0")


def test_commands_refuse_a_wrong_device_of_the_environment_in_one_line(tmp_path, monkeypatch, capsys):
    rows = write_jsonl(tmp_path / "train.jsonl", text=sentences(8), label=[0, 1] * 4)
    model = make_tiny_model(tmp_path / "model")
    monkeypatch.setenv("FOREBEAR_DEVICE", "gpu")
    command = ["index", "--train", rows, "--model", model, "--out", tmp_path / "index", "--quiet"]
    assert run([str(word) for word in command]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: the environment variable FOREBEAR_DEVICE=gpu is no device that torch knows. Give auto, cpu, cuda or "
        "cuda:N."
    )
    assert not (tmp_path / "index").exists() or not list((tmp_path / "index").iterdir())


def test_auto_is_the_cpu_in_tests_and_in_what_they_start(two_gpus):
    assert pick_device() == torch.device("cpu")
    seen = f"import torch; torch.cuda.is_available = lambda: True; {PICK}"
    found = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert found.stdout == "cpu\n"


def test_training_on_another_gpu_than_the_first_is_refused_and_so_is_retraining(two_gpus, monkeypatch):
    said = "device 'cuda:1': training runs on cpu or on the first CUDA device. Choose a GPU by CUDA_VISIBLE_DEVICES."
    monkeypatch.setenv("FOREBEAR_DEVICE", "cuda:1")
    for refuse in (
        lambda: fine_tuning._pick_training_device("auto"),
        lambda: FullRecipe(SimpleNamespace(device=pick_device()), SimpleNamespace(labels=[]), []),
    ):
        with pytest.raises(InputError) as refused:
            refuse()
        assert str(refused.value) == said
    assert fine_tuning._pick_training_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.gpu
def test_auto_is_a_gpu_in_tests_that_are_marked_so():
    assert pick_device() == torch.device("cuda:0")


def test_a_test_that_is_marked_gpu_is_skipped_without_one(request):
    """The skip is the collection's, so no test needs to say it."""
    marked = [item for item in request.session.items if item.get_closest_marker("gpu")]
    assert marked
    if not torch.cuda.is_available():
        assert all(item.get_closest_marker("skip") for item in marked)
