"""Searches on a device give the answers that they give on the CPU, and read what lies there."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from programs import on_pretended

from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory

BUDGETS = (0, 40_000, 1 << 30)  # nothing is kept; a part is; all is


@pytest.mark.slow
def test_searches_of_stored_vectors_give_the_same_rows_and_bits():
    """By every method and scenario; scores are summed in float64 on the host."""
    found = on_pretended(
        """
        import tempfile
        from pathlib import Path
        import numpy as np
        import test_search as cases
        from forebear.indexer.model.device.kept_arrays import HOST, DeviceMemory
        from forebear.indexer.storage import scan_table
        from forebear.retriever.head.search import search_full, search_scan

        scan_table.SCAN_BLOCK_ROWS = cases.BLOCK_ROWS
        found, folder = [], Path(tempfile.mkdtemp())
        for name in (*cases.SCANNED, *cases.NEIGHBOURS):
            for kind in cases.SCENARIOS:
                rows = cases.scenario(kind)
                query, _ = cases.query_and_truth(rows, name)
                factors, k = cases.factors_of(rows, name), min(cases.K, len(rows.live))
                table = cases.table_of(factors, folder)
                for budget in budgets:
                    memory = DeviceMemory(device, budget)
                    for _ in range(2 if name == "gd" else 1):  # the second time from what was kept
                        ledger.clear()
                        ends = search_scan(query, table, factors, k, memory=memory)
                    wanted = search_full(query, factors, k)
                    same = all(
                        np.array_equal(a.rows, b.rows) and np.array_equal(a.scores, b.scores)
                        for a, b in zip(ends, wanted, strict=True)
                    )
                    found.append((name, kind, budget, same, memory.n_bytes, ledger.sent.total()))
        """,
        "retriever/head",
        budgets=BUDGETS,
    )
    assert [case for case in found if not case[3]] == []
    for name, kind, budget, _, kept, sent in found:
        if kind == "fewer rows than results":
            continue
        assert kept <= budget
        assert (kept > 0) == (budget > 0)
        if name == "gd":  # with all of it there, a second search sends queries alone
            assert (sent < 20_000) == (budget == BUDGETS[-1]), (kind, budget, sent)


@pytest.mark.slow
def test_a_scan_waits_once_for_each_list_of_candidates():
    found = on_pretended(
        """
        import tempfile
        from pathlib import Path
        import test_search as cases
        from forebear.indexer.model.device.kept_arrays import DeviceMemory
        from forebear.indexer.storage import scan_table
        from forebear.retriever.head.search import search_scan

        found = {}
        rows = cases.scenario("random")
        for name in (*cases.SCANNED, *cases.NEIGHBOURS):
            query, _ = cases.query_and_truth(rows, name)
            factors = cases.factors_of(rows, name)
            for block_rows in (64, 512):
                scan_table.SCAN_BLOCK_ROWS = block_rows
                table = cases.table_of(factors, Path(tempfile.mkdtemp()))
                memory = DeviceMemory(device, 1 << 30)
                ledger.clear()
                search_scan(query, table, factors, cases.K, memory=memory)
                found[f"{name} {block_rows}"] = ledger.waits.total()
        """,
        "retriever/head",
    )
    assert len(found) == 18
    assert max(found.values()) <= 4, found  # values and positions, of either end; not one a block


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_candidates_from_sketches_are_the_best_by_coordinates_and_code(budget):
    """Against sums in float64 over what is stored, with retired rows, several checkpoints, and ties."""
    found = on_pretended(
        """
        import numpy as np
        import test_sketch as cases
        from forebear.indexer.model.device.kept_arrays import DeviceMemory
        from forebear.indexer.sketches import device_scan
        from forebear.indexer.sketches.candidates import propose
        from forebear.indexer.sketches.estimates import Proposal

        found, memory = [], DeviceMemory(device, budget)
        device_scan.CODE_ROWS, device_scan.MOST_SCORES = 48, 700  # blocks of two queries
        for n_parts in (1, 2):
            parts = cases.parts_of(300, n_parts)
            for live in (np.arange(300), np.setdiff1d(np.arange(300), [0, 7, 299])):
                for cosine in (False, True):
                    for weight in (0.0, 0.6):
                        values = cases.oracle_estimates(parts, cosine=cosine, code_weight=weight)
                        for k in (len(live), 10, 1):
                            ends = propose(parts, live, k, Proposal(cosine, weight), memory)
                            cases.assert_best(ends, values, live, k)
                            found.append(k)
        parts, live = cases.parts_of(300, 2), np.arange(300)
        margin = 0.2 * cases.oracle_units(parts, cosine=False)
        values = cases.oracle_estimates(parts, cosine=False, code_weight=1.0)
        for sign, (rows, scores) in zip((1, -1), propose(parts, live, 7, Proposal(False, 1.0, 0.2), memory)):
            best = np.argsort(-(sign * values + margin), axis=1)[:, :7]
            assert np.array_equal(rows, best)
            assert np.allclose(scores, np.take_along_axis(values, best, axis=1), atol=1e-4 * np.abs(values).max())
        for k in (64, 6):
            for rows, _ in propose([cases.duplicates(64)], np.arange(64), k, Proposal(False, 1.0), memory):
                assert np.array_equal(rows, np.broadcast_to(np.arange(k), (2, k)))
        """,
        "indexer/sketches",
        budget=budget,
    )
    assert len(found) == 48


def test_memory_gives_up_what_was_not_used_lately_and_not_what_a_search_reads():
    found = on_pretended(
        """
        import numpy as np
        from forebear.indexer.model.device.kept_arrays import DeviceMemory

        first, second = ([np.full(100, i, np.float32) for i in numbers] for numbers in (range(4), range(4, 7)))
        memory, found = DeviceMemory(device, 1200), []

        def read(arrays):
            memory.begin()
            ledger.clear()
            for array in arrays:
                assert memory.tensor(array).cpu().tolist() == array.tolist()
            found.append((ledger.sent.total() // 400, memory.n_bytes))

        read(first)  # three fit
        read(first)  # the fourth is sent again, and pushes out none of them
        read(second)
        read(second)
        read(first)
        view = np.frombuffer(first[0].tobytes(), np.float32)
        kept = memory.tensor(view.view(np.int32))
        assert kept.dtype == torch.int32
        """
    )
    assert found == [[4, 1200], [1, 1200], [3, 1200], [0, 1200], [4, 1200]]


def test_a_lack_of_memory_on_the_device_gives_up_what_is_kept_there():
    found = on_pretended(
        """
        import numpy as np
        from forebear.indexer.model.device.kept_arrays import DeviceMemory

        arrays, memory, found = [np.full(100, i, np.float32) for i in range(6)], DeviceMemory(device, 1 << 30), []
        send, full = memory.send, [True]

        def sent(values):
            if memory.n_bytes >= 1600 and full.pop():
                full.append(False)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 400 bytes.")
            return send(values)

        memory.send = sent
        for turn in range(2):
            memory.begin()
            for array in arrays:
                assert memory.tensor(array).cpu().tolist() == array.tolist()
            found.append(memory.n_bytes)
        """
    )
    assert found == [800, 800]  # half of what was kept when it ran out


def test_on_the_cpu_tensors_look_at_the_stored_numbers():
    stored = np.arange(6.0)
    stored.flags.writeable = False
    assert HOST.on_host
    assert HOST.tensor(stored).data_ptr() == HOST.send(stored).data_ptr() == stored.ctypes.data
    assert HOST.n_bytes == 0
    assert not DeviceMemory(torch.device("meta"), 0).on_host


def test_a_search_that_lacks_memory_is_made_again_without_what_is_kept():
    found = on_pretended(
        """
        import numpy as np
        from forebear.errors import InputError
        from forebear.indexer.model.device.kept_arrays import DeviceMemory
        from forebear.indexer.model.device.memory import free_memory

        stored, memory, tries = np.ones(100, np.float32), DeviceMemory(device, 1 << 30), []

        def search():
            tries.append(memory.n_bytes)
            if memory.n_bytes:
                raise RuntimeError("CUDA error: out of memory")
            return "found"

        memory.tensor(stored)
        found = [memory.run(search), tries]
        memory._budget = 1 << 30
        memory.tensor(stored)
        free_memory(torch.device("cpu"))
        found.append(memory.n_bytes)
        free_memory(device)  # as a pass does whose batch does not fit
        found.append(memory.n_bytes)
        try:
            memory.run(lambda: (_ for _ in ()).throw(InputError("a fault of another kind")))
        except InputError as error:
            found.append(str(error))
        """
    )
    assert found == ["found", [400, 0], 400, 0, "a fault of another kind"]


def test_scans_compute_in_fp32_whoever_asks_for_them(monkeypatch: pytest.MonkeyPatch):
    """A scan's bound on rounding is that of float32, also where the caller lets torch round to TF32."""
    from forebear.indexer.sketches import device_scan
    from forebear.indexer.sketches.estimates import GradientStore, Part, Proposal
    from forebear.indexer.sketches.reduction import Reduction
    from forebear.indexer.sketches.sketch import SketchRows
    from forebear.indexer.storage.arrow import RowMatrix
    from forebear.indexer.storage.scan_table import ScanBlock, ScanTable, round_vectors
    from forebear.retriever.head import scan, search
    from forebear.retriever.head.scoring import Query, Term
    from forebear.retriever.question.methods import METHODS

    entered: list[str] = []

    def noted(name: str):
        @contextlib.contextmanager
        def repeatable(_device: torch.device):
            entered.append(name)
            yield

        return repeatable

    for module in (device_scan, scan):
        monkeypatch.setattr(module, "repeatable", noted(module.__name__.rsplit(".", 1)[-1]))
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1).astype(np.float32)
    rounded = round_vectors(vectors, np.eye(1, 4, dtype=np.float32))
    table = ScanTable((ScanBlock(np.arange(50), (rounded,), (), (norms,), ()),))
    factors = search.RowFactors((RowMatrix([vectors]),), (), np.arange(50))
    query = Query(METHODS["nn-euc"], (Term(1.0, vectors[:2].astype(np.float64)),), np.ones(2))
    search.search_scan(query, table, factors, 3)
    reduction = Reduction(np.eye(4, 8).astype(np.float16), np.ones(8, np.float32), 0, 0)
    numbers = SketchRows(vectors, vectors[:, :0], np.ones(50), np.ones(50))
    columns = numbers.columns(reduction)
    store = GradientStore(
        RowMatrix([columns["sketch"]]), None, norms, *(columns[name] for name in ("share", "length", "norm")),
        columns["residual_length"], reduction,
    )  # fmt: skip
    device_scan.propose_on_device([Part(1.0, numbers, store)], np.arange(50), 3, Proposal(True, 0.0), HOST)
    assert entered == ["scan", "device_scan"]
