"""Scores do not depend on how the work was cut up: batches, padding, shards, threads, order, neighbours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DAMPINGS, ROW_METHODS, World, error

from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["bert", "roberta"])
def world(request: pytest.FixtureRequest, make_world: Any) -> World:
    return make_world("bert", 2, False, 2) if request.param == "bert" else make_world("roberta", 3, True, 3)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's thread count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(world: World, out: Path, order: np.ndarray | None = None, **changes: Any) -> Index:
    order = np.arange(len(world.texts)) if order is None else order
    source = rows_from_texts([world.texts[i] for i in order], [world.labels[i] for i in order])
    stores = {"stores": ("features", "sbert", "words"), "words_tops": (0, 3), "sentence_model": world.sentence_model}
    options = stores | {"shard_rows": 17, "seed": 0, "dampings": DAMPINGS}
    chosen = choose_model(None, world.models, world.etas).checkpoints
    return build_index(source, out, chosen, BuildOptions(**(options | {"batch_tokens": 64} | changes)))


def all_scores(retriever: Retriever, queries: list[Any]) -> dict[str, np.ndarray]:
    return {name: retriever.scores(queries, name) for name in ROW_METHODS}


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, np.ndarray]:
    return all_scores(world.retriever, world.queries)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    errors = {name: error(found[name], expected[name]) for name in ROW_METHODS}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_scores_do_not_depend_on_batch_size_and_padding(
    batch_tokens: int, world: World, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """One token a batch is one row a batch, without padding."""
    index = build(world, tmp_path / "index", batch_tokens=batch_tokens)
    assert_same(all_scores(Retriever(index), world.queries), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shard_rows", [1, 1000])
def test_scores_do_not_depend_on_shards(
    shard_rows: int, world: World, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    index = build(world, tmp_path / "index", shard_rows=shard_rows)
    assert_same(all_scores(Retriever(index), world.queries), expected)


def test_scores_do_not_depend_on_the_order_of_training_rows(
    world: World, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(len(world.texts))
    found = all_scores(Retriever(build(world, tmp_path / "index", order)), world.queries)
    assert_same(found, {name: scores[:, order] for name, scores in expected.items()})


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n_threads", [1, 2])
def test_scores_do_not_depend_on_the_number_of_threads(
    n_threads: int, world: World, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch.set_num_threads(n_threads)
    index = build(world, tmp_path / "index")
    assert index.manifest.spec.n_threads == n_threads
    assert_same(all_scores(Retriever(index), world.queries), expected)


def test_a_querys_scores_do_not_depend_on_its_neighbours(world: World, expected: dict[str, np.ndarray]) -> None:
    for i in (0, 3):
        assert_same(all_scores(world.retriever, [world.queries[i]]), {m: s[[i]] for m, s in expected.items()})
    long = "good " * 30
    first = world.queries[0]
    beside = [first, long if isinstance(first, str) else (long, "bad")]
    found = {m: s[:1] for m, s in all_scores(world.retriever, beside).items()}
    assert_same(found, {m: s[:1] for m, s in expected.items()})


def test_scores_follow_the_order_of_queries(world: World, expected: dict[str, np.ndarray]) -> None:
    found = all_scores(world.retriever, world.queries[::-1])
    assert_same({m: s[::-1] for m, s in found.items()}, expected)


def test_answers_do_not_depend_on_the_block_of_queries(world: World) -> None:
    source = rows_from_texts(world.queries, world.query_labels)
    spec = QuerySpec(methods=ROW_METHODS, top=4)
    whole = [world.retriever.answers(source, spec, block_rows=b) for b in (512, 3, 1)]
    tables = []
    for answers in whole:
        blocks = list(answers)
        assert [b.start for b in blocks] == list(np.cumsum([0, *(len(b.targets) for b in blocks)]))[:-1]
        tables.append(
            {m: [np.concatenate([b.rankings[m][e].rows for b in blocks]) for e in (0, 1)] for m in ROW_METHODS}
            | {"targets": [np.concatenate([b.targets for b in blocks])]}
        )
    for other in tables[1:]:
        for name, ends in tables[0].items():
            for a, b in zip(ends, other[name], strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)


FLOAT16 = 1e-3 / TOLERANCE


def test_retrieve_gives_the_ends_of_scores_in_every_mode(world: World, expected: dict[str, np.ndarray]) -> None:
    """The table's rows and scores are those of a sort of ``Retriever.scores``."""
    k = 5
    for exact in ("none", "rerank", "full"):  # "none" of words: the stored vectors, in fp16
        table = world.retriever.retrieve(world.queries, methods=list(ROW_METHODS), top=k, exact=exact)
        rows = table["row"].to_numpy().reshape(len(world.queries), len(ROW_METHODS), 2, k)
        scores = table["score"].to_numpy().reshape(rows.shape)
        for m, name in enumerate(ROW_METHODS):
            for q, truth in enumerate(expected[name]):
                for side, sign in enumerate((1, -1)):
                    best = np.sort(sign * truth)[::-1][:k] * sign
                    size = np.abs(truth).max()
                    if METHODS[name].words and exact == "none":
                        size *= FLOAT16
                    case = f"{name}, {exact}, query {q}, side {side}"
                    np.testing.assert_allclose(scores[q, m, side], best, atol=TOLERANCE * size, err_msg=case)
                    np.testing.assert_allclose(truth[rows[q, m, side]], best, atol=TOLERANCE * size, err_msg=case)


def test_left_padding_in_the_tokenizers_settings_changes_nothing(bert_world: World, tmp_path: Path) -> None:
    """BERT counts positions from the left: a row padded there is another input, so scores would depend on the batch."""
    folder = Path(shutil.copytree(bert_world.models[-1], tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    source = rows_from_texts(bert_world.texts, bert_world.labels)
    indexes = [
        build_index(source, tmp_path / name, choose_model(str(where)).checkpoints, BuildOptions())
        for name, where in (("left", folder), ("right", bert_world.models[-1]))
    ]
    left, right = (Retriever(index).scores(bert_world.queries, "nn-dot") for index in indexes)
    assert error(left, right) <= TOLERANCE
