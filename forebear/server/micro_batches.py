"""The queues of requests, and the one thread that computes: what waits together is computed together.

Nothing waits for company. While one batch is computed, requests gather in the queue of their index; then the oldest of
them is taken with all others that ask the same question, up to a number of test rows, and the models run over their
texts once. One thread computes for all indexes, in turn: retrievers are not made for several, torch divides one batch
among the cores anyway, and memory is that of one batch, however many clients there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebear.errors import CorruptIndexError, ForebearError
from forebear.indexer.model.device.memory import return_memory
from forebear.progress import Listener, heard_by
from forebear.retriever.question.spec import Question
from forebear.server.limits import Limits, Rows
from forebear.server.measures import Measures
from forebear.server.served_indexes import Opened, ServedIndex, ServedIndexes

LOG = logging.getLogger("forebear.server")
LOOK_SECONDS = 1.0  # between two looks at what is on disk, where no request comes
MOST_FAILED = 5  # calls of what is done between requests: an index may change meanwhile, or a disk be full for a while
QUIET_SECONDS = 0.5  # after a batch, in which the next request of a client that asks on and on is waited for


class Task(Protocol):
    """What is computed. Requests whose tasks are equal are computed together."""

    @property
    def most_rows(self) -> int | None:
        """Test rows that are computed together, at most; None: each request is computed as a whole, alone."""

    def check(self, opened: Opened, rows: Rows, n_asked: int) -> None:
        """Refuse what one request asks, before it is joined with others.

        Args:
            opened: The index.
            rows: Test rows of the request.
            n_asked: Test rows of the whole request, of which these may be a part.
        """

    def answer(self, opened: Opened, rows: Rows) -> Sequence[Found]:
        """What was found, one a test row."""


@dataclass(frozen=True)
class Found:
    """What was found for one test row.

    Attributes:
        question: As it was resolved.
        value: A table of results, or numbers; whatever the task gives.
    """

    question: Question
    value: Any


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
        opened: The index as it was asked.
        answers: One for each of the job's test rows.
        facts: What decides the answers, and what is known of their recall.
        notes: What the caller should know, as the command line prints it.
    """

    opened: Opened
    answers: Sequence[Found]
    facts: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(eq=False)
class Job:
    """Test rows of one request, that wait to be computed.

    Attributes:
        served: The index that is asked.
        task: What is asked of it.
        rows: The test rows.
        n_asked: Test rows of the whole request, of which these may be a part.
        deadline: When nobody waits for the answer any more, by ``time.monotonic``.
        opened: The index as the request's earlier test rows were answered from it; None: as it is now.
        outcome: Set by the thread that computes; cancelled by whoever waits no longer.
    """

    served: ServedIndex
    task: Task
    rows: Rows
    n_asked: int
    deadline: float
    opened: Opened | None = None
    outcome: Future[Outcome] = field(default_factory=Future)

    def joins(self, other: Job) -> bool:
        """Whether another job of the same index can be computed with this one."""
        return self.task.most_rows is not None and self.opened is other.opened and bool(self.task == other.task)


class QueueFullError(Exception):
    """As many requests wait as may.

    Attributes:
        retry_seconds: In which, as batches go now, half of them are done.
    """

    def __init__(self, n_waiting: int, retry_seconds: int) -> None:
        super().__init__(f"{n_waiting:,} requests wait already. Ask again in {retry_seconds} s.")
        self.retry_seconds = retry_seconds


class TimeRanOutError(Exception):
    """A request waited for as long as one may take."""


class StoppedError(Exception):
    """The server is being stopped."""


class Worker:
    """The thread that computes, and the queue of each index before it."""

    def __init__(
        self, indexes: ServedIndexes, limits: Limits, measures: Measures, between: Callable[[], bool] = lambda: False
    ) -> None:
        """Prepare the queues.

        Args:
            indexes: By name.
            limits: Of a request.
            measures: Where batches are counted.
            between: Called in the same thread while no request waits: does a little of what takes long, and says
                whether there is more to do.
        """
        self._indexes = indexes
        self._between = between
        self._n_failed = 0  # calls of it, one after another
        self._pause = 0.0  # before the next call of ``between``, if no request comes
        self._limits = limits
        self._measures = measures
        self._queues: dict[ServedIndex, deque[Job]] = {one: deque() for one in indexes.values()}
        self._order = list(self._queues)  # whose turn is next
        self._wake = threading.Condition()
        self._stopped = False
        self._batch_seconds = 0.1  # of late
        for one in self._queues:
            measures.rows.labels(one.name).set(one.current.index.manifest.n_live)
        # In a context of its own: messages name options as Python does, wherever the server was started from.
        self._thread = threading.Thread(target=lambda: Context().run(self._run), name="forebear-compute", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Compute nothing more; jobs that still wait fail. Whether the thread has ended within ``timeout`` seconds."""
        with self._wake:
            self._stopped = True
            left = [job for queue in self._queues.values() for job in queue]
            for queue in self._queues.values():
                queue.clear()
            self._wake.notify_all()
        for job in left:
            _fail(job, StoppedError("the server is being stopped."))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether jobs are computed."""
        return self._thread.is_alive() and not self._stopped

    def submit(self, job: Job) -> None:
        """Queue a job; never waits.

        Raises:
            QueueFullError: As many jobs wait as may.
            StoppedError: The server is being stopped.
        """
        with self._wake:
            if self._stopped:
                raise StoppedError("the server is being stopped.")
            queue = self._queues[job.served]
            if len(queue) >= self._limits.queue:
                self._forget_cancelled(queue)
            if len(queue) >= self._limits.queue:
                raise QueueFullError(len(queue), max(1, round(self._batch_seconds * len(queue) / 2)))
            queue.append(job)
            self._count(job.served)
            self._wake.notify()

    def _forget_cancelled(self, queue: deque[Job]) -> None:
        kept = [job for job in queue if not job.outcome.cancelled()]
        self._measures.dropped.labels("hung up").inc(len(queue) - len(kept))
        queue.clear()
        queue.extend(kept)

    def _count(self, served: ServedIndex) -> None:
        self._measures.waiting.labels(served.name).set(len(self._queues[served]))

    def _run(self) -> None:
        while not self._stopped:
            jobs = self._take()
            if not jobs:
                for served in self._order:
                    self._refreshed(served)
                if not self._stopped:
                    self._go_on()
                continue
            started = time.perf_counter()
            try:
                self._compute(jobs)
            except BaseException as error:  # whatever it is, it is told to those who wait, and others are served
                for job in jobs:
                    _fail(job, error)
            return_memory()
            self._pause = QUIET_SECONDS
            taken = time.perf_counter() - started
            self._batch_seconds += (taken - self._batch_seconds) / 8
            self._measures.batch_seconds.observe(taken)

    def _go_on(self) -> None:
        """Do a little of what nobody waits for; what goes wrong there ends it at last, and nothing else."""
        try:
            has_more = self._between()
            self._n_failed = 0
        except Exception as error:
            LOG.exception("what is computed between requests has failed")
            self._n_failed += 1
            has_more = False
            if not isinstance(error, ForebearError) or self._n_failed >= MOST_FAILED:
                self._between = lambda: False
        self._pause = 0.0 if has_more else LOOK_SECONDS

    def _take(self) -> list[Job]:
        """The oldest job of the index whose turn it is, with those that are computed with it; none after a while."""
        with self._wake:
            if not any(self._queues.values()) and not self._stopped:
                self._wake.wait(self._pause)
            for served in list(self._order):
                queue, jobs, left = self._queues[served], list[Job](), list[Job]()
                n_rows = 0
                while queue:
                    job = queue.popleft()
                    if self._is_dropped(job):
                        continue
                    if not jobs or (jobs[0].joins(job) and n_rows + len(job.rows) <= (job.task.most_rows or 0)):
                        if job.outcome.set_running_or_notify_cancel():
                            jobs.append(job)
                            n_rows += len(job.rows)
                        continue
                    left.append(job)
                queue.extend(left)
                self._count(served)
                if jobs:
                    self._order.remove(served)
                    self._order.append(served)
                    return jobs
        return []

    def _is_dropped(self, job: Job) -> bool:
        """Whether nobody waits for a job any more."""
        if job.outcome.cancelled():
            self._measures.dropped.labels("hung up").inc()
            return True
        if time.monotonic() >= job.deadline:
            self._measures.dropped.labels("time ran out").inc()
            _fail(job, TimeRanOutError())
            return True
        return False

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Answer jobs that ask the same of the same index."""
        opened = jobs[0].opened or self._refreshed(jobs[0].served)
        checked = [job for job in jobs if self._is_sound(job, opened)]
        if not checked:
            return
        self._measures.batch_requests.observe(len(checked))
        self._measures.batch_texts.observe(sum(len(job.rows) for job in checked))
        try:
            outcomes = _answer(checked, opened)
        except Exception as error:
            if len(checked) == 1:
                self._fail_or_repeat(checked[0], opened, error)
                return
            for job in checked:  # what one client sent must not harm the others
                self._answer_alone(job, opened)
            return
        for job, outcome in zip(checked, outcomes, strict=True):
            job.outcome.set_result(outcome)

    def _is_sound(self, job: Job, opened: Opened) -> bool:
        """Whether a job can be answered; one that cannot is told so."""
        try:
            job.task.check(opened, job.rows, job.n_asked)
        except Exception as error:
            self._fail_or_repeat(job, opened, error)
            return False
        return True

    def _answer_alone(self, job: Job, opened: Opened) -> None:
        try:
            (outcome,) = _answer([job], opened)
        except Exception as error:
            self._fail_or_repeat(job, opened, error)
            return
        job.outcome.set_result(outcome)

    def _fail_or_repeat(self, job: Job, opened: Opened, error: Exception) -> None:
        """Tell an error; or ask once more, where a file was gone because the index has changed in this moment."""
        if isinstance(error, CorruptIndexError) and job.opened is None:
            now = self._refreshed(job.served)
            if now is not opened:
                job.opened = now  # once
                if self._is_sound(job, now):
                    self._answer_alone(job, now)
                return
        error.args = tuple(opened.unnamed(part) if isinstance(part, str) else part for part in error.args)
        _fail(job, error)

    def _refreshed(self, served: ServedIndex) -> Opened:
        before = served.current
        now = served.refresh()
        if now is not before:
            self._measures.reloads.labels(served.name).inc()
            self._measures.rows.labels(served.name).set(now.index.manifest.n_live)
        return now


def _answer(jobs: Sequence[Job], opened: Opened) -> list[Outcome]:
    """Answer jobs together."""
    notes: list[str] = []

    def warn(message: str | None) -> None:
        if message is not None:
            notes.append(opened.unnamed(message))

    with heard_by(Listener(warn, lambda subject, message: warn(f"{subject}: {message}"))):
        answers = jobs[0].task.answer(opened, [row for job in jobs for row in job.rows])
        facts = opened.facts(answers[0].question)
    outcomes, start = [], 0
    for job in jobs:
        stop = start + len(job.rows)
        outcomes.append(Outcome(opened, answers[start:stop], facts, tuple(dict.fromkeys(notes))))
        start = stop
    return outcomes


def _fail(job: Job, error: BaseException) -> None:
    """Tell whoever waits for a job, if somebody does."""
    if job.outcome.done():
        return
    if job.outcome.running() or job.outcome.set_running_or_notify_cancel():
        job.outcome.set_exception(error)
