"""Before a build: are the gradients of this model, from hooks and in batches, those of plain autograd row by row?

Hooks see the uses of a layer, not of a weight: a model may use a weight in another way than by calling its layer, mix
the rows of a batch, or change what a hook has seen. No table of architectures knows all such models; a few rows show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from forebear.errors import ModelError, first_line, is_out_of_memory
from forebear.indexer.gradients.factors import EmbeddingFactors, LayerFactors
from forebear.indexer.gradients.tape import Seed, Tape, alone, loss_of, only_asking
from forebear.indexer.losses.loss import Loss
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.forward import forward_batch
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.probe import SHORT_TEXT, TEXT, encoded_text
from forebear.indexer.model.scopes import Block, Scope, embedding_scope, scope_of
from forebear.ratio import ratio

N_ROWS = 4
MOST_PIECES = 512
TOLERANCE = 1e-3  # of a block's largest number
FLOOR = 3e-6  # of the largest number of the scope's gradient: some blocks have none but rounding (biases of keys)
Row = dict[str, list[int]]
T = TypeVar("T")


@dataclass(frozen=True)
class CheckedGradients:
    """What the check found: all of it within rounding.

    Attributes:
        n_rows: Rows that were compared.
        errors: Largest difference of a gradient's number from autograd's, by its block's largest: by the name of the
            scope, with ``embedding`` where words were compared.
        largest_logit_error: Largest difference of a logit in a padded batch from the row's alone, by the largest logit.
    """

    n_rows: int
    errors: dict[str, float]
    largest_logit_error: float

    @property
    def largest_error(self) -> float:
        """The largest over all scopes."""
        return max(self.errors.values())

    @property
    def rounded(self) -> CheckedGradients:
        """With errors to two figures, as a manifest keeps them."""
        errors = {scope: _two_figures(error) for scope, error in self.errors.items()}
        return CheckedGradients(self.n_rows, errors, _two_figures(self.largest_logit_error))

    def describe(self) -> str:
        """A line that states what was found."""
        by_scope = ", ".join(f"{scope} {error:.1e}" for scope, error in self.errors.items())
        return (
            f"checked on {self.n_rows} rows: gradients differ from plain autograd's by {by_scope} of a block's largest "
            f"number, logits in a padded batch by {self.largest_logit_error:.1e}"
        )


def worst_of(checks: Sequence[CheckedGradients]) -> CheckedGradients:
    """The largest errors of several checkpoints, checked at the same rows and scopes."""
    errors = {scope: max(check.errors[scope] for check in checks) for scope in checks[0].errors}
    return CheckedGradients(checks[0].n_rows, errors, max(check.largest_logit_error for check in checks))


def _two_figures(value: float) -> float:
    return float(f"{value:.1e}")


def check_gradients(
    classifier: Classifier,
    scopes: Sequence[str],
    rows: Sequence[Row] = (),
    *,
    with_bias: bool = False,
    words: bool = False,
) -> CheckedGradients:
    """Refuse a model whose gradients would be wrong, or whose predictions depend on the batch.

    Args:
        classifier: At a checkpoint.
        scopes: As the index names them.
        rows: Encoded rows to compare at, of which a few of different lengths are taken; none: two texts.
        with_bias: Whether the scopes hold biases and norms.
        words: Whether gradients of words are wanted, too.

    Raises:
        InputError: A scope is not one of this model's.
        ModelError: A layer of a scope is not supported, or its gradient differs from autograd's: it is named. Or a
            row's logits differ in a padded batch.
    """
    checked = [scope_of(classifier, name, with_bias=with_bias) for name in scopes]
    if words:
        checked.append(embedding_scope(classifier))
    classifier = replace(classifier, precision="fp32")
    chosen = _rows_of_different_lengths(rows) if rows else _texts(classifier)
    with repeatable(classifier.device):
        logit_error = _check_logits(classifier, chosen)
        errors = {scope.name: _check_scope(classifier, scope, chosen) for scope in checked}
    return CheckedGradients(len(chosen), errors, logit_error)


def _texts(classifier: Classifier) -> list[Row]:
    return [
        encoded_text(classifier.tokenizer, classifier.max_length, classifier.name, text) for text in (TEXT, SHORT_TEXT)
    ]


def _rows_of_different_lengths(rows: Sequence[Row]) -> list[Row]:
    """The shortest row, the longest that takes no long time, and some between."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    order = [i for i in order if len(rows[i]["input_ids"]) <= MOST_PIECES] or order[:1]
    places = np.unique(np.linspace(0, len(order) - 1, N_ROWS).round().astype(int))
    return [rows[order[i]] for i in places]


def _check_logits(classifier: Classifier, rows: list[Row]) -> float:
    """Largest difference of a row's logits in a padded batch, by the largest logit; 0 where no row is ever padded.

    Raises:
        ModelError: It is no rounding.
    """
    if classifier.equal_lengths:
        return 0.0

    def run(positions: list[int]) -> tuple[float, float]:
        some = [rows[i] for i in positions]
        together, *each = (
            forward_batch(classifier, pad_batch(classifier.tokenizer, batch, classifier.device)).arrays()[1]
            for batch in (some, *([row] for row in some))
        )
        alone = np.concatenate(each)
        return float(np.abs(together - alone).max()), float(np.abs(alone).max())

    found = [result for _, result in _run(classifier, rows, len(rows), run)]
    difference, largest = (max(numbers) for numbers in zip(*found, strict=True))
    error = float(ratio(difference, largest, otherwise=np.inf)) if difference else 0.0
    if not error <= TOLERANCE:
        raise ModelError(
            f"{classifier.name} ({type(classifier.model).__name__}): logits of a row in a padded batch differ by "
            f"{error:.1%} from those of the row alone, so scores would depend on the batch; it is not supported."
        )
    return error


def _check_scope(classifier: Classifier, scope: Scope, rows: list[Row]) -> float:
    """Largest difference of a gradient's number from autograd's, by its block's largest.

    Raises:
        ModelError: It is no rounding; the block is named.
    """
    at_once = 1 if classifier.equal_lengths or alone(classifier, [scope]) else len(rows)

    def run(positions: list[int]) -> float:
        return _largest_error(classifier, scope, [rows[i] for i in positions])

    return max(error for _, error in _run(classifier, rows, at_once, run))


def _run(
    classifier: Classifier, rows: list[Row], at_once: int, run: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """Run so many of the rows at once, or fewer where they do not fit in memory."""
    batches = [range(start, min(start + at_once, len(rows))) for start in range(0, len(rows), at_once)]
    lengths = [len(row["input_ids"]) for row in rows]
    name = f"{classifier.name}: a row of the check of gradients".format
    return run_batches(batches, run, device=classifier.device, lengths=lengths, name=name)


def _largest_error(classifier: Classifier, scope: Scope, rows: list[Row]) -> float:
    """:func:`_check_scope` of one batch of rows."""
    largest_error = 0.0
    found: dict[str, LayerFactors] = {}
    try:
        _, logits = Tape(classifier, [scope]).record(rows, _unlikely(classifier.loss), found.__setitem__)
    except RuntimeError as error:  # of torch: the model takes a watched output in a way that hooks do not foresee
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{classifier.name} ({type(classifier.model).__name__}) does not run while layers of scope "
            f"{scope.name} are watched ({first_line(error)}); the scope is not supported. Use --scope head.",
            of="index",
        ) from error
    for i, row in enumerate(rows):
        truth = _autograd(classifier, scope, row, classifier.loss.unlikely(logits[i : i + 1]))
        size = max(float(g.abs().max()) for g in truth.values())
        for block in scope.blocks:
            g = truth[block.name]
            block_size = float(g.abs().max())
            apart = float((_gradient(block, found.get(block.name), i, g) - g).abs().max())
            if not apart <= TOLERANCE * block_size + FLOOR * size:
                raise ModelError(
                    f"{classifier.name} ({type(classifier.model).__name__}): the gradient of {block.name}, from "
                    f"its inputs and output gradients, differs by {apart / (block_size or size or apart):.1%} from "
                    "autograd's. The model uses these weights in another way than by calling their layer. Use "
                    "--scope head, or scopes without this layer.",
                    of="index",
                )
            largest_error = max(largest_error, float(ratio(apart, block_size + FLOOR * size)))
    return largest_error


def _unlikely(loss: Loss) -> Seed:
    """The seed of an unlikely target's loss, whose gradient is large."""
    return lambda logits: loss_of(loss, loss.unlikely(logits))(logits)


def _gradient(block: Block, factors: LayerFactors | None, i: int, like: torch.Tensor) -> torch.Tensor:
    """G of row ``i`` from a block's factors; without factors the gradient is said to be zero."""
    if factors is None:
        return torch.zeros_like(like)
    if isinstance(factors, EmbeddingFactors):
        kept = factors.ids[i] >= 0
        return torch.zeros_like(like).index_add_(1, factors.ids[i][kept], factors.deltas[i][kept].T)
    return factors.deltas[i].T @ factors.inputs[i]


def _autograd(classifier: Classifier, scope: Scope, row: Row, target: np.ndarray) -> dict[str, torch.Tensor]:
    """Gradients of the loss of one row, alone in its batch, by autograd through the model's own logits."""
    model, padding = classifier.model, classifier.tokenizer.pad_token_id
    parameters = {key: model.get_parameter(key) for block in scope.blocks for key in block.parameter_names}
    with only_asking(model, parameters.values()), torch.enable_grad():
        logits = model(**pad_batch(classifier.tokenizer, [row], classifier.device)).logits.double()
        loss = classifier.loss.summed(logits, torch.from_numpy(target).to(logits.device))
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    parts = dict(zip(parameters, found, strict=True))
    gradients = {block.name: block.join(parts) for block in scope.blocks}
    for block in scope.blocks:
        if block.kind == "embedding" and padding is not None:  # no word, although a decoder may begin with it
            gradients[block.name][:, padding] = 0.0
    return gradients
