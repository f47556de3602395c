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

from forebear.errors import NonFiniteError
from forebear.indexer.forward import Forward, softmax
from forebear.indexer.model import Classifier, encode, plan_batches
from forebear.indexer.scopes import scope_layers
from forebear.indexer.store import as_tensor, column, read_batches
from forebear.indexer.tape import LayerFactors, Tape

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
        self.layers = scope_layers(classifier.model, classifier.head_name, scope, classifier.name)
        self.tape = Tape(classifier, self.layers, scope)
        self.reduction = None if reduction is None else as_tensor(reduction).to(classifier.device)
        self.bases = {name: _draw(classifier, name, i, seed, side) for i, name in enumerate(self.layers)}
        sizes = [len(b.left) * len(b.right) for b in self.bases.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self._slices = {
            name: slice(int(a), int(b)) for name, a, b in zip(self.layers, starts[:-1], starts[1:], strict=True)
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
        rows = encode(self.classifier, texts)
        width = self.raw_width if self.reduction is None else len(self.reduction)
        sketches = np.empty((len(rows), width), np.float32)
        norms = np.empty(len(rows))
        features = np.empty((len(rows), self.classifier.feature_dim), np.float32)
        logits = np.empty((len(rows), self.classifier.n_classes))
        for batch in plan_batches([len(row["input_ids"]) for row in rows], batch_tokens):
            raw = torch.zeros((len(batch), self.raw_width), device=self.classifier.device)
            squares = torch.zeros(len(batch), dtype=torch.float64, device=self.classifier.device)

            def on_layer(name: str, factors: LayerFactors, raw: torch.Tensor = raw, sq: torch.Tensor = squares) -> None:
                basis = self.bases[name]
                u, v = factors.deltas @ basis.left.T, factors.inputs @ basis.right.T
                raw[:, self._slices[name]] = torch.bmm(u.transpose(1, 2), v).flatten(1)
                sq.add_(squared_norms(factors))

            wanted = None if labels is None else labels[batch]
            f, z = self.tape.record([rows[i] for i in batch], wanted, on_layer)
            reduced = raw if self.reduction is None else raw @ self.reduction.T
            sketches[batch], norms[batch] = reduced.cpu().numpy(), squares.sqrt().cpu().numpy()
            features[batch], logits[batch] = f, z
            if on_rows is not None:
                on_rows(len(batch))
        finite = np.isfinite(norms) & np.isfinite(logits).all(axis=1) & np.isfinite(sketches).all(axis=1)
        if not finite.all():
            row = first_row + int(np.argmin(finite))
            raise NonFiniteError(
                f"{self.classifier.name}: the gradient of row {row} is NaN or infinite. Check the model."
            )
        return GradientRows(sketches, norms, Forward(features, softmax(logits), logits))


def squared_norms(factors: LayerFactors) -> torch.Tensor:
    """||G||^2 of each row, ``(b,)`` float64: sum over t, s of (d_t . d_s)(a_t . a_s), or from G if cheaper."""
    a, d = factors.inputs, factors.deltas
    tokens, n_in, n_out = a.shape[1], a.shape[2], d.shape[2]
    if tokens * (n_in + n_out) > n_in * n_out:
        return torch.bmm(d.transpose(1, 2), a).square_().sum(dim=(1, 2), dtype=torch.float64)
    products = torch.bmm(d, d.transpose(1, 2)).mul_(torch.bmm(a, a.transpose(1, 2)))
    return products.sum(dim=(1, 2), dtype=torch.float64).clamp_min_(0)


def _draw(classifier: Classifier, name: str, number: int, seed: int, side: int) -> LayerBasis:
    weight = classifier.model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    rng = np.random.default_rng([seed, number])

    def rows(width: int) -> torch.Tensor:
        q, _ = np.linalg.qr(rng.normal(size=(width, min(side, width))))
        return torch.from_numpy(np.ascontiguousarray(q.T, dtype=np.float32)).to(weight.device)

    n_out, n_in = weight.shape
    return LayerBasis(rows(n_out), rows(n_in))


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
