"""The nearest training rows of training rows, by cosine of what the index stores."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from forebear.errors import InputError
from forebear.indexer.storage.ann import unit_rows
from forebear.ratio import ratio
from forebear.retriever.head.scoring import Query, Term
from forebear.retriever.head.search import RowFactors, search_scan
from forebear.retriever.head.vectors import VECTORS
from forebear.retriever.question.methods import METHODS, ann_name
from forebear.retriever.question.models import Models
from forebear.retriever.ranking import rank

_NUMBERS = 1 << 25  # entries of the vectors held at once


def nearest_rows(
    models: Models, rows: np.ndarray, k: int, *, representation: str = "feature"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other live rows of each row, nearest first; ties go to the lower row number.

    All are compared, but for an index that was built with ``--ann``: a CPU then takes candidates from FAISS, whose
    recall is the calibrated one that the manifest gives. Cosines come from the vectors in float64.

    Args:
        models: Of the index whose live rows are compared; their device searches.
        rows: Live row numbers, ``(m,)``.
        k: Number of neighbours, fewer than the live rows.
        representation: ``feature``, or ``sentence`` where the index stores sentence embeddings.

    Returns:
        Row numbers and cosines, ``(m, k)`` each.

    Raises:
        InputError: k is out of range, or an inverted file visits too few rows.
    """
    index, live = models.index, models.index.live
    if not 1 <= k < len(live):
        raise InputError(f"--neighbours {k}: expected 1 to {len(live) - 1}, the other rows.")
    matrix, table_of = VECTORS[representation].of_rows(index), VECTORS[representation].scan_table
    assert table_of is not None
    method = METHODS["sbert-cos" if representation == "sentence" else "nn-cos"]
    name = ann_name(index, method)
    ann = None if name is None or not models.memory.on_host else index.ann(name)
    width = min(len(live), (1 if ann is None or ann.exact else ann.widen) * k + 1)
    neighbours, cosines = np.empty((len(rows), k), np.int64), np.empty((len(rows), k))
    step = max(1, _NUMBERS // (width * matrix.width))
    for start in range(0, len(rows), step):
        block_rows = rows[start : start + step]
        unit = unit_rows(matrix.take(block_rows))
        if ann is None:
            query = Query(method, (Term(1.0, unit),), np.ones(len(unit)))
            factors = RowFactors((matrix,), (), live)
            (near,) = search_scan(query, table_of(index), factors, width, memory=models.memory, ends=(True,))
            candidates = near.rows
        else:
            _, positions = ann.search(unit, width)
            if (positions < 0).any():
                raise InputError(f"--neighbours {k}: FAISS visits fewer rows than that for some. Give fewer.")
            candidates = live[positions]
        similarities = np.einsum(
            "mh,mwh->mw", _wide_units(matrix.take(block_rows)), _wide_units(matrix.take(candidates))
        )
        similarities[candidates == block_rows[:, None]] = -np.inf
        neighbours[start : start + len(block_rows)], cosines[start : start + len(block_rows)] = rank(
            similarities, candidates, k, largest=True
        )
    return neighbours, cosines


def nearest_up_to(models: Models, rows: np.ndarray, k: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``most`` nearest other live rows of each row, or all others; but k of them, if k is more or FAISS has fewer.

    As :func:`nearest_rows`, by features; it refuses a k that is out of range, never what was not asked for.
    """
    width = min(most, len(models.index.live) - 1)
    if 1 <= k < width:
        with suppress(InputError):
            return nearest_rows(models, rows, width)
    return nearest_rows(models, rows, k)


def label_disagreement(labels: np.ndarray, rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Share of each row's neighbours that have another label than the row, ``(m,)``.

    Of several labels or numbers: by how much a neighbour's differ from the row's, summed over the outputs, in the mean.

    Args:
        labels: Class id of every row of the index, ``(N,)``; or labels or numbers, ``(N, c)``.
        rows: Row numbers, ``(m,)``.
        neighbours: Row numbers of their neighbours, ``(m, k)``.
    """
    if labels.ndim > 1:
        return np.asarray(np.abs(labels[neighbours] - labels[rows][:, None]).sum(axis=2).mean(axis=1))
    return np.asarray((labels[neighbours] != labels[rows][:, None]).mean(axis=1))


def _wide_units(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1 along the last axis, float64; zero stays zero."""
    wide = vectors.astype(np.float64)
    return ratio(wide, np.linalg.norm(wide, axis=-1, keepdims=True))
