"""A WordNet database of a few words, in the files of the real one."""

from __future__ import annotations

from pathlib import Path

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
