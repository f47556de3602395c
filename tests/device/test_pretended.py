"""The pretended device refuses and counts what a GPU refuses and waits for."""

from __future__ import annotations

import json
from pathlib import Path

from warm import run_program

PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import json
import pretended
import torch

pretended.register()
found = {{}}
with pretended.entered() as ledger:
    device = torch.device("pretend")
    host = torch.arange(20.0).view(4, 5)
    x = host.to(device)
    rows, mask = torch.tensor([0, 2]), x > 3
    refused = {{
        "mix": lambda: x + host,
        "product": lambda: x @ host.T,
        "in place": lambda: x.add_(host),
        "other way": lambda: host.add_(x),
        "index_add": lambda: x.index_add_(0, rows, x[:2]),
        "list": lambda: torch.cat([x, host]),
        "index": lambda: host[rows.to(device)],
        "number": lambda: torch.stack([x[0, 0], host[0, 0]]),
        "embedding": lambda: torch.nn.functional.embedding(rows, x),
        "numpy": lambda: x.numpy(),
        "detached": lambda: x.detach().numpy(),
        "generator": lambda: torch.randn(3, device=device, generator=torch.Generator()),
        "permutation": lambda: torch.randperm(3, device=device, generator=torch.Generator()),
        "pin": lambda: x.pin_memory(),
    }}
    for name, ask in refused.items():
        try:
            ask()
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    counted = {{
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.any()),
        "float": lambda: float(x[0, 0]),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "blocking copy": lambda: host.to(device),
        "made there": lambda: torch.tensor([1.0, 2.0], device=device),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[mask],
        "masked values": lambda: x.clone().index_put_((mask,), x[mask]),
        "index of the host": lambda: x[rows],
        "unique": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x),
        "eigh": lambda: torch.linalg.eigh(x @ x.T),
        "copy": lambda: x.copy_(host, non_blocking=True),
        "masked number": lambda: x.clone().masked_fill_(mask, 0.0),
        "masked by index": lambda: x.clone().__setitem__(mask, 0.0),
        "product": lambda: x @ x.T,
        "view": lambda: x.T,
        "index there": lambda: x[mask.int().argmax(dim=0)],
    }}
    waits, launches, sent = {{}}, {{}}, {{}}
    for name, ask in counted.items():
        ledger.clear()
        ask()
        waits[name], launches[name] = ledger.waits.total(), ledger.launches.total()
        sent[name] = ledger.sent.total()
    weight = x.clone().requires_grad_(True)
    (x * weight).sum().backward()
    found["gradient"] = str(weight.grad.device)
    found["same"] = torch.equal(weight.grad.cpu(), host)
print(json.dumps([found, waits, launches, sent]))
"""


def test_a_gpus_rules_are_kept_and_its_waits_counted():
    done = run_program(PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    found, waits, launches, sent = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("gradient") == "pretend:0"
    assert found.pop("same") is True
    assert set(found) == {
        "mix", "product", "in place", "other way", "index_add", "list", "index", "number", "embedding", "numpy",
        "detached", "generator", "permutation", "pin",
    }  # fmt: skip
    free = {"copy", "masked number", "masked by index", "product", "view", "index there"}
    assert {name for name, n in waits.items() if not n} == free
    assert launches["view"] == 0 < launches["product"]
    assert sent["blocking copy"] == sent["copy"] == 20 * 4
    assert sent["index of the host"] == 2 * 8
    assert sent["product"] == 0
