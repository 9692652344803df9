"""The core on systems that are not Linux: its tests pass without fcntl, sched_getaffinity and /proc.

Here a few of them, with processes that are killed among them; `make portable` runs them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metier.runtime.store.claims import RunClaims
from metier.specializers.shelf.file_lock import exclusive, locked_by_sqlite

ROOT = Path(__file__).parents[1]
FEW = (
    "tests/runtime/store/test_reading.py",
    "tests/runtime/runs/test_two_drivers.py::test_a_driver_that_is_killed_frees_its_runs",
    "tests/runtime/runs/test_two_drivers.py::test_two_drivers_share_the_runs_of_a_batch",
    "tests/runtime/runs/test_listeners.py",
    "tests/specializers/machine/test_threads.py",
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "tests" / "without_linux"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_names_are_away() -> None:
    code = (
        "import os\n"
        "try:\n    import fcntl\nexcept ImportError:\n    print('no fcntl')\n"
        "print(hasattr(os, 'sched_getaffinity'))\n"
        "try:\n    open('/proc/stat')\nexcept FileNotFoundError:\n    print('no /proc')\n"
        "from metier.specializers.machine.threads import others_busy, usable_cores\n"
        "print(usable_cores() == os.cpu_count(), others_busy(0.01))\n"
    )
    done = run("-c", code)
    assert (done.stdout.split("\n"), done.stderr) == (["no fcntl", "False", "no /proc", "True 0.0", ""], "")


def test_a_few_tests_of_the_core_pass_without_them() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *FEW)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_a_lock_by_sqlite_is_one_holders(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked_by_sqlite(lock) as first, locked_by_sqlite(lock) as second:
        assert (first, second) == (True, False)
    with locked_by_sqlite(lock) as again:
        assert again and lock.read_bytes() == b""
    with pytest.raises(OSError, match="cannot be locked"), locked_by_sqlite(tmp_path / "no" / "lock"):
        raise AssertionError


def test_claims_and_folder_locks_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("metier.runtime.store.claims", "metier.specializers.shelf.file_lock"):
        monkeypatch.setattr(f"{module}.fcntl", None)
    mine, theirs = RunClaims(tmp_path / "claims"), RunClaims(tmp_path / "claims")
    with mine.claim(3) as held, theirs.claim(3) as taken, theirs.claim(4) as other:
        assert (held, taken, other) == (True, False, True)
        assert {path.name for path in tmp_path.iterdir()} == {"claims-3", "claims-4"}
    with pytest.raises(FileNotFoundError), theirs.claim(3) as again:  # an error of the block is the block's
        assert again
        raise FileNotFoundError
    assert not [*tmp_path.iterdir()]
    with exclusive(tmp_path / "lock") as first, exclusive(tmp_path / "lock", wait=False) as second:
        assert (first, second) == (True, False)
