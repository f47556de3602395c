"""Work lists as labelling tools take them, and answers as these give them."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET

import pytest

from forebear import InputError, worklists
from forebear.cli.main import run
from forebear.evaluation.worklists.items import Item, WorkList
from forebear.evaluation.worklists.labelling_tools import answers_from, label_studio_config

LIST = WorkList((
    Item(
        row=3, texts={"premise": 'a < b & "c"', "hypothesis": "d"}, given="no", suggested="yes", probability=0.75,
        reason="r",
    ),
    Item(row=5, texts={"premise": "e", "hypothesis": "f"}, given="yes", reason="s"),
    Item(row=9, texts={"premise": "g", "hypothesis": "h"}, given="no", suggested="may be", note="seen"),
    Item(row=11, texts={"premise": "i", "hypothesis": "j"}, given="no", suggested="yes", probability=0.25),
))  # fmt: skip


def exported(tool, tmp_path):
    worklists.export(LIST, tool, tmp_path / "out.json")
    return (tmp_path / "out.json").read_text(encoding="utf-8")


def test_label_studio_gets_tasks_that_fit_its_configuration(tmp_path):
    """As its import wants them: ``data`` has every variable of the configuration, predictions name its tags."""
    tasks = json.loads(exported("label-studio", tmp_path))
    view = ET.fromstring((tmp_path / "out.xml").read_text(encoding="utf-8"))
    texts = {tag.get("name"): tag.get("value") for tag in view.iter("Text")}
    choices = {tag.get("name"): [c.get("value") for c in tag.iter("Choice")] for tag in view.iter("Choices")}
    assert texts == {"premise": "$premise", "hypothesis": "$hypothesis"}
    assert choices == {"label": ["may be", "no", "yes"], "decision": ["remove", "quarantine"]}
    assert {tag.get("toName") for tag in view.iter("Choices")} == {"premise"}
    for task, item in zip(tasks, LIST, strict=True):
        assert {"premise", "hypothesis", "given", "reason"} <= set(task["data"])
        assert task["data"]["premise"] == item.texts["premise"]
        predictions = task.get("predictions", [])
        assert len(predictions) == (item.suggested is not None)
        for prediction in predictions:
            (result,) = prediction["result"]
            assert result["type"] == "choices"
            assert result["to_name"] in texts
            assert result["value"]["choices"] == [item.suggested]
            assert set(result["value"]["choices"]) <= set(choices[result["from_name"]])
            assert prediction.get("score") == item.probability


def test_answers_of_label_studio_become_decisions(tmp_path):
    def annotation(label=None, decision=None, cancelled=False):
        named = {"label": label, "decision": decision}
        result = [
            {"from_name": name, "to_name": "premise", "type": "choices", "value": {"choices": [value]}}
            for name, value in named.items()
            if value
        ]
        return {"id": 1, "result": result, "was_cancelled": cancelled, "completed_by": 10}

    tasks = json.loads(exported("label-studio", tmp_path))
    tasks[0]["annotations"] = [annotation("no", cancelled=True), annotation("yes"), annotation("yes")]
    tasks[1]["annotations"] = [annotation("yes")]
    tasks[2]["annotations"] = [annotation("yes"), annotation("no")]
    tasks[3]["annotations"] = [annotation("yes", "quarantine")]
    tasks += [{"data": {"row": 77}, "annotations": [annotation("no")]}, {"data": {"row": 9}, "annotations": []}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    worklists.write(LIST, tmp_path / "list.csv")
    command = [
        "worklist",
        "import",
        str(tmp_path / "export.json"),
        "--from",
        "label-studio",
        "--list",
        str(tmp_path / "list.csv"),
    ]
    assert run([*command, "--out", str(tmp_path / "decided.csv")]) == 0
    found = worklists.read(tmp_path / "decided.csv")
    assert [(i.decision, i.suggested) for i in found] == [
        ("relabel", "yes"), ("keep", None), ("", "may be"), ("quarantine", "yes"),
    ]  # fmt: skip
    assert found.items[2].note == "seen; annotators disagree: yes, no"
    assert run([*command, "--out", str(tmp_path / "decided.csv")]) == 2  # it is there


def test_argilla_gets_records_and_gives_responses(tmp_path):
    """The keys are those of ``Record.to_dict`` of Argilla 2; a user answers all questions of a record."""
    records = json.loads(exported("argilla", tmp_path))
    for record, item in zip(records, LIST, strict=True):
        assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
        assert record["fields"] == dict(item.texts)
        wanted = {"value": item.suggested, "score": item.probability, "agent": "forebear"}
        assert record["suggestions"] == ({} if item.suggested is None else {"label": wanted})
    records[0]["responses"] = {"label": [{"value": "no", "user_id": "u1"}, {"value": "no", "user_id": "u2"}]}
    records[1]["responses"] = {
        "decision": [{"value": "remove", "user_id": "u1"}],
        "label": [{"value": "no", "user_id": "u1"}],
    }
    records[2]["responses"] = {"label": [{"value": "no", "user_id": "u1"}, {"value": "yes", "user_id": "u2"}]}
    records[3]["responses"] = {"label": [{"value": "yes", "user_id": "u1", "status": "discarded"}]}
    del records[0]["metadata"]
    found = answers_from("argilla", json.dumps(records), LIST)
    assert [i.decision for i in found.work_list] == ["keep", "remove", "", ""]
    assert (found.n_answered, found.n_disagreed, found.n_unknown) == (2, 1, 0)


def test_cleanlab_gets_its_columns_and_gives_suggestions(tmp_path):
    table = list(csv.DictReader(io.StringIO(exported("cleanlab", tmp_path))))
    assert list(table[0]) == ["row", "is_label_issue", "label_score", "given_label", "predicted_label"]
    assert [tuple(line.values()) for line in table] == [
        ("3", "True", "0.25", "no", "yes"), ("5", "False", "", "yes", "yes"), ("9", "True", "", "no", "may be"),
        ("11", "False", "0.75", "no", "yes"),
    ]  # fmt: skip
    issues = ",is_label_issue,label_score,given_label,predicted_label\n3,False,0.9,no,no\n5,True,0.1,yes,no\n"
    issues += "6,True,0,no,yes\n"
    found = answers_from("cleanlab", issues, LIST)
    assert [i.suggested for i in found.work_list] == ["yes", "no", "may be", "yes"]
    assert [i.evidence for i in found.work_list][:3] == [
        {"cleanlab label_score": 0.9},
        {"cleanlab label_score": 0.1},
        {},
    ]
    assert {i.decision for i in found.work_list} == {""}
    assert found.n_unknown == 1


@pytest.mark.parametrize("tool", ["csv", "parquet", "jsonl"])
def test_the_list_itself_is_written_in_each_format(tool, tmp_path):
    worklists.export(LIST, tool, tmp_path / f"list.{tool}")
    assert worklists.read(tmp_path / f"list.{tool}") == LIST


def test_other_files_are_refused_in_one_line(tmp_path):
    for tool, content in (
        ("label-studio", "{}x"), ("label-studio", '[{"data": {}, "annotations": []}]'), ("argilla", "[1]"),
        ("argilla", '[{"id": "x", "responses": {"decision": [{"value": "burn"}]}}]'), ("cleanlab", "a,b\n1,2\n"),
        ("cleanlab", "row,is_label_issue,label_score,given_label,predicted_label\nx,1,1,a,b\n"), ("excel", ""),
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            answers_from(tool, content, LIST)
        assert "\n" not in str(raised.value)
    short = "row,is_label_issue,label_score,given_label,predicted_label\n3,True\n"
    with pytest.raises(InputError, match=r"row 1 .* has too few values"):
        answers_from("cleanlab", short, LIST)
    with pytest.raises(InputError, match=r"OUT\.xml is the labelling configuration"):
        worklists.export(LIST, "label-studio", tmp_path / "tasks.xml")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="expected label-studio, argilla, cleanlab, parquet, csv, jsonl"):
        worklists.export(LIST, "excel", tmp_path / "x")
    assert label_studio_config(WorkList(())).startswith("<View>")


def test_texts_named_like_facts_stay_and_answers_find_their_row(tmp_path):
    item = Item(row=3, texts={"reason": "a text", "row": "another"}, given="no", suggested="yes", reason="doubtful")
    worklists.export(WorkList((item,)), "label-studio", tmp_path / "out.json")
    (task,) = json.loads((tmp_path / "out.json").read_text())
    assert {"reason": "a text", "row": "another"}.items() <= task["data"].items()
    header = ET.fromstring((tmp_path / "out.xml").read_text()).find("Header").get("value")
    shown = {name: task["data"][name] for name in re.findall(r"\$(\w+)", header)}
    assert list(shown.values()) == ["no", "doubtful"]
    choice = {"from_name": "label", "type": "choices", "value": {"choices": ["yes"]}}
    task["annotations"] = [{"result": [choice]}]
    assert answers_from("label-studio", json.dumps([task]), WorkList((item,))).work_list.items[0].decision == "relabel"
    task["annotations"] = [{"result": [{**choice, "value": {"choices": []}}]}]  # a choice that was taken back
    assert answers_from("label-studio", json.dumps([task]), WorkList((item,))).n_answered == 0


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_texts_named_like_questions_have_no_name_in_common_with_them(tool, tmp_path):
    """Both tools refuse two things of one name; the answers come back by the names of the questions."""
    item = Item(row=3, texts={"label": "on the jar", "decision": "of a court"}, given="no", suggested="yes")
    worklists.export(WorkList((item,)), tool, tmp_path / "out.json")
    (one,) = json.loads((tmp_path / "out.json").read_text())
    if tool == "argilla":
        assert one["fields"] == dict(item.texts)
        assert not one["fields"].keys() & (one["suggestions"].keys() | one["metadata"].keys())
        (question,) = one["suggestions"]
        one["responses"] = {question: [{"value": "yes", "user_id": "u"}]}
    else:
        tags = [tag for tag in ET.fromstring((tmp_path / "out.xml").read_text()).iter() if tag.get("name")]
        texts, choices = ([tag.get("name") for tag in tags if tag.tag == kind] for kind in ("Text", "Choices"))
        assert texts == ["label", "decision"]
        assert len({*texts, *choices}) == 4
        (result,) = one["predictions"][0]["result"]
        assert (result["from_name"], result["to_name"]) == (choices[0], "label")
        one["annotations"] = [{"result": [result]}]
    (found,) = answers_from(tool, json.dumps([one]), WorkList((item,))).work_list
    assert (found.decision, found.suggested) == ("relabel", "yes")
