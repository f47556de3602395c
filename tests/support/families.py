"""Tiny random classifiers of the families that transformers offers, and what forebear says of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny import make_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forebear.indexer.gradients.tape import alone
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of

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
REFUSED_BY_NAME = "refused by name"
T5 = ("t5", "umt5", "mt5")
# What scopes top-1 and all do: right, or a part of the refusal.
FAMILIES = {
    "bert": RIGHT, "roberta": RIGHT, "distilbert": RIGHT, "electra": RIGHT, "modernbert": RIGHT, "mpnet": RIGHT,
    "xlm": RIGHT, "flaubert": RIGHT, "camembert": RIGHT, "xlm-roberta": RIGHT, "xlm-roberta-xl": RIGHT,
    "data2vec-text": RIGHT, "ernie": RIGHT, "esm": RIGHT, "gte": RIGHT, "jina_embeddings_v3": RIGHT, "layoutlm": RIGHT,
    "megatron-bert": RIGHT, "mobilebert": RIGHT, "mra": RIGHT, "nomic_bert": RIGHT, "rembert": RIGHT,
    "roberta-prelayernorm": RIGHT, "roformer": RIGHT, "big_bird": RIGHT, "fnet": RIGHT, "yoso": RIGHT,
    "deberta": RIGHT, "deberta-v2": RIGHT, "deberta-v3": RIGHT, "longformer": RIGHT,
    "bart": RIGHT, "mbart": RIGHT, "mvp": RIGHT, "plbart": RIGHT, "bigbird_pegasus": RIGHT, "t5": RIGHT, "umt5": RIGHT,
    "mt5": RIGHT, "eurobert": RIGHT, "gpt2": RIGHT, "opt": RIGHT, "llama": RIGHT, "qwen2": RIGHT, "qwen3": RIGHT,
    "mistral": RIGHT, "gemma": RIGHT, "gemma2": RIGHT, "gemma3_text": RIGHT, "phi": RIGHT, "phi3": RIGHT,
    "gpt_neox": RIGHT, "bloom": RIGHT, "falcon": RIGHT, "stablelm": RIGHT, "starcoder2": RIGHT, "olmo": RIGHT,
    "glm": RIGHT, "smollm3": RIGHT, "modernbert-decoder": RIGHT, "ctrl": RIGHT, "openai-gpt": RIGHT, "biogpt": RIGHT,
    "albert": "top-K has no meaning",
    "canine": "has no word embeddings",
    "convbert": "SeparableConv1D",
    "ibert": "Quant",
    "mixtral": "mixture of experts",
    "nystromformer": "Conv2d",
    "squeezebert": "only linear layers, convolutions of one dimension and one group",
    "xlnet": "XLNet",
}  # fmt: skip
# Their files name tensors in another way, or those that are shared once: only loading tells their fingerprint.
LOADED_ANEW = (
    "esm", "gte", "jina_embeddings_v3", "nomic_bert", "bart", "mbart", "mvp", "plbart", "bigbird_pegasus", "t5", "umt5",
    "mt5", "mixtral",
)  # fmt: skip
# Where an adapter of all linear layers is not right at its own weights: a part of the refusal.
ADAPTERS = {
    "canine": "has no word embeddings",
    "ibert": "No modules were targeted",  # by PEFT itself: its linear layers are not torch's
    "mixtral": "mlp.gate.lora_A",
}
EQUAL_LENGTHS = ("canine", "convbert", "fnet", "nystromformer", "xlnet", "yoso")  # their predictions depend on padding
BEYOND = {  # where one of both scopes holds
    "albert": "`all` exact; its layers share their weights, so there is no `top-K`",
    "canine": "`top-K` exact; it has no word embeddings, where `all` starts",
}
NO_WORDS = ("canine", "ibert", "xlnet")  # no word embeddings of torch's kind, or looked up with positions first
REFUSED = {
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
    if kind in T5:
        config.decoder_start_token_id = 0
    if not pad:
        config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and kind not in T5:  # whose attention has no scale of its own
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer = transformers.CanineTokenizer() if kind == "canine" else AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 10**30
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def make_family_adapter(folder: Path, kind: str) -> Path:
    """Save a random LoRA of a family's tiny classifier, which is saved beside it: every linear layer is adapted.

    What lies outside the base model, its head, was trained whole.
    """
    import peft

    base = make_family(folder / "base", kind)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    own = [name for name, part in model.named_children() if name != model.base_model_prefix and list(part.parameters())]
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS", modules_to_save=own
    )
    torch.manual_seed(1)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def autograd(classifier: Classifier, names: list[str], texts=TEXTS, classes=LABELS) -> list[torch.Tensor]:
    """Gradients of parameters, one row at a time, no padding: ``(n, ...)`` each."""
    parameters = [classifier.model.get_parameter(name) for name in names]
    were = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = []
    for text, label in zip(texts, classes, strict=True):
        encoded = classifier.tokenizer(text, return_tensors="pt")
        row = {key: encoded[key] for key in classifier.tokenizer.model_input_names}
        loss = torch.nn.functional.cross_entropy(classifier.model(**row).logits, torch.tensor([int(label)]))
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    for parameter, was in zip(parameters, were, strict=True):
        parameter.requires_grad_(was)
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def relative_error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    largest = max(float(t.abs().max()) for t in truth)
    return max(float((f - t).abs().max()) for f, t in zip(found, truth, strict=True)) / largest


def table_line(kind: str, classifier: Classifier, error: Callable[[Classifier, str], float], adapter: str) -> str:
    """The family's line in docs/models.md: what holds at its head, beyond it, at an adapter and at its words."""
    head = error(classifier, "head")
    if FAMILIES[kind] == RIGHT:
        beyond = f"exact ({max(error(classifier, scope) for scope in ('top-1', 'all')):.0e})"
    elif kind in BEYOND:
        beyond = BEYOND[kind]
    else:
        beyond = REFUSED_BY_NAME
    words = REFUSED_BY_NAME if kind in NO_WORDS else "exact"
    remarks = ["only rows of one length share a batch"] if classifier.equal_lengths else []
    remarks += ["beyond the head a row is alone in its batch"] if _runs_alone(kind, classifier) else []
    return f"| {kind} | exact ({head:.0e}) | {beyond} | {adapter} | {words} | {'; '.join(remarks)} |"


def adapter_error(folder: Path, kind: str) -> float:
    """Largest error of the gradients of a family's adapter, made in a folder."""
    return largest_error(load_classifier(make_family_adapter(folder, kind)), "adapter")


def adapter_cell(kind: str, error: Callable[[], float]) -> str:
    """What holds at the weights of a family's adapter."""
    if kind == "ibert":
        return "PEFT has none"
    return REFUSED_BY_NAME if kind in ADAPTERS else f"exact ({error():.0e})"


def _runs_alone(kind: str, classifier: Classifier) -> bool:
    return FAMILIES[kind] == RIGHT and alone(classifier, [scope_of(classifier, "all")])


def largest_error(classifier: Classifier, name: str) -> float:
    """Largest error of a scope's gradients against autograd of single rows, by the largest number."""
    scope = scope_of(classifier, name)
    found = whole_gradients(classifier, scope, [TEXTS], LABELS)
    parts = {key: part for block in scope.blocks for key, part in block.split(found[block.name]).items()}
    return relative_error(list(parts.values()), autograd(classifier, list(parts)))


def write_table(page: Path, folder: Path) -> None:
    """Write the lines of all families between the table's header and the next empty line of a page."""
    lines = []
    for kind in sorted(FAMILIES):
        at = folder / kind
        cell = adapter_cell(kind, partial(adapter_error, at, kind))
        lines.append(table_line(kind, load_classifier(make_family(at, kind)), largest_error, cell))
    before, header, rest = page.read_text(encoding="utf-8").partition("| --- | --- | --- | --- | --- | --- |\n")
    page.write_text(before + header + "\n".join(lines) + "\n" + rest[rest.index("\n\n") + 1 :], encoding="utf-8")


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(sys.argv[1]), Path(scratch))
