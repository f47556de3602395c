"""Gradient sketches as they are stored: leading coordinates, a one-bit code of what they leave, norms.

A raw sketch (:mod:`forebear.indexer.sketches.projector`) of some ten thousand numbers is scaled to unit length and
reduced to d coordinates by an uncentred PCA fitted on a sample of the rows. What the coordinates leave over is
summed over groups of numbers with random signs to ``bits`` numbers, of which the signs alone are stored, with one
factor a row that makes <c_q, signs_n> f_n an unbiased estimate of <c_q, c_n> (as in RaBitQ, Gao and Long 2024).
Queries keep their numbers.

    cos(g_q, g_n) is estimated by <x_q, x_n> + f_n <c_q, signs_n>, all scaled by the length of the raw sketch.

Measured on SST-2 (benchmarks/RESULTS.md): 784 bytes a row so spent find more of the exact top 10 than 960 spent on
PCA coordinates alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from forebear.errors import CorruptIndexError
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import (
    MemoryWarning,
    RowCollector,
    labels_seed,
    refuse_non_finite,
    run_pass,
)
from forebear.indexer.gradients.vectors import Vectors, row_lengths
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import fetch, send
from forebear.indexer.model.encoding import Texts, n_rows_of
from forebear.indexer.model.forward import Forward
from forebear.indexer.sketches.packed import PackedCodes, packed, packed_there
from forebear.indexer.sketches.projector import Projector
from forebear.indexer.storage.arrow import MEND, column, read_batches, record_batch, write_table
from forebear.ratio import ratio

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
    refuse_non_finite("the sample that sketches are fitted on", 0, unit)
    blocks = [unit[:, i : i + _FIT_COLUMNS] for i in range(0, raw_width, _FIT_COLUMNS)]
    gram = torch.zeros((n, n))
    for block in blocks:
        wide = torch.from_numpy(block.astype(np.float32))
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram.double())
    width = min(width, int((values > values[-1] * 1e-6).sum()))
    rest = (projector.squares, bits, seed, projector.bounds_norms)
    if not width:  # no row of the sample has a gradient
        return Reduction(np.eye(1, raw_width, dtype=np.float16), *rest)
    mix = (vectors[:, -width:] / values[-width:].sqrt()).flip(1).T.float()
    basis = np.concatenate([(mix @ torch.from_numpy(b.astype(np.float32))).numpy() for b in blocks], axis=1)
    return Reduction(basis.astype(np.float16), *rest)


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


@dataclass(frozen=True)
class SketchRows:
    """Sketches of ``n`` rows, in the order they were given.

    Attributes:
        coordinates: x, of the raw sketch scaled to length 1, ``(n, d)`` float32.
        codes: c, ``(n, bits)`` float32; ``(n, 0)`` where they were packed.
        lengths: Lengths of the raw sketches, ``(n,)`` float64.
        norms: ||G||, or that of the whitened gradient, ``(n,)`` float64.
        norm_bounds: The least and the most that the norms can be, ``(n, 2)`` float64; None where they are exact.
        packed: The codes as they are stored, of rows that are only stored; None of others.
    """

    coordinates: np.ndarray
    codes: np.ndarray
    lengths: np.ndarray
    norms: np.ndarray
    norm_bounds: np.ndarray | None = None
    packed: PackedCodes | None = None

    def take(self, positions: np.ndarray) -> SketchRows:
        """The sketches at some positions, whose codes were not packed."""
        bounds = None if self.norm_bounds is None else self.norm_bounds[positions]
        return SketchRows(
            self.coordinates[positions], self.codes[positions], self.lengths[positions], self.norms[positions], bounds
        )

    def norms_within(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Norms, and the least and the most that they can be, ``(n,)`` each."""
        if self.norm_bounds is None:
            return self.norms, self.norms, self.norms
        return self.norms, self.norm_bounds[:, 0], self.norm_bounds[:, 1]

    def residual_lengths(self, reduction: Reduction) -> np.ndarray:
        """Length of the part of G that the coordinates do not hold, at most, ``(n,)`` float64."""
        norms = self.norms_within()[2]
        held = (self.coordinates.astype(np.float64) @ reduction.orthonormaliser.T) * self.lengths[:, None]
        return np.asarray(np.sqrt(np.maximum(norms**2 - (held**2).sum(axis=1), 0.0)))

    def columns(self, reduction: Reduction) -> dict[str, np.ndarray]:
        """Columns of a gradient shard.

        Coordinates are stored as a unit vector in fp16, its length (``share``) and everything else in fp32: rounded
        vectors are scaled back to length 1 when they are read, for the cosines of a fine-tuned model's
        rows differ by less than what fp16 does to the length of a vector with one large component.
        """
        share = np.linalg.norm(self.coordinates.astype(np.float64), axis=1)
        unit = ratio(self.coordinates, share[:, None])
        out: dict[str, np.ndarray] = {"sketch": unit.astype(np.float16)}
        if reduction.bits:
            codes = packed(self.codes) if self.packed is None else self.packed
            out["code"], out["code_factor"] = codes.signs, codes.factors
        numbers = {
            "share": share, "length": self.lengths, "norm": self.norms,
            "residual_length": self.residual_lengths(reduction),
        }  # fmt: skip
        out = {name: v if v.ndim == 2 else v.astype(np.float32) for name, v in (out | numbers).items()}
        if self.norm_bounds is not None:  # rounded outwards
            outwards = np.array([-np.inf, np.inf], np.float32)
            out["norm_bounds"] = np.nextafter(self.norm_bounds.astype(np.float32), outwards)
        return out


class RawSketches(RowCollector):
    """Gathers raw sketches, scaled to length 1, to fit reductions on."""

    def __init__(self, projector: Projector, n_rows: int, device: torch.device) -> None:
        self.scope = projector.scope
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

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        (self.out[positions],) = arrays

    @override
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.out[copies] = self.out[sources]


def _unit(raw: torch.Tensor) -> torch.Tensor:
    """Raw sketches ``(b, D)`` float32 scaled to length 1, but for zeros."""
    lengths = row_lengths(raw)[:, None]
    return raw * (1 / torch.where(lengths > 0, lengths, 1.0)).float()


def scaled(unit: np.ndarray, weights: torch.Tensor) -> np.ndarray:
    """Raw sketches ``(n, D)`` float16 whose numbers are scaled by ``weights`` ``(D,)``, made length 1 again."""
    out = np.empty_like(unit)
    for start in range(0, len(unit), _FIT_ROWS):
        block = slice(start, start + _FIT_ROWS)
        out[block] = _unit(torch.from_numpy(unit[block].astype(np.float32)) * weights.cpu()).half().numpy()
    return out


class Sketches(RowCollector):
    """Gathers sketches and norms; of rows that are only stored the codes as bits."""

    def __init__(
        self, projector: Projector, reduction: Reduction, n_rows: int, device: torch.device, *, packs: bool = False
    ) -> None:
        self.scope = projector.scope
        self._projector, self._device, self._reduce = projector, device, reduction.on(device)
        self._coordinates = np.empty((n_rows, len(reduction.basis)), np.float32)
        self._lengths, self._norms = np.empty(n_rows), np.empty((n_rows, 3 if projector.bounds_norms else 1))
        self._codes = np.empty((n_rows, 0 if packs else reduction.bits), np.float32)
        self._packed: PackedCodes | None = None
        if packs:
            self._packed = PackedCodes(np.empty((n_rows, -(-reduction.bits // 8)), np.uint8), np.empty(n_rows))

    @override
    def begin(self, positions: list[int]) -> None:
        self._raw = torch.zeros((len(positions), self._reduce.width), device=self._device)
        shape = (self._norms.shape[1], len(positions))
        self._squares = torch.zeros(shape, dtype=torch.float64, device=self._device)

    @override
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        place, numbers, squares = self._projector.project(name, factors)
        self._raw[:, place] = numbers
        self._squares += squares

    @override
    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        lengths, x, codes = self._reduce(self._raw)
        of_codes = (codes,) if self._packed is None else packed_there(codes)
        return (x, lengths, self._squares.T.sqrt(), *of_codes)

    @property
    def _results(self) -> list[np.ndarray]:
        """One array for each tensor of :meth:`end`."""
        of_codes = [self._codes] if self._packed is None else [self._packed.signs, self._packed.factors]
        return [self._coordinates, self._lengths, self._norms, *of_codes]

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        for values, of_batch in zip(self._results, arrays, strict=True):
            values[positions] = of_batch

    @override
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        for values in self._results:
            values[copies] = values[sources]

    def rows(self, first_row: int = 0) -> SketchRows:
        """The sketches of all rows, after the pass.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; the row is named.
        """
        refuse_non_finite("the model", first_row, self._norms, self._coordinates)
        of_norms = _norms_and_bounds(self._norms)
        return SketchRows(self._coordinates, self._codes, self._lengths, *of_norms, self._packed)


def _norms_and_bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Norms and bounds of :class:`SketchRows`, of ``(n, 1)`` or ``(n, 3)``."""
    return values[:, 0], values[:, 1:] if values.shape[1] > 1 else None


@dataclass(frozen=True)
class Sketcher:
    """The maps from gradients to the stored sketches of one representation."""

    projector: Projector
    reduction: Reduction

    def of_matrix(self, vectors: Vectors, device: torch.device) -> SketchRows:
        """Sketches of whole vectors ``(q, n_out, n_in)`` by block."""
        reduce = self.reduction.on(device)
        raw, squares = self.projector.project_matrix(vectors)
        raw = torch.nn.functional.pad(raw, (0, reduce.width - raw.shape[1]))
        lengths, x, codes = reduce(raw)
        x_here, codes_here, lengths_here, norms = fetch(x, codes, lengths.double(), squares.sqrt())
        return SketchRows(x_here, codes_here, lengths_here, *_norms_and_bounds(norms.reshape(-1, len(x_here)).T))

    def collector(self, n_rows: int, device: torch.device, *, packs: bool = False) -> Sketches:
        """A collector of sketches for a pass over ``n_rows`` rows; codes of rows that are only stored are packed."""
        return Sketches(self.projector, self.reduction, n_rows, device, packs=packs)


def sketch_rows(
    classifier: Classifier,
    sketchers: Sequence[Sketcher],
    texts: Texts,
    labels: np.ndarray | None,
    *,
    batch_tokens: int,
    first_row: int = 0,
    on_rows: Callable[[int], None] | None = None,
    warn: MemoryWarning | None = None,
    packs: bool = False,
) -> tuple[list[SketchRows], Forward]:
    """Sketch the loss gradients of rows of text, for all representations in one pass.

    Args:
        classifier: The model whose gradients are sketched.
        sketchers: The representations.
        texts: One list a text column.
        labels: Class whose loss is differentiated, ``(n,)``; None: the predicted one.
        batch_tokens: Largest number of padded tokens in a batch.
        first_row: Row number of the first text, for messages.
        on_rows: Called with the number of rows after each batch.
        warn: Called when memory does not suffice for a batch.
        packs: Whether codes are packed, as for rows that are only stored.

    Returns:
        One :class:`SketchRows` a sketcher; features and logits from the same pass.

    Raises:
        NonFiniteError: A gradient is NaN or infinite; the row is named.
    """
    n_rows, device = n_rows_of(texts), classifier.device
    collectors = [sketcher.collector(n_rows, device, packs=packs) for sketcher in sketchers]
    forward = run_pass(
        classifier, texts, labels_seed(classifier.loss, labels), collectors,
        batch_tokens=batch_tokens, first_row=first_row, on_rows=on_rows, warn=warn,
    )  # fmt: skip
    return [collector.rows(first_row) for collector in collectors], forward
