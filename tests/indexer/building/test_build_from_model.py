"""``Index.build``: the one call that builds an index from a model and rows, as ``forebear index`` does."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from interruptions import hashes
from tiny import labels, sentences

import forebear
from forebear.cli.main import run
from forebear.indexer.building.options import BuildOptions, Work
from forebear.indexer.storage.choices import BuildKeywords, WorkKeywords
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.run import read_run
from forebear.progress import Progress

TEXTS, OTHERS = sentences(30, seed=3), sentences(30, seed=4)
GOLD = labels(30, seed=5)


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that read two oddly named columns of short inputs, and its file."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "train.jsonl"
    rows = zip(TEXTS, OTHERS, GOLD, strict=True)
    data.write_text("".join(json.dumps({"sentence": a, "said": b, "label": y}) + "\n" for a, b, y in rows))
    command = ["train", "--data", str(data), "--model", tiny_model(), "--out", str(folder / "run"), "--epochs", "2"]
    assert run([*command, "--text-columns", "said,sentence", "--max-length", "11", "--quiet", "--device", "cpu"]) == 0
    return folder / "run", data


def test_a_run_says_what_the_command_takes_from_it(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The folders of the two are the same byte for byte, journal and manifest included."""
    model, data = trained
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    command = ["index", "--model", str(model), "--train", str(data), "--out", str(tmp_path / "a" / "i")]
    assert run([*command, "--checkpoints", "all", "--store", "features,words", "--quiet", "--device", "cpu"]) == 0
    index = forebear.Index.build(
        model, data, tmp_path / "b" / "i", checkpoints=["all"], stores=["features", "words"], device="cpu"
    )
    spec = index.manifest.spec
    assert (spec.text_columns, spec.max_length, len(index.manifest.checkpoints)) == (("said", "sentence"), 11, 2)
    assert hashes(tmp_path / "a" / "i") == hashes(tmp_path / "b" / "i")


def test_a_checkpoint_of_a_run_is_indexed_as_the_run_says(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Folder for folder the same as through the run, byte for byte: length, columns of texts, eta."""
    model, data = trained
    said: list[str | None] = []
    folders = [str(model / c.path) for c in read_run(model).checkpoints]  # type: ignore[union-attr]
    for name, through_run, by_folder in (
        ("one", {"model": model}, {"model": folders[-1]}),
        ("first", {"model": model, "checkpoints": ["epoch-1"]}, {"model": folders[0]}),
        ("both", {"model": model, "checkpoints": ["all"]}, {"model": None, "checkpoints": folders}),
        ("ended", {"model": model, "checkpoints": ["all"]}, {"model": folders[1], "checkpoints": folders[:1]}),
    ):
        indexes = []
        for number, chosen in enumerate((through_run, by_folder)):
            (tmp_path / f"{name}{number}").mkdir()
            out = tmp_path / f"{name}{number}" / "i"
            indexes.append(forebear.Index.build(rows=data, out=out, dampings=(), warn=said.append, **chosen))  # type: ignore[arg-type]
        assert hashes(indexes[0].folder) == hashes(indexes[1].folder), name
        assert indexes[1].manifest.spec.max_length == 11
    assert sum(f"lies in the run {model}" in (line or "") for line in said) == 4
    elsewhere = Path(shutil.copytree(folders[-1], tmp_path / "copy"))
    assert choose_model(str(elsewhere)).run is None
    assert choose_model(None, [folders[0], str(elsewhere)]).run is None


def test_what_is_given_wins_over_the_run(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these are not the rows that the run read
        index = forebear.Index.build(
            model, data, tmp_path / "i", text_columns=["sentence"], max_length=9, dampings=[], device="cpu"
        )
    assert index.manifest.spec.text_columns == ("sentence",)
    assert index.manifest.spec.max_length == 9
    assert index.manifest.spec.dampings == ()


@pytest.mark.parametrize("kind", ["texts", "source", "chosen"])
def test_rows_and_models_come_in_several_ways(kind: str, tiny_model: Callable[..., str], tmp_path: Path) -> None:
    source = forebear.rows_from_texts(TEXTS, GOLD)
    unheard: list[str | None] = []
    if kind == "texts":
        index = forebear.Index.build(tiny_model(), TEXTS, tmp_path / "i", GOLD, device="cpu", warn=unheard.append)
    elif kind == "source":
        index = forebear.Index.build(tiny_model(), source, tmp_path / "i", device="cpu", warn=unheard.append)
    else:
        chosen = forebear.choose_model(None, [tiny_model(seed=1), tiny_model()], [0.5, 0.25])
        index = forebear.Index.build(chosen, source, tmp_path / "i", device="cpu", warn=unheard.append)
        assert [c.eta for c in index.manifest.checkpoints] == [0.5, 0.25]
    assert index.manifest.n_rows == 30
    assert index.text_lists(index.live)[0] == TEXTS
    assert isinstance(index, forebear.Index)


def test_what_does_not_fit_is_refused(tiny_model: Callable[..., str], tmp_path: Path) -> None:
    build = forebear.Index.build
    with pytest.raises(forebear.InputError, match="texts without labels"):
        build(tiny_model(), TEXTS, tmp_path / "i")
    with pytest.raises(forebear.InputError, match="rows that have their own"):
        build(tiny_model(), forebear.rows_from_texts(TEXTS, GOLD), tmp_path / "i", GOLD)
    with pytest.raises(forebear.InputError, match="beside a model that choose_model has chosen"):
        build(forebear.choose_model(tiny_model()), TEXTS, tmp_path / "i", GOLD, etas=[1.0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'stroes'"):
        build(tiny_model(), TEXTS, tmp_path / "i", GOLD, stroes=["features"])  # type: ignore[call-arg]
    assert not (tmp_path / "i").exists()


def test_remarks_are_warnings_unless_someone_listens(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = trained
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    with pytest.warns(UserWarning, match="is not what the run was trained on"):
        forebear.Index.build(model, pairs, tmp_path / "a", GOLD, device="cpu")
    told: list[str | None] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forebear.Index.build(model, pairs, tmp_path / "b", GOLD, device="cpu", warn=told.append)
    assert any(line and "is not what the run was trained on" in line for line in told)


def test_its_keywords_are_the_fields_of_the_options() -> None:
    """Of the same types; where a field is a tuple, any sequence may be given."""
    fields_of_build: dict[str, Any] = get_type_hints(BuildOptions)
    keywords = get_type_hints(BuildKeywords)
    work = set(get_type_hints(WorkKeywords))
    assert set(keywords) - work == {field.name for field in fields(BuildOptions)}
    assert work == {field.name for field in fields(Work)} - {"device", "devices"}
    for name in set(keywords) - work:
        kind = fields_of_build[name]
        assert keywords[name] == (Sequence[get_args(kind)[0]] if get_origin(kind) is tuple else kind), name  # type: ignore[misc]
    assert keywords["progress"] == Progress | bool
