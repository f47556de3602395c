"""Files of a cache of retrainings: logits of one retrained model each, and lists of the rows that they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from forebear.errors import CorruptIndexError
from forebear.indexer.storage.arrow import column, read_batches, record_batch, write_table
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.manifest import digest_of


def write_logits(path: Path, job: str, logits: np.ndarray) -> None:
    """Keep the logits ``(q, c)`` of the job of a digest.

    Raises:
        StorageError: The file cannot be written.
    """
    batch = record_batch({"logits": logits})
    schema = batch.schema.with_metadata({"job": job, "sha256": _sha256(logits).decode()})
    write_table(path, [batch.replace_schema_metadata(schema.metadata)], schema)


def read_logits(path: Path, job: str, shape: tuple[int, int], kind: type) -> np.ndarray | None:
    """The kept logits of a job, ``(q, c)``; None where the file is damaged, or of another job or shape."""
    try:
        batch = read_batches(path)[0]
        logits = column(batch, "logits").copy()
        facts = batch.schema.metadata or {}
        stated = (facts.get(b"job"), facts.get(b"sha256"))
        whole = logits.shape == shape and logits.dtype == np.dtype(kind) and stated == (job.encode(), _sha256(logits))
    except (CorruptIndexError, KeyError, IndexError, AttributeError, ValueError):
        return None
    return logits if whole else None


def _sha256(logits: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest().encode()


class EvaluationSets:
    """The sets of evaluation rows of one recipe over the same training rows: a file a set, in one folder of the cache.

    A file bears the digest that the set's outcomes are named by, and lists the sha256 of each row's texts.
    """

    def __init__(self, folder: Path, digest: str, evaluation: Sequence[Sequence[str]]) -> None:
        """Name a set; nothing is read or written yet.

        Args:
            folder: Of the sets; made by :meth:`keep`.
            digest: What the outcomes of this set are named by.
            evaluation: Texts of its rows, one list a text column.
        """
        self._folder, self._digest = folder, digest
        self._rows = [digest_of(list(texts)) for texts in zip(*evaluation, strict=True)]

    def keep(self) -> None:
        """Let later evaluations of fewer rows find this set.

        Raises:
            StorageError: The cache cannot be written.
        """
        path = self._folder / f"{self._digest}.json"
        if not path.exists():
            write_bytes(path, json.dumps(self._rows, allow_nan=False).encode())

    @cached_property
    def larger(self) -> list[tuple[str, np.ndarray, int]]:
        """Other sets that hold all rows of this one: digest, places of these rows in it ``(q,)``, and its size."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))
                places = {row: place for place, row in enumerate(rows)}
            except (OSError, ValueError, TypeError):
                continue  # a damaged list serves nobody: what it lists is trained again
            if path.stem != self._digest and all(row in places for row in self._rows):
                found.append((path.stem, np.array([places[row] for row in self._rows], np.int64), len(rows)))
        return found
