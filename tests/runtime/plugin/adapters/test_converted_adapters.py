"""Adapters that came as another kind are answered by the engine as their own library answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import Ask
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.slots.adapter import LoadedAdapter
from metier.specializers import Shelf
from metier.specializers.adapters.adoption import adopt_adapter
from tests.specializers.adapters.test_adapter_conversion import EXACT, write_adapter

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(("number", "kind"), [(951, "VBLORA"), (952, "MISS")])
async def test_a_converted_adapter_answers_as_the_original(
    tmp_path: Path,
    tiny_base: Path,
    tiny_engine: InProcessEngine,
    make_ask: Callable[..., Ask],
    number: int,
    kind: str,
) -> None:
    original = write_adapter(tmp_path / "original", tiny_base, kind, **EXACT[kind])
    shelf = Shelf(tmp_path / "shelf")
    variant = adopt_adapter(original, name="converted", shelf=shelf, base=tiny_base)
    ask = make_ask("How many legs do three dogs have?", max_tokens=24)
    plain = await tiny_engine.generate(EngineRequest(ask))
    adapter = LoadedAdapter(number, variant.id, shelf.path(variant) / "adapter")
    await tiny_engine.add_adapter(adapter)
    try:
        reply = await tiny_engine.generate(EngineRequest(ask, adapter))
    finally:
        await tiny_engine.remove_adapter(adapter)
    assert reply.text == greedy_text(tiny_base, original, ask)
    assert reply.text != plain.text


def greedy_text(base: Path, adapter: Path, ask: Ask) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    prompt = tokenizer.apply_chat_template(
        [message.model_dump() for message in ask.messages], add_generation_prompt=True, return_dict=False
    )
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=ask.max_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
