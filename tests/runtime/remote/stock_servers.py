"""vLLM's own server in a process of its own, as anybody starts it, on a free port; started together, ready together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from metier.runtime.engines.vllm_environment import engine_environment

PATIENCE_S = 240.0
LOOK_EVERY_S = 0.2


@dataclass
class StockServer:
    """A running server; its engine is a child of `process`, and all of it one process group."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """kill -9, the engine included."""
        os.killpg(self.process.pid, 9)
        self.process.wait()


@contextmanager
def stock_servers(
    base: Path,
    folder: Path,
    count: int = 1,
    *,
    kv_cache_mib: int = 64,
    rank: int = 8,
    threads: int = 1,
    adapter_slots: int = 2,
    context_tokens: int = 512,
    compiled: bool = False,
    dtype: str = "auto",
) -> Iterator[list[StockServer]]:
    """Servers with `adapter_slots` each, their logs in `folder`."""
    sizes = {"max-model-len": context_tokens, "kv-cache-memory-bytes": kv_cache_mib << 20, "max-num-seqs": 8}
    sizes |= {"max-loras": adapter_slots, "max-lora-rank": rank}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    arguments += ["--dtype", dtype]
    if not compiled:
        arguments.append("--enforce-eager")
    with ExitStack() as stack:
        servers = [_start(base, folder / f"server{n}.log", arguments, threads) for n in range(count)]
        for server in servers:
            stack.callback(_stop, server)
        end_s = time.monotonic() + PATIENCE_S
        for server in servers:
            while not _is_ready(server.url):
                assert server.process.poll() is None, server.log.read_text()[-3000:]
                assert time.monotonic() < end_s, server.log.read_text()[-3000:]
                threading.Event().wait(LOOK_EVERY_S)
        yield servers


def _start(base: Path, log: Path, sizes: list[str], threads: int) -> StockServer:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", str(base), "--host", "127.0.0.1", "--port", str(port), *sizes]
    lora = ["--enable-lora", "--served-model-name", "tiny"]
    environment = os.environ | engine_environment(threads=threads, in_process=False)
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *lora],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return StockServer(f"http://127.0.0.1:{port}", process, log)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _stop(server: StockServer) -> None:
    server.process.terminate()
    try:
        server.process.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
