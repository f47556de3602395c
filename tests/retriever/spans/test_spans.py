"""Spans: found, masked, gradients of differences, and rankings by IF+, IF++, TracIn+, TracIn++ and TracInF.

The oracles run plain transformers models in float64, one unpadded row at a time, and share no code with the package: a
span is masked by writing the mask token into the text, and the variants of the model are made here.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import HEADS
from tiny import KINDS, WORDS, labels, make_tiny_model, sentences, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from forebear import BuildOptions, DataError, InputError, ModelError, QuerySpec, Retriever, build_index, retire_rows
from forebear.cli.main import run
from forebear.indexer.gradients.tape import Tape
from forebear.indexer.gradients.whole import exact_dots, whole_gradients
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Encoded
from forebear.indexer.model.loading import load_classifier, make_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches.projector import PlainProjector, draw_bases
from forebear.indexer.sketches.reduction import Reduction
from forebear.indexer.sketches.sketch import Sketcher, sketch_rows
from forebear.indexer.spans.finders import find_spans, span_finder
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.text import Span, split_text
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.deep.search import GradientSearch
from forebear.retriever.spans.rows import span_rows

DAMPING = "0.05"
BY_SPANS = ["if+", "if++", "tracin+", "tracin++"]
ALL = [*BY_SPANS, "tracin-f"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("spans")


def load_plain(path):
    """Model and tokenizer of the oracles."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def load(path, *, double: bool = False) -> Classifier:
    cpu = torch.device("cpu")
    return make_classifier(*load_plain(path), name=str(path), device=cpu) if double else load_classifier(path)


def masked(row: tuple[str, ...], span: tuple[int, int, int], mask: str) -> tuple[str, ...]:
    """The row with the mask token for each word that shares a character with a span (column, start, end)."""
    column, start, end = span

    def write(word: re.Match[str]) -> str:
        return f" {mask} " if word.start() < end and start < word.end() else word[0]

    return (*row[:column], re.sub(r"\w+|[^\w\s]+", write, row[column]), *row[column + 1 :])


# ---------------------------------------------------------------- the pass with another version of each row


class Versions:
    """Entries: rows, some of them several times, each with other words masked.

    And by parameter g - g' of each, and the largest number in g and g'.
    """

    def __init__(self, path: Path) -> None:
        (model, tokenizer), rng = load_plain(path), np.random.default_rng(1)
        owners = np.array([7, 2, 7, 0, 1, 7, 3, 1, 5])
        self.path, self.gold, rows, minus, logits = path, np.array(labels(8, 3))[owners], [], [], []
        self.differences, self.sizes = [], []
        texts = sentences(8, seed=11)
        for text, label in zip([texts[i] for i in owners], self.gold, strict=True):
            rows.append(dict(tokenizer(text)))
            ids = np.array(rows[-1]["input_ids"])
            ids[1 + rng.permutation(len(ids) - 2)[: 1 + len(ids) // 4]] = tokenizer.mask_token_id
            minus.append(rows[-1] | {"input_ids": ids.tolist()})
            both = []
            for version in (rows[-1], minus[-1]):
                logits.append(model(**{key: torch.tensor([value]) for key, value in version.items()}).logits)
                loss = nn.functional.cross_entropy(logits[-1], torch.tensor([label]))
                both.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
            named = [(name, g, h) for (name, _), g, h in zip(model.named_parameters(), *both, strict=True)]
            self.differences.append({name: (g - h).flatten() for name, g, h in named if g is not None})
            self.sizes.append({name: float(max(g.abs().max(), h.abs().max())) for name, g, h in named if g is not None})
        self.encoded, self.logits = Encoded(rows, minus, owners), torch.cat(logits[::2] + logits[1::2]).detach().numpy()

    def truth(self, names) -> tuple[torch.Tensor, np.ndarray]:
        """g - g' ``(n, p)``, and the largest number in g and g' ``(n,)``."""
        found = torch.stack([torch.cat([row[name] for name in names]) for row in self.differences])
        return found, np.array([max(row[name] for name in names) for row in self.sizes])


@pytest.fixture(scope="module", params=KINDS)
def versions(request, folder) -> Versions:
    return Versions(make_tiny_model(folder / request.param, request.param, n_classes=3))


def everything_of(classifier: Classifier, with_bias: bool = False):
    """The scope of all blocks, and the names of the parameters that they hold."""
    scope = scope_of(classifier, "all", with_bias=with_bias)
    return scope, [
        f"{b.name}.{p}" for b in scope.blocks for p in ("weight", "bias")[: 1 + (b.bias or b.kind == "norm")]
    ]


def flat(scope, vectors: dict[str, torch.Tensor], names) -> torch.Tensor:
    """Whole gradients ``(q, p)``, laid out as the parameters."""
    parts = {name: part for block in scope.blocks for name, part in block.split(vectors[block.name]).items()}
    return torch.cat([parts[name].flatten(1) for name in names], dim=1).double()


@pytest.mark.slow
@pytest.mark.parametrize(("double", "limit"), [(True, 1e-10), (False, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_and_dots_of_two_versions_are_those_of_autograd(versions, with_bias, double, limit, monkeypatch):
    classifier, encoded, gold = load(versions.path, double=double), versions.encoded, versions.gold
    scope, names = everything_of(classifier, with_bias)
    truth, largest = versions.truth(names)
    for batch_tokens in (1, 4096):
        monkeypatch.setattr(type(classifier), "batch_tokens", lambda _self, most=batch_tokens: most)
        found = flat(scope, whole_gradients(classifier, scope, encoded, gold), names)
        assert ((found - truth).abs().amax(dim=1).numpy() <= limit * largest).all()
        for n in (1, 8):  # few queries a row and many take different ways
            vectors = whole_gradients(classifier, scope, [sentences(n, seed=5)], np.array(labels(n, 3)))
            dots, v = exact_dots(classifier, scope, vectors, encoded, gold), flat(scope, vectors, names)
            sizes = np.outer(v.norm(dim=1), largest) * truth.shape[1] ** 0.5
            assert (np.abs(dots - (v @ truth.T).numpy()) <= limit * sizes).all()


@pytest.mark.slow
@pytest.mark.parametrize(("double", "limit"), [(True, 1e-10), (False, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("fail", [False, True], ids=["", "out-of-memory"])
def test_sketches_of_two_versions_also_from_halved_batches(versions, fail, double, limit, monkeypatch):
    """The sides of the tiny layers are kept whole, so a raw sketch is g - g' itself."""
    tried, record = [], Tape.record

    def recorded(self, rows, seed, on_layer):
        tried.append(len(rows))
        found = record(self, rows, seed, on_layer)
        if fail and len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Tape, "record", recorded)
    classifier, encoded, gold = load(versions.path, double=double), versions.encoded, versions.gold
    scope, names = everything_of(classifier)
    truth, largest = versions.truth(names)
    norms = truth.norm(dim=1).numpy()
    projector = PlainProjector(scope, draw_bases(classifier, scope, None, 1, "random"))
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(projector.width, 6)))[0].T.astype(np.float16)
    sketcher = Sketcher(projector, Reduction(basis, projector.squares, 16, 0))
    (found,), forward = sketch_rows(classifier, [sketcher], encoded, gold, batch_tokens=4096)
    assert tried[0] == 6 + 9  # each row once
    assert (tried[-1] <= 4) == fail
    assert (np.abs(found.norms - norms) <= limit * largest * truth.shape[1] ** 0.5).all()
    wanted = truth.numpy() / norms[:, None] @ basis.astype(np.float64).T
    assert (np.abs(found.coordinates - wanted).max(axis=1) <= 1e-5 * largest / truth.abs().amax(dim=1).numpy()).all()
    np.testing.assert_allclose(forward.logits, versions.logits, rtol=0, atol=limit * np.abs(versions.logits).max())
    whole = flat(scope, whole_gradients(classifier, scope, encoded, gold), names)
    assert ((whole - truth).abs().amax(dim=1).numpy() <= limit * largest).all()


# ---------------------------------------------------------------- rankings against a slow loop


def clauses(n: int, seed: int) -> list[list[str]]:
    """One to three clauses a row, and a row beyond the limit: its third clause is cut, its fourth not read."""
    parts = iter(sentences(3 * n, seed=seed, low=1, high=5))
    rows = [[next(parts) for _ in range(1 + i % 3)] for i in range(n - 1)]
    return [*rows, [" ".join(WORDS[:30]), "good film plot", "dull slow sad music is good", "very bad"]]


def write_rows(rows: list[list[str]], column: int):
    """Rows of texts, the clauses in the last; and by row where they are, (column, start, end)."""
    texts = [", ".join(parts) + "." if parts else "..." for parts in rows]
    ends = [np.cumsum([len(part) + 2 for part in parts]).tolist() for parts in rows]
    places = [zip(some, parts, strict=True) for some, parts in zip(ends, rows, strict=True)]
    spans = [[(column, end - 2 - len(part), end - 2) for end, part in row] for row in places]
    return list(zip(sentences(len(rows), seed=7), texts, strict=True) if column else zip(texts, strict=True)), spans


class World:
    """An index, retrievers of it in both precisions, and its oracle: plain models, the last three one SGD step away."""

    def __init__(self, folder: Path, kind: str, n_classes: int, n_models: int, scopes, column: int) -> None:
        self.paths = [str(make_tiny_model(folder / f"{kind}-{m}", kind, n_classes, m)) for m in range(n_models)]
        rows, self.gold, self.kept = clauses(36, 1), labels(36, n_classes), {}
        rows[4] = []
        self.texts, self.spans = write_rows(rows, column)
        self.queries, self.query_spans = write_rows(clauses(5, 2)[1:], column)
        self.asked = self.queries if column else [text for (text,) in self.queries]
        plain = self.texts if column else [text for (text,) in self.texts]
        chosen = choose_model(None, self.paths, [0.5, 0.25][:n_models]).checkpoints
        small = {"sketch_dim": 32, "sketch_bits": 64, "white_bits": 64, "calibration_queries": 0, "shard_rows": 13}
        options = BuildOptions(scopes=scopes, dampings=(DAMPING,), **small)
        build_index(rows_from_texts(plain, self.gold), folder / f"{kind}-index", chosen, options)
        self.index = retire_rows(folder / f"{kind}-index", [2, 9])
        double = replace(load(self.paths[-1], double=True), sha256=self.index.manifest.checkpoints[-1].sha256)
        self.retriever, self.double = Retriever(self.index), Retriever(self.index, model=double)
        self.live = [n for n in range(36) if n not in (2, 9)]
        base, self.tokenizer = load_plain(self.paths[-1])
        self.models, self.head = [base], HEADS[kind]
        for m in range(3):
            batch = np.random.default_rng([0, 7, m]).permutation(self.live)[:32]
            self.models.append(copy.deepcopy(base))
            (sum(self.loss(self.texts[n], self.gold[n], -1) for n in batch) / len(batch)).backward()
            with torch.no_grad():
                for p in self.models[-1].parameters():
                    if p.grad is not None:
                        p -= 1e-4 * p.grad
        self.entries = [(n, s) for n in self.live for s in self.spans[n] if self.reads(self.texts[n], s)]
        self.predicted = [int(self.logits(row, 0).argmax()) for row in self.queries]

    def encode(self, row):
        return self.tokenizer(*row, return_tensors="pt", truncation=True, max_length=40)

    def logits(self, row, m: int) -> torch.Tensor:
        return self.models[m](**self.encode(row)).logits[0]

    def loss(self, row, label, m: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(row, m)[None], torch.tensor([label]))

    def without(self, row, span):
        return masked(row, span, self.tokenizer.mask_token)

    def reads(self, row, span) -> bool:
        return self.encode(row)["input_ids"].tolist() != self.encode(self.without(row, span))["input_ids"].tolist()

    def layers(self, scope: str) -> dict[str, nn.Linear]:
        found = {name: layer for name, layer in self.models[0].named_modules() if isinstance(layer, nn.Linear)}
        top = (".layer.1.", "pooler", "classifier")
        kept = {"head": lambda n: n == self.head, "all": lambda n: True, "top-1": lambda n: any(x in n for x in top)}
        return {name: layer for name, layer in found.items() if kept[scope](name)}

    def gradient(self, row, label, m: int, scope: str, span=None) -> np.ndarray:
        """Over the layers of a scope; of a span, what it adds."""
        if span is not None:
            return self.gradient(row, label, m, scope) - self.gradient(self.without(row, span), label, m, scope)
        if (row, label, m, scope) not in self.kept:
            weights = [self.models[m].get_submodule(name).weight for name in self.layers(scope)]
            found = torch.autograd.grad(self.loss(row, label, m), weights)
            self.kept[row, label, m, scope] = torch.cat([g.flatten() for g in found]).numpy()
        return self.kept[row, label, m, scope]

    @torch.no_grad()
    def own_span(self, q: int, target: int):
        """The query's span whose masking raises the target's loss most."""
        row, spans = self.queries[q], self.query_spans[q]
        return max((s for s in spans if self.reads(row, s)), key=lambda s: self.loss(self.without(row, s), target, 0))

    def solve(self, q: np.ndarray, scope: str, solver: str) -> np.ndarray:
        """H^-1 q: by the dense Gauss-Newton matrix of the live rows, or from the stored EK-FAC factors."""
        if solver == "identity":
            return q
        if solver == "ekfac":
            out, start = [], 0
            for name, part in self.index.ekfac(scope).parts.items():
                left, right, values = (x.double().numpy() for x in (part.left, part.right, part.eigenvalues))
                g = q[:, start : (start := start + values.size)].reshape(-1, *values.shape)
                assert values.shape == self.layers(scope)[name].weight.shape
                out.append(left @ ((left.T @ g @ right) / (values + float(DAMPING))) @ right.T)
            return np.hstack([x.reshape(len(q), -1) for x in out])
        if scope not in self.kept:
            rows = [(self.texts[n], self.logits(self.texts[n], 0).detach().softmax(dim=0).numpy()) for n in self.live]
            g = np.array([self.gradient(row, c, 0, scope) for row, p in rows for c in range(len(p))])
            self.kept[scope] = (g.T * np.concatenate([p for _, p in rows])) @ g / len(rows)
        return np.linalg.solve(self.kept[scope] + float(DAMPING) * np.eye(q.shape[1]), q.T).T

    def truth(self, method: str, scope: str, solver: str, targets) -> tuple[list, np.ndarray]:
        """What is scored (row, span), and scores ``(q, m)``, by the formulas."""
        entries = [(n, None) for n in self.live] if method == "tracin-f" else self.entries
        total, by_if = 0.0, method.startswith("if")
        for m in (0,) if by_if else (1, 2, 3):
            own = [self.own_span(q, y) if method.endswith("++") else None for q, y in enumerate(targets)]
            asked = zip(self.queries, targets, own, strict=True)
            v = np.array([self.gradient(row, y, m, scope, s) for row, y, s in asked])
            g = np.array([self.gradient(self.texts[n], self.gold[n], m, scope, s) for n, s in entries])
            total = total + (self.solve(v, scope, solver) if by_if else v) @ g.T
        return entries, total


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Single texts; the variants are those of the last of two checkpoints."""
    return World(tmp_path_factory.mktemp("single"), "bert", 3, 2, ("head", "all", "top-1"), 0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> World:
    """Spans are in the second text."""
    return World(tmp_path_factory.mktemp("pairs"), "roberta", 2, 1, ("head",), 1)


def span_of(result, prefix: str = "span") -> tuple[int, int, int] | None:
    found = tuple(result[f"{prefix}_{part}"] for part in ("column", "start", "end"))
    return None if found == (None, None, None) else found


def assert_ends(table: pa.Table, method: str, entries, scores: np.ndarray, top: int, tolerance: float, queries=None):
    """Both ends are the best and the worst in order, each once; near ties may change places."""
    results, number = table.to_pylist(), {entry: i for i, entry in enumerate(entries)}
    for q, values in zip(range(len(scores)) if queries is None else queries, scores, strict=True):
        for side, ordered in (("proponent", np.sort(values)[::-1]), ("opponent", np.sort(values))):
            mine = [r for r in results if (r["query"], r["method"], r["side"]) == (q, method, side)]
            at, found = [number[r["row"], span_of(r)] for r in mine], np.array([r["score"] for r in mine])
            assert len(set(at)) == top
            assert np.abs(found - values[at]).max() <= tolerance * np.abs(values).max(), (method, q)
            assert np.abs(found - ordered[:top]).max() <= tolerance * np.abs(values).max(), (method, q)


CASES = ["head exact", "head identity", "all ekfac", "all identity", "top-1 ekfac", "top-1 cg"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_both_ends_equal_a_slow_loop(world, case):
    scope, solver = case.split()
    methods, n = (BY_SPANS[:2] if solver in ("ekfac", "cg") else ALL), len(world.live)
    choices = {"curvature": solver, "damping": DAMPING, "curvature_rows": 0, "tolerance": 1e-7}
    ask = {"methods": methods, "exact": "full", "scope": scope, "top": n} | choices
    double = world.double.retrieve(world.asked, **ask)
    single = None if solver == "cg" else world.retriever.retrieve(world.asked, **ask)
    assert solver != "cg" or max(double["residual"].to_pylist()) <= 1e-7
    for method in methods:
        truth = world.truth(method, scope, solver, world.predicted)
        assert_ends(double, method, *truth, n, 1e-5 if solver in ("exact", "cg") else 1e-8)
        if single is not None:
            assert_ends(single, method, *truth, n, 2e-4)
    if "tracin-f" in methods:
        found = world.double.scores(world.asked, "tracin-f", scope=scope)
        np.testing.assert_allclose(found, truth[1], rtol=0, atol=1e-8 * np.abs(truth[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 1])
def test_pairs_with_spans_in_their_second_text(pairs, target):
    methods, targets = ["if++", "tracin++"], [target] * len(pairs.asked)
    ask = {"methods": methods, "exact": "full", "top": 20, "target": f"LABEL_{target}", "span_column": 1}
    table = pairs.double.retrieve(pairs.asked, **ask)
    for method in methods:
        assert_ends(table, method, *pairs.truth(method, "head", "exact", targets), 20, 1e-5)
    for r in table.to_pylist():
        assert span_of(r, "query_span") == pairs.own_span(r["query"], target)
        assert r["span"] == r["hypothesis"][r["span_start"] : r["span_end"]]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["head", "all"])
def test_candidates_of_every_row_give_the_full_answer(world, scope):
    ask = {"methods": ALL, "scope": scope, "top": 6}
    full = world.retriever.retrieve(world.asked, exact="full", **ask)
    assert full.equals(world.retriever.retrieve(world.asked, candidates=len(world.live), **ask))
    assert all(full["exact"].to_pylist())


def test_rows_are_proposed_by_their_whole_gradients_and_all_their_spans_scored(world):
    few = world.retriever.retrieve(world.asked, methods=ALL, candidates=7, top=6)
    for method in ALL:
        entries, scores = world.truth(method, "head", "exact", world.predicted)
        g = np.array([world.gradient(world.texts[n], world.gold[n], 0, "head") for n in world.live])
        for q, (row, y) in enumerate(zip(world.queries, world.predicted, strict=True)):
            v = world.gradient(row, y, 0, "head", world.own_span(q, y) if method.endswith("++") else None)[None]
            v = world.solve(v, "head", "exact") if method.startswith("if") else v
            order = np.array(world.live)[np.argsort(v[0] @ g.T)]
            at = [i for i, (n, _) in enumerate(entries) if n in {*order[:7], *order[-7:]}]
            assert_ends(few, method, [entries[i] for i in at], scores[[q]][:, at], 6, 2e-4, [q])


@pytest.mark.slow
def test_answers_do_not_depend_on_the_block_of_queries(world):
    source, keys = rows_from_texts(world.asked), ["query", "method", "side", "rank", "row", "span", "query_span_start"]
    for scope in ("head", "top-1"):
        spec, tables = QuerySpec(methods=("if+", "tracin++"), top=5, scope=scope), []
        for n in (1, 99):
            answers = world.retriever.answers(source, spec, block_rows=n)
            tables.append(pa.concat_tables([table for block in answers for table in world.retriever.tables(block)]))
        assert tables[0].select(keys).to_pylist() == tables[1].select(keys).to_pylist()
        np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], rtol=1e-3)


@pytest.mark.parametrize("exact", ["rerank", "full"])
def test_ties_go_to_the_lower_row_and_the_earlier_place(world, exact, monkeypatch):
    score = GradientSearch.score

    def nothing(self, *args):
        scores, convergences = score(self, *args)
        return {name: np.zeros_like(values) for name, values in scores.items()}, convergences

    monkeypatch.setattr(GradientSearch, "score", nothing)
    found = world.retriever.retrieve(world.asked[:2], methods=["if+", "tracin++", "tracin-f"], top=9, exact=exact)
    rows = [(n, None) for n in world.live[:9]]
    assert [(r["row"], span_of(r)) for r in found.to_pylist()] == 2 * (4 * world.entries[:9] + 2 * rows)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_spans_influence_on_itself_is_positive(world, scope):
    rows, n, methods = [n for n in world.live if world.spans[n]], len(world.live), ["if++", "tracin++"]
    source = rows_from_texts([world.texts[i][0] for i in rows], [world.gold[i] for i in rows])
    assert len(world.entries) <= 2 * n  # all of them are at one end or the other
    found = world.double.retrieve(source, methods=methods, target="gold", exact="full", scope=scope, top=n).to_pylist()
    own = [r for r in found if (r["row"], span_of(r)) == (rows[r["query"]], span_of(r, "query_span"))]
    assert {(r["query"], r["method"]) for r in own} == {(q, method) for q in range(len(rows)) for method in methods}
    assert min(r["score"] for r in own) > 0


def test_the_model_in_memory_and_on_disk_stays_as_it_is(world):
    files = [path for folder in world.paths for path in Path(folder).rglob("*") if path.is_file()]
    before, retriever = [path.read_bytes() for path in files], Retriever(world.index)
    model = retriever.classifier().model
    weights = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    for scope in ("head", "all"):
        retriever.retrieve(world.asked, methods=ALL, scope=scope, top=3)
    assert [path.read_bytes() for path in files] == before
    for name, p in model.named_parameters():
        assert (p.requires_grad, p.grad) == (weights[name][0], None)
        assert torch.equal(p, weights[name][1])


# ---------------------------------------------------------------- results, and what is refused


@pytest.mark.slow
def test_columns_metadata_and_files(world, tmp_path):
    methods = ["gc", "if+", "if++", "tracin++", "tracin-f"]
    table = world.retriever.retrieve(world.asked, methods=methods, top=3)
    for r in table.to_pylist():
        by_spans, both = r["method"] in BY_SPANS, r["method"].endswith("++")
        assert r["span"] == (r["text"][r["span_start"] : r["span_end"]] if by_spans else None)
        assert span_of(r) in (world.spans[r["row"]] if by_spans else [None])
        assert span_of(r, "query_span") in (world.query_spans[r["query"]] if both else [None])
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
    assert (facts["if++"]["curvature"], facts["if++"]["damping"]) == ("exact", pytest.approx(float(DAMPING)))
    assert [facts[m].get("spans") for m in methods] == [None, "clauses", "clauses", "clauses", None]
    assert [facts[m].get("span_column") for m in methods] == [None, 0, 0, 0, None]
    for name, wanted in (("variants", 3), ("variant_rows", 32), ("variant_learning_rate", 1e-4)):
        assert [facts[m].get(name) for m in methods] == [None, None, None, wanted, wanted]
    test = write_jsonl(tmp_path / "test.jsonl", text=world.asked)
    args = ["retrieve", "--index", world.index.folder, "--method", ",".join(methods), "--top", 3, "--test", test]
    for out in (tmp_path / "a.parquet", tmp_path / "a.jsonl"):
        assert run([*map(str, args), "--out", str(out), "--quiet"]) == 0
    found = pq.read_table(tmp_path / "a.parquet")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for rows in (found.to_pylist(), lines):
        assert rows == [r | {"score": pytest.approx(r["score"], rel=1e-3)} for r in table.to_pylist()]
    assert json.loads(found.schema.metadata[b"forebear"])["methods"] == facts
    assert json.loads((tmp_path / "a.jsonl.meta.json").read_text())["methods"] == facts


def test_the_span_column_is_named_on_the_command_line(pairs, tmp_path, capsys):
    (first, second), out = pairs.queries[1], tmp_path / "a.jsonl"
    args = ["retrieve", "--index", str(pairs.index.folder), "--text", first, "--pair", second, "--method", "tracin++"]
    args += ["--top", "2", "--span-column"]
    assert run([*args, "hypothesis", "--out", str(out)]) == 0
    for r in map(json.loads, out.read_text().splitlines()):
        assert (r["span_column"], r["query_span_column"]) == (1, 1)
        assert r["span"] == r["hypothesis"][r["span_start"] : r["span_end"]]
    assert run([*args, "hypothesis"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"the query's span: {second[r['query_span_start'] : r['query_span_end']]}" in shown
    assert run([*args, "text"]) == 2
    assert "has no text column 'text'; it has premise, hypothesis" in capsys.readouterr().err


UNREAD = "?! " * 40 + "good film"  # one clause, which truncation cuts off


@pytest.mark.slow
@pytest.mark.parametrize("text", ["... !", "", UNREAD])
def test_a_query_without_a_span_is_named(world, text, tmp_path, capsys):
    texts, message = ["a good film", "dull plot, slow", "the", text], "test row 3 has no span that the model reads"
    for block_rows in (3, 99):
        with pytest.raises(InputError, match=message):
            spec = QuerySpec(methods=("if++",), top=1)
            list(world.retriever.answers(rows_from_texts(texts), spec, block_rows=block_rows))
    assert world.retriever.retrieve(texts, methods=["if+", "tracin+"], top=1).num_rows == 16  # its span plays no part
    test, out = write_jsonl(tmp_path / "test.jsonl", text=texts), tmp_path / "a.jsonl"
    args = ["retrieve", "--index", world.index.folder, "--test", test, "--method", "tracin++", "--top", 1, "--out", out]
    assert run([*map(str, args), "--quiet"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert (message in error, out.exists()) == (True, False)


def test_what_means_nothing_is_refused(world, tmp_path, capsys):
    ask, mine = world.retriever.retrieve, tmp_path / "mine.py"
    mine.write_text("def rare(row): return [(0, 1)] if len(row['text']) > 150 else []\ndef none(row): return []\n")
    for method in ALL:
        with pytest.raises(InputError, match=f'exact="none" is not of {re.escape(method)}'):
            ask(["a film"], methods=["gc", method], exact="none")
        with pytest.raises(InputError, match=f"certify=True is not of {re.escape(method)}"):
            ask(["a film"], methods=[method], certify=True, scope="all")
    for method in BY_SPANS:
        with pytest.raises(InputError, match="scores spans or asks of a word, not a row"):
            world.retriever.scores(["a film"], method)
    with pytest.raises(InputError, match="the candidate rows have no span"):
        ask(["a film"], methods=["tracin+"], top=1, spans=f"{mine}:none")
    for spans in ("chunks", f"{mine}:common"):
        with pytest.raises(InputError, match="spans="):
            ask(["a film"], methods=["gc"], spans=spans)
    with pytest.raises(InputError, match='spans="aspect" is of pairs'):
        ask(["a film"], methods=["if+"], spans="aspect")
    args = ["retrieve", "--index", str(world.index.folder), "--text", "a film", "--method", "if+", "--top", "3"]
    assert run([*args, "--spans", f"{mine}:rare"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: if+: the candidate rows have 1 span(s), --top asks for 3. Give a smaller --top")
    assert err.count("\n") == 1


def test_top_counts_spans_not_rows(world):
    n, ask = len(world.entries), {"methods": ["if+"], "exact": "full"}
    assert n > len(world.live)
    assert world.retriever.retrieve(["a film"], top=n, **ask).num_rows == 2 * n
    with pytest.raises(InputError, match=f"have {n} span"):
        world.retriever.retrieve(["a film"], top=n + 1, **ask)


def test_a_text_column_that_is_not_there_is_refused(world):
    with pytest.raises(InputError, match="column"):
        world.retriever.retrieve(["a film"], methods=["if+"], top=1, span_column=1)


def test_training_rows_are_named_by_their_number_in_the_index(world):
    def find(texts, _row, number):
        at_fault = texts == list(world.texts[12])
        return span_finder("columns:a,b")(texts, {"a": 5, "b": 3}, number) if at_fault else []

    with pytest.raises(DataError, match="row 12: span 5 to 3"):
        span_rows(world.index, world.retriever.classifier(), np.array([3, 12]), find)


# ---------------------------------------------------------------- finding spans


CLAUSES = {
    "The plot is 3.5 stars, the cast $4.50 good.": ["The plot is 3.5 stars", "the cast $4.50 good"],
    'He said "good." Then (quietly) left...': ['He said "good', "Then", "quietly", "left"],
    "I liked it but not much": ["I liked it", "but not much"],
    "good. But butter, although old": ["good", "But butter", "although old"],
    "But it works; well-made!  ": ["But it works", "well-made"],
    "good ... bad... ok": ["good", "bad", "ok"],
    "dull - very dull – sad—slow": ["dull", "very dull", "sad", "slow"],
    "see www.x.org/a.html at 10:30 today": ["see www.x.org/a.html at 10:30 today"],
    "  line one\n100% of it [so]": ["line one", "100% of it", "so"],
}
SENTENCES = {
    "It is 3.5, good! Is it? Yes.": ["It is 3.5, good", "Is it", "Yes"],
    '"Fine." (Good.) I liked it but not much': ["Fine", "Good", "I liked it but not much"],
}
SPLIT = {"Don't stop: well-made, 'x' -- naïve 漢字": ["Don't", "stop", "well-made", "x", "naïve", "漢字"]}


@pytest.mark.parametrize(("how", "cases"), [("clauses", CLAUSES), ("sentences", SENTENCES), ("words", SPLIT)])
def test_texts_are_split(how, cases):
    for text, wanted in (cases | {text: [] for text in ("", " \n\t", "?!, ... () – '-'")}).items():
        assert [text[a:b] for a, b in split_text(text, how)] == wanted


def test_what_holds_no_letter_and_no_digit_is_no_word():
    assert split_text("good __ film", "words") == [(0, 4), (8, 12)]


@pytest.mark.parametrize("how", ["clauses", "sentences", "words"])
def test_pieces_are_in_order_apart_and_hold_every_letter(how):
    rng = np.random.default_rng(3)
    some = [*"abé漢1  .,;:!?'\"()[]-–—\n\t…’%$", " but ", " because ", "... ", ". "]
    for _ in range(1500):
        text = "".join(rng.choice(some, size=rng.integers(0, 25)))
        spans = split_text(text, how)
        edges = [0, *(x for span in spans for x in span), len(text)]
        assert edges == sorted(edges)
        assert all(any(c.isalnum() for c in text[a:b]) and text[a:b] == text[a:b].strip() for a, b in spans)
        inside = {i for a, b in spans for i in range(a, b)}
        assert {i for i, c in enumerate(text) if c.isalnum()} <= inside


def test_the_aspects_clause():
    text = "The food was great, but the service slow. Foods"
    cases = {"FOOD": ["The food was great"], "great, but": ["The food was great, but the service slow"]}
    for aspect, wanted in (cases | {"price": [], "": []}).items():
        found = span_finder("aspect")([text, aspect], {}, 0)
        assert [(s.column, text[s.start : s.end]) for s in found] == [(0, clause) for clause in wanted]


def test_the_aspects_clause_after_letters_that_grow_when_case_is_folded():
    text = "ßßßßßßßß food, bad plot"
    (span,) = span_finder("aspect")([text, "food"], {}, 0)
    assert text[span.start : span.end] == "ßßßßßßßß food"


TEXT = "good film, bad plot, ok"


def test_given_columns_hold_numbers_or_lists():
    table = pa.table({"text": [TEXT, TEXT], "from": [[0, 11], []], "to": [[4, 14], []]})
    found = find_spans(span_finder("columns:from, to"), [[TEXT, TEXT]], table, [0, 1], "row")
    assert found == [[Span(0, 0, 4), Span(0, 11, 14)], []]
    for start, end, clause in ((11, 14, (11, 19)), (5, 12, (0, 19)), (9, 10, (9, 10)), (np.int64(0), 23, (0, 23))):
        row = {"from": start, "to": end}
        assert span_finder("columns:from,to", 1)(["", TEXT], row, 0) == [Span(1, start, end)]
        assert span_finder("clause-of:from,to")([TEXT], row, 0) == [Span(0, *clause)]
    assert span_finder("clause-of:a,b")([TEXT], {"a": [0, 5], "b": [4, 9]}, 0) == [Span(0, 0, 9)]  # once


@pytest.mark.parametrize("how", ["columns:from,to", "clause-of:from,to"])
def test_spans_that_do_not_lie_in_their_text_are_refused_by_row(how):
    for start, end in ((0, 24), (-1, 3), (3, 3), (5, 2), (24, 25)):
        with pytest.raises(DataError, match=r"^row 7: span .* expected 0 <= start < end <= 23\.$"):
            span_finder(how)([TEXT], {"from": start, "to": end}, "row 7")
    for start, what in ((None, "nothing"), ("", "nothing"), (0.5, "0.5"), (False, "False"), ("zero", "'zero'")):
        with pytest.raises(DataError, match=rf"^row 7: {what} stands in column 'from'; expected a number"):
            span_finder(how)([TEXT], {"from": start, "to": 3}, "row 7")
    whole = span_finder(how)([TEXT], {"from": 0, "to": 3}, "row 7")
    for start, end in ((0.0, 3.0), ("0", "3"), ("0.0", [3]), ("[0]", 3)):  # as loaders give columns with gaps or lists
        assert span_finder(how)([TEXT], {"from": start, "to": end}, "row 7") == whole
    with pytest.raises(DataError, match="row 7: 2 starts in 'from', 1 ends in 'to'"):
        span_finder(how)([TEXT], {"from": [0, 5], "to": [4]}, "row 7")
    with pytest.raises(InputError, match="no column 'to'; they have text, from"):
        span_finder(how)([TEXT], {"text": TEXT, "from": 0}, "row 7")
    with pytest.raises(DataError, match="row 101: span 0 to 99"):
        find_spans(span_finder(how), [[TEXT, TEXT]], pa.table({"from": [0, 0], "to": [1, 99]}), [100, 101], "row")


def test_functions_of_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "NAME = 1\ndef first(row): return [(0, row['n'])]\ndef far(row): return [(0, 999)]\n"
        "def twice(row): return [(0, 3), (0, 3)]\ndef text(row): return [('0', '3')]\n"
    )
    assert span_finder(f"{path}:twice")([TEXT], {}, "row 7") == [Span(0, 0, 3)]
    with pytest.raises(InputError, match=r"row 7 gets \('0', '3'\); expected whole numbers"):
        span_finder(f"{path}:text")([TEXT], {}, "row 7")
    assert span_finder(f"{path}:first", 1)(["", TEXT], {"n": 4}, 0) == [Span(1, 0, 4)]
    with pytest.raises(DataError, match="row 7: span 0 to 999"):
        span_finder(f"{path}:far")([TEXT], {}, "row 7")
    for how, message in ((f"{path}:none", "no function none"), (f"{path}:NAME", "no function NAME")):
        with pytest.raises(InputError, match=message):
            span_finder(how)
    with pytest.raises(InputError, match=r"there is no file .*other\.py"):
        span_finder(f"{tmp_path}/other.py:first")
    for how in ("", "chunks", "columns", "columns:from", "columns:a,b,c", str(path), f"{path}:", f"{path}:a b", "py:f"):
        with pytest.raises(InputError, match=r"expected clauses, sentences, words, aspect, columns:FROM,TO"):
            span_finder(how)


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_texts", [1, 2])
def test_pieces_that_share_a_character_are_masked_and_spans_cut_off_are_left_out(folder, kind, n_texts):
    classifier, rng = load(make_tiny_model(folder / f"mask-{kind}", kind)), np.random.default_rng(5)
    tokenizer, texts = classifier.tokenizer, [*sentences(6, seed=3), " ".join(WORDS * 2), "Good , film.. 5%  ", "a   b"]
    rows, spans = [tuple(rng.choice(texts, size=n_texts).tolist()) for _ in range(90)], []
    for row in rows:
        column = int(rng.integers(n_texts))
        start, end = sorted(rng.choice(len(row[column]) + 1, size=2, replace=False).tolist())
        spans.append((column, start, start + 2 if rng.random() < 0.3 else end))
    found, kept = mask_spans(classifier, list(zip(*rows, strict=True)), [Span(*span) for span in spans])
    others = [masked(row, span, tokenizer.mask_token) for row, span in zip(rows, spans, strict=True)]
    plain, without = ([dict(tokenizer(*row, truncation=True, max_length=40)) for row in x] for x in (rows, others))
    wanted = [(a, b) for a, b in zip(plain, without, strict=True) if a != b]
    assert kept.tolist() == [a != b for a, b in zip(plain, without, strict=True)]
    assert list(zip(found.rows, found.minus, strict=True)) == wanted
    assert 0 < len(wanted) < len(rows)


def byte_level(trim: bool, **special: str) -> transformers.PreTrainedTokenizerFast:
    """RoBERTa's kind of pieces: with a space before them, some parts of a character."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "f"), ("i", "l"), ("Ġf", "il"), ("Ġ", "g"), ("Ã", "¯")]
    special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"} | special
    pieces = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = ("</s>", 2), ("<s>", 0)
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=trim, add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("trim", [False, True])
def test_byte_level_pieces_are_masked_by_the_characters_whose_bytes_they_hold(folder, trim):
    """A byte-level piece has one character a byte, so where it stands follows from the lengths before it."""
    tokenizer, text = byte_level(trim, mask_token="<mask>"), "the film, naïve 漢字 good  the"
    classifier = replace(load(make_tiny_model(folder / "bytes", "roberta")), tokenizer=tokenizer)
    ids = tokenizer(text)["input_ids"]
    of_byte, pieces = [i for i, c in enumerate(text) for _ in c.encode()], tokenizer.convert_ids_to_tokens(ids)[1:-1]
    starts = np.cumsum([0, *map(len, pieces)])
    assert starts[-1] == len(of_byte)
    held = [set(of_byte[a : a + len(p)]) for a, p in zip(starts, pieces, strict=False)]
    if trim:  # white space before a word is no part of its piece, and by itself no place
        held = [{i for i in some if not text[i].isspace()} for some in held]
    spans = [Span(0, a, b) for a in range(len(text)) for b in range(a + 1, len(text) + 1) if text[a:b].strip()]
    found, kept = mask_spans(classifier, [[text] * len(spans)], spans)
    assert kept.all()
    for span, row, other in zip(spans, found.rows, found.minus, strict=True):
        is_in = [False, *(bool(some & set(range(span.start, span.end))) for some in held), False]
        first, last = is_in.index(True), len(is_in) - is_in[::-1].index(True)
        is_in[first:last] = [True] * (last - first)  # pieces i to j: bare white space between has no place of its own
        assert row["input_ids"] == ids
        assert other["input_ids"] == np.where(is_in, tokenizer.mask_token_id, ids).tolist()


def test_without_a_mask_token_no_span_is_masked(folder):
    classifier = replace(load(make_tiny_model(folder / "bytes", "roberta")), tokenizer=byte_level(False))
    for n in (0, 1):
        with pytest.raises(ModelError, match="its tokenizer has no mask token"):
            mask_spans(classifier, [["the film"] * n], [Span(0, 0, 3)] * n)
