"""Spans of aspects by a question-answering reader (Span paper): the answer to "How is the X?" in the row's text.

Any SQuAD-2 reader of transformers. The question is asked in eleven ways. An answer counts if its score, the
sum of its start and end logits, exceeds the score of "no answer" (both logits at the start token), and if it is not the
whole text; the answer that exceeds it most is the span. Without such an answer, the span is the sentences around the
term's first occurrence. Of a text beyond the reader's longest input, the beginning is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from forebear.errors import InputError, ModelError, NonFiniteError
from forebear.indexer.model.device.arithmetic import repeatable
from forebear.indexer.model.device.copies import Fetched, one_late
from forebear.indexer.model.device.memory import moved, run_batches
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.encoding import plan_batches
from forebear.indexer.model.loading import load_tokenizer, resolve_model_name
from forebear.indexer.model.network.batches import pad_batch
from forebear.indexer.model.network.pretrained import load_pretrained
from forebear.indexer.model.network.probe import padding_matters
from forebear.indexer.model.network.tokenizer import input_limit
from forebear.indexer.spans.text import Finder, Span, covering, place_of_term, split_text, trimmed

QUESTIONS = (
    "How is the {}?",
    "How was the {}?",
    "How are the {}?",
    "How were the {}?",
    "What is the {} like?",
    "What was the {} like?",
    "What about the {}?",
    "How good is the {}?",
    "How bad is the {}?",
    "What do they say about the {}?",
    "What do you think of the {}?",
)
MAX_ANSWER_PIECES = 30
LONGEST = 512  # word pieces of a question and a text: indexes hold spans that were found with this limit
CACHED_ROWS = 1 << 17


@dataclass(frozen=True)
class Reader:
    """A question-answering model, in ``eval()`` mode.

    Attributes:
        name: The folder or hub name that the model was loaded from.
        model: The network.
        tokenizer: The tokenizer of the model, a fast one.
        max_length: Longest question and text together, in word pieces.
        equal_lengths: Whether answers depend on padding, so that only rows of one length share a batch.
    """

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    equal_lengths: bool = False

    def answers(self, questions: Sequence[str], text: str) -> list[tuple[float, int, int]]:
        """The best answer to each question: how far its score exceeds that of no answer, and its characters.

        Raises:
            NonFiniteError: A logit is NaN or infinite.
        """
        encoded = self.tokenizer(
            list(questions), [text] * len(questions), truncation=True, max_length=self.max_length,
            padding=False, return_offsets_mapping=True,
        )  # fmt: skip
        keys = [key for key in encoded if key in self.tokenizer.model_input_names]
        rows = [{key: encoded[key][i] for key in keys} for i in range(len(questions))]
        logits = self._logits(rows)
        out = []
        for i, row in enumerate(rows):
            pieces = np.array([column == 1 for column in encoded.sequence_ids(i)])
            start, end = logits[i]
            if not (np.isfinite(start).all() and np.isfinite(end).all()):
                raise NonFiniteError(f"{self.name}: a logit for {questions[i]!r} is NaN or infinite. Check the reader.")
            null = row["input_ids"].index(self.tokenizer.cls_token_id)
            score, a, b = best_answer(start, end, pieces)
            places = encoded["offset_mapping"][i]
            out.append((score - float(start[null] + end[null]), int(places[a][0]), int(places[b][1])))
        return out

    def _logits(self, rows: Sequence[dict[str, list[int]]]) -> list[np.ndarray]:
        """Logits of an answer's start and end at the word pieces of each row, ``(2, t)`` float64."""
        lengths = [len(row["input_ids"]) for row in rows]
        out = [np.empty(0)] * len(rows)

        def run(positions: list[int]) -> Fetched:
            with torch.no_grad(), repeatable(self.model.device):
                output = self.model(**pad_batch(self.tokenizer, [rows[i] for i in positions], self.model.device))
                return Fetched(torch.stack([output.start_logits, output.end_logits], dim=1).double())

        plan = plan_batches(lengths, len(rows) * max(lengths), equal_lengths=self.equal_lengths)
        batches = run_batches(
            map(sorted, plan), run, lengths=lengths, device=self.model.device, name="question {} of a row".format
        )
        for positions, (both,) in one_late(batches):
            for i, values in zip(positions, both, strict=True):
                out[i] = values[:, : lengths[i]]
        return out


def best_answer(start: np.ndarray, end: np.ndarray, pieces: np.ndarray) -> tuple[float, int, int]:
    """Largest start[a] + end[b] over the text's word pieces, a <= b < a + 30; ties go to the earlier a, then b.

    Args:
        start: Logits ``(t,)``.
        end: Logits ``(t,)``.
        pieces: Whether each position is a word piece of the text, ``(t,)`` bool; if none is, the score is -inf.
    """
    places = np.arange(len(start))
    length = places[None, :] - places[:, None]
    allowed = pieces[:, None] & pieces[None, :] & (length >= 0) & (length < MAX_ANSWER_PIECES)
    scores = np.where(allowed, start[:, None] + end[None, :], -np.inf)
    a, b = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[a, b]), int(a), int(b)


def load_reader(name: str, device: str = "auto") -> Reader:
    """Load a question-answering model from a folder or hub name, to run on a device.

    Raises:
        ModelError: There is no such model, it lacks weights, or its tokenizer does not give the places of word pieces.
    """
    from transformers import AutoModelForQuestionAnswering

    path = resolve_model_name(name)
    model, info = load_pretrained(
        AutoModelForQuestionAnswering, path, output_loading_info=True, dtype=torch.float32
    )  # fmt: skip
    if info["missing_keys"]:
        raise ModelError(
            f"{path} stores no weights for {sorted(info['missing_keys'])[0]}: its answers would be random. Give a "
            "model fine-tuned on SQuAD 2."
        )
    tokenizer = load_tokenizer(path, model)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.cls_token_id is None:
        raise ModelError(
            f"{path}: {type(tokenizer).__name__} does not say where word pieces stand, or has no start token. Give a "
            "reader with a fast tokenizer (tokenizer.json)."
        )
    limit = min(input_limit(model, tokenizer, None, path), LONGEST)
    model = model.eval()

    def starts(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(**batch).start_logits
        return logits

    equal_lengths = padding_matters(starts, tokenizer, limit, model.device, path)
    return Reader(path, moved(model, pick_device(device), path), tokenizer, limit, equal_lengths)


def read_aspect(reader: Reader, text: str, term: str) -> tuple[int, int] | None:
    """Start and end of what a text says of a term; None if either is empty, or if the text does not have the term."""
    term, whole = term.strip(), trimmed(text, 0, len(text))
    if not term or whole is None:
        return None
    answers = [
        (margin, place)
        for margin, a, b in reader.answers([question.format(term) for question in QUESTIONS], text)
        if margin > 0 and (place := trimmed(text, a, b)) not in (None, whole)
    ]
    if answers:
        return max(answers, key=lambda answer: answer[0])[1]  # of equal ones the first question's
    place = place_of_term(text, term)
    return None if place is None else covering(split_text(text, "sentences"), *place)


def reader_finder(name: str, device: str = "auto") -> Finder:
    """A finder of the span of an aspect pair (text, term); loads the reader at the first row, and caches answers."""
    loaded = lru_cache(maxsize=1)(lambda: load_reader(name, device))
    place = lru_cache(maxsize=CACHED_ROWS)(lambda text, term: read_aspect(loaded(), text, term))

    def find(texts: Sequence[str], _row: dict[str, Any], _row_name: str) -> list[Span]:
        if len(texts) != 2:
            raise InputError(f"--spans reader:{name} is of pairs: what the first text says of the second one.")
        span = place(texts[0], texts[1])
        return [] if span is None else [Span(0, *span)]

    return find
