"""What an index says of itself: the spec that decides every stored number, and the manifest around it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forebear.errors import CorruptIndexError
from forebear.indexer.storage.arrow import MEND, write_bytes
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.wording import worded

FORMAT_VERSION = 1


# What computes the stored numbers.
LIBRARIES = ("forebear", "torch", "transformers", "pyarrow", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu")


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of those that are installed."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found for name in names if (found := find(name))}


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: same value, same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


# Fields that came after the first indexes were written. One that holds the value given here, which is what it was
# before there was the field, is left out of the manifest: so the digests of the first indexes still hold.
_LATER: dict[str, Any] = {
    "sketch_bits": 0, "white_bits": 0, "sketch_basis": "mixed", "with_bias": False, "curvature": "none",
    "calibration": {}, "words_tops": (), "words_precision": "fp16", "spans": None, "span_column": 0,
    "spans_sha256": None, "fit": {}, "calibration_queries": None,
    "n_left_out": 0,
}  # fmt: skip


def stated(value: IndexSpec | Manifest | Segment) -> dict[str, Any]:
    """A dataclass as a dictionary, as it is written and digested."""
    return {name: v for name, v in asdict(value).items() if name not in _LATER or v != _LATER[name]}


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Every choice that changes a stored number. Same spec and rows, same index."""

    checkpoint_sha256: tuple[str, ...]  # weights, in training order; the last one is the model that is explained
    etas: tuple[float, ...]  # TracIn's weight of each checkpoint
    tokenizer_sha256: str
    label_names: tuple[str, ...]
    label_mode: str | None  # None or "binary-nli"
    text_columns: tuple[str, ...]  # order of encoding
    max_length: int
    precision: str
    stores: tuple[str, ...]  # "features", "sbert", "words", "spans"
    words_tops: tuple[int, ...] = ()  # positions kept a row, 0 for all: a word store each
    words_precision: str = "fp16"
    spans: str | None = None  # how the stored spans were found
    span_column: int = 0  # the text column that they are in
    spans_sha256: str | None = None  # of the file or the weights that found them, where a function or a reader did
    scopes: tuple[str, ...]  # "head", which is exact, and those that are sketched: "top-K", "all", "layer:NAME"
    sketch_dim: int  # d, coordinates a row, representation and checkpoint; 0 without a sketched scope
    sketch_bits: int = 0  # length of the code of what the coordinates leave over
    white_bits: int = 0  # the same for whitened sketches
    sketch_basis: str = "mixed"
    with_bias: bool = False  # whether the sketched scopes hold biases and LayerNorm
    curvature: str = "none"  # of the sketched scopes: "ekfac" or "none"
    sentence_sha256: str | None  # weights and tokenizer of the un-tuned sentence encoder
    dampings: tuple[str, ...]  # as given: "0.1x" is relative to the mean eigenvalue, "0.003" absolute
    rep_refit: bool
    ann: str | None  # FAISS factory string; None: chosen by size
    seed: int
    batch_tokens: int
    shard_rows: int
    n_threads: int  # last bits of a float depend on it

    @property
    def sketched_scopes(self) -> tuple[str, ...]:
        """The scopes beyond the head, which needs no sketch."""
        return tuple(scope for scope in self.scopes if scope != "head")

    @property
    def whitened(self) -> bool:
        """Whether sketched scopes have curvature, and sketches whitened by it, at each damping."""
        return self.curvature == "ekfac" and bool(self.dampings)

    def digest(self) -> str:
        """Name this spec in the manifest and in results."""
        return digest_of(stated(self))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of the training run."""

    name: str
    path: str
    eta: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows that came in with one build or append."""

    source: str
    rows_sha256: str
    start: int
    n_rows: int
    n_left_out: int = 0  # rows of the source without a label, which are not in the index

    @property
    def rows(self) -> dict[str, Any]:
        """What tells its rows from others, however their file is called."""
        return {"n_rows": self.n_rows, "rows_sha256": self.rows_sha256}


STALE_SHARE = 0.1  # of the rows that something was fitted to: with more changes since, it is warned of


@dataclass(frozen=True)
class FitAge:
    """How far bases, reductions, EK-FAC and calibration beyond the head are from the rows that are there now.

    Attributes:
        n_rows: Live rows when they were fitted (on a sample of these).
        appended: Rows that came since.
        retired: Rows that went since.
    """

    n_rows: int
    appended: int
    retired: int

    @property
    def is_current(self) -> bool:
        """Whether they are those of a build from scratch over the live rows."""
        return not self.appended and not self.retired

    @property
    def is_stale(self) -> bool:
        """Whether so much has changed that it is warned of."""
        return self.appended + self.retired > STALE_SHARE * self.n_rows

    def __str__(self) -> str:
        fitted = f"sketches, EK-FAC and calibration beyond the head were fitted on {self.n_rows:,} rows"
        if self.is_current:
            return f"{fitted}, those of the index"
        return worded(
            f"{fitted}; {self.appended:,} appended and {self.retired:,} retired since. Answers there, most of if and "
            "rif, are not quite those of a build from scratch: forebear index --refit fits them again"
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an index that is not in its Arrow files. Holds no clock time."""

    spec: IndexSpec
    checkpoints: tuple[Checkpoint, ...]
    sentence_model: str | None
    segments: tuple[Segment, ...]
    shards: tuple[tuple[int, int], ...]  # (first row, one past the last), in row order
    n_retired: int
    generation: int  # counts the changes (append, retire) since the first build
    feature_dim: int
    fit: dict[str, int] = field(default_factory=dict)  # of the last refit: generation, n_rows, n_retired
    curvature: dict[str, Any] = field(default_factory=dict)  # scope -> solver -> facts
    calibration_queries: int | None = None  # rows asked for by --calibrate; None: no scope needs it, or not known
    calibration: dict[str, Any] = field(default_factory=dict)  # scope -> method -> candidates by recall
    derived: dict[str, Any] = field(default_factory=dict)  # representation -> facts of its search structure
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path -> sha256, bytes
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Row numbers given out so far, retired rows included."""
        return sum(s.n_rows for s in self.segments)

    @property
    def n_live(self) -> int:
        """Rows that take part in answers."""
        return self.n_rows - self.n_retired

    @property
    def fit_age(self) -> FitAge:
        """Which rows what is fitted beyond the head was fitted to, and what has changed since."""
        n_rows = self.fit.get("n_rows", self.segments[0].n_rows)
        n_retired = self.fit.get("n_retired", 0)
        return FitAge(n_rows - n_retired, self.n_rows - n_rows, self.n_retired - n_retired)

    def fitted_name(self, name: str) -> str:
        """Where a file is that follows from what is fitted beyond the head; a refit writes all of them anew."""
        return f"refit/{self.fit['generation']:04d}/{name}" if self.fit else name

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the digest."""
        parts = {"spec": stated(self.spec), "segments": [stated(segment) for segment in self.segments]}
        return {
            "format": FORMAT_VERSION,
            "spec_digest": self.spec.digest(),
            **json.loads(json.dumps(stated(self) | parts, allow_nan=False)),
        }

    def digest(self) -> str:
        """The index's digest: it covers the sha256 of every file."""
        return digest_of(self.to_dict())

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically, with its own digest in it."""
        content = self.to_dict() | {"digest": self.digest()}
        write_bytes(
            folder / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        )

    def with_files(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """The same manifest, listing ``files``."""
        return replace(self, files=dict(sorted(files.items())))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        CorruptIndexError: It is no manifest, of another format, or was altered since it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        written = path.read_bytes()
        content = json.loads(written, parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise CorruptIndexError(f"{path} cannot be read as a manifest ({error}). {MEND}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise CorruptIndexError(
            f"{path} has index format {found}; this forebear reads format {FORMAT_VERSION}. Build the index again."
        )
    stated = content.pop("digest", None)
    if digest_of(content) != stated:
        raise CorruptIndexError(f"{path} was altered: its digest no longer matches its content. {MEND}")
    try:
        values = {f.name: content[f.name] for f in fields(Manifest) if f.name not in _LATER or f.name in content}
        values["spec"] = IndexSpec(**{k: _tuples(v) for k, v in content["spec"].items()})
        values["checkpoints"] = tuple(Checkpoint(**c) for c in content["checkpoints"])
        values["segments"] = tuple(Segment(**s) for s in content["segments"])
        values["shards"] = _tuples(content["shards"])
        manifest = Manifest(**values)
    except (KeyError, TypeError) as error:
        raise CorruptIndexError(
            f"{path} was written by another version of forebear ({error}). Build the index again with --force."
        ) from error
    if not written.endswith(b"\n"):  # without its last byte it is still JSON
        raise CorruptIndexError(f"{path} was altered: its last byte is missing. {MEND}")
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tuples(value: Any) -> Any:
    """JSON lists back to the tuples of the dataclasses."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
