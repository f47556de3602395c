"""Descent from EK-FAC's solution against dense solves in float64 that share no code with the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forebear.errors import InputError, NonFiniteError
from forebear.indexer.curvature.descent import DescentSettings, descend

SIZE, N_ROWS, DAMPING = 24, 40, 0.05


class Rows:
    """The matrix of rows, mean of u u^T, as products with the mean over some of them; it remembers the positions."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.u = rng.normal(size=(N_ROWS, SIZE)) * np.logspace(0, -1.5, SIZE)
        self.batches: list[list[int] | None] = []

    @property
    def matrix(self) -> np.ndarray:
        return self.u.T @ self.u / N_ROWS

    def __call__(self, vectors, at=None):
        self.batches.append(at)
        u = torch.from_numpy(self.u if at is None else self.u[list(at)])
        flat = vectors["a"].flatten(1)
        return {"a": (flat @ u.T @ u / len(u)).view_as(vectors["a"])}


def as_vectors(flat: np.ndarray):
    return {"a": torch.from_numpy(flat).view(len(flat), 4, SIZE // 4)}


def diagonal(matrix: np.ndarray):
    """A preconditioner that sees the diagonal alone."""
    divisor = torch.from_numpy(np.diag(matrix) + DAMPING).view(4, SIZE // 4)
    return lambda vectors: {"a": vectors["a"] / divisor}


def right_sides() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(3, SIZE)) * np.array([[1e-9], [1.0], [1e6]])


def solved(rows: Rows, b: np.ndarray) -> np.ndarray:
    return np.linalg.solve(rows.matrix + DAMPING * np.eye(SIZE), b.T).T


def far(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def ask(rows: Rows, b: np.ndarray, **given):
    settings = DescentSettings(**{"batch_rows": 8, "steps": 300, **given})
    return descend(
        rows, as_vectors(b), DAMPING, precondition=diagonal(rows.matrix), settings=settings, n_rows=N_ROWS, seed=1
    )


def test_steps_over_all_rows_reach_the_solution():
    rows, b = Rows(), right_sides()
    found = ask(rows, b, batch_rows=N_ROWS, steps=400)
    assert far(found.vectors["a"].flatten(1).numpy(), solved(rows, b)).max() <= 1e-6
    assert found.converged.all()
    assert found.iterations.tolist() == [400] * 3
    assert set(map(type, rows.batches)) == {type(None)}


def test_batches_come_near_it_and_the_residual_is_that_of_all_rows():
    rows, b = Rows(), right_sides()
    found = ask(rows, b)
    x = found.vectors["a"].flatten(1).numpy()
    start = diagonal(rows.matrix)(as_vectors(b))["a"].flatten(1).numpy()
    assert far(x, solved(rows, b)).max() <= 0.25 * far(start, solved(rows, b)).min()
    true = np.linalg.norm(b - x @ (rows.matrix + DAMPING * np.eye(SIZE)), axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found.residual, true, rtol=1e-9)


def test_every_row_takes_part_before_any_takes_part_again():
    rows = Rows()
    ask(rows, right_sides()[1:2], steps=15)
    sampled = [batch for batch in rows.batches if batch is not None]
    used = sampled[16:]  # after four products on each of the four batches of the power method
    assert len(used) == 15
    assert all(len(set(batch)) == 8 for batch in sampled)
    for start in (1, 6):  # one batch of the first five went before, to the power method
        assert sorted(np.concatenate(used[start : start + 5]).tolist()) == list(range(N_ROWS))
    assert used[1:6] != used[6:11]


def test_more_steps_leave_less():
    rows, b = Rows(), right_sides()
    few, many = ask(rows, b, steps=20), ask(rows, b, steps=600)
    assert (many.residual < few.residual).all()


def test_a_solution_that_got_no_better_is_the_first_one():
    rows = Rows()
    vectors = as_vectors(right_sides())
    exact = torch.from_numpy(np.linalg.inv(rows.matrix + DAMPING * np.eye(SIZE)))

    def whole(v):
        return {"a": (v["a"].flatten(1) @ exact).view_as(v["a"])}

    settings = DescentSettings(batch_rows=2, steps=5)
    found = descend(rows, vectors, DAMPING, precondition=whole, settings=settings, n_rows=N_ROWS)
    assert found.iterations.tolist() == [0, 0, 0]  # it was the solution already
    assert found.residual.max() <= 1e-12


def test_a_solution_that_grew_beyond_all_numbers_is_the_first_one(monkeypatch):
    monkeypatch.setattr(
        "forebear.indexer.curvature.descent._largest", lambda *_: 1e-6
    )  # steps a million times too long
    rows, b = Rows(), right_sides()
    found = ask(rows, b, steps=100)
    start = diagonal(rows.matrix)(as_vectors(b))["a"]
    torch.testing.assert_close(found.vectors["a"], start)
    assert found.iterations.tolist() == [0, 0, 0]
    assert np.isfinite(found.residual).all()


def test_zero_gives_zero():
    found = ask(Rows(), np.vstack([np.zeros(SIZE), right_sides()[1]]))
    assert not found.vectors["a"][0].any()
    assert found.residual[0] == 0
    assert 0 < found.residual[1] < 0.5
    nothing = ask(Rows(), np.zeros((2, SIZE)))
    assert not nothing.vectors["a"].any()
    assert nothing.converged.all()


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="to be solved for"):
        ask(Rows(), np.full((1, SIZE), np.nan))
    rows = Rows()
    rows.u[:] = np.inf
    with pytest.raises(NonFiniteError, match="curvature product"):
        ask(rows, right_sides())


def test_settings_are_read_and_refused_by_name():
    assert DescentSettings.parse("") == DescentSettings()
    assert DescentSettings.parse("steps=7") == DescentSettings(steps=7)
    assert DescentSettings.parse(str(DescentSettings(steps=7, batch_rows=3))) == DescentSettings(steps=7, batch_rows=3)
    for bad in ("steps=-1", "depth=3", "steps", "steps=1.5"):
        with pytest.raises(InputError, match="not understood"):
            DescentSettings.parse(bad)
    with pytest.raises(InputError, match="1 or more"):
        DescentSettings.parse("steps=0")
