"""One query for many test rows: their query vectors summed by group, for methods that are linear in the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebear.indexer.model.forward import Forward, joined
from forebear.indexer.rows.labels import LabelMap
from forebear.indexer.rows.row_source import RowSource
from forebear.indexer.rows.targets.target_map import TargetMap
from forebear.retriever.head.queries import make_query
from forebear.retriever.head.scoring import Query, added, summed
from forebear.retriever.question.batch import make_batch
from forebear.retriever.question.models import Models
from forebear.retriever.question.spec import Question

BLOCK_ROWS = 512
NONE = -1  # class id of a group whose rows do not share one


@dataclass(frozen=True)
class Summed:
    """What the models say of test rows, and their query vectors summed by group.

    Attributes:
        queries: By method name, one query a group; only of methods that the ``stored`` searcher answers.
        forward: The last checkpoint's pass over the rows.
        targets: Whose loss is explained, of each row.
    """

    queries: dict[str, Query]
    forward: Forward
    targets: np.ndarray


def sum_queries(
    question: Question, models: Models, texts: Sequence[Sequence[str]], labels: np.ndarray | None, groups: np.ndarray
) -> Summed:
    """Run the models over test rows and sum the query vectors of each group, block by block.

    Args:
        question: Its methods that the ``stored`` searcher answers are summed. Where there is none, the rows are
            predicted all the same.
        models: Models of the index.
        texts: Test rows, one list a text column.
        labels: Class ids, ``(q,)``, or None.
        groups: Number of each row's group, from 0, ``(q,)``.
    """
    n_groups = int(groups.max()) + 1
    stored = [method for method in question.methods if question.searched_by(method) == "stored"]
    queries: dict[str, Query] = {}
    forwards, targets = [], []
    for start in range(0, len(groups), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        gold = None if labels is None else labels[block]
        numbers = range(start, min(start + BLOCK_ROWS, len(groups)))
        batch = make_batch(question.of(stored), models, [column[block] for column in texts], gold, numbers=numbers)
        forwards.append(batch.forward)
        targets.append(batch.targets)
        for method in stored:
            part = summed(make_query(method, batch, question.index, question.curvature), groups[block], n_groups)
            queries[method.name] = added(queries[method.name], part) if method.name in queries else part
    return Summed(queries, joined(forwards), np.concatenate(targets))


def read_rows(source: RowSource, label_ids: LabelMap | TargetMap | None) -> tuple[list[list[str]], np.ndarray | None]:
    """All texts of a source, one list a text column, and the class ids of its rows, ``(q,)``."""
    texts: list[list[str]] = [[] for _ in source.text_columns]
    classes = []
    for block in source.blocks():
        for column, part in zip(texts, block.texts, strict=True):
            column += part
        if label_ids is not None and block.labels is not None:
            classes.append(label_ids(block.labels, block.start))
    return texts, np.concatenate(classes) if classes else None


def common_class(classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The target that all rows of a group share, ``(g,)`` or ``(g, c)``; -1 or NaN where they differ."""
    nothing = NONE if classes.dtype.kind in "iu" else np.nan
    shared = np.full((int(groups.max()) + 1, *classes.shape[1:]), nothing, classes.dtype)
    for group in range(len(shared)):
        distinct = np.unique(classes[groups == group], axis=0)
        if len(distinct) == 1:
            shared[group] = distinct[0]
    return shared
