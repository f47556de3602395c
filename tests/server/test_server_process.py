"""``forebear serve`` as a process of its own: asked by several at once, told to stop, beside one that appends."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import N_ROWS
from serving import Reply, ask, until
from tiny import labels, sentences, write_jsonl
from warm import Started, run_command, start_command

from forebear.cli.main import run
from forebear.indexer.index import Index
from forebear.indexer.storage.layout import JOURNAL_NAME
from forebear.server.http.protection import LOG

QUESTION = {"texts": ["a good film"], "methods": ["gc", "tracin-we"], "top": 500}


class Process:
    """A server of its own process, at a port that was free."""

    def __init__(self, *arguments: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command: Started = start_command(["serve", *arguments, "--port", self.port])
        assert until(self._answers)

    def _answers(self) -> bool:
        assert self.command.runs()
        try:
            return ask(self.port, "/v2/health/ready").status == 200
        except ConnectionError:
            return False

    def ask(self, body: Any, path: str = "/v1/retrieve") -> Reply:
        return ask(self.port, path, body)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code, and what it printed to stderr."""
        os.kill(self.command.pid, number)
        done = self.command.wait(60)
        return done.returncode, done.stderr


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    """Start servers that end with the test."""
    begun: list[Process] = []

    def begin(*arguments: Any) -> Process:
        begun.append(Process(*arguments))
        return begun[-1]

    yield begin
    for one in begun:
        if one.command.runs():
            one.command.kill()
            one.command.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_answers_several_at_once_and_ends_when_it_is_told_to(process, index_folder, number):
    server = process(f"tiny={index_folder}")
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda i: server.ask({"texts": [f"film {'good ' * i}"], "top": 2}), range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        running = clients.submit(server.ask, {"texts": ["a film"] * 200, "methods": ["gc", "tracin-we"]})
        assert until(lambda: 'forebear_requests_total{route="/metrics"' in ask(server.port, "/metrics").body.decode())
        code, printed = server.stop(number)
        assert running.result().status == 200  # begun before, answered to its end
    assert code == 0
    lines = printed.splitlines()
    assert lines[0] == f"serving tiny at http://127.0.0.1:{server.port} (Ctrl-C stops)"
    assert lines[-1] == "stopped."
    assert sum("POST /v1/retrieve 200" in line for line in lines) == 9
    assert "film" not in printed


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_append_leaves_answers_as_they_were(process, index_copy, tmp_path):
    server = process(f"tiny={index_copy}", "--quiet")
    old, first = Index.open(index_copy).manifest.digest(), server.ask(QUESTION)
    assert first.json["digest"] == old
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(400, seed=5), label=labels(400))
    append = ["index", "--out", index_copy, "--append", "--train", more]
    appending = start_command(append)
    assert until(lambda: (index_copy / JOURNAL_NAME).exists())
    during = server.ask(QUESTION)
    appending.kill()
    assert appending.wait(60).returncode == -signal.SIGKILL
    assert server.ask(QUESTION).body == during.body == first.body
    done = run_command([*append, "--resume"])
    assert done.returncode == 0, done.stderr
    after = server.ask(QUESTION).json
    assert after["digest"] == Index.open(index_copy).manifest.digest() != old
    assert max(result["row"] for result in after["answers"][0]["results"]) == N_ROWS + 399
    assert server.stop() == (0, "")


@pytest.mark.slow
def test_answers_during_an_append_are_wholly_those_before_or_after(process, index_copy, tmp_path):
    server = process(f"tiny={index_copy}")
    more = write_jsonl(tmp_path / "more.jsonl", text=sentences(200, seed=6), label=labels(200))
    seen: dict[str, set[bytes]] = {server.ask(QUESTION).json["digest"]: {server.ask(QUESTION).body}}
    appending = start_command(["index", "--out", index_copy, "--append", "--train", more])
    with ThreadPoolExecutor(4) as clients:
        while appending.runs():
            for reply in clients.map(lambda _: server.ask(QUESTION), range(4)):
                assert reply.status == 200, reply.body
                seen.setdefault(reply.json["digest"], set()).add(reply.body)
    assert appending.wait(60).returncode == 0
    last = server.ask(QUESTION)
    seen.setdefault(last.json["digest"], set()).add(last.body)
    assert len(seen) == 2
    rows = [{len(json.loads(body)["answers"][0]["results"]) // 4 for body in bodies} for bodies in seen.values()]
    assert rows == [{N_ROWS}, {N_ROWS + 200}]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["no-such-folder"], {}, "no such folder: no-such-folder"),
        (["{index}", "--host", "0.0.0.0"], {}, "Give a token by --token-file or the variable FOREBEAR_TOKEN"),
        (["{index}", "--host", "::"], {}, "Give a token"),
        (["{index}", "--host", "203.0.113.7"], {"FOREBEAR_TOKEN": "a-token-of-some-length"}, "cannot serve at 203."),
        (["{index}"], {"FOREBEAR_TOKEN": "short"}, "at least 16"),
        (["{index}", "--token-file", "none.txt"], {}, "--token-file none.txt: cannot be read"),
        (["{index}", "--token-file", "open.txt"], {}, "others may read it"),
        (["{index}", "other={index}", "--model", "m"], {}, "--model is for one index"),
        (["{index}", "{index}"], {}, "two indexes are called index"),
        (["{index}", "--queue", "0"], {}, "queue 0: expected at least 1"),
        (["{index}", "--port", "{port}"], {}, "in use"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_the_work(
    arguments, environment, said, index_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open.txt").write_text("a-token-of-some-length")
    (tmp_path / "open.txt").chmod(0o644)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        given = [argument.format(index=index_folder, port=port) for argument in arguments]
        assert run(["serve", *given]) == 2
    assert said in capsys.readouterr().err
    assert not LOG.handlers  # none is left that writes to this test's stderr
