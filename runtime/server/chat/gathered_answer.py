"""An answer as it is generated, handed on in pieces as large as the client is slow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from ...settings.server import ServerSettings
from ..admission import Admission
from .chat import Answer
from .chat_protocol import Completed

__all__ = ["all_of", "gather"]


async def gather(
    answer: Answer, admission: Admission, settings: ServerSettings, on_piece: Callable[[str], Awaitable[None]]
) -> Completed:
    """Have `answer` answered within `request_timeout_s`; what gathers while `on_piece` is at work is its next piece.

    Text that no piece has brought, because the engine gives none on the way, is the last piece.
    """
    pieces: list[str] = []
    fresh = anyio.Event()
    done: Completed | None = None
    handed_on = 0

    def on_text(text: str) -> None:
        pieces.append(text)
        fresh.set()

    async def work() -> None:
        nonlocal done
        with anyio.fail_after(settings.request_timeout_s):
            async with admission.enter():
                done = await answer(on_text)
        fresh.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        while done is None or pieces:
            await fresh.wait()
            fresh = anyio.Event()
            text = "".join(pieces)
            pieces.clear()
            if text:
                await on_piece(text)
                handed_on += len(text)
    assert done is not None
    if len(done.text) > handed_on:
        await on_piece(done.text[handed_on:])
    return done


async def all_of(works: Sequence[Callable[[], Awaitable[Completed]]]) -> list[Completed]:
    """Have several answered at the same time; returns them in their order. The first error cancels the others."""
    if len(works) == 1:
        return [await works[0]()]
    done: dict[int, Completed] = {}

    async def one(number: int) -> None:
        done[number] = await works[number]()

    async with anyio.create_task_group() as tasks:
        for number in range(len(works)):
            tasks.start_soon(one, number)
    return [done[number] for number in range(len(works))]
