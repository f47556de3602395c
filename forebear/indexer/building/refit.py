"""Fitting again what an index fitted when it was built: bases, reductions, EK-FAC and calibration beyond the head.

They are fitted on a sample of the rows. After an append or a retire that sample is out of date. A refit takes the
sample that a build of the live rows would take, and sketches all rows anew. Rows, labels and spans are read from the
index. The new files lie in ``refit/<generation>/``, so that the old ones stay in force until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forebear.errors import CorruptIndexError, InputError
from forebear.indexer.building.finish import calibration_by, finish
from forebear.indexer.building.options import BuildOptions, Work
from forebear.indexer.building.shards import OnRows
from forebear.indexer.building.sharing.beginning import as_begun, checkpoints_now, load_checked
from forebear.indexer.building.sharing.claims import Claims
from forebear.indexer.building.sharing.equal_rows import (
    noted_spans,
    overwrite_sketches,
    overwrite_spans,
    sketch_kinds,
)
from forebear.indexer.building.sharing.processes import write_on_devices
from forebear.indexer.building.sharing.segments import refuse_missing
from forebear.indexer.building.sharing.shard_rows import ShardRows
from forebear.indexer.gradients.earlier_rows import LabelledRows, note_rows, shard_file
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on, device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.sketches.fitting import Sample, fit_sketchers, sample_rows
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.store import masked_pass, write_span_sketches
from forebear.indexer.storage.arrow import write_columns
from forebear.indexer.storage.choices import WorkKeywords
from forebear.indexer.storage.files import path_of
from forebear.indexer.storage.journal import begin_change, check_change, same_device_or_refuse, unfinished, was_done
from forebear.indexer.storage.layout import LOCK_NAME, span_gradients
from forebear.indexer.storage.locks import exclusive
from forebear.indexer.storage.manifest import Checkpoint, IndexSpec, Manifest
from forebear.progress import counted

if TYPE_CHECKING:
    from typing_extensions import Unpack


def refit_index(
    folder: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    devices: Sequence[str | int] = (),
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Fit bases, reductions, EK-FAC and calibration beyond the head to the live rows, and sketch all rows again.

    If no row was retired, the sketches are those of a build from scratch over all rows, to the byte if its shards hold
    the same rows. If rows were retired, the fit is to the live rows, and row numbers stay. The head needs no fit.

    Args:
        folder: The index.
        model: Path of the run, or of the last checkpoint, if it has moved.
        device: Device that models run on.
        devices: In place of ``device`` several, each with a process of its own, as of a build.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. ``force`` removes the files of an
            interrupted change, and fits again even if no row was appended or retired.

    Raises:
        InputError: The index has no scope beyond the head.
        MismatchError: The models are not those of the index.
        OutputExistsError: Another change is unfinished, or a refit is, and ``resume`` is not set.
        InUseError: Another process is writing there.
    """
    folder, work = path_of(folder), Work.of(work_keywords, device, devices)
    Index.open(folder)
    with exclusive(folder / LOCK_NAME, str(folder)):
        index = Index.open(folder)
        index.check_texts_held("fitting again")
        old = index.manifest
        if not old.spec.sketched_scopes:
            raise InputError(f"{folder} holds the head alone, which is exact: there is nothing to fit again.")
        change = {"kind": "refit"}
        done = was_done(folder, old, change)
        journal = unfinished(folder, old, discard=work.force and not work.resume)
        if done or (journal is None and old.fit_age.is_current and (work.resume or not work.force)):
            work.tell(f"{folder} is fitted to its {old.n_live:,} live rows: nothing is left to do.")
            return index
        check_change(folder, journal, change, goes_on=work.resume)
        checkpoints = checkpoints_now(index, model)
        last = load_checked(checkpoints[-1], old.spec, work.device)
        where = computed_on(last.device, last.precision)
        same_device_or_refuse(journal, where, folder)
        if (warning := old.device_warning(where, "fits beyond the head are made")) is not None:
            work.warn(warning)
        begin_change(folder, old, change, journal, where)
        generation = old.generation + 1
        fit: dict[str, Any] = {"generation": generation, "n_rows": old.n_rows, "n_retired": old.n_retired}
        if elsewhere := old.elsewhere(where):
            fit["computed_on"] = elsewhere
        manifest = replace(old, generation=generation, fit=fit, calibration={})
        with as_begun(old.spec.n_threads, last.device):
            _write_sketches(_SketchWriter(index, folder / manifest.fitted_name(""), checkpoints, work), last)
            calibrate = calibration_by(last, _calibration_queries(old), work.progress)
            return finish(folder, manifest, index.retired, work.progress, calibrate)


def _calibration_queries(manifest: Manifest) -> int:
    """How many queries the build was told to calibrate with.

    The manifest of an older version has only the number that was used, which the number of rows may have limited. Then
    the default is taken if it is larger.
    """
    if manifest.calibration_queries is not None:
        return manifest.calibration_queries
    n_used = max((int(facts.get("n_queries", 0)) for facts in manifest.calibration.values()), default=0)
    return max(n_used, BuildOptions.calibration_queries) if n_used >= manifest.fit_age.n_rows else n_used


def _write_sketches(writer: _SketchWriter, last: Classifier) -> None:
    """Fit, and write the shards that are missing, on the devices that the work names; equal rows share numbers."""
    if not writer.work.is_shared or writer.is_written():
        writer.write(last)
        writer.overwrite_equal_rows(last)
        return
    writer.fit(last)
    write = partial(_write_claimed, writer.index.folder, writer.folder, writer.checkpoints)
    stages = [stage for checkpoint in writer.checkpoints for stage in writer.stages(checkpoint).items()]
    written = {name: writer.n_written(kinds) for name, kinds in stages}
    write_on_devices(write, writer.index.folder, writer.work, written=written)
    refuse_missing("sketches", writer.is_written())
    writer.overwrite_equal_rows(last)


def _write_claimed(
    folder: Path, fit_folder: Path, checkpoints: tuple[Checkpoint, ...], work: Work, claims: Claims, _rows: ShardRows
) -> None:
    """In the process of a device: sketch the shards that no other process has claimed."""
    index = Index.open(folder)
    with as_begun(index.manifest.spec.n_threads, pick_device(work.device)):
        _SketchWriter(index, fit_folder, checkpoints, work, claims).write()


@dataclass(frozen=True)
class _SketchWriter:
    """Fits to the live rows of an index, then sketches all its rows and spans; files that exist are kept.

    Attributes:
        index: The index whose rows are sketched.
        folder: The folder of the refit, under which files are written.
        checkpoints: The checkpoints in training order, with their present paths.
        work: Device of the models, and receiver of warnings and progress.
        claims: Which shards this process writes.
    """

    index: Index
    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    work: Work
    claims: Claims = field(default_factory=Claims)

    @property
    def _spec(self) -> IndexSpec:
        return self.index.manifest.spec_on(device_kind(pick_device(self.work.device)))

    @property
    def _has_spans(self) -> bool:
        return self.index.manifest.spec.spans is not None

    def stages(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        """The folders of the shards that each stage of a checkpoint writes, by its name."""
        last = checkpoint is self.checkpoints[-1]
        kinds = sketch_kinds(self.index.manifest, checkpoint.name)
        stages = {f"sketches {checkpoint.name}": kinds}
        return stages | ({"sketches of spans": list(map(span_gradients, kinds))} if last and self._has_spans else {})

    def is_written(self, checkpoint: Checkpoint | None = None) -> bool:
        """Whether all shards are written: of a checkpoint, or of all."""
        chosen = self.checkpoints if checkpoint is None else (checkpoint,)
        all_kinds = [kinds for one in chosen for kinds in self.stages(one).values()]
        return all(self.n_written(kinds) == self.index.manifest.n_rows for kinds in all_kinds)

    def n_written(self, kinds: Sequence[str]) -> int:
        """Rows of the shards that have all of these folders' files."""
        shards = enumerate(self.index.manifest.shards)
        return sum(stop - start for number, (start, stop) in shards if self._has(kinds, number))

    def _has(self, kinds: Sequence[str], shard: int) -> bool:
        return all((self.folder / kind / shard_file(shard)).is_file() for kind in kinds)

    def fit(self, last: Classifier) -> None:
        """Make the fits that are missing."""
        for checkpoint in self.checkpoints:
            if not self.is_written(checkpoint):
                self._sketchers(self._classifier(checkpoint, last), checkpoint)

    def write(self, last: Classifier | None = None) -> None:
        """Make the fits that are missing, and write the missing shards that this process can claim.

        Args:
            last: The model at the last checkpoint, where it is in memory.
        """
        for checkpoint in self.checkpoints:
            if self.is_written(checkpoint):
                continue
            classifier = self._classifier(checkpoint, last)
            sketchers = self._sketchers(classifier, checkpoint)
            writers = (self._write_rows, self._write_spans)
            for (name, kinds), write in zip(self.stages(checkpoint).items(), writers, strict=False):
                self._stage(name, kinds, partial(write, classifier, sketchers))

    def _classifier(self, checkpoint: Checkpoint, last: Classifier | None) -> Classifier:
        if last is not None and checkpoint is self.checkpoints[-1]:
            return last
        return load_checked(checkpoint, self.index.manifest.spec, self.work.device)

    def _sketchers(self, classifier: Classifier, checkpoint: Checkpoint) -> dict[str, Sketcher]:
        """Sketchers of every scope, by the folder of their shards; fitted now if they were not before."""
        return fit_sketchers(
            self.folder, classifier, self._spec, checkpoint.name, self._sample,
            last=checkpoint is self.checkpoints[-1], stage=partial(counted, self.work.progress),
        )  # fmt: skip

    def overwrite_equal_rows(self, last: Classifier) -> None:
        """Give repeated rows and spans the sketches of the first, when all shards are written."""
        rows, shards = LabelledRows(), range(len(self.index.manifest.shards))
        for shard in shards:
            note_rows(rows, self.index.folder, shard, partial(encode, last))
        for checkpoint in self.checkpoints:
            of_rows, *_ = self.stages(checkpoint).values()
            overwrite_sketches(self.folder, of_rows, shards, rows)
        if self._has_spans:
            overwrite_spans(self.folder, of_rows, shards, noted_spans(self.index.folder, shards, last))

    def _stage(self, name: str, kinds: Sequence[str], write: Callable[[int, OnRows], None]) -> None:
        """Call ``write`` with the number of every shard that is missing and that this process can claim."""
        on_rows = counted(self.work.progress, name, self.index.manifest.n_rows)
        for number, (start, stop) in enumerate(self.index.manifest.shards):
            with self.claims.take(name, number, partial(self._has, kinds, number)) as is_ours:
                if is_ours:
                    write(number, on_rows)
                elif not self.claims.shared:
                    on_rows(stop - start)

    def _sample(self) -> Sample:
        """The rows that a build of the live rows would fit on."""
        live = self.index.live
        chosen = live[sample_rows(len(live), self.index.manifest.spec.seed)]
        return Sample(texts=self.index.text_lists(chosen), labels=self.index.targets(chosen))

    def _write_rows(
        self,
        classifier: Classifier,
        sketchers: dict[str, Sketcher],
        shard: int,
        on_rows: OnRows,
    ) -> None:
        start, stop = self.index.manifest.shards[shard]
        rows = np.arange(start, stop)
        encoded = Encoded(encode(classifier, self.index.text_lists(rows)))
        collectors = {kind: s.collector(len(rows), classifier.device, packs=True) for kind, s in sketchers.items()}
        run_pass(
            classifier, encoded, labels_seed(classifier.loss, self.index.targets(rows)),
            list(collectors.values()), batch_tokens=self._spec.batch_tokens, first_row=start,
            on_rows=on_rows, warn=self.work.warn,
        )  # fmt: skip
        for kind, collector in collectors.items():
            write_columns(
                self.folder / kind / shard_file(shard), collector.rows(start).columns(sketchers[kind].reduction)
            )

    def _write_spans(
        self,
        classifier: Classifier,
        sketchers: dict[str, Sketcher],
        shard: int,
        on_rows: OnRows,
    ) -> None:
        start, stop = self.index.manifest.shards[shard]
        store = self.index.spans()
        entries = store.entries_of(np.arange(start, stop))
        owners = store.rows[entries]
        encoded, read = mask_spans(classifier, self.index.text_lists(owners), store.spans(entries))
        if not read.all():
            raise CorruptIndexError(f"{self.index.folder}: a stored span of row {owners[~read][0]} is not in its text.")
        _, _, sketches = masked_pass(
            classifier, sketchers, replace(encoded, owners=owners - start), self.index.targets(owners),
            self._spec.batch_tokens, self.work.warn,
        )  # fmt: skip
        write_span_sketches(self.folder, shard_file(shard), sketches, sketchers)
        on_rows(stop - start)
