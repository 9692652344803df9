"""The Ray to run on: one started on this machine, or an existing cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from ...agents.errors import EngineDeadError, EngineError
from ..settings.ray import RaySettings

__all__ = ["import_ray", "open_ray"]

_QUIET = {
    # Nothing leaves the machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Engines have their memory set explicitly; Ray would kill workers when others fill the machine.
    "RAY_memory_monitor_refresh_ms": "0",
    # A replica without GPUs keeps the environment it is given.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


def import_ray() -> Any:
    """Ray with Serve; raises EngineError with the command where it is not installed."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    try:
        import ray
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"engine 'ray' needs Ray Serve: {error}",
            expected="the extra `ray`",
            remedy="Install it with `pip install 'metier[ray]'`, or `EXTRA=ray make install` in a checkout.",
        ) from error
    return ray


@asynccontextmanager
async def open_ray(settings: RaySettings, *, cores: int) -> AsyncGenerator[Any]:
    """Start Ray with `cores`, or join a cluster; end or leave it at the end. Serve's controller runs without a proxy.

    A program that has called `ray.init` itself keeps its own.

    Raises: EngineError when Ray is not installed, EngineDeadError when the address does not answer in time.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        await _connect(ray, settings, cores)
    try:
        await anyio.to_thread.run_sync(_start_serve)
        yield ray
    finally:
        if ours:
            # Serve's controller stays on a cluster, where others may have applications, and ends with a Ray of our own;
            # `serve.shutdown` would have Ray print of tasks that it retries.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(ray.shutdown)


async def _connect(ray: Any, settings: RaySettings, cores: int) -> None:
    common = {"logging_level": logging.CRITICAL, "log_to_driver": False, "namespace": "metier"}
    if settings.address is None:
        # Straight to its own small cluster, whatever RAY_ADDRESS says.
        how = {
            "address": "local",
            "num_cpus": cores,
            "include_dashboard": False,
            "object_store_memory": settings.object_store_mib << 20,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        how = {"address": settings.address}
        await _check_answers(settings)
    try:
        with anyio.fail_after(settings.connect_timeout_s if settings.address else None):
            # In a thread of its own: it blocks, and a signal handler of Ray's would take Ctrl-C from the program.
            await anyio.to_thread.run_sync(partial(ray.init, **how, **common), abandon_on_cancel=True)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unreachable(settings, str(error) or "no answer in time") from error


async def _check_answers(settings: RaySettings) -> None:
    """Whether the address accepts connections: Ray itself would end the process after a minute."""
    assert settings.address is not None
    if settings.address == "auto":
        return
    host, _, port = settings.address.rpartition(":")
    try:
        with anyio.fail_after(settings.connect_timeout_s):
            await (await anyio.connect_tcp(host, int(port))).aclose()
    except (OSError, OverflowError, TimeoutError) as error:
        raise _unreachable(settings, str(error) or "no answer in time") from error


def _unreachable(settings: RaySettings, problem: str) -> EngineDeadError:
    where = "Ray does not start" if settings.address is None else f"no Ray cluster at {settings.address!r}"
    return EngineDeadError(
        f"{where}: {problem}",
        expected=f"an answer within ray.connect_timeout_s={settings.connect_timeout_s:g}",
        remedy="Start one with `ray start --head`, or leave ray.address out: a Ray of our own is started then.",
    )


def _start_serve() -> None:
    from ray import serve

    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
