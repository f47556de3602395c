"""One answer for many test rows: summed query vectors against sums of scores that are computed row by row."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import N_QUERIES, error
from tiny import write_jsonl

from forebear import BuildOptions, InputError, QuerySpec, Retriever, build_index, choose_model, rows_from_texts
from forebear.cli.main import run
from forebear.indexer.gradients.whole import summed_gradients, whole_gradients
from forebear.retriever.deep import search as gradients
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.inverse import CurvatureSpec
from forebear.retriever.question.methods import METHODS

AT_HEAD = ("nn-dot", "sbert-dot", "gd", "if", "rep", "tracin", "tracin-last")
GROUPS = np.array([1, 0, 0, 2, 1, 0, 1])


def scores_of(ranking, live):
    """Scores of one end of a complete ranking, in the order of the live rows, ``(q, n)``."""
    out = np.empty(ranking.scores.shape)
    np.put_along_axis(out, np.searchsorted(live, ranking.rows), ranking.scores, axis=1)
    return out


def by_group(scores):
    """Sums over the rows of each group, ``(3, n)``, by a loop."""
    return np.stack([sum(scores[q] for q in range(N_QUERIES) if GROUPS[q] == g) for g in range(3)])


@pytest.fixture(scope="module")
def deep(bert_world, tmp_path_factory):
    """The world's rows indexed with the gradients of the last layer, at both checkpoints."""
    source = rows_from_texts(bert_world.texts, bert_world.labels)
    options = BuildOptions(scopes=("head", "top-1"), calibration_queries=0, shard_rows=17, dampings=("0.1x",))
    chosen = choose_model(None, bert_world.models, bert_world.etas).checkpoints
    return Retriever(build_index(source, tmp_path_factory.mktemp("deep") / "index", chosen, options))


@pytest.mark.parametrize("exact", ["rerank", "full"])
@pytest.mark.parametrize("target", ["predicted", "gold"])
def test_scores_of_a_group_are_the_sums_of_its_rows_scores(bert_world, target, exact):
    retriever = bert_world.retriever
    live = retriever.index.live
    spec = QuerySpec(methods=AT_HEAD, target=target, exact=exact, top=len(live))
    gold = np.array(bert_world.query_labels)
    answers = retriever.aggregate([bert_world.queries], gold, GROUPS, spec)
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    for name in AT_HEAD:
        truth = by_group(retriever.scores(source, name, target=target))
        assert error(scores_of(answers.rankings[name][0], live), truth) < 1e-9
        few = retriever.aggregate([bert_world.queries], gold, GROUPS, QuerySpec(methods=(name,), target=target, top=5))
        for end, sign in zip(few.rankings[name], (-1, 1), strict=True):
            np.testing.assert_array_equal(end.rows, live[np.argsort(sign * truth, axis=1, kind="stable")[:, :5]])


def test_three_classes_and_pairs(make_world):
    world = make_world("distilbert", 3, True, 2)
    live = world.index.live
    texts = [list(column) for column in zip(*world.queries, strict=True)]
    methods = ("gd", "if", "tracin")
    answers = world.retriever.aggregate(texts, None, GROUPS, QuerySpec(methods=methods, top=len(live)))
    for name in methods:
        truth = by_group(world.retriever.scores(world.queries, name))
        assert error(scores_of(answers.rankings[name][0], live), truth) < 1e-9


@pytest.mark.parametrize("curvature", ["cg", "lissa"])
def test_iterated_curvature_of_the_head_is_summed_too(bert_world, curvature):
    choices = {"curvature": curvature, "tolerance": 1e-10, "lissa": "han20,depth=50"}
    live = bert_world.index.live
    spec = QuerySpec(methods=("if",), top=len(live), **choices)
    found = bert_world.retriever.aggregate([bert_world.queries], None, GROUPS, spec).rankings["if"][0]
    truth = by_group(bert_world.retriever.scores(bert_world.queries, "if", **choices))
    assert error(scores_of(found, live), truth) < 1e-7
    alone = [r.rankings["if"][0].convergence for r in (
        bert_world.retriever.answer_block(0, [[text]], None, spec) for text in bert_world.queries
    )]  # fmt: skip
    of_groups = [[alone[i] for i in np.flatnonzero(g == GROUPS)] for g in range(3)]
    residuals = [max(one.residual[0] for one in group) for group in of_groups]
    np.testing.assert_allclose(found.convergence.residual, residuals, rtol=1e-3)
    assert found.convergence.iterations.tolist() == [max(one.iterations[0] for one in group) for group in of_groups]


@pytest.mark.parametrize("exact", ["rerank", "full"])
def test_deeper_scopes_sum_whole_gradients(deep, bert_world, exact, monkeypatch):
    live = deep.index.live
    methods = ("gd", "if", "tracin", "rep")
    spec = QuerySpec(methods=methods, scope="top-1", top=len(live), exact=exact, candidates=len(live))
    answers = deep.aggregate([bert_world.queries], None, GROUPS, spec)
    monkeypatch.setattr(gradients, "VECTOR_BYTES", 1)  # a group at a time
    again = deep.aggregate([bert_world.queries], None, GROUPS, spec)
    for name in methods:
        truth = by_group(deep.scores(bert_world.queries, name, scope="top-1"))
        assert error(scores_of(answers.rankings[name][0], live), truth) < 2e-5
        assert error(scores_of(again.rankings[name][0], live), truth) < 2e-5


def test_candidates_and_certified_answers_are_those_of_the_full_search(deep, bert_world):
    spec = {"methods": ("gd", "if"), "scope": "top-1", "top": 5}
    asked = ([bert_world.queries], None, GROUPS)
    full = deep.aggregate(*asked, QuerySpec(**spec, exact="full"))
    proven = deep.aggregate(*asked, QuerySpec(**spec, certify=True))
    for name in spec["methods"]:
        for a, b in zip(full.rankings[name], proven.rankings[name], strict=True):
            assert b.proven.all()
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)


def test_summed_gradients_are_sums_of_whole_ones(deep, bert_world):
    parameters = GradientSearch.kept(deep.models, "top-1", CurvatureSpec()).gradients.parameters
    where = (deep.classifier(), parameters, [bert_world.queries], np.array(bert_world.query_labels))
    whole, found = whole_gradients(*where), summed_gradients(*where, GROUPS)
    assert set(found) == set(whole)
    for name, values in whole.items():
        for g in range(3):
            truth = values[g == GROUPS].double().sum(dim=0).numpy()
            np.testing.assert_allclose(found[name][g].numpy(), truth, atol=1e-5 * max(np.abs(truth).max(), 1e-30))


def test_one_row_is_answered_as_it_is_alone(bert_world):
    one = bert_world.queries[:1]
    alone = bert_world.retriever.retrieve(one, methods=["gd", "if"], top=4)
    together = bert_world.retriever.retrieve(one, methods=["gd", "if"], top=4, aggregate=True)
    numbers, of_sets = ["score", "effect", "effect_probability"], ["effect_together", "effect_probability_together"]
    assert together.drop_columns(numbers + of_sets).equals(alone.drop_columns(numbers))
    for name in numbers:
        np.testing.assert_allclose(together[name].to_numpy(), alone[name].to_numpy(), rtol=1e-9)


def test_many_rows_give_one_answer_that_names_only_what_they_share(bert_world):
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    table = bert_world.retriever.retrieve(source, methods=["gd"], top=3, target="gold", aggregate=True)
    assert table.num_rows == 6
    assert set(table["query"].to_pylist()) == {0}
    assert len(set(bert_world.query_labels)) == 2
    assert table["query_label"].null_count == table["target"].null_count == 6
    facts = json.loads(table.schema.metadata[b"forebear"])
    assert facts["aggregate"] is True
    total = bert_world.retriever.scores(bert_world.queries, "gd", aggregate=True)
    assert total.shape == (1, bert_world.index.manifest.n_live)
    np.testing.assert_allclose(total[0], bert_world.retriever.scores(bert_world.queries, "gd").sum(axis=0))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.linear])
def test_methods_that_are_not_linear_are_refused(name):
    with pytest.raises(InputError, match=f"aggregate=True .* says nothing of {name.replace('+', '.')}"):
        QuerySpec(methods=(name,), aggregate=True).check()


def test_the_refitted_representer_is_refused(bert_world, tmp_path):
    source = rows_from_texts(bert_world.texts, bert_world.labels)
    chosen = choose_model(None, bert_world.models[-1:]).checkpoints
    index = build_index(source, tmp_path / "index", chosen, BuildOptions(rep_refit=True))
    with pytest.raises(InputError, match="rep_refit=True"):
        Retriever(index).retrieve(bert_world.queries, methods=["rep"], aggregate=True)


def test_the_command_writes_one_answer_and_shows_it(bert_world, tmp_path, capsys):
    test = write_jsonl(tmp_path / "test.jsonl", text=bert_world.queries, label=bert_world.query_labels)
    args = ["retrieve", "--index", str(bert_world.index.folder), "--test", str(test), "--method", "if", "--top", "3"]
    assert run([*args, "--aggregate", "--out", str(tmp_path / "a.parquet")]) == 0
    assert "7 queries asked together, 6 results" in capsys.readouterr().err
    truth = bert_world.retriever.scores(bert_world.queries, "if").sum(axis=0)
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    live = bert_world.index.live
    assert [r["row"] for r in table[:3]] == live[np.argsort(-truth, kind="stable")[:3]].tolist()
    assert run([*args, "--aggregate"]) == 0
    shown = capsys.readouterr().out
    assert "7 queries together" in shown
    assert str(table[0]["row"]) in shown
    assert run([*args[:-3], "gc", "--aggregate"]) == 2
    assert "not linear" in capsys.readouterr().err
