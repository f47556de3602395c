"""A million realistic rows: the features of real rows, tiled, each copy moved as far as a row's neighbours lie.

A copy of row i is f_i + (f_a - f_b) s: a and b are two of the ten nearest neighbours of i, and s makes the step as long
as i's distance to its nearest neighbour. So copies lie as close as real rows do, in the directions in which real
neighbours differ; isotropic noise would fill dimensions in which features of a fine-tuned model do not vary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from forebear.indexer.index import Index

N_QUERIES = 1000  # real rows that are held out and never tiled
NEIGHBOURS = 10
_BLOCK_ROWS = 2048


def real_features(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Features of the distinct real rows of an index, those that are tiled and those that ask, ``(n, h)`` each."""
    index = Index.open(folder)
    features = index.features().take(index.live)
    _, first = np.unique(features, axis=0, return_index=True)
    features = features[np.random.default_rng(0).permutation(np.sort(first))]
    return features[N_QUERIES:], features[:N_QUERIES]


def nearest(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ten nearest other rows of each, and the distance to the first of them."""
    x = torch.from_numpy(features)
    squares = (x.double() ** 2).sum(1)
    rows, distances = [], []
    for start in range(0, len(x), _BLOCK_ROWS):
        block = x[start : start + _BLOCK_ROWS]
        scores = squares.float() - 2 * (block @ x.T)
        scores[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        near = scores.topk(NEIGHBOURS, dim=1, largest=False).indices
        rows.append(near.numpy())
        distances.append((block.double() - x[near[:, 0]].double()).norm(dim=1).numpy())
    return np.concatenate(rows), np.concatenate(distances)


def tiled(features: np.ndarray, n_rows: int, seed: int = 0, cache: Path | None = None) -> np.ndarray:
    """``(n_rows, h)`` float32: the real rows first, then their copies, as often as it takes.

    ``cache`` names a file that keeps them; of one that is there, the first rows are taken as they are.
    """
    if cache is not None and cache.exists() and len(np.load(cache, mmap_mode="r")) >= n_rows:
        return np.array(np.load(cache, mmap_mode="r")[:n_rows])
    near, distances = nearest(features)
    rng = np.random.default_rng(seed)
    out = np.empty((n_rows, features.shape[1]), np.float32)
    n_real = min(n_rows, len(features))
    out[:n_real] = features[:n_real]
    for start in range(n_real, n_rows, 65_536):
        rows = np.arange(start, min(start + 65_536, n_rows)) % len(features)
        pairs = rng.permuted(np.tile(np.arange(NEIGHBOURS), (len(rows), 1)), axis=1)[:, :2]
        steps = features[near[rows, pairs[:, 0]]] - features[near[rows, pairs[:, 1]]]
        lengths = np.linalg.norm(steps, axis=1, keepdims=True)
        steps *= distances[rows, None] / np.where(lengths > 0, lengths, 1)
        out[start : start + len(rows)] = features[rows] + steps
    if cache is not None:
        np.save(cache, out)
    return out


def clustered(n_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors around 1,000 centres, in all dimensions alike: what earlier figures were taken on, unlike features."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1000, width)).astype(np.float32)
    out = np.empty((n_rows, width), np.float32)
    for start in range(0, n_rows, 65_536):
        n = min(65_536, n_rows - start)
        out[start : start + n] = centres[rng.integers(0, 1000, n)] + rng.normal(size=(n, width)).astype(np.float32)
    return out
