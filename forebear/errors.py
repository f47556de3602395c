"""Every error that forebear raises on purpose, in one tree.

    ForebearError               exit code 1: something is wrong with a file or the machine
    ├── CorruptIndexError       a stored file is missing, truncated, altered or unlisted
    ├── NonFiniteError          NaN or infinity in weights, features or scores
    ├── StorageError            the disk is full, or a path cannot be written
    └── InputError              exit code 2: the user's to mend
        ├── DataError           a data file that cannot be read as labelled text
        ├── ModelError          a model folder that is no text classifier, or not usable here
        ├── MismatchError       index, model, tokenizer and question do not belong together
        ├── MissingStoreError   the index was built without what the question needs
        ├── NotEnoughMemoryError  not even one row fits in memory, or the results do not
        ├── OutputExistsError   writing would overwrite something that exists
        └── InUseError          another process is writing there

A message is one line: what was found, what was expected, what to do. It names options by their flags, ``--top``; in
Python it reads as Python writes them, ``top=``.
"""

from __future__ import annotations

import errno
import re

from forebear.wording import worded


class ForebearError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns.

    Args:
        message: One line, with options named by their flags.
        of: The command whose options the flags are, such as ``index``, where commands share a flag.
    """

    exit_code = 1

    def __init__(self, message: str, *, of: str | None = None) -> None:
        super().__init__(message)
        self._of = of

    def __str__(self) -> str:
        """The message, with options named as the command line or as Python names them."""
        return worded(super().__str__(), of=self._of)


class CorruptIndexError(ForebearError):
    """A stored file is missing, truncated, altered, or not listed in the manifest."""


class NonFiniteError(ForebearError):
    """NaN or infinity in weights, features, gradients or scores."""


class StorageError(ForebearError):
    """The disk is full, or a path cannot be written."""


class InputError(ForebearError):
    """A mistake that the user can mend."""

    exit_code = 2


class DataError(InputError):
    """A data source that cannot be read as (labelled) text rows."""


class ModelError(InputError):
    """A model that is no text classifier, or that cannot be used here."""


class MismatchError(InputError):
    """Index, model, tokenizer and question do not belong together."""


class MissingStoreError(InputError):
    """The index was built without the representation that the method needs."""


class NotEnoughMemoryError(InputError):
    """Not even one row fits in memory, or what is gathered from the rows does not."""


class OutputExistsError(InputError):
    """Writing would overwrite something that exists."""


class InUseError(InputError):
    """Another process is writing there at this moment."""


# Of torch on CUDA, ROCm, XPU, MPS and the CPU; of cuBLAS, cuDNN, cuSOLVER, oneDNN and CUDA's driver; of FAISS and C++.
_LACK_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to|could not) allocate|alloc(ation)?_failed"
    r"|cudaErrorMemoryAllocation|bad_alloc|bad allocation|could not create a (primitive$|memory object)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device does not suffice, in whatever words.

    What catches any error, to say that a file is damaged or a model not supported, must let such an error pass.
    """
    if isinstance(error, MemoryError | NotEnoughMemoryError):  # of Python, numpy and Arrow; of forebear
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # torch's
        return True
    return isinstance(error, RuntimeError | OSError) and _LACK_OF_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
