"""A seeded ask answers alike whether its prompt was read whole or in parts; stock vLLM ends the engine on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from metier.agents.messages import Ask
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from tests.runtime.conftest import TINY

pytestmark = [pytest.mark.anyio, pytest.mark.engine]
PART = 16
"""Tokens of a step: a prompt of a hundred is read in many parts."""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_seed_gives_the_same_answer_however_the_prompt_is_cut(
    tiny_base: Path, tiny_engine: InProcessEngine, make_ask: Callable[..., Ask]
) -> None:
    asks = [make_ask(f"{n} and seven, " * 12, step=f"{n}", temperature=1.0, seed=n, max_tokens=16) for n in range(4)]
    whole = [(await tiny_engine.generate(EngineRequest(ask))).text for ask in asks]
    settings = TINY.model_copy(update={"max_batch_tokens": PART})
    engine = await InProcessEngine.start(tiny_base, settings, adapters=True, name="parts")
    try:
        parts: dict[int, str] = {}

        async def one(number: int) -> None:
            parts[number] = (await engine.generate(EngineRequest(asks[number]))).text

        async with anyio.create_task_group() as group:
            for number in range(len(asks)):
                group.start_soon(one, number)
    finally:
        await engine.close()
    assert [parts[number] for number in range(len(asks))] == whole
    assert len(set(whole)) == len(whole)
