"""One prediction explained, and the saliency of rows, as Python asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forebear.errors import InputError
from forebear.evaluation.explain import explaining
from forebear.evaluation.explain.explanation import Explanation
from forebear.evaluation.flips.head import check_head
from forebear.evaluation.python.flipping import flip_of
from forebear.evaluation.python.opening import IndexLike, Rows, check_targets, retriever_of, tested_rows
from forebear.indexer.index import Index
from forebear.indexer.losses.kinds import loss_of
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.encoding import Texts
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.loading import load_classifier
from forebear.indexer.rows.labels import label_map
from forebear.indexer.rows.row_format import SINGLE_LABEL, RowFormat
from forebear.indexer.storage.layout import MANIFEST_NAME
from forebear.indexer.training.model_choice import choose_model
from forebear.retriever.answers.coverage import tell_fit_age
from forebear.retriever.question.spec import QueryChoices, QuerySpec
from forebear.retriever.question.targets import choose_targets
from forebear.retriever.retriever import Retriever
from forebear.retriever.saliency import maps
from forebear.retriever.saliency.maps import GRADIENT_X_INPUT, Saliency
from forebear.retriever.searchers import QUERY_BLOCK_ROWS
from forebear.wording import caller

if TYPE_CHECKING:
    from typing_extensions import Unpack


def explain(
    retriever: IndexLike,
    query: str | tuple[str, str],
    *,
    form: str = GRADIENT_X_INPUT,
    saliency_influence: bool = False,
    flip: bool = False,
    spec: QuerySpec | None = None,
    **choices: Unpack[QueryChoices],
) -> Explanation:
    """Explain the prediction for one text or pair of texts: its salient words, and the training rows behind it.

    Args:
        retriever: A Retriever, an Index, or an index folder.
        query: A text, or two for an index of pairs.
        form: Form of the saliency: ``gradient-x-input`` or ``summed-gradient``.
        saliency_influence: Whether rows behind the saliency of a word are asked for too: of ``word``, or else of the
            word of largest summed-gradient saliency.
        flip: Whether the fewest training rows that flip the prediction are looked for; see :func:`forebear.flip`.
        spec: The question. By default five rows at each end, by ``tracin-we-topk`` where the index holds words, and
            ``gc``.
        **choices: Fields of :class:`~forebear.QuerySpec`. By ``spans`` a method that ranks spans is asked too, by
            ``word`` one that is about that word's saliency.

    Returns:
        The explanation. In a notebook it shows its page. ``forebear.evaluations`` and ``forebear.audits`` are about
        many rows.

    Raises:
        InputError: A choice is out of range or does not fit the index.
        ModelError: The model's tokenizer does not tell where words stand.

    Example:
        >>> import forebear
        >>> forebear.explain("runs/demo/index", ("The cat sat .", "A cat sat ."), methods=["gc"], top=3)
    """
    retriever = retriever_of(retriever, "explain")
    if spec is None:
        given = choices.get("methods", ())
        names = (given,) if isinstance(given, str) else given
        about_word = saliency_influence or choices.get("word") is not None
        choices["methods"] = explaining.chosen_methods(
            retriever, names, spans=choices.get("spans") is not None, saliency_influence=about_word
        )
        choices.setdefault("top", 5)
    question = retriever.resolve(QuerySpec.of(spec, **choices))
    tell_fit_age(question)
    if flip:
        check_targets(retriever.index, "flip")
        check_head(retriever.index)
    explanation = explaining.explain(retriever, query, question, form=form, command=caller("forebear.explain(...)"))
    return replace(explanation, flip=flip_of(retriever, query)) if flip else explanation


def saliency(
    model: IndexLike | Classifier, rows: Rows, target: str = "predicted", *, form: str = GRADIENT_X_INPUT
) -> list[Saliency]:
    """How much each word piece of some rows, and each word, speaks for a label.

    ``gradient-x-input`` (Han et al. 2020): -<dL/de_t, e_t> over its L1 norm in the row, start and end tokens included;
    L is the loss of the target. The sign is kept; 0 where the norm is 0. ``summed-gradient`` (Meng et al. 2020): the
    sum over dimensions of dS_y/de_t, S_y the target's probability; not normalised. Positive supports the target.

    Args:
        model: A Retriever or Index (its last checkpoint), a Classifier, or a folder: of an index, a run or a model.
        rows: Texts, pairs of texts as tuples, a RowSource, or a path, as :meth:`Retriever.retrieve` takes them.
        target: ``predicted``, ``gold`` (rows need labels) or a label's name; of several labels ``label:NAME``.
        form: ``gradient-x-input`` or ``summed-gradient``.

    Returns:
        One saliency for each row, in the order given.

    Raises:
        InputError: The form or target is not known; or texts are given by columns, as before 0.2.
        ModelError: The tokenizer does not say where word pieces stand.
        NonFiniteError: A feature, logit or gradient is NaN or infinite.

    Example:
        >>> import forebear
        >>> (map,) = forebear.saliency("runs/demo/index", [("The cat sat .", "A cat sat .")])
        >>> [(word.text, round(word.value, 2)) for word in map.words]
    """
    _refuse_columns(rows, target)
    if form not in maps.FORMS:
        raise InputError(f"saliency form {form!r} is not known. Give {' or '.join(maps.FORMS)}.")
    retriever, classifier, known = _opened(model)
    names = classifier.label_names if retriever is None else retriever.label_names
    source = tested_rows(names, rows, need_labels=target == "gold", like=known)
    if retriever is not None:
        retriever.check_texts(source)
    labels = None
    if target == "gold":
        labels = (
            retriever.query_labels(source, required=True)
            if retriever is not None
            else label_map(source, names, problem_type=classifier.loss.problem_type)
        )
    found: list[Saliency] = []
    for block in source.blocks(QUERY_BLOCK_ROWS):
        gold = None if labels is None or block.labels is None else labels(block.labels, block.start)
        texts: Texts = [list(column) for column in block.texts]
        predictions = np.zeros(len(block), np.int64)
        if target == "predicted" or (target != "gold" and classifier.loss.problem_type != SINGLE_LABEL):
            predictions = run_forward(classifier, texts).predictions
        targets = choose_targets(target, predictions, gold, names, classifier.loss)
        found += maps.saliency(classifier, block.texts, targets, form=form)
    return found


def _refuse_columns(rows: object, target: object) -> None:
    """Refuse texts by columns and class ids, the arguments before 0.2, rather than read a column as a row."""
    by_columns = isinstance(rows, (list, tuple)) and any(isinstance(row, list) for row in rows)
    if by_columns or not isinstance(target, str):
        raise InputError(
            "saliency takes rows, and as target predicted, gold or a label's name; texts by columns and class ids were "
            "given, as before 0.2. Give texts, or pairs as tuples: list(zip(*columns)); and labels by "
            "rows_from_texts(rows, labels) with target gold."
        )


def _opened(model: IndexLike | Classifier) -> tuple[Retriever | None, Classifier, RowFormat]:
    """The retriever, where there is an index; the model whose saliency is meant; and how its rows were read."""
    if isinstance(model, Classifier):
        return None, model, RowFormat()
    if isinstance(model, (Retriever, Index)) or (Path(model) / MANIFEST_NAME).is_file():
        retriever = retriever_of(model, "saliency")
        return retriever, retriever.classifier(), retriever.index.manifest.row_format
    chosen = choose_model(str(model))
    classifier = load_classifier(chosen.checkpoints[-1].path, max_length=chosen.max_length)
    loss = loss_of(classifier.loss.problem_type, **chosen.loss_choices)
    return None, replace(classifier, loss=loss), chosen.row_format
