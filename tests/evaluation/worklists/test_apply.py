"""Decisions applied to training files: what changes, what keeps its bytes, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import labels, sentences

from forebear import BuildOptions, InputError, Retriever, audits, build_index, choose_model, open_rows, worklists
from forebear.cli.main import run
from forebear.errors import DataError, MismatchError, OutputExistsError
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.evaluation.worklists.lines import lines_of
from forebear.evaluation.worklists.training_files import Rewriting, rewrite

NAMES = ("bad", "good")
TEXTS = ["plain", 'a "quoted", text', "line\nbreak", "- dash", "semi; colon", "end", "tab\tin", ""]
GIVEN = [NAMES[i % 2] for i in range(len(TEXTS))]
IDS = [f"00{i}" for i in range(len(TEXTS))]
DECIDED = {0: ("relabel", "good"), 2: ("remove", None), 3: ("keep", "bad"), 4: ("quarantine", None), 6: ("", "good")}


def todo(decided=DECIDED, **more) -> WorkList:
    return WorkList(
        tuple(
            Item(row=row, texts={"text": TEXTS[row]}, given=GIVEN[row], decision=decision, suggested=suggested, **more)
            for row, (decision, suggested) in decided.items()
        )
    )


def expected(kind: int = 0) -> list[tuple[str, str, str]]:
    """The rows that stay (0), or are put apart (1), by hand."""
    every = list(zip(IDS, TEXTS, GIVEN, strict=True))
    every[0] = (*every[0][:2], "good")
    return [every[4]] if kind else [row for i, row in enumerate(every) if i not in (2, 4)]


def as_csv(rows, sign=",", header=("id", "text", "label"), end="\n", quoting=csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=sign, lineterminator=end, quoting=quoting).writerows([header, *rows])
    return out.getvalue()


ROWS = list(zip(IDS, TEXTS, GIVEN, strict=True))


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "encoding"), [("a.csv", "utf-8"), ("a.csv.gz", "utf-8-sig"), ("a.csv.bz2", "utf-16")])
def test_a_csv_file_is_what_a_writer_makes_of_the_rows_that_stay(quoting, end, name, encoding, tmp_path):
    """The oracle writes the changed rows anew by ``csv``; every byte is the same."""
    train, opened = tmp_path / name, {"gz": gzip.open, "bz2": bz2.open}.get(name.rsplit(".", 1)[1], open)
    with opened(train, "wb") as file:
        file.write(as_csv(ROWS, end=end, quoting=quoting).encode(encoding))
    applied = worklists.apply(todo(), train, tmp_path / name.replace("a.", "b."))
    for path, kind in zip(applied.files, (0, 1), strict=False):
        with opened(path, "rb") as file:
            assert file.read() == as_csv(expected(kind), end=end, quoting=quoting).encode(encoding)
    assert [path.name for path in applied.files] == [
        name.replace("a.", "b."),
        name.replace("a.", "b.quarantine."),
        "b.log.jsonl",
    ]
    assert (applied.n_rows, applied.n_written, applied.n_kept, applied.n_undecided) == (8, 6, 1, 1)
    log = [json.loads(line) for line in (tmp_path / "b.log.jsonl").read_text().splitlines()]
    assert [(one["row"], one["line"], one["new_row"], one["before"], one["after"]) for one in log] == [
        (0, 2, 0, "bad", "good"), (2, 4, None, "bad", None), (4, 7, None, "bad", None),
    ]  # fmt: skip
    assert [one["decision"] for one in log] == ["relabel", "remove", "quarantine"]


def test_a_text_file_keeps_its_blank_lines_spaces_and_the_quoting_of_each_cell(tmp_path):
    train = tmp_path / "a.csv"
    train.write_text('label;n;text\n\n"bad"; 1 ;plain\ngood;2;"x"\n\n"bad";3;"a;b"', newline="")
    items = [
        Item(row=r, given=g, decision="relabel", suggested=s) for r, g, s in ((0, "bad", "good"), (1, "good", "bad"))
    ]
    source = open_rows(train, text_columns=["text"], delimiter=";", need_labels=True)
    worklists.apply(WorkList(tuple(items)), source, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == 'label;n;text\n\n"good"; 1 ;plain\nbad;2;"x"\n\n"bad";3;"a;b"'


def test_tab_separated_files_have_no_quotes(tmp_path):
    texts = ["plain", 'a "quote', '"', "end"]
    body = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + body)
    items = [
        Item(row=i, texts={"sentence": t}, given=NAMES[i % 2], decision="relabel", suggested="good")
        for i, t in enumerate(texts)
    ]
    applied = worklists.apply(WorkList(tuple(items)), tmp_path / "a.tsv", tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_text() == "sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts)
    assert [change.item.row for change in applied.changes] == [0, 2]  # the others have this label already
    assert [(c.before, c.after) for c in applied.changes] == [("bad", "good")] * 2


@pytest.mark.parametrize(
    ("style", "array"),
    [
        ({}, False), ({"ensure_ascii": False}, False), ({"separators": (",", ":")}, False), ({}, True),
        ({"ensure_ascii": False}, True), ({"indent": 2}, True), ({"indent": 2, "ensure_ascii": False}, True),
    ],
)  # fmt: skip
def test_json_files_keep_their_style(style, array, tmp_path):
    rows = [{"id": i, "meta": {"ü": [1, None]}, "text": text, "label": name, "x": 1.5} for i, text, name in ROWS]

    def written(some):
        lines = [json.dumps(row, **style) for row in some]
        return json.dumps(some, **style) if array else "".join(f"{line}\n" for line in lines)

    (tmp_path / "a.json").write_text(written(rows))
    worklists.apply(todo(), tmp_path / "a.json", tmp_path / "b.json")
    kept = [dict(row, label="good") if i == 0 else row for i, row in enumerate(rows) if i not in (2, 4)]
    assert (tmp_path / "b.json").read_text() == written(kept)
    assert (tmp_path / "b.quarantine.json").read_text() == written([rows[4]])


@pytest.mark.parametrize("kind", ["names", "numbers", "dictionary", "classes"])
def test_parquet_keeps_types_metadata_and_groups(kind, tmp_path):
    numbers = pa.array([NAMES.index(name) for name in GIVEN], pa.int64())
    column = {"names": pa.array(GIVEN), "dictionary": pa.array(GIVEN).dictionary_encode()}.get(kind, numbers)
    table = pa.table(
        {"idx": pa.array(range(8), pa.int32()), "text": TEXTS, "label": column, "list": [[i] for i in range(8)]}
    )
    if kind == "classes":
        feature = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature), "mine": "kept"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, compression="zstd")
    worklists.apply(todo(), tmp_path / "a.parquet", tmp_path / "b.parquet")
    with pq.ParquetFile(tmp_path / "b.parquet") as found, pq.ParquetFile(tmp_path / "a.parquet") as before:
        assert found.schema_arrow.equals(before.schema_arrow, check_metadata=True)
        assert [found.metadata.row_group(g).num_rows for g in range(3)] == [2, 2, 2]
        assert found.metadata.row_group(0).column(0).compression == "ZSTD"
        wanted = table.to_pylist()
        wanted[0]["label"] = "good" if kind in ("names", "dictionary") else 1
        assert found.read().to_pylist() == [row for i, row in enumerate(wanted) if i not in (2, 4)]
    assert pq.read_table(tmp_path / "b.quarantine.parquet").column("idx").to_pylist() == [4]


def test_probabilities_are_accepted_only_where_nobody_decided(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    chances = {0: 0.95, 2: 0.9, 4: 0.5, 6: None}
    items = [replace(i, probability=chances[i.row]) for i in todo(dict.fromkeys(chances, ("", "good")))]
    items += list(todo({2: ("keep", "good")}))
    applied = worklists.apply(WorkList(tuple(items)), tmp_path / "a.csv", tmp_path / "b.csv", accept=0.9)
    assert [(change.item.row, change.after) for change in applied.changes] == [(0, "good")]
    assert (applied.n_kept, applied.n_undecided) == (1, 2)
    with pytest.raises(InputError, match="this list has none"):
        worklists.apply(todo(), tmp_path / "a.csv", tmp_path / "c.csv", accept=0.9)
    with pytest.raises(InputError, match="accept=2"):
        worklists.apply(WorkList(tuple(items)), tmp_path / "a.csv", tmp_path / "c.csv", accept=2)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([*todo({0: ("relabel", "good")}), *todo({0: ("remove", None)})], "row 0 is decided on twice: relabel to good"),
        ([*todo({0: ("relabel", None)})], "row 0 is to be relabelled, and its suggested label is empty"),
        ([*todo({0: ("relabel", "great")})], r"relabelled 'great'; .* has bad, good"),
        ([Item(row=0, texts={"text": "other"}, given="bad")], r"row 0: .* has 'plain' in row 0 .*, the list 'other'"),
        ([Item(row=0, digest=text_digest(["other"]), texts={"text": "plain"})], "row 0: .* in row 0"),
        ([Item(row=0, texts={"text": "plain"}, given="good")], "has the label bad in row 0 .* the list good"),
        ([Item(row=0, texts={"text": "plain"}, given="n"), Item(row=2, texts={"text": TEXTS[2]}, given="p")], "called"),
        ([Item(row=9, texts={"text": "plain"})], "row 9 of the list is row 9 .* has 8 rows"),
        (list(todo(dict.fromkeys(range(8), ("remove", None)))), "all 8 rows"),
        ([Item(row=0, source="x.csv"), Item(row=1, source="y.csv")], r"came from x\.csv, y\.csv, and none from a\.csv"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(items, said, tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    with pytest.raises((InputError, MismatchError), match=said) as raised:
        worklists.apply(WorkList(tuple(items)), tmp_path / "a.csv", tmp_path / "b.csv")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_merged_label_is_no_label_of_the_file(tmp_path):
    """An index of binary NLI calls two labels of the file by one name."""
    rows = [("0", "a", "entailment"), ("1", "b", "neutral"), ("2", "c", "contradiction")]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    given = ("entailment", "non-entailment", "non-entailment")
    items = [Item(row=i, texts={"text": rows[i][1]}, given=given[i]) for i in range(3)]
    change = replace(items[1], decision="relabel", suggested="entailment")
    applied = worklists.apply(WorkList((items[0], change, items[2])), tmp_path / "a.csv", tmp_path / "b.csv")
    assert [(c.before, c.after) for c in applied.changes] == [("non-entailment", "entailment")]
    back = replace(items[0], decision="relabel", suggested="non-entailment")
    with pytest.raises(
        InputError, match=r"one of several labels of .*: (neutral, contradiction|contradiction, neutral)"
    ):
        worklists.apply(WorkList((back, *items[1:])), tmp_path / "a.csv", tmp_path / "c.csv")
    named = replace(back, suggested="neutral")
    worklists.apply(WorkList((named, *items[1:])), tmp_path / "a.csv", tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text() == as_csv([("0", "a", "neutral"), *rows[1:]])


def test_rows_left_out_and_rows_of_other_files_are_counted(tmp_path):
    rows = [("0", "a", "bad"), ("1", "b", "-"), ("2", "c", "good")]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    mine = Item(row=1, texts={"text": "c"}, given="good", decision="remove", source="somewhere/a.csv")
    other = Item(row=7, texts={"text": "z"}, given="good", decision="remove", source="b.csv", source_row=0)
    applied = worklists.apply(WorkList((mine, other)), tmp_path / "a.csv", tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == as_csv(rows[:2])
    assert (applied.n_elsewhere, applied.changes[0].file_row, applied.n_rows) == (1, 2, 3)


def test_numbers_are_relabelled_and_several_labels_are_not(tmp_path):
    rows = [("0", "a", "1.5"), ("1", "b", "2")]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    source = open_rows(tmp_path / "a.csv", need_labels=True, problem_type="regression")
    item = Item(row=0, texts={"text": "a"}, given="1.5", suggested="3.25", decision="relabel")
    applied = worklists.apply(WorkList((item,)), source, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == as_csv([("0", "a", "3.25"), rows[1]])
    assert [(c.before, c.after) for c in applied.changes] == [("1.5", "3.25")]
    (tmp_path / "c.jsonl").write_text('{"text": "a", "label": ["x", "y"]}\n{"text": "b", "label": ["x"]}\n')
    several = Item(row=0, texts={"text": "a"}, given="x; y", suggested="x", decision="relabel")
    with pytest.raises(InputError, match="has several labels a row"):
        worklists.apply(WorkList((several,)), tmp_path / "c.jsonl", tmp_path / "d.jsonl")
    worklists.apply(WorkList((replace(several, decision="remove"),)), tmp_path / "c.jsonl", tmp_path / "d.jsonl")
    assert (tmp_path / "d.jsonl").read_text() == '{"text": "b", "label": ["x"]}\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """An index of a CSV file, with some of its labels wrong; and test rows."""
    folder = tmp_path_factory.mktemp("apply")
    texts = [f"{text}, said\n- again" for text in sentences(60, seed=4)]
    given = [NAMES[i] for i in labels(60, 2)]
    (folder / "train.csv").write_text(as_csv(list(zip(map(str, range(60)), texts, given, strict=True))))
    test = zip(map(str, range(40)), sentences(40, seed=9), (NAMES[i] for i in labels(40, 2, seed=2)), strict=True)
    (folder / "dev.csv").write_text(
        as_csv([(f"g{int(i) % 2}", text, name) for i, text, name in test], header=("kind", "text", "label"))
    )
    shutil.copytree(tiny_model(), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    index_of(folder / "train.csv", folder / "index", folder / "model")
    return folder


def index_of(file, folder, model):
    """An index of a CSV file."""
    source = open_rows(file, need_labels=True, text_columns=["text"])
    return build_index(source, folder, choose_model(None, (str(model),), (1.0,)).checkpoints, BuildOptions())


@pytest.mark.slow
def test_from_an_audit_through_a_spreadsheet_to_another_training_file(place, tmp_path, capsys):
    """What the command line does, with the edit that a person makes: a column filled in, saved with semicolons."""
    shutil.copy(place / "train.csv", tmp_path)
    assert (
        run(["audit", "mislabelled", "--index", str(place / "index"), "--top", "9", "--out", str(tmp_path / "s")]) == 0
    )
    capsys.readouterr()
    with (tmp_path / "s" / "worklist.csv").open(encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    wanted = {}
    with (place / "train.csv").open(newline="") as file:
        reader = csv.reader(file)
        begins = [1, *(reader.line_num + 1 for _ in reader)]
    for i, row in enumerate(listed):
        assert int(row["line"]) == begins[int(row["row"]) + 1]
        row["decision"] = ("relabel", "remove", "")[i % 3]
        row["suggested"] = NAMES[1 - NAMES.index(row["given"])]
        wanted[int(row["row"])] = row
    with (tmp_path / "edited.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(listed[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(listed)
    command = [
        "apply",
        str(tmp_path / "edited.csv"),
        "--train",
        str(tmp_path / "train.csv"),
        "--out",
        str(tmp_path / "new.csv"),
    ]
    command += [
        "--index",
        str(place / "index"),
        "--retrain",
        "head",
        "--test",
        str(place / "dev.csv"),
        "--group-by",
        "kind",
    ]
    command += ["--cache", str(tmp_path / "cache")]
    assert run([*command, "--report", str(tmp_path / "r")]) == 0
    said = capsys.readouterr()
    assert "3 relabelled, 3 removed, 0 put apart, 0 kept, 3 undecided and kept" in said.out
    with (place / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [
        dict(row, label=wanted[i]["suggested"] if wanted.get(i, {}).get("decision") == "relabel" else row["label"])
        for i, row in enumerate(rows)
        if wanted.get(i, {}).get("decision") != "remove"
    ]
    with (tmp_path / "new.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == kept
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["n_relabelled"], result["n_left_out"]) == (3, 3)
    assert {"all", "label bad", "label good", "kind g0", "kind g1"} == set(result["groups"])
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_retraining_is_that_of_an_index_of_the_new_file(place, tmp_path):
    """The oracle builds an index of the changed file and refits its head by scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    retriever = Retriever(place / "index")
    suspects = audits.suspects(retriever, n_listed=12).work_list
    todo_list = WorkList(tuple(
        replace(one, decision=("remove", "relabel")[i % 2], suggested=NAMES[1 - NAMES.index(one.given)])
        for i, one in enumerate(suspects)
    ))  # fmt: skip
    applied = worklists.apply(todo_list, place / "train.csv", tmp_path / "new.csv")
    how = worklists_retraining(tmp_path)
    found = worklists.retrain(applied, retriever, place / "dev.csv", how=how, group_by="kind")
    gold = labels(40, 2, seed=2)
    test_rows = index_of(place / "dev.csv", tmp_path / "t", place / "model")
    right = {}
    for name, file in (("before", place / "train.csv"), ("after", tmp_path / "new.csv")):
        index = index_of(file, tmp_path / name, place / "model")
        x = np.hstack([index.features().take(index.live), np.ones((len(index.live), 1))])  # the bias is held, too
        head = LogisticRegression(C=2 / (0.01 * len(x)), tol=1e-10, max_iter=10_000, fit_intercept=False)
        head.fit(x, index.labels)
        test_x = np.hstack([test_rows.features().take(test_rows.live), np.ones((40, 1))])
        right[name] = head.predict(test_x) == gold
    assert right["before"].tolist() == found.numbers.before[0].tolist()
    assert right["after"].tolist() == found.numbers.after[0].tolist()
    assert (right["before"] != right["after"]).any()
    of_kind = found.result["groups"]["kind g1"]
    assert of_kind["number"] == 20
    assert of_kind["after − before"] == pytest.approx(of_kind["after"] - of_kind["before"])


def test_lines_are_those_of_the_file_as_the_index_read_it(place, tmp_path):
    texts = ["a", "b\nc", "d", "e"]
    digests = {row: text_digest([text]) for row, text in enumerate(texts)}
    table = [(text, str(i)) for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text("\n" + as_csv(table, sign=";", header=("text", "n"), end="\r\n"), newline="")
    assert lines_of(tmp_path / "a.csv", digests, ("text",), {"delimiter": ";"}) == {0: 3, 1: 4, 2: 6, 3: 7}
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    assert lines_of(tmp_path / "a.jsonl", digests, ("text",), {}) == {0: 1, 1: 3, 2: 5, 3: 7}
    (tmp_path / "a.tsv").write_text("text\n" + "".join(f"{text[0]}\n" for text in texts))
    assert lines_of(tmp_path / "a.tsv", digests, ("text",), {}) == {0: 2, 2: 4, 3: 5}  # of the second, the text differs
    assert lines_of(tmp_path / "gone.csv", digests, ("text",), {}) == {}
    (tmp_path / "b.csv").write_text('text\n"never closed')
    assert lines_of(tmp_path / "b.csv", digests, ("text",), {}) == {}
    (tmp_path / "b.jsonl").write_text(json.dumps([{"text": text} for text in texts]))  # an array on one line
    assert lines_of(tmp_path / "b.jsonl", digests, ("text",), {}) == {}


def test_a_file_that_is_parted_into_other_rows_is_not_written(tmp_path):
    """A row is never changed that is not the one which was read."""
    table = pa.table({"text": TEXTS, "label": GIVEN})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"label": name}) + "\n" for name in GIVEN))
    (tmp_path / "a.json").write_text(json.dumps([{"label": name} for name in GIVEN]))
    for name in ("a.parquet", "a.csv", "a.jsonl", "a.json"):
        change = Rewriting(label_column="label", labels={0: "good"}, left_out=(), n_rows=9)
        with pytest.raises(DataError, match="8 rows were found where 9 were read"):
            rewrite(tmp_path / name, tmp_path / f"new-{name}", change, delimiter=None, encoding=None)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_other_encodings_are_kept(encoding, tmp_path):
    rows = [("0", "café", "bad"), ("1", "naïve", "good")]
    (tmp_path / "a.csv").write_bytes(as_csv(rows).encode(encoding))
    source = open_rows(tmp_path / "a.csv", need_labels=True, encoding=encoding)
    item = Item(row=0, texts={"text": "café"}, given="bad", suggested="good", decision="relabel")
    worklists.apply(WorkList((item,)), source, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_bytes() == as_csv([("0", "café", "good"), rows[1]]).encode(encoding)


def worklists_retraining(folder):
    from forebear.evaluation.python.retrainings import Retraining

    return Retraining(recipe="head", n_seeds=1, cache=folder / "cache")


def test_retraining_refuses_another_index(place, bert_world, tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    applied = worklists.apply(
        WorkList(tuple(replace(i, digest=text_digest(i.texts.values())) for i in todo())),
        tmp_path / "a.csv",
        tmp_path / "b.csv",
    )
    with pytest.raises(MismatchError, match="other texts than the list's"):
        worklists.retrain(applied, place / "index", place / "dev.csv", how=worklists_retraining(tmp_path))
    nothing = worklists.apply(todo({3: ("keep", "bad")}), tmp_path / "a.csv", tmp_path / "c.csv")
    with pytest.raises(InputError, match="no decision changes a row"):
        worklists.retrain(nothing, place / "index", place / "dev.csv", how=worklists_retraining(tmp_path))


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    (tmp_path / "b.log.jsonl").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"b\.log\.jsonl exists already"):
        worklists.apply(todo(), tmp_path / "a.csv", tmp_path / "b.csv")
    with pytest.raises(InputError, match="is the training file itself"):
        worklists.apply(todo(), tmp_path / "a.csv", tmp_path / "a.csv", force=True)
    with pytest.raises(InputError, match=r"expected a name that ends in \.csv"):
        worklists.apply(todo(), tmp_path / "a.csv", tmp_path / "b.jsonl")
    worklists.apply(todo(), tmp_path / "a.csv", tmp_path / "b.csv", force=True)
    assert (tmp_path / "b.log.jsonl").read_text() != "mine"


def test_what_retraining_would_refuse_is_refused_before_a_file_is_written(place, tmp_path, capsys):
    worklists.write(WorkList((Item(row=0, decision="remove"),)), tmp_path / "todo.csv")
    command = ["apply", str(tmp_path / "todo.csv"), "--train", str(place / "train.csv"), "--retrain", "head"]
    command += ["--out", str(tmp_path / "new.csv"), "--index", str(place / "index"), "--cache", str(tmp_path / "cache")]
    assert run([*command, "--test", str(place / "dev.csv"), "--group-by", "nothing"]) == 2
    assert "no such column" in capsys.readouterr().err
    (tmp_path / "dev.csv").write_text("text,label\na,neither\n")
    assert run([*command, "--test", str(tmp_path / "dev.csv")]) == 2
    assert not list(tmp_path.glob("new*"))
