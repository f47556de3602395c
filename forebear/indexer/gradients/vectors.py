"""One vector for each query, kept block by block."""

from __future__ import annotations

import torch

Vectors = dict[str, torch.Tensor]  # (q, n_out, n_in) for each block


def dot(a: Vectors, b: Vectors) -> torch.Tensor:
    """<a, b> of each query over all blocks, ``(q,)`` float64, multiplied and summed in float64."""
    parts = [(a[name].double() * b[name].double()).sum(dim=(1, 2)) for name in a]
    return torch.stack(parts).sum(dim=0)
