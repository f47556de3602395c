"""Stored arrays on the device that searches them: kept there within a budget of bytes, sent block by block beyond it.

On a CPU nothing is kept or copied: tensors look at the memory-mapped files. On a GPU each array is sent when it is
first needed and stays, so that later questions read the device's own memory. What does not fit any more is sent again
each time, through pinned memory, while the block before it is being computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from forebear.errors import is_out_of_memory
from forebear.indexer.model.device.copies import as_tensor, send
from forebear.indexer.model.device.memory import KEEPERS, free_memory

T = TypeVar("T")

_FREE_SHARE = 0.5  # of the memory that is free when it is first needed; the model's passes take the rest


@dataclass
class _Kept:
    """An array's copy on the device; the array is held, so that no other one comes to lie at its address."""

    array: np.ndarray
    tensor: torch.Tensor
    turn: int


class DeviceMemory:
    """Copies of stored arrays on one device.

    Attributes:
        device: Where searches run.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        """Nothing is kept yet.

        Args:
            device: Where searches run.
            budget: Most bytes that are kept; None: half of what is free on the device when it is first needed.
        """
        self.device, self._budget = device, budget
        self._kept: dict[tuple[int, tuple[int, ...], tuple[int, ...], str], _Kept] = {}
        self._n_bytes = self._turn = 0
        KEEPERS.add(self)

    @property
    def on_host(self) -> bool:
        """Whether the device is the CPU, which reads the files themselves."""
        return self.device.type == "cpu"

    @property
    def n_bytes(self) -> int:
        """Bytes kept on the device now."""
        return self._n_bytes

    def begin(self) -> None:
        """Begin a search: what it uses is not given up before it ends, so that a scan does not push itself out."""
        self._turn += 1

    def tensor(self, stored: np.ndarray) -> torch.Tensor:
        """A stored array on the device, which must not be written to.

        Args:
            stored: An array that lives as long as its index is open, such as a block of a memory-mapped file.
        """
        if self.on_host:
            return as_tensor(stored)
        key = (stored.__array_interface__["data"][0], stored.shape, stored.strides, stored.dtype.str)
        if key in self._kept:
            self._kept[key].turn = self._turn
            return self._kept[key].tensor
        tensor = self.run(lambda: self.send(stored))
        if self._has_room(stored.nbytes):
            self._kept[key] = _Kept(stored, tensor, self._turn)
            self._n_bytes += stored.nbytes
        return tensor

    def send(self, values: np.ndarray) -> torch.Tensor:
        """Copy of numbers on the device, which is not kept for later; of the CPU the numbers themselves."""
        return send(values, self.device)

    def give_up(self, device: torch.device) -> None:
        """Keep nothing of what is there, and half as much from now on: its memory does not suffice."""
        if device == self.device and self._kept:
            self._kept.clear()
            self._n_bytes, self._budget = 0, self._n_bytes // 2

    def run(self, search: Callable[[], T]) -> T:
        """What a search returns; where memory does not suffice for it, once more without what is kept."""
        try:
            return search()
        except Exception as error:
            if not (self._kept and is_out_of_memory(error)):
                raise
        free_memory(self.device)  # after the clause, whose error holds what the search had made
        return search()

    def _has_room(self, n_bytes: int) -> bool:
        """Whether so many more bytes may be kept, after giving up what the search under way has not used."""
        if self._budget is None:
            self._budget = int(_FREE_SHARE * _free_bytes(self.device))
        oldest = sorted((kept.turn, key) for key, kept in self._kept.items() if kept.turn < self._turn)
        for _, key in oldest:
            if self._n_bytes + n_bytes <= self._budget:
                break
            self._n_bytes -= self._kept.pop(key).array.nbytes
        return self._n_bytes + n_bytes <= self._budget


def _free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU, with those that torch has reserved and does not use; 0 of other devices."""
    if device.type != "cuda":
        return 0
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reserved)


HOST = DeviceMemory(torch.device("cpu"))
