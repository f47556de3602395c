"""Fine-tuning: schedule weights, checkpoints, freezing, determinism, refusals, and runs that break off."""

from __future__ import annotations

import json
import resource
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences

from forebear.errors import (
    DataError,
    ForebearError,
    InputError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    StorageError,
)
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY, IGNORED
from forebear.indexer.model.encoding import encode
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.training import fine_tuning as training
from forebear.indexer.training.course import Course
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.training.run import Run, read_run
from forebear.indexer.training.start import freeze_below

N_ROWS = 44  # with batches of 8: 6 steps an epoch, the last of 4 rows
NAMES = ("negative", "positive")
NLI = ("entailment", "neutral", "contradiction")


def tiny_rows(n: int = N_ROWS, seed: int = 0, names: tuple[str, ...] = NAMES) -> RowSource:
    return rows_from_texts(sentences(n, seed), labels(n, len(names), seed), label_names=names)


def tiny_options(**changes: object) -> TrainOptions:
    settings: dict[str, object] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"}
    return TrainOptions(**{**settings, "device": "cpu", **changes})  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in load_classifier(folder, device="cpu").model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def linear_rates(n_steps: int, n_warmup: int, peak: float) -> list[float]:
    """Hand computation of the rate with which each step is taken."""
    up = [peak * step / n_warmup for step in range(n_warmup)]
    return up + [peak * (n_steps - step) / (n_steps - n_warmup) for step in range(n_warmup, n_steps)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    out = tmp_path_factory.mktemp("reference") / "run"
    return out, train(tiny_rows(), str(model), out, tiny_options(epochs=3), dev=tiny_rows(30, seed=5))


def test_eta_is_the_mean_rate_since_the_previous_checkpoint(reference: tuple[Path, Run]) -> None:
    rates = linear_rates(n_steps=18, n_warmup=1, peak=1e-3)
    expected = [np.mean(rates[at : at + 6]) for at in (0, 6, 12)]
    assert [c.eta for c in reference[1].checkpoints] == pytest.approx(expected, rel=1e-12)
    assert [c.step for c in reference[1].checkpoints] == [6, 12, 18]


def test_a_run_of_transformers_own_trainer_has_the_rates_of_the_same_run_here(
    reference: tuple[Path, Run], model: Path, tmp_path: Path
) -> None:
    classifier = load_classifier(model, device="cpu")
    encoded = [
        {key: list(values) for key, values in row.items()} | {"labels": label}
        for row, label in zip(
            encode(classifier, [sentences(N_ROWS)]), (label % 2 for label in range(N_ROWS)), strict=True
        )
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-3,
        warmup_steps=1, logging_steps=1, save_strategy="epoch", use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    tokenizer = classifier.tokenizer
    trainer = transformers.Trainer(
        classifier.model,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=encoded,  # type: ignore[arg-type]
        processing_class=tokenizer,
    )
    trainer.train()
    chosen = choose_model(str(tmp_path / "out"), ["all"])
    assert [c.name for c in chosen.checkpoints] == ["checkpoint-6", "checkpoint-12", "checkpoint-18"]
    assert [c.eta for c in chosen.checkpoints] == pytest.approx([c.eta for c in reference[1].checkpoints], rel=1e-6)
    assert "trainer_state.json" in (chosen.remark or "")


def test_eta_without_warmup(model: Path, tmp_path: Path) -> None:
    run = train(tiny_rows(), str(model), tmp_path / "run", tiny_options(warmup_ratio=0.0))
    rates = linear_rates(n_steps=12, n_warmup=0, peak=1e-3)
    assert [c.eta for c in run.checkpoints] == pytest.approx([np.mean(rates[:6]), np.mean(rates[6:])], rel=1e-12)
    assert [c.accuracy for c in run.checkpoints] == [None, None]


def test_a_single_step_is_taken_at_the_full_rate(model: Path, tmp_path: Path) -> None:
    run = train(tiny_rows(6), str(model), tmp_path / "run", tiny_options(epochs=1))
    assert run.checkpoints[0].eta == 1e-3


def test_checkpoints_load_and_give_the_recorded_accuracy(reference: tuple[Path, Run]) -> None:
    out, run = reference
    dev = next(tiny_rows(30, seed=5).blocks(100))
    for checkpoint in run.checkpoints:
        classifier = load_classifier(out / checkpoint.path, device="cpu")
        assert classifier.label_names == NAMES
        predictions = run_forward(classifier, dev.texts).predictions
        assert checkpoint.accuracy == np.mean(predictions == np.array(dev.labels))


@pytest.mark.slow
def test_training_learns_what_can_be_learned(model: Path, tmp_path: Path) -> None:
    texts = [f"{word} film" for word in ("good", "bad", "happy", "sad")] * 8
    source = rows_from_texts(texts, ["positive", "negative"] * 16)
    run = train(source, str(model), tmp_path / "run", tiny_options(epochs=12, learning_rate=5e-3), dev=source)
    assert run.label_names == NAMES
    assert run.checkpoints[-1].accuracy == 1.0
    assert run.checkpoints[-1].train_loss < run.checkpoints[0].train_loss / 2


def test_a_run_folder_holds_the_record_and_no_optimizer_state(reference: tuple[Path, Run], model: Path) -> None:
    out, run = reference
    assert read_run(out) == run
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "run.json"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["epoch-1", "epoch-2", "epoch-3"]
    stored = {path.name for path in (out / "checkpoints" / "epoch-1").iterdir()}
    assert stored <= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert run.data_sha256 == tiny_rows().sha256()
    assert (run.base_model, run.text_columns, run.max_length) == (str(model), ("text",), 40)
    assert run.settings["n_steps"] == 18 and run.settings["precision"] == "fp32" and run.settings["seed"] == 0
    dev = {"data": "the rows given", "sha256": tiny_rows(30, seed=5).sha256(), "n_rows": 30, "warning": None}
    assert run.settings["dev"] == dev
    assert run.libraries["torch"] == version("torch")
    chosen = choose_model(str(out), ["all"])
    assert [c.eta for c in chosen.checkpoints] == [c.eta for c in run.checkpoints]
    assert chosen.max_length == 40


def test_progress_counts_every_step_and_row(model: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    dev = tiny_rows(10)
    train(
        tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=1), dev=dev, progress=lambda *s: told.append(s)
    )
    assert told[0] == ("reading rows", N_ROWS, N_ROWS)
    assert told[1:] == [("training", step, 6) for step in range(1, 7)] + [("evaluating", 10, 10)]


def test_training_says_nothing(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    train(tiny_rows(), str(model), tmp_path / "run", tiny_options())
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_same_seed_same_bytes(reference: tuple[Path, Run], model: Path, tmp_path: Path) -> None:
    out, run = reference
    torch.rand(3)  # the state of the caller's generator does not matter, nor does evaluating on dev
    again = train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=3))
    for ours, theirs in zip(run.checkpoints, again.checkpoints, strict=True):
        name = "model.safetensors"
        assert (out / ours.path / name).read_bytes() == (tmp_path / "run" / theirs.path / name).read_bytes()
        assert (ours.eta, ours.train_loss) == (theirs.eta, theirs.train_loss)


def test_another_seed_other_weights(reference: tuple[Path, Run], model: Path, tmp_path: Path) -> None:
    train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=3, seed=1))
    ours, theirs = (tensors(out / "checkpoints" / "epoch-3") for out in (reference[0], tmp_path / "run"))
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours if key.endswith("weight"))


@pytest.mark.slow
def test_bf16_and_fp32_follow_each_other_in_one_process(model: Path, tmp_path: Path) -> None:
    for precision in ("bf16", "fp32", "bf16"):
        run = train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=1, precision=precision), force=True)
        assert run.settings["precision"] == precision
        assert {value.dtype for value in tensors(tmp_path / "run" / run.checkpoints[0].path).values()} == {
            torch.float32
        }


def test_freezing_keeps_frozen_weights_and_changes_all_others(model: Path, tmp_path: Path) -> None:
    train(tiny_rows(), str(model), tmp_path / "run", tiny_options(freeze_below=1))
    before, after = tensors(model), tensors(tmp_path / "run" / "checkpoints" / "epoch-2")
    frozen = {key for key in before if key.startswith(("bert.embeddings", "bert.encoder.layer.0."))}
    assert 0 < len(frozen) < len(before)
    for key in before:
        if "attention.self.key.bias" in key:  # its gradient is zero but for rounding
            continue
        assert torch.equal(before[key], after[key]) == (key in frozen), key


@pytest.mark.parametrize(
    ("kind", "frozen", "free"),
    [
        ("roberta", "roberta.encoder.layer.1.", "classifier.dense"),
        ("distilbert", "distilbert.transformer.layer.1.", "pre_classifier"),
        ("electra", "electra.encoder.layer.1.", "classifier.dense"),
    ],
)
def test_freezing_finds_the_layers_of_other_encoders(kind: str, frozen: str, free: str, tmp_path: Path) -> None:
    network = load_classifier(make_tiny_model(tmp_path / kind, kind), device="cpu").model
    freeze_below(network, 2)
    wanted = {key: not key.startswith(f"{kind}.") for key, _ in network.named_parameters()}
    assert {key: p.requires_grad for key, p in network.named_parameters()} == wanted
    freeze_below(network, 1)
    state = {key: p.requires_grad for key, p in network.named_parameters()}
    assert all(value for key, value in state.items() if key.startswith((frozen, free)))
    assert not any(value for key, value in state.items() if ".layer.0." in key or "embeddings" in key)


def test_shared_layers_cannot_be_frozen() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ModelError, match=r"runs 3 layers with the weights of 1 \(shared\)"):
        freeze_below(AlbertForSequenceClassification(config), 1)


@pytest.mark.parametrize("k", [-1, 3])
def test_freezing_out_of_range_is_refused(model: Path, tmp_path: Path, k: int) -> None:
    with pytest.raises(InputError, match=rf"freeze_below={k}: .* has 2 encoder layers; expected 0 to 2"):
        train(tiny_rows(), str(model), tmp_path / "run", tiny_options(freeze_below=k))
    assert not (tmp_path / "run").exists()


def test_a_head_with_the_same_names_is_kept_in_its_own_order(reference: tuple[Path, Run], tmp_path: Path) -> None:
    start = reference[0] / "checkpoints" / "epoch-3"
    rows = next(tiny_rows().blocks(N_ROWS))
    turned = rows_from_texts(rows.texts[0], [1 - int(label) for label in rows.labels or []], label_names=NAMES[::-1])
    outs = [tmp_path / "straight", tmp_path / "turned"]
    runs = [
        train(source, str(start), out, tiny_options()) for source, out in zip([tiny_rows(), turned], outs, strict=True)
    ]
    assert [run.settings["head"] for run in runs] == ["kept", "kept"]
    assert [run.label_names for run in runs] == [NAMES, NAMES]
    assert runs[0].settings["start_sha256"] == load_classifier(start, device="cpu").sha256
    assert_same(*(tensors(out / "checkpoints" / "epoch-2") for out in outs))


def test_other_names_get_a_new_head(reference: tuple[Path, Run], model: Path, tmp_path: Path) -> None:
    assert reference[1].settings["head"] == "new"  # its model's labels are LABEL_0 and LABEL_1
    start = reference[0] / "checkpoints" / "epoch-3"
    options = tiny_options(epochs=1, learning_rate=1e-30)
    heads = []
    for name, names in [("two", ("no", "yes")), ("same", ("false", "true")), ("three", NLI)]:
        run = train(tiny_rows(names=names), str(start), tmp_path / name, options)
        assert run.settings["head"] == "new" and run.label_names == names
        heads.append(tensors(tmp_path / name / "checkpoints" / "epoch-1")["classifier.weight"])
    old = tensors(start)["classifier.weight"]
    assert not torch.isclose(heads[0], old).any()
    assert torch.equal(heads[0], heads[1]) and heads[2].shape == (3, 16)


def test_a_base_model_without_head_or_pooler_gets_both(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = make_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        run = train(tiny_rows(), str(tmp_path / "bare"), out, tiny_options(epochs=1))
        torch.rand(5)
    assert run.settings["head"] == "new"
    assert_same(*(tensors(out / "checkpoints" / "epoch-1") for out in outs))


def test_a_folder_without_encoder_weights_is_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path / "holed")
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1.output" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"stores no weights for bert\.encoder\.layer\.1\.output.*random encoder"):
        train(tiny_rows(), str(folder), tmp_path / "run", tiny_options())


def test_binary_nli_merges_classes_and_maps_dev_by_name(model: Path, tmp_path: Path) -> None:
    n = 36
    pairs = list(zip(sentences(n, 2), sentences(n, 3), strict=True))
    source = rows_from_texts(pairs, labels(n, 3), label_names=NLI)
    hans = rows_from_texts(
        pairs, [min(label, 1) for label in labels(n, 3)], label_names=("entailment", "non-entailment")
    )
    outs = [tmp_path / "three", tmp_path / "two"]
    options = tiny_options(label_mode="binary-nli")
    runs = [train(rows, str(model), out, options, dev=hans) for rows, out in zip([source, hans], outs, strict=True)]
    assert runs[0].label_names == ("entailment", "non-entailment") and runs[0].label_mode == "binary-nli"
    assert runs[0].text_columns == ("premise", "hypothesis")
    assert choose_model(str(outs[0])).label_mode == "binary-nli"
    assert_same(*(tensors(out / "checkpoints" / "epoch-2") for out in outs))
    assert [c.accuracy for c in runs[0].checkpoints] == [c.accuracy for c in runs[1].checkpoints]


def test_one_class_is_refused(model: Path, tmp_path: Path) -> None:
    texts = sentences(9)
    with pytest.raises(DataError, match=r"every row of the rows given is negative"):
        train(rows_from_texts(texts, [0] * 9, label_names=NAMES), str(model), tmp_path / "run", tiny_options())
    with pytest.raises(DataError, match=r"has one class, fine"):
        train(rows_from_texts(texts, ["fine"] * 9), str(model), tmp_path / "run", tiny_options())
    with pytest.raises(DataError, match=r"has no labels"):
        train(rows_from_texts(texts), str(model), tmp_path / "run", tiny_options())
    assert not (tmp_path / "run").exists()


def test_dev_rows_that_do_not_fit_are_refused_before_training(model: Path, tmp_path: Path) -> None:
    pairs = rows_from_texts([("a film", "a story")] * 4, [0, 1, 0, 1], label_names=NAMES)
    foreign = rows_from_texts(sentences(4), ["cold", "warm", "cold", "warm"])
    unlabelled = rows_from_texts(sentences(4), [0, 1, -1, 0], label_names=NAMES)
    for dev, message in [(pairs, "premise, hypothesis"), (foreign, "cold"), (unlabelled, r"row 2 .*no label")]:
        with pytest.raises(DataError, match=message):
            train(tiny_rows(), str(model), tmp_path / "run", tiny_options(), dev=dev)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"batch_size": 0},
        {"weight_decay": -1.0},
        {"warmup_ratio": 1.0},
        {"precision": "fp16"},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(changes))}=.*: expected"):
        tiny_options(**changes)


def test_inputs_longer_than_the_model_takes_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_length=41 is out of range"):
        train(tiny_rows(), str(model), tmp_path / "run", tiny_options(max_length=41))
    assert train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=1, max_length=5)).max_length == 5


def test_precision_auto_is_bf16_only_where_it_is_native() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    native = "amx_bf16" in flags or "avx512_bf16" in flags or "bf16" in flags
    assert training._pick_precision("auto", torch.device("cpu")) == ("bf16" if native else "fp32")
    assert training._pick_precision("fp32", torch.device("cpu")) == "fp32"


def test_an_output_is_replaced_only_by_force_and_only_if_it_is_a_run(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = tiny_options(epochs=2)
    train(tiny_rows(), str(model), out, options)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints" / "best").mkdir()
    before = (out / "run.json").read_bytes()
    with pytest.raises(OutputExistsError, match=r"holds a training run.*force=True"):
        train(tiny_rows(), str(model), out, options)
    assert (out / "run.json").read_bytes() == before
    train(tiny_rows(), str(model), out, tiny_options(epochs=1), force=True)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "notes.txt", "run.json"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best", "epoch-1"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(model: Path, tmp_path: Path, force: bool) -> None:
    other, foreign, checkpoints, file = (tmp_path / name for name in ("other", "foreign", "theirs", "file"))
    for folder, name in [(other, "thesis.txt"), (foreign, "run.json"), (checkpoints, "checkpoints/epoch=3.ckpt")]:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps({"mine": 1}))
    file.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for folder, message in [
        (other, "thesis.txt"),
        (foreign, "run.json"),
        (checkpoints, "checkpoints"),
        (file, "is a file"),
    ]:
        with pytest.raises(OutputExistsError, match=message):
            train(tiny_rows(), str(model), folder, tiny_options(), force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_leaves_the_earlier_run_alone(model: Path, tmp_path: Path) -> None:
    train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes in ({"freeze_below": 9}, {"max_length": 1000}, {"label_mode": "binary-nli"}):
        with pytest.raises(InputError):
            train(tiny_rows(), str(model), tmp_path / "run", tiny_options(**changes), force=True)
    with pytest.raises(ModelError):
        train(tiny_rows(), str(tmp_path), tmp_path / "run", tiny_options(), force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_an_interrupted_run_leaves_no_record_and_force_starts_afresh(
    reference: tuple[Path, Run], model: Path, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "training" and done == 8:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    options = tiny_options(epochs=3)
    train(tiny_rows(), str(model), out, tiny_options(epochs=1, seed=7))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_rows(), str(model), out, options, force=True, progress=interrupt)
    assert sorted(path.name for path in out.rglob("*") if path.is_dir()) == ["checkpoints", "epoch-1"]
    assert read_run(out) is None
    (out / "checkpoints" / "epoch-2.partial").mkdir()  # as a power cut leaves it
    (out / "run.json.partial").write_text("{")
    with pytest.raises(OutputExistsError, match=r"holds an unfinished training run"):
        train(tiny_rows(), str(model), out, options)
    train(tiny_rows(), str(model), out, options, force=True)
    assert list(out.rglob("*.partial")) == []
    assert_same(*(tensors(folder / "checkpoints" / "epoch-3") for folder in (out, reference[0])))


def test_a_loss_that_is_not_finite_stops_with_its_step(model: Path, tmp_path: Path) -> None:
    options = tiny_options(epochs=3, learning_rate=1e38, warmup_ratio=0.0, weight_decay=0.0)
    with pytest.raises(NonFiniteError, match=r"training loss is (nan|inf) at step \d+ of 18.*Lower learning_rate="):
        train(tiny_rows(), str(model), tmp_path / "run", options)
    assert not (tmp_path / "run" / "run.json").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_weights_that_are_not_finite_are_not_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(course: Course) -> None:
        if course._step == 5:  # the last of the epoch: no later loss would show it
            course.classifier.head.weight.data[0, 0] = float("nan")
        after_step(course)

    after_step = Course.end_step
    monkeypatch.setattr(Course, "end_step", spoil)
    with pytest.raises(NonFiniteError, match=r"after step 6: tensor classifier\.weight"):
        train(tiny_rows(), str(model), tmp_path / "run", tiny_options())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_half_written(model: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(stage: str, done: int, _total: int) -> None:
        if stage == "training" and done == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(StorageError, match=r"^cannot write .*epoch-2: .+\. The run is unfinished; .*$") as caught:
            train(tiny_rows(), str(model), tmp_path / "run", tiny_options(epochs=3), progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-1"]
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_output_that_cannot_be_made_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ForebearError, match=r"cannot write .*file/run: Not a directory"):
        train(tiny_rows(), str(model), tmp_path / "file" / "run", tiny_options())


def test_ignored_rows_weigh_nothing_in_the_loss_of_a_step() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = CROSS_ENTROPY.mean(logits, torch.tensor([2, IGNORED, 0, IGNORED]))
    kept = logits.detach()[[0, 2]]
    assert loss.item() == pytest.approx((kept.logsumexp(1) - kept[[0, 1], [2, 0]]).mean().item())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[[1, 3]] == 0).all()
    nothing = CROSS_ENTROPY.mean(logits, torch.full((4,), IGNORED))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()
