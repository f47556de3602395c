"""What stays with an answer: the digest of its question, the residual of its solver, every field of its ranking."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import labels
from places import ROOT
from tiny import sentences, write_jsonl

from forebear import Index, QuerySpec, Retriever
from forebear.cli.main import run
from forebear.errors import InputError
from forebear.evaluation.common.comparisons import provenance, question_record
from forebear.evaluation.common.queries import QueryRows, score_queries
from forebear.indexer.curvature.convergence import Convergence
from forebear.indexer.curvature.solvers import HAN20
from forebear.indexer.spans.text import Span
from forebear.retriever.question.spec import QueryChoices
from forebear.retriever.ranking import Ranking, join


def digest(retriever: Retriever, **choices: object) -> str:
    return retriever.resolve(QuerySpec(**choices)).digest  # type: ignore[arg-type]


# ---------------------------------------------------------------- digests

BY_SPANS = {"methods": ("if++",), "scope": "head"}
LISSA = {"methods": ("if",), "curvature": "lissa"}
CG = {"methods": ("if",), "curvature": "cg"}

# A question, and another way to write it.
SAME = [
    (LISSA, {**LISSA, "lissa": "han20"}),
    ({**LISSA, "lissa": "han20"}, {**LISSA, "lissa": str(HAN20)}),
    ({**LISSA, "lissa": "han20,depth=2500"}, {**LISSA, "lissa": "damping=3e-3,scale=1e4,batch_rows=8,depth=2500"}),
    ({"methods": ("gc", "if")}, {"methods": ("if", "gc")}),
    ({"methods": ("gc", "gc")}, {"methods": ("gc",)}),
    ({"methods": ("if",)}, {"methods": ("if",), "curvature": "exact"}),
    ({"methods": ("if",)}, {"methods": ("if",), "damping": "0.1x"}),
    ({"methods": ("if",), "damping": "0.003"}, {"methods": ("if",), "damping": "3e-3"}),
    (CG, {**CG, "damping": "0.1x"}),
    (CG, {**CG, "curvature_rows": 60}),
    (BY_SPANS, {**BY_SPANS, "spans": "clauses"}),
    (BY_SPANS, {**BY_SPANS, "query_spans": "clauses"}),
    (BY_SPANS, {**BY_SPANS, "span_column": 0}),
    ({"methods": ("gc",)}, {"methods": ("gc",), "damping": "2x", "lissa": "pez21", "word": "film", "recall": 0.9}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_ways_to_write_a_question_have_one_digest(bert_world, one, other):
    assert digest(bert_world.retriever, **one) == digest(bert_world.retriever, **other)


def test_a_relative_damping_is_the_absolute_one_that_it_comes_to(bert_world):
    size = bert_world.index.head.damping("2x")["damping"]
    assert digest(bert_world.retriever, methods=("if",), damping="2x") == digest(
        bert_world.retriever, methods=("if",), damping=repr(size)
    )


# Of every field of a question: one where it matters, and another value.
OTHER = {
    "methods": ({}, ("gd",)),
    "top": ({}, 3),
    "target": ({}, "gold"),
    "exact": ({}, "full"),
    "scope": ({"methods": ("gd",)}, "all"),
    "recall": ({"methods": ("gd",), "scope": "all"}, 0.9),
    "candidates": ({"methods": ("gd",), "scope": "all"}, 50),
    "normalise": ({"methods": ("tracin-we",)}, True),
    "spans": (BY_SPANS, "sentences"),
    "query_spans": (BY_SPANS, "sentences"),
    "word": ({"methods": ("saliency-if",)}, "film"),
    "span_column": (BY_SPANS, 1),
    "aggregate": ({"methods": ("gd",)}, True),
    "certify": ({"methods": ("gd",), "scope": "all"}, True),
    "curvature": ({"methods": ("if",)}, "ekfac"),
    "damping": ({"methods": ("if",)}, "2x"),
    "curvature_rows": ({**LISSA, "scope": "all"}, 7),
    "lissa": (LISSA, "pez21"),
    "astra": ({"methods": ("if",), "scope": "all", "curvature": "astra", "damping": "0.01"}, "steps=7"),
    "tolerance": (CG, 0.5),
}


@pytest.mark.parametrize("field", [field.name for field in fields(QuerySpec)])
def test_every_choice_that_matters_changes_the_digest(bert_world, field, monkeypatch):
    monkeypatch.setattr("forebear.retriever.question.spec.check_question", lambda question: None)  # no sketches here
    asked, value = OTHER[field]
    assert digest(bert_world.retriever, **asked) != digest(bert_world.retriever, **{**asked, field: value})


@pytest.mark.parametrize("choices", [{}, {"curvature": "lissa"}, {"curvature": "cg", "damping": "0.1x"}])
def test_the_command_line_and_python_give_one_question_one_digest(bert_world, tmp_path, choices):
    test = write_jsonl(tmp_path / "test.jsonl", text=bert_world.queries)
    options = [part for name, value in choices.items() for part in (f"--{name}", value)]
    out = tmp_path / "out.parquet"
    command = ["retrieve", "--index", str(bert_world.index.folder), "--test", str(test), "--method", "if"]
    assert run([*command, "--top", "4", "--out", str(out), "--quiet", *options]) == 0
    by_command = json.loads(pq.read_schema(out).metadata[b"forebear"])
    table = bert_world.retriever.retrieve(bert_world.queries, methods=("if",), top=4, **choices)
    in_python = json.loads(table.schema.metadata[b"forebear"])
    assert by_command["query_digest"] == in_python["query_digest"]


# ---------------------------------------------------------------- typed keywords


def test_keywords_of_a_question_are_the_fields_of_its_spec():
    """Of the same types; but methods may be any sequence."""
    keywords, spec = get_type_hints(QueryChoices), get_type_hints(QuerySpec)
    assert list(keywords) == [field.name for field in fields(QuerySpec)]
    assert keywords.pop("methods") == Sequence[str]
    assert all(keywords[name] == spec[name] for name in keywords)


def test_a_spec_and_keywords_make_one_question(bert_world):
    retriever, queries = bert_world.retriever, bert_world.queries[:2]
    spec = QuerySpec(methods=("gd", "gc"), top=3)
    assert retriever.retrieve(queries, spec=spec).equals(retriever.retrieve(queries, methods=["gd", "gc"], top=3))
    assert retriever.retrieve(queries, spec=spec, methods="gd").equals(
        retriever.retrieve(queries, methods=("gd",), top=3)
    )
    np.testing.assert_array_equal(
        retriever.scores(queries, spec=QuerySpec(methods=("if",), damping="2x")),
        retriever.scores(queries, "if", damping="2x"),
    )
    with pytest.raises(InputError, match="scores are of one method, not of 2"):
        retriever.scores(queries, spec=spec)
    with pytest.raises(TypeError, match="methdos"):
        retriever.retrieve(queries, methdos=["gd"])


SNIPPET = """
from forebear import Index, QuerySpec, Retriever
index = Index.build("model", "train.csv", "out", stores=["features"], max_length=40, progress=True)
retriever = Retriever(index)
answers = retriever.retrieve([("a", "b")], methods=["gc", "if"], top=5)
print(answers.select(["method", "side"]).to_pandas().to_string())
scores = retriever.scores(["a"], "gd", damping="0.1x")
retriever.retrieve(["a"], spec=QuerySpec(methods=("gd",)), scope="all")
"""


@pytest.mark.slow
def test_mypy_takes_what_is_right_and_refuses_a_misspelt_keyword(tmp_path):
    """By its strict rules, as a user's program is checked."""
    lines = {"good.py": SNIPPET, "bad.py": SNIPPET + "retriever.retrieve(['a'], methdos=['gd'])\n"}
    lines["worse.py"] = SNIPPET + "Index.build('m', 'r', 'o', max_lenght=3)\nretriever.scores(['a'], 'gd', top='3')\n"
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--strict"]
    done = subprocess.run(
        [*command, *map(str, map(tmp_path.joinpath, lines))], capture_output=True, text=True, cwd=ROOT, check=False
    )
    errors = sorted(line for line in done.stdout.splitlines() if "error:" in line)
    assert [Path(line.split(":")[0]).name for line in errors] == ["bad.py", "worse.py", "worse.py"], done.stdout
    assert "methdos" in errors[0]
    assert any("max_lenght" in line for line in errors)
    assert any('"top" to "scores"' in line for line in errors)


# ---------------------------------------------------------------- residuals


def test_a_report_states_the_residuals_of_its_own_scores_alone(bert_world):
    retriever = Retriever(Index.open(bert_world.index.folder))
    queries = QueryRows(
        source="test", rows=np.arange(4), texts=(sentences(4, seed=8),), labels=np.array(labels(4)), table=None
    )
    loose = QuerySpec(methods=("if",), curvature="cg", tolerance=0.5)
    tight = replace(loose, tolerance=1e-8)
    first = score_queries(retriever, queries, loose)
    second = score_queries(retriever, queries, tight)
    assert first.residuals["if"] > 1e-3
    assert second.residuals["if"] <= 1e-8
    plain = score_queries(retriever, queries, QuerySpec(methods=("gd",)))
    assert plain.residuals == {}
    stated = provenance(retriever, tight, "", residuals=second.residuals)
    assert stated["H^-1 of if"] == f"relative residual {second.residuals['if']:.1e}"
    assert "residuals" not in question_record(retriever, QuerySpec(methods=("gd",)), plain.residuals)
    assert not hasattr(retriever, "residuals")


# ---------------------------------------------------------------- joined rankings


def ranking(n_queries: int, seed: int) -> Ranking:
    """A ranking with something in every field."""
    rng = np.random.default_rng(seed)
    makers = {
        "rows": lambda: rng.integers(0, 9, (n_queries, 2)),
        "scores": lambda: rng.normal(size=(n_queries, 2)),
        "exact": lambda: True,
        "n_scored": lambda: rng.integers(0, 9, n_queries),
        "convergence": lambda: Convergence(rng.random(n_queries), rng.integers(0, 9, n_queries)),
        "proven": lambda: rng.random(n_queries) < 0.5,
        "words": lambda: [object() for _ in range(n_queries)],
        "spans": lambda: [[Span(0, i, i + 1)] * 2 for i in range(n_queries)],
        "query_spans": lambda: [Span(0, i, i + 1) for i in range(n_queries)],
        "n_cut": lambda: rng.integers(0, 9, n_queries),
        "effects": lambda: rng.normal(size=(n_queries, 2)),
        "effect_probabilities": lambda: rng.normal(size=(n_queries, 2)),
        "effects_together": lambda: rng.normal(size=(n_queries, 2)),
    }
    return Ranking(**{field.name: makers[field.name]() for field in fields(Ranking)})


def test_joined_rankings_keep_every_field():
    parts = [ranking(2, 0), ranking(3, 1)]
    joined = join(parts)
    for field in fields(Ranking):
        if field.name == "exact":
            continue
        if field.name == "convergence":
            pairs = [np.stack([p.convergence.residual, p.convergence.iterations]) for p in (joined, *parts)]
            np.testing.assert_array_equal(pairs[0], np.concatenate(pairs[1:], axis=1))
            continue
        found, wanted = getattr(joined, field.name), [one for part in parts for one in getattr(part, field.name)]
        assert len(found) == 5
        assert all(
            np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(found, wanted, strict=True)
        )
    assert join([replace(parts[0], exact=False), parts[1]]).exact is False


def test_joined_rankings_leave_empty_what_none_of_them_holds():
    may_lack = (field.name for field in fields(Ranking) if field.default is None)
    empty = dict.fromkeys(may_lack, None)
    assert {"convergence", "proven", "effects", "n_cut"} <= set(empty)
    joined = join([replace(ranking(2, 0), **empty), replace(ranking(1, 1), **empty)])
    assert all(getattr(joined, name) is None for name in empty)
