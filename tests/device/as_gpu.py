"""A plugin of pytest: the tests of a GPU on the pretended device, so that they are known to run before a GPU is there.

``PYTHONPATH=tests/device:tests/support FOREBEAR_TEST_GPU=pretend pytest -p as_gpu -m gpu``
"""

from __future__ import annotations

import pretended
import pytest

pretended.register()
_entered = pretended.entered()


def pytest_configure(config: pytest.Config) -> None:
    _entered.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _entered.__exit__(None, None, None)
