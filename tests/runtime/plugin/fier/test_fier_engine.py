"""Retrieval in the real engine: stock where it has to be, and the same answers however the engine batches the work.

The engines compute in float32 (`TINY`). In bfloat16 stock attention and ours add up in different orders, each as the
processor's instructions have it; where the two best tokens are a step of bfloat16 apart, that decides which is written.
Tokens are compared as far as they are determined: see `assert_same`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from metier.agents.errors import EngineError
from metier.runtime.engines.engine_arguments import engine_arguments
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.plugin.fier import fier_attention
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers.shelf.fier_settings import FierSettings
from tests.runtime.conftest import TINY
from tests.tiny_model import write_random_lora, write_tiny_llama

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

FIER = FierSettings(budget_tokens=32, min_context_tokens=96, dense_layers=1)
# Steps of 128 tokens cut every long prompt in pieces; the cache holds two long sequences, so a third is preempted.
SMALL = {"max_batch_tokens": 128, "kv_cache_mib": 2, "max_model_tokens": 448}


def prompt(number: int, tokens: int) -> list[int]:
    return [3 + (number * 31 + i * i * 7 + i) % 300 for i in range(tokens)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("fier") / "base", head_dim=64, layers=3)


def start(base: Path, settings: EngineSettings, dtype: str = "auto") -> InProcessEngine:
    return anyio.run(partial(InProcessEngine.start, base, settings, adapters=True, name="fier", dtype=dtype))


@pytest.fixture(scope="module")
def stock(base: Path) -> Iterator[InProcessEngine]:
    engine = start(base, TINY.model_copy(update=SMALL))
    yield engine
    anyio.run(engine.close)


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[InProcessEngine]:
    engine = start(base, TINY.model_copy(update={**SMALL, "fier": FIER}))
    yield engine
    anyio.run(engine.close)


def layers(engine: InProcessEngine) -> list[Any]:
    context = engine._llm._llm.vllm_config.compilation_config.static_forward_context
    return [layer.impl for layer in context.values()]


@dataclass(frozen=True)
class Answer:
    """Token ids, and the two best log-probabilities at each, by token."""

    tokens: list[int]
    best: list[dict[int, float]]


async def answers(
    engine: InProcessEngine, prompts: list[list[int]], tokens: int = 24, adapter: LoadedAdapter | None = None
) -> list[Answer]:
    """What the engine goes on with, greedily; all prompts are asked at once, every second one with the adapter."""
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    def run() -> list[Answer]:
        llm = engine._llm._llm
        lora = None if adapter is None else LoRARequest(adapter.id, adapter.number, str(adapter.path))
        for number, ids in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2)
            llm.add_request(f"fier-{number}", tokens_input(ids), params, lora_request=lora if number % 2 else None)
        found: dict[str, Answer] = {}
        while len(found) < len(prompts):
            for output in llm.step():
                if output.finished:
                    said = output.outputs[0]
                    best = [{id: entry.logprob for id, entry in at.items()} for at in said.logprobs]
                    found[output.request_id.split("-")[1]] = Answer(list(said.token_ids), best)
        return [found[str(number)] for number in range(len(prompts))]

    return await engine._in_thread(run)


def assert_same(
    found: list[Answer], wanted: list[Answer], *, tolerance: float = 1e-4, determined: float = 0.95
) -> None:
    """Log-probabilities agree within `tolerance` (nats), token by token, as long as both write the same tokens.

    Two answers may part only where the two best tokens are closer than twice that; what comes after has other texts
    before it and is not compared. `determined` is the least share of all tokens that must have been.
    """
    compared = 0
    for one, other in zip(found, wanted, strict=True):
        for token, same, mine, theirs in zip(other.tokens, one.tokens, one.best, other.best, strict=True):
            first, second = sorted(theirs.values(), reverse=True)[:2]
            assert abs(max(mine.values()) - first) <= tolerance
            if same != token:
                assert first - second <= 2 * tolerance
                break
            compared += 1
    assert compared >= determined * sum(len(other.tokens) for other in wanted)


async def test_only_engines_that_ask_retrieve_and_their_first_layers_do_not(
    stock: InProcessEngine, engine: InProcessEngine
) -> None:
    await answers(engine, [prompt(0, 200)])
    assert not any(isinstance(impl, fier_attention.FierAttention) for impl in layers(stock))
    found = layers(engine)
    assert [impl.side is None for impl in found] == [True, False, False]
    assert found[0].steps == 0 and found[1].steps == found[2].steps > 0


async def test_below_the_minimum_context_the_answers_are_those_of_stock(
    stock: InProcessEngine, engine: InProcessEngine
) -> None:
    before = [impl.steps for impl in layers(engine)]
    prompts = [prompt(n, 20 + 9 * n) for n in range(4)]
    assert_same(await answers(engine, prompts), await answers(stock, prompts))
    assert [impl.steps for impl in layers(engine)] == before


@pytest.mark.parametrize("native", [True, False])
async def test_with_room_for_every_token_the_answers_are_those_of_stock_however_they_are_batched(
    stock: InProcessEngine, engine: InProcessEngine, native: bool, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    await answers(engine, [prompt(0, 40)], 2)
    everything = FIER.model_copy(update={"budget_tokens": 1 << 20})
    for impl in layers(engine)[1:]:
        monkeypatch.setattr(impl, "side", replace(impl.side, settings=everything))
    monkeypatch.setattr(fier_attention, "operators_trusted", lambda: native)
    folder = write_random_lora(tmp_path / "lora", base, rank=4)
    adapter = LoadedAdapter(number=70 + native, id=f"fier-{native}", path=folder)
    for one in (stock, engine):
        await one.add_adapter(adapter)
    before = layers(engine)[1].steps
    preempted: list[str] = []
    scheduler = engine._llm._llm.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def note(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", note)
    # Pieces of prompts beside decode, a prefix of another prompt, adapters; then more than the cache holds.
    mixed = [prompt(1, 300), prompt(2, 97), prompt(1, 300)[:256] + prompt(3, 40), prompt(4, 250), prompt(5, 12)]
    assert_same(await answers(engine, mixed, 40, adapter), await answers(stock, mixed, 40, adapter))
    crowd = [prompt(10 + number, 90) for number in range(6)]
    assert_same(await answers(engine, crowd, 100), await answers(stock, crowd, 100))
    assert preempted
    again = list(reversed(mixed[:3]))  # in blocks that were used before, and partly found in the prefix cache
    assert_same(await answers(engine, again), await answers(stock, again))
    assert layers(engine)[1].steps > before + 20
    for one in (stock, engine):
        await one.remove_adapter(adapter)


async def test_what_is_chosen_does_not_depend_on_the_kernel_or_on_what_is_cached(
    engine: InProcessEngine, stock: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [prompt(7, 400)]
    first = await answers(engine, asked, 40)
    assert_same(await answers(engine, asked, 40), first)  # its prefix is cached now
    monkeypatch.setattr(fier_attention, "operators_trusted", lambda: False)
    assert_same(await answers(engine, asked, 40), first)
    # Random weights attend everywhere: 32 tokens cannot stand for 400.
    assert [answer.tokens for answer in await answers(stock, asked, 40)] != [answer.tokens for answer in first]


def test_in_bfloat16_the_first_token_after_a_prompt_is_as_likely_as_in_stock(base: Path) -> None:
    """The prompt runs through stock attention in both; the token after the next one is the first that is retrieved."""
    prompts = [prompt(20 + number, 97 + 30 * number) for number in range(8)]
    found: list[list[Answer]] = []
    for fier in (None, FIER):
        engine = start(base, TINY.model_copy(update={**SMALL, "fier": fier}), dtype="bfloat16")
        try:
            if fier is not None:
                anyio.run(answers, engine, [prompt(0, 40)], 2)
                for impl in layers(engine)[1:]:
                    impl.side = replace(impl.side, settings=FIER.model_copy(update={"budget_tokens": 1 << 20}))
            found.append(anyio.run(answers, engine, prompts, 2))
            if fier is not None:
                assert layers(engine)[1].steps > 0
        finally:
            anyio.run(engine.close)
    # bfloat16 tells logits of this size apart in steps of 1/64 to 1/32; a key or value read wrongly moves them by whole
    # units. A token that stock and ours write alike is compared, and nearly all are.
    assert_same(found[1], found[0], tolerance=0.1, determined=0.7)


async def test_the_side_cache_comes_out_of_the_engines_memory(stock: InProcessEngine, engine: InProcessEngine) -> None:
    blocks = [e._llm._llm.vllm_config.cache_config.num_gpu_blocks for e in (stock, engine)]
    assert blocks[1] == pytest.approx(blocks[0] / (1 + FIER.cache_share(3, 4)), abs=1)


@pytest.mark.parametrize(
    ("fier", "settings", "said"),
    [
        ({"budget_tokens": 512}, {}, "budget_tokens 512"),
        ({"budget_tokens": 64, "group_tokens": 128}, {"block_tokens": 32}, "group_tokens 128"),
    ],
)
def test_engines_that_cannot_retrieve_are_refused_by_name(
    base: Path, fier: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    asked = TINY.model_copy(update={"fier": FierSettings(**fier), **settings})
    with pytest.raises(EngineError, match=said):
        engine_arguments(base, dtype="auto", settings=asked, adapters=False)


def test_without_the_plugin_retrieval_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_PLUGIN", "0")
    with pytest.raises(EngineError, match="METIER_PLUGIN"):
        engine_arguments(base, dtype="auto", settings=TINY.model_copy(update={"fier": FIER}), adapters=False)


def test_a_gpu_engine_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(EngineError, match="expected a CPU engine"):
        engine_arguments(base, dtype="auto", settings=TINY.model_copy(update={"fier": FIER}), adapters=False)
