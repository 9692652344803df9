"""Which processes belong to an engine's host."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["descendants", "group_lives"]


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, but for Python's resource tracker, which tidies up after the others."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command's name may hold blanks and brackets; the parent's id is the second field after it.
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"resource_tracker" in (folder / "cmdline").read_bytes():
                del parents[int(folder.name)]
        except OSError:
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits for its parent to notice does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            # After the command's name: state, parent, group.
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False
