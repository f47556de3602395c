"""One vector for each query, kept block by block; arrays as tensors."""

from __future__ import annotations

import warnings

import numpy as np
import torch

Vectors = dict[str, torch.Tensor]  # (q, n_out, n_in) for each block


def dot(a: Vectors, b: Vectors) -> torch.Tensor:
    """<a, b> of each query over all blocks, ``(q,)`` float64, multiplied and summed in float64."""
    parts = [(a[name].double() * b[name].double()).sum(dim=(1, 2)) for name in a]
    return torch.stack(parts).sum(dim=0)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """Zero-copy tensor of an array that may be read-only (memory-mapped): never write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only arrays
        return torch.from_numpy(values)
