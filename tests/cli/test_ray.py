"""``--ray``: builds and answers divided among tasks of a Ray cluster on this machine, one of which is killed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny import labels, sentences, write_jsonl

from forebear.cli.main import run
from forebear.cli.ray_tasks import arguments_without
from forebear.indexer.index import Index

ray = pytest.importorskip("ray", reason="unchecked: --ray. To check, pip install 'forebear[ray]'")
N_ROWS, SHARD_ROWS, SHARDS = 600, 8, "3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers of this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Path:
    """A folder with training and test rows, and the index that one process builds of them."""
    folder = tmp_path_factory.mktemp("ray")
    write_jsonl(folder / "train.jsonl", text=sentences(N_ROWS, seed=3), label=labels(N_ROWS))
    write_jsonl(folder / "test.jsonl", text=sentences(1800, seed=4))
    assert run(build(folder, tiny_model("bert", 2, 0), "whole")) == 0
    return folder


def build(folder: Path, model: str, name: str, *more: str) -> list[str]:
    rows = ["--train", str(folder / "train.jsonl"), "--shard-rows", str(SHARD_ROWS)]
    return ["index", "--model", model, *rows, "--out", str(folder / name), "--quiet", *more]


class Killer(threading.Thread):
    """Kills the Ray worker of one part, when the first file of a pattern is there and the part is still at work."""

    def __init__(self, folder: Path, pattern: str) -> None:
        super().__init__(daemon=True)
        self.folder, self.pattern = folder, pattern
        self.killed: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set() and not self.killed:
            if next(self.folder.glob(self.pattern), None) is not None:
                for process in psutil.process_iter(["cmdline"]):
                    words = process.info["cmdline"] or []
                    if "--shard" in words and any(str(self.folder) in word for word in words):
                        worker = process.parent()
                        if worker is not None and "ray" in worker.name():
                            worker.kill()
                            self.killed.append(process.pid)
                            break
            time.sleep(0.02)

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.mark.slow
def test_a_build_of_which_a_worker_is_killed_has_the_bytes_of_one_process(
    cluster: None, given: Path, tiny_model: Callable[..., str]
) -> None:
    with Killer(given / "ray", "rows/*.arrow") as killer:
        assert run(build(given, tiny_model("bert", 2, 0), "ray", "--ray", "auto", "--ray-shards", SHARDS)) == 0
    assert killer.killed, "no worker was killed while it wrote"
    assert not psutil.pid_exists(killer.killed[0]), "the part goes on without its worker"
    assert Index.open(given / "ray").manifest.digest() == Index.open(given / "whole").manifest.digest()
    files = {path.relative_to(given / "ray") for path in (given / "ray").rglob("*") if path.is_file()}
    assert files == {path.relative_to(given / "whole") for path in (given / "whole").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_answers_of_which_a_worker_is_killed_are_those_of_one_process(cluster: None, given: Path) -> None:
    asked = ["retrieve", "--index", str(given / "whole"), "--test", str(given / "test.jsonl"), "--method", "gc,if"]
    with Killer(given, "ray.parquet.parts/*.arrow") as killer:
        out = ["--out", str(given / "ray.parquet"), "--ray", "auto", f"--ray-shards={SHARDS}"]
        assert run([*asked, *out]) == 0
    assert killer.killed, "no worker was killed while it answered"
    assert run([*asked, "--out", str(given / "whole.parquet")]) == 0
    assert (given / "ray.parquet").read_bytes() == (given / "whole.parquet").read_bytes()
    assert not (given / "ray.parquet.parts").exists()


@pytest.mark.slow
def test_what_a_part_is_refused_for_is_the_line_of_the_command(
    cluster: None, given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(given / "none.parquet"), "--ray", "auto", "--ray-shards", "1"]
    assert run(["retrieve", "--index", str(given / "whole"), "--test", str(given / "missing.jsonl"), *out]) == 2
    assert "part 1/1: no such file" in capsys.readouterr().err
    assert not (given / "none.parquet.parts").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ray-shards", "2"], "Name it by --ray"),
        (["--ray", "local", "--ray-shards", "0"], "expected 1 or more"),
        (["--ray", "local", "--ray-gpus", "-1"], "expected 0 or more"),
        (["--ray", "local", "--retire", "3"], "not a change of an index"),
    ],
)
def test_options_that_mean_nothing(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["index", "--out", "nowhere", *more]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_options_of_a_command_are_left_out_in_both_forms() -> None:
    given = ["--index", "i", "--ray", "auto", "--ray-shards=2", "--resume", "--method", "gd"]
    assert arguments_without(given, ["--resume"], ["--ray", "--ray-shards"]) == ["--index", "i", "--method", "gd"]
