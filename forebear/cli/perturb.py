"""``forebear perturb``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.asking import command_line, integers, open_test
from forebear.cli.console import Variadic, listed, progress_bar, say, warn
from forebear.cli.options import (
    Damping,
    Device,
    Force,
    IndexFolder,
    LabelColumn,
    LabelNames,
    MovedModel,
    Quiet,
    Recall,
    Scope,
    TextColumns,
)
from forebear.cli.tables import show_report
from forebear.cli.workers import Workers, start_workers
from forebear.errors import DataError, InputError

if TYPE_CHECKING:
    import numpy as np

    from forebear.evaluation.perturb import Evaluation
    from forebear.evaluation.perturb_spec import PerturbSpec, Queries
    from forebear.indexer.data import RowSource
    from forebear.retriever.retriever import Retriever

ATTACK_HELP = """Replace words of training rows so that a retrained model fails on test rows.

For each attacked test row: the training rows that influence the saliency of its most salient word most, one word of
each replaced by a WordNet synonym so that the saliency of the right label's word falls (lower-right), that of the wrong
label's rises (raise-wrong), or both in turn (combined). The rows of all test rows are replaced at once, the model is
retrained, and tested beside one with as many random changes. Writes report.html, table.csv, result.json and
changed.jsonl. Started again after a kill, it goes on where it was.

Examples:

    forebear perturb attack --index runs/sst2-index --test dev.parquet --out runs/attack

    forebear perturb attack --index I --test T --strategy lower-right,combined --rows 2,6 --retrain top-2 --out A
"""
FIX_HELP = """Add changed training rows so that a retrained model does better.

For each dev row that the model gets wrong: the training rows that influence the saliency of its most salient word most,
one word of each replaced by a WordNet synonym or antonym so that the saliency of the right label's word rises
(raise-right), that of the wrong label's falls (lower-wrong), or both in turn (combined). The changed rows are added,
with the labels of the old ones; the model is retrained and tested, beside one with as many random rows added. Writes
report.html, table.csv, result.json and changed.jsonl. Started again after a kill, it goes on where it was.

Examples:

    forebear perturb fix --index runs/sst2-index --dev dev.parquet --test test.parquet --out runs/fix
"""
ATTACKED, TEST, DEV, WRONG = "attacked rows", "test rows", "dev rows", "wrong dev rows asked about"
RETRAINED_NAME = "retrained"

SeveralRows = Annotated[
    list[str] | None,
    typer.Option(
        "--rows", help="Training rows changed for each row. Default: 1,2,6; of fix 1,2,4,8.", show_default=False
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", help="Retrainings of each kind, with seeds from --seed up.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the samples, and of the first retraining.")]
RandomWords = Annotated[
    int, typer.Option("--random-words", help="Words tried in a row beside the one that matters most.")
]
Curvature = Annotated[
    str | None, typer.Option("--curvature", help="exact, ekfac, cg, lissa or identity.", show_default=False)
]
WordNetFolder = Annotated[
    str | None,
    typer.Option("--wordnet", help="Folder of WordNet's files. Default: Debian's wordnet-base.", show_default=False),
]
Retrain = Annotated[str, typer.Option("--retrain", help="full, top-K (the last K layers) or head.")]
RunFolder = Annotated[
    str | None,
    typer.Option("--run", help="Run folder of the model. Default: the one that it lies in.", show_default=False),
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Folder of what retrained models said. Default: in --out.", show_default=False),
]
Out = Annotated[str, typer.Option("--out", help="Folder for the report.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Change training rows so that a model fails, or does better.", no_args_is_help=True)
    group.command("attack", help=ATTACK_HELP, cls=Variadic)(attack)
    group.command("fix", help=FIX_HELP, cls=Variadic)(fix)
    app.add_typer(group, name="perturb")


def attack(
    index: IndexFolder,
    test: Annotated[str, typer.Option("--test", help="Labelled rows: --queries of them are attacked, all are tested.")],
    out: Out,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", help="lower-right, raise-wrong, combined.  [default: lower-right]", show_default=False
        ),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", help="Rows that are attacked, a seeded sample.")] = 50,
    rows: SeveralRows = None,
    seeds: Seeds = 3,
    seed: Seed = 0,
    random_words: RandomWords = 5,
    scope: Scope = "head",
    curvature: Curvature = None,
    damping: Damping = None,
    recall: Recall = 0.98,
    retrain: Retrain = "full",
    run: RunFolder = None,
    wordnet: WordNetFolder = None,
    cache: Cache = None,
    workers: Workers = 1,
    model: MovedModel = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See ATTACK_HELP."""
    import numpy as np

    from forebear.evaluation.perturb import Evaluation
    from forebear.evaluation.perturb_report import check_out
    from forebear.evaluation.perturb_spec import PerturbSpec, make_queries
    from forebear.retriever.retriever import Retriever

    check_out(Path(out), force=force)
    spec = PerturbSpec(
        what="attack",
        strategies=tuple(listed(strategy)) or ("lower-right",), rows=tuple(integers("--rows", rows)) or (1, 2, 6),
        random_words=random_words, seed=seed, scope=scope, curvature=curvature, damping=damping, recall=recall,
    )  # fmt: skip
    spec.check()
    source = open_test(test, text_columns, label_column, label_names, need_labels=True)
    retriever = Retriever(index, model=model, device=device)
    texts, gold = _labelled(retriever, source)
    at = _sample(np.arange(len(gold)), queries, seed)
    sets = {ATTACKED: at} if len(at) == len(gold) else {ATTACKED: at, TEST: np.arange(len(gold))}
    evaluation = Evaluation(texts, gold, sets)
    chosen = make_queries(retriever, texts, gold).take(at)
    _run(
        retriever, spec, chosen, evaluation, out=out, seeds=seeds, retrain=retrain, run=run, wordnet=wordnet,
        cache=cache, workers=workers, device=device, force=force, quiet=quiet, sources={"test rows": test},
    )  # fmt: skip


def fix(
    index: IndexFolder,
    dev: Annotated[str, typer.Option("--dev", help="Labelled rows: rows are added for those that are wrong.")],
    test: Annotated[str, typer.Option("--test", help="Labelled rows that the retrained model is tested on.")],
    out: Out,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", help="raise-right, lower-wrong, combined.  [default: raise-right]", show_default=False
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option("--queries", help="So many wrong dev rows, a seeded sample. Default: all.", show_default=False),
    ] = None,
    rows: SeveralRows = None,
    seeds: Seeds = 3,
    seed: Seed = 0,
    random_words: RandomWords = 5,
    scope: Scope = "head",
    curvature: Curvature = None,
    damping: Damping = None,
    recall: Recall = 0.98,
    retrain: Retrain = "full",
    run: RunFolder = None,
    wordnet: WordNetFolder = None,
    cache: Cache = None,
    workers: Workers = 1,
    model: MovedModel = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    label_names: LabelNames = None,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """See FIX_HELP."""
    import numpy as np

    from forebear.evaluation.perturb import Evaluation
    from forebear.evaluation.perturb_report import check_out
    from forebear.evaluation.perturb_spec import PerturbSpec, make_queries
    from forebear.retriever.retriever import Retriever

    check_out(Path(out), force=force)
    spec = PerturbSpec(
        what="fix",
        strategies=tuple(listed(strategy)) or ("raise-right",), rows=tuple(integers("--rows", rows)) or (1, 2, 4, 8),
        random_words=random_words, seed=seed, scope=scope, curvature=curvature, damping=damping, recall=recall,
    )  # fmt: skip
    spec.check()
    dev_source, test_source = (
        open_test(path, text_columns, label_column, label_names, need_labels=True) for path in (dev, test)
    )
    retriever = Retriever(index, model=model, device=device)
    texts, gold = _labelled(retriever, dev_source)
    asked = make_queries(retriever, texts, gold)
    wrong = np.flatnonzero(asked.predictions != asked.right)
    if not len(wrong):
        raise DataError(f"{dev}: the model gets all {len(gold)} rows right. There is nothing to fix.")
    at = _sample(wrong, len(wrong) if queries is None else queries, seed)
    test_texts, test_gold = _labelled(retriever, test_source)
    n, every = len(gold), np.concatenate([gold, test_gold])
    sets = {TEST: np.arange(n, len(every)), DEV: np.arange(n), WRONG: at}
    both = [[*first, *second] for first, second in zip(texts, test_texts, strict=True)]
    evaluation = Evaluation(both, every, sets)
    _run(
        retriever, spec, asked.take(at), evaluation, out=out, seeds=seeds, retrain=retrain, run=run, wordnet=wordnet,
        cache=cache, workers=workers, device=device, force=force, quiet=quiet,
        sources={"dev rows": dev, "test rows": test},
    )  # fmt: skip


def _run(
    retriever: Retriever,
    spec: PerturbSpec,
    queries: Queries,
    evaluation: Evaluation,
    *,
    out: str,
    seeds: int,
    retrain: str,
    run: str | None,
    wordnet: str | None,
    cache: str | None,
    workers: int,
    device: str,
    force: bool,
    quiet: bool,
    sources: dict[str, str],
) -> None:
    """Choose, retrain, write and show."""
    from forebear.evaluation.perturb import perturb
    from forebear.evaluation.perturb_choice import Chooser
    from forebear.evaluation.perturb_report import perturb_report, write_changed
    from forebear.evaluation.recipes import open_retrainer
    from forebear.evaluation.report import write_report
    from forebear.evaluation.wordnet import WordNet

    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more.")
    words = WordNet(wordnet)
    folder = Path(cache or Path(out) / RETRAINED_NAME)
    start_workers(workers, folder)
    retrainer = open_retrainer(retriever, retrain, evaluation.texts, folder, run=run, device=device)
    with progress_bar(quiet=quiet) as progress:
        chooser = Chooser(retriever, spec, queries, words, progress)
        numbers = range(spec.seed, spec.seed + seeds)
        found = perturb(retriever, chooser, spec, queries, evaluation, retrainer, numbers, progress)
    for line in retrainer.warnings:
        warn(line)
    provenance = {**sources, "WordNet": str(words.folder), "command": command_line()}
    report, result = perturb_report(found, retriever, retrainer.facts(), provenance)
    write_changed(found, retriever, Path(out))
    page = write_report(report, Path(out), result=result, force=force)
    show_report(report)
    say(f"wrote {page}, table.csv, result.json and changed.jsonl", quiet=quiet)


def _labelled(retriever: Retriever, source: RowSource) -> tuple[list[list[str]], np.ndarray]:
    """All texts of a source, one list a text column, and the model's class ids, ``(n,)``."""
    import numpy as np

    retriever.check_texts(source)
    labels = retriever.query_labels(source, required=True)
    assert labels is not None
    warn(labels.warning)
    blocks = list(source.blocks())
    if not blocks:
        raise DataError(f"{source.name} has no rows.")
    texts = [[text for block in blocks for text in block.texts[i]] for i in range(len(source.text_columns))]
    return texts, np.concatenate([labels(block.labels or [], block.start) for block in blocks])


def _sample(at: np.ndarray, n: int, seed: int) -> np.ndarray:
    """At most ``n`` of some row numbers, ascending."""
    import numpy as np

    if n < 1:
        raise InputError(f"--queries {n}: expected 1 or more.")
    return np.sort(np.random.default_rng([seed, 23]).permutation(at)[:n])
