"""Tiny random models of the families that transformers offers: right against autograd, or refused by name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers
from families import (
    ADAPTERS,
    EQUAL_LENGTHS,
    FAMILIES,
    LABELS,
    LOADED_ANEW,
    N_CLASSES,
    NO_WORDS,
    REFUSED,
    RIGHT,
    TEXTS,
    adapter_cell,
    autograd,
    largest_error,
    make_family,
    make_family_adapter,
    relative_error,
    table_line,
)
from places import ROOT
from tiny import labels, make_tiny_model, sentences, without_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear.errors import InputError, ModelError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.building.row_facts import row_facts
from forebear.indexer.gradients.self_check import check_gradients
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.device.batch_size import BATCH_TOKENS
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import Fingerprint, load_classifier, stored_fingerprint
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.shared_layers import SharedUses
from forebear.indexer.model.scopes import embedding_block, scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.words.gradients import word_gradients
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.maps import saliency


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a family's model, made once."""
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_family(root / kind, kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def loaded(family):
    """A family's model, loaded once: what tests do to it must leave it as it was."""
    return cache(lambda kind: load_classifier(family(kind)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_agrees_with_autograd_at_the_head(kind, loaded):
    classifier = loaded(kind)
    forward = run_forward(classifier, [TEXTS])
    residual, _ = forward.residuals_and_losses(LABELS)
    found = np.einsum("nc,nh->nch", residual, forward.features)
    (truth,) = autograd(classifier, [f"{classifier.head_name}.weight"])
    assert relative_error([torch.from_numpy(found)], [truth]) < 1e-5
    assert classifier.equal_lengths == (kind in EQUAL_LENGTHS)
    run_forward(classifier, [["good film " * 300]])  # as long as it may be


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_beyond_the_head_agrees_with_autograd_or_is_refused_by_name(kind, loaded):
    """Never a layer that is left out: all parameters of the scope, in models that mix rows or positions too."""
    classifier = loaded(kind)
    for scope in ("top-1", "all"):
        if FAMILIES[kind] != RIGHT and (kind, scope) not in (("albert", "all"), ("canine", "top-1")):
            with pytest.raises(ModelError, match=FAMILIES[kind]):
                check_gradients(classifier, ["head", scope])
            continue
        checked = check_gradients(classifier, ["head", scope], encode(classifier, [TEXTS]))
        assert checked.largest_error < 1e-4
        assert largest_error(classifier, scope) < 3e-5, scope


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_is_not_supported_is_refused_by_name(kind, family):
    with pytest.raises(ModelError, match=REFUSED[kind]) as caught:
        load_classifier(family(kind))
    assert "\n" not in str(caught.value)
    assert str(family(kind)) in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_of_a_family_agrees_with_autograd_or_is_refused_by_name(kind, tmp_path):
    """At the adapter's own weights: an A and a B in every linear layer, and what lies outside the base model."""
    pytest.importorskip("peft", reason="needs peft: pip install 'forebear[peft]'")
    if kind in ADAPTERS:
        with pytest.raises((ModelError, ValueError), match=ADAPTERS[kind]):
            check_gradients(load_classifier(make_family_adapter(tmp_path, kind)), ["head", "adapter"])
        return
    classifier = load_classifier(make_family_adapter(tmp_path, kind))
    check_gradients(classifier, ["head", "adapter"], encode(classifier, [TEXTS]))
    assert largest_error(classifier, "adapter") < 3e-5


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_model_that_does_not_run_while_its_layers_are_watched_is_refused_by_name(tmp_path, monkeypatch):
    """As DeBERTa's adapters did not, whose relative positions were repeated for the rows once more."""
    pytest.importorskip("peft", reason="needs peft: pip install 'forebear[peft]'")
    monkeypatch.setattr(SharedUses, "follow", lambda *_: None)
    classifier = load_classifier(make_family_adapter(tmp_path, "deberta-v2"))
    with pytest.raises(ModelError, match="does not run while layers of scope adapter are watched") as caught:
        check_gradients(classifier, ["head", "adapter"])
    assert "\n" not in str(caught.value)


# Heads at every word piece


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_token_stands_in_where_a_decoder_has_no_padding_token(kind, family, tmp_path):
    """Predictions are those of the row alone, for which no padding token is needed."""
    folder = make_family(tmp_path / kind, kind, pad=False)
    classifier = load_classifier(folder)
    assert any("has no padding token" in remark for remark in classifier.remarks)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.pad_token_id is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS]
    np.testing.assert_allclose(run_forward(classifier, [TEXTS]).logits, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "eurobert"])
def test_the_feature_of_a_pooled_head_gives_the_model_s_own_logits(kind, family):
    """GPT-2 picks the last word piece; EuroBERT can average its logits over all of them."""
    classifier = load_classifier(family(kind))
    if kind == "eurobert":
        classifier.model.clf_pooling = "late"
        classifier.model.config.clf_pooling = "late"
    batch = pad_batch(classifier.tokenizer, encode(classifier, [TEXTS]), torch.device("cpu"))
    with torch.no_grad():
        expected = classifier.model(**batch).logits.numpy()
    np.testing.assert_allclose(run_forward(classifier, [TEXTS]).logits, expected, atol=1e-5)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# Rows that cannot share a batch


def test_rows_of_a_layer_that_mixes_them_run_alone_also_with_other_versions(family):
    """Longformer keeps positions first: what a masked span adds is the difference of two rows run one by one."""
    classifier = load_classifier(family("longformer"))
    assert classifier.alone_layers
    parameters = scope_of(classifier, "top-1")
    rows = encode(classifier, [TEXTS])
    minus = [row | {"input_ids": [*row["input_ids"][:1], 5, *row["input_ids"][2:]]} for row in rows]
    found = whole_gradients(classifier, parameters, Encoded(rows, minus=minus), LABELS)
    whole, other = (whole_gradients(classifier, parameters, Encoded(versions), LABELS) for versions in (rows, minus))
    for name, difference in found.items():
        torch.testing.assert_close(difference, whole[name] - other[name], atol=1e-6, rtol=1e-4)


# Words


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in NO_WORDS])
def test_word_gradients_of_a_family_agree_with_autograd(kind, loaded):
    """Of embeddings used once or twice (an encoder and a decoder), scaled, or changed in place."""
    classifier = loaded(kind)
    found = word_gradients(classifier, [TEXTS], LABELS, [0], batch_tokens=100)[0][0]
    block = embedding_block(classifier.model, kind)
    (truth,) = autograd(classifier, [f"{block.name}.weight"])
    truth[:, classifier.tokenizer.pad_token_id] = 0.0  # no word, although a decoder may begin with it
    dense = torch.zeros_like(truth)
    dense[found.rows, found.tokens] = torch.from_numpy(found.vectors)
    assert relative_error([dense], [truth]) < 3e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bart", "deberta", "longformer"])
def test_saliency_of_a_family_is_the_gradient_at_its_embeddings(kind, family):
    """At the output of the word embeddings, both of an encoder and of a decoder, by autograd on the row alone."""
    classifier = load_classifier(family(kind))
    maps = saliency(classifier, [TEXTS], LABELS)
    words = embedding_block(classifier.model, kind)
    weight = classifier.model.get_parameter(f"{words.name}.weight")
    for n, text in enumerate(TEXTS):
        row = classifier.tokenizer(text, return_tensors="pt")
        uses: list[torch.Tensor] = []

        def grow(_module, _args, output, uses=uses):
            uses.append(output.detach().requires_grad_(True))
            return uses[-1].clone()

        modules = [m for m in classifier.model.modules() if getattr(m, "weight", None) is weight]
        hooks = [m.register_forward_hook(grow) for m in modules if isinstance(m, torch.nn.Embedding)]
        logits = classifier.model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
        for hook in hooks:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(LABELS[n])]))
        gradients = torch.autograd.grad(loss, uses)
        terms = [-(g * e.detach()).sum(dim=2)[0] for g, e in zip(gradients, uses, strict=True)]
        n_pieces = row["input_ids"].shape[1]
        value = terms[0][:n_pieces].clone()
        if len(terms) == 2:  # the decoder's inputs begin with a token of its own
            value[: n_pieces - 1] += terms[1][1:n_pieces]
        np.testing.assert_allclose(maps[n].values, (value / value.abs().sum()).numpy(), atol=2e-5)


class _Twice(torch.nn.Module):
    """A layer that is used twice, once for nothing, beside one that is computed and dropped, and one never used."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.dropped, self.unused = layer, torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.layer(values.flip(1))
        self.dropped(values)
        return self.layer(values)


def test_uses_that_the_logits_do_not_depend_on_add_nothing(family):
    classifier = load_classifier(family("bert"))
    pooler = classifier.model.bert.pooler
    pooler.dense = _Twice(pooler.dense)
    parameters = scope_of(classifier, "top-1")
    names = [block.name for block in parameters.blocks]
    assert {"bert.pooler.dense.layer", "bert.pooler.dense.dropped", "bert.pooler.dense.unused"} < set(names)
    check_gradients(classifier, ["top-1"])
    found = whole_gradients(classifier, parameters, [TEXTS], LABELS)
    truth = autograd(classifier, [f"{name}.weight" for name in names])
    assert relative_error([found[name] for name in names], truth) < 1e-5
    assert not found["bert.pooler.dense.dropped"].any()


# Padding


def _scores(index: Index, methods: list[str], scope: str) -> dict[str, np.ndarray]:
    """Scores of all rows by row number, ``(q, n)`` by method."""
    table = Retriever(index).retrieve(TEXTS, methods=methods, scope=scope, top=index.manifest.n_rows)
    table = table.filter(pc.equal(table["side"], "proponent")).sort_by([("query", "ascending"), ("row", "ascending")])
    return {
        name: table.filter(pc.equal(table["method"], name))["score"].to_numpy().reshape(len(TEXTS), -1)
        for name in methods
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_scores_do_not_depend_on_the_batch_where_predictions_depend_on_padding(kind, family, tmp_path):
    texts, gold = sentences(30), labels(30, N_CLASSES)
    scopes = ("head", "all") if kind == "fnet" else ("head",)
    methods = ["gd", "gc", "if", "nn-cos", "tracin-we"]
    told: list[str | None] = []
    found = []
    for batch_tokens in (1, 4096):
        options = BuildOptions(
            stores=("features", "words"), words_tops=(0,), scopes=scopes, batch_tokens=batch_tokens, dampings=("0.1x",)
        )
        out = tmp_path / f"{kind}-{batch_tokens}"
        index = build_index(
            rows_from_texts(texts, gold), out, choose_model(str(family(kind))).checkpoints, options, warn=told.append
        )
        found.append({scope: _scores(index, methods, scope) for scope in scopes})
    classifier = load_classifier(family(kind))
    together, alone = run_forward(classifier, [texts]), [run_forward(classifier, [[text]]) for text in texts]
    np.testing.assert_allclose(together.logits, np.concatenate([f.logits for f in alone]), atol=1e-6)
    maps = saliency(classifier, [texts], np.zeros(30, np.int64))
    one = saliency(classifier, [texts[3:4]], np.zeros(1, np.int64))
    np.testing.assert_allclose(maps[3].values, one[0].values, atol=1e-6)
    for scope in scopes:
        for method, scores in found[0][scope].items():
            scale = np.abs(scores).max()
            np.testing.assert_allclose(scores / scale, found[1][scope][method] / scale, atol=1e-5)
    assert sum("padding" in (message or "") for message in told) == 2  # once a build


# Longest rows


@pytest.mark.parametrize(("kind", "positions", "longest"), [("modernbert", 8192, 8192), ("bert", 48, 48)])
def test_the_longest_row_is_the_model_s_own_limit_also_by_default(kind, positions, longest, tmp_path):
    folder = make_family(tmp_path / kind, kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.max_position_embeddings != positions:
        config.max_position_embeddings = positions
        config.save_pretrained(folder)
    assert load_classifier(folder).max_length == longest
    assert load_classifier(folder, max_length=longest).max_length == longest
    with pytest.raises(InputError, match=f"takes 4 to {longest} word pieces"):
        load_classifier(folder, max_length=longest + 1)


def test_a_long_text_is_read_whole_and_batches_are_bounded_by_word_pieces_not_by_rows(tmp_path, monkeypatch):
    folder = make_family(tmp_path / "m", "modernbert")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 8192
    config.save_pretrained(folder)
    shapes = []
    network = transformers.ModernBertForSequenceClassification
    forward = network.forward

    def noted(model, input_ids=None, **others):
        shapes.append(tuple(input_ids.shape))
        return forward(model, input_ids=input_ids, **others)

    monkeypatch.setattr(network, "forward", noted)
    texts = [*sentences(30), "good film " * 600]  # 1,200 word pieces, and the two that the tokenizer adds
    options = BuildOptions(
        stores=("features", "words"), words_tops=(0,), scopes=("head", "all"), batch_tokens=256, dampings=("0.1x",)
    )
    rows = rows_from_texts(texts, labels(31), label_names=("LABEL_0", "LABEL_1", "LABEL_2"))
    index = build_index(rows, tmp_path / "i", choose_model(str(folder)).checkpoints, options)
    assert row_facts(index).reading.n_cut == 0
    Retriever(index).retrieve(texts[-1:], methods=["gd", "if", "tracin-we"], scope="head", top=2)
    Retriever(index).retrieve(texts[-1:], methods=["gd"], scope="all", top=2)
    longest = max(length for _, length in shapes)
    assert longest == 1202
    assert all(n_rows == 1 or n_rows * length <= BATCH_TOKENS for n_rows, length in shapes)
    assert any(n_rows > 10 for n_rows, _ in shapes)


@pytest.mark.parametrize("kind", ["xlnet", "t5"])
def test_a_model_that_states_no_limit_takes_what_is_asked_for(kind, family):
    assert load_classifier(family(kind)).max_length == 512
    classifier = load_classifier(family(kind), max_length=1000)
    long = ["good film " * 600]
    assert len(encode(classifier, [long])[0]["input_ids"]) == classifier.max_length == 1000
    assert np.isfinite(run_forward(classifier, [long]).logits).all()
    with pytest.raises(InputError, match="takes 4 word pieces or more"):
        load_classifier(family(kind), max_length=3)


# Tokenizers


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert", "mbart", "xlm-roberta", "t5"])
def test_a_folder_without_tokenizer_files_is_refused(kind, tmp_path):
    folder = without_tokenizer(make_family(tmp_path / kind, kind))
    with pytest.raises(ModelError, match=r"holds no vocabulary.*tokenizer\.save_pretrained"):
        load_classifier(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    config = transformers.BertConfig.from_pretrained(folder)
    config.vocab_size = 20
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="belongs to another model"):
        load_classifier(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stored_fingerprint_is_that_of_the_loaded_model_or_is_none(kind, family, loaded):
    """A build trusts it: whatever loading does to a family's tensors or configuration, no other digest may come out."""
    classifier = loaded(kind)
    found = stored_fingerprint(family(kind), classifier)
    assert found is None or found == Fingerprint(
        classifier.feature_dim, classifier.label_names, classifier.sha256, classifier.tokenizer_sha256
    )
    assert (found is None) == (kind in LOADED_ANEW)


# The page of models

LINES = {
    line.split("|")[1].strip(): line
    for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| family", "| ---"))
}


def test_the_page_of_models_lists_every_family():
    assert list(LINES) == sorted(FAMILIES)
    assert len(LINES) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_page_of_models_says_of_a_family_what_is_so(kind, loaded):
    """All but the errors' digits, which depend on the machine: the tests above bound them."""

    def without_errors(line: str) -> str:
        return re.sub(r"\(\de-\d+\)", "", line)

    cell = adapter_cell(kind, lambda: 1e-7)
    line = table_line(kind, loaded(kind), lambda _classifier, _scope: 1e-7, cell)
    assert without_errors(line) == without_errors(LINES[kind])
