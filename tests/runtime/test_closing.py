"""What `async with` closes, and the tasks beside it."""

from __future__ import annotations

import gc

import anyio
import pytest

from metier.runtime.closing import AsyncClosing, BackgroundTasks, WarnsWhenOpen

pytestmark = pytest.mark.anyio


class Closed(AsyncClosing):
    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


class Held(WarnsWhenOpen):
    def __init__(self) -> None:
        self._closed = False

    async def close(self) -> None:
        self._closed = True


async def test_it_is_closed_when_the_block_fails() -> None:
    it = Closed()
    with pytest.raises(ValueError, match="inside"):
        async with it as entered:
            assert entered is it
            raise ValueError("inside")
    assert it.closed == 1


@pytest.mark.filterwarnings("error")
async def test_one_that_is_closed_does_not_warn() -> None:
    async with Held():
        pass
    gc.collect()


async def test_one_that_is_left_open_warns() -> None:
    with pytest.warns(ResourceWarning, match="never closed"):
        held = Held()
        del held
        gc.collect()


async def test_tasks_end_at_close_which_may_be_called_again() -> None:
    tasks, ended = BackgroundTasks(), anyio.Event()

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    await tasks.close()
    await tasks.open()
    tasks.start(work)
    await anyio.lowlevel.checkpoint()
    assert tasks.running and not ended.is_set()
    await tasks.close()
    await tasks.close()
    assert ended.is_set() and not tasks.running


async def test_the_error_of_a_task_is_raised_by_close() -> None:
    tasks = BackgroundTasks()
    failed = anyio.Event()

    async def work() -> None:
        failed.set()
        raise ValueError("of the task")

    await tasks.open()
    tasks.start(work)
    with pytest.raises(ExceptionGroup) as caught:
        try:
            await failed.wait()
        finally:
            await tasks.close()
    assert caught.group_contains(ValueError, match="of the task")
