"""One-bit codes as they are stored, packed where they are computed: a GPU then sends bits instead of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from forebear.ratio import ratio


@dataclass(frozen=True)
class PackedCodes:
    """Codes as they are stored.

    Attributes:
        signs: Bits, 1 where a number is positive, ``(n, bits / 8)`` uint8.
        factors: f, ``(n,)`` float64.
    """

    signs: np.ndarray
    factors: np.ndarray


def packed(codes: np.ndarray) -> PackedCodes:
    """Codes ``(n, bits)`` float32 as they are stored."""
    absolute = np.abs(codes).sum(axis=1, dtype=np.float64)
    squares = (codes.astype(np.float64) ** 2).sum(axis=1)
    return PackedCodes(np.packbits(codes > 0, axis=1), ratio(squares, absolute))


def packed_there(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`packed` on the device of the codes, so that bits are copied from there."""
    if codes.device.type == "cpu":
        found = packed(codes.numpy())
        return torch.from_numpy(found.signs), torch.from_numpy(found.factors)
    places = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    bits = torch.nn.functional.pad(codes > 0, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    absolute, squares = codes.abs().sum(dim=1, dtype=torch.float64), codes.double().square().sum(dim=1)
    return (bits * places).sum(dim=2, dtype=torch.uint8), torch.where(absolute > 0, squares / absolute, 0.0)
