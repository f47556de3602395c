"""Representations that are one stored vector a row, compared as they are: features, sentence embeddings.

Another one is one more entry of :data:`VECTORS`, and rows of the method table that name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forebear.indexer.index import Index
from forebear.indexer.storage.arrow import RowMatrix
from forebear.indexer.storage.scan_table import ScanTable
from forebear.retriever.question.batch import Batch


@dataclass(frozen=True)
class StoredVector:
    """How to get the vectors of a representation.

    Attributes:
        of_rows: Gives the vectors of every training row, ``(N, w)``.
        of_queries: Gives the vectors of the test rows, ``(q, w)``.
        scan_table: Gives the rows by falling norm. None: the index has no such table, and every row is compared.
    """

    of_rows: Callable[[Index], RowMatrix]
    of_queries: Callable[[Batch], np.ndarray]
    scan_table: Callable[[Index], ScanTable] | None = None


def _sentence_embeddings(batch: Batch) -> np.ndarray:
    assert batch.sentence is not None
    return batch.sentence


VECTORS: dict[str, StoredVector] = {
    "feature": StoredVector(
        lambda index: index.features(),
        lambda batch: batch.forward.features,
        lambda index: index.scan_table("head").without_residuals,
    ),
    "sentence": StoredVector(
        lambda index: index.sentence(), _sentence_embeddings, lambda index: index.scan_table("sentence")
    ),
}
