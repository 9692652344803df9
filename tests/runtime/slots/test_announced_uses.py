"""What the slots know of the future, against looking through all announcements."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from metier.runtime.slots.announced_uses import AnnouncedUses

announcements = st.lists(
    st.tuples(st.sampled_from(["run 1", "run 2", "run 3"]), st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)))
)


@settings(max_examples=200, deadline=None)
@given(announcements, st.integers(0, 3))
def test_the_nearest_use_of_any_run_counts(announced: list[tuple[str, dict[str, int]]], asks: int) -> None:
    uses, by_run = AnnouncedUses(), dict[str, dict[str, int]]()
    for run_id, distances in announced:
        uses.announce(run_id, distances)
        by_run[run_id] = distances
    nearest = {id: min((d[id] for d in by_run.values() if id in d), default=math.inf) for id in "abc"}
    assert {id: uses.distance(id) for id in "abc"} == nearest
    soon = uses.within(asks)
    assert set(soon) == {id for id in "abc" if 0 < nearest[id] <= asks}
    assert [nearest[id] for id in soon] == sorted(nearest[id] for id in soon)
    for run_id in by_run:
        uses.forget(run_id)
    assert not uses.within(3) and uses.distance("a") == math.inf
    assert not uses._by_run and not uses._runs_at
