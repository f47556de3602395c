"""EK-FAC: the Gauss-Newton matrix of deeper scopes, block by block, in a Kronecker eigenbasis (George et al. 2018).

For each block, A = mean of a a^T over positions and D = mean of d d^T give the eigenbasis; the eigenvalues are then
corrected: the mean square of each coordinate of the rows' gradients in that basis. Gradients are those
of the model's own uncertainty, not of the gold labels: with B the curvature of the loss at the logits (diag(p) - p p^T
of the cross-entropy), the directions u with sum of u u^T = B are differentiated, so the matrix is the Gauss-Newton one;
gold labels would give the empirical Fisher.
Positions whose output gradient is zero (padding; all but [CLS] in the last layer) take no part in A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from forebear.errors import CorruptIndexError, NonFiniteError, is_out_of_memory
from forebear.indexer.curvature.head import row_chunks
from forebear.indexer.gradients.block_file import read_blocks, write_blocks
from forebear.indexer.gradients.dots import gram
from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.gradients.gradient_pass import ArrayCollector, Collector, SeedOf, run_pass
from forebear.indexer.gradients.tape import Seed
from forebear.indexer.gradients.vectors import Vectors, row_lengths
from forebear.indexer.gradients.whole import gather
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import fetch, picks, send
from forebear.indexer.model.device.memory import free_memory
from forebear.indexer.model.encoding import Texts
from forebear.indexer.model.scopes import Block, Scope
from forebear.indexer.storage.arrow import MEND

EXACT_CLASSES = 4  # up to here every class direction is differentiated; beyond, one random combination a row


def curvature_seeds(
    loss: Loss, n_outputs: int, n_rows: int, seed: int, targets: np.ndarray | None = None
) -> tuple[SeedOf, ...]:
    """Directions u at the logits whose u u^T sum, exactly or in expectation, to the loss' curvature at each row.

    Args:
        loss: Whose curvature: diag(p) - p p^T of the cross-entropy.
        n_outputs: c; up to 4 there is one direction u for each of the loss' basis (c - 1 of the cross-entropy), else
            one in all: a seeded combination with signs +-1.
        n_rows: Number of rows of the pass.
        seed: Random seed of the signs.
        targets: Targets of the rows, where the loss weighs rows by them.
    """
    rank = len(loss.basis(n_outputs))
    row_weights = None if targets is None else loss.row_weights(targets)

    def along(weights: np.ndarray) -> SeedOf:
        """``weights`` (n_rows, rank) combine the columns of a square root of B."""
        if row_weights is not None:
            weights = weights * np.sqrt(row_weights)[:, None]

        def seed_of(positions: list[int]) -> Seed:
            return lambda logits: _combined_roots(loss, loss.outputs(logits), weights[positions])

        return seed_of

    if n_outputs <= EXACT_CLASSES:
        return tuple(along(np.broadcast_to(row, (n_rows, rank))) for row in np.eye(rank))
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(n_rows, rank))
    return (along(signs),)


def _combined_roots(loss: Loss, outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """U w of each row, ``(n, c)``, for weights ``(n, m)``; no more roots are held at once than fit in memory."""
    parts = [
        np.einsum("bck,bk->bc", loss.square_root(outputs[chunk]), weights[chunk])
        for chunk in row_chunks(len(outputs), outputs.shape[1])
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class EkfacBlock:
    """One block's eigenbasis and corrected eigenvalues.

    Attributes:
        block: The parameters.
        left: Eigenvectors of D as columns, by falling eigenvalue, ``(n_out, n_out)``.
        right: Those of A, ``(n_in, n_in)``.
        eigenvalues: Mean square of each coordinate, ``(n_out, n_in)``.
    """

    block: Block
    left: torch.Tensor
    right: torch.Tensor
    eigenvalues: torch.Tensor

    def rotate(self, factors: LayerFactors) -> LayerFactors:
        """The factors of the gradient's coordinates in the eigenbasis."""
        return LayerFactors(factors.inputs @ self.right, factors.deltas @ self.left)

    def to(self, device: torch.device, dtype: torch.dtype) -> EkfacBlock:
        """The block on a device, in a precision."""
        moved = (send(x, device).to(dtype) for x in (self.left, self.right, self.eigenvalues))
        return EkfacBlock(self.block, *moved)


@dataclass(frozen=True)
class Ekfac:
    """The curvature of one scope at one checkpoint.

    Attributes:
        parts: By block name, in the scope's order.
        n_rows: Training rows that it was fitted on.
    """

    parts: dict[str, EkfacBlock]
    n_rows: int

    @cached_property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue over all parameters of the scope."""
        totals = [part.eigenvalues.sum(dtype=torch.float64) for part in self.parts.values()]
        return float(sum(fetch(torch.stack(totals))[0].tolist()) / sum(part.block.size for part in self.parts.values()))

    @cached_property
    def largest_eigenvalue(self) -> float:
        """Largest eigenvalue of all blocks of the scope."""
        return float(fetch(torch.stack([part.eigenvalues.max() for part in self.parts.values()]))[0].max())

    def solve(self, vectors: Vectors, damping: float) -> Vectors:
        """(H + damping I)^-1 V, block by block."""
        with repeatable(next(iter(vectors.values())).device):
            return {name: self._solve_block(self.parts[name], v, damping) for name, v in vectors.items()}

    def _solve_block(self, part: EkfacBlock, v: torch.Tensor, damping: float) -> torch.Tensor:
        rotated = part.left.T @ v @ part.right
        rotated /= part.eigenvalues + damping
        return part.left @ rotated @ part.right.T

    def to(self, device: torch.device, dtype: torch.dtype) -> Ekfac:
        """The curvature on a device, in a precision."""
        return Ekfac({name: part.to(device, dtype) for name, part in self.parts.items()}, self.n_rows)


@dataclass(frozen=True)
class KroneckerFactors:
    """Sums of a a^T and d d^T of each block over rows and positions; float64, neither centred nor divided.

    Attributes:
        inputs: A, ``(n_in, n_in)`` by block name.
        outputs: D, ``(n_out, n_out)`` by block name.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class _Factors(Collector):
    """Gathers Kronecker factors; positions without an output gradient are left out."""

    def __init__(self, scope: Scope, device: torch.device) -> None:
        self.scope, blocks = scope, scope.blocks

        def zeros(n: int) -> torch.Tensor:
            return torch.zeros((n, n), dtype=torch.float64, device=device)

        self.found = KroneckerFactors({b.name: zeros(b.n_in) for b in blocks}, {b.name: zeros(b.n_out) for b in blocks})
        self._batch: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, positions: list[int]) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        live = (factors.deltas != 0).any(dim=-1)
        if picks(live):
            a, d = factors.inputs[live], factors.deltas[live]
        else:
            a, d = (factors.inputs * live[..., None]).flatten(0, 1), factors.deltas.flatten(0, 1)
        self._batch[name] = (gram(a), gram(d))

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        for name, (a, d) in self._batch.items():
            self.found.inputs[name] += a
            self.found.outputs[name] += d


class _Eigenvalues(Collector):
    """Sums of the squared coordinates of the rows' gradients."""

    def __init__(self, scope: Scope, parts: dict[str, EkfacBlock]) -> None:
        self.scope, self._parts = scope, parts
        self.sums = {name: torch.zeros_like(part.eigenvalues, dtype=torch.float64) for name, part in parts.items()}
        self._batch: Vectors = {}

    def begin(self, positions: list[int]) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        total = torch.zeros_like(self._parts[name].eigenvalues)
        room = torch.empty_like(total)
        for part in self._parts[name].rotate(factors.live()).cache_sized():
            if len(part.inputs) == 1:  # one matrix after another in the same place: 2.5x, measured on a CPU
                torch.mm(part.deltas[0].T, part.inputs[0], out=room)
                total.addcmul_(room, room)
            else:
                total += part.gradients().square_().sum(dim=0)
        self._batch[name] = total

    def keep(self, positions: list[int], *arrays: np.ndarray) -> None:
        for name, squares in self._batch.items():
            self.sums[name] += squares


def fit_factors(
    classifier: Classifier,
    scope: Scope,
    texts: Sequence[Sequence[str]],
    *,
    seed: int,
    batch_tokens: int,
    targets: np.ndarray | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> KroneckerFactors:
    """Kronecker factors of a scope from rows of text, in one pass a class direction; arguments as in ``fit_ekfac``."""
    collector = _Factors(scope, classifier.device)
    for seed_of in curvature_seeds(classifier.loss, classifier.n_classes, len(texts[0]), seed, targets):
        run_pass(classifier, texts, seed_of, [collector], batch_tokens=batch_tokens, on_rows=on_rows)
    return collector.found


def fit_ekfac(
    classifier: Classifier,
    scope: Scope,
    texts: Sequence[Sequence[str]],
    *,
    seed: int,
    batch_tokens: int,
    targets: np.ndarray | None = None,
    factors: KroneckerFactors | None = None,
    beside: Callable[[Ekfac], Sequence[Collector]] = lambda _: (),
    on_rows: Callable[[int], None] | None = None,
) -> Ekfac:
    """Fit the curvature of a scope on rows of text, in two passes a direction at the logits.

    Args:
        classifier: The model at the checkpoint.
        scope: Whose curvature.
        texts: A sample of the training rows, one list a text column.
        seed: Random seed of the signs, with more than 4 classes.
        batch_tokens: Largest number of padded tokens in a batch.
        targets: Targets of the rows, which play a part only where the loss weighs rows by them.
        factors: From :func:`fit_factors` on the same rows, if they are known already.
        beside: Makes, of the eigenbasis (whose eigenvalues are still 0), what else gathers from the last passes.
        on_rows: Called with the number of rows after each batch.

    Raises:
        NonFiniteError: A factor is NaN or infinite.
    """
    n_rows = len(texts[0])
    if factors is None:
        factors = fit_factors(
            classifier, scope, texts, seed=seed, batch_tokens=batch_tokens, targets=targets, on_rows=on_rows
        )
    dtype = classifier.head.weight.dtype
    parts = {}
    for block in scope.blocks:
        left, right = (eigenvectors(m[block.name], block.name).to(dtype) for m in (factors.outputs, factors.inputs))
        empty = torch.zeros((block.n_out, block.n_in), dtype=dtype, device=classifier.device)
        parts[block.name] = EkfacBlock(block, left, right, empty)
    del factors  # float64, and as large as the eigenvectors twice
    squares = _Eigenvalues(scope, parts)
    collectors = [squares, *beside(Ekfac(parts, n_rows))]
    for seed_of in curvature_seeds(classifier.loss, classifier.n_classes, n_rows, seed, targets):
        run_pass(classifier, texts, seed_of, collectors, batch_tokens=batch_tokens, on_rows=on_rows)
    return Ekfac(
        {
            name: EkfacBlock(part.block, part.left, part.right, (squares.sums[name] / n_rows).to(dtype))
            for name, part in parts.items()
        },
        n_rows,
    )


def whitened(factors: LayerFactors, weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """H^-1/2 G of the rows of a block in the eigenbasis, a few rows at a time, and their squared lengths.

    Args:
        factors: Of the gradients' coordinates in the eigenbasis, of ``b`` rows.
        weights: (eigenvalues + damping)^-1/2, ``(n_out, n_in)``.

    Yields:
        ``(m, n_out, n_in)``, and <(H + damping I)^-1 G, G>, ``(m,)`` float64.
    """
    for part in factors.cache_sized():
        white = part.gradients().mul_(weights)
        yield white, row_lengths(white.flatten(1)).square()


class _SelfInfluence(ArrayCollector):
    """Gathers <(H + damping I)^-1 G, G> of rows, in the eigenbasis."""

    def __init__(self, scope: Scope, ekfac: Ekfac, damping: float, n_rows: int) -> None:
        self.scope, self._parts, self.out = scope, ekfac.parts, np.empty(n_rows)
        self._weights = {name: (part.eigenvalues + damping).rsqrt() for name, part in ekfac.parts.items()}

    def begin(self, positions: list[int]) -> None:
        device = next(iter(self._weights.values())).device
        self._total = torch.zeros(len(positions), dtype=torch.float64, device=device)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        rotated = self._parts[name].rotate(factors)
        self._total += torch.cat([squares for _, squares in whitened(rotated, self._weights[name])])

    def end(self, positions: list[int]) -> Sequence[torch.Tensor]:
        return (self._total,)


def ekfac_self_influence(
    classifier: Classifier, scope: Scope, ekfac: Ekfac, damping: float, texts: Texts, labels: np.ndarray
) -> np.ndarray:
    """<(H + damping I)^-1 G_n, G_n> of rows, ``(n,)`` float64, in one pass; equal rows get the same number.

    Args:
        classifier: Whose gradients.
        scope: Over which.
        ekfac: The curvature, on the classifier's device.
        damping: Added to every eigenvalue.
        texts: Rows, ``n`` of them, one list a text column; or encoded.
        labels: Their targets.
    """
    collector = _SelfInfluence(scope, ekfac, damping, len(labels))
    gather(classifier, texts, labels, collector)
    return collector.out


def eigenvectors(matrix: torch.Tensor, name: str = "") -> torch.Tensor:
    """Columns by falling eigenvalue; computed on the CPU where the memory of the matrix' device does not suffice.

    Raises:
        NonFiniteError: The matrix, the factor of layer ``name``, holds NaN or infinity.
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"the curvature factor of layer {name} is NaN or infinite. Check the model.")
    try:
        vectors: torch.Tensor | None = torch.linalg.eigh(matrix).eigenvectors
    except Exception as error:
        if matrix.device.type == "cpu" or not is_out_of_memory(error):
            raise
        vectors = None
    if vectors is None:  # after the clause, whose error holds what was in the device's memory
        free_memory(matrix.device)
        vectors = torch.linalg.eigh(matrix.cpu()).eigenvectors.to(matrix.device)
    return vectors.flip(1).contiguous()


def write_ekfac(path: Path, ekfac: Ekfac) -> None:
    """Write bases and eigenvalues, float32."""
    parts = {
        part.block: {"left": part.left, "right": part.right, "eigenvalues": part.eigenvalues}
        for part in ekfac.parts.values()
    }
    write_blocks(path, parts, {"n_rows": str(ekfac.n_rows)})


def read_ekfac(path: Path) -> Ekfac:
    """Memory-map what :func:`write_ekfac` wrote.

    Raises:
        CorruptIndexError: It is no such file.
    """
    parts, metadata = read_blocks(path)
    try:
        return Ekfac(
            {block.name: EkfacBlock(block, **found) for block, found in parts.items()}, int(metadata["n_rows"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptIndexError(f"{path} is no curvature file ({error}). {MEND}") from error
