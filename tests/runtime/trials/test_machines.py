"""Costs of another machine: refused, mixed where that is asked for, or scaled by a few runs made again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from metier.agents.errors import ProfileError
from metier.router.assignment import Assignment
from metier.router.probing.evaluator import Evaluator, OnOutcome
from metier.router.probing.journal import Journal
from metier.router.probing.outcomes import AskCost, Outcome
from metier.router.probing.profile import Profile, TokenCost
from metier.router.space import Candidate, Part, Space
from metier.runtime.trials.machines import check_machines, rescaled
from metier.specializers.machine.machine import Machine

HERE = Machine(processor="Here", capabilities=("avx2",), cores=2, vllm="0.32.0+cpu", dtype="float32")
THERE = HERE.model_copy(update={"processor": "There", "capabilities": ("avx2", "avx512f")})
PART, BASE = Part("solver", "all"), Candidate("base")


def profile(machine: Machine, **fields: object) -> Profile:
    given = {"key": "k", "workflow": "w", "tasks": "t", "incumbent": "i", "role": "solver", "n": 1, "quality": 1.0}
    return Profile.model_validate({**given, "quality_interval": (1.0, 1.0), "machine": machine, **fields})


def test_other_machines_are_refused_with_what_differs() -> None:
    notes: list[str] = []
    assert check_machines([profile(HERE)], HERE, mix=False, on_note=notes.append)
    assert not notes
    with pytest.raises(ProfileError, match="measured on There.*processor Here, not There.*capabilities avx2, not avx2"):
        check_machines([profile(HERE), profile(THERE)], HERE, mix=False, on_note=notes.append)
    assert not check_machines([profile(HERE), profile(THERE)], HERE, mix=True, on_note=notes.append)
    assert check_machines([profile(Machine())], HERE, mix=False, on_note=notes.append)
    assert ["mixed" in note for note in notes] == [True, False] and "unknown" in notes[1]


class Runs:
    """Every run costs so much."""

    def __init__(self, cpu_s: float, seconds: float) -> None:
        self.cost = AskCost(role="solver", variant="base", cpu_s=cpu_s, seconds=seconds)

    async def __call__(self, assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        for task in tasks:
            on_outcome(Outcome(key="", task=task, score=1.0, asks=(self.cost,)))


@pytest.mark.anyio
async def test_costs_are_scaled_by_the_same_runs_made_here() -> None:
    runs: Journal[Outcome] = Journal(None, Outcome)
    space = Space((PART,), {PART: (BASE,)}, {"solver": 1})
    tasks = {str(number): str(number) for number in range(20)}

    def evaluator(runner: Runs) -> Evaluator:
        return Evaluator(space, tasks, runner, runs)

    runs.measure_on(THERE.key)
    await evaluator(Runs(2.0, 8.0)).outcomes({PART: BASE}, list(tasks))
    runs.measure_on(HERE.key)
    token_cost = TokenCost(prefill_cpu_s=1.0, decode_cpu_s=2.0, step_cpu_s=4.0, prefill_s=8.0)
    costs = {"cpu_s": 2.0, "seconds": 8.0, "run_cpu_s": 2.0, "elsewhere_cpu_s": -1.0, "elsewhere_seconds": -4.0}
    given = profile(THERE, token_cost=token_cost, asks=1.0, answer_tokens=5.0, **costs)
    here = evaluator(Runs(6.0, 4.0))
    (found,) = await rescaled([given], {PART: BASE}, here, runs, HERE, on_note=lambda note: None)
    assert here.counts.runs == 6, "a few are enough"
    scaled = {"cpu_s": 6.0, "seconds": 4.0, "run_cpu_s": 6.0, "elsewhere_cpu_s": -3.0, "elsewhere_seconds": -2.0}
    expected = TokenCost(prefill_cpu_s=3.0, decode_cpu_s=6.0, step_cpu_s=12.0, prefill_s=4.0)
    assert found == given.model_copy(update={**scaled, "token_cost": expected, "machine": HERE})
    with pytest.raises(ProfileError, match="--rescale with profiles of 2 machines"):
        await rescaled([given, profile(HERE)], {PART: BASE}, here, runs, HERE, on_note=lambda note: None)
