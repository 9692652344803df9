"""vLLM's own server, as anybody starts it, as a backend: adapters loaded while it runs, schemas, streams, counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import httpx
import pytest

from metier.agents import Ask
from metier.agents.errors import AskRejectedError, EngineError
from metier.runtime.engine import EngineRequest, LoadedAdapter
from metier.runtime.inprocess_engine import InProcessEngine
from metier.runtime.remote_backend import RemoteBackend
from metier.runtime.vllm_environment import engine_environment
from metier.specializers.variant import Variant

pytestmark = [pytest.mark.engine, pytest.mark.stock]

PATIENCE_S = 240.0
LOOK_EVERY_S = 0.2


@pytest.fixture(scope="module")
def stock(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("stock") / "server.log"
    arguments = ["--model", str(tiny_base), "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    sizes = ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20)]
    lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--served-model-name", "tiny"]
    environment = os.environ | engine_environment(threads=1, in_process=False)
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *sizes, *lora],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    url, end_s = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end_s, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                threading.Event().wait(LOOK_EVERY_S)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_stock_server_answers_as_our_own_engine_does(
    stock: str,
    tiny_engine: InProcessEngine,
    tiny_variants: dict[str, tuple[Variant, Path]],
    make_ask: Callable[..., Ask],
) -> None:
    schema = {"enum": ["yes", "no"]}

    async def main() -> None:
        async with RemoteBackend(stock, tiny_variants.__getitem__) as remote:
            for number, name in enumerate((None, "lora0", "lora1")):
                ask = make_ask(variant=name)
                pieces: list[str] = []
                there = await remote.reply(ask, on_text=pieces.append)
                adapter = None
                if name is not None:
                    variant, folder = tiny_variants[name]
                    adapter = LoadedAdapter(900 + number, variant.id, folder / "adapter")
                    await tiny_engine.add_adapter(adapter)
                here = await tiny_engine.generate(EngineRequest(ask, adapter))
                if adapter is not None:
                    await tiny_engine.remove_adapter(adapter)
                assert there.text == here.text == "".join(pieces)
                assert there.usage.prompt_tokens == here.usage.prompt_tokens
                assert there.usage.output_tokens == here.usage.output_tokens
            answer = await remote.reply(make_ask(answer_schema=schema, variant="lora0", max_tokens=100))
            assert answer.text in ('"yes"', '"no"')
            with pytest.raises(AskRejectedError, match="maximum context length|max_model_len|tokens"):
                await remote.reply(make_ask("word " * 3000))
            missing = Path("/nowhere")
            lost = RemoteBackend(stock, lambda name: (tiny_variants["lora2"][0], missing))
            async with lost:
                with pytest.raises(EngineError, match="does not load the adapter of variant 'lora2'"):
                    await lost.reply(make_ask(variant="lora2"))

    anyio.run(main)
