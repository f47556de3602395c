"""Scopes: what their names say, and what a scope knows of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import labels, sentences

from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.gradients.tape import Tape
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scope_names import n_top_layers, scope_named
from forebear.indexer.model.scopes import embedding_scope, encoder_input_scope, root_modules, scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model


def test_names_say_which_layers() -> None:
    assert [n_top_layers(name) for name in ("top-1", "top-12", "top-", "top-x", "all", "layer:top-1")] == [
        1, 12, None, None, None, None
    ]  # fmt: skip
    assert [scope_named(name) for name in ("head", "all", "top-3")] == ["head", "all", "top-3"]
    assert scope_named("bert.encoder.layer.0.output.dense") == "layer:bert.encoder.layer.0.output.dense"


def test_a_pass_over_several_scopes_starts_below_the_deepest(tiny_model: Callable[..., str]) -> None:
    classifier = load_classifier(tiny_model("bert", 2, 0))
    scopes = {name: scope_of(classifier, name) for name in ("head", "top-1", "top-2", "all")}
    assert [scope.depth for scope in scopes.values()] == [0, 1, 2, math.inf]
    assert embedding_scope(classifier).depth == encoder_input_scope(classifier).depth == math.inf
    layers = classifier.model.bert.encoder.layer
    for names, root in (
        (("head",), None),
        (("top-1", "head"), ([layers[1]], False)),
        (("top-1", "top-2"), ([layers[0]], False)),
        (("all", "top-2"), ([classifier.model.bert.embeddings.word_embeddings], True)),
    ):
        tape = Tape(classifier, [scopes[name] for name in names])
        found = tape._root and (tape._root._modules, tape._root._is_embedding)
        assert found == root
        assert len(tape.blocks) == max(len(scopes[name].blocks) for name in names)
    assert root_modules(classifier, encoder_input_scope(classifier)) == ([layers[0]], False)


def test_zeros_are_of_the_blocks_shapes(tiny_model: Callable[..., str]) -> None:
    scope = scope_of(load_classifier(tiny_model("bert", 2, 0)), "all", with_bias=True)
    zeros = scope.zeros(3, torch.empty(0, dtype=torch.float64))
    assert {name: (z.shape, z.dtype) for name, z in zeros.items()} == {
        block.name: ((3, block.n_out, block.n_in), torch.float64) for block in scope.blocks
    }
    assert scope.size == sum(z[0].numel() for z in zeros.values())


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_index_takes_biases_beyond_the_head_alone(
    with_bias: bool, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    options = BuildOptions(
        scopes=("head", "top-1"), with_bias=with_bias, calibration_queries=0, sketch_dim=8, curvature="none"
    )
    source = rows_from_texts(sentences(12, seed=3), labels(12, seed=4))
    index = build_index(source, tmp_path / "index", choose_model(tiny_model()).checkpoints, options)
    classifier = load_classifier(tiny_model())
    assert [block.bias for block in index.scope(classifier, "head").blocks] == [False]
    assert any(block.bias for block in index.scope(classifier, "top-1").blocks) == with_bias
