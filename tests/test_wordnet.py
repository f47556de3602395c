"""The WordNet reader on a hand-written database, and on the installed one where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebear import DataError, InputError
from forebear.evaluation.perturb.wordnet import DEBIAN_FOLDER, WordNet

# Part of speech: synsets as (key, words, antonyms as (place here, key there, place there)).
SYNSETS = {
    "noun": [
        ("movie", ["film", "movie", "motion_picture"], []),
        ("layer", ["film", "coat"], []),
        ("man", ["man", "Adult_male", "fellow"], []),
        ("city", ["Paris", "Lutetia"], []),
    ],
    "verb": [("shoot", ["shoot", "film", "take"], []), ("go", ["run", "go"], [(2, "stop", 1)]), ("stop", ["stop"], [])],
    "adj": [
        ("good", ["good(p)", "fine"], [(1, "bad", 2), (2, "poor", 1)]),
        ("bad", ["ill", "bad"], []),
        ("poor", ["poor"], []),
    ],
    "adv": [("well", ["well", "good"], [])],
}
EXCEPTIONS = {"noun": "men man\n", "verb": "ran run\nwent go\n"}
LETTERS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


def write_wordnet(folder: Path, synsets: dict = SYNSETS, exceptions: dict = EXCEPTIONS) -> Path:
    """Files as wndb(5WN) describes them; senses of a lemma are numbered in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    licence = "".join(f"  {i} This stands for the licence. | \n" for i in range(1, 4))
    place: dict[tuple[str, str], tuple[int, int]] = {}
    for pos, found in synsets.items():
        at = len(licence)
        for key, words, antonyms in found:
            pointers = "".join(f" ! 00000000 {LETTERS[pos]} 0000" for _ in antonyms)
            line = f"00000000 00 {LETTERS[pos]} {len(words):02x}" + "".join(f" {w} 0" for w in words)
            line += f' {len(antonyms) + 1:03d} @ 00000001 n 0000{pointers} | a gloss; "with ! signs"\n'
            place[pos, key] = (at, len(line))
            at += len(line)
    for pos, found in synsets.items():
        data, senses = licence, {}
        for key, words, antonyms in found:
            offset, length = place[pos, key]
            pointers = "".join(
                f" ! {place[pos, other][0]:08d} {LETTERS[pos]} {a:02x}{b:02x}" for a, other, b in antonyms
            )
            line = f"{offset:08d} 00 {LETTERS[pos]} {len(words):02x}" + "".join(f" {w} 0" for w in words)
            line += f' {len(antonyms) + 1:03d} @ 00000001 n 0000{pointers} | a gloss; "with ! signs"\n'
            assert len(line) == length
            data += line
            for word in words:
                senses.setdefault(word.partition("(")[0].lower(), []).append(offset)
        (folder / f"data.{pos}").write_text(data)
        index = "".join(
            f"{lemma} {LETTERS[pos]} {len(at)} 2 @ ! {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}  \n"
            for lemma, at in sorted(senses.items())
        )
        (folder / f"index.{pos}").write_text(licence + index)
        if pos in exceptions:
            (folder / f"{pos}.exc").write_text(exceptions[pos])
    return folder


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory) -> WordNet:
    return WordNet(write_wordnet(tmp_path_factory.mktemp("wordnet")))


@pytest.mark.parametrize(
    ("word", "synonyms", "antonyms"),
    [
        ("film", ["movie", "shoot", "take", "coat"], []),  # by sense number, nouns before verbs
        ("films", ["movie", "shoot", "take", "coat"], []),  # and not "film" itself
        ("filming", ["shoot", "take"], []),
        ("good", ["fine", "well"], ["bad"]),  # antonyms of this lemma, not of its synonym
        ("fine", ["good"], ["poor"]),
        ("well", ["good"], []),
        ("ran", ["go"], []),  # the antonym is that of "go"
        ("went", ["run"], ["stop"]),
        ("men", ["fellow"], []),  # by the exception; of one word only
        ("Good", ["Fine", "Well"], ["Bad"]),
        ("GOOD", ["FINE", "WELL"], ["BAD"]),
        ("paris", ["Lutetia"], []),  # WordNet's own capitals
        ("stop", [], []),
        ("unheard", [], []),
        ("", [], []),
    ],
)
def test_substitutes_are_those_of_the_words_senses(wordnet, word, synonyms, antonyms):
    assert list(wordnet.synonyms(word)) == synonyms
    assert list(wordnet.substitutes(word, antonyms=True)) == synonyms + antonyms


def test_a_missing_wordnet_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"index\.noun is missing.*apt-get install wordnet-base.*--wordnet"):
        WordNet(tmp_path)
    (write_wordnet(tmp_path / "part") / "data.adv").unlink()
    with pytest.raises(InputError, match=r"data\.adv is missing"):
        WordNet(tmp_path / "part")


def test_altered_files_are_refused(tmp_path):
    folder = write_wordnet(tmp_path / "moved")
    data = folder / "data.noun"
    data.write_text(" " + data.read_text())
    with pytest.raises(DataError, match=r"data\.noun, byte \d+: not what WordNet 3 has there"):
        WordNet(folder).synonyms("coat")
    index = write_wordnet(tmp_path / "cut") / "index.verb"
    index.write_text(index.read_text()[:-12])
    with pytest.raises(DataError, match=r"index\.verb, line \d+"):
        WordNet(index.parent)


@pytest.mark.skipif(not Path(DEBIAN_FOLDER, "index.noun").is_file(), reason="no WordNet (Debian: wordnet-base)")
def test_the_installed_wordnet_is_read():
    wordnet = WordNet()
    assert {"movie", "picture", "flick"} <= set(wordnet.synonyms("films"))
    assert "bad" in wordnet.substitutes("good", antonyms=True)
    assert "bad" not in wordnet.synonyms("good")
    assert wordnet.lemmas("children", "noun") == ("child",)
    assert "unhappy" in wordnet.substitutes("happier", antonyms=True)
    for word in ("acting", "terrible", "beautifully", "hot", "go"):
        found = wordnet.substitutes(word, antonyms=True)
        assert found
        assert len(set(found)) == len(found)
        assert not any("_" in other or "(" in other or other.lower() == word for other in found)
