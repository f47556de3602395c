"""Spans by a question-answering reader, against plain transformers calls and readers whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import make_tiny_model

from forebear import InputError, ModelError, NonFiniteError
from forebear.indexer.spans import aspect_reader as module
from forebear.indexer.spans.aspect_reader import QUESTIONS, Reader, best_answer, load_reader, read_aspect
from forebear.indexer.spans.finders import span_finder
from forebear.indexer.spans.text import Span

TEXT = "the music is very good. the film is dull and slow. the actor saw a bright red doctor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BertForQuestionAnswering with the tiny tokenizer."""
    path = make_tiny_model(tmp_path_factory.mktemp("reader"))
    torch.manual_seed(3)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig.from_pretrained(path))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(path)
    return path


def slow_answers(path, text, term):
    """(margin, answer's text) for each question: one unpadded row at a time, every pair of pieces tried."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    out = []
    for question in QUESTIONS:
        encoded = tokenizer(question.format(term), text, return_tensors="pt", return_offsets_mapping=True)
        places = encoded.pop("offset_mapping")[0].tolist()
        columns = encoded.sequence_ids(0)
        with torch.no_grad():
            found = model(**encoded)
        start, end = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        pairs = [
            (start[a] + end[b], places[a][0], places[b][1])
            for a in range(len(start))
            for b in range(a, min(a + 30, len(start)))
            if columns[a] == columns[b] == 1
        ]
        score, a, b = max(pairs, key=lambda pair: pair[0])
        out.append((score - start[0] - end[0], text[a:b]))
    return out


@pytest.mark.parametrize("text", [TEXT, "good film", "a sad slow scene"])
def test_answers_are_those_of_plain_calls(folder, text):
    reader = load_reader(str(folder))
    found = reader.answers([question.format("film") for question in QUESTIONS], text)
    wanted = slow_answers(folder, text, "film")
    assert [text[a:b] for _, a, b in found] == [answer for _, answer in wanted]
    assert [margin for margin, _, _ in found] == pytest.approx([margin for margin, _ in wanted], abs=1e-4)


def test_the_span_is_the_answer_that_exceeds_no_answer_most(folder):
    wanted = [(m, answer) for m, answer in slow_answers(folder, TEXT, "film") if m > 0 and answer.strip(" .") != TEXT]
    assert wanted
    start, end = read_aspect(load_reader(str(folder)), TEXT, "film")
    assert TEXT[start:end] == max(wanted)[1].strip(" .")


class Stub(torch.nn.Module):
    """Finds given words in the input, with given margins over no answer, the same for every question."""

    def __init__(self, tokenizer, answer, margin):
        super().__init__()
        self.device, self.calls = torch.device("cpu"), 0
        self.ids, self.margin = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else [], margin

    def forward(self, input_ids, **_):
        self.calls += 1
        start, end = torch.full(input_ids.shape, -50.0), torch.full(input_ids.shape, -50.0)
        start[:, 0] = end[:, 0] = 1.0
        for i, row in enumerate(input_ids.tolist()):
            places = [j for j in range(len(row)) if self.ids and row[j : j + len(self.ids)] == self.ids]
            for j in places[-1:]:
                start[i, j], end[i, j + len(self.ids) - 1] = 1.0 + self.margin, 1.0
        return SimpleNamespace(start_logits=start, end_logits=end)


def stub(folder, answer, margin=2.0) -> Reader:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Reader("stub", Stub(tokenizer, answer, margin), tokenizer, 40)


@pytest.mark.parametrize(
    ("answer", "margin", "term", "wanted"),
    [
        ("dull and slow", 2.0, "film", "dull and slow"),
        ("very good .", 2.0, "film", "very good"),  # trimmed
        ("dull and slow", -0.5, "film", "the film is dull and slow"),  # no answer: the sentence of the term
        (None, 2.0, "FILM", "the film is dull and slow"),
        (None, 2.0, "music", "the music is very good"),
        (None, 2.0, "judge", None),  # nowhere
        ("dull and slow", 2.0, "judge", "dull and slow"),  # the reader knows all the same
        ("dull and slow", 2.0, " ", None),
    ],
)
def test_known_answers(folder, answer, margin, term, wanted):
    found = read_aspect(stub(folder, answer, margin), TEXT, term)
    assert (None if found is None else TEXT[slice(*found)]) == wanted


def test_an_answer_that_is_the_whole_text_is_none(folder):
    text = "the film is dull. good."
    assert read_aspect(stub(folder, "the film is dull . good"), text, "film") == (0, 16)


def test_a_text_without_a_letter_has_no_span(folder):
    reader = stub(folder, None)
    assert read_aspect(reader, " ... ", "film") is None
    assert reader.model.calls == 0


def test_the_best_answer_keeps_order_length_and_ties():
    start, end = np.zeros(40), np.zeros(40)
    start[5] = end[4] = 10.0  # the wrong way round
    end[39] = 9.0  # too long from 5
    pieces = np.arange(40) > 2
    assert best_answer(start, end, pieces) == (10.0, 3, 4)
    assert best_answer(np.zeros(6), np.zeros(6), np.arange(6) > 3) == (0.0, 4, 4)
    start[0] = 99.0  # the question is no answer
    assert best_answer(start, end, pieces) == (10.0, 3, 4)


def test_as_an_option_of_spans_rows_are_read_once(folder, monkeypatch):

    made = stub(folder, "dull and slow")
    monkeypatch.setattr(module, "load_reader", lambda *_given: made)
    find = module.reader_finder("any/reader")
    for _ in range(3):
        assert find([TEXT, "film"], {}, "row 0") == [Span(0, TEXT.index("dull"), TEXT.index("slow") + 4)]
    assert made.model.calls == 1
    with pytest.raises(InputError, match="is of pairs"):
        find([TEXT], {}, "row 0")


def test_a_folder_as_an_option_of_spans(folder):
    find = span_finder(f"reader:{folder}")
    (span,) = find([TEXT, "film"], {}, "row 0")
    assert (span.start, span.end) == read_aspect(load_reader(str(folder)), TEXT, "film")


def test_what_is_no_reader_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="its answers would be random"):
        load_reader(str(make_tiny_model(tmp_path / "classifier")))
    with pytest.raises(ModelError, match="no such model folder"):
        span_finder(f"reader:{tmp_path}/nowhere")([TEXT, "film"], {}, "row 0")
    with pytest.raises(InputError, match="expected clauses"):
        span_finder("reader:")


def test_nan_is_an_error(folder):
    with pytest.raises(NonFiniteError, match="NaN"):
        read_aspect(stub(folder, "dull and slow", float("nan")), TEXT, "film")


def test_question_and_text_beyond_the_limit_are_cut_longest_first(folder):
    assert read_aspect(stub(folder, "dull and slow"), f"dull and slow {'film ' * 60}", "film") == (0, 13)
    late = f"{'film ' * 60}. dull and slow"
    start, end = read_aspect(stub(folder, "dull and slow"), late, "film")
    assert late[start:end] == ("film " * 60).strip()  # not read: the sentence of the term
    start, end = read_aspect(stub(folder, "dull and slow"), TEXT, "film " * 60)
    assert TEXT[start:end] == "dull and slow"


def test_nothing_to_choose_from_is_no_answer():
    assert best_answer(np.zeros(4), np.zeros(4), np.zeros(4, bool))[0] == -np.inf


def test_a_reader_runs_on_the_device_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "load_reader", lambda *given: asked.append(given))
    monkeypatch.setattr(module, "read_aspect", lambda *_given: None)
    span_finder("reader:any/reader", 0, "cuda:1")([TEXT, "film"], {}, "row 0")
    assert asked == [("any/reader", "cuda:1")]
