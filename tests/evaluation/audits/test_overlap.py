from __future__ import annotations

import math

import numpy as np
import pytest
from places import DATA, NO_DATA

from forebear.errors import DataError, InputError, NonFiniteError
from forebear.evaluation.audits.artifacts.lexical_overlap import lexical_overlap
from forebear.evaluation.common.statistics import bootstrap_interval, mean_and_error

MNLI = DATA / "mnli10k" / "train.parquet"


def test_overlap_is_the_share_of_hypothesis_word_types_found_in_the_premise() -> None:
    premises = ["The doctor thanked the actor", "The doctor slept", "A dog ran", "one two"]
    hypotheses = ["the actor thanked THE doctor", "the the judge", "Cats sleep", "two three three four"]
    assert lexical_overlap(premises, hypotheses).tolist() == [1.0, 0.5, 0.0, 1 / 3]


def test_overlap_keeps_punctuation_attached() -> None:
    assert lexical_overlap(["He saw the actor ."], ["The actor."]).tolist() == [0.5]


@pytest.mark.parametrize("hypothesis", ["", "  \n"])
def test_overlap_of_an_empty_hypothesis_is_zero(hypothesis: str) -> None:
    assert lexical_overlap(["A premise"], [hypothesis]).tolist() == [0.0]


def test_overlap_of_no_rows_is_an_empty_vector() -> None:
    values = lexical_overlap([], [])
    assert values.shape == (0,)
    assert values.dtype == np.float64


def test_overlap_refuses_columns_of_different_length() -> None:
    with pytest.raises(DataError, match="2 premises but 1 hypotheses"):
        lexical_overlap(["a", "b"], ["a"])


def test_overlap_refuses_a_missing_text_and_names_the_row() -> None:
    with pytest.raises(DataError, match=r"row 1 .* NoneType"):
        lexical_overlap(["a", "b"], ["a", None])  # type: ignore[list-item]


@pytest.mark.skipif(not MNLI.exists(), reason=NO_DATA)
def test_mean_overlap_of_the_papers_mnli_rows_is_the_published_one() -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(MNLI, columns=["premise", "hypothesis"]).to_pydict()
    mean, error = mean_and_error(lexical_overlap(rows["premise"], rows["hypothesis"]))
    assert mean == pytest.approx(0.404, abs=0.0006)
    assert error is not None and 0.001 < error < 0.005


def test_standard_error_is_the_sample_deviation_over_root_n() -> None:
    mean, error = mean_and_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    deviation = math.sqrt(sum((v - 7 / 3) ** 2 for v in (1, 2, 4)) / 2)
    assert error == pytest.approx(deviation / math.sqrt(3))


def test_one_value_has_no_standard_error_and_an_interval_without_width() -> None:
    assert mean_and_error([0.3]) == (0.3, None)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)


def test_equal_values_have_no_spread() -> None:
    assert mean_and_error([0.1] * 7) == (0.1, 0.0)
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)


def test_interval_is_that_of_means_resampled_one_by_one() -> None:
    """The same digits with every scipy: a seed stands for the same resamples."""
    values = np.random.default_rng(5).normal(2.0, 1.0, size=60)
    interval = bootstrap_interval(values, seed=3)
    assert interval == bootstrap_interval(values, seed=3)
    assert interval != bootstrap_interval(values, seed=4)
    rng = np.random.default_rng(3)
    means = [values[rng.integers(0, 60, size=60)].mean() for _ in range(2000)]
    assert interval == tuple(np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2]))


def test_interval_widens_with_the_level() -> None:
    values = np.arange(20.0)
    low, high = bootstrap_interval(values, level=0.5)
    wide_low, wide_high = bootstrap_interval(values, level=0.99)
    assert wide_low < low < 9.5 < high < wide_high


def test_interval_of_two_values_is_finite() -> None:
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0])
def test_values_of_a_wrong_shape_are_refused(values: object) -> None:
    with pytest.raises(InputError, match="at least one number"):
        mean_and_error(values)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one number"):
        bootstrap_interval(values)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_never_passes_quietly(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="value 1 is"):
        mean_and_error([0.5, bad])
    with pytest.raises(NonFiniteError, match="value 1 is"):
        bootstrap_interval([0.5, bad])


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 95}, {"n_resamples": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        bootstrap_interval([0.0, 1.0], **options)
