"""The simulated engine: by hand, against closed forms, and against a simulation that makes every step one by one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metier.runtime.simulator.clock import Clock
from metier.runtime.simulator.service_model import ServiceModel
from metier.runtime.simulator.simulated_engine import EngineBounds, EngineRow, PrefixCache, SimulatedEngine

UNIT = ServiceModel(step_s=1.0, prompt_token_s=0.0, row_s=0.0)


@dataclass(frozen=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    priority: float = 0.0


def answered_at(arrivals: list[Arrival], model: ServiceModel, bounds: EngineBounds) -> list[float]:
    """When the simulated engine has answered each ask."""
    clock = Clock()
    engine = SimulatedEngine(clock, model, bounds)
    ends: dict[int, float] = {}
    for number, arrival in enumerate(arrivals):

        def submit(number: int = number, arrival: Arrival = arrival) -> None:
            def done(row: EngineRow) -> None:
                assert number not in ends
                ends[number] = clock.now_s

            row = EngineRow(arrival.prompt_tokens, arrival.output_tokens, arrival.adapter, done)
            row.priority = arrival.priority
            engine.submit(row)

        clock.after(arrival.at_s, submit)
    clock.run()
    assert engine.running == 0
    return [ends[number] for number in range(len(arrivals))]


def step_by_step(arrivals: list[Arrival], model: ServiceModel, bounds: EngineBounds) -> list[float]:
    """The oracle: every step of the engine, one after the other, with nothing kept but lists."""
    to_come = sorted(range(len(arrivals)), key=lambda n: (arrivals[n].at_s, n))
    to_compute = {n: arrivals[n].prompt_tokens for n in to_come}
    to_write = {n: arrivals[n].output_tokens for n in to_come}
    ends: dict[int, float] = {}
    waiting: list[int] = []
    running: list[int] = []
    now = 0.0
    while to_come or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[to_come[0]].at_s)
        while to_come and arrivals[to_come[0]].at_s <= now:
            waiting.append(to_come.pop(0))
        waiting.sort(key=lambda n: arrivals[n].priority)  # stable: of equals the first that came
        budget = bounds.max_batch_tokens
        writing = [n for n in running if not to_compute[n]]
        budget -= len(writing)
        computed: dict[int, int] = {}
        for n in running:
            if to_compute[n] and budget > 0:
                computed[n] = min(to_compute[n], budget)
                budget -= computed[n]
        while waiting and budget > 0 and len(running) < bounds.max_running:
            n = waiting.pop(0)
            running.append(n)
            computed[n] = min(to_compute[n], budget)
            budget -= computed[n]
        adapters = {arrivals[n].adapter for n in running} - {None}
        now += model.step_of(sum(computed.values()), len(writing), len(adapters))
        for n, tokens in computed.items():
            to_compute[n] -= tokens
        for n in [*writing, *(n for n in computed if not to_compute[n])]:
            to_write[n] -= 1
            if not to_write[n]:
                ends[n] = now
                running.remove(n)
    return [ends[n] for n in range(len(arrivals))]


def test_one_ask_takes_a_step_for_its_prompt_and_one_for_each_further_token() -> None:
    assert answered_at([Arrival(0.0, 7, 5)], UNIT, EngineBounds()) == [5.0]


def test_asks_of_one_moment_share_their_steps_and_one_at_a_time_they_queue() -> None:
    four = [Arrival(0.0, 7, 5)] * 4
    assert answered_at(four, UNIT, EngineBounds()) == [5.0] * 4
    assert answered_at(four, UNIT, EngineBounds(max_running=1)) == [5.0, 10.0, 15.0, 20.0]


def test_who_comes_in_the_middle_of_a_step_waits_for_its_end() -> None:
    assert answered_at([Arrival(0.0, 1, 10), Arrival(2.5, 1, 2)], UNIT, EngineBounds()) == [10.0, 5.0]


def test_a_long_prompt_is_computed_in_parts() -> None:
    bounds = EngineBounds(max_batch_tokens=40)
    assert answered_at([Arrival(0.0, 100, 1)], UNIT, bounds) == [3.0]


def test_smallest_priority_goes_first() -> None:
    asks = [Arrival(0.0, 1, 3), Arrival(0.5, 1, 3, priority=2.0), Arrival(0.6, 1, 3, priority=1.0)]
    assert answered_at(asks, UNIT, EngineBounds(max_running=1)) == [3.0, 9.0, 6.0]


def test_who_would_not_fit_the_cache_waits_unless_nothing_runs() -> None:
    bounds = EngineBounds(kv_tokens=64)
    asks = [Arrival(0.0, 30, 4), Arrival(0.0, 30, 4), Arrival(0.0, 100, 2)]
    assert answered_at(asks, UNIT, bounds) == [4.0, 8.0, 10.0]


def test_moves_of_adapters_hold_up_the_next_step() -> None:
    clock, ends = Clock(), list[float]()
    engine = SimulatedEngine(clock, UNIT, EngineBounds())
    engine.submit(EngineRow(1, 4, None, lambda row: ends.append(clock.now_s)))
    clock.after(1.5, lambda: engine.between_steps(10.0, lambda: ends.append(clock.now_s)))
    clock.run()
    assert ends == [12.0, 14.0]
    assert engine.busy_s == 4.0


def test_a_prefix_is_found_by_the_adapter_that_computed_it_until_it_makes_room() -> None:
    cache = PrefixCache(block_tokens=32, limit_blocks=3)

    def admit(adapter: str | None, *blocks: int) -> int:
        return cache.admit(EngineRow(100, 1, adapter, lambda row: None, blocks))

    assert [admit(None, 1, 2), admit(None, 1, 2), admit("a", 1, 2), admit(None, 1, 3)] == [0, 64, 0, 32]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(
        st.builds(
            Arrival,
            at_s=st.integers(0, 400).map(lambda n: n / 16),
            prompt_tokens=st.integers(1, 90),
            output_tokens=st.integers(1, 12),
            adapter=st.sampled_from([None, "a", "b"]),
            priority=st.integers(0, 2).map(float),
        ),
        max_size=14,
    ),
    max_running=st.integers(1, 5),
    max_batch_tokens=st.integers(16, 64),
)
def test_it_agrees_with_every_step_made_one_by_one(
    arrivals: list[Arrival], max_running: int, max_batch_tokens: int
) -> None:
    # Costs that are powers of two: both reckon exactly, and nobody comes at the very moment a step ends.
    arrivals = [replace(arrival, at_s=arrival.at_s + number / 2**20) for number, arrival in enumerate(arrivals)]
    model = ServiceModel(step_s=0.5, prompt_token_s=1 / 128, row_s=1 / 32, adapter_s=1 / 8)
    bounds = EngineBounds(max_running=max_running, max_batch_tokens=max_batch_tokens)
    assert answered_at(arrivals, model, bounds) == step_by_step(arrivals, model, bounds)


def test_one_row_at_a_time_is_the_queue_of_the_textbook() -> None:
    """M/M/1: Poisson arrivals, service times exponential, mean time in the system 1 / (service - arrival rate)."""
    draw, now = random.Random(1), 0.0
    arrivals = []
    for _ in range(40_000):
        now += draw.expovariate(0.5)
        arrivals.append(Arrival(now, max(round(draw.expovariate(1.0) * 1e4), 1), 1))
    model = ServiceModel(step_s=0.0, prompt_token_s=1e-4, row_s=0.0)
    bounds = EngineBounds(max_running=1, max_batch_tokens=10**6)
    ends = answered_at(arrivals, model, bounds)
    mean = sum(end - arrival.at_s for end, arrival in zip(ends, arrivals, strict=True)) / len(ends)
    assert mean == pytest.approx(1 / (1.0 - 0.5), rel=0.05)


def test_events_of_one_moment_keep_their_order() -> None:
    clock, seen = Clock(), list[int]()
    for number in range(5):
        clock.after(1.0, lambda number=number: seen.append(number))  # type: ignore[misc]
    clock.run()
    assert seen == sorted(seen) and Counter(seen) == Counter(range(5))
