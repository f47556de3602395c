"""Processor seconds of each stage of a build at scope ``all``, over an epoch of training; and peak memories by length.

Seconds are those of ``--rows`` reviews of SST-2; memory is taken of texts of one length. The plain pass is a forward
and backward with the gradients of all weights, of the same batches. Every build, and every plain pass whose memory is
taken, has a process of its own.
``python benchmarks/build_stages.py RUN [--rows 1000] [--lengths 25,128,512]``, RUN a folder of ``forebear train``
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import DATA, count_processor_seconds, write_result

WORDS = ("film", "good", "story", "bad", "actor", "plain", "long", "music", "scene", "dull")
MEMORY_TOKENS = 10_000  # of the rows of a build whose memory is taken


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reviews(n_rows: int) -> tuple[list[str], list[int]]:
    """Rows of SST-2."""
    import pyarrow.parquet as pq

    table = pq.read_table(DATA / "sst2" / "train.parquet").slice(0, n_rows)
    return table["sentence" if "sentence" in table.column_names else "text"].to_pylist(), table["label"].to_pylist()


def long_rows(n_pieces: int, n_rows: int) -> tuple[list[str], list[int]]:
    """Rows that differ, of exactly so many word pieces."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n_pieces - 2)) for _ in range(n_rows)], [i % 2 for i in range(n_rows)]


def steps(
    run: str,
    texts: Sequence[str],
    gold: Sequence[int],
    max_length: int,
    plan: Callable[..., Iterator[list[int]]],
    optimiser: bool,
) -> None:
    """A forward and backward of each batch, and a step of AdamW."""
    import torch

    from forebear import choose_model
    from forebear.indexer.model.encoding import encode
    from forebear.indexer.model.loading import load_classifier
    from forebear.indexer.model.network.batches import pad_batch

    classifier = load_classifier(choose_model(run).checkpoints[-1].path, device="cpu", max_length=max_length)
    rows = encode(classifier, [list(texts)])
    model = classifier.model.requires_grad_(True).train(optimiser)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for batch in plan([len(row["input_ids"]) for row in rows]):
        logits = model(**pad_batch(classifier.tokenizer, [rows[i] for i in batch], classifier.device)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([gold[i] for i in batch])).backward()
        if optimiser:
            optimizer.step()
        optimizer.zero_grad()


def in_order(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of 32 rows."""
    yield from (list(range(start, min(start + 32, len(lengths)))) for start in range(0, len(lengths), 32))


def as_a_pass(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The batches of a pass of a build."""
    from forebear.indexer.model.device.batch_size import BATCH_TOKENS
    from forebear.indexer.model.encoding import plan_batches

    return plan_batches(lengths, BATCH_TOKENS, equal_lengths=False)


def plain_memory(run: str, texts: Sequence[str], gold: Sequence[int], max_length: int) -> float:
    """Peak of a process that runs the plain pass, MiB."""
    import torch

    torch.set_num_threads(1)
    steps(run, texts, gold, max_length, as_a_pass, optimiser=False)
    return peak_mib()


def build(run: str, texts: Sequence[str], gold: Sequence[int], max_length: int, n_epochs: int) -> dict[str, Any]:
    """A build: processor seconds by stage and the peak of its process; epochs of training before and after it."""
    import torch

    from forebear import BuildOptions, build_index, choose_model, rows_from_texts

    torch.set_num_threads(1)
    stages: dict[str, float] = {}
    last, before = "model and rows", time.process_time()

    def progress(stage: str, done: int, _total: int) -> None:
        nonlocal last, before
        name = f"after {last}" if not done and stage != last else stage
        stages[name] = stages.get(name, 0.0) + time.process_time() - before
        last, before = stage, time.process_time()

    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions(scopes=("head", "all"), max_length=max_length, device="cpu")
        started = time.process_time()
        before = started
        build_index(
            rows_from_texts(list(texts), list(gold)), Path(scratch) / "index", choose_model(run).checkpoints, options,
            progress=progress,
        )  # fmt: skip
        taken, peak = time.process_time() - started, peak_mib()
    epochs = []
    for _ in range(n_epochs):
        started = time.process_time()
        steps(run, texts, gold, max_length, in_order, optimiser=True)
        epochs.append(time.process_time() - started)
    return {"seconds": taken, "peak": peak, "stages": stages, "epochs": epochs}


def alone(function: Callable[[], Any]) -> Any:
    """Run in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--lengths", default="25,128,512")
    given = parser.parse_args()
    count_processor_seconds()
    found = alone(partial(build, given.run, *reviews(given.rows), 128, 2))
    epoch = statistics.median(found["epochs"])
    memory = {}
    for length in map(int, filter(None, given.lengths.split(","))):
        rows = long_rows(length, max(40, MEMORY_TOKENS // length))
        plain, whole = (
            alone(partial(plain_memory, given.run, *rows, length)),
            alone(partial(build, given.run, *rows, length, 0)),
        )
        memory[length] = {
            "plain": round(plain),
            "build": round(whole["peak"]),
            "over plain": round(whole["peak"] / plain, 2),
        }
    write_result(
        "build_stages",
        smaller=["over_an_epoch"],
        over_an_epoch=found["seconds"] / epoch,
        rows=given.rows,
        seconds=round(found["seconds"], 1),
        epoch=round(epoch, 1),
        stages={name: round(value, 1) for name, value in found["stages"].items() if value >= 0.05},
        peak_mib=round(found["peak"]),
        memory_mib=memory,
    )


if __name__ == "__main__":
    main()
