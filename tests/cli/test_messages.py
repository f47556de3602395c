"""Mistakes at the command line and in Python: each ends in one line that says what was found and what to do."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pytest
from tiny import labels, sentences, write_jsonl

from forebear.cli.main import run
from forebear.errors import DataError, ModelError
from forebear.indexer.index import Index
from forebear.indexer.model.network.pretrained import trainer_checkpoints, trainer_rates
from forebear.indexer.rows.opening import open_rows, rows_from_texts
from forebear.indexer.training.model_choice import choose_model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write_jsonl(folder / "train.jsonl", text=sentences(20), label=labels(20))


@pytest.fixture(scope="module")
def trainer_output(tmp_path_factory, tiny_model):
    """What transformers' Trainer leaves: checkpoint folders, each with the log so far, and no model beside them."""
    folder = tmp_path_factory.mktemp("trainer") / "out"
    history = [{"step": 250 * (i + 1), "learning_rate": rate} for i, rate in enumerate((4e-5, 2e-5, 1e-5, 3e-5))]
    for step, seed in ((500, 0), (1000, 1)):
        shutil.copytree(tiny_model(seed=seed), folder / f"checkpoint-{step}")
        state = {"global_step": step, "log_history": [e for e in history if e["step"] <= step] + [{"eval_loss": 1.0}]}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "runs").mkdir()
    return folder


def said(capsys, args, code=2):
    assert run([str(arg) for arg in args]) == code
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line or "a bug in forebear" in line for line in lines)
    if code:
        assert sum(line.startswith("error:") for line in lines) == 1
    return " ".join(lines)


def test_a_trainers_output_folder_names_its_checkpoints(trainer_output, rows, tmp_path, capsys):
    args = ["index", "--train", rows, "--out", tmp_path / "I", "--model", trainer_output]
    message = said(capsys, args)
    assert "checkpoint-500, checkpoint-1000" in message
    assert f"--model {trainer_output}/checkpoint-1000" in message
    assert "--checkpoints all" in message
    message = said(capsys, [*args, "--checkpoints", "all"], 0)
    assert "eta 3e-05 2e-05" in message
    found = Index.open(tmp_path / "I").manifest.checkpoints
    assert [c.name for c in found] == ["checkpoint-500", "checkpoint-1000"]
    assert [c.eta for c in found] == pytest.approx([3e-5, 2e-5])


def test_eta_that_nobody_knows_is_said_to_be_one(trainer_output, tmp_path):
    copies = [shutil.copytree(path, tmp_path / path.name) for path in trainer_checkpoints(trainer_output)]
    assert trainer_rates(copies) == pytest.approx([3e-5, 2e-5])
    assert trainer_rates(copies[::-1]) is None
    (copies[1] / "trainer_state.json").unlink()
    chosen = choose_model(None, [str(path) for path in copies])
    assert [c.eta for c in chosen.checkpoints] == [1.0, 1.0]
    assert "each gets eta 1" in chosen.remark
    assert "etas=" in chosen.remark
    assert choose_model(None, [str(path) for path in copies], [0.1, 0.2]).remark is None
    assert choose_model(str(copies[0])).remark is None


def test_a_model_beside_a_trainers_checkpoints_is_remarked_on_where_it_is_not_the_last(
    trainer_output, tiny_model, tmp_path
):
    folder = shutil.copytree(trainer_output, tmp_path / "out")
    shutil.copytree(folder / "checkpoint-1000", folder, dirs_exist_ok=True)  # as save_model leaves it at the end
    assert "what is explained" not in choose_model(str(folder), ["all"]).remark
    shutil.copytree(tiny_model(seed=0), folder, dirs_exist_ok=True)  # as load_best_model_at_end does
    chosen = choose_model(str(folder), ["all"])
    assert chosen.remark.startswith("eta 3e-05 2e-05")
    assert "what is explained is the last one, checkpoint-1000" in chosen.remark
    assert [c.name for c in chosen.checkpoints] == ["checkpoint-500", "checkpoint-1000"]


def test_the_only_checkpoint_of_a_trainer_has_its_logged_rate_too(trainer_output, tmp_path):
    shutil.copytree(trainer_output / "checkpoint-500", tmp_path / "out" / "checkpoint-500")
    (chosen,) = choose_model(str(tmp_path / "out"), ["all"]).checkpoints
    assert chosen.eta == pytest.approx(3e-5)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_is_no_model_to_train_and_a_damaged_one_is_named(rows, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "config.json"):
        (tmp_path / "adapter" / name).write_text("{}")
        message = said(capsys, ["train", "--data", rows, "--out", tmp_path / "R", "--model", tmp_path / "adapter"])
        assert "PEFT adapter" in message
        assert "merge_and_unload" in message
        message = said(capsys, ["index", "--train", rows, "--out", tmp_path / "I", "--model", tmp_path / "adapter"])
        assert "adapter_config.json names no base model" in message


def test_quantised_weights_are_refused_before_they_are_read(rows, tmp_path, capsys, tiny_model):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")  # whoever read it would fail
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["index", "--train", rows], ["train", "--data", rows]):
        message = said(capsys, [*command, "--out", tmp_path / "O", "--model", folder])
        assert "quantised weights (quantization_config: bitsandbytes)" in message
        assert "dequantize" in message


@pytest.mark.parametrize("name", ["my-modle", "./my-modle", "models/my-modle"])
def test_a_typing_error_in_a_models_name_names_what_is_like_it(rows, tmp_path, capsys, monkeypatch, tiny_model, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "models/my-model"):
        shutil.copytree(tiny_model(), tmp_path / folder)
    message = said(capsys, ["index", "--train", rows, "--out", "I", "--model", name])
    assert "no such model folder" in message
    assert f"Did you mean {name.removeprefix('./').replace('modle', 'model')}?" in message
    assert "couldn't connect" not in message


def test_a_folder_of_models_is_told_from_a_model(tmp_path, tiny_model, rows, capsys):
    shutil.copytree(tiny_model(), tmp_path / "models" / "first")
    message = said(capsys, ["index", "--train", rows, "--out", tmp_path / "I", "--model", tmp_path / "models"])
    assert "Model folders in it: first" in message


def test_a_training_file_that_is_not_the_runs_is_remarked_on(tmp_path, rows, tiny_model, capsys):
    options = ["--epochs", "1", "--quiet", "--max-length", "20", "--precision", "fp32"]
    assert run(["train", "--data", str(rows), "--model", tiny_model(), "--out", str(tmp_path / "run"), *options]) == 0
    args = ["index", "--model", tmp_path / "run", "--damping", "none", "--train"]
    assert "not what the run was trained on" not in said(capsys, [*args, rows, "--out", tmp_path / "I"], 0)
    other = write_jsonl(tmp_path / "other.jsonl", text=sentences(21, seed=3), label=labels(21))
    message = said(capsys, [*args, other, "--out", tmp_path / "J"], 0)
    assert f"{other} (21 rows, sha256" in message
    assert f"not what the run was trained on, {rows} (20 rows, sha256" in message


def test_a_header_with_spaces_after_its_commas_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label , text\n good,a film\n bad,another\n")
    source = open_rows(path, need_labels=True)
    assert (source.text_columns, source.label_column) == ((" text",), "label ")
    assert open_rows(path, text_columns=["text"], label_column="Label").n_rows == 2


def test_tables_in_memory_are_opened():
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    wanted = rows_from_texts(columns["text"], columns["label"]).sha256()
    frame = pandas.DataFrame(columns)
    for table in (
        frame,
        frame.set_index(pandas.Index([5, 7, 9])),
        pa.table(columns),
        datasets.Dataset.from_dict(columns),
    ):
        source = open_rows(table, need_labels=True)
        assert source.sha256() == wanted
        assert source.name == f"the {type(table).__name__} given"
        assert [block.start for block in source.blocks(2)] == [0, 2]
    frame = pandas.DataFrame({"text": ["a", None], "label": [1, None]})
    assert open_rows(frame).label_values == (1,)
    with pytest.raises(DataError, match="row 1"):
        open_rows(frame).sha256()


class _Polars:
    """Offers its table as polars does: through Arrow's C stream alone."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


def test_frames_are_read_through_arrows_stream():
    table = pa.table({"text": pa.array(["a", "b"], pa.string_view()), "label": [0, 1]})
    source = open_rows(_Polars(table), need_labels=True)
    assert source.sha256() == rows_from_texts(["a", "b"], [0, 1]).sha256()
    assert source.remarks() == []


@pytest.mark.parametrize("given", [["a"], {"text": ["a"]}, None, 3])
def test_other_objects_are_refused_by_type_alone(given):
    with pytest.raises(DataError) as caught:
        open_rows(given)
    assert f"from a {type(given).__name__}" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_one_text_or_a_table_are_no_list_of_texts():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="one str"):
        rows_from_texts("a film")
    with pytest.raises(DataError, match="open_rows takes tables"):
        rows_from_texts(pa.table({"text": ["a"]}))
    with pytest.raises(DataError, match="splits train, test"):
        one = datasets.Dataset.from_dict({"text": ["a"]})
        open_rows(datasets.DatasetDict(train=one, test=one))


def test_a_file_in_place_of_a_model_is_refused(tmp_path, tiny_model):
    from forebear.indexer.model.loading import load_classifier

    with pytest.raises(ModelError, match="is a file"):
        load_classifier(tiny_model() + "/config.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, rows):
    """A folder as a newcomer has it: a model, training rows and an index."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_model(), folder / "model")
    shutil.copy(rows, folder / "train.jsonl")
    write_jsonl(folder / "names.jsonl", text=["a", "b"], label=["good", "bad"])
    args = ["--model", str(folder / "model"), "--train", str(rows), "--out", str(folder / "I"), "--damping", "none"]
    assert run(["index", *args, "--quiet"]) == 0
    return folder


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("index --model model --train trian.jsonl --out J", ["Did you mean train.jsonl?"]),
        ("index --model train.jsonl --train model --out J", ["is a model folder", "Are two options swapped?"]),
        ("retrieve --index I --test I", ["I is an index", "Are two options swapped?"]),
        (
            "index --model model --train train.jsonl --out J --checkpoints epoch-1",
            ["there is no checkpoint folder epoch-1", "run.json"],
        ),
        (
            "index --model model --train names.jsonl --out J",
            ["LABEL_0, LABEL_1, which say nothing", "--label-names, in the order"],
        ),
        ("retrieve --index I --text a --top five", ["'--top'", "an integer. See forebear retrieve --help."]),
        ("retrieve --index I --text a --devise cpu", ["--device", "See forebear retrieve --help."]),
        ("retreive --index I --text a", ["Did you mean 'retrieve'", "See forebear --help."]),
        ("audit hans --index I --test train.jsonl", ["'--out'", "See forebear audit hans --help."]),
        ("info --index I", ["--index", "Usage: forebear info [OPTIONS]"]),
    ],
)
def test_plausible_mistakes_are_told_what_to_do(place, command, parts, capsys, monkeypatch):
    monkeypatch.chdir(place)
    message = said(capsys, command.split())
    for part in parts:
        assert part in message
    assert not (place / "J").exists()


def test_label_names_that_are_not_used_are_said_not_to_be(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    args = ["index", "--model", "model", "--train", "train.jsonl", "--out", tmp_path / "J", "--damping", "none"]
    assert "The 3 label names are not used: the model has 2 classes" in said(
        capsys, [*args, "--label-names", "a,b,c"], 0
    )
    assert Index.open(tmp_path / "J").manifest.spec.label_names == ("LABEL_0", "LABEL_1")
