"""Equal rows of a segment's shards get the numbers of the first of them, once every shard is written.

Shards are computed apart, by other processes and on other machines, too. What this changes depends on the shards alone,
so an index has the same bytes, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from forebear.errors import NonFiniteError
from forebear.indexer.gradients.earlier_rows import (
    EarlierRows,
    EarlierSpans,
    LabelledRows,
    Repeats,
    copy_repeats,
    note_rows,
    overwrite_columns,
    overwrite_repeats,
    shard_file,
    stored_columns_of,
    stored_digests,
)
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import forward_of_features
from forebear.indexer.model.sentence_encoder import SentenceEncoder
from forebear.indexer.sketches.fitting import sketch_folders
from forebear.indexer.spans.store import note_spans, overwrite_repeated_spans
from forebear.indexer.storage.arrow import column, read_batches
from forebear.indexer.storage.layout import span_gradients, word_shards_folder, words_folder
from forebear.indexer.storage.manifest import Checkpoint, Manifest, read_manifest
from forebear.indexer.words.store import overwrite_words, read_word_store, repeated_words
from forebear.progress import Progress

STAGE = "equal rows"


@dataclass(frozen=True, kw_only=True)
class EqualRows:
    """Finds the rows of a segment that an earlier shard has, and overwrites their numbers.

    Attributes:
        folder: The index.
        manifest: The manifest that the change will write; the segment's shards are its last ones, and written.
        first_shard: Number of the segment's first shard.
        checkpoints: The checkpoints in training order.
        classifier_at: Gives the model at a checkpoint; asked for few of them.
        encoder: Gives the sentence encoder; asked where an older version kept no digests.
        progress: Called with the stage.
    """

    folder: Path
    manifest: Manifest
    first_shard: int
    checkpoints: Sequence[Checkpoint]
    classifier_at: Callable[[Checkpoint], Classifier]
    encoder: Callable[[], SentenceEncoder]
    progress: Progress
    _rows: LabelledRows = field(default_factory=LabelledRows)

    def overwrite(self) -> None:
        """Overwrite the repeated rows of every kind of shard; what was overwritten before stays as it is."""
        last = self.checkpoints[-1]
        shards = range(len(self.manifest.shards))
        n_rows = self.manifest.n_rows
        for shard in shards:
            self.progress(STAGE, self.manifest.shards[shard][0], n_rows)
            note_rows(self._rows, self.folder, shard, lambda texts: encode(self.classifier_at(last), texts))
            if shard >= self.first_shard:
                self._overwrite_rows(shard)
        spec = self.manifest.spec
        sketched, fit_folder = partial(sketch_kinds, self.manifest), self.folder / self.manifest.fitted_name("")
        for checkpoint in self.checkpoints:
            overwrite_sketches(fit_folder, sketched(checkpoint.name), shards[self.first_shard :], self._rows)
        if "sbert" in spec.stores:
            self._overwrite_sentences()
        if spec.spans is not None:
            spans = noted_spans(self.folder, shards, self.classifier_at(last))
            for shard in shards[self.first_shard :]:
                if len(spans.masked.repeats(shard)[0]):
                    overwrite_repeated_spans(self.folder, last.name, self.classifier_at(last), shard, spans)
            overwrite_spans(fit_folder, sketched(last.name), shards[self.first_shard :], spans)
        self.progress(STAGE, n_rows, n_rows)

    def _overwrite_rows(self, shard: int) -> None:
        """Features, residuals and words at every checkpoint, then what ``rows/`` says of the last one."""
        read, labelled = self._rows.read.repeats(shard), self._rows.labelled.repeats(shard)
        if not len(read[0]):
            return
        path = self.folder / "rows" / shard_file(shard)
        batch = read_batches(path)[0]
        gold = column(batch, "label")[read[0]]
        losses = None
        for number, checkpoint in enumerate(self.checkpoints):
            losses = self._overwrite_features(checkpoint, shard, gold)
            for top in self.manifest.spec.words_tops:
                self._overwrite_words(words_folder(checkpoint.name, top), number, top, shard, labelled)
        columns = stored_columns_of(path, ("prediction", "probabilities", "loss"))
        of_text = {name: columns[name] for name in ("prediction", "probabilities")}
        copy_repeats(path.parent, of_text, *read)
        if losses is not None:
            columns["loss"][read[0]] = losses
        copy_repeats(path.parent, {"loss": columns["loss"]}, *labelled)
        overwrite_columns(path, columns)

    def _overwrite_features(self, checkpoint: Checkpoint, shard: int, gold: np.ndarray) -> np.ndarray | None:
        """Features and residuals at a checkpoint; returns the losses of the repeated rows, where some have new ones.

        A row that an earlier shard has with another label gets its residual and its loss from the earlier row's
        feature, by the head.
        """
        read, labelled = self._rows.read.repeats(shard), self._rows.labelled.repeats(shard)
        folder = self.folder / "features" / checkpoint.name
        columns = stored_columns_of(folder / shard_file(shard))
        copy_repeats(folder, {"feature": columns["feature"]}, *read)
        losses = None
        if len(labelled[0]) < len(read[0]):
            forward = forward_of_features(self.classifier_at(checkpoint), columns["feature"][read[0]])
            found = forward.residuals_and_losses(gold)
            rows = self.manifest.shards[shard][0] + read[0]
            columns["residual"][read[0]], losses = (as_single(values, rows) for values in found)
        copy_repeats(folder, {"residual": columns["residual"]}, *labelled)
        overwrite_columns(folder / shard_file(shard), columns)
        return losses

    def _overwrite_words(self, kind: str, checkpoint: int, top: int, shard: int, labelled: Repeats) -> None:
        """Words of a shard, from the words of earlier shards and, of earlier segments, from the merged store."""
        positions, places = labelled
        if not len(positions):
            return
        before = Index(self.folder, read_manifest(self.folder), check=False) if self.first_shard else None
        starts = np.array([start for start, _ in self.manifest.shards])
        word_shards = self.folder / word_shards_folder(kind)
        repeated = repeated_words(
            starts[shard] + positions,
            starts[places[:, 0]] + places[:, 1],
            [word_shards / shard_file(i) for i in np.unique(places[:, 0]) if i >= self.first_shard],
            None if before is None else read_word_store([self.folder / name for name in before.word_files(kind)]),
        )
        overwrite_words(word_shards / shard_file(shard), repeated)

    def _overwrite_sentences(self) -> None:
        known, folder = EarlierRows(), self.folder / "sentence"
        for shard in range(len(self.manifest.shards)):
            stored, rows = (read_batches(self.folder / kind / shard_file(shard))[0] for kind in ("sentence", "rows"))
            known.add(stored_digests(stored, lambda texts: self.encoder().encode(texts), rows))
            if shard >= self.first_shard:
                overwrite_repeats(folder, shard, known.repeats(shard))


def as_single(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values of rows as float32.

    Args:
        values: ``(n,)`` or ``(n, c)``.
        rows: Numbers of the rows, ``(n,)``.

    Raises:
        NonFiniteError: One is too large for it; the row is named.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not (finite := np.isfinite(single).reshape(len(single), -1).all(axis=1)).all():
        raise NonFiniteError(
            f"the loss of row {rows[int(np.argmin(finite))]} or its gradient is beyond the largest number of float32. "
            "Scale the targets."
        )
    return single


def sketch_kinds(manifest: Manifest, checkpoint: str) -> list[str]:
    """Folders of all sketches of rows at a checkpoint, relative to the folder of the fits."""
    spec, last = manifest.spec, checkpoint == manifest.checkpoints[-1].name
    of_scopes = (sketch_folders(spec, scope, checkpoint, last=last) for scope in spec.sketched_scopes)
    return [kind for folders in of_scopes for kind in folders.values()]


def overwrite_sketches(fit_folder: Path, kinds: Iterable[str], shards: Iterable[int], rows: LabelledRows) -> None:
    """Give the sketches of repeated rows the numbers of the first, in shards in ascending order."""
    shards = list(shards)
    for kind in kinds:
        for shard in shards:
            overwrite_repeats(fit_folder / kind, shard, rows.labelled.repeats(shard))


def overwrite_spans(fit_folder: Path, kinds: Iterable[str], shards: Iterable[int], spans: EarlierSpans) -> None:
    """The same of the sketches of spans."""
    shards = list(shards)
    for kind in kinds:
        for shard in shards:
            overwrite_repeats(fit_folder / span_gradients(kind), shard, spans.differences.repeats(shard))


def noted_spans(folder: Path, shards: Iterable[int], classifier: Classifier) -> EarlierSpans:
    """The stored spans of some shards of an index, of which the first is shard 0."""
    spans = EarlierSpans()
    for shard in shards:
        note_spans(spans, folder, shard, classifier)
    return spans
