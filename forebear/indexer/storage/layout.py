"""Names of files and folders within an index."""

from __future__ import annotations

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "build.json"
LOCK_NAME = "forebear.lock"  # in a folder that is being changed
CARD_NAME = "README.md"  # of a published index, and what a hub adds to it; neither is in its digest
HUB_NAME = ".gitattributes"
EFFECTS_NAME = "effects.json"  # how true effects were found to be; no part of the index, and not in its digest
BASES_NAME = "bases.arrow"
MAP_NAME = "map.arrow"
SPANS = "spans"
COLUMNS = "columns"  # of rows, besides texts and labels
CLAIMS = "claims"  # of processes on shards, while several write an index
PART_RECORDS = "parts"  # of what parts of an index hold that were written apart, until they are committed
PARTS = ("tokens", "postings", "rows", "entries")  # of a store of words


def gradient_folder(scope: str, checkpoint: str, damping: int | None = None) -> str:
    """Folder of the sketches of a scope at a checkpoint; with the number of a damping, of its whitened sketches."""
    return f"gradients/{scope}/{checkpoint}" if damping is None else f"gradients/{scope}/whitened-{damping}"


def curvature_name(scope: str) -> str:
    """The file of a scope's EK-FAC."""
    return f"curvature/{scope}/ekfac.arrow"


def words_folder(checkpoint: str, top: int) -> str:
    """Folder of the words of a checkpoint: of all positions (``top`` 0), or of each row's ``top`` longest gradients."""
    return f"words/{checkpoint}/{f'top-{top}' if top else 'all'}"


def word_shards_folder(kind: str) -> str:
    """Folder of the sorted words that the pass writes for a word store, one file a shard, until they are merged."""
    return f"{kind}/shards"


def word_files(kind: str, generation: int) -> tuple[str, ...]:
    """Files of the word store ``kind`` at a generation, in the order of :data:`PARTS`."""
    return tuple(f"{kind}/{part}-{generation:04d}.arrow" for part in PARTS)


def masked_folder(checkpoint: str) -> str:
    """Folder of the features and residuals of rows with a span masked."""
    return f"{SPANS}/{checkpoint}"


def span_gradients(kind: str) -> str:
    """Folder of the sketches of spans, within the folder ``kind`` of the sketches of whole rows."""
    return f"{kind}/{SPANS}"
