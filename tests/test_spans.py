"""Spans: how they are found and masked, gradients of differences, and IF+, IF++, TracIn+, TracIn++ and TracInF.

The oracles run plain transformers models in float64, one unpadded row at a time, and share no code with the package: a
span is masked by writing the mask token into the text, and the variants of the model are made here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import HEADS
from tiny import KINDS, WORDS, labels, make_tiny_model, sentences, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from forebear import BuildOptions, DataError, InputError, ModelError, QuerySpec, Retriever, build_index, retire_rows
from forebear.cli.main import run
from forebear.indexer import gradients as module
from forebear.indexer.data import rows_from_texts
from forebear.indexer.gradient_pass import labels_seed, run_pass
from forebear.indexer.gradients import exact_dots, whole_gradients
from forebear.indexer.model import Classifier, Encoded, load_classifier, make_classifier
from forebear.indexer.projector import PlainProjector, draw_bases
from forebear.indexer.runs import choose_model
from forebear.indexer.scopes import scope_blocks
from forebear.indexer.sketch import Reduction, Sketcher, sketch_rows
from forebear.indexer.spans import Span, find_spans, mask_spans, span_finder, split_text
from forebear.indexer.tape import Tape
from forebear.retriever.gradients import GradientSearch
from forebear.retriever.spans import query_spans, span_rows

CPU = torch.device("cpu")
LIMIT = 40  # word pieces
DAMPING = "0.05"
BY_SPANS = ["if+", "if++", "tracin+", "tracin++"]
ALL = [*BY_SPANS, "tracin-f"]
COLUMNS = [f"{prefix}_{part}" for prefix in ("span", "query_span") for part in ("column", "start", "end")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spans")


def load(path: Path | str, *, double: bool = True) -> Classifier:
    """The package's classifier, in float64."""
    if not double:
        return load_classifier(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    return make_classifier(model, transformers.AutoTokenizer.from_pretrained(path), name=str(path), device=CPU)


def masked(row: tuple[str, ...], span: tuple[int, int, int], mask: str) -> tuple[str, ...]:
    """The row with the mask token for each word that shares a character with a span (column, start, end)."""
    column, start, end = span

    def write(word: re.Match[str]) -> str:
        return f" {mask} " if word.start() < end and start < word.end() else word[0]

    return (*row[:column], re.sub(r"\w+|[^\w\s]+", write, row[column]), *row[column + 1 :])


# ---------------------------------------------------------------- the pass with another version of each row


@dataclass(frozen=True, eq=False)
class Versions:
    """Rows and the same with some words masked; gradients of both by autograd, by name of the parameter."""

    path: Path
    encoded: Encoded
    gold: np.ndarray
    truth: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]

    def differences(self, names) -> list[torch.Tensor]:
        """g - g' of each row, flat."""
        return [torch.cat([(g[name] - other[name]).flatten() for name in names]) for g, other in self.truth]

    def largest(self, names) -> np.ndarray:
        """The largest number in the gradient of either version of each row."""
        return np.array([max(float(g[name].abs().max()) for g in both for name in names) for both in self.truth])


@pytest.fixture(scope="module", params=KINDS)
def versions(request, folder) -> Versions:
    path = make_tiny_model(folder / request.param, request.param, n_classes=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    tokenizer, gold, rng = transformers.AutoTokenizer.from_pretrained(path), np.array(labels(9, 3)), _rng(1)
    rows, minus, truth = [], [], []
    for text, label in zip(sentences(9, seed=11), gold, strict=True):
        row = dict(tokenizer(text))
        ids = np.array(row["input_ids"])
        at = 1 + rng.permutation(len(ids) - 2)[: 1 + len(ids) // 4]
        ids[at] = tokenizer.mask_token_id
        rows.append(row)
        minus.append(row | {"input_ids": ids.tolist()})
        both = []
        for version in (rows[-1], minus[-1]):
            logits = model(**{key: torch.tensor([value]) for key, value in version.items()}).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            both.append({name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)})
        truth.append(tuple(both))
    return Versions(path, Encoded(rows, minus), gold, truth)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def blocks_of(classifier: Classifier, *, with_bias: bool = False):
    """All of them, and the names of the parameters that they hold."""
    blocks = scope_blocks(classifier.model, classifier.head_name, "all", with_bias=with_bias)
    both = {b.name: b.bias or b.kind == "norm" for b in blocks}
    return blocks, [f"{name}.{p}" for name, has_bias in both.items() for p in ("weight", "bias")[: 1 + has_bias]]


def flat(blocks, vectors: dict[str, torch.Tensor], names) -> torch.Tensor:
    """Whole gradients ``(q, p)``, laid out as the parameters."""
    parts: dict[str, torch.Tensor] = {}
    for block in blocks:
        parts |= block.split(vectors[block.name])
    return torch.cat([parts[name].flatten(1) for name in names], dim=1).double()


@pytest.mark.parametrize("double", [True, False], ids=["fp64", "fp32"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_whole_gradients_and_dots_of_two_versions_are_differences_of_autograd_gradients(
    versions, with_bias, double, monkeypatch
):
    classifier, limit = load(versions.path, double=double), 1e-10 if double else 1e-5
    blocks, names = blocks_of(classifier, with_bias=with_bias)
    truth, largest = torch.stack(versions.differences(names)), versions.largest(names)
    asked = [[*sentences(8, seed=5)]]
    for batch_tokens in (1, 60, 4096):
        monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
        found = flat(blocks, whole_gradients(classifier, "all", blocks, versions.encoded, versions.gold), names)
        assert ((found - truth).abs().amax(dim=1).numpy() <= limit * largest).all()
        for n_queries in (1, 8):  # few queries a row and many take different ways
            texts, targets = [asked[0][:n_queries]], np.array(labels(8, 3))[:n_queries]
            vectors = whole_gradients(classifier, "all", blocks, texts, targets)
            dots = exact_dots(classifier, "all", vectors, blocks, versions.encoded, versions.gold)
            v = flat(blocks, vectors, names)
            sizes = v.norm(dim=1).numpy()[:, None] * largest * len(v[0]) ** 0.5
            assert (np.abs(dots - (v @ truth.T).numpy()) <= limit * sizes).all()


@pytest.mark.parametrize("fail", [False, True], ids=["", "out-of-memory"])
def test_sketches_norms_and_logits_of_two_versions_and_halved_batches(versions, fail, monkeypatch):
    """The sides of the tiny layers are kept whole, so a raw sketch is g - g' itself."""
    tried: list[int] = []
    record = Tape.record

    def recorded(self, rows, seed, on_layer):
        tried.append(len(rows))
        found = record(self, rows, seed, on_layer)
        if fail and len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Tape, "record", recorded)
    for double, limit in ((True, 1e-10), (False, 1e-5)):
        classifier = load(versions.path, double=double)
        blocks, names = blocks_of(classifier)
        truth, largest = torch.stack(versions.differences(names)), versions.largest(names)
        projector = PlainProjector("all", blocks, draw_bases(classifier, blocks, None, 1, "random"))
        basis = np.linalg.qr(_rng(0).normal(size=(projector.width, 6)))[0].T.astype(np.float16)
        sketcher = Sketcher(projector, Reduction(basis, projector.squares, 16, 0))
        tried.clear()
        (found,), forward = sketch_rows(
            classifier, [sketcher], versions.encoded, versions.gold, batch_tokens=4096
        )  # one batch, if it fits
        assert tried[0] == 18
        assert (tried[-1] <= 4) == fail
        norms = truth.norm(dim=1).numpy()
        assert (np.abs(found.norms - norms) <= limit * largest * len(truth[0]) ** 0.5).all()
        wanted = (truth / truth.norm(dim=1, keepdim=True)).numpy() @ basis.astype(np.float64).T
        room = 1e-5 * largest / np.abs(truth.numpy()).max(axis=1)
        assert (np.abs(found.coordinates - wanted).max(axis=1) <= room).all()
        whole = flat(blocks, whole_gradients(classifier, "all", blocks, versions.encoded, versions.gold), names)
        assert ((whole - truth).abs().amax(dim=1).numpy() <= limit * largest).all()
        plain = run_pass(classifier, Encoded([*versions.encoded.rows, *versions.encoded.minus]),
                         labels_seed(None), [], batch_tokens=1)  # fmt: skip
        np.testing.assert_allclose(forward.logits, plain.logits, rtol=0, atol=1e-5 * np.abs(plain.logits).max())


# ---------------------------------------------------------------- rankings against a slow loop


def write(parts: list[str], column: int = 0) -> tuple[str, list[tuple[int, int, int]]]:
    """A text of some clauses, and where they are."""
    starts = np.cumsum([0, *(len(part) + 2 for part in parts)])
    spans = [(column, int(a), int(a) + len(part)) for a, part in zip(starts, parts, strict=False)]
    return ", ".join(parts) + "." if parts else "...", spans


def clauses(n: int, seed: int) -> list[list[str]]:
    """One to three clauses a row, and a row beyond the limit: its third clause is cut, its fourth not read."""
    parts = iter(sentences(3 * n, seed=seed, low=1, high=5))
    rows = [[next(parts) for _ in range(1 + i % 3)] for i in range(n - 1)]
    return [*rows, [" ".join(WORDS[:30]), "good film plot", "dull slow sad music is good", "very bad"]]


class Oracle:
    """A plain model and its three variants, one SGD step away, and what they say of rows with a span and without."""

    def __init__(self, path: str, kind: str, texts, gold, live) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
        self.models, self.head = [base], HEADS[kind]
        self.texts, self.gold, self.live = texts, gold, live
        self.names = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
        self.kept: dict[Any, Any] = {}
        for m in range(3):
            rows = np.random.default_rng([0, 7, m]).permutation(live)[:32]
            model = copy.deepcopy(base)
            loss = sum(self.loss(self.logits(model, texts[n]), gold[n]) for n in rows) / len(rows)
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                for p, g in zip(model.parameters(), found, strict=True):
                    if g is not None:
                        p -= 1e-4 * g
            self.models.append(model)

    def encode(self, row):
        return dict(self.tokenizer(*row, return_tensors="pt", truncation=True, max_length=LIMIT))

    def logits(self, model, row) -> torch.Tensor:
        return model(**self.encode(row)).logits

    def loss(self, logits, label) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, torch.tensor([int(label)]))

    def without(self, row, span):
        return masked(row, span, self.tokenizer.mask_token)

    def reads(self, row, span) -> bool:
        return not torch.equal(self.encode(row)["input_ids"], self.encode(self.without(row, span))["input_ids"])

    def gradient(self, m: int, row, label, span=None) -> torch.Tensor:
        """Over all linear layers; of a span, what it adds."""
        if span is not None:
            return self.gradient(m, row, label) - self.gradient(m, self.without(row, span), label)
        key = (m, row, int(label))
        if key not in self.kept:
            model = self.models[m]
            weights = [model.get_submodule(name).weight for name in self.names]
            found = torch.autograd.grad(self.loss(self.logits(model, row), label), weights)
            self.kept[key] = torch.cat([g.flatten() for g in found])
        return self.kept[key]

    def predicted(self, row) -> int:
        return int(self.logits(self.models[0], row).argmax())

    def own_span(self, row, target, spans):
        """The one whose masking raises the target's loss most."""
        with torch.no_grad():
            losses = [
                float(self.loss(self.logits(self.models[0], self.without(row, s)), target))
                if self.reads(row, s)
                else -1
                for s in spans
            ]
        return spans[int(np.argmax(losses))]

    def layers(self, scope: str) -> list[str]:
        if scope == "head":
            return [self.head]
        top = [n for n in self.names if ".layer.1." in n or "pooler" in n or n.startswith("classifier")]
        return self.names if scope == "all" else top

    def part(self, scope: str, vectors: torch.Tensor) -> np.ndarray:
        """The columns of a scope."""
        sizes = [self.models[0].get_submodule(name).weight.numel() for name in self.names]
        names = self.layers(scope)
        pieces = zip(self.names, vectors.split(sizes, dim=1), strict=True)
        return torch.cat([piece for name, piece in pieces if name in names], dim=1).numpy()

    def head_hessian(self) -> np.ndarray:
        total, model, caught = 0.0, self.models[0], []
        hook = model.get_submodule(self.head).register_forward_pre_hook(lambda _m, args: caught.append(args[0][0]))
        with torch.no_grad():
            for n in self.live:
                p = self.logits(model, self.texts[n])[0].softmax(dim=0)
                total = total + torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(caught[-1], caught[-1]))
        hook.remove()
        return (total / len(self.live)).numpy()

    def gauss_newton(self, scope: str) -> np.ndarray:
        """E over y ~ p of outer products of row gradients, mean over the live rows."""
        rows, weights = [], []
        for n in self.live:
            p = self.logits(self.models[0], self.texts[n])[0].detach().softmax(dim=0)
            rows += [self.gradient(0, self.texts[n], c) for c in range(len(p))]
            weights += [float(x) / len(self.live) for x in p]
        g = self.part(scope, torch.stack(rows))
        return (g.T * weights) @ g


@dataclass(frozen=True, eq=False)
class World:
    """An index, retrievers of it in both precisions, and its oracle."""

    models: list[str]
    texts: list[tuple[str, ...]]
    spans: list[list[tuple[int, int, int]]]
    gold: list[int]
    queries: list[tuple[str, ...]]
    query_spans: list[list[tuple[int, int, int]]]
    oracle: Oracle
    retriever: Retriever
    double: Retriever
    column: int

    @property
    def live(self) -> np.ndarray:
        return self.retriever.index.live

    def entries(self) -> list[tuple[int, tuple[int, int, int]]]:
        """Spans that the model reads, by row and place."""
        return [(int(n), s) for n in self.live for s in self.spans[n] if self.oracle.reads(self.texts[n], s)]

    def truth(self, method: str, scope: str, targets, solve=lambda q: q) -> tuple[list[Any], np.ndarray]:
        """What is scored, and scores ``(q, m)``, by the formulas."""
        oracle = self.oracle
        entries = [(int(n), None) for n in self.live] if method == "tracin-f" else self.entries()
        own = [None] * len(targets)
        if method.endswith("++"):
            asked = zip(self.queries, targets, self.query_spans, strict=True)
            own = [oracle.own_span(row, target, spans) for row, target, spans in asked]
        total = 0.0
        for m in (0,) if method.startswith("if") else (1, 2, 3):
            asked = zip(self.queries, targets, own, strict=True)
            q = torch.stack([oracle.gradient(m, row, y, s) for row, y, s in asked])
            g = torch.stack([oracle.gradient(m, self.texts[n], self.gold[n], s) for n, s in entries])
            total = total + solve(oracle.part(scope, q)) @ oracle.part(scope, g).T
        return entries, total


def make_world(folder: Path, kind: str, n_classes: int, n_models: int, scopes, column: int, n: int = 36) -> World:
    paths = [str(make_tiny_model(folder / f"{kind}-{m}", kind, n_classes, m)) for m in range(n_models)]
    rows, asked = clauses(n, 1), clauses(5, 2)
    rows[4] = []  # punctuation alone
    texts, spans = zip(*(write(parts, column) for parts in rows), strict=True)
    queries, own = zip(*(write(parts, column) for parts in asked), strict=True)
    beside = [iter(sentences(n, seed=7, high=6)) for _ in range(column)]
    texts, queries = ([(*map(next, beside), text) for text in some] for some in (texts, queries[1:]))
    gold = labels(n, n_classes)
    options = BuildOptions(
        scopes=scopes, sketch_dim=32, sketch_bits=64, white_bits=64, dampings=(DAMPING,), calibration_queries=0,
        shard_rows=13,
    )  # fmt: skip
    chosen = choose_model(None, paths, [0.5, 0.25][:n_models]).checkpoints
    plain = [text[0] for text in texts] if column == 0 else texts
    build_index(rows_from_texts(plain, gold), folder / f"{kind}-index", chosen, options)
    index = retire_rows(folder / f"{kind}-index", [2, 9])
    double = replace(load(paths[-1]), sha256=index.manifest.checkpoints[-1].sha256)
    oracle = Oracle(paths[-1], kind, texts, gold, index.live)
    return World(
        paths, texts, list(spans), gold, queries, list(own[1:]), oracle, Retriever(index),
        Retriever(index, model=double), column,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(folder) -> World:
    """Single texts; the variants are those of the last of two checkpoints."""
    (folder / "single").mkdir()
    return make_world(folder / "single", "bert", 3, 2, ("head", "all", "top-1"), 0)


@pytest.fixture(scope="module")
def pairs(folder) -> World:
    """Spans are in the second text."""
    (folder / "pairs").mkdir()
    return make_world(folder / "pairs", "roberta", 2, 1, ("head",), 1)


def asked_of(world: World) -> list[Any]:
    return [row[0] if len(row) == 1 else row for row in world.queries]


def span_of(result: dict[str, Any], prefix: str = "span") -> tuple[int, int, int] | None:
    found = tuple(result[f"{prefix}_{part}"] for part in ("column", "start", "end"))
    return None if found == (None,) * 3 else found


def assert_ends(table: pa.Table, method: str, entries, scores: np.ndarray, top: int, tolerance: float) -> None:
    """Both ends are the best and the worst in order, each once; near ties may change places."""
    rows = [r for r in table.to_pylist() if r["method"] == method]
    assert len(rows) == 2 * top * len(scores)
    number = {entry: i for i, entry in enumerate(entries)}
    for q, values in enumerate(scores):
        for side, sign in (("proponent", 1), ("opponent", -1)):
            mine = [r for r in rows if (r["query"], r["side"]) == (q, side)]
            at = [number[r["row"], span_of(r)] for r in mine]
            assert len(set(at)) == top
            found, room = np.array([r["score"] for r in mine]), tolerance * np.abs(values).max()
            assert np.abs(found - values[at]).max() <= room, (method, q)
            assert np.abs(found - sign * np.sort(-sign * values)[:top] * -1).max() <= room, (method, q)


def solver_of(world: World, scope: str, solver: str):
    if solver == "identity":
        return lambda q: q
    if solver in ("exact", "cg"):
        h = world.oracle.head_hessian() if solver == "exact" else world.oracle.gauss_newton(scope)
        return lambda q: np.linalg.solve(h + float(DAMPING) * np.eye(len(h)), q.T).T
    stored = world.retriever.index.ekfac(scope).parts

    def solve(q: np.ndarray) -> np.ndarray:
        out, start = [], 0
        for name in world.oracle.layers(scope):
            left, right, values = (getattr(stored[name], k).double().numpy() for k in ("left", "right", "eigenvalues"))
            g = q[:, start : start + values.size].reshape(-1, *values.shape)
            start += values.size
            out.append((left @ ((left.T @ g @ right) / (values + float(DAMPING))) @ right.T).reshape(len(q), -1))
        return np.hstack(out)

    return solve


@pytest.mark.parametrize(
    ("scope", "solver"),
    [("head", "exact"), ("head", "identity"), ("all", "ekfac"), ("all", "identity"), ("top-1", "ekfac"),
     ("top-1", "cg")],
)  # fmt: skip
def test_both_ends_equal_a_slow_loop(world, scope, solver):
    methods = BY_SPANS[:2] if solver in ("ekfac", "cg") else ALL
    n, targets = len(world.live), [world.oracle.predicted(row) for row in world.queries]
    choices = {"curvature": solver, "damping": DAMPING, "curvature_rows": 0, "tolerance": 1e-7}
    ask = {"methods": methods, "exact": "full", "scope": scope, "top": n} | choices
    exactly, single = (r.retrieve(asked_of(world), **ask) for r in (world.double, world.retriever))
    solve = solver_of(world, scope, solver)
    for method in methods:
        entries, scores = world.truth(method, scope, targets, solve if method.startswith("if") else lambda q: q)
        limit = 1e-5 if solver in ("exact", "cg") and method.startswith("if") else 1e-8
        assert_ends(exactly, method, entries, scores, n, limit)
        assert_ends(single, method, entries, scores, n, 2e-4)
    if "tracin-f" in methods:
        _, scores = world.truth("tracin-f", scope, targets)
        found = world.double.scores(asked_of(world), "tracin-f", scope=scope)
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-8 * np.abs(scores).max())


@pytest.mark.parametrize("target", ["LABEL_0", "LABEL_1"])
def test_pairs_with_spans_in_their_second_text(pairs, target):
    ask = {"methods": ALL, "exact": "full", "top": 20, "target": target, "span_column": 1, "damping": DAMPING}
    table = pairs.double.retrieve(asked_of(pairs), **ask)
    targets, solve = [int(target[-1])] * len(pairs.queries), solver_of(pairs, "head", "exact")
    for method in ALL:
        mine = solve if method.startswith("if") else lambda q: q
        assert_ends(table, method, *pairs.truth(method, "head", targets, mine), 20, 1e-5)
    own = [pairs.oracle.own_span(*asked) for asked in zip(pairs.queries, targets, pairs.query_spans, strict=True)]
    for r in table.to_pylist():
        assert span_of(r, "query_span") == (own[r["query"]] if r["method"].endswith("++") else None)
        assert r["span"] == (r["hypothesis"][r["span_start"] : r["span_end"]] if r["method"] in BY_SPANS else None)


@pytest.mark.parametrize("target", ["LABEL_0", "LABEL_1", "LABEL_2"])
def test_the_query_span_is_the_one_whose_masking_raises_the_targets_loss_most(world, target):
    table = world.retriever.retrieve(asked_of(world), methods=["tracin++"], top=1, target=target)
    for r in table.to_pylist():
        q = r["query"]
        own = world.oracle.own_span(world.queries[q], int(target[-1]), world.query_spans[q])
        assert span_of(r, "query_span") == own


@pytest.mark.parametrize("scope", ["head", "all"])
def test_candidates_of_every_row_give_the_full_answer_and_few_rows_are_proposed_as_for_whole_rows(world, scope):
    ask = {"methods": ALL, "scope": scope, "top": 6, "damping": DAMPING}
    full = world.retriever.retrieve(asked_of(world), exact="full", **ask).to_pylist()
    every = world.retriever.retrieve(asked_of(world), candidates=len(world.live), **ask).to_pylist()
    assert [(r["row"], r["span"], r["score"]) for r in every] == [(r["row"], r["span"], r["score"]) for r in full]
    assert all(r["exact"] for r in every)
    if scope != "head":
        return
    few = world.retriever.retrieve(asked_of(world), candidates=7, **ask)
    targets, solve = [world.oracle.predicted(row) for row in world.queries], solver_of(world, "head", "exact")
    for method in ALL:
        mine = solve if method.startswith("if") else lambda q: q
        entries, scores = world.truth(method, "head", targets, mine)
        for q, row in enumerate(world.queries):
            own = world.oracle.own_span(row, targets[q], world.query_spans[q]) if method.endswith("++") else None
            v = mine(world.oracle.part("head", world.oracle.gradient(0, row, targets[q], own)[None]))
            rows = torch.stack([world.oracle.gradient(0, world.texts[n], world.gold[n]) for n in world.live])
            order = world.live[np.argsort(v[0] @ world.oracle.part("head", rows).T)]
            at = [i for i, (n, _) in enumerate(entries) if n in {*order[:7], *order[-7:]}]
            of_query = few.filter(pa.array([x == q for x in few["query"].to_pylist()]))
            of_query = of_query.set_column(0, "query", pa.array([0] * len(of_query)))
            assert_ends(of_query, method, [entries[i] for i in at], scores[[q]][:, at], 6, 1e-4)


def test_answers_do_not_depend_on_the_block_of_queries(world):
    for scope in ("head", "top-1"):
        spec = QuerySpec(methods=tuple(ALL), top=5, scope=scope)
        source = rows_from_texts(asked_of(world))
        whole, blocks = (
            pa.concat_tables([world.retriever.table(a) for a in world.retriever.answers(source, spec, block_rows=n)])
            for n in (99, 1)
        )
        for name in ("query", "method", "side", "rank", "row", "span", *COLUMNS):
            assert whole[name].to_pylist() == blocks[name].to_pylist()
        np.testing.assert_allclose(whole["score"], blocks["score"], rtol=1e-3)


@pytest.mark.parametrize("exact", ["rerank", "full"])
def test_ties_go_to_the_lower_row_and_the_earlier_place(world, exact, monkeypatch):
    score = GradientSearch.score

    def nothing(self, *args):
        scores, residuals = score(self, *args)
        return {name: np.zeros_like(values) for name, values in scores.items()}, residuals

    monkeypatch.setattr(GradientSearch, "score", nothing)
    found = world.retriever.retrieve(asked_of(world)[:2], methods=["if+", "tracin++", "tracin-f"], top=9, exact=exact)
    found = [(r["row"], span_of(r)) for r in found.to_pylist()]
    entries, rows = world.entries()[:9], [(int(n), None) for n in world.live[:9]]
    assert found == 2 * (4 * entries + 2 * rows)


def test_a_spans_influence_on_itself_is_positive(world):
    rows = [int(n) for n in world.live if world.spans[n]]
    source = rows_from_texts([world.texts[n][0] for n in rows], [world.gold[n] for n in rows])
    assert len(world.entries()) <= 2 * len(world.live)  # all are at one end or the other
    for scope in ("head", "all"):
        ask = {"methods": ["if++", "tracin++"], "target": "gold", "exact": "full", "scope": scope}
        table = world.double.retrieve(source, top=len(world.live), **ask)
        own = {
            (r["query"], r["method"]): r["score"]
            for r in table.to_pylist()
            if r["row"] == rows[r["query"]] and span_of(r) == span_of(r, "query_span")
        }
        assert len(own) == 2 * len(rows)
        assert min(own.values()) > 0


def test_the_model_in_memory_and_on_disk_stays_as_it_is(world):
    def digests() -> list[str]:
        files = sorted(p for path in world.models for p in Path(path).rglob("*") if p.is_file())
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]

    before, retriever = digests(), Retriever(world.retriever.index)
    model = retriever.classifier().model
    weights = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    for scope in ("head", "all"):
        retriever.retrieve(asked_of(world), methods=ALL, scope=scope, top=3)
    assert digests() == before
    assert all(torch.equal(p, weights[name][1]) for name, p in model.named_parameters())
    assert all(p.requires_grad == weights[name][0] and p.grad is None for name, p in model.named_parameters())
    assert not model.training


# ---------------------------------------------------------------- results, and what is refused


def test_columns_metadata_and_files(world, pairs, tmp_path, capsys):
    methods = ["gc", "if+", "if++", "tracin++", "tracin-f"]
    table = world.retriever.retrieve(asked_of(world), methods=methods, top=3)
    assert table.num_rows == len(world.queries) * len(methods) * 6
    for r in table.to_pylist():
        by_spans, both = r["method"] in BY_SPANS, r["method"].endswith("++")
        assert r["span"] == (r["text"][r["span_start"] : r["span_end"]] if by_spans else None)
        assert (span_of(r) in world.spans[r["row"]]) if by_spans else (span_of(r) is None)
        assert (span_of(r, "query_span") in world.query_spans[r["query"]]) if both else span_of(r, "query_span") is None
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
    assert facts["if++"]["curvature"] == "exact"
    assert facts["if++"]["damping"] == pytest.approx(float(DAMPING))
    assert [facts[name].get("spans") for name in methods] == [None, "clauses", "clauses", "clauses", None]
    assert facts["tracin++"]["span_column"] == 0
    for name, wanted in (("variants", 3), ("variant_rows", 32), ("variant_learning_rate", 1e-4)):
        assert [facts[m].get(name) for m in methods] == [None, None, None, wanted, wanted]

    test = write_jsonl(tmp_path / "test.jsonl", text=asked_of(world))
    args = ["retrieve", "--index", str(world.retriever.index.folder), "--method", ",".join(methods), "--top", "3"]
    for name in ("a.parquet", "a.jsonl"):
        assert run([*args, "--test", str(test), "--out", str(tmp_path / name), "--quiet"]) == 0
    found = pq.read_table(tmp_path / "a.parquet")
    assert json.loads(found.schema.metadata[b"forebear"])["methods"] == facts
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for rows in (found.to_pylist(), lines):
        assert [r | {"score": None} for r in rows] == [r | {"score": None} for r in table.to_pylist()]
    assert json.loads((tmp_path / "a.jsonl.meta.json").read_text())["methods"] == facts

    first, second = pairs.queries[0]
    args = ["retrieve", "--index", str(pairs.retriever.index.folder), "--text", first, "--pair", second, "--top", "2"]
    args += ["--method", "tracin++", "--span-column"]
    assert run([*args, "hypothesis", "--out", str(tmp_path / "p.jsonl")]) == 0
    for line in (tmp_path / "p.jsonl").read_text().splitlines():
        r = json.loads(line)
        assert (r["span_column"], r["query_span_column"]) == (1, 1)
        assert r["span"] == r["hypothesis"][r["span_start"] : r["span_end"]]
    assert run([*args, "hypothesis"]) == 0
    own = second[r["query_span_start"] : r["query_span_end"]]
    assert f"the query's span: {own}" in " ".join(capsys.readouterr().out.split())
    assert run([*args, "text"]) == 2
    assert "has no text column 'text'; it has premise, hypothesis" in capsys.readouterr().err


UNREAD = " ".join(["?!"] * LIMIT) + " good film"  # one clause, which truncation cuts off


@pytest.mark.parametrize("text", ["... !", "", UNREAD])
def test_a_query_without_a_span_is_named(world, text, tmp_path, capsys):
    texts = ["a good film", "dull plot, slow", "the", text]
    for block_rows in (3, 99):
        spec = QuerySpec(methods=("if++",), top=1)
        with pytest.raises(InputError, match=r"^test row 3 has no span that the model reads\. .*leave the row out\.$"):
            list(world.retriever.answers(rows_from_texts(texts), spec, block_rows=block_rows))
    assert world.retriever.retrieve(texts, methods=["if+", "tracin+"], top=1).num_rows == 16  # its span plays no part
    test = write_jsonl(tmp_path / "test.jsonl", text=texts)
    args = ["retrieve", "--index", str(world.retriever.index.folder), "--test", str(test), "--method", "tracin++"]
    assert run([*args, "--top", "1", "--out", str(tmp_path / "a.jsonl"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "test row 3 has no span" in err
    assert not (tmp_path / "a.jsonl").exists()


def test_what_means_nothing_is_refused(world, tmp_path, capsys):
    ask, python = world.retriever.retrieve, tmp_path / "mine.py"
    python.write_text("def rare(row): return [(0, 1)] if len(row['text']) > 150 else []\ndef none(row): return []\n")
    for method in ALL:
        with pytest.raises(InputError, match=f"--exact none is not of {re.escape(method)}"):
            ask(["a film"], methods=["gc", method], exact="none")
        with pytest.raises(InputError, match=f"--certify is not of {re.escape(method)}"):
            ask(["a film"], methods=[method], certify=True, scope="all")
    for method in BY_SPANS:
        with pytest.raises(InputError, match="scores spans, not rows"):
            world.retriever.scores(["a film"], method)
    with pytest.raises(InputError, match=r"^if\+: the candidate rows have 1 span\(s\), --top asks for 2\. .*$"):
        ask(["a film"], methods=["if+"], top=2, spans=f"{python}:rare")
    with pytest.raises(InputError, match="the candidate rows have no span"):
        ask(["a film"], methods=["tracin+"], top=1, spans=f"{python}:none")
    for choices in ({"spans": "chunks"}, {"spans": f"{python}:common"}):
        with pytest.raises(InputError, match="--spans"):
            ask(["a film"], methods=["gc"], **choices)
    args = ["retrieve", "--index", str(world.retriever.index.folder), "--text", "a film", "--method", "if+"]
    assert run([*args, "--top", "3", "--spans", f"{python}:rare"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--top asks for 3" in err


def test_top_counts_spans(world):
    n = len(world.entries())
    assert n > len(world.live)
    table = world.retriever.retrieve(["a film"], methods=["if+"], top=n, exact="full")
    assert table.num_rows == 2 * n
    with pytest.raises(InputError, match=f"have {n} span"):
        world.retriever.retrieve(["a film"], methods=["if+"], top=n + 1, exact="full")


def test_a_text_column_that_is_not_there_is_refused(world):
    with pytest.raises(InputError, match="span"):
        world.retriever.retrieve(["a film"], methods=["if+"], top=1, span_column=1)


def test_training_rows_are_named_by_their_number_in_the_index(world):
    def find(texts, _row, number):
        return [] if texts[0] != world.texts[12][0] else span_finder("columns:a,b")(texts, {"a": 5, "b": 3}, number)

    with pytest.raises(DataError, match="row 12"):
        span_rows(world.retriever.index, world.retriever.classifier(), np.array([3, 12]), find)


# ---------------------------------------------------------------- finding spans


def found_in(text: str, how: str) -> list[str]:
    return [text[a:b] for a, b in split_text(text, how)]


@pytest.mark.parametrize(
    ("how", "text", "wanted"),
    [
        ("clauses", "The plot is 3.5 stars, the cast $4.50 good.", ["The plot is 3.5 stars", "the cast $4.50 good"]),
        ("clauses", 'He said "good." Then (quietly) left...', ['He said "good', "Then", "quietly", "left"]),
        ("clauses", "I liked it but not much", ["I liked it", "but not much"]),
        ("clauses", "good. But butter, although old", ["good", "But butter", "although old"]),
        ("clauses", "But it works", ["But it works"]),
        ("clauses", "good ... bad... ok", ["good", "bad", "ok"]),
        ("clauses", "dull - very dull – sad—slow", ["dull", "very dull", "sad", "slow"]),
        ("clauses", "see www.x.org/a.html at 10:30 today", ["see www.x.org/a.html at 10:30 today"]),
        ("clauses", "line one\nline two [so]", ["line one", "line two", "so"]),
        ("clauses", "  100% of it; well-made!  ", ["100% of it", "well-made"]),
        ("sentences", "It is 3.5, good! Is it? Yes.", ["It is 3.5, good", "Is it", "Yes"]),
        ("sentences", '"Fine." (Good.) I liked it but not much', ["Fine", "Good", "I liked it but not much"]),
        ("words", "Don't stop: well-made, 'x' -- naïve 漢字", ["Don't", "stop", "well-made", "x", "naïve", "漢字"]),
        *((how, text, []) for how in ("clauses", "sentences", "words") for text in ("", " \n\t", "?!, ... () – '-'")),
    ],
)
def test_texts_are_split(how, text, wanted):
    assert found_in(text, how) == wanted


def test_what_holds_no_letter_and_no_digit_is_no_word():
    assert found_in("good __ film", "words") == ["good", "film"]


@pytest.mark.parametrize("how", ["clauses", "sentences", "words"])
def test_pieces_are_in_order_apart_and_hold_every_letter(how):
    rng = _rng(3)
    pieces = [*"abé漢1  .,;:!?'\"()[]-–—\n\t…’%$", " but ", " because ", "... ", ". "]
    for _ in range(1500):
        text = "".join(rng.choice(pieces, size=rng.integers(0, 25)))
        spans = split_text(text, how)
        edges = [x for span in spans for x in span]
        assert edges == sorted(edges)
        assert all(0 <= a < b <= len(text) for a, b in spans)
        assert all(any(c.isalnum() for c in text[a:b]) and text[a:b] == text[a:b].strip() for a, b in spans)
        inside = {i for a, b in spans for i in range(a, b)}
        assert {i for i, c in enumerate(text) if c.isalnum()} <= inside


def test_the_aspects_clause(world):
    text = "The food was great, but the service slow. Foods"
    for aspect, wanted in (("FOOD", "The food was great"), ("great, but", text[:40]), ("price", None), ("", None)):
        found = span_finder("aspect")([text, aspect], {}, 0)
        assert [text[s.start : s.end] for s in found] == ([] if wanted is None else [wanted])
        assert all(s.column == 0 for s in found)
    with pytest.raises(InputError, match="aspect is of pairs"):
        span_finder("aspect")([text], {}, 0)
    with pytest.raises(InputError, match="aspect is of pairs"):
        world.retriever.retrieve(["a film"], methods=["if+"], top=1, spans="aspect")


def test_the_aspects_clause_after_letters_that_grow_when_case_is_folded():
    text = "ßßßßßßßß food, bad plot"
    (span,) = span_finder("aspect")([text, "food"], {}, 0)
    assert text[span.start : span.end] == "ßßßßßßßß food"


TEXT = "good film, bad plot, ok"


def test_given_columns_hold_numbers_or_lists():
    table = pa.table({"text": [TEXT, TEXT], "from": [[0, 11], []], "to": [[4, 14], []]})
    found = find_spans(span_finder("columns:from, to"), [[TEXT, TEXT]], table)
    assert found == [[Span(0, 0, 4), Span(0, 11, 14)], []]
    for start, end, clause in ((11, 14, (11, 19)), (5, 12, (0, 19)), (9, 10, (9, 10)), (np.int64(0), 23, (0, 23))):
        row = {"from": start, "to": end}
        assert span_finder("columns:from,to", 1)(["", TEXT], row, 0) == [Span(1, start, end)]
        assert span_finder("clause-of:from,to")([TEXT], row, 0) == [Span(0, *clause)]
    assert span_finder("clause-of:a,b")([TEXT], {"a": [0, 5], "b": [4, 9]}, 0) == [Span(0, 0, 9)]  # once


@pytest.mark.parametrize("how", ["columns:from,to", "clause-of:from,to"])
def test_spans_that_do_not_lie_in_their_text_are_refused_by_row(how):
    for start, end in ((0, 24), (-1, 3), (3, 3), (5, 2), (None, 3), (0.0, 3.0), ("0", "3"), (False, True), (24, 25)):
        with pytest.raises(DataError, match=r"^row 7: span .* expected 0 <= start < end <= 23\.$"):
            span_finder(how)([TEXT], {"from": start, "to": end}, 7)
    with pytest.raises(DataError, match="row 7: 2 starts in 'from', 1 ends in 'to'"):
        span_finder(how)([TEXT], {"from": [0, 5], "to": [4]}, 7)
    with pytest.raises(InputError, match="no column 'to'; they have text, from"):
        span_finder(how)([TEXT], {"text": TEXT, "from": 0}, 7)
    table = pa.table({"from": [0, 0], "to": [1, 99]})
    with pytest.raises(DataError, match="row 101: span 0 to 99"):
        find_spans(span_finder(how), [[TEXT, TEXT]], table, first_row=100)


def test_functions_of_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("NAME = 1\ndef first(row): return [(0, row['n'])]\ndef far(row): return [(0, 999)]\n")
    assert span_finder(f"{path}:first", 1)(["", TEXT], {"n": 4}, 0) == [Span(1, 0, 4)]
    with pytest.raises(DataError, match="row 7: span 0 to 999"):
        span_finder(f"{path}:far")([TEXT], {}, 7)
    for function in ("none", "NAME"):
        with pytest.raises(InputError, match=f"defines no function {function}"):
            span_finder(f"{path}:{function}")
    with pytest.raises(InputError, match=r"there is no file .*other\.py"):
        span_finder(f"{tmp_path}/other.py:first")
    for how in ("", "chunks", "columns", "columns:from", "columns:a,b,c", str(path), f"{path}:", f"{path}:a b", "py:f"):
        with pytest.raises(InputError, match=r"expected clauses, sentences, words, aspect, columns:FROM,TO"):
            span_finder(how)


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_share_a_character_are_masked_and_spans_cut_off_are_left_out(folder, kind):
    classifier = load(make_tiny_model(folder / f"mask-{kind}", kind), double=False)
    tokenizer, rng = classifier.tokenizer, _rng(5)
    texts = [*sentences(6, seed=3), " ".join(WORDS * 2), "Good , film.. 5%  ", "xyzzy   film"]
    for row_of in (lambda i: (texts[i],), lambda i: (texts[i], texts[-1 - i])):
        rows, spans = [], []
        for _ in range(60):
            rows.append(row_of(rng.integers(len(texts))))
            column = int(rng.integers(len(rows[-1])))
            start = int(rng.integers(len(rows[-1][column])))
            spans.append(Span(column, start, int(rng.integers(start, len(rows[-1][column]))) + 1))
        found, kept = mask_spans(classifier, list(zip(*rows, strict=True)), spans)
        plain, without = (
            [tokenizer(*row, truncation=True, max_length=LIMIT)["input_ids"] for row in some]
            for some in (
                rows,
                [masked(r, (s.column, s.start, s.end), tokenizer.mask_token) for r, s in zip(rows, spans, strict=True)],
            )
        )
        assert kept.tolist() == [a != b for a, b in zip(plain, without, strict=True)]
        assert 0 < kept.sum() < len(kept)
        assert [row["input_ids"] for row in found.rows] == [
            ids for ids, is_read in zip(plain, kept, strict=True) if is_read
        ]
        assert [row["input_ids"] for row in found.minus] == [
            ids for ids, is_read in zip(without, kept, strict=True) if is_read
        ]
        for row, other in zip(found.rows, found.minus, strict=True):
            assert {k: v for k, v in row.items() if k != "input_ids"} == {
                k: v for k, v in other.items() if k != "input_ids"
            }


def byte_level(trim: bool, **special: str) -> transformers.PreTrainedTokenizerFast:
    """RoBERTa's kind of pieces: with a space before them, some parts of a character."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "f"), ("i", "l"), ("Ġf", "il"), ("Ġ", "g"), ("Ã", "¯")]
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"} | special
    pieces = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("trim", [False, True])
def test_byte_level_pieces_are_masked_by_the_characters_whose_bytes_they_hold(folder, trim):
    """A byte-level piece has one character a byte, so where it stands follows from the lengths before it."""
    tokenizer = byte_level(trim, mask_token="<mask>")
    classifier = replace(load(make_tiny_model(folder / "bytes", "roberta"), double=False), tokenizer=tokenizer)
    text = "the film, naïve 漢字 good  the"
    of_byte = [i for i, c in enumerate(text) for _ in c.encode()]
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            if text[start].isspace() or text[end - 1].isspace():
                continue  # whose space it is differs between tokenizers
            found, kept = mask_spans(classifier, [[text]], [Span(0, start, end)])
            ids, at, wanted = found.rows[0]["input_ids"], 0, []
            for piece in tokenizer.convert_ids_to_tokens(ids)[1:-1]:
                wanted.append(any(start <= i < end for i in of_byte[at : at + len(piece)]))
                at += len(piece)
            assert at == len(of_byte)
            assert kept.all()
            is_mask = np.array(found.minus[0]["input_ids"]) == tokenizer.mask_token_id
            assert is_mask.tolist() == [False, *wanted, False]
            assert (np.array(found.minus[0]["input_ids"]) == np.array(ids))[~is_mask].all()


def test_without_a_mask_token_no_span_is_masked(folder):
    classifier = load(make_tiny_model(folder / "bytes", "roberta"), double=False)
    for spans in ([Span(0, 0, 3)], []):
        with pytest.raises(ModelError, match="its tokenizer has no mask token"):
            mask_spans(replace(classifier, tokenizer=byte_level(False)), [["the film"] * len(spans)], spans)


def test_query_spans_from_given_columns(world):
    """The query's span may be given; of several the one that matters most, of one without a choice that one."""
    classifier, text = world.double.classifier(), world.queries[1][0]
    spans = [(0, 0, len(text) // 2), (0, len(text) // 2, len(text))]
    table = pa.table({"a": [[s[1] for s in spans], [0]], "b": [[s[2] for s in spans], [1]]})
    logits = np.stack([world.oracle.logits(world.oracle.models[0], (text,)).detach().numpy()[0]] * 2)
    find, ask = span_finder("columns:a,b"), (classifier, [[text, text]], table, np.array([1, 1]), logits)
    found, encoded = query_spans(*ask, find)
    assert found == [Span(*world.oracle.own_span((text,), 1, spans)), Span(0, 0, 1)]
    assert len(encoded) == 2
    with pytest.raises(InputError, match="test row 10 has no span"):
        query_spans(*ask[:2], pa.table({"a": [[], [0]], "b": [[], [1]]}), *ask[3:], find, first_row=10)
