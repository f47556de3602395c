"""Exact dot products divided among copies of a model, one a device; the numbers are those of one device."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np

from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.gradients.whole import batches_of, exact_dots, wanted_of_kinds
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.encoding import Encoded, Texts, as_encoded, distinct_rows
from forebear.indexer.model.scopes import Scope


def dots_on_devices(
    replicas: Sequence[Classifier],
    scope: Scope,
    vectors: Vectors,
    texts: Texts,
    labels: np.ndarray,
    *,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """:func:`~forebear.indexer.gradients.whole.exact_dots`, whose batches are divided among devices.

    Each device takes consecutive batches of those that one device would run, so every row has the same rows beside it.
    One thread a device hands out its work; torch lets others run while it computes.

    Args:
        replicas: The model, once on each device; all devices are of one kind.
        scope: See there, as the other arguments.
        vectors: On the device of the first.
        texts: Training rows.
        labels: Their classes.
        wanted: Which pairs are asked for.
    """
    if len(replicas) == 1:
        return exact_dots(replicas[0], scope, vectors, texts, labels, wanted=wanted)
    encoded = as_encoded(replicas[0], texts)
    first, kinds = distinct_rows(encoded, labels)
    some = None if wanted is None else wanted_of_kinds(wanted, kinds, len(first))

    def run(replica: Classifier, part: np.ndarray) -> np.ndarray:
        there = {name: v.to(replica.device) for name, v in vectors.items()}
        rows = first[part]
        return exact_dots(
            replica, scope, there, encoded.take(rows), labels[rows], wanted=None if some is None else some[:, part]
        )

    parts = _parts(replicas, scope, encoded.take(first))
    # What torch decides for the process is set once around all threads: set by each, it would be restored too early.
    with repeatable(replicas[0].device), ThreadPoolExecutor(len(parts)) as pool:
        running = [
            pool.submit(contextvars.copy_context().run, run, replica, part)
            for replica, part in zip(replicas, parts, strict=False)
        ]
        found = [one.result() for one in running]
    out = np.empty((len(found[0]), len(first)))
    out[:, np.concatenate(parts)] = np.concatenate(found, axis=1)
    return out[:, kinds]


def _parts(replicas: Sequence[Classifier], scope: Scope, rows: Encoded) -> list[np.ndarray]:
    """Positions of the rows for each device: whole batches in their order, about as many word pieces each."""
    batches = batches_of(replicas[0], scope, rows)
    sizes = np.cumsum([len(batch) * len(rows.rows[batch[0]]["input_ids"]) for batch in batches])
    cuts = np.searchsorted(sizes, sizes[-1] * np.arange(1, len(replicas)) / len(replicas)) + 1
    ends = np.unique([0, *cuts, len(batches)]).tolist()
    return [np.array(list(chain.from_iterable(batches[start:stop]))) for start, stop in pairwise(ends)]
