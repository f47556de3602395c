"""Word gradients: bytes a row, what they add to the pass, time a query against row by row in Python and a dense scan.

SST-2 (6,920 rows) and AG News (20,000 rows), MiniLM-L6; runs that are there already are used.
``python benchmarks/words.py [--data sst2,agnews] [--queries 32]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, ROOT, by_turns, ratio, run, seconds, write_result

from forebear import BuildOptions, Index, Retriever, build_index
from forebear.indexer.gradients.gradient_pass import labels_seed, run_pass
from forebear.indexer.losses.cross_entropy import CROSS_ENTROPY
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.storage.layout import words_folder
from forebear.indexer.training.model_choice import choose_model
from forebear.indexer.words.gradients import WordGradients, encode_vectors
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.spec import words_top
from forebear.retriever.words.search import WordQueries, WordSearcher

RUNS = ROOT / "runs" / "bench"
DEV = {"sst2": "dev.parquet", "agnews": "test.parquet"}
EPOCHS = {"sst2": "3", "agnews": "1"}
K = 10
N_TRUTH = 16  # queries whose exact answers are known
WORD_METHODS = ("tracin-we-topk", "tracin-we")


def trained(data: str) -> Path:
    folder = RUNS / data
    if not (folder / "run.json").is_file():
        dev = DATA / data / DEV[data]
        train = DATA / data / "train.parquet"
        run("train", "--data", train, "--model", "minilm", "--dev", dev, "--epochs", EPOCHS[data], "--out", folder)
    return folder


def built(data: str, name: str, tops: tuple[int, ...], precision: str) -> Index:
    folder = RUNS / f"{data}-words-{name}"
    if (folder / "manifest.json").is_file():
        return Index.open(folder)
    options = BuildOptions(
        stores=("features", "words"), words_tops=tops, words_precision=precision, max_length=128, dampings=()
    )
    source = open_rows(DATA / data / "train.parquet", need_labels=True)
    return build_index(source, folder, choose_model(str(trained(data))).checkpoints, options)


def added_to_the_pass(data: str, n_rows: int = 384) -> None:
    """Ratios to the pass of issue 2 (sketches and norms of the whole encoder), by turns on the same rows."""
    index = Index.open(RUNS / f"{data}-all", check=False)
    checkpoint = index.manifest.checkpoints[-1]
    model = str((index.folder / checkpoint.path).resolve())
    classifier = load_classifier(model, max_length=128)
    sketchers = open_sketchers(index.folder, classifier, index.manifest.spec, "all", checkpoint.name, last=True)
    plain = next(iter(sketchers.values()))
    at = np.sort(np.random.default_rng(0).permutation(index.manifest.n_rows)[:n_rows])
    texts = [column.to_pylist() for column in index.texts(at).values()]
    labels = index.labels[at].astype(np.int64)

    def passed(sketch: bool, tops: tuple[int, ...], precision: str = "fp16") -> Callable[[], None]:
        def go() -> None:
            words = [WordGradients(classifier, top, n_rows, precision) for top in tops]
            collectors = [*([plain.collector(n_rows, classifier.device)] if sketch else []), *words]
            run_pass(classifier, texts, labels_seed(CROSS_ENTROPY, labels), collectors, batch_tokens=4096)
            for found in words:
                found.rows()

        return go

    cases = {
        "sketch": passed(True, ()), "sketch_and_top_10": passed(True, (10,)), "sketch_and_all": passed(True, (0,)),
        "sketch_and_top_10_int8": passed(True, (10,), "int8"), "top_10_alone": passed(False, (10,)),
    }  # fmt: skip
    found = {name: seconds(case, 5) for name, case in cases.items()}
    ratios = {name: value / found["sketch"] for name, value in found.items()}
    write_result(f"words_pass_{data}", rows=n_rows, ratio_to_the_pass_with_sketches=ratios)


def row_by_row(search: WordSearcher, question: WordQueries, i: int) -> tuple[dict[str, float], np.ndarray]:
    """Training row by training row in Python; seconds of two ways, and the scores of both.

    ``torch``: gradients as torch tensors, a loop over the words of both rows, a dot where they are the same (how a
    notebook does it). ``numpy``: the same with dictionaries, as fast as plain
    Python goes.
    """
    store = search.index.words(question.top, -1)
    words = store.take(np.arange(store.n_rows))
    assert words.vectors is not None
    spans = list(zip(words.starts[:-1].tolist(), words.starts[1:].tolist(), strict=True))
    tokens, vectors, tensors = words.tokens.tolist(), words.vectors, torch.from_numpy(words.vectors)
    as_dicts = [{tokens[j]: vectors[j] for j in range(a, b)} for a, b in spans]
    as_lists = [[(tokens[j], tensors[j]) for j in range(a, b)] for a, b in spans]
    query = question.words.words[-1].take(np.array([i]))
    assert query.vectors is not None
    mine = dict(zip(query.tokens.tolist(), query.vectors, strict=True))
    mine_torch = [(token, torch.from_numpy(vector)) for token, vector in mine.items()]
    seconds_of = {}
    fast, slow = np.zeros(len(spans)), np.zeros(len(spans))
    started = time.perf_counter()
    for n, row in enumerate(as_dicts):
        for token in mine.keys() & row.keys():
            fast[n] += float(np.dot(mine[token], row[token]))
    seconds_of["numpy"] = time.perf_counter() - started
    started = time.perf_counter()
    for n, listed in enumerate(as_lists):
        for token, vector in mine_torch:
            for other, gradient in listed:
                if token == other:
                    slow[n] += float(torch.dot(vector, gradient))
    seconds_of["torch"] = time.perf_counter() - started
    if not np.allclose(fast, slow, rtol=1e-4, atol=1e-6 * np.abs(fast).max()):
        raise AssertionError("the two ways disagree")
    return seconds_of, question.words.etas[-1] * fast


def each(values: list[float]) -> dict[str, float]:
    return {"median_ms": 1e3 * statistics.median(values), "max_ms": 1e3 * max(values)}


def recoded(index: Index, top: int, precision: str) -> None:
    """Make the index answer from its vectors as another precision would have stored them."""
    store = index.words(top)
    parts = [
        encode_vectors(store.vectors(np.arange(i, min(i + 65536, len(store.rows)))), precision)
        for i in range(0, len(store.rows), 65536)
    ]
    codes, scales, errors = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "errors")
    )
    kind = words_folder(index.manifest.checkpoints[-1].name, top)
    index._cache[kind] = replace(
        store, codes=codes, scales=scales, errors=np.maximum.reduceat(errors, store.starts[:-1])
    )


def some_queries(data: str, n_queries: int) -> list[str]:
    texts = next(open_rows(DATA / data / DEV[data]).blocks(400)).texts[0]
    return [texts[i] for i in np.sort(np.random.default_rng(1).permutation(len(texts))[:n_queries])]


def exact_answers(data: str, index: Index, n_queries: int) -> Any:
    """The models' own top 10: of every row for SST-2; of candidates, which were found to hold them, for AG News."""
    exact = "full" if data == "sst2" else "rerank"
    chosen = some_queries(data, n_queries)[:N_TRUTH]
    return Retriever(index).retrieve(chosen, methods=WORD_METHODS, exact=exact, top=K).to_pandas()


def queries(data: str, name: str, index: Index, truth: Any, n_queries: int, *, real: bool = True) -> None:
    retriever = Retriever(index)
    chosen = some_queries(data, n_queries)
    targets = run_forward(retriever.classifier(), [chosen]).predictions
    search = retriever.searcher("words")
    found: dict[str, Any] = {}
    for method in WORD_METHODS:
        if words_top(index, METHODS[method]) not in index.manifest.spec.words_tops or (
            name == "int8" and method == "tracin-we"
        ):
            continue
        (question,) = search.queries([METHODS[method]], [chosen], targets, normalise=False)

        def answer(some: WordQueries, search: WordSearcher = search, method: str = method) -> Any:
            return search.answer([some], K, "none")[method]

        ones = [question.take(i, i + 1) for i in range(n_queries)]
        ways = {"one": lambda o=ones, a=answer: [a(x) for x in o], "batch": lambda q=question, a=answer: a(q)}
        by_turn = by_turns(ways, 9)
        batch, ends = statistics.median(by_turn["batch"]) / n_queries, answer(question)
        alone = np.array([[end.rows[0] for end in answer(single)] for single in ones])
        same = float((alone == np.stack([end.rows for end in ends], axis=1)).mean())
        one, dense = [], []
        for single in ones:
            started = time.perf_counter()
            answer(single)
            one.append(time.perf_counter() - started)
        search.prune = False
        for single in ones[:8]:
            started = time.perf_counter()
            answer(single)
            dense.append(time.perf_counter() - started)
        search.prune = True
        slow, scores = zip(*(row_by_row(search, question, i) for i in range(3)), strict=True)
        agreement = []
        for i, all_scores in enumerate(scores):
            for end, sign in zip(ends, (1, -1), strict=True):
                best = np.lexsort((np.arange(len(all_scores)), -sign * all_scores))[:K]
                agreement.append(len(set(best) & set(end.rows[i].tolist())) / K)
        asked = {"methods": [method], "top": K, "target": "predicted"}
        stored = retriever.retrieve(chosen[:N_TRUTH], exact="none", **asked).to_pandas()
        started = time.perf_counter()
        reranked = retriever.retrieve(chosen[:N_TRUTH], exact="rerank", **asked).to_pandas()
        rerank_seconds = (time.perf_counter() - started) / N_TRUTH
        keys = ["query", "side"]
        best = truth[truth["method"] == method].groupby(keys)["row"].apply(set)

        def recall(table: Any, best: Any = best, keys: list[str] = keys) -> float:
            mine = table.groupby(keys)["row"].apply(set)
            return float(np.mean([len(mine[k] & best[k]) / K for k in best.index]))

        loops = {way: statistics.median(one[way] for one in slow) for way in slow[0]}
        found[method] = {
            "one_query": each(one), "batch_ms_a_query": 1e3 * batch,
            "one_over_batch": ratio(by_turn["one"], by_turn["batch"])._asdict(),
            "batch_answers_as_one": same,
            "every_posting_ms": each(dense)["median_ms"],
            "row_by_row_ms": {way: 1e3 * value for way, value in loops.items()},
            "same_top_10_as_row_by_row": float(np.mean(agreement)),
            "times_faster_one": {way: value / statistics.median(one) for way, value in loops.items()},
            "times_faster_in_a_batch": {way: value / batch for way, value in loops.items()},
            "recall_10": recall(stored), "recall_10_reranked": recall(reranked),
            "reranked_seconds_a_query_with_models": rerank_seconds,
        }  # fmt: skip
    n_stores = len(index.manifest.checkpoints)
    size = {
        str(top): sum(
            facts["bytes"] for n, facts in index.manifest.files.items() if f"/{f'top-{top}' if top else 'all'}/" in n
        )
        / index.manifest.n_rows
        / n_stores
        for top in index.manifest.spec.words_tops
        if real
    }
    write_result(
        f"words_{data}_{name}", rows=index.manifest.n_rows, queries=n_queries, bytes_a_row_and_checkpoint=size,
        methods=found,
    )  # fmt: skip


def main(datasets: list[str], n_queries: int) -> None:
    for data in datasets:
        reference = built(data, "fp16", (0, 10), "fp16")
        if (RUNS / f"{data}-all" / "manifest.json").is_file():
            added_to_the_pass(data)
        truth = exact_answers(data, reference, n_queries)
        queries(data, "fp16", reference, truth, n_queries)
        if data == "sst2":
            queries(data, "int8", built(data, "int8", (10,), "int8"), truth, n_queries)
        else:  # the same numbers without another pass
            again = Index.open(reference.folder)
            recoded(again, 10, "int8")
            queries(data, "int8", again, truth, n_queries, real=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="sst2,agnews")
    parser.add_argument("--queries", type=int, default=32)
    given = parser.parse_args()
    main(given.data.split(","), given.queries)
