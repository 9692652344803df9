"""The pool: which engine and adapter an ask gets, what is refused, and what happens when an engine dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

from metier.agents.errors import AdapterError, EngineDeadError, EngineError, UnknownVariantError, VariantError
from metier.agents.messages import Ask, Reply, Usage
from metier.agents.thinking import THINKING_OFF, ThinkingProfile, ThinkingTags
from metier.runtime.engines.engine import EngineCounters, EngineRequest
from metier.runtime.engines.pool import EnginePool
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.events import Event
from metier.runtime.slots.adapter import LoadedAdapter, SwapCost
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant
from tests.runtime.conftest import TINY
from tests.tiny_model import write_random_lora, write_tiny_llama

pytestmark = pytest.mark.anyio

MakeAsk = Callable[..., Ask]
Variants = dict[str, tuple[Variant, Path]]


class FakeEngine:
    """Answers with its own name and the adapter's; dies on the asks whose role says so, once each."""

    def __init__(self, start: EngineStart, deadly: set[str]) -> None:
        self.name, self.start, self.deadly = start.name, start, deadly
        self.adapters: set[str] = set()
        self.dead = self.closed = False
        self.written_off = 0.0

    async def generate(self, request: EngineRequest, on_text: Any = None) -> Reply:
        await anyio.lowlevel.checkpoint()
        if request.ask.role in self.deadly:
            self.deadly.discard(request.ask.role)
            self.dead = True
            if on_text is not None:
                on_text("half of ")
        if self.dead:
            raise EngineDeadError("engine killed")
        if request.adapter is not None:
            assert request.adapter.id in self.adapters
        if on_text is not None:
            on_text("half of it")
        return Reply(text=f"{self.name}:{request.adapter.id if request.adapter else '-'}", usage=Usage(cpu_s=1.0))

    async def add_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        await anyio.lowlevel.checkpoint()
        if self.dead:
            raise EngineDeadError("engine killed")
        self.adapters.add(adapter.id)
        return SwapCost(0.5, 0.25)

    async def remove_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        self.adapters.remove(adapter.id)
        return SwapCost(0.5, 0.25)

    def write_off(self, role: str, cpu_s: float) -> None:
        self.written_off += cpu_s

    def counters(self) -> EngineCounters:
        return EngineCounters(name=self.name, cpu_s=2.0, abandoned_cpu_s={"x": 1.0}, steps=10)

    async def close(self) -> None:
        self.closed = True


class Started:
    """Starts fake engines and keeps them."""

    def __init__(self, deadly: set[str] | None = None) -> None:
        self.engines: list[FakeEngine] = []
        self.deadly = deadly or set()

    async def __call__(self, start: EngineStart) -> FakeEngine:
        await anyio.lowlevel.checkpoint()
        self.engines.append(FakeEngine(start, self.deadly))
        return self.engines[-1]


async def test_one_engine_per_engine_half(tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk) -> None:
    record, folder = tiny_variants["lora0"]
    precise = record.model_copy(
        update={"id": "f" * 16, "name": "precise", "engine": EngineSpec(base=record.base, dtype="float32")}
    )
    variants = {**tiny_variants, "precise": (precise, folder)}
    started, usual = Started(), TINY.model_copy(update={"dtype": "bfloat16"})
    async with EnginePool(tiny_base, variants.__getitem__, usual, start_engine=started) as pool:
        replies = [await pool.reply(make_ask(variant=v)) for v in (None, "lora0", "lora1", "precise", "lora0")]
    assert [reply.text for reply in replies] == [
        "base:-",
        f"base:{0:016x}",
        f"base:{1:016x}",
        f"base-float32:{'f' * 16}",
        f"base:{0:016x}",
    ]
    assert [reply.usage.swaps for reply in replies] == [0, 1, 1, 1, 0]
    assert replies[1].usage.cpu_s == 1.25 and replies[1].usage.swap_s == 0.5
    assert [engine.start.dtype for engine in started.engines] == ["bfloat16", "float32"]
    assert all(engine.closed for engine in started.engines)


async def test_adapter_of_another_base_is_refused(tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk) -> None:
    record, folder = tiny_variants["lora0"]
    foreign = record.model_copy(update={"base": "0" * 16})
    started = Started()
    async with EnginePool(tiny_base, lambda name: (foreign, folder), TINY, start_engine=started) as pool:
        with pytest.raises(AdapterError, match="was made for base 0000"):
            await pool.reply(make_ask(variant="lora0"))
    assert not started.engines


async def test_adapter_of_another_prompt_layout_is_refused(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    async with EnginePool(tiny_base, tiny_variants.__getitem__, TINY, start_engine=Started()) as pool:
        with pytest.raises(AdapterError, match="prompt layout 1; expected layout 2"):
            await pool.reply(make_ask(variant="lora0", prompt_layout=2))
        assert (await pool.reply(make_ask(prompt_layout=2))).text == "base:-"


async def test_an_adapter_trained_with_other_template_arguments_is_refused(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    record, folder = tiny_variants["lora0"]
    quiet = {"enable_thinking": False}
    variants = {
        "usual": (record.model_copy(update={"data": "d" * 16}), folder),
        "quiet": (record.model_copy(update={"data": "d" * 16, "chat_template_args": quiet}), folder),
        "elsewhere": (record, folder),
    }
    settings = TINY.model_copy(update={"chat_template_args": quiet})
    async with EnginePool(tiny_base, variants.__getitem__, settings, start_engine=Started()) as pool:
        for name in ("quiet", "elsewhere"):  # one that was trained elsewhere does not say how
            assert (await pool.reply(make_ask(variant=name))).text
        with pytest.raises(AdapterError, match=r"trained with the chat template arguments \{\}; expected .*False"):
            await pool.reply(make_ask(variant="usual"))


async def test_an_adapter_trained_with_tags_of_its_own_is_served_with_them_or_refused(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    record, folder = tiny_variants["lora0"]
    own = ThinkingTags(open="<reason>\n", close="</reason>", empty="<reason></reason>")
    variants = {"own": (record.model_copy(update={"data": "d" * 16, "thinking_tags": own}), folder)}
    settings = TINY.model_copy(update={"thinking_tags": own})
    async with EnginePool(tiny_base, variants.__getitem__, settings, start_engine=Started()) as pool:
        assert (await pool.reply(make_ask(variant="own"))).text
    for tags in (None, ThinkingTags()):
        settings = TINY.model_copy(update={"thinking_tags": tags})
        async with EnginePool(tiny_base, variants.__getitem__, settings, start_engine=Started()) as pool:
            with pytest.raises(AdapterError, match="trained to think between .*reason") as caught:
                await pool.reply(make_ask(variant="own"))
        setting = caught.value.remedy.partition("engine.thinking_tags=")[2].partition("'")[0]
        assert ThinkingTags.model_validate(yaml.safe_load(setting)) == own


async def test_adapter_above_the_slot_rank_is_refused(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    settings = TINY.model_copy(update={"slot_rank": 1})
    async with EnginePool(tiny_base, tiny_variants.__getitem__, settings, start_engine=Started()) as pool:
        with pytest.raises(AdapterError, match="rank"):
            await pool.reply(make_ask(variant="lora0"))


async def test_adapter_in_a_pool_without_adapters_is_refused(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    started = Started()
    pool = EnginePool(tiny_base, tiny_variants.__getitem__, TINY, adapters=False, start_engine=started)
    async with pool:
        await pool.warm()
        with pytest.raises(AdapterError, match="opened without any"):
            await pool.reply(make_ask(variant="lora0"))
    assert [engine.start.adapters for engine in started.engines] == [False]


async def test_death_of_an_engine_costs_no_ask(tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk) -> None:
    events: list[Event] = []
    started = Started(deadly={"unlucky"})
    pool = EnginePool(tiny_base, tiny_variants.__getitem__, TINY, on_event=events.append, start_engine=started)
    replies: dict[int, Reply] = {}
    pieces: list[str] = []

    async def one(number: int) -> None:
        role = "unlucky" if number == 7 else "solver"
        on_text = pieces.append if number == 7 else None
        variant = f"lora{number % 4}"
        replies[number] = await pool.reply(make_ask(role=role, variant=variant), on_text=on_text)

    async with pool:
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(one, number)
    assert {n: r.text for n, r in replies.items()} == {n: f"base:{n % 4:016x}" for n in range(20)}
    assert "".join(pieces) == "half of it"
    assert len(started.engines) == 2 and started.engines[0].closed
    assert [event.kind for event in events].count("engine_restarted") == 1
    totals = pool.totals()["base"]
    assert (totals["restarts"], totals["cpu_s"], totals["abandoned_cpu_s"]) == (1, 4.0, {"x": 2.0})


async def test_engine_that_keeps_dying_is_given_up(tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk) -> None:
    class Mortal(set[str]):
        def discard(self, role: str) -> None:
            pass

    started = Started(deadly=Mortal({"cursed"}))
    settings = TINY.model_copy(update={"restart_limit": 2})
    async with EnginePool(tiny_base, tiny_variants.__getitem__, settings, start_engine=started) as pool:
        with pytest.raises(
            EngineDeadError, match=r"died 3 times in 600 s, the last time: engine killed; expected at most 2 restarts"
        ):
            await pool.reply(make_ask(role="cursed"))
    assert len(started.engines) == 3


@pytest.mark.engine
async def test_more_adapters_than_slots_give_the_replies_they_give_alone(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    names = [None, *tiny_variants]
    replies: dict[int, Reply] = {}
    async with EnginePool(tiny_base, tiny_variants.__getitem__, TINY) as pool:

        async def one(number: int) -> None:
            replies[number] = await pool.reply(make_ask(f"Add {number}.", variant=names[number % 6], max_tokens=20))

        async with anyio.create_task_group() as group:
            for number in range(36):
                group.start_soon(one, number)
        for number in range(6):
            alone = await pool.reply(make_ask(f"Add {number}.", variant=names[number], max_tokens=20))
            assert alone.text == replies[number].text
        totals = pool.totals()["base"]
    assert sum(reply.usage.swaps for reply in replies.values()) >= 5
    assert totals["adapter_loads"] - totals["adapter_evictions"] == TINY.adapter_slots


def checkpoints(base: Path, root: Path) -> Variants:
    """Two checkpoints of their own, and an adapter on the second."""
    variants: Variants = {}
    print_of_base = base_fingerprint(base)
    for number, name in enumerate(("slim", "lean")):
        write_tiny_llama(root / name / "weights", seed=7 + number)
        engine = EngineSpec(base=print_of_base, weights="own")
        id = f"{number + 10:016x}"
        record = Variant(id=id, name=name, base=print_of_base, prompt_layout=1, engine=engine)
        variants[name] = variants[id] = (record, root / name)
    write_random_lora(root / "tuned" / "adapter", root / "lean" / "weights", rank=4)
    engine = EngineSpec(base=print_of_base, weights=variants["lean"][0].id)
    ask = AskSpec(adapter="lora", rank=4)
    record = Variant(id="e" * 16, name="tuned", base=print_of_base, prompt_layout=1, engine=engine, ask=ask)
    return variants | {"tuned": (record, root / "tuned")}


async def test_one_engine_per_checkpoint(tiny_base: Path, tmp_path: Path, make_ask: MakeAsk) -> None:
    variants = checkpoints(tiny_base, tmp_path)
    started = Started()
    pool = EnginePool(
        tiny_base, variants.__getitem__, TINY, adapters={variants["tuned"][0].checkpoint}, start_engine=started
    )
    async with pool:
        await pool.warm([None, "slim", "lean", "tuned"])
        replies = [await pool.reply(make_ask(variant=v)) for v in (None, "slim", "lean", "tuned")]
    assert [reply.text for reply in replies] == ["base:-", "slim-000000:-", "lean-000000:-", f"lean-000000:{'e' * 16}"]
    assert [(e.start.weights, e.start.adapters) for e in started.engines] == [
        (tiny_base, False),
        (tmp_path / "slim" / "weights", False),
        (tmp_path / "lean" / "weights", True),
    ]


async def test_weights_that_cannot_be_served_are_refused(tiny_base: Path, tmp_path: Path, make_ask: MakeAsk) -> None:
    variants = checkpoints(tiny_base, tmp_path)

    def resolve(name: str) -> tuple[Variant, Path]:
        if name not in variants:
            raise UnknownVariantError(f"no variant {name!r}")
        return variants[name]

    started = Started()
    async with EnginePool(tiny_base, resolve, TINY, start_engine=started) as pool:
        foreign = variants["slim"][0].model_copy(update={"base": "0" * 16})
        variants["foreign"] = (foreign, tmp_path / "slim")
        with pytest.raises(VariantError, match="'slim' was made from base 0000"):
            await pool.warm(["foreign"])
        (tmp_path / "slim" / "weights" / "tokenizer.json").unlink()
        with pytest.raises(VariantError, match="weights of variant 'slim' cannot be served: .* no tokenizer"):
            await pool.warm(["slim"])
        del variants[variants["lean"][0].id]
        with pytest.raises(VariantError, match="'tuned' stands on the weights of variant 000000000000000b"):
            await pool.warm(["tuned"])
    assert not started.engines


@pytest.mark.parametrize("wrong", [0, 1, 2])
async def test_an_engine_that_computes_something_else_does_not_serve(
    tiny_base: Path, tmp_path: Path, make_ask: MakeAsk, wrong: int
) -> None:
    variants = checkpoints(tiny_base, tmp_path)
    record, folder = variants["slim"]
    known = [
        {"prompt": str(n), "first": [["Paris" if n < wrong else " slim-000000:-", -0.1], ["no", -9.0]]}
        for n in range(3)
    ]
    variants["slim"] = (record.model_copy(update={"card": {"self_check": known}}), folder)
    started = Started()
    async with EnginePool(tiny_base, variants.__getitem__, TINY, start_engine=started) as pool:
        if wrong < 2:
            assert (await pool.reply(make_ask(variant="slim"))).text == "slim-000000:-"
            assert started.engines[0].written_off == 3.0  # what the check cost is on nobody's bill
        else:
            with pytest.raises(EngineError, match="answers 2 of 3 known prompts wrongly: '0' with 'slim.*Paris"):
                await pool.reply(make_ask(variant="slim"))
            assert started.engines[0].closed


@pytest.mark.parametrize("limit", [0, 3])
async def test_an_engine_that_dies_in_its_self_check_is_restarted_within_the_limit(
    tiny_base: Path, tmp_path: Path, make_ask: MakeAsk, limit: int
) -> None:
    variants = checkpoints(tiny_base, tmp_path)
    record, folder = variants["slim"]
    known = [{"prompt": "0", "first": [[" slim-000000:-", -0.1]]}]
    variants["slim"] = (record.model_copy(update={"card": {"self_check": known}}), folder)
    started = Started(deadly={"self-check"})
    settings = TINY.model_copy(update={"restart_limit": limit})
    async with EnginePool(tiny_base, variants.__getitem__, settings, start_engine=started) as pool:
        if limit:
            assert (await pool.reply(make_ask(variant="slim"))).text == "slim-000000:-"
            assert pool.totals()["slim-000000"]["restarts"] == 1
        else:
            with pytest.raises(EngineDeadError, match="died 1 times"):
                await pool.reply(make_ask(variant="slim"))
    assert [engine.closed for engine in started.engines] == [True] * (1 + bool(limit))


@pytest.mark.engine
async def test_engines_on_three_checkpoints_live_together_and_close_apart(
    tiny_base: Path, tmp_path: Path, make_ask: MakeAsk
) -> None:
    variants = checkpoints(tiny_base, tmp_path)
    names = [None, "slim", "lean", "tuned"]

    async def alone(name: str | None) -> str:
        async with EnginePool(tiny_base, variants.__getitem__, TINY) as pool:
            return (await pool.reply(make_ask(variant=name, max_tokens=20))).text

    expected = {name: await alone(name) for name in names}
    assert len(set(expected.values())) == 4
    replies: dict[int, str] = {}
    async with EnginePool(tiny_base, variants.__getitem__, TINY) as others:
        await others.warm(["slim"])
        async with EnginePool(tiny_base, variants.__getitem__, TINY) as pool:

            async def one(number: int) -> None:
                reply = await pool.reply(make_ask(variant=names[number % 4], max_tokens=20))
                replies[number] = reply.text

            async with anyio.create_task_group() as group:
                for number in range(16):
                    group.start_soon(one, number)
            totals = pool.totals()
        # The engines of one pool are gone; that of the other has not noticed.
        assert (await others.reply(make_ask(variant="slim", max_tokens=20))).text == expected["slim"]
        assert (await others.reply(make_ask(variant="tuned", max_tokens=20))).text == expected["tuned"]
    assert replies == {n: expected[names[n % 4]] for n in range(16)}
    assert {name: row["asks"] for name, row in totals.items()} == {"base": 4, "slim-000000": 4, "lean-000000": 8}


async def test_a_variants_own_thinking_holds_where_nobody_says_otherwise(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    record, folder = tiny_variants["lora0"]
    own = ThinkingProfile(max_tokens=9)
    thinker = record.model_copy(update={"ask": record.ask.model_copy(update={"thinking": own})})
    heard: list[ThinkingProfile | None] = []

    class Listening(FakeEngine):
        async def generate(self, request: EngineRequest, on_text: Any = None) -> Reply:
            heard.append(request.ask.thinking)
            return await super().generate(request, on_text)

    async def start(what: EngineStart) -> FakeEngine:
        return Listening(what, set())

    async with EnginePool(tiny_base, lambda name: (thinker, folder), TINY, start_engine=start) as pool:
        for variant, said in (("lora0", None), ("lora0", THINKING_OFF), (None, None)):
            await pool.reply(make_ask(variant=variant, thinking=said))
    assert heard == [own, THINKING_OFF, None]
