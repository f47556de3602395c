"""A server over the tiny index, in this process, on a free port of the loopback interface; fixtures of all tests.

What only a server needs is imported where one is started: every session of tests loads this file.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def error(self) -> str:
        """The one line of an error; an answer is none."""
        assert self.status >= 400, self.json
        assert list(self.json) == ["error"]
        line: str = self.json["error"]
        assert line
        assert line.splitlines() == [line]
        return line


def ask(port: int, path: str, body: Any = None, *, method: str | None = None, **headers: str) -> Reply:
    """One request over a connection of its own; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def until(holds: Callable[[], bool]) -> bool:
    """Wait for what follows an answer, such as its count; whether it came true within a minute or more."""
    for _ in range(6000):
        if holds():
            return True
        time.sleep(0.01)
    return False


class Live:
    """A server that runs in a thread.

    Attributes:
        service: What answers.
        port: Where it listens.
    """

    def __init__(
        self,
        folders: list[str],
        token: str | None = None,
        log_texts: bool = False,
        site: str | None = None,
        listing: Any = None,
        worklists: str | None = None,
        **limits: Any,
    ) -> None:
        from forebear.server.http.app import make_app
        from forebear.server.http.routes import Service
        from forebear.server.limits import Limits
        from forebear.server.measures import Measures
        from forebear.server.micro_batches import Worker
        from forebear.server.running import bound_socket, explored_of, open_indexes, server_of

        bounds = Limits(**limits)
        indexes, measures = open_indexes(folders), Measures()
        explored = explored_of(indexes, bounds, site=site, listing=listing, worklists=worklists)
        worker = Worker(indexes, bounds, measures, explored.go_on)
        self.service = Service(indexes, worker, bounds, measures, log_texts, explored)
        self.service.worker.start()
        bound = bound_socket("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self._server = server_of(make_app(self.service, token), bounds)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        assert self.service.worker.stop(30)

    def ask(self, path: str, body: Any = None, **options: Any) -> Reply:
        return ask(self.port, path, body, **options)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection on which some bytes have been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(sent)
        return connection

    def measure(self, name: str, **labels: str) -> float:
        """A counter's value."""
        return self.service.measures.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def index_folder(bert_world: Any) -> str:
    """Folder of the tiny index: 60 rows, two classes, two checkpoints, words."""
    return str(bert_world.index.folder)


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Start servers that end with the test."""
    running: list[Live] = []

    def begin(*folders: str | Path, **options: Any) -> Live:
        running.append(Live([str(folder) for folder in folders], **options))
        return running[-1]

    yield begin
    for live in running:
        live.stop()


@pytest.fixture(scope="session")
def live(index_folder: str) -> Iterator[Live]:
    """One server for all tests that change nothing."""
    server = Live([f"tiny={index_folder}"], texts=20, batch_texts=4, model_texts=2)
    yield server
    server.stop()
