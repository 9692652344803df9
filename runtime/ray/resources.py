"""Whether cores and memory suffice for the replicas asked for, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...agents.errors import EngineError

__all__ = ["Available", "ReplicaNeed", "check_resources", "free_mib", "weights_mib"]


@dataclass(frozen=True)
class Available:
    """What is available: cores, GPUs, and memory in MiB; `where` names the machine or cluster."""

    where: str
    cores: float
    memory_mib: float
    gpus: float = 0


@dataclass(frozen=True)
class ReplicaNeed:
    """What each replica of one engine takes: cores, GPUs, and memory in MiB."""

    engine: str
    replicas: int
    cores: int
    weights_mib: float
    kv_cache_mib: float
    overhead_mib: float
    gpus: int = 0


def check_resources(needs: Sequence[ReplicaNeed], available: Available) -> None:
    """Add up what all replicas need; weights and caches on GPUs are not the machine's memory.

    Raises: EngineError that says what is missing, how much, and what would fit.
    """
    cores = sum(need.replicas * need.cores for need in needs)
    gpus = sum(need.replicas * need.gpus for need in needs)
    memory = sum(need.replicas * _memory_mib(need) for need in needs)
    total = sum(need.replicas for need in needs)
    engines = ", ".join(f"{need.replicas} of {need.engine!r}" for need in needs)
    if cores > available.cores:
        raise EngineError(
            f"{total} replicas ({engines}) want {cores} cores, and {available.where} has {available.cores:g}",
            expected=f"at most {available.cores:g} cores for all replicas together",
            remedy="Lower ray.replicas or engine.threads, or join a larger cluster with ray.address.",
        )
    if gpus > available.gpus:
        raise EngineError(
            f"{total} replicas ({engines}) want {gpus} GPUs, and {available.where} has {available.gpus:g}",
            expected=f"at most {available.gpus:g} GPUs for all replicas together",
            remedy="Lower ray.replicas, engine.tensor_parallel or engine.data_parallel.",
        )
    if memory > available.memory_mib:
        each = "; ".join(
            f"{need.engine!r}: {need.replicas} × ({need.weights_mib:.0f} weights + {need.kv_cache_mib:.0f} KV cache "
            f"+ {need.overhead_mib:.0f} overhead)"
            for need in needs
        )
        raise EngineError(
            f"{total} replicas want {memory:.0f} MiB, and {available.where} has {available.memory_mib:.0f} MiB free "
            f"({each})",
            expected=f"at most {available.memory_mib:.0f} MiB for all replicas together",
            remedy="Lower ray.replicas or engine.kv_cache_mib.",
        )


def free_mib() -> float:
    """Memory that this machine, or the control group this process is in, has free."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), 0.0)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, (int(limit) - used) / 2**20)


def weights_mib(folder: Path) -> float:
    """Size of a checkpoint's tensors."""
    return sum(os.path.getsize(file) for file in folder.glob("*.safetensors")) / 2**20


def _memory_mib(need: ReplicaNeed) -> float:
    on_device = need.weights_mib + need.kv_cache_mib
    return need.overhead_mib + (0.0 if need.gpus else on_device)
