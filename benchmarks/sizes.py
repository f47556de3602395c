"""What an index of many rows costs to build, open, ask and change, at the head of a small encoder.

    python benchmarks/sizes.py [--folder runs/bench/sizes] [--rows 100000 1000000 10000000]

Rows: the features (64 wide) of SST-2's sentences under a BERT of two layers, trained here for an epoch, tiled as
``million.py`` does it: residuals and losses are those of the model's head, files and search structures those of the
package's own writers. One thread; seconds of the wall, since much of it is reading and writing.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, FOREBEAR, ROOT, run, write_result
from million import make_index
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from forebear.indexer.index import Index
from forebear.indexer.model.loading import resolve_model_name
from forebear.retriever.retriever import Retriever

WIDTH = 64
METHODS = ("nn-cos", "gd", "gc", "if")
APPENDED = 1000
TEXTS = ["a gripping , beautifully acted film", "the plot goes nowhere", "i have seen worse , but not this year"]


def trained_model(folder: Path) -> Path:
    """A run of the small encoder; what is there is not trained again."""
    if not (folder / "run").is_dir():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_name("minilm"))
        shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape))
        for part in (model, tokenizer):
            part.save_pretrained(folder / "start")
        how = ("--model", folder / "start", "--dev", DATA / "sst2" / "dev.parquet", "--epochs", "1", "--lr", "5e-4")
        run("train", "--data", DATA / "sst2" / "train.parquet", *how, "--out", folder / "run", "-q")
    return folder / "run"


def seconds(work: Callable[[], Any]) -> float:
    """Of the wall."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def asked(retriever: Retriever) -> dict[str, dict[str, float]]:
    """Seconds of questions by each method: the first, which reads and hashes what it compares; one; each of a batch."""
    found = {}
    batch = [f"{text} {n}" for n in range(22) for text in TEXTS][:64]
    for method in METHODS:
        ask = partial(retriever.retrieve, methods=(method,), top=10)
        first = seconds(partial(ask, TEXTS[:1]))
        one = float(np.median([seconds(partial(ask, [text])) for text in TEXTS]))
        found[method] = {"first": first, "one": one, "of_64_each": seconds(partial(ask, batch)) / 64}
    return found


def changed(*arguments: object) -> dict[str, float]:
    """Seconds and peak memory of a command, imports and loading the model among them."""
    script = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, FOREBEAR, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return {"seconds": time.perf_counter() - started, "peak_mib": int(done.stdout.split()[-1]) / 1024}


def measure(base: Path, folder: Path, n_rows: int) -> dict[str, Any]:
    """Everything about an index of so many rows."""
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"rows": n_rows, "width": WIDTH}
    found["written_and_finished_seconds"] = seconds(lambda: make_index(Index.open(base), folder, n_rows))
    found["peak_mib_of_this_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = Index.open(folder).manifest.files
    found["bytes_a_row"] = sum(facts["bytes"] for facts in files.values()) / n_rows
    found["files"] = len(files)
    found["open_seconds"] = seconds(lambda: Index.open(folder))
    found["queries"] = asked(Retriever(Index.open(folder)))
    more = folder.with_name("more.csv")
    more.write_text("text,label\n" + "".join(f"new text number {n},{n % 2}\n" for n in range(APPENDED)))
    found[f"append_{APPENDED}"] = changed("index", "--out", folder, "--train", more, "--append", "-q")
    found["retire_10"] = changed("index", "--out", folder, "--retire", "5-14", "-q")
    found["ask_by_command"] = changed("retrieve", "--index", folder, "--text", TEXTS[0], "--method", "gc", "-q")
    found["verify_bytes"] = changed("verify", folder, "--rows", "0")
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    model, base = trained_model(given.folder), given.folder / "base"
    if not base.is_dir():
        run("index", "--model", model, "--train", DATA / "sst2" / "train.parquet", "--out", base, "-q")
    for n_rows in given.rows:
        write_result(f"sizes_{n_rows}", **measure(base, given.folder / f"index-{n_rows}", n_rows))
        shutil.rmtree(given.folder / f"index-{n_rows}")


if __name__ == "__main__":
    main()
