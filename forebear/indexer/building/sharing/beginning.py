"""What a change of an index begins with: its segment, shards and checkpoints, and what last bits depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.loading import check_same_model, load_classifier
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.user_columns import columns_sha256
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec, Segment


@contextmanager
def as_begun(n_threads: int, device: torch.device | None = None) -> Iterator[None]:
    """Run with what last bits of a float depend on: the thread count that the change was begun with, and on a device.

    Args:
        n_threads: The thread count.
        device: Device that models run on, whose numbers then repeat; None: none run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with nullcontext() if device is None else repeatable(device):
            yield
    finally:
        torch.set_num_threads(before)


def segment_of(source: RowSource, start: int, columns: Mapping[str, str]) -> Segment:
    """The rows of a source as a segment of an index, numbered from ``start``; passes over them.

    Args:
        source: The rows.
        start: Number of the first one.
        columns: The columns that the index keeps besides texts and labels, and their kinds.
    """
    return Segment(
        source=source.name,
        rows_sha256=source.sha256(),
        user_columns_sha256=columns_sha256(source, columns),
        start=start,
        n_rows=source.n_rows,
        n_left_out=source.n_dropped,
        row_format=source.format("the index").stated(),
    )


def split_rows(start: int, n_rows: int, shard_rows: int) -> tuple[tuple[int, int], ...]:
    """Row ranges of the shards of a segment."""
    stop = start + n_rows
    return tuple((i, min(i + shard_rows, stop)) for i in range(start, stop, shard_rows))


def checkpoints_now(index: Index, model: str | None) -> tuple[Checkpoint, ...]:
    """The checkpoints of an index with the paths where they are now; see :meth:`Index.at`."""
    paths = index.at(model).checkpoint_paths
    return tuple(replace(c, path=path) for c, path in zip(index.manifest.checkpoints, paths, strict=True))


def load_checked(checkpoint: Checkpoint, spec: IndexSpec, device: str) -> Classifier:
    """A checkpoint of an index, refused if it is not the one that was indexed."""
    classifier = load_classifier(checkpoint.path, device=device, precision=spec.precision, max_length=spec.max_length)
    check_same_model(classifier, checkpoint.sha256, spec.tokenizer_sha256)
    return replace(classifier, label_names=spec.label_names, loss=spec.loss)  # the model's own may say nothing: LABEL_0
