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
from ..closing import AsyncClosing
from ..events import Event, EventKind, OnEvent
from ..settings.engine import EngineSettings
from ..slots.adapter import LoadedAdapter, SwapCost
from ..slots.adapter_slots import OnAdapterUse
from ..slots.announced_uses import AnnouncedUses
from .answer_check import check_answers
from .engine import Engine, EngineCounters, OnAbandoned
from .engine_totals import added_up
from .running_engine import RunningEngine
from .start_times import note_start, start_note
from .variant_targets import EngineStart, Resolve, VariantTargets

__all__ = ["EnginePool", "Resolve", "StartEngine"]

StartEngine = Callable[[EngineStart], Awaitable[Engine]]

FORESEEN_LIMIT = 10_000
"""Announcements whose targets are kept in memory; graphs have a few dozen."""


@dataclass(eq=False)
class _PoolEntry:
    """One engine half: its running engine, and the counters of those that died."""

    start: EngineStart
    room: anyio.Semaphore
    changing: anyio.Lock = field(default_factory=anyio.Lock)
    announced: AnnouncedUses = field(default_factory=AnnouncedUses)
    running: RunningEngine | None = None
    died_s: deque[float] = field(default_factory=deque)
    died_of: str = ""
    past: list[EngineCounters] = field(default_factory=list)
    dead: list[Engine] = field(default_factory=list)
    restarts: int = 0
    past_prefetches: int = 0

    def keep_counts(self, running: RunningEngine) -> None:
        """Keep the counters of an engine that no longer runs."""
        self.past.append(running.counters())
        self.past_prefetches += running.prefetches


class EnginePool(AsyncClosing):
    """The engines of a session. Start it with `async with`; engines start when first asked, or by `warm`.

    `base` is the base checkpoint's folder; `resolve` turns a variant's name or content id into its record and
    folder. `supervised` engines live in processes of their own: one that dies is started again and the asks
    it was working on are asked again, adapters included. `adapters` names the checkpoints (`base`, or content ids)
    that variants in use have adapters on, or is True for all and False for none: the engines of the others start
    without LoRA layers, which is faster. Every engine has a key-value cache of its own.

    `on_abandoned(ask, usage)` is called with the usage of asks that got no reply (cancelled, failed, or asked
    again after an engine died); it may be called more than once for an ask, and the amounts add up.

    `foresee` and `forget` (see `ForeseeingBackend`) announce to the slots which adapters the runs will use next.
    `on_adapter_use` is called when asks pin and release an adapter.
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
        self._entries: dict[EngineStart, _PoolEntry] = {}
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
        entry = self._entry(target.start)
        streamed = None if on_text is None else ResumedText(on_text)
        began_s = time.monotonic()
        async with entry.room:
            waited_s = time.monotonic() - began_s
            while True:
                running = await self._running(entry)
                try:
                    return await running.ask(target, ask, streamed, waited_s)
                except EngineDeadError as death:
                    self._mark_dead(entry, running, death)
                    if streamed is not None:
                        streamed.restart()

    async def check(self, variants: Iterable[str | None] = (None,)) -> None:
        """Check that these variants can be served, and start nothing.

        Raises: UnknownVariantError, AdapterError and BaseModelError for one that cannot.
        """
        for name in variants:
            await self._targets.find(name)

    async def warm(self, variants: Iterable[str | None] = (None,)) -> None:
        """Check these variants, then start their engines: no engine starts where one cannot be served."""
        targets = [await self._targets.find(name) for name in variants]
        for target in targets:
            await self._running(self._entry(target.start))

    def foresee(self, run_id: str, upcoming: Upcoming) -> Prefetch | None:
        """See `ForeseeingBackend.foresee`: passes to each engine's slots how soon the run may need which adapter."""
        if not self._settings.foresight:
            return None
        uses = self._uses(upcoming)
        due = []
        for start, entry in self._entries.items():
            entry.announced.announce(run_id, uses.get(start, {}))
            prefetch = None if entry.running is None else entry.running.foresee(self._targets.adapter_paths)
            if prefetch is not None:
                due.append(prefetch)
        if len(due) < 2:
            return due[0] if due else None
        return partial(_one_by_one, due)

    def forget(self, run_id: str) -> None:
        """See `ForeseeingBackend.forget`."""
        self.foresee(run_id, ())

    def counters(self) -> list[EngineCounters]:
        """The counters of every engine, including engines that have died."""
        return [
            counters
            for entry in self._entries.values()
            for counters in (*entry.past, *([entry.running.counters()] if entry.running else []))
        ]

    def totals(self) -> dict[str, dict[str, Any]]:
        """Engine name → its counters added up over restarts, for reports and the store.

        `cpu_s` is the engine's whole CPU time; replies' `cpu_s`, `abandoned_cpu_s` (per role) and
        `overhead_cpu_s` add up to it. Of the `adapter_loads`, so many were `adapter_prefetches`. `computes` says in
        which number type and why.
        """
        totals = added_up(self.counters())
        for entry in self._entries.values():
            if entry.start.name in totals:
                total = totals[entry.start.name]
                total["computes"] = entry.start.computes
                total["restarts"] += entry.restarts
                total["adapter_prefetches"] += entry.past_prefetches
                total["adapter_prefetches"] += 0 if entry.running is None else entry.running.prefetches
        return totals

    def checkpoint_totals(self) -> dict[str, dict[str, Any]]:
        """As `totals`, by checkpoint: "base", or the id of the variant whose weights they are."""
        totals = self.totals()
        named = {entry.start.name: entry.start.checkpoint for entry in self._entries.values()}
        return {named[name]: row for name, row in totals.items()}

    async def close(self) -> None:
        """Close every engine; asks still under way fail. Closing twice is harmless."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            for entry in self._entries.values():
                await self._close_dead(entry)
                if entry.running is not None:
                    running, entry.running = entry.running, None
                    await running.engine.close()
                    entry.keep_counts(running)

    # -- engines -----------------------------------------------------------------------------------------

    def _entry(self, start: EngineStart) -> _PoolEntry:
        entry = self._entries.get(start)
        if entry is None:
            entry = self._entries[start] = _PoolEntry(start, anyio.Semaphore(self._settings.ask_queue_limit))
        return entry

    async def _running(self, entry: _PoolEntry) -> RunningEngine:
        """The engine of an entry, started or restarted where there is none."""
        if entry.running is not None:
            return entry.running
        async with entry.changing:
            if entry.running is None:
                await self._close_dead(entry)
                began_s = time.monotonic()
                note = f"{entry.start.computes}; {start_note(entry.start)}"
                self._emit("engine_starting", engine=entry.start.name, note=note)
                engine = await self._start_checked(entry)
                entry.running = self._with_adapters(engine, entry)
                kind: EventKind = "engine_restarted" if entry.past else "engine_ready"
                entry.restarts += bool(entry.past)
                self._emit(kind, engine=entry.start.name, seconds=round(time.monotonic() - began_s, 2))
            return entry.running

    async def _start_checked(self, entry: _PoolEntry) -> Engine:
        """A new engine that has passed its self-check; one that dies or hangs in it is restarted as any other."""
        while True:
            self._check_may_start(entry)
            engine: Engine = await self._start_engine(entry.start)
            try:
                await check_answers(engine, entry.start.self_check)
            except EngineDeadError as death:
                entry.died_s.append(time.monotonic())
                entry.died_of = death.problem
                entry.past.append(engine.counters())
            else:
                return engine

    def _check_may_start(self, entry: _PoolEntry) -> None:
        if self._closed:
            raise EngineError("the engine pool is closed", expected="an open session")
        settings = self._settings
        while entry.died_s and entry.died_s[0] < time.monotonic() - settings.restart_window_s:
            entry.died_s.popleft()
        if len(entry.died_s) > settings.restart_limit:
            raise EngineDeadError(
                f"engine {entry.start.name!r} died {len(entry.died_s)} times in {settings.restart_window_s:.0f} s, "
                f"the last time: {entry.died_of}",
                expected=f"at most {settings.restart_limit} restarts",
                remedy="Look at what kills it (memory is the usual cause: lower kv_cache_mib or max_running).",
            )

    def _mark_dead(self, entry: _PoolEntry, running: RunningEngine, death: EngineDeadError) -> None:
        """Record that an engine died, once, however many asks report it."""
        if entry.running is running:
            entry.running = None
            entry.died_s.append(time.monotonic())
            entry.died_of = death.problem
            entry.keep_counts(running)
            entry.dead.append(running.engine)

    async def _close_dead(self, entry: _PoolEntry) -> None:
        while entry.dead:
            await entry.dead.pop().close()

    def _with_adapters(self, engine: Engine, entry: _PoolEntry) -> RunningEngine:
        def on_move(kind: Any, adapter: LoadedAdapter, cost: SwapCost) -> None:
            self._emit(
                kind,
                adapter=self._targets.name_of(adapter.id),
                id=adapter.id,
                engine=engine.name,
                seconds=round(cost.wall_s, 4),
            )

        return RunningEngine(
            engine,
            self._settings,
            entry.announced,
            on_move=on_move,
            on_use=self._on_adapter_use,
            on_abandoned=self._on_abandoned,
        )

    def _uses(self, upcoming: Upcoming) -> dict[EngineStart, dict[str, int]]:
        """Engine → adapter id → asks ahead, for the announced variants that some ask or `warm` has named before."""
        uses = self._foreseen.get(upcoming)
        if uses is None:
            uses, targets = {}, [(self._targets.known(variant), asks) for variant, asks in upcoming]
            for target, asks in reversed(targets):  # nearest first: of two names of one adapter the nearer stays
                if target is not None and target.variant is not None and target.adapter is not None:
                    uses.setdefault(target.start, {})[target.variant.id] = asks
            if all(target is not None for target, _ in targets):
                if len(self._foreseen) >= FORESEEN_LIMIT:
                    self._foreseen.clear()
                self._foreseen[upcoming] = uses
        return uses

    def _emit(self, kind: EventKind, **data: Any) -> None:
        self._on_event(Event(kind=kind, data=data))


async def _one_by_one(prefetches: list[Prefetch]) -> None:
    for prefetch in prefetches:
        await prefetch()


async def _start_in_process(start: EngineStart) -> Engine:
    from .inprocess.inprocess_engine import InProcessEngine

    return await _start_timed(InProcessEngine.start, start)


async def _start_supervised(start: EngineStart) -> Engine:
    from .supervised.supervised_engine import SupervisedEngine

    return await _start_timed(SupervisedEngine.start, start)


async def _start_timed(start_engine: Callable[..., Awaitable[Engine]], start: EngineStart) -> Engine:
    began_s = time.monotonic()
    engine = await start_engine(
        start.weights, start.settings, adapters=start.adapters, dtype=start.dtype, name=start.name
    )
    note_start(start, time.monotonic() - began_s)
    return engine
