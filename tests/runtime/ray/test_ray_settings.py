"""Ray as a setting: what is said before anything of Ray starts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from metier.agents.errors import EngineDeadError, EngineError, SettingsError
from metier.runtime import open_session
from metier.runtime.ray.resources import Available, ReplicaNeed, check_resources, free_mib, weights_mib
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.settings.session import load_settings

HERE = Available("this machine", cores=2, memory_mib=8000)


def need(
    name: str = "base", replicas: int = 2, cores: int = 1, gpus: int = 0, kv_cache_mib: float = 512
) -> ReplicaNeed:
    return ReplicaNeed(name, replicas, cores, weights_mib=260, kv_cache_mib=kv_cache_mib, overhead_mib=1800, gpus=gpus)


def test_what_fits_is_let_through_and_what_does_not_is_said_with_its_numbers() -> None:
    check_resources([need()], HERE)
    with pytest.raises(EngineError, match="3 replicas .* want 3 cores, and this machine has 2") as cores:
        check_resources([need(replicas=3)], HERE)
    assert "ray.replicas" in cores.value.remedy
    with pytest.raises(EngineError, match=r"want 8312 MiB, and this machine has 8000 MiB free .*2 × \(260 weights"):
        check_resources([need(kv_cache_mib=2096)], HERE)
    with pytest.raises(EngineError, match="4 replicas .*2 of 'base', 2 of 'pruned'.* want 4 cores"):
        check_resources([need(), need("pruned")], HERE)
    with pytest.raises(EngineError, match="want 4 GPUs, and this machine has 0"):
        check_resources([need(gpus=2)], HERE)


def test_on_gpus_weights_and_cache_take_nothing_of_the_machines_memory() -> None:
    check_resources([need(gpus=1, kv_cache_mib=80_000)], Available("a cluster", cores=8, memory_mib=4000, gpus=2))


def test_memory_and_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    assert weights_mib(tmp_path) == 3
    assert free_mib() > 1


def test_addresses_are_checked_when_they_are_read() -> None:
    assert load_settings(overrides={"ray.address": "10.0.0.7:6379"}).ray.address == "10.0.0.7:6379"
    with pytest.raises(SettingsError, match=r"ray\.address"):
        load_settings(overrides={"ray.address": "ray://10.0.0.7:10001"})


def test_several_devices_need_processes_of_their_own() -> None:
    assert EngineSettings().one_process
    assert not EngineSettings(tensor_parallel=2).one_process
    assert not EngineSettings(data_parallel=2).one_process


async def opened(base: Path, **overrides: object) -> None:
    settings = load_settings(overrides={name.replace("__", "."): value for name, value in overrides.items()})
    async with open_session(base=base, engine="ray", store=":memory:", settings=settings):
        raise AssertionError("it has opened")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_more_replicas_than_cores_are_refused_before_ray_starts(tiny_base: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match="want 4096 cores, and this machine has"):
        await opened(tiny_base, ray__replicas=4096, engine__kv_cache_mib=64)
    with pytest.raises(EngineError, match="MiB, and this machine has .* MiB free"):
        await opened(tiny_base, ray__replicas=1, engine__kv_cache_mib=1 << 30)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_address_where_nobody_listens_is_said(tiny_base: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineDeadError, match=f"no Ray cluster at '127.0.0.1:{port}'"):
        await opened(tiny_base, ray__address=f"127.0.0.1:{port}")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_without_ray_the_error_has_the_command(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match="needs Ray Serve") as error:
        await opened(tiny_base)
    assert "pip install 'metier[ray]'" in error.value.remedy


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_is_refused(tiny_base: Path) -> None:
    with pytest.raises(EngineError, match="another event loop than asyncio's"):
        await opened(tiny_base)
