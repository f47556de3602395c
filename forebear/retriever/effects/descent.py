"""What a TracIn score says in nats: of a run whose steps were those of plain gradient descent, to first order.

A step of plain stochastic gradient descent on a batch of B rows takes eta / B g_n for each of them from the weights,
and so lowers the loss of a test row by eta / B <g_q, g_n>, to first order in eta. In the S steps from one checkpoint to
the next a row is seen S B / N times in the mean, once where they are an epoch. Summed over the run, the rise of the
test row's loss without the row's own steps is S / N sum_c eta_c <g_q, g_n>: the score times S / N, if S is the same for
all checkpoints.
"""

from __future__ import annotations

from forebear.indexer.index import Index
from forebear.indexer.training.run import RUN_NAME


def descent_divisor(index: Index) -> tuple[float, str]:
    """N / S, by which a TracIn score is divided; or 0 and why the score is no effect, of which 0 says nothing."""
    manifest, found = index.manifest, index.run
    if found is None:
        return 0, f"its score adds up steps of plain gradient descent, and no {RUN_NAME} says how the model was trained"
    _, run, _ = found
    optimizer, settings = run.settings.get("optimizer"), run.settings
    if not optimizer:
        return 0, f"its score adds up steps of plain gradient descent, and {RUN_NAME} does not say which training took"
    if not isinstance(optimizer, dict) or optimizer["name"] != "SGD":
        return 0, "its score adds up steps of plain gradient descent, and training took others"
    for name in ("momentum", "weight_decay", "several_rates"):
        if optimizer[name]:
            return 0, f"its score adds up steps of plain gradient descent, and training had {name.replace('_', ' ')}"
    if settings.get("max_grad_norm"):
        return 0, "its score adds up whole gradients, and training may have cut them (max_grad_norm is not 0)"
    if settings.get("class_weights"):
        return 0, "its score adds up gradients over the number of rows, and class weights divide by their sum"
    first, *appended = manifest.segments
    if appended or first.rows_sha256 != run.data_sha256:
        return 0, "the index holds other rows than those of the run"
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    spans = {after - before for before, after in zip([0, *steps], steps, strict=False)}
    if [c.name for c in manifest.checkpoints] != [c.name for c in run.checkpoints] or len(spans) > 1:
        return 0, "it takes all checkpoints of the run, at equal distances from the first step on"
    if manifest.spec.etas != tuple(checkpoint.eta for checkpoint in run.checkpoints):
        return 0, "its eta are not the learning rates of the run"
    return first.n_rows / spans.pop(), ""
