"""The quick cases: ``make bench``, some minutes on one core, from nothing but the repository.

Each holds this project's code against a plain way of doing the same, written here with numpy, torch or FAISS alone, so
that a ratio moves only when the code does. The model is MiniLM, fine-tuned for one epoch on the pairs that the demo
makes (kept in ``runs/bench/quick``); the index is built anew in every run.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import head_scan
import numpy as np
import torch
from ann import by_scan
from common import ROOT, by_turns, now, ratio
from harness import Case
from head_scan import SPEED_UPS
from tiled_rows import clustered
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from forebear import BuildOptions, Index, Retriever, TrainOptions, build_index, choose_model, open_rows, train
from forebear.evaluation.demo.corpus import make_corpus, write_corpus
from forebear.indexer.model.device.half import has_half_products
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import sketch_rows
from forebear.indexer.storage.ann import import_faiss, unit_rows
from forebear.indexer.words.gradients import WordRows
from forebear.retriever.question.methods import METHODS

disable_progress_bar()
FOLDER = ROOT / "runs" / "bench" / "quick"
SCOPE = "all"
N_ROWS = 192  # of the small index
N_QUERIES = 4
WORD_ROWS, N_WORD_QUERIES = 1_400, 16  # of an index of words
TOP = 10
SCAN = (60_000, 384, 3)  # rows, features, classes
ANN_ROWS, ANN_BATCH = 60_000, 100


@functools.cache
def corpus() -> Path:
    """The demo's pairs: ``train.parquet``, ``dev.parquet``."""
    return write_corpus(make_corpus(0), FOLDER / "data", force=True)


@functools.cache
def model() -> str:
    """The run, made now or found."""
    if not (FOLDER / "run" / "run.json").is_file():
        rows = open_rows(corpus() / "train.parquet", need_labels=True)
        train(rows, "minilm", FOLDER / "run", TrainOptions(epochs=1, learning_rate=1e-4, device="cpu"), force=True)
    return str(FOLDER / "run")


@functools.cache
def rows() -> tuple[list[list[str]], np.ndarray]:
    """Texts, a column a text field, and labels of the rows of the small index."""
    block = next(open_rows(corpus() / "train.parquet", need_labels=True).blocks(N_ROWS))
    return [list(column) for column in block.texts], np.array(block.labels, np.int64)


def queries(n: int) -> list[tuple[str, str]]:
    """The first development pairs."""
    return list(zip(*next(open_rows(corpus() / "dev.parquet").blocks(n)).texts, strict=True))


_scratch = tempfile.TemporaryDirectory(prefix="forebear-bench-")
_built: list[Index] = []


def build(options: BuildOptions, n_rows: int, progress: Any = False) -> Index:
    """An index of the first rows, in a folder of its own."""
    block = next(open_rows(corpus() / "train.parquet", need_labels=True).blocks(n_rows))
    source = rows_from_texts(list(zip(*block.texts, strict=True)), list(block.labels))
    folder = tempfile.mkdtemp(dir=_scratch.name)
    return build_index(source, folder, choose_model(model()).checkpoints, options, progress=progress)


def build_small() -> dict[str, float]:
    """Build the small index: sketches with EK-FAC, calibrated candidates; seconds by stage."""
    stages: dict[str, float] = {}
    last, began = "start", now()

    def progress(stage: str, _done: int, _total: int) -> None:
        nonlocal last, began
        if stage != last:
            stages[last] = stages.get(last, 0.0) + now() - began
            last, began = stage, now()

    options = BuildOptions(
        scopes=("head", SCOPE), max_length=64, device="cpu", dampings=("1%",), calibration_queries=8
    )  # fmt: skip
    _built.append(build(options, N_ROWS, progress))
    progress("end", 0, 0)
    return stages


def index() -> Index:
    """The small index, as it was built last in this run."""
    if not _built:
        build_small()
    return _built[-1]


@functools.cache
def classifier() -> Any:
    """The model, as the index loads it."""
    return load_classifier(str((index().folder / index().manifest.checkpoints[-1].path).resolve()), max_length=64)


@functools.cache
def plain_model() -> tuple[torch.nn.Module, list[tuple[Any, torch.Tensor]]]:
    """The model by transformers alone, and the rows of the index in batches of like lengths."""
    checkpoint = choose_model(model()).checkpoints[-1].path
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts, labels = rows()
    order = np.argsort([len(ids) for ids in tokenizer(*texts)["input_ids"]], kind="stable")
    batches = []
    for some in np.array_split(order, N_ROWS // 64):
        columns = ([column[i] for i in some] for column in texts)
        inputs = tokenizer(*columns, padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append((inputs, torch.from_numpy(labels[some])))
    return AutoModelForSequenceClassification.from_pretrained(checkpoint).eval(), batches


def plain_step() -> None:
    """The yardstick of all that passes over rows: a training step's forward and backward, with weight gradients."""
    network, batches = plain_model()
    for inputs, labels in batches:
        torch.nn.functional.cross_entropy(network(**inputs).logits, labels).backward()
        network.zero_grad()


def activations_step() -> None:
    """The least that any pass over rows takes: forward and backward of activations alone."""
    network, batches = plain_model()
    network.requires_grad_(False)
    try:
        for inputs, labels in batches:
            others = {name: values for name, values in inputs.items() if name != "input_ids"}
            embeddings = network.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
            logits = network(inputs_embeds=embeddings, **others).logits
            torch.nn.functional.cross_entropy(logits, labels).backward()
    finally:
        network.requires_grad_(True)


@functools.cache
def scan_problem() -> head_scan.Problem:
    """Made rows of a head."""
    return head_scan.Problem(*SCAN)


def scan(name: str) -> Case:
    """The exact scan of head gradients against matrix products of everything."""

    def measure() -> dict[str, Any]:
        return head_scan.measure(scan_problem(), name, 15)

    return Case(f"head_scan_{name}", measure, larger=SPEED_UPS, recalls=("recall",))


def nearest() -> dict[str, Any]:
    """``nn-cos`` by the scan, both ends, against FAISS' flat index of float32, one end."""
    vectors = unit_rows(clustered(ANN_ROWS + ANN_BATCH, 384))
    kept, asked = vectors[:ANN_ROWS], vectors[ANN_ROWS:]
    search = by_scan(kept)[0]
    flat = import_faiss().IndexFlatIP(384)
    flat.add(kept)
    truth = flat.search(asked, TOP)[1]
    of_one = by_turns({"ours": lambda: search(asked[:1]), "flat": lambda: flat.search(asked[:1], TOP)}, 15, calls=10)
    of_many = by_turns({"ours": lambda: search(asked), "flat": lambda: flat.search(asked, TOP)}, 5)
    return {
        "rows": ANN_ROWS, "batch": len(asked), "recall_at_10": _shared(search(asked), truth),
        "speed_up_one_query": ratio(of_one["flat"], of_one["ours"]),
        "speed_up_batch": ratio(of_many["flat"], of_many["ours"]),
    }  # fmt: skip


def _shared(found: Any, truth: Any) -> float:
    """Share of the true lists that was found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))


def gradient_pass() -> dict[str, Any]:
    """Sketches, and sketches with those under the curvature, against plain passes over the same rows; also in bf16.

    The plain passes are in fp32: a training step's forward and backward, and those of activations alone.
    """
    model_name, spec = index().manifest.checkpoints[-1].name, index().manifest.spec

    def ours(precision: str, *, whitens: bool) -> Callable[[], Any]:
        half, chosen = replace(classifier(), precision=precision), replace(spec, precision=precision)
        where = (index().folder, half, chosen, SCOPE, model_name)
        sketchers = list(open_sketchers(*where, last=whitens).values())
        return lambda: sketch_rows(half, sketchers, *rows(), batch_tokens=4096)

    ways = {"plain": plain_step, "activations": activations_step}
    for precision in ("fp32", *(["bf16"] if has_half_products(torch.device("cpu")) else [])):
        suffix = "" if precision == "fp32" else f"_{precision}"
        ways[f"sketch{suffix}"] = ours(precision, whitens=False)
        ways[f"sketch_with_curvature{suffix}"] = ours(precision, whitens=True)
    taken = by_turns(ways, 5)
    made = [way for way in ways if way.startswith("sketch")]
    return {
        "rows": N_ROWS, "rows_a_second": {way: N_ROWS / float(np.median(s)) for way, s in taken.items()},
        "over_plain": {way: ratio(taken[way], taken["plain"]) for way in made},
        "over_activations": {way: ratio(taken[way], taken["activations"]) for way in made},
    }  # fmt: skip


def rerank() -> dict[str, Any]:
    """Candidates scored exactly against every row scored exactly, ``gd`` and ``if`` of all linear layers."""
    retriever, recalls, speed_ups = Retriever(index(), device="cpu"), {}, {}
    asked = queries(N_QUERIES)
    for method in ("gd", "if"):
        lists: dict[str, Any] = {}

        def ask(exact: str, method: str = method, lists: dict[str, Any] = lists, **choices: Any) -> None:
            found = retriever.retrieve(asked, methods=[method], scope=SCOPE, top=TOP, exact=exact, **choices)
            lists[exact] = found.to_pandas().groupby(["query", "side"])["row"].apply(list)

        taken = by_turns({"rerank": lambda a=ask: a("rerank", candidates=2 * TOP), "full": lambda a=ask: a("full")}, 3)
        recalls[method] = _shared(lists["rerank"], lists["full"])
        speed_ups[method] = ratio(taken["full"], taken["rerank"])
    return {
        "rows": N_ROWS, "candidates": 2 * TOP, "batch": N_QUERIES, "recall_at_10": recalls, "speed_up_batch": speed_ups,
    }  # fmt: skip


def _dictionaries(rows: WordRows) -> list[dict[int, np.ndarray]]:
    """The word gradients of each row by token."""
    spans = itertools.pairwise(rows.starts.tolist())
    return [dict(zip(rows.tokens[a:b].tolist(), rows.vectors[a:b], strict=True)) for a, b in spans]


def words() -> dict[str, Any]:
    """The search of stored word gradients against a loop over rows, each a dictionary of numpy vectors."""
    stored_words = BuildOptions(stores=("features", "words"), max_length=64, device="cpu", dampings=())
    retriever = Retriever(build(stored_words, WORD_ROWS), device="cpu")
    columns = [list(column) for column in zip(*queries(N_WORD_QUERIES), strict=True)]
    targets = run_forward(retriever.classifier(), columns).predictions
    search = retriever.searcher("words")
    (question,) = search.queries([METHODS["tracin-we-topk"]], columns, targets, normalise=False)
    stored = retriever.index.words(question.top)
    training = _dictionaries(stored.take(np.arange(stored.n_rows)))
    asked = _dictionaries(question.words.words[0])

    def ours(n: int) -> Any:
        some = question.take(0, n)
        return search.answer([some], TOP, "none")["tracin-we-topk"]

    def loops(n: int) -> list[np.ndarray]:
        found = []
        for mine in asked[:n]:
            dots = [sum(float(mine[w] @ row[w]) for w in mine.keys() & row.keys()) for row in training]
            found.append(np.argsort(-np.array(dots), kind="stable")[:TOP])
        return found

    of_one = by_turns({"ours": lambda: ours(1), "loop": lambda: loops(1)}, 15, calls=10)
    of_many = by_turns({"ours": lambda: ours(N_WORD_QUERIES), "loop": lambda: loops(N_WORD_QUERIES)}, 15, calls=5)
    return {
        "rows": WORD_ROWS, "batch": N_WORD_QUERIES, "one_query_ms": 1e3 * float(np.median(of_one["ours"])),
        "same_top_10": _shared(ours(N_WORD_QUERIES)[0].rows, loops(N_WORD_QUERIES)),
        "speed_up_one_query": ratio(of_one["loop"], of_one["ours"]),
        "speed_up_batch": ratio(of_many["loop"], of_many["ours"]),
    }  # fmt: skip


def building() -> dict[str, Any]:
    """The small index from nothing, over plain passes over its rows before and after; by stage.

    The plain passes are a training step's forward and backward, and those of activations alone.

    It is built once, so the spread is that of the yardstick alone.
    """
    model(), plain_model()
    ways = {"plain": plain_step, "activations": activations_step}
    before = by_turns(ways, 3)
    stages = build_small()
    after = by_turns(ways, 3)
    plain, activations = (before[way] + after[way] for way in ways)
    total = sum(stages.values())
    return {
        "rows": N_ROWS, "build_seconds": total, "plain_seconds": float(np.median(plain)),
        "build_over_plain": ratio([total] * len(plain), plain),
        "build_over_activations": ratio([total] * len(plain), activations),
        "stage_over_plain": {
            stage: ratio([taken] * len(plain), plain) for stage, taken in stages.items() if taken > 0.03 * total
        },
    }  # fmt: skip


CASES = (
    *(scan(name) for name in head_scan.SCANNED),
    Case("nn_ann", nearest, larger=SPEED_UPS, recalls=("recall_at_10",)),
    Case("build", building, smaller=("build_over_plain", "build_over_activations", "stage_over_plain")),
    Case("gradient_pass", gradient_pass, smaller=("over_plain", "over_activations")),
    Case("rerank", rerank, larger=("speed_up_batch",), recalls=("recall_at_10",)),
    Case("words", words, larger=SPEED_UPS, recalls=("same_top_10",)),
)
