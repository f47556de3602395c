"""Faults of device that were made, or could be, are seen without a GPU: each is planted, and must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT
from warm import start_program

# What went wrong: module, its source, what is put in its place, where it must show, and what must be said of it.
FAULTS = {
    "a result is read as numpy where it lies": (
        "indexer.model.device.copies", "self._hosts = [_copied(tensor) for tensor in self._hosts]", "pass",
        "sketch", "can't convert pretend:0",
    ),
    "a batch stays on the host": (
        "indexer.model.network.batches", "send(padded, device).unbind()", "torch.from_numpy(padded).unbind()",
        "forward", "in one operation",
    ),
    "a buffer is made on the host": (
        "indexer.sketches.sketch", "self._raw = torch.zeros((len(positions), self._reduce.width), device=self._device)",
        "self._raw = torch.zeros((len(positions), self._reduce.width))", "sketch", "in one operation",
    ),
    "a curvature stays where it was read": (
        "indexer.curvature.ekfac", "return vectors", "return vectors.cpu()", "eigenvalues", "in one operation",
    ),
    "class weights stay on the host": (
        "indexer.losses.cross_entropy", "torch.tensor(self.class_weights, dtype=dtype).to(device, non_blocking=True)",
        "torch.tensor(self.class_weights, dtype=dtype)", "Hessian, weighted", "in one operation",
    ),
    "random numbers are drawn by the host's generator": (
        "indexer.sketches.projector", "signs = send(rng.choice([-1.0, 1.0], size=n), like.device).to(like.dtype)",
        "signs = torch.randn(n, device=like.device, generator=torch.Generator()).to(like.dtype)", "sketch, whitened",
        "generator",
    ),
    "a part of a sum is taken to the host": (
        "indexer.gradients.dots", "dtype=torch.float64).T)", "dtype=torch.float64).T.cpu())", "Gauss-Newton",
        "in one operation",
    ),
    "a number is asked for in a loop over layers": (
        "indexer.gradients.dots", "    tokens = factors.inputs.shape[1]\n    if by_gradients(len(vectors)",
        "    tokens = int((factors.deltas != 0).any(dim=2).sum(dim=1).max())\n    if by_gradients(len(vectors)",
        "Gauss-Newton", "waits",
    ),
    "padding is picked out by a mask": (
        "indexer.model.device.copies", 'return values.device.type == "cpu"', "return True", "words", "waits",
    ),
    "a copy to the device blocks": (
        "indexer.model.device.copies", "return host.to(device, non_blocking=True)", "return host.to(device)",
        "forward", "waits",
    ),
    "the host waits for each result": (
        "indexer.model.device.copies", "self._event = stream_of(away).record_event()",
        "stream_of(away).record_event().synchronize()", "sketch, both, words", "waits",
    ),
    "one product is made for each vector": (
        "indexer.gradients.dots", "return max(1, min(len(vectors), ROWS_BYTES", "return max(1, min(1, ROWS_BYTES",
        "Gauss-Newton", "launches",
    ),
    "more is sent than is used": (
        "indexer.model.network.batches", "send(padded, device).unbind()",
        "send(np.concatenate([padded, padded]), device)[: len(padded)].unbind()", "forward", "bytes",
    ),
    "a table of the index stays on the host": (
        "retriever.head.rounded", "memory.tensor(values) for values in",
        "torch.from_numpy(values.copy()) for values in", "search", "in one operation",
    ),
    "signs are unpacked in another order on a device": (
        "indexer.sketches.estimates", "torch.arange(7, -1, -1, dtype=torch.uint8",
        "torch.arange(8, dtype=torch.uint8", "search", "estimates differ",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def symptoms() -> dict[str, str]:
    """What each fault made of its kernel."""
    keys = ("module", "old", "new", "kernel")
    faults = [dict(zip(keys, fault, strict=False)) for fault in FAULTS.values()]
    folders = ("device", "support", ".", "retriever/head", "indexer/sketches")
    paths = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in folders)]
    code = (
        f"import runpy, sys; sys.path[:0] = {paths!r}\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'forebear']: del sys.modules[name]\n"
        f"runpy.run_path({str(Path(__file__).with_name('planting.py'))!r}, run_name='__main__')"
    )
    done = start_program(code, [json.dumps(faults)]).wait()
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(FAULTS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name: str, symptoms: dict[str, str]) -> None:
    assert FAULTS[name][-1] in symptoms[name], symptoms[name] or "nothing shows it"
