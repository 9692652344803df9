"""Foresight: the variants that the steps after this one will ask for, read from the built graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...agents.backend import ForeseeingBackend, Prefetch, Upcoming
from ...agents.graphs.nodes import BuiltBody, BuiltGraph, BuiltNode, GraphWork, LoopWork, RoleWork
from ...agents.graphs.step_paths import ROOT, StepPath

__all__ = ["Foresight", "RunForesight", "VariantOf"]


VariantOf = Callable[[str, int], str | None]
"""The variant that serves a role in a round."""

PLACES_LIMIT = 2000
"""Places looked at from one place; only loops of hundreds of rounds without any role reach it."""

KNOWN_LIMIT = 10_000
"""Places whose answer is kept; only very long loops have more."""


@dataclass(frozen=True, eq=False)
class _Level:
    """One body as it runs: in round `round` of the loop `around`, or inside the sub-graph `around`.

    `later` marks a run that follows this one.
    """

    body: BuiltBody
    path: StepPath = ROOT
    round: int = 1
    around: BuiltNode | None = None
    outer: _Level | None = None
    later: bool = False


class _Place(NamedTuple):
    level: _Level
    node: BuiltNode


class Foresight:
    """The variants that each step and those after it ask for, at most `asks` asks ahead; computed once for each place.

    Everything that is possible counts: the next round and what comes after the loop, steps whose condition may
    yet fail. A distance is the smallest possible one and counts asks, so functions and skipped steps are free.

    After a run's last steps come the first ones of the next run of the graph. With `again` one is known to follow.
    Otherwise that is a guess, used to choose what to keep when nothing else is known; its distances are above `asks`,
    so that sure uses come first.
    """

    def __init__(self, graph: BuiltGraph, variant_of: VariantOf, *, asks: int) -> None:
        self._graph = graph
        self._variant_of = variant_of
        self._asks = asks
        self._known: dict[tuple[StepPath, bool], Upcoming] = {}

    def upcoming(self, path: str, *, again: bool = False) -> Upcoming:
        """Variants that the step at `path` (`attempt[2]/critic`) asks for, and those that may be asked for after it."""
        at = StepPath.parse(path).without_items  # what follows each item of a fan-out is the same
        known = self._known.get((at, again))
        if known is None:
            if len(self._known) >= KNOWN_LIMIT:
                self._known.clear()
            known = self._known[at, again] = self._look_ahead(at, again)
        return known

    def _look_ahead(self, at: StepPath, again: bool) -> Upcoming:
        """Nearest first over places: going past a role is one ask, everything else is free."""
        here = self._locate(at)
        work = here.node.work
        found = {self._variant_of(work.role.name, here.level.round): 0} if isinstance(work, RoleWork) else {}
        seen: set[tuple[bool, StepPath]] = set()
        queue = deque((place, 0) for place in self._next(here))
        while queue and len(seen) < PLACES_LIMIT:
            place, asks = queue.popleft()
            level, node = place
            if asks >= self._asks or (level.later, level.path / node.name) in seen:
                continue
            seen.add((level.later, level.path / node.name))
            entered = _enter(place)
            if entered is not None:
                queue.extendleft((inner, asks) for inner in entered)
            if isinstance(node.work, RoleWork):
                variant = self._variant_of(node.work.role.name, level.round)
                distance = asks + 1 + (self._asks if level.later and not again else 0)
                found[variant] = min(distance, found.get(variant, distance))
                queue.extend((after, asks + 1) for after in self._next(place))
            if node.when is not None or (entered is None and not isinstance(node.work, RoleWork)):
                queue.extendleft((after, asks) for after in self._next(place))
        return tuple(sorted(found.items(), key=lambda item: item[1]))

    def _next(self, place: _Place) -> Iterator[_Place]:
        """Where a run may go from a place: the steps after it, or out of its body when it is a last one."""
        level, node = place
        followers = level.body.followers[node.name]
        if followers:
            yield from (_Place(level, follower) for follower in followers)
        elif level.around is None or level.outer is None:
            yield from _roots(_Level(self._graph.body, later=True))
        else:
            work = level.around.work
            if isinstance(work, LoopWork) and level.round < work.max_rounds:
                yield from _roots(_round(_Place(level.outer, level.around), work, level.round + 1))
                if work.until is None:
                    return
            yield from self._next(_Place(level.outer, level.around))

    def _locate(self, at: StepPath) -> _Place:
        level = _Level(self._graph.body)
        for step in at.parent.steps:
            around = _Place(level, level.body[step.name])
            if isinstance(around.node.work, LoopWork):
                level = _round(around, around.node.work, step.round or 1)
            else:
                assert isinstance(around.node.work, GraphWork)
                level = _sub_graph(around, around.node.work)
        return _Place(level, level.body[at.name])


def _enter(place: _Place) -> Iterator[_Place] | None:
    """The first steps inside a loop or a sub-graph, None for other steps."""
    work = place.node.work
    if isinstance(work, LoopWork):
        return _roots(_round(place, work, 1))
    return _roots(_sub_graph(place, work)) if isinstance(work, GraphWork) else None


def _round(loop: _Place, work: LoopWork, number: int) -> _Level:
    level, node = loop
    return _Level(work.body, (level.path / node.name).in_round(number), number, node, level, level.later)


def _sub_graph(place: _Place, work: GraphWork) -> _Level:
    level, node = place
    return _Level(work.graph.body, level.path / node.name, 1, node, level, level.later)


def _roots(level: _Level) -> Iterator[_Place]:
    return (_Place(level, node) for node in level.body.nodes if not node.after)


class RunForesight:
    """Announces one run's upcoming variants to a backend as its steps begin; `close` takes them back.

    Several steps of a run may be under way at once: what is announced is what may follow any of them.
    """

    def __init__(
        self, run_id: str, foresight: Foresight, backend: ForeseeingBackend, *, again: Callable[[], bool]
    ) -> None:
        self._run_id = run_id
        self._foresight = foresight
        self._backend = backend
        self._again = again
        self._under_way: dict[str, Upcoming] = {}

    def step_began(self, path: str) -> Prefetch | None:
        """Announce that a step begins. The result loads the adapters that come next; None where none is to load."""
        self._under_way[path] = self._foresight.upcoming(path, again=self._again())
        return self._backend.foresee(self._run_id, self._merged())

    def step_ended(self, path: str) -> None:
        """Forget a step that has ended. Nothing is announced: the steps after it begin now and announce themselves."""
        self._under_way.pop(path, None)

    def close(self) -> None:
        """The run has ended."""
        self._under_way.clear()
        self._backend.forget(self._run_id)

    def _merged(self) -> Upcoming:
        if len(self._under_way) == 1:
            return next(iter(self._under_way.values()))
        nearest: dict[str | None, int] = {}
        for upcoming in self._under_way.values():
            for variant, asks in upcoming:
                nearest[variant] = min(asks, nearest.get(variant, asks))
        return tuple(sorted(nearest.items(), key=lambda item: item[1]))
