"""What our layer over vLLM costs: the same asks through `InProcessEngine`, through bare steps, and through `LLM`.

`bare` steps the very engine that `ours` uses, in the same thread, with nothing around it; `LLM.generate` is vLLM's own
synchronous front on a second engine in the process. Rounds are paired and interleaved. Prints tokens per second, CPU
milliseconds per ask, ratios with their spread, the lag of the event loop meanwhile, and the time engines take to start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from harness import Samples, arguments, clocked, machine, paired_rounds, print_table, spread

from metier.agents.chat.chat_template import ChatTemplate
from metier.agents.messages import Ask, Message
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.vllm_calls import prompt_token_ids, sampling_params
from metier.runtime.meters.percentiles import percentile
from metier.runtime.settings.engine import EngineSettings
from metier.specializers.shelf.base_model import find_base

LAG_PERIOD_S = 0.005
Way = Callable[[list[Ask]], Awaitable[int]]


def make_asks(count: int, tokens: int, offset: int) -> list[Ask]:
    """Prompts of about 40 tokens, new ones each round so that the prefix cache treats all three alike."""
    text = "Write a few sentences about the number {} and what it is good for, without counting."
    return [
        Ask(
            run_id="bench",
            step_path=f"{n}",
            role="writer",
            messages=(Message(role="user", content=text.format(offset + n)),),
            max_tokens=tokens,
        )
        for n in range(count)
    ]


async def through_ours(engine: InProcessEngine, asks: list[Ask]) -> int:
    """Tokens written for the asks by our engine."""
    tokens = 0

    async def one(ask: Ask) -> None:
        nonlocal tokens
        reply = await engine.generate(EngineRequest(ask))
        tokens += reply.usage.answer_tokens

    async with anyio.create_task_group() as group:
        for ask in asks:
            group.start_soon(one, ask)
    return tokens


def step_bare(llm: Any, asks: list[Ask], context_tokens: int) -> int:
    """Tokens written for the asks by vLLM's engine alone; runs in the stepping thread."""
    from vllm.inputs.engine import tokens_input

    template, tokens = ChatTemplate(llm.get_tokenizer()), 0
    for number, ask in enumerate(asks):
        ids = prompt_token_ids(template, ask, context_tokens=context_tokens)
        llm.add_request(f"bare-{number}", tokens_input(ids), sampling_params(ask, stream=False))
    while llm.has_unfinished_requests():
        tokens += sum(len(output.outputs[0].token_ids) for output in llm.step())
    return tokens


async def through_bare(engine: InProcessEngine, asks: list[Ask]) -> int:
    """`step_bare` on the engine that ours uses, in the thread that ours uses."""
    return await engine._in_thread(partial(step_bare, engine._llm._llm, asks, 1 << 20))


async def through_llm(llm: Any, asks: list[Ask]) -> int:
    """Tokens written for the asks by `LLM.chat`."""
    conversations = [[m.model_dump() for m in ask.messages] for ask in asks]
    params = sampling_params(asks[0], stream=False)
    outputs = await anyio.to_thread.run_sync(partial(llm.chat, conversations, params, use_tqdm=False))
    return sum(len(output.outputs[0].token_ids) for output in outputs)


class LoopLag:
    """How late the event loop wakes a sleeper."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []

    async def watch(self) -> None:
        """Sleep and note the delay, until cancelled."""
        while True:
            began = time.perf_counter()
            await anyio.sleep(LAG_PERIOD_S)
            self.lags_s.append(time.perf_counter() - began - LAG_PERIOD_S)


async def main(options: argparse.Namespace) -> None:
    """Start the engines, run the rounds, print the table."""
    settings = EngineSettings(kv_cache_mib=256, threads=options.threads, eager=not options.compiled)
    base = Path(options.base) if options.base else find_base("smollm2-135m")
    starts: list[float] = []
    for _ in range(options.starts):
        began = time.perf_counter()
        async with await InProcessEngine.start(base, settings, adapters=False) as engine:
            starts.append(time.perf_counter() - began)
    print(machine())
    print(f"engine ready: first {starts[0]:.1f} s with imports, then {spread(starts[1:] or starts, '.1f')} s")
    async with await InProcessEngine.start(base, settings, adapters=False) as engine:
        ways: dict[str, Way] = {
            "bare": partial(through_bare, engine),
            "ours": partial(through_ours, engine),
        }
        if not options.no_llm:
            ways["LLM.chat"] = partial(through_llm, await anyio.to_thread.run_sync(make_llm, base, settings))
        for batch in options.batches:
            await measure(ways, batch, options)


def make_llm(base: Path, settings: EngineSettings) -> Any:
    """vLLM's synchronous front with the same settings."""
    from vllm import LLM

    return LLM(
        str(base),
        max_model_len=settings.max_model_tokens,
        max_num_seqs=settings.max_running,
        max_num_batched_tokens=settings.max_batch_tokens,
        kv_cache_memory_bytes=settings.kv_cache_mib << 20,
        block_size=settings.block_tokens,
        enforce_eager=settings.runs_eagerly,
        seed=0,
    )


@dataclass(frozen=True)
class Took:
    """One batch: tokens a second, CPU milliseconds an ask."""

    tokens_per_s: float
    cpu_ms: float


async def measure(ways: dict[str, Way], batch: int, options: argparse.Namespace) -> None:
    """Paired rounds of one batch size."""
    took: Samples[str, Took] = Samples(list(ways), options.journal)
    lag = LoopLag()
    for number, name in paired_rounds(list(ways), options.rounds):
        asks = make_asks(batch, options.tokens, offset=1000 * (number + 1))
        with clocked() as spent:
            tokens = await ways[name](asks)
        took.keep(number, name, Took(tokens / spent.wall_s, spent.cpu_s / len(asks) * 1e3))
    # In a round of its own: watching wakes the loop 200 times a second, which would count as our layer's cost.
    async with anyio.create_task_group() as group:
        group.start_soon(lag.watch)
        await ways["ours"](make_asks(batch, options.tokens, offset=500_000))
        group.cancel_scope.cancel()
    print(f"\nbatch {batch}, {options.tokens} tokens an ask, {options.rounds} paired rounds: median (least-most)")
    rows = []
    for name in ways:
        speed, cpu_ms = took.values(name, lambda t: t.tokens_per_s), took.values(name, lambda t: t.cpu_ms)
        ratios = took.ratios(name, "bare", lambda t: t.tokens_per_s)
        more = took.differences(name, "bare", lambda t: t.cpu_ms)
        rows.append((name, spread(speed, ".1f"), spread(cpu_ms, ".1f"), spread(ratios, ".3f"), spread(more, "+.2f")))
    print_table(("", "tokens/s", "CPU ms/ask", "speed over bare", "CPU ms/ask over bare"), rows)
    if lag.lags_s:
        p50, p99 = (1e3 * percentile(lag.lags_s, share) for share in (0.5, 0.99))
        print(f"event loop lag with ours: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5, threads=2)
    parser.add_argument("--base", help="checkpoint folder (default: the bundled SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per ask (default 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 1], help="asks at a time (default 16 1)")
    parser.add_argument("--starts", type=int, default=3, help="how often to start an engine (default 3)")
    parser.add_argument("--compiled", action="store_true", help="engines with torch.compile")
    parser.add_argument("--no-llm", action="store_true", help="leave LLM.chat out")
    anyio.run(main, parser.parse_args())
