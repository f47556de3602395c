"""The demo's steps on a few rows and a tiny model; tests/cli/test_demo.py runs the real one."""

from __future__ import annotations

import json

import pytest
from places import HAS_MINILM, NO_MINILM
from tiny import make_tiny_model

from forebear.cli.main import run
from forebear.evaluation.demo import run as module
from forebear.evaluation.demo.corpus import make_corpus
from forebear.evaluation.reports.report import REPORT_FILES

SIZES = {"n_train": 120, "n_dev": 12, "n_probe": 12, "n_planted": 8, "n_wrong_probe": 8}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINILM, reason=NO_MINILM)
def test_the_demo_of_a_model_that_learns_nothing_says_that_nothing_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "BASE_MODEL", str(make_tiny_model(tmp_path / "model", seed=1)))
    monkeypatch.setattr(module, "make_corpus", lambda seed: make_corpus(seed, **SIZES))
    assert run(["demo", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    assert "NOT found" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", "run", "index", "report"}
    written = {path.name for path in (tmp_path / "out" / "report").iterdir()}
    assert {name for name in written if not name.startswith("table-")} == set(REPORT_FILES)
    result = json.loads((tmp_path / "out" / "report" / "result.json").read_text())
    assert result["found"] is False
    assert result["wrong_labels"]["share"] == pytest.approx(8 / 120)
    assert run(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "--force" in capsys.readouterr().err
