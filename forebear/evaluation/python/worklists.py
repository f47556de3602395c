"""Work lists: read, write, apply them to the training file, and retrain on what was decided.

>>> from forebear import audits, worklists
>>> audits.suspects("runs/demo/index").write("runs/suspects")
>>> todo = worklists.read("runs/suspects/worklist.csv")  # after somebody filled in its column decision
>>> worklists.apply(todo, "train.csv", "fixed.csv")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from forebear.errors import DataError, InputError, OutputExistsError
from forebear.evaluation.common.comparisons import provenance
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, called, finding, retriever_of, tested_rows
from forebear.evaluation.python.retrainings import Retraining, retrainer_of
from forebear.evaluation.retraining.changes import seeds_of
from forebear.evaluation.worklists.apply import Applied, apply_work_list, decided
from forebear.evaluation.worklists.files import ENDINGS, as_bytes, read_work_list, write_work_list
from forebear.evaluation.worklists.items import Item, WorkList, text_digest
from forebear.evaluation.worklists.labelling_tools import EXPORTS, Answered, answers_from, label_studio_config
from forebear.evaluation.worklists.retraining import Retrained, check_items, retrain_changes, retrained_report
from forebear.indexer.rows.files.reader import reading
from forebear.indexer.rows.opening import open_rows
from forebear.indexer.rows.row_format import RowFormat
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.label_column import DROP_MARKED
from forebear.indexer.storage.atomic import write_bytes
from forebear.progress import Progress, progress_of
from forebear.retriever.question.spec import QuerySpec

__all__ = [
    "Answered", "Applied", "Item", "Retrained", "WorkList", "answers", "apply", "export", "read", "retrain", "write",
]  # fmt: skip


def read(path: str | Path) -> WorkList:
    """Read a work list: Parquet, CSV as a spreadsheet leaves it, or JSON Lines; or the one of an audit's folder.

    Raises:
        DataError: There is no such file, or it is no table.
        InputError: A value is not of its column's kind.
    """
    return read_work_list(Path(path))


def write(work_list: WorkList, path: str | Path) -> None:
    """Write a work list as the name ends: ``.parquet``, ``.csv`` or ``.jsonl``.

    Raises:
        InputError: The name ends otherwise.
        StorageError: It cannot be written.
    """
    write_work_list(work_list, Path(path))


def apply(
    work_list: WorkList | str | Path,
    train: str | Path | RowSource,
    out: str | Path,
    *,
    accept: float | None = None,
    force: bool = False,
) -> Applied:
    """Write the training file as a work list says, and a log beside it; the file itself stays as it is.

    Args:
        work_list: The list, or its file. ``relabel`` writes the label of ``suggested``, ``remove`` leaves the row out,
            ``quarantine`` writes it to ``OUT.quarantine``, ``keep`` and rows without a decision change nothing.
        train: The training file; or a source of :func:`~forebear.open_rows`, where columns or label names are given.
        out: The new file, of the same form.
        accept: Rows without a decision are relabelled as suggested where ``probability`` is at least this.
        force: Overwrite files, but neither the training file nor the list.

    Raises:
        InputError: Decisions contradict each other, a label is none of the file's, or a file to write is one of these.
        MismatchError: A row of the list does not say what the file has.
        OutputExistsError: A file is there already.
        DataError: The file cannot be read.
    """
    todo = read(work_list) if isinstance(work_list, str | Path) else work_list
    if isinstance(train, RowSource):
        source, path = train, Path(train.name)
    else:
        path = Path(train)
        source = open_rows(path, need_labels=True, unlabelled=DROP_MARKED, like=format_of(todo))
    if not path.is_file():
        raise InputError(f"--train {path} is no plain file; rows are written back to one file. Name the file.")
    return apply_work_list(todo, source, path, Path(out), accept=accept, force=force)


def export(work_list: WorkList | str | Path, tool: str, out: str | Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write a work list for a labelling tool; the files that were written.

    Args:
        work_list: The list, or its file.
        tool: ``label-studio`` (with a labelling configuration beside it, ``OUT.xml``), ``argilla`` or ``cleanlab``; or
            ``csv``, ``parquet`` or ``jsonl`` for the list itself.
        out: The file.
        force: Overwrite it.

    Raises:
        InputError: There is no such tool, or tasks would be named as their configuration is.
        OutputExistsError: A file is there already.
        StorageError: It cannot be written.
    """
    todo = read(work_list) if isinstance(work_list, str | Path) else work_list
    path = Path(out)
    if f".{tool}" in ENDINGS:
        contents = {path: as_bytes(todo, f".{tool}")}
    elif tool in EXPORTS:
        contents = {path: EXPORTS[tool](todo).encode("utf-8", "replace")}
    else:
        known = ", ".join([*EXPORTS, *(ending[1:] for ending in ENDINGS)])
        raise InputError(f"--to {tool}: expected {known}.", of="worklist export")
    if tool == "label-studio":
        if path.suffix.lower() == ".xml":
            raise InputError(f"--out {out}: OUT.xml is the labelling configuration. Name the tasks OUT.json.")
        contents[path.with_suffix(".xml")] = label_studio_config(todo).encode("utf-8", "replace")
    _refuse_overwriting(contents, force=force)
    for file, content in contents.items():
        write_bytes(file, content)
    return tuple(contents)


def answers(
    work_list: WorkList | str | Path, tool: str, file: str | Path, out: str | Path, *, force: bool = False
) -> Answered:
    """Take what people answered in a labelling tool into the list that it was exported from, and write that.

    Args:
        work_list: The list, or its file.
        tool: ``label-studio`` (its JSON export), ``argilla`` (``dataset.records.to_json``) or ``cleanlab`` (a table of
            label issues, whose labels become suggestions).
        file: The tool's export.
        out: The new list, named as :func:`write` takes it.
        force: Overwrite it.

    Raises:
        InputError: The file is not the tool's.
        DataError: It cannot be read.
        OutputExistsError: ``out`` is there already.
    """
    todo = read(work_list) if isinstance(work_list, str | Path) else work_list
    _refuse_overwriting([Path(out)], force=force)
    if not Path(file).is_file():
        raise DataError(f"no such file: {file}. Expected what {tool} exported.")
    with reading(str(file), "text"):
        content = Path(file).read_text(encoding="utf-8-sig")
    answered = answers_from(tool, content, todo)
    write(answered.work_list, out)
    return answered


def _refuse_overwriting(paths: Iterable[Path], *, force: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise OutputExistsError(f"{', '.join(there)} exists already. Name another file, or give --force.")


def format_of(work_list: WorkList) -> RowFormat:
    """What a work list knows of its training file: the text columns.

    A spreadsheet may have moved the columns: their order is the one in which most of the first texts have their digest.
    """
    columns = work_list.text_columns
    some = [item for item in work_list if item.digest is not None and item.texts.keys() == set(columns)][:20]
    if len(columns) > 1 and some:
        columns = max(
            itertools.islice(itertools.permutations(columns), 24),
            key=lambda order: sum(item.digest == text_digest(item.texts[n] for n in order) for item in some),
        )
    return RowFormat(owner="the work list", text_columns=columns)


def retrain(
    applied: Applied,
    retriever: IndexLike,
    rows: Rows,
    *,
    group_by: str | None = None,
    how: Retraining | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Finding[Retrained]:
    """What do the changed rows do? The model retrained in pairs, before and after, on labelled test rows.

    Args:
        applied: What :func:`apply` gave.
        retriever: Over the index that the list is of.
        rows: Labelled test rows.
        group_by: A column of the test rows, besides the gold label, by whose values accuracy is parted.
        how: The retraining; None: of the head.
        seed: Seed of the first retraining.
        progress: True, or a function.

    Raises:
        InputError: The index has several labels or numbers a row, or nothing was changed.
        MismatchError: The list is of another index.
    """
    changed = [change.item for change in applied.changes]
    return begin_retraining(changed, retriever, rows, group_by=group_by, how=how, seed=seed)(applied, progress)


def begin_retraining(
    items: Iterable[Item],
    retriever: IndexLike,
    rows: Rows,
    *,
    group_by: str | None = None,
    how: Retraining | None = None,
    seed: int = 0,
) -> Callable[[Applied, Progress | bool], Finding[Retrained]]:
    """All that :func:`retrain` can refuse, before the list is applied; what is returned retrains.

    Args:
        items: Those whose decisions change a row.
        retriever: See :func:`retrain`, as for the others and what is raised.
    """
    how = how or Retraining()
    retriever = retriever_of(retriever, "worklists.retrain")
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format, need_labels=True)
    check_items(list(items), retriever.index)
    tested = sample_queries(retriever, source, 0, seed, need_labels=True)
    gold = tested.labels
    assert gold is not None  # they are needed
    retrainer = retrainer_of(retriever, how, tested.texts, None)
    seeds = seeds_of(retrainer, how.n_seeds, seed)
    names = np.array(retriever.label_names)[gold]
    groups = {f"label {name}": names == name for name in retriever.label_names if (names == name).any()}
    by_value = {} if group_by is None else tested.by_value(group_by)
    groups |= {f"{group_by} {value}": mask for value, mask in by_value.items()}
    asked = provenance(
        retriever, QuerySpec(), called("worklists.retrain"), test_rows=f"{tested.source}, {len(tested):,} of them",
        retraining=f"{retrainer.recipe.name}. {retrainer.recipe.note}", seeds=", ".join(map(str, seeds)),
    )  # fmt: skip

    def run(applied: Applied, progress: Progress | bool) -> Finding[Retrained]:
        found = retrain_changes(
            applied.changes, retriever.index, retrainer, gold, seeds, groups, progress=progress_of(progress)
        )
        return finding(found, retrained_report(found, retrainer, asked, seed))

    return run


def changed_by(work_list: WorkList, accept: float | None = None) -> list[Item]:
    """Items whose decisions, or whose probabilities, change a row.

    Raises:
        InputError: Decisions contradict each other, or no probability is known.
    """
    return [item for item in decided(work_list, accept).values() if item.decision not in ("", "keep")]
