"""Answers of several indexes of one model, merged into those of one index of all their rows.

A score of a training row that comes from the row, the test row and the model alone is the same in any index. So the
best of all rows are among the best of each index, and are ranked by their scores. Scores that depend on the other rows
(by H^-1, by document frequencies) mean something else in each index, and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from forebear.errors import InputError, MismatchError, first_line
from forebear.indexer.index import Index
from forebear.retriever.answers.results import SIDES, text_columns
from forebear.retriever.question.methods import METHODS, Method
from forebear.retriever.question.spec import Question

INDEX = "index"  # the column that names the index of a row
_EFFECTS = ("effect", "effect_probability", "effect_together", "effect_probability_together")  # of one index's rows
_OF_MODEL = (
    "checkpoint_sha256", "tokenizer_sha256", "etas", "label_names", "problem_type", "label_mode", "max_length",
    "precision", "class_weights", "label_smoothing",
)  # fmt: skip
_OF_WORDS = ("words_tops", "words_precision")


def depends_on_other_rows(method: Method) -> bool:
    """Whether a row's score by a method depends on which other rows its index holds."""
    return method.query != "same" or method.representation in ("tfidf", "run") or method.variants or method.saliency


def check_one_model(indexes: Sequence[Index]) -> None:
    """Refuse indexes whose scores are of different models.

    Raises:
        InputError: An index is given twice.
        MismatchError: Two differ in the models, or in how they read rows or what was lost; the choice is named.
    """
    first = indexes[0]
    for number, other in enumerate(indexes[1:], 1):
        if any(other.manifest.digest() == one.manifest.digest() for one in indexes[:number]):
            raise InputError(f"{other.folder} is given twice, or as a copy. Its rows would be listed twice.")
        _compare(first, other, _OF_MODEL)
        if len(first.manifest.spec.text_columns) != len(other.manifest.spec.text_columns):
            _compare(first, other, ("text_columns",))


def check_question(question: Question, others: Sequence[Index]) -> None:
    """Refuse a question whose scores cannot be compared across indexes.

    Args:
        question: For the first index.
        others: The other indexes, each of which can answer it.

    Raises:
        InputError: A method's scores depend on which rows an index holds, or are estimates.
        MismatchError: What is compared is stored otherwise in one of them.
    """
    for method in question.methods:
        if depends_on_other_rows(method):
            could = ", ".join(name for name, m in METHODS.items() if not depends_on_other_rows(m))
            raise InputError(
                f"--method {method.name}: its scores depend on all rows of an index, so those of two indexes mean "
                f"different things. Across indexes there are {could}; or build one index of all rows."
            )
    beyond_head = any(question.searched_by(method) == "gradients" for method in question.methods)
    if beyond_head and question.spec.exact == "none":
        raise InputError(
            "--exact none: estimates from the sketches of two indexes cannot be compared. Leave it out: candidates of "
            "each are then scored exactly."
        )
    needed = {
        "words": _OF_WORDS if any(m.representation == "words" for m in question.methods) else (),
        "sentence": ("sentence_sha256",) if any(m.representation == "sentence" for m in question.methods) else (),
        "gradients": ("with_bias",) if beyond_head else (),
    }
    for other in others:
        _compare(question.index, other, [name for names in needed.values() for name in names])


def _compare(first: Index, other: Index, names: Sequence[str]) -> None:
    for name in names:
        one, two = (getattr(index.manifest.spec, name) for index in (first, other))
        if one != two:
            raise MismatchError(
                f"{first.folder} and {other.folder} are not of one model: {name} is {_brief(one)} and {_brief(two)}. "
                "Ask them one by one."
            )


def _brief(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return ", ".join(str(part)[:12] if isinstance(part, str) and len(part) == 64 else str(part) for part in parts)


def merge_tables(indexes: Sequence[Index], tables: Sequence[pa.Table], top: int) -> pa.Table:
    """The best ``top`` results of each query, method and side among those of several indexes.

    Ties are broken by the order of the indexes, then by row: as if their rows were numbered one index after another.

    Args:
        indexes: The indexes.
        tables: The whole answers of each to the same test rows, by the same methods.
        top: Results a ranking.

    Returns:
        Columns as of one index, with ``index`` before ``row``, without effects, which are of one index's rows. Columns
        that an index lacks are null for its rows.

    Raises:
        MismatchError: A column of the rows has different types.
    """
    try:
        both = pa.concat_tables([_named(*pair, indexes[0]) for pair in zip(indexes, tables, strict=True)],
                                promote_options="default").unify_dictionaries()  # fmt: skip
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise MismatchError(
            f"columns of {' and '.join(str(index.folder) for index in indexes)} have different types "
            f"({first_line(error)}). Build them with --keep-columns that agree."
        ) from error
    number = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    query, row = (both.column(name).to_numpy() for name in ("query", "row"))
    methods = {name: i for i, name in enumerate(tables[0].column("method").unique().to_pylist())}
    method = np.array([methods[name] for name in both.column("method").to_pylist()])
    side = np.array([SIDES.index(name) for name in both.column("side").to_pylist()])
    score = both.column("score").to_numpy()
    order = np.lexsort((row, number, np.where(side == 0, -score, score), side, method, query))
    ranking = np.stack([query, method, side])[:, order]
    starts = np.flatnonzero(np.r_[True, (ranking[:, 1:] != ranking[:, :-1]).any(axis=0)])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    kept = rank < top
    merged = both.take(pa.array(order[kept]))
    place = merged.column_names.index("rank")
    return merged.set_column(place, "rank", pa.array((rank[kept] + 1).astype(np.int32)))


def _named(index: Index, table: pa.Table, like: Index) -> pa.Table:
    """A table of one index with the index's name, the texts under the names that they have in another."""
    texts = dict(zip(text_columns(index), text_columns(like), strict=True))
    names = [texts.get(name, f"row_{INDEX}" if name == INDEX else name) for name in table.column_names]
    table = table.rename_columns(names)
    table = table.select([name for name in names if name not in _EFFECTS])
    of_rows = pa.array([str(index.folder)] * table.num_rows, pa.string())
    return table.add_column(table.column_names.index("row"), INDEX, of_rows)
