"""d s / d theta against finite differences, and influence on saliency against a slow loop of plain autograd."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tiny import KINDS, labels, make_tiny_model, sentences

from forebear import BuildOptions, InputError, Retriever, build_index, rows_from_texts
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import load_classifier, make_classifier
from forebear.indexer.model.scopes import scope_of
from forebear.indexer.spans.text import Span
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.saliency.gradients import saliency_gradients, salient_gradients, salient_words
from forebear.retriever.saliency.maps import saliency
from forebear.retriever.spans.search import WORD_ROWS

TEXTS, LABELS = sentences(24, seed=3, low=3), labels(24)
QUERIES = ["the good film was dull", "a sad story"]
UNK = "[UNK]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saliency-influence")


@pytest.fixture(scope="module")
def retriever(folder) -> Retriever:
    """Over an index of the head and all layers."""
    model = make_tiny_model(folder / "bert", "bert")
    options = BuildOptions(scopes=("head", "all"), sketch_dim=8, sketch_bits=64, white_bits=64, calibration_queries=0)
    return Retriever(
        build_index(rows_from_texts(TEXTS, LABELS), folder / "index", choose_model(str(model)).checkpoints, options)
    )


def double(path) -> Classifier:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return make_classifier(model, tokenizer, name=str(path), device=torch.device("cpu"))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_saliency_is_a_finite_difference(folder, kind, with_bias):
    """Along a random direction of all weights; the saliency itself is tested against autograd elsewhere."""
    classifier = double(make_tiny_model(folder / kind, kind))
    scope = scope_of(classifier, "all", with_bias=with_bias)
    targets = np.array([0, 1])
    words = salient_words(classifier, [QUERIES], targets, None)
    found = saliency_gradients(classifier, scope, [QUERIES], targets, words)
    chosen, together = salient_gradients(classifier, scope, [QUERIES], targets, None)
    assert chosen == words
    assert all(torch.equal(together[name], found[name]) for name in found)
    generator = torch.Generator().manual_seed(1)
    along = {n: torch.randn(v.shape[1:], generator=generator, dtype=torch.float64) for n, v in found.items()}

    @torch.no_grad()
    def moved(step: float) -> np.ndarray:
        pieces = {n: v for b in scope.blocks for n, v in b.split(along[b.name]).items()}
        for name, v in pieces.items():
            classifier.model.get_parameter(name).add_(step * v)
        maps = saliency(classifier, [QUERIES], targets, form="summed-gradient")
        for name, v in pieces.items():
            classifier.model.get_parameter(name).sub_(step * v)
        return np.array(
            [next(w.value for w in m.words if w.start == s.start) for m, s in zip(maps, words, strict=True)]
        )

    truth = (moved(1e-5) - moved(-1e-5)) / 2e-5
    dots = [sum(float((v[i] * along[n]).sum()) for n, v in found.items()) for i in range(len(QUERIES))]
    np.testing.assert_allclose(-np.array(dots), truth, rtol=1e-5, atol=1e-9 * np.abs(truth).max())


def loss_gradient(model, tokenizer, text: str, label: int, unknown: tuple[int, int] | None = None) -> torch.Tensor:
    """Of all linear weights, one long vector; the word at these characters replaced by [UNK]."""
    inputs = dict(tokenizer(text, return_tensors="pt", return_offsets_mapping=True))
    offsets = inputs.pop("offset_mapping")[0].tolist()
    for t, (a, b) in enumerate(offsets):
        if unknown is not None and a < b and (a, b) == unknown:
            inputs["input_ids"][0, t] = tokenizer.unk_token_id
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([label]))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, linear_weights(model))])


def linear_weights(model) -> list[torch.nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]


def saliency_vector(model, tokenizer, text: str, target: int, position: int) -> torch.Tensor:
    """-d s / d theta by two backward passes, s the sum over dimensions at one position of the encoder's input."""
    leaf: list[torch.Tensor] = []

    def grow(_module, args):
        leaf.append(args[0].detach().requires_grad_(True))
        return (leaf[0], *args[1:])

    hook = model.bert.encoder.layer[0].register_forward_pre_hook(grow)
    p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(dim=1)[0, target]
    hook.remove()
    (at_input,) = torch.autograd.grad(p, leaf[0], create_graph=True)
    found = torch.autograd.grad(at_input[0, position].sum(), linear_weights(model), materialize_grads=True)
    return -torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("exact", ["rerank", "full"])
def test_rows_and_their_words_are_ranked_as_by_a_slow_loop(retriever, exact):
    """H = I: both ends, by -d s / d theta against each row's loss gradient; words of rows by making them [UNK]."""
    path = retriever.index.manifest.checkpoints[-1].path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float64
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text, word = QUERIES[0], "film"
    position = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]).index(word)
    target = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
    v = saliency_vector(model, tokenizer, text, target, position)
    of_row = [float(v @ loss_gradient(model, tokenizer, t, y)) for t, y in zip(TEXTS, LABELS, strict=True)]
    of_word = {}
    for n, (t, y) in enumerate(zip(TEXTS, LABELS, strict=True)):
        start = 0
        for w in t.split():
            at = (t.index(w, start), t.index(w, start) + len(w))
            of_word[n, at] = of_row[n] - float(v @ loss_gradient(model, tokenizer, t, y, at))
            start = at[1]
    table = retriever.retrieve(
        [text], methods=["saliency-if", "saliency-if-token"], top=6, scope="all", curvature="identity", exact=exact,
        candidates=len(TEXTS), word=word,
    ).to_pylist()  # fmt: skip
    for side, sign in (("proponent", -1), ("opponent", 1)):
        rows = [r for r in table if (r["method"], r["side"]) == ("saliency-if", side)]
        assert [r["row"] for r in rows] == sorted(range(len(TEXTS)), key=lambda n: sign * of_row[n])[:6]
        assert [r["score"] for r in rows] == pytest.approx([of_row[r["row"]] for r in rows], rel=2e-3)
        words = [r for r in table if (r["method"], r["side"]) == ("saliency-if-token", side)]
        order = sorted(range(len(TEXTS)), key=lambda n: of_row[n])
        of_found = set(order if exact == "full" else [*order[:WORD_ROWS], *order[-WORD_ROWS:]])
        wanted = sorted((key for key in of_word if key[0] in of_found), key=lambda key: sign * of_word[key])[:6]
        scale = max(map(abs, of_word.values()))
        found = [of_word[r["row"], (r["span_start"], r["span_end"])] for r in words]
        assert found == pytest.approx([of_word[key] for key in wanted], abs=1e-4 * scale)
        assert [r["score"] for r in words] == pytest.approx(found, abs=1e-3 * scale)
    at = text.index(word)
    assert {(r["query_span_start"], r["query_span_end"]) for r in table} == {(at, at + len(word))}


@pytest.mark.parametrize("scope", ["head", "all"])
def test_every_curvature_takes_saliency_and_candidates_find_the_full_ranking(retriever, scope):
    choices = {"methods": ["saliency-if", "saliency-if-token"], "top": 4, "scope": scope}
    some, full = (
        {key: [(r["row"], r["score"], r["span_start"]) for r in mine] for key, mine in by_method(table).items()}
        for table in (
            retriever.retrieve(QUERIES, candidates=len(TEXTS), **choices),
            retriever.retrieve(QUERIES, exact="full", **choices),
        )
    )
    assert [row for row, *_ in some["saliency-if"]] == [row for row, *_ in full["saliency-if"]]
    scores = [score for _, score, _ in full["saliency-if"]]
    assert [score for _, score, _ in some["saliency-if"]] == pytest.approx(scores, rel=1e-4)


def by_method(table):
    rows = table.to_pylist()
    return {name: [r for r in rows if r["method"] == name] for name in ("saliency-if", "saliency-if-token")}


@pytest.mark.parametrize("exact", ["rerank", "full"])
def test_words_found_do_not_depend_on_how_many_are_asked_for(retriever, exact):
    assert len(TEXTS) > 2 * WORD_ROWS
    choices = {"methods": ["saliency-if-token"], "scope": "all", "curvature": "identity", "exact": exact}
    few, many = (retriever.retrieve(QUERIES, top=top, **choices).to_pylist() for top in (2, 12))
    assert [r["score"] for r in few] == [r["score"] for r in many if r["rank"] <= 2]
    facts = json.loads(retriever.retrieve(QUERIES, top=2, **choices).schema.metadata[b"forebear"])["methods"]
    assert facts["saliency-if-token"]["recall"] == (1.0 if exact == "full" else None)


def test_at_the_head_all_rows_are_ranked_from_what_is_stored(retriever):
    found = retriever.retrieve(QUERIES, methods=["saliency-if"], top=6)
    facts = json.loads(found.schema.metadata[b"forebear"])["methods"]["saliency-if"]
    assert (facts["recall"], facts["candidates"]) == (1.0, None)
    full = retriever.retrieve(QUERIES, methods=["saliency-if"], top=6, exact="full")
    assert found["row"].to_pylist() == full["row"].to_pylist()
    assert found["score"].to_pylist() == pytest.approx(full["score"].to_pylist(), rel=1e-4)


def test_the_word_is_the_most_salient_one_or_the_one_that_is_named(retriever):
    classifier = load_classifier(retriever.index.manifest.checkpoints[-1].path)
    targets = np.array([1, 0])
    maps = saliency(classifier, [QUERIES], targets, form="summed-gradient")
    best = [max(m.words, key=lambda w: w.value) for m in maps]
    assert salient_words(classifier, [QUERIES], targets, None) == [Span(w.column, w.start, w.end) for w in best]
    assert salient_words(classifier, [["A dull , DULL film"]], targets[:1], "dull") == [Span(0, 2, 6)]
    with pytest.raises(InputError, match=r"test row 8 has no word 'film'"):
        salient_words(classifier, [QUERIES], targets, "film", [7, 8, 9])
    with pytest.raises(InputError, match="test row 0 has no word that the model reads"):
        salient_words(classifier, [[""]], targets[:1], None)


def test_results_state_the_word_and_no_spans_that_were_not_used(retriever):
    table = retriever.retrieve(QUERIES[:1], methods=["saliency-if-token", "if+"], top=2, word="film")
    facts = json.loads(table.schema.metadata[b"forebear"])["methods"]
    assert facts["saliency-if-token"]["word"] == "film"
    assert "spans" not in facts["saliency-if-token"]
    assert facts["if+"]["spans"] == "clauses"


def test_what_means_nothing_is_refused(retriever):
    with pytest.raises(InputError, match='exact="none" is not of saliency-if'):
        retriever.retrieve(QUERIES, methods=["saliency-if"], exact="none")
    with pytest.raises(InputError, match="saliency-if scores spans or asks of a word"):
        retriever.scores(QUERIES, "saliency-if")
