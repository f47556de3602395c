"""The second reduction of a raw sketch: leading coordinates and a one-bit code, fitted on a sample of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from forebear.errors import CorruptIndexError
from forebear.indexer.gradients.dots import gram
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import (
    ArrayCollector,
    refuse_non_finite,
)
from forebear.indexer.gradients.vectors import row_lengths
from forebear.indexer.model.device.copies import send
from forebear.indexer.sketches.projector import Projector
from forebear.indexer.storage.arrow import MEND, column, read_batches, record_batch, write_table

_FIT_COLUMNS = 16_384
_FIT_ROWS = 64


@dataclass(frozen=True)
class Reduction:
    """The map from a raw sketch of unit length to stored coordinates and code.

    Attributes:
        basis: PCA directions as rows, orthonormal but for rounding, ``(d, D)`` float16.
        squares: Squared length of each row of the raw map, ``(D,)`` float32.
        bits: Length of the code; 0 for none.
        seed: Random seed of the code's groups and signs.
        from_plain: Whether raw sketches of whitened gradients are plain ones that were scaled.
    """

    basis: np.ndarray
    squares: np.ndarray
    bits: int
    seed: int
    from_plain: bool = False

    @cached_property
    def _signs(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 3]).choice([-1.0, 1.0], size=len(self.squares)).astype(np.float32)

    @cached_property
    def orthonormaliser(self) -> np.ndarray:
        """T ``(d, d)`` float64: T x are coordinates along orthonormal directions of the gradient itself.

        The map to x is M with M M^T = B diag(squares) B^T = L L^T; T = L^-1, so that ||T x|| <= ||g|| for x = M g.
        """
        wide = self.basis.astype(np.float64)
        gram = np.einsum("iD,D,jD->ij", wide, self.squares.astype(np.float64), wide, optimize=True)
        return np.asarray(np.linalg.inv(np.linalg.cholesky(gram)))

    @cached_property
    def _reducers(self) -> dict[torch.device, Reducer]:
        return {}

    def on(self, device: torch.device) -> Reducer:
        """The reduction as tensors on a device, which are made once: all shards of a pass take them."""
        if device not in self._reducers:
            self._reducers[device] = self._made_on(device)
        return self._reducers[device]

    def _made_on(self, device: torch.device) -> Reducer:
        basis, signs = send(self.basis, device).float(), send(self._signs, device)
        if not self.bits:
            return Reducer(basis, signs, None, 0)
        padding = -len(self.squares) % self.bits
        basis, signs = (torch.nn.functional.pad(values, (0, padding)) for values in (basis, signs))
        return Reducer(basis, signs, _pool(basis * signs, self.bits), self.bits)


@dataclass(frozen=True)
class Reducer:
    """A :class:`Reduction` on a device."""

    basis: torch.Tensor
    signs: torch.Tensor
    code_basis: torch.Tensor | None
    bits: int

    @property
    def width(self) -> int:
        """Width D of raw sketches, padded with zeros to a multiple of the code's length."""
        return len(self.signs)

    def __call__(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lengths ``(b,)`` of raw sketches; coordinates ``(b, d)``, code ``(b, bits)`` of them scaled to length 1.

        ``raw`` ``(b, width)`` float32 is overwritten: it is so large that a copy would slow the pass down.
        """
        lengths = row_lengths(raw)
        scale = (1 / torch.where(lengths > 0, lengths, 1.0))[:, None].float()
        x = (raw @ self.basis.T) * scale
        if self.code_basis is None:
            return lengths, x, x[:, :0]
        return lengths, x, _pool(raw.mul_(self.signs), self.bits) * scale - x @ self.code_basis


def _pool(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Sums of every bits-th entry, ``(b, bits)``; the width is a multiple of ``bits``."""
    return values.view(len(values), -1, bits).sum(dim=1)


def fit_reduction(unit: np.ndarray, projector: Projector, *, width: int, bits: int, seed: int) -> Reduction:
    """Fit the PCA (uncentred, unwhitened) on raw sketches of a sample of rows.

    Args:
        unit: Raw sketches scaled to length 1, ``(n, D)`` float16.
        projector: The map that made the raw sketches.
        width: Number of coordinates d; at most min(n, D) are used.
        bits: Length of the code; 0 for none.
        seed: Random seed of the code.

    Raises:
        NonFiniteError: A sketch is NaN or infinite.
    """
    n, raw_width = unit.shape
    blocks = torch.split(torch.from_numpy(unit), _FIT_COLUMNS, dim=1)  # numpy converts fp16 at a tenth of torch's rate
    products = torch.zeros((n, n))
    for block in blocks:
        products += gram(block.float().T)
    refuse_non_finite("the sample that sketches are fitted on", 0, products.diagonal().numpy())
    values, vectors = torch.linalg.eigh(products.double())
    width = min(width, int((values > values[-1] * 1e-6).sum()))
    rest = (projector.squares, bits, seed, projector.bounds_norms)
    if not width:  # no row of the sample has a gradient
        return Reduction(np.eye(1, raw_width, dtype=np.float16), *rest)
    mix = (vectors[:, -width:] / values[-width:].sqrt()).flip(1).T.float()
    basis = torch.cat([(mix @ block.float()).half() for block in blocks], dim=1)
    return Reduction(basis.numpy(), *rest)


def write_reduction(path: Path, reduction: Reduction) -> None:
    """Write a reduction: the basis, one direction a column, the squares, and the code's length and seed."""
    columns = {"basis": np.ascontiguousarray(reduction.basis.T), "squares": reduction.squares}
    settings = {"bits": str(reduction.bits), "seed": str(reduction.seed)}
    if reduction.from_plain:
        settings["from_plain"] = "true"
    batch = record_batch(columns).replace_schema_metadata(settings)
    write_table(path, [batch], batch.schema)


def read_reduction(path: Path) -> Reduction:
    """Memory-map the reduction that :func:`write_reduction` wrote.

    Raises:
        CorruptIndexError: The file holds no reduction.
    """
    batch = read_batches(path)[0]
    try:
        bits, seed = (int(batch.schema.metadata[key]) for key in (b"bits", b"seed"))
        from_plain = b"from_plain" in batch.schema.metadata
        return Reduction(column(batch, "basis").T, column(batch, "squares"), bits, seed, from_plain)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptIndexError(f"{path} holds no sketch map ({error}). {MEND}") from error


class RawSketches(ArrayCollector):
    """Gathers raw sketches, scaled to length 1, to fit reductions on."""

    def __init__(self, projector: Projector, n_rows: int, device: torch.device) -> None:
        self.scope, self.takes_narrow = projector.scope, projector.rounded and device.type == "cpu"
        self._projector, self._device = projector, device
        self.out = np.empty((n_rows, projector.width), np.float16)

    @override
    def begin(self, positions: list[int]) -> None:
        self._raw = torch.zeros((len(positions), self._projector.width), device=self._device)

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        place, numbers, _ = self._projector.project(name, factors)
        self._raw[:, place] = numbers.float()

    @override
    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return (_unit(self._raw).half(),)


def _unit(raw: torch.Tensor) -> torch.Tensor:
    """Raw sketches ``(b, D)`` float32 scaled to length 1, but for zeros."""
    lengths = row_lengths(raw)[:, None]
    return raw * (1 / torch.where(lengths > 0, lengths, 1.0)).float()


def scaled(unit: np.ndarray, weights: torch.Tensor) -> np.ndarray:
    """Raw sketches ``(n, D)`` float16 whose numbers are scaled by ``weights`` ``(D,)``, made length 1 again."""
    out = np.empty_like(unit)
    for start in range(0, len(unit), _FIT_ROWS):
        block = slice(start, start + _FIT_ROWS)
        out[block] = _unit(torch.from_numpy(unit[block]).float() * weights.cpu()).half().numpy()
    return out
