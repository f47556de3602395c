"""Names of files and folders within an index."""

from __future__ import annotations

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "build.json"
LOCK_NAME = "forebear.lock"  # in a folder that is being changed
BASES_NAME = "bases.arrow"
MAP_NAME = "map.arrow"
SPANS = "spans"
PARTS = ("tokens", "postings", "rows", "entries")  # of a store of words


def gradient_folder(scope: str, checkpoint: str, damping: int | None = None) -> str:
    """Where an index keeps the sketches of a scope at a checkpoint; whitened ones by the damping's number."""
    return f"gradients/{scope}/{checkpoint}" if damping is None else f"gradients/{scope}/whitened-{damping}"


def curvature_name(scope: str) -> str:
    """The file of a scope's EK-FAC."""
    return f"curvature/{scope}/ekfac.arrow"


def words_folder(checkpoint: str, top: int) -> str:
    """Where an index keeps the words of a checkpoint: of all positions (``top`` 0), or of the longest gradients."""
    return f"words/{checkpoint}/{f'top-{top}' if top else 'all'}"


def runs_folder(kind: str) -> str:
    """Where the pass leaves its runs until they are merged."""
    return f"{kind}/runs"


def word_files(kind: str, generation: int) -> tuple[str, ...]:
    """Files of a store."""
    return tuple(f"{kind}/{part}-{generation:04d}.arrow" for part in PARTS)


def masked_folder(checkpoint: str) -> str:
    """Where features and residuals of masked rows are kept."""
    return f"{SPANS}/{checkpoint}"


def span_gradients(kind: str) -> str:
    """Where the sketches of spans are kept, beside those of whole rows in ``kind``."""
    return f"{kind}/{SPANS}"
