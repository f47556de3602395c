"""Copies between the host and a device for which the host does not wait, and what a GPU computes in another way.

On a GPU the host hands out work and goes on; it has to wait where it asks for a number. A pass asks once a batch, for
the logits; everything else that it takes to the host is on its way while the next batch runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """Zero-copy tensor of an array that may be read-only (memory-mapped): never write to it."""
    if values.flags.writeable:
        return torch.from_numpy(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only arrays
        return torch.from_numpy(values)


def send(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device; for the CPU the same memory, so write to neither.

    A GPU reads them from pinned memory whenever it gets there; torch keeps that memory until then.
    """
    host = as_tensor(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and host.device.type == "cpu":
        with suppress(RuntimeError):  # where no memory can be pinned, the host waits for the copy
            host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Fetched:
    """Arrays on their way from a device."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Begin to copy; those on the CPU are taken as they are."""
        self._hosts = [tensor.detach() for tensor in tensors]
        self._event: Any = None
        away = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
        if away is None:
            return
        stream_of: Any = getattr(torch.get_device_module(away), "current_stream", None)
        if stream_of is None:
            self._hosts = [tensor.cpu() for tensor in self._hosts]
            return
        self._hosts = [_copied(tensor) for tensor in self._hosts]
        self._event = stream_of(away).record_event()

    @property
    def is_here(self) -> bool:
        """Whether nobody has to wait for them."""
        return self._event is None

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays; waits until they are here."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return tuple(host.numpy() for host in self._hosts)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


def fetch(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Arrays of tensors, for which the host waits once."""
    return Fetched(*tensors).arrays()


def one_late(batches: Iterable[tuple[T, Fetched]]) -> Iterator[tuple[T, tuple[np.ndarray, ...]]]:
    """Results of batches, each awaited when the next batch was handed out, so that a device always has work."""
    before: tuple[T, Fetched] | None = None
    for now in batches:
        if before is not None:
            yield before[0], before[1].arrays()
        before = now
    if before is not None:
        yield before[0], before[1].arrays()


def picks(values: torch.Tensor) -> bool:
    """Whether entries that matter are picked by a mask, and the others left out of what is computed.

    So it is on the CPU, where padding that is left out saves time. A GPU would have to say how many there are, for
    which the host waits: there all are computed, those that do not matter being zero.
    """
    return values.device.type == "cpu"
