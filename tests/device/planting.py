"""Plants faults of device in the package's sources, and says what the pretended device makes of each.

``python planting.py FAULTS`` reads a JSON list of faults; every one is planted in a process of its own, a fork of this
one, which has imported the libraries but nothing of the package.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
from types import ModuleType
from typing import Any


class Planting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module of the package with a piece of its source replaced."""

    def __init__(self, module: str, old: str, new: str) -> None:
        self._module, self._old, self._new = f"forebear.{module}", old, new
        self.planted = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The module's own place, with this loader."""
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        self._file = spec.origin
        return importlib.machinery.ModuleSpec(name, self, origin=spec.origin)

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed source."""
        assert self._file is not None
        with open(self._file, encoding="utf-8") as file:  # noqa: PTH123
            source = file.read()
        assert source.count(self._old) == 1, f"{self._module} holds {self._old!r} {source.count(self._old)} times"
        module.__file__ = self._file
        exec(compile(source.replace(self._old, self._new), self._file, "exec"), module.__dict__)
        self.planted = True


def run_kernel(name: str) -> str:
    """What is wrong with one of the kernels: an error, a wait too many, or nothing."""
    from device_kernels import measure
    from test_waits import excess

    counts = measure([name])[name]
    return excess(name, counts) or ""


def run_search(_name: str) -> str:
    """What is wrong with a scan and with candidates from sketches, beside the same on the host."""
    from pathlib import Path

    import numpy as np
    import pretended
    import test_search
    import test_sketch
    import torch

    from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
    from forebear.indexer.sketches.candidates import propose
    from forebear.indexer.sketches.estimates import Proposal
    from forebear.retriever.head.search import search_scan

    pretended.register()
    with pretended.entered():
        memory = DeviceMemory(torch.device(pretended.NAME), 1 << 30)
        rows = test_search.scenario("random")
        query, _ = test_search.query_and_truth(rows, "gd")
        factors = test_search.factors_of(rows, "gd")
        table = test_search.table_of(factors, Path(tempfile.mkdtemp()))
        here, there = (search_scan(query, table, factors, 5, memory=m) for m in (HOST, memory))
        if any(not np.allclose(a.scores, b.scores, rtol=1e-3) for a, b in zip(here, there, strict=True)):
            return "scores differ from those on the host"
        parts, live = test_sketch.parts_of(300, 1), np.arange(300)
        here, there = (propose(parts, live, 5, Proposal(False, 1.0), m) for m in (HOST, memory))
        if any(not np.allclose(a[1], b[1], rtol=1e-3) for a, b in zip(here, there, strict=True)):
            return "estimates differ from those on the host"
    return ""


def tried(fault: dict[str, str]) -> str:
    """The symptom of one fault, in this process; empty if nothing shows it."""
    planting = Planting(fault["module"], fault["old"], fault["new"])
    sys.meta_path.insert(0, planting)
    try:
        found = (run_search if fault["kernel"] == "search" else run_kernel)(fault["kernel"])
    except (RuntimeError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    assert planting.planted, f"{fault['module']} was not imported anew"
    return found


def main() -> None:
    """Print the symptoms as a JSON list."""
    import accelerate  # noqa: F401
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.auto.tokenization_auto
    import transformers.models.bert.modeling_bert  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # no fork looks for garbage among the libraries
    # The first fork compiles the modules of the package, the others read them; the changed one is compiled by each.
    sys.dont_write_bytecode, sys.pycache_prefix = False, tempfile.mkdtemp()
    symptoms = []
    for fault in json.loads(sys.argv[1]):
        read, write = os.pipe()
        if not (child := os.fork()):
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                pipe.write(tried(fault))
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            symptoms.append(pipe.read())
        assert os.waitpid(child, 0)[1] == 0, fault
    shutil.rmtree(sys.pycache_prefix)
    print(json.dumps(symptoms))


if __name__ == "__main__":
    main()
