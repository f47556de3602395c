"""One vector for each query, kept block by block; dots and lengths in float64."""

from __future__ import annotations

import torch

from forebear.indexer.model.device.copies import picks

Vectors = dict[str, torch.Tensor]  # (q, n_out, n_in) for each block
_COLUMNS = 32_768  # that are copied to float64 at once


def dot(a: Vectors, b: Vectors) -> torch.Tensor:
    """<a, b> of each query over all blocks, ``(q,)`` float64, multiplied and summed in float64."""
    parts = [(a[name].double() * b[name].double()).sum(dim=(1, 2)) for name in a]
    return torch.stack(parts).sum(dim=0)


def row_lengths(values: torch.Tensor) -> torch.Tensor:
    """Length of each row, ``(b,)`` float64; rows whose squares are too small for float32 are summed in float64."""
    if not picks(values):
        parts = [part.double().square().sum(dim=1) for part in torch.split(values, _COLUMNS, dim=1)]
        return torch.stack(parts).sum(dim=0).sqrt()
    lengths: torch.Tensor = torch.linalg.vector_norm(values, dim=1).double()
    small = lengths < 1e-15
    if bool(small.any()):
        lengths[small] = torch.linalg.vector_norm(values[small].double(), dim=1)
    return lengths


def joined(parts: list[Vectors]) -> Vectors:
    """The vectors of all parts, one part after the other, ``(q_0 + q_1 + ..., n_out, n_in)`` for each block.

    Of several parts no copy stays: block by block, each part's own vectors become views of the joined ones.
    """
    if len(parts) == 1:
        return parts[0]
    whole: Vectors = {}
    for name in list(parts[0]):
        whole[name] = torch.cat([part[name] for part in parts])
        views = torch.split(whole[name], [len(part[name]) for part in parts])
        for part, view in zip(parts, views, strict=True):
            part[name] = view
    return whole
