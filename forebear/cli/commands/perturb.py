"""``forebear perturb``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forebear.cli.options.groups import Options, Shown, grouped, values_of
from forebear.cli.options.model import IndexOptions, Seed
from forebear.cli.options.question import Recall, ScopeOptions
from forebear.cli.options.report import FolderOptions, say_written
from forebear.cli.options.retraining import RetrainOptions
from forebear.cli.options.rows import TestOptions
from forebear.cli.screen.console import Command, integers, listed, progress_bar, warn
from forebear.cli.screen.tables import show_report
from forebear.cli.workers import start_workers
from forebear.errors import DataError, InputError
from forebear.wording import caller

if TYPE_CHECKING:
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.spec import PerturbationQueries, PerturbSpec, What
    from forebear.indexer.rows.row_source import RowSource
    from forebear.retriever.retriever import Retriever

ATTACK_HELP = """Replace words of training rows so that a retrained model fails on test rows.

For each attacked test row: the training rows that influence the saliency of its most salient word most, one word of
each replaced by a WordNet synonym so that the saliency of the right label's word falls (lower-right), that of the wrong
label's rises (raise-wrong), or both in turn (combined). The rows of all test rows are replaced at once, the model is
retrained, and tested beside one with as many random changes. Writes report.html, table.csv, result.json, report.json
and changed.jsonl. Started again after a kill, it goes on where it was.

Examples:

    forebear perturb attack --index runs/sst2-index --test dev.parquet --out runs/attack

    forebear perturb attack --index I --test T --strategy lower-right,combined --rows 2,6 --retrain top-2 --out A
"""
FIX_HELP = """Add changed training rows so that a retrained model does better.

For each dev row that the model gets wrong: the training rows that influence the saliency of its most salient word most,
one word of each replaced by a WordNet synonym or antonym so that the saliency of the right label's word rises
(raise-right), that of the wrong label's falls (lower-wrong), or both in turn (combined). The changed rows are added,
with the labels of the old ones; the model is retrained and tested, beside one with as many random rows added. Writes
report.html, table.csv, result.json, report.json and changed.jsonl. Started again after a kill, it goes on where it was.

Examples:

    forebear perturb fix --index runs/sst2-index --dev dev.parquet --test test.parquet --out runs/fix
"""
ATTACKED, TEST, DEV, WRONG = "attacked rows", "test rows", "dev rows", "wrong dev rows asked about"
RETRAINED_NAME = "retrained"


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(Options, panel="Changes"):
    """Which words of which rows are changed."""

    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows",
            help="Training rows changed for each row that is asked about; several numbers.",
            show_default=False,
        ),
    ] = None
    random_words: Annotated[
        int, typer.Option("--random-words", help="Words tried in a row beside the one that matters most.")
    ] = 5
    asked: ScopeOptions
    recall: Recall = 0.98
    seed: Seed = 0
    wordnet: Annotated[
        str | None,
        typer.Option("--wordnet", help="Folder of WordNet's files.", show_default="Debian's wordnet-base"),
    ] = None

    def spec(self, what: What, strategies: tuple[str, ...], rows: tuple[int, ...]) -> PerturbSpec:
        """The checked choices; ``rows`` are the numbers of rows where ``--rows`` is not given."""
        from forebear.evaluation.perturb.spec import PerturbSpec

        spec = PerturbSpec(
            what=what, strategies=strategies, rows=tuple(integers("--rows", self.rows)) or rows,
            random_words=self.random_words, seed=self.seed, recall=self.recall, **values_of(self.asked),
        )  # fmt: skip
        spec.check()
        return spec


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Options, panel="Changes"):
    """Which rows are the queries, and the strategies by which words are chosen."""

    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="Of attack: lower-right, raise-wrong, combined; of fix: raise-right, lower-wrong, combined.",
            show_default=False,
        ),
    ] = None
    queries: Annotated[
        int | None,
        typer.Option(
            "--queries",
            help="Rows that are attacked, or wrong dev rows that are mended for: a seeded sample.",
            show_default="all",
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Change training rows so that a model fails, or does better.", no_args_is_help=True)
    group.command("attack", help=ATTACK_HELP, cls=Command)(attack)
    group.command("fix", help=FIX_HELP, cls=Command)(fix)
    app.add_typer(group, name="perturb")


@grouped(
    recipe="full", n_seeds=3, cache=Shown("in --out"), strategy=Shown("lower-right"), rows=Shown("1,2,6"), queries=50
)
def attack(
    index_options: IndexOptions,
    test_options: TestOptions,
    selection: SelectionOptions,
    change: ChangeOptions,
    retraining: RetrainOptions,
    output: FolderOptions,
) -> None:
    """Change training rows so that a retrained model fails, and report it."""
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.report import check_out
    from forebear.evaluation.perturb.spec import make_queries
    from forebear.evaluation.python.opening import check_targets

    check_out(output.folder, force=output.force)
    spec = change.spec("attack", tuple(listed(selection.strategy)) or ("lower-right",), (1, 2, 6))
    retriever = index_options.open()
    check_targets(retriever.index, "perturb")
    source = test_options.open(
        test_options.test, classes=retriever.label_names, like=retriever.index.manifest.row_format
    )
    texts, gold = _labelled(retriever, source)
    assert selection.queries is not None  # it has a default
    attacked = _sample(np.arange(len(gold)), selection.queries, change.seed)
    sets = {ATTACKED: attacked}
    if len(attacked) < len(gold):
        sets[TEST] = np.arange(len(gold))
    chosen = make_queries(retriever, texts, gold).take(attacked)
    _run(
        retriever,
        spec,
        chosen,
        Evaluation(texts, gold, sets),
        index_options,
        change,
        retraining,
        output,
        {"test rows": test_options.test},
    )


@grouped(recipe="full", n_seeds=3, cache=Shown("in --out"), strategy=Shown("raise-right"), rows=Shown("1,2,4,8"))
def fix(
    index_options: IndexOptions,
    test_options: TestOptions,
    selection: SelectionOptions,
    change: ChangeOptions,
    retraining: RetrainOptions,
    output: FolderOptions,
    dev: Annotated[str, typer.Option("--dev", help="Labelled rows: rows are added for those that are wrong.")],
) -> None:
    """Add changed training rows so that a retrained model does better, and report it."""
    import numpy as np

    from forebear.evaluation.perturb.experiment import Evaluation
    from forebear.evaluation.perturb.report import check_out
    from forebear.evaluation.perturb.spec import make_queries
    from forebear.evaluation.python.opening import check_targets

    check_out(output.folder, force=output.force)
    spec = change.spec("fix", tuple(listed(selection.strategy)) or ("raise-right",), (1, 2, 4, 8))
    retriever = index_options.open()
    check_targets(retriever.index, "perturb")
    dev_source, test_source = (
        test_options.open(path, classes=retriever.label_names, like=retriever.index.manifest.row_format)
        for path in (dev, test_options.test)
    )
    texts, gold = _labelled(retriever, dev_source)
    dev_queries = make_queries(retriever, texts, gold)
    wrong = np.flatnonzero(dev_queries.predictions != dev_queries.right)
    if not len(wrong):
        raise DataError(f"{dev}: the model gets all {len(gold)} rows right. There is nothing to fix.")
    chosen = _sample(wrong, len(wrong) if selection.queries is None else selection.queries, change.seed)
    test_texts, test_gold = _labelled(retriever, test_source)
    n, all_gold = len(gold), np.concatenate([gold, test_gold])
    sets = {TEST: np.arange(n, len(all_gold)), DEV: np.arange(n), WRONG: chosen}
    all_texts = [[*first, *second] for first, second in zip(texts, test_texts, strict=True)]
    evaluation = Evaluation(all_texts, all_gold, sets)
    _run(
        retriever,
        spec,
        dev_queries.take(chosen),
        evaluation,
        index_options,
        change,
        retraining,
        output,
        {"dev rows": dev, "test rows": test_options.test},
    )


def _run(
    retriever: Retriever,
    spec: PerturbSpec,
    queries: PerturbationQueries,
    evaluation: Evaluation,
    index_options: IndexOptions,
    change: ChangeOptions,
    retraining: RetrainOptions,
    output: FolderOptions,
    sources: dict[str, str],
) -> None:
    """Choose the changes, retrain, and write and show the report."""
    from forebear.evaluation.perturb.choice import Chooser
    from forebear.evaluation.perturb.experiment import perturb
    from forebear.evaluation.perturb.report import CHANGED_NAME, changed_lines, perturb_report
    from forebear.evaluation.perturb.wordnet import WordNet
    from forebear.evaluation.reports.report import write_report
    from forebear.evaluation.retraining.recipes import open_retrainer
    from forebear.retriever.answers.coverage import tell_fit_age

    if retraining.n_seeds < 1:
        raise InputError(f"--seeds {retraining.n_seeds}: expected 1 or more.")
    tell_fit_age(retriever.resolve(spec.question))
    wordnet, out = WordNet(change.wordnet), output.folder
    folder = Path(retraining.cache or out / RETRAINED_NAME)
    start_workers(retraining.workers, folder)
    assert retraining.recipe is not None
    retrainer = open_retrainer(
        retriever,
        retraining.recipe,
        evaluation.texts,
        folder,
        run=retraining.run,
        device=index_options.first_device(),
    )
    with progress_bar() as progress:
        chooser = Chooser(retriever, spec, queries, wordnet, progress)
        numbers = range(spec.seed, spec.seed + retraining.n_seeds)
        found = perturb(retriever, chooser, spec, queries, evaluation, retrainer, numbers, progress)
    for line in retrainer.warnings:
        warn(line)
    provenance = {**sources, "WordNet": str(wordnet.folder), "command": caller("forebear perturb")}
    report, result = perturb_report(found, retriever, retrainer.facts(), provenance)
    changed = {CHANGED_NAME: changed_lines(found, retriever)}
    page = write_report(report, out, result=result, force=output.force, beside=changed)
    show_report(report)
    say_written(page, CHANGED_NAME)


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


def _sample(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A seeded sample of at most ``n`` of these row numbers, ascending."""
    import numpy as np

    if n < 1:
        raise InputError(f"--queries {n}: expected 1 or more.")
    return np.sort(np.random.default_rng([seed, 23]).permutation(rows)[:n])
