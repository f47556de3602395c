"""``forebear evaluate``: the evaluations that compare methods without retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forebear.cli.options.asking import (
    IndexOptions,
    Methods,
    NRows,
    QuestionOptions,
    ReportOptions,
    SampleOptions,
    ScopeOptions,
    SearchOptions,
    Seed,
    Test,
    TestOptions,
    command_line,
    default_methods,
    integers,
    make_question,
    open_queries,
    open_retriever,
)
from forebear.cli.options.groups import grouped
from forebear.cli.options.rows import open_rows_aloud
from forebear.cli.options.shared import LabelNames, Recall, TextColumns, Unlabelled
from forebear.cli.screen.console import Variadic, listed
from forebear.errors import InputError

CORRELATION_HELP = """Do two methods order the training rows alike? Mean Spearman correlation of every pair.

Over a sample of test rows and of training rows. Constant scores have no order; they are left out and counted.

Example:

    forebear evaluate correlation --index I --test dev.csv --method gd,if,gc,rif,nn-cos --queries 100 --rows 500
"""
OVERLAP_HELP = """Do two methods bring up the same training rows? Share of common rows in the tops of every pair.

The top is that of the signed ranking. A share p of N rows stands for floor(p N) rows.

Examples:

    forebear evaluate overlap --index I --test dev.csv --method gd,if,gc --top 10,50

    forebear evaluate overlap --index I --test dev.csv --method gd,if --share 0.01,0.1 --out R
"""
RANDOMIZED_HELP = """Do scores depend on what the model has learned? Spearman with randomly initialised models.

Near 0 is good. Asked about the trained model's predictions, and about each model's own. The sampled training rows are
indexed under each random model in a temporary folder.

Example:

    forebear evaluate randomized --index I --test dev.csv --method gd,if,gc,rif --random-seeds 0,1,2
"""
NEAR_DUPLICATES_HELP = """Is a training row found when it is asked about, as it is or with one word changed?

hit@1 and hit@10. One word of each text is added, removed or replaced at a seeded random place; words are parted by
white space. Rows with the same texts as the source count as hits.

Example:

    forebear evaluate near-duplicates --index I --method nn-cos,gc,gd,if --queries 500
"""
SALIENCY_HELP = """Do influence and saliency agree? Influence of rows holding salient word pieces; tops without one.

For each test row's most negative, median and most positive word piece: the mean z-normalised influence of rows at the
top that hold it, and the overlap of the tops before and after it is masked.

Example:

    forebear evaluate saliency-consistency --index I --test dev.csv --method if --queries 50
"""
CANCELLATION_HELP = """Do the training rows' gradients cancel out? By layer, biases against weights.

The sum of eta ||dL/dW|| over training rows, over how far W moved between the index's checkpoints; and the mean cosine
of two rows' gradients. Needs an index of two or more checkpoints.

Example:

    forebear evaluate cancellation --index I --rows 100
"""
RECALL_HELP = """How much of the exact top k does retrieval find, and how much faster? By method, at both ends.

Compares --exact rerank at --recall with scoring every row.

Example:

    forebear evaluate recall --index I --test dev.csv --scope all --method gd,gc,if --recall 0.95 --queries 30
"""
MISLABELLED_HELP = """Does a row's influence on itself tell wrong labels? AUC and precision, beside two baselines.

Wrong are the rows whose label in the index differs from the one in another column of the training file, or those
whose numbers are given.

Examples:

    forebear evaluate mislabelled --index I --true-label clean_label --method gd,if

    forebear evaluate mislabelled --index I --wrong-rows flipped.txt --method if --damping 0.1x
"""


def register(evaluations: typer.Typer) -> None:
    """Add the commands to the group."""
    for name, help_text, command in (
        ("correlation", CORRELATION_HELP, correlation),
        ("overlap", OVERLAP_HELP, overlap),
        ("randomized", RANDOMIZED_HELP, randomized),
        ("near-duplicates", NEAR_DUPLICATES_HELP, near_duplicates),
        ("saliency-consistency", SALIENCY_HELP, saliency_consistency),
        ("cancellation", CANCELLATION_HELP, cancellation),
        ("recall", RECALL_HELP, recall),
        ("mislabelled", MISLABELLED_HELP, mislabelled),
    ):
        evaluations.command(name, help=help_text, cls=Variadic)(command)


@grouped(queries=100)
def correlation(
    at: IndexOptions,
    tested: TestOptions,
    asked: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    rows: NRows = 500,
) -> None:
    """See CORRELATION_HELP."""
    from forebear.evaluation.measures.correlation import correlation_report, correlations

    retriever = open_retriever(at, report)
    question = make_question(retriever, method, asked, quiet=report.quiet)
    queries = open_queries(retriever, tested, sample, question)
    found = correlations(retriever, queries, question, n_rows=rows, seed=sample.seed)
    report.finish(*correlation_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped(queries=100)
def overlap(
    at: IndexOptions,
    tested: TestOptions,
    asked: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Annotated[
        list[str] | None,
        typer.Option("--top", help="Rows in the tops. Default: 10, 50, unless --share is given.", show_default=False),
    ] = None,
    share: Annotated[
        list[str] | None, typer.Option("--share", help="Shares of all rows, such as 0.1.", show_default=False)
    ] = None,
) -> None:
    """See OVERLAP_HELP."""
    from forebear.evaluation.measures.top_overlap import depths_of, top_overlap_report, top_overlaps

    retriever = open_retriever(at, report)
    question = make_question(retriever, method, asked, quiet=report.quiet)
    tops = integers("--top", top) or ([] if share else [10, 50])
    depths = depths_of(tops, listed(share), retriever.index.manifest.n_live)
    queries = open_queries(retriever, tested, sample, question)
    with report.progress() as progress:
        found = top_overlaps(retriever, queries, question, depths, progress=progress)
    report.finish(*top_overlap_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped(queries=100)
def randomized(
    at: IndexOptions,
    tested: TestOptions,
    asked: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    random_seeds: Annotated[
        list[str] | None,
        typer.Option("--random-seeds", help="One for each random model. Default: 0,1,2.", show_default=False),
    ] = None,
    rows: NRows = 500,
) -> None:
    """See RANDOMIZED_HELP."""
    from forebear.evaluation.measures.randomized import randomized_correlations, randomized_report
    from forebear.retriever.question.methods import METHODS

    retriever = open_retriever(at, report)
    question = make_question(retriever, method, asked, quiet=report.quiet)
    if method is None:  # what does not depend on the model is refused
        kept = tuple(name for name in question.spec.methods if METHODS[name].representation != "sentence")
        question = retriever.resolve(question, methods=kept)
    seed, seeds = sample.seed, integers("--random-seeds", random_seeds) or [0, 1, 2]
    queries = open_queries(retriever, tested, sample, question)
    with report.progress() as progress:
        found = randomized_correlations(
            retriever, queries, question, n_rows=rows, seed=seed, seeds=seeds, progress=progress
        )  # fmt: skip
    report.finish(*randomized_report(found, retriever, queries, question, seed, command_line()))


@grouped(queries=200)
def near_duplicates(
    at: IndexOptions,
    asked: SearchOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    edits: Annotated[
        list[str] | None,
        typer.Option("--edits", help="same, add, remove, replace. Default: all four.", show_default=False),
    ] = None,
    top: Annotated[
        list[str] | None, typer.Option("--top", help="Depths of hit@k. Default: 1, 10.", show_default=False)
    ] = None,
) -> None:
    """See NEAR_DUPLICATES_HELP."""
    from forebear.evaluation.measures.near_duplicates import EDITS, TOPS, near_duplicates_report
    from forebear.evaluation.measures.near_duplicates import near_duplicates as ask

    retriever = open_retriever(at, report)
    question = make_question(retriever, method, asked, quiet=report.quiet)
    tops = sorted(set(integers("--top", top))) or TOPS
    with report.progress() as progress:
        found = ask(
            retriever,
            question,
            n_queries=sample.queries,
            edits=tuple(dict.fromkeys(listed(edits))) or EDITS,
            tops=tops,
            seed=sample.seed,
            progress=progress,
        )
    report.finish(*near_duplicates_report(found, retriever, question, sample.seed, command_line()))


@grouped(queries=50)
def saliency_consistency(
    at: IndexOptions,
    test: Test,
    asked: ScopeOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Methods.  [default: if]", show_default=False)
    ] = None,
    text_columns: TextColumns = None,
) -> None:
    """See SALIENCY_HELP."""
    from forebear.evaluation.measures.saliency_consistency import saliency_consistency as measure
    from forebear.evaluation.measures.saliency_consistency import saliency_consistency_report

    retriever = open_retriever(at, report)
    question = make_question(retriever, method or default_methods(retriever, ["if"], asked), asked, quiet=report.quiet)
    queries = open_queries(retriever, TestOptions(test=test, text_columns=text_columns), sample, question)
    with report.progress() as progress:
        found = measure(retriever, queries, question, progress=progress)
    report.finish(*saliency_consistency_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped()
def cancellation(at: IndexOptions, report: ReportOptions, rows: NRows = 100, seed: Seed = 0) -> None:
    """See CANCELLATION_HELP."""
    from forebear.evaluation.measures.cancellation import cancellation as measure
    from forebear.evaluation.measures.cancellation import cancellation_report

    retriever = open_retriever(at, report)
    with report.progress() as progress:
        found = measure(retriever, n_rows=rows, seed=seed, progress=progress)
    report.finish(*cancellation_report(found, retriever, seed, command_line()))


@grouped(queries=50)
def recall(
    at: IndexOptions,
    tested: TestOptions,
    asked: QuestionOptions,
    sample: SampleOptions,
    report: ReportOptions,
    method: Methods = None,
    top: Annotated[int, typer.Option("--top", help="k, rows at each end.")] = 10,
    recall: Recall = 0.98,
    candidates: Annotated[
        int | None,
        typer.Option("--candidates", help="Rows at each end that a deeper scope proposes.", show_default=False),
    ] = None,
) -> None:
    """See RECALL_HELP."""
    from forebear.evaluation.measures.recall import retrieval_recall, retrieval_recall_report

    retriever = open_retriever(at, report)
    n_live = retriever.index.manifest.n_live
    if not 1 <= top <= n_live:
        raise InputError(f"--top {top}: expected 1 to {n_live}, the live rows.")
    question = make_question(
        retriever, method, asked, recall=recall, top=top, candidates=candidates, quiet=report.quiet
    )
    queries = open_queries(retriever, tested, sample, question)
    with report.progress() as progress:
        found = retrieval_recall(retriever, queries, question, progress=progress)
    report.finish(*retrieval_recall_report(found, retriever, queries, question, sample.seed, command_line()))


@grouped()
def mislabelled(
    at: IndexOptions,
    asked: ScopeOptions,
    report: ReportOptions,
    true_label: Annotated[
        str | None,
        typer.Option("--true-label", help="Column of the training file with the true labels.", show_default=False),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", help="The training file. Default: the one that the index names.", show_default=False),
    ] = None,
    wrong_rows: Annotated[
        str | None,
        typer.Option(
            "--wrong-rows", help="Instead: a text file of numbers of wrongly labelled rows.", show_default=False
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="gd, if, tracin and the like.  [default: gd,if]", show_default=False),
    ] = None,
    top: Annotated[
        list[str] | None,
        typer.Option("--top", help="Depths of precision@k, beside the number of wrong rows.", show_default=False),
    ] = None,
    neighbours: Annotated[int, typer.Option("--neighbours", help="Nearest rows whose labels are compared.")] = 10,
    text_columns: TextColumns = None,
    label_names: LabelNames = None,
    unlabelled: Unlabelled = "refuse",
    seed: Seed = 0,
) -> None:
    """See MISLABELLED_HELP."""
    from forebear.evaluation.measures.mislabelled import mislabelled as measure
    from forebear.evaluation.measures.mislabelled import mislabelled_report, true_labels_of, wrong_rows_of

    if (true_label is None) == (wrong_rows is None):
        raise InputError("give either --true-label COLUMN or --wrong-rows FILE.")
    retriever = open_retriever(at, report)
    question = make_question(
        retriever, method or default_methods(retriever, ["gd", "if"], asked), asked, target="gold", quiet=report.quiet
    )
    opened = retriever.index
    truth = None
    if wrong_rows is not None:
        wrong = wrong_rows_of(Path(wrong_rows), opened.manifest.n_rows)
    else:
        segments = opened.manifest.segments
        if train is None and len(segments) > 1:
            raise InputError(f"{opened.folder} was built from {len(segments)} files. Give them as one by --train.")
        source = open_rows_aloud(
            train or segments[0].source,
            text_columns=text_columns or opened.manifest.spec.text_columns,
            label_column=true_label,
            label_names=label_names,
            unlabelled=unlabelled,
            need_labels=True,
            classes=retriever.label_names,
        )
        truth = true_labels_of(opened, source)
        wrong = truth != opened.labels
    found = measure(retriever, question, wrong, true_labels=truth, n_neighbours=neighbours)
    tops = integers("--top", top)
    report.finish(*mislabelled_report(found, retriever, question, tops, seed, command_line()))
