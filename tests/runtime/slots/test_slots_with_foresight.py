"""Adapter slots that know who runs next: what is evicted, kept and fetched ahead, and that nothing gets stuck."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.errors import AdapterError
from metier.runtime.slots.adapter_slots import AdapterSlots
from metier.runtime.slots.announced_uses import AnnouncedUses
from tests.runtime.slots.adapter_engine import PATH, FakeEngine

pytestmark = pytest.mark.anyio

PATHS = {id: PATH for id in "abcdefgh"}


def evicted(engine: FakeEngine) -> str:
    return "".join(id for move, id in engine.moves if move == "unload")


async def test_evicted_is_what_nobody_announced_then_what_is_needed_last() -> None:
    engine, announced = FakeEngine(3), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    for id in "abc":
        await engine.work(slots, id)
    announced.announce("run 1", {"b": 5, "a": 9})
    announced.announce("run 2", {"a": 7})
    for id in "def":
        await engine.work(slots, id)
        announced.announce("run 3", {**{used: 3 for used in "def"[: "def".index(id)]}, id: 3})
    assert evicted(engine) == "cab"


async def test_equally_far_ones_go_longest_idle_first() -> None:
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    announced.announce("run", {"a": 5, "b": 5})
    for id in "abac":
        await engine.work(slots, id)
    assert evicted(engine) == "b"


async def test_what_runs_soon_is_kept_while_anything_else_will_do() -> None:
    """b is used next by a run that is busy with a: c waits for a instead of taking b's slot."""
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    await engine.work(slots, "b")
    announced.announce("run", {"a": 0, "b": 1})
    async with anyio.create_task_group() as group:
        async with slots.use("a", PATH):
            group.start_soon(engine.work, slots, "c")
            await anyio.wait_all_tasks_blocked()
            assert set(slots.resident) == {"a", "b"}
            announced.announce("run", {"b": 0})
        await anyio.wait_all_tasks_blocked()
    assert evicted(engine) == "a"


async def test_a_use_that_is_called_off_frees_its_slot_at_once() -> None:
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    await engine.work(slots, "b")
    announced.announce("run", {"a": 0, "b": 1})
    async with slots.use("a", PATH), anyio.create_task_group() as group:
        group.start_soon(engine.work, slots, "c")
        await anyio.wait_all_tasks_blocked()
        assert set(slots.resident) == {"a", "b"}
        announced.forget("run")
        slots.announcements_changed()
    assert set(slots.resident) == {"a", "c"}


async def test_an_announced_use_that_never_comes_keeps_nobody_waiting() -> None:
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    for id in "ab":
        await engine.work(slots, id)
    announced.announce("a run that hangs", {"a": 1, "b": 1})
    with anyio.fail_after(5):
        await engine.work(slots, "c")


async def test_who_waits_for_a_kept_slot_is_overtaken_a_bounded_number_of_times() -> None:
    """a is always in use by someone and b always announced: c would wait for ever."""
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(pass_limit=3, announced=announced)
    order: list[str] = []

    async def one(id: str) -> None:
        async with slots.use(id, PATH):
            order.append(id)

    await engine.work(slots, "b")
    announced.announce("run", {"a": 0, "b": 1})
    async with slots.use("a", PATH), anyio.create_task_group() as group:
        group.start_soon(one, "c")
        await anyio.wait_all_tasks_blocked()
        for overtaken in range(1, 4):
            assert order == ["a"] * (overtaken - 1)
            group.start_soon(one, "a")
            await anyio.wait_all_tasks_blocked()
    assert order == ["a"] * 3 + ["c"]
    assert evicted(engine) == "b"


async def test_a_free_slot_goes_to_the_adapter_most_asks_wait_for() -> None:
    engine, announced = FakeEngine(1), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    order: list[str] = []

    async def one(id: str) -> None:
        async with slots.use(id, PATH):
            order.append(id)
            await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as group:
        async with slots.use("a", PATH):
            for id in "bcdcdc":
                group.start_soon(one, id)
                await anyio.wait_all_tasks_blocked()
        await anyio.wait_all_tasks_blocked()
    assert order == list("cccddb")
    assert [id for move, id in engine.moves if move == "load"] == list("acdb")


async def test_prefetch_fills_slots_that_nobody_needs_and_no_others() -> None:
    engine, announced = FakeEngine(2), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    announced.announce("run", {"a": 0, "b": 1, "c": 2})
    async with slots.use("a", PATH):
        assert slots.next_prefetch() == "b"
        await slots.prefetch(PATHS)
        assert slots.resident == ("a", "b")
        announced.announce("run", {"b": 0, "c": 1, "a": 2})
        await slots.prefetch(PATHS)
        assert set(slots.resident) == {"a", "b"}  # a is in use
    await slots.prefetch(PATHS)
    assert set(slots.resident) == {"a", "b"}  # a is announced, if later: one of them has to be loaded again
    announced.announce("run", {"b": 0, "c": 1})
    await slots.prefetch(PATHS)
    assert set(slots.resident) == {"b", "c"}
    assert slots.prefetches == 2


async def test_the_first_user_pays_for_a_prefetch_and_has_not_waited_for_it() -> None:
    engine, announced = FakeEngine(1), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    await engine.work(slots, "a")
    announced.announce("run", {"b": 1})
    await slots.prefetch(PATHS)
    assert slots.unclaimed_cpu_s == 1.25
    async with slots.use("b", PATH) as lease:
        assert (lease.swaps, lease.cpu_s, lease.swap_s) == (1, 1.25, 0.0)
    assert slots.unclaimed_cpu_s == 0.0
    assert await engine.work(slots, "b") == (0, 0.0)


async def test_a_failed_prefetch_is_told_to_who_needs_the_adapter() -> None:
    engine, announced = FakeEngine(2), AnnouncedUses()
    engine.bad = {"bad"}
    slots = engine.make_slots(announced=announced)
    announced.announce("run", {"bad": 1})
    await slots.prefetch({"bad": PATH})
    assert slots.next_prefetch() is None  # it is not tried again and again
    with pytest.raises(AdapterError, match="adapter bad is broken"):
        await engine.work(slots, "bad")
    engine.bad = set()
    await engine.work(slots, "bad")
    assert engine.numbers == [1, 2, 3]


async def test_an_ask_that_comes_during_a_prefetch_waits_for_it() -> None:
    engine, announced = FakeEngine(1), AnnouncedUses()
    slots = engine.make_slots(announced=announced)
    announced.announce("run", {"a": 1})
    paid: list[tuple[int, float]] = []

    async def use() -> None:
        paid.append(await engine.work(slots, "a"))

    async with anyio.create_task_group() as group:
        group.start_soon(slots.prefetch, PATHS)
        group.start_soon(use)
        group.start_soon(use)
    assert sorted(paid) == [(0, 0.0), (1, 1.0)]
    assert engine.numbers == [1]


async def test_without_announcements_nothing_is_fetched_ahead() -> None:
    engine = FakeEngine(2)
    slots = engine.make_slots()
    assert slots.next_prefetch() is None
    await slots.prefetch(PATHS)
    assert not engine.moves


Run = tuple[list[tuple[str, int]], list[dict[str, int]], int | None]


def runs() -> st.SearchStrategy[list[Run]]:
    """What each run uses and for how long, what it announces before (true or not), and when it is cancelled."""
    id = st.sampled_from("abcdefg")
    uses = st.lists(st.tuples(id, st.integers(0, 4)), min_size=1, max_size=6)
    announcements = st.lists(st.dictionaries(id, st.integers(0, 4), max_size=5), min_size=1, max_size=6)
    return st.lists(st.tuples(uses, announcements, st.none() | st.integers(0, 12)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    runs=runs(),
    slot_count=st.integers(1, 4),
    pass_limit=st.integers(0, 4),
    pin_asks=st.integers(0, 3),
    prefetch_asks=st.integers(0, 3),
    bad=st.sets(st.sampled_from("fg"), max_size=1),
    backend=st.sampled_from(["asyncio", "trio"]),
)
def test_whatever_is_announced_every_run_ends_within_the_slots(
    runs: list[Run], slot_count: int, pass_limit: int, pin_asks: int, prefetch_asks: int, bad: set[str], backend: str
) -> None:
    engine, announced = FakeEngine(slot_count), AnnouncedUses()
    engine.bad = bad
    slots: AdapterSlots
    ended: list[int] = []

    def on_use(kind: str, id: str) -> None:
        assert len(engine.held) <= slot_count
        assert not slots._table._waiting or slots._table._waiting.first.overtaken <= pass_limit

    async def one(number: int, run: Run) -> None:
        uses, announcements, cancel_after = run
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as beside:

                async def cancel_later(checkpoints: int) -> None:
                    for _ in range(checkpoints):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                if cancel_after is not None:
                    beside.start_soon(cancel_later, cancel_after)
                for step, (id, checkpoints) in enumerate(uses):
                    announced.announce(str(number), announcements[step % len(announcements)])
                    slots.announcements_changed()
                    beside.start_soon(slots.prefetch, PATHS)
                    try:
                        await engine.work(slots, id, checkpoints)
                    except AdapterError:
                        assert id in bad
                beside.cancel_scope.cancel()
        announced.forget(str(number))
        slots.announcements_changed()
        ended.append(number)

    async def main() -> None:
        nonlocal slots
        slots = engine.make_slots(
            pass_limit, announced=announced, pin_asks=pin_asks, prefetch_asks=prefetch_asks, on_use=on_use
        )
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for number, run in enumerate(runs):
                    group.start_soon(one, number, run)
            # Nothing is left pinned: every slot can still be had.
            for id in "wxyz"[:slot_count]:
                await engine.work(slots, id)

    anyio.run(main, backend=backend)
    assert len(ended) == len(runs)
    assert engine.spent_s == pytest.approx(engine.borne_s + slots.unclaimed_cpu_s)
