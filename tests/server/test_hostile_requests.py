"""Requests that are wrong, too large, slow or meant to harm: a status of 4xx, one line, and nothing else happens."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import until

from forebear.cli.main import run
from forebear.errors import InputError
from forebear.server.limits import Limits

FIELDS = (
    "index", "texts", "text", "methods", "top", "target", "scope", "exact", "recall", "candidates", "normalise",
    "spans", "word", "curvature", "damping", "certify", "rows", "to", "limit", "relabel", "form", "flip",
)  # fmt: skip
SECRET = "a-secret-of-enough-letters"


def read_to_end(connection: socket.socket) -> bytes:
    """What a connection gives until the other side closes it."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    connection.close()
    return b"".join(parts)


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (["--top", "0"], {"top": 0}),
        (["--method", "nonsense"], {"methods": ["nonsense"]}),
        (["--scope", "all", "--method", "gd"], {"scope": "all", "methods": ["gd"]}),
        (["--target", "nobody"], {"target": "nobody"}),
        (["--recall", "2"], {"recall": 2.0}),
        (["--exact", "so-so"], {"exact": "so-so"}),
        (["--damping", "much", "--method", "if"], {"damping": "much", "methods": ["if"]}),
        (["--curvature", "steep", "--method", "if"], {"curvature": "steep", "methods": ["if"]}),
        (["--normalise"], {"normalise": True}),
        (["--candidates", "3"], {"candidates": 3}),
    ],
)
def test_a_question_that_the_command_line_refuses_is_refused_with_its_line(live, index_folder, options, body, capsys):
    """But for the names: of options there, of fields here, and of the index."""
    assert run(["retrieve", "--index", index_folder, "--text", "a film", *options]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    reply = live.ask("/v1/retrieve", {"texts": ["a film"], **body})
    assert reply.status == 422

    def words(line: str) -> list[str]:
        for one, other in ((index_folder, "tiny"), ("--method", "methods"), ("=True", ""), ("=", " "), ("--", "")):
            line = line.replace(one, other)
        return [word.strip("\"'.,;:()") for word in line.removeprefix("error: ").split()]

    assert words(reply.error)[:3] == words(said)[:3]
    assert index_folder not in reply.error


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 422, "required"),
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b'{"texts": ["a"], "top": ' + b"9" * 5000 + b"}", 400, "no JSON"),
        (b'{"texts": ["\\ud800"]}', 422, "surrogates"),
        (b'{"texts": ["a"], "\\ud800": 1}', 422, "unicode"),
        (b'{"texts": ["a"], "recall": NaN}', 422, "finite"),
        (b'{"texts": ["a"], "recall": 1e999}', 422, "finite"),
        ({"texts": []}, 422, "at least 1"),
        ({"texts": [[]]}, 422, "at least 1"),
        ({"texts": [["a", "b", "c"]]}, 422, "at most 2"),
        ({"texts": ["a", ["a", "b"]]}, 422, "not 1 strings"),
        ({"texts": ["a"], "top": "3"}, 422, "valid integer"),
        ({"texts": ["a"], "top": True}, 422, "valid integer"),
        ({"texts": ["a"], "top": 10**6}, 422, "this server takes at most"),
        ({"texts": ["a"] * 21}, 422, "at most 20"),
        ({"texts": ["a" * 20_001]}, 422, "characters in text 0"),
        ({"texts": ["a"], "methods": [f"tracin-layer:{i}" for i in range(9)]}, 422, ""),
        ({"texts": ["a"], "model": "/etc/passwd"}, 422, "model: no such field"),
        ({"texts": ["a"], "spans": "/tmp/code.py:function"}, 422, "spans: "),
        ({"texts": ["a"], "query_spans": "reader:someone/model"}, 422, "query_spans: "),
        ({"texts": ["a"], "lissa": "depth=1000000000"}, 422, "lissa: no such field"),
        ({"texts": ["a"], "index": "../tiny"}, 422, "is not served"),
        ({"texts": ["a"], "target": "gold"}, 422, "have no labels"),
        ({"texts": ["a"], "methods": ["magic"]}, 422, "over all training rows"),
        ({"texts": ["a"], "methods": ["tracin-f"], "recall": 1.0}, 422, "over all training rows"),
        ({"texts": ["a"] * 3, "methods": ["tracin-f"]}, 422, "at most 2"),
        ({"texts": ["a"], "candidates": 3000}, 422, "at most 2,000"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_one_line(live, body, status, said):
    reply = live.ask("/v1/retrieve", body)
    assert (reply.status, said in reply.error) == (status, True), reply.body
    assert len(reply.body) < 2000


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/score", {"texts": ["a"], "rows": [60]}, "row 60 is not one of the 60 live"),
        ("/v1/score", {"texts": ["a"], "rows": [-1]}, "greater than or equal to 0"),
        ("/v1/score", {"texts": ["a"], "rows": [2**63]}, "less than or equal"),
        ("/v1/score", {"texts": ["a"], "methods": ["if+"]}, "not a row"),
        ("/v1/explain", {"text": "a", "form": "best"}, "gradient-x-input"),
        ("/v1/explain", {"text": ["a", "b"]}, "2 text(s)"),
        ("/v1/flip", {"texts": ["a"], "to": "nobody"}, "labels"),
        ("/v1/flip", {"texts": ["a"], "limit": 0}, "expected 1 to 58"),
        ("/v1/flip", {"texts": ["a"], "limit": 2000}, "at most 1,000"),
        ("/v1/flip", {"texts": ["a"] * 9}, "at most 8"),
    ],
)
def test_other_routes_refuse_likewise(live, path, body, said):
    reply = live.ask(path, body)
    assert (reply.status, said in reply.error) == (422, True), reply.body


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/index.html", {}, 404),
        ("/docs", {}, 404),
        ("/v1/retrieve/", {"body": {}}, 404),
        ("/v1/../../etc/passwd", {}, 404),
        ("/v1/retrieve", {}, 405),
        ("/v1/indexes", {"method": "DELETE"}, 405),
        ("/v1/retrieve", {"body": {"texts": ["a"]}, "content_type": "text/plain"}, 422),
        ("/v1/indexes", {"host": "forebear.example"}, 403),
        ("/v1/indexes", {"host": "127.0.0.1.example:8000"}, 403),
        ("/v1/indexes", {"host": ""}, 403),
    ],
)
def test_what_no_route_answers_is_one_line(live, path, options, status):
    reply = live.ask(path, **options)
    assert reply.status == status
    assert reply.error


@pytest.mark.slow
def test_nothing_that_a_request_names_is_opened_imported_or_looked_up(live, tmp_path):
    """Seen by Python itself, of every file, module, folder and host that the process touches meanwhile."""
    (tmp_path / "sentinel.py").write_text("raise SystemExit")
    names = (str(tmp_path / "sentinel.py"), f"{tmp_path}/sentinel.py:find", "reader:sentinel/model", "sentinel/model")
    touched: list[str] = []
    watching = True

    def watch(event: str, arguments: Any) -> None:
        if watching and event.split(".")[0] in (
            "open",
            "import",
            "os",
            "pickle",
            "socket",
            "glob",
            "exec",
            "subprocess",
        ):
            said = f"{event} {arguments!r}"
            if "sentinel" in said and threading.current_thread() is not threading.main_thread():
                touched.append(said)

    sys.addaudithook(watch)  # cannot be taken away again
    statuses = []
    for route, texts in (("retrieve", {"texts": ["a"]}), ("score", {"texts": ["a"]}), ("explain", {"text": "a"}),
                         ("flip", {"texts": ["a"]})):  # fmt: skip
        for field in (*FIELDS, "model", "device", "tokenizer", "folder", "span_column"):
            for name in names:
                statuses += [live.ask(f"/v1/{route}", texts | {field: value}).status for value in (name, [name])]
    asked = [live.ask(f"/{name}") for name in ("v1/indexes?index=sentinel", "sentinel.py", "v1/methods/../sentinel")]
    seen = list(touched)
    reader = threading.Thread(target=Path(names[0]).read_text)  # what would be seen
    reader.start()
    reader.join()
    watching = False
    assert set(statuses) == {200, 422}  # as the text itself, or the word that is asked about, it may stand
    assert [reply.status for reply in asked] == [200, 404, 404]
    assert seen == []
    assert [one.split()[0] for one in touched] == ["open"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
VALUES = st.sampled_from(
    ["a film", "", "gc", "if", "\x00", "../..", "label:", "head", "cg", "1%", "-1%", "0x", 0, 1, -1, 3, 0.5, True]
)


@pytest.mark.slow
@given(
    route=st.sampled_from(["retrieve", "score", "explain", "flip"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(VALUES, max_size=3) | JSON, max_size=4),
    good=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_is_answered_by_a_fault(live, route, fields, good):
    needed = {} if not good else ({"text": "a film"} if route == "explain" else {"texts": ["a film"]})
    reply = live.ask(f"/v1/{route}", json.dumps(needed | fields).encode())
    assert reply.status in (200, 400, 422), (reply.status, reply.body)
    if reply.status == 200:
        assert "NaN" not in reply.body.decode()
    else:
        assert reply.error
    assert live.ask("/v2/health/ready").json == {"ready": True}


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_bytes_that_are_no_http_harm_nobody(live, sent):
    connection = live.connect(sent + b"\r\n\r\n")
    connection.shutdown(socket.SHUT_WR)
    answer = read_to_end(connection)
    assert answer == b"" or answer.split()[1][:1] == b"4", answer
    assert live.ask("/v2/health/live").status == 200


def test_dampings_of_clients_are_those_that_the_index_holds(live, bert_world):
    """Each other one would leave a factored matrix behind. Ways to write one damping are one."""
    held = bert_world.index.manifest.curvature["head"]["exact"]["dampings"]
    kept = live.service.indexes["tiny"].current.index.head._kept

    def ask_at(damping: str) -> Any:
        return live.ask("/v1/retrieve", {"texts": ["a film"], "methods": ["if", "rif"], "damping": damping})

    assert ask_at("0.003").status == ask_at("2x").status == 200
    before = set(kept)
    for damping in ("0.004", "3%", "7x"):
        assert f"holds, {', '.join(one['given'] for one in held)}." in ask_at(damping).error
    same = [ask_at(damping) for damping in ("0.003", "3e-3", "0.00300000", repr(0.003 * (1 + 1e-9)))]
    assert len({reply.body for reply in same}) == 1
    assert set(kept) == before


def test_texts_for_which_the_model_runs_over_rows_are_few_at_a_time_however_many_ask(live, monkeypatch):
    retriever = live.service.indexes["tiny"].current.retriever
    asked, answer_block = list[int](), retriever.answer_block

    def counting(start: int, texts: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(texts[0]))
        time.sleep(0.2)
        return answer_block(start, texts, *rest, **options)

    monkeypatch.setattr(retriever, "answer_block", counting)
    with ThreadPoolExecutor(8) as clients:
        bodies = [{"texts": [f"film {i}"], "methods": ["tracin-f"], "top": 1} for i in range(8)]
        replies = list(clients.map(lambda body: live.ask("/v1/retrieve", body), bodies))
    assert [reply.status for reply in replies] == [200] * 8
    assert max(asked) == 2  # --model-texts of this server
    assert sum(asked) == 8


def test_a_body_is_bounded_whether_or_not_its_length_is_announced(start, index_folder):
    live = start(index_folder, body_bytes=1000)
    assert live.ask("/v1/retrieve", {"texts": ["a " * 400]}).status == 200
    announced = live.ask("/v1/retrieve", {"texts": ["a " * 600]})
    assert (announced.status, "1,000 bytes" in announced.error) == (413, True)
    head = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1f4\r\n" + b" " * 500 + b"\r\n" for _ in range(3)) + b"0\r\n\r\n"
    assert read_to_end(live.connect(head + chunks)).startswith(b"HTTP/1.1 413")
    unsent = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n"
    assert read_to_end(live.connect(unsent + b"{")).startswith(b"HTTP/1.1 413")
    headers = b"GET /v1/indexes HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000
    assert read_to_end(live.connect(headers)).startswith(b"HTTP/1.1 400")


def test_a_slow_client_is_let_go_and_nobody_waits_for_it(start, index_folder):
    live = start(index_folder, body_seconds=0.5)
    slow = [
        live.connect(),
        live.connect(b"POST /v1/retrieve HTTP/1.1\r\nhost: loc"),
        live.connect(b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"),
    ]
    assert live.ask("/v1/retrieve", {"texts": ["a film"]}).status == 200
    answers = [read_to_end(connection) for connection in slow]
    assert answers[:2] == [b"", b""]
    assert answers[2].startswith(b"HTTP/1.1 408")


def test_a_client_that_hangs_up_harms_nobody(start, index_folder):
    live = start(index_folder)
    body = json.dumps({"texts": ["a film"], "methods": ["tracin-f"]}).encode()
    head = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sent = head + b"content-length: %d\r\n\r\n" % len(body) + body
    for _ in range(10):
        live.connect(sent).close()
    assert until(lambda: live.measure("forebear_requests_total", route="/v1/retrieve", status="hung up") > 0)
    assert live.ask("/v1/retrieve", {"texts": ["a film"]}).status == 200
    assert until(lambda: live.measure("forebear_waiting", index="index") == 0)


def test_a_client_that_reads_nothing_is_dropped_when_its_time_is_over(start, index_folder):
    live = start(index_folder, request_seconds=1.0)
    body = json.dumps({"texts": ["a film"] * 200, "methods": ["gc"], "top": 60}).encode()
    head = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"accept: application/x-ndjson\r\ncontent-length: %d\r\n\r\n" % len(body)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(head + body)
    assert until(lambda: live.measure("forebear_request_seconds_count", route="/v1/retrieve") == 1)
    assert not read_to_end(connection).endswith(b"0\r\n\r\n")  # the end of an answer that is whole
    assert live.ask("/v1/retrieve", {"texts": ["a film"]}).status == 200


def test_a_full_queue_is_429_and_health_answers_all_the_while(start, index_folder, monkeypatch):
    live = start(index_folder, queue=2, batch_texts=1)
    retriever = live.service.indexes["index"].current.retriever
    answer_block = retriever.answer_block

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return answer_block(*args, **options)

    monkeypatch.setattr(retriever, "answer_block", slowly)
    with ThreadPoolExecutor(12) as clients:
        asked = [clients.submit(live.ask, "/v1/retrieve", {"texts": [f"film {i}"]}) for i in range(12)]
        assert live.ask("/v2/health/live").status == 200
        replies = [one.result() for one in asked]
    refused = [reply for reply in replies if reply.status == 429]
    assert refused
    assert {reply.status for reply in replies} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 and "wait already" in reply.error for reply in refused)


def test_a_request_that_takes_too_long_is_504(start, index_folder, monkeypatch):
    live = start(index_folder, request_seconds=0.3)
    retriever = live.service.indexes["index"].current.retriever
    monkeypatch.setattr(retriever, "answer_block", lambda *_, **__: time.sleep(1.0))
    reply = live.ask("/v1/retrieve", {"texts": ["a film"]})
    assert (reply.status, "no answer" in reply.error) == (504, True)


def test_a_server_that_computes_no_more_lives_but_is_not_ready(start, index_folder):
    live = start(index_folder)
    assert live.service.worker.stop(30)
    ready = live.ask("/v2/health/ready")
    assert (ready.status, ready.json) == (503, {"ready": False})
    assert live.ask("/v2/health/live").status == 200
    reply = live.ask("/v1/retrieve", {"texts": ["a film"]})
    assert (reply.status, reply.error) == (503, "the server is being stopped.")


def test_a_fault_is_500_without_its_texts_in_answer_or_log(start, index_folder, monkeypatch, caplog):
    live = start(index_folder)
    retriever = live.service.indexes["index"].current.retriever
    monkeypatch.setattr(retriever, "answer_block", lambda *_, **__: 1 / len(""))
    with caplog.at_level(logging.INFO, "forebear.server"):
        reply = live.ask("/v1/retrieve", {"texts": ["the private text"]})
        assert reply.status == 500
        assert "ZeroDivisionError" not in reply.error
        assert until(lambda: " 500 " in caplog.text)
    assert "ZeroDivisionError" in caplog.text
    assert "private" not in caplog.text


def test_the_log_has_texts_where_that_is_asked_for(start, index_folder, caplog):
    live = start(index_folder, log_texts=True)
    with caplog.at_level(logging.INFO, "forebear.server"):
        live.ask("/v1/retrieve", {"texts": ["the text\n2026 INFO forged"]})
        assert until(lambda: " 200 " in caplog.text)
    assert "the text" in caplog.text
    assert "\n2026" not in caplog.text


def test_a_token_is_needed_where_there_is_one_but_for_health(start, index_folder):
    live = start(index_folder, token=SECRET)
    for wrong in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": SECRET},
        {"authorization": f"Basic {SECRET}"},
    ):
        reply = live.ask("/v1/retrieve", {"texts": ["a film"]}, **wrong)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert SECRET not in reply.error
        assert live.ask("/metrics", **wrong).status == live.ask("/openapi.json", **wrong).status == 401
    assert live.ask("/v2/health/ready").status == 200
    asked = {"authorization": f"Bearer {SECRET}", "host": "forebear.example"}
    assert live.ask("/v1/retrieve", {"texts": ["a film"]}, **asked).status == 200


def test_limits_that_let_nothing_through_are_refused():
    Limits().check()
    Limits(model_texts=0).check()
    for name in ("texts", "queue", "model_texts"):
        with pytest.raises(InputError, match=f"{name.replace('_', ' ')} -1: expected at least"):
            Limits(**{name: -1}).check()
