"""What a sweep measured, a JSON line for each point: a killed sweep does not measure again what it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["add_measured", "read_measured"]


def read_measured(path: Path) -> list[dict[str, Any]]:
    """The points in a file, in order; none where there is no file. A line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def add_measured(path: Path, point: dict[str, Any]) -> None:
    """Append a point, on a line of its own also where a kill cut off the line before."""
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(point) + "\n")
