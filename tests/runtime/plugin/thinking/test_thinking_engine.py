"""Thinking on a real engine: budgets to the token in a mixed batch, grammars behind thinking, other rows untouched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from metier.agents.chat.chat_template import ChatTemplate, TemplateSettings
from metier.agents.errors import AskRejectedError, SettingsError
from metier.agents.messages import Ask, Reply
from metier.agents.thinking import THINKING_OFF, ThinkingProfile, ThinkingTags
from metier.runtime.engines import engine_arguments
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.thinking_asks import ReplyReader, ThinkingAsks
from metier.runtime.engines.vllm_calls import VllmAsks
from metier.runtime.plugin.thinking.end_tag import end_tag
from tests.runtime.conftest import TINY

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

SCHEMA = {"type": "object", "properties": {"value": {"type": "integer", "maximum": 99}}, "required": ["value"]}
MakeAsk = Callable[..., Ask]


@pytest.fixture
def anyio_backend() -> str:
    """What is tested here is below the event loop."""
    return "asyncio"


def profile(most: int, least: int = 0, waits: int = 0) -> ThinkingProfile:
    return ThinkingProfile(max_tokens=most, min_tokens=least, waits=waits)


async def together(engine: InProcessEngine, asks: list[Ask]) -> list[Reply]:
    replies: dict[int, Reply] = {}

    async def one(number: int, ask: Ask) -> None:
        replies[number] = await engine.generate(EngineRequest(ask))

    async with anyio.create_task_group() as group:
        for number, ask in enumerate(asks):
            group.start_soon(one, number, ask)
    return [replies[number] for number in range(len(asks))]


def mixed_batch(make_ask: MakeAsk) -> tuple[list[Ask], list[Ask]]:
    """Asks that think, in all ways, and plain ones between which they run."""
    long = "State the final answer as one integer. " * 6
    thinking = [
        make_ask("Add 1 and 2.", thinking=profile(9)),
        make_ask("Add 3 and 4.", thinking=profile(17, 17), temperature=1.0, seed=4),
        make_ask("Add 5 and 6.", thinking=profile(1)),
        make_ask(long, thinking=profile(12, 12, 2)),
        make_ask("Add 7 and 8.", thinking=profile(11, 6), answer_schema=SCHEMA, max_tokens=30),
        make_ask("Add 9 and 1.", thinking=THINKING_OFF, answer_schema=SCHEMA, max_tokens=30),
        make_ask(long, thinking=THINKING_OFF),
    ]
    plain = [
        make_ask("Add 2 and 2.", max_tokens=25),
        make_ask(long, max_tokens=14),
        make_ask("Add 4 and 4.", max_tokens=20, temperature=1.0, seed=9),
        make_ask("Add 6 and 6.", answer_schema=SCHEMA, max_tokens=30),
    ]
    return thinking, plain


@pytest.fixture
def watched_logits(tiny_engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """For every step of the engine: how many rows of logits do not think, and whether they all kept their bits."""
    import torch

    from metier.runtime.plugin.thinking.thinking_processor import ThinkingProcessor

    apply, seen = ThinkingProcessor.apply, list[tuple[int, bool]]()

    def watching(self: Any, logits: Any) -> Any:
        before = logits.clone()
        after = apply(self, logits)
        others = [row for row in range(len(logits)) if row not in self._rows]
        seen.append((len(others), torch.equal(before[others], after[others])))
        return after

    monkeypatch.setattr(ThinkingProcessor, "apply", watching)
    yield seen


async def test_budgets_hold_to_the_token_and_other_rows_keep_their_bits(
    tiny_engine: InProcessEngine,
    tiny_base: Path,
    make_ask: MakeAsk,
    watched_logits: list[tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thinking, plain = mixed_batch(make_ask)
    replies = await together(
        tiny_engine, [ask for pair in zip(thinking, plain, strict=False) for ask in pair] + thinking[4:]
    )
    by_ask = dict(zip([id(a) for pair in zip(thinking, plain, strict=False) for a in pair], replies, strict=False))
    for ask, reply in [*((a, by_ask[id(a)]) for a in thinking[:4]), *zip(thinking[4:], replies[8:], strict=True)]:
        assert ask.thinking is not None and reply.profile == ask.thinking
        assert ask.thinking.min_tokens <= reply.usage.thinking_tokens <= ask.thinking.max_tokens
        assert "think>" not in reply.text and "think>" not in reply.thinking
        if ask.answer_schema is not None:
            assert isinstance(json.loads(reply.text)["value"], int) and reply.finish_reason == "stop"
        elif reply.finish_reason == "length":
            tag = 0 if ask.thinking.off else len(tiny_engine._llm._asks.thinking._ids["close"])
            assert reply.usage.answer_tokens == tag + ask.max_tokens
    # A random model does not know the tag: it thinks as long as it may.
    assert [by_ask[id(a)].usage.thinking_tokens for a in thinking[:4]] == [9, 17, 1, 12]
    assert [r.usage.thinking_tokens for r in replies[8:]] == [11, 0, 0]
    assert len(watched_logits) > 20 and all(same for _, same in watched_logits)
    assert max(others for others, _ in watched_logits) >= 4

    monkeypatch.setattr(engine_arguments, "plugin_wanted", lambda: False)
    async with await InProcessEngine.start(tiny_base, TINY, adapters=True, name="without") as without:
        bare = await together(without, plain)
        assert [r.text for r in bare] == [by_ask[id(a)].text for a in plain]
        assert not without._llm._llm.vllm_config.model_config.logits_processors


async def test_streams_carry_the_answer_alone(tiny_engine: InProcessEngine, make_ask: MakeAsk) -> None:
    heard: list[str] = []
    ask = make_ask(thinking=profile(8), answer_schema=SCHEMA, max_tokens=30)
    reply = await tiny_engine.generate(EngineRequest(ask), heard.append)
    assert "".join(heard) == reply.text
    assert json.loads(reply.text) and reply.thinking and len(heard) > 1


async def written_ids(engine: InProcessEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The token ids of a reply."""
    ids: list[int] = []
    read = ReplyReader.read

    def noting(self: ReplyReader, text: str, token_ids: list[int], **more: Any) -> str:
        ids.extend(token_ids)
        return read(self, text, token_ids, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ReplyReader, "read", noting)
        await engine.generate(EngineRequest(ask))
    return ids


async def test_an_end_the_model_writes_itself_is_found_put_off_and_waited_on(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is random, so the tag is chosen from what it writes: two of its tokens, in the middle of a text."""
    llm = tiny_engine._llm
    ids = await written_ids(tiny_engine, make_ask(thinking=profile(40)), monkeypatch)
    pieces = [end_tag(llm._asks.tokenizer, "</think>").piece(i) for i in ids[:40]]
    text = "".join(pieces)
    at = next(
        n
        for n in range(4, 30)
        if (word := "".join(pieces[n : n + 2])).isascii()
        and word == word.strip()
        and len(word) > 2
        and text.index(word) == len("".join(pieces[:n]))
    )
    close = "".join(pieces[at : at + 2])
    tags = ThinkingTags(close=close, empty=f"<think>\n{close}")
    template = ChatTemplate(llm._asks.tokenizer, TemplateSettings(tags=tags))
    monkeypatch.setattr(llm._asks, "thinking", ThinkingAsks(template, context_tokens=512))
    wait = len(llm._asks.thinking._ids["wait"])
    natural, later, waiting, both = await together(
        tiny_engine,
        [
            make_ask(thinking=profile(40)),
            make_ask(thinking=profile(40, at + 5)),
            make_ask(thinking=profile(at + 9 + wait, waits=1)),
            make_ask(thinking=profile(40), answer_schema=SCHEMA, max_tokens=30),
        ],
    )
    assert natural.usage.thinking_tokens == at
    assert natural.thinking == "".join(pieces[:at]).strip()
    assert at + 5 <= later.usage.thinking_tokens <= 40
    assert later.thinking.startswith("".join(pieces[: at + 1]).strip()) and close not in later.thinking
    assert waiting.thinking.startswith(("".join(pieces[: at + 1]) + "Wait").strip())
    assert at + 1 + wait <= waiting.usage.thinking_tokens <= at + 9 + wait
    assert both.usage.thinking_tokens == at and json.loads(both.text)


async def test_a_template_that_opens_thinking_ends_in_an_answer(
    tiny_engine: InProcessEngine, tiny_base: Path, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said about thinking: the thoughts are bounded and apart, and the grammar begins behind them."""
    from transformers import AutoTokenizer

    llm = tiny_engine._llm
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    monkeypatch.setattr(llm, "_asks", VllmAsks(tokenizer, TINY, context_tokens=512))
    unsaid, strict, off = await together(
        tiny_engine,
        [
            make_ask(max_tokens=12),
            make_ask(answer_schema=SCHEMA, max_tokens=30),
            make_ask(answer_schema=SCHEMA, max_tokens=30, thinking=THINKING_OFF),
        ],
    )
    assert unsaid.usage.thinking_tokens == 12 and unsaid.thinking and unsaid.profile is None
    assert strict.usage.thinking_tokens == 30 and json.loads(strict.text)
    assert off.usage.thinking_tokens == 0 and json.loads(off.text)


async def test_a_reply_ends_at_the_templates_end_of_turn(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another token than the model's own end: one that this random model is sure to write."""
    llm = tiny_engine._llm
    ids = await written_ids(tiny_engine, make_ask(max_tokens=20), monkeypatch)
    at = next(n for n in range(3, 19) if ids[n] not in ids[:n])
    asks = VllmAsks(llm._asks.tokenizer, TINY, context_tokens=512)
    monkeypatch.setitem(asks.template.__dict__, "end_of_turn", ids[at])
    monkeypatch.setattr(llm, "_asks", asks)
    reply = await tiny_engine.generate(EngineRequest(make_ask(max_tokens=20)))
    assert reply.finish_reason == "stop" and reply.usage.answer_tokens == at + 1


async def test_thinking_survives_preemption(
    tiny_base: Path, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little room rows are thrown out and computed anew, prompts come in pieces; counts stay exact."""
    from metier.runtime.plugin.thinking.thinking_processor import ThinkingProcessor

    make_row, returned = ThinkingProcessor._row, list[int]()

    def counting(self: Any, params: Any, prompt: Any, written: list[int]) -> Any:
        if written:
            returned.append(len(written))
        return make_row(self, params, prompt, written)

    monkeypatch.setattr(ThinkingProcessor, "_row", counting)
    narrow = TINY.model_copy(update={"max_batch_tokens": 24, "kv_cache_mib": 1})
    asks = [make_ask(f"Add {n} and 7.", thinking=profile(290 + n, 290 + n, n % 3)) for n in range(8)]
    async with await InProcessEngine.start(tiny_base, narrow, adapters=False, name="narrow") as engine:
        replies = await together(engine, asks)
    assert [r.usage.thinking_tokens for r in replies] == [290 + n for n in range(8)]
    assert returned, "nobody was thrown out: the test has lost its point"


async def test_what_cannot_be_thought_is_refused_alone(
    tiny_engine: InProcessEngine, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AskRejectedError, match="so that an answer fits"):
        await tiny_engine.generate(EngineRequest(make_ask(thinking=profile(600))))
    llm = tiny_engine._llm

    class Losing:
        """The model's tokenizer, but one that writes all tags in capitals."""

        def __getattr__(self, name: str) -> Any:
            return getattr(llm._asks.tokenizer, name)

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(llm._asks.tokenizer.encode(text.upper(), add_special_tokens=add_special_tokens))

    with monkeypatch.context() as patch:
        template = ChatTemplate(Losing(), TemplateSettings(tags=ThinkingTags()))
        patch.setattr(llm._asks, "thinking", ThinkingAsks(template, context_tokens=512))
        with pytest.raises(SettingsError, match=r"thinking_tags.open='<think>\\n' becomes"):
            await tiny_engine.generate(EngineRequest(make_ask(thinking=profile(5))))
    assert (await tiny_engine.generate(EngineRequest(make_ask(thinking=profile(5))))).usage.thinking_tokens == 5
