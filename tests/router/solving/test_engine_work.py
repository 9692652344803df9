"""What engines cost is found again from what they did."""

from __future__ import annotations

import random

import pytest

from metier.router.solving.engine_work import EngineWork, busy_seconds_per_cpu_s, engine_steps, fit_engine_cost


def stretch(number: int, noise: float = 0.0) -> EngineWork:
    """Work of an engine with batches of any size, at 0.4 ms a prompt token, 1.5 ms a token and 25 ms a step."""
    rng = random.Random(number)
    steps, batch, prefill = rng.randint(20, 400), rng.uniform(1, 16), rng.randint(100, 20_000)
    decode = round(steps * batch)
    cpu_s = (4e-4 * prefill + 1.5e-3 * decode + 25e-3 * steps) * (1 + rng.uniform(-noise, noise))
    return EngineWork(
        key=str(number), checkpoint="base", steps=steps, prefill_tokens=prefill, decode_tokens=decode, cpu_s=cpu_s
    )


def test_costs_are_found_again() -> None:
    cost = fit_engine_cost([stretch(number) for number in range(10)])
    assert cost is not None
    assert (cost.prefill_cpu_s, cost.decode_cpu_s, cost.step_cpu_s) == pytest.approx((4e-4, 1.5e-3, 25e-3))


def test_a_noisy_machine_moves_them_little() -> None:
    cost = fit_engine_cost([stretch(number, noise=0.1) for number in range(60)])
    assert cost is not None
    assert (cost.decode_cpu_s, cost.step_cpu_s) == pytest.approx((1.5e-3, 25e-3), rel=0.2)


def test_too_little_work_says_nothing() -> None:
    assert fit_engine_cost([stretch(number) for number in range(7)]) is None
    same = stretch(0)
    assert fit_engine_cost([same] * 20) is None


def test_seconds_of_a_cpu_second_are_those_of_most_stretches() -> None:
    threads = [stretch(n) for n in range(5)]
    half = [one.model_copy(update={"busy_s": one.cpu_s / 2}) for one in threads]
    assert busy_seconds_per_cpu_s(threads) is None  # a journal from before they were noted
    disturbed = half[0].model_copy(update={"busy_s": 30.0 * half[0].cpu_s})
    assert busy_seconds_per_cpu_s([*half, disturbed, *threads]) == pytest.approx(0.5)


def test_steps_by_simulation() -> None:
    """Runs that go through engines one token at a time, all engines stepping in turn, make as many steps as said."""
    tokens = {"a": 30, "b": 15, "c": 5}
    running, tasks, rng = 8, 2_000, random.Random(0)
    plan = [name for name, count in tokens.items() for _ in range(count)]
    places = [rng.randrange(len(plan)) for _ in range(running)]
    steps = dict.fromkeys(tokens, 0)
    turns = tasks * len(plan) // running
    for _ in range(turns):
        for name in {plan[place] for place in places}:
            steps[name] += 1
        places = [(place + 1) % len(plan) if rng.random() < 0.98 else rng.randrange(len(plan)) for place in places]
    said = {name: engine_steps(count, len(plan), running) for name, count in tokens.items()}
    assert steps["a"] / tasks == pytest.approx(said["a"], rel=0.05)
    assert steps["b"] / tasks == pytest.approx(said["b"], rel=0.15)
    # Few runs are in an engine of few tokens: it steps in six turns of ten, and is said to step in eight.
    assert steps["c"] / tasks == pytest.approx(0.57 * len(plan) / running, rel=0.1)
