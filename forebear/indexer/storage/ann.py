"""All use of FAISS: which build is installed, how an index is written and read.

``faiss-cpu`` and ``faiss-gpu`` are two builds of one package that exclude each other (``forebear[cpu]`` and
``forebear[gpu]``); nothing outside this module knows which one is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forebear.conformal import supported_recall
from forebear.errors import CorruptIndexError, InputError, StorageError, first_line, is_out_of_memory
from forebear.indexer.storage.arrow import MEND, RowMatrix
from forebear.indexer.storage.atomic import atomic_file
from forebear.ratio import ratio

RECALL_TARGET = 0.99
_CALIBRATION_QUERIES = 128  # half of them choose the settings, the others state the recall
CALIBRATION_TOP = 10
_TRAIN_ROWS = 163_840  # 40 for each of 4,096 lists
_BLOCK_ROWS = 16_384


def import_faiss() -> Any:
    """The faiss module, or one line that says how to get it."""
    try:
        import faiss
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"FAISS is not usable here ({first_line(error)}). Install one of its two builds, never both: "
            "pip install 'forebear[cpu]', or 'forebear[gpu]' for CUDA 12."
        ) from error
    return faiss


def check_factory(factory: str | None) -> None:
    """Refuse a factory string that FAISS cannot read, before any work is done."""
    if factory is None:
        return
    faiss = import_faiss()
    try:
        faiss.index_factory(3840, factory)
    except RuntimeError as error:
        if "could not parse" in str(error):
            raise InputError(
                f"--ann {factory!r}: {_reason(error)}. Give a FAISS factory string, such as Flat or SQ8."
            ) from error


def _reason(error: RuntimeError) -> str:
    """FAISS' message, without the C++ function and line that it begins with."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])


def backend() -> str:
    """One line on the FAISS in use, and where it searches, for ``forebear info``."""
    try:
        faiss = import_faiss()
    except InputError:
        return "none (install forebear[cpu] or forebear[gpu])"
    build = "GPU" if hasattr(faiss, "StandardGpuResources") else "CPU"
    return f"faiss {faiss.__version__}, {build} build, for searches on the CPU"


@dataclass(frozen=True)
class AnnIndex:
    """A FAISS index over ``n`` vectors with its search settings.

    Attributes:
        faiss_index: The index; positions are those of the vectors it was built from.
        metric: ``cos`` (unit vectors, inner product) or ``euc`` (L2).
        exact: Whether its own scores are float32-exact (``Flat``).
        n_probe: Lists visited by an inverted file, else 0.
        widen: Candidates fetched for each result wanted.
    """

    faiss_index: Any
    metric: str
    exact: bool
    n_probe: int
    widen: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` nearest positions of each query, best first.

        Args:
            queries: ``(q, d)``; unit vectors for ``cos``.
            k: At most the number of vectors.

        Returns:
            Scores ``(q, k)`` (cosine, or minus the squared distance: larger is nearer) and positions ``(q, k)``,
            -1 where an inverted file found fewer.
        """
        if self.n_probe:
            import_faiss().extract_index_ivf(self.faiss_index).nprobe = self.n_probe
        scores, positions = self.faiss_index.search(np.ascontiguousarray(queries, np.float32), k)
        return (scores if self.metric == "cos" else -scores), positions


class Vectors:
    """Live rows of a stored matrix, streamed in blocks; scaled to unit length for ``cos``."""

    def __init__(self, matrix: RowMatrix, live: np.ndarray, metric: str) -> None:
        self._matrix, self._live, self._unit = matrix, live, metric == "cos"

    def __len__(self) -> int:
        return len(self._live)

    @property
    def width(self) -> int:
        """Width d of the vectors."""
        return self._matrix.width

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Vectors at positions among the live rows, ``(n, d)`` float32."""
        values = self._matrix.take(self._live[positions])
        return unit_rows(values) if self._unit else values

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first position, vectors) in order."""
        for start in range(0, len(self), _BLOCK_ROWS):
            yield start, self.take(np.arange(start, min(start + _BLOCK_ROWS, len(self))))


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float32; a zero row stays zero."""
    wide = values.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return ratio(wide, norms).astype(np.float32)


def build_ann(vectors: Vectors, metric: str, name: str, seed: int) -> tuple[AnnIndex, dict[str, Any]]:
    """Build an index over ``vectors`` and calibrate its search settings.

    Settings other than ``Flat``'s are raised until recall@10 over 64 of the rows, themselves excluded, reaches
    0.99. The recall of the settings so chosen over 64 other rows (for ``cos``, of the end where it is lower) is part
    of the returned facts, also where it fell short.

    Args:
        vectors: ``(n, d)``; unit length for ``cos``.
        metric: ``cos`` or ``euc``.
        name: FAISS factory string.
        seed: Which rows train and calibrate.

    Returns:
        The index, and its facts for the manifest.

    Raises:
        InputError: FAISS does not know the factory string, or cannot train it on so few rows.
    """
    faiss = import_faiss()
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cos" else faiss.METRIC_L2
    rng = np.random.default_rng(seed)
    try:
        built = faiss.index_factory(vectors.width, name, kind)
        if not built.is_trained:
            built.train(vectors.take(np.sort(rng.permutation(len(vectors))[:_TRAIN_ROWS])))
        for _, block in vectors.blocks():
            built.add(block)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"--ann {name!r} does not work for {len(vectors)} vectors of width {vectors.width}: {_reason(error)}"
        ) from error
    ann, recall, n_stating = _calibrate(built, vectors, metric, name, rng)
    return ann, {
        "factory": name,
        "n_probe": ann.n_probe,
        "widen": ann.widen,
        "recall": recall,
        **({} if ann.exact else {"n_stating": n_stating}),
        "metric": metric,
    }


def _calibrate(
    built: Any, vectors: Vectors, metric: str, name: str, rng: np.random.Generator
) -> tuple[AnnIndex, float, int]:
    """The cheapest settings that reach the recall target, their recall for other queries, and the number of these."""
    if name == "Flat":
        return AnnIndex(built, metric, True, 0, 2), 1.0, 0
    n_lists = int(import_faiss().extract_index_ivf(built).nlist) if "IVF" in name else 0
    if len(vectors) == 1:
        return AnnIndex(built, metric, False, n_lists, 4), 1.0, 0
    positions = rng.permutation(len(vectors))[:_CALIBRATION_QUERIES]
    choosing, stating = (np.sort(half) for half in np.array_split(positions, 2))
    top = min(CALIBRATION_TOP, len(vectors) - 1)

    def recall_over(positions: np.ndarray, sign: int = 1) -> Callable[[AnnIndex], float]:
        queries = sign * vectors.take(positions)
        truth = _nearest(vectors, queries, positions, metric, top)

        def recall(ann: AnnIndex) -> float:
            _, retrieved = ann.search(queries, min(len(vectors), ann.widen * top + 1))
            shares = [len(np.intersect1d(t, r)) / top for t, r in zip(truth, retrieved, strict=True)]
            return float(np.mean(shares))

        return recall

    chosen = _choose(built, metric, n_lists, recall_over(choosing))
    # Opponents by cosine are what is nearest to -v; the farthest rows in Euclidean distance come from the scan.
    ends = (1, -1) if metric == "cos" else (1,)
    return chosen, min(recall_over(stating, sign)(chosen) for sign in ends), len(stating)


def _choose(built: Any, metric: str, n_lists: int, recall: Callable[[AnnIndex], float]) -> AnnIndex:
    """The cheapest settings that reach the recall target, or those that come nearest to it."""
    probes = [*(p for p in (1, 4, 16, 64, 256, 1024) if p < n_lists), n_lists]
    best: tuple[float, AnnIndex] | None = None
    for n_probe in probes:
        for widen in (4, 10, 20, 40, 70, 100):
            ann = AnnIndex(built, metric, False, n_probe, widen)
            reached = recall(ann)
            if best is None or reached > best[0]:
                best = (reached, ann)
            if reached >= RECALL_TARGET:
                return ann
    assert best is not None
    return best[1]


def _nearest(vectors: Vectors, queries: np.ndarray, own_positions: np.ndarray, metric: str, top: int) -> np.ndarray:
    """Exact nearest positions of each query, ``(q, top)``, by brute force in blocks; its own position is excluded."""
    scores = np.empty((len(queries), len(vectors)), np.float32)
    for start, block in vectors.blocks():
        products = queries @ block.T
        if metric == "euc":
            products = 2 * products - (block**2).sum(axis=1)
        scores[:, start : start + len(block)] = products
    scores[np.arange(len(queries)), own_positions] = -np.inf
    return np.asarray(np.argpartition(-scores, top - 1, axis=1)[:, :top])


def expected_recall(facts: dict[str, Any]) -> float | None:
    """The recall to expect of the next query of a quantised or inverted index; below 1 even if all were found.

    By :mod:`forebear.conformal` for fixed settings: the recalls of the G calibration queries summed, divided by
    G + 1, so at most 64/65.

    Args:
        facts: The manifest's facts about the index, from :func:`build_ann`.

    Returns:
        The recall of the exact top 10. None where no queries measured it apart from those that chose the settings: an
        exact index, or one of an earlier version.
    """
    n_stating = facts.get("n_stating", 0)
    return float(facts["recall"]) * supported_recall(n_stating) if n_stating else None


def write_ann(ann: AnnIndex, path: Path) -> None:
    """Write the FAISS index atomically.

    FAISS' own file writer does not notice a disk that fills up while the file is closed; the handle used here does.
    """
    faiss = import_faiss()
    with atomic_file(path) as handle:
        try:
            faiss.write_index(ann.faiss_index, faiss.PyCallbackIOWriter(handle.write))
        except RuntimeError as error:
            raise StorageError(
                f"cannot write {path}: {str(error).strip().splitlines()[-1]}. Free some space."
            ) from error


def read_ann(path: Path, facts: dict[str, Any]) -> AnnIndex:
    """Read an index written by :func:`write_ann` with the facts that the manifest has of it."""
    try:
        built = import_faiss().read_index(str(path))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise CorruptIndexError(f"{path} cannot be read as a FAISS index. {MEND}") from error
    return AnnIndex(built, facts["metric"], facts["factory"] == "Flat", facts["n_probe"], facts["widen"])
