"""Stored arrays on the device that searches them: kept there within a budget of bytes, sent block by block beyond it.

On a CPU nothing is kept or copied: tensors look at the memory-mapped files. On a GPU each array is sent when it is
first needed and stays, so that later questions read the device's own memory. What does not fit any more is sent again
each time, through pinned memory, while the block before it is being computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from forebear.errors import is_out_of_memory
from forebear.indexer.model.device.copies import as_tensor, send

__all__ = ["HOST", "DeviceMemory", "as_tensor"]

_FREE_SHARE = 0.5  # of the memory that is free at the first search; the model's passes take the rest


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
        self._kept: dict[tuple[int, tuple[int, ...], str], _Kept] = {}
        self._n_bytes = self._turn = 0

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
        key = (stored.__array_interface__["data"][0], stored.shape, stored.dtype.str)
        if key in self._kept:
            self._kept[key].turn = self._turn
            return self._kept[key].tensor
        tensor = self._send_or_give_up(stored)
        if self._has_room(stored.nbytes):
            self._kept[key] = _Kept(stored, tensor, self._turn)
            self._n_bytes += stored.nbytes
        return tensor

    def send(self, values: np.ndarray) -> torch.Tensor:
        """Copy of numbers on the device, which is not kept for later; of the CPU the numbers themselves."""
        return send(values, self.device)

    def _send_or_give_up(self, stored: np.ndarray) -> torch.Tensor:
        """Copy of an array on the device; where its memory does not suffice, in place of what is kept there."""
        try:
            return self.send(stored)
        except (RuntimeError, MemoryError) as error:
            if not (self._kept and is_out_of_memory(error)):
                raise
        self._kept.clear()
        self._n_bytes, self._budget = 0, self._n_bytes // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.send(stored)

    def _has_room(self, n_bytes: int) -> bool:
        """Whether so many more bytes may be kept, after giving up what the search under way has not used."""
        if self._budget is None:
            free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
            self._budget = int(_FREE_SHARE * free)
        oldest = sorted((kept.turn, key) for key, kept in self._kept.items() if kept.turn < self._turn)
        for _, key in oldest:
            if self._n_bytes + n_bytes <= self._budget:
                break
            self._n_bytes -= self._kept.pop(key).array.nbytes
        return self._n_bytes + n_bytes <= self._budget


HOST = DeviceMemory(torch.device("cpu"))
