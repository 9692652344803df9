"""The journal: records of finished work in a file that is only appended to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TextIO, TypeVar

from pydantic import BaseModel

from ...agents.content_hash import content_hash
from ...agents.errors import ProfileError
from ...agents.record_files import cut_torn_line, read_records

__all__ = ["Journal", "Record", "record_key"]

UNKNOWN = ""
"""The machine of records from before machines were noted."""

Record = TypeVar("Record", bound=BaseModel)


def record_key(**content: Any) -> str:
    """The key of a record for this content."""
    return content_hash(content, compact=True)


class Journal(Generic[Record]):
    """A JSONL file of records that is only appended to, so that a probe that was killed goes on where it was.

    A last line that was cut off by a kill is dropped. `path` None keeps
    records for this process only. Records may have a `machine`, the key of the one that they were measured on:
    after `measure_on`, those of other machines are as good as not there. Use as a context manager, or close it.
    Raises: ProfileError when a line is not a record, or the file cannot be written.
    """

    def __init__(self, path: Path | None, kind: type[Record]) -> None:
        self.path = path
        self._kind = kind
        self._records: dict[str, dict[str, Record]] = {}  # by key, and by machine
        self._machine: str | None = None
        self._stamp = UNKNOWN
        self._file: TextIO | None = None
        if path is not None:
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                cut_torn_line(path)
                for record in self._records_in(path):
                    self._keep(record)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"{path} cannot be used: {error}", expected="a file that can be written") from error

    def _records_in(self, path: Path) -> Iterator[Record]:
        return read_records(
            path,
            self._kind,
            ProfileError,
            what=self._kind.__name__,
            expected="a file that `metier probe` wrote",
            remedy="Remove the line, or name another folder.",
        )

    def __len__(self) -> int:
        return sum(map(len, self._records.values()))

    def measure_on(self, machine: str, *, mix: bool = False) -> None:
        """From now on, records are of this machine: those added say so, and those of other machines are not found.

        Records from before machines were noted are found all the same, and with `mix` all are.
        """
        self._machine = None if mix else machine
        self._stamp = machine

    def get(self, key: str) -> Record | None:
        """The record of that content, None where there is none yet."""
        by_machine = self._records.get(key, {})
        if self._machine is None:
            return next(reversed(by_machine.values()), None)
        return by_machine.get(self._machine, by_machine.get(UNKNOWN))

    def items(self) -> list[tuple[str, Record]]:
        """Keys and records, in the order they were first written."""
        found = ((key, self.get(key)) for key in self._records)
        return [(key, record) for key, record in found if record is not None]

    def elsewhere(self, key: str) -> Record | None:
        """The newest record of that content that another, known machine made."""
        others = self._records.get(key, {}).items()
        return next((r for machine, r in reversed(list(others)) if machine not in (UNKNOWN, self._stamp)), None)

    def by_machine(self) -> dict[str, int]:
        """How many records there are of each machine, those of this one left out; "" is an unknown one."""
        counts = Counter(machine for records in self._records.values() for machine in records)
        return {machine: n for machine, n in counts.items() if machine != self._stamp}

    def add(self, record: Record) -> None:
        """Keep a record; it survives this process once the call returns."""
        if self._stamp:
            record = record.model_copy(update={"machine": self._stamp})
        self._keep(record)
        if self._file is None:
            return
        try:
            self._file.write(record.model_dump_json(exclude_defaults=True) + "\n")
            self._file.flush()
        except OSError as error:
            raise ProfileError(
                f"{self.path} cannot be written: {error}",
                expected="a disk with room",
                remedy="Make room and run the same command again: what was written is kept.",
            ) from error

    def _keep(self, record: Record) -> None:
        machine = getattr(record, "machine", UNKNOWN)
        records = self._records.setdefault(_key(record), {})
        name = (
            machine if isinstance(machine, str) else UNKNOWN
        )  # profiles hold the whole machine, and it is in their key
        records.pop(name, None)
        records[name] = record

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(record: BaseModel) -> str:
    fields: Mapping[str, Any] = record.__dict__
    return str(fields["key"])
