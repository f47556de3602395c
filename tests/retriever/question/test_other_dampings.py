"""Dampings that the index was not built with: the same answers as of an index that was."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import labels, sentences

from forebear import InputError, MissingStoreError, QuerySpec, Retriever
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.deep.row_lengths import RowLengths
from forebear.retriever.deep.search import GradientSearch


@pytest.fixture(scope="module")
def two_indexes(tmp_path_factory, tiny_model):
    """The same rows, some of them twice, with one damping; and with that one and two others."""
    texts, gold = sentences(30, seed=4), labels(30, 3)
    source = rows_from_texts([*texts, *texts[:3]], [*gold, *gold[:3]])
    chosen = choose_model(None, (tiny_model("bert", 3),), (1.0,)).checkpoints
    folder = tmp_path_factory.mktemp("dampings")
    retrievers = []
    for dampings in (("0.1x",), ("0.1x", "3x", "0.02")):
        options = BuildOptions(scopes=("head", "all"), sketch_dim=8, dampings=dampings, calibration_queries=0)
        retrievers.append(Retriever(build_index(source, folder / str(len(dampings)), chosen, options)))
    return retrievers


@pytest.mark.parametrize("damping", ["3x", "0.02"])
def test_the_head_takes_any_damping_and_scores_as_if_it_had_been_built_with_it(two_indexes, damping):
    one, _ = two_indexes
    queries = sentences(4, seed=9)
    for method in ("if", "rif"):
        found = [retriever.scores(queries, method, damping=damping) for retriever in two_indexes]
        np.testing.assert_array_equal(found[0], found[1])
        assert not np.allclose(found[0], one.scores(queries, method))
        tables = [r.retrieve(queries, methods=[method], damping=damping, top=9) for r in two_indexes]
        assert tables[0].drop_columns(["score"]).equals(tables[1].drop_columns(["score"]))
        np.testing.assert_array_equal(tables[0]["score"], tables[1]["score"])
    facts = [r.facts(QuerySpec(methods=("if",), damping=damping))["methods"]["if"]["damping"] for r in two_indexes]
    assert facts[0] == pytest.approx(facts[1], rel=1e-12)
    assert one.index.head.self_influence(damping)[30:].tolist() == one.index.head.self_influence(damping)[:3].tolist()


@pytest.mark.parametrize("damping", ["3x", "0.02"])
def test_beyond_the_head_any_damping_is_taken_where_every_row_is_scored(two_indexes, damping):
    one, _ = two_indexes
    queries = sentences(4, seed=9)
    for method in ("if", "rif"):
        found = [retriever.scores(queries, method, damping=damping, scope="all") for retriever in two_indexes]
        np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=2e-4 * np.abs(found[1]).max())
        table = one.retrieve(queries, methods=[method], damping=damping, scope="all", exact="full", top=5)
        best = [row["score"] for row in table.to_pylist() if row["query"] == 0 and row["side"] == "proponent"]
        np.testing.assert_allclose(best, np.sort(found[0][0])[::-1][:5], rtol=1e-4)
        with pytest.raises(MissingStoreError, match=r"damping 0\.1x .*, not"):
            one.retrieve(queries, methods=[method], damping=damping, scope="all")
    with pytest.raises(InputError, match="is lost in float32"):
        one.scores(queries, "if", damping="1e-30", scope="all")


def test_lengths_at_another_damping_are_solved_for_once_a_row(two_indexes, monkeypatch):
    one = Retriever(two_indexes[0].index)
    solved = []
    solve = RowLengths._solve_lengths
    monkeypatch.setattr(RowLengths, "_solve_lengths", lambda *args: solved.append(args[1].tolist()) or solve(*args))
    monkeypatch.setattr(GradientSearch, "chunks", lambda _self, _methods, n: [np.array([i]) for i in range(n)])
    found = one.scores(sentences(3, seed=9), "rif", damping="3x", scope="all")
    assert solved == [one.index.live.tolist()]
    np.testing.assert_allclose(found, two_indexes[0].scores(sentences(3, seed=9), "rif", damping="3x", scope="all"))
