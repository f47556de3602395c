"""Texts come back to an index that was published without them: the rows of the index, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interruptions import hashes
from tiny import labels, sentences

from forebear import BuildOptions, Index, Retriever, append_rows, build_index, choose_model, open_rows, verify_index
from forebear.cli.main import run
from forebear.errors import InputError, MismatchError, MissingStoreError, OutputExistsError
from forebear.evaluation.explorer.records import Drives, row_block
from forebear.hub.published import write_published

N, MORE = 30, 11
TEXTS, LABELS = sentences(N + MORE, seed=51), labels(N + MORE, seed=52)
QUERY = sentences(2, seed=53)
OPTIONS = BuildOptions(
    scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=4, batch_tokens=64,
    shard_rows=8,
)  # fmt: skip


def lines(*, start: int = 0, stop: int = N, **changed: dict[int, Any]) -> list[dict[str, Any]]:
    """Rows; ``changed`` has other values of a column, by row."""
    plain = {"text": TEXTS, "label": LABELS, "author": [f"author {i % 7}" for i in range(len(TEXTS))]}
    return [{name: changed.get(name, {}).get(i, plain[name][i]) for name in plain} for i in range(start, stop)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., str]) -> Path:
    """An index, what is published of it, and its rows."""
    folder = tmp_path_factory.mktemp("attached")
    (folder / "model").symlink_to(tiny_model("bert", 2, 8))
    source = open_rows(write(folder / "rows.jsonl", lines()))
    index = build_index(source, folder / "index", choose_model(str(folder / "model")).checkpoints, OPTIONS)
    write_published(index, folder / "published")
    return folder


def refused(given: Path, out: Path, rows: list[dict[str, Any]], **how: Any) -> str:
    """The line by which other rows are refused; nothing is written."""
    path = write(out.parent / "other.jsonl", rows)
    with pytest.raises(MismatchError) as caught:
        Index.open(given / "published").with_texts(path, out, model=str(given / "model"), **how)
    assert not out.exists()
    return str(caught.value)


def test_an_index_with_its_texts_again_has_the_files_and_answers_of_before(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"gd": {"scope": "top-1"}, "if+": {"spans": "words"}, "saliency-if": {"scope": "head"}}
    before, published = Index.open(given / "index"), Index.open(given / "published")
    for method, how in methods.items():
        with pytest.raises(MissingStoreError, match=r"needs the texts.*Index\.with_texts\(\)"):
            Retriever(published, model=str(given / "model")).retrieve(QUERY, methods=[method], **how)
    words = ["index", "--out", str(tmp_path / "whole"), "--attach", str(given / "published")]
    assert run([*words, "--train", str(given / "rows.jsonl")]) == 0
    whole = Index.open(tmp_path / "whole")
    wanted, found = hashes(before.folder), hashes(whole.folder)
    for files in (wanted, found):
        del files["manifest.json"]
    assert found == wanted
    assert whole.manifest.columns == {"author": "string"}
    assert verify_index(whole.folder, model=str(given / "model"), n_rows=4).problems == ()
    for method, how in methods.items():
        ours, theirs = (
            Retriever(index, model=str(given / "model")).retrieve(QUERY, methods=[method], top=5, **how)
            for index in (before, whole)
        )
        assert ours.equals(theirs), method
    more = open_rows(write(tmp_path / "more.jsonl", lines(start=N, stop=N + MORE)))
    assert append_rows(whole.folder, more, model=str(given / "model")).manifest.n_rows == N + MORE
    capsys.readouterr()
    assert run([*words, "--train", str(given / "rows.jsonl")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--force", "--resume"])
def test_what_means_nothing_for_a_new_folder_is_refused(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    words = ["index", "--out", str(tmp_path / "whole"), "--attach", str(given / "published"), option]
    assert run([*words, "--train", str(given / "rows.jsonl")]) == 2
    assert f"--attach takes no {option}: it writes a new folder" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_records_say_whether_their_texts_are_those_of_the_rows(given: Path) -> None:
    for name, has_texts in (("index", True), ("published", False)):
        retriever = Retriever(given / name, model=str(given / "model"))
        (record,) = row_block(retriever, np.array([3]), Drives(), {})
        assert record["has_texts"] is has_texts
        assert (record["texts"] == [["text", TEXTS[3]]]) is has_texts


def test_rows_that_were_appended_come_with_all_rows_in_one_file(given: Path, tmp_path: Path) -> None:
    options = BuildOptions(shard_rows=8)
    models = choose_model(str(given / "model")).checkpoints
    index = build_index(open_rows(str(given / "rows.jsonl")), tmp_path / "index", models, options)
    more = write(tmp_path / "more.jsonl", lines(start=N, stop=N + MORE))
    index = append_rows(index.folder, open_rows(more))
    write_published(index, tmp_path / "published")
    published = Index.open(tmp_path / "published")
    both = write(tmp_path / "both.jsonl", lines(stop=N + MORE))
    with pytest.warns(UserWarning, match="columns beside texts and labels are not those"):
        whole = published.with_texts(both, tmp_path / "whole")
    wanted, found = hashes(index.folder), hashes(whole.folder)
    for name in [name for name in wanted if name.startswith(("columns/", "manifest"))]:
        wanted.pop(name)
    del found["manifest.json"]
    assert found == wanted
    assert "row 33 (from 0) is the first" in refused_of(
        published, tmp_path, lines(stop=N + MORE, label={33: 1 - LABELS[33]}), given
    )


def refused_of(published: Index, place: Path, rows: list[dict[str, Any]], given: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        published.with_texts(write(place / "others.jsonl", rows), place / "none", model=str(given / "model"))
    return str(caught.value)


def test_other_rows_are_refused_by_the_first_that_differs(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    other = TEXTS[9].rsplit(" ", 1)[0] + " " + TEXTS[10].split()[0] + " again"
    assert "row 9 (from 0) is the first that differs" in refused(given, out, lines(text={9: other, 20: "a"}))
    assert "row 4 (from 0) is the first" in refused(given, out, lines(label={4: 1 - LABELS[4]}, text={9: other}))
    assert "read the same for the model" in refused(given, out, lines(text={9: TEXTS[9] + "  "}))
    assert "has 29 rows" in refused(given, out, lines(stop=N - 1))
    with pytest.raises(MismatchError, match=r"first to differ needs the model \("):
        changed = write(tmp_path / "changed.jsonl", lines(text={9: other}))
        Index.open(given / "published").with_texts(changed, out, model=str(tmp_path))
    with pytest.raises(InputError, match="there is nothing to attach"):
        Index.open(given / "index").with_texts(str(given / "rows.jsonl"), out)
    with pytest.raises(OutputExistsError):
        Index.open(given / "published").with_texts(str(given / "rows.jsonl"), given / "index")


def test_columns_beside_the_texts_come_back_only_if_they_are_those_of_before(given: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", lines(author={2: "somebody else"}))
    with pytest.warns(UserWarning, match="are left out"):
        whole = Index.open(given / "published").with_texts(rows, tmp_path / "whole")
    assert whole.manifest.columns == {}
    assert not (whole.folder / "columns").exists()
    assert whole.text_lists([2, 7]) == [[TEXTS[2], TEXTS[7]]]
