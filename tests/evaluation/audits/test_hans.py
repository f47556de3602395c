"""The HANS audit against a slow loop that shares none of its code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import BuildOptions, DataError, InputError, Retriever, build_index, choose_model, open_rows
from forebear.cli.main import run
from forebear.errors import MismatchError
from forebear.evaluation.audits.artifacts import hans as module
from forebear.evaluation.audits.artifacts.features import measure, negation_feature, overlap_feature
from forebear.evaluation.audits.artifacts.hans import audit_hans, hans_report, training_overlap
from forebear.evaluation.audits.work_lists import hans_list

NAMES = {2: ["entailment", "non-entailment"], 3: ["contradiction", "entailment", "neutral"]}


def nli_model(folder, n_classes):
    make_tiny_model(folder, n_classes=n_classes, seed=5)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(NAMES[n_classes]))
    config["label2id"] = {name: i for i, name in enumerate(NAMES[n_classes])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"hans-{request.param}")
    model = nli_model(folder / "model", request.param)
    names = NAMES[request.param]
    train = write_jsonl(
        folder / "train.jsonl",
        premise=sentences(50, seed=1),
        hypothesis=sentences(50, seed=2, low=1, high=5),
        label=[names[i] for i in labels(50, request.param)],
    )
    hans = write_jsonl(
        folder / "hans.jsonl",
        premise=sentences(40, seed=3),
        hypothesis=sentences(40, seed=4, low=1, high=5),
        label=[["entailment", "non-entailment"][i] for i in labels(40)],
        subcase=[["swap", "passive", None][i % 3] for i in range(40)],
        template=[f"temp{i % 7}" for i in range(40)],
    )
    source = open_rows(train, need_labels=True)
    index = build_index(source, folder / "index", choose_model(str(model)).checkpoints, BuildOptions(shard_rows=16))
    return folder, Retriever(index), open_rows(hans, need_labels=True)


def test_the_audit_equals_a_slow_loop(world):
    folder, retriever, source = world
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    hans = [json.loads(line) for line in (folder / "hans.jsonl").read_text().splitlines()]
    share = []
    for row in train:
        words = set(row["hypothesis"].lower().split())
        share.append(len([w for w in words if w in row["premise"].lower().split()]) / len(words))
    audit = audit_hans(retriever, source, ["gc", "nn-euc"], top=4)
    table = retriever.retrieve([(r["premise"], r["hypothesis"]) for r in hans], methods=["gc"], top=1).to_pylist()
    predicted = {row["query"]: row["query_prediction"] for row in table}
    wrong = [i for i, r in enumerate(hans) if r["label"] == "non-entailment" and predicted[i] == "entailment"]
    right = [i for i, r in enumerate(hans) if r["label"] == "entailment" and predicted[i] == "entailment"]
    assert audit.n_queries == len(wrong) > 3
    assert audit.accuracy[0] == len(right) / 20
    assert audit.n_rows == (20, 20)
    assert audit.all_rows_overlap == pytest.approx(np.mean(share))
    for m, method in enumerate(("gc", "nn-euc")):
        scores = retriever.scores([(hans[i]["premise"], hans[i]["hypothesis"]) for i in wrong], method)
        tops = [sorted(range(50), key=lambda n, q=q: (-scores[q, n], n))[:4] for q in range(len(wrong))]
        wanted = [[share[n] for n in top] for top in tops]
        np.testing.assert_allclose(audit.overlap[:, m], wanted, atol=1e-6)
        first = [top[0] for top in tops]
        assert audit.hub_share[m] == max(first.count(n) for n in first) / len(first)
        assert audit.counts[m].tolist() == [sum(n in top for top in tops) for n in range(50)]
    best = int(audit.overlap.mean(axis=(0, 2)).argmax()) if (audit.hub_share <= 0.5).all() else None
    listed = [(item.row, item.evidence) for item in hans_list(audit, retriever.index)]
    assert listed
    assert {row for row, _ in listed} <= {n for n in range(50) if share[n] > np.mean(share)}
    for row, evidence in listed:
        assert evidence["overlap"] == pytest.approx(share[row])
        assert best is None or evidence["wrong entailments"] == audit.counts[best, row] > 0


def test_kinds_of_rows_are_counted_as_by_a_slow_loop(world):
    folder, retriever, source = world
    hans = [json.loads(line) for line in (folder / "hans.jsonl").read_text().splitlines()]
    audit = audit_hans(retriever, source, ["gc", "nn-euc"], top=4)
    table = retriever.retrieve([(r["premise"], r["hypothesis"]) for r in hans], methods=["gc"], top=1).to_pylist()
    predicted = {row["query"]: row["query_prediction"] for row in table}
    _, result = hans_report(audit, retriever, source, "command")
    assert list(result["by"]) == ["subcase", "template"]  # these rows name no heuristic
    assert list(result["by"]["subcase"]) == ["swap", "passive", "(none)"]
    queries = [i for i, r in enumerate(hans) if r["label"] == "non-entailment" and predicted[i] == "entailment"]
    for column, found in result["by"].items():
        for value, facts in found.items():
            mine = [i for i, r in enumerate(hans) if (r[column] or "(none)") == value]
            right = [i for i in mine if (hans[i]["label"] == "entailment") == (predicted[i] == "entailment")]
            asked = [q for q, i in enumerate(queries) if i in mine]
            assert (facts["n_rows"], facts["n_queries"]) == (len(mine), len(asked))
            assert facts["accuracy"] == pytest.approx(len(right) / len(mine))
            for m, method in enumerate(("gc", "nn-euc")):
                wanted = audit.overlap[asked, m].mean() if asked else None
                assert facts["top_k"][method] == (wanted and pytest.approx(wanted, rel=1e-6))


def test_an_index_that_encodes_the_hypothesis_first_has_the_same_overlap(world, tmp_path):
    folder, retriever, source = world
    order = ["hypothesis", "premise"]
    train = open_rows(folder / "train.jsonl", text_columns=order, need_labels=True)
    model = choose_model(str(folder / "model")).checkpoints
    turned = Retriever(build_index(train, tmp_path / "i", model, BuildOptions()))
    np.testing.assert_array_equal(training_overlap(turned), training_overlap(retriever))
    feature, plain = (overlap_feature(names) for names in (order, order[::-1]))
    assert feature.description == plain.description
    np.testing.assert_array_equal(measure(turned.index, feature), measure(retriever.index, plain))
    assert "'hypothesis'" in negation_feature(order).description
    with pytest.raises(MismatchError, match=r'in this order\. Give text_columns=\("hypothesis", "premise"\)'):
        audit_hans(turned, source, ["gc"])


def test_one_query_has_no_interval_and_more_is_said_only_where_it_is_sure(world, tmp_path):
    folder, retriever, source = world
    n_live = retriever.index.manifest.n_live
    with pytest.raises(InputError, match=rf"top={n_live + 1}: .* has {n_live} live rows"):
        audit_hans(retriever, source, ["gc"], top=n_live + 1)
    every = audit_hans(retriever, source, ["gc"], top=n_live)  # the top rows are all rows
    report, _ = hans_report(every, retriever, source, "")
    assert "No method surely brings up" in report.summary
    rows = [json.loads(line) for line in (folder / "hans.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if row["label"] == "non-entailment"]
    for row in wrong:
        path = write_jsonl(tmp_path / "one.jsonl", **{name: [row[name]] for name in ("premise", "hypothesis", "label")})
        try:
            found = audit_hans(retriever, open_rows(path, need_labels=True), ["gc"], top=3)
        except DataError:  # it is not mispredicted
            continue
        _, result = hans_report(found, retriever, source, "")
        assert [result["methods"]["gc"][k] for k in ("top_k_low", "top_k_high", "hub_share")] == [None] * 3
        return
    raise AssertionError("no row is mispredicted")


def test_blocks_of_any_size_give_one_audit(world, monkeypatch):
    _, retriever, source = world
    whole = audit_hans(retriever, source, ["gc"], top=4)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    parts = audit_hans(retriever, source, ["gc"], top=4)
    np.testing.assert_allclose(parts.overlap, whole.overlap)
    assert [vars(kind) for kind in parts.breakdowns] == [vars(kind) for kind in whole.breakdowns]


def test_the_command_writes_a_report_that_stands_alone(world, tmp_path, capsys):
    folder, _, _ = world
    args = ["audit", "hans", "--index", folder / "index", "--test", folder / "hans.jsonl", "--out", tmp_path / "a"]
    assert run([str(a) for a in args]) == 0
    assert "non-entailment rows are taken for entailment" in capsys.readouterr().out.replace("\n", " ")
    assert {"report.html", "result.json", "table.csv"} <= {p.name for p in (tmp_path / "a").iterdir()}
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert set(result["methods"]) == set(Retriever(folder / "index").row_methods())
    page = (tmp_path / "a" / "report.html").read_text()
    assert "forebear" in page
    assert "<svg" in page
    assert "By template" in page
    assert 'src="http' not in page
    assert run([str(a) for a in args]) == 2
    assert run([*map(str, args), "--force", "-q"]) == 0


def test_a_model_or_a_file_without_nli_labels_is_refused(world, tmp_path):
    _, retriever, _ = world
    plain = write_jsonl(tmp_path / "x.jsonl", premise=["a film"], hypothesis=["a plot"], label=["good"])
    with pytest.raises(InputError, match="expected entailment and non-entailment"):
        audit_hans(retriever, open_rows(plain, need_labels=True), ["gc"])
    model = make_tiny_model(tmp_path / "model")
    train = write_jsonl(
        tmp_path / "t.jsonl", premise=["a film", "a plot"], hypothesis=["a plot", "a film"], label=[0, 1]
    )
    index = build_index(open_rows(train), tmp_path / "i", choose_model(str(model)).checkpoints)
    with pytest.raises(InputError, match="needs a model with NLI labels"):
        audit_hans(Retriever(index), open_rows(plain, need_labels=True), ["gc"])


def test_nothing_mispredicted_is_said_so(world, tmp_path):
    _, retriever, _ = world
    only = write_jsonl(tmp_path / "x.jsonl", premise=["a film"], hypothesis=["a film"], label=["entailment"])
    with pytest.raises(DataError, match="nothing to explain"):
        audit_hans(retriever, open_rows(only, label_names=None, need_labels=True), ["gc"])
