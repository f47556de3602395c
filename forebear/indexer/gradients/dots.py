"""Products of the rows' gradients with vectors and of positions with themselves; weighted sums of gradients."""

from __future__ import annotations

import torch

from forebear.indexer.gradients.factors import ROWS_BYTES, LayerFactors
from forebear.indexer.model.device.copies import picks

_PRODUCT_LENGTH = 8192
_GRAM_COLUMNS = 192


def row_dots(vectors: torch.Tensor, factors: LayerFactors) -> torch.Tensor:
    """<V_q, G_b> of every pair, ``(q, b)`` float64, in a few products whatever the number of vectors.

    Args:
        vectors: V, ``(q, n_out, n_in)``.
        factors: Of ``b`` rows.
    """
    tokens = factors.inputs.shape[1]
    if by_gradients(len(vectors), len(vectors), tokens):
        return dots_of_gradients(vectors, factors)
    a, d = factors.inputs, factors.deltas
    parts = []
    for some in torch.split(vectors, _step(vectors, d)):
        turned = (a.flatten(0, 1) @ some.flatten(0, 1).T).view(*a.shape[:2], len(some), -1)  # V a_t, (b, t, q, n_out)
        parts.append(turned.mul_(d[:, :, None]).sum(dim=(1, 3), dtype=torch.float64).T)
    return torch.cat(parts)


def by_gradients(share: float, n_vectors: int, tokens: int) -> bool:
    """Whether it takes less to form the rows' gradients than to multiply their factors with each vector.

    Args:
        share: Vectors that a row is multiplied with, on average.
        n_vectors: All vectors.
        tokens: Positions of a row.
    """
    return share * tokens >= 2 * (tokens + n_vectors)


def dots_of_gradients(vectors: torch.Tensor, factors: LayerFactors) -> torch.Tensor:
    """:func:`row_dots` from the gradients themselves, as many rows at a time as fit in memory."""
    return torch.cat([products(vectors, part.gradients()) for part in factors.chunks()], dim=1)


def products(v: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """<V_q, G_b>, ``(q, b)`` float64: products of some rows of the matrices at a time, summed in float64.

    One product over all entries (590,000 in a feed-forward layer) would lose the fifth digit in float32.
    """
    n_out, n_in = v.shape[1:]
    size = max(1, _PRODUCT_LENGTH // n_in)
    while n_out % size:
        size -= 1
    a, b = (x.reshape(len(x), n_out // size, size * n_in).transpose(0, 1) for x in (v, gradients))
    return torch.bmm(a, b.transpose(1, 2)).sum(dim=0, dtype=torch.float64)


def gram(x: torch.Tensor) -> torch.Tensor:
    """X^T X, ``(n, n)``, of ``(m, n)``; on a CPU the half below the diagonal is computed and mirrored (1.4x)."""
    if not picks(x):
        return x.T @ x
    out = x.new_empty((x.shape[1], x.shape[1]))
    for start in range(0, len(out), _GRAM_COLUMNS):
        stop = start + _GRAM_COLUMNS
        strip = x[:, start:stop].T @ x[:, :stop]
        out[start:stop, :stop] = strip
        out[:start, start:stop] = strip[:, :start].T
    return out


def room_for_sums(vectors: torch.Tensor, factors: LayerFactors) -> int:
    """Numbers that :func:`add_weighted` needs room for."""
    return _step(vectors, factors.deltas) * factors.deltas.numel()


def add_weighted(total: torch.Tensor, weights: torch.Tensor, factors: LayerFactors, room: torch.Tensor) -> None:
    """Add the sum over rows of w_qb G_b to ``total`` ``(q, n_out, n_in)``; takes no memory.

    Args:
        total: Is changed.
        weights: w, ``(q, b)``, of the factors' type.
        factors: Of ``b`` rows.
        room: Numbers that are overwritten, at least :func:`room_for_sums`.
    """
    a, d = factors.inputs, factors.deltas
    step = _step(total, d)
    for some, of_some in zip(torch.split(total, step), torch.split(weights, step), strict=True):
        weighted = room[: len(some) * d.numel()].view(*d.shape[:2], len(some), -1)
        torch.mul(d[:, :, None], of_some.T[:, None, :, None], out=weighted)
        some.view(-1, some.shape[2]).addmm_(weighted.flatten(2).flatten(0, 1).T, a.flatten(0, 1))


def _step(vectors: torch.Tensor, deltas: torch.Tensor) -> int:
    """How many vectors at a time, so that an output gradient for each of them fits in memory."""
    return max(1, min(len(vectors), ROWS_BYTES // (deltas.element_size() * max(1, deltas.numel()))))
