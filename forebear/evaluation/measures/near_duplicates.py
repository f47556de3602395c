"""``near-duplicates``: is a training row found when it is asked about itself, or about itself with one word changed?
(Pez21, Tables 3 and 4)

Words are what white space parts. In every text of a row one word is added, removed or replaced, at a seeded random
place; new words are drawn from the words of the training rows, each word as likely as any other. The changed text has
single spaces between its words. A text without words can only have one added, and else stays as it is.

A hit is a row with the source row's texts: the source itself, or an exact duplicate of it, which no method can tell
apart. The top rows are retrieved, not picked from scores of all rows, so that what retrieval misses counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.common.comparisons import (
    INTERVAL_COLUMNS,
    interval_cells,
    listed_values,
    provenance,
    question_record,
)
from forebear.evaluation.common.queries import QueryRows, refuse_spans
from forebear.evaluation.reports.charts import bar_chart
from forebear.evaluation.reports.report import Cell, Figure, Report, Table
from forebear.indexer.index import Index
from forebear.indexer.rows.sampling import live_sample
from forebear.progress import Progress, no_progress
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.retriever import Retriever

EDITS = ("same", "add", "remove", "replace")
TOPS = (1, 10)
_BLOCK_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Hits of the source row.

    Attributes:
        methods: Names of the methods, ``m``.
        edits: Names of the edits, ``e``.
        tops: Depths k, ``d``.
        hits: Whether a row of the source's texts is in the top k, ``(e, m, q, d)`` bool.
        rows: Numbers of the training rows that are the queries, ``(q,)``.
        n_duplicated: Number of these rows that have an exact duplicate in the index.
    """

    methods: tuple[str, ...]
    edits: tuple[str, ...]
    tops: tuple[int, ...]
    hits: np.ndarray
    rows: np.ndarray
    n_duplicated: int


def vocabulary(index: Index) -> list[str]:
    """Distinct words of all live training rows, sorted."""
    words: set[str] = set()
    for start in range(0, len(index.live), _BLOCK_ROWS):
        for column in index.text_lists(index.live[start : start + _BLOCK_ROWS]):
            for text in column:
                words.update(text.split())
    return sorted(words)


def edited(text: str, edit: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """A text with one word added, removed or replaced at a random place (the rules are in the module's docstring).

    Args:
        text: The text before the edit.
        edit: One of ``EDITS``.
        words: The words that a new word is drawn from.
        rng: Decides the place and the word.

    Raises:
        InputError: There is no word to draw, or only the word that is to be replaced.
    """
    parts = text.split()
    if edit == "same" or (edit != "add" and not parts):
        return text
    place = int(rng.integers(len(parts) + (edit == "add")))
    if edit == "remove":
        return " ".join(parts[:place] + parts[place + 1 :])
    replaced = parts[place] if edit == "replace" else None
    if not any(word != replaced for word in words):
        raise InputError(f"near-duplicates draws words from the training rows, and they have {len(words)} different.")
    drawn = replaced
    while drawn == replaced:
        drawn = words[int(rng.integers(len(words)))]
    return " ".join([*parts[:place], str(drawn), *parts[place + (edit == "replace") :]])


def near_duplicates(
    retriever: Retriever,
    spec: QuerySpec | Question,
    *,
    n_queries: int = 200,
    edits: Sequence[str] = EDITS,
    tops: Sequence[int] = TOPS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> NearDuplicates:
    """Ask about training rows, changed a little, and see whether they come up.

    Args:
        retriever: Over the index.
        spec: Methods, scope, target (``gold``: the training row's label), exactness; its ``top`` is not used.
        n_queries: Training rows, a seeded sample; 0 for all.
        edits: Names from ``EDITS``.
        tops: Depths k of hit@k, ascending.
        seed: Random seed of the sample, the places and the words.
        progress: Called with the questions answered.

    Raises:
        InputError: An unknown edit, a method that ranks spans, or a number of queries or a depth out of range.
    """
    unknown = [edit for edit in edits if edit not in EDITS]
    if unknown or not edits:
        raise InputError(f"--edits {', '.join(edits) or 'none'}: expected some of {', '.join(EDITS)}.")
    if n_queries < 0:
        raise InputError(f"--queries {n_queries}: expected a number of training rows, or 0 for all of them.")
    question = retriever.resolve(spec, top=max(tops))
    refuse_spans(question)
    index = retriever.index
    n_live = index.manifest.n_live
    if not tops or not 1 <= min(tops) <= max(tops) <= n_live:
        raise InputError(f"tops {', '.join(map(str, tops)) or 'none'}: expected 1 to {n_live}, the live rows.")
    rows = live_sample(index.live, n_queries, seed)
    sources = list(zip(*index.text_lists(rows), strict=True))
    words = vocabulary(index) if {"add", "replace"} & set(edits) else []
    labels = index.targets(rows)
    hits = np.zeros((len(edits), len(question.methods), len(rows), len(tops)), bool)
    progress("questions", 0, len(edits) * len(rows))
    for e, edit in enumerate(edits):
        texts = [
            [
                edited(text, edit, words, np.random.default_rng([seed, int(row), EDITS.index(edit), column]))
                for row, text in zip(rows, texts_of_column, strict=True)
            ]
            for column, texts_of_column in enumerate(zip(*sources, strict=True))
        ]
        queries = QueryRows(source="training rows", rows=rows, texts=tuple(texts), labels=labels)
        done = 0
        for part in queries.blocks():
            results = retriever.answer_block(0, part.texts, part.labels, question).rankings
            for m, name in enumerate(question.spec.methods):
                top = results[name][0].rows
                texts_found = list(zip(*index.text_lists(top), strict=True))
                for q in range(len(part)):
                    lines = slice(q * top.shape[1], (q + 1) * top.shape[1])
                    is_source = [text == sources[done + q] for text in texts_found[lines]]
                    hits[e, m, done + q] = [any(is_source[:k]) for k in tops]
            done += len(part)
            progress("questions", e * len(rows) + done, len(edits) * len(rows))
    return NearDuplicates(
        methods=question.spec.methods, edits=tuple(edits), tops=tuple(tops), hits=hits, rows=rows,
        n_duplicated=_count_duplicated(index, sources),
    )  # fmt: skip


def _count_duplicated(index: Index, sources: Sequence[tuple[str, ...]]) -> int:
    """How many of the rows, given by their texts, have an exact duplicate among the live rows."""
    counts = dict.fromkeys(sources, 0)
    for start in range(0, len(index.live), _BLOCK_ROWS):
        for texts in zip(*index.text_lists(index.live[start : start + _BLOCK_ROWS]), strict=True):
            if texts in counts:
                counts[texts] += 1
    return sum(counts[texts] > 1 for texts in sources)


def near_duplicates_report(
    measured: NearDuplicates, retriever: Retriever, spec: QuerySpec | Question, seed: int, command: str
) -> tuple[Report, dict[str, Any]]:
    """The report, and the numbers for ``result.json``."""
    question = retriever.resolve(spec)
    rows: list[list[Cell]] = []
    for m, name in enumerate(measured.methods):
        for e, edit in enumerate(measured.edits):
            for d, k in enumerate(measured.tops):
                rows.append([name, edit, k, *interval_cells(measured.hits[e, m, :, d].astype(np.float64), seed)])
    table = Table(
        "Hits of the source row",
        ["method", "query", "top", *INTERVAL_COLUMNS],
        rows,
        f"Share of {len(measured.rows):,} training rows that come up in the top k when they are the query, with one "
        "word of each text changed. ± standard error, 95% interval. A row with the same texts is a hit as well: "
        f"{measured.n_duplicated:,} of these rows have an exact duplicate. Equal scores are ordered by row number.",
    )
    drawing = bar_chart(
        measured.methods,
        {edit: measured.hits[e, :, :, 0].mean(axis=1).tolist() for e, edit in enumerate(measured.edits)},
        xlabel=f"hit@{measured.tops[0]}",
    )
    share = measured.hits[0, :, :, 0].mean(axis=1)
    best = int(share.argmax())
    report = Report(
        "Near duplicates",
        f"Asked about a training row ({measured.edits[0]}), {measured.methods[best]} has it in the top "
        f"{measured.tops[0]} for {share[best]:.0%} of the rows, "
        f"{measured.methods[int(share.argmin())]} for {share.min():.0%}.",
        (table,),
        (Figure(f"Source row among the top {measured.tops[0]}", drawing),),
        provenance=provenance(
            retriever, question, command, queries=len(measured.rows), exact=question.spec.exact, seed=seed
        ),
    )
    result = {
        "methods": list(measured.methods),
        "edits": list(measured.edits),
        "tops": list(measured.tops),
        "hit_rate": listed_values(measured.hits.mean(axis=2)),
        "hits": measured.hits,
        "training_rows": measured.rows,
        "n_duplicated": measured.n_duplicated,
        "seed": seed,
        "question": question_record(retriever, retriever.resolve(question, top=max(measured.tops))),
    }
    return report, result
