"""Indexes by name, opened anew when they change, and asked as they were by whoever began before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from serving import until

from forebear.errors import CorruptIndexError, InputError
from forebear.indexer.building.change import append_rows, retire_rows
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage.arrow import file_sha256
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.server.served_indexes import ServedIndex, ServedIndexes, names_of

QUESTION = {"texts": ["a good film"], "methods": ["gc", "tracin-we"], "top": 60}


def rows_of(reply: Any) -> set[int]:
    (answer,) = reply.json["answers"]
    return {result["row"] for result in answer["results"]}


def test_an_append_and_a_retirement_are_picked_up_and_only_once(start, index_copy):
    live = start(f"tiny={index_copy}")
    assert rows_of(live.ask("/v1/retrieve", QUESTION)) == set(range(60))
    retire_rows(index_copy, [3, 5])
    found = live.ask("/v1/retrieve", QUESTION)
    assert rows_of(found) == set(range(60)) - {3, 5}
    assert found.json["digest"] == Index.open(index_copy).manifest.digest()
    append_rows(index_copy, rows_from_texts(["a good film", "a bad film"], [0, 1]))
    found = live.ask("/v1/retrieve", QUESTION | {"top": 62})
    assert rows_of(found) == set(range(62)) - {3, 5}
    assert live.measure("forebear_index_reloads_total", index="tiny") == 2
    assert live.measure("forebear_index_rows", index="tiny") == 60
    (listed,) = live.ask("/v1/indexes").json["indexes"]
    assert listed["rows"] == {"live": 60, "retired": 2}
    assert "row 3 is not one of the 60 live" in live.ask("/v1/score", {"texts": ["a"], "rows": [3]}).error


def test_a_change_is_seen_without_a_question(start, index_copy):
    live = start(f"tiny={index_copy}")
    retire_rows(index_copy, [7])
    assert until(lambda: live.ask("/v1/indexes").json["indexes"][0]["rows"]["live"] == 59)


def test_who_holds_the_index_from_before_gets_the_answers_from_before(index_copy, bert_world):
    """Files that were not read before the change may be gone with it; those that were are still there."""
    served = ServedIndex("tiny", index_copy)
    before = served.current
    question = {"methods": ["gc", "if", "rif", "tracin-we"], "top": 5}
    expected = bert_world.retriever.retrieve(bert_world.queries, **question)
    assert before.retriever.retrieve(bert_world.queries, **question).equals(expected)
    retire_rows(index_copy, expected.column("row").to_pylist()[:3])
    after = served.refresh()
    assert (after.digest != before.digest, served.current is after) == (True, True)
    assert before.retriever.retrieve(bert_world.queries, **question).equals(expected)
    assert after.retriever.classifier().model is before.retriever.classifier().model  # loaded once
    gone = set(expected.column("row").to_pylist()[:3])
    assert not gone & set(after.retriever.retrieve(bert_world.queries, **question).column("row").to_pylist())


def test_files_that_stayed_are_not_hashed_again_and_those_that_changed_are(index_copy, monkeypatch):
    served = ServedIndex("tiny", index_copy)
    served.current.retriever.retrieve(["a film"], methods=["gc", "if", "tracin-we"], top=2)
    retire_rows(index_copy, [4])
    hashed: list[str] = []

    def noting(path: Path) -> str:
        hashed.append(path.relative_to(index_copy).as_posix())
        return file_sha256(path)

    monkeypatch.setattr("forebear.indexer.storage.files.file_sha256", noting)
    first = served.current
    before, now = first.index.manifest.files, Index.open(index_copy).manifest.files
    changed = {name for name, facts in now.items() if before.get(name) != facts}
    served.refresh().retriever.retrieve(["a film"], methods=["gc", "if", "tracin-we"], top=2)
    assert hashed
    assert set(hashed) <= changed
    for name in changed:
        (index_copy / name).write_bytes(bytes(now[name]["bytes"]))
        again = Index.open(index_copy)
        again.trust(first.index)
        with pytest.raises(CorruptIndexError, match="altered"):
            again.checked(name)


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_what_cannot_be_opened_does_not_take_the_place_of_what_is_served(start, index_copy, harm):
    live = start(f"tiny={index_copy}")
    first = live.ask("/v1/retrieve", QUESTION)
    manifest = index_copy / MANIFEST_NAME
    whole = manifest.read_bytes()
    if harm == "damaged":
        manifest.write_bytes(whole[: len(whole) // 2])
    else:
        manifest.unlink()
    again = live.ask("/v1/retrieve", QUESTION)
    assert (again.status, again.body) == (200, first.body)
    (listed,) = live.ask("/v1/indexes").json["indexes"]
    assert listed["problem"]
    assert str(index_copy) not in listed["problem"]
    assert live.ask("/v2/health/ready").status == 200
    manifest.write_bytes(whole)
    assert live.ask("/v1/retrieve", QUESTION).status == 200
    assert live.ask("/v1/indexes").json["indexes"][0]["problem"] is None
    assert live.measure("forebear_index_reloads_total", index="tiny") == 0


def test_several_indexes_are_asked_by_name(start, index_copy, index_folder):
    retire_rows(index_copy, range(10))
    live = start(f"all={index_folder}", f"fewer={index_copy}")
    assert rows_of(live.ask("/v1/retrieve", QUESTION | {"index": "all"})) == set(range(60))
    assert rows_of(live.ask("/v1/retrieve", QUESTION | {"index": "fewer"})) == set(range(10, 60))
    assert "expected one of those that are served, all, fewer" in live.ask("/v1/retrieve", QUESTION).error
    assert [one["name"] for one in live.ask("/v1/indexes").json["indexes"]] == ["all", "fewer"]


def test_names_are_those_given_or_of_the_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_of(["runs/one", "b=runs/two", "./c"]) == {
        "one": Path("runs/one"), "b": Path("runs/two"), "c": Path("c")
    }  # fmt: skip
    assert names_of(["runs/x=y/one", "n=runs/x=y"]) == {"one": Path("runs/x=y/one"), "n": Path("runs/x=y")}
    with pytest.raises(InputError, match="two indexes are called one"):
        names_of(["a/one", "b/one"])
    for wrong in ("/", "a b", ".hidden"):
        with pytest.raises(InputError, match="is no name for a served index"):
            names_of([wrong])


def test_an_index_is_found_by_name_or_alone():
    one: Any = ServedIndex.__new__(ServedIndex)
    other: Any = ServedIndex.__new__(ServedIndex)
    one.name, other.name = "one", "other"
    assert ServedIndexes([one]).named(None) is one
    both = ServedIndexes([one, other])
    assert both.named("other") is other
    with pytest.raises(InputError, match="served, one, other"):
        both.named(None)
    with pytest.raises(InputError, match="'third' is not served; expected one or other"):
        both.named("third")


def test_a_copy_of_the_same_index_is_no_change(start, index_copy):
    live = start(f"tiny={index_copy}")
    manifest = index_copy / MANIFEST_NAME
    shutil.copyfile(manifest, index_copy / "copy")
    (index_copy / "copy").replace(manifest)
    assert live.ask("/v1/retrieve", QUESTION).status == 200
    assert live.measure("forebear_index_reloads_total", index="tiny") == 0
