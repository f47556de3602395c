"""From text to answer on real data, by the commands a user runs: train, index, retrieve, audit, first answer.

SST-2 (6,920 rows, 872 queries) and binary MNLI (10,000 rows; HANS, 1,000 rows), MiniLM-L6. A training run that is
there already is used. Whole-process wall seconds.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import DATA, FOREBEAR, ROOT, by_turns, ratio, run, write_result

RUNS = ROOT / "runs" / "bench"


def info(index: Path) -> dict[str, object]:
    out = subprocess.run([FOREBEAR, "info", str(index), "--json"], check=True, capture_output=True, text=True).stdout
    facts: dict[str, object] = json.loads(out)
    return facts


def train_and_index(name: str, train: Path, dev: Path, *extra: str) -> tuple[Path, Path]:
    folder, index = RUNS / name, RUNS / f"{name}-index"
    seconds = None
    if not (folder / "run.json").is_file():
        seconds = run("train", "--data", train, "--model", "minilm", "--dev", dev, "--out", folder, *extra)
    record = json.loads((folder / "run.json").read_text())
    head = run("index", "--model", folder, "--train", train, "--out", index, "--force", "-q")
    lean = info(index)
    everything = ("--checkpoints", "all", "--store", "features,sbert")
    full = run("index", "--model", folder, "--train", train, "--out", index, *everything, "--force", "-q")
    facts = info(index)
    write_result(
        f"end_to_end_{name}_index",
        train_seconds=seconds,
        dev_accuracy=[c["accuracy"] for c in record["checkpoints"]],
        rows=facts["rows"]["live"],  # type: ignore[index]
        index_seconds=head,
        index_bytes=lean["bytes"],
        index_3_checkpoints_sbert_seconds=full,
        index_3_checkpoints_sbert_bytes=facts["bytes"],
    )
    return folder, index


def retrieve(name: str, index: Path, test: Path) -> None:
    methods = subprocess.run([FOREBEAR, "methods", "--json"], check=True, capture_output=True, text=True).stdout
    names = [m["name"] for m in json.loads(methods)]
    head = [m for m in names if not m.startswith("sbert")]
    found: dict[str, object] = {"queries": pq.ParquetFile(test).metadata.num_rows, "methods": head}
    out = {exact: RUNS / f"{name}-{exact}.parquet" for exact in ("none", "rerank", "full")}
    base = ["retrieve", "--index", index, "--test", test, "--top", "10", "--force", "-q"]
    for exact, path in out.items():
        found[f"seconds_{exact}"] = run(*base, "--method", ",".join(head), "--exact", exact, "--out", path)
    found["seconds_gc_only"] = run(*base, "--method", "gc", "--out", RUNS / "one.parquet")
    truth = pq.read_table(out["full"]).to_pandas()
    for exact in ("none", "rerank"):
        table = pq.read_table(out[exact]).to_pandas()
        same = table["row"].to_numpy() == truth["row"].to_numpy()
        found[f"same_row_and_rank_{exact}"] = float(same.mean())
        scale = truth["score"].abs().groupby([truth["query"], truth["method"]]).transform("max").to_numpy()
        found[f"largest_score_error_{exact}"] = float(
            np.max(np.abs(table["score"].to_numpy() - truth["score"].to_numpy()) / np.maximum(scale, 1e-300))
        )
    write_result(f"end_to_end_{name}_retrieve", **found)


def first_answer(index: Path, folder: Path) -> None:
    """`retrieve --text` against importing the libraries, loading the model and one forward pass."""
    model = folder / json.loads((folder / "run.json").read_text())["checkpoints"][-1]["path"]
    code = (
        "import torch, transformers, pyarrow, faiss\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        f"m = M.from_pretrained({str(model)!r}).eval(); t = T.from_pretrained({str(model)!r})\n"
        "with torch.no_grad(): m(**t('a gripping film', return_tensors='pt'))\n"
    )
    ask = ["retrieve", "--index", index, "--text", "a gripping film", "--method", "gc", "--top", "10"]
    libraries = functools.partial(subprocess.run, [sys.executable, "-c", code], check=True, capture_output=True)
    taken = by_turns({"retrieve": lambda: run(*ask), "libraries": libraries}, 5, warm=False)
    write_result(
        "end_to_end_first_answer",
        smaller=("ratio",),
        retrieve_seconds=statistics.median(taken["retrieve"]),
        libraries_model_forward_seconds=statistics.median(taken["libraries"]),
        ratio=ratio(taken["retrieve"], taken["libraries"]),
    )


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    folder, index = train_and_index("sst2", DATA / "sst2" / "train.parquet", DATA / "sst2" / "dev.parquet")
    retrieve("sst2", index, DATA / "sst2" / "dev.parquet")
    first_answer(index, folder)
    mnli = DATA / "mnli10k"
    _, index = train_and_index("mnli10k", mnli / "train.parquet", mnli / "dev.parquet", "--labels", "binary-nli")
    report = RUNS / "hans1k"
    seconds = run(
        "audit", "hans", "--index", index, "--test", DATA / "hans1k" / "test.parquet", "--out", report, "--force"
    )
    result = json.loads((report / "result.json").read_text())
    size = (report / "report.html").stat().st_size
    write_result(
        "end_to_end_hans1k",
        seconds=seconds,
        report_bytes=size,
        **{k: v for k, v in result.items() if k != "provenance"},
    )


if __name__ == "__main__":
    main()
