"""Where an index was computed is recorded and told; no change goes on half on one kind of device, half on another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import Interrupted, hashes, interrupt_at
from places import GOLDEN
from tiny import labels, sentences, write_jsonl

from forebear import Index, MismatchError, Retriever, explain
from forebear.cli.main import run
from forebear.indexer.building.build import BuildOptions, append_rows, build_index, refit_index, retire_rows
from forebear.indexer.model.device import arithmetic
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.storage.manifest import canonical_json
from forebear.indexer.training.model_choice import choose_model

TEXTS, LABELS = sentences(30, seed=31, low=3), labels(30, 2, seed=32)
OPTIONS = BuildOptions(
    scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=0, shard_rows=8,
)  # fmt: skip
GPU = "NVIDIA H200"
ON_CPU = {"device": "cpu", "attention": "chosen by torch", "precision": "fp32", "torch": torch.__version__}
Begin = Callable[..., Index]


def rows(start: int, stop: int) -> RowSource:
    return rows_from_texts(TEXTS[start:stop], LABELS[start:stop])


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model("bert", 2, 0)


@pytest.fixture(scope="module")
def built(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 20."""
    chosen = choose_model(None, [model]).checkpoints
    return build_index(rows(0, 20), tmp_path_factory.mktemp("devices") / "index", chosen, OPTIONS).folder


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have the CPU taken for another kind of device from then on."""
    return lambda: monkeypatch.setattr(arithmetic, "device_kind", lambda _device: GPU)


def builder(model: str) -> Begin:
    chosen = choose_model(None, [model]).checkpoints
    return lambda folder, **how: build_index(rows(0, 20), folder, chosen, OPTIONS, **how)


CHANGES: dict[str, Callable[[str], Begin]] = {
    "build": builder,
    "append": lambda _model: lambda folder, **how: append_rows(folder, rows(20, 30), **how),
    "refit": lambda _model: lambda folder, **how: refit_index(folder, **how),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("since", ["now", "before there were records"])
def test_a_change_goes_on_only_on_the_kind_of_device_that_it_was_begun_on(
    kind: str, since: str, model: str, index: Path, tmp_path: Path, on_gpu: Callable[[], None]
) -> None:
    change, undisturbed = CHANGES[kind](model), tmp_path / "undisturbed"
    if kind == "build":
        index = tmp_path / "new"
    else:
        if kind == "refit":
            retire_rows(index, [3])
        shutil.copytree(index, undisturbed)
    change(undisturbed)
    with pytest.raises(Interrupted):
        change(index, progress=interrupt_at(4))
    journal = json.loads((index / "build.json").read_text())
    assert journal["computed_on"] == ON_CPU
    if since != "now":
        del journal["computed_on"]
        (index / "build.json").write_bytes(canonical_json(journal))
    killed = Path(shutil.copytree(index, tmp_path / "killed"))
    change(index, resume=True)
    assert hashes(index) == hashes(undisturbed)
    on_gpu()
    before = hashes(killed)
    with pytest.raises(MismatchError) as refused:
        change(killed, resume=True)
    assert str(refused.value) == (
        f"{killed} was begun on cpu; this call runs on {GPU}, whose numbers have other last digits. Go on with "
        'device="cpu", or start over with force=True.'
    )
    assert refused.value.exit_code == 2
    assert hashes(killed) == before
    change(killed, force=True, warn=lambda _line: None)
    assert GPU in json.dumps(Index.open(killed).manifest.to_dict())


def test_an_index_records_where_it_was_built_and_info_says_so(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Index.open(built).manifest.computed_on == ON_CPU
    assert run(["info", str(built), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["computed_on"], facts["device"], facts["refitted_on"]) == (ON_CPU, "cpu", None)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["info", str(built)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"computed on cpu, fp32, torch {torch.__version__}, attention chosen by torch" in said
    assert "here models run on cpu unless --device names another; faiss" in said
    assert "CPU build, for searches on the CPU" in said


def test_rows_and_fits_of_another_kind_of_device_are_warned_of_and_recorded(
    index: Path, on_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str | None] = []
    append_rows(index, rows(20, 24), warn=told.append)
    assert not [line for line in told if line and "built on" in line]
    on_gpu()
    here = ON_CPU | {"device": GPU}
    append_rows(index, rows(24, 30), warn=told.append)
    (line,) = (line for line in told if line and "built on" in line)
    assert line.startswith("the index was built on cpu, and the rows of ")
    assert line.endswith(f" run on {GPU}: equal rows may differ in their last digits. The index records it.")
    manifest = Index.open(index).manifest
    assert [segment.computed_on for segment in manifest.segments] == [{}, {}, here]
    assert (manifest.device, manifest.computed_on) == ("cpu", ON_CPU)
    told.clear()
    refit_index(index, warn=told.append)
    assert [line for line in told if line] == [
        f"the index was built on cpu, and fits beyond the head are made on {GPU}: equal rows may differ in their last "
        "digits. The index records it."
    ]
    assert Index.open(index).manifest.fit["computed_on"] == here
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["info", str(index)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"computed on rows 24 to 29: {GPU}, fp32" in said
    assert f"computed on fits beyond the head: {GPU}, fp32" in said


def test_an_index_from_before_there_were_records_is_one_of_the_cpu(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "index", tmp_path / "index"))
    manifest = Index.open(folder).manifest
    assert (manifest.device, manifest.computed_on) == ("cpu", {})
    told: list[str | None] = []
    append_rows(folder, rows_from_texts(["a new row"], [1]), model=str(GOLDEN / "model"), warn=told.append)
    assert not any(line and "built on" in line for line in told)
    assert Index.open(folder).manifest.segments[-1].computed_on == {}


def test_answers_and_reports_say_where_they_were_computed(built: Path, tmp_path: Path) -> None:
    table = Retriever(built).retrieve([TEXTS[0]], methods=["gc"], top=2)
    assert json.loads(table.schema.metadata[b"forebear"])["computed_on"] == ON_CPU
    test = write_jsonl(tmp_path / "test.jsonl", text=list(TEXTS[:6]), label=list(LABELS[:6]))
    command: list[Any] = ["evaluate", "correlation", "--index", built, "--test", test, "--method", "gc,gd"]
    assert run([str(word) for word in [*command, "--out", tmp_path / "report", "--quiet"]]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    line = f"cpu, fp32, torch {torch.__version__}, attention chosen by torch"
    assert report["provenance"]["computed on"] == line
    assert explain(built, TEXTS[0], methods=["gc"]).provenance["computed on"] == line
