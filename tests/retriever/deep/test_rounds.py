"""Scoring in rounds against sorting all scores: what is found, what is scored, and when it stops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import labels, make_tiny_model, sentences

from forebear import Retriever
from forebear.indexer.building.build import build_index
from forebear.indexer.building.calibration.needed_candidates import (
    RankCalibration,
    Ranking,
    _Estimates,
    _Needed,
    _stop_facts,
)
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches import projector as projecting
from forebear.indexer.sketches.estimates import Proposal
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.deep.candidates import Listed
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.rounds import FIRST_ROUND, rank_candidates
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.recall import deep_recall, n_candidates, stop_of
from forebear.retriever.question.spec import QuerySpec

METHOD = SimpleNamespace(name="if", query="preconditioned")
OTHER = SimpleNamespace(name="gd", query="gradient")


class Scorer:
    """Scores by a table ``(q, n)``, and notes what it was asked for."""

    def __init__(self, **tables: np.ndarray) -> None:
        self.tables, self.rounds = tables, []

    def __call__(self, methods, rows):
        self.rounds.append({m.name: rows[m.name].copy() for m in methods})
        assert list(rows) == [m.name for m in methods]
        return {m.name: np.take_along_axis(self.tables[m.name], rows[m.name], axis=1) for m in methods}, None


def listed_by(estimates: np.ndarray, error: float, m: int) -> tuple[Listed, Listed]:
    """The best ``m`` by estimate at each end, with what an error adds."""
    ends = []
    for sign in (1.0, -1.0):
        rows = np.argsort(-sign * estimates, axis=1, kind="stable")[:, :m]
        ends.append(Listed.by_reach(rows, sign * np.take_along_axis(estimates, rows, axis=1) + error))
    return ends[0], ends[1]


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_are_found_where_no_error_is_larger_than_allowed(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(3, size=(6, 900)).round(2)  # with ties
    error = rng.uniform(-0.3, 0.3, size=scores.shape)
    scorer = Scorer(**{"if": scores})
    first, last = rank_candidates(scorer, [METHOD], {"if": listed_by(scores - error, 0.3, 900)}, k)["if"]
    for q in range(6):
        best = np.lexsort((np.arange(900), -scores[q]))[:k]
        worst = np.lexsort((np.arange(900), scores[q]))[:k]
        np.testing.assert_array_equal(first.rows[q], best)
        np.testing.assert_array_equal(last.rows[q], worst)
        np.testing.assert_array_equal(first.scores[q], scores[q, best])
        scored = {row for of_round in scorer.rounds for row in of_round["if"][q].tolist()}
        assert first.n_scored[q] <= len(scored)  # a row of another query may have been scored besides
    assert first.n_scored.max() < 900 or k == 40


def test_rounds_grow_until_no_other_can_be_among_the_best():
    scores = np.random.default_rng(0).normal(size=(4, 900))
    scorer = Scorer(**{"if": scores})
    first, _ = rank_candidates(scorer, [METHOD], {"if": listed_by(scores, 1.5, 900)}, 5)["if"]
    np.testing.assert_array_equal(first.rows, np.argsort(-scores, axis=1)[:, :5])
    widths = [of_round["if"].shape[1] for of_round in scorer.rounds]
    assert len(widths) > 1
    assert widths[0] == 2 * FIRST_ROUND


def test_scoring_stops_when_no_other_can_be_among_the_best():
    scores = np.concatenate([np.linspace(10, 9, FIRST_ROUND), np.linspace(1, 0, 900)])[None]
    for error, n in ((0.5, FIRST_ROUND), (7.95, FIRST_ROUND), (8.5, None)):
        scorer = Scorer(**{"if": scores})
        high, low = listed_by(scores, error, 400)
        first, _ = rank_candidates(scorer, [METHOD], {"if": (high, low)}, FIRST_ROUND)["if"]
        np.testing.assert_array_equal(first.rows[0], np.arange(FIRST_ROUND))
        if n is not None:  # the other end's rows are near one another: they are all open
            asked = np.concatenate([of_round["if"][0] for of_round in scorer.rounds])
            assert not np.isin(np.arange(2 * n, 2 * n + 50), asked).any()


def test_candidates_without_a_reach_are_scored_at_once():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 50))
    rows = np.argsort(-scores, axis=1)
    listed = Listed(rows[:, :20]), Listed(rows[:, ::-1][:, :20])
    scorer = Scorer(**{"if": scores})
    first, last = rank_candidates(scorer, [METHOD], {"if": listed}, 5)["if"]
    assert len(scorer.rounds) == 1
    assert (first.n_scored == 40).all()
    np.testing.assert_array_equal(first.rows, rows[:, :5])
    np.testing.assert_array_equal(last.rows, rows[:, ::-1][:, :5])


def test_methods_that_stopped_are_not_scored_again():
    rng = np.random.default_rng(1)
    easy, hard = np.sort(rng.normal(size=(2, 600)), axis=1), rng.normal(size=(2, 600))
    scorer = Scorer(**{"if": easy, "gd": hard})
    listed = {"if": listed_by(easy, 1e-9, 600), "gd": listed_by(hard, 3.0, 600)}
    ends = rank_candidates(scorer, [METHOD, OTHER], listed, 3)
    assert list(scorer.rounds[0]) == ["if", "gd"]
    assert all(list(of_round) == ["gd"] for of_round in scorer.rounds[1:])
    np.testing.assert_array_equal(ends["if"][0].rows, [[599, 598, 597]] * 2)
    np.testing.assert_array_equal(ends["gd"][0].rows, np.argsort(-hard, axis=1)[:, :3])


def test_as_many_rows_as_there_are():
    scores = np.array([[3.0, 1.0, 2.0]])
    first, last = rank_candidates(Scorer(**{"if": scores}), [METHOD], {"if": listed_by(scores, 0.1, 3)}, 3)["if"]
    assert first.rows.tolist() == [[0, 2, 1]]
    assert last.rows.tolist() == [[1, 2, 0]]
    assert first.n_scored.tolist() == [3]


# ---------------------------------------------------------------- what is allowed


def test_allowed_errors_keep_their_recall_of_rows_that_are_listed():
    rng = np.random.default_rng(2)
    shares, errors = rng.uniform(size=(2, 40, 3)), rng.normal(size=(2, 40, 3))
    facts = _stop_facts(0.95, _Needed(shares, errors), [0.5, 0.8])
    assert facts["list_share"] == 0.95
    for recall, allowed in facts["errors"].items():
        for of_shares, of_errors in zip(shares, errors, strict=True):
            found = ((of_shares <= 0.95) & (of_errors <= allowed)).mean(axis=1)
            assert found.sum() / 41 >= float(recall)
    assert _stop_facts(None, _Needed(shares, errors), [0.5]) == {}
    assert _stop_facts(0.3, _Needed(shares, errors), [0.9]) == {}  # whatever the error: too few are listed


def test_errors_are_what_scores_are_beyond_their_estimates():
    """A sketch that is the gradient itself, but for noise that is known, in units that are known."""
    rng = np.random.default_rng(3)
    n, q, m = 60, 12, 40
    live, sample, excluded = np.arange(n), np.sort(rng.permutation(n)[:m]), np.zeros((q, n), bool)
    lengths, query_lengths = rng.uniform(0.5, 2, size=n).astype(np.float32), rng.uniform(0.5, 2, size=q)
    estimates, units = rng.uniform(-0.3, 0.3, size=(q, n)).astype(np.float32), rng.uniform(0.1, 1, size=(q, n))
    noise = 0.05 * rng.normal(size=(q, n))
    dots = (estimates + noise) * lengths * query_lengths[:, None]
    part = SimpleNamespace(
        store=SimpleNamespace(lengths=lengths, codes=None), queries=SimpleNamespace(lengths=query_lengths)
    )
    calibration = RankCalibration(part, live, sample, excluded, 0)
    needed = calibration._needed(
        np.arange(q), _Estimates(estimates, None, units), Ranking(dots[:, sample], False), Proposal(False, 0.0), 2
    )
    for i in range(q):
        best = sample[np.argsort(-dots[i, sample])[:2]]
        worst = sample[np.argsort(dots[i, sample])[:2]]
        np.testing.assert_allclose(needed.errors[0, i], noise[i, best] / units[i, best], atol=1e-5)
        np.testing.assert_allclose(needed.errors[1, i], -noise[i, worst] / units[i, worst], atol=1e-5)


# ---------------------------------------------------------------- an index


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    """400 rows whose sketches lose much, so that long lists are needed."""
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projecting, "PRINCIPAL", 4)
        patch.setattr(projecting, "RANDOM", 3)
        model = choose_model(None, [str(make_tiny_model(folder / "model", n_classes=3))], [1.0]).checkpoints
        options = BuildOptions(
            scopes=("head", "top-1"), sketch_dim=8, sketch_bits=64, white_bits=64, dampings=("1%", "10%"), device="cpu",
            calibration_queries=74,
        )  # fmt: skip
        return Retriever(
            build_index(rows_from_texts(sentences(400, seed=3), labels(400, 3)), folder / "index", model, options),
            device="cpu",
        )


def test_a_stop_is_for_what_was_calibrated(retriever):
    facts = retriever.index.manifest.calibration["top-1"]["methods"]
    stopping = [name for name, of_method in facts.items() if "errors" in of_method]
    assert stopping  # else this index shows nothing

    def stop(name: str, **choices):
        question = retriever.resolve(QuerySpec(**{"methods": (name,), "scope": "top-1"} | choices))
        return stop_of(question, question.methods[0])

    for name in stopping:
        of_method = facts[name]
        found = stop(name, recall=0.9)
        assert (found.recall, found.list_share) == (0.9, of_method["list_share"])
        assert found.error == of_method["errors"]["0.9"]
        assert stop(name, recall=0.85).recall == 0.85
        assert stop(name, recall=0.85).error == of_method["errors"]["0.9"]
        for other in ({"exact": "full"}, {"certify": True}, {"candidates": 20}, {"recall": 1.0}, {"target": "gold"}):
            assert stop(name, **other) is None
    for name in set(stopping) & {"if", "rif"}:
        assert stop(name, damping="10%") is None


def test_where_no_error_keeps_a_recall_a_number_of_candidates_does(retriever, monkeypatch):
    """Errors are stated for recalls that the list itself has; what is stated stays the recall that was asked for."""
    facts = retriever.index.manifest.calibration["top-1"]["methods"]
    name = next(name for name, of_method in facts.items() if "errors" in of_method)
    monkeypatch.setitem(facts[name], "errors", {"0.8": 0.1, "0.9": 0.2})

    def asked(recall: float):
        question = retriever.resolve(QuerySpec(methods=(name,), scope="top-1", recall=recall))
        method = question.methods[0]
        n = n_candidates(question, method)
        return stop_of(question, method), n, deep_recall(question, method, n)

    assert asked(0.85)[0].error == 0.2
    for recall in (0.95, 0.99):
        stop, n, (stated, _) = asked(recall)
        assert stop is None
        assert stated == (1.0 if n == 400 else min(recall, facts[name]["supported"]))
    supported = facts[name]["supported"]
    facts[name]["errors"] = {"0.9": 0.2, str(supported): 0.3}
    assert asked(0.99)[0].recall == supported  # the most that the sample supports


def test_fewer_rows_are_scored_than_without_a_stop(retriever):
    """The same rows are found at a recall of the exact ones, by fewer scores than are listed."""
    for name, of_method in retriever.index.manifest.calibration["top-1"]["methods"].items():
        if "errors" not in of_method:
            continue
        question = retriever.resolve(QuerySpec(methods=(name,), scope="top-1", recall=0.9))
        search = GradientSearch.kept(retriever.models, "top-1", question.curvature)
        asked = Queries([sentences(8, seed=99)], np.zeros(8, np.int64))
        widths = {name: int(np.ceil(of_method["list_share"] * 400))}
        found, listed = (
            search.search(question.methods, asked, 10, exact="rerank", n_candidates=widths, errors=errors)[name]
            for errors in ({name: of_method["errors"]["0.9"]}, None)
        )
        for end, all_scored in zip(found, listed, strict=True):
            assert end.n_scored.mean() < all_scored.n_scored.mean()
            shared = [np.isin(a, b).mean() for a, b in zip(end.rows, all_scored.rows, strict=True)]
            assert np.mean(shared) > 0.85
