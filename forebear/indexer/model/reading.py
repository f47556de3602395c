"""How much of some rows a model reads: word pieces unknown to its tokenizer, rows cut at its length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forebear.wording import worded

MANY_UNKNOWN = 0.05  # of word pieces; above this share users are warned. English under its own tokenizer has .001
MANY_CUT = 0.1  # of rows; above this share users are told what to do


@dataclass(frozen=True)
class Reading:
    """How much of some rows a model reads; sums over rows, so that those of shards add up.

    Attributes:
        n_rows: Rows.
        n_pieces: Word pieces read, without those that the tokenizer adds.
        n_unknown: Of these, the unknown token ([UNK]).
        n_cut: Rows of which the length limit cuts the end.
    """

    n_rows: int = 0
    n_pieces: int = 0
    n_unknown: int = 0
    n_cut: int = 0

    def __add__(self, other: Reading) -> Reading:
        """The sums over the rows of both."""
        return Reading(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def share_unknown(self) -> float:
        """Share of the word pieces that are unknown."""
        return self.n_unknown / max(1, self.n_pieces)

    @property
    def share_cut(self) -> float:
        """Share of the rows that are cut."""
        return self.n_cut / max(1, self.n_rows)

    def describe(self, max_length: int) -> str:
        """One line that states both shares."""
        return (
            f"{share(self.share_unknown)} of word pieces unknown to the tokenizer, {share(self.share_cut)} of rows cut "
            f"at {max_length} word pieces"
        )

    def warnings(self, max_length: int, rows: str) -> list[str]:
        """Warnings for the user, empty where all is well; ``rows`` names the rows, such as 'the indexed rows'."""
        warnings = []
        if self.share_unknown > MANY_UNKNOWN:
            warnings.append(
                f"{share(self.share_unknown)} of the word pieces of {rows} are unknown to the tokenizer: the model "
                "does not see these words. Is it the model's own tokenizer, and the language that it was made for?"
            )
        if self.n_cut:
            line = (
                f"{share(self.share_cut)} of {rows} ({self.n_cut:,} of {self.n_rows:,}) are longer than {max_length} "
                "word pieces, and the model does not see the rest."
            )
            if self.share_cut > MANY_CUT:
                line += " If it takes more, train and index with a larger --max-length."
            warnings.append(worded(line))
        return warnings


def count_reading(
    tokenizer: Any, texts: Sequence[Sequence[str]], rows: Sequence[dict[str, list[int]]], max_length: int
) -> Reading:
    """How much of rows of text the model reads.

    Args:
        tokenizer: The model's tokenizer.
        texts: One list a text column.
        rows: The same rows, encoded.
        max_length: Longest row in word pieces.
    """
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id  # GPT-2 has one token for all
    added = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    full_rows = [i for i, row in enumerate(rows) if len(row["input_ids"]) >= max_length]
    uncut: list[list[int]] = []
    if full_rows:  # only these can be cut: they are encoded again, in full
        columns = [[column[i] for i in full_rows] for column in texts]
        uncut = tokenizer(*columns, truncation=False, padding=False, verbose=False)["input_ids"]
    return Reading(
        n_rows=len(rows),
        n_pieces=sum(max(0, len(row["input_ids"]) - added) for row in rows),
        n_unknown=0 if unknown is None else sum(row["input_ids"].count(unknown) for row in rows),
        n_cut=sum(len(ids) > max_length for ids in uncut),
    )


def share(value: float) -> str:
    """A share in percent; a small one is not rounded to nothing."""
    return f"{value:.1%}" if value == 0 or value >= 0.0005 else "under 0.1%"
