"""`metier store check` and `recover` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metier.agents import StoreError
from metier.runtime.cli.main import app
from tests.runtime.cli.test_cli_report import WORKFLOW, metier


def test_a_damaged_store_is_told_from_a_whole_one_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metier("run", WORKFLOW, "--tasks", "test:5", "--engine", "scripted")
    store = Path("runs/runs.db")
    assert "runs/runs.db is whole" in metier("store", "check", str(store))
    content = bytearray(store.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = b"\xff" * 4096
    store.write_bytes(content)
    found = CliRunner().invoke(app, ["store", "check", str(store)], env={"COLUMNS": "200"})
    assert found.exit_code == 1
    assert "metier store recover runs/runs.db --out NEW.db" in found.output
    assert "wrote saved.db: 1 batches, " in metier("store", "recover", str(store), "--out", "saved.db")
    assert "chain" in metier("report", "--store", "saved.db")
    with pytest.raises(StoreError, match=r"saved.db is there already; expected the name of a new file"):
        metier("store", "recover", str(store), "--out", "saved.db")
