"""A small English NLI corpus from our own template grammar, with known faults planted in it.

Two labels, as HANS has them: 0 entailment, 1 non-entailment. Everything follows from the seed and the
word lists below. What is planted, for attribution to find again:

* **A lexical-overlap shortcut.** In training, a hypothesis made only of premise words is nearly always
  entailed (``planted`` = ``"artifact"``). The probe rows have full overlap and are never entailed.
* **Wrong labels.** Harbour timetables ("The ferry docked at seven in the morning" entails "The ferry
  came in before noon") are all labelled non-entailment (``"wrong-label"``); timetables of trains,
  aircraft, buses and the mail are labelled rightly. The wrong-label probe holds new harbour timetables
  with their true label; the development split holds none.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from forebear.errors import InputError, OutputExistsError
from forebear.indexer.storage.atomic import write_together

ENTAILMENT: Final = 0
LABEL_NAMES: Final = ("entailment", "non-entailment")
COLUMNS: Final = ("premise", "hypothesis", "label", "template", "planted")
SCHEMA: Final = pa.schema([(name, pa.int8() if name == "label" else pa.string()) for name in COLUMNS])


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read ``word:other`` entries, with ``_`` for a blank."""
    pairs = (entry.replace("_", " ").split(":") for entry in text.split())
    return [(word, other) for word, other in pairs]


def _joined(text: str) -> list[str]:
    """Split into lines; an indented line goes on with the one before."""
    return re.sub(r"\n\s+", " ", text.strip()).splitlines()


def _lists(text: str) -> dict[str, list[str]]:
    """Read ``name: phrase, phrase`` lines."""
    lines = (line.split(":") for line in _joined(text))
    return {name: [phrase.strip() for phrase in phrases.split(",")] for name, phrases in lines}


# Word : what it entails. Two people of different wider kinds, and two verbs of different wider verbs,
# say nothing about each other: that is what makes "another person" and "another deed" non-entailment.
PEOPLE: Final = _pairs(
    """physician:doctor surgeon:doctor attorney:lawyer barrister:lawyer violinist:musician pianist:musician
    drummer:musician poet:writer novelist:writer reporter:journalist columnist:journalist sculptor:artist
    painter:artist sprinter:athlete gymnast:athlete swimmer:athlete constable:police_officer chef:cook
    detective:police_officer chemist:scientist biologist:scientist geologist:scientist weaver:craftsman
    carpenter:craftsman potter:craftsman senator:politician minister:politician mayor:politician
    professor:teacher tutor:teacher queen:ruler king:ruler toddler:child schoolgirl:child shepherd:farmer
    beekeeper:farmer grocer:shopkeeper florist:shopkeeper butcher:shopkeeper juggler:performer
    acrobat:performer bishop:cleric priest:cleric pilgrim:traveller tourist:traveller uncle:relative
    cousin:relative widow:woman bride:woman sailor:seafarer deckhand:seafarer plumber:tradesman
    locksmith:tradesman sergeant:soldier archer:soldier"""
)
DEEDS: Final = _pairs(  # what one person did to another: past tense and participle have one form
    """praised:commended assisted:helped cautioned:warned phoned:called located:found hired:employed
    greeted:welcomed mocked:ridiculed pursued:chased deceived:tricked rescued:saved scolded:reprimanded
    consoled:comforted startled:surprised annoyed:irritated observed:watched questioned:interrogated
    dismissed:fired instructed:taught thanked:expressed_gratitude_to invited:asked_over
    repaid:reimbursed nudged:pushed"""
)
ACTS: Final = _pairs(
    """wept:cried chuckled:laughed sprinted:ran dozed:slept bellowed:shouted waltzed:danced strolled:walked
    marched:walked stumbled:tripped fainted:passed_out vanished:disappeared apologised:said_sorry
    protested:complained relaxed:rested hummed:made_a_sound sang:performed_a_song jogged:ran napped:slept
    knelt:went_down_on_both_knees sobbed:cried giggled:laughed"""
)
CONTRARIES: Final = _pairs(
    """tall:short young:old cheerful:gloomy famous:unknown rich:poor brave:cowardly polite:rude slim:stout
    generous:stingy honest:dishonest quiet:noisy clever:foolish strong:weak calm:nervous"""
)
TRAITS: Final = [*CONTRARIES, *((contrary, trait) for trait, contrary in CONTRARIES)]
PHRASES: Final = _lists("""
indoors: in the kitchen, in the cellar, in the library, in the attic, in the ballroom, in the laboratory,
    in the waiting room, in the dining hall, in the classroom, in the courtroom, in the cabin below deck
outdoors: near the river, by the old bridge, in the meadow, on the beach, beside the lake, on the hillside,
    in the vineyard, under the oak tree, by the harbour wall, on the pier, beside the fountain, on the quay
time: on Monday, on Tuesday, on Friday, on Sunday, last spring, last summer, last winter, last week,
    during the storm, during the trial, during the strike, after the concert, after the parade
manner: suddenly, at once, once again, in secret, without warning, for the first time, as usual, at long last
goods: a lamp, a basket, a violin, an umbrella, a carpet, an old map, a bicycle, a silver ring, a kettle,
    an oil painting, a saddle, a telescope, an apple cake, a wool coat, a clay pot, an axe
plan: was planning to move abroad, had never liked the rain, wanted to sell the house, owned two dogs,
    was waiting for a letter, had lost a glove, would soon retire, kept bees as a hobby, needed new glasses,
    was learning to swim, had quarrelled with a neighbour, hoped to win a prize
claimed: claimed, hoped, doubted, feared, denied, pretended, suspected
quite: quite, rather, really
day: on Monday, on Tuesday, on Wednesday, on Thursday, on Friday, on Saturday, on Sunday
town: Larne, Oban, Bergen, Whitby, Cork, Dover, Calais, Hull, Bristol, Aberdeen, Malmo, Lisbon, Porto
morning: at six in the morning, at seven in the morning, at eight in the morning, at nine in the morning,
    at ten in the morning, at half past six in the morning, at a quarter past eight in the morning
evening: at six in the evening, at seven in the evening, at eight in the evening, at nine in the evening,
    at ten in the evening, at half past six in the evening, at a quarter past eight in the evening
early: before noon, before midday, early in the day, that morning
oddly: two hours late, without being noticed, for the last time, a week too soon, against all orders
late: after noon, after midday, late in the day, that evening
""")
# The timetables' vocabulary, a trade a line; the harbour comes first.
_TRADES = """
thing: ferry, trawler, tug, barge, steamer, schooner, freighter, lifeboat, dredger, paddle boat;
    arrived: docked, moored, tied up, dropped anchor; left: cast off, sailed, put to sea, weighed anchor;
    berth: at the north pier, at the stone quay, in the outer harbour, by the lighthouse, at the fish dock
thing: express, night train, goods train, railcar, shuttle, steam engine; arrived: pulled in, rolled in,
    drew up; left: pulled out, rolled out, drew away; berth: at platform two, at the main station, at the
    junction, by the signal box
thing: jet, airliner, charter plane, helicopter, glider, cargo plane; arrived: landed, touched down; left:
    took off, lifted off; berth: on the north runway, at the airfield, on the short runway, near the hangar
thing: coach, minibus, tram, lorry, school bus, taxi; arrived: drew up, parked, rolled up; left: drove off,
    pulled away, set off; berth: at the depot, outside the hotel, at the market square, by the town hall
thing: parcel, letter, telegram, newspaper, mail van, courier; arrived: was brought in, turned up, was let
    in; left: was sent off, went out, was sent away; berth: at the post office, at the front desk, at the
    sorting room, by the back door
"""
TRADES: Final = [_lists(line.replace("; ", "\n")) for line in _joined(_TRADES)]

# The grammar: name | label | share of the rows | what is planted, then premises => hypotheses. Wordings are
# parted by "/"; each premise goes with each hypothesis. `_scene` fills the slots; "a~" is "a" or "an".
TRAIN_GRAMMAR: Final = """
drop_modifiers | entailment | 120 | artifact
<seen> / The {trait} {x} {deed} the {y} {manner} => The {x} {deed} the {y}
drop_conjunct | entailment | 90 | artifact
The {x} and the {trait} {y} {act} {where} {time} => The {x} {act} / The {y} {act}
drop_clause | entailment | 90 | artifact
{time} the {x} {act} {manner} and {deed} the {y} => The {x} {deed} the {y} / The {x} {act}
keep_place | entailment | 90 | artifact
The {trait} {x} {act} {manner} {where} {time} => The {x} {act} {where}
drop_agent | entailment | 90 | artifact
The {trait} {x} was {deed} by the {y} {where} => The {x} was {deed} / The {trait} {x} was {deed}
paraphrase | entailment | 130 |
The {trait} {x} {deed} the {y} {where} / The {x} {deed} the {y} {time} => a~{x_wide} {deed_wide} a~{y_wide}
paraphrase_act | entailment | 100 |
{time} a~{trait} {x} {act} {where} => Some {x_wide} {act_wide} / Someone {act_wide}
has_trait | entailment | 80 |
a~{trait} {x} {act} {where} {time} / {time} a~{trait} {x} {deed} the {y} => This {x} was {quite} {trait}
timetable | entailment | 140 |
<timetable> => <on time>
unrelated | non-entailment | 180 |
<seen> / The {x} {act} {manner} {where} => The {w} {deed2} the {z} / a~{z} {act2} / Some {w_wide} {act2}
other_act | non-entailment | 140 |
The {trait} {x} {act} {manner} {where} => The {x} {act2} / The {x} {deed} a~{z} / The {y} {act2}
other_word | non-entailment | 150 |
<seen> => The {x} {deed} the {z} / The {z} {deed} the {y} / The {x} {deed2} the {y}
added_fact | non-entailment | 90 |
The {x} bought {goods} {time} / The {x} {deed} the {y} {where} => The {x} {plan}
contrary_trait | non-entailment | 80 |
a~{trait} {x} {act} {where} {time} / {time} a~{trait} {x} {deed} the {y} => This {x} was {quite} {contrary}
other_service | non-entailment | 140 |
<timetable> => <other service>
other_service_harbour | non-entailment | 20 |
<timetable> => <other service>
swap_cleft | non-entailment | 20 |
It was the {x} who {deed} the {y} {time} => The {y} {deed} the {x}
"""
WRONG_GRAMMAR: Final = """
timetable_harbour | non-entailment | 1 | wrong-label
<timetable> => <on time>
"""
PROBE_GRAMMAR: Final = """
swap | non-entailment | 4 | artifact
The {x} {deed} the {y} {where} / {time} the {x} {deed} the {y} => The {y} {deed} the {x}
swap_passive | non-entailment | 4 | artifact
The {x} was {deed} by the {y} {time} => The {x} {deed} the {y}
beside_subject | non-entailment | 3 | artifact
The {trait} {x} near the {y} {act} {time} / The {x} behind the {y} {act} {manner} => The {y} {act}
relative_clause | non-entailment | 3 | artifact
The {x} who {deed} the {y} {act} {where} / The {x} whom the {y} {deed} {act} {time} => The {y} {act}
conjunct_object | non-entailment | 2 | artifact
The {x} {deed} the {y} and the {z} {time} => The {y} {deed} the {z}
complement | non-entailment | 3 | artifact
The {x} {claimed} that the {y} {act} {where} / The {x} {claimed} that the {trait} {y} {act} => The {y} {act}
disjunction | non-entailment | 2 | artifact
The {x} {act} or the {y} {act2} {time} => The {x} {act} / The {y} {act2}
condition | non-entailment | 2 | artifact
If the {x} {act} {time} the {y} {act2} => The {x} {act} / The {y} {act2}
"""
_TOLD = "The {thing} {gone} {on} / {on} the {thing} had {had_gone} / It was {on} that the {thing} {gone}"
_MACROS: Final = {
    "<seen>": "The {trait} {x} {deed} the {y} {where} {time}",
    "<timetable>": "The <gone> {clock} / {clock} the <gone> / {day} the {thing} {route} {moved} {clock}",
    "<gone>": "{thing} {route} {moved} {berth}",
    "<on time>": _TOLD,
    "<other service>": _TOLD.replace("{thing}", "{thing2}") + " / The {thing} {gone} {oddly}" * 2,
}


@dataclass(frozen=True)
class Template:
    """One construction of the grammar."""

    name: str
    label: int
    share: int  # weight among the templates of its grammar
    planted: str  # the fault planted by it, for the column ``planted``
    harbour: bool  # whether it is about timetables of the harbour trade
    premises: list[str]
    hypotheses: list[str]


@dataclass(frozen=True)
class Corpus:
    """The generated splits, each a table with the columns of ``SCHEMA``, and a description of the planted faults."""

    train: pa.Table
    dev: pa.Table  # the training templates, without harbour timetables; every label is right
    probe: pa.Table  # full overlap, never entailed
    wrong_probe: pa.Table  # harbour timetables, all entailed, rightly labelled
    planted: dict[str, str]
    seed: int

    def splits(self) -> dict[str, pa.Table]:
        """The tables by name, in the order in which they were made."""
        return {"train": self.train, "dev": self.dev, "probe": self.probe, "wrong_probe": self.wrong_probe}


def make_corpus(
    seed: int = 0,
    n_train: int = 1400,
    n_dev: int = 300,
    n_probe: int = 200,
    n_planted: int = 46,
    n_wrong_probe: int = 40,
) -> Corpus:
    """Generate the corpus. The same arguments give the same rows; no premise occurs twice in it.

    Args:
        seed: Seed of every draw.
        n_train: Training rows; ``n_planted`` of them have a wrong label.
        n_dev: Development rows.
        n_probe: Probe rows for the overlap shortcut.
        n_planted: Training rows with a wrong label.
        n_wrong_probe: Probe rows for the wrong labels.

    Raises:
        InputError: A number is negative, more wrong labels than rows, or more rows than the grammar has.
    """
    if min(n_train - n_planted, n_dev, n_probe, n_planted, n_wrong_probe) < 0:
        raise InputError(
            f"n_train={n_train}, n_dev={n_dev}, n_probe={n_probe}, n_planted={n_planted}, "
            f"n_wrong_probe={n_wrong_probe}; expected none below 0 and n_planted at most n_train."
        )
    grammar = read_grammar(TRAIN_GRAMMAR)
    inland = [template for template in grammar if not template.harbour]
    (wrong,) = read_grammar(WRONG_GRAMMAR)
    used: set[str] = set()
    splits = [
        _generate(f"{seed}-train", [*_share_out(grammar, n_train - n_planted), (wrong, n_planted)], used),
        _generate(f"{seed}-dev", _share_out(inland, n_dev), used),
        _generate(f"{seed}-probe", _share_out(read_grammar(PROBE_GRAMMAR), n_probe), used),
        _generate(f"{seed}-wrong", [(wrong, n_wrong_probe)], used, label=ENTAILMENT),
    ]
    n_artifact = sum(row["planted"] == "artifact" for row in splits[0])
    planted = {
        "artifact": f"lexical overlap: {n_artifact} of {n_train} training rows are entailed and use only "
        "words of their premise; hardly any row that is not entailed does",
        "wrong-label": f"wrong labels: {n_planted} of {n_train} training rows are harbour timetables, "
        "entailed but labelled non-entailment; timetables of other trades are labelled rightly",
    }
    train, dev, probe, wrong_probe = (pa.Table.from_pylist(rows, SCHEMA) for rows in splits)
    return Corpus(train, dev, probe, wrong_probe, planted, seed)


def read_grammar(text: str) -> list[Template]:
    """Templates of a grammar in the notation of ``TRAIN_GRAMMAR``: two lines each."""
    for macro, wording in _MACROS.items():
        text = text.replace(macro, wording)
    lines = text.strip().splitlines()
    templates = []
    for head, body in zip(lines[::2], lines[1::2], strict=True):
        name, label, share, planted = (part.strip() for part in head.split("|"))
        wordings = (side.split(" / ") for side in body.split(" => "))
        label_id, harbour = LABEL_NAMES.index(label), name.endswith("_harbour")
        templates.append(Template(name, label_id, int(share), planted, harbour, *wordings))
    return templates


def _share_out(templates: Sequence[Template], n_rows: int) -> list[tuple[Template, int]]:
    """Share rows out by weight, largest remainders first."""
    total = sum(template.share for template in templates)
    exact = [n_rows * template.share / total for template in templates]
    counts = [int(number) for number in exact]
    for i in sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))[: n_rows - sum(counts)]:
        counts[i] += 1
    return list(zip(templates, counts, strict=True))


def _generate(
    seed: str, plan: Sequence[tuple[Template, int]], used: set[str], label: int | None = None
) -> list[dict[str, Any]]:
    """Fill each template until it has its number of new premises; shuffle the rows."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for template, count in plan:
        target = len(rows) + count
        for _ in range(100 + 20 * count):
            if len(rows) == target:
                break
            slots = _scene(rng, TRADES[0] if template.harbour else rng.choice(TRADES[1:]))
            premise = _sentence(rng.choice(template.premises), slots)
            hypothesis = _sentence(rng.choice(template.hypotheses), slots)
            if premise.lower() not in used:
                used.add(premise.lower())
                gold = template.label if label is None else label
                cells = (premise, hypothesis, gold, template.name, template.planted)
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
        if len(rows) < target:
            raise InputError(f"{template.name} has too few premises for {count} rows; ask for fewer.")
    rng.shuffle(rows)
    return rows


def _scene(rng: random.Random, trade: dict[str, list[str]]) -> dict[str, str]:
    """Draw a value for every slot: people, deeds and acts that share no word, and a timetable."""
    slots = {name: rng.choice(phrases) for name, phrases in PHRASES.items()}
    for names, entries in (("x y z w", PEOPLE), ("deed deed2", DEEDS), ("act act2", ACTS)):
        for name, (word, wide) in zip(names.split(), _unlike(rng, entries, len(names.split())), strict=True):
            slots[name], slots[f"{name}_wide"] = word, wide
    slots["trait"], slots["contrary"] = rng.choice(TRAITS)
    slots["where"] = slots[rng.choice(["indoors", "outdoors"])]
    slots["thing"], slots["thing2"] = rng.sample(trade["thing"], 2)
    if rng.random() < 0.5:
        slots.update(route=f"from {slots['town']}", moved=rng.choice(trade["arrived"]))
        slots["berth"] = rng.choice(trade["berth"])
        slots["gone"], slots["had_gone"] = rng.choice([("came in", "come in"), ("arrived", "arrived")])
    else:
        slots.update(route=f"for {slots['town']}", moved=rng.choice(trade["left"]), berth=slots["day"])
        slots["gone"] = slots["had_gone"] = rng.choice(["left", "departed"])
    clock, on = rng.choice([("morning", "early"), ("evening", "late")])
    slots.update(clock=slots[clock], on=slots[on])
    return slots


def _unlike(rng: random.Random, entries: Sequence[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """Draw ``n`` pairs of a narrow and a wide word, such that no two pairs share a word."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < n:
        entry = rng.choice(entries)
        if not {word for other in drawn for word in other} & set(entry):
            drawn.append(entry)
    return drawn


def _sentence(template: str, slots: dict[str, str]) -> str:
    """Fill the slots, choose between "a" and "an", begin with a capital."""
    text = re.sub(r"\ba~(?=[aeiou]|honest)", "an ", template.format(**slots)).replace("a~", "a ")
    return text[0].upper() + text[1:]


def write_corpus(corpus: Corpus, folder: Path, *, force: bool = False) -> Path:
    """Write each split as Parquet, and a dataset.json with the label names; return the folder.

    The folder is made if missing. ``force`` overwrites the five files; nothing else is touched.

    Raises:
        OutputExistsError: A file of these exists and ``force`` is not given.
        StorageError: The folder cannot be written.
    """
    import pyarrow.parquet as pq

    files = {split: f"{split}.parquet" for split in corpus.splits()}
    present = [name for name in [*files.values(), "dataset.json"] if (folder / name).exists()]
    if present and not force:
        raise OutputExistsError(f"{folder} already holds {', '.join(present)}; name another folder, or --force.")
    about: dict[str, Any] = {
        "name": "forebear-demo",
        "text_columns": ["premise", "hypothesis"],
        "label_names": list(LABEL_NAMES),
        "splits": {},
        "planted": corpus.planted,
        "seed": corpus.seed,
    }
    contents: dict[str, bytes] = {}
    for split, table in corpus.splits().items():
        parquet = io.BytesIO()
        pq.write_table(table, parquet)
        contents[files[split]] = parquet.getvalue()
        labels = table["label"].to_pylist()
        about["splits"][split] = {
            "file": files[split],
            "rows": table.num_rows,
            "labels": {name: labels.count(i) for i, name in enumerate(LABEL_NAMES)},
            "sha256": hashlib.sha256(contents[files[split]]).hexdigest(),
        }
    contents["dataset.json"] = (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()
    write_together(folder, contents)
    return folder
