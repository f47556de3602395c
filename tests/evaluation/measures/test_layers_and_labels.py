"""Saliency consistency, cancellation and wrong labels, against slow loops, autograd, scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import N_QUERIES, N_ROWS
from inputs import inputs_of
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import BuildOptions, DataError, InputError, MismatchError, Retriever, build_index, choose_model, open_rows
from forebear.cli.main import run
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.measures.cancellation import cancellation, parameter_groups, row_gradient_norms
from forebear.evaluation.measures.mislabelled import (
    auc_and_interval,
    mislabelled,
    precision_at,
    self_influence,
    true_labels_of,
    wrong_rows_of,
)
from forebear.evaluation.measures.saliency_consistency import (
    INFLUENCE_SHARES,
    ROLES,
    influence_of,
    overlap_of,
    pooled_mean,
    saliency_consistency,
    saliency_consistency_report,
    salient_positions,
    without_piece,
    word_starts,
)
from forebear.indexer.gradients.whole import whole_gradients
from forebear.indexer.model.encoding import encode_with_places
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.saliency.maps import saliency


@pytest.fixture(scope="module")
def retriever(bert_world):
    return bert_world.retriever


@pytest.fixture(scope="module")
def queries(bert_world):
    return sample_queries(bert_world.retriever, rows_from_texts(bert_world.queries), 0, 0)


# Saliency consistency


def test_salient_positions_are_first_middle_and_last_of_the_eligible():
    values = np.array([9.0, 0.3, -0.1, 0.3, -0.5, 0.2, -9.0])
    eligible = np.array([False, True, True, True, True, True, False])
    assert salient_positions(values, eligible) == (4, 5, 3)  # -.5 -.1 .2 .3 .3: number 5 // 2, and ties by place
    eligible[5] = False
    assert salient_positions(values, eligible) == (4, 1, 3)  # -.5 -.1 .3 .3: number 4 // 2
    assert salient_positions(values, np.arange(7) == 2) == (2, 2, 2)
    assert salient_positions(values, np.zeros(7, bool)) is None


def test_continuation_pieces_and_special_tokens_are_never_chosen(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##bel", "##ievable", "film", "!"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip
    folder = make_tiny_model(tmp_path / "m")
    tokenizer.save_pretrained(folder)
    classifier = load_classifier(folder)
    rows, encoded = encode_with_places(classifier, [["unbelievable film film!", ""]])
    pieces = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert [p for p, start in zip(pieces, word_starts(encoded, 0), strict=True) if start] == ["un", "film", "film", "!"]
    assert not word_starts(encoded, 1).any()


def test_a_removed_piece_keeps_its_position():
    row = {"input_ids": [2, 7, 8, 3], "attention_mask": [1, 1, 1, 1]}
    assert without_piece(row, 2) == {"input_ids": [2, 7, 8, 3], "attention_mask": [1, 1, 0, 1]}
    assert row["attention_mask"] == [1, 1, 1, 1]
    assert without_piece({"input_ids": [2, 3]}, 0)["attention_mask"] == [0, 1]


def test_influence_and_overlap_of_a_ranking_made_by_hand():
    scores = np.array([4.0, 1.0, 3.0, 3.0, -1.0, 0.0, 2.0, -4.0, 5.0, -3.0])
    counted = np.array([1, 0, 1, 1, 0, 0, 0, 1, 0, 1], bool)
    z = (scores - 1.0) / np.sqrt(np.mean((scores - 1.0) ** 2))
    sums, counts = influence_of(scores, [counted, ~counted])
    assert counts[0].tolist() == [0, 1, 3, 5]  # tops of 1, 2, 5, 10 rows: 8 | 0 | 2 3 6 | ...
    np.testing.assert_allclose(sums[0], [0, z[0], z[0] + 2 * z[2], z[0] + 2 * z[2] + z[7] + z[9]])
    assert counts[1].tolist() == [1, 1, 2, 5]
    before = np.arange(1000.0)
    after = before.copy()
    after[-3:] = -1
    found = overlap_of(before, after)
    assert found == [0.0, 0.0, 2 / 5, 7 / 10]
    assert np.isnan(overlap_of(before, np.ones(1000))).all()
    assert np.isnan(overlap_of(before[:50], after[:50])).all()
    assert np.isnan(overlap_of(before[:150], before[:150])[:3]).all()
    assert overlap_of(before[:150], before[:150])[3] == 1.0


def test_a_pooled_mean_resamples_queries():
    sums, counts = np.array([2.0, 0.0, 9.0]), np.array([1, 0, 3])
    mean, low, high = pooled_mean(sums, counts, 0)
    assert mean == 11 / 4
    assert low == 2.0
    assert high == 3.0
    assert pooled_mean(sums[:2], counts[:2], 0) == [2.0, None, None]
    assert pooled_mean(np.zeros(2), np.zeros(2, int), 0) == [None] * 3


def slow_consistency(world):
    """Of `gd`: sums, counts and whole rankings before and after, one query at a time over a plain model."""
    path = world.models[-1]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    train = [tokenizer(text)["input_ids"] for text in world.texts]

    def forward(ids, mask):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]), output_hidden_states=True)
            pooled = model.bert.pooler(out.hidden_states[-1])
        return out.logits[0].double(), pooled[0].double()

    rows = []
    for ids, gold in zip(train, world.labels, strict=True):
        logits, f = forward(ids, [1] * len(ids))
        rows.append(torch.outer(logits.softmax(0) - torch.eye(len(logits))[gold], f).flatten())
    rows = torch.stack(rows)
    sums, counts, tops = np.zeros((3, 4, N_QUERIES)), np.zeros((3, 4, N_QUERIES)), []
    for q, text in enumerate(world.queries):
        ids = tokenizer(text)["input_ids"]

        def score(mask, ids=ids):
            logits, f = forward(ids, mask)
            target = int(logits.argmax())
            return target, (rows @ torch.outer(logits.softmax(0) - torch.eye(len(logits))[target], f).flatten()).numpy()

        target, scores = score([1] * len(ids))
        values = saliency(load_classifier(path), [[text]], np.array([target]))[0].values
        at = sorted((t for t in range(len(ids)) if ids[t] not in special), key=lambda t: (values[t], t))
        chosen = [at[0], at[len(at) // 2], at[-1]]
        z = (scores - scores.mean()) / scores.std()
        order = sorted(range(N_ROWS), key=lambda n: (-scores[n], n))
        for r, t in enumerate(chosen):
            for s, share in enumerate((0.1, 0.2, 0.5, 1.0)):
                mine = [
                    z[n] for n in order[: round(share * N_ROWS)] if world.labels[n] == target and ids[t] in train[n]
                ]
                sums[r, s, q], counts[r, s, q] = sum(mine), len(mine)
        tops.append([(scores, score([int(t != gone) for t in range(len(ids))])[1]) for gone in chosen])
    return sums, counts, tops


def test_consistency_is_that_of_a_slow_loop(bert_world, retriever, queries, monkeypatch):
    from forebear.evaluation.measures import saliency_consistency as module

    monkeypatch.setattr(module, "OVERLAP_SHARES", ("0.01", "0.1", "0.2", "0.5"))  # of 60 rows
    spec = QuerySpec(methods=("gd", "if"), curvature="identity")  # H = I: both are gd
    found = saliency_consistency(retriever, queries, spec)
    sums, counts, tops = slow_consistency(bert_world)
    assert counts.sum() > 50
    for m in range(2):
        np.testing.assert_array_equal(found.counts[m], counts)
        np.testing.assert_allclose(found.sums[m], sums, rtol=1e-4, atol=1e-4)
        for r in range(len(ROLES)):
            for d, k in enumerate((0, 6, 12, 30)):
                for q in range(N_QUERIES):
                    before, after = (np.argsort(-s, kind="stable")[:k].tolist() for s in tops[q][r])
                    if k:
                        assert found.overlaps[m, r, d, q] == len(set(before) & set(after)) / k
                    else:
                        assert np.isnan(found.overlaps[m, r, d, q])
    assert (found.overlaps[0, :, 1] < 1).any()
    report, result = saliency_consistency_report(found, inputs_of(retriever, queries, spec))
    assert result["overlaps"][0][0][0] == [None] * N_QUERIES
    pooled = [row[3] for row in report.tables[0].rows if row[:3] == ["gd", "median", "50%"]]
    at = INFLUENCE_SHARES.index("0.5")
    assert pooled[0] == pytest.approx(sums[1, at].sum() / counts[1, at].sum(), rel=1e-4)


def test_rows_without_a_word_and_methods_by_text_are_defined(retriever):
    some = sample_queries(retriever, rows_from_texts(["", "good film"]), 0, 0)
    found = saliency_consistency(retriever, some, QuerySpec(methods=("gd",)))
    assert found.n_skipped == 1
    assert found.query_rows.tolist() == [1]
    with pytest.raises(DataError, match="none of the 1 test rows"):
        saliency_consistency(
            retriever, sample_queries(retriever, rows_from_texts([""]), 0, 0), QuerySpec(methods=("gd",))
        )
    for name in ("sbert-cos", "tracin-we", "tracin-tfidf", "if++"):
        with pytest.raises(InputError, match=name.replace("+", r"\+")):
            saliency_consistency(retriever, some, QuerySpec(methods=(name,)))


def test_consistency_at_a_deeper_scope(bert_world, tmp_path):
    """At the layer of the head the deeper machinery must say what the head's factors say."""
    options = BuildOptions(scopes=("head", "layer:classifier"), calibration_queries=0)
    source = rows_from_texts(bert_world.texts, bert_world.labels)
    chosen = choose_model(None, bert_world.models[-1:]).checkpoints
    retriever = Retriever(build_index(source, tmp_path / "i", chosen, options))
    asked = sample_queries(retriever, rows_from_texts(bert_world.queries), 0, 0)
    deep, head = (
        saliency_consistency(retriever, asked, QuerySpec(methods=("gd",), scope=scope))
        for scope in ("layer:classifier", "head")
    )
    np.testing.assert_array_equal(deep.counts[:, :, -1], head.counts[:, :, -1])
    np.testing.assert_allclose(deep.sums[:, :, -1], head.sums[:, :, -1], rtol=1e-3, atol=1e-3)


# Cancellation


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_row_gradients_are_those_of_the_hooks(tiny_model, kind):
    """Plain autograd here, against the pass that catches factors by hooks, over weights, biases and norms."""
    classifier = load_classifier(tiny_model(kind))
    texts, gold = [sentences(6, seed=4)], np.array(labels(6))
    groups = parameter_groups(classifier)
    norms, cosines = row_gradient_norms(classifier, texts, gold, groups)
    scope = scope_of(classifier, "all", with_bias=True)
    whole = whole_gradients(classifier, scope, texts, gold)
    by_name = {}
    for block in scope.blocks:
        by_name |= {n: g.double().flatten(1) for n, g in block.split(whole[block.name]).items()}
    checked = 0
    for g, group in enumerate(groups):
        if not set(group.parameters) <= by_name.keys():
            continue
        vectors = torch.cat([by_name[name] for name in group.parameters], dim=1).numpy()
        lengths = np.linalg.norm(vectors, axis=1)
        np.testing.assert_allclose(norms[:, g], lengths, rtol=1e-4, atol=1e-7)
        if lengths.min() > 1e-6:
            unit = vectors / lengths[:, None]
            pairs = [unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j]
            assert cosines[g] == pytest.approx(np.mean(pairs), abs=1e-4)
            checked += 1
    assert checked > 20
    assert not any(p.requires_grad and p.grad is not None for p in classifier.model.parameters())


def test_the_embeddings_gradient_is_autograds(tiny_model):
    classifier = load_classifier(tiny_model("bert"))
    groups = parameter_groups(classifier)
    at = [g.name for g in groups].index("bert.embeddings.word_embeddings.weight")
    texts, gold = [sentences(4, seed=8)], np.array([0, 1, 1, 0])
    norms, _ = row_gradient_norms(classifier, texts, gold, groups)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model("bert")).eval()
    for n in range(4):
        model.zero_grad()
        logits = model(**classifier.tokenizer(texts[0][n], return_tensors="pt")).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([int(gold[n])])).backward()
        assert norms[n, at] == pytest.approx(float(model.bert.embeddings.word_embeddings.weight.grad.norm()), rel=1e-4)
        everything = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert norms[n, 0] == pytest.approx(float(everything.norm()), rel=1e-4)


def test_groups_hold_every_parameter_once_a_level(tiny_model):
    for kind in ("bert", "electra"):
        classifier = load_classifier(tiny_model(kind))
        names = sorted(name for name, _ in classifier.model.named_parameters())
        groups = parameter_groups(classifier)
        for level in ("all", "kind", "layer", "tensor"):
            assert sorted(p for g in groups if g.level == level for p in g.parameters) == names
        layers = dict.fromkeys(g.name for g in groups if g.level == "layer")
        assert {"word embeddings", "layer 0", "layer 1"} <= set(layers)


@pytest.mark.slow
def test_cancellation_is_gradients_over_distance(make_world):
    """Three checkpoints, all rows, tensor by tensor; nothing but the row norms is shared with the module."""
    world = make_world("bert", 2, False, 3)
    found = cancellation(world.retriever, n_rows=0)
    weights = [load_classifier(path).model.state_dict() for path in world.models]
    groups = parameter_groups(load_classifier(world.models[0]))
    pulled = 0.0
    for c in (0, 1):
        norms, _ = row_gradient_norms(load_classifier(world.models[c]), [world.texts], np.array(world.labels), groups)
        pulled = pulled + world.etas[c] * norms.sum(axis=0)
    for g, group in enumerate(groups):
        distance = 0.0
        for c in (0, 1):
            parts = [(weights[c + 1][name] - weights[c][name]).flatten() for name in group.parameters]
            distance += float(torch.cat(parts).double().norm())
        value = found.values[:, g].mean()
        if distance == 0:  # biases and norms of random models are all alike
            assert np.isnan(value)
        else:
            assert value == pytest.approx(pulled[g] / distance, rel=1e-6)
    sample = cancellation(world.retriever, n_rows=20, seed=1)
    at = np.searchsorted(np.arange(N_ROWS), sample.rows)
    np.testing.assert_allclose(sample.values[:, 0], found.values[at, 0], rtol=1e-6)


def test_cancellation_needs_checkpoints_and_rows(bert_world, make_world):
    with pytest.raises(InputError, match="two or more"):
        cancellation(make_world("roberta", 2, False, 1).retriever)
    with pytest.raises(InputError, match="n_rows=1"):
        cancellation(bert_world.retriever, n_rows=1)


def test_opposed_gradients_have_a_negative_cosine(tiny_model):
    """The same text under both labels pulls the head both ways: cosine -1 for a two-class head."""
    classifier = load_classifier(tiny_model("bert"))
    groups = parameter_groups(classifier)
    at = [g.name for g in groups if g.level == "tensor"].index("classifier.weight")
    at += len([g for g in groups if g.level != "tensor"])
    _, cosines = row_gradient_norms(classifier, [["a good film"] * 2], np.array([0, 1]), groups)
    assert cosines[at] == pytest.approx(-1.0, abs=1e-5)
    _, cosines = row_gradient_norms(classifier, [["a good film"] * 2], np.array([1, 1]), groups)
    assert cosines[at] == pytest.approx(1.0, abs=1e-5)


# Wrong labels


@pytest.mark.slow
def test_self_influence_is_the_score_with_oneself(bert_world, tmp_path):
    options = BuildOptions(scopes=("head", "top-1"), calibration_queries=0)
    source = rows_from_texts(bert_world.texts, bert_world.labels)
    chosen = choose_model(None, bert_world.models, bert_world.etas).checkpoints
    retriever = Retriever(build_index(source, tmp_path / "i", chosen, options))
    for scope in ("head", "top-1"):
        found = self_influence(retriever.resolve(QuerySpec(methods=("gd", "if", "tracin"), scope=scope)))
        for name, values in found.items():
            for c in (0, 1):
                asked = [n for n in range(N_ROWS) if bert_world.labels[n] == c]
                texts = [bert_world.texts[n] for n in asked]
                scores = retriever.scores(texts, name, target=retriever.label_names[c], scope=scope)
                np.testing.assert_allclose(values[asked], scores[np.arange(len(asked)), asked], rtol=2e-3, atol=1e-6)
    for name in ("gc", "rif", "nn-dot", "rep", "tracin-we", "if++"):
        with pytest.raises(InputError, match=r"not stored|holds no words"):
            self_influence(retriever.resolve(QuerySpec(methods=(name,))))


def test_auc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    values, wrong = rng.integers(0, 6, 300).astype(float), rng.random(300) < 0.2
    area, low, high = auc_and_interval(values, wrong, 0)
    assert area == pytest.approx(roc_auc_score(wrong, values), abs=1e-12)
    assert low < area < high
    assert auc_and_interval(np.ones(10), np.arange(10) < 4, 0) == [0.5, 0.5, 0.5]
    assert auc_and_interval(np.arange(10), np.arange(10) == 9, 0) == [1.0, None, None]  # one row cannot vary
    assert auc_and_interval(np.arange(10.0), np.arange(10) > 7, 0) == [1.0, 1.0, 1.0]


def test_precision_orders_ties_by_row():
    values, wrong = np.array([1.0, 3.0, 1.0, 1.0, 2.0]), np.array([True, True, False, True, False])
    assert [precision_at(values, wrong, k) for k in (1, 2, 3, 4, 5)] == [1, 1 / 2, 2 / 3, 2 / 4, 3 / 5]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Training rows with a column of clean labels, an index of the noisy ones, and which rows differ."""
    folder = tmp_path_factory.mktemp("planted")
    texts, clean = sentences(40, seed=1), labels(40)
    flipped = [3, 7, 20]
    noisy = [1 - label if n in flipped else label for n, label in enumerate(clean)]
    train = write_jsonl(folder / "train.jsonl", text=texts, label=noisy, clean=clean)
    chosen = choose_model(str(make_tiny_model(folder / "model"))).checkpoints
    index = build_index(open_rows(train, need_labels=True), folder / "index", chosen)
    return folder, index, flipped


def test_wrong_rows_come_from_a_column_or_a_file(planted, tmp_path):
    folder, index, flipped = planted
    truth = true_labels_of(index, open_rows(folder / "train.jsonl", label_column="clean", need_labels=True))
    assert np.flatnonzero(truth != index.labels).tolist() == flipped
    numbers = tmp_path / "n.txt"
    numbers.write_text("7\n3 20\n")
    assert np.flatnonzero(wrong_rows_of(numbers, 40)).tolist() == flipped
    for text in ("7\n40", "-1", "x", "²"):
        numbers.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="row numbers from 0 to 39"):
            wrong_rows_of(numbers, 40)
    with pytest.raises(DataError, match="cannot be read"):
        wrong_rows_of(tmp_path / "none.txt", 40)
    for other in (sentences(40, seed=2), sentences(39, seed=1)):
        with pytest.raises(MismatchError, match="built from"):
            true_labels_of(index, rows_from_texts(other, labels(len(other))))


def test_all_or_no_wrong_labels_are_refused(planted):
    _, index, _ = planted
    spec = QuerySpec(methods=("gd",))
    for wrong in (np.zeros(40, bool), np.ones(40, bool)):
        with pytest.raises(DataError, match="expected some, not all"):
            mislabelled(Retriever(index), spec, wrong)
    with pytest.raises(InputError, match="n_neighbours=40"):
        mislabelled(Retriever(index), spec, np.arange(40) < 5, n_neighbours=40)


def test_the_command_measures_planted_flips(planted, tmp_path, capsys):
    folder, index, flipped = planted
    args = ["evaluate", "mislabelled", "--index", str(folder / "index"), "--true-label", "clean", "--top", "5"]
    assert run([*args, "--out", str(tmp_path / "out")]) == 0
    assert "wrong label" in (tmp_path / "out" / "report.html").read_text()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    wrong = np.isin(np.arange(40), flipped)
    wanted = {"gd", "if", "loss", "neighbours", "mean probability", "margin", "out-of-fold", "votes", "evidence"}
    assert set(result["measures"]) == wanted
    for name in wanted:
        assert result["measures"][name]["auc"] == pytest.approx(roc_auc_score(wrong, result["values"][name]))
    np.testing.assert_allclose(result["values"]["loss"], index.losses)
    features = index.features().take(index.live).astype(np.float64)
    near = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(features)
    others = index.labels[near.kneighbors(return_distance=False)] != index.labels[:, None]
    np.testing.assert_allclose(result["values"]["neighbours"], others.mean(axis=1))
    assert result["measures"]["gd"]["precision"]["5"] * 5 == pytest.approx(
        sum(n in flipped for n in np.argsort(-np.array(result["values"]["gd"]), kind="stable")[:5])
    )
    capsys.readouterr()
    assert run(args[:-4]) == 2
    assert "--true-label COLUMN or --wrong-rows FILE" in capsys.readouterr().err
    assert run([*args[:-1], "41"]) == 2
    assert "expected 1 to 40" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saliency-consistency", "cancellation"])
def test_the_commands_write_reports(bert_world, name, tmp_path, capsys):
    test = write_jsonl(tmp_path / "one.jsonl", text=bert_world.queries[:1])
    args = ["evaluate", name, "--index", str(bert_world.index.folder)]
    args += ["--rows", "5"] if name == "cancellation" else ["--test", str(test)]
    assert run([*args, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    written = {"report.html", "report.json", "result.json", "table.csv"}
    assert {p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("table-")} == written
    assert run([*args, "--json"]) == 0
    assert "provenance" in json.loads(capsys.readouterr().out)
