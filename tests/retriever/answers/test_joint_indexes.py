"""``--index A --index B``: the answers of one index of all their rows, or a refusal that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import labels, sentences, write_jsonl

from forebear import Index, InputError, MismatchError, build_index, open_rows, rows_from_texts
from forebear.cli.main import run
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.merged import depends_on_other_rows
from forebear.retriever.question.methods import METHODS
from forebear.retriever.retriever import JointRetriever, Retriever

N, CUT, QUERIES = 48, 16, sentences(5, seed=77, low=3)
TEXTS, LABELS = sentences(N, seed=71, low=4), labels(N, 2, seed=72)
AT_HEAD = ("nn-euc", "nn-cos", "nn-dot", "sbert-euc", "sbert-cos", "sbert-dot", "gd", "gc", "tracin", "tracin-last",
           "tracin-we", "tracin-we-topk", "tracin-we-common", "tracin-we-nocommon")  # fmt: skip
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tiny_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds an index of some rows; shards of 8 rows are the same in all, so that last digits are."""
    folder = tmp_path_factory.mktemp("joint")

    def make(name: str, rows: slice, seeds: tuple[int, ...] = (0, 1), **choices: Any) -> Path:
        if (folder / name).exists():
            return folder / name
        options = {
            "stores": ("features", "sbert", "words"), "sentence_model": tiny_model("bert", 2, 9), "words_tops": (0, 10),
            "scopes": ("head", "top-1"), "sketch_dim": 8, "sketch_bits": 64, "white_bits": 64, "shard_rows": 8,
            "calibration_queries": 0, "batch_tokens": 64,
        }  # fmt: skip
        chosen = choose_model(None, [tiny_model("bert", 2, seed) for seed in seeds], (1.0,) * len(seeds))
        source = rows_from_texts(TEXTS[rows], LABELS[rows])
        return build_index(source, folder / name, chosen.checkpoints, BuildOptions(**options | choices)).folder

    return make


@pytest.fixture(scope="module")
def three(build: Build) -> list[Path]:
    return [build("a", slice(0, CUT)), build("b", slice(CUT, CUT + 8)), build("c", slice(CUT + 8, N))]


def results(table: Any, starts: dict[str, int] | None = None) -> list[tuple[Any, ...]]:
    """Each result, with the row's number in an index of all rows."""
    return [
        (r["query"], r["method"], r["side"], r["rank"], r["row"] + (starts[r["index"]] if starts else 0), r["text"])
        for r in table.to_pylist()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("top", [5, 20])
def test_answers_at_the_head_and_by_words_are_those_of_one_index_of_all_rows(
    build: Build, three: list[Path], top: int
) -> None:
    """20 rows are more than one of the indexes has."""
    whole = Retriever(build("whole", slice(0, N))).retrieve(QUERIES, methods=list(AT_HEAD), top=top)
    found = JointRetriever(three).retrieve(QUERIES, methods=list(AT_HEAD), top=top)
    starts = dict(zip(map(str, three), (0, CUT, CUT + 8), strict=True))
    assert results(found, starts) == results(whole)
    assert found.column("score").to_pylist() == pytest.approx(whole.column("score").to_pylist(), rel=1e-12, abs=1e-12)
    for name in ("label", "prediction", "exact", "words"):
        assert found.column(name).to_pylist() == whole.column(name).to_pylist()
    assert found.column_names.index("index") == found.column_names.index("row") - 1


@pytest.mark.slow
def test_exact_scores_beyond_the_head_are_merged(build: Build, three: list[Path]) -> None:
    choices: dict[str, Any] = {"methods": ["gd", "gc"], "top": 6, "scope": "top-1", "exact": "full"}
    whole = Retriever(build("whole", slice(0, N))).retrieve(QUERIES, **choices)
    found = JointRetriever(three).retrieve(QUERIES, **choices)
    starts = dict(zip(map(str, three), (0, CUT, CUT + 8), strict=True))
    assert results(found, starts) == results(whole)
    assert found.column("score").to_pylist() == pytest.approx(whole.column("score").to_pylist(), rel=1e-4)
    with pytest.raises(InputError, match="estimates from the sketches of two indexes"):
        JointRetriever(three).retrieve(QUERIES, **choices | {"exact": "none"})


def test_methods_whose_scores_depend_on_other_rows_are_refused(three: list[Path]) -> None:
    both = JointRetriever(three[:2])
    refused = {name for name, method in METHODS.items() if depends_on_other_rows(method)}
    assert refused >= {"if", "rif", "rep", "tracin-tfidf", "if+", "if++", "saliency-if", "magic", "tracin-f"}
    assert not refused & set(AT_HEAD)
    with pytest.raises(InputError, match="if: its scores depend on all rows of an index"):
        both.retrieve(QUERIES, methods=["gc", "if"])
    with pytest.raises(InputError, match="one index's rows"):
        both.retrieve(QUERIES, methods=["gd"], group_by="label")


def test_indexes_that_do_not_belong_together_are_refused(build: Build, three: list[Path]) -> None:
    head: dict[str, Any] = {"stores": ("features",), "scopes": ("head",)}
    for other, name in (
        (build("model", slice(0, 8), (0, 2), **head), "checkpoint_sha256"),
        (build("length", slice(0, 8), max_length=6, **head), "max_length"),
    ):
        with pytest.raises(MismatchError, match=f"are not of one model: {name} is"):
            JointRetriever([three[0], other])
    with pytest.raises(InputError, match="given twice"):
        JointRetriever([three[0], three[1], three[0]])
    words = build("words", slice(0, 8), words_tops=(0, 3), scopes=("head",))
    both = JointRetriever([three[0], words])
    assert both.retrieve(QUERIES, methods=["gc"], top=2).num_rows == len(QUERIES) * 4
    with pytest.raises(MismatchError, match="words_tops is 0, 10 and 0, 3"):
        both.retrieve(QUERIES, methods=["tracin-we-topk"], top=2)


def test_the_command_asks_several_indexes(
    build: Build, three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0].parent)
    monkeypatch.setenv("COLUMNS", "200")
    test = write_jsonl(tmp_path / "test.jsonl", text=list(QUERIES), label=labels(5))
    asked = ["retrieve", "--index", "a", "--index", "b", "c", "--method", "gc,nn-cos", "--top", "4"]
    assert run([*asked, "--text", QUERIES[0]]) == 0
    assert "row" in capsys.readouterr().out
    assert run([*asked, "--test", str(test), "--out", str(tmp_path / "answers.parquet")]) == 0
    found = open_rows(tmp_path / "answers.parquet").n_rows
    assert found == len(QUERIES) * 2 * 2 * 4
    capsys.readouterr()
    assert run([*asked, "--text", QUERIES[0], "--group-by", "label"]) == 2
    assert "is about the rows of one index" in capsys.readouterr().err
    assert run(["retrieve", "--index", "a", "--index", "a", "--text", "good"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_columns_that_only_one_index_has_are_null_for_the_others(
    tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    chosen = choose_model(tiny_model("bert", 2, 0)).checkpoints
    indexes = []
    for name, columns in (("a", {"source": ["x"] * 8}), ("b", {"index": list(range(8))})):
        file = write_jsonl(tmp_path / f"{name}.jsonl", text=TEXTS[:8], label=LABELS[:8], **columns)
        indexes.append(build_index(open_rows(file), tmp_path / name, chosen, BuildOptions()))
    table = JointRetriever(indexes).retrieve(QUERIES[:1], methods=["gc"], top=16)
    assert table.num_rows == 32
    of_a = [row for row in table.to_pylist() if row["index"] == str(tmp_path / "a")]
    assert {(row["source"], row["row_index"]) for row in of_a} == {("x", None)}
    assert isinstance(indexes[0], Index)
