"""The queue: what is joined, what is dropped, what one request can do to another. Tasks are pretended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from serving import until

from forebear.errors import CorruptIndexError, ForebearError, InputError
from forebear.server import micro_batches
from forebear.server.limits import Limits
from forebear.server.measures import Measures
from forebear.server.micro_batches import Found, Job, QueueFullError, StoppedError, TimeRanOutError, Worker
from forebear.server.served_indexes import ServedIndexes

SOON = 10.0


class PretendedIndex:
    """An index that can be changed by hand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.now = self.current = self._version(1)

    def _version(self, number: int) -> Any:
        manifest = SimpleNamespace(n_live=number)
        return SimpleNamespace(
            name=self.name, number=number, index=SimpleNamespace(manifest=manifest), facts=lambda _question: {},
            unnamed=lambda message: message.replace("/a/folder", self.name),
        )  # fmt: skip

    def change(self) -> None:
        self.now = self._version(self.now.number + 1)

    def refresh(self) -> Any:
        self.current = self.now
        return self.current


@dataclass(frozen=True)
class Pretended:
    """Answers a text by the index's version and the texts that it was computed with; waits while it is held."""

    asked: str = ""
    most_rows: int | None = 4
    log: list[Any] = field(default_factory=list, compare=False)
    held: threading.Event = field(default_factory=threading.Event, compare=False)

    def check(self, _opened: Any, rows: Any, _n_asked: int) -> None:
        if rows[0][0] == "refused":
            raise InputError("/a/folder does not hold that.")

    def answer(self, opened: Any, rows: Any) -> list[Found]:
        assert self.held.wait(SOON)
        self.log.append([row[0] for row in rows])
        if any(row[0] == "bad" for row in rows):
            raise ValueError("a bad text")
        if any(row[0] == "removed" for row in rows) and opened.number == 1:
            raise CorruptIndexError("/a/folder/words is missing.")
        return [Found(None, (opened.number, row[0])) for row in rows]  # type: ignore[arg-type]


class Desk:
    """A worker over two pretended indexes."""

    def __init__(self, between: Callable[[], bool] = lambda: False, **limits: Any) -> None:
        self.one, self.other = PretendedIndex("one"), PretendedIndex("other")
        self.measures = Measures()
        indexes: Any = ServedIndexes([self.one, self.other])  # type: ignore[list-item]
        self.worker = Worker(indexes, Limits(**({"queue": 8} | limits)), self.measures, between)

    def job(self, task: Pretended, *texts: str, index: Any = None, seconds: float = SOON, opened: Any = None) -> Job:
        rows = [(text,) for text in texts]
        job = Job(index or self.one, task, rows, len(rows), time.monotonic() + seconds, opened)
        self.worker.submit(job)
        return job


@pytest.fixture
def desk() -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**given: Any) -> Desk:
        made.append(Desk(**given))
        return made[-1]

    yield make
    for one in made:
        if one.worker.is_ready:
            assert one.worker.stop(SOON)


def values(job: Job) -> list[Any]:
    return [found.value for found in job.outcome.result(SOON).answers]


def released(asked: str = "", most_rows: int | None = 4) -> Pretended:
    task = Pretended(asked, most_rows)
    task.held.set()
    return task


def test_what_waits_together_is_computed_together_up_to_a_number_of_texts(desk):
    one = desk()
    task = released()
    jobs = [one.job(task, *texts) for texts in (("a",), ("b", "c"), ("d", "e"), ("f",), ("g",))]
    one.worker.start()
    assert [values(job) for job in jobs] == [
        [(1, "a")], [(1, "b"), (1, "c")], [(1, "d"), (1, "e")], [(1, "f")], [(1, "g")]
    ]  # fmt: skip
    assert task.log == [["a", "b", "c", "f"], ["d", "e", "g"]]


def test_only_equal_questions_are_joined(desk):
    one = desk()
    first, second, alone = released("x"), released("y"), released("z", None)
    jobs = [one.job(task, text) for task, text in zip((first, second, first, alone, alone), "abcde", strict=True)]
    one.worker.start()
    wait([job.outcome for job in jobs], SOON)
    assert (first.log, second.log, alone.log) == ([["a", "c"]], [["b"]], [["d"], ["e"]])


def test_indexes_take_turns(desk):
    one = desk()
    order: list[Any] = []
    task = Pretended("", None, order)
    task.held.set()
    jobs = [one.job(task, text) for text in "abc"] + [one.job(task, "x", index=one.other)]
    one.worker.start()
    wait([job.outcome for job in jobs], SOON)
    assert order == [["a"], ["x"], ["b"], ["c"]]


def test_a_text_that_fails_does_not_harm_those_it_was_joined_with(desk):
    one = desk()
    task = released()
    good, bad, refused, last = (one.job(task, text) for text in ("good", "bad", "refused", "last"))
    one.worker.start()
    assert (values(good), values(last)) == ([(1, "good")], [(1, "last")])
    with pytest.raises(ValueError, match="a bad text"):
        values(bad)
    with pytest.raises(InputError, match=r"^one does not hold that"):  # and not the folder
        values(refused)


def test_who_hung_up_or_waited_too_long_is_not_computed(desk):
    one = desk()
    task = released()
    gone, late, stays = one.job(task, "gone"), one.job(task, "late", seconds=0.0), one.job(task, "stays")
    assert gone.outcome.cancel()
    one.worker.start()
    assert values(stays) == [(1, "stays")]
    assert task.log == [["stays"]]
    with pytest.raises(TimeRanOutError):
        values(late)
    dropped = [one.measures.registry.get_sample_value("forebear_dropped_total", {"why": why})
               for why in ("hung up", "time ran out")]  # fmt: skip
    assert dropped == [1, 1]


def test_a_full_queue_refuses_and_says_when_to_come_again(desk):
    one = desk(queue=2)
    task = released()
    first, second = one.job(task, "a"), one.job(task, "b")
    with pytest.raises(QueueFullError, match="2 requests wait already") as refused:
        one.job(task, "c")
    assert refused.value.retry_seconds >= 1
    one.job(task, "x", index=one.other)  # whose queue is its own
    assert first.outcome.cancel()
    third = one.job(task, "c")  # in the place of the one that is gone
    one.worker.start()
    assert (values(second), values(third)) == ([(1, "b")], [(1, "c")])


def test_a_request_keeps_the_index_that_it_began_with(desk):
    one = desk()
    one.worker.start()
    task = released()
    begun = one.job(task, "a").outcome.result(SOON).opened
    one.one.change()
    assert values(one.job(task, "b")) == [(2, "b")]
    held = Pretended("held")
    first = one.job(held, "first")  # while it is computed, the others wait together
    old, new = one.job(task, "c", opened=begun), one.job(task, "d")
    held.held.set()
    assert (values(first), values(old), values(new)) == ([(2, "first")], [(1, "c")], [(2, "d")])


def test_a_file_that_went_with_a_change_is_asked_for_in_the_changed_index(desk):
    one = desk()
    task = Pretended()
    job = one.job(task, "removed")
    one.worker.start()
    while one.one.current is not one.one.now:
        time.sleep(0.01)
    one.one.change()
    task.held.set()
    assert values(job)[0][1] == "removed"


def test_a_file_that_is_missing_without_a_change_is_an_error(desk):
    one = desk()
    one.worker.start()
    with pytest.raises(CorruptIndexError, match=r"^one/words is missing"):
        values(one.job(released(), "removed"))


def test_what_is_done_between_requests_holds_nobody_and_its_fault_ends_it_alone(desk):
    calls: list[int] = []

    def between() -> bool:
        calls.append(len(calls))
        if len(calls) == 3:
            raise RuntimeError("a fault")
        return True

    here = desk(between=between)
    here.worker.start()
    for text in "abcde":
        assert values(here.job(released(), text)) == [(1, text)]
    assert until(lambda: len(calls) == 3)
    assert values(here.job(released(), "f")) == [(1, "f")]
    assert len(calls) == 3


def test_what_fails_between_requests_for_a_while_goes_on_later(desk, monkeypatch):
    monkeypatch.setattr(micro_batches, "LOOK_SECONDS", 0.01)
    calls: list[int] = []

    def between() -> bool:
        calls.append(len(calls))
        if len(calls) in (2, 4) or len(calls) > 6:
            raise ForebearError("the index is being changed")
        return True

    here = desk(between=between)
    here.worker.start()
    assert until(lambda: len(calls) == 6 + micro_batches.MOST_FAILED)
    assert values(here.job(released(), "a")) == [(1, "a")]
    time.sleep(0.1)
    assert len(calls) == 6 + micro_batches.MOST_FAILED  # it has ended


def test_stopping_fails_those_that_wait_and_takes_no_more(desk):
    one = desk()
    task = Pretended()
    one.worker.start()
    running = one.job(task, "a")
    while not running.outcome.running():
        time.sleep(0.01)
    waiting = one.job(task, "b")
    stopper = threading.Thread(target=one.worker.stop, args=(SOON,))
    stopper.start()
    with pytest.raises(StoppedError):
        values(waiting)
    task.held.set()
    assert values(running) == [(1, "a")]
    stopper.join()
    assert not one.worker.is_ready
    with pytest.raises(StoppedError):
        one.job(task, "c")
