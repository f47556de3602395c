"""One whole use of the commands on a device that is not the CPU, from training to retraining."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from programs import on_pretended

from forebear.retriever.question.methods import METHODS

# Of a score, relative to the largest: a device sums in another order, and H^-1 at a small damping makes more of it.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of both runs, and what differs between them."""
    folder = tmp_path_factory.mktemp("flow")
    found = on_pretended(
        """
        from pathlib import Path
        import flow

        folder, waits = Path(folder), {}
        flow.prepare(folder)
        for name in ("cpu", "pretend"):
            (folder / name).mkdir()
            for step, run in flow.STEPS.items():
                ledger.clear()
                run(folder, name)
                waits[f"{name} {step}"] = ledger.waits.total()
        found = {"differences": flow.differences(folder / "cpu", folder / "pretend"), "waits": waits}
        """,
        folder=str(folder),
    )
    return folder, found


@pytest.mark.slow
def test_every_step_gives_the_numbers_that_it_gives_on_the_cpu(flow: tuple[Path, dict]) -> None:
    folder, found = flow
    assert {name: x for name, x in found["differences"].items() if not x <= TOLERANCE} == {}
    asked = {m for path in (folder / "pretend").glob("*.parquet") for m in pq.read_table(path)["method"].to_pylist()}
    assert asked == {name for name, method in METHODS.items() if not method.through_run}
    results = {path.parent.name for path in (folder / "pretend").glob("*/result.json")}
    assert results == {"head", "top-1", "full", "attack", "mislabelled", "duplicates"}


@pytest.mark.slow
def test_every_step_ran_on_the_device_that_was_named(flow: tuple[Path, dict]) -> None:
    waits = flow[1]["waits"]
    assert all((n > 0) == name.startswith("pretend") for name, n in waits.items()), waits
