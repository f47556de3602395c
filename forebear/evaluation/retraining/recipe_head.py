"""Refitting of the head alone, to convergence, on the features of the index's last checkpoint.

The encoder stays as it is, and so still knows the rows that were removed. ``head`` fits a new head; ``proximal-head``
goes from the trained head to the minimum that influence functions linearise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear.errors import InputError
from forebear.evaluation.retraining.jobs import Job, TrainingRows
from forebear.indexer.losses.cross_entropy import IGNORED, CrossEntropy
from forebear.indexer.model.device.arithmetic import computed_on
from forebear.indexer.model.forward import run_forward
from forebear.indexer.storage.manifest import digest_of, library_versions
from forebear.indexer.training.recorded_start import LIBRARIES
from forebear.retriever.effects.minimum import HeadRows, Refit
from forebear.retriever.effects.refits import trained_rows
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.retriever import Retriever

DEFAULT_L2 = 0.01  # of Pez21's head
GRADIENT_TOLERANCE = 1e-8
ACCEPTED_GRADIENT = 1e-6  # where the line search ends at the last bits of the loss


class HeadRecipe:
    """Fit the head to stored features; see :class:`~forebear.evaluation.retraining.jobs.Recipe`.

    Softmax regression without dropout or a random start: the loss is strictly convex, its minimum does not depend on
    the seed. The bias, where the head has one, is the weight of one more feature that is 1, and penalised alike; so the
    minimum exists also when a class has no rows left, whose probability is then small.
    """

    name = "head"
    seeded = False

    def __init__(
        self, retriever: Retriever, rows: TrainingRows, evaluation: Sequence[Sequence[str]], l2: float
    ) -> None:
        if not 0 < l2 < math.inf:
            raise InputError(f"--l2 {l2}: expected a positive number; without it the head has no best weights.")
        self._classifier, self._labels, self._l2 = retriever.classifier(), rows.labels, l2
        assert isinstance(retriever.index.loss, CrossEntropy)
        self._loss = retriever.index.loss
        self._has_bias = self._classifier.head.bias is not None
        index = retriever.index
        self._features = self._extended(index.features().take(np.arange(len(rows.labels))))
        self._evaluation = self._extended(run_forward(self._classifier, evaluation).features)
        self._begin = torch.zeros((len(rows.label_names), self._features.shape[1]), dtype=torch.float64)
        self._begin = self._fit(self._features[rows.live], torch.from_numpy(rows.labels[rows.live]), "all rows")
        spec = index.manifest.spec
        self.facts: Mapping[str, Any] = {
            "checkpoint_sha256": spec.checkpoint_sha256[-1], "tokenizer_sha256": spec.tokenizer_sha256,
            "max_length": spec.max_length, "precision": spec.precision, "l2": l2, "bias": self._has_bias,
            "begin": digest_of(rows.live.tolist()), "libraries": library_versions(LIBRARIES),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        where = computed_on(self._classifier.device, self._classifier.precision)
        if where["device"] != "cpu":  # outcomes of older versions on the CPU stay known
            self.facts = {**self.facts, "computed_on": where}
        if not self._loss.is_plain:
            self.facts = {**self.facts, "loss": asdict(self._loss)}
        self.note = (
            f"A stand-in for fine-tuning: only the head is fitted again (L2 {l2:g}, to convergence), on features of "
            "the trained encoder, which has seen all rows. Seeds make no difference to it."
        )

    def _extended(self, features: np.ndarray) -> torch.Tensor:
        """Features in float64, with a last column of ones for the bias."""
        wide = torch.from_numpy(features.astype(np.float64))
        return torch.cat([wide, torch.ones((len(wide), 1), dtype=torch.float64)], dim=1) if self._has_bias else wide

    def train(self, job: Job) -> np.ndarray:
        """Logits of the refitted head on the evaluation rows, ``(q, c)``."""
        labels, weights = job.weighted_labels(self._labels)
        features = torch.empty((len(labels), self._features.shape[1]), dtype=torch.float64)
        features[: len(job.rows)] = self._features[job.rows]
        places, texts = job.changed()
        if len(places):
            features[places] = self._extended(run_forward(self._classifier, texts).features)
        kept = torch.from_numpy(labels != IGNORED if weights is None else weights > 0)
        of_kept = None if weights is None else torch.from_numpy(weights)[kept]
        head = self._fit(features[kept], torch.from_numpy(labels)[kept], f"{len(job)} rows", of_kept)
        return (self._evaluation @ head.T).numpy()

    def _fit(
        self, features: torch.Tensor, labels: torch.Tensor, row_set: str, factors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weights ``(c, h)`` that minimise mean cross-entropy + l2 / 2 ||W||^2, from the fit to all rows on.

        ``factors`` ``(n,)`` of the rows make the mean a weighted one.
        """
        from scipy.optimize import minimize

        shape = self._begin.shape
        targets = torch.from_numpy(self._loss.coefficients(labels.numpy(), shape[0]))  # onehot, if plain
        total = float(self._loss.total_weight(labels))
        if factors is not None:
            of_class = torch.tensor([float(self._loss.total_weight(torch.tensor([y]))) for y in range(shape[0])])
            targets, total = factors[:, None] * targets, float((factors * of_class.double()[labels]).sum())
        weights_of_rows = targets.sum(dim=1, keepdim=True)

        def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(flat).view(shape)
            log_p = nn.functional.log_softmax(features @ weights.T, dim=1)
            loss = -(log_p * targets).sum() / total + self._l2 / 2 * weights.square().sum()
            gradient = (weights_of_rows * log_p.exp() - targets).T @ features / total + self._l2 * weights
            return loss.item(), gradient.reshape(-1).numpy()

        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": GRADIENT_TOLERANCE, "ftol": 0.0, "maxcor": 20}
        fit = minimize(loss_and_gradient, self._begin.reshape(-1).numpy(), jac=True, method="L-BFGS-B", options=options)
        largest = float(np.abs(fit.jac).max())
        if not largest <= ACCEPTED_GRADIENT:
            raise InputError(
                f"the head's fit to {row_set} did not converge: largest gradient {largest:.1e}, expected "
                f"{ACCEPTED_GRADIENT:g}. Give a larger --l2 (now {self._l2:g})."
            )
        return torch.from_numpy(fit.x).view(shape)


class ProximalHeadRecipe:
    """Refit the head from its trained weight W0; see :class:`~forebear.evaluation.retraining.jobs.Recipe`.

    To the minimum of J_S (:mod:`forebear.retriever.effects.steps`): the mean loss of the rows that are trained on, plus
    damping/2 ||W - W0||^2, less the loss' linear part at W0, so that on all rows W0 is the minimum whether its training
    came to the end or not (the proximal Bregman response; Bae et al., 2022). The bias stays. The divisor of the mean is
    the number of live rows, however many are left out, added or weighted.
    """

    name = "proximal-head"
    seeded = False
    logits_type = np.float64  # changes without a single row are small beside float32's rounding

    def __init__(
        self, retriever: Retriever, rows: TrainingRows, evaluation: Sequence[Sequence[str]], damping: str | None
    ) -> None:
        self._classifier, self._labels = retriever.classifier(), rows.labels
        index = retriever.index
        size = CurvatureSpec(damping=damping).absolute(index, "head")
        if not size > 0:
            raise InputError(f"--damping {damping}: expected more than 0; without it the head has no nearest minimum.")
        self._rows = rows.live
        self._trained = trained_rows(index, self._classifier)
        self._refit = Refit(self._trained, index.loss, size)
        self._evaluation = run_forward(self._classifier, evaluation)
        spec = index.manifest.spec
        self.facts: Mapping[str, Any] = {
            "checkpoint_sha256": spec.checkpoint_sha256[-1], "tokenizer_sha256": spec.tokenizer_sha256,
            "max_length": spec.max_length, "precision": spec.precision, "damping": size,
            "trained_on": digest_of(rows.live.tolist()), "libraries": library_versions(LIBRARIES),
            "threads": torch.get_num_threads(), "loss": index.loss.describe(),
            "computed_on": computed_on(self._classifier.device, self._classifier.precision),
        }  # fmt: skip
        self.note = (
            f"A stand-in for fine-tuning: the head moves from its trained weight to the minimum without the rows, held "
            f"by half its squared distance times the damping {size:.3g}, on features of the trained encoder, which has "
            "seen all rows. It is the refit that influence functions linearise. Seeds make no difference to it."
        )

    def train(self, job: Job) -> np.ndarray:
        """Logits of the refitted head on the evaluation rows, ``(q, c)`` float64."""
        labels, weights = job.weighted_labels(self._labels)
        features = np.empty((len(labels), self._trained.features.shape[1]), np.float32)
        logits = np.empty((len(labels), self._trained.logits.shape[1]))
        at = np.searchsorted(self._rows, job.rows)
        features[: len(job.rows)], logits[: len(job.rows)] = self._trained.features[at], self._trained.logits[at]
        places, texts = job.changed()
        if len(places):
            forward = run_forward(self._classifier, texts)
            features[places], logits[places] = forward.features, forward.logits
        kept = labels != IGNORED if weights is None else weights > 0
        v = self._refit.minimum(HeadRows(features, logits, labels, weights).take(kept))
        return np.asarray(self._evaluation.logits + self._evaluation.features @ self._refit.weight_change(v).T)
