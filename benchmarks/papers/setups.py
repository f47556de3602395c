"""What the papers' tables are rerun on: MiniLM, fine-tuned on the papers' data, and its indexes; made where missing.

They lie in ``runs/bench``. Han20 and Pez21 have SST-2 and binary MNLI of 10,000 rows, Yeh22 and Joint have AG News.
Where a name ends in ``_frozen``, pooler and head were trained alone, as in the configuration that Pez21 released.
Where it ends in ``_1k``, the model was trained on 1,000 rows drawn from all: there, layers can be retrained many times.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, ROOT, run, write_result
from tables import Table

from forebear import Retriever
from forebear.evaluation.common.queries import QueryRows, sample_queries
from forebear.evaluation.retraining.jobs import Retrainer
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.rows.opening import open_rows

RUNS = ROOT / "runs" / "bench"
DEV = {"sst2": "dev", "mnli10k": "dev", "agnews": "test"}
TRAINING = {"sst2": (), "mnli10k": ("--labels", "binary-nli"), "agnews": ("--epochs", "1")}
FROZEN = ("--freeze-below", "6", "--learning-rate", "2e-3")  # MiniLM has six layers
SAMPLED = ("--epochs", "3")
PAPER_DAMPING = "30"  # of Han20: LiSSA's damping 3e-3 times its scale 1e4
INDEXES = {
    "head": ("--store", "features,sbert", "--damping", f"0.1x,{PAPER_DAMPING}"),
    "epochs": ("--checkpoints", "all"),
    "words": ("--store", "features,words", "--words-top", "0,10"),
}


def source_of(name: str) -> str:
    """The folder of a model's data."""
    return re.sub(r"(_frozen|_\d+k)$", "", name)


def dev_rows(name: str) -> str:
    """The file of a model's development rows, below the folder of data sets."""
    source = source_of(name)
    return f"{source}/{DEV[source]}.parquet"


def write_rows(rows: pa.Table, source: str, path: Path) -> None:
    """Write some of a data set's training rows, with its description beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "dataset.json").write_bytes((DATA / source / "dataset.json").read_bytes())
    pq.write_table(rows, path)


def training_rows(name: str) -> Path:
    """The file of a model's training rows; a sample is written where it is missing."""
    whole = DATA / source_of(name) / "train.parquet"
    size = re.search(r"_(\d+)k$", name)
    if size is None:
        return whole
    path = RUNS / f"{name}-rows" / "train.parquet"
    if not path.is_file():
        rows = pq.read_table(whole)
        chosen = np.random.default_rng(0).permutation(len(rows))[: 1000 * int(size[1])]
        write_rows(rows.take(chosen), source_of(name), path)
    return path


def trained(name: str) -> Path:
    """The run folder of a data set's model."""
    folder = RUNS / name
    if not (folder / "run.json").is_file():
        source = source_of(name)
        how = FROZEN if name.endswith("_frozen") else SAMPLED if name != source else ()
        run("train", "--model", "minilm", "--data", training_rows(name), "--precision", "fp32",
            "--dev", DATA / dev_rows(name), *TRAINING[source], *how, "--out", folder)  # fmt: skip
    return folder


def asked(name: str, kind: str = "head") -> Retriever:
    """The retriever over a data set's index: ``head``, ``epochs`` (all checkpoints) or ``words``."""
    out = RUNS / f"{name}-papers-{kind}"
    if not (out / "manifest.json").is_file():
        run("index", "--model", trained(name), "--train", training_rows(name), *INDEXES[kind], "--out", out, "--resume")
    return Retriever(out)


def test_rows(retriever: Retriever, path: str, n: int) -> QueryRows:
    """A sample of test rows with their labels; all of them for 0.

    Args:
        retriever: Whose classes the labels are.
        path: Below the folder of data sets.
        n: How many.
    """
    return sample_queries(retriever, open_rows(DATA / path, need_labels=True), n, 0, need_labels=True)


def retrainer(retriever: Retriever, recipe: str, texts: Sequence[Sequence[str]]) -> Retrainer:
    """Retrains the index's model; outcomes are kept beside the index, so that an interrupted run goes on."""
    return open_retrainer(retriever, recipe, texts, f"{retriever.index.folder}-retraining")


def parsed(about: str | None, sizes: Mapping[str, Any], small: Mapping[str, Any]) -> argparse.Namespace:
    """Options of a script, one a size: numbers, names, and lists of them parted by commas.

    Args:
        about: The script's docstring.
        sizes: Default values.
        small: Those that ``--small`` sets instead.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="about five minutes on two free cores, once the indexes are built"
    )
    for name, value in sizes.items():
        default = ",".join(map(str, value)) if isinstance(value, tuple) else value
        kind = str if isinstance(value, tuple) else type(value)
        shown = f"default {default}" + (f", small {small[name]}" if name in small else "")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=shown)
    given = vars(parser.parse_args())
    chosen = {**sizes, **(small if given.pop("small") else {})}
    for name, value in given.items():
        if value is not None:
            of = type(sizes[name][0]) if isinstance(sizes[name], tuple) else str
            chosen[name] = tuple(map(of, value.split(","))) if isinstance(sizes[name], tuple) else value
    return argparse.Namespace(**chosen)


def store(case: str, retriever: Retriever, table: Table, **facts: Any) -> None:
    """Keep a table, with what it takes to repeat it, in ``benchmarks/results/papers_CASE.json``; print it."""
    command = shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    index = retriever.index
    write_result(
        f"papers_{case}",
        command=command, index=index.manifest.digest(), training_rows=len(index.live), **facts, table=table,
    )  # fmt: skip
