"""Scores summed over groups of training rows, against sums over the full scores by numpy."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import labels, sentences, write_jsonl

import forebear
from forebear import Index, Retriever
from forebear.cli.main import run
from forebear.errors import InputError, NonFiniteError
from forebear.indexer.building.build import retire_rows
from forebear.indexer.model.forward import run_forward
from forebear.retriever.effects.changes import Predictions
from forebear.retriever.effects.listed import effects_of_set
from forebear.retriever.effects.refits import HeadRefits

N = 41
BY = [("anna", "bert", None, "carl", "null")[(i * i + i // 2) % 5] for i in range(N)]
YEARS = [2000 + i % 7 for i in range(N)]
QUERIES = sentences(5, seed=30)
METHODS = ("gd", "gc", "if", "rif", "tracin", "rep", "nn-dot", "nn-cos", "tracin-we", "tracin-we-topk", "tracin-tfidf")


@pytest.fixture(scope="module")
def retriever(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """Over rows with an annotator and a year, of which some are retired."""
    folder = tmp_path_factory.mktemp("groups") / "index"
    rows = [
        {"text": text, "label": label, "by": by, "year": year}
        for text, label, by, year in zip(sentences(N), labels(N), BY, YEARS, strict=True)
    ]
    Index.build(
        tiny_model(), rows, folder, stores=("features", "words"), words_tops=(0, 3), scopes=("head", "top-1"),
        calibration_queries=0, shard_rows=9, device="cpu", warn=lambda _line: None,
    )  # fmt: skip
    return Retriever(retire_rows(folder, [3, 17, 40]))


def oracle(scores: np.ndarray, live: np.ndarray, groups: list[Any]) -> dict[Any, dict[str, Any]]:
    """Of one query: sums by a loop over the rows."""
    found: dict[Any, dict[str, Any]] = {}
    for score, row in zip(scores.tolist(), live.tolist(), strict=True):
        group = found.setdefault(groups[row], {"rows": 0, "sum": 0.0, "size": 0.0, "scores": {}})
        group["rows"] += 1
        group["sum"] += score
        group["size"] += abs(score)
        group["scores"][row] = score
    total = sum(group["size"] for group in found.values())
    for group in found.values():
        group |= {"mean": group["sum"] / group["rows"], "share": group["size"] / total if total else 0.0}
        sign = 1 if group["sum"] >= 0 else -1
        group["best"] = max(sign * score for score in group["scores"].values()) * sign
    return found


@pytest.mark.parametrize(("column", "groups"), [("by", BY), ("year", YEARS), ("label", None)])
@pytest.mark.parametrize("scope", ["head", "top-1"])
def test_groups_are_sums_over_all_live_rows(retriever: Retriever, column: str, groups: Any, scope: str) -> None:
    index = retriever.index
    names = index.manifest.spec.label_names
    groups = [names[i] for i in index.labels] if groups is None else groups
    methods = METHODS if scope == "head" else ("gd", "if", "gc")
    for method in methods:
        table = retriever.retrieve(QUERIES, methods=[method], group_by=column, top=20, scope=scope)
        scores = retriever.scores(QUERIES, method, scope=scope)
        for query in range(len(QUERIES)):
            truth = oracle(scores[query], index.live, groups)
            lines = [line for line in table.to_pylist() if line["query"] == query]
            assert len(lines) == len(truth)
            assert [line["rank"] for line in lines] == list(range(1, len(truth) + 1))
            assert all(a["sum"] >= b["sum"] for a, b in itertools.pairwise(lines))
            for line in lines:
                expected = truth[line["group"]]
                assert line["rows"] == expected["rows"]
                for name in ("sum", "mean", "share"):
                    assert line[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), (method, name)
                assert line["best_score"] == pytest.approx(expected["best"], rel=1e-9)
                assert line["best_score"] == expected["scores"][line["best_row"]]
            assert sum(line["share"] for line in lines) == pytest.approx(1.0)


def test_only_both_ends_are_given_and_their_ranks_say_so(retriever: Retriever) -> None:
    whole, ends = (
        retriever.retrieve(QUERIES[:2], methods=["gd", "if"], group_by="year", top=top).to_pylist() for top in (9, 2)
    )
    assert len(whole) == 2 * 2 * 7
    wanted = [line for line in whole if line["rank"] in (1, 2, 6, 7)]
    for found, line in zip(ends, wanted, strict=True):
        for name in ("effect", "effect_probability"):
            effect, wanted_effect = found.pop(name), line.pop(name)
            assert effect is wanted_effect is None or effect == pytest.approx(wanted_effect, rel=1e-9)
        assert found == line


def test_effects_of_groups_are_those_of_their_rows_taken_out_together(retriever: Retriever) -> None:
    index = retriever.index
    lines = retriever.retrieve(QUERIES[:2], methods=["gd", "if"], group_by="by").to_pylist()
    together = retriever.retrieve(QUERIES[:2], methods=["if"], group_by="by", aggregate=True).to_pylist()
    asked = Predictions.of(forward := run_forward(retriever.classifier(), [QUERIES[:2]]), forward.predictions)
    for name in set(BY):
        rows = np.array([row for row in index.live if BY[row] == name])
        effects, probabilities = effects_of_set(HeadRefits(retriever.models), asked, rows, exact=True)
        found = [line for line in lines if (line["group"], line["method"]) == (name, "if")]
        assert [line["effect"] for line in found] == pytest.approx(effects.tolist(), rel=1e-9)
        assert [line["effect_probability"] for line in found] == pytest.approx(probabilities.tolist(), rel=1e-9)
        (summed,) = (line for line in together if line["group"] == name)
        assert summed["effect"] == pytest.approx(effects.sum(), rel=1e-9)
    assert all(line["effect"] is None for line in lines if line["method"] == "gd")


def test_a_whole_class_has_no_effect_as_its_size_would_be_that_of_the_damping(
    retriever: Retriever, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a class the head's change grows nearly as 1 / damping; without a year's rows it does not."""
    live = retriever.index.live
    for column, groups, stated in (("label", retriever.index.labels, False), ("year", np.array(YEARS), True)):
        table = retriever.retrieve(QUERIES, methods=["if"], group_by=column, damping="0.001x", top=9)
        assert table.column("effect").null_count == table.column("effect_probability").null_count
        assert table.column("effect").null_count == (0 if stated else len(table))
        for group in np.unique(groups):
            rows = live[groups[live] == group]
            small, large = (
                np.linalg.norm(HeadRefits(retriever.models, damping).together(rows, exact=True))
                for damping in ("0.001x", "0.002x")
            )
            assert (small / large > 1.8) != stated
    asked_by_command = ["--index", str(retriever.index.folder), "--text", QUERIES[0], "--method", "if"]
    shown = {}
    for column in ("label", "year"):
        assert run(["retrieve", *asked_by_command, "--damping", "0.001x", "--group-by", column]) == 0
        shown[column] = " ".join(capsys.readouterr().out.split())
    assert "No effect: the rows that stay say too little of the head, whichever group is left out." in shown["label"]
    assert "predicted rise" not in shown["label"]
    assert "predicted rise of the target's loss in nats" in shown["year"]
    assert "say too little" not in shown["year"]


def test_groups_are_shown_in_a_notebook_too(retriever: Retriever) -> None:
    shown = forebear.show(retriever.retrieve(QUERIES[:1], methods=["gd", "gc"], group_by="by"))
    assert "query 0 · gc · groups of “" in repr(shown)
    assert "anna" in repr(shown)
    assert all(name in shown._repr_html_() for name in ("share", "best_row", "carl"))


def test_an_aggregate_is_summed_over_the_queries_first(retriever: Retriever) -> None:
    table = retriever.retrieve(QUERIES, methods=["if"], group_by="by", aggregate=True)
    truth = oracle(retriever.scores(QUERIES, "if").sum(axis=0), retriever.index.live, BY)
    assert {line["group"]: line["sum"] for line in table.to_pylist()} == {
        group: pytest.approx(found["sum"], rel=1e-9) for group, found in truth.items()
    }
    assert set(table.column("query").to_pylist()) == {0}
    assert json.loads(table.schema.metadata[b"forebear"])["group_by"] == "by"


def test_what_cannot_be_summed_is_refused_by_name(retriever: Retriever) -> None:
    for choices, message in (
        ({"group_by": "bye"}, r'group_by="bye": .* keeps no such column; it keeps by, year'),
        ({"group_by": "by", "methods": ["nn-euc"]}, "nn-euc is minus a distance"),
        ({"group_by": "by", "methods": ["gd", "if++"]}, r"if\+\+ scores spans"),
        ({"group_by": "by", "methods": ["saliency-if"]}, "saliency-if scores spans, or asks of a word"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.retrieve(QUERIES, **choices)  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_an_error(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = Retriever._scores

    def spoilt(*given: Any) -> Any:
        scores = scored(*given)
        scores["gd"][1, 5] = np.nan
        return scores

    monkeypatch.setattr(Retriever, "_scores", spoilt)
    with pytest.raises(NonFiniteError, match=f"training row {retriever.index.live[5]} for query 1"):
        retriever.retrieve(QUERIES, methods=["gd"], group_by="by")


def test_a_column_is_known_by_its_name_in_results_too(tiny_model: Any, tmp_path: Path) -> None:
    rows = [{"text": t, "y": y, "label": by} for t, y, by in zip(sentences(N), labels(N), BY, strict=True)]
    index = Index.build(tiny_model(), rows, tmp_path / "index", label_column="y", dampings=(), warn=lambda _line: None)
    found = {
        name: set(Retriever(index).retrieve(QUERIES[:1], methods=["gd"], group_by=name).column("group").to_pylist())
        for name in ("label", "row_label")
    }
    assert found == {"label": {"LABEL_0", "LABEL_1"}, "row_label": set(BY)}
    bare = Index.build(
        tiny_model(), rows, tmp_path / "bare", label_column="y", keep_columns="none", dampings=(), warn=print
    )
    with pytest.raises(InputError, match="it keeps none"):
        forebear.Retriever(bare).retrieve(QUERIES[:1], group_by="by")


def test_the_command_shows_and_writes_groups(retriever: Retriever, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(retriever.index.folder, tmp_path / "index")
    test = write_jsonl(tmp_path / "test.jsonl", text=QUERIES, label=labels(5))
    ask = ["retrieve", "--index", str(folder), "--test", str(test), "--method", "gd,if", "--group-by", "by"]
    assert run(ask) == 0
    shown = capsys.readouterr().out
    assert "gd: by behind" in shown
    assert "if: by behind" in shown
    for word in ("anna", "bert", "null", "share of", "|scores|", "best"):
        assert word in shown
    table = retriever.retrieve(test, methods=["gd", "if"], group_by="by")
    for suffix in ("parquet", "jsonl", "csv"):
        out = tmp_path / f"groups.{suffix}"
        assert run([*ask, "--out", str(out)]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert f"5 queries, {table.num_rows} lines of groups by by" in said
    written = pq.read_table(tmp_path / "groups.parquet")
    assert written.to_pylist() == table.to_pylist()
    assert json.loads(written.schema.metadata[b"forebear"])["group_by"] == "by"
    lines = list(csv.DictReader((tmp_path / "groups.csv").read_text().splitlines()))
    assert [float(line["sum"]) for line in lines] == table.column("sum").to_pylist()
    assert run([*ask, "--aggregate"]) == 0
    assert "5 queries together" in capsys.readouterr().out
    for more, message in (
        (["--certify"], "--certify is about single rows"),
        (["--method", "nn-euc"], "nn-euc is minus"),
    ):
        assert run([*ask, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
