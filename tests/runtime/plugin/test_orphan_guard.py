"""A process of an engine ends when its parent is killed, and not when it has no parent to watch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from metier.runtime.plugin.orphan_guard import GUARDED_BY, end_with_parent

PARENT = """
import subprocess, sys
from metier.runtime.plugin.orphan_guard import guard_children
guard_children()
child = "from metier.runtime.plugin.orphan_guard import end_with_parent as e; e(); print('ready', flush=True); input()"
subprocess.run([sys.executable, "-c", child])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own service")
def test_a_guarded_child_ends_with_its_killed_parent() -> None:
    # The parent and its child hold the pipes; who reads sees the end once both are gone.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes) as parent:  # type: ignore[call-overload]
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        assert parent.stdout.read() == b""


def test_who_has_no_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GUARDED_BY, raising=False)
    end_with_parent()
    monkeypatch.setenv(GUARDED_BY, str(os.getpid()))
    end_with_parent()
