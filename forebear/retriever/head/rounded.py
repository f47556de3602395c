"""Products of rounded vectors: the terms of a query, rounded as the rows of a scan table are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from forebear.indexer.model.device.kept_arrays import DeviceMemory
from forebear.indexer.storage.scan_table import RoundedVectors, codes_of, norms_of
from forebear.retriever.head.scoring import Term

_PROBE_ROWS = 1024


@dataclass(frozen=True)
class UnitTerm:
    """A :class:`Term` scaled to length 1, rounded as the rows are, on the device of a scan.

    Its ``a`` vectors a query are columns, those of one ``a`` after another.
    """

    weight: float
    codes: torch.Tensor  # (h, a q) int8
    scales: torch.Tensor  # (a q,)
    coordinates: torch.Tensor  # (m, a q)
    left: torch.Tensor | None
    basis: torch.Tensor | None
    offset: float
    beside: np.ndarray  # length of what is beside the table's directions, over all a, with the left factor's, (q,)
    lost: np.ndarray  # the same of what rounding took from that

    def products(self, features: SentVectors, residuals: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write scores ``(n, q)`` before the weight, of rows with residuals ``(n, c)``."""
        found = out if self.basis is None else out.new_empty(len(out), self.coordinates.shape[1])
        _multiply(features.codes, self.codes, out=found)
        found.mul_(features.scales[:, None]).mul_(self.scales)
        found.addmm_(features.coordinates, self.coordinates)
        if self.basis is not None:
            assert residuals is not None
            reduced = residuals @ self.basis.T
            parts = found.view(len(found), reduced.shape[1], -1).mul_(reduced[:, :, None])
            torch.sum(parts, dim=1, out=out)
            return
        if self.offset:
            found += self.offset
        if self.left is not None:
            assert residuals is not None
            found *= residuals @ self.left.T


@dataclass(frozen=True)
class SentVectors:
    """Rounded vectors of some rows on the device of a scan."""

    codes: torch.Tensor
    scales: torch.Tensor
    coordinates: torch.Tensor

    @classmethod
    def of(cls, vectors: RoundedVectors, memory: DeviceMemory) -> SentVectors:
        """Vectors of a block."""
        return cls(*(memory.tensor(values) for values in (vectors.codes, vectors.scales, vectors.coordinates)))

    def rows(self, start: int, stop: int) -> SentVectors:
        """Some of them."""
        return SentVectors(self.codes[start:stop], self.scales[start:stop], self.coordinates[start:stop])


def term_lengths(terms: Sequence[Term]) -> np.ndarray:
    """Euclidean length of each query vector over all its terms, ``(q,)``."""
    squares = np.zeros(1)
    for t in terms:
        if t.matrix is not None:
            part = (t.matrix.astype(np.float64) ** 2).sum(axis=(1, 2))
        else:
            assert t.right is not None
            part = (t.right.astype(np.float64) ** 2).sum(axis=1) + t.offset**2
            if t.left is not None:
                part = part * (t.left.astype(np.float64) ** 2).sum(axis=1)
        squares = squares + abs(t.weight) * part
    return np.sqrt(squares)


def unit_term(term: Term, divisor: np.ndarray, basis: np.ndarray, memory: DeviceMemory) -> UnitTerm:
    """A term divided by a number for each query ``(q,)``: by its matrix, else its left factor, else its right one."""
    directions = basis.astype(np.float64)
    left = None if term.left is None else term.left.astype(np.float64) / divisor[:, None]
    if term.matrix is not None:
        vectors = term.matrix.astype(np.float64).transpose(1, 0, 2) / divisor[:, None]
    else:
        assert term.right is not None
        vectors = term.right.astype(np.float64)[None]
        if left is None:
            vectors = vectors / divisor[:, None]
    flat = vectors.reshape(-1, vectors.shape[-1])
    coordinates = flat @ directions.T
    rest = flat - coordinates @ directions
    codes, scales = codes_of(rest)
    lost = rest - codes * scales.astype(np.float64)[:, None]

    def over_all(values: np.ndarray) -> np.ndarray:
        lengths = norms_of(values.reshape(len(vectors), len(divisor), -1).transpose(1, 0, 2).reshape(len(divisor), -1))
        return lengths if left is None else lengths * norms_of(left)

    def send(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else memory.send(np.ascontiguousarray(values, np.float32))

    coordinate_columns = send(coordinates.T)
    assert coordinate_columns is not None
    return UnitTerm(
        weight=term.weight,
        codes=memory.send(np.ascontiguousarray(codes.T)),
        scales=memory.send(scales),
        coordinates=coordinate_columns,
        left=send(left),
        basis=None if term.matrix is None else send(term.basis),
        offset=term.offset,
        beside=over_all(rest),
        lost=over_all(lost),
    )


def _multiply(rows: torch.Tensor, queries: torch.Tensor, out: torch.Tensor) -> None:
    """Write products ``(n, x)`` of codes ``(n, h)`` and ``(h, x)`` int8 as float32."""
    if rows.device.type == "cpu" and _multiplies_integers(rows.shape[1]):
        out.copy_(torch._int_mm(rows, queries))
    else:
        torch.mm(rows.float(), queries.float(), out=out)


@lru_cache(maxsize=8)
def _multiplies_integers(width: int) -> bool:
    """Whether this CPU multiplies integers of 8 bits rightly, and faster than as float32.

    Those without instructions for it would be slower, or saturate sums of two products at 16 bits. The answer
    changes no product: those of integers are exact in float32, too, up to a width
    of 1,040, and beyond it rounded as float32 is.
    """
    rows = torch.full((_PROBE_ROWS, width), 127, dtype=torch.int8)
    rows[1::2] = -127
    queries = torch.full((width, 16), 127, dtype=torch.int8)
    if not hasattr(torch, "_int_mm"):
        return False
    try:
        right = bool((torch._int_mm(rows, queries)[:2, 0] == torch.tensor([width, -width]) * 127**2).all())
    except RuntimeError:
        return False

    def seconds(multiply: Callable[[], torch.Tensor]) -> float:
        multiply()
        tries = []
        for _ in range(3):
            started = time.perf_counter()
            multiply()
            tries.append(time.perf_counter() - started)
        return min(tries)

    return right and seconds(lambda: torch._int_mm(rows, queries)) < seconds(lambda: rows.float() @ queries.float())
