"""Engines on Ray Serve as one backend: replicas of each engine half, chosen by predicted finish."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import anyio

from ...agents.backend import OnText, ResumedText
from ...agents.errors import EngineDeadError, EngineError
from ...agents.messages import Ask, Reply
from ...router.placement.placement import place
from ...router.placement.replica_account import ReplicaAccount
from ...router.placement.token_estimates import TokenEstimates
from ...specializers.machine.threads import usable_cores
from ..closing import AsyncClosing, BackgroundTasks
from ..engines.engine import OnAbandoned
from ..engines.engine_totals import added_up
from ..engines.running_engine import RunningEngine
from ..engines.variant_targets import EngineStart, Resolve, VariantTarget, VariantTargets
from ..events import Event, EventKind, OnEvent
from ..settings.engine import EngineSettings
from ..settings.ray import RaySettings
from ..slots.announced_uses import AnnouncedUses
from .cluster import import_ray, open_ray
from .deployment import EngineDeployment, LiveReplica
from .replica_engine import ReplicaEngine
from .resources import Available, ReplicaNeed, check_resources, free_mib, weights_mib

__all__ = ["RayBackend"]


class RayBackend(AsyncClosing):
    """A backend on Ray Serve. Start it with `async with`, on asyncio; Ray starts at the first ask, or by `warm`.

    Every engine half has a deployment, and every ask goes to the replica that `place` chooses from this driver's own
    account. Adapters are moved within each replica's slots by the driver too, so that none is taken out while an
    ask uses it. An ask that failed because its replica died is asked again on another; Serve starts a new one in its
    place. The reply says where it was placed and why.

    `base`, `resolve`, `adapters` and `on_abandoned` are those of `EnginePool`. On a cluster every node has to see the
    same folders.
    """

    def __init__(
        self,
        base: Path,
        resolve: Resolve,
        settings: RaySettings | None = None,
        engine_settings: EngineSettings | None = None,
        *,
        adapters: bool | Collection[str] = True,
        on_event: OnEvent | None = None,
        on_abandoned: OnAbandoned | None = None,
    ) -> None:
        self._settings = settings or RaySettings()
        given = engine_settings or EngineSettings()
        cores = usable_cores()
        threads = given.threads or max(cores // self._settings.replicas, 1)
        self._cores = cores
        # Which run uses what next is known here, but not which replica will get it: slots go by use.
        self._engine_settings = given.model_copy(update={"threads": threads, "foresight": False})
        self._targets = VariantTargets(base, resolve, self._engine_settings, adapters)
        self._on_event = on_event or (lambda event: None)
        self._on_abandoned = on_abandoned
        self._deployments: dict[EngineStart, EngineDeployment] = {}
        self._ready: set[EngineStart] = set()
        self._starting = anyio.Lock()
        self._room = anyio.Semaphore(self._engine_settings.ask_queue_limit * self._settings.replicas)
        self._estimates = TokenEstimates()
        self._stack = AsyncExitStack()
        self._ray: Any = None
        self._tasks = BackgroundTasks()
        self._closed = self._closed_down = False

    async def __aenter__(self) -> Self:
        try:
            asyncio.get_running_loop()
        except RuntimeError as error:
            raise EngineError(
                "engine 'ray' under another event loop than asyncio's",
                expected="asyncio, which Ray is written for",
                remedy="Run with anyio's asyncio backend, or another engine.",
            ) from error
        import_ray()
        await self._tasks.open()
        return self

    async def close(self) -> None:
        """End every replica, and Ray if it was started here; closing twice is harmless."""
        self._closed = True
        try:
            await self._tasks.close()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end()

    async def _end(self) -> None:
        deployments, self._closed_down = ([] if self._closed_down else list(self._deployments.values())), True
        pids = [pid for deployment in deployments for pid in deployment.pids()]
        for deployment in deployments:
            await deployment.close()
        await self._stack.aclose()
        if self._settings.address is None:
            with anyio.move_on_after(self._engine_settings.close_timeout_s):
                while any(os.path.exists(f"/proc/{pid}") for pid in pids):  # noqa: ASYNC110, ASYNC240
                    await anyio.sleep(0.05)

    async def warm(self, variants: Iterable[str | None] = (None,)) -> None:
        """Check what these variants are made of, and whether their replicas fit; then start them.

        Raises: as `reply`; EngineError when cores or memory do not suffice, EngineDeadError when no cluster answers.
        """
        targets = [await self._targets.find(name) for name in variants]
        await self._start([target.start for target in targets])

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`: the ask's variant decides the deployment, placement the replica.

        Raises: UnknownVariantError, AdapterError, AskRejectedError, EngineError; EngineDeadError when `tries` replicas
        have died with the ask, or none comes up.
        """
        target = await self._targets.find(ask.variant)
        if ask.thinking is None and target.variant is not None and target.variant.ask.thinking is not None:
            ask = ask.model_copy(update={"thinking": target.variant.ask.thinking})
        target.check_layout(ask)
        if target.start not in self._ready:
            await self._start([target.start])
        began_s = time.monotonic()
        async with self._room:
            return await self._ask(target, ask, on_text, began_s)

    async def _ask(self, target: VariantTarget, ask: Ask, on_text: OnText | None, began_s: float) -> Reply:
        deployment = self._deployments[target.start]
        adapter = None if target.adapter is None or target.variant is None else target.variant.id
        placed = self._estimates.placed(ask, adapter)
        streamed = None if on_text is None else ResumedText(on_text)
        before = ""
        for _ in range(self._settings.tries):
            await deployment.anyone()
            states = [replica.account.state for replica in deployment.replicas.values()]
            placement = place(placed, states, self._settings.costs)
            replica = deployment.replicas[placement.replica]
            waited_s = time.monotonic() - began_s
            try:
                with replica.account.answering(placed):
                    reply = await replica.running.ask(target, ask, streamed, waited_s)
            except EngineDeadError as error:
                deployment.remove(placement.replica, replica, error.problem)
                before = f"{placement.replica} failed; "
                if streamed is not None:
                    streamed.restart()
            else:
                self._estimates.note(ask, reply.usage)
                return reply.model_copy(update={"placement": before + placement.reason})
        raise EngineDeadError(
            f"ask {ask.id!r} failed at {self._settings.tries} replicas, the last time: {deployment.trouble}",
            expected=f"an answer within ray.tries={self._settings.tries}",
            remedy="Look at what ends the replicas; what was recorded is kept for a resume.",
        )

    def totals(self) -> dict[str, dict[str, Any]]:
        """Engine and rank → its counters added up over restarts (see `EnginePool.totals`)."""
        totals: dict[str, dict[str, Any]] = {}
        for deployment in self._deployments.values():
            totals |= added_up(deployment.counters())
            for name, restarts in deployment.restarts.items():
                totals[name] |= {"restarts": totals[name]["restarts"] + restarts, "computes": deployment.start.computes}
        return totals

    def replicas(self) -> dict[str, tuple[int, ...]]:
        """Engine and rank → the processes that hold the replica now, Ray's worker first."""
        replicas = [item for deployment in self._deployments.values() for item in deployment.replicas.items()]
        return {name: replica.engine.pids for name, replica in replicas}

    # --- starting -----------------------------------------------------------------------------------------

    async def _start(self, starts: Iterable[EngineStart]) -> None:
        async with self._starting:
            new = [start for start in dict.fromkeys(starts) if start not in self._ready]
            if not new:
                return
            if self._closed or not self._tasks.running:
                raise EngineError("the Ray backend is closed", expected="an open session")
            if self._ray is None:
                if self._settings.address is None:
                    self._check([*self._ready, *new], Available("this machine", self._cores, free_mib()))
                self._ray = await self._stack.enter_async_context(open_ray(self._settings, cores=self._cores))
                self._tasks.start(self._watch)
            if self._settings.address is not None:
                self._check(new, self._cluster())
            for start in new:
                await self._deploy(start)

    async def _deploy(self, start: EngineStart) -> None:
        threads, replicas = self._engine_settings.thread_count, self._settings.replicas
        deployment = EngineDeployment(
            start,
            self._settings,
            start.settings,
            gpus=self._gpus(),
            first_core=len(self._deployments) * replicas * threads,
            with_slots=self._with_slots,
            emit=self._emit,
        )
        self._deployments[start] = deployment
        await deployment.deploy()
        self._ready.add(start)

    def _with_slots(self, engine: ReplicaEngine) -> LiveReplica:
        settings = self._engine_settings

        def on_move(kind: Any, adapter: Any, cost: Any) -> None:
            name = self._targets.name_of(adapter.id)
            self._emit(kind, adapter=name, id=adapter.id, engine=engine.name, seconds=round(cost.wall_s, 4))

        return LiveReplica(
            engine,
            RunningEngine(engine, settings, AnnouncedUses(), on_move=on_move, on_abandoned=self._on_abandoned),
            ReplicaAccount(
                engine.name,
                adapter_slots=settings.adapter_slots,
                conversations_kept=self._settings.conversations_kept,
            ),
        )

    async def _watch(self) -> None:
        """Poll membership in a loop that never ends: Serve offers nothing to await."""
        while True:
            await anyio.sleep(self._settings.membership_every_s)
            for start in list(self._ready):
                deployment = self._deployments[start]
                try:
                    await deployment.look()
                except EngineError as error:  # of a replica that answers wrongly; the others go on
                    deployment.trouble = error.problem

    def _check(self, starts: Iterable[EngineStart], available: Available) -> None:
        settings = self._engine_settings
        check_resources(
            [
                ReplicaNeed(
                    start.name,
                    self._settings.replicas,
                    settings.thread_count,
                    weights_mib(start.weights),
                    settings.kv_cache_mib,
                    self._settings.overhead_mib,
                    self._gpus(),
                )
                for start in starts
            ],
            available,
        )

    def _gpus(self) -> int:
        """GPUs of each replica, none where there are none."""
        wanted = self._engine_settings.tensor_parallel * self._engine_settings.data_parallel
        there = self._ray.cluster_resources().get("GPU", 0) if self._ray is not None else 0
        return wanted if there or wanted > 1 else 0

    def _cluster(self) -> Available:
        free = self._ray.available_resources()
        return Available(
            f"the cluster at {self._settings.address}",
            free.get("CPU", 0),
            free.get("memory", 0) / 2**20,
            free.get("GPU", 0),
        )

    def _emit(self, kind: EventKind, **data: Any) -> None:
        self._on_event(Event(kind=kind, data=data))
