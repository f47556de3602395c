"""Make the golden indexes again: ``.venv/bin/python tests/golden/make.py [words]``, from the repository root.

Only when the index format changes on purpose (FORMAT_VERSION): otherwise an index that a user has on disk would
no longer open, or would answer differently. ``scores.json`` is what the index answered when it was made;
``words.json`` the same of the index of words, which ``words`` makes alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
TEXTS = (
    "a good film", "the plot is dull", "very bright and warm", "not a bad actor", "the scene was slow", "sad music",
    "the judge saw the artist", "a happy story", "cold and slow", "good good film", "bad bad film", "a good film",
)  # fmt: skip
LABELS = (1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0)
QUERIES = ("a good story", "the film was very bad", "an unknownword plot")
WORD_METHODS = ("tracin-we", "tracin-we-topk", "tracin-we-common", "tracin-we-nocommon", "tracin-tfidf")
METHODS = ("nn-euc", "nn-cos", "nn-dot", "gd", "gc", "if", "rif", "rep", "tracin", "tracin-last")


def main() -> None:
    """Write ``model/``, ``index/`` and ``scores.json`` beside this file."""
    os.chdir(HERE)
    sys.path.insert(0, str(HERE.parent / "support"))
    import torch
    import transformers
    from tiny import make_tiny_model

    from forebear.indexer.building.build import BuildOptions, build_index
    from forebear.indexer.rows.opening import rows_from_texts
    from forebear.indexer.training.model_choice import choose_model
    from forebear.retriever.retriever import Retriever

    for name in ("model", "index"):
        shutil.rmtree(name, ignore_errors=True)
    torch.set_num_threads(1)
    make_tiny_model(Path("model"))  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=48, num_labels=2, id2label={0: "negative", 1: "positive"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.save_pretrained("model")
    source = rows_from_texts(TEXTS, LABELS)
    options = BuildOptions(dampings=("0.1x", "0.01"), shard_rows=5, device="cpu")
    retriever = Retriever(build_index(source, "index", choose_model("model").checkpoints, options), device="cpu")
    scores = {name: retriever.scores(QUERIES, name).tolist() for name in METHODS}
    Path("scores.json").write_text(json.dumps({"queries": QUERIES, "scores": scores}, indent=1) + "\n")


def make_words() -> None:
    """Write ``words/`` and ``words.json``, of the model that is there."""
    os.chdir(HERE)
    import torch

    from forebear.indexer.building.build import BuildOptions, build_index
    from forebear.indexer.rows.opening import rows_from_texts
    from forebear.indexer.training.model_choice import choose_model
    from forebear.retriever.retriever import Retriever

    shutil.rmtree("words", ignore_errors=True)
    torch.set_num_threads(1)
    options = BuildOptions(stores=("features", "words"), words_tops=(0, 3), dampings=(), shard_rows=5, device="cpu")
    index = build_index(rows_from_texts(TEXTS, LABELS), "words", choose_model("model").checkpoints, options)
    table = Retriever(index, device="cpu").retrieve(list(QUERIES), methods=WORD_METHODS, top=4, exact="none")
    kept = ("query", "method", "side", "rank", "row", "score", "word_ids", "contributions")
    Path("words.json").write_text(json.dumps({"queries": QUERIES, "answers": table.select(kept).to_pylist()}) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["words"]:
        main()
    make_words()
