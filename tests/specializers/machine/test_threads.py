"""How many threads compute, by what else the machine does and what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.specializers.machine import threads
from metier.specializers.machine.machine import this_machine
from metier.specializers.machine.measured_speed import MeasuredSpeed, Timing, note_speed
from metier.specializers.machine.threads import computing_on, engine_threads, training_threads


@pytest.fixture(autouse=True)
def four_cores_without_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path))
    monkeypatch.setattr(threads, "GIVEN", "")
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "others_busy", lambda: 0.0)


@pytest.mark.parametrize(("busy", "left"), [(0.0, 4), (0.2, 4), (0.3, 3), (1.0, 3), (3.5, 1), (4.0, 1), (9.0, 1)])
def test_training_leaves_the_cores_that_others_use(busy: float, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_busy", lambda: busy)
    found = training_threads(None)
    assert found.threads == left
    assert f"{busy:.1f} of 4 cores" in found.reason


def test_what_is_set_wins_over_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_busy", lambda: 4.0)
    monkeypatch.setattr(threads, "GIVEN", "2")
    assert training_threads(None).threads == 2
    assert training_threads(3).threads == 3
    monkeypatch.setattr(threads, "GIVEN", "2,1")  # a list for nested regions is no number of ours
    assert training_threads(None).threads == 1


def timings(*seconds: float) -> tuple[Timing, ...]:
    return tuple(Timing(dtype="float32", threads=n, seconds=s, cpu_s=n * s) for n, s in enumerate(seconds, 1))


@pytest.mark.parametrize(
    ("seconds", "others", "chosen"),
    [
        ((4.0, 2.1, 1.5, 1.2), 0.0, 4),
        ((4.0, 2.0, 1.9, 1.85), 0.0, 2),  # a thread of the same core saves a tenth
        ((1.0, 1.0, 8.0, 9.0), 0.0, 1),
        ((4.0,), 0.0, 4),  # nothing was compared
        ((1.0, 1.0, 8.0, 9.0), 1.5, 4),  # measured beside other programs: says nothing of a quiet machine
    ],
)
def test_an_engine_takes_no_more_threads_than_were_worth_it(
    seconds: tuple[float, ...], others: float, chosen: int
) -> None:
    assert engine_threads(None).threads == 4
    note_speed(
        MeasuredSpeed(
            machine=this_machine(), base="b", base_name="b", day="today", others=others, engine=timings(*seconds)
        )
    )
    assert engine_threads(None).threads == chosen
    assert engine_threads(3).threads == 3


@pytest.mark.parametrize("after_vllm", [False, True])
def test_torch_computes_on_so_many_threads_and_then_as_before(
    after_vllm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if after_vllm:  # which leaves this behind in a process that held one of its engines
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    before = torch.get_num_threads()
    with computing_on(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
