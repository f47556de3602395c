"""Answers over HTTP are those of the command line and of the library."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from serving import until

import forebear
from forebear.cli.main import run
from forebear.indexer.model import forward
from forebear.retriever.question.methods import METHODS

METHODS_ASKED = ["gc", "if", "nn-euc", "tracin-we-topk"]
BETWEEN_BATCHES = 1e-5  # what the other texts of a batch may move a score by, relative to the largest of its ranking


def by_command(folder: str, tmp_path: Any, *options: str) -> list[dict[str, Any]]:
    out = tmp_path / "answers.jsonl"
    assert run(["retrieve", "--index", folder, "--out", str(out), "--quiet", "--force", *options]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def flat(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers as ``retrieve --out`` writes them: a line a result."""
    return [
        {"query": one["query"], "query_prediction": one["query_prediction"], "target": one["target"], **result}
        for one in answers
        for result in one["results"]
    ]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same results; numbers within what the batch of a forward pass moves them by."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        rest = {name: value for name, value in other.items() if name != "query_label"}
        assert list(one) == list(rest)
        for name, value in rest.items():
            if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
                np.testing.assert_allclose(one[name], value, rtol=BETWEEN_BATCHES, atol=1e-9)
            else:
                assert one[name] == value, name


def test_one_text_gets_the_bits_of_the_command_line(live, bert_world, index_folder, tmp_path):
    text = bert_world.queries[0]
    expected = by_command(index_folder, tmp_path, "--text", text, "--method", ",".join(METHODS_ASKED), "--top", "3")
    found = live.ask("/v1/retrieve", {"texts": [text], "methods": METHODS_ASKED, "top": 3})
    assert found.status == 200
    assert found.json["index"] == "tiny"
    assert found.json["digest"] == bert_world.index.manifest.digest() == found.headers["x-forebear-digest"]
    (answer,) = found.json["answers"]
    assert flat([answer]) == [{k: v for k, v in one.items() if k != "query_label"} for one in expected]


def test_several_texts_get_the_rows_of_the_command_line(live, bert_world, index_folder, tmp_path):
    """Seven texts are computed four and three at a time here, together there."""
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in bert_world.queries), encoding="utf-8")
    expected = by_command(index_folder, tmp_path, "--test", str(file), "--method", ",".join(METHODS_ASKED))
    body = {"texts": bert_world.queries, "methods": METHODS_ASKED}
    assert_same(flat(live.ask("/v1/retrieve", body).json["answers"]), expected)
    lines = live.ask("/v1/retrieve", body, accept="application/x-ndjson")
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [line["query"] for line in lines.lines] == list(range(len(bert_world.queries)))
    assert_same(flat(lines.lines), expected)


def test_texts_asked_at_once_get_what_each_gets_alone(live, bert_world):
    """Twenty texts from twenty clients; some are computed together."""
    texts = [f"{text} {word}" for text in bert_world.queries[:5] for word in ("good", "bad", "film", "dull")]
    body = {"methods": ["if"], "top": 2}
    alone = [live.ask("/v1/retrieve", {"texts": [text], **body}).json for text in texts]
    before = live.measure("forebear_batch_requests_count")
    with ThreadPoolExecutor(len(texts)) as clients:
        together = list(clients.map(lambda text: live.ask("/v1/retrieve", {"texts": [text], **body}).json, texts))
    assert live.measure("forebear_batch_requests_count") - before < len(texts)
    for one, other in zip(alone, together, strict=True):
        assert one["facts"] == other["facts"]
        (expected,), (found,) = one["answers"], other["answers"]
        assert_same(flat([found]), flat([expected]))


def test_batches_of_texts_of_many_lengths_are_little_padded(start, index_folder, monkeypatch):
    live = start(index_folder)
    seen: list[tuple[int, int]] = []
    run_batch = forward.forward_batch

    def watched(classifier: Any, batch: Any) -> Any:
        seen.append((batch["input_ids"].numel(), int(batch["attention_mask"].sum())))
        return run_batch(classifier, batch)

    monkeypatch.setattr(forward, "forward_batch", watched)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["good", "film", "bad", "plot"], n)) for n in [3, 30] * 32]
    assert live.ask("/v1/retrieve", {"texts": texts, "methods": ["gc"], "top": 1}).status == 200
    padded, read = np.sum(seen, axis=0)
    assert read > 1000
    assert padded < 1.3 * read  # in one batch it would be twice as much


def test_scores_are_those_of_the_library_in_the_order_of_the_rows(live, bert_world):
    wanted, texts = [41, 3, 17, 3], bert_world.queries[:6]
    found = live.ask("/v1/score", {"texts": texts, "methods": ["gd", "rif"], "rows": wanted}).json
    assert found["rows"] == [3, 17, 41]
    for method in ("gd", "rif"):
        expected = bert_world.retriever.scores(texts, method)[:, found["rows"]]
        scores = np.array([one["scores"][method] for one in found["answers"]])
        np.testing.assert_allclose(scores, expected, rtol=BETWEEN_BATCHES, atol=1e-7 * np.abs(expected).max())
    every = live.ask("/v1/score", {"texts": texts[:1], "methods": ["gd"]}).json
    assert every["rows"] == bert_world.index.live.tolist() == list(range(len(bert_world.texts)))


def test_an_explanation_is_that_of_the_library(live, bert_world):
    text = bert_world.queries[1]
    expected = asdict(forebear.explain(bert_world.retriever, text, top=2, flip=True))
    (found,) = live.ask("/v1/explain", {"text": text, "top": 2, "flip": True}).json["answers"]
    assert [answer["method"] for answer in found["answers"]] == ["tracin-we-topk", "gc"]
    for name in expected.keys() - {"provenance"}:
        assert found[name] == json.loads(json.dumps(expected[name])), name
    assert str(bert_world.index.folder) not in json.dumps(found)
    assert "checkpoint" not in " ".join(found["provenance"])
    named = live.ask("/v1/explain", {"text": text, "methods": ["if"], "form": "summed-gradient"}).json["answers"][0]
    assert [answer["method"] for answer in named["answers"]] == ["if"]
    assert named["form"] == "summed-gradient"


def test_flip_sets_are_those_of_the_library(live, bert_world):
    texts = bert_world.queries[:3]
    expected = json.loads(
        json.dumps(
            forebear.flip(bert_world.retriever, texts, limit=20).result["sets"], default=lambda value: value.tolist()
        )
    )
    found = live.ask("/v1/flip", {"texts": texts, "limit": 20}).json["answers"]
    assert [one.pop("query") for one in found] == [0, 1, 2]
    sizes = [one.pop("size") for one in found]
    assert found == expected
    assert sizes == [len(one["rows"]) if one["flipped_at_head"] else None for one in expected]


def test_facts_are_those_of_the_library_without_the_folder(live, bert_world):
    found = live.ask("/v1/retrieve", {"texts": ["a film"], "methods": ["rif"]}).json
    expected = bert_world.retriever.facts(forebear.QuerySpec(methods=("rif",)))
    assert found["facts"] == json.loads(json.dumps(expected | {"index": "tiny"}))
    assert found["notes"] == []


def test_indexes_and_methods_say_what_can_be_asked(live, bert_world):
    (index,) = live.ask("/v1/indexes").json["indexes"]
    assert index["name"] == "tiny"
    assert index["rows"] == {"live": len(bert_world.texts), "retired": 0}
    assert (index["text_columns"], index["problem"]) == (["text"], None)
    assert index["methods"] == list(bert_world.retriever.available_methods())
    methods = live.ask("/v1/methods").json["methods"]
    assert [one["name"] for one in methods] == list(METHODS)
    assert {one["name"] for one in methods if one["indexes"] == ["tiny"]} == set(index["methods"])


def test_pairs_are_asked_as_pairs(start, make_world):
    world = make_world("bert", 2, True, 1)
    live = start(f"pairs={world.index.folder}")
    pair = world.queries[0]
    (found,) = live.ask("/v1/retrieve", {"texts": [list(pair)], "top": 2}).json["answers"]
    expected = world.retriever.retrieve([pair], methods=["gc"], top=2)
    assert [result["row"] for result in found["results"]] == expected.column("row").to_pylist()
    assert "2 (premise, hypothesis)" in live.ask("/v1/retrieve", {"texts": ["one text"]}).error


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/metrics", "/openapi.json"])
def test_health_measures_and_document_are_there(live, path):
    assert live.ask(path).status == 200


def test_measures_count_requests_by_route_and_status(live):
    def count(status: str) -> float:
        return live.measure("forebear_requests_total", route="/v1/score", status=status)

    before = count("200"), count("422")
    live.ask("/v1/score", {"texts": ["a"], "rows": [1]})
    live.ask("/v1/score", {"texts": ["a"], "rows": [999]})
    assert until(lambda: (count("200") - before[0], count("422") - before[1]) == (1, 1))
    text = live.ask("/metrics").body.decode()
    assert 'forebear_requests_total{route="/v1/score",status="200"}' in text
    assert f'forebear_index_rows{{index="tiny"}} {60.0}' in text
    assert "process_resident_memory_bytes" in text


def test_the_document_has_an_example_of_each_question_and_each_is_answered_or_needs_another_index(live):
    document = live.ask("/openapi.json").json
    for path in ("/v1/retrieve", "/v1/explain", "/v1/flip", "/v1/score"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            reply = live.ask(path, example["value"])
            if name in ("pairs of texts", "beyond the head", "three rows"):  # rows up to 317, of 60
                assert reply.status == 422, name
            else:
                assert reply.status == 200, (path, name, reply.body)
