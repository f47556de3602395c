"""States of a training: weights and both moments of AdamW, in memory as far as they fit, else in files."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from tempfile import TemporaryFile
from typing import IO

import torch

from forebear.errors import StorageError, is_out_of_memory

Tensors = list[torch.Tensor]  # one for each trained parameter, in the optimizer's order


@dataclass(frozen=True, eq=False)
class State:
    """What a step of AdamW starts from.

    Attributes:
        weights: The trained parameters theta.
        first: Running means m of the clipped gradient.
        second: Running means v of its square.
    """

    weights: Tensors
    first: Tensors
    second: Tensors

    @property
    def n_bytes(self) -> int:
        """Bytes of all numbers."""
        tensors = [tensor for field in fields(self) for tensor in getattr(self, field.name)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def equals(self, other: State) -> bool:
        """Whether all numbers are the same, to the last bit."""
        return all(
            torch.equal(mine, others)
            for field in fields(self)
            for mine, others in zip(getattr(self, field.name), getattr(other, field.name), strict=True)
        )


def copied(tensors: Tensors) -> Tensors:
    """Copies in the memory of the host."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


class KeptStates:
    """States by the number of steps that were taken before.

    Attributes:
        n_bytes: Bytes in memory.
    """

    def __init__(self, memory_bytes: int) -> None:
        """No state yet.

        Args:
            memory_bytes: States beyond so many bytes are written to temporary files, which have no name, so that
                nothing is left of them even where the process is killed.
        """
        self.n_bytes = 0
        self._memory_bytes = memory_bytes
        self._states: dict[int, State | IO[bytes]] = {}

    @property
    def steps(self) -> list[int]:
        """Of which steps there are states, ascending."""
        return sorted(self._states)

    def put(self, step: int, state: State) -> None:
        """Keep a state.

        Raises:
            StorageError: It is to be written, and the disk is full.
        """
        if self.n_bytes + state.n_bytes <= self._memory_bytes:
            self._states[step] = state
            self.n_bytes += state.n_bytes
            return
        try:
            file = TemporaryFile()  # noqa: SIM115  # closed with the states
            weakref.finalize(self, file.close)
            torch.save([getattr(state, field.name) for field in fields(state)], file)
            file.flush()
        except (OSError, RuntimeError) as error:  # torch raises the latter where a file cannot be written whole
            if is_out_of_memory(error):
                raise
            raise StorageError(
                f"the states of a replayed run ({state.n_bytes / 1e6:,.0f} MB each) cannot be written to the folder of "
                f"temporary files: {error}. Free some space, or set TMPDIR to a folder that has it."
            ) from error
        self._states[step] = file

    def get(self, step: int) -> State:
        """The state after so many steps."""
        state = self._states[step]
        if isinstance(state, State):
            return state
        state.seek(0)
        return State(*torch.load(state, weights_only=True))
