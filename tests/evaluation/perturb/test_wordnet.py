"""The WordNet reader on a hand-written database, and on the installed one where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_wordnet import write_wordnet

from forebear import DataError, InputError
from forebear.evaluation.perturb.wordnet import DEBIAN_FOLDER, WordNet


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
    with pytest.raises(InputError, match=r"index\.noun is missing.*apt-get install wordnet-base.*folder="):
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


# Of the real WordNet, what the next test asks for.
REAL_SYNSETS = {
    "noun": [
        ("movie", ["movie", "film", "picture", "moving_picture", "flick"], []),
        ("acting", ["acting", "playing"], []),
        ("child", ["child", "kid"], []),
    ],
    "verb": [("act", ["act", "play"], []), ("go", ["go", "travel", "move"], []), ("go away", ["depart", "go"], [])],
    "adj": [
        ("good", ["good(p)"], [(1, "bad", 1)]),
        ("bad", ["bad"], []),
        ("happy", ["happy"], [(1, "unhappy", 1)]),
        ("unhappy", ["unhappy"], []),
        ("terrible", ["awful", "terrible", "abominable"], []),
        ("hot", ["hot"], [(1, "cold", 1)]),
        ("cold", ["cold"], []),
    ],
    "adv": [("beautifully", ["attractively", "beautifully"], [(2, "badly", 1)]), ("badly", ["unattractively"], [])],
}
INSTALLED = [Path(DEBIAN_FOLDER)] if Path(DEBIAN_FOLDER, "index.noun").is_file() else []


@pytest.mark.parametrize("folder", ["written here", *INSTALLED])
def test_the_real_wordnet_is_read(folder, tmp_path):
    """A part of it, written here; and the whole one, where it is installed."""
    exceptions = {"noun": "children child\n", "adj": "happier happy\n"}
    wordnet = WordNet(folder if folder in INSTALLED else write_wordnet(tmp_path, REAL_SYNSETS, exceptions))
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
