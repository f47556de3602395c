"""Whether an index is whole: every byte re-hashed, nothing unlisted, a sample of rows computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forebear.errors import CorruptIndexError, InputError
from forebear.indexer.building.sharing.beginning import checkpoints_now, load_checked
from forebear.indexer.index import Index
from forebear.indexer.model.classifier import Classifier
from forebear.indexer.model.device.arithmetic import device_kind
from forebear.indexer.model.device.picking import pick_device
from forebear.indexer.model.forward import run_forward
from forebear.indexer.model.sentence_encoder import load_sentence_encoder
from forebear.indexer.sketches.fitting import open_sketchers
from forebear.indexer.sketches.sketch import Sketcher, sketch_rows
from forebear.indexer.spans.masking import mask_spans
from forebear.indexer.spans.store import masked_pass
from forebear.indexer.storage.arrow import file_sha256
from forebear.indexer.storage.atomic import TEMPORARY_SUFFIX
from forebear.indexer.storage.files import local_folder
from forebear.indexer.storage.journal import SUBFOLDERS, is_in_force, read_journal
from forebear.indexer.storage.layout import CARD_NAME, EFFECTS_NAME, HUB_NAME, JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME
from forebear.indexer.storage.locks import owner_of
from forebear.indexer.storage.manifest import Manifest, read_manifest
from forebear.indexer.words.gradients import WordRows, word_gradients
from forebear.wording import worded

FLOAT16_ROUNDING = 1e-3  # of stored coordinates, scaled back to length 1
WORDS_ROUNDING = {"fp16": 1e-3, "int8": 2e-2, "fp32": 0.0}  # of stored word vectors
Compare = Callable[[np.ndarray, np.ndarray], None]  # stored and recomputed numbers
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # max|difference| / max|value|: other batches, other threads


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked, and the problems that were found.

    Attributes:
        n_files: Files re-hashed.
        size_bytes: Size of these files together.
        n_rows_recomputed: Training rows run through the model again.
        max_error: Largest max|difference| / max|value| of recomputed arrays; None if no row was recomputed.
        problems: One line each; empty when the index is whole.
    """

    n_files: int
    size_bytes: int
    n_rows_recomputed: int
    max_error: float | None
    problems: tuple[str, ...]


def verify_index(
    folder: str | Path, *, model: str | None = None, n_rows: int = 16, seed: int = 0, device: str = "auto"
) -> Verification:
    """Check every byte of an index, and a sample of its rows against the model.

    Args:
        folder: The index, or the address of a published one.
        model: Path of the last checkpoint, if it has moved.
        n_rows: Rows to recompute; 0 checks the bytes alone, without a model.
        seed: Random seed of the sample of rows.
        device: Device that the model runs on.

    Raises:
        CorruptIndexError: The manifest itself is damaged.
        ModelError: The model cannot be loaded.
        MismatchError: It is not the model of the index.
    """
    folder = local_folder(folder)
    if not (folder / MANIFEST_NAME).is_file():
        Index.open(folder)  # raises, saying what is there instead
    manifest = read_manifest(folder)
    problems = _byte_problems(folder, manifest)
    max_error = None
    if n_rows < 0:
        raise InputError(f"--rows {n_rows}: expected 0 or more.")
    if n_rows and not problems:
        max_error = _recompute(Index.open(folder, check=False), model, n_rows, seed, device)
        limit = TOLERANCE[manifest.spec.precision]
        if max_error > limit:
            problems.append(
                f"recomputed rows differ from the stored ones by {max_error:.2e} (at most {limit:.0e} expected)"
            )
    return Verification(
        n_files=len(manifest.files) + 1,
        size_bytes=sum(facts["bytes"] for facts in manifest.files.values()),
        n_rows_recomputed=0 if max_error is None else min(n_rows, manifest.n_rows),
        max_error=max_error,
        problems=tuple(problems),
    )


def _byte_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}")
        elif file_sha256(path) != facts["sha256"]:
            problems.append(f"{name} was altered: its sha256 is not the manifest's")
    owner = owner_of(folder / LOCK_NAME)
    left = _left_line(folder, manifest)
    partial_journal = JOURNAL_NAME + TEMPORARY_SUFFIX  # of a change that was killed before it began
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            not path.is_file()
            or name in manifest.files
            or name in (MANIFEST_NAME, JOURNAL_NAME, LOCK_NAME, EFFECTS_NAME, CARD_NAME, HUB_NAME)
        ):
            continue
        if owner is None or name.split("/")[0] not in (*SUBFOLDERS, partial_journal):
            ours = (left is not None and name.split("/")[0] in SUBFOLDERS) or name == partial_journal
            problems.append(
                f"{name} is not listed in the manifest" + (" (left by a change that was interrupted)" if ours else "")
            )
    if owner is not None:
        problems.append(f"{folder} is being changed by {owner}: verify it again when that has ended")
    elif left is not None:
        problems.append(left)
    return problems


def _left_line(folder: Path, manifest: Manifest) -> str | None:
    """A line about the interrupted change of the journal; None without a journal."""
    try:
        journal = read_journal(folder)
    except CorruptIndexError as error:
        return str(error)
    if journal is None:
        return None
    kind = journal["kind"]
    if is_in_force(journal, manifest):
        return worded(
            f"the {kind} is done but for files that it replaced: the next change, or the same command, removes them"
        )
    return worded(
        f"an unfinished {kind}: go on with the same command and --resume, or discard what it left with --force"
    )


def _recompute(index: Index, model: str | None, n_rows: int, seed: int, device: str) -> float:
    """Largest relative difference between stored and recomputed numbers of a sample of rows."""
    manifest = index.manifest
    spec = manifest.spec_on(device_kind(pick_device(device)))
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(manifest.n_rows, size=min(n_rows, manifest.n_rows), replace=False))
    texts = index.text_lists(rows)
    errors = []

    def compare(stored: np.ndarray, recomputed: np.ndarray, rounding: float = 0.0) -> None:
        scale = max(float(np.abs(stored).max()), 1e-30)
        difference = float(np.abs(stored.astype(np.float64) - recomputed).max()) / scale
        errors.append(max(difference - rounding, 0.0) if np.isfinite(difference) else difference)

    checkpoints = checkpoints_now(index, model)
    for number, checkpoint in enumerate(checkpoints):
        last = checkpoint is checkpoints[-1]
        classifier = load_checked(checkpoint, spec, device)
        kinds: dict[str, Sketcher] = {}
        for scope in spec.sketched_scopes:
            kinds |= open_sketchers(index.fit_folder, classifier, spec, scope, checkpoint.name, last=last)
        gold = index.targets(rows)
        if kinds:
            sketches, forward = sketch_rows(
                classifier, list(kinds.values()), texts, gold, batch_tokens=spec.batch_tokens, packs=True
            )
            for kind, recomputed in zip(kinds, sketches, strict=True):
                store = index.gradient_store(kind)
                for norms, fresh_norms in zip(store.norms_within(rows), recomputed.norms_within(), strict=True):
                    compare(norms, fresh_norms)
                compare(store.lengths[rows], recomputed.lengths)
                compare(store.coordinates(rows), recomputed.coordinates, rounding=FLOAT16_ROUNDING)
        else:
            forward = run_forward(classifier, texts, batch_tokens=spec.batch_tokens)
        if spec.words_tops:
            words, _ = word_gradients(classifier, texts, gold, spec.words_tops, batch_tokens=spec.batch_tokens)
            for top, words_of_top in words.items():
                stored_words = index.words(top, number).take(rows)
                positions, fresh_positions = _same_words(stored_words, words_of_top)
                stored_vectors, fresh = stored_words.vectors, words_of_top.vectors
                assert stored_vectors is not None
                assert fresh is not None
                compare(
                    stored_vectors[positions], fresh[fresh_positions], rounding=WORDS_ROUNDING[spec.words_precision]
                )
        residuals, _ = forward.residuals_and_losses(gold)
        compare(index.features(number).take(rows), forward.features)
        compare(index.residuals(number).take(rows), residuals)
        if spec.spans is not None and last:
            _compare_spans(index, classifier, kinds, rows, compare)
    if "sbert" in spec.stores:
        assert manifest.sentence_model is not None
        encoder = load_sentence_encoder(manifest.sentence_model, device=device)
        compare(index.sentence().take(rows), encoder.embed(texts))
    if not np.isfinite(errors).all():
        raise CorruptIndexError(f"{index.folder}: stored numbers are NaN or infinite. Build the index again.")
    return max(errors)


def _compare_spans(
    index: Index, classifier: Classifier, sketchers: dict[str, Sketcher], rows: np.ndarray, compare: Compare
) -> None:
    """Compare the stored numbers of some rows' spans with those of the same spans masked again.

    Raises:
        CorruptIndexError: A stored span is not in what the model reads of its row.
    """
    store = index.spans()
    entries = store.entries_of(rows)
    if not len(entries):
        return
    owners = store.rows[entries]
    encoded, read = mask_spans(classifier, index.text_lists(owners), store.spans(entries))
    if not read.all():
        raise CorruptIndexError(f"{index.folder}: a stored span of row {owners[~read][0]} is not in its text.")
    gold = index.targets(owners)
    features, logits, sketches = masked_pass(classifier, sketchers, encoded, gold, classifier.batch_tokens())
    for kind, recomputed in sketches.items():
        stored = index.gradient_store(kind, spans=True)
        for norms, fresh_norms in zip(stored.norms_within(entries), recomputed.norms_within(), strict=True):
            compare(norms, fresh_norms)
        compare(stored.lengths[entries], recomputed.lengths)
    compare(store.features.take(entries), features)
    compare(store.residuals.take(entries), classifier.loss.residual_and_loss(logits, gold)[0])


def _same_words(stored: WordRows, fresh: WordRows) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the words that both hold, in each of the two.

    A few may differ where only a row's longest gradients are kept, because two lengths may be nearly equal.

    Raises:
        CorruptIndexError: More than a tenth of the words differ.
    """
    keys, fresh_keys = (w.rows << 32 | w.tokens for w in (stored, fresh))
    _, positions, fresh_positions = np.intersect1d(keys, fresh_keys, assume_unique=True, return_indices=True)
    if len(positions) < 0.9 * max(len(keys), len(fresh_keys)):
        raise CorruptIndexError(
            f"the words stored for a sample of rows are not those of their texts: {len(positions)} of {len(keys)} are "
            "the same. Build the index again."
        )
    return positions, fresh_positions
