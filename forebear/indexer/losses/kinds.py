"""Which loss a model was trained with: by its problem type, as transformers chooses it."""

from __future__ import annotations

from typing import Any

from forebear.errors import InputError
from forebear.indexer.losses.choices import GivenWeights, numbers_of
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY, CrossEntropy
from forebear.indexer.losses.loss import Loss
from forebear.indexer.losses.sigmoid import SIGMOID
from forebear.indexer.losses.squared import SQUARED
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL

_LOSSES = {loss.problem_type: loss for loss in (CROSS_ENTROPY, SIGMOID, SQUARED)}


def loss_of(problem_type: str, class_weights: tuple[float, ...] = (), label_smoothing: float = 0.0) -> Loss:
    """The loss of a problem type; class weights and label smoothing are of one label a row alone.

    Raises:
        InputError: Weights or smoothing are given for another problem type.
    """
    if problem_type == SINGLE_LABEL:
        return CrossEntropy(class_weights, label_smoothing)
    check_one_label(problem_type, class_weights, label_smoothing)
    return _LOSSES[problem_type]


def check_one_label(problem_type: str, class_weights: GivenWeights, label_smoothing: float) -> None:
    """Refuse class weights and label smoothing where a row has not one label.

    Raises:
        InputError: As said, or weights mean nothing.
    """
    if problem_type != SINGLE_LABEL and ((given := numbers_of(class_weights) != ()) or label_smoothing):
        option = "--class-weights" if given else "--label-smoothing"
        rows = "of numbers (regression)" if problem_type == REGRESSION else "of several labels a row (multi-label)"
        raise InputError(f"{option} is for one label a row; this model is one {rows}. Leave the option out.")


def problem_type_of_config(config: Any) -> str:
    """The problem type of a model: what its configuration says, else regression where there is one output."""
    return str(config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL))
