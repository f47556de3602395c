"""One prediction explained: the words that speak for it, and the training rows behind it with the words they share.

What the page and the terminal show is put together here, down to the numbers as they are written, so that both say the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.explain.explanation import FORMULAS, Answer, Explanation, FoundRow, Side
from forebear.evaluation.explain.marks import MarkedText, Places, Word, list_words, locate, mark, point_at, write_alike
from forebear.indexer.curvature.convergence import convergence_phrase
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import computed_line
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.opening import rows_from_texts
from forebear.indexer.rows.row_format import SINGLE_LABEL
from forebear.indexer.spans.text import Span
from forebear.indexer.storage.manifest import library_versions
from forebear.retriever.answers.coverage import fit_lines
from forebear.retriever.answers.results import SIDES, user_columns
from forebear.retriever.answers.signs import note_of
from forebear.retriever.effects.kinds import effect_meaning
from forebear.retriever.question.methods import METHODS, pick_methods
from forebear.retriever.question.spec import QuerySpec, Question
from forebear.retriever.question.targets import choose_targets
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency.maps import FORMS, GRADIENT_X_INPUT, Saliency, saliency

WORD_METHOD, PLAIN_METHOD = "tracin-we-topk", "gc"
SALIENCY_METHOD = "saliency-if"
NUMBERED_WORDS = 6  # words of the query that carry their number in the text; the others carry their sign
NOTES = ("formula", "sign", "effect_note", "effect_measured")  # facts of a method that stand elsewhere on the page
NUMBERED_SPANS = 3  # the same in a training row


def default_methods(retriever: Retriever) -> tuple[str, ...]:
    """``tracin-we-topk`` where the index can answer it, and ``gc``."""
    return (WORD_METHOD, PLAIN_METHOD) if WORD_METHOD in retriever.available_methods() else (PLAIN_METHOD,)


def chosen_methods(
    retriever: Retriever, names: Sequence[str], *, spans: bool, saliency_influence: bool
) -> tuple[str, ...]:
    """The named or default methods; a method for spans or for influence on saliency is added if asked for."""
    chosen = [method.name for method in pick_methods(names)] if names else list(default_methods(retriever))
    if spans and not any(METHODS[name].spans for name in chosen if name in METHODS):
        chosen.append("if++" if "if" in retriever.available_methods() else "tracin++")
    if saliency_influence and SALIENCY_METHOD not in chosen:
        chosen.append(SALIENCY_METHOD)
    return tuple(chosen)


def explain(
    retriever: Retriever,
    query: str | tuple[str, str],
    spec: QuerySpec | Question,
    *,
    form: str = GRADIENT_X_INPUT,
    command: str = "",
) -> Explanation:
    """Explain the prediction for one text or pair of texts.

    Args:
        retriever: Over the index of the training rows.
        query: A text, or two for an index of pairs.
        spec: Methods, rows at each end, target and the other choices.
        form: Form of the saliency, one of ``FORMS``.
        command: The command that repeats the explanation, for the provenance.

    Raises:
        InputError: A choice is out of range or does not fit the index; raised before a model is loaded.
        ModelError: The model's tokenizer does not tell where words stand.
    """
    rows: Any = [query]
    source = rows_from_texts(rows)
    retriever.check_texts(source)
    question = _checked(retriever, spec, form)
    classifier, names = retriever.classifier(), retriever.label_names
    texts = (query,) if isinstance(query, str) else query
    columns = [[text] for text in texts]
    forward = run_forward(classifier, columns)
    targets = choose_targets(question.spec.target, forward.predictions, None, names, forward.loss)
    salient = saliency(classifier, columns, targets, form=form)[0]
    table = retriever.retrieve(source, spec=question)
    facts = retriever.facts(question)
    (places,) = locate(classifier, columns)
    results = table.to_pylist()
    passages = _read_passages(retriever, classifier, texts, places, results)
    influence: dict[int, list[tuple[Span, float]]] = {}
    if listed := [result["row"] for result in results if result["method"] == SALIENCY_METHOD]:
        word, entries = retriever.word_influence(texts, targets[0], np.array(listed), question)
        for row, span, value in entries:
            influence.setdefault(row, []).append((span, value))
        passages = replace(passages, salient=word, influence=influence)
    marked, words, ends = _mark_salient(passages, salient)
    return Explanation(
        texts=marked,
        words=words,
        ends=ends,
        form=form,
        probabilities=_probabilities(names, forward.probabilities[0]),
        prediction=str(forward.loss.texts(forward.predictions[:1], names)[0]),
        target=str(forward.loss.texts(targets[:1], names)[0]),
        problem_type=forward.loss.problem_type,
        answers=_answers(passages, results, facts["methods"]),
        provenance=_provenance(question, facts, form, command),
    )


def _checked(retriever: Retriever, spec: QuerySpec | Question, form: str) -> Question:
    """The question, after refusing choices that can be seen to be wrong before a model is loaded."""
    target = spec.spec.target if isinstance(spec, Question) else spec.target
    if form not in FORMS:
        raise InputError(f"--saliency {form!r}: expected {' or '.join(FORMS)}.")
    if target == "gold":
        one_of = "" if retriever.index.loss.problem_type == SINGLE_LABEL else "label:NAME with "
        raise InputError(
            f"--target gold: a text given here has no label. Give predicted, or {one_of}one of "
            f"{', '.join(retriever.label_names)}."
        )
    choose_targets(target, retriever.index.predictions[:1], None, retriever.label_names, retriever.index.loss)
    return retriever.resolve(spec)


@dataclass(frozen=True)
class _Passages:
    """Texts to be marked: the texts of the query, and the texts of the rows that were found, by row number.

    ``others`` are the names of results for the user's columns of rows. For influence on saliency it also holds the
    query's salient word, and the influence of each word of the rows on the saliency of that word.
    """

    columns: tuple[str, ...]
    query: tuple[str, ...]
    query_places: Places
    texts: dict[int, tuple[str, ...]]
    places: dict[int, Places]
    losses: dict[int, float]
    others: tuple[str, ...]
    salient: Span | None = None
    influence: Mapping[int, Sequence[tuple[Span, float]]] = field(default_factory=dict)

    def mark_query(self, values: Mapping[int, float]) -> tuple[MarkedText, ...]:
        """The query with values at its tokens, by token id."""
        return self._mark(self.query, self.query_places, values)

    def mark_row(self, row: int, values: Mapping[int, float]) -> tuple[MarkedText, ...]:
        """A training row with values at its tokens, by token id."""
        return self._mark(self.texts[row], self.places[row], values)

    def mark_spans(self, row: int, spans: Sequence[Span], values: Sequence[float]) -> tuple[MarkedText, ...]:
        """A training row with values at spans; the strongest carry their number."""
        keyed = dict(enumerate(values))
        strongest = sorted(keyed, key=lambda i: -abs(keyed[i]))[:NUMBERED_SPANS]
        notes = dict(zip(strongest, write_alike([keyed[i] for i in strongest], digits=2), strict=True))
        marked = []
        for c, (name, text) in enumerate(zip(self.columns, self.texts[row], strict=True)):
            held = [(span.start, span.end, i) for i, span in enumerate(spans) if span.column == c]
            marked.append(MarkedText(name, mark(text, held, keyed, self.places[row].read[c], notes)))
        return tuple(marked)

    def point_at(self, span: Span) -> tuple[MarkedText, ...]:
        """The query with one span pointed at."""
        parts = zip(self.columns, self.query, self.query_places.read, strict=True)
        return tuple(
            MarkedText(name, point_at(text, *((span.start, span.end) if c == span.column else (0, 0)), read))
            for c, (name, text, read) in enumerate(parts)
        )

    def _mark(self, texts: Sequence[str], places: Places, values: Mapping[int, float]) -> tuple[MarkedText, ...]:
        parts = zip(self.columns, texts, places.pieces, places.read, strict=True)
        return tuple(MarkedText(name, mark(text, spans, values, read)) for name, text, spans, read in parts)


def _read_passages(
    retriever: Retriever,
    classifier: Classifier,
    query: Sequence[str],
    places: Places,
    results: Sequence[Mapping[str, Any]],
) -> _Passages:
    index = retriever.index
    rows = np.unique([result["row"] for result in results])
    columns = {name: values.to_pylist() for name, values in index.texts(rows).items()}
    return _Passages(
        tuple(columns),
        tuple(query),
        places,
        dict(zip(rows.tolist(), zip(*columns.values(), strict=True), strict=True)),
        dict(zip(rows.tolist(), locate(classifier, list(columns.values())), strict=True)),
        dict(zip(rows.tolist(), index.losses[rows].tolist(), strict=True)),
        tuple(user_columns(index).values()),
    )


def _mark_salient(passages: _Passages, salient: Saliency) -> tuple[tuple[MarkedText, ...], tuple[Word, ...], str]:
    """The query's texts marked by saliency, its words (strongest first), and the saliency of start and end tokens."""
    values = {i: word.value for i, word in enumerate(salient.words)}
    strongest = sorted(values, key=lambda i: -abs(values[i]))[:NUMBERED_WORDS]
    notes = dict(zip(strongest, write_alike([values[i] for i in strongest], digits=2), strict=True))
    marked = []
    for c, (name, text) in enumerate(zip(passages.columns, passages.query, strict=True)):
        spans = [(word.start, word.end, i) for i, word in enumerate(salient.words) if word.column == c]
        marked.append(MarkedText(name, mark(text, spans, values, passages.query_places.read[c], notes)))
    wheres = [passages.columns[word.column] for word in salient.words]
    words, _ = list_words([word.text for word in salient.words], list(values.values()), wheres)
    ends = float(salient.values[salient.special].sum())
    return tuple(marked), words, write_alike([*values.values(), ends])[-1]


def _probabilities(names: Sequence[str], probabilities: np.ndarray) -> tuple[tuple[str, float, str], ...]:
    """Classes by falling probability; a probability that rounds to 0 or 1 is written as a bound: ``> 0.9999``."""
    order = np.argsort(-probabilities, kind="stable")
    bounds = {"1.0000": "> 0.9999", "0.0000": "< 0.0001"}
    return tuple(
        (names[i], float(probabilities[i]), bounds.get(shown := f"{probabilities[i]:.4f}", shown)) for i in order
    )


def _answers(
    passages: _Passages, results: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[Answer, ...]:
    """The answer of each method, in the order of the question; ``facts`` by method, from the table's provenance."""
    return tuple(
        Answer(
            method=method,
            formula=str(facts[method]["formula"]),
            asked=_mark_question(next(r for r in results if r["method"] == method), passages),
            sides=tuple(
                _side(side, [r for r in results if (r["method"], r["side"]) == (method, side)], passages)
                for side in SIDES
            ),
            effect_note=effect_meaning(facts[method]),
        )
        for method in dict.fromkeys(result["method"] for result in results)
    )


def _mark_question(result: Mapping[str, Any], passages: _Passages) -> tuple[MarkedText, ...]:
    """The query with the word or span that a method asks about."""
    if result["method"] == SALIENCY_METHOD:
        assert passages.salient is not None
        return passages.point_at(passages.salient)
    if result.get("query_span_start") is None:
        return ()
    return passages.point_at(Span(*(result[f"query_span_{part}"] for part in ("column", "start", "end"))))


def _side(name: str, results: Sequence[Mapping[str, Any]], passages: _Passages) -> Side:
    scores = write_alike([result["score"] for result in results])
    effects, chances = (_written(results, column) for column in ("effect", "effect_probability"))
    rows = tuple(
        replace(_found_row(result, score, passages), effect=effect, effect_probability=chance)
        for result, score, effect, chance in zip(results, scores, effects, chances, strict=True)
    )
    return Side(name=name, rows=rows, notes=tuple(_side_notes(name, results)))


def _written(results: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The numbers of one end of a ranking as they are written; empty where the method has none."""
    values = [result[column] for result in results if result.get(column) is not None]
    return [""] * len(results) if len(values) < len(results) else write_alike(values, digits=2)


def _found_row(result: Mapping[str, Any], score: str, passages: _Passages) -> FoundRow:
    row, contributions = result["row"], result.get("contributions")
    values: dict[int, float] = {}
    words: tuple[Word, ...] = ()
    total = ""
    if contributions is not None:
        values = dict(zip(result["word_ids"], contributions, strict=True))
        words, total = list_words([word.strip() or word for word in result["words"]], contributions)
    if result.get("span") is not None:
        span = Span(*(result[f"span_{part}"] for part in ("column", "start", "end")))
        marked = passages.mark_spans(row, [span], [result["score"]])
    elif result["method"] == SALIENCY_METHOD and row in passages.influence:
        marked = passages.mark_spans(row, *zip(*passages.influence[row], strict=True))
    else:
        marked = passages.mark_row(row, values)
    return FoundRow(
        rank=result["rank"],
        row=row,
        score=score,
        label=result["label"],
        prediction=result["prediction"],
        loss=passages.losses[row],
        texts=marked,
        query_texts=passages.mark_query(values) if total else (),
        words=words,
        total=total,
        columns=tuple((name, str(result[name])) for name in passages.others if result[name] is not None),
    )


def _side_notes(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on one end of a ranking: scores of the other sign, approximate scores, residuals, unread spans."""
    signs = note_of(results[0]["method"], name, [result["score"] for result in results])
    notes = [signs] if signs else []
    if not all(result["exact"] for result in results):
        notes.append("The scores are approximate.")
    if (residual := results[0].get("residual")) is not None:
        notes.append(f"H^-1 was solved to {convergence_phrase(residual, results[0]['iterations'])}.")
    if n_cut := results[0].get("spans_cut"):
        notes.append(f"{n_cut:,} spans that the model does not read (cut by truncation, or blank) are left out.")
    return notes


def _provenance(question: Question, facts: Mapping[str, Any], form: str, command: str) -> dict[str, str]:
    """The provenance lines: index, question, methods, checkpoints, versions and command."""
    manifest = question.index.manifest
    lines = {
        "index": facts["index"],
        "index digest": facts["index_digest"],
        "computed on": computed_line(facts["computed_on"]),
        **fit_lines(question),
        "query digest": facts["query_digest"],
        "training rows": f"{manifest.n_live:,} ({', '.join(segment.source for segment in manifest.segments)})",
        "sign": facts["sign"],
        "saliency": f"{form}: {FORMULAS[form]}",
    }
    for method, method_facts in sorted(facts["methods"].items()):
        rest = {
            k: v
            for k, v in sorted(method_facts.items())
            if v is not None and k not in ("formula", "sign", "effect_note")
        }
        note = rest.pop("recall_note", None)
        listed = [f"{k.replace('_', ' ')} {_plain(v)}" for k, v in rest.items()]
        lines[method] = "; ".join([method_facts["formula"], *listed, *([] if note is None else [note])])
    for checkpoint in manifest.checkpoints:
        lines[f"checkpoint {checkpoint.name}"] = (
            f"{checkpoint.path}; eta {checkpoint.eta:.4g}; sha256 {checkpoint.sha256[:16]}"
        )
    versions = library_versions(("forebear", "torch", "transformers"))
    lines["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return lines | ({"command": command} if command else {})


def _plain(value: Any) -> str:
    """A fact as text: yes or no, four figures, or a list with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
