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
import pyarrow as pa

from forebear.errors import CorruptIndexError, InputError
from forebear.indexer.building.finish import calibration_by, finish
from forebear.indexer.building.options import BuildOptions, Work
from forebear.indexer.building.shards import OnRows, as_begun, checkpoints_now, load_checked
from forebear.indexer.gradients.earlier_rows import EarlierSpans, LabelledRows, copy_repeats, note_rows
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_on, device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import Encoded, encode
from forebear.indexer.sketches.fitting import Sample, fit_sketchers, sample_rows, sketch_folders
from forebear.indexer.sketches.sketch import Sketcher
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.store import masked_pass, note_spans, write_span_sketches
from forebear.indexer.storage.arrow import write_columns
from forebear.indexer.storage.choices import WorkKeywords
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
    **work_keywords: Unpack[WorkKeywords],
) -> Index:
    """Fit bases, reductions, EK-FAC and calibration beyond the head to the live rows, and sketch all rows again.

    If no row was retired, the sketches are those of a build from scratch over all rows, to the byte if its shards hold
    the same rows. If rows were retired, the fit is to the live rows, and row numbers stay. The head needs no fit.

    Args:
        folder: The index.
        model: Path of the run, or of the last checkpoint, if it has moved.
        device: Device that models run on.
        **work_keywords: ``resume``, ``force``, ``warn``, ``tell`` and ``progress``; see
            :class:`~forebear.indexer.building.options.Work`. ``force`` removes the files of an
            interrupted change, and fits again even if no row was appended or retired.

    Raises:
        InputError: The index has no scope beyond the head.
        MismatchError: The models are not those of the index.
        OutputExistsError: Another change is unfinished, or a refit is, and ``resume`` is not set.
        InUseError: Another process is writing there.
    """
    folder, work = Path(folder), Work.of(work_keywords, device)
    Index.open(folder)
    with exclusive(folder / LOCK_NAME, str(folder)):
        index = Index.open(folder)
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
        last = load_checked(checkpoints[-1], old.spec, device)
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
            writer = _SketchWriter(index, folder / manifest.fitted_name(""), work)
            for checkpoint in checkpoints:
                is_last = checkpoint is checkpoints[-1]
                if not writer.is_written(checkpoint, last=is_last):
                    classifier = last if is_last else load_checked(checkpoint, old.spec, device)
                    writer.write(checkpoint, classifier, last=is_last)
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


@dataclass(frozen=True)
class _SketchWriter:
    """Fits to the live rows of an index, then sketches all its rows and spans; files that exist are kept.

    Attributes:
        index: The index whose rows are sketched.
        folder: The folder of the refit, under which files are written.
        work: Receives warnings and progress.
    """

    index: Index
    folder: Path
    work: Work
    _earlier: LabelledRows = field(default_factory=LabelledRows)
    _earlier_spans: EarlierSpans = field(default_factory=EarlierSpans)

    @property
    def _spec(self) -> IndexSpec:
        return self.index.manifest.spec_on(device_kind(pick_device(self.work.device)))

    @property
    def _has_spans(self) -> bool:
        return self.index.manifest.spec.spans is not None

    def is_written(self, checkpoint: Checkpoint, *, last: bool) -> bool:
        """Whether all files of a checkpoint are written."""
        kinds = self._kinds(checkpoint, last)
        return not any(self._missing(i, kinds) for i in range(len(self.index.manifest.shards)))

    def write(self, checkpoint: Checkpoint, classifier: Classifier, *, last: bool) -> None:
        """Make the fits of a checkpoint that are missing, and write its missing shards."""
        sketchers = fit_sketchers(
            self.folder, classifier, self._spec, checkpoint.name, self._sample,
            last=last, stage=partial(counted, self.work.progress),
        )  # fmt: skip
        self._stage(f"sketches {checkpoint.name}", list(sketchers), partial(self._write_rows, classifier, sketchers))
        if last and self._has_spans:
            kinds = [span_gradients(kind) for kind in sketchers]
            self._stage("sketches of spans", kinds, partial(self._write_spans, classifier, sketchers))

    def _stage(self, name: str, kinds: Sequence[str], write: Callable[[int, OnRows], None]) -> None:
        """Call ``write`` with the number of every shard that is missing."""
        on_rows = counted(self.work.progress, name, self.index.manifest.n_rows)
        for number, (start, stop) in enumerate(self.index.manifest.shards):
            if self._missing(number, kinds):
                write(number, on_rows)
            else:
                on_rows(stop - start)

    def _kinds(self, checkpoint: Checkpoint, last: bool) -> list[str]:
        spec = self.index.manifest.spec
        kinds = [
            kind
            for scope in spec.sketched_scopes
            for kind in sketch_folders(spec, scope, checkpoint.name, last=last).values()
        ]
        return kinds + [span_gradients(kind) for kind in kinds if last and self._has_spans]

    def _missing(self, shard: int, kinds: Sequence[str]) -> bool:
        return not all((self.folder / kind / _file(shard)).is_file() for kind in kinds)

    def _sample(self) -> Sample:
        """The rows that a build of the live rows would fit on."""
        live = self.index.live
        chosen = live[sample_rows(len(live), self.index.manifest.spec.seed)]
        return Sample(texts=self.index.text_lists(chosen), labels=self.index.targets(chosen))

    def _write_rows(self, classifier: Classifier, sketchers: dict[str, Sketcher], shard: int, on_rows: OnRows) -> None:
        start, stop = self.index.manifest.shards[shard]
        rows = np.arange(start, stop)
        encoded = Encoded(encode(classifier, self.index.text_lists(rows)))
        collectors = {kind: s.collector(len(rows), classifier.device, packs=True) for kind, s in sketchers.items()}
        run_pass(
            classifier, encoded, labels_seed(classifier.loss, self.index.targets(rows)),
            list(collectors.values()), batch_tokens=self._spec.batch_tokens, first_row=start,
            on_rows=on_rows, warn=self.work.warn,
        )  # fmt: skip
        for number in range(self._earlier.n_shards, shard + 1):
            note_rows(self._earlier, self.index.folder, number, classifier)
        for kind, collector in collectors.items():
            columns: dict[str, pa.Array | np.ndarray] = dict(collector.rows(start).columns(sketchers[kind].reduction))
            copy_repeats(self.folder / kind, columns, *self._earlier.labelled.repeats(shard))
            write_columns(self.folder / kind / _file(shard), columns)

    def _write_spans(self, classifier: Classifier, sketchers: dict[str, Sketcher], shard: int, on_rows: OnRows) -> None:
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
        for number in range(self._earlier_spans.n_shards, shard + 1):
            note_spans(self._earlier_spans, self.index.folder, number, classifier)
        repeats = self._earlier_spans.differences.repeats(shard)
        write_span_sketches(self.folder, _file(shard), sketches, sketchers, repeats)
        on_rows(stop - start)


def _file(shard: int) -> str:
    return f"{shard:05d}.arrow"
