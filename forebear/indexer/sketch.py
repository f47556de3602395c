"""Gradient sketches: S = (A d)^T (B a) summed over tokens, layer by layer, then reduced by a PCA; exact norms beside.

A (k_out x out) and B (k_in x in) have orthonormal rows drawn from the seed, so S is an orthogonal projection of the
gradient, ||S|| <= ||G||, and the residual length sqrt(||G||^2 - ||S||^2) says how much of it is lost. The PCA is fitted
on the rows' own unit sketches, uncentred and unwhitened: its rows are orthonormal too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from forebear.indexer.forward import Forward
from forebear.indexer.gradient_pass import labels_seed, refuse_non_finite, run_pass
from forebear.indexer.model import Classifier
from forebear.indexer.scopes import Block, scope_blocks
from forebear.indexer.store import as_tensor, column, read_batches
from forebear.indexer.tape import LayerFactors

SIDE = 16  # k_out and k_in, at most
FIT_ROWS = 2048  # rows on which the second reduction is fitted
REDUCTION_NAME = "reduction.arrow"


def gradient_folder(scope: str, checkpoint: str) -> str:
    """Where an index keeps the sketches of a scope at a checkpoint."""
    return f"gradients/{scope}/{checkpoint}"


def read_reduction(path: Path) -> np.ndarray:
    """The second reduction of a scope, ``(d, D)`` float32."""
    return column(read_batches(path)[0], "basis")


@dataclass(frozen=True)
class LayerBasis:
    """Orthonormal rows for one layer: ``left`` A ``(k_out, out)``, ``right`` B ``(k_in, in)``."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class GradientRows:
    """Sketches and norms of ``n`` rows, in the order they were given.

    Attributes:
        sketches: ``(n, D)`` float32, not normalised; D is the raw width, or d after a reduction.
        norms: ||G||, exact, ``(n,)`` float64.
        forward: Features and logits, from the same pass.
    """

    sketches: np.ndarray
    norms: np.ndarray
    forward: Forward


def stored_sketches(found: GradientRows) -> dict[str, np.ndarray]:
    """Columns of a gradient shard: unit sketch in fp16, its length, exact norm and residual length in float32.

    Tiny and huge gradients keep their precision: what is rounded to fp16 has length 1.
    """
    lengths = np.linalg.norm(found.sketches.astype(np.float64), axis=1)
    unit = np.divide(found.sketches, lengths[:, None], out=np.zeros_like(found.sketches), where=lengths[:, None] > 0)
    residual = np.sqrt(np.maximum(found.norms**2 - lengths**2, 0.0))
    return {
        "sketch": unit.astype(np.float16),
        "length": lengths.astype(np.float32),
        "norm": found.norms.astype(np.float32),
        "residual_length": residual.astype(np.float32),
    }


class Sketcher:
    """Sketches the gradients of one classifier over one scope."""

    def __init__(
        self, classifier: Classifier, scope: str, seed: int, reduction: np.ndarray | None = None, side: int = SIDE
    ) -> None:
        """Draw the bases.

        Args:
            classifier: Whose gradients.
            scope: ``top-K`` or ``all``.
            seed: Of the bases; the same seed gives the same sketch.
            reduction: Orthonormal rows of the second reduction, ``(d, D)``, or None for raw sketches.
            side: k_out and k_in, at most.
        """
        self.classifier = classifier
        self.scope = scope
        self.blocks = scope_blocks(classifier.model, classifier.head_name, scope, classifier.name)
        self.reduction = None if reduction is None else as_tensor(reduction).to(classifier.device)
        self.bases = {block.name: _draw(classifier, block, i, seed, side) for i, block in enumerate(self.blocks)}
        sizes = [len(b.left) * len(b.right) for b in self.bases.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.slices = {
            name: slice(int(a), int(b)) for name, a, b in zip(self.bases, starts[:-1], starts[1:], strict=True)
        }
        self.raw_width = int(starts[-1])

    def sketch(
        self,
        texts: Sequence[Sequence[str]],
        labels: np.ndarray | None,
        *,
        batch_tokens: int,
        first_row: int = 0,
        on_rows: Callable[[int], None] | None = None,
    ) -> GradientRows:
        """Sketch the loss gradients of rows of text.

        Args:
            texts: One list a text column.
            labels: Class whose loss is differentiated, ``(n,)``; None: the predicted one.
            batch_tokens: Largest number of padded tokens in a batch.
            first_row: Row number of the first text, for messages.
            on_rows: Told the number of rows after each batch.

        Raises:
            NonFiniteError: A gradient is NaN or infinite; the row is named.
        """
        collector = _Sketches(self, len(texts[0]))
        forward = run_pass(
            self.classifier, texts, labels_seed(labels), [collector],
            batch_tokens=batch_tokens, first_row=first_row, on_rows=on_rows,
        )  # fmt: skip
        refuse_non_finite(self.classifier.name, first_row, collector.norms, collector.sketches)
        return GradientRows(collector.sketches, collector.norms, forward)


class _Sketches:
    """Gathers sketches and norms."""

    def __init__(self, sketcher: Sketcher, n_rows: int) -> None:
        self.scope, self.blocks = sketcher.scope, sketcher.blocks
        self._sketcher = sketcher
        width = sketcher.raw_width if sketcher.reduction is None else len(sketcher.reduction)
        self.sketches = np.empty((n_rows, width), np.float32)
        self.norms = np.empty(n_rows)

    def begin(self, n_rows: int) -> None:
        device = self._sketcher.classifier.device
        self._raw = torch.zeros((n_rows, self._sketcher.raw_width), device=device)
        self._squares = torch.zeros(n_rows, dtype=torch.float64, device=device)

    def on_layer(self, name: str, factors: LayerFactors) -> None:
        basis = self._sketcher.bases[name]
        u, v = factors.deltas @ basis.left.T, factors.inputs @ basis.right.T
        self._raw[:, self._sketcher.slices[name]] = torch.bmm(u.transpose(1, 2), v).flatten(1)
        self._squares += squared_norms(factors)

    def end(self, positions: list[int]) -> None:
        reduction = self._sketcher.reduction
        reduced = self._raw if reduction is None else self._raw @ reduction.T
        self.sketches[positions] = reduced.cpu().numpy()
        self.norms[positions] = self._squares.sqrt().cpu().numpy()


def squared_norms(factors: LayerFactors) -> torch.Tensor:
    """||G||^2 of each row, ``(b,)`` float64: sum over t, s of (d_t . d_s)(a_t . a_s), or from G if cheaper."""
    a, d = factors.inputs, factors.deltas
    tokens, n_in, n_out = a.shape[1], a.shape[2], d.shape[2]
    if tokens * (n_in + n_out) > n_in * n_out:
        return torch.bmm(d.transpose(1, 2), a).square_().sum(dim=(1, 2), dtype=torch.float64)
    products = torch.bmm(d, d.transpose(1, 2)).mul_(torch.bmm(a, a.transpose(1, 2)))
    return products.sum(dim=(1, 2), dtype=torch.float64).clamp_min_(0)


def _draw(classifier: Classifier, block: Block, number: int, seed: int, side: int) -> LayerBasis:
    rng = np.random.default_rng([seed, number])

    def rows(width: int) -> torch.Tensor:
        q, _ = np.linalg.qr(rng.normal(size=(width, min(side, width))))
        return torch.from_numpy(np.ascontiguousarray(q.T, dtype=np.float32)).to(classifier.device)

    return LayerBasis(rows(block.n_out), rows(block.n_in))


def fit_reduction(sketches: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Orthonormal rows that keep most of unit sketches: an uncentred PCA.

    Args:
        sketches: Raw sketches of a sample of rows, ``(n, D)``; each is scaled to unit length first.
        width: d, at most min(n, D) is used.
        seed: Of the randomised SVD.

    Returns:
        ``(d, D)`` float32.
    """
    from sklearn.utils.extmath import randomized_svd

    norms = np.linalg.norm(sketches, axis=1, keepdims=True)
    unit = np.divide(sketches, norms, out=np.zeros_like(sketches), where=norms > 0)
    _, _, rows = randomized_svd(unit, n_components=min(width, *unit.shape), n_iter=4, random_state=seed)
    q, _ = np.linalg.qr(rows.T.astype(np.float64))
    return np.ascontiguousarray(q.T, dtype=np.float32)
