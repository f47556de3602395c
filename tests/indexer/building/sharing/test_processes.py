"""``--devices``: as many processes leave the bytes that one leaves, and end as one process does."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import hashes
from tiny import labels, sentences, write_jsonl
from warm import CopiedInterpreter, start_command

from forebear import Index, InputError, choose_model, open_rows
from forebear.cli.main import run
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.building.sharing import processes
from forebear.indexer.model.device import picking

# A finder of spans is the user's code that runs in the processes. Its first call waits until as many processes as
# WAIT_FOR have called it, so that no process writes all shards before another has started.
FINDER = """
import os, signal, time, warnings
from pathlib import Path

HERE, met = Path(__file__).parent, False

def find(row):
    global met
    text = row["text"]
    if not met:
        (HERE / "processes" / str(os.getpid())).touch()
        met = True
        end, n = time.monotonic() + 60, int((HERE / "wait_for").read_text())
        while len(list((HERE / "processes").iterdir())) < n and time.monotonic() < end:
            time.sleep(0.02)
        if (HERE / "warn").exists():
            warnings.warn("the finder was called")
    if (HERE / "kill").exists() and text in (HERE / "kill").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    if (HERE / "fail").exists() and text in (HERE / "fail").read_text():
        return [(5, 2)]
    return [(0, len(text.split()[0]))]
"""
TEXTS, LABELS = sentences(40, seed=21, low=3), labels(40, 2, seed=22)
TEXTS += TEXTS[3:9] + TEXTS[30:38]  # in other shards, some with the other label
LABELS += LABELS[3:6] + [1 - label for label in LABELS[6:9]] + LABELS[30:38]
MORE, MORE_LABELS = TEXTS[10:20] + sentences(10, seed=5, low=3), LABELS[10:20] + labels(10, 2, seed=5)
SKETCHES = ("--sketch-dim", 8, "--sketch-bits", 64, "--white-bits", 64, "--calibrate", 4, "--batch-tokens", 64)


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, models and the finder, which is the current one."""
    write_jsonl(tmp_path / "train.jsonl", text=TEXTS, label=LABELS, note=[f"row {i}" for i in range(len(TEXTS))])
    write_jsonl(tmp_path / "more.jsonl", text=MORE, label=MORE_LABELS, note=["more"] * len(MORE))
    for name, seed in (("one", 0), ("two", 1), ("sentences", 9)):
        (tmp_path / name).symlink_to(tiny_model("bert", 2, seed))
    (tmp_path / "finder.py").write_text(FINDER)
    (tmp_path / "processes").mkdir()
    expect(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are copies of one that has the libraries, not new interpreters that import them."""
    monkeypatch.setattr(processes.subprocess, "Popen", CopiedInterpreter)


def expect(place: Path, n_processes: int) -> None:
    """Let the finder wait for so many processes that have not called it before."""
    for file in (place / "processes").iterdir():
        file.unlink()
    (place / "wait_for").write_text(str(n_processes))


def finders(place: Path) -> set[int]:
    """Ids of the processes that have called the finder."""
    return {int(file.name) for file in (place / "processes").iterdir()}


def index_command(out: str, *more: object, checkpoints: tuple[str, ...] = ("two",)) -> list[str]:
    words = (
        "index", "--checkpoints", *checkpoints, "--eta", *["1"] * len(checkpoints), "--train", "train.jsonl",
        "--out", out, "--store", "features,spans", "--spans", f"{Path.cwd()}/finder.py:find", "--shard-rows", 8,
        *SKETCHES, *more,
    )  # fmt: skip
    return list(map(str, words))


WHOLE = ("--store", "features,words,spans,sbert", "--sentence-model", "sentences", "--words-top", "0,3",
         "--scope", "head,top-1")  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("copies")
def test_two_processes_leave_the_bytes_of_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, n, devices in (("one-process", 1, "cpu"), ("two-processes", 2, "cpu,cpu")):
        expect(place, n)
        assert run(index_command(out, *WHOLE, "--devices", devices, checkpoints=("one", "two"))) == 0
        writers = finders(place)
        assert len(writers) == n
        assert (os.getpid() in writers) == (n == 1)
        expect(place, n)
        assert run(["index", "--out", out, "--append", "--train", "more.jsonl", "--devices", devices]) == 0
        assert len(finders(place)) == n or n == 1  # where one process, this one, has met it before
        assert run(["index", "--out", out, "--refit", "--devices", devices]) == 0
    capsys.readouterr()
    assert hashes(place / "one-process") == hashes(place / "two-processes")
    assert Index.open(place / "two-processes").manifest.generation == 2


@pytest.mark.slow
def test_warnings_come_once_and_rows_of_all_processes_are_counted(place: Path) -> None:
    calls: dict[str, list[tuple[int, int]]] = {}
    chosen = choose_model(None, ["two"], (1.0,))
    options = BuildOptions(
        stores=("features", "spans"), spans=f"{place}/finder.py:find", calibration_queries=0, shard_rows=8,
        batch_tokens=64, devices=("cpu", "cpu"),
    )  # fmt: skip
    expect(place, 2)
    (place / "warn").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_index(
            open_rows("train.jsonl"), place / "index", chosen.checkpoints, options,
            progress=lambda stage, done, total: calls.setdefault(stage, []).append((done, total)),
        )  # fmt: skip
    assert len(finders(place)) == 2
    assert [str(one.message) for one in caught].count("the finder was called") == 1
    for stage in ("features checkpoint-1", "spans"):
        done = [done for done, _ in calls[stage]]
        assert done == sorted(done)
        assert calls[stage][-1] == (len(TEXTS), len(TEXTS))


@pytest.mark.slow
@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_killed_process_is_one_line_and_the_build_goes_on(
    devices: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expect(place, 2)
    (place / "kill").write_text(TEXTS[27])
    assert run(index_command("index", "--devices", "cpu,cpu")) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [
        "error: the process at work on cpu ended before its work was done (SIGKILL, as a system ends it that lacks "
        "memory). What was finished stays: give --resume to go on."
    ]
    features = hashes(place / "index" / "features")
    assert len([name for name in features if name.endswith(".arrow")]) == 7
    assert not (place / "index" / "claims").exists()
    (place / "kill").unlink()
    expect(place, devices.count("cpu"))
    assert run(index_command("index", "--resume", "--devices", devices)) == 0
    expect(place, 1)
    assert run(index_command("undisturbed", "--quiet")) == 0
    assert hashes(place / "index") == hashes(place / "undisturbed")


@pytest.mark.slow
@pytest.mark.usefixtures("copies")
def test_an_error_in_a_process_is_the_error_of_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = []
    (place / "fail").write_text(TEXTS[17])
    for n, devices in ((1, "cpu"), (2, "cpu,cpu")):
        expect(place, n)
        assert run(index_command("index", "--force", "--devices", devices)) == 2
        messages.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error")])
    assert messages[0] == messages[1]
    assert "training row 17" in messages[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_command(how: signal.Signals, place: Path) -> None:
    expect(place, 3)  # of which there are two: they wait
    process = start_command(index_command("index", "--devices", "cpu,cpu"))
    end = time.monotonic() + 120
    while len(finders(place)) < 2 and time.monotonic() < end and process.runs():
        time.sleep(0.05)
    os.kill(process.pid, how)
    done = process.wait(30)
    assert done.returncode == (130 if how == signal.SIGINT else -how)
    said = done.stderr.splitlines()
    assert [line.split(":")[0] for line in said if line.startswith(("error", "Traceback"))] == (
        ["error"] if how == signal.SIGINT else []
    )
    end = time.monotonic() + 20
    while (alive := [one for one in finders(place) if Path(f"/proc/{one}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive
    assert not list((place / "index" / "spans").glob("0*.arrow"))


class TestRefusals:
    def refused(self, devices: tuple[str | int, ...], device: str = "auto") -> str:
        with pytest.raises(InputError) as error:
            picking.pick_devices(device, devices)
        return str(error.value)

    def test_device_and_devices_are_not_given_together(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(index_command("index", "--device", "cpu", "--devices", "cpu,cpu")) == 2
        assert capsys.readouterr().err == "error: --devices cpu,cpu beside --device cpu: give one of them.\n"
        assert not (place / "index").exists()
        assert self.refused((0, 1), "cpu") == 'devices=("0", "1") beside device="cpu": give one of them.'

    def test_a_change_without_models_takes_none(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(place / "one", place / "index")
        assert run(["index", "--out", "index", "--retire", "1", "--devices", "cpu,cpu"]) == 2
        assert "--retire takes no --devices" in capsys.readouterr().err

    def test_numbers_are_cuda_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(picking, "pick_device", picking.torch.device)
        monkeypatch.setattr(picking, "device_kind", lambda device: device.type)
        assert picking.pick_devices("auto", (0, "1", "cuda:2")) == ("cuda:0", "cuda:1", "cuda:2")
        assert picking.pick_devices("cuda:3", ()) == ("cuda:3",)

    def test_devices_of_several_kinds_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(picking, "pick_device", picking.torch.device)
        monkeypatch.setattr(picking, "device_kind", lambda device: "NVIDIA X" if device.type == "cuda" else "cpu")
        assert "expected devices of one kind, not NVIDIA X and cpu" in self.refused((0, "cpu"))

    def test_a_device_that_is_not_there_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(picking.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(picking.torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(picking, "device_kind", lambda _device: "NVIDIA X")
        assert "'cuda:2': torch sees cuda:0 to cuda:1 here" in self.refused((0, 2))
