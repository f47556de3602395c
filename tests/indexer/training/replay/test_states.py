"""States of a training in memory and in files, and a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forebear.errors import StorageError
from forebear.indexer.training.replay import states
from forebear.indexer.training.replay.states import KeptStates, State


def state(number: float) -> State:
    return State(*([torch.full((3, 2), number + part), torch.full((2,), number)] for part in range(3)))


def n_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_states_in_memory_and_in_files_come_back_as_they_were():
    one = state(0.0).n_bytes
    assert one == 3 * 8 * 4
    kept = KeptStates(2 * one)
    for step in range(5):
        kept.put(step, state(float(step)))
    assert kept.steps == [0, 1, 2, 3, 4]
    assert kept.n_bytes == 2 * one
    for step in (4, 0, 3, 3):
        assert kept.get(step).equals(state(float(step)))
    assert not kept.get(4).equals(state(3.0))


def test_files_have_no_name_and_are_closed_with_the_states(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = n_open_files()
    kept = KeptStates(0)
    kept.put(0, state(0.0))
    assert n_open_files() == before + 1
    assert not list(tmp_path.iterdir())
    del kept
    assert n_open_files() == before


def test_a_full_disk_is_one_line(monkeypatch):
    def full(*_given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states.torch, "save", full)
    with pytest.raises(StorageError, match=r"cannot be written .* No space left on device\. Free some space"):
        KeptStates(0).put(0, state(0.0))
