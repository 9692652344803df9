"""Which simulated replica gets an ask: our policy, and those it is compared with."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ...router.placement.placement import PlacedAsk, PlacementCosts, ReplicaState, place
from .service_model import ServiceModel

__all__ = ["PLACEMENTS", "Chooser", "PlacementName", "costs_of", "make_chooser"]

PlacementName = Literal["placed", "placed-sample", "least-loaded", "round-robin", "adapter-hash"]
PLACEMENTS: tuple[PlacementName, ...] = get_args(PlacementName)

Chooser = Callable[[PlacedAsk], int]

HOLDERS = DRAWN = 8
"""How many replicas `placed-sample` looks at: that hold the adapter, and that are drawn."""


@dataclass
class _RoundRobin:
    replicas: int
    turn: int = -1

    def __call__(self, ask: PlacedAsk) -> int:
        self.turn = (self.turn + 1) % self.replicas
        return self.turn


class _PlacedSample:
    """`place`, but on the replicas that were last given the adapter and on a few drawn at random.

    Two drawn at random already do most of what looking at all does (Mitzenmacher, The power of two choices, 2001).
    """

    def __init__(self, states: Sequence[ReplicaState], costs: PlacementCosts) -> None:
        self._states = states
        self._costs = costs
        self._index = {state.name: number for number, state in enumerate(states)}
        self._draw = random.Random(0)
        self._given: dict[str | None, list[int]] = {}

    def __call__(self, ask: PlacedAsk) -> int:
        given = self._given.setdefault(ask.adapter, [])
        given[:] = [number for number in given if ask.adapter in self._states[number].adapters][-HOLDERS:]
        drawn = self._draw.sample(range(len(self._states)), min(DRAWN, len(self._states)))
        placement = place(ask, [self._states[number] for number in sorted({*given, *drawn})], self._costs)
        chosen = self._index[placement.replica]
        if chosen not in given:
            given.append(chosen)
        return chosen


def make_chooser(name: PlacementName, states: Sequence[ReplicaState], costs: PlacementCosts) -> Chooser:
    """A policy over replicas whose states the caller keeps.

    `placed` is `router/placement.py`, what serves, on all replicas; `placed-sample` the same on a few. `least-loaded`
    has the fewest tokens before it; `adapter-hash` gives every adapter one replica for good, and spreads what needs
    none by conversation.
    """
    if name == "placed":
        index = {state.name: number for number, state in enumerate(states)}
        return lambda ask: index[place(ask, states, costs).replica]
    if name == "placed-sample":
        return _PlacedSample(states, costs)
    if name == "least-loaded":
        return lambda ask: min(range(len(states)), key=lambda number: states[number].outstanding_tokens)
    if name == "round-robin":
        return _RoundRobin(len(states))
    return lambda ask: zlib.crc32((ask.adapter or ask.conversation).encode()) % len(states)


def costs_of(model: ServiceModel, *, max_running: int, running: float, output_tokens: float) -> PlacementCosts:
    """Costs of placement on replicas of this model, with `running` asks on each of `output_tokens` tokens.

    A token in flight shares its steps with the rest of a full batch, and an ask of one's own takes as many such steps
    as it writes tokens. All asks on a replica stand still during a load.
    """
    shared_step_s = model.step_s / max_running + model.row_s
    full_step_s = model.step_of(0, max_running, 1)
    return PlacementCosts(
        prompt_token_s=model.prompt_token_s,
        answer_token_s=full_step_s,
        outstanding_token_s=shared_step_s,
        adapter_load_s=(model.load_s + model.evict_s) * max(min(running, max_running), 1.0),
        slot_hold_s=full_step_s * output_tokens,
    )
