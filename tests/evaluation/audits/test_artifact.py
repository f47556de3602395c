"""The artifact regression against textbook least squares, slow loops, and artifacts known to be planted or chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import N_QUERIES, N_ROWS
from scipy import stats
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import BuildOptions, Retriever, build_index, choose_model, rows_from_texts
from forebear.cli.main import run
from forebear.errors import DataError, InputError, NonFiniteError
from forebear.evaluation.audits.artifacts import regression as module
from forebear.evaluation.audits.artifacts.features import (
    NEGATIONS,
    has_negation,
    measure,
    negation_feature,
    overlap_feature,
    user_feature,
)
from forebear.evaluation.audits.artifacts.regression import (
    bin_means,
    fit_parabola,
    groups_of,
    regress_artifact,
    z_normalised,
)
from forebear.evaluation.audits.artifacts.regression_report import MeanCoefficient, mean_coefficient
from forebear.evaluation.audits.work_lists import artifact_list
from forebear.evaluation.common.queries import sample_queries
from forebear.retriever.question.spec import QuerySpec


def textbook(z, y):
    """Coefficients, OLS and HC3 standard errors by matrices: (X'X)^-1 and the sandwich, by the book."""
    design = np.stack([z**2, z, np.ones_like(z)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    beta, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ beta
    ols = inverse * (residual @ residual) / (len(z) - 3)
    leverage = np.array([x @ inverse @ x for x in design])
    meat = sum(np.outer(x, x) * (e / (1 - h)) ** 2 for x, e, h in zip(design, residual, leverage, strict=True))
    return beta, np.sqrt(ols[0, 0]), np.sqrt((inverse @ meat @ inverse)[0, 0])


def heavy_scores(rng, n):
    """Signed and log-normal, as influence is."""
    return rng.choice([-1.0, 1.0], n) * np.exp(1.9 * rng.normal(size=n))


@pytest.fixture(scope="module")
def pairs(make_world):
    return make_world("bert", 3, True, 1)


@pytest.fixture(scope="module")
def queries(pairs):
    return sample_queries(pairs.retriever, rows_from_texts(pairs.queries, pairs.query_labels), 0, 0)


@pytest.fixture(scope="module")
def overlaps(pairs):
    return measure(pairs.index, overlap_feature(("premise", "hypothesis")))


@pytest.mark.parametrize("draw", ["normal", "heavy"])
def test_the_fit_and_its_error_are_the_textbooks(draw):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=80) if draw == "normal" else heavy_scores(rng, 80)
    z = z_normalised(scores * 1e-7 + 3e-6)
    np.testing.assert_allclose(z, stats.zscore(scores), atol=1e-7)
    y = rng.uniform(size=80) + 0.1 * np.abs(z)
    found = fit_parabola(z, y)
    beta, ols, hc3 = textbook(z, y)
    np.testing.assert_allclose((found.a, found.b, found.c), beta, atol=1e-9)
    np.testing.assert_allclose((found.a, found.b, found.c), np.polyfit(z, y, 2), atol=1e-9)
    assert found.error == pytest.approx(max(ols, hc3), rel=1e-7)
    assert np.linalg.norm(found.contributions) == pytest.approx(hc3, rel=1e-7)
    assert found.weights @ y == pytest.approx(found.a, abs=1e-12)


def test_a_parabola_without_noise_is_found_with_no_error():
    z = z_normalised(np.random.default_rng(1).normal(size=30))
    found = fit_parabola(z, 0.25 * z**2 - 2 * z + 7)
    np.testing.assert_allclose((found.a, found.b, found.c), (0.25, -2, 7), atol=1e-12)
    assert found.error < 1e-12


def test_the_interval_holds_pure_chance_although_scores_are_heavy_tailed():
    rng = np.random.default_rng(2)
    n, covered, covered_by_hc1 = 400, 0, 0
    quantile = stats.t.ppf(0.975, n - 3)
    for _ in range(300):
        z = z_normalised(heavy_scores(rng, n))
        y = (rng.random(n) < 0.2).astype(float)
        found = fit_parabola(z, y)
        residual = y - np.polyval((found.a, found.b, found.c), z)
        hc1 = np.sqrt(n / (n - 3)) * np.linalg.norm(found.weights * residual)
        covered += abs(found.a) <= quantile * found.error
        covered_by_hc1 += abs(found.a) <= quantile * hc1
    assert covered >= 0.92 * 300
    assert covered_by_hc1 < 0.85 * 300  # why HC1 is not used


def test_scores_that_determine_no_parabola_give_none():
    y = np.random.default_rng(3).uniform(size=10)
    assert z_normalised(np.full(10, 0.1)) is None
    assert z_normalised(np.zeros(10)) is None
    two_values = z_normalised(np.array([1.0] * 4 + [2.0] * 6))
    assert fit_parabola(two_values, y) is None
    hangs_on_one_row = z_normalised(np.array([1.0] * 4 + [2.0] * 5 + [7.0]))
    assert fit_parabola(hangs_on_one_row, y) is None
    three_values = z_normalised(np.array([1.0] * 4 + [2.0] * 4 + [7.0] * 2))
    assert fit_parabola(three_values, y).error > 0


def test_a_constant_artifact_has_no_coefficient_and_four_rows_are_the_fewest():
    rng = np.random.default_rng(4)
    z = z_normalised(rng.normal(size=20))
    constant = fit_parabola(z, np.full(20, 0.3))
    np.testing.assert_allclose((constant.a, constant.b, constant.c, constant.error), (0, 0, 0.3, 0), atol=1e-14)
    assert fit_parabola(z_normalised(np.array([1.0, 2.0, 4.0, 9.0])), np.arange(4.0) ** 3) is not None
    with pytest.raises(DataError, match="3 training rows; a parabola and its error take 4"):
        fit_parabola(z_normalised(np.array([1.0, 2.0, 4.0])), np.arange(3.0))


def test_bins_are_equal_parts_of_the_ranking():
    rng = np.random.default_rng(5)
    z, y = z_normalised(rng.normal(size=23)), rng.uniform(size=23)
    fit = fit_parabola(z, y)
    order = np.argsort(z)
    found = bin_means(z, y, fit, order, 5)
    ranked = sorted(zip(z, y, strict=True))
    parts = [ranked[a:b] for a, b in zip((0, 4, 9, 13, 18), (4, 9, 13, 18, 23), strict=True)]
    for j, part in enumerate(parts):
        np.testing.assert_allclose(found[0, j], np.mean([p[0] for p in part]))
        np.testing.assert_allclose(found[1, j], np.mean([p[1] for p in part]))
        np.testing.assert_allclose(found[2, j], np.mean([np.polyval((fit.a, fit.b, fit.c), p[0]) for p in part]))


def test_groups_are_predicted_labels_and_the_wrong_ones_none_twice():
    names, members = groups_of(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 0]), ("yes", "no", "never"))
    assert names == ("all", "predicted yes", "predicted yes, wrongly", "predicted no")
    np.testing.assert_array_equal(members, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    assert groups_of(np.array([1, 1]), None, ("yes", "no"))[0] == ("all",)


def test_the_regression_equals_a_slow_loop(pairs, queries, overlaps):
    found = regress_artifact(pairs.retriever, queries, QuerySpec(methods=("if", "gd")), overlaps)
    share = []
    for premise, hypothesis in pairs.texts:
        words = set(hypothesis.split())
        share.append(sum(word in premise.split() for word in words) / len(words))
    np.testing.assert_allclose(overlaps, share)
    for m, method in enumerate(("if", "gd")):
        scores = pairs.retriever.scores(pairs.queries, method)
        contributions, plain = np.zeros(N_ROWS), np.zeros(N_ROWS)
        variances = []
        for q in range(N_QUERIES):
            z = stats.zscore(scores[q])
            beta, ols, hc3 = textbook(z, overlaps)
            np.testing.assert_allclose(found.coefficients[m, q], beta, rtol=1e-6, atol=1e-9)
            assert found.errors[m, q] == pytest.approx(max(ols, hc3), rel=1e-6)
            design = np.stack([z**2, z, np.ones_like(z)], axis=1)
            pseudo = np.linalg.pinv(design)
            residual = overlaps - design @ beta
            contributions += pseudo[0] * residual / (1 - np.diag(design @ pseudo)) / N_QUERIES
            plain += pseudo[0] / N_QUERIES
            variances.append(residual @ residual / (N_ROWS - 3))
        wanted = max(np.sqrt((contributions**2).sum()), np.sqrt(np.mean(variances) * (plain**2).sum()))
        assert found.row_errors[m, 0] == pytest.approx(wanted, rel=1e-6)
    assert found.bins.shape == (2, len(found.groups), 3, 20)
    np.testing.assert_allclose(found.bins[0, 0, :2].mean(axis=1), [0, overlaps.mean()], atol=1e-9)
    np.testing.assert_allclose(found.bins[0, 0, 2].mean(), overlaps.mean(), atol=1e-9)
    first = pairs.retriever.scores(pairs.queries, "if")[0]
    assert found.ends[0, 0].tolist() == sorted(range(N_ROWS), key=lambda n: (-first[n], n))[:5]
    assert found.ends[0, 1].tolist() == sorted(range(N_ROWS), key=lambda n: (first[n], n))[:5]
    scores = pairs.retriever.scores(pairs.queries, "if")
    tops = [sorted(range(N_ROWS), key=lambda n, q=q: (-scores[q, n], n))[:5] for q in range(N_QUERIES)]
    counts = {n: sum(n in top for top in tops) for n in range(N_ROWS)}
    listed = artifact_list(found, overlap_feature(("premise", "hypothesis")), overlaps, pairs.index)
    wanted = {n: float(counts[n]) for n in range(N_ROWS) if counts[n] and share[n] > np.mean(share)}
    assert {item.row: item.evidence["test rows"] for item in listed} == wanted
    assert [item.evidence["test rows"] for item in listed] == sorted(wanted.values(), reverse=True)


def test_queries_scored_one_by_one_give_the_same(pairs, queries, overlaps, monkeypatch):
    spec = QuerySpec(methods=("if", "gd"))
    whole = regress_artifact(pairs.retriever, queries, spec, overlaps)
    monkeypatch.setattr(module, "_MAX_SCORES", 1)
    parts = regress_artifact(pairs.retriever, queries, spec, overlaps)
    np.testing.assert_allclose(parts.coefficients, whole.coefficients, atol=1e-6)  # float32 passes of other batches
    np.testing.assert_allclose(parts.row_errors, whole.row_errors, rtol=1e-4)
    np.testing.assert_array_equal(parts.ends, whole.ends)


def test_asking_one_row_again_and_again_makes_its_mean_no_surer(pairs, overlaps):
    once = rows_from_texts(pairs.queries[:1])
    often = rows_from_texts(pairs.queries[:1] * 9)
    spec = QuerySpec(methods=("if",))
    one, many = (
        regress_artifact(pairs.retriever, sample_queries(pairs.retriever, source, 0, 0), spec, overlaps)
        for source in (once, often)
    )
    assert one.row_errors[0, 0] == pytest.approx(one.errors[0, 0])
    assert many.row_errors[0, 0] == pytest.approx(one.errors[0, 0])
    single, mean = mean_coefficient(one, 0, 0), mean_coefficient(many, 0, 0)
    assert (single.n, single.error, single.low) == (1, None, None)
    assert mean.low == pytest.approx(mean.high)  # no queries differ; the rows are as unsure as before
    half = stats.t.ppf(0.975, N_ROWS - 3) * one.errors[0, 0]
    np.testing.assert_allclose((mean.rows_low, mean.rows_high), (single.mean - half, single.mean + half), rtol=1e-5)


class Scorer:
    """A retriever that scores rows as it is told."""

    def __init__(self, world, scores):
        self.index, self.scores = world.index, scores
        self.classifier, self.label_names = world.retriever.classifier, world.retriever.label_names

    def resolve(self, spec):
        return spec.resolve(self.index)

    def score_block(self, texts, labels, question, first_row=0):
        return {method.name: self.scores[first_row : first_row + len(texts[0])] for method in question.methods}


def test_a_planted_artifact_is_found_and_chance_is_not_however_many_queries_share_the_rows(pairs, queries):
    rng = np.random.default_rng(6)
    spec = QuerySpec(methods=("gd",))
    wrong_by_queries = wrong_by_both = 0
    for trial in range(40):
        common = rng.standard_t(4, N_ROWS)
        scores = common + 0.2 * rng.normal(size=(N_QUERIES, N_ROWS))  # queries are alike, as those of one template
        z = stats.zscore(common)
        found = regress_artifact(Scorer(pairs, scores), queries, spec, rng.uniform(size=N_ROWS))
        mean = mean_coefficient(found, 0, 0)
        wrong_by_both += mean.sign != 0
        wrong_by_queries += mean.low > 0 or mean.high < 0
        if trial < 5:
            planted = regress_artifact(Scorer(pairs, scores), queries, spec, 0.5 * z**2 + rng.normal(size=N_ROWS) / 9)
            assert mean_coefficient(planted, 0, 0).sign == 1
            less = regress_artifact(Scorer(pairs, scores), queries, spec, rng.normal(size=N_ROWS) / 9 - 0.5 * z**2)
            assert mean_coefficient(less, 0, 0).sign == -1
    assert wrong_by_both <= 4
    assert wrong_by_queries >= 13  # the bootstrap over queries alone takes chance for an artifact


def test_queries_without_a_parabola_are_left_out_and_counted(pairs, queries, overlaps):
    scores = np.random.default_rng(7).normal(size=(N_QUERIES, N_ROWS))
    scores[2] = 0.5
    spec = QuerySpec(methods=("gd",))
    found = regress_artifact(Scorer(pairs, scores), queries, spec, overlaps)
    assert np.isnan(found.errors[0]).tolist() == [q == 2 for q in range(N_QUERIES)]
    mean = mean_coefficient(found, 0, 0)
    assert (mean.n, mean.undefined) == (N_QUERIES - 1, 1)
    assert mean.mean == pytest.approx(np.delete(found.coefficients[0, :, 0], 2).mean())
    none = regress_artifact(Scorer(pairs, np.ones((N_QUERIES, N_ROWS))), queries, spec, overlaps)
    assert mean_coefficient(none, 0, 0) == MeanCoefficient(n=0, undefined=N_QUERIES)
    assert mean_coefficient(none, 0, 0).sign == 0
    scores[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="test row 3"):
        regress_artifact(Scorer(pairs, scores), queries, spec, overlaps)


def test_negations_are_words_of_their_own():
    for word in NEGATIONS:
        held = {"n't": "They do n't agree ."}.get(word, f"They saw {word.upper()} , then .")
        assert has_negation(held), word
    assert has_negation("We don't")
    assert has_negation("It isn’t so.")
    for text in ("another notable knot", "Norway and nobility", "nothingness", "", "ant"):
        assert not has_negation(text), text


def test_features_are_of_the_right_text_and_name_what_is_wrong(pairs, bert_world):
    assert negation_feature(("text",)).of_rows([["no", "yes"]], np.arange(2)).tolist() == [1.0, 0.0]
    last = negation_feature(("premise", "hypothesis"))
    first = negation_feature(("premise", "hypothesis"), "premise")
    texts = [["not a", "b"], ["c", "never d"]]
    assert last.of_rows(texts, np.arange(2)).tolist() == [0.0, 1.0]
    assert first.of_rows(texts, np.arange(2)).tolist() == [1.0, 0.0]
    assert last.words(["not a", "c is n't it"]) == {"n't"}
    with pytest.raises(InputError, match="was built from premise, hypothesis"):
        negation_feature(("premise", "hypothesis"), "text")
    with pytest.raises(InputError, match="is of pairs"):
        overlap_feature(bert_world.index.manifest.spec.text_columns)
    held = measure(pairs.index, last)
    assert held.tolist() == [float("not" in hypothesis.split()) for _, hypothesis in pairs.texts]


USER = """
import math
def words(row): return len(row["hypothesis"].split())
def constant(row): return True
def nan(row): return math.nan if "bad" in row["premise"] else 1.0
def text(row): return "7"
def nothing(row): pass
def fails(row): return row["label"]
def leaves(row): raise SystemExit(0)
def huge(row): return 10**400
def large(row): return 1e308
def imaginary(row): return 1 + 2j
number = 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("constant", "is 1 in all 60 live training rows"),
        ("nan", r"returned nan for training row \d+; expected a number from"),
        ("text", "returned '7' for training row 0; expected a number from"),
        ("nothing", "returned None for training row 0"),
        ("fails", r"failed on training row 0 \(KeyError: 'label'\)"),
        ("leaves", r"failed on training row 0 \(SystemExit: 0\)"),
        ("huge", r"returned 1000+\.\.\. for training row 0; expected a number from"),
        ("large", r"returned 1e\+308 for training row 0; expected a number from"),
        ("imaginary", r"returned \(1\+2j\) for training row 0"),
        ("number", "defines no function number"),
        ("absent", "defines no function absent"),
        ("not a name", "expected FILE.py:function"),
    ],
)
def test_a_users_function_that_gives_no_numbers_is_refused(pairs, tmp_path, name, message):
    file = tmp_path / "mine.py"
    file.write_text(USER)
    with pytest.raises(InputError, match=message) as caught:
        measure(pairs.index, user_feature(f"{file}:{name}", ("premise", "hypothesis")))
    assert "\n" not in str(caught.value)


def test_a_users_file_that_is_not_there_or_does_not_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        user_feature(f"{tmp_path}/none.py:f", ("text",))
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(InputError, match="fails to load"):
        user_feature(f"{tmp_path}/broken.py:f", ("text",))
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(InputError, match="fails to load"):
        user_feature(f"{tmp_path}/leaves.py:f", ("text",))


def test_a_users_file_may_hold_dataclasses_and_import_its_neighbours(pairs, tmp_path):
    (tmp_path / "neighbour.py").write_text("HALF = 0.5")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport neighbour\n"
        "@dataclass\nclass Length:\n    words: int\n"
        "def f(row): return neighbour.HALF * Length(len(row['premise'].split())).words\n"
    )
    found = measure(pairs.index, user_feature(f"{tmp_path}/mine.py:f", ("premise", "hypothesis")))
    texts = pairs.index.text_lists(pairs.index.live)[0]
    assert found.tolist() == [0.5 * len(text.split()) for text in texts]


def test_a_users_function_gets_the_texts_by_column(pairs, tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    found = measure(pairs.index, user_feature(f"{tmp_path}/mine.py:words", ("premise", "hypothesis")))
    assert found.tolist() == [len(hypothesis.split()) for _, hypothesis in pairs.texts]


def test_an_index_of_three_rows_is_too_small(tmp_path):
    model = choose_model(str(make_tiny_model(tmp_path / "model"))).checkpoints
    source = rows_from_texts(sentences(3), labels(3))
    retriever = Retriever(build_index(source, tmp_path / "index", model, BuildOptions()))
    asked = sample_queries(retriever, rows_from_texts(["a film"]), 0, 0)
    with pytest.raises(DataError, match="has 3 live training rows"):
        regress_artifact(retriever, asked, QuerySpec(methods=("gd",)), np.arange(3.0))


@pytest.mark.slow
def test_the_commands_write_reports(pairs, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(USER)
    premises, hypotheses = zip(*pairs.queries, strict=True)
    test = write_jsonl(tmp_path / "t.jsonl", premise=premises, hypothesis=hypotheses, label=pairs.query_labels)
    common = ["--index", str(pairs.index.folder), "--test", str(test), "-q"]
    user = ["artifact", "--feature", f"{tmp_path}/mine.py:words"]
    for n, command in enumerate((["overlap", "--method", "if,nn-cos"], ["negation", "--column", "premise"], user)):
        out = tmp_path / str(n)
        assert run(["audit", *command, *common, "--out", str(out)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "mean quadratic coefficient" in shown
        result = json.loads((out / "result.json").read_text())
        for method in result["methods"].values():
            assert len(method["per_query"]["a"]) == N_QUERIES == method["groups"]["all"]["n"]
            assert len(method["groups"]["all"]["bins"]["z"]) == 20
            assert method["groups"]["all"]["mean"] == pytest.approx(np.mean(method["per_query"]["a"]))
        page = (out / "report.html").read_text()
        assert "<svg" in page
        assert pairs.texts[int(page.split("top 1 · row ")[1].split("<")[0])][0] in page
    assert ", ".join(NEGATIONS) in (tmp_path / "1/report.html").read_text().replace("&#39;", "'")
    assert run(["audit", "negation", *common, "--out", str(tmp_path / "1")]) == 2
    assert run(["audit", "negation", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["feature"]["name"] == "negation"
    assert run(["audit", "artifact", "--feature", f"{tmp_path}/mine.py:text", *common]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_single_texts_have_no_overlap(bert_world, tmp_path, capsys):
    test = write_jsonl(tmp_path / "t.jsonl", text=bert_world.queries)
    assert run(["audit", "overlap", "--index", str(bert_world.index.folder), "--test", str(test)]) == 2
    assert "lexical overlap is of pairs" in capsys.readouterr().err
    assert run(["audit", "negation", "--index", str(bert_world.index.folder), "--test", str(test), "-q"]) == 0
