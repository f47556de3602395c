"""Choices of a build that change stored numbers, and how a build tells of its progress."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forebear.errors import InputError
from forebear.indexer.curvature.damping import refuse_nil_damping
from forebear.indexer.curvature.head import absolute_damping
from forebear.indexer.model.forward import DEFAULT_BATCH_TOKENS
from forebear.indexer.sketches.projector import BASES
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.storage.ann import check_factory
from forebear.indexer.words.gradients import PRECISIONS

STORES = ("features", "sbert", "words", "spans")
DEFAULT_SHARD_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Choices of ``forebear index`` that change stored numbers; see :class:`IndexSpec` for the rest."""

    stores: tuple[str, ...] = ("features",)
    scopes: tuple[str, ...] = ("head",)
    sketch_dim: int = 128
    sketch_bits: int = 4096
    white_bits: int = 5888  # with 128 coordinates: 1,012 bytes a row
    sketch_basis: str = "mixed"
    with_bias: bool = False
    curvature: str = "ekfac"  # of the scopes beyond the head
    calibration_queries: int = 74  # 0: candidates are not calibrated
    sentence_model: str = "minilm"
    words_tops: tuple[int, ...] = (10,)  # positions kept a row; 0: all of them
    words_precision: str = "fp16"
    spans: str = "clauses"
    span_column: int = 0
    dampings: tuple[str, ...] = ("0.1x",)  # empty: no curvature
    rep_refit: bool = False
    ann: str | None = None
    seed: int = 0
    precision: str = "fp32"
    max_length: int | None = None
    label_mode: str | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    shard_rows: int = DEFAULT_SHARD_ROWS
    device: str = "auto"

    def check(self) -> None:
        """Refuse what can be refused before anything is loaded."""
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
            absolute_damping(given, 1.0)
            for scope in self.scopes if self.curvature != "none" else ():
                if scope != "head":
                    refuse_nil_damping(given, torch.float32, scope)
        if self.batch_tokens < 1 or self.shard_rows < 1:
            raise InputError("--batch-tokens and --shard-rows must be at least 1.")
        if "spans" in self.stores:
            span_finder(self.spans, self.span_column)
        check_factory(self.ann)
