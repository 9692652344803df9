"""The Serve deployment of one engine half, and its running replicas."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import anyio
import anyio.to_thread

from ...agents.errors import EngineDeadError, EngineError
from ...router.placement.replica_account import ReplicaAccount
from ..engines.answer_check import check_answers
from ..engines.engine import EngineCounters
from ..engines.running_engine import RunningEngine
from ..engines.supervised.host_protocol import Begin, to_line
from ..engines.variant_targets import EngineStart
from ..settings.engine import EngineSettings
from ..settings.ray import RaySettings
from .membership import members
from .replica_engine import ReplicaEngine

__all__ = ["EngineDeployment", "LiveReplica"]

_ROUTER = f"{__package__}.request_router:AddressedRouter"


@dataclass(eq=False)
class LiveReplica:
    """One replica that answers: its engine with its slots, and the account of its asks in flight."""

    engine: ReplicaEngine
    running: RunningEngine
    account: ReplicaAccount


class EngineDeployment:
    """A deployment of one engine half in an application of its own, so that two drivers never share slots.

    `with_slots(engine)` puts slots around a new replica's engine; `emit` is called with every event.
    """

    def __init__(
        self,
        start: EngineStart,
        settings: RaySettings,
        engine_settings: EngineSettings,
        *,
        gpus: int,
        first_core: int,
        with_slots: Callable[[ReplicaEngine], LiveReplica],
        emit: Callable[..., None],
    ) -> None:
        self.start = start
        self.application = f"metier-{start.name}-{uuid4().hex[:8]}"
        self.replicas: dict[str, LiveReplica] = {}
        self.past: list[EngineCounters] = []
        self.restarts = Counter[str]()
        self.trouble = "it has not started"
        self._settings = settings
        self._engine_settings = engine_settings
        self._gpus = gpus
        self._first_core = first_core
        self._with_slots = with_slots
        self._emit = emit
        self._handle: Any = None
        self._changed = anyio.Event()
        self._known: set[str] = set()

    async def deploy(self) -> None:
        """Start all replicas and wait until each has answered; raises EngineError with the reason when one cannot."""
        began_s = time.monotonic()
        self._emit("engine_starting", engine=self.start.name, replicas=self._settings.replicas)
        timeout_s = self._engine_settings.start_timeout_s
        try:
            with anyio.fail_after(timeout_s):
                handle = await anyio.to_thread.run_sync(self._run, abandon_on_cancel=True)
                self._handle = handle
                await ReplicaEngine.anyone(handle)
                while len(self.replicas) < self._settings.replicas:
                    await self.look()
                    await anyio.sleep(self._settings.membership_every_s / 4)
        except (RuntimeError, TimeoutError) as error:
            said = str(error).strip() or f"not ready after {timeout_s:.0f} s"
            raise EngineError(
                f"the replicas of engine {self.start.name!r} do not start: {said}",
                expected=f"{self._settings.replicas} running replicas",
                remedy="Raise engine.start_timeout_s on a slow machine; otherwise look at what it says.",
            ) from error
        self._emit("engine_ready", engine=self.start.name, seconds=round(time.monotonic() - began_s, 2))

    def _run(self) -> Any:
        """Hand the deployment to Serve (in a worker thread: it waits)."""
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from .replica import EngineReplica

        settings, ours = self._engine_settings, self._settings
        begin = Begin(
            name=self.start.name,
            weights=self.start.weights,
            dtype=self.start.dtype,
            adapters=self.start.adapters,
            settings=settings,
        )
        deployment = serve.deployment(
            name=self.start.name,
            num_replicas=ours.replicas,
            ray_actor_options={"num_cpus": settings.thread_count, "num_gpus": self._gpus},
            # The bound that people set is the driver's; Serve must not keep asks back a second time.
            max_ongoing_requests=2 * settings.ask_queue_limit,
            max_constructor_retry_count=1,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            health_check_period_s=ours.health_every_s,
            health_check_timeout_s=ours.health_timeout_s,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=settings.close_timeout_s,
            request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        )(EngineReplica)
        application = deployment.bind(to_line(begin), ours.pin_cores, self._first_core)
        return serve.run(application, name=self.application, route_prefix=None)

    # --- who is there -------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Drop replicas that are gone, and add new ones; raises EngineError when one answers wrongly."""
        there = members(self.application)
        for name, replica in list(self.replicas.items()):
            if replica.engine.replica not in there:
                self.remove(name, replica, "Serve has given it up")
                replica.engine.lose()
        for replica_id in sorted(there - self._known):
            try:
                await self._meet(replica_id)
            except EngineDeadError as error:
                self.trouble = error.problem

    async def _meet(self, replica: str) -> None:
        engine = await ReplicaEngine.meet(self._handle, replica, self._settings.health_timeout_s)
        self._known.add(replica)
        timeout_s = self._engine_settings.start_timeout_s
        try:
            with anyio.fail_after(timeout_s):
                await check_answers(engine, self.start.self_check)
        except TimeoutError as error:
            problem = f"replica {replica} did not end its self-check within engine.start_timeout_s={timeout_s:g}"
            raise EngineDeadError(problem, expected="a replica that answers") from error
        before = self.replicas.get(engine.name)
        if before is not None:
            self.remove(engine.name, before, "another has its rank")
            before.engine.lose()
        self.replicas[engine.name] = self._with_slots(engine)
        if any(counters.name == engine.name for counters in self.past):
            self.restarts[engine.name] += 1
            self._emit("engine_restarted", engine=engine.name)
        self._changed.set()
        self._changed = anyio.Event()

    def remove(self, name: str, replica: LiveReplica, why: str) -> None:
        """Remove a replica that has ended, once, however many asks report it."""
        if self.replicas.get(name) is replica:
            del self.replicas[name]
            self.trouble = f"{name}: {why}"
            self.past.append(replica.running.counters())

    async def anyone(self) -> None:
        """Wait until there is a replica; raises EngineDeadError after the time one has to start."""
        timeout_s = self._engine_settings.start_timeout_s
        with anyio.move_on_after(timeout_s):
            while not self.replicas:
                await self._changed.wait()
        if not self.replicas:
            raise EngineDeadError(
                f"engine {self.start.name!r} has no replica: {self.trouble}",
                expected=f"one within engine.start_timeout_s={timeout_s:.0f}",
                remedy="Look at what ends them (memory is the usual cause), then resume the batch.",
            )

    def pids(self) -> list[int]:
        """The processes of all running replicas."""
        return [pid for replica in self.replicas.values() for pid in replica.engine.pids]

    def counters(self) -> list[EngineCounters]:
        """The counters of every replica, ended ones included."""
        return [*self.past, *(replica.running.counters() for replica in self.replicas.values())]

    async def close(self) -> None:
        """Delete the application; its replicas shut down in order."""
        from ray import serve

        for name, replica in list(self.replicas.items()):
            self.remove(name, replica, "it is closed")
        if self._handle is not None:
            await anyio.to_thread.run_sync(partial(serve.delete, self.application))
