"""The pass over the training rows, which writes every shard file of every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.errors import MismatchError, NonFiniteError
from forebear.indexer.building.options import Work
from forebear.indexer.building.row_facts import reading_metadata
from forebear.indexer.building.sharing.beginning import load_checked
from forebear.indexer.building.sharing.claims import Claims
from forebear.indexer.building.sharing.shard_rows import ShardRows, SourceRows
from forebear.indexer.gradients.earlier_rows import (
    DIGEST,
    EarlierRows,
    EarlierSpans,
    LabelledRows,
    copy_repeats,
    note_rows,
    stored_digests,
)
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import Forward, forward_of_features, run_forward
from forebear.indexer.model.reading import count_reading
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.indexer.rows.row_source import RowBlock
from forebear.indexer.rows.user_columns import stored_columns
from forebear.indexer.sketches.fitting import Sample, fit_sketchers
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_found
from forebear.indexer.spans.store import note_spans, write_spans
from forebear.indexer.storage.arrow import read_batches, write_columns
from forebear.indexer.storage.layout import COLUMNS, SPANS, word_shards_folder, words_folder
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec, Manifest, read_manifest
from forebear.indexer.words.gradients import WordGradients, count_tokens
from forebear.indexer.words.store import Postings, read_word_store, repeated_words, write_shard
from forebear.progress import counted

OnRows = Callable[[int], None]
WriteShard = Callable[[Path, RowBlock, np.ndarray, int, OnRows], None]  # file, rows, their targets, number of the first


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Writes the shard files of one segment of rows; files that are there already are left as they are.

    Attributes:
        folder: The index.
        manifest: The manifest that the change will write; the segment's shards are its last ones.
        checkpoints: The checkpoints in training order, with their present paths.
        rows: The segment's rows with their targets.
        first_shard: Number of the segment's first shard.
        work: Devices of the models, and receiver of warnings and progress.
        claims: Which shards this process writes.
    """

    folder: Path
    manifest: Manifest
    checkpoints: tuple[Checkpoint, ...]
    rows: ShardRows
    first_shard: int
    work: Work
    claims: Claims = field(default_factory=Claims)
    _rows: LabelledRows = field(default_factory=LabelledRows)
    _sentences: EarlierRows = field(default_factory=EarlierRows)
    _spans: EarlierSpans = field(default_factory=EarlierSpans)

    @property
    def spec(self) -> IndexSpec:
        """The index's choices."""
        return self.manifest.spec_on(device_kind(pick_device(self.work.device)))

    @property
    def shards(self) -> tuple[tuple[int, int], ...]:
        """Row ranges of the segment's shards."""
        return self.manifest.shards[self.first_shard :]

    @property
    def fit_folder(self) -> Path:
        """Folder of all files that depend on fits beyond the head."""
        return self.folder / self.manifest.fitted_name("")

    def write(self, loaded: dict[str, Classifier], encoder: SentenceEncoder | None = None) -> None:
        """Write the shard files that are missing and that no other process has claimed.

        Args:
            loaded: Models in memory, by the name of their checkpoint, such as the last one and the first. All but the
                last are removed from the dictionary after their pass, to free memory. Others are loaded.
            encoder: The sentence encoder, where it is in memory; None: it is loaded when its turn comes.
        """
        for checkpoint in self.checkpoints:
            self._stage(
                f"features {checkpoint.name}",
                f"features/{checkpoint.name}",
                partial(self._features_writer, checkpoint, loaded),
            )
            if checkpoint is not self.checkpoints[-1]:
                loaded.pop(checkpoint.name, None)
        if "sbert" in self.spec.stores:
            self._stage("sentence embeddings", "sentence", partial(self._sentence_writer, encoder))
        if self.spec.spans is not None:
            self._stage("spans", SPANS, partial(self._span_writer, loaded, self.spec.spans))

    def fit(self, loaded: dict[str, Classifier]) -> None:
        """Fit what is to be fitted before the shards of all checkpoints; ``loaded`` as in :meth:`write`."""
        for checkpoint in self.checkpoints if self.spec.sketched_scopes else ():
            if not self.is_written(f"features/{checkpoint.name}"):
                self._sketchers(self._classifier(checkpoint, loaded), checkpoint)
            if checkpoint is not self.checkpoints[-1]:
                loaded.pop(checkpoint.name, None)

    def _classifier(self, checkpoint: Checkpoint, loaded: dict[str, Classifier]) -> Classifier:
        """The model at a checkpoint; the last one stays in memory."""
        classifier = loaded.get(checkpoint.name) or load_checked(checkpoint, self.spec, self.work.device)
        if checkpoint is self.checkpoints[-1]:
            loaded[checkpoint.name] = classifier
        return classifier

    def _features_writer(self, checkpoint: Checkpoint, loaded: dict[str, Classifier]) -> WriteShard:
        classifier = self._classifier(checkpoint, loaded)
        return partial(self._write_features, checkpoint, classifier, self._sketchers(classifier, checkpoint))

    def _sentence_writer(self, encoder: SentenceEncoder | None) -> WriteShard:
        assert self.manifest.sentence_model is not None
        encoder = encoder or load_sentence_encoder(self.manifest.sentence_model, device=self.work.device)
        if encoder.sha256 != self.spec.sentence_sha256:
            raise MismatchError(
                f"{encoder.name} is not the sentence model of the index: sha256 {encoder.sha256[:12]}, expected "
                f"{(self.spec.sentence_sha256 or '')[:12]}."
            )
        return partial(self._write_sentences, encoder)

    def _span_writer(self, loaded: dict[str, Classifier], finder: str) -> WriteShard:
        last = self.checkpoints[-1]
        classifier = self._classifier(last, loaded)
        return partial(self._write_spans, classifier, self._sketchers(classifier, last), finder)

    def stages(self) -> dict[str, str]:
        """Folders of the shards that mark what is written, by the name of the stage."""
        stages = {f"features {c.name}": f"features/{c.name}" for c in self.checkpoints}
        stages |= {"sentence embeddings": "sentence"} if "sbert" in self.spec.stores else {}
        return stages | ({"spans": SPANS} if self.spec.spans is not None else {})

    def is_written(self, kind: str) -> bool:
        """Whether all shards of a kind are written."""
        return all(path.is_file() for path in self._paths(kind))

    def n_written(self, kind: str) -> int:
        """Rows of the segment's shards of a kind that are written."""
        written = zip(self._paths(kind), self.shards, strict=True)
        return sum(stop - start for path, (start, stop) in written if path.is_file())

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / kind / f"{shard:05d}.arrow"

    def _paths(self, kind: str) -> list[Path]:
        return [self._path(kind, self.first_shard + i) for i in range(len(self.shards))]

    def _stage(self, name: str, kind: str, open_writer: Callable[[], WriteShard]) -> None:
        """Write every shard of a kind that is missing and that this process can claim."""
        if self.is_written(kind):
            return
        write = None if self.claims.shared else open_writer()
        on_rows = counted(self.work.progress, name, self.shards[-1][1] - self.shards[0][0])
        for number, (path, (start, stop)) in enumerate(zip(self._paths(kind), self.shards, strict=True)):
            with self.claims.take(kind, int(path.stem), path.is_file) as is_ours:
                if is_ours:
                    write = write or open_writer()  # a process that comes too late for any shard loads no model
                    write(path, *self.rows.block(number), start, on_rows)
                elif not self.claims.shared:
                    on_rows(stop - start)

    def _wait(self, kind: str, shards: Iterable[int]) -> None:
        """Wait until shards of a kind are written; of other segments all are."""
        self.claims.wait(kind, shards, lambda shard: self._path(kind, shard).is_file())

    def _write_features(
        self,
        checkpoint: Checkpoint,
        classifier: Classifier,
        sketchers: dict[str, Sketcher],
        path: Path,
        block: RowBlock,
        gold: np.ndarray,
        row: int,
        on_rows: OnRows,
    ) -> None:
        """One forward (and, for sketches and words, one backward of activations) over a block of rows."""
        encoded = Encoded(encode(classifier, block.texts))
        shard = int(path.stem)
        batch_tokens = self.spec.batch_tokens
        sketches = {kind: s.collector(len(block), classifier.device, packs=True) for kind, s in sketchers.items()}
        words = {
            words_folder(checkpoint.name, top): WordGradients(classifier, top, len(block), self.spec.words_precision)
            for top in self.spec.words_tops
        }
        if sketches or words:
            forward = run_pass(
                classifier, encoded, labels_seed(classifier.loss, gold), [*sketches.values(), *words.values()],
                batch_tokens=batch_tokens, first_row=row, on_rows=on_rows, warn=self.work.warn,
            )  # fmt: skip
        else:
            forward = run_forward(classifier, encoded, batch_tokens=batch_tokens, first_row=row, on_rows=on_rows)
        self._note_rows(classifier, shard, encoded, gold)  # after the pass: by now others have written their shards
        for repeats in (self._rows.read.repeats(shard), self._rows.labelled.repeats(shard)):
            self._wait(f"features/{checkpoint.name}", np.unique(repeats[1][:, 0]).tolist())
        for kind, sketch in sketches.items():
            sketch_columns = sketch.rows(row).columns(sketchers[kind].reduction)
            copy_repeats(self.fit_folder / kind, sketch_columns, *self._rows.labelled.repeats(shard))
            write_columns(self.fit_folder / kind / path.name, sketch_columns)
        for kind, gathered in words.items():
            word_shards = self.folder / word_shards_folder(kind)
            write_shard(word_shards / path.name, gathered.rows(row), row, self._repeated_words(kind, shard))
        forward = self._as_first_stored(path.parent, classifier, forward, shard)
        residuals, losses = (_single(values, row) for values in forward.residuals_and_losses(gold))
        copy_repeats(path.parent, {"residual": residuals}, *self._rows.labelled.repeats(shard))
        if checkpoint is self.checkpoints[-1]:
            columns: dict[str, pa.Array | np.ndarray] = {"row": np.arange(row, row + len(block))}
            columns |= {f"text_{i}": pa.array(texts, pa.string()) for i, texts in enumerate(block.texts)}
            columns |= {"label": _narrow(gold, np.float64), "prediction": _narrow(forward.predictions, np.float32)}
            columns |= {"probabilities": forward.probabilities.astype(np.float32), "loss": losses}
            columns |= {DIGEST: encoded.digests}
            reading = count_reading(classifier.tokenizer, block.texts, encoded.rows, classifier.max_length)
            of_text = {name: columns[name] for name in ("prediction", "probabilities")}
            copy_repeats(self.folder / "rows", of_text, *self._rows.read.repeats(shard))
            copy_repeats(self.folder / "rows", {"loss": losses}, *self._rows.labelled.repeats(shard))
            write_columns(self.folder / "rows" / path.name, columns, reading_metadata(reading))
            if self.manifest.columns:
                write_columns(self.folder / COLUMNS / path.name, stored_columns(block.table, self.manifest.columns))
            if words:
                starts, tokens, counts = count_tokens(classifier, block.texts)
                lists = {
                    name: pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values, pa.int32()))
                    for name, values in (("token", tokens), ("count", counts))
                }
                write_columns(self.folder / "tokens" / path.name, lists)
        write_columns(path, {"feature": forward.features, "residual": residuals})

    def _stored(self, kind: str, shard: int) -> pa.RecordBatch:
        return read_batches(self._path(kind, shard))[0]

    def _note_rows(self, classifier: Classifier, shard: int, encoded: Encoded, gold: np.ndarray) -> None:
        """Note the rows of a shard, to find those that an earlier shard has too.

        Earlier shards that this process did not write are read; where they are not written yet (by another process, or
        in a resumed build, which has no shards of rows before its last checkpoint), their texts are encoded again.
        """
        known = self._rows
        for number in range(known.n_shards, shard):
            if self._path("rows", number).is_file():
                note_rows(known, self.folder, number, classifier)
            else:
                block, its_gold = self.rows.block(number - self.first_shard)
                known.add(Encoded(encode(classifier, block.texts)).digests, its_gold)
        if known.n_shards == shard:  # at the first checkpoint
            known.add(encoded.digests, gold)

    def _as_first_stored(self, folder: Path, classifier: Classifier, forward: Forward, shard: int) -> Forward:
        """A shard's forward pass; rows that an earlier shard has too get the stored features, and their logits."""
        positions, places = self._rows.read.repeats(shard)
        if not len(positions):
            return forward
        copy_repeats(folder, {"feature": forward.features}, positions, places)
        again = forward_of_features(classifier, forward.features[positions])
        forward.logits[positions] = again.logits
        return Forward(forward.features, forward.logits, forward.loss)

    def _repeated_words(self, kind: str, shard: int) -> Postings | None:
        """Stored words of the rows that an earlier shard has too, from its words or from the older store."""
        positions, places = self._rows.labelled.repeats(shard)
        if not len(positions):
            return None
        before = Index(self.folder, read_manifest(self.folder), check=False) if self.first_shard else None
        shards_before = () if before is None else before.manifest.shards
        starts = np.array([start for start, _ in (*shards_before, *self.shards)])
        word_shards = self.folder / word_shards_folder(kind)
        return repeated_words(
            starts[shard] + positions,
            starts[places[:, 0]] + places[:, 1],
            [word_shards / f"{i:05d}.arrow" for i in np.unique(places[:, 0]) if i >= self.first_shard],
            None if before is None else read_word_store([self.folder / name for name in before.word_files(kind)]),
        )

    def _write_sentences(
        self,
        encoder: SentenceEncoder,
        path: Path,
        block: RowBlock,
        _gold: np.ndarray,
        _row: int,
        on_rows: OnRows,
    ) -> None:
        encoded, known, shard = Encoded(encoder.encode(block.texts)), self._sentences, int(path.stem)
        embedding = encoder.embed(encoded, batch_tokens=self.spec.batch_tokens, on_rows=on_rows)
        for number in range(known.n_shards, shard):
            if self._path("sentence", number).is_file() and self._path("rows", number).is_file():
                stored = self._stored("sentence", number)
                known.add(stored_digests(stored, encoder.encode, self._stored("rows", number)))
            else:
                texts = self.rows.block(number - self.first_shard)[0].texts
                known.add(Encoded(encoder.encode(texts)).digests)
        known.add(encoded.digests)
        positions, places = known.repeats(shard)
        self._wait("sentence", np.unique(places[:, 0]).tolist())
        copy_repeats(path.parent, {"embedding": embedding}, positions, places)
        write_columns(path, {"embedding": embedding, DIGEST: encoded.digests})

    def _write_spans(
        self,
        classifier: Classifier,
        sketchers: dict[str, Sketcher],
        finder: str,
        path: Path,
        block: RowBlock,
        gold: np.ndarray,
        row: int,
        on_rows: OnRows,
    ) -> None:
        """Write what every span of a block of rows adds to its row's gradient."""
        rows = range(row, row + len(block))
        find = span_finder(finder, self.spec.span_column, str(classifier.device))
        spans = find_spans(find, block.texts, block.table, rows, "training row")
        write_spans(
            self.folder, self.fit_folder, path.name, self.checkpoints[-1].name, classifier, sketchers,
            mask_found(classifier, block.texts, spans), gold, partial(self._earlier_spans, classifier, int(path.stem)),
            first_row=row, batch_tokens=self.spec.batch_tokens, warn=self.work.warn,
        )  # fmt: skip
        on_rows(len(block))

    def _earlier_spans(self, classifier: Classifier, shard: int) -> EarlierSpans:
        """Spans of the shards before this one, when all of these are written."""
        earlier = range(self._spans.n_shards, shard)
        for kind in (f"features/{self.checkpoints[-1].name}", SPANS):
            self._wait(kind, earlier)
        for number in earlier:
            note_spans(self._spans, self.folder, number, classifier)
        return self._spans

    def _sketchers(self, classifier: Classifier, checkpoint: Checkpoint) -> dict[str, Sketcher]:
        """Sketchers of every scope, by the folder of their shards; fitted now if they were not before."""
        return fit_sketchers(
            self.fit_folder, classifier, self.spec, checkpoint.name, self._sample,
            last=checkpoint is self.checkpoints[-1], stage=partial(counted, self.work.progress),
        )  # fmt: skip

    def _sample(self) -> Sample:
        assert isinstance(self.rows, SourceRows)  # the first process has fitted before others are started
        return self.rows.sample(self.spec.seed)


def _single(values: np.ndarray, first_row: int) -> np.ndarray:
    """Values of rows as float32.

    Raises:
        NonFiniteError: One is too large for it; the row is named.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not (finite := np.isfinite(single).reshape(len(single), -1).all(axis=1)).all():
        raise NonFiniteError(
            f"the loss of row {first_row + int(np.argmin(finite))} or its gradient is beyond the largest number of "
            "float32. Scale the targets."
        )
    return single


def _narrow(targets: np.ndarray, numbers: type) -> np.ndarray:
    """Targets as they are stored: class ids in int32, numbers as ``numbers``."""
    return targets.astype(np.int32 if targets.dtype.kind in "iu" else numbers)
