"""Adapter slots on a fake engine: never too many, never starving, every failure told."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.errors import AdapterError
from tests.runtime.slots.adapter_engine import PATH, FakeEngine


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
