"""Messages name options as whoever is spoken to wrote them: by flags at the command line, by keywords in Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import COMMANDS
from places import ROOT
from tiny import labels, sentences, write_jsonl

from forebear import BuildOptions, Index, QuerySpec, Retriever, TrainOptions, choose_model, open_rows
from forebear.cli.main import run
from forebear.errors import InputError
from forebear.retriever.answers.coverage import question_facts
from forebear.wording import GOING_ON, KEYWORDS, at_command_line, worded

FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)(?: ([^\s(]\S*))?")
IN_MESSAGES_OF_OTHERS = {"--reinstall"}  # of apt-get
OF_PYTHON_ALONE = {"--warmup-ratio", "--weight-decay"}  # fields of TrainOptions that no command sets
VALUES = {  # words that messages give as values; what else follows a flag must be of GOING_ON
    "multi-label", "regression", "a,b,c", "a,b",
    "all", "aspect", "binary-nli", "cg", "cp1252", "cpu", "drop", "ekfac", "exact", "features", "features,sbert",
    "features,spans", "features,words", "bf16", "fp32", "full", "gold", "head", "head,", "keep", "none",
    "random", "rerank", "spans", "reader:", "entailment,non-entailment", "damping=", "whole",
}  # fmt: skip


def written_in(path: Path) -> list[str]:
    """Texts in a module that are no docstring; ``{}`` stands for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aside: set[int] = set()  # docstrings, and the parts of formatted strings
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body and isinstance(body[0], ast.Expr):
            aside.add(id(body[0].value))
        if isinstance(node, ast.JoinedStr):
            aside.update(id(part) for part in ast.walk(node) if part is not node)
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in aside:
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            texts.append(node.value)
    return texts


LIBRARY = [path for path in sorted((ROOT / "forebear").rglob("*.py")) if "cli" not in path.relative_to(ROOT).parts]
MESSAGES = [
    (path, text)
    for path in LIBRARY
    if path.name != "wording.py"
    for text in written_in(path)
    if FLAG.search(text) and not text.startswith("forebear ")
]
FLAGS_OF_COMMANDS = {name: {flag for option in c.params for flag in option.opts} for name, c in COMMANDS.items()}


def test_every_flag_in_a_message_is_of_a_command_and_has_a_name_in_python() -> None:
    assert len(MESSAGES) > 200
    every = set().union(*FLAGS_OF_COMMANDS.values())
    for path, text in MESSAGES:
        for flag, _ in FLAG.findall(re.sub("`forebear [^`]*`", "", text)):
            if flag not in IN_MESSAGES_OF_OTHERS:
                assert flag in every, f"{path}: {text}"
                assert flag in KEYWORDS, f"{path}: {text}"


def test_a_word_after_a_flag_is_known_as_its_value_or_as_more_of_the_sentence() -> None:
    for path, text in MESSAGES:
        for flag, after in FLAG.findall(re.sub("`forebear [^`]*`", "", text)):
            word = after.rstrip(".,:;)?").removesuffix("{}")
            if word and "{" not in word[:2] and flag in KEYWORDS and KEYWORDS[flag].kind not in ("switch", "phrase"):
                assert word in VALUES or word in GOING_ON, f"{path}: {flag} {word} in {text}"


def test_flags_with_names_of_their_own_are_flags_of_that_command() -> None:
    for key in KEYWORDS:
        command, _, flag = key.rpartition(" ")
        known = FLAGS_OF_COMMANDS[command] if command else set().union(*FLAGS_OF_COMMANDS.values()) | OF_PYTHON_ALONE
        assert flag in known, key


def taken_in_python() -> dict[str, set[str]]:
    """Parameters of every function, and fields and parameters of every class, in the package."""
    found: dict[str, set[str]] = {}
    parents: dict[str, list[str]] = {}
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = found.setdefault(getattr(node, "name", "") or "", set())
            functions = [node] if isinstance(node, ast.FunctionDef) else []
            if isinstance(node, ast.ClassDef):
                names.update(ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign))
                functions = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
                parents[node.name] = [ast.unparse(base) for base in node.bases]
            for function in functions:
                arguments = function.args
                names.update(one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    for name in found:
        above = list(parents.get(name, ()))
        while above:
            found[name] |= found.get(above[0], set())
            above += parents.get(above.pop(0), ())
    return found


def test_what_an_option_is_called_in_python_is_a_parameter_there() -> None:
    taken = taken_in_python()
    for key, keyword in KEYWORDS.items():
        assert keyword.of in taken, f"{key}: there is no {keyword.of}"
        if keyword.kind != "phrase":
            assert keyword.name in taken[keyword.of], f"{key}: {keyword.of} takes no {keyword.name}"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--top 0: expected at least 1.", "top=0: expected at least 1."),
        ("--exact 'may be': expected none.", "exact='may be': expected none."),
        ("Ask with --curvature cg, or more.", 'Ask with curvature="cg", or more.'),
        ("Name their column by --label-column.", "Name their column by label_column=."),
        ("--spans: the rows have none.", "spans: the rows have none."),
        ("Build it with --store features,sbert.", 'Build it with stores=("features", "sbert").'),
        ("Give --store features,spans --spans words.", 'Give stores=("features", "spans"), spans="words".'),
        ("it was built with --words-top 10.", "it was built with words_tops=(10,)."),
        ("--eta 0.1 -0.2: expected positive.", "etas=(0.1,) -0.2: expected positive."),
        ("--eta 0.1 0.2: expected.", "etas=(0.1, 0.2): expected."),
        ("give --force without it", "give force=True without it"),
        ("Choose them by --text-columns or --pair.", "Choose them by text_columns= or pairs of texts."),
        ("go on with the same command and --resume", "go on with the same call and resume=True"),
        ("(forebear index --refit fits them again)", "(refit_index() fits them again)"),
        ("Give a folder of `forebear audit hubs --out`.", "Give a folder of `forebear audit hubs --out`."),
        ("apt-get install --reinstall wordnet-base", "apt-get install --reinstall wordnet-base"),
        ("--rows : expected numbers.", "n_rows='': expected numbers."),
        ("--sides : expected top.", "names=(): expected top."),
        ("Give a larger --l2 (now 0.1).", "Give a larger l2= (now 0.1)."),
    ],
)
def test_options_read_as_python_writes_them(written: str, read: str) -> None:
    assert worded(written) == read
    assert worded(read) == read
    with at_command_line():
        assert worded(written) == written


def test_one_flag_may_be_several_keywords() -> None:
    message = "built with --damping none, not --scope head,all"
    assert worded(message, of="index") == 'built with dampings=(), not scopes=("head", "all")'
    assert worded(message) == 'built with damping="none", not scope="head,all"'


def test_an_error_says_so_whenever_it_is_asked() -> None:
    error = InputError("--scope all: expected head.", of="index")
    assert str(error) == 'scopes=("all",): expected head.'
    with at_command_line():
        assert str(error) == "--scope all: expected head."
        assert f"{error}" == "--scope all: expected head."
    assert str(InputError(f"{error} Give --force.")) == 'scopes=("all",): expected head. Give force=True.'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> SimpleNamespace:  # type: ignore[no-untyped-def]
    """A model, training rows and an index of them, without words or curvature."""
    folder = tmp_path_factory.mktemp("wording")
    rows = write_jsonl(folder / "train.jsonl", text=sentences(20), label=labels(20))
    args = ["--model", tiny_model(), "--train", str(rows), "--out", str(folder / "I"), "--damping", "none", "-q"]
    assert run(["index", *args, "--ann", "Flat"]) == 0
    return SimpleNamespace(index=folder / "I", rows=rows, folder=folder, model=tiny_model())


def ask(place: SimpleNamespace, **choices: object) -> None:
    Retriever(Index.open(place.index)).retrieve(["a film"], **choices)  # type: ignore[arg-type]


BOTH_DOORS = {  # arguments of the command; what Python does; what the command says; what Python says
    "a number": (
        "retrieve --index INDEX --text a --top 0", lambda place: ask(place, top=0),
        "--top 0: expected at least 1", "top=0: expected at least 1",
    ),
    "a word": (
        "retrieve --index INDEX --text a --method if --curvature kfac",
        lambda place: ask(place, methods=["if"], curvature="kfac"),
        "--curvature 'kfac': expected", "curvature='kfac': expected",
    ),
    "a store that is not there": (
        "retrieve --index INDEX --text a --method sbert-cos", lambda place: ask(place, methods=["sbert-cos"]),
        "Build it with --store features,sbert.", 'Build it with stores=("features", "sbert").',
    ),
    "a switch": (
        "retrieve --index INDEX --text a --certify --exact full",
        lambda place: ask(place, exact="full", certify=True),
        "--certify proves what --exact rerank finds", 'certify=True proves what exact="rerank" finds',
    ),
    "a scope of the index": (
        "retrieve --index INDEX --text a --scope all", lambda place: ask(place, scope="all"),
        "Build it with --scope head,all.", 'Build it with scopes=("head", "all").',
    ),
    "curvature that was left out": (
        "retrieve --index INDEX --text a --method if", lambda place: ask(place, methods=["if"]),
        "was built with --damping none: it holds no curvature of the head. Ask with --curvature cg",
        'was built with dampings=(): it holds no curvature of the head. Ask with curvature="cg"',
    ),
    "a choice of the index": (
        "index --model MODEL --train ROWS --out NEW --calibrate -1",
        lambda _place: BuildOptions(calibration_queries=-1).check(),
        "--calibrate -1: expected 0", "calibration_queries=-1: expected 0",
    ),
    "a choice of a training": (
        "train --data ROWS --model MODEL --out NEW --batch-size 0", lambda _place: TrainOptions(batch_size=0),
        "--batch-size 0: expected at least 1", "batch_size=0: expected at least 1",
    ),
    "a column": (
        "index --model MODEL --train ROWS --out NEW --text-columns text,text",
        lambda place: open_rows(place.rows, text_columns=["text", "text"]),
        "--text-columns names", "text_columns= names",
    ),
    "a model": (
        "index --train ROWS --out NEW", lambda _place: choose_model(None),
        "Name one by --model, or its checkpoints by --checkpoints.",
        "Name one by model=, or its checkpoints by checkpoints=.",
    ),
    "recall": (
        "retrieve --index INDEX --text a --recall 2", lambda _place: QuerySpec(methods=("gc",), recall=2).check(),
        "--recall 2.0: expected a share", "recall=2: expected a share",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOTH_DOORS)
def test_both_doors_name_what_the_caller_wrote(case: str, place: SimpleNamespace, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    command, call, typed, keyword = BOTH_DOORS[case]
    names = {"INDEX": place.index, "ROWS": place.rows, "MODEL": place.model, "NEW": tmp_path / "new"}
    assert run([str(names.get(word, word)) for word in command.split()]) == 2
    assert typed in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError) as caught:
        call(place)
    assert keyword in str(caught.value)
    assert "--" not in str(caught.value)


def test_notes_and_remarks_are_worded_too(place: SimpleNamespace) -> None:
    question = Retriever(Index.open(place.index)).resolve(QuerySpec(methods=("nn-cos",), exact="none"))
    assert question_facts(question)["methods"]["nn-cos"]["recall_note"] == 'recall not measured for exact="none"'
    remark = choose_model(None, [place.model, place.model]).remark
    assert remark is not None and "by etas" in remark and "--" not in remark
    with at_command_line():
        assert "by --eta" in str(choose_model(None, [place.model, place.model]).remark)
