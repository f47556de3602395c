"""What is known of a loss: values and derivatives at the logits of a row, in float64, and names for people.

The *target* of a row is what its loss compares the logits with; what the model *says* is of the same kind. Of a
classifier of one label a row both are class ids ``(n,)`` int64, else numbers ``(n, c)`` float64, one an output.
Everything else in the package asks the loss, and knows no formula of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch


class Loss(ABC):
    """A loss of one row: a function of its c logits and of its target.

    The *outputs* are what curvature depends on beside the target: the probabilities of a classifier. The curvature at
    the logits is weight x B(outputs); B is the same for all targets, and the weight of a row depends on its target
    alone (:meth:`row_weights`).

    Attributes:
        problem_type: What targets are, one of ``PROBLEM_TYPES``.
        is_separate: Whether B is diagonal in the basis of the outputs, so that the head's curvature is one matrix over
            the features for each output.
    """

    problem_type: ClassVar[str]
    is_separate: ClassVar[bool] = False

    @property
    def is_plain(self) -> bool:
        """Whether this is the unweighted cross-entropy of one label a row."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """The loss in a few words, such as ``cross-entropy, label smoothing 0.1``."""

    @abstractmethod
    def outputs(self, logits: np.ndarray) -> np.ndarray:
        """Outputs ``(n, c)`` of float64 logits ``(n, c)``."""

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What is shown of the outputs, ``(n, c)`` float64: probabilities, of a regression the numbers."""
        return self.outputs(logits)

    @abstractmethod
    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """What the model says of each row, as targets."""

    def targets_of(self, predictions: np.ndarray) -> np.ndarray:
        """The targets by which predictions are explained: they themselves, but for a regression."""
        return predictions

    @abstractmethod
    def unlikely(self, logits: np.ndarray) -> np.ndarray:
        """Targets that the model does not predict, whose gradients are large."""

    @abstractmethod
    def residual_and_loss(self, logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient at the logits, the *residual*, ``(n, c)``, and loss ``(n,)`` of each row, both float64.

        Args:
            logits: ``(n, c)`` float64.
            targets: ``n`` targets.
        """

    @abstractmethod
    def outputs_of_residuals(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Outputs ``(n, c)`` float64 of rows whose residuals ``(n, c)`` and targets are known."""

    @abstractmethod
    def row_weights(self, targets: np.ndarray) -> np.ndarray | None:
        """Factor of each row's curvature, ``(n,)`` float64; None: all are 1, and targets play no part."""

    @abstractmethod
    def basis(self, n_outputs: int) -> np.ndarray:
        """Orthonormal directions ``(m, c)`` that hold every residual and all curvature; the head is solved in them."""

    @abstractmethod
    def curvature(self, outputs: np.ndarray) -> np.ndarray:
        """B of each row in the basis, ``(n, m, m)`` float64."""

    @abstractmethod
    def curvature_diagonal(self, outputs: np.ndarray) -> np.ndarray:
        """Diagonal of B of each row, not in the basis: ``(n, c)`` float64."""

    @abstractmethod
    def curvature_trace(self, residuals: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Trace of weight x B of each row ``(n,)``, from its residual ``(n, c)`` and target."""

    @abstractmethod
    def curvature_products(self, outputs: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """B u in the basis, no matrix being formed.

        Args:
            outputs: ``(n, c)`` float64.
            vectors: u, ``(q, m, n)``.

        Returns:
            ``(q, m, n)``.
        """

    @abstractmethod
    def square_root(self, outputs: np.ndarray) -> np.ndarray:
        """U with U U^T = B for each row, not in the basis: ``(n, c, m)`` float64."""

    @abstractmethod
    def support_slope(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Gradient of :meth:`support` at the logits, ``(n, c)`` float64."""

    @abstractmethod
    def support(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """How much the outputs speak for the targets, ``(n,)``, differentiable: of a classifier the probability."""

    @abstractmethod
    def summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss summed over rows, differentiable: a scalar of the logits' type."""

    @abstractmethod
    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        """What training divides the summed loss of a batch by: the number of rows, or their weights; a scalar."""

    @abstractmethod
    def representer(self, targets: np.ndarray, n_outputs: int) -> np.ndarray:
        """The combination of logits that speaks for each target, ``(n, c)`` float64: of a classifier its class."""

    @abstractmethod
    def measures(self, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """How well predictions fit their targets, by the names of the measures; the first one is the main one."""

    @abstractmethod
    def better_than_guessing(self, predictions: np.ndarray, targets: np.ndarray) -> bool:
        """Whether predictions fit better than what could be said without reading the rows."""

    @abstractmethod
    def texts(self, targets: np.ndarray, names: Sequence[str]) -> list[str | None]:
        """Targets as people read them; None where a row has none.

        Args:
            targets: ``n`` targets.
            names: Names of the c outputs.
        """

    def mean(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch that training minimises, differentiable: a scalar of the logits' type."""
        return self.summed(logits, targets) / self.total_weight(targets)

    def weighted_mean(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`mean` with a weight for each row, differentiable also with respect to the weights.

        A weight counts in the divisor, too: with weight 0 the batch has the mean of the other rows, as where the row's
        target is ``IGNORED``.

        Args:
            logits: ``(n, c)``.
            targets: ``n`` targets, none of them ``IGNORED``.
            weights: ``(n,)``; the loss of a batch whose weights are all 0 is 0.
        """
        rows = list(zip(torch.split(logits, 1), torch.split(targets, 1), strict=True))
        losses = torch.stack([self.summed(*row) for row in rows])
        totals = torch.stack([self.total_weight(target).to(losses) for _, target in rows])
        total = (weights * totals).sum()
        return (weights * losses).sum() / torch.where(total > 0, total, 1.0)


def number_text(number: float) -> str:
    """The shortest text from which a number can be read again: of float32 if it is one, else of float64."""
    value = np.float32(number) if np.float32(number) == number else np.float64(number)
    return str(value.item() if isinstance(value, np.float64) else value).removesuffix(".0")
