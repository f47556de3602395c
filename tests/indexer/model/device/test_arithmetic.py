"""The arithmetic of a GPU is decided inside passes and training, and is the caller's again after them.

There is no GPU here: the settings are torch's, and can be looked at without one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import sentences
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.errors import InputError, ModelError
from forebear.evaluation.measures.agreement import start_states
from forebear.evaluation.measures.cancellation import Group, row_gradient_norms
from forebear.evaluation.measures.randomized import save_random_model
from forebear.evaluation.retraining.jobs import Job
from forebear.evaluation.retraining.recipes import open_retrainer
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.curvature.products import HessianProduct
from forebear.indexer.gradients.self_check import check_gradients
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.model.device import arithmetic
from forebear.indexer.model.device.arithmetic import (
    computed_line,
    computed_on,
    forward_arithmetic,
    is_deterministic,
    own_random_numbers,
    repeatable,
)
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.spans.text import Span
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.progress import Listener, heard_by
from forebear.retriever.question.models import one_step_away
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.gradients import saliency_gradients

GPU, CPU = torch.device("cuda"), torch.device("cpu")
TEXTS, LABELS = sentences(6, seed=8), np.array([0, 1, 1, 0, 1, 0])
KERNELS = ("flash", "mem_efficient", "math", "cudnn")


def settings() -> dict[str, Any]:
    """Every setting of torch that decides the arithmetic of a GPU."""
    enabled = {name: getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in KERNELS}
    backends = torch.backends
    parts = {"products": backends.cuda.matmul, "convolutions": backends.cudnn.conv, "recurrent": backends.cudnn.rnn}
    return enabled | {name: part.fp32_precision for name, part in parts.items()} | {
        "order": torch._C._get_sdp_priority_order(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "by time": backends.cudnn.benchmark,
    }  # fmt: skip


@pytest.fixture
def fresh(monkeypatch) -> Iterator[None]:
    """No answer on cuBLAS from an earlier test, and no workspace in the environment."""
    is_deterministic.cache_clear()
    monkeypatch.setenv(arithmetic.WORKSPACE, "")
    monkeypatch.delenv(arithmetic.WORKSPACE)
    yield
    is_deterministic.cache_clear()


@pytest.fixture
def gpu(fresh, monkeypatch) -> None:
    """cuBLAS starts with the workspace that it is given."""
    monkeypatch.setattr(arithmetic, "_has_started_without", lambda _device: False)


@contextmanager
def restoring() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.enable_flash_sdp(True)
        torch.set_deterministic_debug_mode(0)
        torch.backends.cudnn.benchmark = False


def test_on_the_cpu_nothing_is_set():
    before = settings()
    with repeatable(CPU), forward_arithmetic(CPU, "fp32"):
        assert settings() == before


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_on_a_gpu_the_arithmetic_is_decided_and_then_the_callers_again(gpu, ends):
    with restoring():
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)
        torch.set_deterministic_debug_mode("warn")
        torch.backends.cudnn.benchmark = True
        before = settings()
        try:
            with repeatable(GPU):
                inside = settings()
                if ends != "well":
                    raise KeyError
        except KeyError:
            pass
        assert settings() == before
        assert torch.get_float32_matmul_precision() == "medium"
    assert {name: inside[name] for name in KERNELS} == {
        "flash": False, "cudnn": False, "mem_efficient": True, "math": True
    }  # fmt: skip
    assert inside["order"][:2] == [int(SDPBackend.EFFICIENT_ATTENTION), int(SDPBackend.MATH)]
    assert [inside[name] for name in ("products", "convolutions", "recurrent")] == ["ieee"] * 3
    assert (inside["deterministic"], inside["filled"], inside["by time"]) == (2, False, False)


def test_older_versions_of_torch_have_two_settings_of_tf32(monkeypatch):
    class Older:
        allow_tf32 = True

    products, cudnn = Older(), Older()
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with arithmetic._without_tf32():
        assert (products.allow_tf32, cudnn.allow_tf32) == (False, False)
    assert (products.allow_tf32, cudnn.allow_tf32) == (True, True)


def test_math_alone_stays_math_alone_inside(gpu):
    with repeatable(GPU), sdpa_kernel(SDPBackend.MATH), repeatable(CPU):
        assert [name for name in KERNELS if settings()[name]] == ["math"]


def test_the_workspace_of_cublas_is_set_before_it_starts(gpu):
    assert is_deterministic(GPU)
    assert os.environ[arithmetic.WORKSPACE] == ":4096:8"


@pytest.mark.parametrize(
    ("given", "started", "said"),
    [
        (
            ":0:0",
            False,
            "CUBLAS_WORKSPACE_CONFIG=:0:0: on cuda numbers may differ in their last digits from run to run",
        ),
        (
            None,
            True,
            "this process had used cuBLAS before, without CUBLAS_WORKSPACE_CONFIG: on cuda numbers may differ",
        ),
    ],
)
def test_where_a_gpu_cannot_repeat_its_numbers_that_is_said_once(given, started, said, fresh, monkeypatch):
    monkeypatch.setattr(arithmetic, "_has_started_without", lambda _device: started)
    if given is not None:
        monkeypatch.setenv(arithmetic.WORKSPACE, given)
    told: list[str] = []
    with heard_by(Listener(told.append, lambda *_note: None)):
        for _ in range(2):
            with repeatable(GPU):
                assert settings()["deterministic"] == 0
                assert settings()["products"] == "ieee"
    (line,) = told
    assert line.startswith(said)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    record = computed_on(GPU, "fp32")
    assert record["deterministic"] is False
    assert computed_line(record).endswith("; not deterministic")


def test_a_cublas_that_started_too_early_is_found_by_a_product(fresh, monkeypatch):
    said = f"this operation is not deterministic because it uses CuBLAS ... {arithmetic.WORKSPACE}"

    def fail(*_args, **_kwargs):
        assert torch.get_deterministic_debug_mode() == 2
        raise RuntimeError(said)

    assert not arithmetic._has_started_without(CPU)
    monkeypatch.setattr(torch, "ones", fail)
    assert arithmetic._has_started_without(GPU)
    assert torch.get_deterministic_debug_mode() == 0
    said = "CUDA error: no kernel image is available"
    with pytest.raises(RuntimeError, match="no kernel image"):
        arithmetic._has_started_without(GPU)


def test_what_has_no_deterministic_algorithm_is_refused_in_one_line(gpu):
    with pytest.raises(ModelError) as refused, repeatable(GPU), repeatable(GPU):
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
        )
    assert str(refused.value) == (
        "the model computes adaptive_avg_pool2d_backward_cuda, for which torch has no deterministic algorithm on cuda: "
        'its numbers would differ from run to run. Use device="cpu".'
    )
    with pytest.raises(RuntimeError, match="shapes"), repeatable(GPU):
        raise RuntimeError("shapes do not match")


def test_precisions_that_there_are_not_are_refused():
    arithmetic.check_precision(CPU, "bf16")
    with pytest.raises(InputError, match=r"precision 'fp8' is not known"):
        arithmetic.check_precision(CPU, "fp8")
    with pytest.raises(InputError, match=r"torch does not compute in bf16 on meta\. Give precision=.fp32."):
        arithmetic.check_precision(torch.device("meta"), "bf16")
    with forward_arithmetic(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_records_say_where_and_how_numbers_are_computed(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    assert computed_on(CPU, "fp32") == {
        "device": "cpu", "attention": "chosen by torch", "precision": "fp32", "torch": torch.__version__,
    }  # fmt: skip
    on_gpu = computed_on(GPU, "bf16")
    assert on_gpu == {
        "device": "NVIDIA H200", "attention": ["efficient", "math"], "precision": "bf16", "torch": torch.__version__,
        "deterministic": True,
    }  # fmt: skip
    assert computed_line(on_gpu) == f"NVIDIA H200, bf16, torch {torch.__version__}, attention efficient or math"


def test_the_callers_random_numbers_go_on_also_those_of_gpus(monkeypatch):
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    before, kept = torch.get_rng_state(), dict(states)
    for device in (GPU, CPU):  # a training on the CPU seeds the GPUs, too
        with own_random_numbers(device):
            torch.manual_seed(5)
            states.update({0: torch.tensor([8]), 1: torch.tensor([9])})
        assert torch.equal(torch.get_rng_state(), before)
        assert states == kept


OPTIONS = TrainOptions(epochs=1, batch_size=8, learning_rate=2e-2, seed=3, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Retriever:
    """The index of a run, so that the run can be repeated."""
    folder = tmp_path_factory.mktemp("repeated")
    source = rows_from_texts(sentences(24, seed=4), [0, 1] * 12)
    train(source, tiny_model("bert", 2, 5, 2.0), folder / "run", OPTIONS)
    checkpoints = choose_model(str(folder / "run")).checkpoints
    return Retriever(build_index(source, folder / "index", checkpoints, BuildOptions(dampings=("0.1x",))))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "top-1"])
def test_retraining_leaves_the_callers_random_numbers(trained, recipe, tmp_path):
    retrainer = open_retrainer(trained, recipe, [TEXTS], tmp_path)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    retrainer.run([Job(trained.index.live, 4)])
    assert retrainer.n_trained == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", ["full", "head"])
def test_outcomes_of_retraining_are_kept_by_device_and_a_run_says_its_own(trained, recipe, tmp_path, monkeypatch):
    record = json.loads((trained.index.folder.parent / "run" / "run.json").read_text())["settings"]["computed_on"]
    assert record == computed_on(CPU, "fp32")
    job = Job(trained.index.live, OPTIONS.seed)
    on_cpu = open_retrainer(trained, recipe, [TEXTS], tmp_path)
    assert "computed_on" not in on_cpu.recipe.facts  # so outcomes of older versions are known
    monkeypatch.setattr(arithmetic, "device_kind", lambda _device: "NVIDIA H200")
    on_gpu = open_retrainer(trained, recipe, [TEXTS], tmp_path)
    assert on_gpu.recipe.facts["computed_on"] == record | {"device": "NVIDIA H200"}
    assert on_gpu.digest(job) != on_cpu.digest(job)


def test_random_models_leave_the_callers_random_numbers(trained, tmp_path):
    before = torch.get_rng_state()
    save_random_model(trained.classifier(), tmp_path / "model", 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def seen(gpu, monkeypatch) -> list[tuple[str, int]]:
    """The mode of torch in each forward and backward of a linear layer, the CPU being taken for a GPU."""
    monkeypatch.setattr(arithmetic, "_leaves_open", lambda _device: True)
    modes: list[tuple[str, int]] = []
    forward = nn.Linear.forward

    def noting(self: nn.Linear, values: torch.Tensor) -> torch.Tensor:
        modes.append(("forward", torch.get_deterministic_debug_mode()))
        out = forward(self, values)
        if out.requires_grad:
            out.register_hook(lambda _gradient: modes.append(("backward", torch.get_deterministic_debug_mode())))
        return out

    monkeypatch.setattr(nn.Linear, "forward", noting)
    return modes


def _retrain(recipe: str) -> Callable[..., Any]:
    def retrain(_world, trained, folder):
        retrainer = open_retrainer(trained, recipe, [TEXTS], folder)
        return lambda: retrainer.run([Job(np.arange(20), OPTIONS.seed)])  # a model that is loaded

    return retrain


def _hessian(world, _trained, _folder):
    classifier = world.retriever.classifier()
    scope = scope_of(classifier, "top-1")
    product = HessianProduct(classifier, scope, [TEXTS], LABELS, batch_tokens=1000)
    return lambda: product(scope.zeros(1, classifier.head.weight))


def _saliency(world, _trained, _folder):
    classifier = world.retriever.classifier()
    words = [Span(0, 0, len(text.split()[0])) for text in TEXTS]
    return lambda: saliency_gradients(classifier, scope_of(classifier, "top-1"), [TEXTS], LABELS, words)


def _norms(world, _trained, _folder):
    classifier = world.retriever.classifier()
    group = Group("all", "all", "all", tuple(name for name, _ in classifier.model.named_parameters()))
    return lambda: row_gradient_norms(classifier, [TEXTS], LABELS, [group])


def _of_classifier(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda world, _trained, _folder: partial(run, world.retriever.classifier())


WORK: dict[str, Callable[..., Any]] = {
    "forward": _of_classifier(lambda classifier: run_forward(classifier, [TEXTS])),
    "gradients": _of_classifier(lambda it: whole_gradients(it, scope_of(it, "all"), [TEXTS], LABELS)),
    "check of gradients": _of_classifier(lambda classifier: check_gradients(classifier, ["all"])),
    "agreement": _of_classifier(lambda classifier: start_states(classifier, [TEXTS])),
    "embeddings": lambda world, _trained, _folder: partial(world.retriever.models.sentence_encoder.embed, [TEXTS]),
    "one step away": lambda world, _t, _f: partial(one_step_away, world.retriever.classifier(), world.index, 0),
    "Hessian": _hessian,
    "saliency": _saliency,
    "norms": _norms,
    "full": _retrain("full"),
    "top-1": _retrain("top-1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_every_forward_and_backward_runs_with_the_arithmetic_decided(name, bert_world, trained, tmp_path, request):
    work = WORK[name](bert_world, trained, tmp_path)
    modes = request.getfixturevalue("seen")
    work()
    assert modes
    assert {mode for _, mode in modes} == {2}
    has_backward = name not in ("forward", "agreement", "embeddings")
    assert ("backward" in {step for step, _ in modes}) is has_backward
    assert torch.get_deterministic_debug_mode() == 0


def test_torchs_older_settings_can_be_read_where_tf32_is_off():
    """They contradict the newer ones otherwise, and torch refuses to say what they are."""
    before = torch.backends.cudnn.allow_tf32
    with arithmetic._without_tf32():
        assert not torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True):  # reads them all
            pass
    assert torch.backends.cudnn.allow_tf32 == before
