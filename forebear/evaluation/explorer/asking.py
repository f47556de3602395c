"""What the explorer is asked for: an index, test rows and a question, opened and checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forebear.errors import InputError
from forebear.evaluation.audits.rows.hub_shares import read_hub_shares
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.explain.explaining import chosen_methods
from forebear.evaluation.explorer.records import Asked
from forebear.evaluation.python.opening import IndexLike, Rows, retriever_of, tested_rows
from forebear.retriever.answers.coverage import tell_fit_age
from forebear.retriever.question.query_rows import tell_label_remark
from forebear.retriever.question.spec import QueryChoices, QuerySpec
from forebear.retriever.saliency.maps import GRADIENT_X_INPUT

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ask(
    retriever: IndexLike,
    rows: Rows,
    *,
    hubs: str | Path | None = None,
    form: str = GRADIENT_X_INPUT,
    **choices: Unpack[QueryChoices],
) -> Asked:
    """Open the test rows and the question; methods and rows at each end are by default those of ``explain``.

    Args:
        retriever: A Retriever, an Index, or an index folder.
        rows: Test rows, as audits take them; labels are used where there are any.
        hubs: Folder of an audit of hubs.
        form: Form of the saliency.
        **choices: Fields of :class:`~forebear.QuerySpec`.

    Raises:
        InputError: A choice does not fit the index, or there are no test rows.
        DataError: The test rows cannot be read.
        MismatchError: The audit of hubs is of another index, or at another scope or curvature.
    """
    retriever = retriever_of(retriever, "explain")
    if choices.get("target") == "gold":
        raise InputError("--target gold: the explorer explains predictions. Give predicted, or a label's name.")
    given = choices.get("methods") or ()
    choices["methods"] = chosen_methods(
        retriever, (given,) if isinstance(given, str) else given, spans=False, saliency_influence=False
    )
    choices.setdefault("top", 5)
    question = retriever.resolve(QuerySpec.of(None, **choices))
    tell_fit_age(question)
    source = tested_rows(retriever.label_names, rows, like=retriever.index.manifest.row_format)
    tell_label_remark(retriever.index, source, required=False)
    if not source.n_rows:
        raise InputError(f"{source.name} has no rows. Give test rows.")
    shares = None if hubs is None else read_hub_shares(Path(hubs), retriever, question)
    test = sample_queries(retriever, source, 0, 0)
    return Asked(retriever=retriever, question=question, form=form, test=test, hubs=shares)
