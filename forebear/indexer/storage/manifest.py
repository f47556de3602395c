"""The manifest of an index, and in it the spec: everything that decides a stored number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from forebear.errors import CorruptIndexError, is_out_of_memory
from forebear.indexer.model.device.batch_size import BATCH_TOKENS
from forebear.indexer.rows.row_format import SINGLE_LABEL, RowFormat
from forebear.indexer.storage.arrow import MEND
from forebear.indexer.storage.atomic import write_bytes
from forebear.indexer.storage.choices import LATER_CHOICES, Choices
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.wording import worded

if TYPE_CHECKING:
    from forebear.indexer.losses.loss import Loss

FORMAT_VERSION = 2
READ_FORMATS = (1, 2)  # what is read; every change of an index makes it one of FORMAT_VERSION


# The packages that compute the stored numbers.
LIBRARIES = ("forebear", "torch", "transformers", "pyarrow", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu")


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the named packages, without those that are not installed."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: found for name in names if (found := find(name))}


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: same value, same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: tuples as lists."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


# Fields that are newer than the first indexes, with the value that says what forebear did before the field existed. A
# field with this value is left out of the manifest, so that the digests of the first indexes still match.
_LATER: dict[str, Any] = LATER_CHOICES | {
    "calibration": {}, "spans_sha256": None, "fit": {}, "calibration_queries": None, "n_left_out": 0,
    "row_format": {}, "self_check": {}, "columns": {}, "user_columns_sha256": None, "problem_type": SINGLE_LABEL,
    "computed_on": {}, "without_texts": False, "parts": (),
}  # fmt: skip
# Fields that are written before a certain choice, and that choice: the order of older versions, so that a manifest
# has the same bytes.
_PLACES = {"text_columns": "max_length", "spans_sha256": "scopes", "sentence_sha256": "dampings"}


def stated(value: IndexSpec | Manifest | Segment) -> dict[str, Any]:
    """A dataclass as a dictionary, as it is written and digested."""
    values = asdict(value)
    return {name: values[name] for name in _ordered(value) if name not in _LATER or values[name] != _LATER[name]}


def _ordered(value: IndexSpec | Manifest | Segment) -> list[str]:
    names = [f.name for f in fields(value)]
    if isinstance(value, IndexSpec):
        choices = {f.name for f in fields(Choices)}
        first = [name for name in names if name not in (*choices, *_PLACES, "n_threads")]
        placed_before = {choice: [name_found] for name_found, choice in _PLACES.items()}
        placed = [name for choice in names if choice in choices for name in (*placed_before.get(choice, ()), choice)]
        return [*first, *placed, "n_threads"]
    return names


@dataclass(frozen=True, kw_only=True)
class IndexSpec(Choices):
    """Everything that changes a stored number: the choices, and what they were applied to. Same spec, same numbers."""

    checkpoint_sha256: tuple[str, ...]  # weights, in training order; the last one is the model that is explained
    etas: tuple[float, ...]  # TracIn's weight of each checkpoint
    tokenizer_sha256: str
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]  # order of encoding
    problem_type: str = SINGLE_LABEL  # what a row's target is
    max_length: int = field()
    batch_tokens: int = field()
    spans_sha256: str | None = None  # of the file or the weights that found spans, where a function or a reader did
    sentence_sha256: str | None  # weights and tokenizer of the un-tuned sentence encoder
    n_threads: int  # last bits of a float depend on it

    @property
    def loss(self) -> Loss:
        """What the checkpoints were trained to minimise."""
        from forebear.indexer.losses.kinds import loss_of  # torch: a manifest is read without it

        weights = tuple(float(weight) for weight in self.class_weights)
        return loss_of(self.problem_type, weights, self.label_smoothing)

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
    row_format: dict[str, Any] = field(default_factory=dict)  # how the source was read, as RowFormat.stated says it
    user_columns_sha256: str | None = None  # of the columns kept besides texts and labels
    computed_on: dict[str, Any] = field(default_factory=dict)  # where it is another kind of device than the build's

    @property
    def rows(self) -> dict[str, Any]:
        """Identity of the segment's rows: their number and their digests, whatever name their file has."""
        return {"n_rows": self.n_rows, "rows_sha256": self.rows_sha256, "user_columns_sha256": self.user_columns_sha256}


def kind_recorded(computed_on: dict[str, Any] | None) -> str:
    """The kind of device in a record of where numbers were computed; before there were records, the CPU."""
    return str((computed_on or {}).get("device", "cpu"))


STALE_SHARE = 0.1  # of the fitted rows: if more rows were appended or retired since, users are warned


@dataclass(frozen=True)
class FitAge:
    """How far the fits beyond the head (bases, reductions, EK-FAC, calibration) are from the rows that are live now.

    Attributes:
        n_rows: Live rows at the time of the fit, which took a sample of them.
        appended: Number of rows appended since.
        retired: Number of rows retired since.
    """

    n_rows: int
    appended: int
    retired: int

    @property
    def is_current(self) -> bool:
        """Whether the fits are those of a build from scratch over the live rows."""
        return not self.appended and not self.retired

    @property
    def is_stale(self) -> bool:
        """Whether so many rows came or went that users are warned."""
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
    columns: dict[str, str] = field(default_factory=dict)  # kept besides texts and labels: kinds by name
    without_texts: bool = False  # published without the rows' texts, which are empty
    self_check: dict[str, Any] = field(default_factory=dict)  # before the build: gradients against plain autograd
    computed_on: dict[str, Any] = field(default_factory=dict)  # of the build: device, precision, torch, attention
    # Of parts that something else computed than what was fitted first: name, shards, and what; "commit": the end.
    parts: tuple[dict[str, Any], ...] = ()
    # Of the last refit: generation, n_rows, n_retired; and computed_on, where it is another kind than the build's.
    fit: dict[str, Any] = field(default_factory=dict)
    curvature: dict[str, Any] = field(default_factory=dict)  # scope -> solver -> facts
    calibration_queries: int | None = (
        None  # --calibrate; None: no scope needs it, or an older version wrote the manifest
    )
    calibration: dict[str, Any] = field(default_factory=dict)  # scope -> method -> candidates by recall
    derived: dict[str, Any] = field(default_factory=dict)  # representation -> facts of its search structure
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path -> sha256, bytes
    libraries: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    @property
    def n_rows(self) -> int:
        """Row numbers given out so far, retired rows included."""
        return sum(s.n_rows for s in self.segments)

    @property
    def n_live(self) -> int:
        """Rows that take part in answers."""
        return self.n_rows - self.n_retired

    @property
    def device(self) -> str:
        """The kind of device that the index was built on; of an index that does not say so, the CPU."""
        return kind_recorded(self.computed_on)

    def elsewhere(self, computed_on: dict[str, Any]) -> dict[str, Any]:
        """What a change of the index records of its device: nothing where the build ran on the same kind."""
        return {} if kind_recorded(computed_on) == self.device else computed_on

    def spec_on(self, kind: str) -> IndexSpec:
        """The spec for work on a kind of device: where the build ran on another, batches are no larger than anywhere.

        The build's may be those of a large GPU.
        """
        if kind == self.device:
            return self.spec
        return replace(self.spec, batch_tokens=min(self.spec.batch_tokens, BATCH_TOKENS))

    def device_warning(self, computed_on: dict[str, Any], subject: str) -> str | None:
        """A warning where a change runs on another kind of device than the build did; None where it does not.

        Args:
            computed_on: Where models run now.
            subject: What runs, with its verb, such as ``the rows of train.csv run``.
        """
        if not (elsewhere := self.elsewhere(computed_on)):
            return None
        return (
            f"the index was built on {self.device}, and {subject} on {elsewhere['device']}: equal rows may differ in "
            "their last digits. The index records it."
        )

    @property
    def row_format(self) -> RowFormat:
        """How the rows of the build were read; indexes of older versions know the text columns alone."""
        first = self.segments[0].row_format
        stated = {"text_columns": list(self.spec.text_columns)} | first
        return RowFormat.of(stated, "the index", self.spec.problem_type)

    @property
    def fit_age(self) -> FitAge:
        """How many rows the fits beyond the head were made on, and how many rows came or went since."""
        n_rows = self.fit.get("n_rows", self.segments[0].n_rows)
        n_retired = self.fit.get("n_retired", 0)
        return FitAge(n_rows - n_retired, self.n_rows - n_rows, self.n_retired - n_retired)

    def fitted_name(self, name: str) -> str:
        """Path of a file that depends on fits beyond the head; each refit has a folder of its own for all of them."""
        return f"refit/{self.fit['generation']:04d}/{name}" if self.fit else name

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the digest."""
        parts = {"spec": stated(self.spec), "segments": [stated(segment) for segment in self.segments]}
        content: dict[str, Any] = plain(stated(self) | parts)
        return {"format": self.format, "spec_digest": self.spec.digest()} | content

    def digest(self) -> str:
        """The index's digest: it covers the sha256 of every file."""
        return digest_of(self.to_dict())

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically, with its own digest in it."""
        content = self.to_dict()
        content["digest"] = digest_of(content)
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / MANIFEST_NAME, text.encode() + b"\n")

    def with_files(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """A copy of the manifest that lists ``files``."""
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
        if is_out_of_memory(error):
            raise
        raise CorruptIndexError(f"{path} cannot be read as a manifest ({error}). {MEND}") from error
    number = content.get("format") if isinstance(content, dict) else None
    if number not in READ_FORMATS:
        raise CorruptIndexError(
            f"{path} has index format {number}; this forebear reads {' and '.join(map(str, READ_FORMATS))}. "
            "Build the index again."
        )
    stated_digest = content.pop("digest", None)
    if digest_of(content) != stated_digest:
        raise CorruptIndexError(f"{path} was altered: its digest no longer matches its content. {MEND}")
    try:
        manifest = manifest_of(content)
    except (KeyError, TypeError) as error:
        raise CorruptIndexError(
            f"{path} was written by another version of forebear ({error}). Build the index again with --force."
        ) from error
    if outside := [name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]:
        raise CorruptIndexError(f"{path} lists {outside[0]!r}, which is outside of the index. {MEND}")
    if not written.endswith(b"\n"):  # JSON that lacks its last byte still parses
        raise CorruptIndexError(f"{path} was altered: its last byte is missing. {MEND}")
    return manifest


def manifest_of(content: dict[str, Any]) -> Manifest:
    """The manifest that :meth:`Manifest.to_dict` gave.

    Raises:
        KeyError: A field is missing, as of another version.
        TypeError: A field is unknown.
    """
    values = {f.name: content[f.name] for f in fields(Manifest) if f.name not in _LATER or f.name in content}
    values["spec"] = _read_spec(content["spec"])
    values["checkpoints"] = tuple(Checkpoint(**c) for c in content["checkpoints"])
    values["segments"] = tuple(Segment(**s) for s in content["segments"])
    values["shards"] = _tuples(content["shards"])
    values["parts"] = tuple(content.get("parts", ()))
    return Manifest(**values)


def _read_spec(content: dict[str, Any]) -> IndexSpec:
    """A spec from its JSON; only fields of :data:`_LATER` may be missing."""
    names = [f.name for f in fields(IndexSpec) if f.name not in _LATER or f.name in content]
    values = {name: content[name] for name in names} | content  # an unknown field, of another version, raises TypeError
    return IndexSpec(**LATER_CHOICES | {name: _tuples(value) for name, value in values.items()})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tuples(value: Any) -> Any:
    """JSON lists back to the tuples of the dataclasses."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
