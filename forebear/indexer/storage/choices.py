"""The choices of an index: each is one field here, whether a user gives it or a manifest stores or compares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from forebear.progress import Progress, Tell

# The best compromise of three data sets in linear datamodeling scores of `if` and `rif`, with effects of the right size
# at the head; see docs/which-method.md.
DEFAULT_DAMPING = "0.3%"


def _of_part(part: str, default: Any, *, unused: Any, since_first: bool = False) -> Any:
    """A choice that counts only where an index has a part.

    Args:
        part: One of the names of :attr:`Choices.parts`.
        default: The value where the user gives none.
        unused: The value in the spec of an index without that part.
        since_first: Whether the manifests of the first version have the field. A later one is left out of a manifest
            where it is unused, so that the digests of older indexes still hold.
    """
    return field(default=default, metadata={"part": part, "unused": unused, "later": not since_first})


def _added(default: Any) -> Any:
    """A choice that counts in every index and is newer than the first ones, which were built as by ``default``."""
    return field(default=default, metadata={"unused": default, "later": True})


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices of a build that change stored numbers.

    :class:`~forebear.indexer.building.options.BuildOptions` are these choices as a user gives them, an
    :class:`~forebear.indexer.storage.manifest.IndexSpec` as an index stores them. A new choice needs one field here,
    and the code that uses it.
    """

    label_mode: str | None = None  # None or "binary-nli"
    max_length: int | None = None  # None: the model's limit, or 512 if it has none
    precision: str = "fp32"
    # Of the loss that the model was trained with: in a spec one number a class, or none; to a build also "balanced".
    class_weights: tuple[float | str, ...] = _added(())
    label_smoothing: float = _added(0.0)
    stores: tuple[str, ...] = ("features",)  # and "sbert", "words", "spans"
    words_tops: tuple[int, ...] = _of_part("words", (10,), unused=())  # positions kept a row, 0 for all: a store each
    words_precision: str = _of_part("words", "fp16", unused="fp16")
    spans: str | None = _of_part("spans", "clauses", unused=None)  # how the stored spans are found
    span_column: int = _of_part("spans", 0, unused=0)  # the text column that they are in
    scopes: tuple[str, ...] = ("head",)  # which is exact, and those that are sketched: "top-K", "all", "layer:NAME"
    # d, the number of coordinates of a row, in each representation and at each checkpoint
    sketch_dim: int = _of_part("sketches", 128, unused=0, since_first=True)
    sketch_bits: int = _of_part("sketches", 4096, unused=0)  # of the code of what the coordinates do not hold
    white_bits: int = _of_part("whitened", 5888, unused=0)  # code length of whitened sketches, 1,012 bytes a row in all
    # "leading": whitened sketches are made from plain ones where the damping allows it; "whole": from whole gradients
    whitening: str = _of_part("whitened", "leading", unused="whole")
    sketch_basis: str = _of_part("sketches", "mixed", unused="mixed")
    with_bias: bool = _of_part("sketches", False, unused=False)  # whether sketched scopes hold biases and LayerNorm
    curvature: str = _of_part("sketches", "ekfac", unused="none")  # of the sketched scopes: "ekfac" or "none"
    dampings: tuple[str, ...] = (DEFAULT_DAMPING,)  # "0.3%" of the largest eigenvalue, "0.1x" the mean one, "0.003"
    rep_refit: bool = False
    ann: str | None = None  # FAISS factory string; None: no FAISS index
    seed: int = 0
    batch_tokens: int | Literal["auto"] = "auto"  # "auto": as many as suit the device; in a spec always a number
    shard_rows: int = 4096

    @property
    def sketched_scopes(self) -> tuple[str, ...]:
        """The scopes beyond the head, which needs no sketch."""
        return tuple(scope for scope in self.scopes if scope != "head")

    @property
    def whitened(self) -> bool:
        """Whether sketched scopes have curvature, and sketches whitened by it, at each damping."""
        return bool(self.sketched_scopes and self.dampings) and self.curvature == "ekfac"

    @property
    def parts(self) -> frozenset[str]:
        """The parts of an index of these choices, out of ``words``, ``spans``, ``sketches`` and ``whitened``."""
        presence = {
            "words": "words" in self.stores,
            "spans": "spans" in self.stores,
            "sketches": bool(self.sketched_scopes),
            "whitened": self.whitened,
        }
        return frozenset(part for part, is_there in presence.items() if is_there)

    def in_use(self) -> dict[str, Any]:
        """The choices that change a number of this index, by name: without those of parts that the index lacks."""
        parts = self.parts
        return {f.name: getattr(self, f.name) for f in fields(Choices) if f.metadata.get("part") in (None, *parts)}

    def settled(self) -> dict[str, Any]:
        """Every choice, by name, as a spec stores it: choices that lead to the same numbers get the same values.

        The order of ``words_tops`` does not matter, for example, and choices of absent parts have their unused values.
        """
        values = {f.name: f.metadata["unused"] for f in fields(Choices) if "part" in f.metadata} | self.in_use()
        curvature = "ekfac" if self.whitened else "none"
        return values | {"words_tops": tuple(sorted(values["words_tops"])), "curvature": curvature}


class WorkKeywords(TypedDict, total=False):
    """Keyword arguments of every function that writes an index: :class:`~forebear.indexer.building.options.Work`."""

    resume: bool
    force: bool
    warn: Callable[[str | None], None]
    tell: Tell
    progress: Progress | bool


class PushKeywords(TypedDict, total=False):
    """What :meth:`Index.push_to_hub` takes, for type checkers."""

    with_texts: bool
    model: str | None
    private: bool
    message: str | None
    token: str | None


class BuildKeywords(WorkKeywords, total=False):
    """The fields of :class:`~forebear.indexer.building.options.BuildOptions`, and those of a build's work, as keywords.

    What :meth:`Index.build` takes, for type checkers.
    """

    label_mode: str | None
    max_length: int | None
    precision: str
    class_weights: Sequence[float | str]
    label_smoothing: float
    stores: Sequence[str]
    words_tops: Sequence[int]
    words_precision: str
    spans: str | None
    span_column: int
    scopes: Sequence[str]
    sketch_dim: int
    sketch_bits: int
    white_bits: int
    whitening: str
    sketch_basis: str
    with_bias: bool
    curvature: str
    dampings: Sequence[str]
    rep_refit: bool
    ann: str | None
    seed: int
    batch_tokens: int | Literal["auto"]
    shard_rows: int
    calibration_queries: int
    sentence_model: str
    keep_columns: Sequence[str]
    device: str
    devices: Sequence[str | int]


# Values of the fields that are newer than the first indexes, for a manifest that does not have them.
LATER_CHOICES = {f.name: f.metadata["unused"] for f in fields(Choices) if f.metadata.get("later")}
