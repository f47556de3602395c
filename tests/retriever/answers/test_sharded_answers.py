"""``retrieve --shard I/N``: parts of the answers by processes that know nothing of each other, and the file of them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import World
from tiny import sentences, write_jsonl
from warm import run_command, start_command

from forebear.cli.main import run
from forebear.retriever.retriever import Retriever

N_QUERIES = 23
SHARDS = [f"{number}/3" for number in (3, 1, 2)]


@pytest.fixture
def command(bert_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command that asks all test rows, in blocks of four, for the answers ``NAME.parquet``."""
    queries = tmp_path / "queries.jsonl"
    write_jsonl(queries, text=sentences(N_QUERIES, seed=77))
    monkeypatch.setattr(Retriever, "asked_together", lambda *_: 4)

    def of(name: str, *more: str) -> list[str]:
        out = str(tmp_path / f"{name}.parquet")
        given = ["--test", str(queries), "--method", "gc,tracin-we", "--top", "3", "--out", out]
        return ["retrieve", "--index", str(bert_world.index.folder), *given, *more]

    return of


def test_shards_in_any_order_are_the_answers_of_one_run(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run(command("whole")) == 0
    for shard in SHARDS:
        assert not (tmp_path / "parts.parquet").exists()
        assert run(command("parts", "--shard", shard)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts.parquet.parts").glob("*.arrow")}
    assert len(before) == 6
    assert run(command("parts", "--shard", SHARDS[0])) == 0  # once more: nothing is asked twice
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(command("parts", "--resume")) == 0
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not list(tmp_path.glob("parts.parquet.*"))
    assert pq.read_table(tmp_path / "parts.parquet")["query"].unique().to_pylist() == list(range(N_QUERIES))


def test_a_damaged_part_and_a_missing_shard_are_asked_at_the_end(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command("whole")) == 0
    for shard in SHARDS[:2]:
        assert run(command("parts", "--shard", shard)) == 0
    part = next((tmp_path / "parts.parquet.parts").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-1])
    capsys.readouterr()
    assert run(command("parts", "--resume")) == 0
    assert "is damaged" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_another_question_does_not_mix_with_the_parts(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command("parts", "--shard", "1/3")) == 0
    assert run([*command("parts", "--shard", "2/3"), "--target", "LABEL_0"]) == 2
    assert "target" in capsys.readouterr().err
    assert run(command("parts", "--shard", "2/3", "--force")) == 2
    assert run(command("parts")) == 2  # a plain run would start anew
    assert len(list((tmp_path / "parts.parquet.parts").glob("*.arrow"))) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shard", "0/3"], "expected I/N"),
        (["--shard", "4/3"], "expected I/N"),
        (["--shard", "1/2", "--resume"], "--resume then writes"),
        (["--shard", "1/2", "--group-by", "label"], "--group-by keeps none"),
    ],
)
def test_what_a_shard_does_not_take(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run(command("parts", *more)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert re.search(re.escape(said), error), error


def test_a_shard_under_way_is_not_written_by_another_and_a_killed_one_goes_on(
    bert_world: World, tmp_path: Path
) -> None:
    queries = tmp_path / "queries.jsonl"
    write_jsonl(queries, text=sentences(1500, seed=78))
    given = ["retrieve", "--index", bert_world.index.folder, "--test", queries, "--method", "tracin-we"]

    def shard(name: str, *more: object) -> list[object]:
        return [*given, "--out", tmp_path / f"{name}.parquet", *more]

    first = start_command(shard("parts", "--shard", "1/2"))
    parts = tmp_path / "parts.parquet.parts"
    while not list(parts.glob("*.arrow")):
        assert first.runs()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # it is at work while the others ask
    second = run_command(shard("parts", "--shard", "1/2"))
    finish = run_command(shard("parts", "--resume"))
    first.kill()
    first.wait()
    assert second.returncode == 2, second.stderr
    assert "shard 1/2" in second.stderr
    assert finish.returncode == 2, finish.stderr
    assert run_command(shard("parts", "--shard", "2/2")).returncode == 0
    assert run_command(shard("parts", "--shard", "1/2")).returncode == 0
    assert run_command(shard("parts", "--resume")).returncode == 0
    assert run_command(shard("whole")).returncode == 0
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
