"""The fewest loads of a trace, against trying everything."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from metier.runtime.slots.slot_trace import SlotEvent, fewest_loads


def by_trying_everything(events: list[SlotEvent], slots: int, resident: frozenset[str]) -> int:
    """Fewest loads over all choices of what to hold after each event: dynamic programming over whole sets."""
    costs: dict[frozenset[str], int] = {resident: 0}
    using: list[str] = []
    for kind, id in events:
        if kind == "ended":
            using.remove(id)
            continue
        using.append(id)
        reached: dict[frozenset[str], int] = {}
        for held, cost in costs.items():
            for keep in product((False, True), repeat=len(held)):
                kept = frozenset(h for h, k in zip(sorted(held), keep, strict=True) if k)
                after = kept | {id}
                if set(using) - {id} <= kept and len(after) <= slots:
                    paid = cost + (id not in held)
                    reached[after] = min(paid, reached.get(after, paid))
        costs = reached
    return min(costs.values())


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[SlotEvent], int, frozenset[str]]:
    slots = draw(st.integers(1, 3))
    events: list[SlotEvent] = []
    using: list[str] = []
    for id, end_one in draw(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=14)):
        while using and (end_one or len({*using, id}) > slots):
            events.append(("ended", using.pop(0)))
            end_one = False
        using.append(id)
        events.append(("began", id))
    resident = draw(st.sets(st.sampled_from("abcde"), max_size=slots))
    return events + [("ended", id) for id in using], slots, frozenset(resident)


@settings(max_examples=400, deadline=None)
@given(traces())
def test_as_few_as_trying_everything_finds(trace: tuple[list[SlotEvent], int, frozenset[str]]) -> None:
    assert fewest_loads(*trace) == by_trying_everything(*trace)


def one_after_another(ids: str) -> list[SlotEvent]:
    return [event for id in ids for event in (("began", id), ("ended", id))]  # type: ignore[misc]


def test_a_cycle_that_is_one_longer_than_the_slots() -> None:
    """Always evicting the longest idle loads at every use; the optimum does so at every third."""
    assert fewest_loads(one_after_another("abcd" * 4), 3) == 4 + 4
    assert fewest_loads(one_after_another("abcd" * 4), 4) == 4
    assert fewest_loads(one_after_another("abcd" * 4), 4, "abcd") == 0


def test_a_use_that_goes_on_occupies_a_slot() -> None:
    inner = one_after_another("bcbc")
    assert fewest_loads(inner, 2) == 2
    assert fewest_loads([("began", "a"), *inner, ("ended", "a")], 2) == 1 + 4
