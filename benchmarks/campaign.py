"""What an index and its commands stand: kills, bit flips, cut files, full disks, two at once, read-only, a wrong clock.

    python benchmarks/campaign.py                    some minutes
    python benchmarks/campaign.py --full             about an hour
    python benchmarks/campaign.py --only kills,flips --seed 1
    python benchmarks/campaign.py --quick            half a minute, of the tests: a few of each, nothing is written

A tiny random model and an index of everything are made on the fly. Each part says how many faults it tried and which
were not stood; a table is printed and written to ``benchmarks/results/campaign.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from faults import MODULES, Ended, Fault, ended, run, start, warm_up  # noqa: E402
from tiny import WORDS, labels, make_tiny_model, sentences, write_jsonl  # noqa: E402

N_ROWS, N_MORE = 26, 9
QUERY = "a very good film saw the old plot"
BUILD = [
    "--scope", "head,top-1", "--store", "features,sbert,words,spans", "--words-top", "0,3", "--spans", "words",
    "--sketch-dim", "8", "--sketch-bits", "64", "--white-bits", "64", "--calibrate", "4", "--shard-rows", "8",
    "--batch-tokens", "64", "--damping", "0.1x", "--rep-refit", "--quiet",
]  # fmt: skip
QUICK = [
    "--scope",
    "head,top-1",
    "--sketch-dim",
    "8",
    "--sketch-bits",
    "64",
    "--white-bits",
    "64",
    "--calibrate",
    "2",
    "-q",
]
ASK = ["--text", QUERY, "--method", "gd,if,nn-cos,sbert-cos", "--scope", "top-1", "--top", "5", "--quiet"]


@dataclass
class Part:
    """One part of the campaign: what was tried, and what was not stood."""

    name: str
    n_tried: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, note: str) -> None:
        self.notes[note] = self.notes.get(note, 0) + 1

    def check(self, ok: bool, what: str) -> bool:
        if not ok:
            self.failures.append(what)
            print(f"  {self.name}: {what}", flush=True)
        return ok


@dataclass(frozen=True)
class Case:
    """A command that changes files below one folder.

    Attributes:
        name: Of the case.
        base: What lies in the folder before; None for nothing.
        command: Run with a fault.
        resume: Run afterwards, until it has nothing left to do.
        index: The index below the folder that goes on answering meanwhile; None for none.
        is_done: Exit codes of ``resume`` when the work was done already.
    """

    name: str
    base: Path | None
    command: tuple[Any, ...]
    resume: tuple[Any, ...]
    index: Path | None = None
    is_done: tuple[int, ...] = (0,)


class World:
    """A tiny model, its training file, indexes of it, and what each change makes of them undisturbed."""

    def __init__(self, scratch: Path, *, quick: bool = False) -> None:
        self.scratch, self.at, self.quick = scratch, scratch / "work", quick
        self.index = self.at / "I"
        write_jsonl(scratch / "train.jsonl", text=sentences(N_ROWS), label=labels(N_ROWS))
        write_jsonl(scratch / "more.jsonl", text=sentences(N_MORE, seed=5), label=labels(N_MORE))
        write_jsonl(scratch / "test.jsonl", text=sentences(5, seed=9), label=labels(5))
        self.run("model", lambda: save_model(scratch / "model"))
        self.build = ["index", "--model", scratch / "model", "--train", scratch / "train.jsonl", "--out", self.index]
        self.build += QUICK if quick else [*BUILD, "--sentence-model", scratch / "model"]
        self.ask = ["retrieve", "--index", self.index, *ASK]
        if quick:
            self.ask[self.ask.index("--method") + 1] = "gd,if"
        change = ["index", "--out", self.index, "--quiet"]
        self.append = [*change, "--append", "--train", scratch / "more.jsonl"]
        self.retire, self.rebuild, self.refit = (
            [*change, "--retire", "3,7"],
            [*change, "--rebuild-ann"],
            [*change, "--refit"],
        )
        warm_up(self.build, scratch=scratch, modules=("forebear.cli.main",) if quick else MODULES)
        self._trials: dict[str, Trials] = {}
        self.built = self.undisturbed("built", None, self.build)
        warm_up(self.ask, self.append, scratch=scratch, modules=())
        self.appended = self.undisturbed("appended", self.built, self.append)

    def run(self, what: str, work: Callable[[], object]) -> None:
        """Do something in a child, so that this process starts no threads."""
        pid = os.fork()
        if not pid:
            work()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, what

    def undisturbed(self, name: str, base: Path | None, command: Sequence[Any]) -> Path:
        self.reset(base)
        found = run(command, scratch=self.scratch)
        assert found.code == 0, (command, found.err)
        return Path(shutil.copytree(self.at, self.scratch / name))

    def reset(self, base: Path | None) -> None:
        """Let the work folder hold a copy of ``base``, or nothing."""
        shutil.rmtree(self.at, ignore_errors=True)
        if base is None:
            self.at.mkdir()
        else:
            shutil.copytree(base, self.at)

    def answers(self) -> Ended:
        return run(self.ask, scratch=self.scratch)

    def trials(self, case: Case) -> Trials:
        """Trials of a case, which is run undisturbed but once."""
        if case.name not in self._trials:
            self._trials[case.name] = Trials(self, case)
        return self._trials[case.name]

    def cases(self) -> Iterator[Case]:
        def changed(name: str, base: Path | None, command: Sequence[Any], *more: str) -> Case:
            index = None if base is None else self.index
            return Case(name, base, tuple(command), (*command, "--resume", *more), index)

        yield changed("build", None, self.build)
        yield changed("append", self.built, self.append)
        yield changed("retire", self.appended, self.retire)
        yield changed("refit", self.appended, self.refit)
        if self.quick:
            return
        yield changed("rebuild", self.built, [*self.rebuild, "--ann", "SQfp16"])
        yield changed("build over an index", self.appended, [*self.build, "--force"])
        index = ["--index", self.index, "--test", self.scratch / "test.jsonl"]
        for suffix in ("parquet", "jsonl"):
            ask = ("retrieve", *index, "--method", "gd,if", "--scope", "top-1", "--out", self.at / f"a.{suffix}", "-q")
            yield Case(f"retrieve --out a.{suffix}", self.built, ask, ask, self.index, (0, 2))
        report = ("--out", self.at / "R", "--quiet", "--retrain", "head")
        removal = (
            "evaluate",
            "removal",
            *index,
            "--method",
            "gd",
            "--remove",
            "3",
            "--cache",
            self.at / "cache",
            *report,
        )
        yield Case("evaluate removal", self.built, removal, removal, self.index, (0, 2))
        from tiny_wordnet import write_wordnet

        if not (self.scratch / "wordnet").exists():
            pairs = [(f"{a}-{b}", [a, b], []) for a, b in zip(WORDS[::2], WORDS[1::2], strict=False)]
            write_wordnet(self.scratch / "wordnet", {"noun": pairs, "verb": [], "adj": [], "adv": []}, {})
        perturb = ("perturb", "attack", *index, "--queries", "2", "--rows", "1", "--seeds", "2")
        perturb += ("--wordnet", self.scratch / "wordnet", *report)
        yield Case("perturb attack", self.built, perturb, perturb, self.index, (0, 2))


def save_model(folder: Path) -> None:
    from transformers import logging

    logging.disable_progress_bar()
    make_tiny_model(folder)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    what = ["missing" if n not in found else "left over" if n not in wanted else "other bytes" for n in names]
    return ", ".join(f"{n} ({w})" for n, w in zip(names[:4], what, strict=False)) + (" ..." if len(names) > 4 else "")


def is_one_line(found: Ended) -> bool:
    """Whether a command ended with one line that tells what went wrong, and is no fault of forebear's."""
    lines = [line for line in found.err.splitlines() if not line.startswith("warning: ")]
    return len(lines) == 1 and lines[0].startswith("error: ") and "bug in forebear" not in lines[0]


class Trials:
    """Trials of one case: what it does undisturbed is found first."""

    def __init__(self, world: World, case: Case) -> None:
        self.world, self.case = world, case
        world.reset(case.base)
        self.before = world.answers().out if case.index else ""
        started = time.perf_counter()
        found = run(case.command, scratch=world.scratch, fault=Fault("count", 0, world.at))
        assert found.code == 0, (case.name, found.err)
        self.seconds, self.n_operations = time.perf_counter() - started, found.n_operations
        self.wanted = digests(world.at)
        self.after = world.answers().out if case.index else ""

    def go(self, part: Part, faults: Sequence[Fault]) -> None:
        """One trial: the command with the first fault, its resumptions with the others, then to the end."""
        world, case = self.world, self.case
        where = f"{case.name} ({self.n_operations} operations), " + " then ".join(
            f"{f.kind} at {f.at:g}" for f in faults
        )
        world.reset(case.base)
        for i, fault in enumerate(faults):
            found = run(case.command if i == 0 else case.resume, scratch=world.scratch, fault=fault)
            part.n_tried += 1
            part.count(case.name)
            if found.code == 0 or (i > 0 and found.code in case.is_done):
                part.count("ended before the fault")
            elif fault.kind == "full":
                part.check(
                    found.code == 1 and is_one_line(found), f"{where}: exit {found.code}: {found.err.strip()[-300:]}"
                )
            else:
                part.check(found.code == -signal.SIGKILL, f"{where}: exit {found.code}: {found.err.strip()[-300:]}")
            if case.index is not None and i == 0:
                self._answers(part, where)
        found = run(case.resume, scratch=world.scratch)
        part.check(found.code in case.is_done, f"{where}: resumed with exit {found.code}: {found.err.strip()[-300:]}")
        held = digests(world.at)
        if not part.check(held == self.wanted, f"{where}: resumed to {differences(held, self.wanted)}"):
            return
        if part.n_tried % 3:
            return
        again = run(case.resume, scratch=world.scratch)
        held = digests(world.at)
        ok = again.code in case.is_done and held == self.wanted
        part.check(ok, f"{where}: again: exit {again.code}, {differences(held, self.wanted)}: {again.err[-300:]}")

    def _answers(self, part: Part, where: str) -> None:
        """The old index answers in between, or the new one; one that is replaced says so."""
        found = self.world.answers()
        if self.case.name == "build over an index" and found.code == 2:
            part.check("unfinished build" in found.err, f"{where}: in between: {found.err.strip()[-300:]}")
            return
        ok = found.code == 0 and found.out in (self.before, self.after)
        part.check(ok, f"{where}: in between exit {found.code}: {found.err.strip()[-300:]}")


def kills(world: World, part: Part, rng: np.random.Generator, size: int) -> None:
    """SIGKILL at the n-th operation on files, and after a random time; some of the resumptions are killed as well."""
    for case in world.cases():
        trials = world.trials(case)
        part.notes[f"{case.name}: operations"] = trials.n_operations
        n = min(size, trials.n_operations)
        at = np.unique(np.linspace(1, trials.n_operations, n).round().astype(int))
        print(f"  {case.name}: {trials.n_operations} operations, {trials.seconds:.1f} s undisturbed", flush=True)
        for i, number in enumerate(at):
            faults = [Fault("kill", int(number), world.at)]
            if i % 3 == 2:
                faults.append(Fault("kill", int(rng.integers(1, trials.n_operations + 1)), world.at))
            trials.go(part, faults)
        for _ in range(size // 3):
            trials.go(part, [Fault("kill after", float(rng.uniform(0, trials.seconds)), world.at)])


def full(world: World, part: Part, rng: np.random.Generator, size: int) -> None:
    """A disk on which nothing more can be written from the n-th operation on; later there is space again."""
    for case in world.cases():
        trials = world.trials(case)
        at = np.unique(rng.integers(1, trials.n_operations + 1, size))
        for number in at:
            trials.go(part, [Fault("full", int(number), world.at)])


def questions(name: str) -> tuple[str, str]:
    """Methods and scope of a question that reads a file of the index."""
    if "/spans/" in name and name.startswith("gradients"):
        return ("if++" if "whitened" in name else "tracin++"), "top-1"
    for start_, methods, scope in (
        ("gradients/top-1/whitened", "if", "top-1"), ("gradients", "gd", "top-1"), ("curvature/top-1", "if", "top-1"),
        ("curvature/head/self", "rif", "head"), ("curvature/head/rep", "rep", "head"), ("curvature", "if", "head"),
        ("words", "tracin-we,tracin-we-topk", "head"), ("tokens", "tracin-tfidf", "head"),
        ("spans", "tracin++,if+", "head"), ("sentence", "sbert-cos", "head"), ("ann/sentence-cos", "sbert-cos", "head"),
        ("ann/sentence", "sbert-euc", "head"),
        ("ann/feature", "nn-cos,nn-euc", "head"),
    ):  # fmt: skip
        if name.startswith(start_):
            return methods, scope
    return "gd,nn-cos", "head"


def _damage(world: World, part: Part, damages: Sequence[tuple[str, Callable[[Path], None], str]], every: int) -> None:
    """Damage files of an index one after the other; ``verify`` sees each, and every so many a query refuses it."""
    import forebear
    from forebear import Retriever, verify_index

    intact = world.scratch / "intact"
    for i, (name, damage, what) in enumerate(damages):
        path = world.index / name
        content = path.read_bytes()
        damage(path)
        part.n_tried += 1
        part.count(name.split("/")[0] if "/" in name else name)
        try:
            seen = bool(verify_index(world.index, n_rows=0).problems)
        except forebear.CorruptIndexError:
            seen = True
        part.check(seen, f"{name}, {what}: verify says whole")
        if i % every == 0:
            part.count("asked")
            methods, scope = questions(name)
            try:
                Retriever(world.index).retrieve([QUERY], methods=methods.split(","), scope=scope, top=3)
                part.check(False, f"{name}, {what}: {methods} at {scope} answered")
            except forebear.CorruptIndexError as error:
                part.check("\n" not in str(error), f"{name}, {what}: {error}")
            except Exception as error:  # what a user would see as a bug
                part.check(False, f"{name}, {what}: {type(error).__name__}: {error}")
        path.write_bytes(content)
    assert digests(world.at) == digests(intact)


def _retired_world(world: World) -> list[str]:
    """Put an index with every kind of file into the work folder; names of its files."""
    world.reset(world.appended)
    found = run(world.retire, scratch=world.scratch)
    assert found.code == 0, found.err
    shutil.rmtree(world.scratch / "intact", ignore_errors=True)
    shutil.copytree(world.at, world.scratch / "intact")
    return sorted(digests(world.index))


def flips(world: World, part: Part, rng: np.random.Generator, size: int, every: int) -> None:
    """Single flipped bits over all files."""
    names = _retired_world(world)

    def flip(place: int, bit: int) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[place % len(content)] ^= 1 << bit
            path.write_bytes(content)

        return damage

    order = [names[i % len(names)] for i in range(size)]  # every kind often, whatever its size
    damages = []
    for name in order:
        place, bit = int(rng.integers((world.index / name).stat().st_size)), int(rng.integers(8))
        damages.append((name, flip(place, bit), f"bit {bit} of byte {place}"))
    _damage(world, part, damages, every)


def truncation(world: World, part: Part, rng: np.random.Generator, block: int, every: int) -> None:
    """Every file cut at each boundary of a block, and by its last byte."""
    names = _retired_world(world)

    def cut(size: int) -> Callable[[Path], None]:
        return lambda path: os.truncate(path, size)

    damages = []
    for name in names:
        size = (world.index / name).stat().st_size
        damages += [(name, cut(at), f"cut to {at} bytes") for at in sorted({*range(0, size, block), size - 1})]
    _damage(world, part, damages, every)


def two_at_once(world: World, part: Part, rng: np.random.Generator) -> None:
    """While one process is held in the middle, a second of the same or another kind is refused; the first ends well."""
    cases = {case.name: case for case in world.cases()}
    others = {
        "build": [cases["build"].command, (*world.build, "--resume"), (*world.build, "--force")],
        "append": [world.append, [*world.append, "--resume"], [*world.append, "--force"], world.retire, world.refit],
        "retire": [world.append, world.retire, world.rebuild],
        "refit": [[*world.refit, "--resume"], world.append],
        "retrieve --out a.parquet": [(*cases["retrieve --out a.parquet"].command, "--force")],
    }
    train = ["train", "--model", world.scratch / "model", "--data", world.scratch / "train.jsonl", "--epochs", "1"]
    train += ["--out", world.at / "run", "--quiet"]
    cases["train"] = Case("train", None, tuple(train), ())
    others["train"] = [train, [*train, "--force"]]
    for name, seconds in others.items():
        case = cases[name]
        world.reset(case.base)
        counted = run(case.command, scratch=world.scratch, fault=Fault("count", 0, world.at))
        wanted = digests(world.at)
        for second in seconds:
            world.reset(case.base)
            at = max(4, counted.n_operations // 2)
            first = start(case.command, scratch=world.scratch, fault=Fault("hold", at, world.at))
            os.waitpid(first, os.WUNTRACED)
            found = run(second, scratch=world.scratch)
            part.n_tried += 1
            said = found.code == 2 and is_one_line(found) and f"process {first} on" in found.err
            part.check(said, f"{name} beside {second}: exit {found.code}: {found.err.strip()[-300:]}")
            if case.index is not None:
                part.check(world.answers().code == 0, f"{name}: no answers meanwhile")
            os.kill(first, signal.SIGCONT)
            code = ended(first, world.scratch)
            held = digests(world.at)
            ok = code.code == 0 and held == wanted
            part.check(ok, f"{name} beside {second}: first ended {code.code}, {differences(held, wanted)} {code.err}")


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Mount a folder read-only over itself; whether that is allowed here."""
    bind = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
    if bind.returncode:
        yield False
        return
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def read_only_folders(world: World, part: Part, rng: np.random.Generator, only: str | None = None) -> None:
    """From a read-only folder questions are answered; changes end in one line. ``only`` names one case."""
    for case in world.cases():
        if only not in (None, case.name):
            continue
        world.reset(case.base)
        before = digests(world.at)
        with read_only(world.at) as allowed:
            if not allowed:
                part.count("skipped: no mount allowed here")
                return
            part.n_tried += 1
            found = run(case.command, scratch=world.scratch)
            part.check(
                found.code in (1, 2) and is_one_line(found),
                f"{case.name}: exit {found.code}: {found.err.strip()[-300:]}",
            )
            if case.index is not None:
                for command in (
                    ["info", case.index],
                    ["verify", case.index],
                    world.ask,
                ):
                    found = run(command, scratch=world.scratch)
                    part.check(found.code == 0, f"{command[0]}: exit {found.code}: {found.err.strip()[-300:]}")
        part.check(digests(world.at) == before, f"{case.name}: something changed")


def clock(world: World, part: Part, rng: np.random.Generator, only: str | None = None) -> None:
    """Time that runs backwards, and files from the future: same bytes. ``only`` names one case."""
    for case in world.cases():
        if only not in (None, case.name):
            continue
        trials = world.trials(case)
        world.reset(case.base)
        future = time.time() + 10**8
        for path in world.at.rglob("*"):
            os.utime(path, (future, future))
        part.n_tried += 1
        found = run(case.command, scratch=world.scratch, fault=Fault("clock", 0, world.at))
        held = digests(world.at)
        ok = found.code == 0 and held == trials.wanted
        part.check(ok, f"{case.name}: exit {found.code}, {differences(held, trials.wanted)} {found.err.strip()[-300:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--full", action="store_true", help="about an hour")
    parser.add_argument("--only", default="", help="some parts, by name, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    scale = 6 if given.full else 1
    parts: dict[str, Callable[[World, Part, np.random.Generator], None]] = {
        "kills": lambda w, p, r: kills(w, p, r, 12 * scale),
        "full": lambda w, p, r: full(w, p, r, 11 * scale),
        "two-at-once": two_at_once,
        "read-only": read_only_folders,
        "clock": clock,  # what follows runs models in this process, which forks no more
        "flips": lambda w, p, r: flips(w, p, r, 1000 * scale, 1 if given.full else 5),
        "truncation": lambda w, p, r: truncation(w, p, r, 512, 4 if given.full else 40),
    }
    if given.quick:
        parts = {
            "kills": lambda w, p, r: kills(w, p, r, 3),
            "full": lambda w, p, r: full(w, p, r, 1),
            "read-only": lambda w, p, r: read_only_folders(w, p, r, "retire"),
            "clock": lambda w, p, r: clock(w, p, r, "retire"),
            "flips": lambda w, p, r: flips(w, p, r, 60, 10),
            "truncation": lambda w, p, r: truncation(w, p, r, 1 << 20, 10),
        }
    chosen = [name for name in given.only.split(",") if name] or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    found = campaign({name: parts[name] for name in chosen}, given.seed, quick=given.quick)
    if not given.quick:
        from common import write_result

        facts: dict[str, Any] = {part.name: vars(part) for part in found}
        write_result("campaign", seed=given.seed, scale=scale, parts=facts)
    return 1 if any(part.failures for part in found) else 0


def campaign(
    parts: dict[str, Callable[[World, Part, np.random.Generator], None]], seed: int, *, quick: bool
) -> list[Part]:
    """Run some parts, printing a line of each."""
    found = []
    in_memory = Path("/dev/shm")  # an fsync costs nothing there
    with tempfile.TemporaryDirectory(
        prefix="forebear-campaign-", dir=in_memory if in_memory.is_dir() else None
    ) as scratch:
        world = World(Path(scratch), quick=quick)
        for name, go in parts.items():
            part = Part(name)
            started = time.perf_counter()
            go(world, part, np.random.default_rng([seed, *name.encode()]))
            part.seconds = time.perf_counter() - started
            found.append(part)
            failed = len(part.failures)
            print(f"{name:12} {part.n_tried:6,} tried, {failed:4} not stood, {part.seconds:6.0f} s", flush=True)
    return found


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.exit(main())
