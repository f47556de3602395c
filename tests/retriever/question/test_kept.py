"""What is kept for later questions stays within its budget, and answers do not depend on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import labels, sentences

from forebear import BuildOptions, Index, build_index, choose_model, rows_from_texts
from forebear.indexer.model.device.batch_size import vector_bytes_on
from forebear.retriever.deep import search
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.kept import Kept, budget_on, size_of
from forebear.retriever.question.methods import METHODS
from forebear.retriever.retriever import Retriever


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_model) -> Index:
    """Two checkpoints and all layers."""
    models = choose_model(None, (tiny_model(), tiny_model(seed=1)), (1.0, 0.5)).checkpoints
    options = BuildOptions(scopes=("head", "all"), sketch_dim=16, sketch_bits=64, white_bits=64, calibration_queries=2)
    return build_index(
        rows_from_texts(sentences(40), labels(40)), tmp_path_factory.mktemp("kept") / "i", models, options
    )


def test_those_not_used_for_longest_go_first():
    kept = Kept(budget=3 * 40)
    for name in "abc":
        kept.put(name, np.zeros(5))
    kept.get("a", lambda: pytest.fail("it is kept"))
    kept.put("d", np.zeros(5))
    assert kept.find("b") is None
    assert all(kept.find(name) is not None for name in "acd")
    assert kept.n_bytes == 3 * 40
    kept.drop("a")
    kept.drop("a")
    assert kept.n_bytes == 2 * 40


def test_what_stays_or_is_in_use_is_not_given_up():
    kept = Kept(budget=50)
    kept.put("model", np.zeros(10), stays=True)
    kept.put("search", object())
    kept.put("first", np.zeros(5))
    kept.put("second", np.zeros(5))
    assert kept.find("first") is None
    assert all(kept.find(name) is not None for name in ("model", "search", "second"))


def test_bytes_are_those_of_arrays_tensors_and_networks(tmp_path):
    np.zeros(100).tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", np.float64)
    layer = torch.nn.Linear(3, 2)
    assert size_of({"a": [np.zeros(4), torch.zeros(2)], "b": (layer, "text", 7)}) == 32 + 8 + 4 * (6 + 2)
    assert size_of(Kept()) == 0
    assert size_of(mapped.view(np.ndarray)) == 0


def test_gradients_and_solutions_of_a_block_fit_in_what_a_gpu_keeps(monkeypatch):
    """Otherwise each would push the other out."""
    device = torch.device("cuda:0")
    for n_bytes in (8 << 30, 139 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, n_bytes=n_bytes: (0, n_bytes))
        assert vector_bytes_on(device, search.VECTOR_BYTES) <= budget_on(device)
    assert budget_on(torch.device("cpu")) >= search.VECTOR_BYTES


def test_solvers_that_iterate_take_fewer_test_rows_at_once(index, monkeypatch):
    """They hold more vectors of each."""
    models = Retriever(index).models
    for solver, method, size in ((None, "gd", 8), (None, "if", 4), ("identity", "rif", 4), ("cg", "if", 2)):
        search_of = search.GradientSearch(models, "all", CurvatureSpec(solver=solver))
        monkeypatch.setattr(search, "VECTOR_BYTES", 8 * 4 * search_of.gradients.parameters.size)
        assert [len(chunk) for chunk in search_of.chunks([METHODS[method]], 8)] == [size] * (8 // size)


def test_candidates_are_encoded_once_for_all_chunks_and_checkpoints(index, monkeypatch):
    asked, encode, encoded = sentences(6, seed=3), search.encode, []
    wanted = Retriever(index).retrieve(asked, methods=["tracin", "gc"], scope="all", top=4, exact="full")
    monkeypatch.setattr(search, "VECTOR_BYTES", 1)  # a chunk for each test row
    monkeypatch.setattr(search, "encode", lambda c, texts: encoded.extend(texts[0]) or encode(c, texts))
    retriever = Retriever(index)
    found = retriever.retrieve(asked, methods=["tracin", "gc"], scope="all", top=4, exact="full")
    assert len(encoded) == index.manifest.n_live
    assert found["row"].to_pylist() == wanted["row"].to_pylist()


def test_answers_are_the_same_where_nothing_can_be_kept(index):
    asked = sentences(3, seed=5)
    question = {"methods": ["tracin", "if", "rif"], "scope": "all", "top": 4}
    wanted = Retriever(index).retrieve(asked, **question)
    retriever = Retriever(index)
    retriever.models.kept = Kept(budget=0)
    found = retriever.retrieve(asked, **question)
    assert found["row"].to_pylist() == wanted["row"].to_pylist()
    assert found["score"].to_pylist() == wanted["score"].to_pylist()
