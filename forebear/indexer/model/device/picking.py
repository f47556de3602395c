"""Which device a name stands for: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, or any other device type of torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from forebear.errors import InputError
from forebear.indexer.model.device.arithmetic import device_kind

AUTO = "auto"
VARIABLE = "FOREBEAR_DEVICE"  # the environment variable that says what ``auto`` is
EXPECTED = "auto, cpu, cuda or cuda:N"


def pick_device(device: str = AUTO) -> torch.device:
    """The device that a name stands for, checked before anything is run on it.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` (the N-th GPU, from 0), or another device type that torch knows. ``auto``
            is what the environment variable ``FOREBEAR_DEVICE`` names; without it the first CUDA device where torch
            sees one, else the CPU.

    Raises:
        InputError: Torch knows no such device, or sees none here.
    """
    given = f"device {device!r}"
    if device == AUTO and (device := os.environ.get(VARIABLE, "").strip() or AUTO) != AUTO:
        given = f"the environment variable {VARIABLE}={device}"
    if device == AUTO:
        return _current_cuda() if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{given} is no device that torch knows. Give {EXPECTED}.") from error
    if picked.type == "cuda":
        _check_cuda(picked, given)
        return _current_cuda() if picked.index is None else picked
    if picked.type != "cpu":
        try:
            torch.zeros(1, device=picked).cpu()
        except (RuntimeError, AssertionError) as error:  # whatever a build of torch without this device raises
            raise InputError(f"{given}: torch cannot use such a device here. Give {EXPECTED}.") from error
    return picked


def pick_devices(device: str, devices: Sequence[str | int]) -> tuple[str, ...]:
    """Names of the devices that processes run on, one each, from ``--device`` and ``--devices``.

    Args:
        device: As :func:`pick_device` takes it.
        devices: Names of devices, or numbers of CUDA devices; one that is named twice has two processes. Empty:
            ``device`` alone.

    Raises:
        InputError: Both are given, the devices are of several kinds, or one of them is not there.
    """
    if not devices:
        return (device,)
    names = tuple(f"cuda:{given}" if str(given).isdigit() else str(given) for given in devices)
    given = f"--devices {','.join(map(str, devices))}"
    if device != AUTO:
        raise InputError(f"{given} beside --device {device}: give one of them.")
    kinds = sorted({device_kind(pick_device(name)) for name in names})
    if len(kinds) > 1:
        raise InputError(
            f"{given}: expected devices of one kind, not {' and '.join(kinds)}: the last bits of a number depend on "
            "the kind, and so on which process came first."
        )
    return names


def _current_cuda() -> torch.device:
    """The CUDA device that torch takes where no number is given, by its number: some of torch's functions need it."""
    has_begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device() if has_begun else 0)


def _check_cuda(picked: torch.device, given: str) -> None:
    """Refuse a CUDA device that is not there."""
    if not torch.cuda.is_available():
        raise InputError(f"{given}: torch sees no CUDA device here. Use --device cpu.")
    n_devices = torch.cuda.device_count()
    if picked.index is not None and picked.index >= n_devices:
        numbers = "cuda:0 alone" if n_devices == 1 else f"cuda:0 to cuda:{n_devices - 1}"
        raise InputError(f"{given}: torch sees {numbers} here. Give one of these, or --device cpu.")
