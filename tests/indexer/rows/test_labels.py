"""Claims about mapping a source's labels onto a model's classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from places import DATA, NO_DATA

from forebear.errors import DataError
from forebear.indexer.rows.labels import classes_for, collapse_to_binary_nli, label_map
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.rows.row_source import RowSource

MNLI = ("entailment", "neutral", "contradiction")
HANS = ("entailment", "non-entailment")
GENERIC = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture(scope="module")
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(NO_DATA)
    return DATA


def rows(labels: Sequence[Any], names: Sequence[str] | None = None) -> RowSource:
    return rows_from_texts(["x"] * len(labels), labels, label_names=names)


def mapped(source: RowSource, model_names: Sequence[str], mode: str | None = None) -> list[int]:
    mapping = label_map(source, model_names, mode)
    return [i for block in source.blocks(2) for i in mapping(block.labels or [], block.start).tolist()]


def refusal(source: RowSource, model_names: Sequence[str], mode: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        label_map(source, model_names, mode)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_integers_are_mapped_by_their_names_not_their_order() -> None:
    source = rows([0, 1, 2], MNLI)
    assert mapped(source, ("contradiction", "entailment", "neutral")) == [1, 2, 0]
    assert label_map(source, MNLI).warning is None
    assert label_map(source, MNLI)([2, 0]).dtype == "int64"
    assert label_map(source, MNLI)([]).shape == (0,)


def test_names_match_whatever_their_case_hyphens_and_spaces() -> None:
    model = ("Very Negative", "not_so-bad", "Sci/Tech")
    assert mapped(rows(["very_negative", "NOT SO BAD", "sci/tech"]), model) == [0, 1, 2]
    assert mapped(rows(["not_entailment", "Entailment", "non entailment"]), HANS) == [1, 0, 1]


def test_names_that_do_not_occur_need_no_class() -> None:
    assert mapped(rows([0, 1], ("negative", "positive", "mixed")), ("positive", "negative")) == [1, 0]


def test_an_unknown_label_is_refused_by_row_at_once_and_when_mapped() -> None:
    source = rows(["good", "bad", "ugly", "bad"])
    message = refusal(source, ("bad", "good"))
    assert "row 2 " in message
    assert "1 of 4 rows" in message
    assert "'ugly'" in message
    assert "bad, good" in message
    mapping = label_map(rows(["good", "bad"]), ("bad", "good"))
    with pytest.raises(DataError, match=r"row 101 \(from 0\) has the label 'ugly'"):
        mapping(["good", "ugly"], start=100)


def test_names_with_nothing_in_common_list_both_and_the_option() -> None:
    for source in (rows([0, 1], ("negative", "positive")), rows(["negative", "positive"])):
        message = refusal(source, ("spam", "ham"))
        assert "negative, positive" in message
        assert "spam, ham" in message
        assert "label_names=" in message


def test_generic_models_take_integers_as_their_own_ids_with_a_warning() -> None:
    for source, shown in ((rows([2, 0]), GENERIC), (rows([2, 0], MNLI), MNLI)):
        assert mapped(source, GENERIC) == [2, 0]
        as_listed = ", ".join(f"{class_id} = {name}" for class_id, name in enumerate(shown))
        assert str(label_map(source, GENERIC).warning).endswith(f"taken as its ids: {as_listed}")
    assert "row 1 " in refusal(rows([2, 3]), GENERIC)


def test_generic_models_take_names_by_the_order_given() -> None:
    source = rows(["good", "bad"], ("bad", "good"))
    assert mapped(source, GENERIC[:2]) == [1, 0]
    assert "bad, good" in str(label_map(source, GENERIC[:2]).warning)
    assert "it knows bad, good. " in refusal(rows(["good", "ugly"], ("bad", "good")), GENERIC[:2])
    assert "label_names=" in refusal(rows(["good", "bad"]), GENERIC)
    assert mapped(rows(["LABEL_1", "label 0"]), GENERIC) == [1, 0]
    assert label_map(rows(["LABEL_1"]), GENERIC).warning is None


def test_numbers_without_names_are_the_models_ids_with_a_warning() -> None:
    source = rows([1, 0])
    assert mapped(source, ("negative", "positive")) == [1, 0]
    warning = str(label_map(source, ("negative", "positive")).warning)
    assert "1 = positive" in warning
    assert "label_names=" in warning
    message = refusal(rows([0, 1, 3]), ("negative", "positive"))
    assert "row 2 " in message
    assert "label 3" in message


def test_numbers_are_names_to_a_model_whose_names_are_numbers() -> None:
    assert mapped(rows([1, 3]), ("1", "2", "3")) == [0, 2]
    assert label_map(rows([1, 3]), ("1", "2", "3")).warning is None
    assert "row 1 " in refusal(rows([1, 0]), ("1", "2", "3"))


def test_binary_nli_lets_the_labels_of_mnli_and_hans_meet() -> None:
    assert mapped(rows([0, 1, 2], MNLI), HANS, "binary-nli") == [0, 1, 1]
    assert mapped(rows([0, 1], HANS), HANS, "binary-nli") == [0, 1]
    assert mapped(rows(["contradiction", "not_entailment", "Entailment"]), HANS[::-1], "binary-nli") == [0, 0, 1]


def test_binary_nli_is_refused_for_other_models_and_labels() -> None:
    assert "entailment, neutral, contradiction" in refusal(rows([0, 1], HANS), MNLI, "binary-nli")
    assert "LABEL_0" in refusal(rows([0, 1], HANS), GENERIC[:2], "binary-nli")
    assert "label_names=" in refusal(rows(["good", "bad"]), HANS, "binary-nli")
    assert "row 2 " in refusal(rows([0, 1, 2]), HANS, "binary-nli")
    for call in (lambda: label_map(rows(["a"]), ["a"], "binary"), lambda: classes_for(["a"], "binary")):
        with pytest.raises(DataError, match="expected binary-nli"):
            call()


def test_hans_against_a_three_label_model_says_what_to_do() -> None:
    for source in (rows([0, 1], HANS), rows([1, 1], HANS), rows(["entailment", "non-entailment"])):
        message = refusal(source, MNLI)
        assert "audit_hans()" in message
        assert 'label_mode="binary-nli"' in message


def test_mnli_against_a_two_label_model_says_what_to_do() -> None:
    assert 'label_mode="binary-nli"' in refusal(rows([0, 1, 2], MNLI), HANS)


def test_rows_marked_minus_one_are_refused_when_met(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,-1\nc,1\n")
    source = open_rows(tmp_path / "a.csv", label_names=["no", "yes"])
    mapping = label_map(source, ["yes", "no"])
    assert mapping([0, 1]).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"row 1 .*no label"):
        mapped(source, ["yes", "no"])


def test_sources_without_labels_and_models_with_twin_names_are_refused() -> None:
    assert "label_column=" in refusal(rows_from_texts(["x"]), MNLI)
    assert "repeat" in refusal(rows([0]), ("a b", "A_B"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (rows([1, 0], ("no", "yes")), ("no", "yes")),
        (rows([1, 1], ("no", "yes", "maybe")), ("no", "yes", "maybe")),
        (rows(["yes", "no", "yes"]), ("no", "yes")),
        (rows([0, 1, 0]), ("0", "1")),
        (rows([3, 0]), ("0", "1", "2", "3")),
        (rows([2, 1, 5]), ("1", "2", "3", "4", "5")),
        (rows([1, -1]), ("-1", "1")),
        (rows([10**12, 0]), ("0", "1000000000000")),
    ],
)
def test_a_new_model_gets_the_sources_classes(source: RowSource, expected: tuple[str, ...]) -> None:
    assert classes_for(source) == expected
    ids = mapped(source, expected)  # and the source maps onto the model that it named
    assert all(0 <= class_id < len(expected) for class_id in ids)


def test_negative_numbers_map_back_to_the_classes_they_named() -> None:
    assert mapped(rows([1, -1, 1]), classes_for(rows([1, -1]))) == [1, 0, 1]


def test_a_new_binary_nli_model_gets_two_classes() -> None:
    for source in (rows([0, 1, 2], MNLI), rows([0, 1], HANS), rows(["neutral", "entailment"]), MNLI):
        assert classes_for(source, "binary-nli") == HANS
    for source in (rows([0, 1, 2]), rows(["good", "bad"]), ("a", "b")):
        with pytest.raises(DataError, match="binary-nli"):
            classes_for(source, "binary-nli")
    with pytest.raises(DataError, match="label_column="):
        classes_for(rows_from_texts(["x"]))
    with pytest.raises(DataError, match="spell each one way"):
        classes_for(rows(["yes", "Yes"]))
    assert classes_for(["b", "a"]) == ("b", "a")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("contradiction", "Entailment", "NEUTRAL"), [1, 0, 1]),
        (("not_entailment", "entailment"), [1, 0]),
        (("entailment", "contradiction"), [0, 1]),
        (("entailment",), None),
        (("neutral", "contradiction"), None),
        (("negative", "positive"), None),
        (("entailment", "neutral", "other"), None),
        (GENERIC, None),
        ((), None),
    ],
)
def test_nli_names_collapse_and_others_do_not(names: tuple[str, ...], expected: list[int] | None) -> None:
    merged = collapse_to_binary_nli(names)
    assert (merged if merged is None else merged.tolist()) == expected


def test_real_mnli_and_hans_meet_in_binary_nli(real_data: Path) -> None:
    mnli = open_rows(real_data / "mnli10k" / "train.parquet", need_labels=True)
    hans = open_rows(real_data / "hans" / "test.parquet", need_labels=True)
    names = classes_for(mnli, "binary-nli")
    assert sum(mapped(mnli, names, "binary-nli")) == 3422 + 3293
    assert sum(mapped(hans, names, "binary-nli")) == 15_000
    by_name = open_rows(real_data / "hans" / "test.parquet", label_column="gold_label")
    assert mapped(by_name, names, "binary-nli") == mapped(hans, names, "binary-nli")
    assert "audit_hans()" in refusal(hans, classes_for(mnli))
