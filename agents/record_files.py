"""JSON files of our own records: one record whole, or one a line in a file that grows.

People copy them, disks damage them, and a kill cuts their last line off. What is read is a record of the expected type,
or one named error that says the file, the line, and what to change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import MetierError
from .text_files import MOST_JSON_MIB, UnreadableTextError, parse_json, read_bounded, read_lines, shown

__all__ = ["cut_torn_line", "read_record", "read_records"]

T = TypeVar("T")

_BLOCK_BYTES = 1 << 16


def read_record(
    path: Path,
    kind: type[T],
    raises: type[MetierError],
    *,
    what: str,
    expected: str,
    remedy: str,
    most_mib: int = MOST_JSON_MIB,
) -> T:
    """The one record in a file, as the type `kind`; `what` it is, `expected` and `remedy` are for errors.

    Raises: `raises` when there is no such file, or it is no such record.
    """
    try:
        text = read_bounded(path, most_mib=most_mib)
        parse_json(text)
        return TypeAdapter(kind).validate_json(text)
    except (FileNotFoundError, UnreadableTextError, ValidationError) as error:
        raise raises(f"{path} is no {what}: {_reason(error)}", expected=expected, remedy=remedy) from error


def read_records(
    path: Path, kind: type[T], raises: type[MetierError], *, what: str, expected: str, remedy: str
) -> Iterator[T]:
    """The records of a file that has one a line, in order and one at a time; empty lines are passed over.

    `what` one of them is, `expected` and `remedy` are for errors.
    Raises: `raises` with the number of a line that is no record, or where the file cannot be read.
    """
    adapter = TypeAdapter(kind)
    lines = read_lines(path)
    while True:
        try:
            number, line = next(lines)
        except StopIteration:
            return
        except (UnreadableTextError, FileNotFoundError) as error:
            raise raises(f"{path} cannot be read: {_reason(error)}", expected=expected, remedy=remedy) from error
        if not line.strip():
            continue
        try:
            record = adapter.validate_json(line)
        except ValidationError as error:
            problem = f"{path}, line {number} is no {what}: {_reason(error)}"
            raise raises(problem, expected=expected, remedy=remedy) from error
        yield record


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without an end, which a kill left in the middle; raises OSError."""
    with path.open("rb+") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - _BLOCK_BYTES)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < end:
            file.truncate(at)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "no such file" if isinstance(error, FileNotFoundError) else str(error)
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {shown(first['input'])}: {first['msg']}" if place else str(first["msg"])
