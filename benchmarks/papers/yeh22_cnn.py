"""Yeh22's convolutional network on AG News: Table 1 (cancellation, deletion by layer) and section 3.2 (biases).

Embedding 128, convolutions 5x10, 5x10, 1x10, maximum over positions, linear; random start; as in the paper. Retrained
whole for every removal. ``python benchmarks/papers/yeh22_cnn.py [--small] [--parts cancellation,deletion]``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from setups import DATA, RUNS, parsed, retrainer, store, test_rows, write_rows
from tables import cell, table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from forebear import BuildOptions, Index, QuerySpec, Retriever, TrainOptions, build_index, train
from forebear.evaluation.measures.cancellation import cancellation as measure_cancellation
from forebear.evaluation.retraining.changes import seeds_of
from forebear.evaluation.retraining.deletion_curve import measure_deletion
from forebear.evaluation.retraining.row_choice import row_scores
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.training.model_choice import choose_model

VOCABULARY = 10_000
EMBEDDING = 128
FILTERS = 10
WINDOWS = (5, 5, 1)
SECOND, THIRD = "cnn.layers.1", "cnn.layers.2"
# Cancellation and 100 times the mean cosine of two gradients.
CANCELLATION = {
    ("word embeddings", "embedding"): (1863, 3.5), ("layer 1", "weight"): (2019, 7.5),
    ("layer 2", "weight"): (3126, 21), ("head", "weight"): (2966, 23), ("all", "all"): (2368, None),
    ("weight", "weight"): (2555, None), ("bias", "bias"): (16789, None),
}  # fmt: skip
# AUC-DEL+ and AUC-DEL-. Of "all" with biases and without section 3.2 says the same as Table 1.
DELETION = {
    "first": (-0.077, 0.045), "second": (-0.075, 0.022), "third": (0.012, 0.006), "last": (-0.016, -0.032),
    "all": (-0.065, 0.046), "all, with biases": (-0.036, 0.011),
}  # fmt: skip


class CnnConfig(transformers.PreTrainedConfig):
    """Of the network; the sizes are the paper's."""

    model_type = "yeh22-cnn"
    hidden_size = EMBEDDING
    vocab_size = VOCABULARY


class CnnForSequenceClassification(transformers.PreTrainedModel):
    """The network, with transformers' names for what forebear asks of a model."""

    config_class = CnnConfig
    base_model_prefix = "cnn"

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        widths = (EMBEDDING, *[FILTERS] * len(WINDOWS))
        self.cnn = nn.Module()
        self.cnn.words = nn.Embedding(VOCABULARY, EMBEDDING)
        self.cnn.layers = nn.ModuleList(
            nn.Conv1d(n_in, n_out, window, padding="same")
            for n_in, n_out, window in zip(widths, widths[1:], WINDOWS, strict=False)
        )
        self.classifier = nn.Linear(FILTERS, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.cnn.words  # type: ignore[return-value]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        kept = attention_mask[:, None, :].bool()
        x = self.cnn.words(input_ids).transpose(1, 2)  # type: ignore[operator]
        for layer in self.cnn.layers:  # type: ignore[union-attr]
            x = torch.relu(layer(x.masked_fill(~kept, 0.0)))
        return SequenceClassifierOutput(logits=self.classifier(x.masked_fill(~kept, 0.0).amax(dim=2)))


transformers.AutoConfig.register(CnnConfig.model_type, CnnConfig)
transformers.AutoModelForSequenceClassification.register(CnnConfig, CnnForSequenceClassification)


def random_start(folder: Path, texts: list[str], label_names: tuple[str, ...]) -> None:
    """Save the untrained network, and a tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[MASK]"]
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        model_max_length=128, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    names = dict(enumerate(label_names))
    torch.manual_seed(0)
    config = CnnConfig(
        num_hidden_layers=len(WINDOWS), id2label=names, label2id={name: i for i, name in names.items()},
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CnnForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def asked(sizes: argparse.Namespace) -> Iterator[Retriever]:
    """Retrievers over indexes of all checkpoints, without biases and with them; made where missing."""
    base = RUNS / f"agnews-cnn-{sizes.training_rows}"
    rows, run = base / "train.parquet", base / "run"
    if not (run / "run.json").is_file():
        some = pq.read_table(DATA / "agnews" / "train.parquet").slice(0, sizes.training_rows)
        write_rows(some, "agnews", rows)
        source = open_rows(rows, need_labels=True)
        assert source.label_names is not None
        random_start(base / "start", some["text"].to_pylist(), source.label_names)
        options = TrainOptions(epochs=sizes.epochs, learning_rate=5e-3, weight_decay=0.0, precision="fp32")
        train(source, base / "start", run, options, dev=open_rows(DATA / "agnews" / "test.parquet"), force=True)
    for with_bias in (False, True):
        folder = base / ("index-bias" if with_bias else "index")
        if not (folder / "manifest.json").is_file():
            layers = () if with_bias else tuple(f"layer:{name}" for name in (SECOND, THIRD))
            options = BuildOptions(
                scopes=("head", "all", *layers), with_bias=with_bias, calibration_queries=0, dampings=(),
                stores=("features",) if with_bias else ("features", "words"), words_tops=(0,),
            )  # fmt: skip
            build_index(open_rows(rows, need_labels=True), folder, choose_model(str(run), ["all"]).checkpoints, options)
        yield Retriever(Index.open(folder))


def cancellation(retriever: Retriever, sizes: argparse.Namespace) -> None:
    """How far gradients cancel, and the mean cosine of two rows' gradients."""
    found = measure_cancellation(retriever, n_rows=sizes.rows)
    rows = {}
    for g, group in enumerate(found.groups):
        if (group.name, group.kind) in CANCELLATION and group.level != "tensor":
            ratio, cosine = CANCELLATION[group.name, group.kind]
            label = f"{group.name}, {group.kind}" if group.level == "layer" else group.name
            rows[label] = [cell(found.values[:, g], ratio), cell(100 * found.cosines[:, g].mean(keepdims=True), cosine)]
    store(
        "yeh22_cnn_cancellation", retriever, table("parameters", ["C", "100 x cosine"], rows, 1),
        rows=len(found.rows), checkpoints=found.checkpoints,
    )  # fmt: skip


def deletion(retriever: Retriever, with_bias: Retriever, sizes: argparse.Namespace) -> None:
    """TracIn of each layer's weights, and of all of them: change of the gold class's probability, averaged over k."""
    queries = test_rows(retriever, "agnews/test.parquet", sizes.queries)
    assert queries.labels is not None

    def scores(of: Retriever, method: str, **choices: str) -> Any:
        return row_scores(of, queries, of.resolve(QuerySpec(methods=(method,), target="gold", **choices)))[method]

    words, everything = scores(retriever, "tracin-we"), scores(retriever, "tracin", scope="all")
    by_layer = {
        "first": words,
        "second": scores(retriever, f"tracin-layer:{SECOND}"),
        "third": scores(retriever, f"tracin-layer:{THIRD}"),
        "last": scores(retriever, "tracin", scope="head"),
        "all": words + everything,
        "all, with biases": words + scores(with_bias, "tracin", scope="all"),
    }
    trainer = retrainer(retriever, "full", queries.texts)
    found = measure_deletion(trainer, by_layer, queries.labels, sizes.remove, seeds_of(trainer, sizes.seeds, 0))
    rows = {
        name: [cell(found.auc[m, side], DELETION[name][side]) for side in range(2)]
        for m, name in enumerate(found.methods)
    }
    store(
        "yeh22_cnn_deletion", retriever, table("weights of", ["AUC-DEL+", "AUC-DEL-"], rows, 3),
        queries=len(queries), removed=sizes.remove, seeds=len(found.seeds), sampled=found.sampled,
    )  # fmt: skip


def main() -> None:
    """See the module."""
    sizes = parsed(
        __doc__,
        {
            "parts": ("cancellation", "deletion"), "training_rows": 5000, "epochs": 5, "queries": 20, "rows": 500,
            "remove": tuple(range(10, 101, 10)), "seeds": 3,
        },
        {"queries": 4, "rows": 200, "remove": (100,), "seeds": 2},
    )  # fmt: skip
    retriever, with_bias = asked(sizes)
    if "cancellation" in sizes.parts:
        cancellation(retriever, sizes)
    if "deletion" in sizes.parts:
        deletion(retriever, with_bias, sizes)


if __name__ == "__main__":
    main()
