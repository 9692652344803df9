"""CPU-seconds per ask: the fitted cost, the accounts, the clock, and their sum on a real engine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.agents.messages import Ask, Usage
from metier.runtime.engines.pool import EnginePool
from metier.runtime.meters.cpu_clock import ThreadFamilyClock
from metier.runtime.meters.cpu_meter import CpuMeter, StepCost, StepRow
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY

rows = st.lists(
    st.builds(StepRow, key=st.integers(0, 5), prefill_tokens=st.integers(0, 500), decode_tokens=st.integers(0, 2)),
    max_size=8,
)


def test_cost_is_learned_from_steps() -> None:
    truth = (0.2e-3, 3e-3, 5e-3)
    draw, cost = random.Random(0), StepCost()
    for _ in range(300):
        prefill, decode = draw.choice((0, 0, 40, 300)), draw.randint(0, 16)
        noise = draw.gauss(1.0, 0.05)
        cost.observe(prefill, decode, noise * (truth[0] * prefill + truth[1] * decode + truth[2]))
    assert cost.seconds == pytest.approx(truth, rel=0.15)


def test_long_run_of_one_kind_of_step_keeps_the_fit_finite() -> None:
    cost = StepCost()
    for _ in range(20_000):
        cost.observe(0, 4, 0.02)
    prefill, decode, fixed = cost.seconds
    assert 4 * decode + fixed == pytest.approx(0.02, rel=1e-3)
    assert 0 <= prefill < 0.1


def test_row_bears_its_tokens_and_an_equal_part_of_the_fixed_cost() -> None:
    cost = StepCost()
    a, b, c = cost.seconds
    total = 100 * a + b + c
    assert cost.shares([StepRow(1, prefill_tokens=100), StepRow(2, decode_tokens=1)]) == pytest.approx(
        [(100 * a + c / 2) / total, (b + c / 2) / total]
    )


@given(steps=st.lists(st.tuples(rows, st.floats(0, 10)), max_size=30), spent=st.floats(0, 5))
def test_accounts_add_up_to_the_total(steps: list[tuple[list[StepRow], float]], spent: float) -> None:
    meter = CpuMeter()
    for step_rows, cpu_s in steps:
        meter.charge_step(step_rows, cpu_s)
    meter.charge(3, spent)
    meter.charge_overhead(spent)
    charged = sum(meter.take(key) for key in range(6)) + meter.overhead_s
    assert charged == pytest.approx(meter.total_s, rel=1e-9, abs=1e-9)
    assert meter.total_s == pytest.approx(sum(cpu_s for _, cpu_s in steps) + 2 * spent, rel=1e-9, abs=1e-9)
    assert meter.take(3) == 0.0


def burn(cpu_s: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < cpu_s:
        pass


def test_clock_counts_the_threads_it_started_and_no_others() -> None:
    readings: dict[str, float] = {}
    go, stranger_done = threading.Event(), threading.Event()

    def stranger() -> None:
        go.wait()
        burn(0.2)
        stranger_done.set()

    def engine() -> None:
        clock = ThreadFamilyClock()
        before = clock.read()
        helper = threading.Thread(target=burn, args=(0.1,))
        helper.start()
        burn(0.05)
        readings["while running"] = clock.read() - before
        helper.join()
        go.set()
        stranger_done.wait()
        readings["family"] = clock.read() - before

    other = threading.Thread(target=stranger)
    other.start()
    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    other.join()
    assert 0.05 <= readings["while running"] <= readings["family"] < 0.2


@pytest.mark.engine
@pytest.mark.anyio
async def test_roles_sum_to_the_engines_total_under_a_mixed_load(
    tiny_base: Path, tiny_variants: dict[str, tuple[Variant, Path]], make_ask: Callable[..., Ask]
) -> None:
    """Long and short prompts, base and five adapters on two slots, schemas, streams, refusals, cancellations."""
    replied: list[Usage] = []
    abandoned: dict[str, float] = {}

    def on_abandoned(ask: Ask, usage: Usage) -> None:
        abandoned[ask.role] = abandoned.get(ask.role, 0.0) + usage.cpu_s

    pool = EnginePool(tiny_base, tiny_variants.__getitem__, TINY, on_abandoned=on_abandoned)

    async def one(number: int) -> None:
        variant = None if number % 6 == 5 else f"lora{number % 6}"
        fields: dict[str, Any] = {"variant": variant, "max_tokens": 5 + number % 30, "role": f"role{number % 3}"}
        if number % 7 == 0:
            fields["answer_schema"] = {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]}
        if number % 10 == 9:
            fields["max_tokens"], fields["role"], fields["temperature"] = 400, "cancelled", 1.0
        words = 300 if number % 4 == 0 else 3
        with anyio.CancelScope() as scope:
            on_text = (lambda piece: scope.cancel()) if number % 10 == 9 else None
            reply = await pool.reply(make_ask(f"{number} " + "seven " * words, **fields), on_text=on_text)
            replied.append(reply.usage)

    async with pool:
        await pool.warm()
        before = pool.totals()["base"]["cpu_s"]
        process_before_s = time.process_time()
        async with anyio.create_task_group() as group:
            for number in range(60):
                group.start_soon(one, number)
        await pool.reply(make_ask(max_tokens=1))  # whatever was aborted is booked before this is answered
        process_s = time.process_time() - process_before_s
        totals = pool.totals()["base"]
    total = totals["cpu_s"] - before
    last = totals["asks"] - len(replied)
    assert last >= 1
    lost = sum(totals["abandoned_cpu_s"].values())
    assert lost > 0 and set(totals["abandoned_cpu_s"]) == {"cancelled"}
    assert abandoned["cancelled"] == pytest.approx(lost)
    charged = sum(usage.cpu_s for usage in replied) + lost
    assert charged == pytest.approx(total, rel=0.02)
    # The engine is most of this process's work, never more than all of it.
    assert total <= process_s * 1.001
