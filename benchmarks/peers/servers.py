"""The two servers, one alive at a time: vLLM's own without our plugin, and `metier serve`; what they use while up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from ours import BENCHMARKS, load_parts, overrides_of

from metier.runtime.engines.vllm_environment import engine_environment

START_TIMEOUT_S = 300.0
LOOK_EVERY_S = 0.3
STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Served:
    """A server that answers at `url`, with all its processes."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU-seconds of all processes of it that are alive."""
        times = [process.cpu_times() for process in self._all()]
        return float(sum(one.user + one.system for one in times))

    def resident_mib(self) -> float:
        """Resident memory of all processes; what they share is counted once."""
        return float(sum(process.memory_full_info().pss for process in self._all()) / (1 << 20))

    def _all(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def stock_command(folder: Path, port: int, adapters: bool) -> tuple[list[str], dict[str, str]]:
    """vLLM's server as its documentation starts it, in the sizes of our engines."""
    parts = load_parts(folder)
    engine = {
        "--max-model-len": "2048",
        "--max-num-seqs": "16",
        "--max-num-batched-tokens": "2048",
        "--kv-cache-memory-bytes": str(512 << 20),
        "--block-size": "32",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(parts.base)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    command += [word for pair in engine.items() for word in pair]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(parts.adapters)), "--max-lora-rank", "16", "--lora-modules"]
        command += [f"random-{role}={path}" for role, path in parts.adapters.items()]
    # Without this vLLM's automatic binding computes with one of two cores; the rest only quietens it.
    environment = engine_environment(threads=len(os.sched_getaffinity(0)), in_process=False)
    return command, environment | {"VLLM_PLUGINS": ""}


def our_command(folder: Path, port: int, adapters: bool) -> tuple[list[str], dict[str, str]]:
    """`metier serve`, as README starts it."""
    command = [str(Path(sys.executable).parent / "metier"), "serve", str(BENCHMARKS / "programs.py")]
    command += ["--base", str(folder / "base"), "--port", str(port), "--store", str(folder / "served.db")]
    if adapters:
        command += ["--assignment", str(folder / "assignment.yaml")]
    for name, value in overrides_of(folder).items():
        command += ["--set", f"{name}={value}"]
    return command, {}


COMMANDS = {"stock": stock_command, "ours": our_command}


@contextmanager
def server(kind: str, folder: Path, adapters: bool = True) -> Iterator[Served]:
    """Start a server (`stock` or `ours`), yield it when it answers, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, environment = COMMANDS[kind](folder, port, adapters)
    log = folder / f"{kind}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield Served(url, psutil.Process(process.pid))
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in below:
            if child.is_running():
                child.kill()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers; SystemExit with the end of its log when it does not."""
    end_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < end_s:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"{' '.join(process.args[:4])} does not answer:\n{log.read_text()[-3000:]}")  # type: ignore[index]
