"""A store that is only read: also from a folder or a file system that cannot be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...agents.errors import StoreError
from .store import RunStore

__all__ = ["copied_store", "store_for_reading"]


@contextmanager
def store_for_reading(path: Path) -> Iterator[RunStore]:
    """Open a store for reports, closed at the end of the block.

    SQLite's write-ahead mode writes files beside the store even to read it. Where that cannot be, a copy is read.
    Raises: StoreError when there is no such file, or it cannot be read.
    """
    if path.is_file() and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        with RunStore(path) as store:
            yield store
        return
    with copied_store(path) as copy, RunStore(copy) as store:
        store.path = str(path)  # what errors name
        yield store


@contextmanager
def copied_store(path: Path) -> Iterator[Path]:
    """A copy of a store in a folder of its own, for the length of the block: the file itself is only read.

    Raises: StoreError when there is no such file, or no room for a copy.
    """
    if not path.is_file():
        raise StoreError(
            f"there is no run store {path}",
            expected="a file that `metier run` wrote",
            remedy="Name the store it is in with --store.",
        )
    with tempfile.TemporaryDirectory(prefix="metier-store-") as folder:
        copy = Path(folder) / "store.db"
        try:
            for suffix in ("", "-wal"):
                if Path(f"{path}{suffix}").is_file():
                    shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        except OSError as error:
            raise StoreError(
                f"the run store {path} cannot be copied to {folder}: {error}",
                expected="a file that can be read, and room for a copy",
                remedy="Set TMPDIR to a folder with room.",
            ) from error
        yield copy
