"""What a GPU computes in another way than the CPU, since its host would wait for what is left out: the same numbers."""

from __future__ import annotations

import pytest
from programs import on_pretended

PROGRAM = """
import numpy as np
from forebear.indexer.curvature.ekfac import _Factors
from forebear.indexer.curvature.products import _Positions, _Tokens
from forebear.indexer.gradients import dots, factors
from forebear.indexer.gradients.factors import EmbeddingFactors, LayerFactors
from forebear.indexer.model.scopes import Block, Scope
from forebear.indexer.losses.cross_entropy import IGNORED, CrossEntropy
from forebear.indexer.sketches.packed import packed_there
from forebear.indexer.gradients.vectors import row_lengths
from forebear.indexer.sketches.norms import squared_norms
from forebear.indexer.words.gradients import _sums_of_all, _sums_of_kept

generator = torch.Generator().manual_seed(0)
b, t, n_in, n_out, q = 5, 7, 6, 4, 3
a, d = (torch.randn(b, t, n, generator=generator) for n in (n_in, n_out))
d[0, 3:] = 0.0
d[2] *= 1e-22
d[3] = 0.0
v = torch.randn(q, n_out, n_in, generator=generator)
weights = torch.randn(q, b, generator=generator)
ids = torch.randint(0, 4, (b, t), generator=generator).masked_fill(torch.rand(b, t, generator=generator) < 0.3, -1)
ids[4] = -1
codes = torch.randn(b, 21, generator=generator)
codes[1] = 0.0
targets = torch.tensor([0, IGNORED, 1, 1])
long = torch.randn(3, 70_000, generator=generator) * torch.tensor([[1.0], [1e-25], [0.0]])
scope = Scope("layer:x", (Block("x", "linear", n_out, n_in),))


def words(found):
    keys, vectors = (x.cpu().numpy() for x in found)
    keys = keys[keys < b * 10]
    keys = np.unique(keys)
    return [keys, vectors[: len(keys)]]


def forms(device, positions, sums):
    there = lambda *values: [x.to(device) for x in values]
    f = LayerFactors(*there(a, d))
    collector = _Factors(scope, device)
    collector.begin([0])
    collector.on_layer("x", f)
    collector.keep([0])
    vectors, w = there(v, weights)
    part = positions(f)
    total, room = torch.zeros_like(vectors), vectors.new_empty(part.room(vectors))
    part.add_to(total, w, room)
    found = {
        "norms": [squared_norms(f)], "lengths": [row_lengths(*there(long))], "dots": [part.dots(vectors)],
        "sums": [total], "factors": [collector.found.inputs["x"], collector.found.outputs["x"]],
        "codes": packed_there(*there(codes)),
        "weights": [CrossEntropy((1.0, 3.0)).total_weight(x) for x in there(targets, torch.full((2,), IGNORED))],
    }
    found = {name: [x.cpu().numpy() for x in values] for name, values in found.items()}
    for top in (0, 2):
        found["words", top] = words(sums(EmbeddingFactors(*there(a, d, ids, ids)), top, 10))
    return found


here = forms(torch.device("cpu"), _Tokens, _sums_of_kept)
for rows_bytes in (1 << 30, 1):  # all at once, and one row or vector at a time
    dots.ROWS_BYTES = factors.ROWS_BYTES = rows_bytes
    there = forms(device, _Positions, _sums_of_all)
    for name, values in here.items():
        assert len(values) == len(there[name])
        for x, y in zip(values, there[name]):
            assert x.shape == y.shape and x.dtype == y.dtype, (name, x.shape, y.shape, x.dtype, y.dtype)
            assert np.allclose(x, y, rtol=1e-5, atol=1e-7 * np.abs(x).max()), (name, x, y)
norms = here["norms"][0]
exact = torch.einsum("bto,bti->boi", d.double(), a.double()).square().sum(dim=(1, 2)).numpy()
assert np.allclose(norms, exact, rtol=1e-5, atol=0.0), (norms, exact)
found = [len(here), float(norms[2]) > 0]
"""


@pytest.mark.slow
def test_a_device_gives_the_numbers_of_the_cpu():
    assert on_pretended(PROGRAM) == [9, True]
