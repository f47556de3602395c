"""The server under load: many clients for minutes, hostile ones among them, and its throughput beside the command line.

    python benchmarks/serve.py [--index runs/bench/sst2-index] [--model FOLDER] [--seconds 300] [--clients 64]
                               [--hostile 10000] [--rounds 3] [--rows 872]

SST-2, MiniLM, the head; one ``forebear serve`` on the loopback interface. Clients ask one text at a time (one in eight
asks four) over connections that they keep; a probe asks for health twice a second; slow clients hold connections that
they never use. Then the hostile ones, while honest ones go on asking. Last, the dev rows one by one from all clients,
beside ``retrieve --test`` of the same rows and one ``retrieve --text`` after another, by turns; whole processes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, FOREBEAR, ROOT, by_turns, ratio, run, write_result

HEADERS = {"content-type": "application/json"}
QUESTIONS = ({"methods": ["gc"]}, {"methods": ["gc", "if"], "top": 5}, {"methods": ["if"], "top": 3})
N_SLOW = 16
N_HONEST = 4


@contextmanager
def served(index: Path, model: str | None) -> Iterator[tuple[int, int]]:
    """A server over an index; yields its port and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [FOREBEAR, "serve", f"sst2={index}", "--port", str(port), *(["--model", model] if model else [])]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "the server ended"
            try:
                if Client(port).ask("/v2/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "the server did not end as it should"


class Client:
    """A client with a connection that it keeps."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("GET" if body is None else "POST", path, data, HEADERS)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def retrieve(self, texts: list[str], **question: Any) -> tuple[int, bytes]:
        return self.ask("/v1/retrieve", {"texts": texts, **question})


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def measure(port: int, name: str) -> float:
    text = Client(port).ask("/metrics")[1].decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))


def until(end: float, work: Callable[[random.Random], None], seed: int) -> None:
    rng = random.Random(seed)
    while time.monotonic() < end:
        work(rng)


def load(port: int, pid: int, texts: Sequence[str], n_clients: int, seconds: float) -> dict[str, Any]:
    """Many clients for a while: statuses, seconds of a request, of health, and memory."""
    statuses: Counter[str] = Counter()
    taken, health, memory = list[float](), list[float](), list[float]()
    lock, end = threading.Lock(), time.monotonic() + seconds
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(N_SLOW)]
    for connection in slow:
        connection.sendall(b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")

    def ask(seed: int) -> None:
        client = Client(port)

        def once(rng: random.Random) -> None:
            n = 4 if rng.random() < 1 / 8 else 1
            started = time.perf_counter()
            try:
                status = str(client.retrieve(rng.choices(texts, k=n), **rng.choice(QUESTIONS))[0])
            except OSError as error:
                status = type(error).__name__
            with lock:
                statuses[status] += 1
                taken.append(time.perf_counter() - started)

        until(end, once, seed)

    def probe(_seed: int) -> None:
        client = Client(port)

        def once(_rng: random.Random) -> None:
            started = time.perf_counter()
            assert client.ask("/v2/health/live")[0] == 200
            health.append(time.perf_counter() - started)
            memory.append(resident_mib(pid))
            time.sleep(0.5)

        until(end, once, 0)

    with ThreadPoolExecutor(n_clients + 1) as pool:
        jobs = [pool.submit(probe, 0), *(pool.submit(ask, seed) for seed in range(n_clients))]
        for job in jobs:
            job.result()
    for connection in slow:
        connection.close()
    fifths = [float(np.median(part)) for part in np.array_split(memory, 5)]
    return {
        "clients": n_clients,
        "seconds": seconds,
        "requests": len(taken),
        "requests_a_second": len(taken) / seconds,
        "statuses": dict(statuses),
        "p50_seconds": float(np.quantile(taken, 0.5)),
        "p99_seconds": float(np.quantile(taken, 0.99)),
        "health_p99_seconds": float(np.quantile(health, 0.99)),
        "memory_mib_by_fifths": [round(mib, 1) for mib in fifths],
        "requests_a_batch": measure(port, "forebear_batch_requests_sum")
        / measure(port, "forebear_batch_requests_count"),
    }


def hostile_bytes(rng: random.Random) -> bytes:
    """A request as nobody should send it: malformed, oversized or hostile."""

    def post(
        body: bytes, path: str = "/v1/retrieve", length: int | None = None, kind: str = "application/json"
    ) -> bytes:
        size = len(body) if length is None else length
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\nconnection: close\r\n"
        return head.encode() + f"content-length: {size}\r\n\r\n".encode() + body

    def asked(**fields: Any) -> bytes:
        return post(json.dumps({"texts": ["a film"]} | fields).encode(), rng.choice(("/v1/retrieve", "/v1/score")))

    def cut() -> bytes:
        whole = json.dumps({"texts": ["a film"], "methods": ["gc"]}).encode()
        return post(whole[: rng.randrange(len(whole))])

    noise = rng.randbytes(rng.randrange(1, 300))
    return rng.choice((
        lambda: noise + b"\r\n\r\n",
        lambda: post(noise),
        cut,
        lambda: post(b"[" * rng.randrange(1, 200_000)),
        lambda: post(b'{"texts": ["' + b"a" * rng.randrange(20_001, 60_000) + b'"]}'),
        lambda: post(json.dumps({"texts": ["a"] * rng.randrange(257, 5000)}).encode()),
        lambda: post(b" " * ((1 << 20) + 1)) if rng.random() < 0.02 else post(b"{", length=1 << 40),
        lambda: b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        lambda: b"GET /" + b"../" * rng.randrange(1, 50) + b"etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
        lambda: b"GET /v1/indexes HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n",
        lambda: b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        lambda: asked(top=rng.choice((0, -1, 10**6, "5", None, 1.5, [], {}))),
        lambda: asked(methods=rng.choice(([], ["nope"], ["magic"], "gc", ["gc"] * 101, [["gc"]], ["\x00"]))),
        lambda: asked(scope=rng.choice(("../all", "nobody", "", 3, "top-999999999"))),
        lambda: asked(spans=rng.choice(("/tmp/x.py:f", "reader:someone/model", "columns:a,b"))),
        lambda: asked(model="someone/model"),
        lambda: asked(index=rng.choice(("/etc", "../sst2", "sst2/", "", "SST2"))),
        lambda: asked(damping=rng.choice(("1e999", "-1", "nan", "x" * 10_000)), methods=["if"]),
        lambda: asked(rows=rng.choice(([10**9], [-1], [2**70], ["1"], [True]))),
        lambda: asked(texts=rng.choice(([], [""] * 300, [["a", "b"]], [None], "a", [{"a": 1}], ["\ud800"]))),
        lambda: post(b'{"texts": ["a"], "recall": NaN}'),
        lambda: post(b'{"texts": ["a"], "top": ' + b"9" * 6000 + b"}"),
        lambda: post(b'{"texts": ["a"]}', kind="text/plain"),
        lambda: post(b"{}", rng.choice(("/v1/explain", "/v1/flip", "/v2/health/live", "/v1/nothing"))),
    ))()  # fmt: skip


def hostile(port: int, pid: int, texts: Sequence[str], n: int) -> dict[str, Any]:
    """Hostile requests, while honest clients go on: statuses, and whether the honest got what they got before."""
    one = {"methods": ["gc", "if"], "top": 5}
    before = {text: Client(port).retrieve([text], **one) for text in texts[:20]}
    assert all(status == 200 for status, _ in before.values())
    statuses: Counter[str] = Counter()
    honest: Counter[str] = Counter()
    lock, done = threading.Lock(), threading.Event()

    def attack(seed: int) -> None:
        rng = random.Random(seed)
        sent, hangs_up = hostile_bytes(rng), rng.random() < 0.1
        status = "hung up"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(sent)
                if not hangs_up:
                    connection.shutdown(socket.SHUT_WR)
                    head = connection.recv(64).split(b" ")
                    status = head[1].decode() if len(head) > 1 else "closed"
        except OSError as error:
            status = type(error).__name__
        with lock:
            statuses[status] += 1

    def ask(seed: int) -> None:
        rng, client = random.Random(seed), Client(port)
        while not done.is_set():
            text = rng.choice(texts[:20])
            status, answer = client.retrieve([text], **one)
            same = status == 200 and alike(answer, before[text][1])
            with lock:
                honest["the same" if same else f"another ({status})"] += 1

    memory = resident_mib(pid)
    with ThreadPoolExecutor(N_HONEST) as asking, ThreadPoolExecutor(16) as attacking:
        jobs = [asking.submit(ask, seed) for seed in range(N_HONEST)]
        started = time.perf_counter()
        list(attacking.map(attack, range(n)))
        seconds = time.perf_counter() - started
        done.set()
        for job in jobs:
            job.result()
    return {
        "requests": n,
        "seconds": seconds,
        "statuses": dict(sorted(statuses.items())),
        "answers_5xx": sum(count for status, count in statuses.items() if status.startswith("5")),
        "honest_answers": dict(honest),
        "memory_mib_before_and_after": [round(memory, 1), round(resident_mib(pid), 1)],
    }


def alike(one: bytes, other: bytes) -> bool:
    """Whether two answers have the same rows, and scores up to what the batch of a forward pass moves them by."""

    def results(answer: bytes) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(answer)["answers"][0]["results"]
        return found

    mine, theirs = results(one), results(other)
    same_rows = [r["row"] for r in mine] == [r["row"] for r in theirs]
    return same_rows and np.allclose([r["score"] for r in mine], [r["score"] for r in theirs], rtol=1e-4, atol=1e-7)


def throughput(
    port: int,
    index: Path,
    model: list[str],
    test: Path,
    texts: Sequence[str],
    n_clients: int,
    rounds: int,
    chosen: Sequence[str],
) -> dict[str, list[float]]:
    """Seconds a test row by the server, by ``retrieve --test`` and by one command a row, by turns."""
    question = ["--method", "gc,if", "--top", "5", "-q"]
    out = ROOT / "runs" / "bench" / "serve.parquet"
    local = threading.local()

    def ask(text: str) -> None:
        if not hasattr(local, "client"):
            local.client = Client(port)
        status, _ = local.client.retrieve([text], methods=["gc", "if"], top=5)
        assert status == 200, status

    def at_once() -> None:
        with ThreadPoolExecutor(n_clients) as clients:
            list(clients.map(ask, texts))

    def in_lists() -> None:
        client = Client(port)
        for start in range(0, len(texts), 256):
            assert client.retrieve(list(texts[start : start + 256]), methods=["gc", "if"], top=5)[0] == 200

    def one_after_another() -> None:
        client = Client(port)
        for text in texts[: len(texts) // 8]:
            assert client.retrieve([text], methods=["gc", "if"], top=5)[0] == 200

    ways = {
        "server, all clients": (at_once, len(texts)),
        "server, one client, lists of 256": (in_lists, len(texts)),
        "server, one client, one by one": (one_after_another, len(texts) // 8),
        "retrieve --test": (
            lambda: run("retrieve", "--index", index, *model, "--test", test, "--out", out, "--force", *question),
            len(texts),
        ),
        "retrieve --text, one by one": (
            lambda: run("retrieve", "--index", index, *model, "--text", texts[0], *question),
            1,
        ),
    }
    ways = {name: way for name, way in ways.items() if not chosen or name in chosen}
    taken = by_turns({name: way for name, (way, _) in ways.items()}, rounds, warm=False)
    return {name: [second / ways[name][1] for second in seconds] for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=ROOT / "runs" / "bench" / "sst2-index")
    parser.add_argument("--model", default=None, help="where the model is, if it has moved")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--hostile", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=872, help="dev rows whose throughput is measured")
    parser.add_argument("--ways", nargs="*", default=[], help="ways whose throughput is measured; by default all")
    parser.add_argument("--only", nargs="*", default=["load", "hostile", "throughput"])
    given = parser.parse_args()
    dev = pq.read_table(DATA / "sst2" / "dev.parquet")
    texts = dev.column("text").to_pylist()
    model = ["--model", given.model] if given.model else []
    with served(given.index.resolve(), given.model) as (port, pid):
        if "load" in given.only:
            write_result("serve_load", **load(port, pid, texts, given.clients, given.seconds))
        if "hostile" in given.only:
            write_result("serve_hostile", **hostile(port, pid, texts, given.hostile))
        if "throughput" in given.only:
            test = ROOT / "runs" / "bench" / "serve_test.parquet"
            test.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(dev.slice(0, given.rows), test)
            texts = texts[: given.rows]
            a_row = throughput(port, given.index, model, test, texts, given.clients, given.rounds, given.ways)
            server = a_row["server, all clients"]
            over = {"over_retrieve_test": "retrieve --test", "over_one_by_one": "retrieve --text, one by one"}
            ratios = {name: ratio(a_row[way], server) for name, way in over.items() if way in a_row}
            write_result(
                f"serve_throughput_{given.rows}" if given.ways else "serve_throughput",
                larger=tuple(ratios),
                rows=given.rows,
                rounds=given.rounds,
                clients=given.clients,
                seconds_a_row={name: round(float(np.median(taken)), 5) for name, taken in a_row.items()},
                **ratios,
            )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
