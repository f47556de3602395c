"""Synonyms and antonyms of a word, from WordNet's database files (wndb(5WN): index.noun, data.noun, noun.exc, ...).

nltk's reader takes no folder outside of nltk's data path and asks for a file that Debian's package does not hold, so
they are read here. Licence and version of the database are the user's; nothing of it is part of forebear.

A word's lemmas are those of WordNet's morphology (morphy(7WN)): the word itself, those of the exception lists or else
those left when an inflection is taken off. Substitutes come as lemmas: they are not inflected like the word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from forebear.errors import DataError, InputError

DEBIAN_FOLDER = "/usr/share/wordnet"
ANTONYM = "!"
# Inflections and what they are replaced by, in WordNet's order.
_DETACHMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip
_LETTERS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}


@dataclass(frozen=True)
class _Synset:
    """One line of a data file.

    Attributes:
        words: Lemmas of the synset, underscores for spaces, in WordNet's order.
        antonyms: For the word at a place (from 1): its place, part of speech and offset of the antonym's synset,
            and the place of the antonym in that synset.
    """

    words: tuple[str, ...]
    antonyms: tuple[tuple[int, str, int, int], ...]


class WordNet:
    """WordNet's files, open for reading."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Read the indexes (a few megabytes).

        Args:
            folder: Folder of index.noun, data.noun and so on; None: the folder of Debian's package.

        Raises:
            InputError: The folder lacks one of these files.
            DataError: A file is not in the format of WordNet 3.
        """
        self.folder = Path(folder or DEBIAN_FOLDER)
        for pos in _DETACHMENTS:
            for name in (f"index.{pos}", f"data.{pos}"):
                if not (self.folder / name).is_file():
                    raise InputError(
                        f"no WordNet in {self.folder}: {name} is missing. Install it (Debian: apt-get install "
                        "wordnet-base), or name the folder of its index and data files by --wordnet."
                    )
        self._offsets = {pos: self._read_index(pos) for pos in _DETACHMENTS}
        self._exceptions = {pos: self._read_exceptions(pos) for pos in _DETACHMENTS}
        self._data = {pos: (self.folder / f"data.{pos}").read_bytes() for pos in _DETACHMENTS}
        self._substitutes = lru_cache(maxsize=None)(self._find)

    def synonyms(self, word: str) -> tuple[str, ...]:
        """Other lemmas of the word's senses; see :meth:`substitutes`."""
        return self.substitutes(word, antonyms=False)

    def substitutes(self, word: str, *, antonyms: bool) -> tuple[str, ...]:
        """Single words that can stand for a word, each once: synonyms, then antonyms if asked for.

        Synonyms share a sense with one of the word's lemmas; antonyms are the direct ones of these lemmas. In order of
        sense number, then part of speech (noun, verb, adjective, adverb), then WordNet's order in the sense. Left out
        are lemmas of several words and the word itself in another inflection. "Word" and "WORD" are followed in their
        capitals; what WordNet spells with a capital keeps it.

        Args:
            word: Without white space around it, in any case.
            antonyms: Whether to add antonyms.
        """
        synonyms, opposites = self._substitutes(word.lower())
        lemmas = synonyms + opposites if antonyms else synonyms
        return tuple(dict.fromkeys(_like(word, lemma) for lemma in lemmas))

    def lemmas(self, word: str, pos: str) -> tuple[str, ...]:
        """Lemmas of a lower-case word as a ``noun``, ``verb``, ``adj`` or ``adv``, by WordNet's rules."""
        forms = [word, *self._exceptions[pos].get(word, ())]
        if len(forms) == 1:
            forms += [word[: -len(end)] + new for end, new in _DETACHMENTS[pos] if word.endswith(end)]
        return tuple(dict.fromkeys(form for form in forms if form in self._offsets[pos]))

    def _find(self, word: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        senses = sorted(
            (
                (number, order, pos, lemma, offset)
                for order, pos in enumerate(_DETACHMENTS)
                for lemma in self.lemmas(word, pos)
                for number, offset in enumerate(self._offsets[pos][lemma])
            ),
            key=lambda sense: sense[:2],
        )
        own_forms = {word, *(sense[3] for sense in senses)}
        synonyms: list[str] = []
        opposites: list[str] = []
        for _, _, pos, lemma, offset in senses:
            synset = self._synset(pos, offset)
            synonyms += synset.words
            word_places = [place for place, other in enumerate(synset.words, 1) if other.lower() == lemma]
            for place, other_pos, other_offset, other_place in synset.antonyms:
                if place in word_places:
                    opposites.append(self._synset(other_pos, other_offset).words[other_place - 1])

        def usable(words: list[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(w for w in words if "_" not in w and w.lower() not in own_forms))

        return usable(synonyms), usable(opposites)

    def _read_index(self, pos: str) -> dict[str, tuple[int, ...]]:
        """Offsets of the senses of each lemma, by sense number."""
        path = self.folder / f"index.{pos}"
        out: dict[str, tuple[int, ...]] = {}
        for number, line in enumerate(self._text(path).splitlines(), 1):
            if line.startswith("  "):  # the licence
                continue
            fields = line.split()
            try:  # lemma pos n_synsets n_pointers pointers... n_senses n_tagged offsets...
                n_synsets, n_pointers = int(fields[2]), int(fields[3])
                offsets = tuple(int(field) for field in fields[6 + n_pointers :])
                whole = len(offsets) == n_synsets
            except (IndexError, ValueError):
                whole = False
            if not whole:
                raise self._broken(path, f"line {number}")
            out[fields[0]] = offsets
        return out

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(path, f"byte {error.start}") from error

    def _read_exceptions(self, pos: str) -> dict[str, tuple[str, ...]]:
        """Lemmas of irregular forms; a part of speech may have none."""
        path = self.folder / f"{pos}.exc"
        if not path.is_file():
            return {}
        lines = (line.split() for line in self._text(path).splitlines())
        return {fields[0]: tuple(fields[1:]) for fields in lines if fields}

    def _synset(self, pos: str, offset: int) -> _Synset:
        data = self._data[pos]
        end = data.find(b"\n", offset)
        try:
            # offset file type n_words(hex) (word id)... n_pointers (symbol offset pos source-target(hex))... | gloss
            fields = data[offset : end if end >= 0 else None].decode().partition("|")[0].split()
            if int(fields[0]) != offset:
                raise ValueError
            n_words = int(fields[3], 16)
            # An adjective may say where it stands: galore(ip).
            words = tuple(field.partition("(")[0] for field in fields[4 : 4 + 2 * n_words : 2])
            pointers_start = 5 + 2 * n_words
            pointers = [
                fields[pointers_start + 4 * i : pointers_start + 4 * i + 4]
                for i in range(int(fields[pointers_start - 1]))
            ]
            antonyms = tuple(
                (int(places[:2], 16), _LETTERS[letter], int(other_offset), int(places[2:], 16))
                for symbol, other_offset, letter, places in pointers
                if symbol == ANTONYM
            )
        except (IndexError, ValueError, KeyError) as error:
            raise self._broken(self.folder / f"data.{pos}", f"byte {offset}") from error
        return _Synset(words, antonyms)

    def _broken(self, path: Path, where: str) -> DataError:
        return DataError(
            f"{path}, {where}: not what WordNet 3 has there. Files of one version belong together, unaltered; "
            "install them again (Debian: apt-get install --reinstall wordnet-base)."
        )


def _like(word: str, lemma: str) -> str:
    """A lemma with the capitals of the word that it stands for."""
    if len(word) > 1 and word.isupper():
        return lemma.upper()
    return lemma[0].upper() + lemma[1:] if word[0].isupper() else lemma
