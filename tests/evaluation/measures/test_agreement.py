"""Sag@K and Lag@K against slow loops with plain transformers calls, masks written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from inputs import inputs_of

from forebear import DataError, InputError, QuerySpec, Retriever
from forebear.cli.main import run
from forebear.evaluation.common import span_queries
from forebear.evaluation.common.span_queries import sample_span_queries
from forebear.evaluation.measures import agreement
from forebear.evaluation.measures.agreement import (
    PAPER_METHODS,
    RANDOM_ROWS,
    RANDOM_SPANS,
    cosines,
    depths,
    measure_agreement,
)
from forebear.evaluation.measures.agreement_report import agreement_report
from forebear.indexer.rows.opening import rows_from_texts

K = (2, 5)


class Plain:
    """The model of a world, asked one unpadded row at a time; a text's j-th word is its (j + 1)-th piece."""

    def __init__(self, path):
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def ask(self, text, word=None, label=0):
        """emb of a row, with a word masked, and its loss."""
        inputs = self.tokenizer(text, return_tensors="pt")
        if word is not None:
            inputs["input_ids"][0, 1 + word] = self.tokenizer.mask_token_id
        found = self.model(**inputs, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(found.logits, torch.tensor([label]))
        return found.hidden_states[-1][0, 0].double().numpy(), float(loss)

    def e(self, text, word=None):
        return self.ask(text)[0] - (0.0 if word is None else self.ask(text, word)[0])

    def own_word(self, text, label):
        """The word whose masking raises the loss most."""
        losses = [self.ask(text, word, label)[1] for word in range(len(text.split()))]
        return int(np.argmax(losses))


@pytest.fixture(scope="module")
def plain(bert_world):
    return Plain(bert_world.models[-1])


def question(world, **choices):
    spec = {"methods": PAPER_METHODS, "top": K[-1], "spans": "words"} | choices
    return world.retriever.resolve(QuerySpec(**spec))


def measured(world, measure, at=K, queries=None, gold=None, n_queries=0, seed=0, **choices):
    spec = question(world, top=at[-1], **choices)
    source = rows_from_texts(queries or world.queries, world.query_labels if queries is None else gold)
    asked = sample_span_queries(world.retriever, source, spec, n_queries, seed)
    return measure_agreement(world.retriever, asked, spec, at, measure, seed=seed), asked, spec


def word_of(text, start):
    return len(text[:start].split())


def cos(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.slow
def test_semantic_agreement_is_that_of_a_slow_loop(bert_world, plain):
    found, _, spec = measured(bert_world, "semantic")
    table = bert_world.retriever.retrieve(bert_world.queries, methods=PAPER_METHODS, top=K[-1], spans="words")
    results = [r for r in table.to_pylist() if r["side"] == "proponent"]
    predicted = [r["target"] for r in results if r["method"] == "if" and r["rank"] == 1]
    for q, text in enumerate(bert_world.queries):
        label = bert_world.retriever.label_names.index(predicted[q])
        whole, part = plain.e(text), plain.e(text, plain.own_word(text, label))
        for i, method in enumerate(spec.spec.methods):
            mine = [r for r in results if (r["query"], r["method"]) == (q, method)]
            assert [r["rank"] for r in mine] == [1, 2, 3, 4, 5]
            each = []
            for r in mine:
                row = bert_world.texts[r["row"]]
                by_span = method.endswith("+")
                each.append(
                    cos(plain.e(row, word_of(row, r["span_start"]) if by_span else None), part if by_span else whole)
                )
            wanted = [100 * np.mean(each[:k]) for k in K]
            assert found.values[q, i] == pytest.approx(wanted, abs=2e-2), (q, method)


@pytest.mark.slow
def test_label_agreement_counts_labels_of_the_target(bert_world):
    for target in ("predicted", "gold"):
        found, _, spec = measured(bert_world, "label", target=target)
        source = rows_from_texts(bert_world.queries, bert_world.query_labels)
        ask = {"methods": spec.spec.methods, "top": K[-1], "spans": "words", "target": target}
        results = [r for r in bert_world.retriever.retrieve(source, **ask).to_pylist() if r["side"] == "proponent"]
        for q in range(len(bert_world.queries)):
            for i, method in enumerate(spec.spec.methods):
                mine = [r["label"] == r["target"] for r in results if (r["query"], r["method"]) == (q, method)]
                assert found.values[q, i].tolist() == [100 * sum(mine[:k]) / k for k in K]
            y = bert_world.query_labels[q] if target == "gold" else int(found.targets[q])
            assert found.targets[q] == y
            share = 100 * bert_world.labels.count(y) / len(bert_world.labels)
            assert found.controls[RANDOM_ROWS][q] == pytest.approx([share, share])
            of_words = [
                y_n for text, y_n in zip(bert_world.texts, bert_world.labels, strict=True) for _ in text.split()
            ]
            assert found.controls[RANDOM_SPANS][q] == pytest.approx([100 * of_words.count(y) / len(of_words)] * 2)


def test_a_named_target_is_the_label_compared(bert_world):
    found, *_ = measured(bert_world, "label", target="LABEL_1", methods=("gd", "nn-cos"))
    assert set(found.targets) == {1}
    assert found.methods == ("gd", "nn-cos")


def test_a_training_row_asked_about_agrees_with_itself(bert_world):
    found, *_ = measured(bert_world, "semantic", (1,), bert_world.texts[:9], methods=("nn-cos",))
    assert found.values == pytest.approx(np.full((9, 1, 1), 100.0))


@pytest.mark.slow
def test_random_rows_and_spans_are_those_of_the_index(bert_world, plain):
    """At K = all rows nothing is left to chance; word salads are one clause each."""
    n = len(bert_world.texts)
    found, *_ = measured(bert_world, "semantic", (n,), bert_world.queries[:2], methods=("gd", "if+"), spans="clauses")
    for q, text in enumerate(bert_world.queries[:2]):
        rows = [cos(plain.e(row), plain.e(text)) for row in bert_world.texts]
        assert found.controls[RANDOM_ROWS][q] == pytest.approx(100 * np.mean(rows), abs=1e-2)
        spans = [cos(difference(plain, row), difference(plain, text)) for row in bert_world.texts]
        assert found.controls[RANDOM_SPANS][q] == pytest.approx(100 * np.mean(spans), abs=1e-2)
    few, *_ = measured(bert_world, "semantic", (1,), methods=("gd",))
    other, *_ = measured(bert_world, "semantic", (1,), methods=("gd",), seed=1)
    assert few.controls[RANDOM_ROWS].std() > 0
    assert (few.controls[RANDOM_ROWS] != other.controls[RANDOM_ROWS]).any()
    assert RANDOM_SPANS not in few.controls


@torch.no_grad()
def difference(plain, text):
    """emb of a text less that of as many mask tokens."""
    return plain.e(text) - plain.e(" ".join([plain.tokenizer.mask_token] * len(text.split())))


@pytest.mark.parametrize("measure", ["semantic", "label"])
def test_values_do_not_depend_on_blocks(bert_world, measure, monkeypatch):
    methods = ("gd", "if++")
    whole, *_ = measured(bert_world, measure, methods=methods)
    monkeypatch.setattr(agreement, "BLOCK_ROWS", 2)
    parts, *_ = measured(bert_world, measure, methods=methods)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-3)
    for name in whole.controls:
        np.testing.assert_allclose(parts.controls[name], whole.controls[name], atol=1e-3)
    assert [s.row for s in parts.shown] == [s.row for s in whole.shown] == [0, 1, 2]


def test_rows_without_a_span_are_left_out_and_counted(bert_world):
    texts = ["good film", "...", "bad plot", "?"]
    found, asked, spec = measured(bert_world, "semantic", queries=texts, spans="clauses")
    assert asked.rows.tolist() == found.rows.tolist() == [0, 2]
    assert asked.left_out.tolist() == [1, 3]
    assert asked.texts == (["good film", "bad plot"],)
    report, result = agreement_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert "2 sampled test rows hold no span" in report.tables[0].note
    assert result["query_rows_left_out"].tolist() == [1, 3]
    _, whole, _ = measured(bert_world, "semantic", queries=texts, spans="clauses", methods=("gd",))
    assert whole.rows.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="none of the 1 test rows has a span"):
        measured(bert_world, "label", queries=["..."], spans="clauses")


def test_queries_are_a_seeded_sample_with_their_labels(bert_world):
    _, asked, _ = measured(bert_world, "label", n_queries=3, target="gold", methods=("gd",))
    assert len(asked) == 3
    assert (np.diff(asked.rows) > 0).all()
    assert asked.labels.tolist() == [bert_world.query_labels[i] for i in asked.rows]
    assert asked.texts == ([bert_world.queries[i] for i in asked.rows],)
    _, other, _ = measured(bert_world, "label", n_queries=3, seed=1, methods=("gd",))
    assert asked.rows.tolist() != other.rows.tolist()


def test_one_query_has_no_interval(bert_world):
    found, asked, spec = measured(bert_world, "label", queries=["good film"], methods=("gd", "if++"))
    report, _ = agreement_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert all(row[2:] == [None, None, None] for row in report.tables[0].rows)
    assert all(row[3:] == [None, None, None, 1] for row in report.tables[1].rows)


def test_residuals_of_a_solver_that_iterates_are_said(bert_world):
    found, asked, spec = measured(bert_world, "label", methods=("gd", "if"), curvature="cg")
    assert set(found.residuals) == {"if"}
    report, result = agreement_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert 0 < result["largest_residuals"]["if"] <= 1e-3
    assert "relative residual" in report.tables[0].note


def test_a_cosine_with_a_zero_vector_is_zero():
    assert cosines(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([3.0, 4.0])).tolist() == [0.0, 1.0]


def test_what_has_no_meaning_is_refused(bert_world):
    with pytest.raises(InputError, match=r"at=\(61,\): .* has 60 live rows"):
        measured(bert_world, "label", (61,), methods=("gd",))
    with pytest.raises(InputError, match="saliency-if explains the saliency of a word"):
        measured(bert_world, "semantic", methods=("gd", "saliency-if"))
    for at in ([], [0], [1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(InputError, match="one to six numbers"):
            depths(at)
    assert depths([10, 1, 10]) == (1, 10)
    with pytest.raises(InputError, match="n_queries=-1"):
        measured(bert_world, "label", n_queries=-1)


def test_fewer_spans_than_k_are_refused(bert_world, monkeypatch):
    retriever = bert_world.retriever
    monkeypatch.setattr(agreement, "training_spans", lambda r, s, rows: span_queries.training_spans(r, s, rows[:3]))
    with pytest.raises(InputError, match=r"at=\(5,\): 3 spans were found"):
        agreement._random_states(retriever, question(bert_world, spans="clauses"), 5, 0, by_spans=True)


def test_a_model_without_last_states_is_refused(bert_world, monkeypatch):
    classifier = Retriever(bert_world.index).classifier()
    forward = type(classifier.model.base_model).forward
    monkeypatch.setattr(type(classifier.model.base_model), "forward", lambda *a, **k: forward(*a, **k).pooler_output)
    with pytest.raises(agreement.ModelError, match="no embedding"):
        agreement.start_states(classifier, [["good film"]])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["semantic-agreement", "label-agreement"])
def test_command_writes_a_report_and_refuses_to_replace_it(bert_world, tmp_path, capsys, command):
    test = tmp_path / "test.csv"
    test.write_text(
        "text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(bert_world.queries, bert_world.query_labels, strict=True))
    )
    out = tmp_path / "out"
    ask = ["evaluate", command, "--index", str(bert_world.index.folder), "--test", str(test), "--method", "if++,gd"]
    ask += ["--at", "2,5", "--queries", "4", "--spans", "words", "--out", str(out), "--quiet"]
    assert run(ask) == 0
    shown = capsys.readouterr().out
    assert f"{'Sag' if command.startswith('s') else 'Lag'}@5" in shown
    result = json.loads((out / "result.json").read_text())
    assert np.array(result["per_query"]["if++"]).shape == (4, 2)
    assert result["mean"]["gd"] == pytest.approx(np.mean(result["per_query"]["gd"], axis=0))
    assert result["question"]["spec"]["spans"] == "words"
    assert "forebear" in result["provenance"]["command"]
    assert run(ask) == 2
    assert "already holds" in capsys.readouterr().err
    assert run([*ask, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["at"] == [2, 5]
