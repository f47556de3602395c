"""The pass over the training rows, which writes every shard file of every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from forebear.errors import MismatchError
from forebear.indexer.building.options import Work
from forebear.indexer.building.row_facts import reading_metadata
from forebear.indexer.building.sharing.beginning import load_checked
from forebear.indexer.building.sharing.claims import Claims
from forebear.indexer.building.sharing.equal_rows import EqualRows, as_single
from forebear.indexer.building.sharing.shard_rows import ShardRows, SourceRows
from forebear.indexer.gradients.earlier_rows import DIGEST, shard_file
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.reading import count_reading
from forebear.indexer.model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from forebear.indexer.rows.row_source import RowBlock
from forebear.indexer.rows.user_columns import stored_columns
from forebear.indexer.sketches.fitting import Sample, fit_sketchers
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_found
from forebear.indexer.spans.store import write_spans
from forebear.indexer.storage.arrow import write_columns
from forebear.indexer.storage.layout import COLUMNS, SPANS, word_shards_folder, words_folder
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec, Manifest
from forebear.indexer.words.gradients import WordGradients, count_tokens
from forebear.indexer.words.store import write_shard
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
        part: Numbers of the shards that this writer is for; None: those of the whole segment.
    """

    folder: Path
    manifest: Manifest
    checkpoints: tuple[Checkpoint, ...]
    rows: ShardRows
    first_shard: int
    work: Work
    claims: Claims = field(default_factory=Claims)
    part: range | None = None

    @property
    def spec(self) -> IndexSpec:
        """The index's choices."""
        return self.manifest.spec_on(device_kind(pick_device(self.work.device)))

    @property
    def numbers(self) -> range:
        """Numbers of the shards that this writer is for."""
        return range(self.first_shard, len(self.manifest.shards)) if self.part is None else self.part

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
        return partial(self._write_sentences, encoder or self._sentence_encoder())

    def _sentence_encoder(self) -> SentenceEncoder:
        assert self.manifest.sentence_model is not None
        encoder = load_sentence_encoder(self.manifest.sentence_model, device=self.work.device)
        if encoder.sha256 != self.spec.sentence_sha256:
            raise MismatchError(
                f"{encoder.name} is not the sentence model of the index: sha256 {encoder.sha256[:12]}, expected "
                f"{(self.spec.sentence_sha256 or '')[:12]}."
            )
        return encoder

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
        """Rows of the shards of a kind that are written."""
        return sum(self._n_rows(shard) for shard in self.numbers if self._path(kind, shard).is_file())

    def _n_rows(self, shard: int) -> int:
        start, stop = self.manifest.shards[shard]
        return stop - start

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / kind / shard_file(shard)

    def _paths(self, kind: str) -> list[Path]:
        return [self._path(kind, shard) for shard in self.numbers]

    def _stage(self, name: str, kind: str, open_writer: Callable[[], WriteShard]) -> None:
        """Write every shard of a kind that is missing and that this process can claim."""
        if self.is_written(kind):
            return
        write = None if self.claims.shared else open_writer()
        on_rows = counted(self.work.progress, name, sum(map(self._n_rows, self.numbers)))
        for shard in self.numbers:
            path = self._path(kind, shard)
            with self.claims.take(kind, shard, path.is_file) as is_ours:
                if is_ours:
                    write = write or open_writer()  # a process that comes too late for any shard loads no model
                    write(path, *self.rows.block(shard - self.first_shard), self.manifest.shards[shard][0], on_rows)
                elif not self.claims.shared:
                    on_rows(self._n_rows(shard))

    def overwrite_equal_rows(self, loaded: dict[str, Classifier], encoder: SentenceEncoder | None = None) -> None:
        """Give repeated rows the numbers of the first, when all shards of the segment are written; as :meth:`write`."""
        EqualRows(
            folder=self.folder, manifest=self.manifest, first_shard=self.first_shard, checkpoints=self.checkpoints,
            classifier_at=lambda checkpoint: self._classifier(checkpoint, loaded),
            encoder=lambda: encoder or self._sentence_encoder(), progress=self.work.progress,
        ).overwrite()  # fmt: skip

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
        for kind, sketch in sketches.items():
            write_columns(self.fit_folder / kind / path.name, sketch.rows(row).columns(sketchers[kind].reduction))
        for kind, gathered in words.items():
            write_shard(self.folder / word_shards_folder(kind) / path.name, gathered.rows(row), row)
        rows = np.arange(row, row + len(block))
        residuals, losses = (as_single(values, rows) for values in forward.residuals_and_losses(gold))
        if checkpoint is self.checkpoints[-1]:
            columns: dict[str, pa.Array | np.ndarray] = {"row": rows}
            columns |= {f"text_{i}": pa.array(texts, pa.string()) for i, texts in enumerate(block.texts)}
            columns |= {"label": _narrow(gold, np.float64), "prediction": _narrow(forward.predictions, np.float32)}
            columns |= {"probabilities": forward.probabilities.astype(np.float32), "loss": losses}
            columns |= {DIGEST: encoded.digests}
            reading = count_reading(classifier.tokenizer, block.texts, encoded.rows, classifier.max_length)
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

    def _write_sentences(
        self,
        encoder: SentenceEncoder,
        path: Path,
        block: RowBlock,
        _gold: np.ndarray,
        _row: int,
        on_rows: OnRows,
    ) -> None:
        encoded = Encoded(encoder.encode(block.texts))
        embedding = encoder.embed(encoded, batch_tokens=self.spec.batch_tokens, on_rows=on_rows)
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
            mask_found(classifier, block.texts, spans), gold, first_row=row,
            batch_tokens=self.spec.batch_tokens, warn=self.work.warn,
        )  # fmt: skip
        on_rows(len(block))

    def _sketchers(self, classifier: Classifier, checkpoint: Checkpoint) -> dict[str, Sketcher]:
        """Sketchers of every scope, by the folder of their shards; fitted now if they were not before."""
        return fit_sketchers(
            self.fit_folder, classifier, self.spec, checkpoint.name, self._sample,
            last=checkpoint is self.checkpoints[-1], stage=partial(counted, self.work.progress),
        )  # fmt: skip

    def _sample(self) -> Sample:
        assert isinstance(self.rows, SourceRows)  # the first process has fitted before others are started
        return self.rows.sample(self.spec.seed)


def _narrow(targets: np.ndarray, numbers: type) -> np.ndarray:
    """Targets as they are stored: class ids in int32, numbers as ``numbers``."""
    return targets.astype(np.int32 if targets.dtype.kind in "iu" else numbers)
