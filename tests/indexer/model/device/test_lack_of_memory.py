"""A lack of memory: known in all its words, met with smaller batches, and in the end one line."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import weakref
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run as run_command
from forebear.errors import ModelError, NotEnoughMemoryError, is_out_of_memory
from forebear.evaluation.measures.agreement import start_states
from forebear.indexer.curvature.ekfac import eigenvectors, fit_ekfac
from forebear.indexer.curvature.products import GaussNewton, HessianProduct
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.gradients.self_check import check_gradients
from forebear.indexer.gradients.tape import Tape
from forebear.indexer.gradients.whole import _Gradients
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.device import memory
from forebear.indexer.model.device.memory import run_batches
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.rows.files.reader import reading
from forebear.indexer.storage.arrow import read_batches, write_columns
from forebear.indexer.storage.atomic import atomic_file
from forebear.retriever.question.inverse import CurvatureSpec, HeadSolver
from forebear.retriever.question.models import one_step_away
from forebear.retriever.saliency.maps import saliency

CPU = torch.device("cpu")
TEXTS = sentences(9, seed=4)
LABELS = np.array([0, 1, 0, 1, 1, 0, 1, 0, 1])
LACK_OF_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
    pa.ArrowMemoryError("malloc of size 1099511627776 failed"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.75 GiB is "
        "free. Process 1 has 138.05 GiB memory in use."
    ),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB."),
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 1.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 144115188075855872 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("unable to mmap 438001024 bytes from file </model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB, max allowed: 18.13 GB). Tried to allocate 1 GB"),
    RuntimeError("Invalid buffer size: failed to allocate 12.00 GB"),
    RuntimeError("pretend:0 out of memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    OSError("Memory mapping file failed: Cannot allocate memory"),
    RuntimeError("Error in faiss::gpu::StandardGpuResourcesImpl::allocMemory: cudaMalloc error out of memory [2]"),
    NotEnoughMemoryError("row 5 does not fit in the memory of cuda:0."),
]  # fmt: skip
OTHER_FAULTS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory is a word of this title"),
    ModelError("model: no such folder."),
    KeyError("row"),
]


@pytest.mark.parametrize("error", LACK_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_a_lack_of_memory_is_known_in_whatever_words(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER_FAULTS, ids=lambda error: str(error)[:40])
def test_another_fault_is_not_taken_for_a_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_the_allocator_of_this_torch_says_so_in_known_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55)
    assert is_out_of_memory(raised.value)


def few_rows(most: int, tried: list[list[int]]):
    """A ``run`` for which more than ``most`` rows do not fit in memory."""

    def run(batch: list[int]) -> list[int]:
        tried.append(batch)
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [10 * i for i in batch]

    return run


def test_batches_are_halved_in_order_and_later_ones_as_large_without_a_try():
    tried, told = [], []
    plan = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    found = list(run_batches(plan, few_rows(2, tried), device=CPU, lengths=[7] * 11, warn=told.append))
    assert [i for batch, _ in found for i in batch] == list(range(11))
    assert all(result == [10 * i for i in batch] for batch, result in found)
    assert tried == [[0, 1, 2, 3, 4], [0, 1], [2], [3, 4], [5, 6], [7], [8, 9], [10]]
    assert told[0] == "5 rows of 7 word pieces do not fit in memory; going on with 2."


def test_a_single_row_that_does_not_fit_is_named_with_what_to_do():
    with pytest.raises(NotEnoughMemoryError) as refused:
        list(run_batches([[3, 4]], few_rows(0, []), device=CPU, lengths=[0, 0, 0, 8, 9], name="row 10{}".format))
    assert str(refused.value) == (
        "row 103 (8 word pieces) does not fit in the memory of cpu. Give max_length= a smaller value, or take a "
        "machine with more memory."
    )
    assert refused.value.exit_code == 2
    with pytest.raises(
        NotEnoughMemoryError, match=r"^row 3 does not fit in the memory of cuda:1\. Ask less, or use dev"
    ):
        list(run_batches([[3]], few_rows(0, []), device=torch.device("cuda:1"), remedy="Ask less"))


def test_another_fault_in_a_batch_passes_through():
    with pytest.raises(ZeroDivisionError):
        list(run_batches([[0, 1]], lambda batch: 1 // 0, device=CPU))


def test_tensors_of_a_batch_that_failed_are_gone_when_memory_is_freed(monkeypatch):
    held, gone = [], []

    def run(batch: list[int]) -> None:
        class Node:
            tensor = torch.zeros(len(batch))

        node = Node()
        node.itself = node  # objects that refer to each other are freed by the collector of garbage alone
        held.append(weakref.ref(node))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    free = memory.free_memory
    monkeypatch.setattr(memory, "free_memory", lambda device: (free(device), gone.append(held[-1]() is None)))
    list(run_batches([[0, 1]], run, device=CPU))
    assert gone == [True]


@pytest.mark.skipif(memory._malloc_trim() is None, reason="the C library is not glibc")
def test_memory_between_what_is_kept_goes_back_to_the_system():
    script = """
    from pathlib import Path
    from forebear.indexer.model.device.memory import return_memory

    def megabytes():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    blocks = [b"x" * (100_000 + i) for i in range(2000)]
    before = megabytes()
    blocks = blocks[::20]
    return_memory()
    print(before - megabytes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150  # of 190 that are freed


@pytest.mark.slow
def test_a_pass_lets_go_of_the_tensors_of_a_batch_that_failed(tiny_model, monkeypatch):
    classifier = load_classifier(tiny_model())
    collector = _Gradients(scope_of(classifier, "all"), len(TEXTS), classifier.head.weight)
    record, held, gone = Tape.record, [], []

    def failing(self, rows, seed, on_layer):
        def shown(name, factors):
            held.extend(map(weakref.ref, (factors.inputs, factors.deltas)))
            on_layer(name, factors)

        found = record(self, rows, seed, shown if len(rows) > 2 else on_layer)
        if len(rows) > 2:
            activations = torch.zeros(len(rows))  # on the traceback
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    free = memory.free_memory
    monkeypatch.setattr(Tape, "record", failing)
    monkeypatch.setattr(
        memory, "free_memory", lambda device: (free(device), gone.append([tensor() is None for tensor in held]))
    )
    run_pass(classifier, [TEXTS], labels_seed(CROSS_ENTROPY, LABELS), [collector], batch_tokens=1000)
    assert len(gone[0]) > 10
    assert all(map(all, gone[1::2]))  # before the collectors let go, and after


@contextmanager
def room_for(model: torch.nn.Module, most_rows: int, tried: list[int]):
    """Inside, a batch of more rows does not fit in the memory of the model's device."""

    def refuse(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        n_rows = len(kwargs["input_ids"])
        tried.append(n_rows)
        if n_rows > most_rows:
            raise torch.AcceleratorError("CUDA error: out of memory")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def hessian(classifier):
    scope = scope_of(classifier, "top-1")
    vectors = scope.zeros(2, classifier.head.weight)
    for values in vectors.values():
        values.normal_(generator=torch.Generator().manual_seed(1))
    return HessianProduct(classifier, scope, [TEXTS], LABELS, batch_tokens=1000), vectors


def gauss_newton(classifier):
    _, vectors = hessian(classifier)
    scope = scope_of(classifier, "top-1")
    return GaussNewton(classifier, scope, [TEXTS], seed=0, batch_tokens=1000)(vectors)


def ekfac_numbers(classifier):
    fitted = fit_ekfac(classifier, scope_of(classifier, "top-1"), [TEXTS], seed=0, batch_tokens=1000)
    return {name: part.eigenvalues for name, part in fitted.parts.items()}


PASSES = {
    "forward": lambda classifier: run_forward(classifier, [TEXTS]).logits,
    "Hessian product": lambda classifier: (lambda product, vectors: product(vectors))(*hessian(classifier)),
    "Gauss-Newton product": gauss_newton,
    "EK-FAC": ekfac_numbers,
    "saliency": lambda classifier: np.concatenate([row.values for row in saliency(classifier, [TEXTS], LABELS)]),
    "agreement": lambda classifier: start_states(classifier, [TEXTS]),
}


def numbers(found) -> np.ndarray:
    if isinstance(found, dict):
        return np.concatenate([values.numpy().ravel() for values in found.values()])
    return np.asarray(found, np.float64).ravel()


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_goes_on_with_smaller_batches_and_gives_the_same_numbers(name, tiny_model):
    classifier = load_classifier(tiny_model())
    wanted, tried = numbers(PASSES[name](classifier)), []
    watched = classifier.model.base_model if name == "agreement" else classifier.model
    with room_for(watched, 2, tried):
        found = numbers(PASSES[name](classifier))
    assert max(tried) > 2
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    with room_for(watched, 0, tried), pytest.raises(NotEnoughMemoryError, match="does not fit in the memory of cpu"):
        PASSES[name](classifier)


def test_a_hessian_product_that_fails_between_two_vectors_counts_none_twice(tiny_model, monkeypatch):
    classifier = load_classifier(tiny_model())
    product, vectors = hessian(classifier)
    wanted, calls, grad = numbers(product(vectors)), [], torch.autograd.grad

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:  # the gradients, the first vector, and the second
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", failing)
    found = numbers(product(vectors))
    assert len(calls) == 3 + 2 * 2  # halves go on with the second vector
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_sentence_embeddings_go_on_with_smaller_batches(tiny_model):
    encoder, tried = load_sentence_encoder(tiny_model("bert", 2, 9)), []
    wanted = encoder.embed([TEXTS])
    with room_for(encoder.model, 2, tried):
        np.testing.assert_allclose(encoder.embed([TEXTS]), wanted, rtol=1e-4, atol=1e-5)
    assert max(tried) > 2


def test_a_model_one_step_away_is_the_same_from_smaller_batches(bert_world):
    classifier = bert_world.retriever.classifier()
    wanted = one_step_away(classifier, bert_world.index, 0)
    tried = []
    with room_for(classifier.model, 5, tried):  # hooks are copied with the model
        found = one_step_away(classifier, bert_world.index, 0)
    assert max(tried) > 5
    before = classifier.model.state_dict()
    for key, value in wanted.model.state_dict().items():
        step, other = value - before[key], found.model.state_dict()[key] - before[key]
        assert (step - other).abs().max() <= 1e-3 * step.abs().max() + 1e-9, key


def test_self_influence_of_a_large_head_is_solved_for_fewer_rows_at_once(bert_world, monkeypatch):
    index = bert_world.index
    solver = HeadSolver(CurvatureSpec(solver="cg"), index)
    residuals, features = index.residuals().take(index.live), index.features().take(index.live)
    wanted, tried, solve = solver.self_influence(residuals, features), [], HeadSolver.solve

    def failing(self, r, f):
        tried.append(len(r))
        if len(r) > 9:
            raise MemoryError
        return solve(self, r, f)

    monkeypatch.setattr(HeadSolver, "solve", failing)
    np.testing.assert_allclose(solver.self_influence(residuals, features), wanted, rtol=1e-2)
    assert max(tried) > 9


def test_eigenvectors_that_do_not_fit_on_a_device_are_those_of_the_cpu(monkeypatch):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    wanted, eigh = eigenvectors(matrix), torch.linalg.eigh

    class OnDevice(torch.Tensor):
        device = torch.device("cuda:0")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    def failing(values):
        if isinstance(values, OnDevice):
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")
        return eigh(values)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_args: self)
    assert torch.equal(eigenvectors(matrix.as_subclass(OnDevice)), wanted)


def test_the_check_of_gradients_takes_fewer_rows_at_once(tiny_model):
    classifier, tried = load_classifier(tiny_model()), []
    with room_for(classifier.model, 1, tried):
        found = check_gradients(classifier, ["head", "all"])
    assert max(tried) > 1
    assert found.largest_error < 1e-3


@pytest.mark.parametrize("where", ["load", "train"])
def test_what_does_not_fit_at_all_is_said_in_one_line_of_a_command(where, tmp_path, monkeypatch, capsys):
    rows = write_jsonl(tmp_path / "train.jsonl", text=sentences(8), label=[0, 1] * 4)
    model = make_tiny_model(tmp_path / "model")
    if where == "load":
        import transformers

        def refuse(self, *_args, **_kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(transformers.PreTrainedModel, "to", refuse)
        said = f"error: the model {model} does not fit in the memory of cpu. Give a smaller model, or take a machine"
    else:
        from forebear.indexer.training.course import Course

        def refuse(self, *_args):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

        monkeypatch.setattr(Course, "loss", refuse)
        said = (
            "error: a training step of 32 rows does not fit in the memory of cpu. Train with a smaller --batch-size, or"
        )
    command = ["train", "--data", rows, "--model", model, "--out", tmp_path / "run", "--quiet", "--precision", "fp32"]
    assert run_command([str(word) for word in command]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize(
    "error",
    [error for error in LACK_OF_MEMORY if not isinstance(error, NotEnoughMemoryError)],
    ids=lambda error: str(error)[:40],
)
def test_a_lack_of_memory_that_nobody_foresaw_is_one_line_and_no_bug(error, tmp_path, monkeypatch, capsys):
    from forebear.indexer.index import Index

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(Index, "open", fail)
    assert run_command(["info", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory does not suffice (")
    assert "--batch-tokens" in line
    assert "bug" not in line


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file_or_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "rows.arrow"
    write_columns(path, {"row": np.arange(3)})
    rows = write_jsonl(tmp_path / "train.jsonl", text=sentences(4), label=[0, 1] * 2)

    def fail(*_args, **_kwargs):
        raise OSError("Memory mapping file failed: Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pa, "memory_map", fail)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            read_batches(path)
    with pytest.raises(OSError, match="Cannot allocate memory"), atomic_file(tmp_path / "new"):
        fail()
    assert not list(tmp_path.glob("new*"))

    def exhaust(*_args, **_kwargs):
        raise pa.ArrowMemoryError("malloc of size 1099511627776 failed")

    with pytest.raises(pa.ArrowMemoryError), reading(str(rows), "JSON Lines"):
        exhaust()
