"""Factors of the rows' gradients: inputs a_t and output gradients d_t of a layer, of which G = sum_t d_t a_t^T."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, Self, TypeVar

import torch
from torch import nn

from forebear.indexer.model.device.copies import picks

ROWS_BYTES = 1 << 30  # of whole gradients that are formed at once


def wide(values: torch.Tensor) -> torch.Tensor:
    """bf16 (autocast) to fp32; fp32 and fp64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one block's gradients over a batch of ``b`` rows; several uses of a layer follow one another.

    Attributes:
        inputs: a, ``(b, t, n_in)``.
        deltas: d, the gradients at the output, ``(b, t, n_out)``; zero at padding.
    """

    inputs: torch.Tensor
    deltas: torch.Tensor

    def gradients(self) -> torch.Tensor:
        """G of every row, ``(b, n_out, n_in)``."""
        return torch.bmm(wide(self.deltas).transpose(1, 2), wide(self.inputs))

    def differences(self, owners: torch.Tensor) -> LayerFactors:
        """Factors of G - G' for rows followed by ``n`` other versions of them, tokens side by side.

        As the sum over t of (d_t - d'_t) a_t^T + d'_t (a_t - a'_t)^T, both small where G - G' is: were the factors of
        G and of -G' put side by side, the square of a small difference would be lost in float32.

        Args:
            owners: Position of the row that each version belongs to, ``(n,)``.
        """
        n = len(owners)
        (a, others_a), (d, others_d) = ((x[:-n][owners], x[-n:]) for x in (self.inputs, self.deltas))
        return LayerFactors(torch.cat([a, a - others_a], dim=1), torch.cat([d - others_d, others_d], dim=1))

    def cache_sized(self) -> Iterator[LayerFactors]:
        """The rows a few at a time: on a CPU one by one, so that a whole gradient stays in the cache (2x, measured).

        On a GPU as many whole gradients as take :data:`ROWS_BYTES`.
        """
        return self._split(1) if picks(self.inputs) else self.chunks()

    def chunks(self, n_bytes: int | None = None) -> Iterator[LayerFactors]:
        """The rows, as many at a time as have whole gradients of so many bytes; default :data:`ROWS_BYTES`."""
        size = self.inputs.element_size() * self.inputs.shape[2] * self.deltas.shape[2]
        return self._split(max(1, (n_bytes or ROWS_BYTES) // size))

    def live(self) -> LayerFactors:
        """Without the positions at which no row has an output gradient, on the CPU: often all but [CLS]."""
        if not picks(self.deltas):
            return self
        live = self.deltas.any(dim=2).any(dim=0)
        return self if bool(live.all()) else LayerFactors(self.inputs[:, live], self.deltas[:, live])

    def _split(self, step: int) -> Iterator[LayerFactors]:
        for start in range(0, len(self.inputs), step):
            yield LayerFactors(self.inputs[start : start + step], self.deltas[start : start + step])

    def nothing(self) -> Self:
        """Factors of one row whose gradient is zero, of these widths."""
        return replace(self, **{field.name: getattr(self, field.name)[:1, :0] for field in fields(self)})

    @classmethod
    def of_rows(cls, rows: Sequence[Self]) -> Self:
        """One batch of rows that were run one by one; shorter ones are filled up."""
        return cls(*(_filled([getattr(row, field.name) for row in rows]) for field in fields(cls)))

    @classmethod
    def of_uses(cls, uses: Sequence[Self]) -> Self:
        """One row after another, the uses of a layer side by side."""
        if len(uses) == 1:
            return uses[0]
        return cls(*(torch.cat([getattr(use, field.name) for use in uses], dim=1) for field in fields(cls)))


@dataclass(frozen=True)
class EmbeddingFactors(LayerFactors):
    """Factors of the word embeddings (or of the encoder's input): ``inputs`` are embeddings e_t, ``deltas`` gradients.

    Both are ``(b, t, e)``. An encoder and a decoder that embed words by one matrix are two uses.

    Attributes:
        ids: Token ids ``(b, t)`` int64, -1 where there is padding or a [PAD] in the text.
        pieces: The word piece of the row that each entry stands for, ``(b, t)`` int64, -1 where it is none.
    """

    ids: torch.Tensor
    pieces: torch.Tensor

    def differences(self, owners: torch.Tensor) -> EmbeddingFactors:
        """Both versions side by side, d' negated: a position may hold another word in each."""
        n = len(owners)
        whole = EmbeddingFactors(*(getattr(self, field.name)[:-n][owners] for field in fields(self)))
        other = EmbeddingFactors(*(getattr(self, field.name)[-n:] for field in fields(self)))
        return EmbeddingFactors.of_uses([whole, replace(other, deltas=-other.deltas)])


def _filled(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows ``(1, t, ...)`` as one tensor; ids and pieces are filled up with -1, numbers with 0."""
    fill = 0.0 if rows[0].is_floating_point() else -1
    return nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True, padding_value=fill)


Made = TypeVar("Made")


class OfLastFactors(Generic[Made]):
    """What was made of the factors that were shown last, while they are there: for the next projector of a pass."""

    def __init__(self) -> None:
        self._made: tuple[weakref.ref[LayerFactors], Made] | None = None

    def get(self, factors: LayerFactors, make: Callable[[], Made]) -> Made:
        """What ``make`` makes of ``factors``."""
        if self._made is None or self._made[0]() is not factors:
            self._made = None  # before its successor takes memory
            self._made = weakref.ref(factors, self._drop), make()
        return self._made[1]

    def _drop(self, factors: weakref.ref[LayerFactors]) -> None:
        """Let go of what was made of factors that are gone."""
        if self._made is not None and self._made[0] is factors:
            self._made = None


OnLayer = Callable[[str, LayerFactors], None]
