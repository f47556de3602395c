"""Explanations: marks against the tokenizer, sums against scores, the page as a browser sees it, the terminal."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from page_outline import Outline, outline
from tiny import labels, make_tiny_model, sentences
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from forebear import (
    BuildOptions,
    InputError,
    NonFiniteError,
    OutputExistsError,
    QuerySpec,
    Retriever,
    build_index,
    choose_model,
    rows_from_texts,
)
from forebear.cli.main import run
from forebear.cli.screen import console
from forebear.evaluation.explain.explaining import chosen_methods, default_methods, explain
from forebear.evaluation.explain.explanation import FORMULAS, Explanation, FoundRow
from forebear.evaluation.explain.marks import Piece, list_words, locate, mark, shorten, write_alike
from forebear.evaluation.explain.page import check_page, render_page, write_page
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.loading import make_classifier
from forebear.retriever.saliency.maps import FORMS, saliency

HOSTILE = '<script>alert("x")</script> & <b onclick=go()> the good </style> film'
NAMES = ["<i>bad</i>", 'good & "great"']
QUERY = "a good film was not dull and the plot was good"
PAIR = ("the good actor saw a film", "the actor was good")
N_ROWS = 40


@dataclass(frozen=True)
class World:
    """A tiny model and an index of it, words included."""

    folder: Path
    texts: list[Any]
    retriever: Retriever

    def planted(self, **columns: list[Any]) -> Planted:
        """A retriever whose answers have these columns."""
        planted = Planted(self.folder / "index", model=self.retriever.classifier())
        planted.columns = columns
        return planted


class Planted(Retriever):
    """Asks as usual, and puts other columns into the answer."""

    columns: dict[str, list[Any]]

    def retrieve(self, queries: Any, **choices: Any) -> pa.Table:
        table = super().retrieve(queries, **choices)
        for name, values in self.columns.items():
            if name in table.column_names:
                table = table.drop_columns([name])
            kinds = {"word_ids": pa.list_(pa.int32()), "words": pa.list_(pa.string())}
            table = table.append_column(name, pa.array(values, kinds.get(name)))
        return table


def build(folder: Path, texts: list[Any], kind: str, stores: tuple[str, ...] = ("features", "words")) -> World:
    model = make_tiny_model(folder / "model", kind, seed=3)
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    (model / "config.json").write_text(json.dumps(config))
    source = rows_from_texts(texts, labels(len(texts)))
    options = BuildOptions(stores=stores, words_tops=(0, 10), shard_rows=16)
    index = build_index(source, folder / "index", choose_model(str(model)).checkpoints, options)
    return World(folder, texts, Retriever(index))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("explain"), [*sentences(N_ROWS - 1, seed=1), HOSTILE], "bert")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    texts = list(zip(sentences(N_ROWS, seed=2), sentences(N_ROWS, seed=3, high=6), strict=True))
    return build(tmp_path_factory.mktemp("explain-pairs"), texts, "roberta")


@pytest.fixture(scope="module")
def without_words(tmp_path_factory):
    return build(tmp_path_factory.mktemp("explain-plain"), sentences(20, seed=4), "bert", ("features",))


def joined(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text for piece in pieces)


def marked(pieces: tuple[Piece, ...]) -> list[str]:
    return [piece.text for piece in pieces if piece.value is not None]


def found_rows(explanation: Explanation, method: str) -> list[FoundRow]:
    return [row for answer in explanation.answers if answer.method == method for s in answer.sides for row in s.rows]


# Marks.


def test_pieces_join_to_the_text_and_each_character_gets_the_sum_of_its_values():
    rng = np.random.default_rng(0)
    text = "  The café 😀\n\n was\tgood, naïve 漢字 and good  "
    for _ in range(100):
        starts = rng.integers(0, len(text), size=10)
        spans = [(int(s), int(min(len(text), s + rng.integers(0, 7))), int(rng.integers(0, 6))) for s in starts]
        values = {key: float(rng.normal()) for key in range(5)}
        pieces = mark(text, spans, values, (0, len(text)))
        assert joined(pieces) == text
        found = [piece.value for piece in pieces for _ in piece.text]
        for i, character in enumerate(text):
            keys = {key for start, end, key in spans if start <= i < end and key in values}
            if not character.isspace():
                assert found[i] == (pytest.approx(sum(values[key] for key in keys)) if keys else None)


def test_white_space_at_the_ends_of_a_span_is_not_marked():
    pieces = mark("a  good film", [(1, 7, 0), (7, 8, 1)], {0: 1.0, 1: 1.0}, (0, 12))
    assert marked(pieces) == ["good"]


def test_a_mark_says_its_sign_and_its_strength_beside_the_strongest():
    values = {0: 2.0, 1: -1.0, 2: 0.5, 3: -0.1, 4: 0.001, 5: 0.0}
    pieces = mark("abcdef", [(i, i + 1, i) for i in range(6)], values, (0, 6), {0: "+2.0"})
    assert [piece.level for piece in pieces] == [3, 3, 2, 1, 0, 0]
    assert [piece.note for piece in pieces] == ["+2.0", "-", "+", "-", "", ""]


def test_what_truncation_cuts_off_is_said_to_be_unread():
    pieces = mark("one two three ", [(0, 3, 0)], {0: 1.0}, (0, 7))
    assert [(p.text, p.read) for p in pieces] == [("one", True), (" two", True), (" three ", False)]
    assert mark("one   ", [], {}, (0, 3))[-1].read  # nothing but white space was cut off


def test_numbers_of_a_list_are_written_alike():
    assert write_alike([0.31416, -0.00123, 0.0]) == ["+0.3142", "-0.0012", "0.0000"]
    assert write_alike([123.456, -0.5]) == ["+123.5", "-0.5"]
    assert write_alike([1.2345e-7, -3e-9]) == ["+1.235e-07", "-0.030e-07"]
    assert write_alike([2.5e8]) == ["+2.500e+08"]
    assert write_alike([0.314], digits=2) == ["+0.31"]
    assert write_alike([]) == []
    assert write_alike([0.0]) == ["0.000"]
    with pytest.raises(NonFiniteError):
        write_alike([1.0, math.nan])


def test_lists_of_words_are_ordered_summed_and_shortened():
    words, total = list_words(["a", "b", "c", "d"], [0.1, -0.4, 0.2, 0.2])
    assert [(w.text, w.number, w.level) for w in words] == [
        ("b", "-0.4000", 3), ("c", "+0.2000", 3), ("d", "+0.2000", 3), ("a", "+0.1000", 2),
    ]  # fmt: skip
    assert total == "+0.1000"
    assert [w.share for w in words] == [1.0, 0.5, 0.5, 0.25]
    assert shorten(words, 4) == words
    assert [(w.text, w.number) for w in shorten(words, 2)] == [("b", "-0.4000"), ("3 more", "+0.5000")]
    assert list_words([], []) == ((), "0.000")


def byte_classifier(folder: Path, *, trim_offsets: bool) -> Classifier:
    """A tiny RoBERTa over bytes and a few merges; its offsets may hold the space before a word."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    merges = [("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("Ġgoo", "d")]
    vocab = {w: i for i, w in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets, add_prefix_space=False
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=40, **dict(zip(names, special, strict=True))
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(make_tiny_model(folder, "roberta"))
    model.resize_token_embeddings(len(vocab))
    return make_classifier(model, tokenizer, name="bytes", device=torch.device("cpu"))


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_byte_level_tokens_are_marked_where_they_stand(tmp_path, trim_offsets):
    classifier = byte_classifier(tmp_path / "m", trim_offsets=trim_offsets)
    text = "so good é 😀 good"
    (places,) = locate(classifier, [[text]])
    encoded = classifier.tokenizer(text)["input_ids"]
    good = classifier.tokenizer.convert_tokens_to_ids("Ġgood")
    assert encoded.count(good) == 2
    assert marked(mark(text, places.pieces[0], {good: 1.0}, places.read[0])) == ["good", "good"]
    face = classifier.tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert len(set(face)) == 4  # four bytes of one character
    pieces = mark(text, places.pieces[0], dict(zip(face, [1.0, 2.0, 4.0, 8.0], strict=True)), places.read[0])
    assert ("😀", 15.0) in [(p.text, p.value) for p in pieces]
    assert joined(pieces) == text


def test_places_are_those_of_the_truncated_row(world):
    classifier = world.retriever.classifier()
    (places,) = locate(classifier, [["good film " * 30]])
    assert len(places.pieces[0]) == classifier.max_length - 2
    assert places.read == ((0, places.pieces[0][-1][1]),)
    (short,) = locate(classifier, [["good film  "]])
    assert short.read == ((0, 11),)


# Explanations.


def test_the_prediction_is_the_models(world):
    explanation = explain(world.retriever, QUERY, QuerySpec(methods=("gc",), top=2))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world.folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "model")
    with torch.no_grad():
        wanted = torch.softmax(model(**tokenizer(QUERY, return_tensors="pt")).logits[0].double(), dim=0)
    found = {name: value for name, value, _ in explanation.probabilities}
    assert [found[name] for name in NAMES] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert explanation.prediction == explanation.target == NAMES[int(wanted.argmax())]
    assert explanation.probabilities[0][0] == explanation.prediction


@pytest.mark.parametrize("form", FORMS)
def test_saliency_is_shown_word_by_word(world, form):
    other = min(NAMES, key=lambda name: name == explain(world.retriever, QUERY, QuerySpec(top=1)).prediction)
    explanation = explain(world.retriever, QUERY, QuerySpec(methods=("gc",), top=1, target=other), form=form)
    assert explanation.target == other
    classifier = world.retriever.classifier()
    (truth,) = saliency(classifier, [[QUERY]], np.array([NAMES.index(other)]), form=form)
    pieces = explanation.texts[0].pieces
    assert joined(pieces) == QUERY
    assert [(p.text, p.value) for p in pieces if p.value is not None] == [(w.text, w.value) for w in truth.words]
    assert [w.value for w in explanation.words] == sorted((w.value for w in truth.words), key=lambda v: -abs(v))
    assert float(explanation.ends) == pytest.approx(truth.values[truth.special].sum(), abs=1e-3, rel=1e-2)
    numbered = [p for p in pieces if len(p.note) > 1]
    assert len(numbered) == 6
    assert min(abs(p.value) for p in numbered) >= sorted(abs(w.value) for w in truth.words)[-6]


def test_rows_are_those_of_the_answer_and_facts_those_of_the_index(world):
    spec = QuerySpec(methods=("if", "nn-euc"), top=4)
    explanation = explain(world.retriever, QUERY, spec)
    table = world.retriever.retrieve([QUERY], methods=["if", "nn-euc"], top=4).to_pylist()
    found = [row for method in ("if", "nn-euc") for row in found_rows(explanation, method)]
    assert [row.row for row in found] == [row["row"] for row in table]
    index = world.retriever.index
    for row, truth in zip(found, table, strict=True):
        assert float(row.score) == pytest.approx(truth["score"], rel=2e-2, abs=1e-4 * abs(truth["score"]))
        assert (row.label, row.prediction) == (truth["label"], truth["prediction"])
        assert row.loss == index.losses[row.row]
        assert joined(row.texts[0].pieces) == world.texts[row.row]
        assert marked(row.texts[0].pieces) == []
        assert (row.words, row.total, row.query_texts) == ((), "", ())
    assert not any(answer.has_words for answer in explanation.answers)


@pytest.mark.parametrize("method", ["tracin-we", "tracin-we-topk", "tracin-tfidf"])
def test_contributions_add_up_to_the_score(world, method):
    explanation = explain(world.retriever, QUERY, QuerySpec(methods=(method, "gc"), top=6))
    table = world.retriever.retrieve([QUERY], methods=[method], top=6).to_pylist()
    rows = found_rows(explanation, method)
    assert len(rows) == 12
    for row, truth in zip(rows, table, strict=True):
        assert sum(word.value for word in row.words) == pytest.approx(truth["score"], rel=1e-6, abs=1e-12)
        digit = 10.0 ** -len(row.total.split("e")[0].partition(".")[2]) * 10 ** int((row.total + "e0").split("e")[1])
        assert float(row.total) == pytest.approx(truth["score"], abs=0.51 * digit)
        written = sum(float(word.number) for word in row.words)
        assert written == pytest.approx(float(row.total), abs=0.51 * digit * (len(row.words) + 1))
    assert not any(row.total for row in found_rows(explanation, "gc"))


def test_shared_words_are_marked_in_the_row_and_in_the_query(world):
    explanation = explain(world.retriever, QUERY, QuerySpec(methods=("tracin-we",), top=15))
    for row in found_rows(explanation, "tracin-we"):
        mine, shared = world.texts[row.row], set(QUERY.split()) & set(re.findall(r"\w+", world.texts[row.row]))
        assert joined(row.texts[0].pieces) == mine
        assert set(marked(row.texts[0].pieces)) == shared
        assert marked(row.query_texts[0].pieces) == [word for word in QUERY.split() if word in shared]
        values = {word.text: word.value for word in row.words}
        assert set(values) == shared | {"[CLS]", "[SEP]"}
        for piece in (*row.texts[0].pieces, *row.query_texts[0].pieces):
            if piece.value is not None:
                assert piece.value == values[piece.text]
                assert piece.note == ("" if piece.level == 0 else "+" if piece.value > 0 else "-")


def test_pairs_are_marked_in_both_columns(pairs):
    explanation = explain(pairs.retriever, PAIR, QuerySpec(methods=("tracin-we",), top=10))
    assert [text.name for text in explanation.texts] == ["premise", "hypothesis"]
    assert tuple(joined(text.pieces) for text in explanation.texts) == PAIR
    assert [marked(text.pieces) for text in explanation.texts] == [text.split() for text in PAIR]
    assert sorted((w.text, w.where) for w in explanation.words) == sorted(
        (word, name) for name, text in zip(("premise", "hypothesis"), PAIR, strict=True) for word in text.split()
    )
    wanted = {word for text in PAIR for word in text.split()}
    for row in found_rows(explanation, "tracin-we"):
        texts = pairs.texts[row.row]
        words = [[word for word in text.split() if word in wanted] for text in texts]
        assert [marked(text.pieces) for text in row.texts] == words


def test_an_empty_text_is_explained_too(world):
    explanation = explain(world.retriever, "", QuerySpec(methods=("tracin-we", "gc"), top=2))
    assert explanation.words == ()
    assert explanation.texts[0].pieces == ()
    assert {word.text for row in found_rows(explanation, "tracin-we") for word in row.words} == {"[CLS]", "[SEP]"}
    page = render_page(explanation)
    assert "The text has no words." in page
    assert "(empty)" in page


def test_planted_contributions_are_shown_as_they_are(world):
    good, film = world.retriever.classifier().tokenizer.convert_tokens_to_ids(["good", "film"])
    row = N_ROWS - 1  # the hostile one
    answer = world.planted(
        row=[row, row], word_ids=[[film, good], None], words=[["film", " good"], None],
        contributions=[[-0.75, 0.25], None], score=[-0.5, -0.5],
    )  # fmt: skip
    first, second = found_rows(explain(answer, QUERY, QuerySpec(methods=("gc",), top=1)), "gc")
    assert [(w.text, w.number) for w in first.words] == [("film", "-0.7500"), ("good", "+0.2500")]
    assert (first.score, first.total) == ("-0.5000", "-0.5000")
    assert [(p.text, p.value) for p in first.texts[0].pieces if p.value] == [("good", 0.25), ("film", -0.75)]
    assert [(p.text, p.note) for p in first.query_texts[0].pieces if p.value] == [
        ("good", "+"), ("film", "-"), ("good", "+"),
    ]  # fmt: skip
    assert second.total == ""


def test_a_row_that_shares_no_word_says_so(world):
    answer = world.planted(word_ids=[[], []], words=[[], []], contributions=[[], []], score=[0.0, 0.0])
    explanation = explain(answer, QUERY, QuerySpec(methods=("gc",), top=1))
    assert [row.total for row in found_rows(explanation, "gc")] == ["0.000", "0.000"]
    assert "no shared word" in render_page(explanation)


def test_what_one_would_not_expect_of_a_ranking_is_said(world):
    notes = {}
    cases = {"gc": [0.9, 0.5], "if": [-0.5, -0.9], "nn-euc": [-0.5, -0.9], "nn-cos": [0.9, 0.5]}
    for method, scores in cases.items():
        answer = world.planted(score=scores, exact=[True, method != "if"])
        (one,) = explain(answer, QUERY, QuerySpec(methods=(method,), top=1)).answers
        notes[method] = [side.notes for side in one.sides]
    above = "1 of 1 opponents of gc have scores above 0: none opposes the target, they support it least."
    assert notes["gc"] == [(), (above,)]
    assert notes["nn-euc"] == notes["nn-cos"] == [(), ()]  # similarities, whose sign says nothing of support
    below = "1 of 1 proponents of if have scores below 0: none supports the target, they oppose it least."
    assert notes["if"][0][0] == below
    assert notes["if"][1] == ("The scores are approximate.",)
    spec = QuerySpec(methods=("if",), top=1, curvature="cg")
    note = explain(world.retriever, QUERY, spec).answers[0].sides[0].notes[-1]
    assert re.fullmatch(r"H\^-1 was solved to a relative residual of \S+ in \d+ iterations\.", note)


def asked(explanation: Explanation, method: str) -> list[str]:
    """What of the query is pointed at."""
    (answer,) = (a for a in explanation.answers if a.method == method)
    return [piece.text for column in answer.asked for piece in column.pieces if piece.asked]


def test_spans_are_marked_with_their_score_and_the_querys_is_pointed_at(world):
    spec = QuerySpec(methods=("if++", "tracin+"), top=2, spans="words")
    explanation = explain(world.retriever, QUERY, spec)
    found = world.retriever.retrieve([QUERY], methods=spec.methods, top=2, spans="words").to_pylist()
    for method in spec.methods:
        wanted = [r for r in found if r["method"] == method]
        rows = found_rows(explanation, method)
        assert [row.row for row in rows] == [r["row"] for r in wanted]
        for row, r in zip(rows, wanted, strict=True):
            (piece,) = (p for p in row.texts[0].pieces if p.value is not None)
            assert joined(row.texts[0].pieces) == world.texts[row.row]
            assert (piece.text, piece.value) == (r["span"], pytest.approx(r["score"]))
            assert float(piece.note) == pytest.approx(r["score"], rel=0.06)
    own = next(r for r in found if r["method"] == "if++")
    assert asked(explanation, "if++") == [QUERY[own["query_span_start"] : own["query_span_end"]]]
    assert asked(explanation, "tracin+") == []


@pytest.mark.parametrize("word", [None, "film"])
def test_influence_on_saliency_marks_each_word_with_its_own_score(world, word):
    spec = QuerySpec(methods=("saliency-if",), top=3, word=word)
    explanation = explain(world.retriever, QUERY, spec)
    assert word is None or asked(explanation, "saliency-if") == [word]
    (salient,) = asked(explanation, "saliency-if")
    rows = found_rows(explanation, "saliency-if")
    several = {row.row for row in rows}
    ask = {"methods": ["saliency-if-token"], "word": salient}
    found = world.retriever.retrieve([QUERY], top=30, exact="full", **ask).to_pylist()
    truth = {(r["row"], r["span_start"]): r["score"] for r in found if r["row"] in several}
    assert len(truth) > len(several)
    seen_words = 0
    for row in rows:
        start = 0
        for piece in row.texts[0].pieces:
            if (row.row, start) in truth and piece.value is not None:
                assert piece.value == pytest.approx(truth[row.row, start], rel=1e-3, abs=1e-6)
                seen_words += 1
            start += len(piece.text)
    assert seen_words >= len(several)


def test_spans_and_influence_on_the_page_and_on_the_terminal(world, tmp_path, capsys):
    more = ["--text", QUERY, "--spans", "words", "--saliency-influence", "--word", "film", "--top", "2"]
    assert run(args(world, *more)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "asked about, a word (by summed-gradient saliency) of text: a good [film] was" in shown
    assert "saliency-if: proponents of the word's saliency" in shown
    assert "if++: proponents of" in shown
    assert run(args(world, *more, "--html", str(tmp_path / "a.html"))) == 0
    page = (tmp_path / "a.html").read_text()
    assert page.count('<mark class="asked"><span>film</span></mark>') == 1
    assert page.count('class="asked"') == 2
    assert "raises the saliency of the boxed word most" in page


def test_methods_for_spans_and_saliency_are_added_once(world):
    both = {"spans": True, "saliency_influence": True}
    assert chosen_methods(world.retriever, ["gc"], **both) == ("gc", "if++", "saliency-if")
    given = ["tracin+", "saliency-if"]
    assert chosen_methods(world.retriever, given, **both) == tuple(given)
    none = {"spans": False, "saliency_influence": False}
    assert chosen_methods(world.retriever, [], **none) == default_methods(world.retriever)
    with pytest.raises(InputError, match="'if\\+\\+\\+' is not known"):
        chosen_methods(world.retriever, ["if+++"], **none)


def test_default_methods_follow_from_the_index(world, without_words):
    assert default_methods(world.retriever) == ("tracin-we-topk", "gc")
    assert default_methods(without_words.retriever) == ("gc",)


def test_provenance_names_index_methods_checkpoints_and_command(world):
    spec = QuerySpec(methods=("if", "tracin-we"), top=1)
    lines = explain(world.retriever, QUERY, spec, command="forebear explain ...").provenance
    assert lines["index digest"] == world.retriever.index.manifest.digest()
    assert "<H^-1 g_q, g_n>" in lines["if"]
    assert "curvature exact" in lines["if"]
    assert str(N_ROWS) in lines["training rows"]
    assert any(name.startswith("checkpoint ") and "eta" in line for name, line in lines.items())
    assert "forebear" in lines["versions"]
    assert lines["command"] == "forebear explain ..."
    assert set(FORMULAS) == set(FORMS)


@pytest.mark.parametrize(
    ("query", "choices", "form", "message"),
    [
        (QUERY, {}, "loudness", "form='loudness': expected gradient-x-input or summed-gradient"),
        (QUERY, {"target": "gold"}, FORMS[0], "no label"),
        (QUERY, {"target": "sideways"}, FORMS[0], "'sideways'"),
        (QUERY, {"top": 0}, FORMS[0], "top=0"),
        (QUERY, {"methods": ("sbert-cos",)}, FORMS[0], r'stores=\("features", "sbert"\)'),
        (QUERY, {"scope": "all"}, FORMS[0], r'scopes=\("head", "all"\)'),
        (PAIR, {}, FORMS[0], r"2 text\(s\)"),
    ],
)
def test_choices_are_checked_before_a_model_is_loaded(world, query, choices, form, message):
    unloaded = Retriever(world.folder / "index", model="nowhere/at/all")
    with pytest.raises(InputError, match=message):
        explain(unloaded, query, QuerySpec(**choices), form=form)


# The page.


@pytest.fixture(scope="module")
def page(world) -> str:
    spec = QuerySpec(methods=("tracin-we", "gc"), top=N_ROWS // 2)  # so that the hostile row is there
    return render_page(explain(world.retriever, HOSTILE, spec, command=f"forebear explain --text '{HOSTILE}'"))


@pytest.fixture(scope="module")
def seen(page) -> Outline:
    return outline(page)


def test_texts_and_labels_never_become_markup(page, seen):
    assert not {tag for tag, _ in seen.elements} & {"script", "img", "link", "iframe", "object", "u", "font"}
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert "<script" not in page
    assert page.count("</style>") == 1
    text = "".join(seen.text)
    assert HOSTILE in text  # in the command
    assert all(name in text for name in NAMES)
    assert NAMES[0] not in page


def test_the_page_stands_alone(page, seen):
    for tag, attributes in seen.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"https?:|@import|@font-face|url\(", page)
    assert "default-src 'none'" in page
    assert "{{" not in page
    assert "{%" not in page


def test_the_page_is_semantic_and_its_ids_resolve(page, seen):
    tags = [tag for tag, _ in seen.elements]
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert tags.count("h1") == tags.count("main") == 1
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(a["href"] or "")[1:] for _, a in seen.elements if "href" in a]
    targets += [a["aria-labelledby"] or "" for _, a in seen.elements if "aria-labelledby" in a]
    assert targets
    assert set(targets) <= set(ids)
    assert all(a.get("scope") for tag, a in seen.elements if tag == "th")
    assert all(a.get("title") for tag, a in seen.elements if tag == "mark" and "short" in (a["class"] or ""))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_marks_read_without_colour(world):
    """Every mark but the faintest has its sign or number beside it, and another line for each sign."""
    page = render_page(explain(world.retriever, QUERY, QuerySpec(methods=("tracin-we",), top=3)))
    body = page[page.index("<section") :]
    marks = re.findall(
        r'<mark class="(\w+) s(\d)[^"]*" title="([^"]*)"><span>[^<]*</span>(?:<sup>([^<]*)</sup>)?', body
    )
    assert len(marks) == body.count("<mark") > 20
    for side, level, title, note in marks:
        sign = {"supports": "+", "opposes": "\u2212"}[side]
        assert title.startswith(sign)
        assert title.endswith(side)
        assert note.startswith(sign) == (level != "0")
    assert {side for side, *_ in marks} == {"supports", "opposes"}
    style = page[: page.index("</style>")]
    assert "mark.supports span { text-decoration-style: solid" in style
    assert "mark.opposes span { text-decoration-style: dashed" in style
    assert "mark span { text-decoration: underline" in style


def test_a_text_that_is_cut_off_says_so_on_the_page_and_on_the_terminal(world, capsys):
    long = "good film " * 25
    page = "".join(outline(render_page(explain(world.retriever, long, QuerySpec(top=1)))).text)
    assert "[not read by the model: good film" in page
    assert run(["explain", "--index", str(world.folder / "index"), "--text", long, "--top", "1"]) == 0
    assert re.search(r"\[not read by\s+the\s+model:\s+\d+\s+characters", capsys.readouterr().out)


def test_a_page_is_written_whole_or_not_at_all(world, tmp_path, monkeypatch):
    explanation = explain(world.retriever, QUERY, QuerySpec(top=1))
    path = tmp_path / "new" / "page.html"
    write_page(explanation, path)
    assert path.read_text(encoding="utf-8") == render_page(explanation)
    with pytest.raises(OutputExistsError, match=r"page\.html exists.*force=True"):
        write_page(explanation, path)
    path.write_text("precious")

    def broken(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", broken)
        write_page(explanation, path, force=True)
    assert path.read_text() == "precious"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    write_page(explanation, path, force=True)
    assert "precious" not in path.read_text()


def test_a_page_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r'page\.pdf": expected a name ending in \.html'):
        check_page(tmp_path / "page.pdf", force=True)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_page(tmp_path / "folder.html", force=True)
    check_page(tmp_path / "new.html", force=False)


# The command.


def args(world: World, *more: Any) -> list[str]:
    return ["explain", "--index", str(world.folder / "index"), *map(str, more)]


def test_the_terminal_needs_no_colour_and_no_more_than_80_columns(pairs, capsys, monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 80)
    assert run(args(pairs, "--text", PAIR[0], "--pair", PAIR[1], "--method", "tracin-we,gc", "--top", 3)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    flat = " ".join(out.split())
    assert "The model predicts" in flat
    assert re.search(r"premise: the\([+-]", flat)
    assert re.search(r"good\([+-]0\.\d+\)", flat)  # a number
    assert "tracin-we: proponents of" in flat
    assert "gc: opponents of" in flat
    assert re.search(r"shared: .* = [+-]\d", flat)
    assert "<i>bad</i>" in flat
    words = set(re.sub(r"\([+-][^)]*\)", " ", flat).split())
    explanation = explain(pairs.retriever, PAIR, QuerySpec(methods=("tracin-we", "gc"), top=3))
    for row in found_rows(explanation, "tracin-we") + found_rows(explanation, "gc"):
        assert {str(row.row), row.score} <= words
        assert {word for text in pairs.texts[row.row] for word in text.split()} <= words  # nothing is cropped
        assert all(word.number in words for word in row.words)


def test_markup_in_texts_is_printed_as_it_is(world, capsys):
    assert run(args(world, "--text", "[red]a good[/red] film [/]", "--method", "gc", "--top", 1)) == 0
    assert "[red" in re.sub(r"\([^)]*\)", "", capsys.readouterr().out)


def test_the_command_writes_a_page_and_keeps_one_that_is_there(world, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert run(args(world, "--text", QUERY, "--html", path, "--top", 2)) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "page.html" in said.err
    page = path.read_text(encoding="utf-8")
    assert outline(page).text.count("Training rows by tracin-we-topk") == 1
    path.write_text("precious")
    assert run(args(world, "--text", QUERY, "--html", path)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_text() == "precious"
    assert run(args(world, "--text", QUERY, "--html", path, "--top", 2, "--force", "--quiet")) == 0
    assert capsys.readouterr().err == ""
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_choices_reach_the_answer(world, tmp_path):
    path = tmp_path / "page.html"
    more = [
        "--method",
        "if",
        "nn-dot",
        "--curvature",
        "identity",
        "--saliency",
        "summed-gradient",
        "--target",
        NAMES[0],
    ]
    assert run(args(world, "--text", QUERY, "--html", path, "--top", 1, *more)) == 0
    text = "".join(outline(path.read_text(encoding="utf-8")).text)
    assert "curvature identity" in text
    assert "Saliency by summed-gradient" in text
    assert "Training rows by nn-dot" in text
    assert f"“{NAMES[0]}”" in text


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--text", "a", "--html", "page.txt"], ".html"),
        (["--text", "a", "--saliency", "loud"], "'loud'"),
        (["--text", "a", "--method", "nonsense"], "'nonsense'"),
        (["--text", "a", "--target", "gold"], "no label"),
        (["--text", "a", "--pair", "b"], "2 text(s)"),
        (["--text", "a", "--method", "if", "--damping", "much"], "'much'"),
        (["--text", "a", "--recall", "0"], "--recall 0"),
        (["--text", "a", "--scope", "all"], "--scope head,all"),
        (["--pair", "b"], "--text"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(world, capsys, monkeypatch, more, part):
    def load(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("forebear.retriever.question.models.load_classifier", load)
    assert run(args(world, *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_words_that_are_not_stored_are_refused(without_words, capsys):
    assert run(args(without_words, "--text", "a film", "--method", "tracin-we-topk")) == 2
    assert "words" in capsys.readouterr().err
    assert run(args(without_words, "--text", "a film", "--top", 1)) == 0
    assert "gc: proponents" in capsys.readouterr().out


def test_help_shows_an_example_without_importing_torch():
    code = "import sys; from forebear.cli.main import run; run(['explain', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Example" in done.stdout
