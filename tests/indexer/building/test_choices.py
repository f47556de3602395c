"""The choices of an index: one field each, given by options, kept by the spec, and given back by the manifest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from places import GOLDEN
from tiny import labels, sentences

from forebear.errors import CorruptIndexError
from forebear.indexer.building.build import append_rows, build_index, rebuild_ann, refit_index, retire_rows
from forebear.indexer.building.options import BuildOptions, Work
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.storage.choices import LATER_CHOICES, Choices, WorkKeywords
from forebear.indexer.storage.manifest import IndexSpec, digest_of, read_manifest, stated
from forebear.indexer.training.model_choice import choose_model

SMALL = {"sketch_dim": 8, "sketch_bits": 64, "white_bits": 72, "calibration_queries": 0, "shard_rows": 8}
CASES: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "no curvature at the head": {"dampings": ()},
    "none beyond it": SMALL | {"scopes": ("head", "all"), "curvature": "none"},
    "no damping beyond it": SMALL | {"scopes": ("head", "top-1"), "dampings": ()},
    "everything": SMALL | {
        "stores": ("features", "sbert", "words", "spans"), "words_tops": (3, 0), "words_precision": "int8",
        "spans": "words", "scopes": ("head", "all"), "with_bias": True, "sketch_basis": "random", "sketch_bits": 0,
        "dampings": ("0.1x", "0.5"), "rep_refit": True, "ann": "Flat", "seed": 3, "batch_tokens": 128,
        "max_length": 20, "calibration_queries": 5,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_options_of_a_manifest_build_the_same_index(name: str, tiny_model: Callable[..., str], tmp_path: Path) -> None:
    options = BuildOptions(**CASES[name], sentence_model=tiny_model("bert", 2, 9), device="cpu")
    source = rows_from_texts(sentences(20, seed=3), labels(20, seed=4))
    checkpoints = choose_model(tiny_model()).checkpoints
    built = build_index(source, tmp_path / "a" / "i", checkpoints, options).manifest
    again = BuildOptions.of(built, device="cpu")
    again.check()
    assert again.settled() == {f.name: getattr(built.spec, f.name) for f in fields(Choices)}
    assert build_index(source, tmp_path / "b" / "i", checkpoints, again).manifest == built


def test_a_choice_of_a_part_that_is_not_there_does_not_count() -> None:
    """Their specs, and so their digests, are the same."""
    plain = BuildOptions().settled()
    others: dict[str, Any] = {
        "words_tops": (0,), "words_precision": "int8", "spans": "words", "span_column": 1, "sketch_dim": 16,
        "sketch_bits": 0, "white_bits": 0, "sketch_basis": "random", "with_bias": True, "curvature": "none",
    }  # fmt: skip
    for name, value in others.items():
        assert BuildOptions(**{name: value}).settled() == plain, name
    used = {"stores": ("features", "words", "spans"), "scopes": ("head", "all")}
    for name, value in others.items():
        assert BuildOptions(**used, **{name: value}).settled() != BuildOptions(**used).settled(), name


def test_every_choice_stands_in_one_place() -> None:
    """Options and spec have them from Choices; neither declares one of its own again, but for what a build decides."""
    chosen = {f.name for f in fields(Choices)}
    assert chosen & set(vars(BuildOptions)["__annotations__"]) == set()
    assert chosen & set(vars(IndexSpec)["__annotations__"]) == {"max_length", "batch_tokens"}
    assert chosen >= set(LATER_CHOICES)


def test_a_spec_is_written_as_before_there_was_one_class_of_choices() -> None:
    """The bytes of a manifest depend on the order of its fields."""
    written = json.loads((GOLDEN / "words" / "manifest.json").read_text())
    manifest = read_manifest(GOLDEN / "words")
    assert list(manifest.to_dict()["spec"]) == list(written["spec"])
    assert list(manifest.to_dict()) == [name for name in written if name != "digest"]
    every = replace(manifest.spec, with_bias=True, spans="words", spans_sha256="0", scopes=("head", "all"))
    assert [name for name in stated(every) if name in ("span_column", "spans", "spans_sha256", "scopes")] == [
        "spans", "spans_sha256", "scopes"
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_spec_of_another_version_is_refused(change: str, tmp_path: Path) -> None:
    content = json.loads((GOLDEN / "index" / "manifest.json").read_text())
    del content["digest"]
    if change == "missing":
        del content["spec"]["scopes"]
    else:
        content["spec"]["flavour"] = "sweet"
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"digest": digest_of(content)}) + "\n")
    with pytest.raises(CorruptIndexError, match="written by another version of forebear"):
        read_manifest(tmp_path)


def test_all_that_writes_an_index_takes_the_same_keywords() -> None:
    names = set(inspect.get_annotations(WorkKeywords))
    assert names | {"device", "devices"} == {f.name for f in fields(Work)}
    assert asdict(Work()).keys() == names | {"device", "devices"}
    for function in (build_index, append_rows, retire_rows, rebuild_ann, refit_index):
        assert inspect.signature(function).parameters["work_keywords"].kind is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="resumed"):
        retire_rows(GOLDEN / "index", [0], resumed=True)  # type: ignore[call-arg]
