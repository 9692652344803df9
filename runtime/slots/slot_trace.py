"""The fewest adapter loads possible for a recorded trace of uses: Belady's optimum for uses that overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

__all__ = ["SlotTrace", "fewest_loads"]

SlotEvent = tuple[Literal["began", "ended"], str]


class SlotTrace:
    """Records when asks pin and release adapters (`OnAdapterUse`), and how many loads there were."""

    def __init__(self) -> None:
        self.events: list[SlotEvent] = []

    def __call__(self, kind: Literal["began", "ended"], id: str) -> None:
        """Record one event."""
        self.events.append((kind, id))

    def clear(self) -> None:
        """Start over; only while no adapter is in use."""
        self.events = []


def fewest_loads(events: Sequence[SlotEvent], slots: int, resident: Iterable[str] = ()) -> int:
    """The fewest loads with which these uses can happen in this order, overlapping as they did.

    `resident` is what the slots hold at the start. An adapter in use occupies a slot. Between two uses it is
    either kept, which occupies a slot all that time, or comes back with a load. So the fewest loads are the
    stretches of use less the most gaps that can be kept in the slots that are free meanwhile. Going through
    time and, when there are too many, giving up the gap that ends last keeps the most: an exchange argument as
    in Belady, IBM Systems Journal 5 (1966), of which this is the case of several pages pinned at a time.

    The bound is for this trace: another order of the same asks may need fewer loads.
    """
    starts: dict[str, list[int]] = {}
    ends: dict[str, list[int]] = {}
    using: Counter[str] = Counter()
    free_after: list[int] = []  # slots without an adapter in use, after each event
    for time, (kind, id) in enumerate(events):
        using[id] += 1 if kind == "began" else -1
        if kind == "began" and using[id] == 1:
            starts.setdefault(id, []).append(time)
        if using[id] == 0:
            del using[id]
            ends.setdefault(id, []).append(time)
        free_after.append(slots - len(using))
    # A gap is open after event `end` and before event `start`; -1 is before everything.
    opening: dict[int, list[int]] = {}
    for id, began in starts.items():
        ended = ends.get(id, [])
        if id in resident:
            opening.setdefault(-1, []).append(began[0])
        for end, start in zip(ended, began[1:], strict=False):
            opening.setdefault(end, []).append(start)
    stretches, kept, open_gaps = sum(map(len, starts.values())), 0, list[int]()
    for time in range(-1, len(events)):
        kept += sum(start <= time for start in open_gaps)
        open_gaps = sorted([start for start in open_gaps if start > time] + opening.get(time, []))
        free = slots if time < 0 else free_after[time]
        del open_gaps[max(free, 0) :]
    return stretches - kept
