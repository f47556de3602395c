"""Correlation, overlap, randomized models, near duplicates and recall, against scipy, sets and slow loops."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import N_QUERIES, N_ROWS
from inputs import inputs_of
from scipy import stats
from tiny import make_tiny_model, write_jsonl

from forebear import BuildOptions, InputError, Retriever, build_index, choose_model, rows_from_texts
from forebear.cli.main import run
from forebear.errors import MismatchError, NonFiniteError
from forebear.evaluation.common.amounts import common_share, rows_of_share
from forebear.evaluation.common.comparisons import defined_means, interval_cells, listed_values, matrix_of, spearman
from forebear.evaluation.common.queries import sample_queries, score_queries
from forebear.evaluation.measures.correlation import correlations
from forebear.evaluation.measures.near_duplicates import EDITS, edited, near_duplicates, vocabulary
from forebear.evaluation.measures.randomized import random_retriever, randomized_correlations
from forebear.evaluation.measures.recall import retrieval_recall
from forebear.evaluation.measures.top_overlap import depths_of, top_overlaps
from forebear.evaluation.reports.charts import heat_map
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.ranking import Ranking

METHODS = ("nn-cos", "gd", "gc", "if")


@pytest.fixture(scope="module")
def retriever(bert_world):
    return bert_world.retriever


@pytest.fixture(scope="module")
def queries(bert_world):
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    return sample_queries(bert_world.retriever, source, 0, 0)


@pytest.fixture(scope="module")
def files(bert_world, tmp_path_factory):
    """The test rows as a file, and one with a single row."""
    folder = tmp_path_factory.mktemp("comparisons")
    whole = write_jsonl(folder / "test.jsonl", text=bert_world.queries, label=bert_world.query_labels)
    one = write_jsonl(folder / "one.jsonl", text=bert_world.queries[:1], label=bert_world.query_labels[:1])
    return whole, one


def test_spearman_is_scipys_with_ties_and_undefined_where_scores_are_constant():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, size=(2, 6, 40)).astype(float)
    first[4] = 3.0
    second[5] = -1.0
    found = spearman(first, second)
    for q in range(4):
        assert found[q] == pytest.approx(stats.spearmanr(first[q], second[q]).statistic, abs=1e-12)
    assert np.isnan(found[4:]).all()
    np.testing.assert_allclose(spearman(first[:4], first[:4] ** 3 + 1), 1.0)
    np.testing.assert_allclose(spearman(first[:4], -first[:4]), -1.0)


def test_queries_are_a_seeded_sample_in_their_order(retriever, bert_world):
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    some = sample_queries(retriever, source, 4, 1)
    assert len(some) == 4
    assert sorted(set(some.rows)) == some.rows.tolist()
    assert some.texts[0] == [bert_world.queries[i] for i in some.rows]
    assert some.labels.tolist() == [bert_world.query_labels[i] for i in some.rows]
    np.testing.assert_array_equal(some.rows, sample_queries(retriever, source, 4, 1).rows)
    assert any(sample_queries(retriever, source, 4, seed).rows.tolist() != some.rows.tolist() for seed in (2, 3, 4))
    assert len(sample_queries(retriever, source, 100, 0)) == N_QUERIES
    with pytest.raises(InputError, match="n_queries=-1"):
        sample_queries(retriever, source, -1, 0)
    with pytest.raises(MismatchError):
        sample_queries(retriever, rows_from_texts([("a", "b")]), 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["head", "top-1"])
def test_scores_of_chosen_rows_are_those_of_all_rows(bert_world, tmp_path, scope):
    retriever = bert_world.retriever
    methods = retriever.row_methods()
    if scope == "top-1":
        options = BuildOptions(scopes=("head", "top-1"), calibration_queries=0, shard_rows=17)
        source = rows_from_texts(bert_world.texts, bert_world.labels)
        index = build_index(source, tmp_path / "i", choose_model(None, bert_world.models[-1:]).checkpoints, options)
        retriever, methods = Retriever(index), ("gd", "gc", "if", "rif", "nn-cos", "tracin-f")
    rows = np.array([0, 3, 4, 20, 59])
    asked = sample_queries(retriever, rows_from_texts(bert_world.queries), 0, 0)
    some = score_queries(retriever, asked, QuerySpec(methods=methods, scope=scope), rows)
    for name in methods:
        every = retriever.scores(bert_world.queries, name, scope=scope)
        np.testing.assert_allclose(some[name], every[:, rows], rtol=1e-5, atol=1e-7 * np.abs(every).max())


def test_correlations_are_scipys_over_the_sampled_rows(retriever, queries, bert_world):
    found = correlations(retriever, queries, QuerySpec(methods=METHODS), n_rows=25, seed=3)
    assert len(set(found.rows)) == 25
    scores = {name: retriever.scores(bert_world.queries, name)[:, found.rows] for name in METHODS}
    for (i, a), (j, b) in itertools.product(enumerate(METHODS), repeat=2):
        for q in range(N_QUERIES):
            wanted = stats.spearmanr(scores[a][q], scores[b][q]).statistic
            assert found.values[q, i, j] == pytest.approx(wanted, abs=1e-9)
    assert matrix_of(found.values)[0][1] == pytest.approx(found.values[:, 0, 1].mean())


def test_constant_scores_are_left_out_and_counted(retriever, queries, monkeypatch):
    from forebear.evaluation.measures import correlation

    def scores(_retriever, _queries, spec, rows):
        given = np.arange(3 * len(rows), dtype=float).reshape(3, -1)
        flat = given.copy()
        flat[1] = 7.0
        return {"gd": given, "gc": flat}

    monkeypatch.setattr(correlation, "score_queries", scores)
    spec = QuerySpec(methods=("gd", "gc"))
    found = correlations(retriever, queries, spec)
    assert np.isnan(found.values[1, 0, 1])
    assert matrix_of(found.values)[0][1] == pytest.approx(1.0)
    _, result = correlation.correlation_report(found, inputs_of(retriever, queries, spec))
    assert result["n_undefined"] == 1
    assert result["per_query"][1][0][1] is None
    all_undefined = np.full((3, 2, 2), np.nan)
    assert matrix_of(all_undefined) == [[None, None], [None, None]]
    assert interval_cells(all_undefined[:, 0, 0], 0) == [None] * 4


@pytest.mark.parametrize(
    ("share", "n", "k"), [("0.1", 30, 3), ("0.29", 100, 29), ("0.001", 999, 0), ("1", 7, 7), ("1e-1", 19, 1)]
)
def test_a_share_is_floored_exactly(share, n, k):
    assert rows_of_share(share, n) == k


def test_depths_are_checked():
    assert depths_of([5, 2], ["0.1", "0.5"], 50) == (2, 5, 25)
    for tops, shares in (([0], []), ([51], []), ([], ["0.001"]), ([], [])):
        with pytest.raises(InputError, match="expected 1 to 50"):
            depths_of(tops, shares, 50)
    for share in ("0", "1.5", "x", "-0.1"):
        with pytest.raises(InputError, match="share"):
            rows_of_share(share, 50)


def test_overlaps_are_those_of_sets(retriever, queries, bert_world):
    found = top_overlaps(retriever, queries, QuerySpec(methods=METHODS), (1, 6, N_ROWS))
    scores = {name: retriever.scores(bert_world.queries, name) for name in METHODS}
    for d, k in enumerate(found.depths):
        for q in range(N_QUERIES):
            tops = [set(sorted(range(N_ROWS), key=lambda n, s=scores[m][q]: (-s[n], n))[:k]) for m in METHODS]
            wanted = [[len(a & b) / k for b in tops] for a in tops]
            np.testing.assert_allclose(found.values[d, q], wanted)
    assert (found.values[2] == 1).all()
    with pytest.raises(InputError, match="ranks spans"):
        top_overlaps(retriever, queries, QuerySpec(methods=("gd", "if++")), (1,))
    with pytest.raises(InputError, match="two or more"):
        top_overlaps(retriever, queries, QuerySpec(methods=("gd",)), (1,))


def test_common_share():
    assert common_share(np.array([4, 1, 9]), np.array([9, 4, 2])) == 2 / 3
    assert common_share(np.array([4]), np.array([5])) == 0


def test_a_heat_map_shows_every_value_and_refuses_nan():
    svg = heat_map(["a", "b"], ["x", "y", "z"], [[0.25, None, 1.0], [-0.5, 0.0, 0.75]], low=-1, high=1)
    assert all(shown in svg for shown in (">0.25<", ">1.00<", ">−0.50<", ">0.75<"))
    assert "<image" not in svg
    with pytest.raises(InputError, match="2 x 2"):
        heat_map(["a", "b"], ["x", "y"], [[0.0, 1.0]], low=0, high=1)
    with pytest.raises(NonFiniteError):
        heat_map(["a"], ["x"], [[float("nan")]], low=0, high=1)


def test_random_models_scores_are_those_of_that_model(retriever, queries, bert_world, tmp_path):
    """`gd` at the head by a plain loop over a model that is initialised here."""
    rows = np.array([1, 5, 8, 30, 44, 59])
    other = random_retriever(retriever, QuerySpec(methods=("gd",)), rows, 7, tmp_path)
    torch.manual_seed(7)
    config = transformers.AutoConfig.from_pretrained(bert_world.models[-1])
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval().double()
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(bert_world.models[-1])
    assert not torch.equal(model.classifier.weight.float(), trained.classifier.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_world.models[-1])

    def gradient(text, label):
        model.zero_grad()
        logits = model(**tokenizer(text, return_tensors="pt")).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        return model.classifier.weight.grad.flatten().clone()

    asked = [gradient(text, 1) for text in bert_world.queries]
    wanted = [[float(g @ gradient(bert_world.texts[n], bert_world.labels[n])) for n in rows] for g in asked]
    name = retriever.label_names[1]
    found = score_queries(other, queries, QuerySpec(methods=("gd",), target=name))["gd"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_randomized_correlations_are_scipys_for_every_method(retriever, queries, bert_world, tmp_path):
    methods = tuple(name for name in retriever.row_methods() if not name.startswith("sbert"))
    spec = QuerySpec(methods=methods)
    found = randomized_correlations(retriever, queries, spec, n_rows=30, seeds=(4, 9))
    assert found.values.shape == (2, 2, N_QUERIES, len(methods))
    assert np.isfinite(found.values[:, :, :, methods.index("if")]).all()
    assert (np.abs(found.values[np.isfinite(found.values)]) <= 1).all()
    other = random_retriever(retriever, spec, found.rows, 9, tmp_path)
    targets = retriever.retrieve(bert_world.queries, methods=["gd"], top=1).to_pylist()
    predicted = [r["query_prediction"] for r in targets if r["side"] == "proponent"]
    for m, name in enumerate(methods):
        ours = retriever.scores(bert_world.queries, name)[:, found.rows]
        for q in range(N_QUERIES):
            for t, target in enumerate((predicted[q], "predicted")):
                theirs = other.scores(bert_world.queries[q : q + 1], name, target=target)[0]
                if np.ptp(ours[q]) and np.ptp(theirs):
                    wanted = stats.spearmanr(ours[q], theirs).statistic
                    assert found.values[t, 1, q, m] == pytest.approx(wanted, abs=1e-6)
                else:
                    assert np.isnan(found.values[t, 1, q, m])


def test_randomized_refuses_what_means_nothing(retriever, queries):
    with pytest.raises(InputError, match="does not depend on the model"):
        randomized_correlations(retriever, queries, QuerySpec(methods=("sbert-cos",)))
    with pytest.raises(InputError, match="each once"):
        randomized_correlations(retriever, queries, QuerySpec(methods=("gd",)), seeds=(1, 1))
    with pytest.raises(InputError, match="n_rows=1"):
        randomized_correlations(retriever, queries, QuerySpec(methods=("gd",)), n_rows=1)


def test_a_querys_mean_over_seeds_takes_the_defined_values():
    nan = np.nan
    found = defined_means(np.array([[1.0, nan, nan], [0.5, 0.25, nan]]), axis=0)
    assert listed_values(found) == [0.75, 0.25, None]


@pytest.mark.parametrize("seed", range(20))
def test_one_word_is_added_removed_or_replaced(seed):
    text, words = "a good  film\tindeed", ["dull", "good", "plot"]
    before = text.split()

    def draw(edit):
        return edited(text, edit, words, np.random.default_rng(seed)).split()

    assert edited(text, "same", words, np.random.default_rng(seed)) == text
    added, removed, replaced = draw("add"), draw("remove"), draw("replace")
    assert any(added[:i] + added[i + 1 :] == before and added[i] in words for i in range(5))
    assert any(before[:i] + before[i + 1 :] == removed for i in range(4))
    changed = [i for i in range(4) if replaced[i] != before[i]]
    assert len(replaced) == 4
    assert len(changed) == 1
    assert replaced[changed[0]] in words


def test_places_and_words_vary_and_short_texts_are_defined():
    rngs = [np.random.default_rng(i) for i in range(60)]
    assert {edited("a b c", "remove", [], rng) for rng in rngs} == {"b c", "a c", "a b"}
    assert {edited("", "add", ["x", "y"], rng) for rng in rngs} == {"x", "y"}
    assert edited("  ", "remove", [], rngs[0]) == "  "
    assert edited("", "replace", ["x"], rngs[0]) == ""
    assert edited("only", "remove", [], rngs[0]) == ""
    for edit, text in (("add", "a"), ("replace", "a")):
        with pytest.raises(InputError, match="draws words"):
            edited(text, edit, ["a"] if edit == "replace" else [], rngs[0])


def test_hits_are_those_of_a_slow_loop(retriever, bert_world):
    spec = QuerySpec(methods=("nn-cos", "gd"), target="gold")
    found = near_duplicates(retriever, spec, n_queries=20, seed=5)
    assert found.edits == EDITS
    assert found.hits.shape == (4, 2, 20, 2)
    words = sorted({word for text in bert_world.texts for word in text.split()})
    assert vocabulary(retriever.index) == words
    for e, edit in enumerate(EDITS):
        for q, row in enumerate(found.rows):
            rng = np.random.default_rng([5, int(row), e, 0])
            text = edited(bert_world.texts[row], edit, words, rng)
            label = retriever.label_names[bert_world.labels[row]]
            for m, name in enumerate(spec.methods):
                scores = retriever.scores([text], name, target=label)[0]
                order = sorted(range(N_ROWS), key=lambda n, s=scores: (-s[n], n))
                at = [bert_world.texts[n] == bert_world.texts[row] for n in order]
                assert found.hits[e, m, q].tolist() == [any(at[:1]), any(at[:10])]
    assert found.hits[0, 0, :, 0].all()


def test_pairs_change_in_both_texts_and_duplicates_are_hits(tmp_path, monkeypatch):
    texts = [("a good film", "dull plot")] * 3 + [("a bad film", f"plot {w}") for w in ("red", "blue", "green")]
    model = make_tiny_model(tmp_path / "m")
    source = rows_from_texts(texts, [0, 1, 0, 1, 0, 1])
    retriever = Retriever(build_index(source, tmp_path / "i", choose_model(str(model)).checkpoints))
    asked = []
    answer = retriever.answer_block

    def spy(start, columns, *args, **kwargs):
        asked.append([list(column) for column in columns])
        return answer(start, columns, *args, **kwargs)

    monkeypatch.setattr(retriever, "answer_block", spy)
    found = near_duplicates(retriever, QuerySpec(methods=("nn-cos",)), n_queries=0, tops=(1, 2))
    assert found.n_duplicated == 3
    assert found.hits[0, 0, :, 0].all()  # ties go to row 0, whose texts rows 1 and 2 share
    for edit, columns in zip(EDITS[1:], asked[1:], strict=True):
        for column in (0, 1):
            assert all(new != old[column] for new, old in zip(columns[column], texts, strict=True)), edit
    for choices, message in (({"edits": ("swap",)}, r'edits=\("swap",\)'), ({"tops": (7,)}, "expected 1 to 6")):
        with pytest.raises(InputError, match=message):
            near_duplicates(retriever, QuerySpec(methods=("nn-cos",)), **choices)


def test_recall_is_the_share_of_the_exact_top(retriever, queries, monkeypatch):
    """Of answers made up here: one of three proponents and all opponents are found."""
    answer = retriever.answer_block

    def broken(start, texts, labels, question):
        answers = answer(start, texts, labels, question)
        if question.spec.exact == "rerank":
            for name, (near, far) in answers.rankings.items():
                wrong = near.rows.copy()
                wrong[:, 1:] = -1
                answers.rankings[name] = (Ranking(wrong, near.scores, True, near.n_scored), far)
        return answers

    spec = QuerySpec(methods=("gd", "nn-cos"), top=3)
    whole = retrieval_recall(retriever, queries, spec)
    assert (whole.values == 1).all()
    assert (whole.seconds > 0).all()
    monkeypatch.setattr(retriever, "answer_block", broken)
    found = retrieval_recall(retriever, queries, spec)
    np.testing.assert_allclose(found.values[:, 0], 1 / 3)
    np.testing.assert_allclose(found.values[:, 1], 1.0)
    with pytest.raises(InputError, match="ranks spans"):
        retrieval_recall(retriever, queries, QuerySpec(methods=("tracin++",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["correlation", "overlap", "randomized", "near-duplicates", "recall"])
def test_the_commands_write_reports(bert_world, files, name, tmp_path, capsys):
    args = ["evaluate", name, "--index", str(bert_world.index.folder), "--method", "gd,nn-cos", "--out", "OUT"]
    args[-1] = str(tmp_path / "out")
    args += {"randomized": ["--random-seeds", "3"], "overlap": ["--top", "2", "--share", "0.1"]}.get(name, [])
    if name != "near-duplicates":
        args += ["--test", str(files[1])]  # one query: no error, no interval
    assert run([*args, "--queries", "1"]) == 0
    assert "gd" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["methods"] == ["gd", "nn-cos"]
    assert result["question"]["index_digest"] == bert_world.index.manifest.digest()
    assert run(args) == 2
    assert "already holds" in capsys.readouterr().err
    assert run([*args[: args.index("--out")], *args[args.index("--out") + 2 :], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == ["gd", "nn-cos"]
