"""One whole use of the commands, on the device that is named: run on two devices, it must leave the same numbers.

Each step is a function of the folder and the device, so that one that goes wrong can be run alone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import labels, make_tiny_model, sentences, write_jsonl
from tiny_wordnet import write_wordnet

from forebear.cli.main import run
from forebear.retriever.question.methods import METHODS

N_ROWS, N_TESTS = 24, 3
SYNONYMS = {
    "noun": [("n1", ["film", "story", "scene"], []), ("n2", ["doctor", "lawyer"], [])],
    "verb": [("v1", ["saw", "thanked"], [])],
    "adj": [("a1", ["good", "bright"], [(1, "a2", 1)]), ("a2", ["bad", "dull"], []), ("a5", ["red", "blue"], [])],
    "adv": [("r1", ["near", "not"], [])],
}
SKETCHES = ("--sketch-dim", 8, "--sketch-bits", 64, "--white-bits", 64, "--calibrate", 3, "--shard-rows", 10)
LISSA = ("--lissa", "damping=0.01,scale=1e4,batch_rows=8,depth=2")
BY_WORDS = tuple(name for name, method in METHODS.items() if method.by_words or method.representation == "tfidf")
STORED = (
    *BY_WORDS,
    *(name for name, m in METHODS.items() if m.scope == "head" or m.representation in ("feature", "sentence")),
)
DEEP = tuple(name for name, m in METHODS.items() if name not in STORED and not m.by_model)
# The run itself can be asked on its own device alone, of the rows that it was trained on.
BY_MODEL = tuple(name for name, method in METHODS.items() if method.by_model and not method.through_run)


def command(*words: object) -> None:
    """Run a command of ``forebear``; it must succeed."""
    arguments = [str(word) for word in words] + ([] if words[0] in ("verify", "explain") else ["--quiet"])
    assert run(arguments) == 0, " ".join(arguments)


@contextlib.contextmanager
def trainer_on(device: str):
    """Let transformers' Trainer, which looks for devices by itself, take the pretended one, and save from it."""
    import accelerate
    import transformers

    from forebear.indexer.training import fine_tuning

    if device == "cpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "_pick_training_device", torch.device)
        for place in (transformers.TrainingArguments, accelerate.Accelerator):
            patch.setattr(place, "device", property(lambda _self: torch.device(device)))
        save = transformers.PreTrainedModel.save_pretrained

        def save_from_host(model: Any, *args: Any, **kwargs: Any) -> None:
            save(model, *args, state_dict={name: v.cpu() for name, v in model.state_dict().items()}, **kwargs)

        patch.setattr(transformers.PreTrainedModel, "save_pretrained", save_from_host)
        yield


def prepare(folder: Path) -> None:
    """Rows, a model to start from, a sentence encoder, WordNet: the same for every device."""
    for name, n, seed in (("train", N_ROWS, 0), ("more", 5, 7), ("test", N_TESTS, 3)):
        write_jsonl(folder / f"{name}.jsonl", text=sentences(n, seed=seed, low=4, high=8), label=labels(n, seed=seed))
    make_tiny_model(folder / "start", scale=3.0)
    make_tiny_model(folder / "sentences", seed=9)
    write_wordnet(folder / "wordnet", SYNONYMS, {})


def train(folder: Path, device: str) -> None:
    """Two epochs."""
    with trainer_on(device):
        command(
            "train", "--data", folder / "train.jsonl", "--model", folder / "start", "--out", folder / device / "run",
            "--epochs", 2, "--batch-size", 8, "--precision", "fp32", "--device", device,
        )  # fmt: skip


def index(folder: Path, device: str) -> None:
    """Every store, all kinds of scope, two checkpoints; then more rows, and rows taken out."""
    out = folder / device / "index"
    command(
        "index", "--model", folder / "cpu" / "run", "--train", folder / "train.jsonl", "--out", out,
        "--store", "features,sbert,words,spans", "--sentence-model", folder / "sentences", "--words-top", "0,3",
        "--spans", "clauses", "--scope", "head,top-1,all", *SKETCHES, "--device", device,
    )  # fmt: skip
    command("index", "--append", "--train", folder / "more.jsonl", "--out", out, "--device", device)
    command("index", "--retire", 2, "--out", out)
    command("verify", out, "--device", device)


def ask(folder: Path, device: str, name: str, *words: object) -> None:
    """Retrieve from the device's index into ``NAME.parquet``."""
    command(
        "retrieve", "--index", folder / device / "index", "--test", folder / "test.jsonl", "--top", 3,
        "--out", folder / device / f"{name}.parquet", "--device", device, *words,
    )  # fmt: skip


def retrieve(folder: Path, device: str) -> None:
    """Every method, at the head and beyond it, with every way to search."""
    ask(folder, device, "stored", "--method", ",".join(STORED))
    ask(folder, device, "head", "--method", ",".join((*DEEP, *BY_MODEL)))
    ask(folder, device, "all", "--method", ",".join((*DEEP, *BY_MODEL)), "--scope", "all")
    ask(folder, device, "layers", "--method", "gd,gc,tracin,if,rif", "--scope", "top-1", "--exact", "none")
    ask(folder, device, "full", "--method", "gc,rif", "--scope", "all", "--exact", "full")


def solve(folder: Path, device: str) -> None:
    """Every solver of H^-1, at the head and beyond it; proofs; sums over test rows."""
    for curvature in ("cg", "cg-hessian", "lissa"):
        few = () if curvature == "lissa" else ("--curvature-rows", 8, "--tolerance", 0.05)
        more = (*few, *(LISSA if curvature == "lissa" else ()), "--damping", 0.1)
        ask(folder, device, f"{curvature}-head", "--method", "if", "--curvature", curvature, *more)
        beyond = "if,rif" if curvature == "cg" else "if"  # rif solves for training rows as if does for test rows
        ask(folder, device, curvature, "--method", beyond, "--scope", "top-1", "--curvature", curvature, *more)
    steps = ("--astra", "steps=4,batch_rows=8")
    ask(folder, device, "astra", "--method", "if", "--scope", "top-1", "--curvature", "astra", *steps)
    ask(folder, device, "certified", "--method", "gd,rif", "--scope", "top-1", "--certify")
    ask(folder, device, "summed", "--method", "gd,if", "--scope", "all", "--aggregate")


def explain(folder: Path, device: str) -> None:
    """Saliency, spans and neighbours of one prediction; audits that compare rows with each other."""
    common = ("--index", folder / device / "index", "--device", device)
    command(
        "explain", *common, "--text", sentences(1, seed=5, low=6, high=7)[0], "--method", "if,gc,tracin-we",
        "--spans", "clauses", "--saliency-influence", "--scope", "top-1", "--html", folder / device / "page.html",
    )  # fmt: skip
    for audit in ("mislabelled", "duplicates"):
        command("audit", audit, *common, "--out", folder / device / audit)


def retrain(folder: Path, device: str) -> None:
    """Rows left out and words replaced, by every recipe."""
    common = ("--index", folder / device / "index", "--test", folder / "test.jsonl", "--device", device)
    with trainer_on(device):
        for recipe in ("head", "top-1", "full"):
            command(
                "evaluate", "removal", *common, "--method", "gd", "--remove", 2, "--sides", "top", "--queries", 1,
                "--seeds", 1, "--retrain", recipe, "--cache", folder / device / f"cache-{recipe}",
                "--out", folder / device / recipe,
            )  # fmt: skip
        command(
            "perturb", "attack", *common, "--wordnet", folder / "wordnet", "--queries", 2, "--rows", 1, "--seeds", 1,
            "--retrain", "top-1", "--cache", folder / device / "cache-attack", "--out", folder / device / "attack",
        )  # fmt: skip


STEPS: dict[str, Callable[[Path, str], None]] = {
    step.__name__: step for step in (train, index, retrieve, solve, explain, retrain)
}


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """The numbers that a file of results holds, in order, by what they are."""
    if path.suffix == ".parquet":
        table = pq.read_table(path).to_pandas()
        return {str(method): rows["score"].to_numpy(float) for method, rows in table.groupby("method")}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return {"": np.array(list(_leaves(json.loads(text))))}
    return {"": np.array([float(score.replace("−", "-")) for score in re.findall(r"score ([+−][\d.]+)", text)])}


def _leaves(found: Any) -> Iterator[float]:
    """The numbers of a JSON value."""
    if isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _leaves(value)
    elif isinstance(found, int | float):
        yield float(found)


def differences(first: Path, second: Path) -> dict[str, float]:
    """Largest difference of the numbers of each file of results, relative to the largest one, by file and method."""
    found: dict[str, float] = {}
    paths = [*first.glob("*.parquet"), *first.glob("*/result.json"), *first.glob("*.html")]
    for path in sorted(paths):
        a, b = (numbers_of(folder / path.relative_to(first)) for folder in (first, second))
        assert a.keys() == b.keys(), path
        for name, numbers in a.items():
            assert numbers.shape == b[name].shape, (path, name)
            size = max(float(np.abs(numbers).max()), 1e-30)
            found[f"{path.relative_to(first)} {name}"] = float(np.abs(numbers - b[name]).max()) / size
    return found
