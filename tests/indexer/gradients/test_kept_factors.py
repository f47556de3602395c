"""Factors that a second pass takes from a file, against those of a pass that runs the model."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import pytest
import torch
from tiny import labels, make_tiny_model, sentences

from forebear import BuildOptions, build_index
from forebear.indexer.gradients.factors import KeptFactors, LayerFactors
from forebear.indexer.gradients.gradient_pass import Collector, labels_seed, run_pass
from forebear.indexer.gradients.tape import Tape
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model

N = 9
TEXTS, LABELS = sentences(N, seed=31), np.array(labels(N))


class Shown(Collector):
    """Gathers copies of the factors, with their strides, by rows and layer."""

    def __init__(self, scope, fails_at: int = -1) -> None:
        self.scope, self.fails_at, self.found = scope, fails_at, {}

    def begin(self, positions):
        self.batch = {}

    def on_layer(self, name, factors):
        self.fails_at -= 1
        if self.fails_at == 0:
            raise MemoryError
        self.batch[name] = tuple((x.clone(), x.stride()) for x in (factors.inputs, factors.deltas))

    def keep(self, positions, *arrays):
        self.found[tuple(positions)] = self.batch


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Numbers of rows of the batches that were run."""
    found, record = [], Tape.record

    def counted(tape, rows, *rest):
        found.append(len(rows))
        return record(tape, rows, *rest)

    monkeypatch.setattr(Tape, "record", counted)
    return found


@pytest.fixture(params=[False, True], ids=["weights", "weights and biases"])
def go(request, tiny_model):
    """A pass over the rows in some three batches; what it showed, features and logits."""
    classifier = load_classifier(tiny_model(), device="cpu")
    scope = scope_of(classifier, "all", with_bias=request.param)

    def run(recorder=None, fails_at=-1):
        shown = Shown(scope, fails_at)
        seeds = labels_seed(CROSS_ENTROPY, LABELS)
        forward = run_pass(classifier, [TEXTS], seeds, [shown], batch_tokens=50, recorder=recorder)
        return shown.found, forward

    return run


@pytest.fixture
def keeper(tmp_path):
    """Makes files of kept factors, which are closed after the test."""
    with ExitStack() as opened:
        yield lambda *bound: opened.enter_context(closing(KeptFactors(tmp_path, *bound)))


def assert_same(found, wanted) -> None:
    """To the last bit, strides among it."""
    (factors, forward), (of_run, forward_of_run) = found, wanted
    assert factors.keys() == of_run.keys()
    for batch, layers in of_run.items():
        assert list(factors[batch]) == list(layers)
        for name, both in layers.items():
            for (values, strides), (wanted_values, wanted_strides) in zip(factors[batch][name], both, strict=True):
                assert torch.equal(values, wanted_values), name
                assert strides == wanted_strides, name
    np.testing.assert_array_equal(forward.features, forward_of_run.features)
    np.testing.assert_array_equal(forward.logits, forward_of_run.logits)


def test_a_second_pass_is_shown_the_factors_of_the_first_and_runs_nothing(go, keeper, tmp_path, runs):
    wanted, kept = go(), keeper()
    assert len(wanted[0]) > 1
    assert_same(go(kept.of_pass(0)), wanted)
    del runs[:]
    assert_same(go(kept.of_pass(0)), wanted)
    assert not runs
    go(kept.of_pass(1))  # another thing is differentiated
    assert sum(runs) == N
    assert not any(tmp_path.iterdir())


def test_batches_beyond_the_bound_are_run_again(go, keeper, runs):
    wanted, kept = go(), keeper()
    go(kept.of_pass(0))
    batches = list(map(len, wanted[0]))
    bounded = keeper(kept._end - 1)  # one number too few for the last batch
    go(bounded.of_pass(0))
    del runs[:]
    assert_same(go(bounded.of_pass(0)), wanted)
    assert runs == batches[-1:]


@pytest.mark.parametrize("n_writes", [0, 5])
def test_a_full_disk_keeps_less(go, keeper, runs, monkeypatch, n_writes):
    wanted, write, left = go(), os.pwrite, [n_writes]

    def until_full(*arguments):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", until_full)
    kept = keeper()
    for _ in range(2):
        del runs[:]
        assert_same(go(kept.of_pass(0)), wanted)
        assert sum(runs) == N


def test_a_batch_that_lacked_memory_leaves_nothing(go, keeper, runs):
    kept = keeper()
    wanted = go(kept.of_pass(0), fails_at=3)
    again = keeper()
    go(again.of_pass(0), fails_at=3)
    assert again._end == kept._end == sum(place.n_bytes for place in places_of(kept))
    for batch, layers in wanted[0].items():
        shown = {}
        kept.of_pass(0)(batch, partial(pytest.fail, "it was kept"), shown.__setitem__)
        for name, both in layers.items():
            assert torch.equal(shown[name].inputs, both[0][0])
            assert torch.equal(shown[name].deltas, both[1][0])


def places_of(kept: KeptFactors) -> set:
    return {place for _, layers in kept._batches.values() for _, *both in layers for place in both}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_views_come_back_as_they_were(keeper, dtype):
    base = torch.arange(240.0).reshape(4, 6, 10).to(dtype)
    views = {
        "first positions": base[:, :1],
        "columns": base[:, :, 3:7],
        "turned": base.transpose(1, 2),
        "repeated": base[:1].expand(4, -1, -1),
        "whole": base,
    }
    kept, found = keeper(), {}
    ends = np.zeros((4, 2)), np.zeros((4, 2))

    def run(on_layer):
        for name, view in views.items():
            on_layer(name, LayerFactors(base, view))
        return ends

    record = kept.of_pass(0)
    record([0, 1], run, lambda *_: None)
    assert record([0, 1], partial(pytest.fail, "it was kept"), found.__setitem__) is ends
    for name, view in views.items():
        assert torch.equal(found[name].inputs, base)
        assert torch.equal(found[name].deltas, view)
        assert found[name].deltas.stride() == view.stride()
        assert found[name].deltas.dtype == dtype
    # the same inputs once, repeated rows once
    assert kept._end == base.element_size() * (240 + 40 + 96 + 240 + 60 + 240)


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [2, 3])
def test_an_index_has_the_same_bytes_however_much_was_kept(tmp_path, monkeypatch, runs, n_classes):
    model = str(make_tiny_model(tmp_path / "model", n_classes=n_classes))
    rows = rows_from_texts(sentences(3 * N, seed=32), labels(3 * N, n_classes))
    contents, n_run = [], []
    for n_bytes in (0, 200_000, 1 << 30):
        monkeypatch.setattr("forebear.indexer.sketches.fitting.KeptFactors", partial(KeptFactors, n_bytes=n_bytes))
        del runs[:]
        options = BuildOptions(
            scopes=("head", "all"), sketch_dim=8, batch_tokens=50, calibration_queries=0, device="cpu"
        )
        folder = tmp_path / f"index-{n_bytes}"
        build_index(rows, folder, choose_model(None, [model], [1.0]).checkpoints, options)
        contents.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        n_run.append(sum(runs))
    assert contents[0] == contents[1] == contents[2]
    assert n_run[0] - n_run[2] == 3 * N * (n_classes - 1)  # a pass less for each direction at the logits
    assert n_run[0] > n_run[1] > n_run[2]
