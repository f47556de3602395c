"""What a user decides of a build: the choices that change stored numbers, and how the work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from forebear.errors import InputError
from forebear.indexer.curvature.damping import damping_number, refuse_nil_damping
from forebear.indexer.losses.choices import check_loss_choices
from forebear.indexer.model.device.picking import pick_devices
from forebear.indexer.rows.user_columns import ALL
from forebear.indexer.sketches.projector import BASES
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.storage.ann import check_factory
from forebear.indexer.storage.choices import Choices, WorkKeywords
from forebear.indexer.storage.manifest import Manifest
from forebear.indexer.words.gradients import PRECISIONS
from forebear.progress import Progress, Tell, ignore_warning, no_progress, progress_of, say_nothing

if TYPE_CHECKING:
    from typing_extensions import Self

STORES = ("features", "sbert", "words", "spans")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Choices):
    """Choices of ``forebear index``: those of :class:`Choices`, which the spec stores, and five that it does not.

    Attributes:
        calibration_queries: Number of queries that calibrate candidates beyond the head; 0: no calibration.
        sentence_model: The un-tuned encoder of the store ``sbert``; the spec has the digest of its weights.
        keep_columns: Columns of the rows that are kept besides texts and labels: names; ``all``, every column of
            strings, numbers, true and false, dates or times; or ``none``.
        device: Device that models run on.
        devices: In place of ``device`` several, each with a process of its own that writes shards: names, or numbers
            of CUDA devices.
    """

    calibration_queries: int = 74
    sentence_model: str = "minilm"
    keep_columns: tuple[str, ...] = (ALL,)
    device: str = "auto"
    devices: tuple[str | int, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, **changes: Any) -> Self:
        """The options by which an index was built, from its manifest.

        Args:
            manifest: The manifest of the index. Choices of parts that the index lacks get their defaults.
            **changes: Fields with another value.
        """
        chosen = manifest.spec.in_use()
        for name in ("calibration_queries", "sentence_model"):
            if (value := getattr(manifest, name)) is not None:
                chosen[name] = value
        return cls(**chosen | {"keep_columns": tuple(manifest.columns)} | changes)

    def check(self) -> None:
        """Refuse invalid choices, as far as that takes neither model nor rows.

        Raises:
            InputError: A choice is invalid; its option and the expected values are named.
        """
        unknown = sorted(set(self.stores) - set(STORES))
        if unknown or "features" not in self.stores:
            raise InputError(f"--store {','.join(self.stores)}: expected features, and sbert, words, spans as wanted.")
        if "head" not in self.scopes or len(set(self.scopes)) != len(self.scopes):
            raise InputError(
                f"--scope {','.join(self.scopes)}: expected head, and others once each, such as head,all.", of="index"
            )
        if not 8 <= self.sketch_dim <= 4096:
            raise InputError(f"--sketch-dim {self.sketch_dim}: expected 8 to 4096.")
        for name, bits in (("--sketch-bits", self.sketch_bits), ("--white-bits", self.white_bits)):
            if bits % 8 or not 0 <= bits <= 65_536:
                raise InputError(f"{name} {bits}: expected a multiple of 8, at most 65536, or 0 for no code.")
        for name, value, known in (
            ("--sketch-basis", self.sketch_basis, BASES),
            ("--whitening", self.whitening, ("leading", "whole")),
            ("--curvature", self.curvature, ("ekfac", "none")),
            ("--words-precision", self.words_precision, PRECISIONS),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r}: expected {', '.join(known[:-1])} or {known[-1]}.")
        tops = self.words_tops
        if not tops or min(tops) < 0 or len(set(tops)) < len(tops) or sum(top > 0 for top in tops) > 1:
            given = ",".join(map(str, tops))
            raise InputError(f"--words-top {given}: expected a number of positions, 0 for all of them, or both: 0,10.")
        if self.calibration_queries < 0:
            raise InputError(f"--calibrate {self.calibration_queries}: expected 0 (not at all) or more.")
        for given in self.dampings:
            damping_number(given)
            for scope in self.scopes if self.curvature != "none" else ():
                if scope != "head":
                    refuse_nil_damping(given, torch.float32, scope)
        tokens = self.batch_tokens
        if tokens != "auto" and (not isinstance(tokens, int) or tokens < 1):
            raise InputError(f"--batch-tokens {tokens}: expected auto, or a number of word pieces from 1 up.")
        if self.shard_rows < 1:
            raise InputError(f"--shard-rows {self.shard_rows}: expected 1 or more.")
        if "spans" in self.stores:
            if self.spans is None:
                raise InputError("--store spans: say by --spans how they are found.")
            span_finder(self.spans, self.span_column)
        check_factory(self.ann)
        check_loss_choices(self.class_weights, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Settings of a build or of a change of an index that no stored number depends on.

    Attributes:
        resume: Go on with an interrupted build or change; finished files are kept.
        force: Replace an existing index, or discard an unfinished change.
        warn: Called with what the user should know, such as that labels are taken as the model's own ids.
        tell: Called with one line when nothing is left to do.
        progress: Called with the stage, the rows done and the rows in all.
        device: Device that models run on.
        devices: Names of the devices that share the shards, of which ``device`` is the first; one, or several.
    """

    resume: bool = False
    force: bool = False
    warn: Callable[[str | None], None] = ignore_warning
    tell: Tell = say_nothing
    progress: Progress = no_progress
    device: str = "auto"
    devices: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether several processes write shards."""
        return len(self.devices) > 1

    def naming(self, place: str | Path, folder: Path) -> Self:
        """The same work, whose lines name ``place`` where they mean the folder that stands for it."""

        def named(line: str) -> str:
            return line.replace(str(folder), str(place))

        return replace(
            self,
            tell=lambda line: self.tell(named(line)),
            warn=lambda line: self.warn(None if line is None else named(line)),
        )

    @classmethod
    def of(cls, keywords: WorkKeywords, device: str = "auto", devices: Sequence[str | int] = ()) -> Self:
        """The work that keyword arguments ask for; ``progress=True`` is the usual bar.

        Raises:
            InputError: The devices are not there, see :func:`~forebear.indexer.model.device.picking.pick_devices`.
        """
        names = pick_devices(device, devices)
        values: dict[str, Any] = {
            **keywords,
            "progress": progress_of(keywords.get("progress", False)),
            "device": names[0],
            "devices": names,
        }
        return cls(**values)
