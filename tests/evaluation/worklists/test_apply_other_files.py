"""Work lists applied beside other files: what is never overwritten, and which rows are whose."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forebear import BuildOptions, InputError, build_index, choose_model, open_rows, worklists
from forebear.errors import MismatchError, StorageError
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.evaluation.worklists.listing import list_rows
from forebear.indexer.building.build import append_rows

TRAIN = "text,label\na,bad\nb,good\nc,bad\n"
REMOVE, APART = (Item(row=0, texts={"text": "a"}, decision=decision) for decision in ("remove", "quarantine"))


def listed(*items: Item) -> WorkList:
    return WorkList(items)


@pytest.mark.parametrize("name", ["g.quarantine.csv", "g.csv"])
def test_the_training_file_is_never_overwritten(name, tmp_path):
    train = tmp_path / name
    train.write_text(TRAIN)
    with pytest.raises(InputError, match="is the training file itself"):
        worklists.apply(listed(APART), train, tmp_path / "g.csv", force=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, TRAIN)]


def test_the_work_list_is_never_overwritten(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN)
    for name, out in (("worklist.csv", "worklist.csv"), ("a.log.jsonl", "a.csv"), ("b.quarantine.csv", "b.csv")):
        worklists.write(listed(APART), tmp_path / name)
        before = (tmp_path / name).read_bytes()
        for todo in {tmp_path / name, tmp_path if name == "worklist.csv" else tmp_path / name}:
            with pytest.raises(InputError, match="is the work list itself"):
                worklists.apply(todo, tmp_path / "train.csv", tmp_path / out, force=True)
        assert (tmp_path / name).read_bytes() == before


def test_files_of_an_earlier_run_are_replaced_and_those_of_other_versions_stay(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN)
    first = worklists.apply(listed(APART), tmp_path / "train.csv", tmp_path / "t.v1.csv")
    second = worklists.apply(listed(APART), tmp_path / "train.csv", tmp_path / "t.v2.csv")
    assert not set(first.files) & set(second.files)
    worklists.apply(listed(REMOVE), tmp_path / "train.csv", tmp_path / "t.v1.csv", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t.v1.csv", "t.v1.log.jsonl", "t.v2.csv", "t.v2.log.jsonl", "t.v2.quarantine.csv", "train.csv",
    ]  # fmt: skip


def test_without_a_log_there_is_no_new_file(tmp_path):
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "b.log.jsonl").mkdir()
    with pytest.raises(StorageError):
        worklists.apply(listed(APART), tmp_path / "train.csv", tmp_path / "b.csv", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.log.jsonl", "train.csv"]


def test_parquet_holds_the_label_that_was_asked_for_or_is_not_written(tmp_path):
    for kind, suggested, fits in (
        (pa.int64(), "3.5", False), (pa.int64(), "4", True), (pa.float32(), "3.3", True), (pa.int8(), "300", False),
    ):  # fmt: skip
        pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([1, 2], kind)}), tmp_path / "a.parquet")
        source = open_rows(tmp_path / "a.parquet", need_labels=True, problem_type="regression")
        item = Item(row=0, texts={"text": "a"}, decision="relabel", suggested=suggested)
        if fits:
            worklists.apply(listed(item), source, tmp_path / "b.parquet", force=True)
            found = pq.read_table(tmp_path / "b.parquet").column("label").to_pylist()
            assert found == pytest.approx([float(suggested), 2])
        else:
            with pytest.raises(InputError, match="column label of the file holds int"):
                worklists.apply(listed(item), source, tmp_path / "c.parquet")
    assert not list(tmp_path.glob("c.*"))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.csv").write_text(TRAIN)
    one, other = (str(tmp_path / name / "t.csv") for name in ("a", "b"))
    items = (
        Item(row=0, source=one, source_row=0, decision="remove"),
        Item(row=4, source=other, source_row=1, decision="remove"),
    )
    applied = worklists.apply(listed(*items), other, tmp_path / "new.csv")
    assert ([change.file_row for change in applied.changes], applied.n_elsewhere) == ([1], 1)
    with pytest.raises(MismatchError, match="may be each of these"):
        worklists.apply(listed(*items), tmp_path / "elsewhere" / "t.csv", tmp_path / "c.csv")
    same = (items[0], Item(row=4, source=one, source_row=0, decision="remove"))
    with pytest.raises(InputError, match=r"rows 0 and 4 of the list are both row 0"):
        worklists.apply(listed(*same), one, tmp_path / "c.csv")
    unplaced = Item(row=5, source=other, decision="remove")  # rows were left out of the index, which has no texts
    with pytest.raises(InputError, match="row 5 has neither texts nor a source_row"):
        worklists.apply(listed(items[0], unplaced), other, tmp_path / "c.csv")


def test_a_source_row_is_a_number_of_the_file_also_where_rows_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,bad\nb,-\nc,good\nd,bad\n")
    item = Item(row=7, texts={"text": "d"}, source_row=3, decision="remove")
    worklists.apply(listed(item), tmp_path / "a.csv", tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "text,label\na,bad\nb,-\nc,good\n"
    with pytest.raises(MismatchError, match=r"row 1 \(from 0\) of .* has no label"):
        worklists.apply(listed(replace(item, source_row=1)), tmp_path / "a.csv", tmp_path / "c.csv")


def test_rows_of_a_second_file_of_which_some_were_left_out_are_found_by_their_texts(tmp_path, tiny_model):
    """The index numbers rows on behind the first file, and does not say which rows of a file it left out."""
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("text,label\nthe film,LABEL_0\nbad,-\na story,LABEL_1\n")
    second.write_text("text,label\ngood,LABEL_0\nthe plot,-\na story,LABEL_1\nbad,LABEL_0\na story,LABEL_1\n")
    sources = [open_rows(file, need_labels=True, unlabelled="drop-marked") for file in (first, second)]
    build_index(sources[0], tmp_path / "i", choose_model(None, [tiny_model()]).checkpoints, BuildOptions())
    index = append_rows(tmp_path / "i", sources[1])
    made = [replace(item, decision="remove") for item in list_rows(index, [1, 3, 4, 5], ["?"] * 4)]
    assert [(item.source, item.source_row) for item in made] == [(str(first), None)] + [(str(second), None)] * 3
    todo, last = WorkList(tuple(made[:3])), made[3]
    for items in (todo.items, todo.items[1:]):  # also where no row of the list tells that there is a first file
        applied = worklists.apply(listed(*items), second, tmp_path / "new.csv", force=True)
        assert [(change.item.row, change.file_row, change.line) for change in applied.changes] == [(3, 2, 4), (4, 3, 5)]
        assert (tmp_path / "new.csv").read_text() == "text,label\ngood,LABEL_0\nthe plot,-\na story,LABEL_1\n"
    worklists.apply(todo, first, tmp_path / "new.csv", force=True)
    assert (tmp_path / "new.csv").read_text() == "text,label\nthe film,LABEL_0\nbad,-\n"
    with pytest.raises(MismatchError, match=r"row 5 .* in several rows of .*b\.csv.* Fill in that column"):
        worklists.apply(listed(todo.items[0], last), second, tmp_path / "c.csv")
    with pytest.raises(MismatchError, match=r"has 'good' in row 0"):  # both texts are there, not one after the other
        moved = (replace(todo.items[1], row=0), replace(todo.items[2], row=3))
        worklists.apply(listed(*moved), second, tmp_path / "c.csv")


@pytest.mark.parametrize("with_digest", [False, True])
def test_text_columns_may_be_moved_in_the_list(with_digest, tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\na,x,no\nb,y,yes\n")
    texts = {"hypothesis": "x", "premise": "a"}
    digest = text_digest(["a", "x"]) if with_digest else None
    item = Item(row=0, texts=texts, given="no", decision="remove", digest=digest)
    worklists.apply(listed(item), tmp_path / "a.csv", tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "premise,hypothesis,label\nb,y,yes\n"


def test_numbers_may_have_commas_before_their_decimals(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1.5\nb,2\n")
    source = open_rows(tmp_path / "a.csv", need_labels=True, problem_type="regression")
    item = Item(row=0, texts={"text": "a"}, given="1,5", suggested="3,25", decision="relabel")
    applied = worklists.apply(listed(item), source, tmp_path / "b.csv")
    assert [(change.before, change.after) for change in applied.changes] == [("1.5", "3.25")]
    with pytest.raises(MismatchError, match=r"has the label 1\.5"):
        worklists.apply(listed(replace(item, given="1,6")), source, tmp_path / "c.csv")


def test_rows_of_several_label_columns_can_be_removed(tmp_path):
    (tmp_path / "a.csv").write_text("text,x,y\na,1,0\nb,0,1\n")
    source = open_rows(tmp_path / "a.csv", need_labels=True, label_column="x,y")
    worklists.apply(listed(REMOVE), source, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "text,x,y\nb,0,1\n"


def test_accepting_all_takes_no_row_without_a_probability(tmp_path):
    (tmp_path / "a.csv").write_text(TRAIN)
    items = [
        Item(row=row, texts={"text": "abc"[row]}, suggested="good", probability=p) for row, p in ((0, None), (2, 0))
    ]
    applied = worklists.apply(listed(*items), tmp_path / "a.csv", tmp_path / "b.csv", accept=0)
    assert [json.loads(line)["row"] for line in applied.files[-1].read_text().splitlines()] == [2]
