"""The linear datamodeling score on models whose retrained outputs are known: scipy, slow loops, sums by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from inputs import Additive, retraining_inputs_of
from scipy import stats
from scipy.stats import rankdata, spearmanr
from tiny import labels, sentences, write_jsonl

from forebear import evaluations
from forebear.cli.main import run
from forebear.errors import InputError, MissingStoreError
from forebear.evaluation.common.comparisons import partial_spearman
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.jobs import Job, Retrainer, TrainingRows
from forebear.evaluation.retraining.lds import baselines
from forebear.evaluation.retraining.lds.baselines import BASELINES, baseline_scores, bm25, tfidf_cosines
from forebear.evaluation.retraining.lds.draws import Draws, class_counts
from forebear.evaluation.retraining.lds.measure import Lds, measure_lds
from forebear.evaluation.retraining.lds.report import lds_report
from forebear.evaluation.retraining.lds.settings import Settings
from forebear.evaluation.retraining.row_choice import stratified_rows
from forebear.indexer.building.build import BuildOptions, build_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

N, Q = 60, 5
ONES = np.ones(Q, np.int64)


@pytest.fixture
def weights():
    return np.random.default_rng(3).normal(size=(Q, N)) / 4


@pytest.fixture
def make(bert_world, weights, tmp_path):
    def retrainer(noise=0.0, of=weights):
        recipe = Additive(of, noise)
        recipe.facts = {"noise": noise, "sum": float(of.sum())}
        return Retrainer(recipe, TrainingRows(bert_world.index), [[f"query {i}" for i in range(len(of))]], tmp_path)

    return retrainer


@pytest.fixture
def queries(bert_world):
    return QueryRows(source="q", rows=np.arange(7), texts=(bert_world.queries,), labels=None)


def halves_of(gold, n):
    """Halves of each class, drawn as the first rows of a class in a random order of all."""
    for i in range(n):
        order = np.random.default_rng([0, 17, i]).permutation(len(gold)).tolist()
        kept = []
        for label in sorted(set(gold)):
            members = [row for row in order if gold[row] == label]
            kept += members[: math.floor(len(members) / 2 + 0.5)]
        yield sorted(kept)


def test_the_rows_of_stratified_halves_stay_those_of_finished_retrainings():
    gold = np.array([0, 1, 1, 0, 1, 2, 1, 0, 2, 1, 1])
    assert stratified_rows(np.arange(11), gold, 0.5, 0, 17, 3).tolist() == [2, 3, 4, 7, 8, 10]
    assert Draws().rows(np.arange(11), gold, 4, 0)[3].tolist() == [2, 3, 4, 7, 8, 10]


def test_lds_of_additive_outputs_is_one_and_else_scipys(bert_world, make, weights):
    noisy = weights + np.random.default_rng(0).normal(size=weights.shape) / 4
    scores = {"perfect": weights, "opposite": -weights, "noisy": noisy, "flat": np.full((Q, N), 0.1)}
    targets = np.array([1, 1, 0, 1, 0])
    signs = np.where(targets == 1, 1.0, -1.0)[:, None]
    scores = [{name: values * signs} for name, values in scores.items()]
    found = measure_lds(make(), scores[:3], targets, (0, 1), n_subsets=20, baselines=scores[3:])
    assert (found.methods, found.baselines) == (("perfect", "opposite", "noisy"), ("flat",))
    np.testing.assert_allclose(found.values[0], 1.0)
    np.testing.assert_allclose(found.values[1], -1.0)
    assert np.isnan(found.values[3]).all()
    halves = list(halves_of(bert_world.labels, 20))
    for i in range(Q):
        sums = [scores[2]["noisy"][i, half].sum() for half in halves]
        outputs = [signs[i, 0] * weights[i, half].sum() for half in halves]
        assert found.values[2, i] == pytest.approx(spearmanr(sums, outputs).statistic)
    assert found.is_balanced
    np.testing.assert_array_equal(found.balance_out, found.values)
    np.testing.assert_allclose(found.agreement, 1.0)
    np.testing.assert_allclose(found.ceiling, 1.0)


def test_the_noise_ceiling_follows_from_how_well_seeds_agree(make, weights):
    found = measure_lds(make(noise=0.7), [{"perfect": weights}], ONES, (0, 1, 2), n_subsets=150)
    outputs = found.outputs
    for i in range(Q):
        pairs = [spearmanr(outputs[:, a, i], outputs[:, b, i]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
        r = sum(pairs) / 3
        assert found.agreement[i] == pytest.approx(r)
        assert found.ceiling[i] == pytest.approx((3 * max(r, 0) / (1 + 2 * max(r, 0))) ** 0.5)
    assert abs(found.values[0].mean() - found.ceiling.mean()) < 0.05
    assert 0.5 < found.ceiling.mean() < 0.95
    assert measure_lds(make(), [{"a": weights}], ONES, (0,), n_subsets=4).ceiling is None


def test_plain_halves_measure_the_label_and_stratified_ones_do_not(bert_world, make, weights):
    """Where rows speak for their own label, a constant for the label foretells the outputs of plain halves alone."""
    of_label = np.where(np.array(bert_world.labels) == 1, 1.0, -1.0)
    outputs = make(of=weights / 4 + of_label)
    label = np.tile(of_label, (Q, 1))
    arguments = {"scores": [{"perfect": outputs.recipe.weights, "label": label}], "targets": ONES, "seeds": (0, 1)}
    plain = measure_lds(outputs, **arguments, n_subsets=60, draws=Draws(how="plain"))
    assert not plain.is_balanced
    assert plain.values[1].min() > 0.8
    assert np.isnan(plain.balance_out[1]).all()
    np.testing.assert_allclose(plain.balance_out[0], 1.0)
    np.testing.assert_allclose(plain.ceiling_balance_out, 1.0)
    even = measure_lds(outputs, **arguments, n_subsets=60)
    assert np.isnan(even.values[1]).all()
    np.testing.assert_allclose(even.values[0], 1.0)
    halves = [np.sort(np.random.default_rng([0, 17, i]).permutation(N)[: N // 2]) for i in range(60)]
    ones = [sum(bert_world.labels[row] for row in half) for half in halves]
    assert plain.class_counts.tolist() == [[30 - n, n] for n in ones]


@pytest.mark.parametrize("n_covariates", [1, 2])
def test_a_partial_correlation_is_that_of_what_a_regression_of_ranks_leaves(n_covariates):
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 9, size=(2, 4, 25)).astype(float)
    covariates = rng.integers(0, 5, size=(25, n_covariates)).astype(float)
    second += covariates[:, 0]
    constant = np.ones((25, 1))
    found = partial_spearman(first, second, np.hstack([covariates, constant]))
    for i in range(4):
        if n_covariates == 1:
            ab, az, bz = (spearmanr(*pair).statistic for pair in (
                (first[i], second[i]), (first[i], covariates[:, 0]), (second[i], covariates[:, 0])))  # fmt: skip
            truth = (ab - az * bz) / math.sqrt((1 - az**2) * (1 - bz**2))
        else:
            design = np.column_stack([np.ones(25), *(rankdata(column) for column in covariates.T)])
            left = [rankdata(side[i]) for side in (first, second)]
            left = [ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0] for ranks in left]
            truth = stats.pearsonr(*left).statistic
        assert found[i] == pytest.approx(truth, abs=1e-12)
    assert (np.abs(found - [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]) > 1e-3).all()


def test_a_partial_correlation_is_undefined_where_the_covariates_explain_a_side_or_are_too_many():
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(20, 1)), rng.normal(size=(1, 20))
    assert np.isnan(partial_spearman(np.exp(z.T), x, z)).all()
    assert np.isfinite(partial_spearman(x, x[:, ::-1], np.hstack([z, 2 * z, z**3]))).all()  # one covariate, thrice
    assert np.isnan(partial_spearman(x[:, :3], x[:, 3:6], z[:3])).all()


def test_draws_keep_their_share_and_refuse_those_that_leave_nothing_out(bert_world):
    live, gold = bert_world.index.live, np.array(bert_world.labels)
    for how in ("stratified", "plain"):
        kept = Draws(how=how, share=0.29).rows(live, gold, 9, 1)
        counts = class_counts(kept, gold)
        total = counts.sum(axis=1)
        if how == "stratified":
            wanted = [math.floor(0.29 * (gold == label).sum() + 0.5) for label in (0, 1)]
            assert (counts == wanted).all()
        else:
            assert (total == 17).all()  # of 60 rows, 17.4
            assert len(np.unique(counts[:, 0])) > 1
        assert len({tuple(rows) for rows in kept}) == 9
    for share in (0.999, 0.01):
        with pytest.raises(InputError, match=f"rows_share={share} keeps"):
            Draws(share=share).rows(live, gold, 3, 0)
    for wrong, message in (({"how": "even"}, "draw='even': expected"), ({"share": 1.0}, "rows_share=1: expected")):
        with pytest.raises(InputError, match=message):
            Draws(**wrong).check()


def test_bm25_is_that_of_a_slow_loop():
    rng = np.random.default_rng(2)
    from scipy import sparse

    rows, asked = rng.integers(0, 4, size=(12, 9)), rng.integers(0, 3, size=(5, 9))
    rows[3] = 0
    rows[:, 7] = 0
    found = bm25(sparse.csr_array(rows.astype(float)), sparse.csr_array(asked.astype(float)))
    mean = rows.sum() / 12
    for q in range(5):
        for n in range(12):
            score = 0.0
            for term in range(9):
                holding = sum(1 for row in rows if row[term] > 0)
                f, length = rows[n][term], rows[n].sum()
                idf = math.log(1 + (12 - holding + 0.5) / (holding + 0.5))
                for _ in range(asked[q][term]):
                    score += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * length / mean))
            assert found[q, n] == pytest.approx(score, abs=1e-12)
    empty = sparse.csr_array(np.zeros((3, 9)))
    assert (bm25(empty, sparse.csr_array(asked.astype(float))) == 0).all()
    assert (tfidf_cosines(sparse.csr_array(rows.astype(float)), sparse.csr_array(np.zeros((2, 9)))) == 0).all()


def test_every_baseline_scores_every_live_row(bert_world, queries, monkeypatch):
    from sklearn.feature_extraction.text import TfidfVectorizer

    retriever, targets = bert_world.retriever, np.array([0, 1, 1, 0, 1, 0, 1])
    found: dict[str, np.ndarray] = {}
    for block in baseline_scores(retriever, queries, "predicted", targets, 4):
        found |= block
    assert tuple(found) == BASELINES
    assert all(scores.shape == (7, N) and np.isfinite(scores).all() for scores in found.values())
    for q, n in ((0, 0), (1, 7), (6, 59)):
        assert found["(label)"][q, n] == (1 if bert_world.labels[n] == targets[q] else -1)
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", lowercase=False)
    rows = vectorizer.fit_transform(bert_world.texts)
    np.testing.assert_allclose(
        found["(tf-idf)"], (vectorizer.transform(bert_world.queries) @ rows.T).toarray(), atol=1e-9
    )
    np.testing.assert_allclose(found["(nn-cos)"], retriever.scores(bert_world.queries, "nn-cos"))
    np.testing.assert_allclose(found["(sentence embedding)"], retriever.scores(bert_world.queries, "sbert-cos"))
    np.testing.assert_allclose(found["(own loss)"], np.tile(-bert_world.index.losses, (7, 1)))
    assert abs(found["(random scores)"].mean()) < 0.2

    # without embeddings in the index: by the packaged encoder, here another name of the index's own
    monkeypatch.setattr(Retriever, "available_methods", lambda _self: ("nn-cos",))
    monkeypatch.setattr(baselines, "load_sentence_encoder", lambda _name, **_how: retriever.models.sentence_encoder)
    monkeypatch.setattr(baselines, "has_packaged_minilm", lambda: True)
    again = list(baseline_scores(retriever, queries, "predicted", targets, 4))
    np.testing.assert_allclose(again[4]["(sentence embedding)"], found["(sentence embedding)"], atol=1e-5)
    monkeypatch.setattr(baselines, "has_packaged_minilm", lambda: False)
    names = [name for block in baseline_scores(retriever, queries, "predicted", targets, 4) for name in block]
    assert names == [name for name in BASELINES if name != "(sentence embedding)"]


def test_constant_scores_alone_still_make_a_report(bert_world, make):
    retrainer = make()
    found = measure_lds(retrainer, [{"gd": np.ones((Q, N)), "gc": np.ones((Q, N))}], ONES, (0,))
    assert isinstance(found, Lds)
    inputs = retraining_inputs_of(bert_world.retriever, retrainer, Q, QuerySpec(methods=("gd", "gc")), 0)
    report, result = lds_report(found, Settings.of(bert_world.retriever, inputs.question), inputs)
    assert report.tables[0].rows[0] == ["gd", *[None] * 7, Q]
    assert result["lds"]["gd"] == [None] * Q


def test_a_method_is_compared_with_the_best_baseline_and_a_draw_asks_for_more_queries(bert_world, make, weights):
    rng = np.random.default_rng(1)
    near = [weights + rng.normal(size=weights.shape) / 4 for _ in range(2)]
    retrainer = make()
    scores = [{"gd": weights, "gc": near[0]}]
    bad = [{"(random scores)": rng.normal(size=(Q, N))}, {"(tf-idf)": near[1]}]
    found = measure_lds(retrainer, scores, ONES, (0, 1), baselines=bad, n_subsets=30)
    inputs = retraining_inputs_of(bert_world.retriever, retrainer, Q, QuerySpec(methods=("gd", "gc")), 0, 1)
    report, result = lds_report(found, Settings.of(bert_world.retriever, inputs.question), inputs)
    table = next(t for t in report.tables if t.title == "Compared with the best baseline")
    assert "(tf-idf)" in table.note
    for row, values in zip(table.rows, found.values, strict=False):
        difference = values - found.values[3]
        interval = stats.ttest_1samp(difference, 0.0).confidence_interval()
        assert row[1:4] == pytest.approx([difference.mean(), interval.low, interval.high])
        assert (row[-1] is None) == (not interval.low <= 0 <= interval.high)
    assert table.rows[1][-1] > Q
    assert result["baselines"] == ("(random scores)", "(tf-idf)")
    assert "left out" in report.tables[0].note  # the sentence embedding


def test_bad_subsets_are_refused(make, weights):
    with pytest.raises(InputError, match="n_subsets=2"):
        measure_lds(make(), [{"a": weights}], ONES, (0,), n_subsets=2)
    with pytest.raises(InputError, match="a correlation takes 3"):
        measure_lds(make(), [{"a": weights}], ONES, (0,), n_subsets=9, budget=2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("lds") / "run"
    source = rows_from_texts(sentences(24, seed=4), labels(24, 2), label_names=("down", "up"))
    options = TrainOptions(epochs=1, batch_size=8, learning_rate=2e-2, seed=3, precision="fp32", device="cpu")
    train(source, tiny_model("bert", 2, 5, 2.0), folder, options)
    built = BuildOptions(scopes=("head", "all"), sketch_dim=8, dampings=("0.1x", "2x"))
    build_index(source, folder / "index", choose_model(str(folder)).checkpoints, built)
    return folder


TESTED = sentences(6, seed=31)


def test_scopes_and_dampings_share_their_retrainings_and_stand_in_one_table(run_folder, tmp_path, monkeypatch):
    retriever = Retriever(run_folder / "index")
    how = evaluations.Retraining(recipe="head", cache=tmp_path / "cache")
    asked = {"methods": ["gd", "if", "rep", "nn-cos"], "n_subsets": 6, "how": how}
    kept = []
    monkeypatch.setattr(
        "forebear.evaluation.retraining.lds.measure._sums", lambda scores, _kept: kept.append(scores) or scores[:, :6]
    )
    found = evaluations.lds(retriever, TESTED, **asked, scopes=("head", "all"), dampings=("0.1x", "2x"))
    assert len(list(tmp_path.glob("cache/*/*.arrow"))) == 6
    settings = [(s["method"], s["scope"], s["damping"]) for s in found.result["settings"]]
    assert settings == [
        ("gd", "head", None), ("if", "head", "0.1x"), ("rep", "head", None), ("nn-cos", None, None),
        ("if", "head", "2x"), ("gd", "all", None), ("if", "all", "0.1x"), ("if", "all", "2x"),
    ]  # fmt: skip
    for (method, scope, damping), scores in zip(settings, kept, strict=False):
        truth = retriever.scores(TESTED, method, scope=scope or "head", damping=damping)
        np.testing.assert_allclose(scores, truth, rtol=1e-5, atol=1e-7 * np.abs(truth).max())
    table = found.report.tables[0]
    assert table.columns[:3] == ["method", "scope", "damping"]
    assert [row[:3] for row in table.rows[:2]] == [["gd", "head", None], ["if", "head", "0.1x"]]
    assert [row[0] for row in table.rows[8:15]] == list(BASELINES)
    assert list(found.result["lds"])[:2] == ["gd, head", "if, head, 0.1x"]
    assert found.report.provenance["scope"] == "head, all"
    assert found.report.provenance["damping"] == "0.1x, 2x"
    with pytest.raises(MissingStoreError, match="top-1"):
        evaluations.lds(retriever, TESTED, **asked, scopes=("head", "top-1"))


@pytest.mark.slow
def test_paired_draws_are_retrained_in_place_with_the_runs_own_seed(run_folder, tmp_path):
    how = evaluations.Retraining(recipe="full", n_seeds=1, cache=tmp_path)
    found = evaluations.lds(
        run_folder / "index", TESTED, methods=["gd"], paired=True, rows_share=0.9, n_subsets=3, how=how
    )
    assert found.result["seeds"] == (3,)
    assert "keep their place" in found.report.tables[0].note
    retriever = Retriever(run_folder / "index")
    live, gold = retriever.index.live, retriever.index.labels
    digests = set()
    for kept in Draws(share=0.9).rows(live, gold, 3, 0):
        job = Job(live, 3, without=np.setdiff1d(live, kept))
        digests.add(job.digest(found.result["digest"], seeded=True))
    assert {path.stem for path in tmp_path.glob("*/*.arrow")} == digests


def test_what_means_nothing_is_refused_before_the_work(bert_world, tmp_path, capsys):
    path = write_jsonl(tmp_path / "test.jsonl", text=sentences(12, seed=31), label=labels(12, 2, seed=8))
    args = ["evaluate", "lds", "--index", str(bert_world.index.folder), "--test", str(path), "-q", "--method", "if"]
    args += ["--cache", str(tmp_path / "cache")]
    for extra, message in (
        (["--draw", "even"], "--draw 'even': expected stratified or plain"),
        (["--rows-share", "1"], "--rows-share 1: expected a share between 0 and 1"),
        (["--rows-share", "0.999"], "keeps 60 of 60 rows"),
        (["--paired"], "--seeds 5: --paired repeats the training"),
        (["--damping", "0.1x,x"], "damping 'x': expected a number"),
        (["--scope", "head,all"], "scope"),
    ):
        assert run([*args, *extra]) == 2
        err = capsys.readouterr().err
        assert message in " ".join(err.split()), err
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_command_takes_several_settings_and_plain_draws(bert_world, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", text=sentences(12, seed=31), label=labels(12, 2, seed=8))
    args = ["evaluate", "lds", "--index", str(bert_world.index.folder), "--test", str(path), "-q", "--method", "if,gd"]
    args += ["--damping", "0.1x,2x", "--draw", "plain", "--rows-share", "0.4", "--subsets", "8", "--queries", "5"]
    assert run([*args, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["lds"])[:3] == ["if, head, 0.1x", "gd, head", "if, head, 2x"]
    assert all(value is None for value in result["lds_balance_out"]["(label)"])
    assert result["draws"] == {"how": "plain", "share": 0.4, "paired": False}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "(BM25)" in page
    assert "class balance taken out" in page
