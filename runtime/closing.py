"""Objects that are used with `async with` and closed at its end, and the tasks that run beside them meanwhile."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Self

import anyio

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

__all__ = ["AsyncClosing", "BackgroundTasks", "WarnsWhenOpen"]


class AsyncClosing(ABC):
    """An object that `async with` closes at the end, whatever happened in the block."""

    @abstractmethod
    async def close(self) -> None:
        """Close it; closing twice is harmless."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class WarnsWhenOpen(AsyncClosing):
    """One that warns with ResourceWarning when it is garbage-collected without having been closed."""

    _closed: bool

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if not getattr(self, "_closed", True):
            _warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)


class BackgroundTasks:
    """Tasks that run from `open` to `close`, both called by the same task; an error in one ends the others."""

    def __init__(self) -> None:
        self._group: TaskGroup | None = None

    @property
    def running(self) -> bool:
        """Whether tasks can be started."""
        return self._group is not None

    async def open(self) -> None:
        """Allow tasks from now on."""
        self._group = anyio.create_task_group()
        await self._group.__aenter__()

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run `work` beside the caller; only while `running`."""
        assert self._group is not None
        self._group.start_soon(work)

    async def close(self) -> None:
        """Cancel the tasks and wait for their end; harmless when there are none. Raises: what a task raised."""
        group, self._group = self._group, None
        if group is not None:
            group.cancel_scope.cancel()
            # Without the error of the caller's block, which the group would wrap in an exception group.
            await group.__aexit__(None, None, None)
