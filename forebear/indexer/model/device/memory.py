"""A lack of memory is met with smaller batches.

:func:`run_batches` is the one place where batches are halved. It halves after the ``except`` clause has ended, because
the traceback of the error holds the tensors of the batch that failed. (:func:`~forebear.errors.is_out_of_memory` knows
a lack of memory by its words.)
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakSet

from forebear.errors import NotEnoughMemoryError, is_out_of_memory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Keeper(Protocol):
    """What keeps things on devices that it can make again."""

    def give_up(self, device: torch.device) -> None:
        """Let go of all that is kept on a device."""


def return_memory() -> None:
    """Give memory that nothing uses back to the system, where the C library (glibc) keeps it otherwise.

    Blocks of rows take arrays of ever other sizes, between which it keeps what the last ones left: a run of 100,000
    test rows grew by a half.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


KEEPERS: WeakSet[Keeper] = WeakSet()  # who is asked where memory does not suffice


def run_batches(
    batches: Iterable[Sequence[int]],
    run: Callable[[list[int]], T],
    *,
    device: torch.device,
    lengths: Sequence[int] | None = None,
    name: Callable[[int], str] = "row {}".format,
    remedy: str = "Give --max-length a smaller value",
    warn: Callable[[str], None] | None = None,
    let_go: Callable[[list[int]], None] | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Run batches of rows; one that does not fit in memory is halved, and so are later ones that are as large.

    Args:
        batches: Positions of the rows of each batch.
        run: Called with the positions of a batch; called again with parts of them where memory does not suffice, so
            that only what it returns may count.
        device: Device of the batches.
        lengths: Word pieces of each row, by its position; None: all rows are as large.
        name: What messages call the row at a position.
        remedy: What to do about a single row that does not fit, as a command to the user.
        warn: Called when batches are halved.
        let_go: Called with the positions of a batch that failed, to drop what is left of it outside of ``run``.

    Yields:
        The positions of each batch that was run, and what ``run`` returned, in order.

    Raises:
        NotEnoughMemoryError: Not even one row fits; it is named.
    """
    waiting, limit = deque(map(list, batches)), float("inf")
    while waiting:
        positions = waiting.popleft()
        longest = 1 if lengths is None else max(lengths[position] for position in positions)
        if len(positions) > 1 and len(positions) * longest > limit:
            waiting.extendleft(_halves(positions))
            continue
        fits = True
        try:
            result = run(positions)
        except Exception as error:
            if not is_out_of_memory(error) or (len(positions) == 1 and isinstance(error, NotEnoughMemoryError)):
                raise
            if len(positions) == 1:
                size = "" if lengths is None else f" ({longest} word pieces)"
                raise not_enough(f"{name(positions[0])}{size}", device, remedy) from error
            fits = False
        if fits:
            yield positions, result
            continue
        free_memory(device)
        if let_go is not None:
            let_go(positions)
            free_memory(device)
        limit = len(positions) * longest // 2
        if warn is not None:
            n = len(positions)
            rows = f"{n} rows" if lengths is None else f"{n} rows of {longest} word pieces"
            warn(f"{rows} do not fit in memory; going on with {n // 2}.")
        waiting.extendleft(_halves(positions))


def _halves(positions: list[int]) -> tuple[list[int], list[int]]:
    """Later half first: ``extendleft`` turns them around."""
    middle = len(positions) // 2
    return positions[middle:], positions[:middle]


def not_enough(subject: str, device: torch.device, remedy: str) -> NotEnoughMemoryError:
    """The error for work that cannot be halved.

    Args:
        subject: What does not fit, such as ``a step of 32 rows``.
        device: Where it does not fit.
        remedy: What to do, as a command to the user: ``Give --batch-size a smaller value``.
    """
    elsewhere = "take a machine with more memory" if device.type == "cpu" else "use --device cpu"
    return NotEnoughMemoryError(f"{subject} does not fit in the memory of {device}. {remedy}, or {elsewhere}.")


@contextmanager
def refusing_lack(subject: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Turn a lack of memory in work that cannot be halved into :func:`not_enough`, which has these arguments."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, NotEnoughMemoryError):
            raise
        raise not_enough(subject, device, remedy) from error


def moved(model: Any, device: torch.device, name: str) -> Any:
    """A model on a device.

    Raises:
        NotEnoughMemoryError: It does not fit there.
    """
    with refusing_lack(f"the model {name}", device, "Give a smaller model"):
        return model.to(device)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, what torch keeps, and what was kept on the device for later."""
    import torch

    for keeper in list(KEEPERS):
        keeper.give_up(device)
    gc.collect()
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)  # the CPU has none
    if empty_cache is not None:
        empty_cache()
