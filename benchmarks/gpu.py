"""What a GPU gives, beside the CPU in one run: repeats, waits, answers, too little memory, FAISS.

``python benchmarks/gpu.py PART [--device cuda] [--data FILE] [--model minilm] [--rows N] [--work FOLDER]``

Parts: ``train`` (the same training and retraining twice), ``index`` (head and all layers at three batch sizes, with the
waits that torch reports), ``retrieve`` (24 test rows against the exact scores of all rows; after ``index``), ``memory``
(builds in a small share of the memory), ``search`` (a million vectors: torch, FAISS on the GPU, FAISS on the CPU).
Each prints JSON, writes it to ``benchmarks/results``, and ends with an error if what it checks does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, write_result

from forebear import (
    BuildOptions,
    Index,
    Retriever,
    TrainOptions,
    build_index,
    choose_model,
    evaluations,
    open_rows,
    train,
)

BATCHES = (4096, 16_384, 65_536)
METHODS = ("gd", "gc", "if", "rif")
N_TESTS, TOP = 24, 10
LEAST_RECALL = 0.9
N_VECTORS, WIDTH = 1_000_000, 384


class Check:
    """One run of the parts.

    Attributes:
        found: What was measured.
        wrong: What did not hold.
    """

    def __init__(self, choices: argparse.Namespace) -> None:
        self.device, self.model, self.n_rows = choices.device, choices.model, choices.rows
        self.data, self.work = Path(choices.data), Path(choices.work)
        self.is_cuda = torch.device(self.device).type == "cuda"
        self.found: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)

    def must(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what)

    @property
    def rows(self) -> Path:
        """The training rows: the first of the data."""
        import pyarrow.parquet as pq

        path = self.work / f"train-{self.n_rows}.parquet"
        if not path.is_file():
            pq.write_table(pq.read_table(self.data).slice(0, self.n_rows), path)
        return path

    @property
    def tests(self) -> Path:
        """Rows behind the training rows."""
        import pyarrow.parquet as pq

        path = self.work / "tests.parquet"
        if not path.is_file():
            pq.write_table(pq.read_table(self.data).slice(self.n_rows, N_TESTS), path)
        return path

    def trained(self, name: str) -> Path:
        """A model of one epoch, trained if it is not there."""
        folder = self.work / name
        if not folder.is_dir():
            options = TrainOptions(epochs=1, batch_size=64, learning_rate=1e-4, max_length=64, device=self.device)
            train(open_rows(str(self.rows)), self.model, folder, options)
        return folder

    def timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """A result, and the seconds it took."""
        started = time.perf_counter()
        found = run()
        if self.is_cuda:
            torch.cuda.synchronize()
        return found, round(time.perf_counter() - started, 3)

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Count the lines for which the host waits, as torch reports them: not of events, by which results come."""
        counted: Counter[str] = Counter()
        if not self.is_cuda:
            yield counted
            return
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield counted
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counted.update(f"{Path(w.filename).name}:{w.lineno}" for w in heard if "synchroniz" in str(w.message).lower())

    def build(self, name: str, batch_tokens: int, **more: Any) -> tuple[Index, float]:
        """An index at the head and all layers, and the seconds it took."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        options = BuildOptions(scopes=("head", "all"), device=self.device, batch_tokens=batch_tokens, max_length=64)
        chosen = choose_model(str(self.trained("run"))).checkpoints
        return self.timed(lambda: build_index(open_rows(str(self.rows)), folder, chosen, options, **more))

    # ---------------------------------------------------------------- parts

    def train(self) -> None:
        """The same training, and the same retrainings, twice: equal to the bit."""
        weights = []
        for name in ("run", "again"):
            folder, seconds = self.timed(lambda name=name: self.trained(name))
            paths = sorted(folder.rglob("*.safetensors"))
            weights.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
            self.found[f"training, {name}, seconds"] = seconds
        self.must(weights[0] == weights[1], "the same training gave other weights")
        options = BuildOptions(device=self.device, max_length=64)
        folder = self.work / "head"
        shutil.rmtree(folder, ignore_errors=True)
        built = build_index(
            open_rows(str(self.rows)), folder, choose_model(str(self.trained("run"))).checkpoints, options
        )
        outcomes = []
        for turn in range(2):
            cache = self.work / f"cache-{turn}"
            shutil.rmtree(cache, ignore_errors=True)
            how = evaluations.Retraining(recipe="top-1", n_seeds=1, cache=cache, device=self.device)
            retriever = Retriever(built, device=self.device)
            _, seconds = self.timed(
                lambda retriever=retriever, how=how: evaluations.removal(
                    retriever, str(self.tests), remove=[self.n_rows // 20], how=how, n_queries=2, methods=["gd"]
                )
            )
            outcomes.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in cache.rglob("*.arrow")})
            self.found[f"retraining the last layer, turn {turn}, seconds"] = seconds
        self.must(bool(outcomes[0]) and outcomes[0] == outcomes[1], "the same retrainings gave other logits")

    def index(self) -> None:
        """Builds at three batch sizes, and the host's waits in one of them."""
        for batch in BATCHES if self.is_cuda else BATCHES[1:2]:
            (index, seconds) = self.build(f"index-{batch}", batch)
            self.found[f"index, {batch} tokens a batch, seconds"] = seconds
            self.found[f"index, {batch} tokens a batch, rows a second"] = round(len(index.live) / seconds)
        with self.waits() as waits:
            self.build("index-waits", BATCHES[1])
        n_tokens = self.n_rows * 20  # about 20 word pieces a row
        self.found["waits of a build"] = waits.total()
        self.found["waits a batch, about"] = round(waits.total() / max(1, n_tokens / BATCHES[1]), 1)
        self.found["lines that wait most"] = dict(waits.most_common(12))

    def retrieve(self) -> None:
        """Answers from candidates beside the scores of all rows."""
        retriever = Retriever(self.work / f"index-{BATCHES[1]}", device=self.device)
        for scope in ("head", "all"):
            for method in METHODS:
                ask = {"methods": [method], "scope": scope, "top": TOP}
                retriever.retrieve(str(self.tests), **ask)  # sketches and the model get there
                found, seconds = self.timed(lambda ask=ask: retriever.retrieve(str(self.tests), **ask))
                full, full_seconds = self.timed(
                    lambda ask=ask: retriever.retrieve(str(self.tests), exact="full", **ask)
                )
                recall = _recall(found, full)
                self.found[f"{scope} {method}"] = {
                    "seconds": seconds, "seconds of all rows": full_seconds, "recall": round(recall, 4)
                }  # fmt: skip
                self.must(
                    recall >= (1.0 if scope == "head" else LEAST_RECALL), f"{scope} {method}: recall {recall:.3f}"
                )

    def memory(self) -> None:
        """A build whose batches do not fit in what it may take is halved, and is the same."""
        if not self.is_cuda:
            return
        whole = Index.open(self.work / f"index-{BATCHES[1]}")
        total = torch.cuda.get_device_properties(self.device).total_memory
        warned: list[str | None] = []
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + (3 << 30)) / total))
        try:
            small, seconds = self.build("index-small", 1 << 18, warn=warned.append)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        a, b = (index.gradients("all").norms for index in (whole, small))
        apart = float(np.abs(a - b).max() / a.max())
        self.found["a build in 3 GiB"] = {"seconds": seconds, "warnings": len(warned), "norms apart": apart}
        self.must(any("do not fit" in (line or "") for line in warned), "nothing was halved in 3 GiB")
        self.must(apart < 1e-3, f"a halved build differs by {apart:.1e}")

    def search(self) -> None:
        """The 10 nearest of a million vectors for 64 queries, exact in torch, by FAISS there, by FAISS on the CPU."""
        import faiss

        n = N_VECTORS if self.is_cuda else 20_000
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(n, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        queries = vectors[rng.permutation(n)[:64]] + 0.05 * rng.normal(size=(64, WIDTH)).astype(np.float32)
        there, asked = (torch.from_numpy(x).to(self.device) for x in (vectors, queries))

        def exact() -> np.ndarray:
            return (asked @ there.T).topk(TOP, dim=1).indices.cpu().numpy()

        exact()
        truth, seconds = self.timed(exact)
        self.found["torch, exact"] = {"milliseconds": round(1000 * seconds, 2), "recall": 1.0}
        indexes: dict[str, Callable[[], Any]] = {"FAISS, Flat, CPU": lambda: faiss.IndexFlatIP(WIDTH)}
        if self.is_cuda and getattr(faiss, "get_num_gpus", lambda: 0)():
            resources = faiss.StandardGpuResources()
            indexes |= {
                "FAISS, Flat, GPU": lambda: faiss.GpuIndexFlatIP(resources, WIDTH),
                "FAISS, IVF1024, GPU": lambda: faiss.GpuIndexIVFFlat(
                    resources, WIDTH, 1024, faiss.METRIC_INNER_PRODUCT
                ),
            }
            if hasattr(faiss, "GpuIndexCagra"):
                indexes["FAISS, CAGRA, GPU"] = lambda: faiss.GpuIndexCagra(resources, WIDTH, faiss.METRIC_INNER_PRODUCT)
        for name, make in indexes.items():
            try:
                index = make()
                if not index.is_trained or "CAGRA" in name:
                    index.train(vectors)
                if "CAGRA" not in name:
                    index.add(vectors)
                if "IVF" in name:
                    index.nprobe = 32
                index.search(queries, TOP)
                (_, positions), seconds = self.timed(lambda index=index: index.search(queries, TOP))
            except Exception as error:  # a build of FAISS without this kind
                self.found[name] = str(error).splitlines()[0]
                continue
            shares = [len(np.intersect1d(a, b)) / TOP for a, b in zip(truth, positions, strict=True)]
            self.found[name] = {"milliseconds": round(1000 * seconds, 2), "recall": round(float(np.mean(shares)), 4)}


def _recall(found: Any, full: Any) -> float:
    """Share of the exact top rows, of both ends, that were found."""
    names = ("query", "method", "side", "row")
    wanted, given = (set(zip(*(table[name].to_pylist() for name in names), strict=True)) for table in (full, found))
    return len(wanted & given) / len(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("train", "index", "retrieve", "memory", "search"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", default=str(DATA / "sst2_glue" / "train.parquet"))
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--work", default="runs/gpu_check")
    check = Check(parser.parse_args())
    for part in parser.parse_args().parts:
        check.found, check.wrong = {}, []
        started = time.perf_counter()
        getattr(check, part)()
        check.found["seconds in all"] = round(time.perf_counter() - started, 1)
        write_result(f"gpu_{part}", found=check.found, wrong=check.wrong)
        if check.wrong:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
