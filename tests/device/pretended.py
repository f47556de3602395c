"""A pretended accelerator: tensors whose numbers lie on the CPU, that say another device and obey a GPU's rules.

:func:`register` gives torch's spare device type (PrivateUse1) the name ``pretend``; inside :func:`entered` every
operation of a pretended tensor runs on the CPU, after it was checked and counted. So results are those of the CPU, and
what is tested is the code around them. Run it in a process of its own: a device type cannot be taken back.

Refused, as CUDA refuses it:

* tensors of two devices in one operation, also as operands of an in-place operation or as an index;
* ``numpy()``, ``np.asarray`` and ``from_numpy``'s way back, of a tensor on the device;
* a generator of another device;
* pinning a tensor that is on the device.

Counted, by the line of the package that asks for it:

* ``waits``, where the host waits until the device is done: ``item``, ``bool``, ``float`` and ``int``, ``cpu``, a copy
  to the device that blocks, ``nonzero``, an index by a mask, ``unique``, a decomposition that is checked for errors;
* ``sent``, bytes copied from the host to the device;
* ``launches``, operations that compute on the device (views cost nothing).

It sees no kernel that a GPU lacks, no other rounding and no race.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import forebear

NAME = "pretend"
PACKAGE = str(Path(forebear.__file__).parent)
COPIES = f"{PACKAGE}/indexer/model/device/copies.py"  # its callers ask, not this module
aten = torch.ops.aten
_COPIES = {aten.copy_.default, aten._to_copy.default}
_PINNING = {aten._pin_memory.default, aten.is_pinned.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "linalg_eigh", "_linalg_eigh", "linalg_cholesky", "linalg_cholesky_ex", "linalg_inv_ex",
    "_linalg_solve_ex", "_linalg_svd", "linalg_qr",
}  # fmt: skip
# Take no tensor of no dimensions on the CPU either.
_NO_NUMBERS = {
    "mm", "bmm", "addmm", "baddbmm", "cat", "stack", "index_select", "gather", "scatter_", "scatter", "scatter_add_",
    "embedding", "index_add_", "index_add", "take_along_dim", "native_layer_norm", "_scaled_dot_product_attention",
}  # fmt: skip


class DeviceError(RuntimeError):
    """What CUDA calls "Expected all tensors to be on the same device"."""


@dataclass
class Ledger:
    """What the package asked of the device, by ``module.py:line``.

    Attributes:
        waits: Number of times the host waited.
        sent: Bytes copied to the device.
        launches: Number of operations.
    """

    waits: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    _n_copies: int = 0  # to the host that nobody waited for when they were begun
    _n_here: int = 0  # of these, arrived: whoever waits, waits for all that was handed out before

    def clear(self) -> None:
        """Begin to count anew."""
        for counter in (self.waits, self.sent, self.launches):
            counter.clear()

    def wait(self, line: str) -> None:
        """Note that the host waits until the device is done."""
        self.waits[line] += 1
        self._n_here = self._n_copies


LEDGER = Ledger()


class _Event:
    """What comes after the copies so far; waiting costs nothing if the host has waited since."""

    def __init__(self) -> None:
        LEDGER._n_copies += 1
        self._number = LEDGER._n_copies

    def synchronize(self) -> None:
        if LEDGER._n_here < self._number:
            LEDGER.wait(_asked_by())


class _Stream:
    """The one stream of the device."""

    def record_event(self) -> _Event:
        return _Event()


def _asked_by() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and name != COPIES:
            return f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Pretended(torch.Tensor):
    """``numbers`` on the CPU; its device is ``pretend:0``."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Pretended:
        out: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=torch.device(NAME, 0),
            requires_grad=numbers.requires_grad,
        )  # fmt: skip
        out.numbers = numbers.detach()
        return out

    def __repr__(self, **_kwargs: Any) -> str:
        return f"Pretended({self.numbers!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], _meta: Any, _size: Any, _stride: Any) -> Pretended:
        return Pretended(inner["numbers"])

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, *_args: Any) -> torch.Tensor:
        raise RuntimeError("only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                out: torch.Tensor = Pretended(self.numbers.clone())
            if isinstance(self, torch.nn.Parameter):
                out = torch.nn.Parameter(out, self.requires_grad)
            memo[id(self)] = out.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Tensors among arguments, which torch nests one list deep at most."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, torch.Tensor))


def _check(func: Any, args: Any, kwargs: dict[str, Any], plain: list[torch.Tensor], n_mine: int) -> None:
    """Refuse what a GPU refuses."""
    name, generator = func.overloadpacket.__name__, kwargs.get("generator")
    if generator is not None and generator.device.type != NAME and (n_mine or _is_here(kwargs.get("device"))):
        raise DeviceError(f"{name}: expected a {NAME} generator, found {generator.device} ({_asked_by()})")
    if not (n_mine and plain) or func in _COPIES:
        return
    if func in _INDEXED and isinstance(args[0], Pretended):  # an index may lie on the CPU, and is sent
        bad = [x for x in _tensors(args[2:3]) if not isinstance(x, Pretended) and x.dim()]
    else:
        bad = [x for x in plain if x.dim() or name in _NO_NUMBERS or func in _INDEXED]
    if bad:
        raise DeviceError(f"{name}: {NAME}:0 and cpu {tuple(bad[0].shape)} in one operation ({_asked_by()})")


def _count(func: Any, args: Any, kwargs: dict[str, Any], plain: list[torch.Tensor], n_mine: int) -> None:
    """Note what the operation costs a GPU."""
    name, target = func.overloadpacket.__name__, kwargs.get("device")
    if not func.is_view:
        LEDGER.launches[_asked_by()] += 1
    blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
    sent = 0
    if func in _COPIES:
        source = args[1] if func is aten.copy_.default else args[0]
        goes_to = args[0] if func is aten.copy_.default else None
        ends_here = isinstance(goes_to, Pretended) if goes_to is not None else _is_here(target)
        starts_here = isinstance(source, Pretended)
        moves = starts_here != ends_here and not (goes_to is None and target is None)
        waits = moves and blocking
        if moves and ends_here:
            sent = source.numel() * source.element_size()
    elif func in _INDEXED:
        index = list(_tensors(args[1:2]))
        fills = "put" in name and len(index) == 1 and args[2].numel() == 1  # a mask and one number: masked_fill
        away = [x for x in index if not isinstance(x, Pretended)]
        sent = sum(x.numel() * x.element_size() for x in away)
        waits = bool(away) or (not fills and any(x.dtype in (torch.bool, torch.uint8) for x in index))
    else:
        waits = bool(n_mine) and name in _WAITING
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            waits = True
    if waits:
        LEDGER.wait(_asked_by())
    if sent:
        LEDGER.sent[_asked_by()] += sent


def _numbers_of(value: Any) -> Any:
    """The same with the numbers of pretended tensors in their place, in lists and tuples, too."""
    if isinstance(value, Pretended):
        return value.numbers
    return type(value)(map(_numbers_of, value)) if type(value) in (tuple, list) else value


def _pretended(value: Any) -> Any:
    """The same with pretended tensors in the place of plain ones, in lists and tuples, too."""
    if type(value) is torch.Tensor:
        return Pretended(value)
    return type(value)(map(_pretended, value)) if type(value) in (tuple, list) else value


@cache
def _writes(func: Any) -> bool:
    """Whether an operation writes into one of its arguments."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target = kwargs.get("device")
    tensors = list(_tensors((*args, *kwargs.values())))
    plain = [x for x in tensors if not isinstance(x, Pretended)]
    n_mine = len(tensors) - len(plain)
    _check(func, args, kwargs, plain, n_mine)
    _count(func, args, kwargs, plain, n_mine)
    if func is aten._to_copy.default:
        stays = _is_here(target if target is not None else args[0].device)
    elif func is aten.copy_.default:
        stays = isinstance(args[0], Pretended)
    else:
        stays = bool(n_mine) if target is None else _is_here(target)
    real_args, real = _numbers_of(args), {name: _numbers_of(value) for name, value in kwargs.items()}
    if _is_here(real.get("device")):
        real["device"] = torch.device("cpu")
    real.pop("pin_memory", None)
    out = func(*real_args, **real)
    if not stays or func.overloadpacket.__name__ == "_local_scalar_dense":
        return out
    wrapped = _pretended(out)
    if _writes(func):
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PINNING and not isinstance(args[0], Pretended):  # numbers on the host stay where they are
            return func is aten.is_pinned.default or args[0].clone()
        if _is_here(kwargs.get("device")) or any(isinstance(x, Pretended) for x in _tensors((*args, *kwargs.values()))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


_kept: list[Any] = []


def register() -> None:
    """Make the device known; before the process' first backward, whose threads are made for the devices there are."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def current_stream(self, _device: Any = None) -> _Stream:
            return _Stream()

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a CPU tensor and moves it
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing here
    _kept.append(library)


@contextlib.contextmanager
def entered() -> Iterator[Ledger]:
    """Inside, ``torch.device("pretend")`` works, and is counted; every operation takes a Python call more."""
    LEDGER.clear()
    with _Mode():
        yield LEDGER


# ``PYTHONPATH=tests/device:tests/support FOREBEAR_TEST_GPU=pretend pytest -p pretended -m gpu`` runs the tests of a GPU
# on this device, so that they are known to run before a GPU is there.


def pytest_configure() -> None:
    """As a plugin of pytest: enter for the rest of the process."""
    register()
    _kept.append(entered())
    _kept[-1].__enter__()
