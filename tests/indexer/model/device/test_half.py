"""bf16 on a CPU, against products of numbers that are rounded by hand and attention written out in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forebear.indexer.model.device.arithmetic import forward_arithmetic
from forebear.indexer.model.device.half import has_half_products, rounded_product, rounded_products

CPU = torch.device("cpu")


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 numbers to the nearest with 8 bits, ties to even, as float64."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def test_products_round_what_they_multiply_and_nothing_else():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((300, 384), (384, 64)))
    with rounded_products(CPU):
        inside = (torch.from_numpy(a) @ torch.from_numpy(b)).double().numpy()
    after = (torch.from_numpy(a) @ torch.from_numpy(b)).double().numpy()
    whole, of_rounded = a.astype(np.float64) @ b.astype(np.float64), rounded(a) @ rounded(b)
    assert np.abs(after - whole).max() < 1e-4 < np.abs(of_rounded - whole).max()
    # A processor without such products, or a torch without the setting, goes on in fp32.
    assert min(np.abs(inside - of_rounded).max(), np.abs(inside - whole).max()) < 1e-4
    if has_half_products(CPU) and hasattr(torch.backends.mkldnn, "matmul"):
        assert np.abs(inside - of_rounded).max() < 1e-4


def test_numbers_of_a_pass_in_bf16_are_multiplied_as_they_are():
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((300, 384), (384, 64)))
    expected = rounded(a) @ rounded(b)
    found = rounded_product(torch.from_numpy(a).bfloat16(), torch.from_numpy(b))
    assert found.dtype == torch.float32
    assert (np.abs(found.double().numpy() - expected) <= 2.0**-8 * np.abs(expected) + 1e-4).all()


def test_settings_of_the_caller_come_back_also_after_an_error():
    def product() -> torch.Tensor:
        return torch.full((64, 512), 1 + 2.0**-12) @ torch.ones((512, 64))

    before = product()
    with pytest.raises(KeyError), rounded_products(CPU):
        raise KeyError
    assert torch.equal(product(), before)
    with rounded_products(torch.device("meta")):
        assert torch.equal(product(), before)


def test_flags_of_the_processor_say_whether_there_are_products():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_half_products(CPU) == any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    assert not has_half_products(torch.device("meta"))


class Kernels(TorchDispatchMode):
    """Notes the types of numbers that reach attention's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__ and "backward" not in func.__name__:
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def attention(q, k, v, mask, **choices) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **choices)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k, v, g = (torch.randn(2, 3, 7, 8, generator=generator).bfloat16() for _ in range(4))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    return q, k, v, g, mask


def test_attention_and_its_gradient_are_in_fp32(inputs):
    q, k, v, g, mask = inputs
    asked = [x.clone().requires_grad_() for x in (q, k, v)]
    with Kernels() as kernels, forward_arithmetic(CPU, "bf16"):
        out = attention(*asked, mask)
    assert kernels.types == [torch.float32]
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, asked, g)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    scores = (wide[0] @ wide[1].transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(dim=-1) @ wide[2]
    truth = torch.autograd.grad(expected, wide, g.double())
    for ours, theirs in [(out, expected), *zip(found, truth, strict=True)]:  # rounded once, to 8 bits
        assert ((ours.double() - theirs).abs() <= 2.0**-8 * theirs.abs() + 1e-6).all()


def test_attention_without_a_gradient_or_with_dropout_stays_in_bf16(inputs):
    q, k, v, _, mask = inputs
    with Kernels() as kernels, forward_arithmetic(CPU, "bf16"):
        with torch.no_grad():
            attention(q, k, v, mask)
        attention(q.requires_grad_(), k, v, mask, dropout_p=0.5)
    assert kernels.types
    assert torch.float32 not in kernels.types
