"""``forebear perturb``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.asking import ColumnOptions, IndexOptions, command_line, integers, say_what_was_fitted
from forebear.cli.options.groups import grouped
from forebear.cli.options.shared import Damping, Force, Quiet, Recall, Scope
from forebear.cli.screen.console import Variadic, listed, progress_bar, say, warn
from forebear.cli.screen.tables import show_report
from forebear.cli.workers import Workers, start_workers
from forebear.errors import DataError, InputError

if TYPE_CHECKING:
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.spec import PerturbSpec, Queries, What
    from forebear.indexer.rows.row_source import RowSource
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


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """Which words of which rows are changed."""

    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows", help="Training rows changed for each row. Default: 1,2,6; of fix 1,2,4,8.", show_default=False
        ),
    ] = None
    random_words: Annotated[
        int, typer.Option("--random-words", help="Words tried in a row beside the one that matters most.")
    ] = 5
    scope: Scope = "head"
    curvature: Annotated[
        str | None, typer.Option("--curvature", help="exact, ekfac, cg, lissa or identity.", show_default=False)
    ] = None
    damping: Damping = None
    recall: Recall = 0.98
    seed: Annotated[int, typer.Option("--seed", help="Of the samples, and of the first retraining.")] = 0
    wordnet: Annotated[
        str | None,
        typer.Option(
            "--wordnet", help="Folder of WordNet's files. Default: Debian's wordnet-base.", show_default=False
        ),
    ] = None

    def spec(self, what: What, strategies: tuple[str, ...], rows: tuple[int, ...]) -> PerturbSpec:
        """The choices, checked; ``rows`` where none are given."""
        from forebear.evaluation.perturb.spec import PerturbSpec

        spec = PerturbSpec(
            what=what, strategies=strategies, rows=tuple(integers("--rows", self.rows)) or rows,
            random_words=self.random_words, seed=self.seed, scope=self.scope, curvature=self.curvature,
            damping=self.damping, recall=self.recall,
        )  # fmt: skip
        spec.check()
        return spec


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the model is retrained, and where the report goes."""

    out: Annotated[str, typer.Option("--out", help="Folder for the report.")]
    retrain: Annotated[str, typer.Option("--retrain", help="full, top-K (the last K layers) or head.")] = "full"
    seeds: Annotated[int, typer.Option("--seeds", help="Retrainings of each kind, with seeds from --seed up.")] = 3
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run folder of the model. Default: the one that it lies in.", show_default=False),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Folder of what retrained models said. Default: in --out.", show_default=False),
    ] = None
    workers: Workers = 1
    force: Force = False
    quiet: Quiet = False


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Change training rows so that a model fails, or does better.", no_args_is_help=True)
    group.command("attack", help=ATTACK_HELP, cls=Variadic)(attack)
    group.command("fix", help=FIX_HELP, cls=Variadic)(fix)
    app.add_typer(group, name="perturb")


@grouped()
def attack(
    at: IndexOptions,
    columns: ColumnOptions,
    change: ChangeOptions,
    how: RunOptions,
    test: Annotated[str, typer.Option("--test", help="Labelled rows: --queries of them are attacked, all are tested.")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", help="lower-right, raise-wrong, combined.  [default: lower-right]", show_default=False
        ),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", help="Rows that are attacked, a seeded sample.")] = 50,
) -> None:
    """See ATTACK_HELP."""
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.report import check_out
    from forebear.evaluation.perturb.spec import make_queries

    check_out(Path(how.out), force=how.force)
    spec = change.spec("attack", tuple(listed(strategy)) or ("lower-right",), (1, 2, 6))
    retriever = at.open()
    source = columns.open(test, retriever, need_labels=True)
    texts, gold = _labelled(retriever, source)
    attacked = _sample(np.arange(len(gold)), queries, change.seed)
    sets = {ATTACKED: attacked}
    if len(attacked) < len(gold):
        sets[TEST] = np.arange(len(gold))
    chosen = make_queries(retriever, texts, gold).take(attacked)
    _run(retriever, spec, chosen, Evaluation(texts, gold, sets), at, change, how, {"test rows": test})


@grouped()
def fix(
    at: IndexOptions,
    columns: ColumnOptions,
    change: ChangeOptions,
    how: RunOptions,
    dev: Annotated[str, typer.Option("--dev", help="Labelled rows: rows are added for those that are wrong.")],
    test: Annotated[str, typer.Option("--test", help="Labelled rows that the retrained model is tested on.")],
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
) -> None:
    """See FIX_HELP."""
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.report import check_out
    from forebear.evaluation.perturb.spec import make_queries

    check_out(Path(how.out), force=how.force)
    spec = change.spec("fix", tuple(listed(strategy)) or ("raise-right",), (1, 2, 4, 8))
    retriever = at.open()
    dev_source, test_source = (columns.open(path, retriever, need_labels=True) for path in (dev, test))
    texts, gold = _labelled(retriever, dev_source)
    asked = make_queries(retriever, texts, gold)
    wrong = np.flatnonzero(asked.predictions != asked.right)
    if not len(wrong):
        raise DataError(f"{dev}: the model gets all {len(gold)} rows right. There is nothing to fix.")
    chosen = _sample(wrong, len(wrong) if queries is None else queries, change.seed)
    test_texts, test_gold = _labelled(retriever, test_source)
    n, every = len(gold), np.concatenate([gold, test_gold])
    sets = {TEST: np.arange(n, len(every)), DEV: np.arange(n), WRONG: chosen}
    both = [[*first, *second] for first, second in zip(texts, test_texts, strict=True)]
    evaluation = Evaluation(both, every, sets)
    _run(retriever, spec, asked.take(chosen), evaluation, at, change, how, {"dev rows": dev, "test rows": test})


def _run(
    retriever: Retriever,
    spec: PerturbSpec,
    queries: Queries,
    evaluation: Evaluation,
    at: IndexOptions,
    change: ChangeOptions,
    how: RunOptions,
    sources: dict[str, str],
) -> None:
    """Choose, retrain, write and show."""
    from forebear.evaluation.perturb.choice import Chooser
    from forebear.evaluation.perturb.experiment import perturb
    from forebear.evaluation.perturb.report import CHANGED_NAME, changed_lines, perturb_report
    from forebear.evaluation.perturb.wordnet import WordNet
    from forebear.evaluation.reports.report import write_report
    from forebear.evaluation.retraining.recipes import open_retrainer

    if how.seeds < 1:
        raise InputError(f"--seeds {how.seeds}: expected 1 or more.")
    say_what_was_fitted(retriever.resolve(spec.question), quiet=how.quiet)
    words, out = WordNet(change.wordnet), Path(how.out)
    folder = Path(how.cache or out / RETRAINED_NAME)
    start_workers(how.workers, folder)
    retrainer = open_retrainer(retriever, how.retrain, evaluation.texts, folder, run=how.run, device=at.device)
    with progress_bar(quiet=how.quiet) as progress:
        chooser = Chooser(retriever, spec, queries, words, progress)
        numbers = range(spec.seed, spec.seed + how.seeds)
        found = perturb(retriever, chooser, spec, queries, evaluation, retrainer, numbers, progress)
    for line in retrainer.warnings:
        warn(line)
    provenance = {**sources, "WordNet": str(words.folder), "command": command_line()}
    report, result = perturb_report(found, retriever, retrainer.facts(), provenance)
    changed = {CHANGED_NAME: changed_lines(found, retriever)}
    page = write_report(report, out, result=result, force=how.force, beside=changed)
    show_report(report)
    say(f"wrote {page}, table.csv, result.json and changed.jsonl", quiet=how.quiet)


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
