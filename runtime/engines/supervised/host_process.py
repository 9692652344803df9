"""A supervised engine's host process as its owner sees it: started, written to, read from, ended."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO

from ...settings.engine import EngineSettings
from ..ended_processes import how_ended
from ..vllm_environment import engine_environment
from .processes import group_lives

__all__ = ["HostProcess"]

_SHOWN_LOG_BYTES = 8000
_EXIT_GRACE_S = 1.0
_GROUP_GRACE_S = 5.0


class HostProcess:
    """Runs `engine_host` and a socket pair to it, read by one thread and written by another.

    `on_line` gets each line and, when there are no more, `on_end` how the host has ended, both in the reading thread.
    A host that hangs blocks no caller.
    """

    def __init__(
        self, name: str, settings: EngineSettings, *, on_line: Callable[[bytes], None], on_end: Callable[[str], None]
    ) -> None:
        self._close_timeout_s = settings.close_timeout_s
        self._on_line = on_line
        self._on_end = on_end
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._log: IO[bytes] = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.engine_host", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=os.environ | engine_environment(threads=settings.thread_count, in_process=settings.one_process),
                # A group of its own: Ctrl-C is the program's to handle, and the whole group can be ended.
                start_new_session=True,
            )
        self._threads = [
            threading.Thread(target=target, name=f"metier-{name}-{role}", daemon=True)
            for role, target in (("reader", self._read), ("writer", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, line: bytes) -> None:
        """Write a line to the host, soon."""
        self._lines.put(line)

    def kill(self, pids: Iterable[int] = ()) -> None:
        """Kill the host itself and `pids` at once: while it builds its engine, or hangs, it reads no messages."""
        self._process.kill()
        _kill(pids)

    def end(self, pids: Iterable[int]) -> None:
        """Wait for the host to go, then make sure that `pids` and the rest of its group are gone too. Blocks."""
        try:
            self._process.wait(self._close_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _kill(pids)
        # Python's resource tracker is in the group too: given a moment, it removes shared memory that a killed
        # process left behind, and ends by itself.
        deadline_s = time.monotonic() + _GROUP_GRACE_S
        while group_lives(self._process.pid) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._lines.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join()
        self._log.close()

    def log_tail(self) -> str:
        """The last of what the host's processes have printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - _SHOWN_LOG_BYTES, 0))
        return self._log.read().decode(errors="replace").strip() or "none"

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._socket.sendall(line)
            except OSError:
                return  # the reader finds out why

    def _read(self) -> None:
        unreadable = ""
        try:
            with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # what a killed host was writing has no end
                        self._on_line(line)
        except Exception as error:  # whatever it is, those who wait for this host have to hear that it is over
            self.kill()
            unreadable = f"sent what cannot be read ({type(error).__name__}: {error})"
        self._on_end(unreadable or self._how_ended())

    def _how_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_GRACE_S)
        return how_ended([self._process.returncode])


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
