"""Exact dot products divided among copies of a model are those of one, to the last bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import labels, sentences

from forebear import BuildOptions, InputError, QuerySpec, Retriever, build_index, choose_model
from forebear.cli.main import run
from forebear.indexer.gradients import replicas as replicas_module
from forebear.indexer.gradients.replicas import dots_on_devices
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts

TEXTS, LABELS = sentences(300, seed=3, low=2, high=30), np.array(labels(300, 2, seed=4))
TEXTS[200:220], LABELS[200:220] = TEXTS[10:30], LABELS[10:30]


def copies(classifier: Classifier, n: int) -> list[Classifier]:
    return [classifier, *(replace(classifier, model=copy.deepcopy(classifier.model)) for _ in range(n - 1))]


@pytest.fixture
def threads_that_ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the threads that computed a part."""
    ran: list[int] = []

    def noted(*args: object, **kwargs: object) -> np.ndarray:
        ran.append(threading.get_ident())
        return exact_dots(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(replicas_module, "exact_dots", noted)
    return ran


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
@pytest.mark.parametrize("n_wanted", [None, 40])
@pytest.mark.parametrize("n", [2, 3])
def test_copies_give_the_dots_of_one_model(
    n: int, n_wanted: int | None, kind: str, tiny_model: Callable[..., str], threads_that_ran: list[int]
) -> None:
    classifier = load_classifier(tiny_model(kind, 2, 0), device="cpu")
    scope = scope_of(classifier, "all")
    vectors = whole_gradients(classifier, scope, [TEXTS[:5]], LABELS[:5])
    encoded = Encoded(encode(classifier, [TEXTS]))
    wanted = None
    if n_wanted is not None:
        wanted = np.zeros((5, len(TEXTS)), bool)
        for query, row in enumerate(wanted):
            row[np.random.default_rng(query).permutation(len(TEXTS))[:n_wanted]] = True
    alone = exact_dots(classifier, scope, vectors, encoded, LABELS, wanted=wanted)
    shared = dots_on_devices(copies(classifier, n), scope, vectors, encoded, LABELS, wanted=wanted)
    assert len(threads_that_ran) == n
    assert (shared == alone).all()


def test_fewer_batches_than_copies(tiny_model: Callable[..., str], threads_that_ran: list[int]) -> None:
    classifier = load_classifier(tiny_model("bert", 2, 0), device="cpu")
    scope = scope_of(classifier, "top-1")
    vectors = whole_gradients(classifier, scope, [TEXTS[:2]], LABELS[:2])
    texts, gold = [TEXTS[:3]], LABELS[:3]
    shared = dots_on_devices(copies(classifier, 3), scope, vectors, texts, gold)
    assert (shared == exact_dots(classifier, scope, vectors, texts, gold)).all()
    assert len(threads_that_ran) == 1


def test_spans_are_divided_too(tiny_model: Callable[..., str]) -> None:
    classifier = load_classifier(tiny_model("bert", 2, 0), device="cpu")
    scope = scope_of(classifier, "all")
    vectors = whole_gradients(classifier, scope, [TEXTS[:2]], LABELS[:2])
    rows = encode(classifier, [TEXTS])
    masked = [{name: [*ids[:-2], *ids[-1:]] for name, ids in row.items()} for row in rows]
    entries = Encoded([*rows, *rows[:40]], [*masked, *rows[40:80]], np.array([*range(300), *range(40)]))
    gold = np.concatenate([LABELS, LABELS[:40]])
    alone = exact_dots(classifier, scope, vectors, entries, gold)
    assert (dots_on_devices(copies(classifier, 2), scope, vectors, entries, gold) == alone).all()


def test_an_answer_by_two_devices_is_that_of_one(
    tiny_model: Callable[..., str], tmp_path: Path, threads_that_ran: list[int]
) -> None:
    chosen = choose_model(None, [tiny_model("bert", 2, 0), tiny_model("bert", 2, 1)], (1.0, 0.5)).checkpoints
    options = BuildOptions(
        scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=0, batch_tokens=512
    )
    index = build_index(rows_from_texts(TEXTS, LABELS.tolist()), tmp_path / "index", chosen, options)
    spec = QuerySpec(methods=("gd", "if", "tracin"), scope="top-1", exact="full", top=7)
    one, two = (
        Retriever(index, **where).retrieve(TEXTS[:3], spec=spec)
        for where in ({"device": "cpu"}, {"devices": ["cpu", "cpu"]})
    )
    assert one.equals(two)
    assert len(threads_that_ran) == 2 + 2 * 2  # at two checkpoints: by one thread, by two
    command = ["retrieve", "--index", str(index.folder), "--text", TEXTS[0], "--method", "gd,if,tracin", "--quiet"]
    command += ["--scope", "top-1", "--exact", "full", "--out"]
    assert run([*command, str(tmp_path / "one.parquet"), "--device", "cpu"]) == 0
    assert run([*command, str(tmp_path / "two.parquet"), "--devices", "cpu,cpu"]) == 0
    assert pq.read_table(tmp_path / "one.parquet").equals(pq.read_table(tmp_path / "two.parquet"))
    with pytest.raises(InputError, match="beside device"):
        Retriever(index, device="cpu", devices=["cpu", "cpu"])
