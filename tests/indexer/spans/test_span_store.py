"""The store of spans: what it holds, searches in it, and how it goes through resume, append, retire and verify.

The oracles are plain transformers models on texts with the mask token written in, and the search without a store, which
test_spans.py holds against slow loops.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import labels, make_tiny_model, sentences, write_jsonl

from forebear import (
    BuildOptions,
    Index,
    InputError,
    QuerySpec,
    Retriever,
    append_rows,
    build_index,
    open_rows,
    retire_rows,
)
from forebear.cli.main import run
from forebear.errors import CorruptIndexError, DataError, MismatchError, NonFiniteError
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.retraining.row_choice import row_scores
from forebear.indexer.building import shards
from forebear.indexer.building.verify import verify_index
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.spans import store as span_store
from forebear.indexer.storage.arrow import read_batches, write_table
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.coverage import question_facts

N = 26
BY_SPANS = ["if+", "if++", "tracin+", "tracin++"]
SILENT = [5, 6, 7]  # rows without a span; with shards of 4 rows none is empty, with shards of 1 three are


def texts() -> list[str]:
    """Two clauses a row, most of them; one with a clause that the model does not read."""
    out = [f"{a}, {b}." for a, b in zip(sentences(N, 1, 2, 6), sentences(N, 2, 2, 6), strict=True)]
    for row in SILENT:
        out[row] = "?!"
    out[9] += " the film" * 20 + ", a good actor."
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", n_classes=3)


def build(model: Path, folder: Path, rows: slice = slice(0, N), **options) -> Index:
    options = {"stores": ("features", "spans"), "scopes": ("head", "all"), "dampings": ("0.1x",)} | options
    source = rows_from_texts(texts()[rows], labels(N, 3)[rows])
    chosen = choose_model(None, (str(model),), ()).checkpoints
    return build_index(source, folder, chosen, BuildOptions(shard_rows=4, batch_tokens=64, **options))


@pytest.fixture(scope="module")
def index(model, tmp_path_factory) -> Index:
    return build(model, tmp_path_factory.mktemp("index") / "i")


@pytest.fixture(scope="module")
def without(model, tmp_path_factory) -> Index:
    return build(model, tmp_path_factory.mktemp("index") / "i", stores=("features",))


def results(table, *, by_side: bool = True):
    keys = ("query", "method", "side", "rank") if by_side else ("query", "method")
    return [(tuple(r[k] for k in keys), r["row"], r["span_start"], r["span_end"]) for r in table.to_pylist()]


# ---------------------------------------------------------------- what is stored


def test_entries_are_the_clauses_of_each_row_and_truncated_ones_are_counted(index):
    store, found = index.spans(), {}
    for row, span in zip(store.rows.tolist(), store.spans(np.arange(len(store.rows))), strict=True):
        found.setdefault(row, []).append(texts()[row][span.start : span.end])
    assert sorted(set(range(N)) - set(found)) == SILENT
    for row, clauses in found.items():
        wanted = texts()[row].rstrip(".").replace(". ", ", ").split(", ")
        assert clauses == (wanted[:3] if row == 9 else wanted)
    assert store.n_cut == 1
    assert (np.diff(store.rows) >= 0).all()


def test_features_residuals_and_norms_are_those_of_plain_autograd(index, model):
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    weights = [p for n, p in plain.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    store, gold = index.spans(), labels(N, 3)
    caught = []
    plain.classifier.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    norms = index.gradients("all", spans=True).norms
    for entry in range(0, len(store.rows), 5):
        row, (span,) = int(store.rows[entry]), store.spans(np.array([entry]))
        text = texts()[row]
        masked = " ".join(["[MASK]"] * len(text[span.start : span.end].split()))
        versions = [text, f"{text[: span.start]} {masked} {text[span.end :]}"]
        gradients = []
        for version in versions:
            encoded = tokenizer(version, return_tensors="pt", truncation=True, max_length=40)
            logits = plain(**encoded).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([gold[row]]))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        residual = logits.softmax(-1)[0].detach().numpy() - np.eye(3)[gold[row]]
        np.testing.assert_allclose(store.features.take(np.array([entry]))[0], caught[-1][0].detach(), atol=1e-5)
        np.testing.assert_allclose(store.residuals.take(np.array([entry]))[0], residual, atol=1e-5)
        assert norms[entry] == pytest.approx(float((gradients[0] - gradients[1]).norm()), rel=1e-4)


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("curvature", ["exact", "identity"])
def test_at_the_head_stored_spans_give_the_full_answer_without_the_model(index, without, curvature, monkeypatch):
    ask = {"methods": ["if+", "if++"], "top": 12, "curvature": curvature}
    asked = sentences(5, 50)
    full = Retriever(without).retrieve(asked, exact="full", **ask)
    retriever = Retriever(index)
    monkeypatch.setattr("forebear.retriever.deep.search.dots_on_devices", None)  # no row goes through the model
    found = retriever.retrieve(asked, **ask)
    assert results(found) == results(full)
    np.testing.assert_allclose(found["score"], full["score"], rtol=2e-4, atol=1e-6)
    facts = json.loads(found.schema.metadata[b"forebear"])["methods"]["if++"]
    assert (facts["recall"], facts["stored_spans"], facts["spans"]) == (1.0, True, "clauses")
    assert set(found["spans_cut"].to_pylist()) == {1}


@pytest.mark.parametrize("scope", ["head", "all"])
def test_all_stored_spans_as_candidates_give_the_full_answer(index, without, scope):
    ask = {"methods": BY_SPANS, "top": 10, "scope": scope}
    asked = sentences(4, 51)
    full = Retriever(without).retrieve(asked, exact="full", **ask)
    found = Retriever(index).retrieve(asked, candidates=len(index.live_spans), **ask)
    assert results(found) == results(full)
    assert results(Retriever(index).retrieve(asked, exact="full", **ask)) == results(full)


def test_candidates_are_spans_and_are_scored_exactly(index):
    ask = {"methods": BY_SPANS, "top": 3, "scope": "all"}
    asked = sentences(3, 52)
    retriever = Retriever(index)
    full = {r[0][:2] + r[1:]: s for r, s in _scored(retriever.retrieve(asked, exact="full", **ask | {"top": 20}))}
    few = retriever.retrieve(asked, candidates=6, **ask)
    for key, score in _scored(few):
        entry = key[0][:2] + key[1:]
        if entry in full:
            assert score == pytest.approx(full[entry], rel=2e-3, abs=1e-6)
    assert sum(key[0][:2] + key[1:] in full for key, _ in _scored(few)) > 0.8 * few.num_rows


def _scored(table):
    return zip(results(table), table["score"].to_pylist(), strict=True)


def test_calibration_says_how_many_spans_are_proposed(index):
    retriever = Retriever(index)
    table = retriever.retrieve(["a good film, a dull plot"], methods=BY_SPANS, scope="all", top=2, recall=0.9)
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
    for method in BY_SPANS:
        known = index.calibrated("all", method)["candidates"]
        assert 0 < known["0.9"] <= 1
        assert facts[method]["candidates"] == max(2, round(known["0.9"] * len(index.live_spans)))
        if method.startswith("if"):
            assert facts[method]["recall"] == 0.9
        else:  # calibration asks no variants of the model
            assert facts[method]["recall"] is None
            assert "not its variants" in facts[method]["recall_note"]


def test_where_spans_of_test_rows_are_found_otherwise_no_recall_is_stated(index):
    spec = QuerySpec(methods=("if+", "if++"), scope="all", recall=0.9, query_spans="words", top=5)
    facts = question_facts(spec.resolve(index))["methods"]
    assert facts["if+"]["recall"] == 0.9  # it asks with the whole row
    assert facts["if++"]["recall"] is None
    assert 'query_spans="words": calibrated for clauses' in facts["if++"]["recall_note"]


def test_other_spans_than_the_stored_ones_are_searched_without_the_store(index, without):
    for spans in ("words", "sentences"):
        ask = {"methods": ["if+", "tracin++"], "top": 5, "spans": spans}
        asked = sentences(3, 53)
        found, wanted = (Retriever(i).retrieve(asked, **ask) for i in (index, without))
        assert results(found) == results(wanted)
        facts = json.loads(found.schema.metadata[b"forebear"])["methods"]["if+"]
        assert (facts["stored_spans"], facts["recall"]) == (False, 1.0)  # all rows are candidates
        spec = QuerySpec(methods=("if+",), scope="all", candidates=20, top=5, spans=spans)
        facts = question_facts(spec.resolve(index))["methods"]["if+"]
        assert facts["recall"] is None
        assert "rows are proposed as for if, not its spans" in facts["recall_note"]


def test_ties_go_to_the_earlier_span(model, tmp_path):
    source = rows_from_texts(["the film, the film", "a plot, the film", "the film, the film"], [0, 1, 0])
    chosen = choose_model(None, (str(model),), ()).checkpoints
    built = build_index(source, tmp_path / "i", chosen, BuildOptions(stores=("features", "spans"), dampings=("0.1x",)))
    found = results(Retriever(built).retrieve(["the film, a plot"], methods=["if+"], top=6))
    for side in ("proponent", "opponent"):
        twins = [r[1:] for r in found if r[0][2] == side and r[1] != 1]
        first, second = twins.index((0, 0, 8)), twins.index((2, 0, 8))
        assert second == first + 1


# ---------------------------------------------------------------- columns, functions, what is refused


def test_spans_of_training_rows_by_columns(model, tmp_path):
    rows = {"text": ["a good film, a dull plot", "a bright scene", "an actor"], "label": ["x", "y", "z"]}
    rows |= {"from": [[2, 15], [2], []], "to": [[6, 19], [8], []]}
    train = write_jsonl(tmp_path / "train.jsonl", **rows)
    args = ["index", "--checkpoints", str(model), "--train", str(train), "--out", str(tmp_path / "i"), "--quiet"]
    args += ["--store", "features,spans", "--spans", "columns:from,to", "--label-names", "LABEL_0,LABEL_1,LABEL_2"]
    rows["label"] = [0, 1, 2]
    write_jsonl(train, **rows)
    assert run(args) == 0
    built = Index.open(tmp_path / "i")
    store = built.spans()
    assert [(int(n), s.start, s.end) for n, s in zip(store.rows, store.spans(np.arange(3)), strict=True)] == [
        (0, 2, 6), (0, 15, 19), (1, 2, 8),
    ]  # fmt: skip
    found = Retriever(built).retrieve(["a good plot"], methods=["if++"], query_spans="words", top=3).to_pylist()
    assert {r["span"] for r in found} == {"good", "dull", "bright"}
    test = rows_from_texts(["a good plot"])
    with pytest.raises(InputError, match="no column 'from'"):
        Retriever(built).retrieve(test, methods=["if++"], top=1)
    assert run(["info", str(tmp_path / "i")]) == 0


def test_a_wrong_span_of_a_training_row_is_named(model, tmp_path, capsys):
    train = write_jsonl(tmp_path / "t.jsonl", text=["a film", "a plot"], label=[0, 1], a=[0, 3], b=[1, 99])
    args = ["index", "--checkpoints", str(model), "--train", str(train), "--out", str(tmp_path / "i"), "--quiet"]
    args += ["--store", "features,spans", "--spans", "columns:a,b", "--label-names", "LABEL_0,LABEL_1,LABEL_2"]
    assert run(args) == 2
    assert "training row 1: span 3 to 99 is not in its text of 6 characters" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_means_nothing_is_refused(model, index, without, tmp_path, capsys):
    with pytest.raises(InputError, match=r'stores=\("features", "spans"\), spans="columns:a,b"'):
        Retriever(without).retrieve(["a film"], methods=["if+"], spans="columns:a,b")
    with pytest.raises(InputError, match="spans='verses'"):
        build(model, tmp_path / "i", spans="verses")
    with pytest.raises(InputError, match="span column 1: "):
        build(model, tmp_path / "i", span_column=1)
    n = len(index.live_spans)
    with pytest.raises(InputError, match=rf"have {n} span\(s\), top= asks for {n + 1}"):
        Retriever(index).retrieve(["a film"], methods=["if+"], top=n + 1)
    train = write_jsonl(tmp_path / "t.jsonl", text=["a film", "a plot"], label=[0, 1])
    args = ["index", "--checkpoints", str(model), "--train", str(train), "--out", str(tmp_path / "i")]
    assert run([*args, "--store", "features,spans", "--span-column", "body", "--label-names", "a,b,c"]) == 2
    assert "--span-column body: the text columns are text" in " ".join(capsys.readouterr().err.split())


def test_rows_without_any_span(model, tmp_path):
    source = rows_from_texts(["?!", "...", "!"], [0, 1, 2])
    chosen = choose_model(None, (str(model),), ()).checkpoints
    options = BuildOptions(stores=("features", "spans"), scopes=("head", "all"), dampings=("0.1x",))
    built = build_index(source, tmp_path / "i", chosen, options)
    assert len(built.spans().rows) == 0
    with pytest.raises(InputError, match="have no span"):
        Retriever(built).retrieve(["a film"], methods=["if+"], top=1)
    queries = QueryRows(source="q", rows=np.arange(1), texts=(["a film"],), labels=None)
    for method in ("if+", "tracin+"):  # from the store, and by the model
        with pytest.raises(InputError, match="no training row has a span"):
            row_scores(Retriever(built), queries, Retriever(built).resolve(QuerySpec(methods=(method,))))
    assert not verify_index(built.folder).problems


def test_a_rows_best_span_is_the_same_from_the_store_as_from_the_model(index, without):
    asked = sentences(5, 61)
    queries = QueryRows(source="q", rows=np.arange(5), texts=(asked,), labels=None)
    found, wanted = (
        row_scores(retriever, queries, retriever.resolve(QuerySpec(methods=(*BY_SPANS, "gd"), damping="0.1x")))
        for retriever in (Retriever(index), Retriever(without))
    )
    for name in BY_SPANS:
        assert np.isneginf(found[name][:, SILENT]).all()
        seen = np.delete(np.arange(N), SILENT)
        scale = np.abs(wanted[name][:, seen]).max()
        np.testing.assert_allclose(found[name][:, seen], wanted[name][:, seen], atol=1e-4 * scale)
    best = Retriever(index).retrieve(asked, methods=["if++"], top=1, damping="0.1x").to_pylist()
    tops = [row["row"] for row in best if row["side"] == "proponent"]
    assert found["if++"].argmax(axis=1).tolist() == tops


def test_equal_spans_rank_by_row(model, tmp_path):
    """Many equal rows among others, shuffled: of equal scores the lower row comes first, stored or by the model."""
    rng = np.random.default_rng(3)
    mixed = ["a good film, it is slow."] * 120 + [
        f"{t}, {u}." for t, u in zip(sentences(30, 5), sentences(30, 6), strict=True)
    ]
    gold = [0] * 120 + labels(30, 3)
    order = rng.permutation(len(mixed))
    source = rows_from_texts([mixed[i] for i in order], [gold[i] for i in order])
    chosen = choose_model(None, (str(model),), ()).checkpoints
    options = BuildOptions(stores=("features", "spans"), scopes=("head",), dampings=("0.1x",), batch_tokens=64)
    retriever = Retriever(build_index(source, tmp_path / "i", chosen, options))
    for method, top in (("if++", 80), ("if+", 80), ("tracin++", 60)):
        table = retriever.retrieve(sentences(2, 9), methods=[method], top=top, damping="0.1x", exact="full").to_pylist()
        groups: dict[tuple, list[int]] = {}
        for r in table:
            groups.setdefault((r["query"], r["side"], r["text"], r["span_start"], r["label"]), []).append(r["row"])
        assert max(map(len, groups.values())) > 20
        for (_, _, text, _, label), rows in groups.items():
            equal = [n for n, i in enumerate(order) if mixed[i] == text and f"LABEL_{gold[i]}" == label]
            assert rows == equal[: len(rows)]


def test_a_function_that_changed_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def first(row): return [(0, 3)]\n")
    how = f"{tmp_path / 'mine.py'}:first"
    built = build(model, tmp_path / "i", rows=slice(0, 4), spans=how, scopes=("head",))
    Retriever(built).retrieve(["a film"], methods=["if++"], top=1)
    (tmp_path / "mine.py").write_text("def first(row): return [(0, 2)]\n")
    with pytest.raises(MismatchError, match=r'mine\.py:first" has changed since'):
        Retriever(built).retrieve(["a film"], methods=["if++"], top=1)
    with pytest.raises(MismatchError, match=r'mine\.py:first" has changed since'):
        append_rows(tmp_path / "i", rows_from_texts(texts()[4:6], [0, 1]))
    Retriever(built).retrieve(["a film"], methods=["if++"], top=1, query_spans="words")
    (tmp_path / "mine.py").unlink()
    Retriever(built).retrieve(["a film"], methods=["gc", "if+"], top=1)  # no span of a test row is looked for


# ---------------------------------------------------------------- changes


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [0, 3, 6])
def test_an_interrupted_build_resumes_to_the_same_bytes(model, index, tmp_path, monkeypatch, shard):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > shard:
            raise KeyboardInterrupt
        return span_store.write_spans(*args, **kwargs)

    monkeypatch.setattr(shards, "write_spans", fail)
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "i")
    monkeypatch.undo()
    source = rows_from_texts(texts(), labels(N, 3))
    options = BuildOptions(
        stores=("features", "spans"), scopes=("head", "all"), dampings=("0.1x",), shard_rows=4, batch_tokens=64
    )
    chosen = choose_model(None, (str(model),), ()).checkpoints
    build_index(source, tmp_path / "i", chosen, options, resume=True)
    found, wanted = files(tmp_path / "i"), files(index.folder)
    assert {n: v for n, v in found.items() if "manifest" not in n} == {
        n: v for n, v in wanted.items() if "manifest" not in n
    }


def test_append_and_retire_give_the_answers_of_a_build_from_scratch(model, tmp_path):
    whole = build(model, tmp_path / "whole", scopes=("head",))
    build(model, tmp_path / "part", rows=slice(0, 15), scopes=("head",))
    more = rows_from_texts(texts()[15:], labels(N, 3)[15:])
    grown = append_rows(tmp_path / "part", more)
    asked, ask = sentences(3, 54), {"methods": BY_SPANS, "top": 6}
    assert len(grown.spans().rows) == len(whole.spans().rows)
    found, wanted = (Retriever(i).retrieve(asked, **ask) for i in (grown, whole))
    assert results(found) == results(wanted)
    gone = sorted({r[1] for r in results(wanted)})[:3]
    smaller = retire_rows(tmp_path / "whole", gone)
    assert not {r[1] for r in results(Retriever(smaller).retrieve(asked, **ask))} & set(gone)


def test_verify_recomputes_spans(index, tmp_path):
    assert verify_index(index.folder, n_rows=N).max_error < 1e-4
    copy = Path(shutil.copytree(index.folder, tmp_path / "i"))
    name = f"spans/{index.manifest.checkpoints[-1].name}/00000.arrow"
    batch = read_batches(copy / name)[0]
    write_table(copy / name, [batch.take(np.arange(len(batch))[::-1])], batch.schema)
    with pytest.raises(CorruptIndexError, match="altered"):
        Retriever(Index.open(copy)).retrieve(["a film"], methods=["if+"], top=1)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert name in manifest["files"]
    assert f"{name} was altered: its sha256 is not the manifest's" in verify_index(copy).problems


def test_nan_with_a_span_masked_names_the_rows(model, tmp_path, monkeypatch):
    real = span_store.sketch_rows

    def spoiled(*args, **kwargs):
        raise NonFiniteError("m: the gradient of row 3 is NaN or infinite. Check the model.")

    assert real is not None
    monkeypatch.setattr(span_store, "sketch_rows", spoiled)
    with pytest.raises(NonFiniteError, match="with a span masked, a gradient of a row between 0 and 3 is NaN"):
        build(model, tmp_path / "i")


def test_null_or_missing_columns_of_training_rows(model, tmp_path):
    source = open_rows(
        write_jsonl(tmp_path / "t.jsonl", text=["a film", "a plot"], label=[0, 1], a=[0, 3], b=[None, 4])
    )
    chosen = choose_model(None, (str(model),), ()).checkpoints
    for spans in ("columns:a,c", "columns:a,b"):
        options = BuildOptions(stores=("features", "spans"), dampings=("0.1x",), spans=spans)
        with pytest.raises((InputError, DataError)):
            build_index(source, tmp_path / spans.replace(":", "-"), chosen, options)
