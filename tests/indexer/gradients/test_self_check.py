"""The check before a build: gradients from hooks against autograd, and padded logits; whatever is wrong is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import make_family
from tiny import labels, sentences, write_jsonl

from forebear.cli.main import run
from forebear.errors import ModelError
from forebear.indexer.building import build
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.building.spec import make_spec
from forebear.indexer.gradients import self_check
from forebear.indexer.gradients.embedding_uses import EmbeddingUses
from forebear.indexer.gradients.layer_uses import LayerUses
from forebear.indexer.gradients.self_check import check_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model

TEXTS = ["good film", "a bad story and a dull plot", "the actor was very happy near the artist", "slow"]
QUERY, OUTPUT = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("check") / "bert", "bert")


def test_rows_of_different_lengths_agree_with_autograd(folder):
    classifier = load_classifier(folder)
    checked = check_gradients(
        classifier, ["head", "top-1", "all"], encode(classifier, [TEXTS]), with_bias=True, words=True
    )
    assert checked.n_rows == 4
    assert tuple(checked.errors) == ("head", "top-1", "all", "embedding")
    assert 0 < checked.largest_error < 1e-4
    assert 0 < checked.largest_logit_error < 1e-5


def test_a_head_of_zeros_has_gradients_and_logits_of_zero_and_passes(folder):
    """Nothing is divided by them."""
    classifier = load_classifier(folder)
    for parameter in classifier.head.parameters():
        torch.nn.init.zeros_(parameter)
    checked = check_gradients(classifier, ["head", f"layer:{QUERY}"], encode(classifier, [TEXTS]), words=True)
    assert (checked.largest_error < 1e-4, checked.largest_logit_error) == (True, 0.0)


def test_a_gradient_where_autograd_has_none_is_found_by_name(folder, monkeypatch):
    classifier = load_classifier(folder)
    torch.nn.init.zeros_(classifier.head.weight)
    monkeypatch.setattr(self_check, "_gradient", lambda block, factors, i, like: torch.ones_like(like))
    with pytest.raises(ModelError, match=rf"the gradient of {QUERY}, .* differs by 100\.0% from autograd's"):
        check_gradients(classifier, [f"layer:{QUERY}"])


def test_a_use_that_is_dropped_is_found_by_name(folder, monkeypatch):
    whole = LayerUses._arrive

    def without_query(self, block, number, delta):
        if block.name != QUERY:
            whole(self, block, number, delta)

    monkeypatch.setattr(LayerUses, "_arrive", without_query)
    with pytest.raises(ModelError, match=rf"the gradient of {QUERY}, .* differs by 100\.0% from autograd's"):
        check_gradients(load_classifier(folder), ["top-1"])


def test_a_delta_that_is_scaled_is_found_by_name(folder, monkeypatch):
    whole = LayerUses._arrive

    def scaled(self, block, number, delta):
        whole(self, block, number, delta * 1.01 if block.name == OUTPUT else delta)

    monkeypatch.setattr(LayerUses, "_arrive", scaled)
    with pytest.raises(ModelError, match=rf"the gradient of {OUTPUT}, .* differs by 1\.0% from autograd's"):
        check_gradients(load_classifier(folder), ["all"])


def test_word_gradients_that_are_scaled_are_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(EmbeddingUses, "_scale", lambda *_args: 1.5)
    with pytest.raises(ModelError, match=r"the gradient of bert\.embeddings\.word_embeddings, .* differs"):
        check_gradients(load_classifier(folder), ["head"], words=True)


def test_weights_that_are_used_past_their_layer_are_refused_before_the_pass(folder, tmp_path):
    """No hook sees a product with the weight itself."""
    classifier = load_classifier(folder)
    pooler = classifier.model.bert.pooler

    def forward(hidden):
        first = hidden[:, 0]
        return torch.tanh(pooler.dense(first) + torch.nn.functional.linear(first.flip(1), pooler.dense.weight))

    pooler.forward = forward
    with pytest.raises(ModelError, match=r"bert\.pooler\.dense.* uses these weights in another way"):
        check_gradients(classifier, ["head", "top-1"])


def test_logits_that_depend_on_the_batch_are_refused(folder):
    """On rows of the user's own, where the texts of the probe showed nothing."""
    classifier = load_classifier(folder)
    whole = classifier.model.bert.embeddings.forward

    def forward(input_ids=None, **inputs):
        states = whole(input_ids=input_ids, **inputs)
        return states + torch.linspace(0, 0.5, states.shape[2]) if input_ids.shape[1] > 9 else states

    classifier.model.bert.embeddings.forward = forward
    with pytest.raises(ModelError, match=r"logits of a row in a padded batch differ by .* from those of the row alone"):
        check_gradients(classifier, ["head"], encode(classifier, [TEXTS]))


def test_logits_that_are_no_numbers_are_refused(folder):
    classifier = load_classifier(folder)
    classifier.model.bert.pooler.register_forward_hook(lambda _module, _args, output: output * float("nan"))
    with pytest.raises(ModelError, match="logits of a row in a padded batch differ"):
        check_gradients(classifier, ["head"])


def test_a_build_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EmbeddingUses, "_scale", lambda *_args: 1.5)
    rows = rows_from_texts(TEXTS, np.array([0, 1, 2, 0]).tolist())
    options = BuildOptions(stores=("features", "words"), words_tops=(0,))
    with pytest.raises(ModelError, match="differs"):
        build_index(rows, tmp_path / "index", choose_model(str(folder)).checkpoints, options)
    assert not (tmp_path / "index").exists()


def test_what_was_found_is_said_and_kept(folder, tmp_path, capsys, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", text=sentences(12), label=labels(12))
    out = tmp_path / "index"
    command = ["index", "--model", str(folder), "--train", str(data), "--scope", "head,top-1", "--calibrate", "0"]
    assert run([*command, "--out", str(out)]) == 0
    line = "checked on 4 rows: gradients differ from plain autograd's by head "
    assert line in " ".join(capsys.readouterr().err.split())
    kept = Index.open(out).manifest.self_check
    assert (kept["n_rows"], list(kept["errors"])) == (4, ["head", "top-1"])
    assert all(0 < error < 1e-4 for error in kept["errors"].values())
    assert run(["info", str(out)]) == 0
    assert line in " ".join(capsys.readouterr().out.split())
    bytes_before = (out / "manifest.json").read_bytes()

    def found_otherwise(*given, **choices):
        *made, checked = make_spec(*given, **choices)
        return *made, replace(checked, errors=dict.fromkeys(checked.errors, 0.5))

    def die(*_given):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(build, "make_spec", found_otherwise)
        assert run([*command, "--out", str(out), "--resume"]) == 0
        assert (out / "manifest.json").read_bytes() == bytes_before
    begun = tmp_path / "begun"
    with monkeypatch.context() as patched:
        patched.setattr(build, "finish_build", die)
        with pytest.raises(RuntimeError, match="killed"):
            Index.build(str(folder), data, begun, scopes=("head", "top-1"), calibration_queries=0, warn=lambda _l: None)
    with monkeypatch.context() as patched:  # the last figures may differ on another machine
        patched.setattr(build, "make_spec", found_otherwise)
        assert run([*command, "--out", str(begun), "--resume"]) == 0
    assert Index.open(begun).manifest.self_check == kept
