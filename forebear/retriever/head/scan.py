"""The scan: scores of factored rows by vectors of 8 bits, and how far rounding may have moved them.

A score is known to within its *reach*: the length that rounding took from the row times the query's length beside the
table's directions, and the other way round (Cauchy-Schwarz), and float32's own rounding. So the scan ends with the rows
that can be among the best k, usually little more than k, and no other row can.

On a CPU rows are visited by falling norm, until no later row can matter. A GPU reads all of them, so that the host need
not wait after each block for the answer whether it must go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch
from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
from forebear.indexer.storage.scan_table import ScanBlock, ScanTable
from forebear.retriever.head.rounded import SentVectors, term_lengths, unit_term
from forebear.retriever.head.row_sides import RowSides, row_sides
from forebear.retriever.head.scoring import Query

# Rounding of a float32 dot product of two unit vectors, with a margin: 4e-6 is over 60 units in the last place.
SCAN_TOLERANCE = 4e-6
GROUP_ROWS = 32  # rows of which only the best and the worst are looked at before the end
_PRODUCTS = 1 << 18  # entries of a product that stay in the processor's cache until its groups are known
_LEAST_ROWS = 1024  # that are multiplied at once
_WIDER = 1 + 1e-4  # reaches are sums of a few float32 products
_PAIRS = 1 << 22  # scores of groups that are looked at together


_Bounds = tuple[torch.Tensor, torch.Tensor]  # what the best of each group is at least, and at most, (g, q)
Listed = list[np.ndarray | None]  # positions in a scan table, an array a query; None where they are too many


def group_rows(table: ScanTable, k: int) -> int:
    """Rows that are grouped; 1 where there are too few rows, or where groups would not end with a block."""
    whole = all(len(block.rows) % GROUP_ROWS == 0 for block in table.blocks[:-1])
    return GROUP_ROWS if whole and len(table) >= 16 * GROUP_ROWS * k else 1


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
        values, rows_reach, bounds, scores_memory = self._visited(k, group)
        # Both ends as one: the opponents are the proponents of the negative scores.
        signs = [1.0 if largest else -1.0 for largest in ends]
        least = torch.cat([bounds[largest][0] for largest in ends], dim=1)
        most_possible = torch.cat([bounds[largest][1] for largest in ends], dim=1)
        n_queries = len(self.query)
        edges = least.topk(k, dim=0).values[-1]
        chosen = most_possible >= edges
        crowded = chosen.sum(dim=0) * group > most + group * (k + 1)
        pairs = (chosen & ~crowded).nonzero()
        offsets = torch.arange(group, device=values.device)
        sign_of = self.memory.send(np.repeat(np.array(signs, np.float32), n_queries))
        found = []
        for start in range(0, len(pairs), _PAIRS // group):
            groups, columns = pairs[start : start + _PAIRS // group].unbind(1)
            positions = groups[:, None] * group + offsets
            queries = columns % n_queries
            sign = sign_of[columns][:, None]
            scores = values[positions, queries[:, None]] * sign
            reach = (rows_reach[positions] * self._reach.T[queries][:, None, :]).sum(dim=2)
            possible = (scores + reach >= edges[columns][:, None]) & (positions < len(self.table))
            kept = possible.nonzero()
            pair, member = kept.unbind(1)
            found.append(
                torch.stack(
                    [columns[pair].double(), positions[pair, member].double(), scores[pair, member].double(),
                     reach[pair, member].double()]
                )
            )  # fmt: skip
        together = torch.cat(found, dim=1) if found else torch.zeros((4, 0), dtype=torch.float64, device=values.device)
        (numbers, too_many) = fetch(together, crowded)
        self.table.kept[self.memory.device] = scores_memory
        return [
            _lists(numbers, range(i * n_queries, (i + 1) * n_queries), too_many, k, most) for i in range(len(signs))
        ]

    def _visited(self, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, dict[bool, _Bounds], torch.Tensor]:
        """Scores ``(v, q)`` of the rows visited, their factors of reaches ``(v, x)``, and each group's bounds by end.

        The last tensor is the memory of the scores, to be kept when they are no longer needed. Where the last group is
        not full, v is rounded up, with scores that mean nothing.
        """
        table, memory = self.table, self.memory
        n_rows = -(-len(table) // group) * group
        # A place that is kept: the system would clear new memory for every batch of queries.
        kept = table.kept.pop(memory.device, None)
        if kept is None or kept.numel() < n_rows * len(self.query):
            kept = torch.empty(n_rows * len(self.query), device=memory.device)
        values = kept[: n_rows * len(self.query)].view(n_rows, len(self.query))
        rows_reach = torch.zeros((n_rows, len(self._reach)), device=memory.device)
        bounds: dict[bool, list[_Bounds]] = {True: [], False: []}
        stops = memory.on_host and self._metric == "dot" and len(table.blocks) > 1
        limits = [self._bound(b, sides) if stops else 0.0 for b, sides in zip(table.blocks, self._sides, strict=True)]
        visited, reached = 0, _Reached(k)
        for i, (block, sides) in enumerate(zip(table.blocks, self._sides, strict=True)):
            reach_of_rows = memory.tensor(sides.reach)
            rows_reach[visited : visited + len(block.rows)].copy_(reach_of_rows)
            group_reach = _by_group(reach_of_rows, group)
            of_block: dict[bool, list[_Bounds]] = {True: [], False: []}
            begun = visited
            for part in self._parts(block, sides):
                place = slice(visited, visited + len(part))
                values[place].copy_(part)
                reach = group_reach[(visited - begun) // group :][: -(-len(part) // group)] @ self._reach
                for largest in (True, False):
                    best = _by_group(part, group, largest=largest)
                    best = best if largest else -best
                    of_block[largest].append((best - reach, best + reach))
                visited += len(part)
            for largest, parts in of_block.items():
                bounds[largest] += parts
            if stops and i + 1 < len(limits) and reached.beyond(of_block, max(limits[i + 1 :])):
                break
        visited = -(-visited // group) * group
        whole = {
            largest: (torch.cat([least for least, _ in parts]), torch.cat([most for _, most in parts]))
            for largest, parts in bounds.items()
        }
        return values[:visited], rows_reach[:visited], whole, kept

    def _bound(self, block: ScanBlock, sides: RowSides) -> float:
        """Largest possible |score| of any row of a block against a unit query."""
        bound = sides.sizes
        if self.query.self_influence is not None:  # Cauchy-Schwarz in H^-1's inner product, often tighter
            reach = (self.query.norms / self.scale).max()
            bound = np.minimum(bound, reach * np.sqrt(self.query.self_influence[block.rows]))
        return _WIDER * float(bound.max())

    def _parts(self, block: ScanBlock, sides: RowSides) -> Iterator[torch.Tensor]:
        """Scores of the block's rows, a few at once on a CPU; ``(n, q)`` each."""
        memory, n_rows = self.memory, len(block.rows)
        sent = [SentVectors.of(vectors, memory) for vectors in block.features]
        residuals, factors = ([memory.tensor(values) for values in part] for part in (sides.residuals, sides.factors))
        squares = None if sides.squares is None else memory.tensor(sides.squares)

        def scores(start: int, stop: int) -> torch.Tensor:
            total: torch.Tensor | None = None
            for i, (term, vectors) in enumerate(zip(self._terms, sent, strict=True)):
                part = term.products(vectors.rows(start, stop), residuals[i][start:stop] if residuals else None)
                if factors:
                    part *= factors[i][start:stop, None]
                elif not residuals and term.weight != 1:
                    part *= term.weight
                total = part if total is None else total + part
            assert total is not None
            if squares is None:
                return total
            return (2 * total - squares[start:stop, None]).float()

        widest = max(term.codes.shape[1] for term in self._terms)
        step = max(_LEAST_ROWS, _PRODUCTS // widest // GROUP_ROWS * GROUP_ROWS) if memory.on_host else n_rows
        starts = range(0, n_rows, step)
        return map(scores, starts, (min(start + step, n_rows) for start in starts))


class _Reached:
    """What the k-th best and the k-th worst score of each query are at least beyond."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: dict[bool, torch.Tensor] = {}

    def beyond(self, bounds: dict[bool, list[_Bounds]], limit: float) -> bool:
        """Take in the bounds of a block, by end; True once every query's k-th are beyond ``limit``."""
        for largest, parts in bounds.items():
            together = torch.cat([*([self._kept[largest]] if self._kept.get(largest) is not None else []),
                                  *(least for least, _ in parts)])  # fmt: skip
            self._kept[largest] = together.topk(min(self.k, len(together)), dim=0).values
        return all(len(kept) == self.k and bool((kept[-1] > limit).all()) for kept in self._kept.values())


def _lists(numbers: np.ndarray, columns: range, too_many: np.ndarray, k: int, most: int) -> list[np.ndarray | None]:
    """Positions of the rows that can be among the best k, by column; of (column, position, score, reach) ``(4, x)``."""
    order = np.argsort(numbers[0], kind="stable")
    column, position, score, reach = numbers[:, order]
    starts = np.searchsorted(column, np.arange(columns.start, columns.stop + 1))
    lists: list[np.ndarray | None] = []
    for i, number in enumerate(columns):
        here = slice(starts[i], starts[i + 1])
        surely, perhaps = score[here] - reach[here], score[here] + reach[here]
        if too_many[number]:
            lists.append(None)
            continue
        edge = np.partition(surely, len(surely) - k)[len(surely) - k]
        listed = position[here][perhaps >= edge].astype(np.int64)
        lists.append(listed if len(listed) <= most else None)
    return lists


def _by_group(values: torch.Tensor, group: int, *, largest: bool = True) -> torch.Tensor:
    """Largest or smallest value in each group of consecutive rows, ``(n / group, q)``; the last may be shorter."""
    best = torch.amax if largest else torch.amin
    whole = len(values) // group
    found = best(values[: whole * group].view(whole, group, values.shape[1]), dim=1)
    return found if whole * group == len(values) else torch.cat([found, best(values[whole * group :], 0, True)])
