"""The store of spans: what each span of each training row adds to its gradient, one entry a span.

    spans/00000.arrow                        row, text column, start and end of a shard's spans
    spans/<checkpoint>/00000.arrow           feature and p - y of the row with the span masked
    gradients/<scope>/<checkpoint>/spans/    sketches of g - g', in the format of the rows' sketches; also whitened

At the last checkpoint alone: the variants that ``tracin+`` and ``tracin++`` sum over are one small step away from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.errors import NonFiniteError
from forebear.indexer.gradients.earlier_rows import (
    DIGEST,
    EarlierSpans,
    copy_repeats,
    overwrite_columns,
    shard_file,
    stored_columns_of,
    stored_digests,
)
from forebear.indexer.gradients.gradient_pass import MemoryWarning
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import forward_of_features, run_forward
from forebear.indexer.sketches.sketch import Sketcher, SketchRows, sketch_rows
from forebear.indexer.spans.masking import MaskedSpans, mask_spans
from forebear.indexer.spans.text import Span
from forebear.indexer.storage.arrow import RowMatrix, column, read_batches, record_batch, write_columns, write_table
from forebear.indexer.storage.layout import SPANS, masked_folder, span_gradients

_CUT = b"cut"


@dataclass(frozen=True)
class SpanStore:
    """Every stored span, in the order of rows and places.

    Attributes:
        rows: Training row of each entry, ascending, ``(e,)`` int64.
        columns: Text column of each entry, ``(e,)``.
        starts: First character of each span, ``(e,)``.
        ends: One past the last character, ``(e,)``.
        features: f of the row with the span masked, ``(e, h)`` float32.
        residuals: p - y of that masked row, ``(e, c)`` float32.
        n_cut: Spans that truncation cuts away, which have no entry.
    """

    rows: np.ndarray
    columns: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    features: RowMatrix
    residuals: RowMatrix
    n_cut: int

    def spans(self, entries: np.ndarray) -> list[Span]:
        """The spans of the given entries."""
        parts = (values[entries].tolist() for values in (self.columns, self.starts, self.ends))
        return [Span(*ends) for ends in zip(*parts, strict=True)]

    def entries_of(self, rows: np.ndarray) -> np.ndarray:
        """Entries of some training rows, ascending."""
        return np.flatnonzero(np.isin(self.rows, rows))


def write_spans(
    folder: Path,
    fit_folder: Path,
    name: str,
    checkpoint: str,
    classifier: Classifier,
    sketchers: dict[str, Sketcher],
    masked: MaskedSpans,
    labels: np.ndarray,
    *,
    first_row: int,
    batch_tokens: int,
    warn: MemoryWarning,
) -> None:
    """Write the spans of one shard's rows: sketches first, the list of spans last, which marks the shard as written.

    Args:
        folder: The index.
        fit_folder: Folder of the fits, which the sketches are written under.
        name: Name of the shard's files.
        checkpoint: Name of the last checkpoint.
        classifier: The model at that checkpoint.
        sketchers: Sketchers, by the folder of the rows' sketches.
        masked: The spans of the shard.
        labels: Gold classes of the shard's rows, ``(n,)``.
        first_row: Number of the shard's first row.
        batch_tokens: Largest number of padded tokens in a batch.
        warn: Called when memory does not suffice for a batch.
    """
    gold = labels[masked.owners]
    try:
        features, logits, sketches = masked_pass(classifier, sketchers, masked.encoded, gold, batch_tokens, warn)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{classifier.name}: with a span masked, a gradient of a row between {first_row} and "
            f"{first_row + len(labels) - 1} is NaN or infinite. Check the model."
        ) from error
    write_span_sketches(fit_folder, name, sketches, sketchers)
    residuals = classifier.loss.residual_and_loss(logits, gold)[0].astype(np.float32)
    write_columns(folder / masked_folder(checkpoint) / name, {"feature": features, "residual": residuals})
    ends = np.array([(s.column, s.start, s.end) for s in masked.spans], np.int32).reshape(-1, 3)
    columns = {"row": first_row + masked.owners.astype(np.int64)}
    columns |= {part: np.ascontiguousarray(ends[:, i]) for i, part in enumerate(("column", "start", "end"))}
    columns[DIGEST] = masked.encoded.others.digests
    batch = record_batch(columns).replace_schema_metadata({_CUT: str(len(masked.cut)).encode()})
    write_table(folder / SPANS / name, [batch], batch.schema)


def write_span_sketches(
    fit_folder: Path,
    name: str,
    sketches: dict[str, SketchRows],
    sketchers: dict[str, Sketcher],
) -> None:
    """Write the sketches of one shard's spans, beside those of its rows."""
    for kind, span_sketches in sketches.items():
        write_columns(fit_folder / span_gradients(kind) / name, span_sketches.columns(sketchers[kind].reduction))


def overwrite_repeated_spans(
    folder: Path, checkpoint: str, classifier: Classifier, shard: int, earlier: EarlierSpans
) -> None:
    """Give masked rows of a written shard that an earlier shard has too the numbers stored there.

    Args:
        folder: The index.
        checkpoint: Name of the last checkpoint.
        classifier: The model there: of a masked row with another label, its head gives the residual anew.
        shard: Number of the shard; the earlier ones have been through this.
        earlier: Spans of the shards up to this one.
    """
    positions, places = earlier.masked.repeats(shard)
    if not len(positions):
        return
    masked_rows_folder = folder / masked_folder(checkpoint)
    listed, rows = (read_batches(folder / kind / shard_file(shard))[0] for kind in (SPANS, "rows"))
    gold = column(rows, "label")[column(listed, "row") - column(rows, "row")[0]]
    columns = stored_columns_of(masked_rows_folder / shard_file(shard))
    copy_repeats(masked_rows_folder, {"feature": columns["feature"]}, positions, places)
    logits = forward_of_features(classifier, columns["feature"][positions]).logits
    columns["residual"][positions] = classifier.loss.residual_and_loss(logits, gold[positions])[0]
    copy_repeats(masked_rows_folder, {"residual": columns["residual"]}, *earlier.labelled.repeats(shard))
    overwrite_columns(masked_rows_folder / shard_file(shard), columns)


def note_spans(earlier: EarlierSpans, folder: Path, shard: int, classifier: Classifier) -> None:
    """Add the stored spans of the next shard to those of the shards before it.

    Args:
        earlier: Spans of the shards before this one.
        folder: The index.
        shard: Number of the shard to add.
        classifier: The model at the last checkpoint.
    """
    listed, rows = (read_batches(folder / kind / f"{shard:05d}.arrow")[0] for kind in (SPANS, "rows"))
    row_positions = column(listed, "row") - column(rows, "row")[0]
    read = stored_digests(rows, partial(encode, classifier), rows)
    earlier.add(read[row_positions], masked_digests(listed, rows, classifier), column(rows, "label")[row_positions])


def masked_digests(listed: pa.RecordBatch, rows: pa.RecordBatch, classifier: Classifier) -> np.ndarray:
    """Digests of the word pieces of a shard's masked rows, ``(e, 2)``; masked again where an older version kept none.

    Args:
        listed: The shard's spans.
        rows: The shard's rows.
        classifier: The model at the last checkpoint.
    """
    if DIGEST in listed.schema.names:
        return column(listed, DIGEST)
    row_positions = (column(listed, "row") - column(rows, "row")[0]).tolist()
    names = [name for name in rows.schema.names if name.startswith("text_")]
    texts = [[texts[i] for i in row_positions] for texts in (rows.column(name).to_pylist() for name in names)]
    ends = (column(listed, part).tolist() for part in ("column", "start", "end"))
    encoded, _ = mask_spans(classifier, texts, [Span(*span_ends) for span_ends in zip(*ends, strict=True)])
    return encoded.others.digests


def masked_pass(
    classifier: Classifier,
    sketchers: dict[str, Sketcher],
    encoded: Encoded,
    gold: np.ndarray,
    batch_tokens: int,
    warn: MemoryWarning | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, SketchRows]]:
    """Features and logits of the masked rows; sketches of the differences, by the folder of the rows' sketches."""
    if not sketchers:
        forward = run_forward(classifier, encoded.others, batch_tokens=batch_tokens)
        return forward.features, forward.logits, {}
    sketches, both = sketch_rows(
        classifier, list(sketchers.values()), encoded, gold, batch_tokens=batch_tokens, warn=warn, packs=True
    )
    n = len(encoded)
    return both.features[n:], both.logits[n:], dict(zip(sketchers, sketches, strict=True))


def read_spans(listed: list[pa.RecordBatch], masked: list[pa.RecordBatch]) -> SpanStore:
    """Memory-map what :func:`write_spans` wrote, of all shards."""
    row, text_column, start, end = (
        np.concatenate([column(b, part) for b in listed]) for part in ("row", "column", "start", "end")
    )
    return SpanStore(
        rows=row, columns=text_column, starts=start, ends=end,
        features=RowMatrix([column(b, "feature") for b in masked]),
        residuals=RowMatrix([column(b, "residual") for b in masked]),
        n_cut=sum(int(b.schema.metadata[_CUT]) for b in listed),
    )  # fmt: skip
