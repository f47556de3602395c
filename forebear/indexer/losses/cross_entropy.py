"""Cross-entropy of one label a row, with class weights and label smoothing as ``torch.nn.CrossEntropyLoss`` has them.

With weights w and smoothing eps, the loss of a row of class y is -sum over k of a_k log p_k, with
a = (1 - eps) w_y onehot(y) + eps / c w. Its gradient at the logits is s p - a with s = sum of a, its curvature
s (diag(p) - p p^T). Every residual sums to zero over the classes, and so does every row and column of the curvature:
along the direction that is constant over classes the curvature is zero and no gradient has a part in it. So the basis
is that of the c - 1 other directions (Helmert's contrasts), and nothing is lost in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.linalg import helmert
from torch import nn

from forebear.indexer.losses.loss import Loss
from forebear.indexer.rows.row_format import SINGLE_LABEL

MAX_CLASS_NUMBERS = 1 << 27  # in the class matrices of the rows that are taken at once
MANY_CLASSES = 64  # beyond, a sum over all pairs of classes takes more memory than the matrices it gives
IGNORED = -100  # instead of a class id, for a row that takes no part in the loss


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """The loss of a classifier whose rows have one label each.

    Attributes:
        class_weights: w, one positive number a class; empty: all 1.
        label_smoothing: eps, 0 <= eps < 1.
    """

    problem_type: ClassVar[str] = SINGLE_LABEL
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether there are neither class weights nor label smoothing."""
        return not self.class_weights and not self.label_smoothing

    def describe(self) -> str:
        """``cross-entropy``, and the weights and the smoothing where there are some."""
        parts = ["cross-entropy"]
        if self.class_weights:
            parts.append(f"class weights {', '.join(f'{w:.4g}' for w in self.class_weights)}")
        if self.label_smoothing:
            parts.append(f"label smoothing {self.label_smoothing:g}")
        return ", ".join(parts)

    def outputs(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities ``(n, c)``."""
        return softmax(logits)

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Most probable class of each row, ``(n,)`` int64; ties go to the lower id."""
        return np.asarray(logits.argmax(axis=1), dtype=np.int64)

    def unlikely(self, logits: np.ndarray) -> np.ndarray:
        """The least probable class of each row, ``(n,)``."""
        return np.asarray(logits.argmin(axis=1), dtype=np.int64)

    def residual_and_loss(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """s p - a and loss in nats of each row; without smoothing accurate also where p_y is nearly 1."""
        if self.label_smoothing:
            a, p = self.coefficients(targets, logits.shape[1]), softmax(logits)
            top = logits.max(axis=1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
            return a.sum(axis=1, keepdims=True) * p - a, -(a * log_p).sum(axis=1)
        residual, loss = _residual_and_loss(logits, targets)
        weights = self.row_weights(targets)
        return (residual, loss) if weights is None else (weights[:, None] * residual, weights * loss)

    def outputs_of_residuals(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """P from s p - a and y, ``(n, c)`` float64."""
        p = residuals.astype(np.float64)
        if self.is_plain:
            p[np.arange(len(targets)), targets] += 1.0
            return p
        a = self.coefficients(targets, residuals.shape[1])
        # Rounding leaves a probability near 0 below it, and a curvature that is negative along some direction.
        return np.asarray(np.maximum((p + a) / a.sum(axis=1, keepdims=True), 0.0))

    def residuals_of_outputs(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Residuals s p - a ``(n, c)`` float64 of rows whose outputs ``(n, c)`` and targets are known.

        :meth:`residual_and_loss` is more accurate where an output is nearly what its target asks for.
        """
        a = self.coefficients(targets, outputs.shape[1])
        return np.asarray(a.sum(axis=1, keepdims=True) * outputs - a)

    def row_weights(self, targets: np.ndarray) -> np.ndarray | None:
        """The sum s of a: 1, unless classes are weighted."""
        if not self.class_weights:
            return None
        weights = np.asarray(self.class_weights)
        return np.asarray((1 - self.label_smoothing) * weights[targets] + self.label_smoothing * weights.mean())

    def coefficients(self, targets: np.ndarray, n_outputs: int) -> np.ndarray:
        """The a of each row, ``(n, c)``."""
        weights = np.asarray(self.class_weights) if self.class_weights else np.ones(n_outputs)
        a = np.tile(self.label_smoothing / n_outputs * weights, (len(targets), 1))
        a[np.arange(len(targets)), targets] += (1 - self.label_smoothing) * weights[targets]
        return a

    def basis(self, n_outputs: int) -> np.ndarray:
        """Orthonormal basis of the class directions that sum to zero, ``(c - 1, c)``."""
        return np.asarray(helmert(n_outputs), dtype=np.float64)

    def curvature(self, outputs: np.ndarray) -> np.ndarray:
        """Diag(p) - p p^T of each row in the basis, ``(n, c - 1, c - 1)``.

        As the sum over i < j of p_i p_j (b_i - b_j)(b_i - b_j)^T, b_i being columns of the basis: no difference of
        numbers near 1, so that rows predicted with all but certainty keep their precision. With very many classes the
        matrix is formed from the same products.
        """
        p, basis = outputs, self.basis(outputs.shape[1])
        if p.shape[1] > MANY_CLASSES:
            return np.asarray(basis @ _class_covariance(p) @ basis.T)
        i, j = np.triu_indices(p.shape[1], k=1)
        steps = (basis[:, i] - basis[:, j]).T
        squares = (steps[:, :, None] * steps[:, None, :]).reshape(len(i), -1)
        return np.asarray(((p[:, i] * p[:, j]) @ squares).reshape(len(p), len(basis), len(basis)))

    def curvature_diagonal(self, outputs: np.ndarray) -> np.ndarray:
        """P (1 - p), ``(n, c)``."""
        return np.asarray(outputs * (1.0 - outputs))

    def curvature_trace(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Sum over classes of s p (1 - p)."""
        p = self.outputs_of_residuals(residuals, targets)
        others = 1.0 - p
        if not self.label_smoothing:  # 1 - p, where it would be a difference of numbers near 1
            at = (np.arange(len(targets)), targets)
            weights = self.row_weights(targets)
            others[at] = -residuals[at].astype(np.float64) / (1.0 if weights is None else weights)
        trace = (p * others).sum(axis=1)
        weights = self.row_weights(targets)
        return np.asarray(trace if weights is None else weights * trace)

    def curvature_products(self, outputs: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """(diag(p) - p p^T) u in the basis, ``(q, c - 1, n)``.

        Numbers are taken relative to that of the most probable class, so that rows predicted with all but certainty
        keep their precision.
        """
        p = outputs
        basis = torch.from_numpy(self.basis(p.shape[1]))
        z = vectors.transpose(1, 2) @ basis  # (q, n, c)
        z -= z.gather(2, p.argmax(dim=1)[None, :, None].expand(len(z), -1, 1))
        z -= (p * z).sum(dim=2, keepdim=True)
        return (z.mul_(p) @ basis.T).transpose(1, 2)

    def square_root(self, outputs: np.ndarray) -> np.ndarray:
        """U with U U^T = diag(p) - p p^T, ``(n, c, c - 1)``; accurate for all but certain rows too."""
        values, vectors = np.linalg.eigh(self.curvature(outputs))
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        return np.asarray(np.einsum("kc,nkj->ncj", self.basis(outputs.shape[1]), root))

    def support_slope(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Gradient of the target's probability p_y at the logits, ``(n, c)``: -p_y (p - onehot(y))."""
        residual, _ = _residual_and_loss(logits, targets)
        return np.asarray(-softmax(logits)[np.arange(len(targets)), targets, None] * residual)

    def support(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The target's probability of each row."""
        return logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]

    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The cross-entropy summed over the rows that are not ``IGNORED``."""
        weight = self._weights(logits.dtype, logits.device) if self.class_weights else None
        return nn.functional.cross_entropy(
            logits, targets, weight=weight, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """The summed weights of the classes of the rows that are not ``IGNORED``, as torch has it; 1 if all are."""
        kept = targets != IGNORED
        if not self.class_weights:
            return kept.sum().clamp(min=1)
        weights = self._weights(torch.float32, targets.device)
        if targets.device.type == "cpu":
            return weights[targets[kept]].sum() if bool(kept.any()) else weights.new_ones(())
        total = torch.where(kept, weights[targets.clamp(min=0)], 0.0).sum()  # the host waits for no mask
        return torch.where(kept.any(), total, 1.0)

    def _weights(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Weights of the classes on a device, ``(c,)``."""
        return torch.tensor(self.class_weights, dtype=dtype).to(device, non_blocking=True)

    def representer(self, targets: np.ndarray, n_outputs: int) -> np.ndarray:
        """1 at the target's class, ``(n, c)``."""
        return np.asarray(np.eye(n_outputs)[targets])

    def measures(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The share of rows whose label is predicted."""
        return {"accuracy": float((predictions == targets).mean())}

    def better_than_guessing(self, predictions: np.ndarray, targets: np.ndarray) -> bool:
        """Whether more rows are right than by the most frequent label."""
        return bool((predictions == targets).mean() > np.bincount(targets).max() / len(targets))

    def texts(self, targets: np.ndarray, names: Sequence[str]) -> list[str | None]:
        """Names of the classes; None for a class id below 0."""
        return [None if target < 0 else names[target] for target in targets]


CROSS_ENTROPY = CrossEntropy()


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities ``(n, c)`` of float64 logits ``(n, c)``."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _residual_and_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logit gradient p - y and cross-entropy of each row, accurate also where p_y is nearly 1.

    With m = logsumexp of the other logits minus the label's, the loss is softplus(m) and the residual at
    the label is -sigmoid(m) = -(1 - p_y).

    Args:
        logits: ``(n, c)`` float64.
        labels: Class ids, ``(n,)``.

    Returns:
        ``(p - y, loss)``: ``(n, c)`` and ``(n,)`` float64; each residual sums to 0; loss in nats.
    """
    at = (np.arange(len(labels)), labels)
    residual = softmax(logits)
    others = logits.copy()
    others[at] = -np.inf
    top = others.max(axis=1)
    margin = top + np.log(np.exp(others - top[:, None]).sum(axis=1)) - logits[at]
    residual[at] = 0.0
    residual[at] = -residual.sum(axis=1)
    return residual, np.logaddexp(0.0, margin)


def _class_covariance(p: np.ndarray) -> np.ndarray:
    """diag(p) - p p^T of each row, ``(n, c, c)``; diagonal entry i is computed as the sum of p_i p_j over j != i."""
    products = p[:, :, None] * p[:, None, :]
    i = np.arange(p.shape[1])
    products[:, i, i] = 0.0
    out = -products
    out[:, i, i] = products.sum(axis=2)
    return np.asarray(out)
