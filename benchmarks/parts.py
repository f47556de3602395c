"""An index built in four parts, in separate folders, by processes of their own, beside a plain build: are they equal?

    python benchmarks/parts.py RUN 2000 head 250
    python benchmarks/parts.py RUN 300 head,all 50

RUN is a run of ``forebear train`` on SST-2; then come rows, scopes and rows a shard. Then one part is written again as
a machine with an older processor writes it (AVX2 alone), and its answers are compared: what "last digits" means.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import DATA, FOREBEAR, run, write_result

from forebear import Index, Retriever

N_PARTS = 4
N_QUERIES = 16
OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def largest_error(one: Index, other: Index, scope: str) -> dict[str, float]:
    """Over queries, the largest difference of a score as a share of the largest score; and the share of equal top 10s.

    Both rank by stored numbers alone, without scores of the model.
    """
    texts = pq.read_table(DATA / "sst2" / "dev.parquet").column("text").to_pylist()[:N_QUERIES]
    methods = ["gc", "gd", "if", "rif"]
    choices = {"methods": methods, "top": 10, "scope": scope} | ({} if scope == "head" else {"exact": "none"})
    tables = [Retriever(index).retrieve(texts, **choices).to_pandas() for index in (one, other)]
    keys = ["query", "method", "side", "rank"]
    both = tables[0].merge(tables[1], on=keys, suffixes=("", "_other"))
    largest = both.groupby(["query", "method"])["score"].transform(lambda s: np.abs(s).max())
    same = both["row"] == both["row_other"]
    error = (np.abs(both["score"] - both["score_other"]) / largest)[same].max()
    return {"error": float(error), "same_rows": float(same.mean())}


def main(model: str, n_rows: int, scopes: str, shard_rows: int) -> None:
    work = Path(tempfile.mkdtemp(prefix="parts-"))
    rows = work / "train.parquet"
    pq.write_table(pq.read_table(DATA / "sst2" / "train.parquet").slice(0, n_rows), rows)
    choices = ("--model", model, "--train", rows, "--scope", scopes, "--shard-rows", shard_rows, "--quiet")
    choices = tuple(map(str, choices))
    seconds = {"plain build": run("index", *choices, "--out", work / "plain")}
    seconds["fit"] = run("index", *choices, "--out", work / "fit", "--fit")

    def part(number: int, folder: Path, environment: dict[str, str] | None = None) -> None:
        shutil.copytree(work / "fit", folder)
        command = [FOREBEAR, "index", "--out", folder, "--train", rows, "--shard", f"{number}/{N_PARTS}", "--quiet"]
        subprocess.run(list(map(str, command)), check=True, env=os.environ | (environment or {}))

    def commit(out: str, others: list[Path]) -> Index:
        shutil.copytree(work / "fit", work / out)
        name = "commit" if out == "index" else "commit, one part of an older processor"
        seconds[name] = run("index", "--out", work / out, "--commit", "--quiet", "--from", *others)
        return Index.open(work / out)

    folders = [work / f"part-{i}" for i in range(1, N_PARTS + 1)]
    for number, folder in enumerate(folders, 1):
        part(number, folder)
    index, plain = commit("index", folders), Index.open(work / "plain")
    same = {path.relative_to(work / "plain") for path in (work / "plain").rglob("*") if path.is_file()}
    equal = all((work / "plain" / p).read_bytes() == (work / "index" / p).read_bytes() for p in same)
    part(3, work / "older", OLDER)
    other = commit("mixed", [folders[0], folders[1], work / "older", folders[3]])
    write_result(
        f"parts_{scopes.replace(',', '_')}_{n_rows}",
        n_rows=n_rows, n_shards=len(plain.manifest.shards), scopes=scopes, digest_plain=plain.manifest.digest(),
        digest_parts=index.manifest.digest(), n_files=len(same), all_files_equal=equal, step_seconds=seconds,
        recorded_of_older=[{k: v for k, v in p.items() if k != "libraries"} for p in other.manifest.parts],
        older={scope: largest_error(plain, other, scope) for scope in scopes.split(",")},
    )  # fmt: skip
    shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
