"""Tiny randomly initialised classifiers and data for fast unit tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

WORDS = (
    "a an the good bad dull bright film story actor scene plot is was not very and or near saw thanked doctor lawyer "
    "artist judge happy sad slow fast warm cold music red blue green"
).split()
KINDS = ("bert", "roberta", "distilbert", "electra")


def sentences(n: int, seed: int = 0, low: int = 2, high: int = 12) -> list[str]:
    """Random word salads of varied length, deterministic."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(low, high))) for _ in range(n)]


def labels(n: int, n_classes: int = 2, seed: int = 1) -> list[int]:
    """Random labels in which every class occurs."""
    values = np.arange(n) % n_classes
    return [int(v) for v in np.random.default_rng(seed).permutation(values)]


def make_tiny_model(folder: Path, kind: str = "bert", n_classes: int = 2, seed: int = 0, scale: float = 6.0) -> Path:
    """Save a tiny random classifier and its word-level tokenizer; its head is scaled so that predictions vary."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(seed)
    if kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        start, end, pad, unk, mask = "<s>", "</s>", "<pad>", "<unk>", "<mask>"
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        start, end, pad, unk, mask = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = f"{start} $A {end} {end} $B {end}" if kind == "roberta" else f"{start} $A {end} $B:1 {end}:1"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    inputs = ["input_ids", "attention_mask"]
    if kind in ("bert", "electra"):
        inputs.insert(1, "token_type_ids")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, cls_token=start, sep_token=end, mask_token=mask,
        bos_token=start, eos_token=end, model_max_length=40, model_input_names=inputs,
    )  # fmt: skip
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    common = {"vocab_size": len(vocab), "num_labels": n_classes, "pad_token_id": vocab[pad]}
    if kind == "bert":
        config = transformers.BertConfig(**shape, **common, max_position_embeddings=48)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "roberta":
        config = transformers.RobertaConfig(**shape, **common, max_position_embeddings=48, type_vocab_size=1)
        model = transformers.RobertaForSequenceClassification(config)
    elif kind == "electra":
        config = transformers.ElectraConfig(**shape, **common, max_position_embeddings=48, embedding_size=12)
        model = transformers.ElectraForSequenceClassification(config)
    else:
        config = transformers.DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=24, **common, max_position_embeddings=48
        )
        model = transformers.DistilBertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, **columns: list[object]) -> Path:
    """One JSON object a line."""
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows), encoding="utf-8")
    return path
