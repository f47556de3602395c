"""Whole-encoder gradients with MiniLM: the pass, memory, recall and time against scoring every row, proofs.

Uses the runs of end_to_end.py; that of the 67k phrases of SST-2 is trained here, for one epoch.
``python benchmarks/gradients.py [--data sst2|mnli10k|sst2_glue] [--queries 24] [--methods gd,gc,if,rif] [--rows N]``
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, ROOT, run, seconds, write_result

from forebear import BuildOptions, Index, Retriever, build_index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode, plan_batches
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.sketches.candidates import propose
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import sketch_rows
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.recall import n_candidates
from forebear.retriever.question.spec import QuerySpec

SCOPE = "all"
BATCH_TOKENS = 4096
FULL_SAMPLE = 4096  # rows that one query is scored against where all would take too long
NATIVE_BF16 = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("amx_bf16", "avx512_bf16"))


def checkpoint(index: Index) -> str:
    return str((index.folder / index.manifest.checkpoints[-1].path).resolve())


def training_step(classifier: Classifier, texts: list[list[str]], labels: np.ndarray) -> None:
    """A plain forward and backward with weight gradients on the batches that the pass uses."""
    rows = encode(classifier, texts)
    for p in classifier.model.parameters():
        p.requires_grad_(True)
    lengths = [len(row["input_ids"]) for row in rows]
    for batch in plan_batches(lengths, BATCH_TOKENS, equal_lengths=classifier.equal_lengths):
        with classifier.arithmetic():
            logits = classifier.model(
                **pad_batch(classifier.tokenizer, [rows[i] for i in batch], classifier.device)
            ).logits
        torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels[batch])).backward()
        classifier.model.zero_grad()
    for p in classifier.model.parameters():
        p.requires_grad_(False)


def the_pass(index: Index, n_rows: int = 512) -> None:
    """Ratios to the plain forward and backward of the same rows, in one run."""
    at = np.sort(np.random.default_rng(0).permutation(index.manifest.n_rows)[:n_rows])
    texts = [column.to_pylist() for column in index.texts(at).values()]
    labels = index.labels[at].astype(np.int64)
    found: dict[str, float] = {}
    sketches = {}
    for precision in ("fp32", *(("bf16",) if NATIVE_BF16 else ())):
        classifier = load_classifier(checkpoint(index), precision=precision, max_length=128)
        sketchers = open_sketchers(
            index.folder, classifier, index.manifest.spec, SCOPE, index.manifest.checkpoints[-1].name, last=True
        )
        plain, *white = sketchers.values()
        found[f"plain_{precision}"] = seconds(lambda c=classifier: training_step(c, texts, labels), 3)

        def ours(some: list[Any], c: Classifier = classifier) -> Any:
            return sketch_rows(c, some, texts, labels, batch_tokens=BATCH_TOKENS)

        found[f"sketch_{precision}"] = seconds(lambda p=plain, run=ours: run([p]), 3)
        if white:
            found[f"sketch_and_whitened_{precision}"] = seconds(lambda p=plain, w=white, run=ours: run([p, *w]), 3)
        sketches[precision] = ours([plain])[0][0]
    facts: dict[str, Any] = {
        "rows": n_rows,
        "rows_a_second": {k: n_rows / v for k, v in found.items()},
        "ratio_to_plain_fp32": {k: v / found["plain_fp32"] for k, v in found.items()},
    }
    if "bf16" in sketches:
        a, b = sketches["fp32"].coordinates, sketches["bf16"].coordinates
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        facts["bf16_cosine_quantiles_0_1_50"] = np.quantile(cosine, [0, 0.01, 0.5]).tolist()
    else:
        facts["bf16"] = "not measured: this CPU computes in bf16 by emulation only"
    write_result("gradients_pass", **facts)


def peak_memory(index: Index) -> None:
    """Largest resident size of a process that runs the plain pass or ours over some rows."""
    found = {}
    for what in ("plain", "sketch"):
        for n_rows in (256, 1024):
            out = subprocess.run(
                [sys.executable, __file__, "--memory", what, str(n_rows), str(index.folder)],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            found[f"{what}_{n_rows}_rows_mib"] = int(out.split()[-1]) // 1024
    write_result("gradients_memory", **found)


def memory_of(what: str, n_rows: int, folder: str) -> None:
    index = Index.open(folder, check=False)
    at = np.arange(n_rows)
    texts = [column.to_pylist() for column in index.texts(at).values()]
    labels = index.labels[at].astype(np.int64)
    classifier = load_classifier(checkpoint(index), max_length=128)
    if what == "plain":
        training_step(classifier, texts, labels)
    else:
        name = index.manifest.checkpoints[-1].name
        sketchers = open_sketchers(index.folder, classifier, index.manifest.spec, SCOPE, name, last=True)
        sketch_rows(classifier, list(sketchers.values())[:1], texts, labels, batch_tokens=BATCH_TOKENS)
    # Not getrusage: its maximum is that of the parent at the fork, if that was larger.
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def built(data: str, curvature: str, n_rows: int) -> Index:
    """The index, made now (seconds by stage written) or found."""
    trained = ROOT / "runs" / "bench" / data
    folder, train = trained.with_name(f"{data}-all" + f"-{n_rows}" * bool(n_rows)), DATA / data / "train.parquet"
    if not (trained / "run.json").is_file():
        dev = DATA / data / "dev.parquet"
        run("train", "--data", train, "--model", "minilm", "--dev", dev, "--epochs", "1", "--out", trained)
    if (folder / "manifest.json").is_file():
        return Index.open(folder)
    stages: dict[str, float] = {}
    last = ["start", time.perf_counter()]

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage != last[0]:
            now = time.perf_counter()
            stages[str(last[0])] = now - float(last[1])
            last[:] = [stage, now]

    options = BuildOptions(scopes=("head", SCOPE), max_length=128, curvature=curvature, dampings=("0.1x",))
    options = replace(options, label_mode=json.loads((trained / "run.json").read_text())["label_mode"])
    source = open_rows(train, need_labels=True)
    if n_rows:  # the first ones
        block = next(source.blocks(n_rows))
        texts = list(zip(*block.texts, strict=True)) if len(block.texts) > 1 else block.texts[0]
        source = rows_from_texts(texts, block.labels, label_names=source.label_names)
    index = build_index(source, folder, choose_model(str(trained)).checkpoints, options, progress=progress)
    stages[str(last[0])] = time.perf_counter() - float(last[1])
    write_result(f"gradients_build_{folder.name}", rows=index.manifest.n_rows, seconds=stages)
    return index


def some_queries(data: str, n_queries: int) -> list[Any]:
    """Seeded ones of the first 200 dev rows: texts or pairs."""
    texts = next(open_rows(DATA / data / "dev.parquet").blocks(200)).texts
    rows = list(zip(*texts, strict=True)) if len(texts) > 1 else texts[0]
    return [rows[i] for i in np.sort(np.random.default_rng(1).permutation(len(rows))[:n_queries])]


def recall_and_time(index: Index, data: str, n_queries: int, methods: tuple[str, ...]) -> None:
    retriever = Retriever(index)
    queries = some_queries(data, n_queries)
    columns = [list(c) for c in zip(*queries, strict=True)] if isinstance(queries[0], tuple) else [queries]
    started = time.perf_counter()
    truth = {
        100: retriever.retrieve(queries, exact="full", methods=methods, top=100, scope=SCOPE).to_pandas(),
    }
    full_batch = (time.perf_counter() - started) / n_queries
    truth[10] = truth[100][truth[100]["rank"] <= 10]
    models = retriever.models
    search = GradientSearch.kept(models, SCOPE, CurvatureSpec())
    targets = run_forward(models.classifier(), columns).predictions
    parts = search.candidates.parts([METHODS[m] for m in methods], Queries(columns, targets))
    found: dict[str, Any] = {}
    for method in methods:
        spec = QuerySpec(methods=(method,), scope=SCOPE)
        default = n_candidates(retriever.resolve(spec), METHODS[method])
        how = index.proposal(SCOPE, method, cosine=METHODS[method].metric == "cos")
        by_candidates = {}
        for n in sorted({100, 200, 400, 800, default}):
            ends = propose(parts[method], index.live, n, how)
            by_candidates[n] = {
                f"{side}s@{k}": _recall(rows, truth[k][truth[k]["method"] == method], side, k)
                for side, (rows, _) in zip(("proponent", "opponent"), ends, strict=True)
                for k in (10, 100)
            }
        started = time.perf_counter()
        for text in queries[:3]:
            retriever.retrieve([text], methods=[method], top=10, scope=SCOPE)
        one = (time.perf_counter() - started) / 3
        found[method] = {"default_candidates": default, "recall": by_candidates, "one_query_seconds": one}
    sample = index.live[np.random.default_rng(2).permutation(len(index.live))[:FULL_SAMPLE]]
    started = time.perf_counter()
    search.score([METHODS["gd"]], Queries([c[:1] for c in columns], targets[:1]), {"gd": sample})
    full_one = (time.perf_counter() - started) * len(index.live) / len(sample)
    files = index.manifest.files
    size = {
        kind: sum(
            f["bytes"]
            for n, f in files.items()
            if n.startswith(f"gradients/{SCOPE}/{kind}") and n.split("/")[-1][0].isdigit()
        )
        / index.manifest.n_rows
        for kind in ("epoch", "whitened")
    }
    write_result(
        f"gradients_retrieval_{index.folder.name}",
        rows=index.manifest.n_rows, queries=n_queries, bytes_a_row=size,
        full_seconds_a_query_in_a_batch=full_batch, full_one_query_seconds=full_one,
        full_one_query_from_rows=len(sample), methods=found,
        speed_up_one_query={m: full_one / f["one_query_seconds"] for m, f in found.items()},
    )  # fmt: skip


def _recall(listed: np.ndarray, truth: Any, side: str, k: int) -> float:
    best = truth[truth["side"] == side].groupby("query")["row"].apply(set)
    return float(np.mean([len(set(listed[q].tolist()) & best[q]) / k for q in best.index]))


def proofs(index: Index, data: str, n_queries: int = 3, methods: tuple[str, ...] = ("gd", "gc")) -> None:
    retriever = Retriever(index)
    dev = some_queries(data, n_queries)
    found = {}
    for method in methods:
        started = time.perf_counter()
        table = retriever.retrieve(dev, methods=[method], top=10, scope=SCOPE, certify=True).to_pandas()
        first = table[table["rank"] == 1]
        found[method] = {
            "proven": float(first["proven"].mean()),
            "rows_scored_share": float(first["rows_scored"].mean()) / index.manifest.n_live,
            "seconds_a_query": (time.perf_counter() - started) / n_queries,
        }
    write_result(f"gradients_proofs_{index.folder.name}", queries=n_queries, methods=found)


def main(data: str, n_queries: int, methods: tuple[str, ...], n_rows: int) -> None:
    index = built(data, "ekfac" if {"if", "rif"} & set(methods) else "none", n_rows)
    if data == "sst2":
        the_pass(index)
        peak_memory(index)
    recall_and_time(index, data, n_queries, methods)
    if data == "sst2":
        proofs(index, data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory_of(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--data", default="sst2")
        parser.add_argument("--queries", type=int, default=24)
        parser.add_argument("--methods", default="gd,gc,if,rif")
        parser.add_argument("--rows", type=int, default=0, help="index the first so many; 0: all")
        given = parser.parse_args()
        main(given.data, given.queries, tuple(given.methods.split(",")), given.rows)
