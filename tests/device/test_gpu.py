"""On a GPU: every kernel beside the CPU, the commands from end to end, repeats to the bit, too little memory, times.

``pytest -m gpu`` runs them where torch sees a CUDA device, and prints what each kernel takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flow
import numpy as np
import pytest
import torch
from device_kernels import KERNELS, OWN_MODEL, Kernels
from places import GPU, ROOT
from tiny import labels, make_tiny_model, sentences
from warm import run_tests

from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.gradients.whole import _Sums
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of

# Of the largest number: a GPU adds in another order. Words are stored in fp16; solvers and H^-1 magnify.
TOLERANCE = 2e-4
TOLERANCES = {"words": 2e-3, "words, top": 2e-3, "eigenvalues": 2e-3, "cg": 2e-3, "lissa": 2e-3}
FLOW_TOLERANCE = 5e-3
DRAWN = ("retrain top", "train")  # dropout draws other numbers on a GPU: only that they are finite is looked at


def numbers(found: Any) -> Iterator[np.ndarray]:
    """Every array of numbers in a result."""
    if isinstance(found, torch.Tensor):
        yield found.detach().cpu().double().numpy()
    elif isinstance(found, np.ndarray):
        yield found.astype(np.float64)
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            yield from numbers(getattr(found, field.name))
    elif isinstance(found, dict | list | tuple):
        for value in found.values() if isinstance(found, dict) else found:
            yield from numbers(value)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernels, Kernels]:
    """The kernels on the CPU and on the GPU."""
    cpu, gpu = (Kernels(tmp_path_factory.mktemp(name.replace(":", "")), name) for name in ("cpu", GPU))
    return cpu, gpu


@pytest.fixture(scope="module")
def times(pytestconfig: pytest.Config) -> Iterator[dict[str, tuple[float, float]]]:
    """Seconds of each kernel on the CPU and on the GPU, printed at the end."""
    found: dict[str, tuple[float, float]] = {}
    yield found
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{'kernel, of a tiny model':24}{'cpu ms':>10}{GPU + ' ms':>12}")
        for name, (cpu, gpu) in found.items():
            print(f"{name:24}{1000 * cpu:10.1f}{1000 * gpu:12.1f}")


def timed(kernels: Kernels, name: str) -> tuple[Any, float]:
    """The second result of a kernel, and how long it took."""
    for _ in range(2):
        started = time.perf_counter()
        found = KERNELS[name](kernels)
        if kernels.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return found, seconds


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_numbers_of_the_cpu(name: str, both: Any, times: dict[str, tuple[float, float]]) -> None:
    (cpu, on_cpu), (gpu, on_gpu) = (timed(kernels, name) for kernels in both)
    times[name] = on_cpu, on_gpu
    wanted, found = list(numbers(cpu)), list(numbers(gpu))
    assert len(found) == len(wanted) > 0 or name in OWN_MODEL
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all()
        if name not in DRAWN and a.size:
            assert np.abs(a - b).max() <= TOLERANCES.get(name, TOLERANCE) * max(np.abs(a).max(), 1e-30)


@pytest.mark.gpu
def test_commands_from_training_to_retraining_give_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    """Every method, solver and store; of retraining the head alone, for dropout draws other numbers on a GPU."""
    flow.prepare(tmp_path)
    for device in ("cpu", GPU):
        (tmp_path / device).mkdir()
        for step in flow.STEPS.values():
            step(tmp_path, device)
    found = flow.differences(tmp_path / "cpu", tmp_path / GPU)
    drawn = ("top-1/", "full/", "attack/")
    assert len(found) > 50
    assert {name: x for name, x in found.items() if not (x <= FLOW_TOLERANCE or name.startswith(drawn))} == {}


def bytes_of(folder: Path, pattern: str) -> dict[str, str]:
    """Digests of files by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(pattern)
    }


@pytest.mark.gpu
def test_what_is_done_twice_is_equal_to_the_bit(tmp_path: Path) -> None:
    """Weights of a training, files of an index, logits of retrained models."""
    flow.prepare(tmp_path)
    (tmp_path / "cpu").mkdir()
    flow.train(tmp_path, "cpu")  # what both indexes are built of
    found = []
    for turn in ("first", "second"):
        (tmp_path / GPU).mkdir()
        for step in (flow.train, flow.index, flow.retrain):
            step(tmp_path, GPU)
        (tmp_path / GPU).rename(tmp_path / turn)
        folder = tmp_path / turn
        kinds = [("run", "*.safetensors"), ("index", "*.arrow"), ("index", "*.faiss")]
        kinds += [(f"cache-{recipe}", "*.arrow") for recipe in ("top-1", "full")]
        digests = [bytes_of(folder / name, pattern) for name, pattern in kinds]
        assert all(digests)
        found.append({(kind, name): x for kind, of in zip(kinds, digests, strict=True) for name, x in of.items()})
    assert len(found[0]) > 40
    manifest = json.loads((tmp_path / "second" / "index" / "manifest.json").read_text())
    assert manifest["computed_on"]["device"] == (torch.cuda.get_device_name() if GPU.startswith("cuda") else GPU)
    assert {name for name, digest in found[0].items() if digest != found[1].get(name)} == set()


@pytest.mark.gpu
@pytest.mark.skipif(GPU.split(":")[0] != "cuda", reason="the pretended device has all the memory of the machine")
def test_batches_that_do_not_fit_are_halved_and_give_the_same_numbers(tmp_path: Path) -> None:
    classifier = load_classifier(str(make_tiny_model(tmp_path / "model")), device=GPU)
    texts, gold = sentences(8000, low=20, high=36), np.array(labels(8000))  # about 700 MB in one batch
    scope, told = scope_of(classifier, "all"), list[str]()

    def summed(batch_tokens: int) -> dict[str, torch.Tensor]:
        collector = _Sums(scope, np.zeros(len(gold), np.int64), classifier.head.weight)
        seeds = labels_seed(CROSS_ENTROPY, gold)
        run_pass(classifier, [texts], seeds, [collector], batch_tokens=batch_tokens, warn=told.append)
        return collector.out

    wanted = summed(4096)
    assert not told
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (128 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = summed(1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told
    for name, values in wanted.items():
        assert (found[name] - values).abs().max() <= 1e-3 * values.abs().max(), name


@pytest.mark.slow
def test_the_tests_of_a_gpu_run_on_the_pretended_device() -> None:
    """So that they are not run for the first time where time is short."""
    arguments = [
        "-q", "-p", "pretended", "-p", "no:cacheprovider", "-m", "gpu", __file__, "-k", "kernels and (forward or dots)",
    ]  # fmt: skip
    paths = [ROOT, ROOT / "tests/device", ROOT / "tests/support"]
    done = run_tests(arguments, ROOT, paths, FOREBEAR_TEST_GPU="pretend")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "3 passed" in done.stdout
    assert "pretend ms" in done.stdout
