"""A store where nothing can be written is reported all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from metier.agents import StoreError
from metier.runtime import RunStore
from metier.runtime.store.reading import store_for_reading
from metier.runtime.store.records import BatchRecord, RunRecord

READ = """
import os, sys
from pathlib import Path
from metier.runtime.store.reading import store_for_reading
if os.getuid() == 0:  # permissions do not bind root
    os.setgid(65534)
    os.setuid(65534)
path = Path(sys.argv[1])
assert not os.access(path.parent, os.W_OK)
with store_for_reading(path) as store:
    print([run.id for run in store.runs("b")], store.path == str(path))
"""


def write(path: Path, runs: int = 2) -> RunStore:
    store = RunStore(path)
    batch = BatchRecord("b", "label", "g", "f", "flowchart", {}, 1.0)
    store.add_batch(batch, [RunRecord(f"b.{i}", "b", str(i), "{}", 0) for i in range(runs)])
    return store


def test_a_folder_that_cannot_be_written_is_read() -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own may be read by nobody but who runs the tests
        Path(parent).chmod(0o755)
        folder = Path(parent) / "fixed"
        folder.mkdir()
        writer = write(folder / "runs.db")  # still open: what it wrote is in the write-ahead file
        folder.chmod(0o555)
        try:
            done = subprocess.run(
                [sys.executable, "-c", READ, str(folder / "runs.db")],
                capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": "/tmp"},
            )  # fmt: skip
        finally:
            folder.chmod(0o755)
            writer.close()
    assert done.stdout == "['b.0', 'b.1'] True\n", done.stderr


def test_one_that_can_be_written_is_opened_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "runs.db").close()
    with store_for_reading(tmp_path / "runs.db") as store:
        assert len(store.runs("b")) == 2
    assert not list(tmp_path.glob("metier-store-*"))


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no run store"), store_for_reading(tmp_path / "none.db"):
        pass
    assert not list(tmp_path.iterdir())
