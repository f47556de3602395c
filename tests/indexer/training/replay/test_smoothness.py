"""Metasmoothness: its formula on known ways, and of a run whose weights move smoothly or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import labels, sentences

from forebear import evaluations
from forebear.cli.main import run as forebear
from forebear.errors import InputError
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.replay.smoothness import straightness

N = 24


def test_straightness_is_1_on_a_line_and_counts_each_weight_by_how_far_it_moves():
    begin, step = [torch.zeros(4), torch.zeros(1)], [torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([4.0])]
    middle = [b + s for b, s in zip(begin, step, strict=True)]
    on = [m + 5 * s for m, s in zip(middle, step, strict=True)]
    assert straightness(begin, middle, on) == 1.0
    back = [m - 3 * s for m, s in zip(middle, step, strict=True)]
    assert straightness(begin, middle, back) == -1.0
    # The first tensor goes on, 6 |step| in all; the second goes back, to 2 |step| on the other side.
    assert straightness(begin, middle, [on[0], back[1]]) == pytest.approx((6 * 6 - 2 * 4) / (6 * 6 + 2 * 4))
    assert straightness(begin, middle, [on[0], begin[1]]) == 1.0  # what ends where it began counts for nothing
    assert straightness(begin, begin, begin) == 1.0


@pytest.mark.slow
def test_a_run_of_small_steps_is_smoother_than_one_of_large_steps(tiny_model, tmp_path, capsys):
    source = rows_from_texts(sentences(N, seed=4), labels(N, 2), label_names=("down", "up"))
    found = {}
    for rate in (1e-4, 0.5):
        folder = tmp_path / str(rate)
        options = TrainOptions(epochs=2, batch_size=12, learning_rate=rate, seed=3, precision="fp32", device="cpu")
        train(source, tiny_model("bert", 2, 5, 2.0), folder, options)
        build_index(source, folder / "index", choose_model(str(folder)).checkpoints, BuildOptions())
        found[rate] = evaluations.metasmoothness(str(folder / "index"), share=0.1, n_directions=2).numbers.values
    assert found[1e-4].mean() > 0.8 > found[0.5].mean()
    assert forebear(["evaluate", "metasmoothness", "--index", str(tmp_path / "0.5" / "index"), "--share", "2"]) == 2
    assert "--share 2: expected a share above 0, below 1." in capsys.readouterr().err
    with pytest.raises(InputError, match="n_directions=0: expected at least 1"):
        evaluations.metasmoothness(str(tmp_path / "0.5" / "index"), n_directions=0)
    again = evaluations.metasmoothness(str(tmp_path / "0.5" / "index"), share=0.1, n_directions=2).numbers.values
    np.testing.assert_array_equal(again, found[0.5])
