"""The demo: plant faults in a small corpus, train a classifier on it, and see whether attribution finds the faults."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forebear.errors import OutputExistsError
from forebear.evaluation.audits.artifacts.hans import HansAudit, audit_hans, hans_report
from forebear.evaluation.common.passages import rank_headings, row_passages
from forebear.evaluation.common.statistics import bootstrap_interval
from forebear.evaluation.demo.corpus import make_corpus, write_corpus
from forebear.evaluation.reports.report import Cell, Group, Passage, Report, Table, write_report
from forebear.indexer.building.build import build_index
from forebear.indexer.building.options import BuildOptions
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.training.fine_tuning import TrainOptions, train
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.results import SIDES
from forebear.retriever.answers.signs import note_of
from forebear.retriever.question.spec import QuerySpec
from forebear.retriever.retriever import Retriever

TOP = 10
JUDGE = "gc"  # the method by which the demo is judged; all are shown
BASE_MODEL = "minilm"
LEARNING_RATE = 1e-4  # twice the default: the rows are few
N_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class WrongLabels:
    """How well each method finds the planted wrong labels behind the answers they spoilt.

    Attributes:
        n_queries: Probe rows answered with the planted label.
        n_probe: Number of probe rows.
        share: Share of planted rows in the whole index: what random rows would give.
        precision: Share of planted rows among the top 10, by method.
        median_rank: Median rank of the first planted row, by method; one past the last rank looked at if none.
        groups: The first queries and their proponents.
    """

    n_queries: int
    n_probe: int
    share: float
    precision: dict[str, float]
    median_rank: dict[str, float]
    groups: tuple[Group, ...]

    @property
    def found(self) -> bool:
        """Whether the judging method finds the planted rows.

        At least half of the probe rows are answered with the planted label, the median rank of the first planted row is
        at most 3, and planted rows fill half of the top 10 (and are five times as frequent as in the index).
        """
        return (
            self.n_queries >= self.n_probe / 2
            and self.median_rank[JUDGE] <= 3
            and self.precision[JUDGE] >= max(0.5, 5 * self.share)
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Whether the demo found all planted faults, its report, and the path of the page."""

    found: bool
    report: Report
    page: Path


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
    say: Callable[[str], None] = lambda _line: None,
) -> Outcome:
    """Generate, train, index, retrieve, audit, report.

    Args:
        out: Folder for ``data``, ``run``, ``index`` and ``report``.
        seed: Random seed of the corpus and the training.
        device: ``auto``, ``cpu`` or ``cuda``.
        force: Replace what an earlier demo wrote there.
        progress: Called with the stage, rows done and rows in all.
        say: Called with one line after each of the five steps.

    Raises:
        OutputExistsError: ``out`` is not empty and ``force`` is not given.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise OutputExistsError(f"{folder} is not empty. Give another --out, or --force to replace an earlier demo.")
    started = time.perf_counter()
    data = write_corpus(make_corpus(seed), folder / "data", force=force)
    rows = {
        name: open_rows(data / f"{name}.parquet", need_labels=True) for name in ("train", "dev", "probe", "wrong_probe")
    }
    say(f"1/5 corpus: {rows['train'].n_rows:,} training pairs with planted faults, in {data}")
    run = train(
        rows["train"], BASE_MODEL, folder / "run", TrainOptions(learning_rate=LEARNING_RATE, seed=seed, device=device),
        dev=rows["dev"], force=force, progress=progress,
    )  # fmt: skip
    accuracy = run.checkpoints[-1].accuracy or 0.0
    say(f"2/5 model: {run.base_model} fine-tuned, {accuracy:.1%} right on the development pairs")
    chosen = choose_model(str(folder / "run"), ["all"])
    index = build_index(
        rows["train"],
        folder / "index",
        chosen.checkpoints,
        BuildOptions(stores=("features", "sbert"), device=device, max_length=chosen.max_length),
        force=force,
        progress=progress,
    )
    size_mib = sum(facts["bytes"] for facts in index.manifest.files.values()) / 2**20
    say(f"3/5 index: {index.manifest.n_rows:,} rows x {len(chosen.checkpoints)} checkpoints, {size_mib:.0f} MiB")
    retriever = Retriever(index, device=device)
    wrong = find_wrong_labels(retriever, folder)
    say(f"4/5 retrieval: the rows behind {wrong.n_queries} answers spoilt by wrong labels")
    audit = audit_hans(retriever, rows["probe"], top=TOP, progress=progress)
    report, all_found = _report(audit, wrong, retriever, folder, accuracy, time.perf_counter() - started)
    result = {
        "found": all_found,
        "wrong_labels": {"precision": wrong.precision, "median_rank": wrong.median_rank, "share": wrong.share},
        "overlap": hans_report(audit, retriever, rows["probe"], "forebear demo")[1],
        "dev_accuracy": accuracy,
    }
    page = write_report(report, folder / "report", result=result, force=force)
    say(f"5/5 audit and report, {time.perf_counter() - started:.0f} s in all")
    return Outcome(found=all_found, report=report, page=page)


def find_wrong_labels(retriever: Retriever, folder: Path) -> WrongLabels:
    """Ask for the rows behind probe rows that are answered with the planted label, and rank the planted rows."""
    planted = np.array(
        [
            mark == "wrong-label"
            for block in open_rows(folder / "data" / "train.parquet").blocks()
            for mark in block.table["planted"].to_pylist()
        ]
    )
    source = open_rows(folder / "data" / "wrong_probe.parquet", need_labels=True)
    methods = retriever.row_methods()
    spec = QuerySpec(methods=methods, top=100)
    label_ids = retriever.query_labels(source, required=True)
    (block,) = source.blocks(max(1, source.n_rows))
    assert label_ids is not None and block.labels is not None
    answers = retriever.answer_block(0, block.texts, label_ids(block.labels, 0), spec)
    assert answers.labels is not None
    spoilt = np.flatnonzero(answers.predictions != answers.labels)
    precision, median_rank = {}, {}
    for name in methods:
        hits = planted[answers.rankings[name][0].rows[spoilt]]
        precision[name] = float(hits[:, :TOP].mean()) if len(spoilt) else 0.0
        first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, hits.shape[1] + 1)
        median_rank[name] = float(np.median(first)) if len(spoilt) else float(hits.shape[1] + 1)
    index = retriever.index
    names = index.manifest.spec.text_columns
    groups = []
    for i in spoilt[:N_SHOWN]:
        ranking = answers.rankings[JUDGE][0]
        top = ranking.rows[i, :5]
        scores = ranking.scores[i, : len(top)]
        notes = ["planted wrong label" if planted[row] else "" for row in top]
        passages = row_passages(retriever, top, rank_headings(top, scores), notes=notes)
        query = Passage(
            f"probe row {i}",
            {name: column[i] for name, column in zip(names, block.texts, strict=True)},
            facts={
                "right": retriever.label_names[answers.labels[i]],
                "predicted": retriever.label_names[answers.predictions[i]],
            },
        )
        intro = note_of(JUDGE, SIDES[0], scores)
        groups.append(Group(f"Why is probe row {i} answered wrongly? By {JUDGE}", passages, intro, query))
    return WrongLabels(
        n_queries=len(spoilt),
        n_probe=source.n_rows,
        share=float(planted.mean()),
        precision=precision,
        median_rank=median_rank,
        groups=tuple(groups),
    )


def artifact_found(audit: HansAudit) -> bool:
    """Whether the 95% interval of the top rows' overlap lies at least 0.2 above the mean overlap of all rows."""
    low, _ = bootstrap_interval(audit.mean_overlap(TOP)[:, audit.methods.index(JUDGE)])
    return low >= audit.all_rows_overlap + 0.2


def _report(
    audit: HansAudit, wrong: WrongLabels, retriever: Retriever, folder: Path, accuracy: float, seconds: float
) -> tuple[Report, bool]:
    """The report of the demo (verdict, both findings, rows), and whether all planted faults were found."""
    probe = open_rows(folder / "data" / "probe.parquet", need_labels=True)
    overlap, _ = hans_report(audit, retriever, probe, f"forebear demo --out {folder}")
    by_overlap = artifact_found(audit)
    verdicts: list[list[Cell]] = [
        [
            "lexical-overlap shortcut",
            f"overlap {audit.mean_overlap(TOP)[:, audit.methods.index(JUDGE)].mean():.2f} in the top {TOP} by {JUDGE}, "
            f"{audit.all_rows_overlap:.2f} in all rows",
            "found" if by_overlap else "NOT found",
        ],
        [
            "wrong labels",
            f"{wrong.precision[JUDGE]:.0%} of the top {TOP} by {JUDGE} are planted, {wrong.share:.0%} of all rows; "
            f"the first has rank {wrong.median_rank[JUDGE]:g} (median)",
            "found" if wrong.found else "NOT found",
        ],
    ]
    all_found = by_overlap and wrong.found
    random_rows: list[list[Cell]] = [["(random rows)", wrong.share, None]]
    by_method: list[list[Cell]] = [
        [method, wrong.precision[method], wrong.median_rank[method]] for method in wrong.precision
    ]
    ranks = Table(
        "Planted wrong labels behind the answers they spoilt",
        ["method", f"share of the top {TOP}", "median rank of the first"],
        random_rows + by_method,
        f"{wrong.n_queries} of {wrong.n_probe} probe rows are answered as the wrong labels say.",
    )
    summary = (
        f"A classifier with {accuracy:.0%} accuracy on its development pairs takes a shortcut on {audit.n_queries} of "
        f"{audit.n_rows[1]} probe pairs and repeats wrong labels on {wrong.n_queries} of {wrong.n_probe}. Attribution "
        + ("finds the training rows behind both." if all_found else "does NOT find all that was planted.")
    )
    verdict = Table("What was planted, and was it found?", ["planted", "measured", "verdict"], verdicts)
    report = Report(
        "forebear demo",
        summary,
        (verdict, ranks, *overlap.tables),
        overlap.figures,
        (*wrong.groups, *overlap.groups),
        dict(overlap.provenance) | {"seconds, all in all": f"{seconds:.0f}"},
    )
    return report, all_found
