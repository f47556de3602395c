"""``forebear.audits.poison``: rows that plant a behaviour."""

from __future__ import annotations

from dataclasses import replace

from forebear.errors import InputError
from forebear.evaluation.audits.poison import poison as of_poison
from forebear.evaluation.audits.poison.report import poison_list, poison_report
from forebear.evaluation.common.queries import sample_queries
from forebear.evaluation.python.opening import Finding, IndexLike, Rows, called, finding, retriever_of, tested_rows
from forebear.evaluation.python.retrainings import Retraining, retrainer_of
from forebear.evaluation.retraining.changes import seeds_of
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.progress import Progress, progress_of

DEFAULT_ENCODER = "minilm"


def poison(
    retriever: IndexLike,
    rows: Rows | None = None,
    *,
    how: Retraining | None = None,
    n_measured: int = 40,
    n_listed: int = 100,
    sentence_model: str | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Finding[of_poison.Poison]:
    """Which training rows plant a behaviour by a phrase that they share, and what is the phrase?

    Args:
        retriever: Over an index of one label a row.
        rows: Suspicious test rows, labelled or not: only phrases that stand in one of them are looked at; None: all.
        how: How models are trained again, without the listed rows, to see whether the behaviour goes; None: none is,
            nor where nothing is listed.
        n_measured: Phrases that are put into other rows: those of nearly one label first, by their association.
        n_listed: Rows in the report; the work list has all.
        sentence_model: An encoder that was not fine-tuned, a folder or hub name; None: that of the index's sentence
            embeddings, or ``minilm``.
        seed: Random seed of samples, of the places of phrases and of the retrainings.
        progress: True, or a function.

    Raises:
        InputError: A number is out of range, or the index keeps no texts.
    """
    name = "audits.poison"
    retriever = retriever_of(retriever, name)
    for flag, number in (("--measured", n_measured), ("--top", n_listed)):
        if number < 1:
            raise InputError(f"{flag} {number}: expected at least 1.")
    index = retriever.index
    suspicious, test_rows = None, None
    if rows is not None:
        source = tested_rows(retriever.label_names, rows, like=index.manifest.row_format)
        queries = sample_queries(retriever, source, 0, seed)
        suspicious, test_rows = queries.texts, f"{len(queries):,} of {source.name}"
    progress = progress_of(progress)
    encoder = load_sentence_encoder(
        sentence_model or index.manifest.sentence_model or DEFAULT_ENCODER, device=str(retriever.models.device)
    )
    found = of_poison.find_poison(
        retriever, encoder, suspicious=suspicious, n_measured=n_measured, seed=seed, progress=progress
    )
    recipe = None
    probes = of_poison.probe_texts(found, seed, len(index.manifest.spec.text_columns))
    if how is not None and probes[0]:
        retrainer = retrainer_of(retriever, how, probes, None)
        recipe = retrainer.recipe
        seeds = seeds_of(retrainer, how.n_seeds, seed)
        found = replace(found, retrained=of_poison.retrain(found, retrainer, seeds, progress))
    page = poison_report(
        found, retriever, n_listed, called(name), recipe, suspicious_test_rows=test_rows,
        encoder_of_the_reference=encoder.name, seed=seed,
    )  # fmt: skip
    return finding(found, page, poison_list(found, index))
