"""The same numbers on a GPU; skipped where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from interruptions import hashes
from tiny import labels, make_tiny_model, sentences

from forebear import METHODS, BuildOptions, Retriever, TrainOptions, build_index, choose_model, rows_from_texts, train
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.gradients.whole import _Sums
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of

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


def test_a_run_and_its_index_repeat_to_the_last_bit(tmp_path):
    model = str(make_tiny_model(tmp_path / "model", scale=2.0))
    source = rows_from_texts(sentences(96, low=8, high=36), labels(96))
    found = []
    for name in ("first", "second"):
        options = TrainOptions(epochs=2, batch_size=8, learning_rate=1e-2, precision="fp32", device="cuda")
        run = train(source, model, tmp_path / name / "run", options)
        assert run.settings["computed_on"]["deterministic"]
        choices = BuildOptions(
            device="cuda", stores=("features", "words"), words_tops=(0,), scopes=("head", "all"), sketch_dim=16,
            sketch_bits=64, white_bits=64, calibration_queries=8,
        )  # fmt: skip
        checkpoints = choose_model(str(tmp_path / name / "run")).checkpoints
        build_index(source, tmp_path / name / "index", checkpoints, choices)
        files = hashes(tmp_path / name)
        del files["index/manifest.json"]  # it names the folder of the run
        found.append(files)
    assert found[0] == found[1]
    manifest = json.loads((tmp_path / "first" / "index" / "manifest.json").read_text())
    assert manifest["computed_on"]["device"] == torch.cuda.get_device_name()


def test_batches_that_do_not_fit_on_the_gpu_are_halved_and_give_the_same_numbers(tmp_path):
    classifier = load_classifier(str(make_tiny_model(tmp_path / "model")), device="cuda")
    texts, gold = sentences(8000, low=20, high=36), np.array(labels(8000))  # about 700 MB in one batch
    scope, told = scope_of(classifier, "all"), []

    def summed(batch_tokens: int) -> dict[str, torch.Tensor]:
        collector = _Sums(scope, np.zeros(len(gold), np.int64), classifier.head.weight)
        seeds = labels_seed(CROSS_ENTROPY, gold)
        run_pass(classifier, [texts], seeds, [collector], batch_tokens=batch_tokens, warn=told.append)
        return collector.out

    wanted = summed(4096)
    assert not told
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (128 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = summed(1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told
    for name, values in wanted.items():
        assert (found[name] - values).abs().max() <= 1e-3 * values.abs().max(), name
