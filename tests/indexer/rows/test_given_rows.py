"""Rows as callers of Python have them: the same rows, labels and digests as from a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from tiny import labels, sentences

from forebear import DataError, Index, Retriever, audits, open_rows
from forebear.indexer.rows.opening import rows_given

TEXTS, LABELS = sentences(24), labels(24)
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
FORMS = {
    "dicts": ROWS,
    "pandas": pd.DataFrame(ROWS),
    "arrow": pa.Table.from_pylist(ROWS),
    "datasets": datasets.Dataset.from_list(ROWS),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_memory_are_those_of_a_file(form: str, file: Path) -> None:
    found, truth = open_rows(FORMS[form], need_labels=True), open_rows(file, need_labels=True)
    assert found.sha256() == truth.sha256()
    assert (found.n_rows, found.text_columns, found.label_column) == (24, ("text",), "label")


def test_every_form_builds_and_asks_the_same(tiny_model: Any, file: Path, tmp_path: Path) -> None:
    by_file = Index.build(tiny_model(), file, tmp_path / "file", warn=lambda _line: None)
    by_dicts = Index.build(tiny_model(), ROWS, tmp_path / "dicts", warn=lambda _line: None)
    assert by_dicts.manifest.segments[0].rows_sha256 == by_file.manifest.segments[0].rows_sha256
    retriever = Retriever(by_dicts)
    truth = Retriever(by_file).retrieve(open_rows(file), top=2, target="gold").to_pylist()
    for rows in (*FORMS.values(), file, str(file)):
        assert retriever.retrieve(rows, top=2, target="gold").to_pylist() == truth
    table = retriever.retrieve(TEXTS[:2], top=2).to_pylist()
    assert {line["query_label"] for line in table} == {None}
    found = audits.errors(retriever, FORMS["datasets"])
    assert found.result is not None


def test_dicts_that_are_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="is not a dict of columns"):
        open_rows([ROWS[0], "a text"])
    with pytest.raises(DataError, match="is not a dict of columns"):
        open_rows([{1: "a text"}])
    with pytest.raises(DataError, match="need labels"):
        rows_given(TEXTS, need_labels=True)
    assert open_rows([{"text": "a"}, {"text": "b", "label": "x"}], unlabelled="keep").n_rows == 2
