"""An index opened for reading: checked files, memory-mapped arrays."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from forebear.errors import MissingStoreError
from forebear.indexer.curvature.damping import find_damping, stored_damping
from forebear.indexer.curvature.ekfac import Ekfac, read_ekfac
from forebear.indexer.curvature.stored_head import StoredHead
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.scope_names import HEAD
from forebear.indexer.model.scopes import Scope, scope_of
from forebear.indexer.sketches.estimates import GradientStore, Proposal
from forebear.indexer.sketches.reduction import read_reduction
from forebear.indexer.spans.store import SpanStore, read_spans
from forebear.indexer.storage.ann import AnnIndex, read_ann
from forebear.indexer.storage.arrow import RowMatrix, column
from forebear.indexer.storage.layout import (
    MAP_NAME,
    PARTS,
    SPANS,
    curvature_name,
    gradient_folder,
    masked_folder,
    span_gradients,
    words_folder,
)
from forebear.indexer.storage.ragged import offsets
from forebear.indexer.storage.scan_table import ScanTable, read_scan_table
from forebear.indexer.storage.stored_rows import StoredRows
from forebear.indexer.training.model_choice import moved_paths
from forebear.indexer.training.run import Run, RunCheckpoint, run_of_checkpoint
from forebear.indexer.words.store import WordStore, read_word_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

    from forebear.indexer.storage.choices import BuildKeywords, PushKeywords
    from forebear.indexer.training.model_choice import ModelChoice


class Index(StoredRows):
    """An index folder, open for reading; its files are checked by :class:`~forebear.indexer.storage.files.IndexFiles`.

    Attributes:
        folder: The index folder.
        manifest: The manifest that is in force.
    """

    @classmethod
    def build(
        cls,
        model: str | Path | ModelChoice | PreTrainedModel | None,
        rows: Any,
        out: str | Path,
        labels: Sequence[Any] | None = None,
        *,
        checkpoints: Sequence[str] = (),
        etas: Sequence[float] = (),
        text_columns: Sequence[str] | None = None,
        label_column: str | Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        unlabelled: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        tokenizer: Any = None,
        **choices: Unpack[BuildKeywords],
    ) -> Index:
        """Build the index of a classifier's training rows, as ``forebear index`` does.

        Args:
            model: A run folder of ``forebear train``, a model folder or a hub name; or what ``choose_model`` chose; or
                a transformers model in memory, which is saved to the folder ``OUT-model`` to be asked later. A run
                says ``max_length``, ``label_mode``, class weights, label smoothing and how rows are read, where nothing
                else is given here.
            rows: A path, hub name, table or list of dicts, as ``open_rows`` takes; texts or pairs of texts; or a
                RowSource.
            out: Folder to write; must not exist, unless ``resume`` or ``force``.
            labels: Where ``rows`` are texts or pairs of texts: one label for each.
            checkpoints: ``("all",)``, or names or folders of checkpoints, as ``choose_model`` takes them.
            etas: TracIn's weight of each checkpoint, as ``choose_model`` takes them.
            text_columns: One or two columns of text, in order of encoding; default as in ``open_rows``.
            label_column: The column of labels, or several; default as in ``open_rows``.
            label_names: The names that integer labels index; default as in ``open_rows``.
            unlabelled: What becomes of rows without a label, as in ``open_rows``; default as the run, else
                ``drop-marked``.
            delimiter: Of a CSV or TSV file; default as in ``open_rows``.
            encoding: Of a text file; default as in ``open_rows``.
            tokenizer: Of a model in memory.
            **choices: The fields of :class:`BuildOptions`, such as ``scopes=("head", "all")``; and ``resume``,
                ``force``, ``warn`` (default: Python's warnings), ``tell`` and ``progress`` (True: the usual bar).

        Raises:
            ForebearError: As ``build_index`` and ``open_rows``.
        """
        # Named, not imported: building is written in terms of this module, which only opens what is built.
        building = importlib.import_module("forebear.indexer.building.build")
        columns = {
            "text_columns": text_columns,
            "label_column": label_column,
            "label_names": label_names,
            "unlabelled": unlabelled,
            "delimiter": delimiter,
            "encoding": encoding,
        }
        index: Index = building.build_from_model(
            model,
            rows,
            out,
            labels,
            checkpoints=checkpoints,
            etas=etas,
            columns=columns,
            tokenizer=tokenizer,
            **choices,
        )
        return index

    def push_to_hub(self, address: str, **choices: Unpack[PushKeywords]) -> str:
        """Publish this index on the model hub, with a card; the folder itself is left as it is.

        Args:
            address: ``hf://user/name``, or ``hf://user/name@branch``; a repository that does not exist is made.
            **choices: ``with_texts`` (default: the texts of the training rows stay here), ``model`` (the hub name at
                which readers find the last checkpoint), ``private``, ``message`` and ``token``.

        Returns:
            The address of the commit.

        Raises:
            InputError: No access, no way to the hub; or the index holds stores made of texts, and ``with_texts`` is
                not set.
        """
        commit: str = importlib.import_module("forebear.hub.transfer").push(self, address, **choices)
        return commit

    @cached_property
    def checkpoint_paths(self) -> list[str]:
        """Where the checkpoints lie, as the index remembers it, or :meth:`at` another place."""
        return moved_paths(None, self.manifest.checkpoints, self.folder)

    def at(self, model: str | None) -> Index:
        """This index with its checkpoints at another place: itself, if ``model`` is None.

        Args:
            model: The folder of the run, or of the last checkpoint. Nothing is loaded: a model is compared with the
                index when it is.

        Raises:
            InputError: The run lacks a checkpoint of the index.
        """
        if model is None:
            return self
        index = copy.copy(self)
        index.checkpoint_paths = moved_paths(model, self.manifest.checkpoints, self.folder)
        return index

    @property
    def run(self) -> tuple[Path, Run, RunCheckpoint] | None:
        """The run in which the last checkpoint lies; see :func:`run_of_checkpoint`."""
        return run_of_checkpoint(self.checkpoint_paths[-1])

    def features(self, checkpoint: int = -1) -> RowMatrix:
        """f of every row at a checkpoint (the last by default), ``(n, h)`` float32."""
        return self._matrix(f"features/{self.manifest.checkpoints[checkpoint].name}", "feature")

    def residuals(self, checkpoint: int = -1) -> RowMatrix:
        """p - y of every row at a checkpoint, ``(n, c)`` float32."""
        return self._matrix(f"features/{self.manifest.checkpoints[checkpoint].name}", "residual")

    def sentence(self) -> RowMatrix:
        """Un-tuned sentence embeddings, ``(n, s)`` float32."""
        if "sbert" not in self.manifest.spec.stores:
            raise MissingStoreError(
                f"{self.folder} holds no sentence embeddings. Build it with --store features,sbert."
            )
        return self._matrix("sentence", "embedding")

    def check_scope(self, scope: str) -> None:
        """Refuse a scope that the index does not hold.

        Raises:
            MissingStoreError: Naming the option that builds it.
        """
        if scope not in self.manifest.spec.scopes:
            raise MissingStoreError(
                f"{self.folder} holds the scope(s) {', '.join(self.manifest.spec.scopes)}, not {scope!r}. "
                f"Build it with --scope head,{scope}.",
                of="index",
            )

    def scope(self, classifier: Classifier, name: str) -> Scope:
        """The parameters of a scope at a checkpoint; a scope beyond the head has biases if the spec says so."""
        return scope_of(classifier, name, with_bias=self.manifest.spec.with_bias and name != HEAD)

    def gradients(
        self, scope: str, checkpoint: int = -1, damping: int | None = None, *, spans: bool = False
    ) -> GradientStore:
        """Sketches and norms of every row over a sketched scope.

        Args:
            scope: Name of a scope beyond the head.
            checkpoint: Position of the checkpoint, the last by default.
            damping: Number of a stored damping; the sketches are then those of gradients whitened with it, at the last
                checkpoint. None: gradients as they are.
            spans: Whether the sketches are those of what every span adds to its row's gradient, at the last checkpoint.
        """
        self.check_scope(scope)
        kind = gradient_folder(scope, self.manifest.checkpoints[checkpoint].name, damping)
        return self.gradient_store(kind, spans=spans)

    def spans(self) -> SpanStore:
        """Every span of every row.

        Raises:
            MissingStoreError: The index holds none.
        """
        if self.manifest.spec.spans is None:
            raise MissingStoreError(f"{self.folder} holds no spans. Build it with --store features,spans.")
        key = "span store"
        if key not in self._cache:
            masked = self._shards(masked_folder(self.manifest.checkpoints[-1].name))
            self._cache[key] = read_spans(self._shards(SPANS), masked)
        store: SpanStore = self._cache[key]
        return store

    @cached_property
    def live_spans(self) -> np.ndarray:
        """Entries of the span store whose rows take part in answers, ascending."""
        return self.spans().entries_of(self.live)

    def gradient_store(self, kind: str, *, spans: bool = False) -> GradientStore:
        """Sketches of one representation, by its folder: of the rows' gradients, or of what spans add to them."""
        key = ("gradients", kind, spans)
        if key not in self._cache:
            shards = self._shards(self.manifest.fitted_name(span_gradients(kind) if spans else kind))

            def whole(name: str) -> np.ndarray:
                return np.concatenate([column(batch, name) for batch in shards])

            (reduction,) = self.checked(self.manifest.fitted_name(f"{kind}/{MAP_NAME}"))
            names = shards[0].schema.names

            def matrix(name: str) -> RowMatrix | None:
                return RowMatrix([column(batch, name) for batch in shards]) if name in names else None

            coded = "code" in names
            self._cache[key] = GradientStore(
                sketches=RowMatrix([column(batch, "sketch") for batch in shards]),
                codes=matrix("code"),
                code_factors=whole("code_factor") if coded else np.zeros_like(whole("share")),
                shares=whole("share"),
                lengths=whole("length"),
                norms=whole("norm"),
                residual_lengths=whole("residual_length"),
                reduction=read_reduction(reduction),
                norm_bounds=matrix("norm_bounds"),
            )
        store: GradientStore = self._cache[key]
        return store

    def ekfac(self, scope: str) -> Ekfac:
        """EK-FAC of a scope beyond the head, at the last checkpoint."""
        self.check_scope(scope)
        if not self.manifest.spec.whitened:
            raise MissingStoreError(
                f"{self.folder} holds no curvature of scope {scope}: it was built with --curvature none or --damping "
                "none. Build it without them, or ask with --curvature cg, lissa or identity.",
                of="index",
            )
        key = ("ekfac", scope)
        if key not in self._cache:
            self._cache[key] = read_ekfac(self.checked(self.manifest.fitted_name(curvature_name(scope)))[0])
        ekfac: Ekfac = self._cache[key]
        return ekfac

    def ekfac_damping(self, scope: str, given: str | None = None) -> tuple[int, float]:
        """Number and size of one stored damping of a deeper scope; the first one by default.

        Raises:
            MissingStoreError: The index has no curvature of the scope, or not at this damping.
        """
        self.ekfac(scope)
        stored = self.manifest.curvature[scope]["ekfac"]["dampings"]
        number = stored_damping(stored, given, f"{self.folder} holds the curvature of scope {scope}")
        return number, float(stored[number]["damping"])

    def find_ekfac_damping(self, scope: str, given: str | None = None) -> int | None:
        """Number of a stored damping of a deeper scope, the first one by default; None if it is not stored.

        Raises:
            MissingStoreError: The index has no curvature of the scope.
        """
        self.ekfac(scope)
        return find_damping(self.manifest.curvature[scope]["ekfac"]["dampings"], given)

    def calibrated(self, scope: str, method: str) -> dict[str, Any] | None:
        """The facts of a method's calibration at a scope beyond the head; None if it was not calibrated."""
        facts = self.manifest.calibration.get(scope, {}).get("methods", {}).get(method)
        return None if facts is None else dict(facts)

    def proposal(self, scope: str, method: str, *, cosine: bool) -> Proposal:
        """How a method's candidates are chosen at a scope: as calibration chose; by the estimates where it did not."""
        calibrated = self.calibrated(scope, method)
        if calibrated is None or "margin_unit" not in calibrated:  # of an earlier forebear
            return Proposal(cosine, 1.0)
        return Proposal(cosine, float(calibrated["code_weight"]), float(calibrated["margin"]))

    def word_files(self, kind: str) -> list[str]:
        """Files of one word store, in the order of :data:`PARTS`; an empty list before the store is merged."""
        names = [name for name in self.manifest.files if name.startswith(f"{kind}/")]
        return sorted(names, key=lambda name: PARTS.index(Path(name).name.split("-")[0]))

    def words(self, top: int, checkpoint: int = -1) -> WordStore:
        """Words of every row at a checkpoint, of all positions (``top`` 0) or of the longest gradients.

        Raises:
            MissingStoreError: The index holds no such words.
        """
        self.check_words(top)
        kind = words_folder(self.manifest.checkpoints[checkpoint].name, top)
        if kind not in self._cache:
            self._cache[kind] = read_word_store(self.checked(*self.word_files(kind)))
        store: WordStore = self._cache[kind]
        return store

    def check_words(self, top: int | None = None) -> None:
        """Refuse words that the index does not hold.

        Raises:
            MissingStoreError: Naming the options that store them.
        """
        tops = self.manifest.spec.words_tops
        if not tops:
            wanted = "" if top is None else f" --words-top {top}"
            raise MissingStoreError(f"{self.folder} holds no words. Build it with --store features,words{wanted}.")
        if top is not None and top not in tops:
            held = " and ".join(f"those of the {t} longest gradients a row" if t else "all" for t in tops)
            raise MissingStoreError(
                f"{self.folder} holds {held} of the words. Build it with --store features,words --words-top "
                f"{','.join(map(str, sorted({*tops, top})))}."
            )

    def token_counts(self) -> sparse.csr_array:
        """How often each token occurs in each row, without special tokens, ``(n, vocabulary)``."""
        self.check_words()
        if "token counts" not in self._cache:
            shards = self._shards("tokens")
            counts = np.concatenate([np.diff(batch.column("token").offsets.to_numpy()) for batch in shards])
            tokens, values = (
                np.concatenate([batch.column(name).flatten().to_numpy() for batch in shards])
                for name in ("token", "count")
            )
            starts = offsets(counts)
            width = 1 + int(tokens.max(initial=0))
            self._cache["token counts"] = sparse.csr_array((values, tokens, starts), shape=(len(counts), width))
        return self._cache["token counts"]

    def _derived_path(self, name: str) -> Path:
        if name.startswith("sentence"):
            self.sentence()
        return self.checked(self.manifest.derived[name]["file"])[0]

    def scan_table(self, name: str) -> ScanTable:
        """Scan table ``head``, ``head-tracin`` or ``sentence``."""
        key = ("scan", name)
        if key not in self._cache:
            self._cache[key] = read_scan_table(self._derived_path(name))
        table: ScanTable = self._cache[key]
        return table

    def ann(self, name: str) -> AnnIndex:
        """FAISS index ``feature-cos``, ``-euc``, ``sentence-cos`` or ``-euc``; its positions are those of ``live``."""
        key = ("ann", name)
        if key not in self._cache:
            self._cache[key] = read_ann(self._derived_path(name), self.manifest.derived[name])
        ann: AnnIndex = self._cache[key]
        return ann

    @cached_property
    def head(self) -> StoredHead:
        """The curvature of the head at the last checkpoint."""
        return StoredHead(self, self.features(), self.residuals(), self.targets, self.live, self.loss)
