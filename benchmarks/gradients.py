"""Whole-encoder gradients on real data: the pass, bytes a row, recall of the exact top 10, time a query.

SST-2 (6,920 rows), MiniLM, scope ``all``. The plain pass is fp32 forward and backward with weight gradients on the
same batches. Recall is against ``--exact full`` (every row scored exactly), for development rows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import DATA, ROOT, seconds, write_result

from forebear import BuildOptions, Index, Retriever, build_index, choose_model, open_rows, rows_from_texts
from forebear.indexer.model import encode, load_classifier, pad_batch, plan_batches
from forebear.indexer.sketch import Sketcher, fit_reduction

SCOPE = "all"
BATCH_TOKENS = 4096
CANDIDATES = (50, 100, 200, 400)


def the_pass(model: str, rows: int) -> None:
    """Features, sketches and exact norms against a plain forward and backward, side by side."""
    block = next(open_rows(DATA / "sst2" / "train.parquet", need_labels=True).blocks(rows))
    labels = np.array(block.labels)
    classifier = load_classifier(model)
    encoded = encode(classifier, block.texts)
    plan = list(plan_batches([len(r["input_ids"]) for r in encoded], BATCH_TOKENS))

    def plain() -> None:
        for batch in plan:
            inputs = pad_batch(classifier.tokenizer, [encoded[i] for i in batch], classifier.device)
            logits = classifier.model(**inputs).logits
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch])).backward()
        classifier.model.zero_grad()

    raw = Sketcher(classifier, SCOPE, 0).sketch(block.texts, labels, batch_tokens=BATCH_TOKENS)
    reduction = fit_reduction(raw.sketches, 256, 0)
    found = {"plain_fp32": seconds(plain, 3)}
    sketches = {}
    for precision in ("fp32", "bf16"):
        sketcher = Sketcher(load_classifier(model, precision=precision), SCOPE, 0, reduction)

        def ours(sketcher: Sketcher = sketcher) -> None:
            sketcher.sketch(block.texts, labels, batch_tokens=BATCH_TOKENS)

        found[f"sketch_{precision}"] = seconds(ours, 3)
        sketches[precision] = sketcher.sketch(block.texts, labels, batch_tokens=BATCH_TOKENS)
    a, b = sketches["fp32"], sketches["bf16"]
    cosine = (
        (a.sketches * b.sketches).sum(axis=1) / np.linalg.norm(a.sketches, axis=1) / np.linalg.norm(b.sketches, axis=1)
    )
    write_result(
        "gradients_pass",
        rows=rows,
        raw_width=Sketcher(classifier, SCOPE, 0).raw_width,
        rows_a_second={k: rows / v for k, v in found.items()},
        ratio_fp32=found["sketch_fp32"] / found["plain_fp32"],
        ratio_bf16=found["sketch_bf16"] / found["plain_fp32"],
        bf16_cosine_quantiles_0_1_50=np.quantile(cosine, [0, 0.01, 0.5]).tolist(),
        bf16_norm_error_median=float(np.median(np.abs(b.norms / a.norms - 1))),
    )


def retrieval(folder: Path, index_folder: Path, n_queries: int, train_rows: int) -> None:
    block = next(open_rows(DATA / "sst2" / "train.parquet", need_labels=True).blocks(train_rows))
    source = rows_from_texts(block.texts[0], block.labels, label_names=("negative", "positive"))
    if (index_folder / "manifest.json").is_file():
        index, built = Index.open(index_folder), None
    else:
        started = time.perf_counter()
        chosen = choose_model(str(folder))
        index = build_index(
            source, index_folder, chosen.checkpoints, BuildOptions(scopes=("head", SCOPE), max_length=128)
        )
        built = time.perf_counter() - started
    retriever = Retriever(index)
    queries = next(open_rows(DATA / "sst2" / "dev.parquet").blocks(n_queries)).texts[0]
    ask = {"methods": ["gd", "gc"], "top": 10, "scope": SCOPE}
    full_seconds = {}
    truth = {}
    for method in ask["methods"]:
        started = time.perf_counter()
        truth[method] = retriever.retrieve(queries, exact="full", **(ask | {"methods": [method]})).to_pandas()
        full_seconds[method] = (time.perf_counter() - started) / n_queries
    recall: dict[str, dict[str, float]] = {m: {} for m in ask["methods"]}
    for method in ask["methods"]:
        for n in (10, *CANDIDATES):
            # The candidates of --exact rerank are the top of --exact none: a list holds what re-ranking would find.
            listed = retriever.retrieve(queries, exact="none", methods=[method], top=n, candidates=n, scope=SCOPE)
            pairs = zip(
                listed.to_pandas().groupby(["query", "side"]), truth[method].groupby(["query", "side"]), strict=True
            )
            recall[method][str(n)] = float(
                np.mean([len(set(a["row"]) & set(b["row"])) / 10 for (_, a), (_, b) in pairs])
            )
    started = time.perf_counter()
    retriever.retrieve(queries[0:1], methods=["gd"], top=10, scope=SCOPE)
    one = time.perf_counter() - started
    files = index.manifest.files
    sketch_bytes = sum(f["bytes"] for n, f in files.items() if n.startswith("gradients/") and "reduction" not in n)
    write_result(
        "gradients_retrieval",
        rows=index.manifest.n_rows, queries=n_queries, ends=2, build_seconds=built,
        sketch_bytes_a_row=sketch_bytes / index.manifest.n_rows,
        recall_at_10_by_candidates=recall, full_seconds_a_query_in_a_batch=full_seconds,
        one_query_100_candidates_seconds=one,
    )  # fmt: skip


def main(n_queries: int = 12, pass_rows: int = 1024, train_rows: int = 6920) -> None:
    folder = ROOT / "runs" / "bench" / "sst2"
    record = json.loads((folder / "run.json").read_text())
    the_pass(str(folder / record["checkpoints"][-1]["path"]), pass_rows)
    retrieval(folder, ROOT / "runs" / "bench" / f"sst2-all-{train_rows}-index", n_queries, train_rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
