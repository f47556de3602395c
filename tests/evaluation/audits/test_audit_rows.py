"""Audits of training rows: wrong labels, duplicates, mistakes and hubs, against scipy, scikit-learn and slow loops."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import N_QUERIES, N_ROWS
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from tiny import WORDS, sentences, write_jsonl

from forebear import BuildOptions, InputError, QuerySpec, Retriever, build_index, choose_model, rows_from_texts
from forebear.cli.main import run
from forebear.errors import DataError
from forebear.evaluation.audits.rows.doubts import majority_label
from forebear.evaluation.audits.rows.duplicates import Thresholds, duplicates, leaks
from forebear.evaluation.audits.rows.errors import explain_groups, group_mistakes, mistakes_of
from forebear.evaluation.audits.rows.hubs import hubs, skewness, training_queries
from forebear.evaluation.audits.rows.near_words import near_pairs, word_sets, words_of
from forebear.evaluation.audits.rows.suspects import opponents_of, own_places, suspects
from forebear.evaluation.audits.work_lists import duplicates_list, errors_list, hubs_list
from forebear.evaluation.common.neighbours import label_disagreement, nearest_rows
from forebear.evaluation.common.queries import sample_queries
from forebear.retriever.question.models import Models


def jaccard(a, b):
    """Jaccard similarity of the words of two texts."""
    a, b = set(words_of(a)), set(words_of(b))
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def index_of(tiny_model, tmp_path_factory):
    """Index texts with labels by a tiny model; without what the audits do not need."""

    def make(texts, labels, **choices):
        options = BuildOptions(shard_rows=13, **choices)
        chosen = choose_model(tiny_model(), ()).checkpoints
        return build_index(rows_from_texts(texts, labels), tmp_path_factory.mktemp("rows") / "index", chosen, options)

    return make


# Neighbours and wrong labels


@pytest.mark.parametrize("representation", ["feature", "sentence"])
def test_nearest_rows_are_scikit_learns(bert_world, representation):
    index = bert_world.index
    matrix = index.features() if representation == "feature" else index.sentence()
    vectors = matrix.take(index.live).astype(np.float64)
    rows, cosines = nearest_rows(bert_world.retriever.models, index.live, 4, representation=representation)
    distances, _ = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(vectors).kneighbors()
    np.testing.assert_allclose(cosines, 1 - distances[:, :4], atol=1e-9)
    assert not (rows == index.live[:, None]).any()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(np.einsum("nh,nkh->nk", unit, unit[rows]), cosines, atol=1e-12)
    with pytest.raises(InputError, match=f"n_neighbours={N_ROWS}"):
        nearest_rows(bert_world.retriever.models, index.live, N_ROWS)


def test_disagreement_counts_the_neighbours_of_another_label():
    labels = np.array([0, 1, 1, 2, 0])
    near = np.array([[1, 4, 2], [2, 0, 4]])
    assert label_disagreement(labels, np.array([0, 1]), near).tolist() == [2 / 3, 2 / 3]
    assert label_disagreement(labels, np.array([4]), near[:1, :2]).tolist() == [0.5]


def test_majority_prefers_the_rows_own_label_then_the_lower_id():
    near = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 2], [2, 2, 2, 0]])
    assert majority_label(near, np.array([1, 0, 0, 0]), 3).tolist() == [1, 0, 1, 2]


def test_a_rows_own_place_is_left_out_or_else_the_last():
    found = np.array([[3, 1, 2], [1, 2, 4], [5, 6, 3]])
    others = ~own_places(found, np.array([3, 9, 3]))
    assert found[others].reshape(3, 2).tolist() == [[1, 2], [1, 2], [5, 6]]


def test_suspects_have_the_mean_of_their_ranks(bert_world):
    retriever, index = bert_world.retriever, bert_world.index
    found = suspects(retriever, QuerySpec(methods=("gd", "if")), n_neighbours=5)
    assert found.names[:4] == ("gd", "if", "loss", "neighbours")
    texts = rows_from_texts(bert_world.texts, bert_world.labels)
    values = [np.diag(retriever.scores(texts, name, target="gold")) for name in ("gd", "if")]
    p = np.exp(-index.losses.astype(np.float64))
    assert ((p > 0.5) == (index.predictions == index.labels)).all()
    values.append(-np.log(p))
    features = index.features().take(index.live)
    near = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(features).kneighbors()[1]
    gold = np.array(bert_world.labels)
    values.append(np.array([np.mean([gold[j] != gold[i] for j in near[i]]) for i in range(N_ROWS)]))
    for mine, truth in zip(found.values[:4], values, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-12)
    mean = np.mean([stats.rankdata(-v) for v in found.values], axis=0)
    np.testing.assert_allclose(found.combined, mean)
    chance = found.probability
    assert found.order.tolist() == sorted(range(N_ROWS), key=lambda i: (-chance[i], i))
    for i in range(N_ROWS):
        votes = Counter(gold[near[i]])
        other = 1 - gold[i]
        if index.predictions[i] == other or votes[other] > votes[gold[i]]:
            assert found.suggested[i] == other
        else:
            assert found.suggested[i] in (other, -1)


def test_opponents_are_the_smallest_scores_of_the_row_asked_with_its_own_label(bert_world):
    texts = rows_from_texts(bert_world.texts, bert_world.labels)
    scores = bert_world.retriever.scores(texts, "gc", target="gold")
    rows = np.array([4, 9, 31])
    found, _ = opponents_of(bert_world.retriever, QuerySpec(methods=("gd", "if")), rows)
    assert found.tolist() == [np.argsort(scores[r], kind="stable")[:3].tolist() for r in rows]


def test_planted_wrong_labels_lead_the_list(index_of):
    """All rows have the label that the model predicts, but for five."""
    texts = sentences(60, seed=3)
    predicted = index_of(texts, [0, 1] * 30).predictions
    flipped = [3, 17, 22, 40, 58]
    labels = [int(1 - p) if i in flipped else int(p) for i, p in enumerate(predicted)]
    found = suspects(Retriever(index_of(texts, labels)), QuerySpec(methods=("gd",)))
    assert sorted(found.rows[found.order[:5]].tolist()) == flipped
    assert [int(found.suggested[i]) for i in flipped] == [int(predicted[i]) for i in flipped]


# Duplicates


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_pairs_are_all_pairs_of_a_slow_loop(threshold):
    texts = [*sentences(200, seed=1, high=5), "", "!!", "good good", "Good."]
    i, j, similarity = near_pairs(word_sets([texts]), threshold)
    found = dict(zip(zip(i.tolist(), j.tolist(), strict=True), similarity, strict=True))
    truth = {
        (a, b): jaccard(texts[a], texts[b])
        for a in range(len(texts)) for b in range(a + 1, len(texts))
        if words_of(texts[a]) and words_of(texts[b]) and jaccard(texts[a], texts[b]) >= threshold - 1e-12
    }  # fmt: skip
    assert len(truth) > 3
    assert found == pytest.approx(truth)


def test_near_pairs_of_pairs_of_texts_take_the_less_similar_column():
    first, second = sentences(80, seed=1, low=1, high=3), sentences(80, seed=2, low=1, high=3)
    i, j, similarity = near_pairs(word_sets([first, second]), 0.4)
    truth = {}
    for a in range(80):
        for b in range(a + 1, 80):
            least = min(jaccard(first[a], first[b]), jaccard(second[a], second[b]))
            if least >= 0.4 - 1e-12:
                truth[a, b] = least
    assert len(truth) > 3
    assert dict(zip(zip(i.tolist(), j.tolist(), strict=True), similarity, strict=True)) == pytest.approx(truth)


BASE = [
    "the good story was very bright", "sad slow music", "Sad, slow -- MUSIC!", "doctor saw lawyer near artist today",
    "sad slow music", "doctor saw lawyer near artist", "red blue green", "cold plot", "!!!", "???", "green blue red",
]  # fmt: skip


def test_groups_of_known_duplicates(index_of):
    labels = [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0]
    index = index_of(BASE, labels)
    found = duplicates(Models(index), Thresholds(jaccard=0.8, neighbours=0))
    assert [(g.rows.tolist(), g.kind, g.conflict) for g in found] == [
        ([1, 2, 4], "same words", True),
        ([3, 5], "similar", False),
        ([6, 10], "similar", False),  # the same words in another order
    ]
    assert [g.weakest for g in found] == pytest.approx([1.0, 5 / 6, 1.0])
    exact = duplicates(Models(index_of(BASE[:2] + BASE[4:5], [0, 1, 0])), Thresholds(neighbours=0))
    assert [(g.rows.tolist(), g.kind, g.conflict) for g in exact] == [([1, 2], "same texts", True)]
    assert duplicates(Models(index_of(BASE[6:9], [0, 1, 0])), Thresholds()) == []
    assert duplicates(Models(index_of(BASE[:1], [0], dampings=())), Thresholds()) == []


def test_the_list_of_duplicates_says_what_contradicts_and_what_could_go(index_of):
    labels = [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0]
    index = index_of(BASE, labels)
    names = index.manifest.spec.label_names
    groups = duplicates(Models(index), Thresholds(jaccard=0.8, neighbours=0))
    found = [(i.row, i.suggested, i.contradicting, i.evidence["weakest link"]) for i in duplicates_list(groups, index)]
    assert found == [
        (1, None, (2,), 1.0), (2, names[0], (1, 4), 1.0), (4, None, (2,), 1.0), (5, None, (), pytest.approx(5 / 6)),
        (10, None, (), 1.0),
    ]  # fmt: skip
    assert [i.reason for i in duplicates_list(groups, index)][1::2] == [
        "2 of the 2 other rows with the same words have another label",
        "row 3 has similar words and the same label; one of them could go",
    ]
    tie = duplicates_list(duplicates(Models(index), Thresholds(neighbours=0))[:0], index)
    assert not tie.items


def test_retired_rows_are_no_duplicates(index_of):
    from forebear.indexer.building.build import retire_rows

    index = index_of(BASE, [0, 1] * 5 + [0])
    live = retire_rows(index.folder, [2, 4])
    groups = duplicates(Models(live), Thresholds(neighbours=0))
    assert [g.rows.tolist() for g in groups] == [[3, 5], [6, 10]]


def test_cosines_link_neighbours_whose_words_overlap(bert_world):
    index = bert_world.index
    vectors = index.sentence().take(index.live).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    cut = float(np.sort(cosines.reshape(-1))[-120])
    t = Thresholds(jaccard=1.0, cosine=cut - 1e-9, cosine_jaccard=0.25, neighbours=N_ROWS - 1)
    found = duplicates(Models(index), t)
    texts = bert_world.texts
    links = {
        (a, b) for a, b in zip(*np.nonzero(cosines >= t.cosine), strict=True) if jaccard(texts[a], texts[b]) >= 0.25
    }
    links |= {(a, b) for a in range(N_ROWS) for b in range(N_ROWS) if a != b and jaccard(texts[a], texts[b]) == 1}
    group = list(range(N_ROWS))
    for _ in range(N_ROWS):
        for a, b in links:
            group[a] = group[b] = min(group[a], group[b])
    truth = sorted([i for i in range(N_ROWS) if group[i] == g] for g, n in Counter(group).items() if n > 1)
    assert len(truth) > 1
    assert sorted(g.rows.tolist() for g in found) == truth


def test_test_rows_among_training_rows(index_of):
    index = index_of(BASE, [0, 1] * 5 + [0])
    texts = ["SAD slow music", "sad slow music", "doctor saw lawyer near artist again", "warm day", "!!!", "blue"]
    queries = sample_queries(Retriever(index), rows_from_texts(texts), 0, 0)
    found = leaks(index, queries, Thresholds(jaccard=0.7))
    assert [(leak.test_row, leak.row, leak.kind) for leak in found] == [
        (0, 1, "same words"), (1, 1, "same texts"), (2, 5, "similar"), (4, 8, "same texts"),
    ]  # fmt: skip
    assert found[2].jaccard == pytest.approx(5 / 6)


@pytest.mark.parametrize("bad", [{"jaccard": 0.0}, {"cosine": 1.5}, {"cosine_jaccard": -1.0}, {"neighbours": -1}])
def test_thresholds_that_mean_nothing_are_refused(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}="):
        Thresholds(**bad).check()


# Mistakes


def test_mistakes_are_grouped_and_searched_together(bert_world):
    retriever = bert_world.retriever
    source = rows_from_texts(bert_world.queries, bert_world.query_labels)
    found = mistakes_of(retriever, source)
    predictions = retriever.answer_block(0, [bert_world.queries], None, QuerySpec()).predictions
    gold = np.array(bert_world.query_labels)
    assert found.rows.tolist() == np.flatnonzero(predictions != gold).tolist()
    groups = group_mistakes(found, retriever.label_names, 1, 0)
    assert [len(g.members) for g in groups] == sorted((len(g.members) for g in groups), reverse=True)
    assert sorted(np.concatenate([g.members for g in groups]).tolist()) == list(range(len(found.rows)))
    answers = explain_groups(retriever, found, groups, QuerySpec(methods=("if", "tracin"), top=4))
    for i, group in enumerate(groups):
        rows = found.rows[group.members]
        assert len(set(zip(gold[rows], predictions[rows], strict=True))) == 1
        for name in ("if", "tracin"):
            total = retriever.scores([bert_world.queries[r] for r in rows], name).sum(axis=0)
            near, far = answers.rankings[name]
            np.testing.assert_array_equal(near.rows[i], np.argsort(-total, kind="stable")[:4])
            np.testing.assert_array_equal(far.rows[i], np.argsort(total, kind="stable")[:4])
            np.testing.assert_allclose(near.scores[i], np.sort(total)[::-1][:4], rtol=1e-9)
    for target, side in (("predicted", 0), ("gold", 1)):
        listed = errors_list(groups, answers, bert_world.index, QuerySpec(target=target))
        behind = {}
        for i, group in enumerate(groups):
            for row in answers.rankings["if"][side].rows[i].tolist():
                behind[row] = behind.get(row, 0) + len(group.members)
        assert {item.row: item.evidence["mistakes"] for item in listed} == behind
        assert listed.items[0].evidence["mistakes"] == max(behind.values())


def test_clusters_part_mistakes_of_one_kind(bert_world):
    source = rows_from_texts(bert_world.texts, [1 - int(p) for p in bert_world.index.predictions])
    found = mistakes_of(bert_world.retriever, source)
    assert len(found.rows) == N_ROWS
    plain = group_mistakes(found, ("a", "b"), 1, 0)
    groups = group_mistakes(found, ("a", "b"), 3, 0)
    assert {g.name for g in plain} == {("b → a", "a → b")[p] for p in bert_world.index.predictions}
    assert {g.name for g in groups} == {f"{g.name}, {i}" for g in plain for i in (1, 2, 3)}
    assert sorted(np.concatenate([g.members for g in groups]).tolist()) == list(range(N_ROWS))
    unit = found.features / np.linalg.norm(found.features, axis=1, keepdims=True)
    for kind in plain:
        parts = [g.members for g in groups if g.name.startswith(kind.name)]
        centres = np.stack([unit[members].mean(axis=0) for members in parts])
        for k, members in enumerate(parts):  # k-means has converged: each row is nearest its own centre
            assert (((unit[members, None] - centres) ** 2).sum(axis=2).argmin(axis=1) == k).all()
    same = group_mistakes(found, ("a", "b"), N_ROWS * 2, 0)
    assert sum(len(g.members) for g in same) == N_ROWS
    with pytest.raises(InputError, match="n_clusters=0"):
        group_mistakes(found, ("a", "b"), 0, 0)


def test_no_mistakes_is_said(bert_world):
    source = rows_from_texts(bert_world.texts, [int(p) for p in bert_world.index.predictions])
    with pytest.raises(DataError, match="predicted right"):
        mistakes_of(bert_world.retriever, source)


# Hubs


@pytest.mark.parametrize("of_training", [False, True])
def test_counts_of_hubs_are_those_of_complete_rankings(bert_world, of_training):
    retriever = bert_world.retriever
    methods = ("gd", "nn-cos", "tracin")
    if of_training:
        queries = training_queries(retriever, 20, 4)
        assert len(queries) == 20
    else:
        queries = sample_queries(retriever, rows_from_texts(bert_world.queries), 0, 0)
    found = hubs(retriever, queries, QuerySpec(methods=methods, top=3))
    for i, name in enumerate(methods):
        scores = retriever.scores(queries.texts[0], name)
        counts = np.zeros(N_ROWS, int)
        for q, row in enumerate(queries.rows):
            mine = scores[q].copy()
            if of_training:
                mine[row] = -np.inf
            counts[np.argsort(-mine, kind="stable")[:3]] += 1
        np.testing.assert_array_equal(found.counts[i], counts)
        centred = [c - sum(counts) / N_ROWS for c in counts]
        second, third = (sum(c**power for c in centred) / N_ROWS for power in (2, 3))
        assert skewness(found.counts[i]) == pytest.approx(third / second**1.5)
    assert found.counts.sum(axis=1).tolist() == [3 * len(queries)] * 3
    np.testing.assert_allclose(found.shares, found.counts / len(queries))
    assert found.expected == pytest.approx(3 / N_ROWS)
    listed = {item.row: item for item in hubs_list(found, bert_world.index)}
    assert set(listed) == {int(found.rows[i]) for i in range(N_ROWS) if max(found.counts[:, i]) >= found.hub_count}
    for row, item in listed.items():
        assert item.evidence == {f"share by {n}": found.counts[i, row] / len(queries) for i, n in enumerate(methods)}
        hubs_by = [n for i, n in enumerate(methods) if found.counts[i, row] >= found.hub_count]
        assert [n for n in methods if f"by {n}" in item.reason] == hubs_by


def test_a_hub_comes_up_more_often_than_chance_allows(bert_world):
    queries = sample_queries(bert_world.retriever, rows_from_texts(bert_world.queries), 0, 0)
    found = hubs(bert_world.retriever, queries, QuerySpec(methods=("gd",), top=3))
    chance = [stats.binom(N_QUERIES, 3 / N_ROWS).pmf(range(c, N_QUERIES + 1)).sum() * N_ROWS for c in range(8)]
    least = found.hub_count
    assert chance[least] < 0.05 <= chance[least - 1]
    every = hubs(bert_world.retriever, queries, QuerySpec(methods=("gd",), top=N_ROWS))
    assert skewness(every.counts[0]) is None
    assert every.hub_count == N_QUERIES + 1  # all rows come up always: none is a hub


def test_questions_that_count_no_rows_are_refused(bert_world):
    queries = training_queries(bert_world.retriever, 5, 0)
    with pytest.raises(InputError, match="ranks spans"):
        hubs(bert_world.retriever, queries, QuerySpec(methods=("if++",)))
    with pytest.raises(InputError, match=f"top={N_ROWS}: expected 1 to {N_ROWS - 1}"):
        hubs(bert_world.retriever, queries, QuerySpec(methods=("gd",), top=N_ROWS))
    with pytest.raises(InputError, match="n_queries=-1"):
        training_queries(bert_world.retriever, -1, 0)


# Commands


@pytest.fixture(scope="module")
def queries_file(bert_world, tmp_path_factory):
    path = tmp_path_factory.mktemp("audits") / "test.jsonl"
    return str(write_jsonl(path, text=bert_world.queries, label=bert_world.query_labels))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mislabelled", "duplicates", "errors", "hubs"])
def test_each_command_writes_its_folder_and_can_be_repeated(bert_world, queries_file, tmp_path, capsys, command):
    asked = {
        "mislabelled": ["--top", "7"],
        "duplicates": ["--test", queries_file, "--cosine-jaccard", "0.2"],
        "errors": ["--test", queries_file, "--method", "gd,if", "--top", "2", "--clusters", "2"],
        "hubs": ["--method", "gd,nn-cos", "--queries", "30", "--listed", "4"],
    }[command]
    args = ["audit", command, "--index", str(bert_world.index.folder), *asked, "--quiet"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run([*args, "--out", str(first)]) == 0
    assert run([*args, "--out", str(second)]) == 0
    capsys.readouterr()
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for result in results:
        result.pop("provenance")
    assert results[0] == results[1]
    assert run([*args, "--out", str(first)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["index digest"] == bert_world.index.manifest.digest()
    lines = list(csv.DictReader((first / "table.csv").read_text(encoding="utf-8").splitlines()))
    if command == "mislabelled":
        assert [int(line["row"]) for line in lines] == results[0]["listed"]
        assert len(lines) == 7
        assert lines[0]["text: text"] == bert_world.texts[int(lines[0]["row"])]
    if command == "hubs":
        counted = results[0]["counts"]["nn-cos"]
        rows = csv.DictReader((first / "table-most-frequent-rows.csv").read_text(encoding="utf-8").splitlines())
        listed = [line for line in rows if line["method"] == "nn-cos"]
        assert int(listed[0]["queries"]) == counted[listed[0]["row"]] == max(counted.values())
        assert sum(counted.values()) == 30 * 10
    if command == "errors":
        assert sum(len(g["test_rows"]) for g in results[0]["groups"]) == results[0]["n_mistakes"]
        assert run(args[:-1]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "group method side row score effect label" in shown
        assert "By if, effect: predicted rise of the target's loss" in shown
        assert "target's probability" not in shown  # which is no column of this table


def test_mistakes_in_use_are_one_line(bert_world, queries_file, capsys):
    folder = str(bert_world.index.folder)
    for args, said in (
        (["errors", "--test", queries_file, "--method", "gc"], "not linear"),
        (["errors", "--test", queries_file, "--clusters", "0"], "--clusters 0"),
        (["mislabelled", "--method", "gc"], "self-influence is not stored"),
        (["mislabelled", "--top", "0"], "--top 0"),
        (["mislabelled", "--neighbours", "60"], "--neighbours 60"),
        (["duplicates", "--jaccard", "2"], "--jaccard 2"),
        (["duplicates", "--top", "0"], "--top 0"),
        (["hubs", "--listed", "0", "--method", "gd", "--queries", "3"], "--listed 0"),
    ):
        assert run(["audit", args[0], "--index", folder, *args[1:], "--quiet"]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1


def test_the_words_of_the_tests_are_words():
    assert words_of("The GOOD, bad—ugly_1 ﬁlm!") == ["the", "good", "bad", "ugly_1", "film"]
    assert not set(words_of(" ".join(WORDS))) ^ set(WORDS)


def test_results_show_the_share_of_reference_queries(bert_world, queries_file, tmp_path, capsys):
    folder = str(bert_world.index.folder)
    methods = ["--method", "gd,if", "--top", "4"]
    audit = ["audit", "hubs", "--index", folder, "--test", queries_file, *methods, "--quiet"]
    assert run([*audit, "--out", str(tmp_path / "hubs")]) == 0
    args = ["retrieve", "--index", folder, "--test", queries_file, *methods, "--hubs", str(tmp_path / "hubs")]
    assert run([*args, "--out", str(tmp_path / "a.parquet")]) == 0
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    ends = Counter((line["method"], line["row"]) for line in table if line["side"] == "proponent")
    for line in table:  # the reference queries are the very ones asked about: the shares can be counted here
        share = ends[line["method"], line["row"]] / N_QUERIES if line["side"] == "proponent" else None
        assert line["hub_share"] == (None if share is None else pytest.approx(share))
    capsys.readouterr()
    assert run([*args[:-3], "2", "--hubs", str(tmp_path / "hubs")]) == 0  # of fewer rows
    shown = [line for line in table if line["side"] == "proponent" and line["rank"] <= 2 and line["query"] < 5]
    largest = max(line["hub_share"] for line in shown)
    assert f"{largest:.1%}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_audit_of_something_else_is_refused(bert_world, make_world, queries_file, tmp_path, capsys):
    folder, out = str(bert_world.index.folder), str(tmp_path / "hubs")
    audit = ["audit", "hubs", "--index", folder, "--test", queries_file, "--method", "if", "--quiet", "--out", out]
    assert run(audit) == 0
    ask = ["retrieve", "--index", folder, "--text", "good film", "--hubs", out, "--method"]
    assert run([*ask, "gd"]) == 2
    assert "gd is asked for" in capsys.readouterr().err
    assert run([*ask, "if", "--damping", "2x"]) == 2
    assert "another curvature" in capsys.readouterr().err
    assert run([*ask, "if", "--damping", "0.1x"]) == 0
    other = make_world("bert", 2, False, 1).index.folder
    assert run(["retrieve", "--index", str(other), "--text", "good", "--method", "if", "--hubs", out]) == 2
    assert "another index" in capsys.readouterr().err
    assert run([*ask[:-2], str(tmp_path), "--method", "if"]) == 2
    assert "no audit of hubs" in capsys.readouterr().err
