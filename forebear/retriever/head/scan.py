"""The scan: scores of factored rows by vectors of 8 bits, and how far rounding may have moved them.

A score is known to within its *reach*: the length that rounding took from the row times the query's length beside the
table's directions, and the other way round (Cauchy-Schwarz), and float32's own rounding. So the scan ends with the rows
that can be among the best k, usually little more than k, and no other row can.

On a CPU rows are visited by falling norm, until no later row can matter. A GPU reads all of them, so that the host need
not wait after each block for the answer whether it must go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable
from forebear.retriever.head.rounded import SentVectors, term_lengths, unit_term
from forebear.retriever.head.row_sides import BlockSides, row_sides
from forebear.retriever.head.scoring import Query

# Rounding of a float32 dot product of two unit vectors, with a margin: 4e-6 is over 60 units in the last place.
SCAN_TOLERANCE = 4e-6
GROUP_ROWS = 64  # rows of which only the best and the worst are looked at before the end, at most
_GROUPS = 32  # at least so many for each row that is wanted
_PRODUCTS = 1 << 18  # entries of a product that stay in the processor's cache until its groups are known
_LEAST_ROWS = 1024  # that are multiplied at once
_WIDER = 1 + 1e-4  # reaches are sums of a few float32 products
_PAIRS = 1 << 22  # scores of groups that are looked at together


Listed = list[np.ndarray | None]  # positions in a scan table, an array a query; None where they are too many


def group_rows(table: ScanTable, k: int) -> int:
    """Rows that are grouped, a power of two; fewer where there are few rows, or where groups would not end a block."""
    group = GROUP_ROWS
    while group > 1 and (len(table) < _GROUPS * group * k or any(len(b.rows) % group for b in table.blocks[:-1])):
        group //= 2
    return group


class Scan:
    """Scores of factored rows in scan order, for one batch of queries, each known to within its reach.

    Queries are scaled to length 1 and residuals to unit length with their norm beside them, so that tiny
    gradients keep their precision; scores come in the units of the exact score divided by ``scale``. For Euclidean
    distances a score is ``2 <q, f> - ||f||^2``, which ranks as minus the distance does.
    """

    def __init__(self, query: Query, table: ScanTable, memory: DeviceMemory = HOST) -> None:
        self.query, self.table, self.memory = query, table, memory
        self._metric = query.method.metric
        lengths = term_lengths(query.terms)
        divisor = {"cos": query.norms, "dot": lengths, "euc": np.ones(len(query))}[self._metric]
        divisor = np.where(divisor > 0, divisor, 1.0)
        self.scale = divisor if self._metric == "dot" else np.ones_like(divisor)
        self._terms = [
            unit_term(term, divisor, basis, memory) for term, basis in zip(query.terms, table.bases, strict=True)
        ]
        self._sides = row_sides(table, self._metric, query.terms, query.self_influence)
        # A reach is the product of a row's numbers and a query's, which stand here in the same order.
        reach = [length for term in self._terms for length in (term.beside, term.lost)]
        if self._metric == "euc":  # 2 <q, f> - ||f||^2 is rounded at the size of ||q||^2 + ||f||^2
            reach += [np.full(len(query), 2 * SCAN_TOLERANCE), 2 * SCAN_TOLERANCE * lengths**2]
        else:
            reach.append(SCAN_TOLERANCE * lengths / divisor)
        self._reach = memory.send((_WIDER * np.stack(reach)).astype(np.float32))

    def contenders(self, k: int, most: int, ends: Sequence[bool] = (True, False)) -> list[Listed]:
        """Rows that can be among the best k: of the proponents (True) or the opponents (False).

        Args:
            k: Rows at an end, at most as many as there are.
            most: Of more rows than that no list is made.
            ends: The ends that are wanted.

        Returns:
            One list an end; no row that is not in it can be among the best k.
        """
        self.memory.begin()
        with repeatable(self.memory.device):
            return self._contenders(k, most, ends)

    def _contenders(self, k: int, most: int, ends: Sequence[bool]) -> list[Listed]:
        group = group_rows(self.table, k)
        values, rows_reach, best, group_reach, scores_memory = self._visited(k, group, ends)
        n_queries = len(self.query)
        # Both ends as one: the opponents are the proponents of the negative scores.
        edges = _best_of(None, _folded(best - group_reach, k), k)[:, -1]
        chosen = best + group_reach >= edges[:, None]
        offsets = torch.arange(group, device=values.device)
        signs = self.memory.send(np.where(ends, 1.0, -1.0).astype(np.float32))

        def possible(pairs: torch.Tensor) -> torch.Tensor:
            """Column, position, score and reach ``(4, x)`` of rows that can be, by end, group and query ``(p, 3)``."""
            end, groups, queries = pairs.unbind(1)
            positions = groups[:, None] * group + offsets
            scores = values[positions, queries[:, None]] * signs[end][:, None]
            near = scores >= (edges[end, queries] - group_reach[groups, queries])[:, None]
            pair, member = (near & (positions < len(self.table))).nonzero().unbind(1)
            rows, queries, end = positions[pair, member], queries[pair], end[pair]
            score, reach = scores[pair, member], (rows_reach[rows] * self._reach.T[queries]).sum(dim=1)
            columns = end * n_queries + queries
            kept = score + reach >= edges[end, queries]  # a group's reach is its longest row's
            return torch.stack([columns.double(), rows.double(), score.double(), reach.double()])[:, kept]

        crowded = chosen.sum(dim=1) * group > most
        pairs = (chosen & ~crowded[:, None]).nonzero()
        parts = [possible(some) for some in torch.split(pairs, _PAIRS // group)]
        numbers, too_many = fetch(torch.cat(parts, dim=1), crowded)
        found = [numbers]
        # The groups of a query may have more rows than a list, and the list be short: it is made alone.
        for end, query in np.argwhere(too_many):
            groups = chosen[end, :, query].nonzero()
            alone = torch.cat([torch.full_like(groups, end), groups, torch.full_like(groups, query)], dim=1)
            (rows,) = fetch(possible(alone))
            if rows.shape[1] <= most:
                too_many[end, query] = False
                found.append(rows)
        self.table.kept[self.memory.device] = scores_memory
        lists = _lists(np.concatenate(found, axis=1), too_many.reshape(-1), k, most)
        return [lists[start : start + n_queries] for start in range(0, len(lists), n_queries)]

    def _visited(self, k: int, group: int, ends: Sequence[bool] = (True, False)) -> tuple[torch.Tensor, ...]:
        """Scores of the rows visited, how far they may be off, and the same of groups of them.

        Returns:
            The scores ``(v, q)``; the rows' factors of reaches ``(v, x)``; the best score of each group by end, with
            the end's sign, ``(e, g, q)``; the reach of each group's scores ``(g, q)``; and the memory of the scores,
            to be kept when they are no longer needed. Where the last group is not full, v is rounded up.
        """
        table, memory, n_queries = self.table, self.memory, len(self.query)
        n_groups = -(-len(table) // group)
        # A place that is kept: the system would clear new memory for every batch of queries.
        kept = table.kept.pop(memory.device, None)
        if kept is None or kept.numel() < n_groups * group * n_queries:
            kept = torch.empty(n_groups * group * n_queries, device=memory.device)
        values = kept[: n_groups * group * n_queries].view(-1, n_queries)
        best = torch.empty((len(ends), n_groups, n_queries), device=memory.device)
        group_reach = memory.tensor(self._sides.group_reach(group)) @ self._reach
        stops = memory.on_host and self._metric == "dot" and len(table.blocks) > 1
        limits = [self._bound(*both) if stops else 0.0 for both in zip(table.blocks, self._sides.blocks, strict=True)]
        visited, reached = 0, None
        for i, (block, sides) in enumerate(zip(table.blocks, self._sides.blocks, strict=True)):
            before = visited // group
            for scores in self._parts(block, sides, values[visited:]):
                begun, visited = visited // group, visited + len(scores)
                if visited == len(table):  # what fills the last group up is not better than the last row
                    values[visited:] = values[visited - 1]
                    visited = len(values)
                grouped = values[begun * group : visited].view(-1, group, n_queries)
                for largest, out in zip(ends, best[:, begun : visited // group], strict=True):
                    if largest:
                        torch.amax(grouped, dim=1, out=out)
                    else:
                        torch.amin(grouped, dim=1, out=out).neg_()
            if stops and i + 1 < len(limits):
                here = slice(before, visited // group)
                reached = _best_of(reached, best[:, here] - group_reach[here], k)
                if reached.shape[1] == k and bool((reached[:, -1] > max(limits[i + 1 :])).all()):
                    break
        n_groups = visited // group
        return values[:visited], memory.tensor(self._sides.reach), best[:, :n_groups], group_reach[:n_groups], kept

    def _bound(self, block: ScanBlock, sides: BlockSides) -> float:
        """Largest possible |score| of any row of a block against a unit query."""
        bound = sides.sizes
        if self.query.self_influence is not None:  # Cauchy-Schwarz in H^-1's inner product, often tighter
            reach = (self.query.norms / self.scale).max()
            bound = np.minimum(bound, reach * np.sqrt(self.query.self_influence[block.rows]))
        return _WIDER * float(bound.max())

    def _parts(self, block: ScanBlock, sides: BlockSides, out: torch.Tensor) -> Iterator[torch.Tensor]:
        """Write the scores of the block's rows, a few at once on a CPU, to the first rows of ``out``; these rows."""
        memory, n_rows = self.memory, len(block.rows)
        sent = [SentVectors.of(vectors, memory) for vectors in block.features]
        residuals, factors = ([memory.tensor(values) for values in part] for part in (sides.residuals, sides.factors))
        squares = None if sides.squares is None else memory.tensor(sides.squares)

        def scores(start: int, stop: int) -> torch.Tensor:
            total = out[start:stop]
            for i, (term, vectors) in enumerate(zip(self._terms, sent, strict=True)):
                part = total if i == 0 else torch.empty_like(total)
                term.products(vectors.rows(start, stop), residuals[i][start:stop] if residuals else None, part)
                if factors:
                    part *= factors[i][start:stop, None]
                elif not residuals and term.weight != 1:
                    part *= term.weight
                if i:
                    total += part
            if squares is not None:
                total.mul_(2).sub_(squares[start:stop, None])
            return total

        widest = max(term.codes.shape[1] for term in self._terms)
        step = max(_LEAST_ROWS, _PRODUCTS // widest // GROUP_ROWS * GROUP_ROWS) if memory.on_host else n_rows
        starts = range(0, n_rows, step)
        return map(scores, starts, (min(start + step, n_rows) for start in starts))


def _folded(values: torch.Tensor, k: int) -> torch.Tensor:
    """The largest of neighbours along the second axis, if many: their k-th is quick to find, and little smaller."""
    n_neighbours = values.shape[1] // (_GROUPS * k)
    if n_neighbours < 2:
        return values
    whole = values[:, : values.shape[1] // n_neighbours * n_neighbours]
    return whole.view(len(values), -1, n_neighbours, values.shape[2]).amax(dim=2)


def _best_of(before: torch.Tensor | None, values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of those before and of values ``(e, g, q)`` along g, best first; all where they are fewer."""
    together = values if before is None else torch.cat([before, values], dim=1)
    return together.topk(min(k, together.shape[1]), dim=1).values


def _lists(numbers: np.ndarray, too_many: np.ndarray, k: int, most: int) -> Listed:
    """Positions of the rows that can be among the best k, by column; of (column, position, score, reach) ``(4, x)``."""
    columns = numbers[0].astype(np.uint16 if len(too_many) <= 1 << 16 else np.int64)  # numpy counts short integers
    order = np.argsort(columns, kind="stable")
    starts = np.searchsorted(columns, np.arange(len(too_many) + 1), sorter=order)
    _, positions, scores, reaches = numbers[:, order]

    def of_column(start: int, stop: int) -> np.ndarray | None:
        score, reach = scores[start:stop], reaches[start:stop]
        edge = np.partition(score - reach, -k)[-k]
        rows = positions[start:stop][score + reach >= edge].astype(np.int64)
        return rows if len(rows) <= most else None

    return [None if none else of_column(*ends) for none, ends in zip(too_many, pairwise(starts), strict=True)]
