"""Indexes published: what leaves the machine, what it answers, and the hub's own client with a hub of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import World
from hub_server import HubServer, hub_server
from tiny import labels, sentences

from forebear import BuildOptions, Index, Retriever, append_rows, build_index, choose_model, retire_rows, verify_index
from forebear.cli.main import run
from forebear.errors import CorruptIndexError, InputError, MissingStoreError, OutputExistsError
from forebear.hub.published import write_published
from forebear.hub.transfer import HubName
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.storage.manifest import digest_of
from forebear.retriever.effects.measured import KEPT_EFFECTS, Measured, measured_lines
from forebear.server.served_indexes import ServedIndex, names_of

N = 40
TEXTS, LABELS = [f"secretword {text}" for text in sentences(N, seed=41)], labels(N, seed=42)
QUERY = sentences(2, seed=43)
STORED_METHODS = ("gd", "gc", "if", "rif", "nn-cos", "nn-euc", "tracin")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model("bert", 2, 4)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, model: str) -> Index:
    """Three shards, a column beside the texts, a retired row; the file's folder and the model's are telling names."""
    folder = tmp_path_factory.mktemp("private-folder")
    lines = zip(TEXTS, LABELS, strict=True)
    data = [{"text": text, "label": label, "author": f"author-{i}"} for i, (text, label) in enumerate(lines)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
    options = BuildOptions(shard_rows=17, batch_tokens=64, keep_columns=("author",))
    source = open_rows(str(folder / "rows.jsonl"))
    built = build_index(source, folder / "index", choose_model(model).checkpoints, options)
    return retire_rows(built.folder, [3])


@pytest.fixture
def published(index: Index, tmp_path: Path) -> Index:
    write_published(index, tmp_path / "published")
    return Index.open(tmp_path / "published")


def answers(index: Index, model: str, methods: tuple[str, ...] = STORED_METHODS) -> Any:
    return Retriever(index, model=model).retrieve(QUERY, methods=methods, top=5, scope="head")


def test_no_text_leaves_and_answers_are_the_same(index: Index, published: Index, model: str) -> None:
    for path in published.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (b"secretword", b"author-", b"private-folder", str(index.folder).encode()):
                assert secret not in content, f"{path.name} holds {secret!r}"
    ours, theirs = answers(index, model), answers(published, model)
    for name in ("query", "method", "side", "rank", "row", "score", "label", "prediction"):
        assert ours[name].equals(theirs[name]), name
    rows = theirs["row"].to_pylist()
    assert theirs["text"].to_pylist() == [f"(row {row} of rows.jsonl)" for row in rows]
    assert verify_index(published.folder, n_rows=0).problems == ()
    assert published.manifest.segments[0].rows_sha256 == index.manifest.segments[0].rows_sha256


def test_texts_go_along_where_they_are_asked_for(index: Index, model: str, tmp_path: Path) -> None:
    write_published(index, tmp_path / "published", with_texts=True)
    whole = Index.open(tmp_path / "published")
    assert answers(whole, model).equals(answers(index, model))
    assert not whole.manifest.without_texts
    assert verify_index(whole.folder, model=model, n_rows=4).problems == ()


def test_what_needs_texts_is_refused_by_name(published: Index, model: str) -> None:
    with pytest.raises(MissingStoreError, match="published without them"):
        published.text_lists(np.arange(2))
    with pytest.raises(MissingStoreError, match="published without them"):
        append_rows(published.folder, rows_from_texts(TEXTS[:2], LABELS[:2]), model=model)
    assert retire_rows(published.folder, [5]).manifest.n_retired == 2
    assert verify_index(published.folder, n_rows=0).problems == ()


def test_a_method_beyond_the_head_is_refused_before_a_model_is_loaded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(scopes=("head", "all"), calibration_queries=0)
    source = rows_from_texts(TEXTS, LABELS)
    built = build_index(source, tmp_path / "index", choose_model(model).checkpoints, options)
    write_published(built, tmp_path / "published")
    loaded: list[object] = []
    monkeypatch.setattr("forebear.retriever.question.models.load_classifier", lambda *a, **k: loaded.append(a))
    with pytest.raises(MissingStoreError, match=r"gd at all needs the texts of the training rows"):
        Retriever(tmp_path / "published").retrieve(QUERY, methods=("gd",), scope="all")
    assert not loaded


def test_stores_made_of_texts_are_refused_without_them(bert_world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"word gradients.*to publish"):
        write_published(bert_world.index, tmp_path / "published")
    assert not (tmp_path / "published").exists()
    write_published(bert_world.index, tmp_path / "published", with_texts=True)
    assert verify_index(tmp_path / "published", n_rows=0).problems == ()


def test_an_existing_folder_is_left_alone(index: Index, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    with pytest.raises(OutputExistsError):
        write_published(index, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note"]


def test_an_altered_file_is_not_published(index: Index, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(index.folder, tmp_path / "copy"))
    path = copy / "features" / "checkpoint-1" / "00001.arrow"
    path = path if path.exists() else next((copy / "features").rglob("00001.arrow"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptIndexError, match="altered"):
        write_published(Index.open(copy), tmp_path / "published")


def test_a_manifest_that_points_outside_is_refused(published: Index) -> None:
    path = published.folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"]
    content["files"]["../../outside"] = {"sha256": "0", "bytes": 1}
    path.write_text(json.dumps(content | {"digest": digest_of(content)}) + "\n")
    with pytest.raises(CorruptIndexError, match="outside"):
        Index.open(published.folder)


@pytest.mark.parametrize("address", ["hf://x", "hf://a/b/c", "hf://a/b@", "hf://a/b@../c", "hf:a/b", "hf://a b/c"])
def test_addresses_of_no_repository_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="expected hf://user/name"):
        HubName.of(address)


# --- a hub on this machine ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The hub's own client speaks to it, with an empty cache."""
    with hub_server() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        files = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def test_an_index_goes_to_the_hub_and_comes_back(index: Index, model: str, hub: HubServer) -> None:
    before = sorted(path.name for path in index.folder.parent.iterdir())
    url = index.push_to_hub("hf://me/mine", model="me/model", private=True)
    assert url.startswith(f"{hub.address}/me/mine/commit/")
    assert hub.private == {"me/mine"}
    assert "Bearer hf_mine" in hub.tokens
    assert sorted(path.name for path in index.folder.parent.iterdir()) == before
    card = hub.files("me/mine")["README.md"].decode()
    assert 'base_model: "me/model"' in card
    fetched = Index.open("hf://me/mine")
    assert fetched.manifest.digest() in card
    assert answers(fetched, model)["row"].equals(answers(index, model)["row"])
    assert fetched.checkpoint_paths == ["me/model"]
    asked = len(hub.asked)
    assert Index.open(f"hf://me/mine@{hub.heads['me/mine']['main']}").manifest == fetched.manifest
    assert not [line for line in hub.asked[asked:] if line.startswith("GET") and "/resolve/" in line]


def test_what_is_known_of_effects_is_known_of_the_published_index(index: Index, hub: HubServer, tmp_path: Path) -> None:
    copy = Index.open(Path(shutil.copytree(index.folder, tmp_path / "copy")))
    known = Measured(
        index_digest=copy.manifest.digest(), method="if", scope="head", curvature="exact", damping=0.5,
        target="predicted", recipe="proximal-head", seeds=(0,), test_rows="3 of private-folder/dev.csv", sizes=(1, 5),
        n_pairs=30, slope=0.97, slope_low=None, slope_high=None, correlation=0.99,
    )  # fmt: skip
    stale = replace(known, index_digest="of an earlier state", method="gd")
    KEPT_EFFECTS.keep(copy.folder, [known, stale])
    copy.push_to_hub("hf://me/mine")
    fetched = Index.open("hf://me/mine")
    lines = measured_lines(fetched)
    assert lines == measured_lines(copy)
    assert [line.endswith("measured before the index changed") for line in lines] == [False, True]
    assert [one.test_rows for one in KEPT_EFFECTS.read(fetched.folder)] == ["3 of dev.csv"] * 2
    assert verify_index(fetched.folder, n_rows=0).problems == ()
    (copy.folder / "effects.json").write_text("{")
    with pytest.warns(UserWarning, match="is damaged .*not copied"):
        copy.push_to_hub("hf://me/mine")
    assert "effects.json" not in hub.files("me/mine")


def test_a_later_push_replaces_the_files_and_leaves_what_was_opened(index: Index, hub: HubServer) -> None:
    index.push_to_hub("hf://me/mine", with_texts=True)
    opened = Index.open("hf://me/mine")
    assert any(name.startswith("columns/") for name in hub.files("me/mine"))
    index.push_to_hub("hf://me/mine")
    assert set(hub.files("me/mine")) == {".gitattributes", "README.md", "manifest.json", *_listed(hub)}
    assert not any(name.startswith("columns/") for name in hub.files("me/mine"))
    assert opened.text_lists(np.arange(1)) == [[TEXTS[0]]]
    assert Index.open("hf://me/mine").manifest.without_texts
    index.push_to_hub("hf://me/mine@with-texts", with_texts=True)
    assert not Index.open("hf://me/mine@with-texts").manifest.without_texts
    assert Index.open("hf://me/mine").manifest.without_texts


def _listed(hub: HubServer) -> list[str]:
    return list(json.loads(hub.files("me/mine")["manifest.json"])["files"])


def test_the_command_line_pushes_asks_and_checks(
    index: Index, model: str, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(index.folder), str(tmp_path / "seen")]) == 0
    assert "without the texts" in capsys.readouterr().out
    assert run(["push", str(index.folder), "hf://me/mine"]) == 0
    assert "published: " in capsys.readouterr().out
    question = ["--model", model, "--text", QUERY[0], "--method", "gd", "--top", "2"]
    for name, place in (("ours", str(index.folder)), ("theirs", "hf://me/mine")):
        assert run(["retrieve", "--index", place, *question, "--out", str(tmp_path / f"{name}.parquet")]) == 0
    ours, theirs = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("ours", "theirs"))
    assert ours["row"].equals(theirs["row"])
    assert ours["score"].equals(theirs["score"])
    capsys.readouterr()
    assert run(["verify", "hf://me/mine", "--rows", "0"]) == 0
    assert run(["info", "hf://me/mine"]) == 0
    assert "published without" in " ".join(capsys.readouterr().out.split())
    assert run(["push", str(index.folder), str(tmp_path / "seen")]) == 2
    assert run(["push", str(index.folder), str(tmp_path / "other"), "--private"]) == 2


def test_what_the_hub_refuses_is_one_line(index: Index, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    index.push_to_hub("hf://me/mine")
    with pytest.raises(InputError, match=r"^hf://me/none: the hub has no such repository.*`hf auth login`\.$"):
        Index.open("hf://me/none")
    with pytest.raises(InputError, match=r"^hf://me/mine@v9: no such revision"):
        Index.open("hf://me/mine@v9")
    hub.commit("me/mine", "main", {"README.md": b"only a card"})
    with pytest.raises(InputError, match=r"holds no index \(main\)"):
        Index.open("hf://me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(InputError, match=r"^hf://me/mine@elsewhere: .*hub cannot be reached"):
        Index.open("hf://me/mine@elsewhere")
    with pytest.raises(InputError, match=r"^hf://me/mine: .*[Oo]ffline.*network"):
        index.push_to_hub("hf://me/mine")


def test_a_published_index_is_served_by_its_name(index: Index, hub: HubServer, model: str) -> None:
    index.push_to_hub("hf://me/mine")
    (folder,) = names_of(["hf://me/mine"]).values()
    assert names_of(["hf://me/mine@main", "other=hf://me/mine"]) == {"mine": folder, "other": folder}
    served = ServedIndex("mine", folder, model=model)
    assert served.current.digest == Index.open("hf://me/mine").manifest.digest()
    assert {"gc", "if"} <= set(served.current.methods)


def test_a_file_that_the_hub_changed_is_refused(index: Index, hub: HubServer, model: str) -> None:
    index.push_to_hub("hf://me/mine")
    files = dict(hub.files("me/mine"))
    name = next(name for name in files if name.startswith("features/"))
    files[name] = files[name][:-100] + bytes([files[name][-100] ^ 1]) + files[name][-99:]
    hub.commit("me/mine", "main", files)
    with pytest.raises(CorruptIndexError, match="altered"):
        answers(Index.open("hf://me/mine"), model)
