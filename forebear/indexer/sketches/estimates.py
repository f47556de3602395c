"""What scores are estimated from: stored sketches, those of the queries beside them, and a rule for candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forebear.indexer.model.device.copies import as_tensor
from forebear.indexer.sketches.reduction import Reduction
from forebear.indexer.sketches.sketch import SketchRows
from forebear.indexer.storage.arrow import RowMatrix
from forebear.ratio import ratio

FLOAT32 = 1e-5  # relative rounding of a score, with a margin
_LONG = 1e200  # one over a length that may be 0
CODE_ROWS = 4096  # rows whose codes are unpacked at once
RAW_ERROR = 0.03  # usual error of a cosine of two raw sketches, roughly, where coordinates hold nearly all of both
_SIGNS_OF_BYTES = as_tensor(2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) - 1)


@dataclass(frozen=True)
class GradientStore:
    """Stored sketches of one scope at one checkpoint, or of its whitened gradients.

    Attributes:
        sketches: Coordinates as unit vectors, ``(n, d)`` float16.
        codes: Packed signs, ``(n, bits / 8)`` uint8, or None.
        code_factors: f, ``(n,)`` float32.
        shares: Length of the coordinates of the raw sketch scaled to length 1, ``(n,)`` float32.
        lengths: Lengths of the raw sketches, ``(n,)`` float32.
        norms: Norm of the (whitened) gradient, ``(n,)`` float32.
        residual_lengths: Length of the part of that gradient that the coordinates do not hold, at most, ``(n,)``
            float32.
        reduction: The map that made coordinates and codes.
        norm_bounds: The least and the most that the norms can be, ``(n, 2)`` float32; None where they are exact.
    """

    sketches: RowMatrix
    codes: RowMatrix | None
    code_factors: np.ndarray
    shares: np.ndarray
    lengths: np.ndarray
    norms: np.ndarray
    residual_lengths: np.ndarray
    reduction: Reduction
    norm_bounds: RowMatrix | None = None

    def norms_within(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Norms of rows, and the least and the most that they can be, ``(n,)`` float64 each."""
        norms = self.norms[rows].astype(np.float64)
        if self.norm_bounds is None:
            return norms, norms, norms
        bounds = self.norm_bounds.take(rows).astype(np.float64)
        return norms, bounds[:, 0], bounds[:, 1]

    def coordinates(self, rows: np.ndarray) -> np.ndarray:
        """x of the given rows, ``(..., d)`` float32."""
        stored = as_tensor(self.sketches.take(rows).reshape(-1, self.sketches.width)).float()
        lengths = torch.linalg.vector_norm(stored, dim=1)
        scale = as_tensor(self.shares[np.asarray(rows).reshape(-1)]) / torch.where(lengths > 0, lengths, 1.0)
        return np.asarray(stored.mul_(scale[:, None]).numpy().reshape(*np.shape(rows), -1))


@dataclass(frozen=True)
class Part:
    """One checkpoint's part of the scores: sketches of the queries and of the training rows, and a weight.

    Attributes:
        weight: eta of the checkpoint, or 1.
        queries: Sketches of the queries' vectors, ``q`` of them.
        store: Stored sketches of the training rows.
    """

    weight: float
    queries: SketchRows
    store: GradientStore

    def query_coordinates(self, positions: np.ndarray) -> np.ndarray:
        """Coordinates of some queries, ``(q, d)`` float32."""
        return np.asarray(self.queries.coordinates[positions])

    def code_products(self, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """f_n <c_q, signs_n>, the code's estimate of what the coordinates leave out, ``(q, n)`` float32."""
        store = self.store
        if store.codes is None:
            return np.zeros((len(positions), len(rows)), np.float32)
        c = as_tensor(self.queries.codes[positions])
        out = np.empty((len(positions), len(rows)), np.float32)
        for start in range(0, len(rows), CODE_ROWS):
            block = as_tensor(store.codes.take(rows[start : start + CODE_ROWS]))
            out[:, start : start + len(block)] = code_products(c, block, store.reduction.bits).numpy()
        return np.asarray(out * store.code_factors[rows])


def may_be_best(products: np.ndarray, asked: np.ndarray, least: np.ndarray, most: np.ndarray, k: int) -> np.ndarray:
    """Which rows can be among the ``k`` largest or smallest cosines of some test row, ``(n,)`` bool.

    Args:
        products: What is divided by the rows' lengths, ``(q, n)``.
        asked: Which rows each test row is compared with, ``(q, n)`` bool.
        least: The least that each row's length can be, ``(n,)``.
        most: The most.
        k: From 1 up.
    """
    open_rows = np.zeros(len(least), bool)
    near, far = (ratio(1.0, lengths, otherwise=_LONG) for lengths in (most, least))
    for sign in (1.0, -1.0):  # both ends
        for product, mine in zip(sign * products, asked, strict=True):
            lower, upper = (np.where(mine, product * bound, -np.inf) for bound in (near, far))
            lower, upper = np.minimum(lower, upper), np.maximum(lower, upper)
            edge = np.partition(lower, -k)[-k] if k < len(lower) else -np.inf
            open_rows |= mine & (upper >= edge - FLOAT32 * abs(edge) if k < len(lower) else mine)
    return open_rows


def code_products(queries: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """<c_q, signs_n> of codes ``(q, bits)`` and packed signs ``(n, bits / 8)``, ``(q, n)`` float32, on their device.

    For one query on a CPU, sums of a table of what each byte of its code makes with each of 256 bytes, a quarter of the
    time.
    """
    on_cpu = codes.device.type == "cpu"
    if on_cpu and len(queries) == 1 and not bits % 8:
        table = queries.view(-1, 8) @ _SIGNS_OF_BYTES.T
        places = codes.long() + torch.arange(0, table.numel(), 256)
        return torch.take(table, places).sum(dim=1)[None]
    if on_cpu:
        ones = torch.from_numpy(np.unpackbits(codes.numpy(), axis=1, count=bits))
    else:
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)  # the first sign is the highest bit
        ones = (codes[:, :, None] >> places & 1).view(len(codes), -1)[:, :bits]
    return 2 * (queries @ ones.float().T) - queries.sum(dim=1, keepdim=True)


def factors_of(parts: Sequence[Part], rows: np.ndarray, *, cosine: bool) -> list[np.ndarray]:
    """For each part, the factor from estimated cosines to scores at some rows: lengths, or 1 for cosines."""
    if cosine:
        return [np.ones(rows.shape, np.float32) for _ in parts]
    return [part.weight * part.store.lengths[rows] for part in parts]


@dataclass(frozen=True)
class Proposal:
    """How candidates of one method are chosen: by their estimates, and a margin for the error that these may have.

    Attributes:
        cosine: Whether scores are cosines; otherwise dot products.
        code_weight: Share of the code's estimate that is counted, 0 to 1.
        margin: Margin of an estimate, in :meth:`units`.
    """

    cosine: bool
    code_weight: float
    margin: float = 0.0

    def units(self, parts: Sequence[Part], rows: np.ndarray) -> np.ndarray:
        """What an error of 1 is in scores of every query with rows ``(n,)``, or with its own ``(q, m)``; float32.

        The usual error of an estimate grows with what the coordinates of both sides leave over.
        """
        total: np.ndarray | None = None
        for part, factor in zip(parts, factors_of(parts, rows, cosine=self.cosine), strict=True):
            of_queries = residuals(np.linalg.norm(part.queries.coordinates, axis=1))[:, None]
            of_part = (of_queries * residuals(part.store.shares[rows]) + RAW_ERROR) * factor
            if not self.cosine:
                of_part *= part.queries.lengths[:, None]
            total = of_part if total is None else total + of_part
        assert total is not None
        return total.astype(np.float32)


def residuals(shares: np.ndarray) -> np.ndarray:
    """Lengths of what coordinates of these lengths leave of unit vectors, of the same shape."""
    return np.asarray(np.sqrt(np.maximum(1.0 - shares.astype(np.float64) ** 2, 0.0)))


def keep_best(
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    scores: torch.Tensor,
    rows: torch.Tensor,
    width: int,
    *,
    largest: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the rows kept so far and of new rows; of equal scores at the cut, lower row numbers are kept."""
    if kept is not None:
        scores, rows = torch.cat([kept[0], scores], dim=1), torch.cat([kept[1], rows], dim=1)
    width = min(width, scores.shape[1])
    values, positions = scores.topk(width, dim=1, largest=largest)
    equal = scores == values[:, -1:]
    for q in torch.nonzero(equal.sum(dim=1) > (values == values[:, -1:]).sum(dim=1)).flatten().tolist():
        better = torch.nonzero(values[q] != values[q, -1]).flatten()
        tied = torch.nonzero(equal[q]).flatten()
        positions[q] = torch.cat([positions[q, better], tied[rows[q, tied].argsort()[: width - len(better)]]])
    return values, rows.gather(1, positions)
