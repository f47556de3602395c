"""Tiny random models of the families that transformers offers: right against autograd, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences, without_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear.errors import InputError, ModelError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.gradients.scope_probe import check_gradients
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import residual_and_loss, run_forward
from forebear.indexer.model.loading import Fingerprint, load_classifier, stored_fingerprint
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.row_source import rows_from_texts
from forebear.indexer.training.run import choose_model
from forebear.indexer.words.gradients import word_gradients
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.maps import saliency

N_CLASSES = 3
# Whatever of these a configuration knows, so that one table makes all families tiny.
TINY = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 48, "num_key_value_heads": 1, "head_dim": 8, "embedding_size": 16, "d_model": 16,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dim": 16,
    "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "emb_dim": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "n_inner": 24, "d_inner": 24, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "word_embed_proj_dim": 16,
    "max_relative_positions": 8, "max_2d_position_embeddings": 16, "num_hash_buckets": 64, "ffn_dim": 24,
    "num_latents": 4, "d_latents": 16, "attention_window": 8, "input_embedding_size": 16,
}  # fmt: skip
DEBERTA_V3 = {
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_buckets": 4,
    "position_biased_input": False,
}
RIGHT = "right"
# What scopes top-1 and all do: right, or a part of the refusal.
ENCODERS = {
    "bert": RIGHT, "roberta": RIGHT, "distilbert": RIGHT, "electra": RIGHT, "modernbert": RIGHT, "mpnet": RIGHT,
    "xlm": RIGHT, "flaubert": RIGHT, "camembert": RIGHT, "xlm-roberta": RIGHT, "xlm-roberta-xl": RIGHT,
    "data2vec-text": RIGHT, "ernie": RIGHT, "esm": RIGHT, "gte": RIGHT, "jina_embeddings_v3": RIGHT, "layoutlm": RIGHT,
    "megatron-bert": RIGHT, "mobilebert": RIGHT, "mra": RIGHT, "nomic_bert": RIGHT, "rembert": RIGHT,
    "roberta-prelayernorm": RIGHT, "roformer": RIGHT, "big_bird": RIGHT, "fnet": RIGHT, "yoso": RIGHT,
    "bart": RIGHT, "mbart": RIGHT, "mvp": RIGHT, "plbart": RIGHT, "bigbird_pegasus": RIGHT, "t5": RIGHT, "umt5": RIGHT,
    "albert": "top-K has no meaning",
    "canine": "has no word embeddings",
    "convbert": "SeparableConv1D",
    "deberta": "pos_proj is also used on something that does not come from the words",
    "deberta-v2": "pos_key_proj is also used on something that does not come from the words",
    "deberta-v3": "query_proj is also used on something that does not come from the words|key_proj is also used",
    "ibert": "Quant",
    "longformer": "cannot be told apart by row",
    "nystromformer": "Conv2d",
    "squeezebert": "only linear layers, and convolutions of one dimension and one group",
    "xlnet": "XLNet",
}  # fmt: skip
# Their files name tensors in another way, or those that are shared once: only loading tells their fingerprint.
LOADED_ANEW = (
    "esm", "gte", "jina_embeddings_v3", "nomic_bert", "bart", "mbart", "mvp", "plbart", "bigbird_pegasus", "t5", "umt5"
)  # fmt: skip
EQUAL_LENGTHS = ("canine", "convbert", "fnet", "nystromformer", "xlnet", "yoso")  # their predictions depend on padding
DECODERS = ("gpt2", "opt", "llama", "qwen2", "gemma", "bloom", "ctrl", "openai-gpt", "falcon", "mistral", "biogpt")
REFUSED = {
    **dict.fromkeys((*DECODERS, "eurobert"), "at every word piece and picks or averages them after its head"),
    "funnel": "does not run on a text of 3 word pieces",
    "perceiver": "not the output of one linear layer",
    "xmod": "Input language unknown",
}  # fmt: skip
TEXTS = ["good film", "a bad story and a dull plot", "the actor was very happy near the artist", "good film", "slow"]
LABELS = np.array([0, 1, 2, 0, 1])


def make_family(folder: Path, kind: str, *, pad: bool = True) -> Path:
    """Save a tiny random classifier of a family, with a tokenizer that leaves the longest row to the model."""
    make_tiny_model(folder)
    known = transformers.CONFIG_MAPPING["deberta-v2" if kind == "deberta-v3" else kind]
    names = set(known().to_dict()) | set(known.attribute_map)
    choices = {name: value for name, value in TINY.items() if name in names}
    choices |= DEBERTA_V3 if kind == "deberta-v3" else {}
    config = known(**choices, num_labels=N_CLASSES, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    if kind in ("t5", "umt5"):
        config.decoder_start_token_id = 0
    if not pad:
        config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind not in ("t5", "umt5"):  # whose attention has no scale of its own
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer = transformers.CanineTokenizer() if kind == "canine" else AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 10**30
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


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


def autograd(classifier: Classifier, names: list[str], texts=TEXTS, classes=LABELS) -> list[torch.Tensor]:
    """Gradients of parameters, one row at a time, no padding: ``(n, ...)`` each."""
    parameters = [classifier.model.get_parameter(name).requires_grad_(True) for name in names]
    rows = []
    for text, label in zip(texts, classes, strict=True):
        encoded = classifier.tokenizer(text, return_tensors="pt")
        row = {key: encoded[key] for key in classifier.tokenizer.model_input_names}
        loss = torch.nn.functional.cross_entropy(classifier.model(**row).logits, torch.tensor([int(label)]))
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def relative_error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    largest = max(float(t.abs().max()) for t in truth)
    return max(float((f.reshape(t.shape) - t).abs().max()) for f, t in zip(found, truth, strict=True)) / largest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_family_agrees_with_autograd_at_the_head(kind, family):
    classifier = load_classifier(family(kind))
    forward = run_forward(classifier, [TEXTS])
    residual, _ = residual_and_loss(forward.logits, LABELS)
    found = np.einsum("nc,nh->nch", residual, forward.features)
    (truth,) = autograd(classifier, [f"{classifier.head_name}.weight"])
    assert relative_error([torch.from_numpy(found)], [truth]) < 1e-5
    assert classifier.equal_lengths == (kind in EQUAL_LENGTHS)
    run_forward(classifier, [["good film " * 300]])  # as long as it may be


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_family_beyond_the_head_agrees_with_autograd_or_is_refused_by_name(kind, family):
    """Never a layer that is left out: all parameters of the scope, in models that mix rows or positions too."""
    classifier = load_classifier(family(kind))
    for scope in ("top-1", "all"):
        if ENCODERS[kind] != RIGHT and (kind, scope) not in (("albert", "all"), ("canine", "top-1")):
            with pytest.raises(ModelError, match=ENCODERS[kind]):
                check_gradients(classifier, ["head", scope])
            continue
        check_gradients(classifier, ["head", scope])
        parameters = scope_of(classifier, scope)
        found = whole_gradients(classifier, parameters, [TEXTS], LABELS)
        truth = autograd(classifier, [f"{block.name}.weight" for block in parameters.blocks])
        assert relative_error([found[block.name] for block in parameters.blocks], truth) < 2e-5, scope


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_is_not_supported_is_refused_by_name(kind, family):
    with pytest.raises(ModelError, match=REFUSED[kind]) as caught:
        load_classifier(family(kind))
    assert "\n" not in str(caught.value)
    assert str(family(kind)) in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_without_a_pad_token_is_refused_by_name(kind, tmp_path):
    with pytest.raises(ModelError, match=r"as decoders do\. Such models are not supported yet"):
        load_classifier(make_family(tmp_path / kind, kind, pad=False))


# Relative positions


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "deberta-v3"])
def test_a_layer_of_relative_positions_is_refused_before_the_pass_and_others_are_right(kind, family, tmp_path):
    folder = family(kind)
    rows = rows_from_texts(TEXTS, LABELS.tolist())
    chosen = choose_model(str(folder)).checkpoints
    with pytest.raises(ModelError, match=r"layer deberta.encoder.layer.0.*relative positions"):
        build_index(rows, tmp_path / "index", chosen, BuildOptions(scopes=("head", "all")))
    assert not (tmp_path / "index").exists()
    classifier = load_classifier(folder)
    name = "deberta.encoder.layer.1.intermediate.dense"
    parameters = scope_of(classifier, f"layer:{name}")
    check_gradients(classifier, [f"layer:{name}"], words=True)
    found = whole_gradients(classifier, parameters, [TEXTS], LABELS)
    assert relative_error([found[name]], autograd(classifier, [f"{name}.weight"])) < 1e-5


def test_the_pass_itself_refuses_a_constant_use(family):
    """An index that was built before knows no probe: its queries stop at their first batch."""
    classifier = load_classifier(family("deberta-v3"))
    parameters = scope_of(classifier, "top-1")
    with pytest.raises(ModelError, match="also used on something"):
        whole_gradients(classifier, parameters, [TEXTS], LABELS)


def test_words_of_an_encoder_and_a_decoder_are_refused(family):
    classifier = load_classifier(family("bart"))
    with pytest.raises(ModelError, match=r"model\.shared is used more than once"):
        check_gradients(classifier, ["head"], words=True)
    with pytest.raises(ModelError, match=r"model\.shared is used more than once"):
        word_gradients(classifier, [TEXTS], LABELS, [0], batch_tokens=100)


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


@pytest.mark.parametrize(("kind", "positions", "longest"), [("modernbert", 2048, 2048), ("bert", 48, 48)])
def test_the_longest_row_is_the_model_s_own_limit_and_the_default_at_most_512(kind, positions, longest, tmp_path):
    folder = make_family(tmp_path / kind, kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.max_position_embeddings != positions:
        config.max_position_embeddings = positions
        config.save_pretrained(folder)
    assert load_classifier(folder).max_length == min(longest, 512)
    assert load_classifier(folder, max_length=longest).max_length == longest
    with pytest.raises(InputError, match=f"takes 4 to {longest} word pieces"):
        load_classifier(folder, max_length=longest + 1)


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


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_stored_fingerprint_is_that_of_the_loaded_model_or_is_none(kind, family):
    """A build trusts it: whatever loading does to a family's tensors or configuration, no other digest may come out."""
    classifier = load_classifier(family(kind))
    found = stored_fingerprint(family(kind), classifier)
    assert found is None or found == Fingerprint(
        classifier.feature_dim, classifier.label_names, classifier.sha256, classifier.tokenizer_sha256
    )
    assert (found is None) == (kind in LOADED_ANEW)
