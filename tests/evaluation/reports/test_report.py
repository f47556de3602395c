from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_outline import outline
from rich.console import Console

from forebear.cli.screen import tables
from forebear.errors import InputError, NonFiniteError, OutputExistsError, StorageError
from forebear.evaluation.reports import report as module
from forebear.evaluation.reports.charts import bar_chart, line_chart
from forebear.evaluation.reports.report import (
    REPORT_FILES,
    Figure,
    Group,
    Passage,
    Report,
    Table,
    check_folder,
    format_cell,
    render_csv,
    render_html,
    write_report,
)

HOSTILE = '<script>alert("x")</script> & <b onclick=go()> </style>'
TABLE = Table("Overlap", ["method", "mean", "error"], [["gc", 0.84, 0.0102], ["if", 0.5, None]], note="n = 200")


def small_chart() -> str:
    return bar_chart(
        ["gc", "if"],
        {"top 10": [0.84, -0.5], "random 10": [0.5, 0.49]},
        xlabel="Overlap",
        errors={"top 10": [0.02, None]},
        reference=("all rows", 0.5),
    )


def full_report(text: str = "plain") -> Report:
    passages = [
        Passage(f"rank {i} · {text}", {f"premise {text}": text}, frozenset({"Alert", "go"}), {text: text}, text)
        for i in range(1, 8)
    ]
    figure = Figure(text, bar_chart([text], {text: [1.0], "b": [2.0]}, xlabel=text, reference=(text, 1.5)), text)
    return Report(
        title=text,
        summary=text,
        tables=[Table(text, [text, "n"], [[text, 3]], text), TABLE],
        figures=[figure, Figure("second", small_chart())],
        groups=[Group(text, passages, text, query=passages[0])],
        provenance={text: text},
    )


def test_the_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    path = write_report(full_report(), tmp_path / "a" / "b", result={"mean": 0.84})
    assert path == tmp_path / "a" / "b" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*REPORT_FILES, "table-overlap.csv"])


def test_text_from_the_data_never_becomes_markup() -> None:
    page = outline(render_html(full_report(HOSTILE)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "img", "link", "iframe", "object"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in "".join(page.text)


def test_page_reaches_for_nothing_outside() -> None:
    page = outline(render_html(full_report()))
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    source = render_html(full_report())
    assert "@import" not in source and "@font-face" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert "default-src 'none'" in source


def test_page_is_semantic_and_its_ids_are_unique_and_resolve() -> None:
    page = outline(render_html(full_report()))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and "nav" in tags and "details" in tags
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a[name] or "" for _, a in page.elements for name in ("href", "xlink:href") if name in a]
    targets += ["#" + (a["aria-labelledby"] or "") for _, a in page.elements if "aria-labelledby" in a]
    assert targets and {target[1:] for target in targets} <= set(ids)
    assert all(a.get("scope") for tag, a in page.elements if tag == "th")
    regions = [a for _, a in page.elements if a.get("role") == "region"]
    assert regions and all(a["tabindex"] == "0" for a in regions)


def test_page_serves_dark_screens_and_paper() -> None:
    source = render_html(full_report())
    assert "prefers-color-scheme: dark" in source and "@media print" in source
    svg = source[source.index("<svg") : source.index("</svg>")]
    assert "currentColor" in svg and "#010203" not in svg and "#000000" not in svg


def test_words_are_marked_whole_and_in_any_case() -> None:
    passage = Passage("row 1", {"text": "The cat's category: Cat, CAT."}, {"cat.", "."})
    page = render_html(Report("t", "s", groups=[Group("g", [passage])]))
    assert "The cat&#39;s category: <mark>Cat</mark>, <mark>CAT</mark>." in page


def test_long_lists_are_folded_away() -> None:
    few = [Passage(f"rank {i}", {"text": "t"}) for i in range(4)]
    assert "<details>" not in render_html(Report("t", "s", groups=[Group("g", few)]))
    many = [*few, *few]
    page = render_html(Report("t", "s", groups=[Group("g", many)]))
    assert page.count("<article") == 8 and "Show 4 more" in page
    long = Table("long", ["row"], [[i] for i in range(1200)])
    assert "Show 1\u202f200 rows" in render_html(Report("t", "s", tables=[long]))


def test_report_without_parts_is_a_page() -> None:
    page = outline(render_html(Report("Title", "Summary.")))
    assert "Summary." in page.text and "nav" not in [tag for tag, _ in page.elements]
    assert "No rows." in render_html(Report("t", "s", tables=[Table("empty", ["a", "b"], [])]))


def test_existing_report_is_kept_unless_forced(tmp_path: Path) -> None:
    write_report(Report("first", "s"), tmp_path, result={})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"already holds report\.html, table\.csv, result\.json.*force=True"):
        write_report(Report("second", "s"), tmp_path, result={})
    with pytest.raises(OutputExistsError):
        check_folder(tmp_path)
    check_folder(tmp_path, force=True)
    assert "first" in (tmp_path / "report.html").read_text()
    write_report(Report("second", "s"), tmp_path, result={}, force=True)
    assert "second" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == len(REPORT_FILES) + 1


def test_folder_with_other_files_is_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert write_report(Report("t", "s"), tmp_path, result={}).exists()


def test_a_file_in_the_way_is_refused_even_when_forced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="other data"):
        write_report(Report("t", "s"), tmp_path / "file", result={}, force=True)
    with pytest.raises(StorageError, match="cannot write"):
        write_report(Report("t", "s"), tmp_path / "file" / "below", result={})


def test_a_failed_write_leaves_the_old_report_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(Report("first", "s"), tmp_path, result={})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_report(Report("second", "s"), tmp_path, result={}, force=True)
    assert "first" in (tmp_path / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(REPORT_FILES)


def test_a_report_written_over_another_is_never_a_mixture_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each step that touches the disk, until a run gets through."""

    class Killed(BaseException):
        pass

    def dies_at(number: int) -> None:
        """Let the number-th of all calls that sync, remove or rename a file raise."""
        calls = iter(range(1, 1000))

        def counted(function):
            def call(*args, **kwargs):
                if next(calls) == number:
                    raise Killed
                return function(*args, **kwargs)

            return call

        for owner, name in ((os, "fsync"), (Path, "unlink"), (Path, "replace")):
            patched.setattr(owner, name, counted(getattr(owner, name)))

    reports = {title: Report(title, title, (Table(title, ["n"], [[title]]),)) for title in ("first", "second")}
    found = set()
    for number in range(1, 100):
        folder = tmp_path / str(number)
        write_report(reports["first"], folder, result={"of": "first"}, beside={"rows.txt": "first"})
        with monkeypatch.context() as patched:
            dies_at(number)
            try:
                write_report(
                    reports["second"], folder, result={"of": "second"}, force=True, beside={"rows.txt": "second"}
                )
            except Killed:
                killed = True
            else:
                killed = False
        present = [folder / name for name in (*REPORT_FILES, "rows.txt") if (folder / name).exists()]
        of = {title for title in reports for path in present if title in path.read_text()}
        assert len(of) <= 1, f"killed at step {number}: {sorted(path.name for path in present)} are of both"
        found.add((*of, len(present)))
        if not killed:
            break
    assert {("first", 5), ("second", 5), ("first", 2), ("second", 2)} <= found  # it was killed at each kind of step
    assert not killed


def test_result_is_strict_json_with_plain_numbers_and_provenance(tmp_path: Path) -> None:
    result = {"a": np.float32(0.5), "b": np.arange(2), "c": Path("x"), "d": {"z", "y"}, "e": None, "f": np.bool_(True)}
    write_report(Report("t", "s", provenance={"seed": "0"}), tmp_path, result=result)
    read = json.loads((tmp_path / "result.json").read_text())
    plain = {"a": 0.5, "b": [0, 1], "c": "x", "d": ["y", "z"], "e": None, "f": True}
    assert read == {"provenance": {"seed": "0"}, **plain}


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float64("nan")])
def test_nan_never_passes_quietly(tmp_path: Path, bad: float) -> None:
    with pytest.raises(NonFiniteError):
        write_report(Report("t", "s"), tmp_path, result={"a": [bad]})
    with pytest.raises(NonFiniteError, match=r"row 0 of table 'x' .* under 'a'"):
        write_report(Report("t", "s", tables=[Table("x", ["a"], [[bad]])]), tmp_path, result={})
    with pytest.raises(NonFiniteError):
        passage = Passage("h", {}, facts={"loss": bad})
        write_report(Report("t", "s", groups=[Group("g", [passage])]), tmp_path, result={})
    with pytest.raises(NonFiniteError, match="'s'"):
        bar_chart(["a"], {"s": [bad]}, xlabel="x")
    with pytest.raises(NonFiniteError, match="'s'"):
        bar_chart(["a"], {"s": [1.0]}, xlabel="x", errors={"s": [bad]})
    assert list(tmp_path.iterdir()) == []


def test_bars_of_errors_reach_both_ends_of_an_interval_that_is_not_symmetric() -> None:
    def drawn(error: float | tuple[float, float]) -> str:
        return bar_chart(["a", "b"], {"s": [1.0, 2.0]}, xlabel="x", errors={"s": [error, None]})

    even, uneven = drawn(0.3), drawn((0.1, 0.3))
    assert even == drawn((0.3, 0.3))
    assert uneven not in (even, drawn(0.1), drawn((0.3, 0.1)))
    with pytest.raises(NonFiniteError, match="'s'"):
        drawn((0.1, float("nan")))


def test_each_table_is_a_file_of_its_own_and_none_of_a_replaced_report_stays(tmp_path: Path) -> None:
    times = Table("Time, s: à la carte", ["method", "seconds"], [['a "b"', 3]])
    same = Table("time s a la carte?", ["x"], [])
    write_report(Report("t", "s", tables=[TABLE, times, Table("†", ["y"], []), same, same]), tmp_path, result={})
    assert (tmp_path / "table.csv").read_text() == "method,mean,error\ngc,0.84,0.0102\nif,0.5,\n"
    assert (tmp_path / "table-time-s-la-carte.csv").read_text() == 'method,seconds\n"a ""b""",3\n'
    names = {path.name for path in tmp_path.glob("table*.csv")}
    assert {"table-more.csv", "table-time-s-a-la-carte.csv", "table-time-s-a-la-carte-5.csv"} < names
    assert len(names) == 5
    write_report(Report("t", "s", tables=[times]), tmp_path, result={}, force=True)
    assert [path.name for path in tmp_path.glob("table*.csv")] == ["table.csv"]


def test_only_files_of_the_report_that_is_replaced_go(tmp_path: Path) -> None:
    report = Report("t", "s", tables=[TABLE, TABLE])
    (tmp_path / "table-overlap.csv").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"already holds table-overlap\.csv"):
        check_folder(tmp_path)  # before the work
    (tmp_path / "table-overlap.csv").rename(tmp_path / "table-mine.csv")
    write_report(report, tmp_path, result={}, force=True, beside={"worklist.csv": "row\n1\n"})
    (tmp_path / "worklist.jsonl").write_text("mine")
    write_report(Report("t", "s"), tmp_path, result={}, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {*REPORT_FILES, "table-mine.csv", "worklist.jsonl"}
    assert (tmp_path / "table-mine.csv").read_text() == "mine"


def test_rows_to_decide_on_stand_first_and_what_is_behind_them_next() -> None:
    listed = [Passage(f"{i}. row {i}", {"text": f"text <{i}>"}, facts={"label": "no"}, note="why") for i in range(12)]
    figure = Figure("f", bar_chart(["a"], {"s": [1.0]}, xlabel="x"))
    behind = [Group("behind", [Passage("h", {"text": "x"})])]
    report = Report("t", "s", [TABLE], [figure], behind, listed=listed, n_listed=30)
    page = render_html(report)
    places = [page.index(f'<h2 id="{name}">') for name in ("listed", "rows", "figures", "tables")]
    assert places == sorted(places)
    assert page.count('id="rows"') == 1
    assert "The first 12 of 30." in page
    assert "text &lt;11&gt;" in page
    assert page.index("Show 2 more") < page.index("text &lt;10&gt;")
    without = render_html(replace(report, listed=()))
    assert without.index('<h2 id="figures">') < without.index('<h2 id="tables">') < without.index('<h2 id="rows">')


def test_no_cell_of_a_csv_table_is_a_formula_and_numbers_stay_numbers() -> None:
    texts = ["=1+1", "@a", "- a dull film", "-0.5", "'tis", "'-", "+1e3", "\tx"]
    rows = [[text, number] for text, number in zip(texts, [-1, -0.25, None, 3, True, 0, -2, 1], strict=True)]
    lines = list(csv.reader(io.StringIO(render_csv(Table("t", ["text", "number"], rows)))))[1:]
    assert [line[0] for line in lines] == ["'=1+1", "'@a", "'- a dull film", "-0.5", "'tis", "''-", "+1e3", "'\tx"]
    assert [line[1] for line in lines] == ["-1", "-0.25", "", "3", "True", "0", "-2", "1"]


def test_table_row_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="row 1 of table 't' has 1 cells; expected 2"):
        render_html(Report("t", "s", tables=[Table("t", ["a", "b"], [[1, 2], [3]])]))


@pytest.mark.parametrize(
    ("value", "decimals", "shown"),
    [
        (None, 2, "–"),
        (True, None, "yes"),
        (-12345, None, "\u221212\u202f345"),
        (0.123456, None, "0.1235"),
        (0.5, 4, "0.5000"),
        (0.0, 2, "0.00"),
        (-1.2e-7, 4, "\u22121.200e\u221207"),
        (np.float32(2.5), None, "2.5"),
        (np.int64(7), 2, "7"),
        ("a-b", None, "a-b"),
    ],
)
def test_cells_are_set_for_reading(value: object, decimals: int | None, shown: str) -> None:
    assert format_cell(value, decimals) == shown  # type: ignore[arg-type]


def test_column_of_numbers_shares_its_decimals_and_is_set_flush_right() -> None:
    table = Table("t", ["name", "mean"], [["a", 0.5], ["b", 0.25], ["c", None]])
    page = render_html(Report("t", "s", tables=[table]))
    assert '<td class="n">0.5000</td>' in page and '<td class="n">0.2500</td>' in page
    assert '<th scope="row">a</th>' in page and '<th scope="col" class="n">mean</th>' in page


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_number_of_a_table_is_cut_on_a_narrow_screen(width, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tables, "OUT", Console(width=width, highlight=False))
    names = ["method", *(f"random low {i}" for i in range(9)), "text"]
    numbers = [1234.5 + i for i in range(9)]
    tables.show_table(module.Table("T", names, [["saliency-if-token", *numbers, "a long text " * 20]]))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "saliency-if-token" in shown
    assert all(module.format_cell(number, 3) in shown for number in numbers)
    assert " ".join(shown.split()).count("long") == 20


def test_charts_are_deterministic_and_carry_no_date() -> None:
    assert small_chart() == small_chart()
    assert not re.search(r"<metadata|dc:date|matplotlib v", small_chart(), flags=re.IGNORECASE)


def test_bar_chart_says_its_values_in_text_and_tells_series_apart_without_colour() -> None:
    svg = small_chart()
    for text in ("0.84", "\u22120.50", "top 10", "random 10", "all rows", "Overlap", "gc"):
        assert f">{text}</text>" in svg
    assert "#0072b2" in svg and "#e69f00" in svg
    assert "url(#" in svg and "<pattern" in svg  # the second series' hatch


def test_line_chart_names_each_line_at_its_end() -> None:
    lines = {"gc": [0.0, -0.2], "if": [0.0, -0.2]}
    svg = line_chart([0, 10], lines, xlabel="Rows", ylabel="Change", errors={"gc": [0.0, 0.1]})
    assert svg.startswith("<svg") and ">gc</text>" in svg and ">if</text>" in svg
    assert svg == line_chart([0, 10], lines, xlabel="Rows", ylabel="Change", errors={"gc": [0.0, 0.1]})


def test_chart_takes_dollar_signs_and_markup_as_text() -> None:
    svg = bar_chart(["$x_1$ <b>"], {"a & b": [0.0]}, xlabel="$")
    assert ">$x_1$ &lt;b&gt;</text>" in svg


@pytest.mark.parametrize(
    ("labels", "series"),
    [([], {"a": []}), (["x"], {}), (["x"], {"a": [1, 2]}), (["x"], {str(i): [1] for i in range(7)})],
)
def test_charts_refuse_what_they_cannot_show(labels: list[str], series: dict[str, list[float]]) -> None:
    with pytest.raises(InputError):
        bar_chart(labels, series, xlabel="x")


@pytest.mark.parametrize(
    "svg",
    [
        "<svg><script>go()</script></svg>",
        "<svg onload='go()'></svg>",
        "<svg xmlns:xlink='http://www.w3.org/1999/xlink'><use xlink:href='http://x/y'/></svg>",
        "<svg><image href='data:image/png;base64,AA'/></svg>",
        "<svg><foreignObject/></svg>",
        "<svg>",
        "<p>hello</p>",
        "<!DOCTYPE svg [<!ENTITY a 'b'>]><svg>&a;</svg>",
    ],
)
def test_drawing_with_code_or_links_is_refused(svg: str) -> None:
    with pytest.raises(InputError, match="figure 'f'"):
        render_html(Report("t", "s", figures=[Figure("f", svg)]))


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, forebear.evaluation.reports.report; "
        "heavy = {'matplotlib', 'jinja2', 'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "matplotlib.pyplot" not in Path(module.__file__).read_text()
