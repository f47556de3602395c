"""Hostile data files, in process: the small cases of ``benchmarks/hostile.py``, which runs all as commands."""

from __future__ import annotations

import bz2
import gzip
import os
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import ROOT

from forebear.cli.screen.console import shortened
from forebear.errors import DataError
from forebear.indexer.rows.arrow_text import column_bytes
from forebear.indexer.rows.files import file_formats as readers
from forebear.indexer.rows.files import text_file
from forebear.indexer.rows.opening import open_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
from hostile import bad_bytes, nested, tables, typed


def end_of(case):
    """Number of rows read, or the line that refuses the file."""
    try:
        return sum(len(block) for block in open_rows(case.path).blocks())
    except DataError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000 + len(str(case.path))
        return str(error)


@pytest.mark.parametrize("cases", [nested, tables, typed, bad_bytes])
def test_hostile_files_are_read_rightly_or_refused_in_one_line(cases, tmp_path):
    for case in cases(tmp_path):
        found = end_of(case)
        if case.n_rows is not None:
            assert found == case.n_rows, case.name
        elif not (case.may_end_early and found == 300):
            assert isinstance(found, str), case.name
            assert case.says in found, case.name


def test_line_ends_of_all_kinds_give_the_same_texts(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,label\r\na,0\n"b\r\nc",1\rd,0\r\n')
    assert [text for block in open_rows(tmp_path / "a.csv").blocks() for text in block.texts[0]] == ["a", "b\r\nc", "d"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "csv.gz"])
def test_byte_order_marks_say_the_encoding(tmp_path, encoding, suffix):
    tab = "\t" if suffix == "tsv" else ","
    content = f"text{tab}label\nnaïve 💡{tab}0\nb{tab}1\n"
    if suffix == "jsonl":
        content = '{"text": "naïve 💡", "label": 0}\n{"text": "b", "label": 1}\n'
    elif suffix == "json":
        content = ' [{"text": "naïve 💡", "label": 0},\n {"text": "b", "label": 1}]\n'
    packed = content.encode(encoding)
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(packed) if suffix.endswith("gz") else packed)
    source = open_rows(tmp_path / f"a.{suffix}", need_labels=True)
    assert [block.texts[0] for block in source.blocks(1, 0)] == [["naïve 💡"], ["b"]]
    assert [block.labels for block in source.blocks(1, 1)] == [[1]]


def test_latin_1_is_refused_by_byte_and_line_with_the_way_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nfilm,0\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        open_rows(path)
    assert "byte 21 (from 0), in line 3, is 0xe9" in str(caught.value)
    assert 'If it is Latin-1, as Excel writes it, give encoding="cp1252".' in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be"])
def test_the_encoding_that_a_refusal_names_reads_the_file(tmp_path, pack, encoding):
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[pack]
    path = tmp_path / f"my file.csv{suffix}"
    path.write_bytes(pack("text\ncafé 1\n".encode(encoding)))
    with pytest.raises(DataError) as caught:
        open_rows(path)
    (named,) = re.findall('encoding="(.+)"', str(caught.value))
    (block,) = open_rows(path, encoding=named).blocks()
    assert block.texts[0] == ["café 1"]


def test_a_wrong_byte_far_into_a_file_is_placed_rightly(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "READ_BYTES", 7)  # characters of two bytes are cut in two
    content = "text\n" + "ä\n" * 50
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode() + b"\xe4\n")
    with pytest.raises(DataError, match=r"byte 155 \(from 0\), in line 52, is 0xe4"):
        open_rows(path)


def test_long_arrays_are_decoded_piece_by_piece(tmp_path, monkeypatch):
    from forebear.indexer.rows.files import json_rows

    texts = ["word " * n + '"]}, {' for n in range(60)]
    path = tmp_path / "a.json"
    import json

    path.write_text(json.dumps([{"text": text, "x": [n, {"y": "]"}]} for n, text in enumerate(texts)]))
    for size in (1, 7, 64):
        monkeypatch.setattr(json_rows, "READ_CHARACTERS", size)
        assert [text for block in open_rows(path).blocks(7) for text in block.texts[0]] == texts
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 200)
    with pytest.raises(DataError, match=r"element \d+ \(from 1\) is longer than 0 MiB.*cut its text"):
        open_rows(path)


def test_packed_files_that_never_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "FREE_BYTES", 1 << 16)
    rows = b"text,label\n" + b"a,0\n" * 100_000
    for name, content in (
        ("a.csv.gz", gzip.compress(rows)),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 40_000)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"200 times its size.*give its rows unpacked"):
            open_rows(tmp_path / name)


@pytest.mark.parametrize("store_schema", [True, False])  # with the schema the column stays a dictionary
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.list_(pa.string())])
def test_parquet_that_repeats_a_long_text_is_refused_before_it_is_spelled_out(
    tmp_path, monkeypatch, kind, store_schema
):
    monkeypatch.setattr(text_file, "FREE_BYTES", 1 << 24)
    repeated = kind.value_type if pa.types.is_list(kind) else kind
    column = pa.DictionaryArray.from_arrays(
        pa.array([0] * 1000, pa.int32()), pa.array(["x" * (1 << 20)]).cast(repeated)
    )
    if pa.types.is_list(kind):
        column = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), column)
    is_text = kind in (pa.string(), pa.large_string())
    table = pa.table({"text": column} if is_text else {"text": ["a"] * 1000, "other": column})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=store_schema)
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=r"200 times its size.*give its rows unpacked"):
        for _block in open_rows(path).blocks(1):
            assert pa.total_allocated_bytes() - before < 100 << 20


def test_rows_of_a_dictionary_share_their_strings(tmp_path):
    texts = ["a" * 100, "b", None, "a" * 100]
    for name, path in (("dictionary", tmp_path / "a.parquet"), ("string", tmp_path / "b.parquet")):
        column = pa.array(texts).dictionary_encode() if name == "dictionary" else pa.array(texts)
        pq.write_table(pa.table({"text": column, "label": [0, 1, 0, 1]}), path)
        (table,) = readers.parquet_reader(str(path)).tables(0, None)
        assert table["text"].to_pylist() == texts
        assert pa.types.is_dictionary(table.schema.field("text").type) == (name == "dictionary")
    held = pa.table({"text": pa.array(["a" * 100, "b", "a" * 100]).dictionary_encode()})
    (block,) = open_rows(held).blocks()
    assert block.texts[0] == ["a" * 100, "b", "a" * 100]
    assert block.texts[0][0] is block.texts[0][2]


def test_bytes_of_rows_are_counted_in_values_of_every_kind():
    rows = {
        pa.list_(pa.string()): [["abc", "d"], None, []],
        pa.map_(pa.string(), pa.string()): [[("ab", "c")], [], None],
        pa.list_(pa.string(), 2): [["a", "bb"], None, ["c", None]],
        pa.struct([("q", pa.string()), ("n", pa.int64())]): [{"q": "ab", "n": 1}, None, {"q": None, "n": 2}],
        pa.dictionary(pa.int8(), pa.large_string()): ["ab", None, "ä"],
        pa.string_view(): ["ab", None, "ä"],
        pa.int64(): [1, 2, None],
    }
    expected = [[4, 0, 0], [3, 0, 0], [3, 0, 1], [2, 0, 0], [2, 0, 2], [2, 0, 2], [0, 0, 0]]
    for (kind, values), lengths in zip(rows.items(), expected, strict=True):
        column = pa.chunked_array([pa.array(values, kind), pa.array(values[::-1], kind).slice(1)])
        assert column_bytes(column).tolist() == [*lengths, *lengths[::-1][1:]], kind


def test_long_lists_of_a_small_parquet_file_are_decoded_a_few_rows_at_a_time(tmp_path):
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1 << 24, np.int8)), 1 << 18).cast(pa.list_(pa.int8()))
    pq.write_table(pa.table({"text": ["a"] * 64, "mask": values}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    assert [len(table) for table in readers.parquet_reader(str(tmp_path / "a.parquet")).tables(0, None)] == [8] * 8


def test_long_texts_of_a_small_parquet_file_are_spelled_out_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    texts = ["a" * 300, "b" * 300, None, "a" * 300, "c" * 2000, "", "d"]
    pq.write_table(pa.table({"text": texts, "label": range(7)}), tmp_path / "a.parquet", row_group_size=5)
    reader = readers.parquet_reader(str(tmp_path / "a.parquet"))
    found = list(reader.tables(0, None))
    assert [len(table) for table in found] == [4, 1, 2]
    assert [text for table in found for text in table["text"].to_pylist()] == texts
    assert [table.schema.field("text").type for table in found] == [pa.string()] * 3
    assert [text for table in reader.tables(4, ["text"]) for text in table["text"].to_pylist()] == texts[4:]


def test_too_many_columns_and_too_long_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("forebear.indexer.rows.files.reader.MAX_COLUMNS", 5)
    (tmp_path / "a.csv").write_text("text,a,b,c,d,e\n")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "a", "c{i}": 1}}\n' for i in range(6)))
    pq.write_table(pa.table({name: ["a"] for name in "abcdef"}), tmp_path / "c.parquet")
    for name in ("a.csv", "b.jsonl", "c.parquet"):
        with pytest.raises(DataError, match=r"expected at most 5.*save the columns of texts and labels alone"):
            open_rows(tmp_path / name)
    from forebear.indexer.rows.files import json_rows

    monkeypatch.setattr(json_rows, "LONGEST_ROW", 100)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * 100 + '"}\n')
    with pytest.raises(DataError, match=r"line 2 is longer than 0 MiB.*Break it up, or cut its text"):
        open_rows(tmp_path / "d.jsonl")


@pytest.mark.parametrize(("suffix", "asks"), [("csv", "Is a quote opened"), ("tsv", "Is a line break lost")])
def test_a_row_beyond_the_limit_is_refused_with_the_limit_and_the_way_out(tmp_path, monkeypatch, suffix, asks):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 20)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"text\n" + b"a" * (3 << 20) + b"\n")
    with pytest.raises(DataError, match=rf"longer than 1 MiB\. {asks}.* Else cut its text"):
        open_rows(path)
    held = pa.table({"text": ["a" * ((16 << 20) + 1)]})
    with pytest.raises(DataError, match=r"16,777,217 bytes in 'text'; expected at most 16,777,216\. Cut it"):
        list(open_rows(held).blocks())


def test_pipes_devices_and_dangling_links_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "nothing.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for path, said in (
        ("pipe.csv", "a pipe or a device"),
        ("link.csv", "nothing.csv, which does not"),
        ("loop.csv", "link"),
    ):
        with pytest.raises(DataError, match=said):
            open_rows(tmp_path / path)
    with pytest.raises(DataError, match="a pipe or a device"):
        open_rows("/dev/zero")


@pytest.mark.parametrize("beginning", [b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"ARROW1", b"\x28\xb5\x2f\xfd"])
def test_other_formats_are_told_by_their_first_bytes(tmp_path, beginning):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(beginning + b"text")
        with pytest.raises(DataError, match="by its first bytes"):
            open_rows(tmp_path / name)


def test_the_screen_shows_the_beginning_of_a_long_text():
    assert shortened("a" * 2000) == "a" * 2000
    assert shortened("a" * 10_000) == "a" * 2000 + " ... (10,000 characters)"
