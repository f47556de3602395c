"""A user's function, given as ``FILE.py:function``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebear.errors import InputError


def load_function(given: str, option: str) -> Callable[..., Any]:
    """Run a Python file and take a function from it.

    Args:
        given: ``FILE.py:function``.
        option: The option that it was given to, for messages.

    Raises:
        InputError: ``given`` is not of this form, the file is missing or fails, or it defines no such function.
    """
    file, _, name = given.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{option} {given!r}: expected FILE.py:function.")
    if not path.is_file():
        raise InputError(f"{option} {given}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"forebear_user_code_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look themselves up
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.append(beside)  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise InputError(f"{option} {given}: {path} fails to load ({type(error).__name__}: {error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{option} {given}: {path} defines no function {name}.")
    return function  # type: ignore[no-any-return]
