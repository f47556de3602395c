"""The harness of the benchmarks: what it calls slower, what it keeps, and what it says where nothing was recorded."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness
from common import Ratio, by_turns, make_result, ratio
from harness import Case, Skip, better_of, both_of, compare, kind, run_cases, table

XEON = {"cpu": "Intel(R) Xeon(R) Processor", "model": "6/207", "threads": 1}


def result(ratios=None, recalls=None, good="larger"):
    """A case's JSON with ratios given as (value, low, high)."""
    of = {name: dict(zip(("value", "low", "high"), r, strict=True), good=good) for name, r in (ratios or {}).items()}
    return {"case": "made", "ratios": of, "recalls": recalls or {}}


def verdicts(recorded, now):
    return {line.name: line.verdict for line in compare(recorded, now)}


@pytest.mark.parametrize(
    ("recorded", "now", "good", "verdict"),
    [
        ((4.0, 3.9, 4.1), 3.0, "larger", "slower"),  # 1.33 times worse, outside of the spread
        ((4.0, 3.9, 4.1), 5.0, "larger", "faster"),
        ((4.0, 3.9, 4.1), 3.4, "larger", "as before"),  # outside of the spread, but only 1.18 times
        ((4.0, 2.5, 6.0), 3.0, "larger", "as before"),  # 1.33 times, within the spread
        ((0.5, 0.49, 0.51), 0.65, "smaller", "slower"),
        ((0.5, 0.49, 0.51), 0.4, "smaller", "faster"),
        ((0.5, 0.3, 0.7), 0.65, "smaller", "as before"),
    ],
)
def test_slower_is_a_fifth_worse_and_outside_of_the_recorded_spread(recorded, now, good, verdict):
    found = verdicts(result({"speed": recorded}, good=good), result({"speed": (now, now, now)}, good=good))
    assert found == {"speed": verdict}


@pytest.mark.parametrize(("recall", "verdict"), [(0.99, "recall fell"), (0.9999, "as before"), (1.0, "recall rose")])
def test_a_recall_that_falls_is_said_however_little(recall, verdict):
    recorded = 1.0 if recall < 1.0 else 0.9
    assert verdicts(result(recalls={"recall": recorded}), result(recalls={"recall": recall})) == {"recall": verdict}


def test_what_is_no_longer_measured_is_said_to_be_gone():
    old = result({"kept": (1, 1, 1), "dropped": (1, 1, 1)}, {"recall": 1.0})
    now = result({"kept": (1, 1, 1), "added": (1, 1, 1)}, {"other": 1.0})
    expected = {"kept": "as before", "dropped": "gone", "added": "new", "recall": "gone", "other": "new"}
    assert verdicts(old, now) == expected


def test_the_table_has_a_line_a_ratio_with_both_numbers():
    lines = compare(result({"speed": (4.0, 3.9, 4.1)}), result({"speed": (3.0, 3, 3)}))
    head, line = table(lines).splitlines()
    assert head.split() == ["case", "ratio", "or", "recall", "recorded", "now", "verdict"]
    assert line.split() == ["made", "speed", "4", "3", "slower"]


@pytest.mark.parametrize(("good", "best"), [("larger", 3.0), ("smaller", 2.0)])
def test_the_better_of_two_measurements_is_taken_ratio_by_ratio(good, best):
    first, second = (result({"a": (x, x, x), "b": (y, y, y)}, good=good) for x, y in ((2.0, 3.0), (3.0, 2.0)))
    found = better_of(first, second)["ratios"]
    assert [found[name]["value"] for name in "ab"] == [best, best]


def test_a_record_holds_the_spread_of_two_measurements():
    found = both_of(result({"a": (2.0, 1.9, 2.5)}), result({"a": (4.5, 4.0, 5.0)}))["ratios"]["a"]
    assert found == {"value": 3.0, "low": 1.9, "high": 5.0, "good": "larger"}


def test_machines_of_one_cpu_and_number_of_threads_are_of_one_kind():
    assert kind(XEON) == kind(XEON | {"torch": "9", "cores": 64}) == "intel-xeon-processor-6-207-1-thread"
    assert len({kind(XEON), kind(XEON | {"threads": 2}), kind(XEON | {"model": "6/85"})}) == 3


def test_turns_alternate_and_a_ratio_is_taken_round_by_round():
    calls = []
    taken = by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # each once uncounted, then in turn
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == pytest.approx(Ratio(2.0, 1.2, 2.8))  # 2, 3 and 1


def test_a_result_says_case_commit_machine_date_ratios_and_recalls():
    facts = {"rows": 5, "speed": Ratio(2.0, 1.5, 2.5), "stages": {"one": 1.0, "two": 3.0}, "recall": 0.5}
    found = json.loads(json.dumps(make_result("made", facts, ("speed",), ("stages",), ("recall",))))
    assert found["ratios"] == {
        "speed": {"value": 2.0, "low": 1.5, "high": 2.5, "good": "larger"},
        "stages, one": {"value": 1.0, "low": 1.0, "high": 1.0, "good": "smaller"},
        "stages, two": {"value": 3.0, "low": 3.0, "high": 3.0, "good": "smaller"},
    }
    assert (found["case"], found["recalls"], found["facts"]) == ("made", {"recall": 0.5}, {"rows": 5})
    assert {"cpu", "model", "flags", "cores", "threads", "torch", "python"} <= set(found["machine"])
    assert isinstance(found["dirty"], bool)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", found["date"])


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of records and of the latest results, on a machine of a known kind."""
    monkeypatch.setattr(harness, "machine", lambda: XEON)
    monkeypatch.setattr(harness, "LATEST", tmp_path / "latest")
    return tmp_path / "records"


def speeds(*values):
    """A case that gives these ratios, one a measurement."""
    left = list(values)
    return Case("made", lambda: {"speed": left.pop(0), "recall": 1.0}, larger=("speed",), recalls=("recall",))


def test_a_record_is_a_file_a_kind_of_machine_and_case(places, capsys):
    assert run_cases([speeds(4.0, 4.0)], check=False, record=True, records=places) == 0
    (kept,) = places.rglob("*.json")
    assert kept.relative_to(places).as_posix() == f"{kind(XEON)}/made.json"
    assert json.loads(kept.read_text())["ratios"]["speed"]["value"] == 4.0
    assert "nothing to compare" not in capsys.readouterr().out


def test_the_check_fails_where_something_is_slower_twice(places, capsys):
    run_cases([speeds(4.0, 4.0)], check=False, record=True, records=places)
    assert run_cases([speeds(3.0, 3.1)], check=True, record=False, records=places) == 1
    out = capsys.readouterr().out
    assert re.search(r"made +speed +4 +3\.1 +slower\n", out)
    assert out.endswith("1 of 2 got worse\n")
    assert run_cases([speeds(3.0, 3.9)], check=True, record=False, records=places) == 0  # noise met the first
    assert run_cases([speeds(3.8)], check=True, record=False, records=places) == 0


def test_the_check_says_where_no_record_of_this_kind_of_machine_is(places, capsys):
    assert run_cases([speeds(3.0)], check=True, record=False, records=places) == 0
    assert "no record of this kind of machine" in capsys.readouterr().out


def test_a_case_that_cannot_run_here_is_skipped_and_one_that_fails_is_an_error(places, capsys):
    def lacks():
        raise Skip("no data in /nowhere (set FOREBEAR_DATA)")

    assert run_cases([Case("without", lacks)], check=False, record=False, records=places) == 0
    assert "without skipped: no data in /nowhere (set FOREBEAR_DATA)" in capsys.readouterr().out
    assert run_cases([Case("broken", dict, larger=("speed",))], check=False, record=False, records=places) == 1
    assert "broken FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_cases_can_be_imported_and_those_unknown_are_refused():
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("--only nothing: expected some of head_scan_gd,")
