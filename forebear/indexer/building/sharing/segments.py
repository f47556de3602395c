"""The shards of a segment of rows, written by this process or by one a device."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from forebear.errors import ForebearError
from forebear.indexer.building.options import Work
from forebear.indexer.building.shards import ShardWriter
from forebear.indexer.building.sharing.beginning import as_begun
from forebear.indexer.building.sharing.claims import Claims
from forebear.indexer.building.sharing.processes import write_on_devices
from forebear.indexer.building.sharing.shard_rows import ShardRows, SourceRows
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.sentence_encoder import SentenceEncoder
from forebear.indexer.rows.labels import LabelMap
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.indexer.storage.manifest import Checkpoint, Manifest


def rows_for(work: Work, source: RowSource, labels: LabelMap | TargetMap, shard_rows: int) -> SourceRows:
    """The rows of a segment; some shards are kept where several processes ask for them.

    Args:
        work: Names the devices.
        source: The rows.
        labels: Maps the source's labels to the model's targets.
        shard_rows: Rows of a shard.
    """
    return SourceRows(source, labels, shard_rows, n_kept=2 * (len(work.devices) - 1))


def write_segment(writer: ShardWriter, loaded: dict[str, Classifier], encoder: SentenceEncoder | None = None) -> None:
    """Write the shard files of a segment that are missing, and then what its equal rows have in common.

    Args:
        writer: Writer of the segment.
        loaded: Models in memory on the first device, see :meth:`ShardWriter.write`.
        encoder: The sentence encoder, likewise.
    """
    write_shards(writer, loaded, encoder)
    writer.overwrite_equal_rows(loaded, encoder)


def write_shards(writer: ShardWriter, loaded: dict[str, Classifier], encoder: SentenceEncoder | None = None) -> None:
    """Write the shard files that are missing, on the devices that the writer's work names.

    What is fitted is fitted by this process, before others write shards: the files have the same bytes, however many
    processes there are.

    Args:
        writer: Writer of the segment.
        loaded: Models in memory on the first device, see :meth:`ShardWriter.write`.
        encoder: The sentence encoder, likewise.
    """
    kinds = writer.stages()
    if not writer.work.is_shared or all(map(writer.is_written, kinds.values())):
        writer.write(loaded, encoder)
        return
    writer.fit(loaded)
    write = partial(_write_claimed, writer.folder, writer.manifest, writer.checkpoints, writer.first_shard, writer.part)
    written = {stage: writer.n_written(kind) for stage, kind in kinds.items()}
    write_on_devices(write, writer.folder, writer.work, rows=writer.rows, written=written)
    for stage, kind in kinds.items():
        refuse_missing(stage, writer.is_written(kind))


def _write_claimed(
    folder: Path,
    manifest: Manifest,
    checkpoints: tuple[Checkpoint, ...],
    first_shard: int,
    part: range | None,
    work: Work,
    claims: Claims,
    rows: ShardRows,
) -> None:
    """In the process of a device: write the shards that no other process has claimed."""
    writer = ShardWriter(
        folder=folder, manifest=manifest, checkpoints=checkpoints, rows=rows, first_shard=first_shard, work=work,
        claims=claims, part=part,
    )  # fmt: skip
    with as_begun(manifest.spec.n_threads, pick_device(work.device)):
        writer.write({})


def refuse_missing(stage: str, is_written: bool) -> None:
    """Refuse to go on without all shards of a stage, after all processes have ended.

    Raises:
        ForebearError: A shard is missing.
    """
    if not is_written:
        raise ForebearError(f"{stage}: a process left a shard unwritten. Give --resume to go on.")
