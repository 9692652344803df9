"""One server of a fleet: its adapters in slots, its health, and the account of what is under way there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from ...agents.backend import OnText
from ...agents.errors import AskRejectedError, EngineDeadError, EngineError
from ...agents.messages import Ask, Message, Reply, add_usage
from ...router.placement.placement import PlacedAsk
from ...router.placement.replica_account import ReplicaAccount
from ..events import Event, EventKind, OnEvent
from ..settings.fleet import FleetServer, FleetSettings
from ..slots.adapter import LoadedAdapter, SwapCost
from ..slots.adapter_slots import AdapterSlots
from ..slots.slot_table import AdapterLease, SlotTable
from .circuit_breaker import CircuitBreaker
from .remote_backend import RemoteBackend, Resolve
from .server_calls import GarbledAnswerError, ServerBusyError

__all__ = ["FleetMember", "ServerCounters"]

TRIAL = "trial"
"""Run, step and role of the ask that a server has to answer before it gets others again."""

CheckBase = Callable[[RemoteBackend], None]
"""Raises EngineError for a server that has another base than the fleet."""


@dataclass
class ServerCounters:
    """What a server has done for this driver, and how often its requests failed."""

    asks: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    restarts: int = 0
    failed_asks: int = 0
    cpu_s: float = 0.0


class FleetMember:
    """A server in a fleet. It is not healthy before `join`, while its breaker is open, and while it drains.

    `resolve` finds a variant's record and folder; a server of ours moves adapters by itself and needs none.
    """

    def __init__(
        self,
        server: FleetServer,
        remote: RemoteBackend,
        settings: FleetSettings,
        check_base: CheckBase,
        resolve: Resolve | None,
        on_event: OnEvent,
    ) -> None:
        slots = server.adapter_slots or settings.adapter_slots
        self.url = remote.url
        self.remote = remote
        self.trouble = "not asked yet"
        self.counters = ServerCounters()
        self.account = ReplicaAccount(self.url, adapter_slots=slots, conversations_kept=settings.conversations_kept)
        self.account.state.healthy = False
        self._adapters = server.adapters
        self._settings = settings
        self._check_base = check_base
        self._resolve = resolve
        self._on_event = on_event
        self._breaker = CircuitBreaker(failures=settings.failures_to_open, open_s=settings.open_s)
        self._joined = self._draining = self._stopping = False
        self._asking: set[anyio.CancelScope] = set()
        self._trial = anyio.CancelScope()
        self._idle = anyio.Event()
        self._names: dict[str, str] = {}
        self._slots = AdapterSlots(SlotTable(slots), load=self._load, unload=self._unload, on_move=self._moved)

    # --- health -------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Learn what the server is and serves.

        Raises: EngineDeadError when it does not answer in time, EngineError when it is no server of models.
        """
        try:
            with anyio.fail_after(self._settings.load_timeout_s):
                await self.remote.look()
        except TimeoutError as error:
            problem = f"{self.url} does not say what it serves within {self._settings.load_timeout_s:g} s"
            raise EngineDeadError(problem, expected="a running server") from error

    def join(self) -> None:
        """Take asks from now on; raises EngineError when the server has another base than the fleet.

        A trial still under way is cancelled: with asks under way there, its health has to be checked.
        """
        self._check_base(self.remote)
        self._trial.cancel()
        self._joined, self.trouble = True, ""
        self._breaker.succeeded()
        self._refresh()

    async def watch(self) -> None:
        """Check the server's health in a loop that never ends."""
        while True:
            await anyio.sleep(self._settings.health_every_s)
            await self.look_after()

    async def look_after(self) -> None:
        """Check the server's health once, unless its breaker is open; raises nothing."""
        if not self._breaker.closed and not self._breaker.trial_due:
            return
        try:
            self._stopping = not await self.remote.ready(self._settings.health_timeout_s)
            if not self._joined:
                self.remote.forget()
                self.account.forget()
                with anyio.CancelScope() as self._trial:
                    await self.look()
                    await self._try_out()
                if not self._trial.cancelled_caught:
                    self.join()
                    self._emit("server_back", server=self.url)
        except EngineError as error:
            self.failed(error, whole=True)
        self._refresh()

    async def _try_out(self) -> None:
        """Have the base say one token: the health of a server whose engine hangs may still be good.

        To be refused, or told to wait, is an answer too.
        Raises: EngineDeadError when nothing comes in time, and what else `RemoteBackend.reply` raises.
        """
        timeout_s = self._settings.load_timeout_s
        messages = (Message(role="user", content="Hello"),)
        try:
            with anyio.fail_after(timeout_s):
                await self.remote.reply(Ask(run_id=TRIAL, step_path=TRIAL, role=TRIAL, messages=messages, max_tokens=1))
        except (AskRejectedError, ServerBusyError):
            return
        except TimeoutError as error:
            problem = f"{self.url} does not say one token within fleet.load_timeout_s={timeout_s:g}"
            raise EngineDeadError(problem, expected="an engine that computes") from error

    def failed(self, error: EngineError, *, whole: bool = False) -> None:
        """Record a failure; after one of the `whole` server with its breaker open, asks under way are cancelled."""
        self.trouble = error.problem
        if self._breaker.failed() and self._joined:
            self.lose(error)
        if whole and not self._breaker.closed:
            for scope in self._asking:
                scope.cancel()

    def lose(self, error: EngineError) -> None:
        """Send nothing there until it has joined again."""
        self._joined = False
        self.trouble = error.problem
        self._refresh()
        self.counters.restarts += 1
        self._emit("server_lost", server=self.url, reason=error.problem)

    async def drain(self) -> None:
        """Take no more asks, and wait for those under way."""
        self._draining = True
        self._refresh()
        while self._asking:
            self._idle = anyio.Event()
            await self._idle.wait()

    def admit(self) -> None:
        """Take asks again after `drain`."""
        self._draining = False
        self._refresh()

    def _refresh(self) -> None:
        draining = self._draining or self._stopping
        if self._joined:
            self.trouble = "takes no more asks" if draining else ""
        self.account.state.healthy = self._joined and not draining

    # --- asks ---------------------------------------------------------------------------------------------

    def may_hold(self, variant: str | None, adapter: str | None) -> bool:
        """Whether the settings let a variant's adapter go there, by its name or content id."""
        return self._adapters is None or adapter is None or not self._adapters.isdisjoint({variant, adapter})

    async def ask(self, ask: Ask, placed: PlacedAsk, on_text: OnText | None) -> Reply:
        """Have an ask answered there, its adapter in a slot.

        Raises: what `RemoteBackend.reply` raises; EngineDeadError also when its health says so meanwhile.
        """
        with anyio.CancelScope() as scope:
            self._asking.add(scope)
            try:
                with self.account.answering(placed):
                    reply = await self._reply(ask, on_text)
            except (EngineDeadError, GarbledAnswerError):
                self.counters.failed_asks += 1
                raise
            finally:
                self._asking.discard(scope)
                if not self._asking:
                    self._idle.set()
            if self._joined:
                self._breaker.succeeded()
            self.counters.asks += 1
            self.counters.prefill_tokens += reply.usage.prefilled_tokens
            self.counters.decode_tokens += max(reply.usage.output_tokens - 1, 0)
            self.counters.cpu_s += reply.usage.cpu_s
            return reply
        self.counters.failed_asks += 1
        raise EngineDeadError(f"{self.url} stopped being well: {self.trouble}", expected="a server that is well")

    async def _reply(self, ask: Ask, on_text: OnText | None) -> Reply:
        began_s = time.monotonic()
        async with self._lease(ask.variant) as lease:
            if lease is None:
                return await self.remote.reply(ask, on_text=on_text)
            wait_s = max(time.monotonic() - began_s - lease.swap_s, 0.0)
            reply = await self.remote.reply(ask, on_text=on_text)
            usage = add_usage(reply.usage, queue_s=wait_s, slot_wait_s=wait_s, swaps=lease.swaps, swap_s=lease.swap_s)
            return reply.model_copy(update={"usage": usage})

    # --- adapters -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _lease(self, name: str | None) -> AsyncIterator[AdapterLease | None]:
        """Hold the adapter that a variant has in a slot of a server that does not move adapters by itself."""
        if name is None or self.remote.ours or self._resolve is None:
            yield None
            return
        variant, folder = self._resolve(name)
        if variant.ask.adapter is None:
            yield None
            return
        await self.remote.check(name)
        self._names[variant.id] = name
        async with self._slots.use(variant.id, folder / "adapter") as lease:
            yield lease

    async def _load(self, adapter: LoadedAdapter) -> SwapCost:
        return await self._bounded(adapter, "load", self.remote.warm([self._names[adapter.id]]))

    async def _unload(self, adapter: LoadedAdapter) -> SwapCost:
        return await self._bounded(adapter, "unload", self.remote.unload(adapter.id))

    async def _bounded(self, adapter: LoadedAdapter, verb: str, call: Coroutine[Any, Any, None]) -> SwapCost:
        began_s = time.monotonic()
        try:
            with anyio.fail_after(self._settings.load_timeout_s):
                await call
        except TimeoutError as error:
            raise EngineDeadError(
                f"{self.url} did not {verb} adapter {adapter.id} within {self._settings.load_timeout_s:g} s",
                expected="an answer",
                remedy="Raise fleet.load_timeout_s if the disk is slow.",
            ) from error
        return SwapCost(time.monotonic() - began_s)

    def _moved(self, kind: Any, adapter: LoadedAdapter, cost: SwapCost) -> None:
        self.counters.adapter_loads += kind == "adapter_loaded"
        self.counters.adapter_evictions += kind == "adapter_evicted"
        name = self._names.get(adapter.id, adapter.id)
        self._emit(kind, adapter=name, id=adapter.id, engine=self.url, seconds=round(cost.wall_s, 4))

    def _emit(self, kind: EventKind, **data: Any) -> None:
        self._on_event(Event(kind=kind, data=data))
