"""Memory that does not grow with what is asked: peaks of two sizes are compared, in Python, numpy and Arrow."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear.cli.main import run
from forebear.evaluation.measures import agreement
from forebear.indexer.building import row_facts
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers import results
from forebear.retriever.answers.parts import Parts
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

FEW, MANY = 100, 800


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python and numpy hold at most while something is done, beyond what they held before."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def build(folder: Path, n_rows: int) -> Index:
    chosen = choose_model(str(make_tiny_model(folder / "m"))).checkpoints
    source = rows_from_texts(sentences(n_rows), labels(n_rows))
    return build_index(source, folder / "i", chosen, BuildOptions(dampings=("0.1x",)))


@pytest.mark.slow
def test_results_written_to_a_file_take_memory_that_does_not_grow_with_queries(tmp_path, monkeypatch):
    index = build(tmp_path, 60)
    monkeypatch.setattr(row_facts, "SAMPLED_ROWS", 16)
    asked = ["retrieve", "--index", str(index.folder), "--method", "gc,if,nn-cos", "--top", "60", "--quiet", "--force"]
    in_arrow = []

    def watched(tables):
        def watch(*of):
            for table in tables(*of):
                in_arrow.append(pa.total_allocated_bytes())
                if len(in_arrow) % 32 == 0:
                    gc.collect()  # and the tuples that Python keeps for reuse, thousands of a size: no results
                yield table

        return watch

    for made_by in (Retriever, Parts):  # from answers, and from the parts that they were kept in
        monkeypatch.setattr(made_by, "tables", watched(made_by.tables))

    def measure(n: int) -> tuple[int, int]:
        path = write_jsonl(tmp_path / f"{n}.jsonl", text=sentences(n, seed=2))
        arguments = [*asked, "--test", str(path), "--out", str(tmp_path / "out.parquet")]
        in_arrow.clear()
        before = pa.total_allocated_bytes()
        ended: list[int] = []
        found = peak(lambda: ended.append(run(arguments)))
        assert ended == [0]
        return found, max(in_arrow) - before

    measure(10)  # what is imported and kept at first
    held = {}
    for limit in (1 << 16, 1 << 26):
        monkeypatch.setattr(results, "ANSWER_BYTES", limit)
        monkeypatch.setattr(results, "TABLE_RESULTS", limit >> 6)
        held[limit] = [b - a for a, b in zip(measure(FEW), measure(MANY), strict=True)]
    one_query = 3 * 2 * 60 * 16  # bytes of its rankings
    together = (512 - FEW) * one_query
    assert held[1 << 26][0] > together  # all of them at once would show
    assert max(held[1 << 16]) < together / 4


@pytest.mark.slow
def test_labels_of_all_spans_take_memory_that_does_not_grow_with_rows_but_for_the_labels(tmp_path, monkeypatch):
    spec = QuerySpec(methods=("if+",), spans="words")
    found: dict[tuple[int, int], int] = {}
    n_spans = {}
    for n in (FEW, MANY):
        retriever = Retriever(build(tmp_path / str(n), n))
        settled = retriever.resolve(spec)
        agreement._labels_of_all(retriever, settled, by_spans=True)  # the model is loaded
        for at_once in (20, MANY):
            monkeypatch.setattr(agreement, "LABELLED_ROWS", at_once)
            labels_found: list[int] = []
            found[n, at_once] = peak(
                lambda retriever=retriever, settled=settled, into=labels_found: into.append(
                    len(agreement._labels_of_all(retriever, settled, by_spans=True))
                )
            )
            n_spans[n] = labels_found[0]
    assert n_spans[MANY] > 6 * n_spans[FEW]
    assert found[MANY, MANY] > 4 * found[FEW, MANY]  # all rows at once would show
    assert found[MANY, 20] < 2 * found[FEW, 20] + 16 * n_spans[MANY]
