"""What ForebearCallback costs a training by transformers' Trainer: MiniLM on SST-2, with and without it by turns.

``python benchmarks/callback.py [--rows 480] [--turns 5]``
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from common import DATA, write_result

from forebear import ForebearCallback
from forebear.indexer.model.loading import resolve_model_name


def train(n_rows: int, folder: Path, *, with_callback: bool) -> float:
    """Processor seconds of an epoch in batches of 16, with its save at the end."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    base = resolve_model_name("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    rows = pq.read_table(DATA / "sst2" / "train.parquet").slice(0, n_rows)
    examples = [
        {**tokenizer(text, truncation=True, max_length=64), "labels": label}
        for text, label in zip(rows["text"].to_pylist(), rows["label"].to_pylist(), strict=True)
    ]
    settings = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=16, save_strategy="epoch", logging_steps=10,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    callbacks = [ForebearCallback(rows)] if with_callback else []
    trainer = Trainer(
        model=model, args=settings, train_dataset=examples, processing_class=tokenizer, callbacks=callbacks
    )
    before = time.process_time()
    trainer.train()
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as scratch:
        train(32, Path(scratch) / "warm", with_callback=True)
        for turn in range(given.turns):
            for with_callback in (False, True) if turn % 2 else (True, False):
                folder = Path(scratch) / f"{turn}-{with_callback}"
                seconds[with_callback].append(train(given.rows, folder, with_callback=with_callback))
    ratios = [with_it / without for with_it, without in zip(seconds[True], seconds[False], strict=True)]
    result = {
        "rows": given.rows, "steps": -(-given.rows // 16), "seconds_without": seconds[False],
        "seconds_with": seconds[True], "ratio": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip
    write_result("callback", **result)


if __name__ == "__main__":
    main()
