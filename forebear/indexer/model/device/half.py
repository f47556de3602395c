"""bf16 on a CPU: where it has products of such numbers, they are several times as fast as those of fp32.

Measured on an Intel Xeon with AMX (benchmarks/RESULTS.md): products eight times as fast, and the gradient of attention
over short texts eight times as slow. So attention stays in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NATIVE = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # flags of processors


def has_half_products(device: torch.device) -> bool:
    """Whether a device has products of bf16; elsewhere they are emulated, and slower than those of fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(flags & NATIVE)


class AttentionInFloat32(TorchFunctionMode):
    """While it is entered, attention of which a gradient is asked runs in fp32 on a CPU, also under autocast.

    Without dropout, that is: torch has no kernel of its own for attention with dropout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of torch passes here."""
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["query"]
        dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
        if given.dtype != torch.bfloat16 or dropout:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            out = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return out.to(given.dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Inside, products of fp32 matrices on a CPU may round what they multiply to bf16; sums are in fp32.

    The setting is torch's own, of the whole process, and is restored at the end. Versions of torch that have none for
    products on CPUs alone, and other devices, go on in fp32.
    """
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu" or not hasattr(products, "fp32_precision"):
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def rounded_product(values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``values @ matrix`` in fp32, of numbers that may be rounded to bf16; ``values`` may be in bf16."""
    if values.dtype == torch.bfloat16:
        return (values @ matrix.to(torch.bfloat16)).float()
    with rounded_products(values.device):
        return values @ matrix
