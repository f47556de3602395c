"""Search structures made from the Arrow files: scan tables sorted by falling norm, and FAISS indexes on request.

They live in ``ann/``, can be made again from ``features/`` and ``sentence/`` at any time, and hold the live rows
only. A scan table keeps one representation in the order in which a dot-product search visits the rows, so that a search
that stops early (Cauchy-Schwarz) also reads little. Vectors stand in it rounded to 8 bits, with what the rounding lost:
see :class:`RoundedVectors`. The exact ones are read from the Arrow files, for the few rows that the scan leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.indexer.storage.ann import Vectors, build_ann, write_ann
from forebear.indexer.storage.arrow import RowMatrix, column, read_batches, record_batch, write_table
from forebear.ratio import ratio

SCAN_BLOCK_ROWS = 8192
_GATHERED_BYTES = 1 << 27  # of rows that are read at once, in the order of the table
_DIRECTIONS = 8  # kept in float32; features of a fine-tuned model vary most along a few
_WIDTH_A_DIRECTION = 32  # at least so many numbers a row for each of them
_SAMPLE_ROWS = 16_384  # that the directions are fitted to
_LARGEST_CODE = 127
_COLUMNS = ("code", "scale", "coordinate", "code_length", "error")


@dataclass(frozen=True)
class RoundedVectors:
    """Vectors ``f = coordinates @ basis + scales * codes + d``, of which only the length of ``d`` is known.

    The rounded part and ``d`` together are orthogonal to the basis, so a product with q is one of coordinates, one of
    the codes with what of q is beside the basis, and one of that with ``d``, which Cauchy-Schwarz bounds. A few numbers
    a row along the directions in which rows differ most take most of the length out of both sides of that bound.

    Attributes:
        codes: ``(n, h)`` int8.
        scales: ``(n,)`` float32.
        coordinates: ``(n, m)`` float32.
        lengths: ||scales * codes||, rounded up, ``(n,)`` float32.
        errors: ||d||, rounded up, ``(n,)`` float32.
        basis: ``(m, h)`` float32, rows of length 1 that are orthogonal to float32's precision; the same in all blocks.
    """

    codes: np.ndarray
    scales: np.ndarray
    coordinates: np.ndarray
    lengths: np.ndarray
    errors: np.ndarray
    basis: np.ndarray


def round_vectors(vectors: np.ndarray, basis: np.ndarray) -> RoundedVectors:
    """Round vectors ``(n, h)``; what is lost is measured in float64 against what is stored."""
    wide, directions = vectors.astype(np.float64), basis.astype(np.float64)
    coordinates = (wide @ directions.T).astype(np.float32)
    wide -= coordinates @ directions
    codes, scales = codes_of(wide)
    rounded = codes * scales.astype(np.float64)[:, None]
    return RoundedVectors(codes, scales, coordinates, _lengths_above(rounded), _lengths_above(wide - rounded), basis)


def codes_of(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors ``(n, h)`` as int8 times a float32 number each, ``(n,)``."""
    scales = (np.abs(vectors).max(axis=1, initial=0.0) / _LARGEST_CODE).astype(np.float32)
    steps = np.where(scales > 0, scales, 1).astype(np.float64)[:, None]
    return np.clip(np.rint(vectors / steps), -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8), scales


def _lengths_above(values: np.ndarray) -> np.ndarray:
    """Norm of each row, the next float32 above it."""
    return np.nextafter(norms_of(values).astype(np.float32), np.float32(np.inf))


def main_directions(matrix: RowMatrix, live: np.ndarray) -> np.ndarray:
    """Orthonormal directions of the longest projections of a sample of rows, ``(m, h)`` float32; the same each time.

    By subspace iteration, which need not converge: any orthonormal directions give true bounds.
    """
    n_directions = max(1, min(_DIRECTIONS, matrix.width // _WIDTH_A_DIRECTION))
    rng = np.random.default_rng(0)
    sample = matrix.take(np.sort(rng.permutation(live)[:_SAMPLE_ROWS])).astype(np.float64)
    directions = rng.normal(size=(matrix.width, min(n_directions, matrix.width)))
    for _ in range(4):
        directions = np.linalg.qr(sample.T @ (sample @ np.linalg.qr(directions)[0]))[0]
    return np.ascontiguousarray(directions.T, np.float32)


@dataclass(frozen=True)
class ScanBlock:
    """Consecutive rows of a scan table.

    Attributes:
        rows: Row numbers, ``(n,)``.
        features: One array of ``n`` vectors a checkpoint.
        residuals: One ``(n, c)`` float32 array a checkpoint; empty for representations without residuals.
        feature_norms: ||f||, one ``(n,)`` float32 array a checkpoint.
        residual_norms: ||p - y||, one ``(n,)`` float32 array a checkpoint.
    """

    rows: np.ndarray
    features: tuple[RoundedVectors, ...]
    residuals: tuple[np.ndarray, ...]
    feature_norms: tuple[np.ndarray, ...]
    residual_norms: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class ScanTable:
    """Rows of a representation by falling norm, in memory-mapped blocks.

    Attributes:
        blocks: The rows.
        kept: What searches compute from the rows alone, by what it is for.
    """

    blocks: tuple[ScanBlock, ...]
    kept: dict[Any, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """Row number at each position, ``(n,)``."""
        return np.concatenate([b.rows for b in self.blocks])

    @cached_property
    def without_residuals(self) -> ScanTable:
        """The same rows as vectors alone, in the same order."""
        return ScanTable(tuple(replace(b, residuals=(), residual_norms=()) for b in self.blocks))

    @property
    def bases(self) -> tuple[np.ndarray, ...]:
        """The basis of each checkpoint's vectors."""
        return tuple(vectors.basis for vectors in self.blocks[0].features)


def write_scan_table(path: Path, order: np.ndarray, features: list[RowMatrix], residuals: list[RowMatrix]) -> None:
    """Write the rows ``order`` of one or more checkpoints' factors, block by block, in bounded memory."""
    bases = [main_directions(matrix, np.sort(order)) for matrix in features]
    metadata = {f"basis_{i}": basis.astype("<f4").tobytes() for i, basis in enumerate(bases)}
    batches = (
        _scan_batch(*block, bases).replace_schema_metadata(metadata) for block in _gathered(order, features, residuals)
    )
    first = next(batches)
    write_table(path, itertools.chain([first], batches), first.schema)


def _gathered(
    order: np.ndarray, features: list[RowMatrix], residuals: list[RowMatrix]
) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]:
    """Blocks of rows in an order, with their features and residuals.

    By falling norm, rows of a block lie in as many shards as there are: many blocks are gathered at once, so that each
    shard is visited a few times.
    """
    row_bytes = sum(matrix.shards[0].itemsize * matrix.width for matrix in (*features, *residuals))
    n_gathered = max(1, _GATHERED_BYTES // (row_bytes * SCAN_BLOCK_ROWS)) * SCAN_BLOCK_ROWS
    for start in range(0, len(order), n_gathered):
        rows = order[start : start + n_gathered]
        vectors, factors = ([matrix.take(rows) for matrix in matrices] for matrices in (features, residuals))
        for first in range(0, len(rows), SCAN_BLOCK_ROWS):
            block = slice(first, first + SCAN_BLOCK_ROWS)
            yield rows[block], [values[block] for values in vectors], [values[block] for values in factors]


def _scan_batch(
    rows: np.ndarray, features: list[np.ndarray], residuals: list[np.ndarray], bases: list[np.ndarray]
) -> pa.RecordBatch:
    """A block of a scan table; its rows stand by what rounding took of them, so that neighbours are alike."""
    rounded = [round_vectors(vectors, basis) for vectors, basis in zip(features, bases, strict=True)]
    lengths = [norms_of(vectors) for vectors in features]
    by_loss = np.argsort(ratio(rounded[-1].errors, lengths[-1]), kind="stable")
    columns: dict[str, np.ndarray] = {"row": rows[by_loss]}
    for i, vectors in enumerate(rounded):
        columns[f"code_{i}"], columns[f"scale_{i}"] = vectors.codes[by_loss], vectors.scales[by_loss]
        columns[f"coordinate_{i}"] = vectors.coordinates[by_loss]
        columns[f"code_length_{i}"], columns[f"error_{i}"] = vectors.lengths[by_loss], vectors.errors[by_loss]
        columns[f"feature_norm_{i}"] = lengths[i][by_loss].astype(np.float32)
    for i, factors in enumerate(residuals):
        columns[f"residual_{i}"] = factors[by_loss]
        columns[f"residual_norm_{i}"] = norms_of(columns[f"residual_{i}"]).astype(np.float32)
    return record_batch(columns)


def read_scan_table(path: Path) -> ScanTable:
    """Memory-map a scan table. One of an index of format 1, which holds its vectors as they are, is rounded first."""
    batches = read_batches(path)
    metadata = batches[0].schema.metadata or {}
    n_checkpoints = sum(name.startswith("feature_norm_") for name in batches[0].schema.names)
    if "code_0" in batches[0].schema.names:
        bases = [
            np.frombuffer(metadata[f"basis_{i}".encode()], "<f4").reshape(-1, column(batches[0], f"code_{i}").shape[1])
            for i in range(n_checkpoints)
        ]
    else:
        whole = [RowMatrix([column(b, f"feature_{i}") for b in batches]) for i in range(n_checkpoints)]
        bases = [main_directions(matrix, np.arange(len(matrix))) for matrix in whole]

    def vectors(batch: pa.RecordBatch, i: int) -> RoundedVectors:
        if "code_0" not in batch.schema.names:
            return round_vectors(column(batch, f"feature_{i}"), bases[i])
        codes, scales, coordinates, lengths, errors = (column(batch, f"{name}_{i}") for name in _COLUMNS)
        return RoundedVectors(codes, scales, coordinates, lengths, errors, bases[i])

    def block(batch: pa.RecordBatch) -> ScanBlock:
        n_residuals = sum(name.startswith("residual_norm_") for name in batch.schema.names)
        return ScanBlock(
            column(batch, "row"),
            tuple(vectors(batch, i) for i in range(n_checkpoints)),
            tuple(column(batch, f"residual_{i}") for i in range(n_residuals)),
            tuple(column(batch, f"feature_norm_{i}") for i in range(n_checkpoints)),
            tuple(column(batch, f"residual_norm_{i}") for i in range(n_residuals)),
        )

    return ScanTable(tuple(map(block, batches)))


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
        factory: Of FAISS indexes beside the scan tables; None makes none.
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

    if factory is None:
        return facts
    named = {"feature": features[-1]} | ({"sentence": sentence} if sentence is not None else {})
    for name, matrix in named.items():
        for metric in ("cos", "euc"):
            ann, ann_facts = build_ann(Vectors(matrix, live, metric), metric, factory, seed)
            file = f"ann/{name}-{metric}-{generation:04d}.faiss"
            write_ann(ann, folder / file)
            facts[f"{name}-{metric}"] = {"file": file, "kind": "faiss"} | ann_facts
    return facts
