"""Answers as tables: one row a result, written as they come to Parquet or JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forebear.errors import InputError, OutputExistsError
from forebear.indexer.index import Index
from forebear.indexer.locks import exclusive
from forebear.indexer.spans import Span
from forebear.indexer.store import atomic_file, write_bytes
from forebear.retriever.search import Ranking
from forebear.retriever.vocabulary import token_texts

SIDES = ("proponent", "opponent")


@dataclass(frozen=True)
class Answers:
    """Answers to a block of ``q`` test rows.

    Attributes:
        start: Row number of the first of them in the test file.
        labels: Gold class ids ``(q,)``, or None.
        predictions: Predicted class ids, ``(q,)``.
        targets: Class ids whose loss was explained, ``(q,)``. Of an aggregate, labels, predictions and targets are
            those that all its test rows share, else -1.
        found: (proponents, opponents) by method name.
    """

    start: int
    labels: np.ndarray | None
    predictions: np.ndarray
    targets: np.ndarray
    found: dict[str, tuple[Ranking, Ranking]]


def answer_table(index: Index, answers: Answers, tokenizer: Any) -> pa.Table:
    """The columns of DESIGN.md's section 5, ordered by query, method, side and rank.

    Args:
        index: That was asked.
        answers: To its questions.
        tokenizer: Names the shared words.
    """
    names = list(answers.found)
    # (q, methods, 2, k)
    rows = np.stack([np.stack([r.rows for r in answers.found[name]], axis=1) for name in names], axis=1)
    scores = np.stack([np.stack([r.scores for r in answers.found[name]], axis=1) for name in names], axis=1)
    exact = np.array([[r.exact for r in answers.found[name]] for name in names])
    q, m, sides, k = rows.shape
    flat = rows.reshape(-1)

    def spread(values: np.ndarray, axis: int) -> np.ndarray:
        """Repeat values that vary along one of (query, method, side, rank) over all results."""
        shape = [1, 1, 1, 1]
        shape[axis] = len(values)
        return np.broadcast_to(values.reshape(shape), (q, m, sides, k)).reshape(-1)

    labels = np.array(index.manifest.spec.label_names, dtype=object)

    def named(ids: np.ndarray) -> pa.Array:
        return pa.array(labels[ids], pa.string(), mask=ids < 0)

    gold = spread(answers.labels, 0) if answers.labels is not None else None
    columns: dict[str, pa.Array] = {
        "query": pa.array(spread(np.arange(answers.start, answers.start + q), 0)),
        "query_label": named(gold) if gold is not None else pa.nulls(len(flat), pa.string()),
        "query_prediction": named(spread(answers.predictions, 0)),
        "target": named(spread(answers.targets, 0)),
        "method": pa.array(spread(np.array(names, dtype=object), 1), pa.string()),
        "side": pa.array(spread(np.array(SIDES, dtype=object), 2), pa.string()),
        "rank": pa.array(spread(np.arange(1, k + 1, dtype=np.int32), 3)),
        "row": pa.array(flat),
        "score": pa.array(scores.reshape(-1)),
        "exact": pa.array(np.broadcast_to(exact[None, :, :, None], (q, m, sides, k)).reshape(-1)),
        "label": named(index.labels[flat]),
        "prediction": named(index.predictions[flat]),
    }
    columns |= _optional_columns(answers, (q, m, sides, k))
    if any(r.spans is not None for pair in answers.found.values() for r in pair):
        columns |= _span_columns(index, answers, flat)
    if any(r.words is not None for pair in answers.found.values() for r in pair):
        columns |= _word_columns(answers, tokenizer)
    for name, values in index.texts(flat).items():
        columns[name if name not in columns else f"row_{name}"] = values
    return pa.table(columns)


def _optional_columns(answers: Answers, shape: tuple[int, int, int, int]) -> dict[str, pa.Array]:
    """``residual`` where a solver iterated; ``proven`` and ``rows_scored`` where proofs were asked for."""
    rankings = list(answers.found.values())
    q = shape[0]

    def spread(values: list[list[np.ndarray]]) -> np.ndarray:
        """Values of each method and side, ``(q,)``, over all results."""
        stacked = np.stack([np.stack(pair, axis=1) for pair in values], axis=1)
        return np.broadcast_to(stacked[..., None], shape).reshape(-1)

    columns = {}
    if any(r.residual is not None for pair in rankings for r in pair):
        nan = np.full(q, np.nan)
        found = spread([[nan if r.residual is None else r.residual for r in pair] for pair in rankings])
        columns["residual"] = pa.array(found, from_pandas=True)
    if any(r.proven is not None for pair in rankings for r in pair):
        columns["proven"] = pa.array(
            spread([[np.ones(q, bool) if r.proven is None else r.proven for r in pair] for pair in rankings])
        )
        columns["rows_scored"] = pa.array(spread([[r.n_scored for r in pair] for pair in rankings]))
    return columns


def _span_columns(index: Index, answers: Answers, rows: np.ndarray) -> dict[str, pa.Array]:
    """Span of each result and of its test row: text column and ends, and the text of the former; null where none is.

    ``spans_cut``: how many spans of what was searched the model does not read (they lie beyond its longest input, or
    hold nothing but white space), and were left out.
    """
    spans: list[Span | None] = []
    own: list[Span | None] = []
    cut: list[int | None] = []
    for i in range(len(answers.predictions)):
        for pair in answers.found.values():
            for ranking in pair:
                k = ranking.rows.shape[1]
                spans += [None] * k if ranking.spans is None else ranking.spans[i]
                own += [None if ranking.query_spans is None else ranking.query_spans[i]] * k
                cut += [None if ranking.n_cut is None else int(ranking.n_cut[i])] * k
    columns = [values.to_pylist() for values in index.texts(rows).values()]
    texts = [None if s is None else columns[s.column][i][s.start : s.end] for i, s in enumerate(spans)]
    out = {"span": pa.array(texts, pa.string())}
    for prefix, some in (("span", spans), ("query_span", own)):
        for part in ("column", "start", "end"):
            values = [None if span is None else getattr(span, part) for span in some]
            out[f"{prefix}_{part}"] = pa.array(values, pa.int32())
    out["spans_cut"] = pa.array(cut, pa.int64())
    return out


def _word_columns(answers: Answers, tokenizer: Any) -> dict[str, pa.Array]:
    """Shared words of each result and what each contributes to the score; null where scores are no sums of words."""
    ids: list[Any] = []
    contributions: list[Any] = []
    for i in range(len(answers.predictions)):
        for pair in answers.found.values():
            for ranking in pair:
                found = [None] * ranking.rows.shape[1] if ranking.words is None else ranking.words[i]
                ids += [None if one is None else one[0] for one in found]
                contributions += [None if one is None else one[1] for one in found]
    distinct = sorted({int(t) for tokens in ids if tokens is not None for t in tokens})
    names = dict(zip(distinct, token_texts(tokenizer, distinct), strict=True))
    words = [None if tokens is None else [names[int(t)] for t in tokens] for tokens in ids]
    return {
        "word_ids": pa.array(ids, pa.list_(pa.int32())),
        "words": pa.array(words, pa.list_(pa.string())),
        "contributions": pa.array(contributions, pa.list_(pa.float64())),
    }


@contextmanager
def result_writer(path: Path, metadata: dict[str, str], *, force: bool) -> Iterator[Callable[[pa.Table], None]]:
    """Write result tables one after another; the file appears complete, or not at all.

    ``.parquet`` keeps provenance in the schema's metadata; ``.jsonl`` gets it in a file ``NAME.meta.json`` beside it.

    Raises:
        OutputExistsError: The file is there, and ``force`` is not given.
        InUseError: Another process is writing it.
        InputError: Another suffix.
    """
    check_output(path, force=force)
    with exclusive(path.with_name(path.name + ".lock"), str(path)), atomic_file(path) as handle:
        if path.suffix == ".parquet":
            writer: pq.ParquetWriter | None = None

            def write(table: pa.Table) -> None:
                nonlocal writer
                table = table.replace_schema_metadata(metadata)
                writer = writer or pq.ParquetWriter(handle, table.schema, compression="zstd")
                writer.write_table(table)

            try:
                yield write
            finally:
                if writer is not None:
                    writer.close()
        else:

            def write_lines(table: pa.Table) -> None:
                lines = (json.dumps(row, ensure_ascii=False) for row in table.to_pylist())
                handle.write("".join(f"{line}\n" for line in lines).encode())

            yield write_lines
            content = json.dumps(
                json.loads(metadata["forebear"]), indent=1
            )  # first: no answers without it after a kill
            write_bytes(path.with_name(path.name + ".meta.json"), content.encode() + b"\n")


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output of an unknown kind, or one that exists; before any work is done."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"--out {path}: expected a name ending in .parquet or .jsonl.")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder. Give a file name.")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists. Give another --out, or --force to replace it.")
