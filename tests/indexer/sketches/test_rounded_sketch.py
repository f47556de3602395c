"""Sketches of a pass in bf16, whose products are of rounded numbers, against sums in float64."""

from __future__ import annotations

import numpy as np
import torch

from forebear.indexer.gradients.factors import LayerFactors
from forebear.indexer.model.scopes import Block, Scope
from forebear.indexer.sketches.projector import PlainProjector, SideBases

WIDE, TOKENS, ROWS, DIRECTIONS = 384, 20, 40, 64


def test_a_rounded_sketch_is_as_far_off_as_its_numbers_are_rounded():
    rng = np.random.default_rng(1)
    a, d = (rng.normal(size=(ROWS, TOKENS, WIDE)).astype(np.float32) for _ in range(2))
    left, right = (np.linalg.qr(rng.normal(size=(WIDE, DIRECTIONS)))[0].T.astype(np.float32) for _ in range(2))
    block = Block(name="layer", kind="linear", n_out=WIDE, n_in=WIDE)
    bases = {"layer": SideBases(torch.from_numpy(left), torch.from_numpy(right))}
    factors = LayerFactors(torch.from_numpy(a), torch.from_numpy(d))
    gradients = np.einsum("bto,bti->boi", d.astype(np.float64), a.astype(np.float64))
    expected, squares = (left @ gradients @ right.T).reshape(ROWS, -1), (gradients**2).sum(axis=(1, 2))
    for rounded, limit in ((False, 1e-5), (True, 2.0**-7)):
        projector = PlainProjector(Scope("all", (block,)), bases, rounded=rounded)
        _, numbers, norms = projector.project("layer", factors)
        errors = np.linalg.norm(numbers.double().numpy() - expected, axis=1)
        assert (errors < limit * np.linalg.norm(expected, axis=1)).all()
        assert (np.abs(norms.numpy() / squares - 1) < limit).all()
