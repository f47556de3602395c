"""A LoRA adapter of MiniLM, trained by transformers' Trainer on SST-2 with planted wrong labels, indexed as it is.

What the audit of wrong labels finds at each scope, and how far scores at the head are from those of the merged model.
``python benchmarks/adapters.py [--rows 2000] [--flips 100] [--all-rows 400]``
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, ROOT, run, write_result

from forebear import Index, Retriever
from forebear.indexer.model.loading import resolve_model_name

FOLDER = ROOT / "runs" / "bench" / "adapters"
EPOCHS = 2


def train(rows: pa.Table, folder: Path) -> None:
    """A Trainer folder with an adapter a checkpoint; the tokenizer is left to the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    base = resolve_model_name("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    targets = ["query", "value", "dense"]
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets))
    texts, labels = rows["text"].to_pylist(), rows["label"].to_pylist()
    examples = [
        {**tokenizer(text, truncation=True, max_length=128), "labels": label}
        for text, label in zip(texts, labels, strict=True)
    ]
    settings = TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=32, learning_rate=1e-3, save_strategy="epoch",
        logging_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=examples, processing_class=tokenizer).train()


def merge(adapter: Path, folder: Path) -> None:
    """The adapter's weights added to its base's, as a model of its own."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)


def head_scores(folder: Path, texts: list[str]) -> np.ndarray:
    """Dot products at the head of all rows, by row number, ``(q, n)``."""
    retriever = Retriever(Index.open(folder))
    table = retriever.retrieve(texts, methods=["gd"], top=retriever.index.manifest.n_rows)
    scores = np.zeros((len(texts), retriever.index.manifest.n_rows))
    for line in table.to_pylist():
        scores[line["query"], line["row"]] = line["score"]
    return scores


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--all-rows", type=int, default=400)
    asked = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(DATA / "sst2" / "train.parquet")
    rng = np.random.default_rng(0)
    table = table.take(np.sort(rng.permutation(len(table))[: asked.rows]))
    labels = table["label"].to_numpy().copy()
    flipped = np.sort(rng.permutation(asked.rows)[: asked.flips])
    labels[flipped] = 1 - labels[flipped]
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels))
    pq.write_table(table, FOLDER / "train.parquet")
    pq.write_table(table.slice(0, asked.all_rows), FOLDER / "few.parquet")
    trainer = FOLDER / "trainer"
    if not trainer.exists():
        train(table, trainer)
    last = sorted(trainer.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    result: dict[str, Any] = {"rows": asked.rows, "flips": asked.flips, "seconds": {}, "found": {}}
    names = ["--label-names", "negative,positive", "--force"]
    for name, model, rows, scope in (
        ("adapter", [trainer, "--checkpoints", "all"], "train", "head,adapter"),
        ("all", [last], "few", "head,all"),
    ):
        started = time.perf_counter()
        train_rows = FOLDER / f"{rows}.parquet"
        run("index", "--model", *model, "--train", train_rows, "--out", FOLDER / name, "--scope", scope, *names)
        result["seconds"][name] = time.perf_counter() - started
    merge(last, FOLDER / "merged")
    for name, model in (("head", last), ("head-merged", FOLDER / "merged")):
        run("index", "--model", model, "--train", FOLDER / "train.parquet", "--out", FOLDER / name, *names)
    texts = pq.read_table(DATA / "sst2" / "dev.parquet")["text"].to_pylist()[:20]
    ours, theirs = (head_scores(FOLDER / name, texts) for name in ("head", "head-merged"))
    result["largest difference at the head"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    for name, scope in (("adapter", "head"), ("adapter", "adapter"), ("all", "all")):
        out = FOLDER / f"audit-{name}-{scope}"
        run("audit", "mislabelled", "--index", FOLDER / name, "--scope", scope, "--out", out, "--force")
        result["found"][scope] = found_in(out, flipped)
    asked_for = ["--scope", "adapter", "--method", "gd,if,rif,tracin", "--top", "3", "--text", texts[0]]
    run("retrieve", "--index", FOLDER / "adapter", *asked_for, "--out", FOLDER / "answers.parquet", "--force")
    print(json.dumps(result, indent=1))
    write_result("adapters", **result)


def found_in(report: Path, flipped: np.ndarray) -> dict[str, int]:
    """Of the rows that an audit lists first, how many were planted."""
    with (report / "table.csv").open(encoding="utf-8", newline="") as file:
        listed = [int(line["row"]) for line in csv.DictReader(file)]
    return {f"first {n}": len(set(listed[:n]) & set(flipped.tolist())) for n in (20, 50, 100)}


if __name__ == "__main__":
    main()
