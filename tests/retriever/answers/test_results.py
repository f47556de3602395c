"""Answers as tables and files: a text once, bounded tables and blocks, and signs that are not those of their side."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import N_QUERIES, N_ROWS

from forebear.cli.main import run
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.model.encoding import MaskedRows
from forebear.indexer.model.network.batches import tokenize
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.spans import masking as spans
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_found
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.results import RESULT_COLUMNS, queries_together
from forebear.retriever.answers.signs import SignCounts, is_crossed, note_of
from forebear.retriever.question.methods import METHODS, pick_methods
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

ASKED = ("gc", "if", "nn-euc", "tracin-we", "if++")
LONG_TEXT = pa.dictionary(pa.int32(), pa.large_string())
SMALL = {"TABLE_RESULTS": 7, "TABLE_TEXT_BYTES": 60, "ANSWER_BYTES": 1}


@pytest.fixture
def small(monkeypatch):
    """Shrink a limit of what is held together, by name."""
    return lambda name: monkeypatch.setattr(f"forebear.retriever.answers.results.{name}", SMALL[name])


def tables_of(world, methods=ASKED, top=4):
    answers = world.retriever.answers(rows_from_texts(world.queries), QuerySpec(methods=methods, top=top))
    return [table for block in answers for table in world.retriever.tables(block)]


def test_texts_are_dictionaries_of_64_bit_offsets_that_hold_a_text_once(bert_world):
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["gc", "if++"], top=N_ROWS)
    for name in ("text", "span"):
        assert table.schema.field(name).type == LONG_TEXT
    (chunk,) = table["text"].chunks
    assert len(chunk) == 2 * 2 * N_QUERIES * N_ROWS
    assert sorted(chunk.dictionary.to_pylist()) == sorted(set(bert_world.texts))
    assert chunk.to_pylist() == [bert_world.texts[row] for row in table["row"].to_pylist()]
    assert table.to_pandas()["text"].tolist() == chunk.to_pylist()


def test_equal_rows_share_one_text(bert_world, tmp_path):
    texts = ["a good film", "a bad film", "a good film", "", "", "a good film"]
    chosen = choose_model(None, bert_world.models[:1], (1.0,)).checkpoints
    options = BuildOptions(dampings=("0.1x",), shard_rows=2)
    index = build_index(rows_from_texts(texts, [0, 1] * 3), tmp_path / "index", chosen, options)
    rows = np.array([5, 0, 4, 2, 3, 1, 5])
    column = index.texts(rows)["text"]
    assert column.type == LONG_TEXT
    assert sorted(column.dictionary.to_pylist()) == ["", "a bad film", "a good film"]
    (listed,) = index.text_lists(rows)
    assert listed == column.to_pylist() == [texts[row] for row in rows]
    assert listed[0] is listed[1]
    assert index.row_texts.sizes.tolist() == [len(text) for text in texts]
    assert index.text_lists(rows[:0]) == [[]]


def test_texts_with_the_name_of_a_result_have_another_in_every_table(bert_world, tmp_path, capsys):
    rows = pd.DataFrame({"words": bert_world.texts, "hub_share": bert_world.texts, "label": bert_world.labels})
    source = open_rows(rows, text_columns=["words", "hub_share"])
    chosen = choose_model(None, bert_world.models[:1], (1.0,)).checkpoints
    index = build_index(source, tmp_path / "index", chosen, BuildOptions(stores=("features", "words")))
    for method in ("gd", "tracin-we-topk"):
        table = Retriever(index).retrieve([("a good film", "a plot")], methods=[method], top=2)
        assert table["row_words"].to_pylist() == [bert_world.texts[row] for row in table["row"].to_pylist()]
        assert "row_hub_share" in table.column_names
        ask = [
            "retrieve",
            "--index",
            str(index.folder),
            "--text",
            "a good film",
            "--pair",
            "a plot",
            "--method",
            method,
        ]
        assert run([*ask, "--top", "2"]) == 0
        assert "row_words" in capsys.readouterr().out


def test_every_column_of_a_result_is_listed(bert_world):
    questions = (
        {"methods": ["if"], "curvature": "cg"}, {"methods": ["if"], "aggregate": True},
        {"methods": ["tracin-we", "if++"]},
    )  # fmt: skip
    answers = [bert_world.retriever.retrieve(bert_world.queries[:1], top=2, **asked) for asked in questions]
    columns = {name for table in answers for name in table.column_names} - {"text"}
    assert columns == RESULT_COLUMNS - {"hub_share", "proven", "rows_scored"}  # of an audit, and of proofs


@pytest.mark.parametrize("limit", SMALL)
def test_no_table_and_no_block_is_longer_than_its_limit_and_all_say_the_same(limit, bert_world, small):
    whole = tables_of(bert_world)
    small(limit)
    parts = tables_of(bert_world)
    numbers = ("score", "contributions", "effect", "effect_probability")
    keys = [name for name in whole[0].column_names if name not in numbers]
    assert pa.concat_tables(parts).select(keys).to_pylist() == pa.concat_tables(whole).select(keys).to_pylist()
    for name in numbers:
        found, wanted = (pa.concat_tables(t)[name].combine_chunks() for t in (parts, whole))
        if name == "contributions":
            found, wanted = found.flatten(), wanted.flatten()
        found, wanted = (values.to_numpy(zero_copy_only=False) for values in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(whole) == 1
    assert len({part.schema for part in parts}) == 1
    if limit == "TABLE_RESULTS":
        assert {part.num_rows for part in parts[:-1]} == {7}
    elif limit == "TABLE_TEXT_BYTES":
        held = [sum(map(len, set(part["text"].to_pylist()))) for part in parts]
        assert all(size <= 60 or part.num_rows == 1 for size, part in zip(held, parts, strict=True))
        assert len(parts) > N_QUERIES
    else:
        assert [len(set(part["query"].to_pylist())) for part in parts] == [1] * N_QUERIES


def test_fewer_queries_are_asked_together_where_their_rankings_are_long():
    few = pick_methods(["gc", "if"])
    assert queries_together(few, 10) > 512
    assert queries_together(few, 10_000) * 10_000 == pytest.approx(queries_together(few, 100) * 100, rel=0.01)
    assert queries_together(pick_methods(["tracin-we"]), 1000) < queries_together(few, 1000) / 10
    assert queries_together(few, 10**9) == 1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_is_written_part_by_part(suffix, bert_world, tmp_path, monkeypatch, small):
    """Many row groups, each with a dictionary of its own, read as one table."""
    wanted = pa.concat_tables(tables_of(bert_world, top=N_ROWS))
    for name in SMALL:
        small(name)
    monkeypatch.setitem(SMALL, "TABLE_RESULTS", 500)
    small("TABLE_RESULTS")
    monkeypatch.setattr("forebear.retriever.answers.results.TABLE_TEXT_BYTES", 1 << 20)
    monkeypatch.setattr("forebear.retriever.answers.result_file._LINES", 3)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": text}) + "\n" for text in bert_world.queries))
    out = tmp_path / f"a.{suffix}"
    args = ["retrieve", "--index", bert_world.index.folder, "--test", test, "--method", ",".join(ASKED)]
    assert run([*map(str, args), "--top", str(N_ROWS), "--out", str(out), "--quiet"]) == 0
    keys = ["query", "method", "side", "rank", "row", "span", "words", "text"]
    if suffix == "parquet":
        file = pq.ParquetFile(out)
        assert file.num_row_groups == 2 * N_QUERIES
        found = file.read()
        assert pa.types.is_dictionary(found.schema.field("text").type)
        assert pd.read_parquet(out)["text"].tolist() == wanted["text"].to_pylist()
        assert found.select(keys).to_pylist() == wanted.select(keys).to_pylist()
    else:
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [{key: line[key] for key in keys} for line in lines] == wanted.select(keys).to_pylist()


def test_the_terminal_shows_five_queries_however_few_are_asked_together(bert_world, tmp_path, capsys, small):
    small("ANSWER_BYTES")
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"text": text}) + "\n" for text in bert_world.queries))
    assert run(["retrieve", "--index", str(bert_world.index.folder), "--test", str(test), "--top", "2"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[1] for line in shown.out.splitlines() if line.startswith("query")] == list("01234")
    assert "the first 5 of 7" in shown.err


def test_scores_of_the_other_sign_are_counted():
    scores = np.array([0.5, 0.0, -0.1, -0.2])
    said = "2 of 4 proponents of if have scores below 0: these oppose the target, less than other rows do."
    assert note_of("if", "proponent", scores) == said
    assert note_of("if", "opponent", scores).startswith("1 of 4 opponents of if have scores above 0: these support")
    assert "none supports the target, they oppose it least" in note_of("gd", "proponent", scores[2:])
    assert "none lowers the word's saliency, they raise it least" in note_of("saliency-if", "opponent", scores[:1])
    assert note_of("if", "proponent", scores[:2]) == note_of("if", "opponent", scores[1:]) == ""
    unsigned = [name for name, method in METHODS.items() if not method.signed]
    assert unsigned == ["nn-euc", "nn-cos", "nn-dot", "sbert-euc", "sbert-cos", "sbert-dot"]
    for name in unsigned:
        assert note_of(name, "proponent", scores) == note_of(name, "opponent", scores) == ""


def test_retrieve_says_which_results_have_the_other_sign(bert_world, tmp_path, capsys):
    """Asked for every row, both sides hold all scores, of either sign."""
    index, out = str(bert_world.index.folder), tmp_path / "a.parquet"
    asked = ["retrieve", "--index", index, "--text", bert_world.queries[0], "--method", "if,nn-euc", "--top"]
    assert run([*asked, str(N_ROWS), "--out", str(out)]) == 0
    facts = json.loads(pq.read_schema(out).metadata[b"forebear"])["methods"]
    assert "below 0 opposes" in facts["if"]["sign"]
    assert "neither support nor opposition" in facts["nn-euc"]["sign"]
    table = pq.read_table(out).to_pandas()
    notes = []
    for side in ("proponent", "opponent"):
        scores = table.score[(table.method == "if") & (table.side == side)].to_numpy()
        n = int(is_crossed(METHODS["if"], side, scores).sum())
        assert 0 < n < N_ROWS
        notes.append(f"{n} of {N_ROWS} {side}s have scores {'below' if side == 'proponent' else 'above'} 0")
    err = capsys.readouterr().err
    assert all(f"note: if: {note}: these" in err for note in notes)
    assert "note: nn-euc" not in err
    assert run([*asked, str(N_ROWS)]) == 0
    shown = capsys.readouterr()
    assert all(f"note: if: {note}: these" in shown.err for note in notes)
    assert "have scores" not in shown.out
    assert run([*asked, str(N_ROWS), "--quiet"]) == 0
    assert "have scores" not in "".join(capsys.readouterr())


def test_memory_goes_back_to_the_system_after_each_block_of_test_rows(bert_world, monkeypatch):
    returned = []
    monkeypatch.setattr("forebear.retriever.retriever.return_memory", lambda: returned.append(True))
    spec = QuerySpec(methods=("gd",), top=2)
    blocks = list(bert_world.retriever.answers(rows_from_texts(bert_world.queries), spec, block_rows=3))
    assert len(returned) == len(blocks) == -(-N_QUERIES // 3)


def test_counts_of_many_answers_are_those_of_all_scores(bert_world):
    spec = QuerySpec(methods=("gd", "nn-dot"), top=N_ROWS)
    counts = SignCounts(spec.check())
    for answers in bert_world.retriever.answers(rows_from_texts(bert_world.queries), spec, block_rows=3):
        counts.add(answers)
    scores = Retriever(bert_world.index).scores(bert_world.queries, "gd")
    below, above = int((scores < 0).sum()), int((scores > 0).sum())
    first, second = counts.notes()
    assert first.startswith(f"{below} of {N_QUERIES * N_ROWS} proponents of gd have scores below 0")
    assert second.startswith(f"{above} of {N_QUERIES * N_ROWS} opponents of gd have scores above 0")


def test_each_row_is_encoded_once_and_a_masked_row_is_made_when_it_is_read(bert_world, monkeypatch):
    classifier, encode, seen = bert_world.retriever.classifier(), spans.encode_with_places, []
    monkeypatch.setattr(spans, "encode_with_places", lambda c, texts: seen.append(len(texts[0])) or encode(c, texts))
    monkeypatch.setattr(spans, "_ENCODED_ROWS", 2)
    texts = ["a good film", "the bad plot", "a good film", "red"]
    found = find_spans(span_finder("words"), [texts], None, range(4), "row")
    masked = mask_found(classifier, [texts], found)
    assert seen == [2, 1]
    assert masked.owners.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert isinstance(masked.encoded.minus, MaskedRows)
    assert isinstance(masked.encoded.take([9, 0]).minus, MaskedRows)
    for i, (owner, span) in enumerate(zip(masked.owners, masked.spans, strict=True)):
        text = texts[owner]
        words = text[: span.start] + classifier.tokenizer.mask_token + text[span.end :]
        (wanted,) = tokenize(classifier.tokenizer, [[words]], classifier.max_length)
        assert masked.encoded.minus[i] == wanted
        assert masked.encoded.rows[i] is masked.encoded.rows[masked.owners.tolist().index(owner)]
    assert list(masked.encoded.minus[2:4]) == [masked.encoded.minus[2], masked.encoded.minus[3]]
    kept = masked.encoded.take([9, 0]).minus
    assert kept[0] == masked.encoded.minus[9]


def test_a_csv_file_holds_the_answers_of_a_jsonl_file(bert_world, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*bert_world.queries, 'two\nlines, "q"']))
    arguments = ["retrieve", "--index", bert_world.index.folder, "--test", path, "--method", "gc,tracin-we", "--top", 3]
    for name in ("a.jsonl", "a.csv"):
        assert run([*map(str, arguments), "--quiet", "--out", str(tmp_path / name)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) == 2 * 2 * 3 * (N_QUERIES + 1)
    for row, line in zip(rows, lines, strict=True):
        assert row.keys() == line.keys()
        for name, value in line.items():
            plain = "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
            assert row[name] == plain
    facts = [json.loads((tmp_path / f"{name}.meta.json").read_text()) for name in ("a.jsonl", "a.csv")]
    assert facts[0]["query_digest"] == facts[1]["query_digest"]
