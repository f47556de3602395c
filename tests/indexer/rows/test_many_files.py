"""A folder or a pattern of files, which are read as one source."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forebear.errors import DataError
from forebear.indexer.rows.opening import open_rows

N_ROWS = 12
TEXTS = [f"text {n}" for n in range(N_ROWS)]
LABELS = [n % 3 for n in range(N_ROWS)]


def write(path, start, stop, **more):
    columns = {"text": TEXTS[start:stop], "label": LABELS[start:stop], **more}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join([",".join(columns), *rows]) + "\n")


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_shards_in_natural_order_are_the_rows_of_one_file(tmp_path, ending):
    write(tmp_path / f"whole.{ending}", 0, N_ROWS)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (start, stop) in {1: (0, 5), 2: (5, 6), 10: (6, N_ROWS)}.items():
        write(folder / f"part-{number}.{ending}", start, stop)
    whole = open_rows(tmp_path / f"whole.{ending}", need_labels=True)
    for name in (folder, f"{folder}/part-*.{ending}"):
        source = open_rows(name, need_labels=True)
        assert (source.n_rows, source.sha256(), source.name) == (N_ROWS, whole.sha256(), str(name))
        for start in range(N_ROWS):
            blocks = list(source.blocks(4, start))
            assert [text for block in blocks for text in block.texts[0]] == TEXTS[start:]
            assert [label for block in blocks for label in block.labels] == LABELS[start:]
        assert source.first_row_of(2) == 2


def test_a_split_of_a_folder_is_the_files_whose_names_begin_with_it(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", 0, 4)
    write(tmp_path / "train-00001-of-00002.parquet", 4, 8)
    write(tmp_path / "test-00000-of-00001.parquet", 8, N_ROWS)
    (tmp_path / "dataset.json").write_text('{"label_names": ["a", "b", "c"]}')
    assert open_rows(f"{tmp_path}:train").n_rows == 8
    assert open_rows(f"{tmp_path}:train").label_names == ("a", "b", "c")
    assert open_rows(f"{tmp_path}/test-*").n_rows == 4
    with pytest.raises(DataError, match=r"holds files of several splits.*test, train, as in .*:test"):
        open_rows(tmp_path)
    with pytest.raises(DataError, match="no data files whose names begin with 'dev'"):
        open_rows(f"{tmp_path}:dev")


def test_shards_that_do_not_fit_are_refused_by_name(tmp_path):
    write(tmp_path / "a.parquet", 0, 4)
    write(tmp_path / "b.parquet", 4, 8, more=list("abcd"))
    with pytest.raises(DataError, match=r"b\.parquet has the columns text, label, more, .*a\.parquet has text, label"):
        open_rows(tmp_path)
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has columns of other types"):
        open_rows(tmp_path)
    (tmp_path / "b.parquet").unlink()
    write(tmp_path / "b.csv", 0, 4)
    with pytest.raises(DataError, match=r"files of several formats, a\.parquet, b\.csv"):
        open_rows(tmp_path)


def test_shards_of_unlike_label_names_are_refused(tmp_path):
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        kinds = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=kinds)
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(DataError, match="states other features"):
        open_rows(tmp_path)


def test_keys_that_some_json_shards_leave_out_are_null_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c", "label": 1, "note": "x"}\n{"text": "d"}\n')
    source = open_rows(tmp_path)
    (block,) = source.blocks()
    assert block.labels == [0, 1, 1, None]
    assert block.table.column("note").to_pylist() == [None, None, "x", None]
    with pytest.raises(DataError, match=r"gives no label in 1 of 4 rows, first in row 3"):
        open_rows(tmp_path, need_labels=True)


def test_a_pattern_without_files_and_a_folder_without_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        open_rows(f"{tmp_path}/train-*.parquet")
    (tmp_path / "inner").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no data files.*Are they in .*inner\?"):
        open_rows(tmp_path)
