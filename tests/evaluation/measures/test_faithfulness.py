"""Span scores and their rank correlation with the final model's, against autograd, a dense Hessian and scipy."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from inputs import inputs_of
from scipy.stats import spearmanr

from forebear import InputError, QuerySpec
from forebear.cli.main import run
from forebear.evaluation.common.span_queries import gradients_compared, sample_span_queries, training_spans
from forebear.evaluation.measures import faithfulness
from forebear.evaluation.measures.faithfulness import (
    CONTROL,
    METHODS,
    RANDOM,
    faithfulness_report,
    measure_faithfulness,
    variances,
)
from forebear.indexer.rows.opening import rows_from_texts
from forebear.retriever.question import models
from forebear.retriever.spans.scores import SpanScores

DAMPING = "0.003"
ROWS = np.arange(0, 60, 6)
RATE = 0.05  # of the variants in some tests: far enough from the model to tell them apart


def question(world, **choices):
    spec = {"methods": METHODS, "spans": "words", "damping": DAMPING} | choices
    return world.retriever.resolve(QuerySpec(**spec))


def sampled(world, spec, queries=None):
    source = rows_from_texts(queries or world.queries, None if queries else world.query_labels)
    return sample_span_queries(world.retriever, source, spec, 0, 0)


def measured(world, queries=None, n_rows=8, n_repeats=2, **choices):
    spec = question(world, **choices)
    asked = sampled(world, spec, queries)
    return measure_faithfulness(world.retriever, asked, spec, n_rows=n_rows, n_repeats=n_repeats), asked, spec


class Plain:
    """The checkpoints in float64, the last one's variants, and gradients of the head by autograd, row by row."""

    def __init__(self, world):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.world = world
        self.checkpoints = [load(path, dtype=torch.float64).eval() for path in world.models]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(world.models[-1])

    def loss(self, model, text, label, word=None):
        inputs = self.tokenizer(text, return_tensors="pt")
        if word is not None:
            inputs["input_ids"][0, 1 + word] = self.tokenizer.mask_token_id
        return torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([label]))

    def variant(self, number):
        rows = np.random.default_rng([0, 7, number]).permutation(60)[:32]
        model = copy.deepcopy(self.checkpoints[-1])
        (sum(self.loss(model, self.world.texts[n], self.world.labels[n]) for n in rows) / 32).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
        return model.requires_grad_(True)

    def difference(self, model, text, label, word):
        weight = model.classifier.weight
        (g,) = torch.autograd.grad(self.loss(model, text, label), weight)
        (without,) = torch.autograd.grad(self.loss(model, text, label, word), weight)
        return (g - without).flatten().numpy()

    def differences(self, model, targets):
        """Of the most important word of each query, and of every word of the rows."""
        asked = []
        for text, y in zip(self.world.queries, targets, strict=True):
            words = range(len(text.split()))
            best = max(words, key=lambda w: self.loss(self.checkpoints[-1], text, y, w).item())
            asked.append(self.difference(model, text, y, best))
        rows = [(self.world.texts[n], self.world.labels[n]) for n in ROWS]
        spans = [self.difference(model, text, y, w) for text, y in rows for w in range(len(text.split()))]
        return np.array(asked), np.array(spans)

    def inverse(self):
        """(H + damping)^-1 of the head's weight over all training rows."""
        size = self.checkpoints[-1].classifier.weight.numel()
        total = np.zeros((size, size))
        for text in self.world.texts:
            features = []
            hook = self.checkpoints[-1].classifier.register_forward_pre_hook(lambda _m, a: features.append(a[0]))  # noqa: B023
            with torch.no_grad():
                p = self.checkpoints[-1](**self.tokenizer(text, return_tensors="pt")).logits[0].softmax(0).numpy()
            hook.remove()
            f = features[0][0].numpy()
            total += np.kron(np.diag(p) - np.outer(p, p), np.outer(f, f)) / len(self.world.texts)
        return np.linalg.inv(total + float(DAMPING) * np.eye(size))


@pytest.fixture(scope="module")
def plain(bert_world):
    return Plain(bert_world)


@pytest.fixture(scope="module")
def scores(bert_world):
    """SpanScores of some rows at the head, and the targets."""
    spec = question(bert_world)
    _, asked = gradients_compared(bert_world.retriever, sampled(bert_world, spec), spec)
    entries = training_spans(bert_world.retriever, spec, ROWS)
    return SpanScores(bert_world.index, bert_world.retriever.classifier(), "head", asked, entries), asked.targets


def close(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.slow
def test_sums_over_checkpoints_are_those_of_autograd(bert_world, plain, scores):
    spans, targets = scores
    wanted = [a @ n.T for a, n in (plain.differences(model, targets) for model in plain.checkpoints)]
    close(spans.summed([bert_world.retriever.classifier()]), wanted[-1])
    close(spans.summed(bert_world.retriever.classifier(i) for i in range(2)), wanted[0] + wanted[1])


def test_sums_over_variants_are_those_of_models_stepped_by_hand(bert_world, plain, scores, monkeypatch):
    monkeypatch.setattr(models, "VARIANT_LEARNING_RATE", RATE)
    spans, targets = scores
    made = [models.one_step_away(bert_world.retriever.classifier(), bert_world.index, m) for m in (3, 4)]
    pairs = [plain.differences(plain.variant(m), targets) for m in (3, 4)]
    close(found := spans.summed(made), sum(a @ n.T for a, n in pairs))
    unmoved = 2 * spans.summed([bert_world.retriever.classifier()])
    assert np.abs(found - unmoved).max() > 0.01 * np.abs(unmoved).max()


def test_preconditioned_scores_are_those_of_a_dense_hessian(bert_world, plain, scores):
    spans, targets = scores
    found, residual = spans.preconditioned(question(bert_world).curvature)
    asked, rows = plain.differences(plain.checkpoints[-1], targets)
    close(found, asked @ plain.inverse() @ rows.T)
    assert residual is None


def test_chunks_of_queries_change_nothing(bert_world, scores, monkeypatch):
    from forebear.retriever.spans import scores as span_scores

    spans, _ = scores
    last, solver = bert_world.retriever.classifier(), question(bert_world).curvature
    whole = spans.summed([last]), spans.preconditioned(solver)[0]
    monkeypatch.setattr(span_scores, "VECTOR_BYTES", 1)
    close(spans.summed([last]), whole[0])
    close(spans.preconditioned(solver)[0], whole[1])


def test_correlations_are_scipys(bert_world, monkeypatch):
    monkeypatch.setattr(models, "VARIANT_LEARNING_RATE", RATE)
    found, asked, spec = measured(bert_world)
    assert found.names == (*METHODS, CONTROL, RANDOM)
    assert found.values.shape == (2, 7, 4)
    assert found.n_control == 2
    rows = [np.sort(np.random.default_rng([run, 5]).permutation(60)[:8]) for run in range(2)]
    retriever = bert_world.retriever
    last = retriever.classifier()
    for run_number, mine in enumerate(rows):
        entries = training_spans(retriever, spec, mine)
        assert found.n_spans[run_number] == sum(len(bert_world.texts[n].split()) for n in mine)
        spans = SpanScores(bert_world.index, last, "head", gradients_compared(retriever, asked, spec)[1], entries)
        truth = spans.summed([last])
        variants = [models.one_step_away(last, bert_world.index, 3 * run_number + m) for m in range(3)]
        control = spans.summed(retriever.classifier(i) for i in range(2))
        compared = [spans.summed(variants), spans.preconditioned(spec.curvature)[0], control]
        for i, values in enumerate(compared):
            wanted = [spearmanr(a, b).statistic for a, b in zip(values, truth, strict=True)]
            assert found.values[run_number, :, i] == pytest.approx(wanted, abs=1e-6)
    assert (found.values[0] != found.values[1]).any(axis=0).all()


def test_what_is_the_yardstick_itself_correlates_fully(bert_world, monkeypatch):
    monkeypatch.setattr(models, "VARIANT_LEARNING_RATE", 0.0)
    monkeypatch.setattr(faithfulness, "CONTROL_CHECKPOINTS", 1)
    found, asked, spec = measured(bert_world, curvature="identity", damping=None)
    assert found.names == (*METHODS, RANDOM)  # a control of one checkpoint would be the yardstick
    assert found.values[:, :, :2] == pytest.approx(np.ones((2, 7, 2)), abs=1e-3)
    assert np.abs(found.values[:, :, 2]).max() < 0.9
    report, _ = faithfulness_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert "one checkpoint" in report.tables[0].note


@pytest.mark.slow
def test_random_scores_correlate_with_nothing(bert_world):
    found, *_ = measured(bert_world, n_rows=0)
    n = found.n_spans[0]
    assert abs(found.values[:, :, -1].mean()) < 4 / np.sqrt(14 * (n - 1))


def test_variances_done_by_hand():
    values = np.array([[1.0, 3.0], [2.0, 6.0]])  # means 2 and 4, variances 2 and 8
    assert variances(values) == [5.0, 2.0]
    assert variances(values[:1]) == [2.0, None]
    assert variances(values[:, :1]) == [None, 0.5]
    assert variances(np.array([[1.0, np.nan, 3.0], [np.nan] * 3])) == [2.0, None]


def test_constant_scores_have_no_order_and_are_left_out(bert_world, monkeypatch):
    def constant(self, _models):
        return np.zeros((len(self._queries.targets), len(self._entries.rows)))

    monkeypatch.setattr(SpanScores, "summed", constant)
    found, asked, spec = measured(bert_world)
    assert np.isnan(found.values).all()
    report, result = faithfulness_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert all(row[1:] == [None] * 6 for row in report.tables[0].rows)
    assert "undefined" in report.summary
    assert "14 lists" in report.tables[0].note
    json.dumps(result["per_run_and_query"], allow_nan=False)


def test_the_chart_shows_the_means_of_the_table(bert_world):
    found, asked, spec = measured(bert_world)
    values = found.values.copy()
    values[:, 0, 1], values[:, :, 2] = np.nan, np.nan  # if++ has no order for one query, the control for none
    changed = replace(found, values=values)
    report, _ = faithfulness_report(changed, inputs_of(bert_world.retriever, asked, spec))
    (figure,) = report.figures
    means = {name: mean for name, mean, *_ in report.tables[0].rows}
    assert means[found.names[2]] is None
    assert means[METHODS[1]] == pytest.approx(100 * values[:, 1:, 1].mean())
    for name, mean in means.items():
        assert (mean is None) != (name in figure.svg)
        assert mean is None or f"{mean:.1f}".replace("-", "−") in figure.svg


def test_too_little_to_compare_is_refused(bert_world):
    with pytest.raises(InputError, match=r"1 span\(s\) in the sampled"):
        measured(bert_world, n_rows=1, spans="clauses")
    with pytest.raises(InputError, match="n_repeats=0"):
        measured(bert_world, n_repeats=0)
    with pytest.raises(InputError, match="n_rows=-1"):
        measured(bert_world, n_rows=-1)


def test_one_query_and_one_run_have_no_spread(bert_world):
    found, asked, spec = measured(bert_world, queries=["good film plot"], n_repeats=1)
    report, result = faithfulness_report(found, inputs_of(bert_world.retriever, asked, spec))
    assert all(row[2:] == [None] * 5 for row in report.tables[0].rows)
    assert result["mean"]["if++"] == pytest.approx(100 * found.values[0, 0, 1])


def test_command_writes_a_report(bert_world, tmp_path, capsys):
    test, out = tmp_path / "test.csv", tmp_path / "out"
    test.write_text("text\n" + "".join(f"{text}\n" for text in bert_world.queries))
    ask = ["evaluate", "faithfulness", "--index", str(bert_world.index.folder), "--test", str(test), "--queries", "3"]
    ask += ["--rows", "6", "--repeats", "2", "--spans", "words", "--out", str(out), "--quiet"]
    assert run(ask) == 0
    assert "tracin++" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    values = np.array(result["per_run_and_query"])
    assert values.shape == (2, 3, 4)
    assert [result["mean"][name] for name in result["names"]] == pytest.approx(values.mean(axis=(0, 1)).tolist())
    assert run(ask) == 2
