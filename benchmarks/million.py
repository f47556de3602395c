"""100,000 test rows asked of a million training rows by ``forebear retrieve``, killed and gone on with.

    python benchmarks/million.py [BASE] [--folder runs/bench/million] [--rows N] [--queries N] [--method nn-cos]

BASE is an index of one checkpoint (default: one is built of the run of ``gradients.py --data sst2_glue``); its head
is taken. Its features are tiled (``tiled_rows.py``); probabilities, residuals and losses are those that the
model's head gives to the moved features, and a copy has the texts and the label of its row, whose number stands in the
column ``source_row``. The package's own writers and search structures make an index of them, so ``forebear verify
--rows 0`` accepts it; recomputed from the texts, copies differ, as they should.

Test rows are distinct texts of AG News, MNLI and SST-2. Memory is sampled twice a second: all of the process, and what
of it is not mapped from files, which the system takes back when it needs the place.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import pstats
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from common import DATA, FOREBEAR, ROOT, run, write_json, write_result
from tiled_rows import tiled

from forebear.cli.main import app
from forebear.indexer.building.finish import finish
from forebear.indexer.building.sharing.beginning import checkpoints_now, load_checked, split_rows
from forebear.indexer.gradients.earlier_rows import DIGEST, combined
from forebear.indexer.index import Index
from forebear.indexer.model.forward import forward_of_features, run_forward
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.storage.arrow import column, read_batches, write_columns
from forebear.indexer.storage.manifest import Segment, digest_of
from forebear.indexer.training.model_choice import path_from
from forebear.retriever.answers.parts import remove_parts
from forebear.retriever.retriever import Retriever

SOURCES = ("agnews/test", "agnews/train", "mnli/dev", "mnli/train", "sst2/dev", "sst2/test")
TEXTS = ("text", "premise", "hypothesis")
TOP = 10
PREFIX = 2048  # test rows that are asked again without interruption: whole blocks of 512
CHECKED = 8  # answers that are computed again by numpy
STEPS = {  # functions whose seconds are told apart, with what each calls
    "word pieces": ("encoding.py", "encode"), "encoder": ("forward.py", "forward_batch"),
    "scan": ("scan.py", "contenders"), "exact scores": ("search.py", "_rank_listed"),
    "tables": ("results.py", "_table"), "kept parts": ("parts.py", "write"), "file": ("result_file.py", "write"),
    "loading the model": ("loading.py", "load_classifier"),
    "hashing of the index": ("files.py", "checked"), "all": ("retrieve.py", "retrieve"),
}  # fmt: skip


def base_index(folder: Path) -> Path:
    """The index of the 67,349 phrases of SST-2, at the head; what is there already is not made again."""
    index, trained, data = folder / "base", ROOT / "runs" / "bench" / "sst2_glue", DATA / "sst2_glue"
    train = data / "train.parquet"
    if not trained.is_dir():
        how = ("--model", "minilm", "--dev", data / "dev.parquet", "--epochs", "1")
        run("train", "--data", train, *how, "--out", trained)
    if not index.is_dir():
        run("index", "--model", trained, "--train", train, "--out", index, "-q")
    return index


def make_index(base: Index, folder: Path, n_rows: int) -> None:
    """An index of the rows of ``base`` with distinct features, and of moved copies of them, ``n_rows`` in all."""
    old, live = base.manifest, base.live
    (checkpoint,) = checkpoints_now(base, None)
    classifier = load_checked(checkpoint, old.spec, "cpu")
    features = base.features().take(live)
    first = np.sort(np.unique(features, axis=0, return_index=True)[1])
    moved = tiled(features[first], n_rows)
    shards = split_rows(0, n_rows, old.spec.shard_rows)
    names = [f"{number:05d}.arrow" for number in range(len(shards))]
    stored = [read_batches(path)[0] for path in sorted((base.folder / "rows").iterdir())]
    digests = np.concatenate([column(batch, DIGEST) for batch in stored])
    for name, (start, stop) in zip(names, shards, strict=True):
        numbers = np.arange(start, stop)
        rows, copy = live[first[numbers % len(first)]], numbers // len(first)
        targets, forward = base.targets(rows), forward_of_features(classifier, moved[start:stop])
        residuals, losses = forward.residuals_and_losses(targets)
        texts = [text.dictionary_decode().cast(pa.string()) for text in base.texts(rows).values()]
        columns: dict[str, pa.Array | np.ndarray] = {"row": numbers}
        columns |= {f"text_{i}": text for i, text in enumerate(texts)}
        columns |= {"label": targets.astype(np.int32), "prediction": forward.predictions.astype(np.int32)}
        columns |= {"probabilities": forward.probabilities.astype(np.float32), "loss": losses.astype(np.float32)}
        own = combined(digests[rows], copy)  # equal digests would say equal features
        columns[DIGEST] = np.where(copy[:, None] > 0, own, digests[rows])
        write_columns(folder / "rows" / name, columns)
        write_columns(folder / "columns" / name, {"source_row": rows})
        factors = {"feature": moved[start:stop], "residual": residuals.astype(np.float32)}
        write_columns(folder / "features" / checkpoint.name / name, factors)
    source = f"{old.segments[0].source}, tiled to {n_rows:,} rows"
    segment = Segment(source=source, rows_sha256=digest_of([old.digest(), n_rows]), start=0, n_rows=n_rows)
    manifest = replace(
        old, spec=replace(old.spec, scopes=("head",), stores=("features",)), calibration={}, calibration_queries=None,
        self_check={}, checkpoints=(replace(checkpoint, path=path_from(folder, checkpoint.path)),), segments=(segment,),
        shards=shards, n_retired=0, generation=0, columns={"source_row": "int64"}, files={},
    )  # fmt: skip
    finish(folder, manifest, np.empty(0, np.int64), lambda *_: None)


def make_queries(path: Path, n_rows: int) -> None:
    """A file of distinct texts, in an order of chance."""
    texts: dict[str, None] = {}
    for source in SOURCES:
        table = pq.read_table(DATA / f"{source}.parquet")
        for name in TEXTS:
            texts |= dict.fromkeys(table.column(name).to_pylist() if name in table.column_names else ())
    listed = np.array([text for text in texts if text and text.strip()], object)
    if len(listed) < n_rows:
        raise SystemExit(f"{len(listed):,} distinct texts in {DATA}; {n_rows:,} were asked for")
    chosen = np.random.default_rng(0).permutation(listed)[:n_rows].tolist()
    pyarrow.csv.write_csv(pa.table({"text": chosen}), path)


def first_rows(queries: Path, n_rows: int) -> Path:
    """A file of the first test rows of another."""
    path = queries.with_name(f"first-{n_rows}.csv")
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    pyarrow.csv.write_csv(pyarrow.csv.read_csv(queries, parse_options=options).slice(0, n_rows), path)
    return path


def ask(index: Path, queries: Path, method: str, out: Path) -> list[str]:
    """The arguments of the command."""
    words = ["retrieve", "--index", index, "--test", queries, "--method", method, "--top", TOP, "--out", out, "-q"]
    return list(map(str, words))


def memory_bytes(process: int) -> tuple[int, int]:
    """What a process holds in memory, and what of that is not mapped from files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return 1024 * int(sizes.get("VmRSS", 0)), 1024 * int(sizes.get("RssAnon", 0))


def rows_done(out: Path) -> int:
    """Test rows whose answers are kept."""
    parts = [path.stem.split("-") for path in out.with_name(out.name + ".parts").glob("*.arrow")]
    return sum(int(last) - int(start) + 1 for start, last in parts)


def sampled(command: list[str], out: Path, *, stop_at: float, wait: float = 0) -> Iterator[dict[str, float]]:
    """Memory and test rows done while a command runs, twice a second.

    It is killed when ``stop_at`` test rows are done and ``wait`` more seconds have passed.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen([FOREBEAR, *command])
    while process.poll() is None:
        resident, own = memory_bytes(process.pid)
        done = rows_done(out)
        yield {"seconds": time.perf_counter() - started, "done": done, "resident": resident, "own": own}
        if done >= stop_at:
            time.sleep(wait)
            process.kill()
            process.wait()
            return
        time.sleep(0.5)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def killed_and_resumed(command: list[str], out: Path, n_rows: int, n_kills: int) -> dict[str, Any]:
    """Run the command to the end, killed by SIGKILL at moments of chance and gone on with; its memory by progress."""
    rng, before_all = np.random.default_rng(), resource.getrusage(resource.RUSAGE_CHILDREN)
    moments = [*np.sort(rng.uniform(0.05, 0.95, n_kills)) * n_rows, np.inf]
    samples: list[dict[str, float]] = []
    killed: list[int] = []
    for number, moment in enumerate(moments):
        if out.exists():  # it ended before it was killed
            break
        before = samples[-1]["seconds"] if samples else 0.0
        resume = ["--resume"] if number else []
        of_run = sampled([*command, *resume], out, stop_at=moment, wait=rng.uniform(0, 5))
        samples += [sample | {"seconds": before + sample["seconds"]} for sample in of_run]
        if not out.exists():
            killed.append(rows_done(out))
    write_json(out.with_suffix(".json"), {"samples": samples})
    done = np.array([sample["done"] for sample in samples])
    done = np.maximum.accumulate(done)  # parts go away when the file is complete
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before_all.ru_utime - before_all.ru_stime
    found: dict[str, Any] = {"seconds": samples[-1]["seconds"], "processor_seconds": processor}
    found["killed_at_rows"] = killed
    for kind in ("resident", "own"):
        sizes = np.array([sample[kind] for sample in samples])
        by_share = {f"{share:.0%}": int(sizes[done <= share * n_rows].max()) for share in (0.1, 0.5, 1)}
        found[f"largest_{kind}_bytes_until"] = by_share
    found["rows_done_by_minute"] = [
        int(done[np.searchsorted([s["seconds"] for s in samples], 60 * minute)])
        for minute in range(int(samples[-1]["seconds"] // 60) + 1)
    ]
    return found


def answers_sha256(path: Path, n_rows: int) -> str:
    """Digest of the answers to the first test rows, column by column."""
    table = pq.read_table(path, filters=[("query", "<", n_rows)]).replace_schema_metadata(None)
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=4096):
        digest.update(json.dumps(batch.to_pylist(), default=str).encode())
    return digest.hexdigest()


def against_numpy(index: Index, queries: Path, method: str, out: Path) -> dict[str, float]:
    """The first answers beside float64 products of all features: share of equal rows, largest error of a score."""
    retriever = Retriever(index)
    block = next(open_rows(queries).blocks(512))
    forward = run_forward(retriever.classifier(), block.texts)  # as asked: last bits depend on the rows of a batch
    features, residuals = index.features(), index.residuals()
    asked = forward.features.astype(np.float64)
    asked_residuals = forward.probabilities - np.eye(forward.probabilities.shape[1])[forward.predictions]
    answers = pq.read_table(out, filters=[("query", "<", CHECKED)]).to_pandas()
    same, errors = [], []
    for query in range(CHECKED):
        parts = []
        for (_, f), (_, r) in zip(features.blocks(), residuals.blocks(), strict=True):
            wide, slopes = f.astype(np.float64), r.astype(np.float64)
            products, lengths = wide @ asked[query], np.linalg.norm(wide, axis=1) * np.linalg.norm(asked[query])
            if method != "nn-cos":
                products *= slopes @ asked_residuals[query]
                lengths *= np.linalg.norm(slopes, axis=1) * np.linalg.norm(asked_residuals[query])
            parts.append(products if method == "gd" else products / lengths)
        scores = np.concatenate(parts)
        for side, sign in (("proponent", 1), ("opponent", -1)):
            right = np.argsort(-sign * scores, kind="stable")[:TOP]
            of_query = answers[(answers["query"] == query) & (answers["side"] == side)].sort_values("rank")
            same.append(np.mean(of_query["row"].to_numpy() == right))
            errors.append(np.abs(of_query["score"].to_numpy() - scores[right]).max() / np.abs(scores[right]).max())
    return {"same_row_and_rank": float(np.mean(same)), "largest_score_error": float(np.max(errors))}


def seconds_by_step(command: list[str]) -> dict[str, float]:
    """Processor seconds of a command by step, in this process; the profiler's own are among them."""
    profile = cProfile.Profile(time.process_time)
    with suppress(SystemExit):
        profile.runcall(app, command, standalone_mode=False)
    found = dict.fromkeys(STEPS, 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for step, place in STEPS.items():
            if (Path(file).name, function) == place:
                found[step] += cumulative
    return found


def bytes_a_row(index: Index) -> dict[str, float]:
    """Bytes of the index for each row, by folder; and of its texts alone, which are among those of ``rows``."""
    found: dict[str, int] = {"texts": int(index.row_texts.sizes.sum())}
    for name, facts in index.manifest.files.items():
        part = name.split("/")[0]
        found[part] = found.get(part, 0) + facts["bytes"]
    return {part: size / index.manifest.n_rows for part, size in found.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "million")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--method", default="nn-cos", choices=("nn-cos", "gd", "gc"))
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    folder, queries = given.folder / f"index-{given.rows}", given.folder / f"queries-{given.queries}.csv"
    if not folder.is_dir():
        make_index(Index.open(given.base or base_index(given.folder)), folder, given.rows)
    if not queries.is_file():
        make_queries(queries, given.queries)
    some, out, again = first_rows(queries, PREFIX), *(given.folder / f"{name}.parquet" for name in ("all", "first"))
    out.unlink(missing_ok=True)
    remove_parts(out)
    found = killed_and_resumed(ask(folder, queries, given.method, out), out, given.queries, given.kills)
    steps = seconds_by_step([*ask(folder, some, given.method, again), "--force"])
    index = Index.open(folder)
    write_result(
        f"million_{given.method}", rows=given.rows, queries=given.queries, method=given.method, top=TOP,
        features_width=index.features().width, processor_seconds_by_step_of_first=steps, first=PREFIX, **found,
        answers=pq.ParquetFile(out).metadata.num_rows, file_bytes=out.stat().st_size,
        first_as_without_interruption=answers_sha256(out, PREFIX) == answers_sha256(again, PREFIX),
        against_numpy=against_numpy(index, queries, given.method, out), bytes_a_row=bytes_a_row(index),
    )  # fmt: skip


if __name__ == "__main__":
    main()
