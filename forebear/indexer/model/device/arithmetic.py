"""The arithmetic of a GPU, made repeatable: the same work on the same device gives the same numbers, to the last bit.

Four things are otherwise left open on CUDA. Products of fp32 may be rounded to TF32 (10 bits; cuDNN's default). The
kernel of attention is chosen by what the machine and its torch have. Sums may be taken in the order in which threads
finish. And cuBLAS may share its workspace between streams. Inside :func:`repeatable` all four are decided. The settings
are torch's own, of the whole process, so they are restored at the end: the caller has other work for torch, too.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.errors import InputError, ModelError
from forebear.indexer.model.device.half import AttentionInFloat32
from forebear.progress import tell_warning

# In this order. The first has a deterministic backward in torch's strict mode, the other needs none.
ATTENTION_KERNELS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # an environment variable that cuBLAS reads when it starts
FIXED_WORKSPACES = (":4096:8", ":16:8")  # the values with which cuBLAS is deterministic


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, fp32 is fp32, and a CUDA device repeats its numbers; on other devices nothing is changed.

    Deterministic algorithms are those of ``torch.use_deterministic_algorithms``, in its strict mode: with warnings
    alone, the backward of attention would not be deterministic. Where cuBLAS cannot be made deterministic any more, a
    warning says so once, and the mode stays as it is.

    Raises:
        ModelError: The model computes something for which torch has no deterministic algorithm on the device.
    """
    if not _leaves_open(device):
        yield
        return
    with ExitStack() as settings:
        settings.enter_context(_without_tf32())
        settings.enter_context(_attention_in_order())
        if is_deterministic(device):
            settings.enter_context(_deterministic_algorithms(device))
        yield


def _leaves_open(device: torch.device) -> bool:
    """Whether torch leaves the arithmetic of a device open."""
    return device.type == "cuda"


@contextmanager
def _set(*values: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of objects, and restore them at the end."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products and convolutions of fp32 without TF32.

    Newer versions of torch have settings for each kind of them. Of convolutions the older setting is set, too, for
    torch refuses to read it where it contradicts the newer. These may have been inherited: they are restored as values
    of their own.
    """
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not hasattr(products, "fp32_precision"):
        with _set((products, "allow_tf32", False), (cudnn, "allow_tf32", False)):
            yield
        return
    convolutions: Any = cudnn  # mypy knows the older settings alone
    try:
        older: bool | None = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # the caller's settings contradict each other
        older = None
    kinds = (products, convolutions.conv, convolutions.rnn)
    with _set(*((kind, "fp32_precision", kind.fp32_precision) for kind in kinds)):  # restores them after the older one
        if older is not None:
            torch._C._set_cudnn_allow_tf32(False)
        try:
            for kind in kinds:
                kind.fp32_precision = "ieee"
            yield
        finally:
            if older is not None:
                torch._C._set_cudnn_allow_tf32(older)


@contextmanager
def _attention_in_order() -> Iterator[None]:
    """The first of :data:`ATTENTION_KERNELS` that takes a model's shapes."""
    has_order = (
        "set_priority" in inspect.signature(sdpa_kernel).parameters
    )  # older versions have the order that we want
    order = torch._C._get_sdp_priority_order() if has_order else []
    try:
        with sdpa_kernel(list(ATTENTION_KERNELS.values()), **({"set_priority": True} if has_order else {})):
            yield
    finally:
        if has_order:  # torch restores it for the kernels that the caller has enabled alone
            torch._C._set_sdp_priority_order(order)


@contextmanager
def _deterministic_algorithms(device: torch.device) -> Iterator[None]:
    before, filling = torch.get_deterministic_debug_mode(), torch.utils.deterministic
    try:
        torch.set_deterministic_debug_mode("error")
        # The mode would also fill new memory with NaN, to find reads of it; and cuDNN would choose by time.
        with _set((filling, "fill_uninitialized_memory", False), (torch.backends.cudnn, "benchmark", False)):
            yield
    except RuntimeError as error:
        if (found := re.match(r"(\S+) does not have a deterministic implementation", str(error))) is None:
            raise
        raise ModelError(
            f"the model computes {found[1]}, for which torch has no deterministic algorithm on {device}: its numbers "
            "would differ from run to run. Use --device cpu."
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before)


@cache
def is_deterministic(device: torch.device) -> bool:
    """Whether products on a CUDA device repeat their numbers: whether cuBLAS starts, or has started, with a workspace.

    Sets the environment variable that decides it, where the user has not. A warning, given once, says why not.
    """
    given = os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES[0])
    consequence = "numbers may differ in their last digits from run to run"
    if given not in FIXED_WORKSPACES:
        tell_warning(f"{WORKSPACE}={given}: on {device} {consequence}. Unset it, or set it to {FIXED_WORKSPACES[0]}.")
    elif _has_started_without(device):
        tell_warning(
            f"this process had used cuBLAS before, without {WORKSPACE}: on {device} {consequence}. Set {WORKSPACE}="
            f"{FIXED_WORKSPACES[0]} before the process starts."
        )
    else:
        return True
    return False


def _has_started_without(device: torch.device) -> bool:
    """Whether torch, which looks at the environment at the first product of a process, has looked too early."""
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("error")
        torch.ones((2, 2), device=device) @ torch.ones((2, 2), device=device)
    except RuntimeError as error:
        if WORKSPACE not in str(error):
            raise
        return True
    finally:
        torch.set_deterministic_debug_mode(before)
    return False


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision that is not known, or that the device does not compute in.

    Raises:
        InputError: It is refused.
    """
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision {precision!r} is not known. Give fp32 or bf16.")
    if precision == "bf16" and not torch.amp.is_autocast_available(device.type):
        raise InputError(f"torch does not compute in bf16 on {device}. Give --precision fp32, or another --device.")


@contextmanager
def forward_arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """The arithmetic of a forward pass: :func:`repeatable`, in ``bf16`` (by autocast) or ``fp32``.

    A backward pass, and what is gathered from it, takes :func:`repeatable` alone: its numbers have the types that the
    forward pass gave them.
    """
    with ExitStack() as settings:
        settings.enter_context(repeatable(device))
        if precision == "bf16":
            settings.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                settings.enter_context(AttentionInFloat32())
        yield


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Inside, torch may be seeded; at the end the random numbers of the caller go on, on the CPU and on GPUs.

    Seeding torch seeds all GPUs, also those that the work does not use.
    """
    on_gpus = device.type == "cuda" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpus else ()):
        yield


def device_kind(device: torch.device) -> str:
    """What tells devices of other last digits apart: the name of a GPU, else the type of the device, such as cpu."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def computed_on(device: torch.device, precision: str) -> dict[str, Any]:
    """Where and how numbers are computed, as an index, a run and results record it.

    Returns:
        ``device`` (its kind), ``precision``, ``torch`` (its version and build) and ``attention``: the kernels that may
        be taken, in order, or that torch chooses. On a GPU also whether its numbers repeat, ``deterministic``.
    """
    is_gpu = device.type == "cuda"
    facts = {
        "device": device_kind(device),
        "attention": list(ATTENTION_KERNELS) if is_gpu else "chosen by torch",
        "precision": precision,
        "torch": str(torch.__version__),
    }
    return facts | ({"deterministic": is_deterministic(device)} if is_gpu else {})


def computed_line(computed_on: Mapping[str, Any]) -> str:
    """:func:`computed_on` as a line for people."""
    kernels = computed_on["attention"]
    attention = kernels if isinstance(kernels, str) else " or ".join(kernels)
    line = f"{computed_on['device']}, {computed_on['precision']}, torch {computed_on['torch']}, attention {attention}"
    return line if computed_on.get("deterministic", True) else f"{line}; not deterministic"
