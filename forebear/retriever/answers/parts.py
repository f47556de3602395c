"""Answers to finished blocks of test rows, kept beside the file that they become: a run that was killed goes on.

The folder ``NAME.parts`` holds ``run.json``, which says what is answered, and a part for each finished block, named by
its first and last test row: the tables of its results as an Arrow IPC stream (a *file* of Arrow may hold one dictionary
a column, and every table has its own texts). After the stream stands the sha256 of all that is before it, where readers
of Arrow no longer look. When the last block is finished, the parts become the output file, and the folder goes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from forebear.errors import CorruptIndexError, InputError, OutputExistsError, is_out_of_memory
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.spans.finders import finder_sha256
from forebear.indexer.storage.arrow import file_sha256
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX, atomic_file, write_bytes
from forebear.indexer.storage.journal import same_or_refuse
from forebear.indexer.storage.locks import check_free, exclusive
from forebear.indexer.storage.manifest import digest_of, plain
from forebear.progress import tell_note, tell_warning
from forebear.retriever.answers.result_file import check_output, claimed_output, lock_of
from forebear.retriever.question.spec import Question

RUN_NAME = "run.json"
_PART = re.compile(r"\d+-\d+\.arrow")
_DIGEST_BYTES = 64  # of a sha256 as text
_CHUNK_BYTES = 1 << 20
_CODEC = pa.ipc.IpcWriteOptions(compression="zstd")


def folder_of(path: Path) -> Path:
    """The folder of the parts of an output file."""
    return path.with_name(path.name + ".parts")


def run_facts(
    question: Question, source: RowSource, facts: dict[str, Any], block_rows: int, **more: Any
) -> dict[str, Any]:
    """What decides the bytes of an answer, for a comparison by name when a run goes on.

    Args:
        question: The question.
        source: The test rows.
        facts: What the answer's metadata say; see ``Retriever.facts``. Names of places are left out.
        block_rows: Test rows that are asked together.
        **more: What else decides a table of results.
    """
    import torch

    from forebear import __version__

    told = {key: value for key, value in facts.items() if key not in ("index", "index_digest", "query_digest")}
    return {
        "index": {"index digest": facts["index_digest"]},
        "methods": {"methods": list(question.spec.methods)},
        "choices": vars(question.spec),
        "question": {"question digest": question.digest},
        "rows": _facts_of_rows(question, source),
        "how": {"forebear": __version__, "test rows of a block": block_rows, **more, **_flat(told)},
        "threads": torch.get_num_threads(),
    }


def _facts_of_rows(question: Question, source: RowSource) -> dict[str, Any]:
    """Number and digest of the test rows, of their other columns and of a user's function, where spans are asked for.

    Functions that find spans see all columns of a row.
    """
    names = None if source.label_names is None else list(source.label_names)
    found = {"number of test rows": source.n_rows, "test rows' sha256": source.sha256(), "label names": names}
    if any(method.spans for method in question.methods):
        digest = hashlib.sha256()
        for table in source.tables(list(source.other_columns())):
            for row in table.to_pylist():
                digest.update(repr(row).encode() + b"\n")
        found |= {"test rows' other columns": digest.hexdigest(), "finder": finder_sha256(str(question.query_spans))}
    return found


def _flat(facts: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Facts of facts under names such as ``methods.if.damping``, but for what was measured of answers meanwhile."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if name == "effect_measured":
            continue
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def check_parts(path: Path, *, resume: bool, force: bool) -> None:
    """Refuse, before any work, to go on with nothing, and to start anew over the parts of a run that was interrupted.

    Args:
        path: The output file.
        resume: Whether a run is to go on.
        force: Whether parts that are there may be removed; with ``resume``, whether the file may be replaced.

    Raises:
        InUseError: Another process is writing the file.
        InputError: There is nothing to resume.
        OutputExistsError: Parts are left, and neither ``resume`` nor ``force`` is set; or the folder is not forebear's.
    """
    if folder_of(path).exists():
        check_free(lock_of(path), str(path))
    _check_left(path, resume=resume, force=force)


def _check_foreign(path: Path) -> None:
    """Refuse a folder of the parts' name that holds something else."""
    folder = folder_of(path)
    if folder.exists():
        names = (
            [] if not folder.is_dir() else sorted(one.name.removesuffix(TEMPORARY_SUFFIX) for one in folder.iterdir())
        )
        foreign = [name for name in names if name != RUN_NAME and not _PART.fullmatch(name)]
        if foreign or not folder.is_dir():
            raise OutputExistsError(
                f"{folder} is where answers of {path.name} are kept until all are there, and holds something else"
                f"{f', {foreign[0]}' if foreign else ''}: it is left alone. Give another --out.",
                of="retrieve",
            )


def _check_left(path: Path, *, resume: bool, force: bool) -> None:
    _check_foreign(path)
    folder = folder_of(path)
    for lock in path.parent.glob(f"{glob.escape(path.name)}.*-*.lock"):
        check_free(lock, f"a shard of {path}")
    if resume:
        if not (folder / RUN_NAME).is_file():
            raise InputError(
                f"--resume: there is no {folder} of an interrupted run, so there is nothing to resume. "
                "Leave --resume out.",
                of="retrieve",
            )
        if path.exists() and not force:
            raise OutputExistsError(
                f"{path} exists beside {folder} of an interrupted run. Give --resume and --force to replace the file "
                "when the answers are complete.",
                of="retrieve",
            )
    elif not force and any(folder.glob("*.arrow")):
        raise OutputExistsError(
            f"{folder} holds answers of a run that was interrupted. Give --resume to go on with them, or --force to "
            "start anew.",
            of="retrieve",
        )


def remove_parts(path: Path) -> None:
    """Remove the parts of an output file, and what says of which run they are last; what cannot be removed stays."""
    folder = folder_of(path)
    with suppress(OSError):
        for one in sorted(folder.iterdir(), key=lambda one: one.name.startswith(RUN_NAME)):
            one.unlink()
        folder.rmdir()


@contextmanager
def kept_parts(
    path: Path, run: dict[str, Any], blocks: Iterable[tuple[int, int]], *, resume: bool, force: bool
) -> Iterator[Parts]:
    """Hold an output file's lock and its parts; they are removed at the end, but stay where the work breaks off.

    Args:
        path: The output file; to be written by ``table_writer`` within the context.
        run: What decides the answers: :func:`run_facts`.
        blocks: First test row of each block, and the one behind its last.
        resume: Go on with the parts that are there.
        force: Remove them; also, the file may be replaced.

    Raises:
        MismatchError: ``resume``, and the run was begun with something else; the first thing that differs is named.
        CorruptIndexError: What says of which run the parts are is damaged.
        StorageError: The disk is full, or the place cannot be written.

    And what :func:`check_parts` raises.
    """
    with claimed_output(path, force=force):
        _check_left(path, resume=resume, force=force)
        parts = Parts(path, plain(run), dict(blocks))
        if resume:
            parts.take_up()
            parts.tell_done()
        else:
            remove_parts(path)
        try:
            if not resume:
                parts.begin()
            yield parts
        except BaseException:
            if not parts.done:
                remove_parts(path)  # nothing is lost, and the next run need not be told what to do with it
            raise
        remove_parts(path)


@contextmanager
def kept_shard(path: Path, run: dict[str, Any], blocks: Iterable[tuple[int, int]], shard: str) -> Iterator[Parts]:
    """The parts of some blocks of an output file, which other processes write the other blocks of at the same time.

    Parts that are there and whole stay. When those of all shards are there, :func:`kept_parts` with ``resume`` makes
    the file of them.

    Args:
        path: The output file; it must not exist.
        run: What decides the answers: :func:`run_facts`.
        blocks: First test row of each block of the shard, and the one behind its last.
        shard: Name of the shard, such as ``3/8``.

    Raises:
        InUseError: Another process writes this shard, or the file.
        OutputExistsError: The file exists, or the folder of its parts is not forebear's.
        MismatchError: The parts that are there are answers to something else; the first thing that differs is named.
        CorruptIndexError: What says of which run the parts are is damaged.
    """
    check_output(path, force=False)
    with exclusive(_shard_lock(path, shard), f"shard {shard} of {path}"):
        check_free(lock_of(path), str(path))
        _check_foreign(path)
        parts = Parts(path, plain(run), dict(blocks))
        if (folder_of(path) / RUN_NAME).is_file():
            parts.take_up()
            if parts.done:
                parts.tell_done()
        else:
            parts.begin()
        yield parts


def _shard_lock(path: Path, shard: str) -> Path:
    return path.with_name(f"{path.name}.{shard.replace('/', '-')}.lock")


class Parts:
    """The parts of one output file, or of a shard of it.

    Attributes:
        done: First test rows of the blocks whose answers are there.
    """

    def __init__(self, path: Path, run: dict[str, Any], blocks: dict[int, int]) -> None:
        """Name the parts; nothing is read or written yet.

        Args:
            path: The output file.
            run: What decides the answers, as it comes back from JSON.
            blocks: The test row behind the last of each block, by its first.
        """
        self._folder, self._name, self._run, self._blocks = folder_of(path), path.name, run, blocks
        self._digest = digest_of({name: value for name, value in run.items() if name not in ("choices", "threads")})
        self.done: set[int] = set()

    @property
    def n_rows_done(self) -> int:
        """Test rows whose answers are there."""
        return sum(self._blocks[start] - start for start in self.done)

    @property
    def n_rows(self) -> int:
        """Test rows of all blocks."""
        return sum(stop - start for start, stop in self._blocks.items())

    @property
    def missing(self) -> set[int]:
        """First test rows of the blocks that are still to be asked."""
        return self._blocks.keys() - self.done

    def begin(self) -> None:
        """Write down what is answered."""
        write_bytes(self._folder / RUN_NAME, json.dumps(self._run, indent=1, allow_nan=False).encode() + b"\n")

    def take_up(self) -> None:
        """Check that the run that was interrupted is this one, and find its parts."""
        path = self._folder / RUN_NAME
        try:
            begun = json.loads(path.read_bytes())
            parts = [begun[name] for name in ("index", "methods", "rows", "choices", "question", "how")]
            threads = begun["threads"]
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError("it names no run")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptIndexError(f"{path} is damaged ({error}). Start anew with --force.", of="retrieve") from error
        for name in ("index", "methods", "rows", "choices", "question", "how"):
            if name != "choices" or begun["question"] != self._run["question"]:  # choices may be put in several ways
                same_or_refuse(begun[name], self._run[name], self._folder)
        if threads != self._run["threads"]:
            tell_warning(
                f"{self._folder} was begun with {threads} threads and goes on with {self._run['threads']}: the last "
                "bits of scores may differ from those of a run that was not interrupted."
            )
        for start in self._blocks:
            if self._is_whole(part := self._path(start)):
                self.done.add(start)
            elif part.exists():
                tell_warning(f"{part} is damaged: its test rows {start} to {self._blocks[start] - 1} are asked again.")

    def tell_done(self) -> None:
        """Say how many test rows are answered already."""
        n = f"{self.n_rows_done:,} of {self.n_rows:,}"
        tell_note(self._name, f"{n} test rows were answered before the interruption")

    def write(self, start: int, tables: Iterable[pa.Table]) -> None:
        """Keep the answers to the block that begins with test row ``start``: tables of one chunk each."""
        writer: pa.ipc.RecordBatchStreamWriter | None = None
        with atomic_file(self._path(start)) as handle:
            for table in tables:
                (batch,) = table.replace_schema_metadata({"run": self._digest}).to_batches()
                writer = writer or pa.ipc.new_stream(handle, batch.schema, options=_CODEC)
                writer.write_batch(batch)
            assert writer is not None  # a block has test rows, and each of them results
            writer.close()
            handle.flush()
            handle.write(file_sha256(Path(handle.name)).encode())
        self.done.add(start)

    def tables(self) -> Iterator[pa.Table]:
        """All results in the order of the test rows, one table at a time.

        Raises:
            CorruptIndexError: A part was altered since it was written.
        """
        for start in sorted(self._blocks):
            path = self._path(start)
            if not self._is_whole(path):
                raise CorruptIndexError(
                    f"{path} was altered while the other test rows were asked. Run the same command with --resume: its "
                    "test rows are asked again.",
                    of="retrieve",
                )
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:09d}-{self._blocks[start] - 1:09d}.arrow"

    def _is_whole(self, path: Path) -> bool:
        """Whether a part is as it was written, and of this run."""
        sha256 = hashlib.sha256()
        try:
            with path.open("rb") as file:
                left = path.stat().st_size - _DIGEST_BYTES
                while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                    sha256.update(chunk)
                    left -= len(chunk)
                if left or file.read() != sha256.hexdigest().encode():
                    return False
                file.seek(0)
                return (pa.ipc.open_stream(file).schema.metadata or {}).get(b"run") == self._digest.encode()
        except (OSError, pa.ArrowInvalid) as error:
            if is_out_of_memory(error):
                raise
            return False
