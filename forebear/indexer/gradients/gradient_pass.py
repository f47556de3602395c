"""The gradient pass: one forward and one backward of activations a batch, seen by any number of collectors.

What is gathered (sketches, norms, curvature factors, dots with a query) is a collector's business; batches, memory
and bad numbers are handled here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forebear.errors import NonFiniteError, StorageError
from forebear.indexer.gradients.tape import LayerFactors, Seed, Tape, loss_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded, Texts, as_encoded, distinct, distinct_rows, plan_batches
from forebear.indexer.model.forward import Forward, softmax
from forebear.indexer.model.scopes import Scope


class Collector(ABC):
    """Gathers something from the gradients of one scope, batch by batch.

    A batch is a transaction. It is begun, each block's factors arrive in any order, it is ended, and then kept. Until
    it is kept it may fail for want of memory at any point, also in another collector of the same pass: it is then begun
    again with fewer rows. So only :meth:`keep` may change the result; all else works on what belongs to the batch.

    Attributes:
        scope: Parameters whose gradients are gathered.
    """

    scope: Scope

    @abstractmethod
    def begin(self, positions: list[int]) -> None:
        """A batch starts, its rows at ``positions`` of the texts; what is left of one that failed is dropped."""

    @abstractmethod
    def on_layer(self, name: str, factors: LayerFactors) -> None:
        """A block's factors."""

    def end(self, positions: list[int]) -> None:  # noqa: B027  # most collectors have nothing left to compute
        """All factors have arrived: whatever still takes memory is computed here."""

    @abstractmethod
    def keep(self, positions: list[int]) -> None:
        """The batch becomes part of the result; never repeated, so a lack of memory here ends the pass."""


class RowCollector(Collector):
    """A collector of something for each row, which equal rows can share."""

    @abstractmethod
    def repeat(self, sources: np.ndarray, copies: np.ndarray) -> None:
        """After the last batch: rows at ``copies`` ``(m,)`` were not run, and get what those at ``sources`` have."""


SeedOf = Callable[[list[int]], Seed]  # what is differentiated at the rows of these positions
MemoryWarning = Callable[[str], None]


@dataclass(frozen=True)
class SeedByKey:
    """A :data:`SeedOf` that is the same for rows of the same word pieces and the same key.

    Attributes:
        keys: Of each row, ``(n,)``; None: one for all.
        seed_of: What is differentiated.
    """

    keys: np.ndarray | None
    seed_of: SeedOf

    def __call__(self, at: list[int]) -> Seed:
        """What is differentiated at the rows of these positions."""
        return self.seed_of(at)


def labels_seed(labels: np.ndarray | None) -> SeedByKey:
    """The loss of ``labels`` ``(n,)``; None: of the predicted classes."""
    return SeedByKey(labels, lambda at: loss_of(None if labels is None else labels[at]))


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

    A batch for which memory does not suffice is halved, and so are the larger ones after it.

    Equal rows (the same word pieces, and the same key of a :class:`SeedByKey`) are run once and get equal numbers,
    where all collectors gather something for each row.

    Args:
        classifier: The model.
        texts: One list a text column, or encoded rows.
        seed_of: What is differentiated, the same for both versions of a row.
        collectors: Of one scope or several; scopes share the pass.
        batch_tokens: Largest number of padded tokens in a batch.
        first_row: Row number of the first text, for messages.
        on_rows: Told the number of rows after each batch.
        warn: Told when batches are halved.

    Returns:
        Features and logits, from the same pass; of rows with another version those of all rows, then of all versions.

    Raises:
        NonFiniteError: A feature or logit is NaN or infinite; the row is named.
        StorageError: Not even one row fits in memory, or the results do not.
    """
    encoded = as_encoded(classifier, texts)
    rows, minus = encoded.rows, encoded.minus
    versions = 1 if minus is None else 2
    sizes = [versions * len(row["input_ids"]) for row in rows]
    features = np.empty((versions * len(rows), classifier.feature_dim), np.float32)
    logits = np.empty((versions * len(rows), classifier.n_classes))
    tape = Tape(classifier, [collector.scope for collector in collectors])
    wanted = [(collector, frozenset(block.name for block in collector.scope.blocks)) for collector in collectors]

    whole_of = torch.empty(0, dtype=torch.long)  # of the batch: which of its rows each version belongs to

    def on_layer(name: str, factors: LayerFactors) -> None:
        shown = factors if minus is None else factors.differences(whole_of.to(factors.inputs.device))
        for collector, names in wanted:
            if name in names:
                collector.on_layer(name, shown)

    first, kinds = _rows_to_run(encoded, seed_of, collectors)
    plan = plan_batches([sizes[i] for i in first], batch_tokens, equal_lengths=classifier.equal_lengths)
    waiting = deque(first[batch].tolist() for batch in plan)
    limit = batch_tokens
    while waiting:
        at = waiting.popleft()
        longest = max(sizes[i] for i in at)
        if len(at) > 1 and len(at) * longest > limit:
            waiting.extendleft(_halves(at))
            continue
        try:
            for collector in collectors:
                collector.begin(at)
            wholes, which = _run_once(encoded, at)
            whole_of = torch.from_numpy(which)
            together = [rows[i] for i in wholes] + ([] if minus is None else [minus[i] for i in at])
            f, z = tape.record(together, _seed_of_versions(seed_of, wholes, at, versions), on_layer)
            for collector in collectors:
                collector.end(at)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(at) == 1:
                raise StorageError(
                    f"row {first_row + at[0]} ({longest} word pieces) does not fit in the memory of "
                    f"{classifier.device}. Give --max-length a smaller value, or use --device cpu."
                ) from error
            limit = len(at) * longest // 2
            if classifier.device.type == "cuda":
                torch.cuda.empty_cache()
            if warn is not None:
                warn(f"{len(at)} rows of {longest} word pieces do not fit in memory; going on with {len(at) // 2}.")
            waiting.extendleft(_halves(at))
            continue
        _keep(collectors, at, classifier)
        features[at], logits[at] = f[which], z[which]
        if minus is not None:
            to = [len(rows) + i for i in at]
            features[to], logits[to] = f[len(wholes) :], z[len(wholes) :]
        if on_rows is not None:
            on_rows(len(at))
    if len(first) < len(rows):
        _repeat(collectors, first, kinds)
        for start, digests in enumerate(
            [encoded.digests] if minus is None else [encoded.digests, encoded.others.digests]
        ):
            own = slice(start * len(rows), (start + 1) * len(rows))
            run, read = distinct(digests)  # features are equal also where labels are not
            features[own], logits[own] = features[own][run[read]], logits[own][run[read]]
        if on_rows is not None:
            on_rows(len(rows) - len(first))
    refuse_non_finite(classifier.name, first_row, *np.split(logits, versions), *np.split(features, versions))
    return Forward(features, softmax(logits), logits)


def _keep(collectors: Sequence[Collector], at: list[int], classifier: Classifier) -> None:
    """Add a batch to the results; a lack of memory ends the pass, for a batch that was kept must not run again."""
    try:
        for collector in collectors:
            collector.keep(at)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StorageError(
            f"the memory of {classifier.device} does not suffice for what is gathered from the rows. Give "
            "--batch-tokens a smaller value, or use --device cpu."
        ) from error


def _rows_to_run(encoded: Encoded, seed_of: SeedOf, collectors: Sequence[Collector]) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each kind, and every row's kind; all rows are of a kind of their own where they are summed."""
    if isinstance(seed_of, SeedByKey) and all(isinstance(collector, RowCollector) for collector in collectors):
        return distinct_rows(encoded, seed_of.keys)
    return np.arange(len(encoded)), np.arange(len(encoded))


def _repeat(collectors: Sequence[Collector], first: np.ndarray, kinds: np.ndarray) -> None:
    """Let rows that were not run share what the first of their kind has."""
    copies = np.setdiff1d(np.arange(len(kinds)), first)
    for collector in collectors:
        assert isinstance(collector, RowCollector)
        collector.repeat(first[kinds[copies]], copies)


def _run_once(encoded: Encoded, at: list[int]) -> tuple[list[int], np.ndarray]:
    """Of a batch: positions of the rows that are run, and which of these each entry stands for, ``(len(at),)``."""
    if encoded.owners is None:
        return at, np.arange(len(at))
    _, first, which = np.unique(encoded.owners[at], return_index=True, return_inverse=True)
    return [at[i] for i in first], which


def _seed_of_versions(seed_of: SeedOf, wholes: list[int], at: list[int], versions: int) -> Seed:
    """What is differentiated at the rows of a batch, and at the other versions after them."""
    if versions == 1:
        return seed_of(wholes)
    n = len(wholes)
    return lambda logits: np.concatenate([seed_of(wholes)(logits[:n]), seed_of(at)(logits[n:])])


def refuse_non_finite(name: str, first_row: int, *numbers: np.ndarray) -> None:
    """Stop at the first row that has a NaN or infinity in any of ``numbers`` ``(n, ...)``.

    Raises:
        NonFiniteError: The row is named.
    """
    finite = np.logical_and.reduce([np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in numbers])
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise NonFiniteError(f"{name}: the gradient of row {row} is NaN or infinite. Check the model.")


def _halves(at: list[int]) -> tuple[list[int], list[int]]:
    """Later half first: ``extendleft`` turns them around."""
    middle = len(at) // 2
    return at[middle:], at[:middle]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )
