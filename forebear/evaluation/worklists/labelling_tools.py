"""Work lists for labelling tools, and what people answered there: Label Studio, Argilla, cleanlab.

- Label Studio: a file of tasks with predictions, as its import takes it; its JSON export is read back.
- Argilla 2: a file of records, as ``dataset.records.from_json`` takes it and ``dataset.records.to_json`` writes it.
- cleanlab: the columns of ``CleanLearning.get_label_issues`` and of Datalab's label issues.

Each names a row by its number in the index, so that answers find their item again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from xml.sax.saxutils import quoteattr

from forebear.errors import InputError
from forebear.evaluation.worklists.items import DECISIONS, Item, WorkList

AGENT: Final = "forebear"
LABEL, DECISION = "label", "decision"  # names of the two questions
ROW, GIVEN, PROBABILITY, REASON = "row", "given", "probability", "reason"  # names of facts beside the texts
LEAVING: Final = ("remove", "quarantine")  # decisions that are no label
ISSUE_COLUMNS: Final = ("is_label_issue", "label_score", "given_label", "predicted_label")


def labels_of(work_list: WorkList) -> list[str]:
    """The labels that a list gives or suggests, sorted."""
    return sorted({label for item in work_list for label in (item.given, item.suggested) if label is not None})


def as_label_studio(work_list: WorkList) -> str:
    """Tasks with predictions; a suggestion is a prediction, its score the probability where that was measured."""
    first, names = _first_column(work_list), _names(work_list)
    tasks = [_task(item, first, names) for item in work_list]
    return json.dumps(tasks, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _task(item: Item, to_name: str, names: Mapping[str, str]) -> dict[str, Any]:
    facts = {names[name]: value for name, value in _facts(item).items()}
    task: dict[str, Any] = {"data": {**item.texts, **facts}}
    if item.suggested is not None:
        value = {"choices": [item.suggested]}
        choice = {"from_name": names[LABEL], "to_name": to_name, "type": "choices", "value": value}
        prediction: dict[str, Any] = {"model_version": AGENT, "result": [choice]}
        if item.probability is not None:
            prediction["score"] = item.probability
        task["predictions"] = [prediction]
    return task


def label_studio_config(work_list: WorkList) -> str:
    """The labelling configuration that the tasks are for: the texts, what is known, a label and a decision."""
    columns, names = list(work_list.text_columns), _names(work_list)
    lines = [f"  <Text name={quoteattr(name)} value={quoteattr('$' + name)}/>" for name in columns]
    lines += [f"  <Header value={quoteattr(f'Given: ${names[GIVEN]}. ${names[REASON]}')}/>"]
    first = quoteattr(_first_column(work_list))
    for question, choices in ((LABEL, labels_of(work_list)), (DECISION, LEAVING)):
        lines.append(f'  <Choices name="{names[question]}" toName={first} choice="single">')
        lines += [f"    <Choice value={quoteattr(choice)}/>" for choice in choices]
        lines.append("  </Choices>")
    return "\n".join(["<View>", *lines, "</View>", ""])


def _first_column(work_list: WorkList) -> str:
    return next(iter(work_list.text_columns), "text")


def as_argilla(work_list: WorkList) -> str:
    """Records of Argilla 2; a suggestion's score is the probability where that was measured."""
    records, names = [], _names(work_list)
    for item in work_list:
        suggestion = {"value": item.suggested, "score": item.probability, "agent": AGENT}
        records.append({
            "id": f"row-{item.row}",
            "fields": dict(item.texts),
            "metadata": {names[name]: value for name, value in _facts(item).items() if value is not None},
            "suggestions": {} if item.suggested is None else {names[LABEL]: suggestion},
            "responses": {},
            "vectors": {},
        })  # fmt: skip
    return json.dumps(records, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _names(work_list: WorkList) -> dict[str, str]:
    """Names of the questions and the facts, each another one than those of the texts: tools refuse two of a name."""
    names = {}
    for name in (LABEL, DECISION, ROW, GIVEN, PROBABILITY, REASON):
        names[name] = name
        while names[name] in work_list.text_columns:
            names[name] = f"{AGENT}_{names[name]}"
    return names


def _facts(item: Item) -> dict[str, Any]:
    return {ROW: item.row, GIVEN: item.given, PROBABILITY: item.probability, REASON: item.reason}


def as_cleanlab(work_list: WorkList) -> str:
    """A table of label issues by row; ``label_score`` is 1 - probability, empty where that was not measured.

    A row is an issue where its label is wrong with a probability of half or more, or where, unmeasured, another label
    is suggested.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", *ISSUE_COLUMNS])
    for item in work_list:
        chance = item.probability
        is_issue = item.suggested is not None if chance is None else chance >= 0.5
        score = "" if chance is None else 1.0 - chance
        writer.writerow(
            [item.row, is_issue, score, item.given, item.given if item.suggested is None else item.suggested]
        )
    return out.getvalue()


EXPORTS: Final[Mapping[str, Callable[[WorkList], str]]] = {
    "label-studio": as_label_studio, "argilla": as_argilla, "cleanlab": as_cleanlab,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A list with what people answered.

    Attributes:
        work_list: The list, with their decisions.
        n_answered: Items that were answered.
        n_disagreed: Items about which annotators disagree; they stay open, and their note says who says what.
        n_unknown: Answers about rows that are not on the list.
    """

    work_list: WorkList
    n_answered: int
    n_disagreed: int
    n_unknown: int


def answers_from(tool: str, content: str, work_list: WorkList) -> Answered:
    """Take the answers of a tool's export into the list that it was made from.

    The given label as an answer is the decision to keep, another label the one to relabel. What cleanlab finds is a
    suggestion, not a decision.

    Raises:
        InputError: The content is not the tool's, or the tool is not known.
    """
    readers: dict[str, Callable[[Any, Mapping[str, str]], dict[int, list[Answer]]]] = {
        "label-studio": _label_studio_answers, "argilla": _argilla_answers,
    }  # fmt: skip
    if tool == "cleanlab":
        return _with_issues(content, work_list)
    if tool not in readers:
        raise InputError(f"--from {tool}: expected {', '.join(EXPORTS)}.")
    try:
        answers = readers[tool](json.loads(content), _names(work_list))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"this is no JSON export of {tool} ({type(error).__name__}: {error}).") from error
    items, n_answered, n_disagreed = [], 0, 0
    for item in work_list:
        said = answers.get(item.row, [])
        if not said:
            items.append(item)
        elif len(set(said)) > 1:
            n_disagreed += 1
            note = f"annotators disagree: {', '.join(' '.join(filter(None, one)) for one in said)}"
            items.append(replace(item, note="; ".join(filter(None, (item.note, note)))))
        else:
            n_answered += 1
            items.append(_decided(item, said[0]))
    return Answered(
        work_list=WorkList(tuple(items)), n_answered=n_answered, n_disagreed=n_disagreed,
        n_unknown=len(answers.keys() - {item.row for item in work_list}),
    )  # fmt: skip


Answer = tuple[str, str]  # label, and a decision that is no label; one of them may be empty


def _decided(item: Item, answer: Answer) -> Item:
    label, decision = answer
    if decision:
        return replace(item, decision=decision)
    if label == item.given:
        return replace(item, decision="keep")
    return replace(item, decision="relabel", suggested=label)


def _label_studio_answers(tasks: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[int, list[Answer]]:
    found: dict[int, list[Answer]] = {}
    for task in tasks:
        answers = [
            _answer(_choices(annotation["result"]), names)
            for annotation in task.get("annotations", [])
            if not annotation.get("was_cancelled")
        ]
        found.setdefault(int(task["data"][names[ROW]]), []).extend(answer for answer in answers if any(answer))
    return {row: answers for row, answers in found.items() if answers}


def _choices(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {
        one["from_name"]: one["value"]["choices"][0]
        for one in results
        if one.get("type") == "choices" and one["value"]["choices"]  # empty: the choice was taken back
    }


def _argilla_answers(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[int, list[Answer]]:
    found: dict[int, list[Answer]] = {}
    for record in records:
        row = (record.get("metadata") or {}).get(names[ROW], str(record["id"]).removeprefix("row-"))
        by_user: dict[str, dict[str, str]] = {}
        for question, responses in (record.get("responses") or {}).items():
            for response in responses:
                if response.get("status", "submitted") == "submitted":
                    by_user.setdefault(str(response.get("user_id")), {})[question] = str(response["value"])
        answers = [answer for given in by_user.values() if any(answer := _answer(given, names))]
        if answers:
            found.setdefault(int(row), []).extend(answers)
    return found


def _answer(given: Mapping[str, str], names: Mapping[str, str]) -> Answer:
    decision = given.get(names[DECISION], "")
    if decision and decision not in DECISIONS:
        raise ValueError(f"the decision {decision!r} is none of {', '.join(DECISIONS)}")
    return given.get(names[LABEL], ""), decision


def _with_issues(content: str, work_list: WorkList) -> Answered:
    """Suggestions from a table of label issues; its first column, or the one named row, is the row number."""
    table = list(csv.DictReader(io.StringIO(content, newline="")))
    if not table or not set(ISSUE_COLUMNS) <= set(table[0]):
        raise InputError(f"this is no table of label issues; expected the columns {', '.join(ISSUE_COLUMNS)}.")
    key = "row" if "row" in table[0] else next(iter(table[0]))
    for number, issue in enumerate(table, 1):
        if any(issue[name] is None for name in (key, *ISSUE_COLUMNS)):
            raise InputError(f"row {number} (from 1) of the table has too few values. Mend it.")
    try:
        issues = {int(line[key]): line for line in table}
        figures = {row: float(line["label_score"]) for row, line in issues.items() if line["label_score"]}
    except ValueError as error:
        raise InputError(f"the table's column {key or '(without a name)'} or label_score: {error}.") from error
    items, n_answered = [], 0
    for item in work_list:
        line = issues.get(item.row)
        if line is None:
            items.append(item)
            continue
        n_answered += 1
        score = {"cleanlab label_score": figures[item.row]} if item.row in figures else {}
        suggests = line["is_label_issue"].lower() in ("true", "1") and line["predicted_label"] != item.given
        suggested = line["predicted_label"] if suggests else item.suggested
        items.append(replace(item, suggested=suggested, evidence={**item.evidence, **score}))
    unknown = issues.keys() - {item.row for item in work_list}
    return Answered(work_list=WorkList(tuple(items)), n_answered=n_answered, n_disagreed=0, n_unknown=len(unknown))
