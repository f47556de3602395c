"""EK-FAC: the Gauss-Newton matrix of deeper scopes, block by block, in a Kronecker eigenbasis (George et al. 2018).

For each block, A = mean of a a^T over positions and D = mean of d d^T give the eigenbasis; the eigenvalues are then
corrected: the mean square of each coordinate of the rows' gradients in that basis. Gradients are those
of the model's own uncertainty, not of the gold labels: with B = diag(p) - p p^T, the class directions u with
sum of u u^T = B are differentiated, so the matrix is the Gauss-Newton one (gold labels would give the empirical Fisher).
Positions whose output gradient is zero (padding; all but [CLS] in the last layer) take no part in A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from forebear.errors import CorruptIndexError, NonFiniteError
from forebear.indexer.curvature import class_basis, class_curvature
from forebear.indexer.forward import softmax
from forebear.indexer.gradient_pass import SeedOf, run_pass
from forebear.indexer.model import Classifier
from forebear.indexer.scopes import Block
from forebear.indexer.store import as_tensor, read_batches, write_table
from forebear.indexer.tape import LayerFactors, Seed

EXACT_CLASSES = 4  # up to here every class direction is differentiated; beyond, one random combination a row

Vectors = dict[str, torch.Tensor]  # (q, n_out, n_in) for each block


def curvature_seeds(n_classes: int, n_rows: int, seed: int) -> tuple[SeedOf, ...]:
    """Class directions u whose u u^T sum, exactly or in expectation, to diag(p) - p p^T at each row.

    Args:
        n_classes: c; up to 4 there are c - 1 directions, else one: a seeded combination with signs +-1.
        n_rows: Of the pass that they are for.
        seed: Of the signs.
    """
    rank = n_classes - 1

    def along(weights: np.ndarray) -> SeedOf:
        """``weights`` (n_rows, rank) combine the columns of a square root of B."""

        def seed_of(at: list[int]) -> Seed:
            return lambda logits: np.einsum("bck,bk->bc", class_square_root(softmax(logits)), weights[at])

        return seed_of

    if n_classes <= EXACT_CLASSES:
        return tuple(along(np.broadcast_to(row, (n_rows, rank))) for row in np.eye(rank))
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=(n_rows, rank))
    return (along(signs),)


def class_square_root(p: np.ndarray) -> np.ndarray:
    """U with U U^T = diag(p) - p p^T for each row, ``(n, c, c - 1)`` float64; accurate for all but certain rows too."""
    values, vectors = np.linalg.eigh(class_curvature(p))
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    return np.asarray(np.einsum("kc,nkj->ncj", class_basis(p.shape[1]), root))


@dataclass(frozen=True)
class EkfacBlock:
    """One block's eigenbasis and corrected eigenvalues.

    Attributes:
        block: Which parameters.
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

    def to(self, device: torch.device) -> EkfacBlock:
        """The same on another device."""
        moved = (x.to(device) for x in (self.left, self.right, self.eigenvalues))
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
        """Over all parameters of the scope."""
        total = sum(float(part.eigenvalues.sum(dtype=torch.float64)) for part in self.parts.values())
        return total / sum(part.block.size for part in self.parts.values())

    def solve(self, vectors: Vectors, damping: float) -> Vectors:
        """(H + damping I)^-1 V, block by block."""
        return {name: self._solve_block(self.parts[name], v, damping) for name, v in vectors.items()}

    def _solve_block(self, part: EkfacBlock, v: torch.Tensor, damping: float) -> torch.Tensor:
        rotated = part.left.T @ v @ part.right
        rotated /= part.eigenvalues + damping
        return part.left @ rotated @ part.right.T

    def to(self, device: torch.device) -> Ekfac:
        """The same on another device."""
        return Ekfac({name: part.to(device) for name, part in self.parts.items()}, self.n_rows)


class _Factors:
    """Sums of a a^T and d d^T of each block; positions without an output gradient are left out."""

    def __init__(self, scope: str, blocks: Sequence[Block], device: torch.device) -> None:
        self.scope, self.blocks = scope, tuple(blocks)

        def zeros(n: int) -> torch.Tensor:
            return torch.zeros((n, n), dtype=torch.float64, device=device)

        self.a = {block.name: zeros(block.n_in) for block in blocks}
        self.d = {block.name: zeros(block.n_out) for block in blocks}
        self._batch: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, n_rows: int) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        live = (factors.deltas != 0).any(dim=-1)
        a, d = factors.inputs[live], factors.deltas[live]
        self._batch[name] = (a.T @ a, d.T @ d)

    def end(self, positions: list[int]) -> None:
        for name, (a, d) in self._batch.items():
            self.a[name] += a
            self.d[name] += d


class _Eigenvalues:
    """Sums of the squared coordinates of the rows' gradients."""

    def __init__(self, scope: str, parts: dict[str, EkfacBlock]) -> None:
        self.scope, self.blocks = scope, tuple(part.block for part in parts.values())
        self._parts = parts
        self.sums = {name: torch.zeros_like(part.eigenvalues, dtype=torch.float64) for name, part in parts.items()}
        self._batch: Vectors = {}

    def begin(self, n_rows: int) -> None:
        self._batch = {}

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        self._batch[name] = self._parts[name].rotate(factors).gradients().square_().sum(dim=0)

    def end(self, positions: list[int]) -> None:
        for name, squares in self._batch.items():
            self.sums[name] += squares


def fit_ekfac(
    classifier: Classifier,
    scope: str,
    blocks: Sequence[Block],
    texts: Sequence[Sequence[str]],
    *,
    seed: int,
    batch_tokens: int,
    on_rows: Callable[[int], None] | None = None,
) -> Ekfac:
    """Fit the curvature of a scope on rows of text (labels play no part), in two passes a class direction.

    Args:
        classifier: At the checkpoint.
        scope: Its name.
        blocks: Its parameters.
        texts: A sample of the training rows, one list a text column.
        seed: Of the signs, with more than 4 classes.
        batch_tokens: Largest number of padded tokens in a batch.
        on_rows: Told the number of rows after each batch.

    Raises:
        NonFiniteError: A factor is NaN or infinite.
    """
    n_rows = len(texts[0])
    seeds = curvature_seeds(classifier.n_classes, n_rows, seed)

    def run(collector: _Factors | _Eigenvalues) -> None:
        for seed_of in seeds:
            run_pass(classifier, texts, seed_of, [collector], batch_tokens=batch_tokens, on_rows=on_rows)

    factors = _Factors(scope, blocks, classifier.device)
    run(factors)
    dtype = classifier.head.weight.dtype
    parts = {}
    for block in blocks:
        left, right = (_eigenvectors(m[block.name], block.name).to(dtype) for m in (factors.d, factors.a))
        empty = torch.zeros((block.n_out, block.n_in), dtype=dtype, device=classifier.device)
        parts[block.name] = EkfacBlock(block, left, right, empty)
    squares = _Eigenvalues(scope, parts)
    run(squares)
    return Ekfac(
        {
            name: EkfacBlock(part.block, part.left, part.right, (squares.sums[name] / n_rows).to(dtype))
            for name, part in parts.items()
        },
        n_rows,
    )


def _eigenvectors(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """Columns by falling eigenvalue."""
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"the curvature factor of layer {name} is NaN or infinite. Check the model.")
    vectors: torch.Tensor = torch.linalg.eigh(matrix).eigenvectors
    return vectors.flip(1).contiguous()


_FIELDS = ("left", "right", "eigenvalues")


def write_ekfac(path: Path, ekfac: Ekfac) -> None:
    """One record batch a block, float32."""
    schema = pa.schema(
        [("name", pa.string()), ("kind", pa.string()), ("bias", pa.bool_()), ("shape", pa.list_(pa.int64()))]
        + [(field, pa.large_list(pa.float32())) for field in _FIELDS],
        metadata={"n_rows": str(ekfac.n_rows)},
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for part in ekfac.parts.values():
            block = part.block
            numbers = [getattr(part, field).float().cpu().numpy().reshape(-1) for field in _FIELDS]
            columns = [pa.array([block.name]), pa.array([block.kind]), pa.array([block.bias])]
            columns.append(pa.array([[block.n_out, block.n_in]], pa.list_(pa.int64())))
            columns += [pa.LargeListArray.from_arrays(pa.array([0, len(x)], pa.int64()), pa.array(x)) for x in numbers]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    write_table(path, batches(), schema)


def read_ekfac(path: Path) -> Ekfac:
    """Memory-map what :func:`write_ekfac` wrote.

    Raises:
        CorruptIndexError: It is no such file.
    """
    batches = read_batches(path)
    parts = {}
    try:
        for batch in batches:
            n_out, n_in = batch.column("shape")[0].as_py()
            name = batch.column("name")[0].as_py()
            block = Block(name, batch.column("kind")[0].as_py(), n_out, n_in, batch.column("bias")[0].as_py())
            left, right, eigenvalues = (
                as_tensor(batch.column(field).values.to_numpy(zero_copy_only=True)) for field in _FIELDS
            )
            parts[name] = EkfacBlock(
                block, left.view(n_out, n_out), right.view(n_in, n_in), eigenvalues.view(n_out, n_in)
            )
        return Ekfac(parts, int(batches[0].schema.metadata[b"n_rows"]))
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise CorruptIndexError(f"{path} is no curvature file ({error}).") from error
