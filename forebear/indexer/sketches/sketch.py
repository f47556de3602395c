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

import numpy as np
import torch
from typing_extensions import override

from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import (
    MemoryWarning,
    RowCollector,
    labels_seed,
    refuse_non_finite,
    run_pass,
)
from forebear.indexer.gradients.vectors import Vectors
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.encoding import Texts, n_rows_of
from forebear.indexer.model.forward import Forward
from forebear.indexer.sketches.packed import PackedCodes, packed, packed_there
from forebear.indexer.sketches.projector import Projector
from forebear.indexer.sketches.reduction import Reduction
from forebear.ratio import ratio


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


class Sketches(RowCollector):
    """Gathers sketches and norms; of rows that are only stored the codes as bits."""

    def __init__(
        self, projector: Projector, reduction: Reduction, n_rows: int, device: torch.device, *, packs: bool = False
    ) -> None:
        self.scope, self.takes_narrow = projector.scope, projector.rounded and device.type == "cpu"
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
