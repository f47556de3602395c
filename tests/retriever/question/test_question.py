"""A question is resolved once; a searcher for each representation answers it; a new method is a row of the table."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from conftest import error

from forebear import InputError, MissingStoreError, QuerySpec
from forebear.indexer.model.forward import run_forward
from forebear.retriever.head.vectors import VECTORS, StoredVector
from forebear.retriever.question import spec as module
from forebear.retriever.question.methods import METHODS, STORED, Method, Searched, Stored
from forebear.retriever.searchers import SEARCHERS


def test_every_method_has_a_searcher_and_every_searcher_a_method():
    assert set(SEARCHERS) == set(get_args(Searched))
    found = {method.searched_by(scope) for method in METHODS.values() for scope in ("head", "all")}
    assert found == set(SEARCHERS)


def test_a_question_is_checked_once_however_many_blocks_are_asked(bert_world, monkeypatch):
    checked = []
    check = module.check_question
    monkeypatch.setattr(module, "check_question", lambda question: checked.append(question) or check(question))
    table = bert_world.retriever.retrieve(bert_world.queries, methods=["gd", "nn-cos", "tracin-we"], top=2)
    assert table.num_rows == len(bert_world.queries) * 3 * 2 * 2
    assert len(checked) == 1


def test_a_resolved_question_stays_as_it_is_and_its_choices_can_be_changed(bert_world):
    question = bert_world.retriever.resolve(QuerySpec(methods=("gd", "nn-cos"), top=3))
    assert bert_world.retriever.resolve(question) is question
    other = bert_world.retriever.resolve(question, top=4)
    assert (other.spec.top, other.methods) == (4, question.methods)
    assert other.digest != question.digest
    part = question.of([METHODS["nn-cos"]])
    assert part.spec.methods == ("nn-cos",)


def test_a_question_of_another_index_is_resolved_anew(bert_world, tmp_path):
    import shutil

    from forebear import Retriever

    shutil.copytree(bert_world.index.folder, tmp_path / "i")
    other = Retriever(tmp_path / "i")
    question = bert_world.retriever.resolve(QuerySpec(methods=("gd",)))
    assert other.resolve(question).index is other.index


def test_choices_that_name_spans_are_filled_in_for_methods_by_spans_alone(bert_world):
    assert bert_world.retriever.resolve(QuerySpec(methods=("gd",))).spec.spans is None
    question = bert_world.retriever.resolve(QuerySpec(methods=("if++", "gd")))
    assert (question.spec.spans, question.spec.span_column, question.query_spans) == ("clauses", 0, "clauses")


@pytest.mark.parametrize(
    ("choices", "error_type", "said"),
    [
        ({"top": 0}, InputError, "top=0"),
        ({"methods": ("no-such",)}, InputError, "'no-such' is not known"),
        ({"scope": "top-1"}, MissingStoreError, "scopes="),
        ({"methods": ("if++",), "span_column": 7}, InputError, "span column 7"),
    ],
)
def test_what_an_index_cannot_answer_is_refused_when_the_question_is_resolved(bert_world, choices, error_type, said):
    with pytest.raises(error_type, match=said):
        bert_world.retriever.resolve(QuerySpec(**choices))


def test_a_method_over_another_stored_vector_takes_one_entry_and_one_row(bert_world, monkeypatch):
    """What ``docs/`` shows: the cosine of the residuals p - y of both rows."""

    def residuals(batch):
        return batch.forward.residuals_and_losses(batch.targets)[0]

    monkeypatch.setitem(STORED, "residual", Stored("features", "residual p - y"))
    monkeypatch.setitem(VECTORS, "residual", StoredVector(lambda index: index.residuals(), residuals))
    method = Method(
        name="residual-cos", representation="residual", metric="cos", formula="cos(r_q, r_n)", source="here"
    )
    monkeypatch.setitem(METHODS, "residual-cos", method)

    index, retriever = bert_world.index, bert_world.retriever
    stored = np.stack([index.residuals().take(np.array([row]))[0] for row in index.live]).astype(np.float64)
    forward = run_forward(retriever.classifier(), [bert_world.queries])
    asked = forward.logits - forward.logits.max(axis=1, keepdims=True)
    asked = np.exp(asked) / np.exp(asked).sum(axis=1, keepdims=True) - np.eye(asked.shape[1])[forward.predictions]
    truth = (asked @ stored.T) / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    assert error(retriever.scores(bert_world.queries, "residual-cos"), truth) < 1e-6

    for exact in ("none", "rerank", "full"):
        rows = retriever.retrieve(bert_world.queries, methods=["residual-cos"], top=3, exact=exact).to_pylist()
        best = [row["row"] for row in rows if row["query"] == 0 and row["side"] == "proponent"]
        assert truth[0][np.searchsorted(index.live, best)] == pytest.approx(np.sort(truth[0])[::-1][:3])
