"""What holds of every corpus, asked of random small ones: few words, equal rows, empty texts, ties, a class missing.

The examples are the same at each run. FOREBEAR_EXAMPLES=N asks N other ones a property, chosen anew each time.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROW_METHODS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from forebear.indexer.building.build import BuildOptions, append_rows, build_index, retire_rows
from forebear.indexer.index import Index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.results import Answers
from forebear.retriever.question.methods import METHODS
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

DEEP_METHODS = ("gd", "gc", "if", "rif", "tracin")
BITWISE = ("nn-euc", "nn-cos", "nn-dot", "gd", "gc", "tracin", "tracin-last")  # of stored factors alone
N_CLASSES = 3
EXAMPLES = int(os.environ.get("FOREBEAR_EXAMPLES", "0"))
WORDS = ("good", "bad", "film", "xyzzy")  # the last is unknown to the model


def examples(n):
    """``n`` fixed examples, or as many as the environment asks for."""
    return settings(
        max_examples=EXAMPLES or n, derandomize=not EXAMPLES, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Training rows, test rows, and what is done with them."""

    texts: list[str]
    labels: list[int]
    queries: list[str]
    top: int
    seed: int  # of the model
    shard_rows: int


TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), st.sampled_from(("", " ", "\t.")))


@st.composite
def corpora(draw, least=1, most=40):
    """Rows drawn from few distinct ones, so that many are equal."""
    pool = draw(st.lists(st.tuples(TEXTS, st.integers(0, N_CLASSES - 1)), min_size=1, max_size=12))
    rows = draw(st.lists(st.sampled_from(pool), min_size=least, max_size=most))
    return Corpus(
        texts=[text for text, _ in rows], labels=[label for _, label in rows],
        queries=draw(st.lists(st.one_of(TEXTS, st.sampled_from([text for text, _ in rows])), min_size=1, max_size=4)),
        top=draw(st.integers(1, 9)), seed=draw(st.integers(0, 1)), shard_rows=draw(st.sampled_from((3, 16, 64))),
    )  # fmt: skip


@pytest.fixture(scope="module")
def build(tiny_model):
    """Index rows with one of two tiny models, its two checkpoints and all stores."""

    def build(folder, corpus, texts, labels, **choices):
        models = [tiny_model("bert", N_CLASSES, corpus.seed), tiny_model("bert", N_CLASSES, corpus.seed + 1)]
        options = {"stores": ("features", "sbert", "words"), "words_tops": (0, 3), "sketch_dim": 16}
        options |= {"sentence_model": tiny_model("bert", 2, 9), "shard_rows": corpus.shard_rows} | choices
        chosen = choose_model(None, models, (0.5, 1.5)).checkpoints
        return build_index(rows_from_texts(texts, labels), Path(folder) / "index", chosen, BuildOptions(**options))

    return build


def answer(retriever, queries, **choices) -> Answers:
    """All answers in one block."""
    (answers,) = retriever.answers(rows_from_texts(queries), QuerySpec(**choices))
    return answers


def assert_ends_of(scores, live, ranking, largest, kind, tolerance, where):
    """A rank list is an end of the full scores ``(n,)``; among rows of one kind the lower number comes first."""
    rows, found = ranking
    k, limit = len(rows), tolerance * max(np.abs(scores).max(), 1e-300)
    order = np.lexsort((live, -scores if largest else scores))[:k]
    assert len(set(rows.tolist())) == k, where
    assert np.abs(found - scores[order]).max() <= limit, (where, found, scores[order])
    at = np.searchsorted(live, rows)
    assert np.abs(found - scores[at]).max() <= limit, (where, found, scores[at])
    keys = list(zip(-found if largest else found, rows.tolist(), strict=True))
    assert keys == sorted(keys), (where, keys)
    for one in set(map(kind, rows.tolist())):  # equal rows have equal scores, and none is passed over
        mine = [row for row in rows.tolist() if kind(row) == one]
        assert mine == [row for row in live.tolist() if kind(row) == one][: len(mine)], (where, one)
        assert len(set(found[np.isin(rows, mine)].tolist())) == 1, (where, one)


def assert_disjoint(scores, live, ends, tolerance, where):
    """A row on both sides of 2 k or more is tied with so many that no ranking could keep it from one of them."""
    k = len(ends[0])
    limit = tolerance * np.abs(scores).max()
    for row in set(ends[0].tolist()) & set(ends[1].tolist()) if 2 * k <= len(live) else ():
        tied = int((np.abs(scores - scores[live == row]) <= limit).sum())
        assert tied > len(live) - 2 * k + 1, (where, row, tied)


def check_methods(retriever, corpus, methods, scope, **choices):
    """Rank lists of every method are the sorted full scores, however they are found."""
    live, n = retriever.index.live, retriever.index.manifest.n_live
    pieces = retriever.classifier().tokenizer(corpus.texts)["input_ids"]

    def kind(row):
        return tuple(pieces[row]), corpus.labels[row], corpus.texts[row] if by_text else ""

    asked = {"methods": methods, "top": corpus.top, "scope": scope, **choices}
    found = {exact: answer(retriever, corpus.queries, exact=exact, **asked).rankings for exact in ("rerank", "full")}
    for name in methods:
        by_text = METHODS[name].representation == "sentence"
        tolerance = 1e-9 if scope == "head" and not METHODS[name].by_words else 2e-4
        scores = retriever.scores(corpus.queries, name, scope=scope)
        assert scores.shape == (len(corpus.queries), n)
        for q in range(len(corpus.queries)):
            for exact, answers in found.items():
                ends = [(ranking.rows[q], ranking.scores[q]) for ranking in answers[name]]
                for end, largest in zip(ends, (True, False), strict=True):
                    where = (scope, name, exact, q, "proponents" if largest else "opponents")
                    assert_ends_of(scores[q], live, end, largest, kind, tolerance, where)
                assert_disjoint(scores[q], live, [rows for rows, _ in ends], tolerance, (scope, name, exact, q))


@pytest.mark.slow
@examples(8)
@given(corpora())
def test_rank_lists_are_the_sorted_full_scores(build, corpus):
    with tempfile.TemporaryDirectory() as folder:
        index = build(folder, corpus, corpus.texts, corpus.labels)
        check_methods(Retriever(index), corpus, ROW_METHODS, "head")


@pytest.mark.slow
@examples(4)
@given(corpora(least=2))
def test_rank_lists_beyond_the_head_are_the_sorted_full_scores(build, corpus):
    with tempfile.TemporaryDirectory() as folder:
        index = build(folder, corpus, corpus.texts, corpus.labels, stores=("features",), scopes=("head", "all"))
        check_methods(Retriever(index), corpus, DEEP_METHODS, "all", candidates=max(len(corpus.texts), corpus.top))


@pytest.mark.slow
@examples(5)
@given(corpora())
def test_queries_together_apart_and_aggregated_get_the_same(build, corpus):
    """Also: contributions of shared words sum to the score."""
    with tempfile.TemporaryDirectory() as folder:
        retriever = Retriever(build(folder, corpus, corpus.texts, corpus.labels))
        asked = {"methods": ROW_METHODS, "top": corpus.top}
        together = answer(retriever, corpus.queries, **asked).rankings
        linear = tuple(name for name in ROW_METHODS if METHODS[name].linear)
        for q, query in enumerate(corpus.queries):
            alone = answer(retriever, [query], **asked).rankings
            summed = answer(retriever, [query], methods=linear, top=corpus.top, aggregate=True).rankings
            for name in ROW_METHODS:
                for a, b in zip(together[name], alone[name], strict=True):
                    # The model's float32 depends on the rows of a batch; a distance or cosine may be 0 but for that.
                    size = np.abs(a.scores[q]).max() if METHODS[name].metric == "dot" else 1.0
                    limit = 1e-4 * max(size, 1e-300)
                    assert np.abs(a.scores[q] - b.scores[0]).max() <= limit, (name, q)
                for a, b in zip(alone[name], summed.get(name, alone[name]), strict=True):
                    size = np.abs(b.scores).max()
                    if name == "rep":  # its sum leaves out what rounding adds to the sum of a row's p - y
                        assert np.abs(a.scores - b.scores).max() <= 1e-6 * size, q
                        continue
                    assert a.rows.tolist() == b.rows.tolist(), (name, q)
                    assert np.abs(a.scores - b.scores).max() <= 1e-12 * size, (name, q)
                for end in alone[name]:
                    for score, shared in zip(end.scores[0], [] if end.words is None else end.words[0], strict=False):
                        parts = np.abs(shared[1]).sum() if len(shared[1]) else 0.0
                        assert abs(shared[1].sum() - score) <= 1e-9 * max(parts, 1e-300), (name, q)


@pytest.mark.slow
@examples(5)
@given(corpora(least=2, most=20), st.data())
def test_retire_then_append_equals_a_build(build, corpus, data):
    """One row a batch, so that the factors of a row do not depend on its neighbours."""
    n = len(corpus.texts)
    retired = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1), label="retired"))
    added = data.draw(st.lists(st.tuples(TEXTS, st.integers(0, N_CLASSES - 1)), min_size=1, max_size=6), label="added")
    more, gold = [text for text, _ in added], [label for _, label in added]
    kept = [i for i in range(n) if i not in retired]
    numbers = np.array([*kept, *range(n, n + len(more))])
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        build(first, corpus, corpus.texts, corpus.labels, batch_tokens=1)
        retire_rows(Path(first) / "index", retired)
        append_rows(Path(first) / "index", rows_from_texts(more, gold))
        changed = Retriever(Index.open(Path(first) / "index"))
        texts, labels = [corpus.texts[i] for i in kept] + more, [corpus.labels[i] for i in kept] + gold
        fresh = Retriever(build(second, corpus, texts, labels, batch_tokens=1))
        assert changed.index.live.tolist() == numbers.tolist()
        asked = {"methods": ROW_METHODS, "top": corpus.top}
        one, other = (answer(retriever, corpus.queries, **asked).rankings for retriever in (changed, fresh))
        for name in ROW_METHODS:
            for a, b in zip(one[name], other[name], strict=True):
                if name in BITWISE:
                    assert a.rows.tolist() == numbers[b.rows].tolist(), name
                    assert a.scores.tobytes() == b.scores.tobytes(), name
                size = np.maximum(np.abs(b.scores).max(axis=1, keepdims=True), 1e-300)
                assert (np.abs(a.scores - b.scores) <= 1e-6 * size).all(), name


def test_the_corpora_hold_what_they_are_meant_to():
    """Equal rows, a class missing, empty texts, single rows: each among the first examples."""
    seen: Counter[str] = Counter()

    @examples(40)
    @given(corpora())
    def look(corpus):
        rows = list(zip(corpus.texts, corpus.labels, strict=True))
        seen["equal rows"] += len(set(rows)) < len(rows)
        seen["a class missing"] += len(set(corpus.labels)) < N_CLASSES
        seen["an empty text"] += "" in corpus.texts
        seen["fewer rows than two tops"] += len(rows) < 2 * corpus.top
        seen["many rows"] += len(rows) >= 2 * corpus.top

    look()
    assert len(+seen) == 5, seen
