"""What a sweep measured, a JSON line for each point: a killed sweep does not measure again what it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ...agents.errors import TrainingError
from ...agents.record_files import cut_torn_line, read_records

__all__ = ["add_measured", "read_measured"]

T = TypeVar("T")


def read_measured(path: Path, kind: type[T]) -> list[T]:
    """The points in a file as the type `kind`, in order; none where there is no file.

    A last line that a kill cut off is left out. Raises: TrainingError with the number of a line that is no point.
    """
    if not path.exists():
        return []
    expected, remedy = "what the sweep wrote", "Remove the line, or the file: what is missing is measured again."
    try:
        cut_torn_line(path)
    except OSError as error:
        raise TrainingError(f"{path} cannot be used: {error.strerror}", expected=expected, remedy=remedy) from error
    return list(read_records(path, kind, TrainingError, what="measured point", expected=expected, remedy=remedy))


def add_measured(path: Path, point: dict[str, Any]) -> None:
    """Append a point, on a line of its own also where a kill cut off the line before; raises OSError."""
    if path.exists():
        cut_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(point) + "\n")
