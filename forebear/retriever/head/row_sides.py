"""What a scan multiplies products of vectors by, and how far each row's score may be off: of rows alone, so kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.storage.scan_table import ScanBlock, ScanTable
from forebear.ratio import ratio
from forebear.retriever.head.scoring import Term
from forebear.retriever.question.methods import Metric

_KINDS = 4  # of which a table keeps the numbers: the ones used last


@dataclass(frozen=True)
class BlockSides:
    """Numbers of a block's rows that are the same for all queries of a kind; float32.

    Attributes:
        residuals: p - y times the term's weight, over the row's norm for cosines, ``(n, c)``, by term; empty for
            representations without residuals.
        factors: What products are multiplied by where there are no residuals, ``(n,)``, by term; empty where by the
            term's weight alone.
        squares: ||f||^2, where distances are compared; else None.
        sizes: Euclidean length of each row as it is scored: that of its gradient, over the row's norm for cosines.
    """

    residuals: tuple[np.ndarray, ...]
    factors: tuple[np.ndarray, ...]
    squares: np.ndarray | None
    sizes: np.ndarray


class RowSides:
    """The numbers of all rows of a table.

    Attributes:
        blocks: By block.
        reach: The rows' factors of how far a score may be off, ``(n, x)`` float32: by term what rounding took of the
            vector, what it left of it, and then the row's size.
    """

    def __init__(self, blocks: list[BlockSides], reach: np.ndarray, own: np.ndarray | None) -> None:
        """Of these numbers; ``own`` is held, so that no other array comes to have its id."""
        self.blocks, self.reach, self._own = blocks, reach, own
        self._of_groups: dict[int, np.ndarray] = {}

    def group_reach(self, group: int) -> np.ndarray:
        """Largest factors in each group of consecutive rows, ``(n / group, x)``; the last may be shorter."""
        if group not in self._of_groups:
            self._of_groups[group] = np.maximum.reduceat(self.reach, np.arange(0, len(self.reach), group), axis=0)
        return self._of_groups[group]


def row_sides(table: ScanTable, metric: Metric, terms: Sequence[Term], own: np.ndarray | None) -> RowSides:
    """The numbers of every block.

    Args:
        table: The scan table.
        metric: Of the method.
        terms: Of the query; only their weights and offsets matter.
        own: <H^-1 g_n, g_n> of every training row, ``(N,)``, where cosines are divided by its root.
    """
    weights, offsets = (tuple(getattr(term, name) for term in terms) for name in ("weight", "offset"))
    kind = (metric, weights, offsets, id(own))
    kept = table.kept.pop(kind, None)
    if kept is None:
        blocks, reach = zip(*(_of_block(block, metric, weights, offsets, own) for block in table.blocks), strict=True)
        kept = RowSides(list(blocks), np.concatenate(reach), own)
    table.kept[kind] = kept
    while len(table.kept) > _KINDS:
        del table.kept[next(iter(table.kept))]
    found: RowSides = kept
    return found


def _of_block(
    block: ScanBlock, metric: Metric, weights: Sequence[float], offsets: Sequence[float], own: np.ndarray | None
) -> tuple[BlockSides, np.ndarray]:
    reach, residuals, factors = [], [], []
    squares = np.zeros(len(block.rows))
    for i, (weight, offset) in enumerate(zip(weights, offsets, strict=True)):
        length, vectors = np.ones(len(block.rows)), block.features[i]
        if block.residuals:
            length = block.residual_norms[i].astype(np.float64)
        size = (block.feature_norms[i].astype(np.float64) + abs(offset)) * length
        if metric == "cos":  # a row of length 0 has products of 0 anyway
            divisor = np.sqrt(own[block.rows]) if own is not None else block.feature_norms[i] * length
            length, size = ratio(length, divisor, 1.0), ratio(size, divisor)
        if block.residuals:  # of a residual of length 0 nothing is left
            unit = ratio(block.residuals[i].astype(np.float64), block.residual_norms[i].astype(np.float64)[:, None])
            residuals.append((unit * (weight * length)[:, None]).astype(np.float32))
        elif metric == "cos":
            factors.append((weight * length).astype(np.float32))
        spread = abs(weight) * length * (2 if metric == "euc" else 1)
        reach += [spread * vectors.errors, spread * vectors.lengths]
        squares += abs(weight) * size**2
    reach += [squares, np.ones_like(squares)] if metric == "euc" else [np.sqrt(squares)]
    sides = BlockSides(
        tuple(residuals),
        tuple(factors),
        block.feature_norms[0] ** 2 if metric == "euc" else None,
        np.sqrt(squares).astype(np.float32),
    )
    return sides, np.stack(reach, axis=1).astype(np.float32)
