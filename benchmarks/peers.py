"""One question put to captum's TracInCP, to bergson and to forebear: which rows' loss gradients have a large dot?

SST-2, MiniLM, the weights of all linear layers, one checkpoint of weight 1: the loss of the predicted label for
queries (development rows), of the gold label for training rows. Every score is held against ``exact_dots`` over
``whole_gradients``. A peer that is not installed is left out, with the reason in the result.

Wall seconds. The passes (``sketch_pass_seconds``, ``collection_seconds``) exclude loading the model;
``index_build_seconds`` includes it and everything that is fitted. ``sketches_only`` is forebear's counterpart of
bergson's projected dots: neither is exact.

captum is a development dependency. bergson has requirements of its own, so it lives in an environment of its own; it
names torchvision and torchaudio but imports neither, hence the second line:

    python -m venv runs/bench/peers-venv && runs/bench/peers-venv/bin/pip install torch==2.13.0 accelerate datasets \
        jaxtyping ml_dtypes natsort scipy peft petname pyarrow pyyaml simple-parsing torchopt transformers bitsandbytes
    runs/bench/peers-venv/bin/pip install --no-deps bergson

That environment lacks forebear: this file runs there a second time, with a folder to exchange numbers in, so it imports
forebear, captum and bergson where they are used.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, ROOT, seconds, write_result

SCOPE = "all"
BATCH_TOKENS = 4096
CANDIDATES = 20
TOP = 10
CAPTUM_WAYS = {"batch_1": (1, False), "batch_16": (16, False), "sample_wise_batch_16": (16, True)}
MODEL = ROOT / "runs" / "bench" / "sst2" / "checkpoints" / "epoch-3"
PEERS_PYTHON = ROOT / "runs" / "bench" / "peers-venv" / "bin" / "python"
PROJECTION = 16  # bergson's two-sided projection, 16 x 16 numbers a layer
SHIPPED_ROWS = 8  # rows for `bergson build` on the classifier
WHOLE_ROWS = 4  # rows whose gradients bergson collects unprojected, 42 MB each
BERGSON_LIMIT_SECONDS = 3600


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of one call, and its result; for calls that take too long to repeat."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def attempt(run: Callable[..., Any], *args: Any, **choices: Any) -> Any:
    """The result of a peer's call, or what it raised: with another version of the peer that is the finding."""
    try:
        return run(*args, **choices)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:400]}


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest error of scores ``(q, n)``, relative to the query's largest exact score; the worst query's."""
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())


def agreement(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Scores ``(q, n)`` against exact ones; the figure of the worst query."""
    from scipy.stats import spearmanr

    ranks = [spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)]
    k = min(TOP, exact.shape[1])
    top = [len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k for a, b in zip(found, exact, strict=True)]
    return {
        "spearman": float(min(ranks)),
        "max_relative_error": relative_error(found, exact),
        "recall_at_10": float(min(top)),
    }


def texts_and_labels(n_rows: int, n_queries: int) -> tuple[list[str], np.ndarray, list[str]]:
    """The first training rows with their gold labels, and the first development rows."""
    from forebear import open_rows

    block = next(open_rows(DATA / "sst2" / "train.parquet", need_labels=True).blocks(n_rows))
    queries = next(open_rows(DATA / "sst2" / "dev.parquet").blocks(n_queries)).texts[0]
    return list(block.texts[0]), np.array(block.labels).astype(np.int64), list(queries)


# forebear


def forebear_exact(texts: list[str], labels: np.ndarray, queries: list[str], n_gram: int) -> dict[str, Any]:
    """What the others are held against: exact dots ``(q, n)``, predicted labels, dots among the first rows ``(g, g)``.

    ``gram`` is multiplied in float64, ``gram_by_exact_dots`` as forebear does it: in fp32 within a block, for that many
    queries.
    """
    from forebear.indexer.gradients.whole import exact_dots, whole_gradients
    from forebear.indexer.model.forward import run_forward
    from forebear.indexer.model.loading import load_classifier
    from forebear.indexer.model.scopes import scope_of

    classifier = load_classifier(MODEL)
    scope = scope_of(classifier, SCOPE)
    targets = run_forward(classifier, [queries]).predictions

    vectors = whole_gradients(classifier, scope, [queries], targets)
    some, gold = texts[:n_gram], labels[:n_gram]
    whole = whole_gradients(classifier, scope, [some], gold)
    gram = sum((g.flatten(1).double() @ g.flatten(1).double().T).numpy() for g in whole.values())
    return {
        "layers": [block.name for block in scope.blocks],
        "weights": scope.size,
        "targets": targets,
        "dots": exact_dots(classifier, scope, vectors, [texts], labels),
        "gram": gram,
        "gram_by_exact_dots": exact_dots(classifier, scope, whole, [some], gold),
    }


def forebear_case(texts: list[str], labels: np.ndarray, queries: list[str], exact: np.ndarray) -> dict[str, Any]:
    """The index of the rows, its sketching pass alone, and a query by candidates and in full."""
    from forebear import BuildOptions, Retriever, build_index, choose_model, rows_from_texts
    from forebear.indexer.sketches.fitting import open_sketchers
    from forebear.indexer.sketches.sketch import sketch_rows

    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions(
            scopes=("head", SCOPE), curvature="none", dampings=(), calibration_queries=0, batch_tokens=BATCH_TOKENS
        )
        source = rows_from_texts(texts, labels.tolist(), label_names=("negative", "positive"))
        chosen = choose_model(str(MODEL)).checkpoints
        build_seconds, index = timed(lambda: build_index(source, Path(scratch) / "index", chosen, options))
        retriever = Retriever(index)
        classifier, spec = retriever.classifier(), index.manifest.spec
        name = index.manifest.checkpoints[-1].name
        sketchers = list(open_sketchers(index.folder, classifier, spec, SCOPE, name, last=True).values())
        sketch_rows_seconds = seconds(
            lambda: sketch_rows(classifier, sketchers, [texts], labels, batch_tokens=BATCH_TOKENS), 3
        )
        ask = {"methods": ["gd"], "scope": SCOPE, "top": min(TOP, len(texts))}
        ways = {
            "sketches_only": {"exact": "none"},
            f"candidates_{CANDIDATES}": {"candidates": CANDIDATES},
            "exact_full": {"exact": "full"},
        }
        found: dict[str, Any] = {
            "index_build_seconds": build_seconds,
            "sketch_pass_seconds": sketch_rows_seconds,
            "stored_coordinates": int(sketchers[0].reduction.basis.shape[0]),
            "stored_bits": sketchers[0].reduction.bits,
        }
        for way, choices in ways.items():
            table = retriever.retrieve(queries, **ask, **choices).to_pandas()
            found[way] = {
                "one_query_seconds": seconds(lambda c=choices: retriever.retrieve(queries[:1], **ask, **c), 3),
                "seconds_a_query_together": seconds(lambda c=choices: retriever.retrieve(queries, **ask, **c), 3)
                / len(queries),
                **answer_agreement(table, exact),
            }
        return found


def answer_agreement(table: Any, exact: np.ndarray) -> dict[str, float]:
    """Lists of results against exact scores: recall of both ends, error of the scores listed; the worst query."""
    recalls, errors = [], []
    for (query, side), rows in table.groupby(["query", "side"]):
        sign = 1.0 if str(side).startswith("pro") else -1.0
        best = set(np.argsort(-sign * exact[query])[: len(rows)])
        recalls.append(len(best & set(rows["row"])) / len(rows))
        scores = exact[query, rows["row"].to_numpy()]
        errors.append(np.abs(rows["score"].to_numpy() - scores).max() / np.abs(exact[query]).max())
    return {"recall_at_10": float(min(recalls)), "max_relative_error": float(max(errors))}


# captum


class Logits(torch.nn.Module):
    """captum calls models as ``model(*batch[:-1])``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


def captum_case(texts: list[str], labels: np.ndarray, queries: list[str], exact: dict[str, Any]) -> dict[str, Any]:
    """TracInCP at one checkpoint of weight 1; each way of batching on its own."""
    if importlib.util.find_spec("captum") is None:
        return {"skipped": "captum is not installed in this environment (it is one of the dev dependencies)"}
    import captum

    from forebear.indexer.model.encoding import encode
    from forebear.indexer.model.loading import load_classifier

    classifier = load_classifier(MODEL)
    for name in exact["layers"]:
        linear = classifier.model.get_submodule(name)
        bias = linear._parameters.pop("bias").detach()
        linear.register_buffer("bias", bias)  # captum takes every parameter of a layer
    model = Logits(classifier.model).eval()
    rows, asked = encode(classifier, [texts]), encode(classifier, [queries])
    found: dict[str, Any] = {"version": captum.__version__}
    for way, (batch_size, sample_wise) in CAPTUM_WAYS.items():
        found[way] = attempt(captum_way, model, classifier, exact, (rows, labels), asked, batch_size, sample_wise)
    return found


def captum_way(
    model: torch.nn.Module,
    classifier: Any,
    exact: dict[str, Any],
    rows: tuple[list[dict[str, list[int]]], np.ndarray],
    asked: list[dict[str, list[int]]],
    batch_size: int,
    sample_wise: bool,
) -> dict[str, Any]:
    """Time and agreement of one setting; rows are sorted by length, so that little of a batch is padding."""
    from captum.influence import TracInCP

    from forebear.indexer.model.network.batches import pad_batch

    encoded, labels = rows
    order = np.argsort([-len(row["input_ids"]) for row in encoded], kind="stable")

    def collate(pairs: list[tuple[dict[str, list[int]], int]]) -> tuple[torch.Tensor, ...]:
        batch = pad_batch(classifier.tokenizer, [row for row, _ in pairs], classifier.device)
        return batch["input_ids"], batch["attention_mask"], torch.tensor([int(label) for _, label in pairs])

    data = [(encoded[i], labels[i]) for i in order]
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, collate_fn=collate)
    tracin = TracInCP(
        model, loader, [str(MODEL)], lambda _model, _path: 1.0,
        layers=[f"model.{name}" for name in exact["layers"]], batch_size=batch_size,
        loss_fn=torch.nn.CrossEntropyLoss(reduction="sum" if sample_wise else "none"),
        sample_wise_grads_per_batch=sample_wise,
    )  # fmt: skip
    queries = list(zip(asked, exact["targets"], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # word pieces have no gradient
        one_seconds, _ = timed(lambda: tracin.influence(collate(queries[:1])))
        all_seconds, scores = timed(lambda: tracin.influence(collate(queries)))
    back = np.empty((len(queries), len(order)))
    back[:, order] = scores.detach().numpy()
    return {
        "one_query_seconds": one_seconds,
        "seconds_a_query_together": all_seconds / len(queries),
        **agreement(back, exact["dots"]),
    }


# bergson, from outside


def bergson_case(texts: list[str], labels: np.ndarray, queries: list[str], exact: dict[str, Any]) -> dict[str, Any]:
    """Run this file in bergson's environment and compare what it collected."""
    if not PEERS_PYTHON.is_file():
        return {"skipped": f"no environment with bergson at {PEERS_PYTHON.relative_to(ROOT)} (see benchmarks/peers.py)"}
    there = subprocess.run([PEERS_PYTHON, "-c", "import bergson"], capture_output=True, text=True, check=False)
    if there.returncode:
        return {"skipped": f"bergson cannot be imported: {there.stderr.strip().splitlines()[-1]}"}
    from forebear.indexer.model.encoding import encode
    from forebear.indexer.model.loading import load_classifier

    classifier = load_classifier(MODEL)
    sets = {"rows": (texts, labels), "queries": (queries, exact["targets"])}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        content: dict[str, Any] = {"layers": exact["layers"]}
        for name, (some, classes) in sets.items():
            ids = [row["input_ids"] for row in encode(classifier, [some])]
            content[name] = {"input_ids": ids, "length": [len(i) for i in ids], "label": classes.tolist()}
        (folder / "question.json").write_text(json.dumps(content))
        ran = subprocess.run(
            [PEERS_PYTHON, __file__, "--bergson", folder],
            capture_output=True, text=True, check=False, timeout=BERGSON_LIMIT_SECONDS,
        )  # fmt: skip
        if ran.returncode or not (folder / "answer.json").is_file():
            return {"failed": ran.stderr[-800:]}
        found: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        if "failed" not in found["with_our_loss"]:
            arrays = np.load(folder / "scores.npz")
            found["with_our_loss"] |= agreement(arrays["scores"], exact["dots"])
            found["with_our_loss"]["gram_max_relative_error"] = relative_error(arrays["gram"], exact["gram"])
        return found


# bergson, inside its environment


def bergson_worker(folder: Path) -> None:
    """What bergson does with the classifier as it comes, and what its hooks do when the loss is ours."""
    import bergson

    question = json.loads((folder / "question.json").read_text())
    found: dict[str, Any] = {
        "version": bergson.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "build_command": shipped_build(folder, question["rows"]),
        "python_call_on_the_classifier": shipped_call(folder, question["rows"]),
    }
    found["with_our_loss"] = attempt(collect, folder, question)
    (folder / "answer.json").write_text(json.dumps(found))


def first(rows: dict[str, list[Any]], n: int) -> dict[str, list[Any]]:
    """The first rows of a set."""
    return {name: column[:n] for name, column in rows.items()}


def shipped_build(folder: Path, rows: dict[str, list[Any]]) -> dict[str, Any]:
    """``bergson build`` on the classifier, thrice: with gold labels, with all labels flipped, and with another seed.

    ``--debug`` fixes bergson's seeds, so the first two differ by the labels alone; the third leaves them free.
    """
    from datasets import Dataset, load_from_disk

    flipped = [1 - label for label in first(rows, SHIPPED_ROWS)["label"]]
    runs: dict[str, tuple[list[int], list[str]]] = {
        "gold": (rows["label"][:SHIPPED_ROWS], ["--debug"]),
        "flipped": (flipped, ["--debug"]),
        "unseeded": (rows["label"][:SHIPPED_ROWS], []),
    }
    gradients, losses, said = {}, {}, ""
    for name, (labels, extra) in runs.items():
        data, out = folder / f"{name}-data", folder / f"{name}-index"
        Dataset.from_dict(first(rows, SHIPPED_ROWS) | {"label": labels}).save_to_disk(data)
        ran = subprocess.run(
            [sys.executable, "-m", "bergson", "build", out, "--model", MODEL, "--dataset", data, "--precision", "fp32",
             "--projection_dim", str(PROJECTION), "--token_batch_size", "512", *extra],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            return {"exit_status": ran.returncode, "failed": ran.stderr[-400:]}
        said = ran.stderr
        gradients[name] = (out / "gradients.bin").read_bytes()
        losses[name] = np.array(load_from_disk(out / "data.hf")["loss"][:])
    n_predicted = np.array(first(rows, SHIPPED_ROWS)["length"]) - 1
    plain = re.sub(r"\x1b\[\d+m", "", said)
    report = re.search(r"(\w+) LOAD REPORT", plain)
    return {
        "exit_status": 0,
        "model_loaded": report[1] if report else None,
        "weights_drawn_at_random": re.findall(r"^(\S+)\s*\|\s*MISSING", plain, re.MULTILINE),
        "weights_of_the_classifier_dropped": re.findall(r"^(\S+)\s*\|\s*UNEXPECTED", plain, re.MULTILINE),
        "gradients_change_when_every_label_is_flipped": gradients["gold"] != gradients["flipped"],
        "gradients_change_with_the_random_head": gradients["gold"] != gradients["unseeded"],
        "loss_a_word_piece": float((losses["gold"] / n_predicted).mean()),
        "loss_of_a_uniform_guess": float(np.log(json.loads((MODEL / "config.json").read_text())["vocab_size"])),
    }


def shipped_call(folder: Path, rows: dict[str, list[Any]]) -> dict[str, str]:
    """``collect_gradients`` given the classifier itself: the error it ends in, or that it ended in none."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    cfg = IndexConfig(str(folder / "call"), projection_dim=PROJECTION)
    cfg.partial_run_path.mkdir(parents=True)
    data = Dataset.from_dict(first(rows, 2))
    found = {}
    model = load_frozen()
    encoder = {name for name, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "pooler.dense"
    }
    for name, only in {"all_layers": None, "encoder_layers_only": encoder}.items():
        processor = GradientProcessor(projection_dim=PROJECTION)
        failure = attempt(collect_gradients, model, data, processor, cfg, target_modules=only)
        found[name] = "no error" if failure is None else failure["failed"]
    return found


def load_frozen() -> Any:
    """The classifier with gradients as bergson sets them: of the word embeddings only, so that hooks fire."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


class OneToken(torch.nn.Module):
    """A linear layer on one vector a row, shown to bergson's hooks as one on a sequence of length 1."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:, None])[:, 0]


def classifier_loss(model: Any, x: torch.Tensor, _y: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """In the place of bergson's next-token loss, which has no attention mask either."""
    mask = torch.arange(x.shape[1]) < torch.tensor(batch["length"])[:, None]
    logits = model(input_ids=x, attention_mask=mask.long()).logits
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["label"]), reduction="none")
    losses.sum().backward()
    model.zero_grad()
    return losses


def collect(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """bergson's batches, hooks, projection and loop over the classifier, with our loss and two layers wrapped."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.data import allocate_batches
    from datasets import Dataset

    model = load_frozen()
    targets = set()
    wrapped = [name for name in question["layers"] if name == "classifier" or "pooler" in name]
    for name in wrapped:
        model.set_submodule(name, OneToken(model.get_submodule(name)))
    for name in question["layers"]:
        targets.add(f"{name}.linear" if name in wrapped else name)

    def gradients(rows: dict[str, list[Any]], projection: int) -> np.ndarray:
        cfg = IndexConfig(str(folder / "ours"), projection_dim=projection, token_batch_size=BATCH_TOKENS)
        cfg.partial_run_path.mkdir(parents=True, exist_ok=True)
        data = Dataset.from_dict(rows)
        collector = InMemoryCollector(
            model=model, data=data, cfg=cfg, processor=processors[projection], target_modules=targets
        )
        batches = allocate_batches(rows["length"], BATCH_TOKENS)
        computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=cfg)
        computer.forward_backward = classifier_loss
        computer.run_with_collector_hooks()
        return collector.builder.grad_buffer

    processors = {p: GradientProcessor(projection_dim=p) for p in (0, PROJECTION)}  # which keep the projections
    rows, queries = question["rows"], question["queries"]
    whole = gradients(first(rows, WHOLE_ROWS), 0)
    gram = whole.astype(np.float64) @ whole.T.astype(np.float64)
    del whole
    pass_seconds = seconds(lambda: gradients(rows, PROJECTION), 3)
    stored = gradients(rows, PROJECTION)
    query_seconds = seconds(lambda: gradients(first(queries, 1), PROJECTION) @ stored.T, 3)
    together_seconds = seconds(lambda: gradients(queries, PROJECTION) @ stored.T, 3)
    np.savez(folder / "scores.npz", scores=gradients(queries, PROJECTION) @ stored.T, gram=gram)
    return {
        "layers": len(targets),
        "projection": f"{PROJECTION} x {PROJECTION} numbers a layer",
        "stored_bytes_a_row": stored.nbytes // len(stored),
        "collection_seconds": pass_seconds,
        "one_query_seconds": query_seconds,
        "seconds_a_query_together": together_seconds / len(queries["label"]),
    }


def main(n_rows: int = 200, n_queries: int = 2) -> None:
    texts, labels, queries = texts_and_labels(n_rows, n_queries)
    exact = forebear_exact(texts, labels, queries, WHOLE_ROWS)
    write_result(
        "peers",
        rows=len(texts),
        queries=len(queries),
        scope=SCOPE,
        n_layers=len(exact["layers"]),
        n_weights=exact["weights"],
        gram_rows=len(exact["gram"]),
        gram_max_relative_error=relative_error(exact["gram_by_exact_dots"], exact["gram"]),
        forebear=forebear_case(texts, labels, queries, exact["dots"]),
        captum=captum_case(texts, labels, queries, exact),
        bergson=bergson_case(texts, labels, queries, exact),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bergson"]:
        bergson_worker(Path(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
