"""Which device a worker of a retraining command has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from forebear import InputError
from forebear.cli import workers
from forebear.cli.options.model import WORKER, IndexOptions
from forebear.indexer.model.device import picking


class _Started:
    """Stands for a worker: notes its environment."""

    environments: ClassVar[list[dict[str, str]]] = []

    def __init__(self, _command: list[str], *, env: dict[str, str], **_how: Any) -> None:
        self.environments.append(env)

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any device is taken for one that is there."""
    monkeypatch.setattr(picking, "pick_device", torch.device)
    monkeypatch.setattr(picking, "device_kind", lambda device: device.type)


def first_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n: int, **given: Any) -> list[str]:
    """The devices on which a command and its ``n - 1`` other workers retrain."""
    monkeypatch.setattr(_Started, "environments", [])
    monkeypatch.setattr(workers.subprocess, "Popen", _Started)
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: None)
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    options = IndexOptions(index="index", **given)
    monkeypatch.delenv(WORKER, raising=False)
    found = [options.first_device()]
    workers.start_workers(n, tmp_path / "cache")
    workers.stop_workers()
    for environment in _Started.environments:
        monkeypatch.setenv(WORKER, environment[WORKER])
        found.append(options.first_device())
    return found


@pytest.mark.usefixtures("gpus")
def test_workers_take_the_devices_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = first_devices(monkeypatch, tmp_path, 5, devices=["0,cuda:1", "2"])
    assert found == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]


@pytest.mark.usefixtures("gpus")
def test_of_one_device_all_have_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert first_devices(monkeypatch, tmp_path, 3, device="cuda:1") == ["cuda:1"] * 3


@pytest.mark.usefixtures("gpus")
def test_a_worker_answers_on_its_own_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    options = IndexOptions(index="index", devices=["0,1"])
    monkeypatch.setenv(WORKER, "3")
    assert options.places() == {"device": "cuda:1", "devices": ()}
    monkeypatch.delenv(WORKER)
    assert options.places() == {"device": "auto", "devices": ["0", "1"]}


def test_device_and_devices_are_refused_together_in_every_command() -> None:
    with pytest.raises(InputError, match="give one of them"):
        IndexOptions(index="index", device="cpu", devices=["cpu,cpu"]).first_device()
