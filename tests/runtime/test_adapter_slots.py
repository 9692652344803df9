"""Adapter slots on a fake engine: never too many, never starving, every failure told."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.errors import AdapterError
from metier.runtime.adapter_slots import AdapterSlots
from metier.runtime.engine import LoadedAdapter, SwapCost

PATH = Path("adapter")


class FakeEngine:
    """Holds adapters, counts, and complains at once when it is asked for what a real engine could not do."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[int, str] = {}
        self.in_use: dict[str, int] = {}
        self.numbers: list[int] = []
        self.bad: set[str] = set()
        self.moves: list[tuple[str, str]] = []

    async def load(self, adapter: LoadedAdapter) -> SwapCost:
        await anyio.lowlevel.checkpoint()
        self.numbers.append(adapter.number)
        assert adapter.number not in self.held and adapter.id not in self.held.values()
        assert len(self.held) < self.slots
        if adapter.id in self.bad:
            raise AdapterError(f"adapter {adapter.id} is broken")
        self.held[adapter.number] = adapter.id
        self.moves.append(("load", adapter.id))
        await anyio.lowlevel.checkpoint()
        return SwapCost(wall_s=2.0, cpu_s=1.0)

    async def unload(self, adapter: LoadedAdapter) -> SwapCost:
        await anyio.lowlevel.checkpoint()
        assert not self.in_use.get(adapter.id)
        assert self.held.pop(adapter.number) == adapter.id
        self.moves.append(("unload", adapter.id))
        await anyio.lowlevel.checkpoint()
        return SwapCost(wall_s=0.5, cpu_s=0.25)

    def make_slots(self, pass_limit: int = 32) -> AdapterSlots:
        return AdapterSlots(self.slots, load=self.load, unload=self.unload, pass_limit=pass_limit)

    async def work(self, slots: AdapterSlots, id: str, checkpoints: int = 1) -> tuple[int, float]:
        async with slots.use(id, PATH) as lease:
            assert self.held[lease.adapter.number] == id
            self.in_use[id] = self.in_use.get(id, 0) + 1
            try:
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                    assert self.held[lease.adapter.number] == id
            finally:
                self.in_use[id] -= 1
            return lease.swaps, lease.cpu_s


@pytest.mark.anyio
async def test_only_the_ask_that_caused_a_swap_pays_for_it() -> None:
    engine = FakeEngine(1)
    slots = engine.make_slots()
    paid: list[tuple[int, float]] = []

    async def one(id: str) -> None:
        paid.append(await engine.work(slots, id))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(one, "a")
    assert sorted(paid) == [(0, 0.0), (0, 0.0), (0, 0.0), (1, 1.0)]
    assert await engine.work(slots, "b") == (1, 1.25)
    assert engine.moves == [("load", "a"), ("unload", "a"), ("load", "b")]
    assert slots.resident == ("b",)


@pytest.mark.anyio
async def test_longest_idle_is_evicted_and_the_one_in_use_is_not() -> None:
    engine = FakeEngine(3)
    slots = engine.make_slots()
    for id in ("a", "b", "c", "a"):
        await engine.work(slots, id)
    async with slots.use("b", PATH):
        await engine.work(slots, "d")
        await engine.work(slots, "e")
    assert [move for move in engine.moves if move[0] == "unload"] == [("unload", "c"), ("unload", "a")]


@pytest.mark.anyio
async def test_waiting_ask_is_overtaken_a_bounded_number_of_times() -> None:
    engine = FakeEngine(1)
    slots = engine.make_slots(pass_limit=3)
    order: list[str] = []
    hold = anyio.Event()

    async def holder() -> None:
        async with slots.use("a", PATH):
            await hold.wait()

    async def one(id: str) -> None:
        async with slots.use(id, PATH):
            order.append(id)

    async with anyio.create_task_group() as group:
        group.start_soon(holder)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(one, "b")
        await anyio.wait_all_tasks_blocked()
        for _ in range(10):
            group.start_soon(one, "a")
        await anyio.wait_all_tasks_blocked()
        assert order == ["a"] * 3
        hold.set()
    assert order == ["a"] * 3 + ["b"] + ["a"] * 7


@pytest.mark.anyio
async def test_failed_load_is_told_to_all_who_waited_and_its_number_never_returns() -> None:
    engine = FakeEngine(1)
    engine.bad = {"bad"}
    slots = engine.make_slots()
    await engine.work(slots, "good")
    failures: list[str] = []

    async def one() -> None:
        with pytest.raises(AdapterError, match="adapter bad is broken"):
            await engine.work(slots, "bad")
        failures.append("told")

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
    assert failures == ["told"] * 3
    engine.bad = set()
    await engine.work(slots, "bad")
    await engine.work(slots, "good")
    assert len(set(engine.numbers[:-1])) == len(engine.numbers[:-1])
    assert engine.numbers[-1] == 1  # a number that never failed stays with its adapter


@pytest.mark.anyio
async def test_cancelled_loader_finishes_for_those_who_count_on_it() -> None:
    engine = FakeEngine(1)
    slots = engine.make_slots()
    done: list[str] = []

    async def cancelled() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.work(slots, "a")

    async def patient() -> None:
        await engine.work(slots, "a")
        done.append("a")

    async with anyio.create_task_group() as group:
        group.start_soon(cancelled)
        group.start_soon(patient)
    assert done == ["a"]
    await engine.work(slots, "b")


@settings(max_examples=60, deadline=None)
@given(
    asks=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 6), st.booleans()), max_size=40),
    slot_count=st.integers(1, 4),
    pass_limit=st.integers(0, 5),
    bad=st.sets(st.sampled_from("ef"), max_size=1),
    backend=st.sampled_from(["asyncio", "trio"]),
)
def test_any_load_is_served_within_the_slots(
    asks: list[tuple[str, int, bool]], slot_count: int, pass_limit: int, bad: set[str], backend: str
) -> None:
    engine = FakeEngine(slot_count)
    engine.bad = bad
    slots = engine.make_slots(pass_limit)
    ended: list[str] = []

    async def one(id: str, checkpoints: int, cancel: bool) -> None:
        with anyio.CancelScope() as scope:
            if cancel:
                scope.deadline = anyio.current_time()  # cancelled at the first checkpoint
            try:
                await engine.work(slots, id, checkpoints)
            except AdapterError:
                assert id in bad
        ended.append(id)

    async def main() -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for ask in asks:
                    group.start_soon(one, *ask)
        # Nothing is left pinned: every slot can still be had.
        for id in "wxyz"[:slot_count]:
            await engine.work(slots, id)

    anyio.run(main, backend=backend)
    assert len(ended) == len(asks)
    assert len(engine.held) <= slot_count
