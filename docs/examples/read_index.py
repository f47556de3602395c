"""Read a forebear index with pyarrow and numpy alone; ``python read_index.py INDEX`` ranks the rows behind row 0."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa


def read_manifest(folder: Path) -> dict:
    """The manifest, once its own digest fits what it says."""
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    digest = content.pop("digest")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if content["format"] not in (1, 2) or hashlib.sha256(canonical.encode()).hexdigest() != digest:
        raise SystemExit(f"{folder}: another format, or the manifest was altered")
    return content


def read_shards(folder: Path, manifest: dict, kind: str) -> pa.Table | None:
    """All shards in one folder of the index, in row order; None where there are none."""
    tables = []
    for name in sorted(name for name in manifest["files"] if str(Path(name).parent) == kind):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != manifest["files"][name]["sha256"]:
            raise SystemExit(f"{folder / name} was altered")
        tables.append(pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all())
    return pa.concat_tables(tables) if tables else None


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists, ``(n, d)`` float64."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).astype(np.float64)


def head_scores(feature: np.ndarray, residual: np.ndarray, row: int) -> dict[str, np.ndarray]:
    """Scores of all rows with one of them as the query and its gold label as the target."""
    cosines = feature @ feature[row] / np.linalg.norm(feature, axis=1) / np.linalg.norm(feature[row])
    return {"nn-cos": cosines, "gd": (residual @ residual[row]) * (feature @ feature[row])}


if __name__ == "__main__":
    index = Path(sys.argv[1])
    about = read_manifest(index)
    rows, head = (read_shards(index, about, kind) for kind in ("rows", f"features/{about['checkpoints'][-1]['name']}"))
    retired = read_shards(index, about, "retired")
    scores = head_scores(matrix(head["feature"]), matrix(head["residual"]), row=0)["gd"]
    live = np.setdiff1d(np.arange(len(scores)), [] if retired is None else retired["row"])
    for n in live[np.argsort(-scores[live], kind="stable")][:3].tolist():
        label = about["spec"]["label_names"][rows["label"][n].as_py()]
        print(f"row {rows['row'][n]}, score {scores[n]:.4g}, {label}: {rows['text_0'][n]}")
