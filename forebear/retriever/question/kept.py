"""Objects that are kept for later questions, within one number of bytes in all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

T = TypeVar("T")

# On a CPU: two of gradients and solutions of a block of test rows, a few models, and what solvers hold.
KEPT_BYTES = 6 << 30


@dataclass
class _Entry:
    value: Any
    n_bytes: int
    stays: bool


class Kept:
    """Models, gradients of test rows, sketchers and encoded rows; those that were not used for longest go first.

    Attributes:
        n_bytes: Bytes that are kept now.
    """

    def __init__(self, budget: int = KEPT_BYTES) -> None:
        """Nothing is kept yet.

        Args:
            budget: Most bytes that are kept, but for what is in use and what stays.
        """
        self._budget = budget
        self._entries: dict[Hashable, _Entry] = {}  # those used last come last
        self.n_bytes = 0

    def find(self, key: Hashable) -> Any:
        """The object kept under a key; None where there is none."""
        if (entry := self._entries.pop(key, None)) is None:
            return None
        self._entries[key] = entry
        return entry.value

    def get(
        self, key: Hashable, make: Callable[[], T], *, size: Callable[[T], int] | None = None, stays: bool = False
    ) -> T:
        """The object kept under a key, which ``make`` makes where there is none.

        Args:
            key: Names the object.
            make: Makes it.
            size: Its bytes; None: as :func:`size_of` counts them.
            stays: Whether it is never given up, because others hold it anyway.
        """
        found: T | None = self.find(key)
        return self.put(key, make(), size=size, stays=stays) if found is None else found

    def put(self, key: Hashable, value: T, *, size: Callable[[T], int] | None = None, stays: bool = False) -> T:
        """Keep an object, in place of what was kept under the key; returns it. Arguments as of :meth:`get`."""
        self.drop(key)
        self._entries[key] = _Entry(value, (size or size_of)(value), stays)
        self.n_bytes += self._entries[key].n_bytes
        if self.n_bytes > self._budget:
            self._give_up(key)
        return value

    def drop(self, key: Hashable) -> None:
        """Give up what is kept under a key, such as before its successor is made."""
        if (entry := self._entries.pop(key, None)) is not None:
            self.n_bytes -= entry.n_bytes

    def _give_up(self, used_now: Hashable) -> None:
        """Go back to the budget."""
        left_over, n_bytes = [], self.n_bytes
        for key, entry in self._entries.items():
            if n_bytes <= self._budget:
                break
            if entry.n_bytes and not entry.stays and key != used_now:
                left_over.append(key)
                n_bytes -= entry.n_bytes
        for key in left_over:
            self.drop(key)


def budget_on(device: torch.device) -> int:
    """Most bytes that are kept where models run: on a GPU a quarter of its memory, twice a block's gradients."""
    return torch.cuda.mem_get_info(device)[1] // 4 if device.type == "cuda" else KEPT_BYTES


def size_of(value: Any) -> int:
    """Bytes of the arrays, tensors and networks that an object is made of; of an object that says so, ``n_bytes``."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        owner = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return value.nbytes if owner.base is None else 0  # a file's are the system's to keep
    if isinstance(value, nn.Module):
        return sum(map(size_of, (*value.parameters(), *value.buffers())))
    if isinstance(n_bytes := getattr(value, "n_bytes", None), int):
        return n_bytes
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    if is_dataclass(value):
        return sum(size_of(getattr(value, field.name)) for field in fields(value))
    return 0
