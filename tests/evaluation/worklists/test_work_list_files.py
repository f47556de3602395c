"""Work lists survive their files, and what spreadsheets do to them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import labels

from forebear import audits
from forebear.errors import DataError, InputError
from forebear.evaluation.worklists.files import as_bytes, read_work_list, rendered, write_work_list
from forebear.evaluation.worklists.items import DECISIONS, Item, WorkList, item_of, text_digest
from forebear.evaluation.worklists.listing import list_rows

HOSTILE = (
    "", " ", "plain", "=1+1", "- a stunning film", "+1", "@home", "'=quoted", "''-twice", "'tis plain", "\ttab", "\rcr",
    'a "quoted", text; with | all\tof them', "line\nbreak", "windows\r\nbreak", "\u2028 \x85 \x0b", "naïve 🎬 ＝",
    "null", "NA", "1e5", "[1, 2]", "007", "\ufeffmark", "a\x00b",
)  # fmt: skip


def item(row: int, text: str, **more) -> Item:
    return Item(row=row, texts={"premise": text, "hypothesis": text[::-1]}, **more)


ITEMS = [item(i, text, given=text or None, reason=text, note=text) for i, text in enumerate(HOSTILE)]
FULL = WorkList((
    *ITEMS,
    item(
        7, "a", given="comedy; not drama", suggested="comedy; drama 0.5", decision="relabel", probability=0.1 + 0.2,
        evidence={"mean rank": 1 / 3, "-if": -1e-300}, contradicting=(5, 12, 2**40), source="train.csv", source_row=3,
        line=12, digest=text_digest(["a", "a"]),
    ),
    item(8, "b", given="3.5", evidence={"loss": 2.0}, decision="remove", contradicting=(1,)),
))  # fmt: skip


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_what_is_written_is_read_without_loss(ending, tmp_path):
    write_work_list(FULL, tmp_path / f"list{ending}")
    found = read_work_list(tmp_path / f"list{ending}")
    assert len(found) == len(FULL)
    for one, other in zip(found, FULL, strict=True):
        assert one == other
    assert found.columns == FULL.columns
    assert as_bytes(found, ending) == as_bytes(FULL, ending)
    write_work_list(WorkList(()), tmp_path / f"none{ending}")
    assert read_work_list(tmp_path / f"none{ending}") == WorkList(())


def test_other_libraries_read_the_same_from_all_three_files():
    files = rendered(FULL)
    of_parquet = pq.read_table(io.BytesIO(files["worklist.parquet"])).to_pylist()
    of_json = [json.loads(line) for line in files["worklist.jsonl"].decode().split("\n")[:-1]]
    assert of_parquet == of_json
    of_csv = list(csv.DictReader(io.StringIO(files["worklist.csv"].decode(), newline="")))
    assert list(of_csv[0]) == list(of_json[0])
    for cells, values in zip(of_csv, of_json, strict=True):
        for name, value in values.items():
            if isinstance(value, str):
                assert cells[name].lstrip("'") == value.lstrip("'")
                assert cells[name][:1] not in ("=", "+", "-", "@", "\t", "\r") or not cells[name]
            elif isinstance(value, list):
                assert cells[name] == "; ".join(map(str, value))
            else:
                assert (float(cells[name]) if cells[name] else None) == value


@pytest.mark.parametrize(("sign", "decimal"), [(";", ","), ("\t", ","), (",", ".")])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_spreadsheets_file_is_read(sign, decimal, encoding, tmp_path):
    """Other separators, a mark, CRLF, columns in another order and new ones, two of them without a name."""
    rows = list(csv.DictReader(io.StringIO(as_bytes(FULL, ".csv").decode(), newline="")))
    columns = sorted(rows[0], key=lambda name: hashlib.sha256(name.encode()).digest())
    with (tmp_path / "list.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=sign, lineterminator="\r\n")
        writer.writerow(["checked by", *columns, "", ""])
        for cells in rows:
            for name in ("evidence: mean rank", "evidence: -if", "evidence: loss", "probability"):
                cells[name] = cells[name].replace(".", decimal)
            writer.writerow(["Ann", *(cells[name] for name in columns), "", ""])
    found = read_work_list(tmp_path / "list.csv")
    assert [dict(vars(one), texts=dict(one.texts)) for one in found] == [vars(one) for one in FULL]


def test_cells_that_people_fill_in_are_taken_as_they_are_meant(tmp_path):
    (tmp_path / "list.csv").write_text(
        'decision,row,suggested,contradicting,text: s\n Relabel ,3.0,-1,12,=not guarded\nKEEP,4,,"1,2",\'-guarded\n'
    )
    first, second = read_work_list(tmp_path / "list.csv")
    assert (first.decision, first.row, first.suggested, first.contradicting) == ("relabel", 3, "-1", (12,))
    assert (first.texts, second.texts) == ({"s": "=not guarded"}, {"s": "-guarded"})
    assert (second.decision, second.suggested, second.contradicting) == ("keep", None, (1, 2))


def test_what_the_explorer_kept_before_is_read():
    old = {
        "row": 7, "source": "a.csv", "source_row": 7, "text": "fine", "label": "bad", "suggested": "good",
        "evidence": "loss 3", "probability": 0.25, "reason": "proponent 1", "decision": "wrong label", "note": "sure",
    }  # fmt: skip
    found = item_of(old)
    assert (found.given, found.texts, found.decision) == ("bad", {"text": "fine"}, "relabel")
    assert found.reason == "loss 3; proponent 1"
    assert (found.probability, found.evidence) == (None, {"probability of the label": 0.25})
    assert item_of({**old, "decision": "note"}).decision == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "line,text\n1,a\n", "a work list has a column row"),
        ("a.csv", "row,decision\n1,relable\n", r"a.csv, item 1: row 1: decision 'relable': expected relabel, remove"),
        ("a.csv", "row,decision\nx,keep\n", r"row 'x': expected the number"),
        ("a.csv", "row,decision\n1,\n,keep\n", r"item 2: an item without a row number"),
        ("a.csv", "row,evidence: loss\n1,high\n", r"row 1: 'high': expected a number"),
        ("a.csv", "row,evidence: loss\n1,inf\n", r"row 1: evidence 'loss' is inf"),
        ("a.csv", "row,probability\n1,1.5\n", r"row 1: probability 1.5: expected 0 to 1"),
        ("a.csv", "row,line\n1,1.5\n", r"row 1: '1.5': expected a whole number"),
        ("a.csv", "row,row\n1,1\n", "more than one column 'row'"),
        ("a.csv", "row\n-1\n", "row -1: expected a number from 0"),
        ("a.jsonl", '{"row": 1, "note": 3}\n', "row 1: note 3: expected text"),
        ("a.txt", "row\n1\n", "expected one that ends in .parquet"),
    ],
)
def test_what_is_no_work_list_is_refused_in_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said) as raised:
        read_work_list(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_other_encodings_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("row,note\n1,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="Save it from the spreadsheet as CSV UTF-8"):
        read_work_list(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no such file"):
        read_work_list(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"holds no worklist\.parquet"):
        read_work_list(tmp_path)
    with pytest.raises(InputError, match=r"is written as \.parquet, \.csv, \.jsonl"):
        write_work_list(FULL, tmp_path / "a.xlsx")


def test_items_know_their_row_as_the_index_has_it(bert_world):
    index = bert_world.index
    listed = list_rows(index, [5, 2], ["a", "b"], evidence={"loss": [1.0, np.nan]}, contradicting=[[1], []])
    names, gold = index.manifest.spec.label_names, labels(60, 2)
    assert [found.row for found in listed] == [5, 2]
    assert [found.texts for found in listed] == [{"text": bert_world.texts[5]}, {"text": bert_world.texts[2]}]
    assert [found.given for found in listed] == [names[gold[5]], names[gold[2]]]
    assert [found.evidence for found in listed] == [{"loss": 1.0}, {}]
    assert [(found.source, found.source_row) for found in listed] == [("the rows given", 5), ("the rows given", 2)]
    content = json.dumps([bert_world.texts[5]], ensure_ascii=False).encode()
    assert listed.items[0].digest == "sha256:" + hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.slow
def test_audit_mislabelled_writes_its_list_beside_the_page(bert_world, tmp_path):
    found = audits.suspects(bert_world.retriever, n_listed=7)
    found.write(tmp_path / "report")
    lists = [read_work_list(tmp_path / "report" / name) for name in rendered(found.work_list)]
    assert lists == [found.work_list] * 3
    assert [one.row for one in found.work_list] == found.result["listed"].tolist()
    assert {one.decision for one in found.work_list} == {""}
    for one in found.work_list:
        place = found.result["rows"].tolist().index(one.row)
        assert one.suggested == found.result["suggested"][place]
        assert one.evidence["mean rank"] == found.result["mean_rank"][place]
        assert one.evidence["estimated probability"] == found.result["estimated_probability"][place]
        assert one.probability is None
    with pytest.raises(InputError, match="already holds"):
        found.write(tmp_path / "report")
    assert read_work_list(tmp_path / "report") == found.work_list
    assert set(DECISIONS) == {"relabel", "remove", "quarantine", "keep"}


def test_one_contradicting_row_may_stand_as_a_number():
    assert item_of({"row": 1, "contradicting": 12.0}).contradicting == (12,)
    with pytest.raises(InputError, match=r"row 1: contradicting .*: expected numbers of rows"):
        item_of({"row": 1, "contradicting": {"a": 1}})


def test_of_a_folder_the_file_with_decisions_counts_whatever_was_changed_last(tmp_path):
    """A copy gives files other times, in any order."""
    decided = WorkList((Item(row=1, decision="remove"), Item(row=2)))
    for name, content in rendered(WorkList((Item(row=1), Item(row=2)))).items():
        (tmp_path / name).write_bytes(content)
    write_work_list(decided, tmp_path / "worklist.csv")
    os.utime(tmp_path / "worklist.csv", (0, 0))
    assert read_work_list(tmp_path) == decided
    write_work_list(WorkList((Item(row=1, decision="keep"), Item(row=2))), tmp_path / "worklist.jsonl")
    with pytest.raises(InputError, match=r"worklist\.csv and .*worklist\.jsonl hold different decisions"):
        read_work_list(tmp_path)
