"""Recall: stated only where it was measured, no higher than its sample supports, and kept on held-out queries."""

from __future__ import annotations

import ast
import json
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny import labels, make_tiny_model, sentences, write_jsonl

import forebear
from forebear import BuildOptions, Index, InputError, QuerySpec, Retriever, build_index
from forebear.cli.main import run
from forebear.conformal import least_share, supported_recall
from forebear.indexer.building.build import append_rows, retire_rows
from forebear.indexer.building.calibration import calibrate as calibrating
from forebear.indexer.building.calibration.calibrate import calibrate_scope
from forebear.indexer.curvature import eigenbasis
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches import projector as projecting
from forebear.indexer.sketches.estimates import Part
from forebear.indexer.storage.manifest import read_manifest
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.coverage import question_facts
from forebear.retriever.deep.query_gradients import Queries
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.question.methods import METHODS

SCOPE = "all"
HELD_OUT = sentences(80, seed=30)
N_SAMPLE = 320  # at most so many rows are scored by calibration
LOSSY = {"sketch_dim": 8, "sketch_bits": 64, "white_bits": 64, "dampings": ("0.1x", "3x"), "device": "cpu"}
ITERATED = {"curvature_rows": 48, "tolerance": 0.05, "lissa": "han20,depth=50"}


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    """Few directions and groups a side, so that the tiny model's sketches lose much; the same when it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projecting, "PRINCIPAL", 4)
        patch.setattr(projecting, "RANDOM", 3)
        patch.setattr(projecting, "POOLED", 6)
        patch.setattr(calibrating, "SAMPLE_ROWS", N_SAMPLE)
        patch.setattr(calibrating, "LEAST_SAMPLE_ROWS", N_SAMPLE)
        yield


def built(folder: Path, n_rows: int, *, seed: int = 0, n_checkpoints: int = 1, **choices) -> Index:
    """An index of a tiny model whose sketches lose much."""
    models = [str(make_tiny_model(folder / f"m{i}", n_classes=3, seed=seed + i)) for i in range(n_checkpoints)]
    options = BuildOptions(**{"scopes": ("head", SCOPE)} | LOSSY | choices)
    checkpoints = choose_model(None, models, [1.0] * n_checkpoints).checkpoints
    return build_index(
        rows_from_texts(sentences(n_rows, seed=3), labels(n_rows, 3)), folder / "index", checkpoints, options
    )


@pytest.fixture(scope="module")
def few_rows(_narrow, tmp_path_factory) -> Retriever:
    """200 rows, of which all are scored by calibration."""
    return Retriever(built(tmp_path_factory.mktemp("few"), 200), device="cpu")


@pytest.fixture(scope="module")
def many_rows(_narrow, tmp_path_factory) -> Retriever:
    """Of these rows calibration scores a half."""
    return Retriever(built(tmp_path_factory.mktemp("many"), 2 * N_SAMPLE), device="cpu")


def facts_of(retriever: Retriever, method: str, **choices) -> dict:
    spec = QuerySpec(**{"methods": (method,), "scope": SCOPE} | choices)
    return question_facts(spec.resolve(retriever.index))["methods"][method]


@cache
def exact_scores(retriever: Retriever, method: str, queries: tuple[str, ...], **choices) -> np.ndarray:
    """Of all rows; the same whatever recall is asked for."""
    return retriever.scores(list(queries), method, scope=SCOPE, **choices)


def measured(retriever: Retriever, method: str, queries: list[str], **choices) -> np.ndarray:
    """Share of the exact top 10 that is found, for each end and query, ``(2, q)``; all rows are scored to know it."""
    how = {name: value for name, value in choices.items() if name not in ("recall", "candidates")}
    exact = exact_scores(retriever, method, tuple(queries), **how)
    table = retriever.retrieve(queries, methods=[method], scope=SCOPE, **choices)
    rows = table["row"].to_numpy().reshape(len(queries), 2, 10)
    out = np.empty((2, len(queries)))
    for end, sign in enumerate((1, -1)):
        best = np.argsort(-sign * exact, axis=1, kind="stable")[:, :10]
        out[end] = [len(set(mine) & set(found)) / 10 for mine, found in zip(best, rows[:, end], strict=True)]
    return out


# ---------------------------------------------------------------- what a sample supports


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.9, 0.95])
def test_the_least_share_keeps_its_recall_for_the_next_query(recall):
    """Over many draws of queries whose rows are found together or not at all, the next one's mean recall reaches it."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        hard = rng.lognormal(sigma=1.5, size=(n, 1))
        return np.minimum(1.0, 0.02 * hard * rng.uniform(0.5, 1.5, size=(n, 10)))

    kept = []
    for _ in range(3000):
        share = least_share(draw(19), recall)
        kept.append((draw(1) <= share).mean())
    error = np.std(kept) / np.sqrt(len(kept))
    assert np.mean(kept) >= recall - 2 * error
    assert np.mean(kept) <= recall + 1 / 20 + 2 * error  # and no more than the next query's share above it


def test_the_least_share_is_the_smallest_that_the_bound_allows():
    needed = np.array([[0.1, 0.4], [0.2, 0.2], [0.3, 0.9]])
    for recall in (0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75):
        share = least_share(needed, recall)
        bound = [(s, (needed <= s).mean(axis=1).sum() / 4) for s in np.unique(needed)]
        assert share == min(s for s, value in bound if value >= recall - 1e-12)
    assert supported_recall(3) == 0.75
    assert least_share(needed, 0.76) is None
    assert least_share(needed, 1.0) is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gd", "gc", "tracin", "if", "rif"])
def test_held_out_queries_find_the_recall_that_is_stated(few_rows, method):
    """The issue's case among them: 200 rows, .98 asked for, .956 measured over 160 results."""
    for recall in (0.8, 0.9, 0.95, 0.98):
        found = measured(few_rows, method, HELD_OUT, recall=recall)
        stated = facts_of(few_rows, method, recall=recall)["recall"]
        assert stated in (recall, 1.0)  # all rows are scored where candidates would be as many
        for end in found:
            assert end.mean() >= stated - 2 * end.std() / np.sqrt(len(end))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_over_several_indexes_the_recall_is_kept_on_average(seed, tmp_path):
    retriever = Retriever(built(tmp_path, 300, seed=seed), device="cpu")
    for method in ("if", "rif"):
        for recall in (0.9, 0.98):
            found = measured(retriever, method, HELD_OUT, recall=recall)
            assert facts_of(retriever, method, recall=recall)["recall"] in (recall, 1.0)
            assert (found.mean(axis=1) >= recall - 2 * found.std(axis=1) / np.sqrt(len(HELD_OUT))).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gd", "gc", "if", "rif"])
def test_of_a_sample_of_the_rows_the_recall_is_kept_too(many_rows, method):
    for recall in (0.9, 0.98):
        found = measured(many_rows, method, HELD_OUT[:30], recall=recall)
        stated = facts_of(many_rows, method, recall=recall)["recall"]
        assert stated == recall
        assert (found.mean(axis=1) >= stated - 2 * found.std(axis=1) / np.sqrt(30)).all()


@pytest.mark.slow
def test_no_more_is_stated_than_was_asked_for_nor_than_the_sample_supports(many_rows, tmp_path):
    for method in ("gd", "gc", "if", "rif"):
        assert facts_of(many_rows, method, recall=0.9)["recall"] == 0.9
        assert facts_of(many_rows, method, recall=0.93)["recall"] == 0.93
        facts = facts_of(many_rows, method, recall=0.99)
        assert facts["recall"] == supported_recall(50)
        assert "50 queries supports at most 0.98" in facts["recall_note"]
        supported = facts_of(many_rows, method, recall=supported_recall(50))["candidates"]
        assert facts["candidates"] == max(100, supported) < 2 * N_SAMPLE
        everything = {"candidates": 2 * N_SAMPLE, "recall": 1.0, "stops_early": False}
        assert facts_of(many_rows, method, recall=1.0) | everything == facts_of(many_rows, method, recall=1.0)
    small = Retriever(built(tmp_path, 400, calibration_queries=12), device="cpu")
    facts = facts_of(small, "gd")
    assert facts["recall"] == pytest.approx(8 / 9)
    assert "recall=0.98 was asked for" in facts["recall_note"]


def test_where_candidates_of_both_ends_would_be_all_rows_all_are_scored(few_rows):
    """At no more cost the answer is the exact one."""
    for method in ("gd", "gc", "if", "rif"):
        facts = facts_of(few_rows, method, recall=0.99)  # not supported: at least 100 at each end of 200 rows
        assert (facts["candidates"], facts["recall"]) == (200, 1.0)
        assert (measured(few_rows, method, HELD_OUT[:4], recall=0.99) == 1.0).all()


def test_calibration_chooses_by_other_queries_than_it_states_by(few_rows):
    for found in few_rows.index.manifest.calibration[SCOPE]["methods"].values():
        assert (found["n_choosing"], found["n_stating"]) == (24, 50)
        assert found["supported"] == 50 / 51
        assert max(map(float, found["candidates"])) == found["supported"]


@pytest.mark.slow
def test_calibration_reads_the_codes_once_for_each_set_of_queries(few_rows, monkeypatch):
    """Not once for each weight and margin: of many rows that takes most of a build."""
    index, asked = few_rows.index, []
    products = Part.code_products

    def counted(part: Part, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        asked.append((len(which), len(rows)))
        return products(part, which, rows)

    monkeypatch.setattr(Part, "code_products", counted)
    calibration = {"n_queries": 74, "on_rows": lambda n: None}
    scope = index.scope(few_rows.classifier(), SCOPE)
    found = calibrate_scope(index, few_rows.classifier(), scope, **calibration)
    assert asked == [(24, 200), (50, 200)] * 2  # of plain and of whitened sketches, for dots and cosines together
    assert found["methods"] == index.manifest.calibration[SCOPE]["methods"]
    asked.clear()
    monkeypatch.setattr("forebear.indexer.building.calibration.needed_candidates.ESTIMATED_QUERIES", 20)
    assert calibrate_scope(index, few_rows.classifier(), scope, **calibration)["methods"] == found["methods"]
    assert asked == [(24, 200), (20, 200), (20, 200), (10, 200)] * 2


def test_calibration_holds_the_gradients_of_one_group_of_queries(few_rows, monkeypatch):
    """What is counted by VECTOR_BYTES is all that is held while the sample is scored; groups change no score."""
    hold, held, n_held = eigenbasis.hold_gradients, [], []

    def holding(*args):
        n_held.append(sum(one() is not None for one in held))
        found = hold(*args)
        held.append(weakref.ref(found))
        return found

    scope = few_rows.index.scope(few_rows.classifier(), SCOPE)
    how = {"n_queries": 30, "on_rows": lambda n: None}
    together = calibrate_scope(few_rows.index, few_rows.classifier(), scope, **how)
    monkeypatch.setattr(eigenbasis, "hold_gradients", holding)
    monkeypatch.setattr(calibrating, "VECTOR_BYTES", 1)
    in_groups = calibrate_scope(few_rows.index, few_rows.classifier(), scope, **how)
    assert n_held == [0, 0, 0]
    for method, facts in together["methods"].items():
        assert in_groups["methods"][method]["candidates"] == pytest.approx(facts["candidates"], rel=0.02)


# ---------------------------------------------------------------- where nothing was measured


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"curvature": "lissa"}, 'curvature="lissa": calibrated under ekfac'),
        ({"curvature": "cg", "damping": "10x"}, 'curvature="cg": calibrated under ekfac'),
        ({"curvature": "cg-hessian"}, 'curvature="cg-hessian": calibrated under ekfac'),
        ({"damping": "3x"}, 'damping="3x": calibrated at 0.1x'),
        ({"target": "gold"}, 'target="gold": calibrated for the predicted label'),
        ({"target": "LABEL_1"}, 'target="LABEL_1": calibrated for the predicted label'),
        ({"top": 200, "candidates": 201}, "top=200: calibrated for the top 11"),
        ({"candidates": 10}, "so few candidates as 10"),
    ],
)
def test_a_recall_that_was_not_measured_is_not_stated(many_rows, choices, words):
    for method in ("if", "rif"):
        facts = facts_of(many_rows, method, **choices)
        assert facts["recall"] is None
        assert words in facts["recall_note"]
        assert facts_of(many_rows, method)["recall"] == 0.98
        assert "recall_note" not in facts_of(many_rows, method)
        assert facts_of(many_rows, method, **choices | {"candidates": 2 * N_SAMPLE, "top": 10})["recall"] == 1.0
        assert facts_of(many_rows, method, **choices | {"exact": "full", "candidates": None})["recall"] == 1.0


def test_of_an_aggregate_no_recall_is_stated(many_rows):
    facts = facts_of(many_rows, "if", aggregate=True)
    assert facts["recall"] is None
    assert "aggregate=True: calibrated for single rows" in facts["recall_note"]


def test_what_is_proven_has_a_recall_of_one(many_rows):
    assert facts_of(many_rows, "gd", certify=True)["recall"] == 1.0


def test_without_a_curvature_methods_are_what_they_are_but_for_a_factor(many_rows):
    """H = I makes ``if`` of ``gd`` and ``rif`` of ``gc``, and one checkpoint ``tracin`` of ``gd``, candidates too."""
    ask = {"scope": SCOPE, "top": 10}
    for method, same, choices in (
        ("if", "gd", {"curvature": "identity"}),
        ("rif", "gc", {"curvature": "identity"}),
        ("tracin", "gd", {}),
    ):
        found, wanted = facts_of(many_rows, method, **choices), facts_of(many_rows, same)
        assert (found["recall"], found["candidates"]) == (wanted["recall"], wanted["candidates"]) != (None, None)
        tables = [
            many_rows.retrieve(HELD_OUT[:5], methods=[name], exact=exact, **ask, **how)
            for name, how in ((method, choices), (same, {}))
            for exact in ("rerank", "none")
        ]
        assert tables[0]["row"].to_pylist() == tables[2]["row"].to_pylist()
        assert tables[1]["row"].to_pylist() == tables[3]["row"].to_pylist()


@pytest.mark.slow
def test_sums_over_checkpoints_are_not_calibrated(tmp_path):
    two = Retriever(built(tmp_path, 240, n_checkpoints=2), device="cpu")
    facts = facts_of(two, "tracin")
    assert facts["recall"] is None
    assert "sums over checkpoints are not calibrated" in facts["recall_note"]
    assert facts_of(two, "gd")["recall"] == 0.98


@pytest.mark.slow
def test_rows_that_changed_since_calibration_void_it(tmp_path):
    index = built(tmp_path, 120)
    before = facts_of(Retriever(index), "gd")
    assert before["recall"] == 0.98
    append_rows(index.folder, rows_from_texts(sentences(7, seed=9), labels(7, 3)), device="cpu")
    retire_rows(index.folder, [3, 5])
    facts = facts_of(Retriever(index.folder), "gd")
    assert facts["recall"] is None
    assert "rows that have changed since calibration (7 appended, 2 retired)" in facts["recall_note"]


@pytest.mark.slow
def test_a_calibration_of_an_earlier_version_is_not_stated(tmp_path):
    """Its margins are of other units."""
    from dataclasses import replace

    index = built(tmp_path, 120)
    old = {
        scope: {"n_queries": 36, "n_rows": 120}
        | {
            "methods": {
                name: {key: found[key] for key in ("code_weight", "margin", "candidates")}
                for name, found in facts["methods"].items()
            }
        }
        for scope, facts in index.manifest.calibration.items()
    }
    replace(index.manifest, calibration=old).write(index.folder)
    retriever = Retriever(index.folder)
    facts = facts_of(retriever, "gd")
    assert facts["recall"] is None
    assert "build it again" in facts["recall_note"]
    assert not facts["stops_early"]
    assert run(["info", str(index.folder)]) == 0


def test_at_the_head_only_a_quantised_faiss_index_has_a_recall_below_one(tmp_path):
    from dataclasses import replace

    index = built(tmp_path, 60, scopes=("head",), ann="SQ8")
    for method in ("gc", "gd", "nn-dot", "if"):
        for exact in ("rerank", "none"):
            assert facts_of(Retriever(index), method, scope="head", exact=exact)["recall"] == 1.0
    facts = facts_of(Retriever(index), "nn-cos", scope="head", exact="none")
    assert (facts["recall"], facts["recall_note"]) == (None, 'recall not measured for exact="none"')
    for method, name in (("nn-cos", "feature-cos"), ("nn-euc", "feature-euc")):
        facts = facts_of(Retriever(index), method, scope="head")
        measured_recall, n_stating = (index.manifest.derived[name][key] for key in ("recall", "n_stating"))
        assert facts["recall"] == pytest.approx(measured_recall * n_stating / (n_stating + 1))
        assert facts["recall_note"] == f"measured on {n_stating} rows (training rows, FAISS SQ8), not proven"
        on_a_gpu = question_facts(QuerySpec(methods=(method,)).resolve(index), by_scan=True)  # all vectors are compared
        assert on_a_gpu["methods"][method]["recall"] == 1.0
        assert facts_of(Retriever(index), method, scope="head", exact="full") | {"recall": 1.0} == facts_of(
            Retriever(index), method, scope="head", exact="full"
        )
    facts = facts_of(Retriever(index), "nn-cos", scope="head", top=11)
    assert facts["recall"] is None
    assert "FAISS SQ8 at top=11, but for the top 10" in facts["recall_note"]
    old = {name: {k: v for k, v in found.items() if k != "n_stating"} for name, found in index.manifest.derived.items()}
    replace(index.manifest, derived=old).write(index.folder)
    facts = facts_of(Retriever(index.folder), "nn-cos", scope="head")
    assert facts["recall"] is None
    assert "rebuild_ann() measures it" in facts["recall_note"]


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 2, 3, 200])
def test_a_quantised_faiss_index_never_states_a_recall_of_one(n_rows, tmp_path, capsys):
    """Where every row that was asked about found its neighbours, the next one need not."""
    index = built(tmp_path, n_rows, scopes=("head",), ann="SQ8")
    test_rows = write_jsonl(tmp_path / "test.jsonl", text=HELD_OUT[:1], label=[0])
    for method in ("nn-cos", "nn-euc"):
        facts = facts_of(Retriever(index), method, scope="head")
        n_stating = index.manifest.derived["feature-" + method[3:]]["n_stating"]
        args = ["retrieve", "--index", str(index.folder), "--test", str(test_rows), "--method", method, "--top", "3"]
        assert run(args) == 0
        shown = " ".join(capsys.readouterr().err.split())
        if n_rows == 1:
            assert (n_stating, facts["recall"]) == (0, None)
            assert f"note: {method}: recall not measured for FAISS SQ8 of a single row" in shown
            continue
        assert facts["recall"] <= supported_recall(n_stating) < 1
        by = f"measured on {n_stating} {'row' if n_stating == 1 else 'rows'} (training rows, FAISS SQ8), not proven"
        assert f"note: {method}: recall {facts['recall']:.3g} expected of the exact top 3; {by}" in shown


# ---------------------------------------------------------------- candidates under another H^-1


OTHERS = ({"curvature": "lissa"}, {"curvature": "cg", "damping": "10x"})


@pytest.mark.slow
@pytest.mark.parametrize("choices", OTHERS)
def test_candidates_for_if_under_another_solver_come_from_its_solutions(many_rows, choices):
    """Whitened sketches at EK-FAC's damping found .09 (lissa) and .62 (cg) of the top 10, with .9 claimed."""
    found = measured(many_rows, "if", HELD_OUT[:6], recall=0.9, **choices, **ITERATED)
    assert found.mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("choices", OTHERS)
def test_candidates_for_rif_under_another_solver_come_from_both_sketches(few_rows, choices, monkeypatch):
    """From whitened sketches alone .69 (lissa) and .84 (cg) of the top 10, from solutions alone 1.0 and .53."""
    monkeypatch.setattr("forebear.retriever.deep.row_lengths.SELF_ROWS", 256)  # right-hand sides of one solution
    how = ITERATED | {"lissa": "han20,depth=4"} | choices
    queries = HELD_OUT[:6]
    found = measured(few_rows, "rif", queries, recall=0.8, **how)
    assert found.mean() >= 0.9
    question = few_rows.resolve(QuerySpec(methods=("rif",), scope=SCOPE, **how))
    search = GradientSearch.kept(few_rows.models, SCOPE, question.curvature)
    asked = Queries([queries], np.zeros(6, np.int64))
    width = {"rif": 20}
    (high, low) = search.candidates.propose([METHODS["rif"]], asked, width)["rif"]
    assert high.reach is None
    assert high.rows.shape == low.rows.shape == (6, 40)
    assert all(len(set(rows.tolist())) > 20 for rows in high.rows)  # the two sketches propose different rows


# ---------------------------------------------------------------- commands


@pytest.fixture
def test_rows(tmp_path) -> Path:
    return write_jsonl(tmp_path / "test.jsonl", text=HELD_OUT[:2], label=[0, 1])


def test_the_terminal_says_where_no_recall_was_measured(few_rows, test_rows, capsys, tmp_path):
    args = ["retrieve", "--index", str(few_rows.index.folder), "--test", str(test_rows), "--scope", SCOPE, "--top", "3"]
    assert run([*args, "--method", "if"]) == 0
    shown = " ".join((found := capsys.readouterr()).out.split() + found.err.split())
    assert "note: if: recall 0.98 expected of the exact top 3" in shown
    assert run([*args, "--method", "if", "--damping", "3x"]) == 0
    shown = " ".join((found := capsys.readouterr()).out.split() + found.err.split())
    assert "note: if: recall not measured for --damping 3x: calibrated at 0.1x" in shown
    out = tmp_path / "answers.jsonl"
    assert run([*args, "--method", "if", "--aggregate", "--out", str(out)]) == 0
    assert "note: if: recall not measured for --aggregate" in " ".join(capsys.readouterr().err.split())


def test_an_index_command_says_what_its_calibration_supports(few_rows, capsys):
    assert run(["info", str(few_rows.index.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50 queries, which support at most 0.98" in shown


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_an_index_of_one_row_beyond_the_head_is_an_index_like_others(n_rows, tmp_path):
    """It wrote NaN into its manifest, and ``gc`` ended in an IndexError."""
    model = make_tiny_model(tmp_path / "m", n_classes=2)
    train = write_jsonl(tmp_path / "train.jsonl", text=sentences(n_rows), label=["LABEL_0"] * n_rows)
    args = ["index", "--model", str(model), "--train", str(train), "--quiet"]
    assert run([*args, "--scope", f"head,{SCOPE}", "--out", str(tmp_path / "i")]) == 0
    written = (tmp_path / "i" / "manifest.json").read_text(encoding="utf-8")
    json.loads(written, parse_constant=lambda name: pytest.fail(f"the manifest holds {name}"))
    read_manifest(tmp_path / "i")
    ask = ["retrieve", "--index", str(tmp_path / "i"), "--text", "a good film", "--scope", SCOPE, "--top", "1"]
    assert run([*ask, "--method", "gd,gc,if,rif,tracin", "--out", str(tmp_path / "a.jsonl")]) == 0
    retriever = Retriever(tmp_path / "i")
    for method in ("gd", "gc", "if", "rif", "tracin"):
        assert facts_of(retriever, method, top=1)["recall"] == 1.0


def test_a_manifest_with_nan_of_an_earlier_version_is_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"format": 1, "calibration": {"all": NaN}, "digest": "0"}')
    assert run(["info", str(tmp_path)]) == 1
    assert "cannot be read as a manifest (NaN is not JSON)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_tolerance_that_is_no_number_is_refused_before_it_is_written(tolerance):
    with pytest.raises(InputError, match=r"tolerance=.*: expected a number above 0"):
        QuerySpec(methods=("if",), tolerance=tolerance).check()


@pytest.mark.slow
def test_json_that_is_written_holds_no_nan():
    """``json.dumps`` writes NaN, which is not JSON, unless it is told not to."""
    found, n_calls = [], 0
    room = (
        Path(forebear.__file__).parent / "indexer" / "rows"
    )  # reads others' files: what it dumps is digested or shown
    for path in sorted(Path(forebear.__file__).parent.rglob("*.py")):
        if room in path.parents or path.name == "training_files.py":  # which keeps what others' files hold
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strict = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
                found += [] if strict else [f"{path.name}:{node.lineno}"]
                n_calls += 1
    assert found == []
    assert n_calls > 5
