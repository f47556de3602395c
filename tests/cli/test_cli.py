"""The command line, called in process as a user would: exit codes, one-line errors, files, README's promises."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import METHODS, Index, Retriever
from forebear.cli.main import run

COLUMNS = [
    "query", "query_label", "query_prediction", "target", "method", "side", "rank", "row", "score", "exact", "label",
    "prediction", "text",
]  # fmt: skip
SPANS = ["span", *(f"{of}_{end}" for of in ("span", "query_span") for end in ("column", "start", "end"))]

ANSWERED = [name for name, method in METHODS.items() if not method.through_run]  # the model comes from no run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, its training file, two test files and an index built by the command."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_model(folder / "model")
    write_jsonl(folder / "train.jsonl", text=sentences(60), label=labels(60))
    write_jsonl(folder / "more.jsonl", text=sentences(10, seed=5), label=labels(10))
    write_jsonl(folder / "test.jsonl", text=sentences(7, seed=9), label=labels(7))
    command = ["index", "--model", str(folder / "model"), "--train", str(folder / "train.jsonl"), "--quiet"]
    command += [
        "--store",
        "features,sbert,words",
        "--words-top",
        "0,3",
        "--sentence-model",
        str(folder / "model"),
        "--shard-rows",
        "16",
    ]
    assert run([*command, "--out", str(folder / "index")]) == 0
    return folder


def fails(capsys, args, code, *parts):
    """The command ends with ``code`` and exactly one line on stderr that says ``parts``."""
    assert run([str(a) for a in args]) == code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.slow
def test_retrieve_writes_the_documented_columns_with_provenance(world, tmp_path):
    out = tmp_path / "a.parquet"
    methods = ",".join(ANSWERED)
    args = ["retrieve", "--index", world / "index", "--test", world / "test.jsonl", "--method", methods, "--top", 4]
    assert run([*map(str, args), "--out", str(out), "--quiet"]) == 0
    table = pq.read_table(out)
    further = [*SPANS, "spans_cut", "word_ids", "words", "contributions", "text"]
    assert table.column_names == [*COLUMNS[:9], "effect", "effect_probability", *COLUMNS[9:-1], *further]
    assert table.num_rows == 7 * len(ANSWERED) * 2 * 4
    assert set(table["side"].to_pylist()) == {"proponent", "opponent"}
    assert set(table["rank"].to_pylist()) == {1, 2, 3, 4}
    assert all(table["exact"].to_pylist())
    facts = json.loads(table.schema.metadata[b"forebear"])
    assert facts["index_digest"] == Index.open(world / "index").manifest.digest()
    assert facts["methods"]["if"]["damping"] > 0
    assert facts["methods"]["gc"]["recall"] == 1.0
    train = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for row in table.slice(0, 50).to_pylist():
        assert row["text"] == train[row["row"]]["text"]


def test_command_line_and_python_give_the_same(world, tmp_path):
    out = tmp_path / "a.jsonl"
    args = ["retrieve", "--index", world / "index", "--test", world / "test.jsonl", "--method", "gc", "--top", 3]
    assert run([*map(str, args), "--out", str(out), "--quiet"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (world / "test.jsonl").read_text().splitlines()]
    table = Retriever(world / "index").retrieve(texts, methods=["gc"], top=3)
    for found, line in zip(table.to_pylist(), lines, strict=True):
        assert found["row"] == line["row"]
        assert found["score"] == pytest.approx(line["score"], rel=1e-5, abs=1e-7)
    assert json.loads((tmp_path / "a.jsonl.meta.json").read_text())["sign"].startswith("larger = proponent")


def test_results_come_in_blocks_and_numbers_follow_the_file(world, tmp_path, monkeypatch):
    monkeypatch.setattr("forebear.retriever.retriever.QUERY_BLOCK_ROWS", 2)
    from forebear import QuerySpec, open_rows

    retriever = Retriever(world / "index")
    source = open_rows(world / "test.jsonl")
    spec = QuerySpec(methods=("gc",), top=2)
    blocks = list(retriever.answers(source, spec, block_rows=2))
    assert [b.start for b in blocks] == [0, 2, 4, 6]
    whole = next(iter(retriever.answers(source, spec, block_rows=100)))
    for block in blocks:
        part = whole.rankings["gc"][0].rows[block.start : block.start + len(block.predictions)]
        assert (block.rankings["gc"][0].rows == part).all()


def test_one_text_on_the_terminal(world, capsys):
    assert (
        run(["retrieve", "--index", str(world / "index"), "--text", "a good film", "--method", "gc,if", "--top", "2"])
        == 0
    )
    out = capsys.readouterr().out
    assert "a good film" in out
    assert "gc: proponents of" in out
    assert "if: opponents of" in out


def test_info_and_verify_as_json(world, capsys):
    assert run(["info", str(world / "index"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts["curvature"]["head"]["exact"]["damping"], float)
    assert facts["rows"] == {"live": 60, "retired": 0, "given_out": 60}
    assert facts["checkpoints"][0]["eta"] == 1.0
    assert facts["faiss"].startswith("faiss")
    assert run(["info", str(world / "index")]) == 0
    assert "60 live" in capsys.readouterr().out
    assert run(["verify", str(world / "index"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["n_rows_recomputed"] == 16
    assert found["max_error"] < 1e-4
    assert run(["verify", str(world / "index")]) == 0


def test_verify_names_a_flipped_byte_and_an_unlisted_file(world, tmp_path, capsys):
    import shutil

    copy = tmp_path / "index"
    shutil.copytree(world / "index", copy)
    (copy / "rows" / "stray.arrow").write_bytes(b"x")
    fails(capsys, ["verify", copy, "--rows", 0], 1, "stray.arrow is not listed")
    (copy / "rows" / "stray.arrow").unlink()
    path = copy / "features" / "final" / "00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    fails(capsys, ["verify", copy], 1, "features/final/00001.arrow was altered")
    fails(capsys, ["retrieve", "--index", copy, "--text", "a film"], 1, "00001.arrow was altered", "--force")


@pytest.mark.slow
def test_append_retire_and_rebuild_by_command(world, tmp_path, capsys):
    import shutil

    copy = str(tmp_path / "index")
    shutil.copytree(world / "index", copy)
    assert run(["index", "--out", copy, "--append", "--train", str(world / "more.jsonl"), "--quiet"]) == 0
    assert Index.open(copy).manifest.n_live == 70
    assert run(["index", "--out", copy, "--retire", "3", "60-62", "--quiet"]) == 0
    assert list(Index.open(copy).retired) == [3, 60, 61, 62]
    table = Retriever(copy).retrieve(["a good film"], methods=ANSWERED, top=66)
    assert not {3, 60, 61, 62} & set(table["row"].to_pylist())
    assert run(["index", "--out", copy, "--rebuild-ann", "--ann", "SQfp16", "--quiet"]) == 0
    assert Index.open(copy).manifest.derived["feature-cos"]["factory"] == "SQfp16"
    assert run(["verify", copy, "--json"]) == 0
    capsys.readouterr()
    fails(capsys, ["index", "--out", copy, "--retire", "3"], 2, "retired before")
    fails(capsys, ["index", "--out", copy, "--retire", "900"], 2, "row 900", "0 to 69")
    fails(capsys, ["index", "--out", copy, "--retire", "three"], 2, "--retire three")


def test_several_values_after_one_flag(world, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=4)
    args = ["index", "--checkpoints", other, world / "model", "--eta", "0.2", "0.1", "--train", world / "train.jsonl"]
    assert run([*map(str, args), "--out", str(tmp_path / "i"), "-q"]) == 0
    assert [c.eta for c in Index.open(tmp_path / "i").manifest.checkpoints] == [0.2, 0.1]


def test_methods_lists_the_table(capsys):
    assert run(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in listed] == list(METHODS)
    assert {m["name"] for m in listed if "similarity" in m["sign"]} == {n for n in METHODS if n[:2] in ("nn", "sb")}
    assert run(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "tracin-last" in shown
    assert "sbert-dot are similarities" in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["retrieve", "--index", "INDEX"], ["--test", "--text"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--method", "nonsense"], ["'nonsense'", "gc"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--top", "0"], ["--top 0"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--exact", "maybe"], ["'maybe'", "rerank"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--target", "sideways"], ["'sideways'", "LABEL_0"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--target", "gold"], ["labels"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--pair", "b"], ["2 text(s)", "1 (text)"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--out", "x.doc"], [".parquet, .jsonl or .csv"]),
        (["retrieve", "--index", "INDEX", "--text", "a", "--method", "if", "--damping", "much"], ["'much'", "0.1x"]),
        (["retrieve", "--index", "nowhere", "--text", "a"], ["no such folder: nowhere"]),
        (["retrieve", "--index", "INDEX", "--test", "nowhere.csv"], ["nowhere.csv"]),
        (["retrieve", "--index", "INDEX", "--nonsense"], ["--nonsense"]),
        (["index", "--out", "INDEX", "--model", "MODEL", "--train", "TRAIN"], ["holds an index", "--force"]),
        (["index", "--out", "NEW", "--model", "MODEL"], ["--train"]),
        (["index", "--out", "NEW", "--train", "TRAIN"], ["--model"]),
        (["index", "--out", "NEW", "--model", "TRAIN", "--train", "TRAIN"], ["no transformers model folder"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--damping", "much"], ["'much'", "0.1x"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--ann", "Gibberish7"], ["Gibberish7"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--eta", "1", "2"], ["2 value(s) for 1"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--scope", "most"], ["'most'", "top-K"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--store", "words"], ["words", "features"]),
        (["index", "--out", "NEW", "--model", "MODEL", "--train", "TRAIN", "--max-length", "999"], ["999", "40"]),
        (["audit", "hans", "--index", "INDEX", "--test", "TEST", "--out", "NEW"], ["pairs"]),
        (["verify", "nowhere"], ["no such folder: nowhere", "forebear index"]),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(world, tmp_path, capsys, args, parts):
    names = {
        "INDEX": world / "index",
        "MODEL": world / "model",
        "TRAIN": world / "train.jsonl",
        "TEST": world / "test.jsonl",
    }
    names["NEW"] = tmp_path / "new"
    fails(capsys, [names.get(a, a) for a in args], 2, *parts)


def test_an_output_that_exists_is_kept_without_force(world, tmp_path, capsys):
    out = tmp_path / "a.parquet"
    out.write_text("precious")
    args = ["retrieve", "--index", world / "index", "--text", "a film", "--out", out]
    fails(capsys, args, 2, "exists", "--force")
    assert out.read_text() == "precious"
    assert run([*map(str, args), "--force", "-q"]) == 0
    assert pq.read_table(out).num_rows == 20


def test_a_failure_half_way_leaves_no_output(world, tmp_path, capsys, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("forebear.retriever.retriever.Retriever.answer_block", broken)
    out = tmp_path / "a.parquet"
    fails(capsys, ["retrieve", "--index", world / "index", "--text", "a film", "--out", out], 1, "RuntimeError: boom")
    assert list(tmp_path.iterdir()) == []


def test_sbert_is_refused_where_it_is_not_stored(world, tmp_path, capsys):
    index = tmp_path / "i"
    assert (
        run(
            ["index", "--model", str(world / "model"), "--train", str(world / "train.jsonl"), "--out", str(index), "-q"]
        )
        == 0
    )
    fails(capsys, ["retrieve", "--index", index, "--text", "a", "--method", "sbert-cos"], 2, "--store features,sbert")


def test_no_curvature_refuses_if_and_serves_the_rest(world, tmp_path, capsys):
    index = str(tmp_path / "i")
    args = [
        "index",
        "--model",
        world / "model",
        "--train",
        world / "train.jsonl",
        "--out",
        index,
        "--damping",
        "none",
        "-q",
    ]
    assert run([str(a) for a in args]) == 0
    fails(capsys, ["retrieve", "--index", index, "--text", "a", "--method", "if"], 2, "--damping none")
    assert run(["retrieve", "--index", index, "--text", "a", "--method", "gc", "--quiet"]) == 0


def test_query_labels_that_do_not_fit_are_left_out_with_a_warning(world, tmp_path, capsys):
    path = write_jsonl(tmp_path / "odd.jsonl", text=sentences(3), label=["x", "y", "x"])
    out = tmp_path / "a.parquet"
    assert run(["retrieve", "--index", str(world / "index"), "--test", str(path), "--out", str(out)]) == 0
    assert "query_label stays empty" in capsys.readouterr().err
    assert pq.read_table(out)["query_label"].null_count == 60
    fails(
        capsys,
        ["retrieve", "--index", world / "index", "--test", path, "--target", "gold"],
        2,
        "labels x, y",
        "--label-names",
    )


def test_options_that_no_method_asked_for_takes_are_refused(bert_world, capsys):
    args = ["retrieve", "--index", str(bert_world.index.folder), "--text", "good film", "--method"]
    for extra, message in (
        (["gc", "--word", "film"], "--word is for saliency-if and saliency-if-token, not gc"),
        (["gc,if", "--spans", "clauses"], "--spans is for if+, if++, tracin+ and tracin++; gc, if compare rows"),
        (["saliency-if-token", "--spans", "clauses"], "--spans is for if+"),
        (["gc", "--query-spans", "clauses"], "--query-spans is for if+"),
    ):
        assert run([*args, *extra]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_spans_with_markup_are_printed_as_they_are(bert_world, capsys):
    args = [
        "retrieve",
        "--index",
        str(bert_world.index.folder),
        "--method",
        "if++",
        "--spans",
        "sentences",
        "--top",
        "1",
    ]
    for text in ("good [/foo] film", "good [bold] film"):
        assert run([*args, "--text", text]) == 0
        assert f"The query's span: {text}" in " ".join(capsys.readouterr().out.split())


def test_texts_with_markup_are_printed_as_they_are(world, tmp_path, capsys):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["[bold]good[/bold] film", "bad [/] film"] * 8, "label": [0, 1] * 8}), path)
    index = str(tmp_path / "i")
    assert run(["index", "--model", str(world / "model"), "--train", str(path), "--out", index, "-q"]) == 0
    assert run(["retrieve", "--index", index, "--text", "[red]a film[/red]", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "[red]a film[/red]" in out
    assert "[/] film" in out


def test_an_index_answers_from_any_working_folder(world, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(world / "model", tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    args = ["index", "--model", "model", "--train", str(world / "train.jsonl"), "--out", "index", "-q"]
    assert run(args) == 0
    monkeypatch.chdir("/")
    assert run(["retrieve", "--index", str(tmp_path / "a" / "index"), "--text", "a film", "--top", "2"]) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert run(["retrieve", "--index", str(tmp_path / "b" / "index"), "--text", "a film", "--top", "2"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "b" / "model")
    fails(capsys, ["retrieve", "--index", tmp_path / "b" / "index", "--text", "a film"], 2, "model", "--model")


def test_careless_options_are_refused_before_any_work(world, tmp_path, capsys):
    base = ["index", "--model", world / "model", "--train", world / "train.jsonl", "--out", tmp_path / "new"]
    fails(capsys, [*base, "--ann", "Flt"], 2, "could not parse", "'Flt'")
    fails(capsys, [*base, "--max-length", "0"], 2, "--max-length 0")
    fails(capsys, ["index", "--out", world / "index", "--retire", "5-2"], 2, "ends before it begins")
    fails(capsys, ["retrieve", "--index", world / "index", "--text", "a", "--target", "gold"], 2, "--test")
    assert not (tmp_path / "new").exists()
