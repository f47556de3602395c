"""The same numbers on a GPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import labels, make_tiny_model, sentences

from forebear import METHODS, BuildOptions, Retriever, build_index, choose_model, rows_from_texts

pytestmark = pytest.mark.gpu


def test_an_index_built_on_the_gpu_answers_like_one_built_on_the_cpu(tmp_path):
    model = str(make_tiny_model(tmp_path / "model"))
    source = rows_from_texts(sentences(80), labels(80))
    retrievers = {}
    for device in ("cpu", "cuda"):
        options = BuildOptions(
            device=device, stores=("features", "sbert"), sentence_model=model, scopes=("head", "all"), sketch_dim=16,
            sketch_bits=64, white_bits=64, calibration_queries=8,
        )  # fmt: skip
        index = build_index(source, tmp_path / device, choose_model(model).checkpoints, options)
        retrievers[device] = Retriever(index, device=device)
    for method in METHODS:
        cpu, cuda = (retrievers[d].scores(sentences(9, seed=3), method) for d in ("cpu", "cuda"))
        assert np.abs(cpu - cuda).max() <= 1e-4 * np.abs(cpu).max(), method
    for method in ("gd", "gc", "tracin", "if", "rif"):
        ask = {"method": method, "scope": "all"}
        cpu, cuda = (retrievers[d].scores(sentences(9, seed=3), **ask) for d in ("cpu", "cuda"))
        assert np.abs(cpu - cuda).max() <= 1e-3 * np.abs(cpu).max(), method
        rows = [
            retrievers[d].retrieve(["a film"], methods=[method], scope="all", top=5)["row"] for d in ("cpu", "cuda")
        ]
        assert len(set(rows[0].to_pylist()) & set(rows[1].to_pylist())) >= 9, method
