"""The gradient pass: one forward and one backward of activations a batch, seen by any number of collectors.

A collector decides what is gathered from the gradients (sketches, norms, curvature factors, dot products with queries);
batches, lack of memory and numbers that are NaN or infinite are handled here for all collectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from typing_extensions import override

from forebear.errors import NonFiniteError
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.tape import Seed, Tape, alone, loss_of
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import Fetched, send
from forebear.indexer.model.device.memory import refusing_lack, run_batches
from forebear.indexer.model.encoding import Encoded, Texts, as_encoded, distinct, distinct_rows, plan_batches
from forebear.indexer.model.forward import Forward
from forebear.indexer.model.scopes import Scope


class Collector(ABC):
    """Gathers something from the gradients of one scope, batch by batch.

    A batch is a transaction: :meth:`begin`, then :meth:`on_layer` for each block in any order, :meth:`end`, and
    :meth:`keep`. Before ``keep`` memory may run out at any point, also in another collector of the same pass; the batch
    is then begun again with fewer rows. So only ``keep`` may change the result; the other methods change only the state
    of the batch.

    What :meth:`end` returns is for the host, and is on its way while the device runs the next batch: ``keep`` may then
    come after the next ``begin``, and reads nothing but its arguments. Where it returns nothing, ``keep`` comes at
    once, and may read the state of the batch.

    Attributes:
        scope: Parameters whose gradients are gathered.
        takes_narrow: Whether factors may come as a pass in bf16 has them; else they are in fp32 or fp64.
    """

    scope: Scope
    takes_narrow: bool = False

    @abstractmethod
    def begin(self, positions: list[int]) -> None:
        """Start a batch of the rows at ``positions`` of the texts, and drop the state of a batch that failed."""

    @abstractmethod
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        """Take the factors of one block, ``name``, at the rows of the batch."""

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        """Compute what the batch adds, after all factors have arrived; the last step that may run out of memory.

        Returns:
            Tensors that :meth:`keep` needs on the host.
        """
        return ()

    @abstractmethod
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        """Add the batch to the result; never repeated, so a lack of memory here ends the pass.

        Args:
            positions: The batch's rows.
            *arrays: What :meth:`end` returned, on the host.
        """


class RowCollector(Collector):
    """A collector whose result has one entry for each row, so that equal rows can share one."""

    @abstractmethod
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        """Give rows at ``copies`` ``(m,)``, which were not run, the entries of ``sources``, after the last batch."""


class ArrayCollector(RowCollector):
    """A collector whose result is one array.

    Attributes:
        out: An entry for each row, ``(n, ...)``.
    """

    out: np.ndarray

    @override
    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        (self.out[positions],) = arrays

    @override
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        self.out[copies] = self.out[sources]


SeedOf = Callable[[list[int]], Seed]  # from positions of rows to the seed that is differentiated there
MemoryWarning = Callable[[str], None]


@dataclass(frozen=True)
class SeedByKey:
    """A :data:`SeedOf` that is the same for rows of the same word pieces and the same key.

    Attributes:
        keys: Key of each row, ``(n,)`` or ``(n, k)``; None: all rows have the same key.
        seed_of: The seeds, by positions of rows.
    """

    keys: np.ndarray | None
    seed_of: SeedOf

    def __call__(self, positions: list[int]) -> Seed:
        """The seed at the rows of these positions."""
        return self.seed_of(positions)


def labels_seed(loss: Loss, labels: np.ndarray | None) -> SeedByKey:
    """Seeds of a loss with ``n`` targets ``labels``; None: with what the model says."""
    return SeedByKey(labels, lambda positions: loss_of(loss, None if labels is None else labels[positions]))


def run_pass(
    classifier: Classifier,
    texts: Texts,
    seed_of: SeedOf,
    collectors: Sequence[Collector],
    *,
    batch_tokens: int,
    first_row: int = 0,
    on_rows: Callable[[int], None] | None = None,
    warn: MemoryWarning | None = None,
) -> Forward:
    """Run rows of text through the model and back, and show every layer's factors to the collectors.

    A batch that does not fit in memory is halved, and so are later batches that are as large.

    Equal rows (the same word pieces, and the same key of a :class:`SeedByKey`) are run once and get equal numbers,
    where all collectors gather something for each row.

    Args:
        classifier: The model.
        texts: One list a text column, or encoded rows.
        seed_of: The seeds to differentiate, the same for both versions of a row.
        collectors: Collectors of one scope or several; all share the pass.
        batch_tokens: Largest number of padded tokens in a batch.
        first_row: Row number of the first text, for messages.
        on_rows: Called with the number of rows after each batch.
        warn: Called when batches are halved.

    Returns:
        Features and logits of the pass. Where rows have another version (``minus``): of all rows, then of all versions.

    Raises:
        NonFiniteError: A feature or logit is NaN or infinite; the row is named.
        NotEnoughMemoryError: Not even one row fits in memory, or the results do not.
    """
    encoded = as_encoded(classifier, texts)
    rows, minus = encoded.rows, encoded.minus
    versions = 1 if minus is None else 2
    sizes = [versions * len(row["input_ids"]) for row in rows]
    features = np.empty((versions * len(rows), classifier.feature_dim), np.float32)
    logits = np.empty((versions * len(rows), classifier.n_classes))
    narrow = minus is None and all(collector.takes_narrow for collector in collectors)
    tape = Tape(classifier, [collector.scope for collector in collectors], narrow=narrow)
    block_names = [(collector, frozenset(block.name for block in collector.scope.blocks)) for collector in collectors]

    row_of_version = torch.empty(0, dtype=torch.long)  # row of the batch that each version belongs to
    results = _Results(collectors, classifier)

    def on_layer(name: str, factors: LayerFactors) -> None:
        shown = factors if minus is None else factors.differences(row_of_version)
        for collector, names in block_names:
            if name in names:
                collector.on_layer(name, shown)

    first, kinds = _rows_to_run(encoded, seed_of, collectors)
    batches_to_run = plan(classifier, [c.scope for c in collectors], [sizes[i] for i in first], batch_tokens)

    def run(positions: list[int]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        nonlocal row_of_version
        for collector in collectors:
            collector.begin(positions)
        wholes, run_of_row = _run_once(encoded, positions)
        row_of_version = send(run_of_row, classifier.device)
        together = [rows[i] for i in wholes] + ([] if minus is None else [minus[i] for i in positions])
        f, z = tape.record(together, _seed_of_versions(seed_of, wholes, positions, versions), on_layer)
        results.end(positions)
        return wholes, run_of_row, f, z

    def let_go(positions: list[int]) -> None:
        for collector in collectors:  # each drops its state of the batch, and begins one of a single row
            collector.begin(positions[:1])

    batches = run_batches(
        (first[batch].tolist() for batch in batches_to_run), run, lengths=sizes, device=classifier.device,
        name=lambda position: f"row {first_row + position}", warn=warn, let_go=let_go,
    )  # fmt: skip
    with repeatable(classifier.device):
        for positions, (wholes, run_of_row, f, z) in batches:
            results.keep()
            features[positions], logits[positions] = f[run_of_row], z[run_of_row]
            if minus is not None:
                version_positions = [len(rows) + i for i in positions]
                features[version_positions], logits[version_positions] = f[len(wholes) :], z[len(wholes) :]
            if on_rows is not None:
                on_rows(len(positions))
        results.settle()
    if len(first) < len(rows):
        _repeat(collectors, first, kinds)
        for start, digests in enumerate(
            [encoded.digests] if minus is None else [encoded.digests, encoded.others.digests]
        ):
            of_version = slice(start * len(rows), (start + 1) * len(rows))
            first_read, kinds_read = distinct(digests)  # features are equal also where labels are not
            features[of_version], logits[of_version] = (
                features[of_version][first_read[kinds_read]],
                logits[of_version][first_read[kinds_read]],
            )
        if on_rows is not None:
            on_rows(len(rows) - len(first))
    refuse_non_finite(classifier.name, first_row, *np.split(logits, versions), *np.split(features, versions))
    return Forward(features, logits, classifier.loss)


def plan(classifier: Classifier, scopes: Sequence[Scope], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Positions of the rows of each batch of a pass, longest rows first.

    Args:
        classifier: The model.
        scopes: Scopes whose gradients are gathered.
        lengths: Word pieces of each row that is run, of both versions together.
        batch_tokens: Largest number of padded tokens in a batch.
    """
    batch_tokens = 1 if alone(classifier, scopes) else batch_tokens
    return list(plan_batches(lengths, batch_tokens, equal_lengths=classifier.equal_lengths))


class _Results:
    """Gives the collectors what they compute of each batch; what comes from a device, when the next batch has run."""

    def __init__(self, collectors: Sequence[Collector], classifier: Classifier) -> None:
        self._collectors, self._classifier = collectors, classifier
        self._ended: tuple[list[int], list[int], Fetched] = [], [], Fetched()  # positions, arrays a collector
        self._waiting: tuple[list[int], list[int], Fetched] | None = None

    def end(self, positions: list[int]) -> None:
        """End a batch."""
        found = [tuple(collector.end(positions)) for collector in self._collectors]
        self._ended = positions, [len(tensors) for tensors in found], Fetched(*chain.from_iterable(found))

    def keep(self) -> None:
        """Add the batch that was ended last to the results, or the one before it, as long as it is on its way."""
        self.settle()
        self._waiting = positions, n_arrays, fetched = self._ended
        with self._refused_lack():
            for collector, n in zip(self._collectors, n_arrays, strict=True):
                if not n:
                    collector.keep(positions)
        if fetched.is_here:
            self.settle()

    def settle(self) -> None:
        """Add what is on its way."""
        if self._waiting is None:
            return
        (positions, n_arrays, fetched), self._waiting = self._waiting, None
        arrays = iter(fetched.arrays())
        with self._refused_lack():
            for collector, n in zip(self._collectors, n_arrays, strict=True):
                if n:
                    collector.keep(positions, *islice(arrays, n))

    def _refused_lack(self) -> AbstractContextManager[None]:
        """A lack of memory ends the pass, because a batch that was kept must not run again."""
        remedy = "Give --batch-tokens a smaller value"
        return refusing_lack("what is gathered from the rows", self._classifier.device, remedy)


def _rows_to_run(encoded: Encoded, seed_of: SeedOf, collectors: Sequence[Collector]) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each kind of equal rows, and every row's kind; for collectors of sums every row is a kind."""
    if isinstance(seed_of, SeedByKey) and all(isinstance(collector, RowCollector) for collector in collectors):
        return distinct_rows(encoded, seed_of.keys)
    return np.arange(len(encoded)), np.arange(len(encoded))


def _repeat(collectors: Sequence[Collector], first: np.ndarray, kinds: np.ndarray) -> None:
    """Give rows that were not run the entries of the first row of their kind."""
    copies = np.setdiff1d(np.arange(len(kinds)), first)
    for collector in collectors:
        assert isinstance(collector, RowCollector)
        collector.repeat(first[kinds[copies]], copies)


def _run_once(encoded: Encoded, positions: list[int]) -> tuple[list[int], np.ndarray]:
    """Positions of the rows of a batch that are run, and for each entry of the batch which of these it is, ``(b,)``."""
    if encoded.owners is None:
        return positions, np.arange(len(positions))
    _, first, run_of_entry = np.unique(encoded.owners[positions], return_index=True, return_inverse=True)
    return [positions[i] for i in first], run_of_entry


def _seed_of_versions(seed_of: SeedOf, wholes: list[int], positions: list[int], versions: int) -> Seed:
    """The seed at the rows of a batch, followed by the seed at their other versions."""
    if versions == 1:
        return seed_of(wholes)
    n = len(wholes)
    return lambda logits: np.concatenate([seed_of(wholes)(logits[:n]), seed_of(positions)(logits[n:])])


def refuse_non_finite(name: str, first_row: int, *numbers: np.ndarray) -> None:
    """Stop at the first row that has a NaN or infinity in any of ``numbers`` ``(n, ...)``.

    Raises:
        NonFiniteError: There is such a row; it is named.
    """
    finite = np.logical_and.reduce([np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in numbers])
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise NonFiniteError(f"{name}: the gradient of row {row} is NaN or infinite. Check the model.")
