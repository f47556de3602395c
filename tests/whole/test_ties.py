"""Equal rows get equal scores, to the last bit, whatever the attention kernel and the batches."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from places import GOLDEN
from tiny import labels, make_tiny_model, sentences
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.indexer.building import refit, shards
from forebear.indexer.building.build import BuildOptions, append_rows, build_index, refit_index
from forebear.indexer.building.sharing import equal_rows
from forebear.indexer.gradients import earlier_rows
from forebear.indexer.index import Index
from forebear.indexer.model import encoding
from forebear.indexer.model import loading as model_module
from forebear.indexer.model.encoding import Encoded, distinct_rows
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.model.sentence_encoder import SentenceEncoder
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.sketches.fitting import sketch_folders
from forebear.indexer.sketches.sketch import Sketches
from forebear.indexer.spans import store as span_store
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.retriever import Retriever

TWINS = [3, 11, 29, 47]
SHORT = "a good film, the happy doctor"  # of a batch's padded tokens its last bits depend on the other rows
HEAD_METHODS = ["gd", "gc", "if", "rif", "nn-cos", "nn-euc", "nn-dot", "rep", "tracin", "tracin-we", "tracin-we-topk"]
DEEP_METHODS = ["gd", "gc", "if", "rif", "tracin"]
SPAN_METHODS = ["if+", "tracin+"]


def corpus(twin: str = "a good film and a bright story about the happy doctor") -> tuple[list[str], list[int]]:
    texts, gold = sentences(60), labels(60, 3)
    for row in TWINS:
        texts[row], gold[row] = twin, 1
    return texts, gold


@pytest.fixture(params=["eager", "math", "flash"])
def kernel(request, monkeypatch):
    """One attention kernel for all that runs in the test."""
    if request.param == "eager":
        load = model_module.load_pretrained

        def eager(auto_class, name, **choices):
            if "Model" in auto_class.__name__:
                choices["attn_implementation"] = "eager"
            return load(auto_class, name, **choices)

        monkeypatch.setattr(model_module, "load_pretrained", eager)
    with sdpa_kernel(SDPBackend.MATH) if request.param == "math" else nullcontext():
        yield request.param


@pytest.mark.slow
def test_equal_rows_come_back_in_row_order_with_one_score(kernel, tmp_path):
    texts, gold = corpus()
    folder = make_tiny_model(tmp_path / "m", n_classes=3)
    # Batches of three such rows: two of the four would share no batch with the others.
    options = BuildOptions(
        stores=("features", "words"), words_tops=(0, 5), scopes=("head", "all"), batch_tokens=40, calibration_queries=0
    )
    index = build_index(rows_from_texts(texts, gold), tmp_path / "i", choose_model(str(folder)).checkpoints, options)
    check_twins(index, solve_each=kernel == "math")


def check_twins(index: Index, *, solve_each: bool = False) -> None:
    """In every method's ranking the equal rows have one score and stand in row order.

    ``solve_each``: also by ``rif`` beyond the head under conjugate gradients, which takes a solve a row.
    """
    retriever = Retriever(index)
    has_sentences = "sbert" in index.manifest.spec.stores
    for scope, methods in (("head", HEAD_METHODS + ["sbert-cos", "sbert-dot"] * has_sentences), ("all", DEEP_METHODS)):
        for exact in ("rerank", "full"):
            check_ranking(retriever, methods, scope=scope, top=60, exact=exact)
    for scope in ("head", "all") if solve_each else ("head",):
        few_steps = {"curvature": "cg", "curvature_rows": 16, "tolerance": 0.2}
        check_ranking(retriever, ["rif"], scope=scope, top=60, exact="full", **few_steps)
    if "spans" in index.manifest.spec.stores:
        check_ranking(retriever, SPAN_METHODS, scope="head", top=len(index.live_spans))
        check_ranking(retriever, ["if+"], scope="all", top=len(index.live_spans), candidates=len(index.live_spans))


def check_ranking(retriever: Retriever, methods: list[str], **choices: object) -> None:
    queries = sentences(5, seed=9)
    table = retriever.retrieve(queries, methods=methods, **choices)
    spans = "span_start" in table.column_names
    for method in methods:
        for query in range(len(queries)):
            chosen = pc.and_(pc.equal(table["method"], method), pc.equal(table["query"], query))
            part = table.filter(pc.and_(chosen, pc.equal(table["side"], "proponent")))
            rows, scores = part["row"].to_numpy(), part["score"].to_numpy()
            starts = part["span_start"].to_numpy(zero_copy_only=False) if spans else np.zeros(len(rows))
            for start in np.unique(starts[np.isin(rows, TWINS)]):
                places = np.flatnonzero(np.isin(rows, TWINS) & (starts == start))
                assert len(np.unique(scores[places])) == 1, (choices, method, query)
                assert rows[places].tolist() == TWINS, (choices, method, query)


def build_and_append(tmp_path: Path, twin: str, **choices: object) -> Index:
    """An index of shards of 7 rows, the last of them appended: every twin lies in another shard."""
    texts, gold = corpus(twin)
    assert len({row // 7 for row in TWINS}) == 4
    folder = make_tiny_model(tmp_path / "m", n_classes=3)
    options = BuildOptions(
        stores=("features", "words", "sbert", "spans"), words_tops=(0, 5), scopes=("head", "all"), shard_rows=7,
        calibration_queries=0, sentence_model=str(folder), **choices,
    )  # fmt: skip
    chosen = choose_model(str(folder)).checkpoints
    build_index(rows_from_texts(texts[:40], gold[:40]), tmp_path / "i", chosen, options)
    return append_rows(tmp_path / "i", rows_from_texts(texts[40:], gold[40:]))


def check_stored(index: Index, name: str) -> None:
    """All that is stored of the twins is the same, to the last bit."""
    found = {
        "features": index.features().take(np.array(TWINS)),
        "residuals": index.residuals().take(np.array(TWINS)),
        "norms": index.gradients("all").norms[TWINS],
        "whitened norms": index.gradients("all", damping=0).norms[TWINS],
        "sentences": index.sentence().take(np.array(TWINS)),
        "losses": index.losses[TWINS],
    }
    for top in (0, 5):
        words = [index.words(top).take(np.array([row])) for row in TWINS]
        found[f"words {top}"] = np.stack([w.vectors for w in words])
        found[f"tokens {top}"] = np.stack([w.tokens for w in words])
    store = index.spans()
    entries = [store.entries_of(np.array([row])) for row in TWINS]
    found["masked features"] = np.stack([store.features.take(mine) for mine in entries])
    found["masked residuals"] = np.stack([store.residuals.take(mine) for mine in entries])
    found["span norms"] = np.stack([index.gradients("all", spans=True).norms[mine] for mine in entries])
    differing = [kind for kind, values in found.items() if not (values == values[0]).all()]
    assert not differing, (name, differing)


@pytest.mark.slow
def test_equal_rows_of_other_shards_and_of_an_append_tie_too(kernel, tmp_path):
    index = build_and_append(tmp_path, SHORT, batch_tokens=64)
    check_stored(index, kernel)
    check_twins(index)


def test_a_resumed_build_finds_equal_rows_of_the_shards_that_were_written(tmp_path):
    texts, gold = corpus()
    chosen = choose_model(str(make_tiny_model(tmp_path / "m", n_classes=3))).checkpoints
    options = BuildOptions(
        scopes=("head", "all"), batch_tokens=40, shard_rows=7, sketch_dim=8, sketch_bits=64, white_bits=64,
        calibration_queries=0,
    )  # fmt: skip
    whole = build_index(rows_from_texts(texts, gold), tmp_path / "i", chosen, options)

    def stop(stage: str, done: int, _total: int) -> None:
        if stage.startswith("features") and done >= 28:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(rows_from_texts(texts, gold), tmp_path / "j", chosen, options, progress=stop)
    again = build_index(rows_from_texts(texts, gold), tmp_path / "j", chosen, options, resume=True)
    assert again.manifest.files == whole.manifest.files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "shard_rows"), [("eager", 7), ("math", 7), ("flash", 7), ("flash", 4096)], indirect=["kernel"]
)
def test_equal_word_pieces_have_equal_features_also_under_other_labels(kernel, shard_rows, tmp_path):
    texts, gold = corpus(SHORT)
    gold[11] = 2
    folder = make_tiny_model(tmp_path / "m", n_classes=3)
    options = BuildOptions(scopes=("head", "all"), batch_tokens=64, shard_rows=shard_rows, calibration_queries=0)
    index = build_index(rows_from_texts(texts, gold), tmp_path / "i", choose_model(str(folder)).checkpoints, options)
    features, residuals = (values.take(np.array(TWINS)) for values in (index.features(), index.residuals()))
    assert (features == features[0]).all()
    assert len(set(index.predictions[TWINS].tolist())) == 1
    assert (residuals[[0, 2, 3]] == residuals[0]).all()
    assert (index.losses[[3, 29, 47]] == index.losses[3]).all()
    # Of one pass: where neither row has its label, to the last bit.
    assert residuals[1][0] == residuals[0][0]
    np.testing.assert_allclose(residuals[1] + np.eye(3)[2], residuals[0] + np.eye(3)[1], atol=1e-6)


def test_equal_test_rows_are_asked_alike(kernel, tmp_path):
    classifier = load_classifier(make_tiny_model(tmp_path / "m", n_classes=3))
    texts, _ = corpus()
    forward = run_forward(classifier, [texts], batch_tokens=40)
    assert (forward.logits[TWINS] == forward.logits[3]).all()
    assert not (forward.logits[TWINS[0]] == forward.logits[4]).all()


def test_rows_are_told_apart_by_all_that_the_model_reads():
    plain = {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1]}
    rows = [
        plain,
        {"input_ids": [2, 7, 3], "attention_mask": [1, 0, 1]},
        dict(plain),
        {"input_ids": [2, 7], "x": [3, 1]},
    ]
    first, kinds = distinct_rows(Encoded(rows))
    assert (first.tolist(), kinds.tolist()) == ([0, 1, 3], [0, 1, 0, 2])
    first, kinds = distinct_rows(Encoded(rows), np.array([0, 0, 1, 0]))
    assert (first.tolist(), kinds.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    first, kinds = distinct_rows(Encoded([plain] * 3, minus=[plain, rows[1], plain]))
    assert (first.tolist(), kinds.tolist()) == ([0, 1], [0, 1, 0])


def test_rounding_that_differs_between_shards_does_not_reach_the_store(tmp_path, monkeypatch):
    """A stand-in for kernels whose last bits depend on the batch: every shard's features are off by a little."""
    texts, gold = corpus()
    chosen = choose_model(str(make_tiny_model(tmp_path / "m", n_classes=3))).checkpoints

    def shifted(classifier, rows, *, first_row, **choices):
        found = run_forward(classifier, rows, first_row=first_row, **choices)
        return replace(found, features=found.features + np.float32(1e-5 * (1 + first_row)))

    monkeypatch.setattr(shards, "run_forward", shifted)
    options = BuildOptions(dampings=(), shard_rows=7)
    build_index(rows_from_texts(texts[:40], gold[:40]), tmp_path / "i", chosen, options)
    index = append_rows(tmp_path / "i", rows_from_texts(texts[40:], gold[40:]))
    features = index.features().take(np.array(TWINS))
    assert (features == features[0]).all()
    monkeypatch.setattr(equal_rows, "copy_repeats", lambda *_: None)
    index = build_index(rows_from_texts(texts, gold), tmp_path / "j", chosen, options)
    features = index.features().take(np.array(TWINS))
    assert len(np.unique(features[:, 0])) == 4  # the stand-in does what it stands for


def test_an_append_reads_the_digests_of_the_rows_before_it(tmp_path, monkeypatch):
    """It encodes its own rows alone, and hashes each once."""
    texts, gold = corpus(SHORT)
    folder = make_tiny_model(tmp_path / "m", n_classes=3)
    options = BuildOptions(
        stores=("features", "sbert", "spans"), sentence_model=str(folder), shard_rows=7, calibration_queries=0
    )
    chosen = choose_model(str(folder)).checkpoints
    build_index(rows_from_texts(texts[:59], gold[:59]), tmp_path / "i", chosen, options)
    encoded: list[int] = []
    hashed: list[int] = []
    encode_rows, embed_rows, digests = shards.encode, SentenceEncoder.encode, encoding.read_digests
    monkeypatch.setattr(shards, "encode", lambda c, t: encoded.append(len(t[0])) or encode_rows(c, t))
    monkeypatch.setattr(SentenceEncoder, "encode", lambda e, t: encoded.append(len(t[0])) or embed_rows(e, t))
    for module in (encoding, earlier_rows):
        monkeypatch.setattr(module, "read_digests", lambda rows: hashed.append(len(rows)) or digests(rows))
    index = append_rows(tmp_path / "i", rows_from_texts([SHORT], [1]))
    assert encoded == [1, 1]  # by the classifier, by the sentence encoder
    n_spans = len(index.spans().entries_of(np.array([59])))
    assert hashed == [1, 1, n_spans]  # its word pieces in both; its spans' rows, masked
    for values in (index.features(), index.residuals(), index.sentence()):
        twins = values.take(np.array([*TWINS, 59]))
        assert (twins == twins[0]).all()


def test_an_index_of_an_older_version_is_appended_to_and_its_rows_tie(tmp_path):
    """Its shards keep no digests: its rows are encoded once more."""
    shutil.copytree(GOLDEN / "index", tmp_path / "i")
    old = Index.open(tmp_path / "i")
    (texts,) = old.text_lists(np.arange(old.manifest.n_rows))
    names = old.manifest.spec.label_names
    gold = [names[label] for label in old.labels]
    index = old
    for row in (3, 5):
        rows = rows_from_texts([texts[row], "a text that is new"], [gold[row], names[0]])
        index = append_rows(tmp_path / "i", rows, model=str(GOLDEN / "model"), device="cpu")
        for values in (index.features(), index.residuals()):
            found = values.take(np.array([row, index.manifest.n_rows - 2]))
            assert (found[0] == found[1]).all()
        assert index.losses[row] == index.losses[-2]


@pytest.mark.slow
def test_no_rounding_reaches_what_a_refit_sentences_and_spans_store(tmp_path, monkeypatch):
    """The same stand-in for sketches, sentence embeddings and masked rows: the numbers of every call are others."""
    texts, gold = corpus()
    folder = make_tiny_model(tmp_path / "m", n_classes=3)
    chosen = choose_model(str(folder)).checkpoints
    calls = count(1)

    def shifted(values):
        return values + np.float32(1e-5 * next(calls))

    sketched, masked, embed = Sketches.rows, span_store.masked_pass, SentenceEncoder.embed

    def shifted_rows(self, first_row=0):
        found = sketched(self, first_row)
        return replace(found, norms=shifted(found.norms))

    def shifted_pass(*args, **choices):
        features, logits, sketches = masked(*args, **choices)
        return shifted(features), logits, {k: replace(s, norms=shifted(s.norms)) for k, s in sketches.items()}

    monkeypatch.setattr(Sketches, "rows", shifted_rows)
    for module in (span_store, refit):
        monkeypatch.setattr(module, "masked_pass", shifted_pass)
    monkeypatch.setattr(SentenceEncoder, "embed", lambda *args, **choices: shifted(embed(*args, **choices)))
    options = BuildOptions(
        stores=("features", "sbert", "spans"), spans="words", scopes=("head", "top-1"), shard_rows=7, sketch_dim=8,
        sentence_model=str(folder), calibration_queries=0,
    )  # fmt: skip

    def stored():
        build_index(rows_from_texts(texts[:40], gold[:40]), tmp_path / "i", chosen, options, force=True)
        yield append_rows(tmp_path / "i", rows_from_texts(texts[40:], gold[40:]))
        yield refit_index(tmp_path / "i")

    def of_twins(index):
        twins, spans = np.array(TWINS), index.spans()
        entries = [spans.entries_of(np.array([row])) for row in TWINS]
        yield "embedding", index.sentence().take(twins)
        yield "norm", index.gradients("top-1").norms[twins]
        for i in range(len(entries[0])):
            at = np.array([of_row[i] for of_row in entries])
            yield "masked", spans.features.take(at)
            (kind,) = (
                k for k in sketch_folders(index.manifest.spec, "top-1", "final", last=True).values() if "wh" in k
            )
            yield "span", index.gradient_store(kind, spans=True).norms[at]

    for index in stored():
        for name, values in of_twins(index):
            assert (values == values[0]).all(), name
    for module in (span_store, earlier_rows):
        monkeypatch.setattr(module, "copy_repeats", lambda *_: None)
    for index in stored():
        assert {name for name, values in of_twins(index) if len(np.unique(values, axis=0)) == 1} == set()
