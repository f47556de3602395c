"""Search structures made from the Arrow files: FAISS indexes, and scan tables sorted by falling norm.

They live in ``ann/``, can be made again from ``features/`` and ``sentence/`` at any time, and hold the live rows
only. A scan table keeps the factors of one representation contiguous in the order in which a dot-product search
visits them, so that a search that stops early (Cauchy-Schwarz) also reads little.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.indexer.storage.ann import Vectors, build_ann, write_ann
from forebear.indexer.storage.arrow import RowMatrix, column, read_batches, record_batch, write_table

SCAN_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class ScanBlock:
    """Consecutive rows of a scan table.

    Attributes:
        rows: Row numbers, ``(n,)``.
        features: One ``(n, h)`` float32 array a checkpoint.
        residuals: One ``(n, c)`` float32 array a checkpoint; empty for representations without residuals.
        feature_norms: ||f||, one ``(n,)`` float32 array a checkpoint.
        residual_norms: ||p - y||, one ``(n,)`` float32 array a checkpoint.
    """

    rows: np.ndarray
    features: tuple[np.ndarray, ...]
    residuals: tuple[np.ndarray, ...]
    feature_norms: tuple[np.ndarray, ...]
    residual_norms: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class ScanTable:
    """Rows of a representation by falling norm, in memory-mapped blocks."""

    blocks: tuple[ScanBlock, ...]

    def __len__(self) -> int:
        return sum(len(b.rows) for b in self.blocks)

    @cached_property
    def rows(self) -> np.ndarray:
        """Row number at each position, ``(n,)``."""
        return np.concatenate([b.rows for b in self.blocks])


def write_scan_table(path: Path, order: np.ndarray, features: list[RowMatrix], residuals: list[RowMatrix]) -> None:
    """Write the rows ``order`` of one or more checkpoints' factors, block by block, in bounded memory."""

    def batch(rows: np.ndarray) -> pa.RecordBatch:
        columns: dict[str, np.ndarray] = {"row": rows}
        for name, matrices in (("feature", features), ("residual", residuals)):
            for i, matrix in enumerate(matrices):
                columns[f"{name}_{i}"] = matrix.take(rows)
                columns[f"{name}_norm_{i}"] = norms_of(columns[f"{name}_{i}"]).astype(np.float32)
        return record_batch(columns)

    starts = range(0, len(order), SCAN_BLOCK_ROWS)
    first = batch(order[:SCAN_BLOCK_ROWS])
    rest = (batch(order[start : start + SCAN_BLOCK_ROWS]) for start in starts[1:])
    write_table(path, itertools.chain([first], rest), first.schema)


def read_scan_table(path: Path) -> ScanTable:
    """Memory-map a scan table."""

    def columns(batch: pa.RecordBatch, stem: str) -> tuple[np.ndarray, ...]:
        n = sum(name.startswith(stem) and name[len(stem) :].isdigit() for name in batch.schema.names)
        return tuple(column(batch, f"{stem}{i}") for i in range(n))

    stems = ("feature_", "residual_", "feature_norm_", "residual_norm_")
    return ScanTable(
        tuple(ScanBlock(column(b, "row"), *(columns(b, stem) for stem in stems)) for b in read_batches(path))
    )


def norms_of(values: np.ndarray) -> np.ndarray:
    """Euclidean norm of each row, ``(n,)`` float64."""
    return np.asarray(np.linalg.norm(values.astype(np.float64), axis=1))


def row_norms(matrix: RowMatrix) -> np.ndarray:
    """Euclidean norm of every row, ``(n,)`` float64."""
    return np.concatenate([norms_of(block) for _, block in matrix.blocks()])


def by_falling(norms: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Live row numbers by falling norm; ties by row number."""
    return np.asarray(live[np.argsort(-norms[live], kind="stable")])


def build_derived(
    folder: Path,
    *,
    generation: int,
    live: np.ndarray,
    features: list[RowMatrix],
    residuals: list[RowMatrix],
    etas: tuple[float, ...],
    sentence: RowMatrix | None,
    factory: str | None,
    seed: int,
) -> dict[str, Any]:
    """Build every search structure of an index; returns their facts for the manifest.

    Args:
        folder: The index.
        generation: Goes into the file names, so that a crash leaves the old ones in force.
        live: Row numbers that take part, ascending.
        features: f of every checkpoint.
        residuals: p - y of every checkpoint.
        etas: TracIn's checkpoint weights.
        sentence: Un-tuned sentence embeddings, if stored.
        factory: FAISS factory string, or None to choose by size.
        seed: Random seed of FAISS' training and calibration.
    """
    facts: dict[str, Any] = {}

    def scan(name: str, norms: np.ndarray, f: list[RowMatrix], r: list[RowMatrix]) -> None:
        file = f"ann/{name}-{generation:04d}.arrow"
        write_scan_table(folder / file, by_falling(norms, live), f, r)
        facts[name] = {"file": file, "kind": "scan"}

    norms = [row_norms(f) * row_norms(r) for f, r in zip(features, residuals, strict=True)]
    scan("head", norms[-1], features[-1:], residuals[-1:])
    if len(features) > 1:
        total = np.sqrt(sum(eta * n**2 for eta, n in zip(etas, norms, strict=True)))
        scan("head-tracin", np.asarray(total), features, residuals)
    if sentence is not None:
        scan("sentence", row_norms(sentence), [sentence], [])

    named = {"feature": features[-1]} | ({"sentence": sentence} if sentence is not None else {})
    for name, matrix in named.items():
        for metric in ("cos", "euc"):
            ann, ann_facts = build_ann(Vectors(matrix, live, metric), metric, factory, seed)
            file = f"ann/{name}-{metric}-{generation:04d}.faiss"
            write_ann(ann, folder / file)
            facts[f"{name}-{metric}"] = {"file": file, "kind": "faiss"} | ann_facts
    return facts
