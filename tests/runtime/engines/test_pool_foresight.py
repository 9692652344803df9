"""The pool told who runs next, and adapters whose files vanish: prefetch, accounts, named errors, a living engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import Role, TaskGraph
from metier.agents.errors import AdapterError
from metier.agents.messages import Ask
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, load_settings, open_session
from metier.runtime.engines.pool import EnginePool
from metier.runtime.slots.slot_trace import SlotTrace, fewest_loads
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY
from tests.runtime.engines.test_pool import FakeEngine, Started

pytestmark = pytest.mark.anyio

MakeAsk = Callable[..., Ask]
Variants = dict[str, tuple[Variant, Path]]


@pytest.fixture
def lent_variants(tiny_variants: Variants, tmp_path: Path) -> Variants:
    """The adapter variants in folders that a test may destroy."""
    shutil.copytree(next(iter(tiny_variants.values()))[1].parent, tmp_path / "shelf")
    return {name: (record, tmp_path / "shelf" / name) for name, (record, _) in tiny_variants.items()}


async def test_an_announced_adapter_is_there_before_its_ask(
    tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk
) -> None:
    started = Started()
    async with EnginePool(tiny_base, tiny_variants.__getitem__, TINY, start_engine=started) as pool:
        await pool.warm(["lora0", "lora1", None])
        assert pool.foresee("run", (("lora0", 0), (None, 1), ("lora1", 2))) is None
        prefetch = pool.foresee("run", (("lora0", 0), ("lora1", 1), ("unheard-of", 1)))
        assert prefetch is not None
        await prefetch()
        assert started.engines[0].adapters == {f"{1:016x}"}
        totals = pool.totals()["base"]
        assert (totals["adapter_prefetches"], totals["overhead_cpu_s"]) == (1, 0.25)
        usage = (await pool.reply(make_ask(variant="lora1"))).usage
        assert (usage.swaps, usage.cpu_s, usage.swap_s) == (1, 1.25, 0.0)
        assert pool.totals()["base"]["overhead_cpu_s"] == 0.0
        pool.forget("run")
        pool.forget("never heard of")


async def test_announcements_outlive_an_engine(tiny_base: Path, tiny_variants: Variants, make_ask: MakeAsk) -> None:
    started = Started(deadly={"unlucky"})
    async with EnginePool(tiny_base, tiny_variants.__getitem__, TINY, start_engine=started) as pool:
        await pool.warm(["lora0", "lora1", "lora2"])
        pool.foresee("run", (("lora0", 0), ("lora1", 3)))
        for role, number in (("unlucky", 1), ("solver", 2), ("solver", 0)):
            await pool.reply(make_ask(role=role, variant=f"lora{number}"))
        assert len(started.engines) == 2
        # In the second engine nobody had announced lora2, so it made room for lora0.
        assert started.engines[1].adapters == {f"{number:016x}" for number in (0, 1)}


async def test_a_pool_without_foresight_takes_no_notice(tiny_base: Path, tiny_variants: Variants) -> None:
    settings = TINY.model_copy(update={"foresight": False})
    async with EnginePool(tiny_base, tiny_variants.__getitem__, settings, start_engine=Started()) as pool:
        await pool.warm(["lora0"])
        assert pool.foresee("run", (("lora0", 1),)) is None
        pool.forget("run")


class Text(BaseModel):
    text: str = ""


def in_circles(roles: int, rounds: int) -> TaskGraph:
    """Rounds of roles one after another; every other round is announced and never runs."""
    graph = TaskGraph("circles", takes=Text, gives=str)
    with graph.loop("circle", max_rounds=2 * rounds, until=lambda s: s[count] >= rounds):
        before = graph.step(Role("r0", takes=Text, gives=str, instructions="Write."))
        for number in range(1, roles):
            role = Role(f"r{number}", takes={"draft": str}, gives=str, instructions="Write.")
            before = graph.step(role, after=before, inputs={"draft": before})
        count = graph.step(_count, after=before, inputs={"draft": before, "rounds": "_count"})
    graph.returns(before)
    return graph


async def _count(draft: str, rounds: int | None = None) -> int:
    return 1 + (rounds or 0)


async def run_in_circles(
    tiny_base: Path, variants: Variants, *, runs: int, rounds: int
) -> tuple[EnginePool, SlotTrace]:
    trace = SlotTrace()
    settings = load_settings(None, {"engine": TINY.model_dump()})
    assignment = Assignment(roles={f"r{n}": RoleAssignment(variant=f"lora{n}") for n in range(5)})
    pool = EnginePool(tiny_base, variants.__getitem__, TINY, start_engine=Started(), on_adapter_use=trace)
    async with pool:
        await pool.warm(assignment.names())
        with RunStore(":memory:") as store, anyio.fail_after(30):
            async with open_session(backend=pool, assignment=assignment, store=store, settings=settings) as session:
                results = await session.map(in_circles(5, rounds), [Text()] * runs, concurrency=3)
    assert [result.error for result in results] == [None] * runs
    return pool, trace


@pytest.mark.parametrize(("runs", "times_the_optimum"), [(1, 1.15), (7, 1.3)])
async def test_a_loop_over_more_adapters_than_slots_loads_hardly_more_than_the_optimum(
    tiny_base: Path,
    tiny_variants: Variants,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    times_the_optimum: float,
) -> None:
    """Side by side on two slots, and with rounds announced that never come, there is no promise: a third at most."""
    loads: list[str] = []
    add_adapter = FakeEngine.add_adapter

    async def counted(self: FakeEngine, adapter):  # type: ignore[no-untyped-def]
        loads.append(adapter.id)
        return await add_adapter(self, adapter)

    monkeypatch.setattr(FakeEngine, "add_adapter", counted)
    pool, trace = await run_in_circles(tiny_base, tiny_variants, runs=runs, rounds=3)
    assert len(trace.events) == 2 * runs * 5 * 3
    assert len(loads) <= times_the_optimum * fewest_loads(trace.events, TINY.adapter_slots) + 1


@pytest.mark.engine
@pytest.mark.parametrize("foresight", [True, False])
async def test_vanished_adapters_are_named_and_the_engine_lives(
    tiny_base: Path, tiny_variants: Variants, lent_variants: Variants, make_ask: MakeAsk, foresight: bool
) -> None:
    settings = TINY.model_copy(update={"foresight": foresight})
    replies = []
    async with EnginePool(tiny_base, lent_variants.__getitem__, settings) as pool:
        await pool.warm(["lora0", "lora1", "lora2"])
        alone = await pool.reply(make_ask(variant="lora0", max_tokens=60))

        async def ask() -> None:
            replies.append(await pool.reply(make_ask("Multiply 6 and 8.", variant="lora0", max_tokens=60)))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            shutil.rmtree(lent_variants["lora0"][1])  # in use
        assert replies[0].usage.answer_tokens > 0
        # Still in its slot: files are read when an adapter is loaded, not when it is used.
        assert (await pool.reply(make_ask(variant="lora0", max_tokens=60))).text == alone.text
        for name in ("lora1", "lora2"):
            await pool.reply(make_ask(variant=name))  # lora0 leaves its slot
        shutil.rmtree(lent_variants["lora1"][1])
        for _ in range(2):
            prefetch = pool.foresee("run", (("lora0", 1),))
            if prefetch is not None:
                await prefetch()  # fails, which is nobody's error yet
            with pytest.raises(AdapterError, match=r"adapter '0+' is gone from .*lora0/adapter: .* missing"):
                await pool.reply(make_ask(variant="lora0"))
        await pool.reply(make_ask(variant="lora3"))  # what is there is served
        shutil.copytree(tiny_variants["lora0"][1], lent_variants["lora0"][1])
        assert (await pool.reply(make_ask(variant="lora0", max_tokens=60))).text == alone.text
        assert (await pool.reply(make_ask())).text
