"""How often the host waits for the device: at most so often a batch, in every kernel that runs a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from programs import on_pretended
from warm import run_program

if TYPE_CHECKING:
    from device_kernels import Counts

# In every forward pass of an encoder transformers asks whether the batch has padding. A pass over gradients waits for
# the logits, too, and every kernel for its last results; what a product or a solver needs is spread over its batches.
FORWARD, PASS = 1.0, 2.0
LAST = 0.5
BUDGETS = {
    "forward": FORWARD, "sentences": FORWARD, "sketch": PASS, "sketch, whitened": PASS, "sketch, both, words": PASS,
    "words": PASS, "words, top": PASS, "spans": PASS, "factors": PASS, "whole gradients": PASS, "sums": PASS,
    "dots": PASS, "dots, wanted": PASS, "Gauss-Newton": PASS, "cg": PASS + 1, "saliency": PASS, "Hessian": FORWARD,
    "Hessian, weighted": FORWARD, "lissa": FORWARD + 1, "saliency gradients": FORWARD, "retrain top": FORWARD,
    "train": FORWARD,
}  # fmt: skip
# One product for all vectors, where one for each of them would take six times as many.
MOST_LAUNCHES = {"dots": 260, "dots, wanted": 260, "Gauss-Newton": 280}
MOST_BYTES = {"forward": 1800}  # 3 x 8 bytes a word piece, padding included


def excess(name: str, counts: Counts) -> str | None:
    """By how much a kernel is over its budget, and where."""
    waits, sent, launches = (counts.of_a_batch(kind) for kind in ("waits", "sent", "launches"))
    if waits > BUDGETS[name] + max(LAST, 1 / counts.batches):
        return f"{waits:.1f} waits a batch: {counts.waits}"
    if launches > MOST_LAUNCHES.get(name, launches):
        return f"{launches:.0f} launches a batch: {counts.launches}"
    return f"{sent:.0f} bytes a batch: {counts.sent}" if sent > MOST_BYTES.get(name, sent) else None


PROGRAM = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1] / "support")!r}]
import json
import torch
from device_kernels import KERNELS, measure
from test_waits import excess
torch.set_num_threads(1)
found = measure([name for name in KERNELS if name in {list(BUDGETS)!r}])
print(json.dumps({{name: [counts.batches, excess(name, counts)] for name, counts in found.items()}}))
"""


@pytest.mark.slow
def test_the_host_waits_within_the_budget_of_each_kernel():
    done = run_program(PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(BUDGETS)
    assert all(batches for batches, _ in found.values())
    assert {name: over for name, (_, over) in found.items() if over} == {}


LOSSES = """
from forebear.errors import NonFiniteError
from forebear.indexer.training.step_losses import READ_STEPS, StepLosses

losses, n_added, found = StepLosses("step {}: {}".format), 0, []
try:
    for step in range(40):
        losses.add(torch.tensor(float("nan") if step == 5 else step / 8).to(device), torch.tensor(2).to(device))
        n_added += 1
except NonFiniteError as error:
    found = [str(error), n_added == READ_STEPS - 1, len(losses.read)]
ledger.clear()
losses = StepLosses("step {}: {}".format)
values = torch.arange(40.0, device=device)
for value in values:
    losses.add(value, torch.ones((), device=device))
losses.settle()
found += [ledger.waits.total(), losses.read == [(float(step), 1.0) for step in range(40)]]
"""


def test_losses_of_steps_are_read_many_at_a_time_and_the_first_that_is_nan_is_named():
    assert on_pretended(LOSSES) == ["step 5: nan", True, 5, 2, True]
