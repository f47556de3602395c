"""Records of the explorer: one a prediction and one a training row, as values that JSON has.

What they say is what ``explain``, ``audit hubs``, ``audit duplicates`` and ``audit mislabelled`` say: their functions
are called, and nothing is computed a second way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forebear.evaluation.audits.rows.doubts import Doubts, doubts
from forebear.evaluation.audits.rows.duplicates import DuplicateGroup, Leak, Thresholds, duplicates, leaks
from forebear.evaluation.audits.rows.hub_shares import Shares
from forebear.evaluation.common.neighbours import nearest_rows
from forebear.evaluation.common.queries import QueryRows
from forebear.evaluation.explain.explaining import explain
from forebear.evaluation.explain.explanation import Answer, Explanation, FoundRow, Side
from forebear.evaluation.explain.marks import MarkedText, Piece, Word
from forebear.evaluation.worklists.listing import source_of
from forebear.indexer.model.forward import run_forward
from forebear.indexer.rows.row_format import REGRESSION, SINGLE_LABEL
from forebear.progress import Progress, no_progress
from forebear.retriever.answers.results import SIDES
from forebear.retriever.question.spec import Question
from forebear.retriever.retriever import Retriever

Record = dict[str, Any]
NEIGHBOURS = 10  # nearest rows whose labels are compared with the label of a row
BY_TEXTS = Thresholds(neighbours=0)  # duplicates of training rows as those of test rows are found: without cosines
LISTED_CHARACTERS = 2000  # of a text in the list of test rows, which the filter by text looks at
LISTED_DUPLICATES = 50
PREDICTED_TOGETHER = 1024  # test rows
LEAST_QUERIES = 20  # test rows that a hub share is stated of
JUDGED = ("label", "prediction", "probability", "wrong")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is explained, and how.

    Attributes:
        retriever: Over the index.
        question: Methods, rows at each end, target and the other choices.
        form: Form of the saliency.
        test: The test rows, with their gold labels where the file has them.
        hubs: Shares of reference queries by method and row; None where no audit of hubs was given.
    """

    retriever: Retriever
    question: Question
    form: str
    test: QueryRows
    hubs: Shares | None = None


@dataclass
class Drives:
    """The predictions that each training row is listed for, gathered while test rows are explained.

    Attributes:
        places: By training row: test row, method, side, rank, score and effect.
        n_tests: Test rows that were explained.
    """

    places: dict[int, list[Record]] = field(default_factory=lambda: defaultdict(list))
    n_tests: int = 0

    def add(self, number: int, explanation: Explanation) -> None:
        """Note the rows of one explanation, of test row ``number``."""
        self.n_tests += 1
        for answer in explanation.answers:
            for side in answer.sides:
                for row in side.rows:
                    place = {"test": number, "method": answer.method, "side": side.name, "rank": row.rank}
                    self.places[row.row].append({**place, "score": row.score, "effect": row.effect})

    @property
    def rows(self) -> np.ndarray:
        """Training rows that any prediction lists, ascending."""
        return np.array(sorted(self.places), np.int64)

    def hub_share(self, method: str, row: int) -> float:
        """Of the test rows that were explained, the share that a training row is a proponent of by a method."""
        found = {p["test"] for p in self.places.get(row, ()) if (p["method"], p["side"]) == (method, SIDES[0])}
        return len(found) / self.n_tests


def add_hub_shares(page: Record, drives: Drives) -> None:
    """Say of each proponent on a page for which share of the test rows it comes up, as ``audit hubs`` would.

    Too few test rows say nothing of a share, and are left out.
    """
    if drives.n_tests < LEAST_QUERIES:
        return
    page["hub_queries"] = f"{drives.n_tests:,} test rows"
    for answer in page["answers"]:
        for found in answer["sides"][0]["rows"]:
            found["hub_share"] = drives.hub_share(answer["method"], found["row"])


@dataclass(frozen=True)
class Known:
    """What is known of the test rows before any of them is explained.

    Attributes:
        gold: Their labels as texts, ``(q,)``; None where they have none.
        leak_of: Those that stand among the training rows, by number.
    """

    gold: Sequence[str | None]
    leak_of: dict[int, Leak]

    @classmethod
    def of(cls, asked: Asked) -> Known:
        """Compare the test rows with all training rows, of which a block at a time is in memory."""
        index, test = asked.retriever.index, asked.test
        gold: Sequence[str | None] = [None] * len(test)
        if test.labels is not None:
            gold = index.loss.texts(test.labels, asked.retriever.label_names)
        return cls(gold, {leak.test_row: leak for leak in leaks(index, test, BY_TEXTS)})


def prediction_records(asked: Asked, drives: Drives) -> Iterator[tuple[Record, Record]]:
    """For each test row its line in the list and its page, in the order of the file; ``drives`` gathers their rows."""
    known = Known.of(asked)
    for number in range(len(asked.test)):
        explanation = explain_row(asked, number)
        drives.add(number, explanation)
        page = page_record(asked, known, number, explanation)
        yield _line(asked, known, number, {name: page[name] for name in JUDGED}), page


def explain_row(asked: Asked, number: int) -> Explanation:
    """The explanation of a test row."""
    texts = [column[number] for column in asked.test.texts]
    query = texts[0] if len(texts) == 1 else (texts[0], texts[1])
    return explain(asked.retriever, query, asked.question, form=asked.form)


def page_record(asked: Asked, known: Known, number: int, explanation: Explanation) -> Record:
    """The page of a test row."""
    by_name = {name: value for name, value, _ in explanation.probabilities}
    judged = _judged(asked, known.gold[number], explanation.prediction, by_name.get(explanation.prediction))
    leak = known.leak_of.get(number)
    page = {"number": number, **judged, **explained(explanation, asked.hubs)}
    return page | {"duplicate": None if leak is None else {"row": leak.row, "kind": leak.kind, "jaccard": leak.jaccard}}


def predicted_lines(asked: Asked, known: Known, progress: Progress = no_progress) -> list[Record]:
    """The lines of all test rows, of which none is explained: one forward pass over each block of them."""
    retriever, lines, n_tests = asked.retriever, list[Record](), len(asked.test)
    progress("test rows", 0, n_tests)
    for block in asked.test.blocks(PREDICTED_TOGETHER):
        forward = run_forward(retriever.classifier(), block.texts, first_row=len(lines))
        predictions = forward.loss.texts(forward.predictions, retriever.label_names)
        for prediction, probabilities in zip(predictions, forward.probabilities.tolist(), strict=True):
            number, by_name = len(lines), dict(zip(retriever.label_names, probabilities, strict=True))
            judged = _judged(asked, known.gold[number], str(prediction), by_name.get(str(prediction)))
            lines.append(_line(asked, known, number, judged))
        progress("test rows", len(lines), n_tests)
    return lines


def _line(asked: Asked, known: Known, number: int, judged: Record) -> Record:
    texts = [column[number][:LISTED_CHARACTERS] for column in asked.test.texts]
    return {"number": number, **judged, "texts": texts, "duplicate": number in known.leak_of}


def _judged(asked: Asked, gold: str | None, prediction: str, probability: float | None) -> Record:
    """The prediction beside the gold label: probability of the predicted class, and whether the two differ.

    Both are None where they mean nothing: a probability of several labels or of numbers; an error of a number, or of a
    test row without a label.
    """
    problem_type = asked.retriever.index.loss.problem_type
    return {
        "label": gold,
        "prediction": prediction,
        "probability": probability if problem_type == SINGLE_LABEL else None,
        "wrong": None if gold is None or problem_type == REGRESSION else gold != prediction,
    }


def explained(explanation: Explanation, hubs: Shares | None = None) -> Record:
    """An explanation as JSON has it, with the hub share of each proponent where ``hubs`` has its method."""
    return {
        "title": explanation.title,
        "summary": explanation.summary,
        "target": explanation.target,
        "texts": _texts(explanation.texts),
        "words": _words(explanation.words),
        "ends": explanation.ends,
        "form": explanation.form,
        "formula": explanation.formula,
        "numbers": explanation.are_numbers,
        "probabilities": [[n, p, shown, explanation.remark_on(n)] for n, p, shown in explanation.probabilities],
        "answers": [_answer(answer, (hubs or {}).get(answer.method)) for answer in explanation.answers],
    }


def _answer(answer: Answer, shares: dict[int, float] | None) -> Record:
    return {
        "method": answer.method,
        "formula": answer.formula,
        "asked": _texts(answer.asked),
        "effect_note": answer.effect_note,
        "of_saliency": answer.of_saliency,
        "sides": [_side(side, shares if side.name == SIDES[0] else None) for side in answer.sides],
    }


def _side(side: Side, shares: dict[int, float] | None) -> Record:
    rows = [_found(row, None if shares is None else shares.get(row.row, 0.0)) for row in side.rows]
    return {"name": side.name, "notes": list(side.notes), "rows": rows}


def _found(row: FoundRow, hub_share: float | None) -> Record:
    return {
        "rank": row.rank,
        "row": row.row,
        "score": row.score,
        "label": row.label,
        "prediction": row.prediction,
        "loss": row.loss,
        "effect": row.effect,
        "effect_probability": row.effect_probability,
        "hub_share": hub_share,
        "texts": _texts(row.texts),
        "query_texts": _texts(row.query_texts) if _is_marked(row.query_texts) else [],
        "words": _words(row.words),
        "total": row.total,
    }


def _is_marked(texts: Iterable[MarkedText]) -> bool:
    return any(piece.value is not None for text in texts for piece in text.pieces)


def _texts(marked: Iterable[MarkedText]) -> list[list[Any]]:
    """Marked texts: [column, pieces]."""
    return [[text.name, [_piece(piece) for piece in text.pieces]] for text in marked]


def _piece(piece: Piece) -> list[Any]:
    """A stretch of a text: [text], or [text, facts] where there is more to say of it."""
    facts: Record = {}
    if piece.value is not None:
        sign = "supports" if piece.value > 0 else "opposes" if piece.value < 0 else "zero"
        facts = {"sign": sign, "level": piece.level, "note": piece.note, "value": f"{piece.value:+.4g}"}
    if not piece.read:
        facts["unread"] = True
    if piece.asked:
        facts["asked"] = True
    return [piece.text, facts] if facts else [piece.text]


def _words(words: Iterable[Word]) -> list[list[Any]]:
    """Words: [text, number as it is written, its column where there are several]."""
    return [[word.text, word.number, word.where] for word in words]


def row_records(asked: Asked, drives: Drives, block_rows: int) -> Iterator[list[Record]]:
    """Blocks of records of the training rows that ``drives`` holds, by row number."""
    retriever, rows = asked.retriever, drives.rows
    group_of = {
        int(row): group for group in duplicates(retriever.models, BY_TEXTS) for row in group.rows.tolist()
    }  # fmt: skip
    for start in range(0, len(rows), block_rows):
        yield row_block(retriever, rows[start : start + block_rows], drives, group_of)


def row_block(
    retriever: Retriever, rows: np.ndarray, drives: Drives, group_of: dict[int, DuplicateGroup]
) -> list[Record]:
    """Records of some live training rows.

    ``probability`` is what the model gives the row's label, exp(-loss); None where the loss is another one: of several
    labels or numbers, of weighted classes, of smoothed labels. Without ``has_texts`` the index holds none, and the
    ``texts`` say where the row came from.
    """
    index, spec = retriever.index, retriever.index.manifest.spec
    texts = {name: column.to_pylist() for name, column in index.texts(rows).items()}
    columns = index.columns(rows)
    others = {name: columns.column(name).to_pylist() for name in columns.column_names}
    labels, predictions = index.label_texts(rows), index.prediction_texts(rows)
    is_plain = spec.problem_type == SINGLE_LABEL and not spec.class_weights and not spec.label_smoothing
    k = min(NEIGHBOURS, len(index.live) - 1)
    doubted = doubts(index, rows, nearest_rows(retriever.models, rows, k)[0]) if k else None
    suggested: Sequence[str | None] = [None] * len(rows)
    if doubted is not None and spec.problem_type != REGRESSION:
        suggested = index.loss.texts(doubted.suggested, retriever.label_names)
    records = []
    for i, row in enumerate(rows.tolist()):
        loss = float(index.losses[row])
        source, source_row = source_of(index, row)
        group = group_of.get(row)
        records.append({
            "row": row,
            "source": source,
            "source_row": source_row,
            "label": labels[i],
            "prediction": predictions[i],
            "loss": loss,
            "probability": float(np.exp(-loss)) if is_plain else None,
            "texts": [[name, values[i]] for name, values in texts.items()],
            "has_texts": not index.manifest.without_texts,
            "columns": [[name, str(values[i])] for name, values in others.items() if values[i] is not None],
            "suggested": suggested[i],
            "evidence": _evidence(doubted, i, labels[i], predictions[i], loss, group),
            "duplicates": None if group is None else _group(group, row),
            "drives": drives.places.get(row, []),
        })  # fmt: skip
    return records


def _group(group: DuplicateGroup, row: int) -> Record:
    others = [other for other in group.rows.tolist() if other != row]
    shown = others[:LISTED_DUPLICATES]
    return {"rows": shown, "n_rows": len(others), "kind": group.kind, "conflict": group.conflict}


def _evidence(
    doubted: Doubts | None, i: int, label: str, prediction: str, loss: float, group: DuplicateGroup | None
) -> str:
    """What speaks against a row's label, in words, and its loss."""
    said = []
    if doubted is not None:
        contradicting = doubted.contradicting[i]
        said.append(f"{int(contradicting.sum())} of {len(contradicting)} nearest rows contradict the label")
    if prediction != label:
        said.append(f"the model predicts {prediction}")
    if group is not None and group.conflict:
        said.append("a duplicate has another label")
    return "; ".join([*said, f"loss {loss:.3g}"])
