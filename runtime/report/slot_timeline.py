"""An engine's adapter slots over time: what was resident, what was in use, and who waited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .ledger import AskEntry, Ledger

__all__ = ["EngineTimeline", "Lane", "engine_timelines", "merged", "without_pauses"]

Span = tuple[float, float]

POINTS = 700
"""Moments a timeline is resolved to; more would not be seen, and would make the page as large as the store."""
LANES = 24
PAUSE_S = 5.0
"""Stretches longer than this without any ask (a batch resumed the next day) are cut out."""


@dataclass
class Lane:
    """One variant on one engine, in seconds since the timeline's start; `adapter` says that it needs a slot.

    `resident` from loaded to evicted, `loading` while it was brought in, `using` while asks were in the engine,
    `waiting` while asks waited for a slot or for the load.
    """

    variant: str
    adapter: bool = False
    asks: int = 0
    resident: list[Span] = field(default_factory=list)
    loading: list[Span] = field(default_factory=list)
    using: list[Span] = field(default_factory=list)
    waiting: list[Span] = field(default_factory=list)


@dataclass
class EngineTimeline:
    """One engine: a lane per variant, and at `times` how many asks were inside, queued, and waiting for a slot.

    `pauses` are the moments where idle time was cut out; `left_out` says how many lanes were too many to show.
    """

    engine: str
    length_s: float
    lanes: list[Lane]
    times: list[float]
    running: list[int]
    queued: list[int]
    for_slot: list[int]
    pauses: list[float]
    left_out: int = 0

    @property
    def has_slots(self) -> bool:
        """Whether adapters were moved in and out of this engine."""
        return any(lane.adapter for lane in self.lanes)


def engine_timelines(ledger: Ledger) -> list[EngineTimeline]:
    """One timeline for each engine that answered asks, busiest first."""
    by_engine: dict[str, list[AskEntry]] = defaultdict(list)
    for ask in ledger.asks:
        if not ask.lost and ask.engine:
            by_engine[ask.engine].append(ask)
    ordered = sorted(by_engine.items(), key=lambda item: -len(item[1]))
    return [_timeline(ledger, engine, asks) for engine, asks in ordered]


def merged(spans: Iterable[Span], gap: float = 0.0) -> list[Span]:
    """The union of spans in order; those nearer than `gap` become one."""
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1] + gap:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def without_pauses(spans: Sequence[Span], pause_s: float = PAUSE_S) -> tuple[Callable[[float], float], list[float]]:
    """A function from time to time with pauses cut out, starting at 0, and the moments at which one was cut."""
    busy = merged(spans, gap=pause_s)
    cuts: list[tuple[float, float]] = [(busy[0][0], busy[0][0])]  # (from when on, by how much earlier)
    pauses = []
    for (_, end), (start, _) in zip(busy, busy[1:], strict=False):
        shift = cuts[-1][1] + start - end
        pauses.append(end - cuts[-1][1])
        cuts.append((start, shift))

    def squeezed(time: float) -> float:
        for index in range(len(cuts) - 1, -1, -1):
            start, shift = cuts[index]
            if time >= start:
                # What lies in a pause is moved to its beginning.
                latest = busy[index][1]
                return min(time, latest) - shift
        return 0.0

    return squeezed, pauses


def _timeline(ledger: Ledger, engine: str, asks: list[AskEntry]) -> EngineTimeline:
    squeezed, pauses = without_pauses([(ask.asked_at, ask.answered_at) for ask in asks])
    length = max(squeezed(ask.answered_at) for ask in asks)
    lanes: dict[str, Lane] = {}
    phases: dict[str, list[Span]] = {"running": [], "queued": [], "for_slot": []}
    for ask in asks:
        lane = lanes.setdefault(ask.variant, Lane(ask.variant))
        lane.asks += 1
        began = min(ask.asked_at + ask.queue_s + ask.swap_s, ask.answered_at)
        lane.using.append((squeezed(began), squeezed(ask.answered_at)))
        phases["running"].append((squeezed(began), squeezed(ask.answered_at)))
        phases["queued"].append((squeezed(ask.asked_at), squeezed(began)))
        waited = ask.slot_wait_s + ask.swap_s
        if waited > 0:
            span = (squeezed(ask.asked_at), squeezed(min(ask.asked_at + waited, ask.answered_at)))
            lane.waiting.append(span)
            phases["for_slot"].append(span)
    _note_moves(ledger, engine, lanes, squeezed, length)
    shown = sorted(lanes.values(), key=lambda lane: (-lane.asks, lane.variant))
    resolution = length / POINTS
    for lane in shown:
        for name in ("resident", "loading", "using", "waiting"):
            setattr(lane, name, merged(getattr(lane, name), gap=resolution))
    times = [index * resolution for index in range(POINTS + 1)]
    return EngineTimeline(
        engine=engine,
        length_s=length,
        lanes=shown[:LANES],
        times=times,
        running=_most_at_once(phases["running"], times),
        queued=_most_at_once(phases["queued"], times),
        for_slot=_most_at_once(phases["for_slot"], times),
        pauses=pauses,
        left_out=len(shown[LANES:]),
    )


def _note_moves(
    ledger: Ledger, engine: str, lanes: dict[str, Lane], squeezed: Callable[[float], float], length: float
) -> None:
    """Residence from loads and evictions; what was there before the batch began was there from the start."""
    since: dict[str, float] = {}
    for event in ledger.slot_events:
        if event.engine != engine:
            continue
        lane = lanes.setdefault(event.adapter, Lane(event.adapter))
        lane.adapter = True
        at = squeezed(event.at)
        if event.loaded:
            lane.loading.append((squeezed(event.at - event.seconds), at))
            since[event.adapter] = at
        else:
            lane.resident.append((since.pop(event.adapter, 0.0), at))
    for adapter, start in since.items():
        lanes[adapter].resident.append((start, length))
    for lane in lanes.values():
        first = min((start for start, _ in lane.using), default=None)
        known = min((start for start, _ in lane.resident), default=None)
        if lane.adapter and first is not None and known is not None and first < known - max(0.01, length / POINTS):
            lane.resident.append((0.0, known))


def _most_at_once(spans: list[Span], times: Sequence[float]) -> list[int]:
    """How many spans are open at each of the (evenly spaced) times."""
    step = times[1] - times[0] if len(times) > 1 and times[1] > times[0] else 1.0
    change = [0] * (len(times) + 1)
    for start, end in spans:
        if end > start:
            first = min(int(start / step), len(times) - 1)
            change[first] += 1
            change[max(min(int(end / step), len(times)), first + 1)] -= 1
    counts, open_now = [], 0
    for difference in change[:-1]:
        open_now += difference
        counts.append(open_now)
    return counts
