"""One engine per distinct engine half of the variants in use; itself a backend."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from ...agents.backend import OnText, Prefetch, ResumedText, Upcoming
from ...agents.errors import EngineDeadError, EngineError
from ...agents.messages import Ask, Reply
from ..events import Event, EventKind, OnEvent
from ..settings.engine import EngineSettings
from ..slots.adapter import LoadedAdapter, SwapCost
from ..slots.adapter_slots import OnAdapterUse
from ..slots.announced_uses import AnnouncedUses
from .answer_check import check_answers
from .engine import Engine, EngineCounters, OnAbandoned, added_up
from .running_engine import RunningEngine
from .start_times import note_start, start_note
from .variant_targets import EngineStart, Resolve, VariantTargets

__all__ = ["EnginePool", "Resolve", "StartEngine"]

StartEngine = Callable[[EngineStart], Awaitable[Engine]]

FORESEEN_LIMIT = 10_000
"""Announcements whose meaning is kept worked out; graphs have a few dozen."""


@dataclass(eq=False)
class _Seat:
    """The place of one engine half: the engine that runs there now, and those that died there."""

    start: EngineStart
    room: anyio.Semaphore
    changing: anyio.Lock = field(default_factory=anyio.Lock)
    announced: AnnouncedUses = field(default_factory=AnnouncedUses)
    running: RunningEngine | None = None
    deaths: deque[float] = field(default_factory=deque)
    past: list[EngineCounters] = field(default_factory=list)
    dead: list[Engine] = field(default_factory=list)
    restarts: int = 0
    past_prefetches: int = 0

    def keep_counts(self, running: RunningEngine) -> None:
        """Remember what an engine has done that runs here no more."""
        self.past.append(running.counters())
        self.past_prefetches += running.prefetches


class EnginePool:
    """The engines of a session. Start it with `async with`; engines start when first asked, or by `warm`.

    `base` is the base checkpoint's folder; `resolve` turns a variant's name or content id into its record and
    folder. `supervised` engines live in processes of their own: one that dies is started again and the asks
    it was working on are asked again, adapters included. `adapters` names the checkpoints (`base`, or content ids)
    that variants in use have adapters on, or is True for all and False for none: the engines of the others start
    without LoRA layers, which is faster. Every engine has a key-value cache of its own.

    `on_abandoned(ask, usage)` hears what asks have used that never got a reply (cancelled, failed, or asked
    again after a death); it may be called more than once for an ask, and the amounts add up.

    `foresee` and `forget` (see `ForeseeingBackend`) tell the slots which adapters the runs will use next.
    `on_adapter_use` hears when asks begin and end to hold an adapter in a slot.
    """

    def __init__(
        self,
        base: Path,
        resolve: Resolve,
        settings: EngineSettings | None = None,
        *,
        supervised: bool = False,
        adapters: bool | Collection[str] = True,
        on_event: OnEvent | None = None,
        on_abandoned: OnAbandoned | None = None,
        on_adapter_use: OnAdapterUse | None = None,
        start_engine: StartEngine | None = None,
    ) -> None:
        self._settings = settings or EngineSettings()
        self._targets = VariantTargets(base, resolve, self._settings, adapters)
        self._on_event = on_event or (lambda event: None)
        self._on_abandoned = on_abandoned
        self._on_adapter_use = on_adapter_use
        self._start_engine = start_engine or (_start_supervised if supervised else _start_in_process)
        self._seats: dict[EngineStart, _Seat] = {}
        self._foreseen: dict[Upcoming, dict[EngineStart, dict[str, int]]] = {}
        self._closed = False

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`: the ask's variant decides engine and adapter.

        Raises: UnknownVariantError, AdapterError (adapter of another base, layout or rank, or damaged),
        AskRejectedError, EngineError; EngineDeadError when the engine keeps dying.
        """
        target = await self._targets.find(ask.variant)
        if ask.thinking is None and target.variant is not None and target.variant.ask.thinking is not None:
            ask = ask.model_copy(update={"thinking": target.variant.ask.thinking})
        target.check_layout(ask)
        seat = self._seat(target.start)
        streamed = None if on_text is None else ResumedText(on_text)
        began_s = time.monotonic()
        async with seat.room:
            waited_s = time.monotonic() - began_s
            while True:
                running = await self._running(seat)
                try:
                    return await running.ask(target, ask, streamed, waited_s)
                except EngineDeadError:
                    self._bury(seat, running)
                    if streamed is not None:
                        streamed.restart()

    async def warm(self, variants: Iterable[str | None] = (None,)) -> None:
        """Check what these variants are made of, then start their engines: what cannot serve is said in no time."""
        targets = [await self._targets.find(name) for name in variants]
        for target in targets:
            await self._running(self._seat(target.start))

    def foresee(self, run_id: str, upcoming: Upcoming) -> Prefetch | None:
        """See `ForeseeingBackend.foresee`: says to each engine's slots when the run may need which adapter."""
        if not self._settings.foresight:
            return None
        uses = self._uses(upcoming)
        due = []
        for start, seat in self._seats.items():
            seat.announced.announce(run_id, uses.get(start, {}))
            prefetch = None if seat.running is None else seat.running.foresee(self._targets.adapter_paths)
            if prefetch is not None:
                due.append(prefetch)
        if len(due) < 2:
            return due[0] if due else None
        return partial(_one_by_one, due)

    def forget(self, run_id: str) -> None:
        """See `ForeseeingBackend.forget`."""
        self.foresee(run_id, ())

    def counters(self) -> list[EngineCounters]:
        """What every engine has done, those that have died included."""
        return [
            counters
            for seat in self._seats.values()
            for counters in (*seat.past, *([seat.running.counters()] if seat.running else []))
        ]

    def totals(self) -> dict[str, dict[str, Any]]:
        """Engine name → its counters added up over restarts, for reports and the store.

        `cpu_s` is the engine's whole CPU time; replies' `cpu_s`, `abandoned_cpu_s` (per role) and
        `overhead_cpu_s` add up to it. Of the `adapter_loads`, so many were `adapter_prefetches`.
        """
        totals = added_up(self.counters())
        for seat in self._seats.values():
            if seat.start.name in totals:
                total = totals[seat.start.name]
                total["restarts"] += seat.restarts
                total["adapter_prefetches"] += seat.past_prefetches
                total["adapter_prefetches"] += 0 if seat.running is None else seat.running.prefetches
        return totals

    def checkpoint_totals(self) -> dict[str, dict[str, Any]]:
        """As `totals`, by checkpoint: "base", or the id of the variant whose weights they are."""
        totals = self.totals()
        named = {seat.start.name: seat.start.checkpoint for seat in self._seats.values()}
        return {named[name]: row for name, row in totals.items()}

    async def close(self) -> None:
        """Close every engine; asks still under way fail. Closing twice is harmless."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            for seat in self._seats.values():
                await self._close_dead(seat)
                if seat.running is not None:
                    running, seat.running = seat.running, None
                    await running.engine.close()
                    seat.keep_counts(running)

    async def __aenter__(self) -> EnginePool:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # -- engines -----------------------------------------------------------------------------------------

    def _seat(self, start: EngineStart) -> _Seat:
        seat = self._seats.get(start)
        if seat is None:
            seat = self._seats[start] = _Seat(start, anyio.Semaphore(self._settings.ask_queue_limit))
        return seat

    async def _running(self, seat: _Seat) -> RunningEngine:
        """The engine of a seat, started or started again if need be."""
        if seat.running is not None:
            return seat.running
        async with seat.changing:
            if seat.running is None:
                await self._close_dead(seat)
                self._check_may_start(seat)
                began_s = time.monotonic()
                self._tell("engine_starting", engine=seat.start.name, note=start_note(seat.start))
                engine: Engine = await self._start_engine(seat.start)
                await check_answers(engine, seat.start.self_check)
                seat.running = self._with_adapters(engine, seat)
                kind: EventKind = "engine_restarted" if seat.past else "engine_ready"
                seat.restarts += bool(seat.past)
                self._tell(kind, engine=seat.start.name, seconds=round(time.monotonic() - began_s, 2))
            return seat.running

    def _check_may_start(self, seat: _Seat) -> None:
        if self._closed:
            raise EngineError("the engine pool is closed", expected="an open session")
        settings = self._settings
        while seat.deaths and seat.deaths[0] < time.monotonic() - settings.restart_window_s:
            seat.deaths.popleft()
        if len(seat.deaths) > settings.restart_limit:
            raise EngineDeadError(
                f"engine {seat.start.name!r} died {len(seat.deaths)} times in {settings.restart_window_s:.0f} s",
                expected=f"at most {settings.restart_limit} restarts",
                remedy="Look at what kills it (memory is the usual cause: lower kv_cache_mib or max_running).",
            )

    def _bury(self, seat: _Seat, running: RunningEngine) -> None:
        """Note a death once, however many asks bring the news."""
        if seat.running is running:
            seat.running = None
            seat.deaths.append(time.monotonic())
            seat.keep_counts(running)
            seat.dead.append(running.engine)

    async def _close_dead(self, seat: _Seat) -> None:
        while seat.dead:
            await seat.dead.pop().close()

    def _with_adapters(self, engine: Engine, seat: _Seat) -> RunningEngine:
        def on_move(kind: Any, adapter: LoadedAdapter, cost: SwapCost) -> None:
            self._tell(
                kind,
                adapter=self._targets.name_of(adapter.id),
                id=adapter.id,
                engine=engine.name,
                seconds=round(cost.wall_s, 4),
            )

        return RunningEngine(
            engine,
            self._settings,
            seat.announced,
            on_move=on_move,
            on_use=self._on_adapter_use,
            on_abandoned=self._on_abandoned,
        )

    def _uses(self, upcoming: Upcoming) -> dict[EngineStart, dict[str, int]]:
        """Engine → adapter id → asks ahead, for the announced variants that some ask or `warm` has named before."""
        uses = self._foreseen.get(upcoming)
        if uses is None:
            uses, targets = {}, [(self._targets.known(variant), asks) for variant, asks in upcoming]
            for target, asks in reversed(targets):  # nearest first: two names of one adapter leave the nearer
                if target is not None and target.variant is not None and target.adapter is not None:
                    uses.setdefault(target.start, {})[target.variant.id] = asks
            if all(target is not None for target, _ in targets):
                if len(self._foreseen) >= FORESEEN_LIMIT:
                    self._foreseen.clear()
                self._foreseen[upcoming] = uses
        return uses

    def _tell(self, kind: EventKind, **data: Any) -> None:
        self._on_event(Event(kind=kind, data=data))


async def _one_by_one(prefetches: list[Prefetch]) -> None:
    for prefetch in prefetches:
        await prefetch()


async def _start_in_process(start: EngineStart) -> Engine:
    from .inprocess.inprocess_engine import InProcessEngine

    began_s = time.monotonic()
    engine = await InProcessEngine.start(
        start.weights, start.settings, adapters=start.adapters, dtype=start.dtype, name=start.name
    )
    note_start(start, time.monotonic() - began_s)
    return engine


async def _start_supervised(start: EngineStart) -> Engine:
    from .supervised.supervised_engine import SupervisedEngine

    began_s = time.monotonic()
    engine = await SupervisedEngine.start(
        start.weights, start.settings, adapters=start.adapters, dtype=start.dtype, name=start.name
    )
    note_start(start, time.monotonic() - began_s)
    return engine
