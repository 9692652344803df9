"""Load: a number of conversations always under way (closed loop), or arriving at random times (Poisson)."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import anyio
from pydantic import Field, model_validator

from ...agents.backend import Backend
from ...agents.errors import MetierError
from ...agents.frozen_model import FrozenModel
from ...agents.messages import Ask, Usage
from ..meters.stamps import stamp_s
from .records import CANCELLED, FAILED, ErrorDetails, Phase, RequestMetadata, RequestRecord, request_metrics
from .workload import Conversation

__all__ = ["Cache", "LoadLevel", "OnRecord", "apply_load"]

Cache = Literal["as-is", "warm", "cold"]
OnRecord = Callable[[RequestRecord], None]


class LoadLevel(FrozenModel):
    """One level of load: a number of conversations at a time, or a rate of arrivals; exactly one of the two."""

    concurrency: int | None = Field(default=None, ge=1)
    """Conversations at a time."""

    rate_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Conversations that arrive each second, at random times (Poisson)."""

    cache: Cache = "as-is"
    """`warm`: all was asked once before, so that prefixes are cached and adapters loaded. `cold`: every prompt begins
    differently, so that nothing of it is cached. `as-is`: neither."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError("a level is either a concurrency or a rate")
        return self

    def __str__(self) -> str:
        load = f"{self.concurrency} at a time" if self.concurrency else f"{self.rate_per_s:g} per second"
        return load if self.cache == "as-is" else f"{load}, {self.cache}"


@dataclass(frozen=True)
class _Asked:
    """A request under way: its conversation, and the turn it is there."""

    session_num: int
    run_id: str
    conversation: Conversation
    turn: int
    worker: int


async def apply_load(
    backend: Backend, conversations: Sequence[Conversation], level: LoadLevel, on_record: OnRecord, seed: int = 0
) -> float:
    """Ask all conversations at a level of load; returns the seconds it took. The turns of each follow one another.

    `on_record` is called with every request as it ends, failed and cancelled ones included; a failed turn ends its
    conversation. In a `warm` level all is asked once before, as phase `warmup`.
    """
    if level.cache == "warm":
        await _loop(backend, conversations, level.model_copy(update={"cache": "as-is"}), on_record, "warmup", seed)
    return await _loop(backend, conversations, level, on_record, "profiling", seed)


async def _loop(
    backend: Backend,
    conversations: Sequence[Conversation],
    level: LoadLevel,
    on_record: OnRecord,
    phase: Phase,
    seed: int,
) -> float:
    began_s = time.perf_counter()

    async def converse(number: int, conversation: Conversation, worker: int) -> None:
        # Asks of different levels, or of a trace that is asked again, must not look like tries of one step.
        run_id = f"bench-{next(_numbers)}"
        for turn, ask in enumerate(conversation.asks):
            asked = _Asked(number, run_id, conversation, turn, worker)
            record = await _request(backend, ask, asked, level, phase, on_record)
            if record.error is not None:
                return

    async with anyio.create_task_group() as tasks:
        if level.concurrency is not None:
            waiting = iter(list(enumerate(conversations)))

            async def work(worker: int) -> None:
                for number, conversation in waiting:
                    await converse(number, conversation, worker)

            for worker in range(min(level.concurrency, len(conversations))):
                tasks.start_soon(work, worker)
        else:
            assert level.rate_per_s is not None
            draw, at_s = random.Random(seed), 0.0
            for number, conversation in enumerate(conversations):
                await anyio.sleep(max(began_s + at_s - time.perf_counter(), 0.0))
                tasks.start_soon(converse, number, conversation, number)
                at_s += draw.expovariate(level.rate_per_s)
    return time.perf_counter() - began_s


_numbers = itertools.count()


async def _request(
    backend: Backend, ask: Ask, asked: _Asked, level: LoadLevel, phase: Phase, on_record: OnRecord
) -> RequestRecord:
    ask = ask.model_copy(update={"run_id": asked.run_id})
    if level.cache == "cold":
        first, *others = ask.messages
        unlike = first.model_copy(update={"content": f"{uuid.uuid4().hex}\n{first.content}"})
        ask = ask.model_copy(update={"messages": (unlike, *others)})
    pieces_s: list[float] = []
    start_ns, start_s = round(1e9 * stamp_s()), time.perf_counter()
    usage, error = Usage(), None
    cancelled = True
    try:
        reply = await backend.reply(ask, on_text=lambda _: pieces_s.append(time.perf_counter()))
        usage, cancelled = reply.usage, False
    except MetierError as failure:
        error, cancelled = ErrorDetails(code=FAILED, type=type(failure).__name__, message=str(failure)), False
    finally:
        end_s = time.perf_counter()
        end_ns = start_ns + round(1e9 * (end_s - start_s))
        if cancelled:
            message = f"Request was cancelled after {end_s - start_s:.3f} seconds"
            error = ErrorDetails(code=CANCELLED, type="RequestCancellationError", message=message)
        record = RequestRecord(
            metadata=RequestMetadata(
                session_num=asked.session_num,
                x_request_id=ask.id,
                x_correlation_id=ask.run_id,
                conversation_id=asked.conversation.id,
                turn_index=asked.turn,
                request_start_ns=start_ns,
                request_ack_ns=start_ns + round(1e9 * (pieces_s[0] - start_s)) if pieces_s else None,
                request_end_ns=end_ns,
                worker_id=f"worker_{asked.worker}",
                record_processor_id="metier",
                benchmark_phase=phase,
                was_cancelled=cancelled,
                cancellation_time_ns=end_ns if cancelled else None,
                load=str(level),
                role=ask.role,
                variant=ask.variant or "base",
            ),
            metrics={} if error is not None else request_metrics(ask, usage, start_s, pieces_s, end_s),
            error=error,
        )
        on_record(record)
    return record
