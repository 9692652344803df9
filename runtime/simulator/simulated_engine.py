"""One engine on the simulated clock: continuous batching, a step at a time, with moves of adapters between steps."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from .clock import Clock
from .service_model import ServiceModel

__all__ = ["EngineBounds", "EngineRow", "PrefixCache", "SimulatedEngine"]


@dataclass(frozen=True)
class EngineBounds:
    """What bounds a step, as in `EngineSettings`; `kv_tokens` is what the key-value cache holds, None for no bound."""

    max_running: int = 16
    max_batch_tokens: int = 2048
    block_tokens: int = 32
    kv_tokens: int | None = None


@dataclass(eq=False)
class EngineRow:
    """One ask in an engine. `cached_tokens` is known once it has been scheduled; smallest `priority` goes first."""

    prompt_tokens: int
    output_tokens: int
    adapter: str | None
    done: Callable[[EngineRow], None]
    blocks: tuple[object, ...] = ()
    priority: float = 0.0
    cached_tokens: int = 0
    queued_at_s: float = 0.0
    scheduled_at_s: float = 0.0
    first_token_at_s: float = 0.0
    to_compute: int = 0


class PrefixCache:
    """Which beginnings of prompts an engine has computed, by adapter; the one used longest ago makes room."""

    def __init__(self, block_tokens: int, limit_blocks: int | None) -> None:
        self._block_tokens = block_tokens
        self._limit_blocks = limit_blocks
        self._held: OrderedDict[tuple[str | None, object], None] = OrderedDict()

    def admit(self, row: EngineRow) -> int:
        """Tokens of the row's prompt that are there; all its blocks are from now on."""
        hits = 0
        for block in row.blocks:
            if (row.adapter, block) not in self._held:
                break
            hits += 1
        for block in reversed(row.blocks):  # what others may share is kept longest
            self._held[row.adapter, block] = None
            self._held.move_to_end((row.adapter, block))
        while self._limit_blocks is not None and len(self._held) > self._limit_blocks:
            self._held.popitem(last=False)
        return hits * self._block_tokens


class SimulatedEngine:
    """Takes asks in as vLLM's scheduler does: running rows first, then prompts by priority, up to the bounds.

    A prompt is computed in one step, or in parts where the step's tokens do not suffice; its step gives the first
    token. A row whose prompt and answer would not fit the cache waits; nothing is preempted. Steps that are all alike
    are made in one event, which is cut short at the end of its step when something comes in.
    """

    def __init__(self, clock: Clock, model: ServiceModel, bounds: EngineBounds) -> None:
        self.steps = self.prompt_tokens = self.cached_tokens = self.row_tokens = 0
        self.busy_s = 0.0
        self._clock = clock
        self._model = model
        self._bounds = bounds
        kv_tokens = bounds.kv_tokens
        self._cache = PrefixCache(bounds.block_tokens, None if kv_tokens is None else kv_tokens // bounds.block_tokens)
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, EngineRow]] = []
        self._computing: list[EngineRow] = []
        self._writing: list[tuple[int, int, EngineRow]] = []  # heap by the step in which the row ends
        self._adapters: Counter[str] = Counter()
        self._jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self._kv_used = 0
        self._working = False
        self._stretch: tuple[float, float, int] | None = None  # start, seconds of a step, steps
        self._stretches = 0

    @property
    def running(self) -> int:
        """Rows that are being computed."""
        return len(self._computing) + len(self._writing)

    def submit(self, row: EngineRow) -> None:
        """Take in an ask at the next step."""
        row.queued_at_s = self._clock.now_s
        heapq.heappush(self._waiting, (row.priority, next(self._numbers), row))
        self._interrupt()

    def between_steps(self, seconds: float, done: Callable[[], None]) -> None:
        """Do something else before the next step, which takes so long: move an adapter."""
        self._jobs.append((seconds, done))
        self._interrupt()

    def _interrupt(self) -> None:
        """Begin, or end the stretch of steps under way with its present step."""
        if not self._working:
            self._working = True
            self._clock.after(0.0, self._next)  # what comes in at the same moment is in the same step
        elif self._stretch is not None:
            start_s, step_s, steps = self._stretch
            made = min(int((self._clock.now_s - start_s) / step_s) + 1, steps) if step_s > 0 else steps
            if made < steps:
                self._begin_stretch(start_s, step_s, made)

    def _next(self) -> None:
        """At the end of a step: first what is to be done between steps, then the next step, or rest."""
        self._stretch = None
        if self._jobs:
            seconds, done = self._jobs.popleft()

            def job_done() -> None:
                done()
                self._next()

            self._clock.after(seconds, job_done)
            return
        chunks = self._schedule()
        if not chunks and not self._writing:
            self._working = False
            return
        prompt_tokens, rows = sum(tokens for _, tokens in chunks), len(self._writing)
        step_s = self._model.step_of(prompt_tokens, rows, len(self._adapters))
        if chunks:
            self._clock.after(step_s, lambda: self._end_mixed_step(chunks, step_s))
            return
        self._begin_stretch(self._clock.now_s, step_s, self._writing[0][0] - self.steps)

    def _schedule(self) -> list[tuple[EngineRow, int]]:
        """Prompts to compute in this step, with how many of their tokens."""
        bounds = self._bounds
        budget = bounds.max_batch_tokens - len(self._writing)
        chunks = []
        for row in self._computing:
            if budget > 0:
                chunks.append((row, min(row.to_compute, budget)))
                budget -= chunks[-1][1]
        while self._waiting and budget > 0 and self.running < bounds.max_running:
            row = self._waiting[0][2]
            needed = row.prompt_tokens + row.output_tokens
            if bounds.kv_tokens is not None and self._kv_used + needed > bounds.kv_tokens and self.running:
                break
            heapq.heappop(self._waiting)
            self._kv_used += needed
            row.scheduled_at_s = self._clock.now_s
            row.cached_tokens = self._cache.admit(row)
            row.to_compute = row.prompt_tokens - row.cached_tokens
            self.cached_tokens += row.cached_tokens
            self._computing.append(row)
            if row.adapter is not None:
                self._adapters[row.adapter] += 1
            chunks.append((row, min(row.to_compute, budget)))
            budget -= chunks[-1][1]
        return chunks

    def _end_mixed_step(self, chunks: list[tuple[EngineRow, int]], step_s: float) -> None:
        self._count(1, step_s)
        ended = []
        for row, tokens in chunks:
            self.prompt_tokens += tokens
            row.to_compute -= tokens
            if row.to_compute == 0:
                self._computing.remove(row)
                row.first_token_at_s = self._clock.now_s
                if row.output_tokens == 1:
                    ended.append(row)
                else:
                    end = self.steps + row.output_tokens - 1
                    heapq.heappush(self._writing, (end, next(self._numbers), row))
        self._end_rows(ended)

    def _begin_stretch(self, start_s: float, step_s: float, steps: int) -> None:
        self._stretch = (start_s, step_s, steps)
        self._stretches += 1
        number = self._stretches
        delay_s = max(start_s + steps * step_s - self._clock.now_s, 0.0)
        self._clock.after(delay_s, lambda: self._end_stretch(number, step_s, steps))

    def _end_stretch(self, number: int, step_s: float, steps: int) -> None:
        if number == self._stretches:  # else it was cut short
            self._stretch = None
            self._count(steps, step_s)
            self._end_rows([])

    def _count(self, steps: int, step_s: float) -> None:
        self.steps += steps
        self.row_tokens += steps * len(self._writing)
        self.busy_s += steps * step_s

    def _end_rows(self, ended: list[EngineRow]) -> None:
        """Hand over what is whole, then go on: who it was for hears of it while the next step is made."""
        while self._writing and self._writing[0][0] <= self.steps:
            ended.append(heapq.heappop(self._writing)[2])
        for row in ended:
            self._kv_used -= row.prompt_tokens + row.output_tokens
            if row.adapter is not None:
                self._adapters[row.adapter] -= 1
                if not self._adapters[row.adapter]:
                    del self._adapters[row.adapter]
        for row in ended:
            row.done(row)
        self._next()
