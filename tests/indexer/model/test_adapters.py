"""Adapters of PEFT: their own weights' gradients, those of the merged model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import LABELS, N_CLASSES, TEXTS, largest_error, make_family, relative_error
from tiny import labels, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear.errors import InputError, ModelError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.gradients.self_check import check_gradients
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.retriever import Retriever

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
peft = pytest.importorskip("peft", reason="needs peft: pip install 'forebear[peft]'")

SAVED = {"deberta-v2": ["classifier", "pooler"]}  # its pooler is the head of the model
TARGETS = {
    "bert": ["query", "value", "output.dense"], "roberta": ["query", "key"], "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"], "deberta-v2": ["query_proj", "key_proj"],
}  # fmt: skip


def make_adapter(root: Path, kind: str, *, config_class: str = "LoraConfig", **choices) -> Path:
    """A random adapter of a tiny random model, beside its base; the base's own head is left out of its files."""
    base = make_family(root / "base", kind)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    torch.manual_seed(1)
    chosen = {"task_type": "SEQ_CLS", "modules_to_save": SAVED.get(kind)} | choices
    if config_class == "LoraConfig":
        chosen = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": TARGETS[kind]} | chosen
    adapted = peft.get_peft_model(model, getattr(peft, config_class)(**chosen))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(root / "adapter")
    AutoModelForSequenceClassification.from_pretrained(base).base_model.save_pretrained(base)  # an encoder alone
    return root / "adapter"


def merged(folder: Path, adapter: Path) -> Classifier:
    """What PEFT makes of an adapter, as a whole model in a folder."""
    base = AutoModelForSequenceClassification.from_pretrained(adapter.parent / "base", num_labels=N_CLASSES)
    model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter.parent / "base").save_pretrained(folder)
    return load_classifier(folder)


def gradients(classifier: Classifier, scope: str) -> dict[str, np.ndarray]:
    found = whole_gradients(classifier, scope_of(classifier, scope), [TEXTS], LABELS)
    return {name.replace(".base_layer", "").replace(".modules_to_save.default", ""): g for name, g in found.items()}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_of_an_adapters_own_weights_are_autograds(kind, use_dora, tmp_path):
    classifier = load_classifier(make_adapter(tmp_path, kind, use_dora=use_dora))
    scope = scope_of(classifier, "adapter")
    assert any(".lora_A." in block.name for block in scope.blocks)
    assert any(".lora_magnitude_vector." in block.name for block in scope.blocks) == use_dora
    assert any("classifier" in block.name or "score" in block.name for block in scope.blocks)
    assert largest_error(classifier, "adapter") < 2e-5
    check_gradients(classifier, ["head", "adapter"], encode(classifier, [TEXTS]))


@pytest.mark.parametrize("kind", TARGETS)
def test_autograd_through_peft_itself_gives_the_same(kind, tmp_path):
    """With PEFT's own forward in training form, also of DoRA, whose layers are computed anew here."""
    folder = make_adapter(tmp_path, kind, use_dora=True)
    classifier = load_classifier(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder.parent / "base", num_labels=N_CLASSES)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
    model.config.pad_token_id = tokenizer.pad_token_id
    found = whole_gradients(classifier, scope_of(classifier, "adapter"), [TEXTS], LABELS)
    for i, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)):
        model.zero_grad()
        row = {key: value for key, value in tokenizer(text, return_tensors="pt").items() if key != "token_type_ids"}
        torch.nn.functional.cross_entropy(model(**row).logits, torch.tensor([int(label)])).backward()
        truth = {
            key.removeprefix("base_model.model."): p.grad for key, p in model.named_parameters() if p.requires_grad
        }
        for name, g in found.items():
            key = f"{name.removesuffix('.magnitude')}.weight"
            expected = truth[key].reshape(g[i].shape) if "magnitude" in name else truth[key]
            assert relative_error([torch.as_tensor(g[i])], [expected]) < 2e-5, name


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_scopes_are_those_of_the_merged_model(kind, use_dora, tmp_path):
    classifier = load_classifier(make_adapter(tmp_path, kind, use_dora=use_dora))
    whole = merged(tmp_path / "merged", tmp_path / "adapter")
    for scope in ("head", "top-1", "all"):
        found, truth = gradients(classifier, scope), gradients(whole, scope)
        assert found.keys() == truth.keys()
        for name in truth:
            assert relative_error([torch.as_tensor(found[name])], [torch.as_tensor(truth[name])]) < 1e-4, name
    ours, theirs = (run_forward(c, [TEXTS], batch_tokens=64) for c in (classifier, whole))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
    np.testing.assert_allclose(ours.features, theirs.features, atol=1e-5)


def test_an_adapter_of_another_kind_is_merged(tmp_path):
    folder = make_adapter(tmp_path, "bert", config_class="IA3Config", target_modules=["query"], feedforward_modules=[])
    classifier = load_classifier(folder)
    assert classifier.adapter is None
    np.testing.assert_allclose(
        run_forward(classifier, [TEXTS], batch_tokens=64).logits,
        run_forward(merged(tmp_path / "merged", folder), [TEXTS], batch_tokens=64).logits,
        atol=1e-5,
    )
    with pytest.raises(InputError, match="holds no LoRA or DoRA adapter"):
        scope_of(classifier, "adapter")


def test_adapters_that_cannot_be_indexed_say_why(tmp_path):
    with pytest.raises(ModelError, match=r"PREFIX_TUNING.*cannot be"):
        load_classifier(make_adapter(tmp_path / "a", "bert", config_class="PrefixTuningConfig", num_virtual_tokens=4))
    folder = make_adapter(tmp_path / "b", "bert", task_type=None)  # saves no head
    with pytest.raises(ModelError, match="stores weights for classifier"):
        load_classifier(folder)
    folder = make_adapter(tmp_path / "c", "bert", bias="all")
    with pytest.raises(ModelError, match="no whole linear layer"):
        scope_of(load_classifier(folder), "adapter")
    (tmp_path / "c" / "base").rename(tmp_path / "c" / "elsewhere")
    with pytest.raises(ModelError, match="no such model folder"):
        load_classifier(folder)


def test_digests_tell_adapters_and_their_scaling_apart(tmp_path):
    folder = make_adapter(tmp_path, "bert")
    first = load_classifier(folder)
    assert load_classifier(folder).sha256 == first.sha256
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    assert load_classifier(folder).sha256 != first.sha256


def test_an_adapter_is_indexed_and_asked_at_every_scope(tmp_path):
    classes = np.array(labels(40, N_CLASSES))
    options = BuildOptions(
        stores=("features", "words"), words_tops=(0,), scopes=("head", "adapter", "top-1"), sketch_dim=16,
        calibration_queries=8, dampings=("0.1x",),
    )  # fmt: skip
    checkpoints = choose_model(str(make_adapter(tmp_path, "bert"))).checkpoints
    index = build_index(rows_from_texts(sentences(40), classes.tolist()), tmp_path / "index", checkpoints, options)
    retriever = Retriever(index)
    for scope in ("head", "adapter", "top-1"):
        methods = ["gd", "gc", "if", "rif", "tracin", "tracin-we"]
        table = retriever.retrieve(["a good film"], methods=methods, scope=scope, top=5)
        assert set(table["method"].to_pylist()) == set(methods)
        assert np.isfinite(table["score"].to_numpy()).all()
    found = retriever.retrieve(["a good film"], methods=["gd"], scope="adapter", top=3, exact="full").to_pylist()
    numbers = [line["row"] for line in found]
    parameters = scope_of(retriever.classifier(), "adapter")
    rows = whole_gradients(retriever.classifier(), parameters, [[sentences(40)[i] for i in numbers]], classes[numbers])
    text = [["a good film"]]
    predicted = run_forward(retriever.classifier(), text, batch_tokens=64).logits.argmax(axis=1)
    query = whole_gradients(retriever.classifier(), parameters, text, predicted)
    expected = sum((rows[name] * query[name]).sum(axis=(1, 2)) for name in rows)
    np.testing.assert_allclose([line["score"] for line in found], expected, rtol=1e-4)
